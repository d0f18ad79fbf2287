//! Does what the plan says. Fails closed: the first step that fails ends everything.

mod helper;
mod outcome;
mod stay;

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use casemate_broker::handover::{self, VERSION};
use casemate_broker::{
    AllowedName, BrokerPolicy, ConnectTarget, Descriptor, Handover, HandoverTable, Kind,
    PassedFile, exit, fdpass,
};
use nix::fcntl::{AtFlags, FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{
    ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, execveat, getpid, getppid, pipe2, setsid,
};

use crate::arguments::{Arguments, GrantKind};
use crate::broker::{self, Child};
use crate::cgroup;
use crate::credentials::{self, Parent};
use crate::error::{Context, Error, Result, refused, say};
use crate::grants::{self, Listener};
use crate::landlock::{self, Domain};
use crate::plan::{Facts, Fork, Step, plan};
use crate::{growth, inherited, namespaces, root, sys, tap};
use outcome::Outcome;
use stay::Stay;

/// Something that the VMM gets by name.
#[derive(Debug)]
struct Named {
    name: String,
    kind: Kind,
    file: Arc<OwnedFd>,
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("step \"{}\": {error}", step.name())]
struct Failure {
    step: Step,
    error: Error,
}

/// What is held while the jail goes up.
#[derive(Debug)]
struct Jail<'a> {
    arguments: &'a Arguments,
    caller: Pid,
    /// `--daemonize`: tells the process that the caller waits for how it went. Closes at exec.
    outcome: Option<Outcome>,
    exec_file: Option<OwnedFd>,
    null: Option<OwnedFd>,
    log: Option<Arc<OwnedFd>>,
    named: Vec<Named>,
    listeners: Vec<(GrantKind, String, Listener)>,
    allowed: Vec<AllowedName>,
    chroot: Option<OwnedFd>,
    cgroups: cgroup::Made,
    /// The other half, for the one that becomes the VMM.
    other_half: Option<OwnedFd>,
    /// For a helper.
    parts: helper::Parts,
}

/// Builds the jail and execs the VMM, or stays as its parent. Returns the exit code.
pub fn run(arguments: &Arguments) -> u8 {
    let facts = match grants::open_chroot(arguments) {
        Ok(chroot) => Facts {
            chroot_exists: chroot.is_some(),
        },
        Err(error) => {
            say(format!("--chroot-base-dir: {error}"));
            return exit::JAIL_FAILED;
        }
    };
    let plan = plan(arguments, facts);
    let mut jail = Jail::new(arguments);
    for step in &plan.shared {
        if *step == Step::Daemonize {
            match jail.daemonize(1 + usize::from(plan.fork.is_some())) {
                Ok(None) => {}
                Ok(Some(code)) => return code,
                Err(error) => return jail.fail(&Failure { step: *step, error }.to_string()),
            }
        } else if let Err(failure) = jail.take(*step) {
            jail.undo();
            return jail.fail(&failure.to_string());
        }
    }
    match plan.fork {
        None => jail.become_vmm(&plan.vmm),
        Some(how) => match jail.split(how) {
            Err(error) => {
                jail.undo();
                jail.fail(&format!("step \"fork\": {error}"))
            }
            Ok(Half::Vmm) => jail.become_vmm(&plan.vmm),
            Ok(Half::Parent(stay)) => stay.run(jail, &plan.parent),
        },
    }
}

/// Which half this process is after the fork.
enum Half {
    Vmm,
    Parent(Box<Stay>),
}

impl<'a> Jail<'a> {
    fn new(arguments: &'a Arguments) -> Self {
        Self {
            arguments,
            // Its number now is not enough: it may have ended already.
            caller: arguments.parent.map_or_else(getppid, Pid::from_raw),
            outcome: None,
            exec_file: None,
            null: None,
            log: None,
            named: Vec::new(),
            listeners: Vec::new(),
            allowed: Vec::new(),
            chroot: None,
            cgroups: cgroup::Made::default(),
            other_half: None,
            parts: helper::Parts::default(),
        }
    }

    /// Reports a failure: to the process that the caller waits for, or else directly.
    fn fail(&mut self, why: &str) -> u8 {
        match &mut self.outcome {
            Some(outcome) => outcome.failed(why),
            None => say(why),
        }
        exit::JAIL_FAILED
    }

    /// One line that is no error, into the log. True if there is a log.
    fn note(&self, text: &str) -> bool {
        if let Some(log) = &self.log {
            let line = format!("casemate-jailer: {text}\n");
            // A log that cannot be written must not keep the machine from starting.
            let _ = nix::unistd::write(log, line.as_bytes());
        }
        self.log.is_some()
    }

    /// A note that the caller is told of if there is no log: it does not get what it asked for.
    fn tell(&self, text: &str) {
        if !self.note(text) {
            say(text);
        }
    }

    fn undo(&mut self) {
        let listeners = self.listeners.iter().map(|(_, _, listener)| listener);
        for listener in listeners.chain(&self.parts.listeners) {
            listener.remove();
        }
        self.cgroups.undo();
    }

    /// Forks; the first process waits for the outcome of so many halves and returns its exit code.
    fn daemonize(&mut self, halves: usize) -> Result<Option<u8>> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).doing("make", "a pipe")?;
        match sys::fork().doing("fork", "for --daemonize")? {
            ForkResult::Child => {
                self.outcome = Some(Outcome::new(write));
                setsid().doing("start", "a session")?;
                Ok(None)
            }
            ForkResult::Parent { .. } => {
                drop(write);
                outcome::wait(read, halves).map(Some)
            }
        }
    }

    fn take(&mut self, step: Step) -> std::result::Result<(), Failure> {
        self.perform(step).map_err(|error| Failure { step, error })
    }

    fn perform(&mut self, step: Step) -> Result<()> {
        let arguments = self.arguments;
        if let Some(helper) = &arguments.helper
            && let Some(done) = self.perform_for_helper(step, helper)
        {
            return done;
        }
        match step {
            Step::CloseDescriptors => self.close_descriptors(),
            Step::Scheduling => inherited::ordinary_scheduling(),
            Step::OpenExecFile => {
                self.exec_file = Some(grants::open_exec_file(&arguments.exec_file)?);
                Ok(())
            }
            Step::OpenDevices => {
                self.null = Some(grants::open_device("/dev/null")?);
                let kvm = grants::open_device("/dev/kvm")?;
                self.name(handover::KVM, Kind::Kvm, kvm);
                if arguments.userfaultfd {
                    let device = grants::open_device("/dev/userfaultfd")?;
                    self.name(handover::USERFAULTFD, Kind::Userfaultfd, device);
                }
                Ok(())
            }
            Step::OpenFiles => {
                for grant in &arguments.grants {
                    let (kind, file) = match grant.kind {
                        GrantKind::ReadOnly => {
                            (Kind::FileRo, grants::open_file(&grant.path, false)?)
                        }
                        GrantKind::ReadWrite => {
                            (Kind::FileRw, grants::open_file(&grant.path, true)?)
                        }
                        GrantKind::Append => (Kind::Append, grants::open_append(&grant.path)?),
                        GrantKind::Connect => (Kind::Stream, grants::connect_to(&grant.path)?),
                        GrantKind::Tap
                        | GrantKind::Listen
                        | GrantKind::Api
                        | GrantKind::ApiSock => continue,
                    };
                    self.name(&grant.name, kind, file);
                }
                Ok(())
            }
            Step::OpenDirectories => {
                self.chroot = grants::open_chroot(arguments)?;
                let open = arguments.allow_open.iter();
                let open = open.map(|path| (path, path, false));
                let create = arguments.allow_create.iter();
                let create = create.map(|created| (&created.name, &created.path, true));
                for (name, path, create) in open.chain(create) {
                    let (directory, file) = grants::open_allowed(path)?;
                    self.allowed.push(AllowedName {
                        name: name.clone(),
                        directory,
                        file,
                        create,
                    });
                }
                Ok(())
            }
            Step::Listen => {
                for grant in &arguments.grants {
                    let path = match grant.kind {
                        GrantKind::Listen | GrantKind::Api => grant.path.clone(),
                        GrantKind::ApiSock if self.chroot.is_some() => {
                            grants::beneath_chroot(arguments, &grant.path)
                        }
                        GrantKind::ApiSock => grant.path.clone(),
                        _ => continue,
                    };
                    let listener = grants::make_listener(&path, arguments.uid, arguments.gid)?;
                    let name = grant.name.clone();
                    self.listeners.push((grant.kind, name, listener));
                }
                Ok(())
            }
            Step::JoinCgroup => cgroup::join(arguments, &mut self.cgroups),
            Step::OpenTaps => {
                if let Some(path) = &arguments.netns {
                    tap::enter_netns(path)?;
                }
                for grant in arguments.grants.iter().filter(|g| g.kind == GrantKind::Tap) {
                    let queues = tap::open_tap(&grant.path.to_string_lossy(), grant.queues)?;
                    for (index, queue) in queues.into_iter().enumerate() {
                        let name = match index {
                            0 => grant.name.clone(),
                            _ => format!("{}:{index}", grant.name),
                        };
                        self.name(&name, Kind::Tap, queue);
                    }
                }
                Ok(())
            }
            Step::Unshare => namespaces::enter_new(),
            Step::EmptyRoot => root::empty(),
            Step::Limits => {
                let mut limits = arguments.limits;
                // What the broker may open later is no disk of today's size. And memory that is shared with a
                // back-end is a file, too: how large it is only the machine config says.
                let shares = self.named.iter().any(|named| named.kind == Kind::Stream);
                let opens = !self.allowed.is_empty() || self.chroot.is_some();
                if limits.fsize.is_none() && !opens && !shares {
                    let disks = self.named.iter().filter(|named| named.kind == Kind::FileRw);
                    let disks = disks.map(|named| named.file.as_fd());
                    let logs = self.named.iter().filter(|named| named.kind == Kind::Append);
                    let logs = logs.map(|named| named.file.as_fd());
                    let logs = logs.chain(self.log.as_ref().map(|log| log.as_fd()));
                    limits.fsize = growth::limit(disks, logs)?;
                }
                for note in credentials::limit(&limits)? {
                    self.tell(&note);
                }
                Ok(())
            }
            Step::BoundingSet | Step::User | Step::Capabilities | Step::NoNewPrivileges => {
                give_up_privileges(arguments, step)
            }
            Step::DieWithParent => credentials::die_with_parent(&match &self.other_half {
                Some(pidfd) => Parent::OtherHalf(pidfd.as_fd()),
                None => Parent::Caller(self.caller),
            }),
            Step::CloseStreams => close_streams(self.null.as_ref(), self.log.as_deref()),
            Step::Landlock => {
                let program = required(self.exec_file.as_ref(), step)?;
                let domain = Domain::Vmm(program.as_fd());
                let note = landlock::enter(&domain, arguments.allow_missing_landlock)?;
                if let Some(note) = note {
                    // The same at every start on an older kernel, so without a log it is not said.
                    self.note(&note);
                }
                Ok(())
            }
            // Done by `become_vmm`, `Stay::run` and `perform_for_helper`, which have what they need.
            Step::Daemonize
            | Step::HandOver
            | Step::Exec
            | Step::Seccomp
            | Step::Serve
            | Step::UserNamespace
            | Step::HelperRoot
            | Step::EnterHelperRoot
            | Step::EnterUserNamespace
            | Step::KeepCapabilities => refused(step.name(), "is not a step of its own"),
        }
    }

    fn name(&mut self, name: &str, kind: Kind, file: OwnedFd) {
        self.named.push(Named {
            name: name.to_owned(),
            kind,
            file: Arc::new(file),
        });
    }

    fn close_descriptors(&mut self) -> Result<()> {
        sys::close_all_but(self.arguments.log_fd).doing("close", "inherited descriptors")?;
        broker::unblock_signals()?;
        sys::default_sigchld().doing("reset", "SIGCHLD")?;
        inherited::reset_personality()?;
        inherited::check_standard_streams()?;
        if let Some(number) = self.arguments.log_fd {
            let Ok(log) = fdpass::adopt(number) else {
                return refused(format!("--log-fd {number}"), "not an open descriptor");
            };
            inherited::check_stream(log.as_fd(), &format!("--log-fd {number}"))?;
            inherited::append_only(log.as_fd())?;
            let log = Arc::new(log);
            self.named.push(Named {
                name: handover::LOG.to_owned(),
                kind: Kind::Log,
                file: Arc::clone(&log),
            });
            self.log = Some(log);
        }
        Ok(())
    }

    /// Forks into the half that becomes the VMM and the half that stays.
    fn split(&mut self, how: Fork) -> Result<Half> {
        let signals = broker::watch_signals()?;
        let me = sys::pidfd_open(getpid()).doing("open", "a descriptor for this process")?;
        let asking = [
            (how.broker, handover::BROKER),
            (how.broker && how.api, handover::CONTROL_BROKER),
        ];
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (_, name) in asking.into_iter().filter(|(asks, _)| *asks) {
            let flags = SockFlag::SOCK_CLOEXEC;
            let (our, their) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
                .doing("make", "the broker's socket pair")?;
            ours.push(our);
            theirs.push((name, their));
        }
        if how.new_pid_ns {
            namespaces::new_pid_for_children()?;
        }
        match sys::fork().doing("fork", "the half that becomes the VMM")? {
            ForkResult::Child => {
                if how.new_pid_ns {
                    broker::hold_back_signals()?;
                } else {
                    broker::unblock_signals()?;
                }
                drop(signals);
                drop(ours);
                for (name, socket) in theirs {
                    self.name(name, Kind::Broker, socket);
                }
                for (_, name, listener) in std::mem::take(&mut self.listeners) {
                    self.name(&name, Kind::Listener, listener.socket);
                }
                self.other_half = Some(me);
                Ok(Half::Vmm)
            }
            ForkResult::Parent { child } => {
                let pidfd = sys::pidfd_open(child).doing("open", "a descriptor for the VMM")?;
                Ok(Half::Parent(Box::new(Stay {
                    policy: self.policy(),
                    sockets: ours,
                    child: Child { pid: child, pidfd },
                    signals,
                })))
            }
        }
    }

    /// What the broker may do, out of what was opened.
    fn policy(&mut self) -> BrokerPolicy {
        let files = self.named.iter().filter_map(|named| {
            let writable = match named.kind {
                Kind::FileRo => false,
                Kind::FileRw => true,
                _ => return None,
            };
            Some(PassedFile {
                name: named.name.clone(),
                file: Arc::clone(&named.file),
                writable,
            })
        });
        BrokerPolicy {
            passed: files.collect(),
            allowed: std::mem::take(&mut self.allowed),
            chroot: self.chroot.take(),
            connections: std::mem::take(&mut self.listeners)
                .into_iter()
                .filter(|(kind, ..)| *kind == GrantKind::Listen)
                .map(|(_, device, listener)| ConnectTarget {
                    device,
                    directory: listener.directory,
                    base_name: listener.base_name,
                })
                .collect(),
            unconfined: false,
            tap: None,
            listen: None,
        }
    }

    fn become_vmm(mut self, steps: &[Step]) -> u8 {
        let mut table = None;
        for step in steps {
            let done = match step {
                Step::HandOver => self.hand_over().map(|memfd| table = Some(memfd)),
                Step::Exec => {
                    if let Some(outcome) = &mut self.outcome {
                        outcome.done();
                    }
                    let executed = if self.arguments.helper.is_some() {
                        self.exec_helper()
                    } else {
                        required(table.as_ref(), *step).and_then(|table| self.exec(table))
                    };
                    executed.map(|never| match never {})
                }
                other => self.perform(*other),
            };
            if let Err(error) = done {
                return self.fail(&Failure { step: *step, error }.to_string());
            }
        }
        // Only if a plan does not end with exec.
        exit::JAIL_FAILED
    }

    /// Writes the table; what it names survives exec from here on.
    fn hand_over(&self) -> Result<OwnedFd> {
        let mut descriptors = Vec::new();
        for named in &self.named {
            keep_over_exec(&named.file, &named.name)?;
            descriptors.push(Descriptor {
                name: named.name.clone(),
                fd: named.file.as_raw_fd(),
                kind: named.kind,
            });
        }
        let table = HandoverTable {
            version: VERSION,
            id: self.arguments.id.clone(),
            jailed: true,
            descriptors,
        };
        Ok(Handover::write_memfd(&table)?)
    }

    fn exec(&self, table: &OwnedFd) -> Result<Infallible> {
        let program = required(self.exec_file.as_ref(), Step::Exec)?;
        let number = table.as_raw_fd().to_string();
        let own = [
            self.arguments.exec_name.as_str(),
            "--id",
            self.arguments.id.as_str(),
            "--handover-fd",
            &number,
        ];
        let own = own.into_iter().map(OsStr::new);
        let all = own.chain(self.arguments.vmm_arguments.iter().map(AsRef::as_ref));
        let arguments: std::result::Result<Vec<CString>, _> = all
            .map(|argument| CString::new(argument.as_bytes()))
            .collect();
        let Ok(arguments) = arguments else {
            return refused("the VMM's arguments", "one contains a NUL");
        };
        let environment: [CString; 0] = [];
        execveat(
            program,
            c"",
            &arguments,
            &environment,
            AtFlags::AT_EMPTY_PATH,
        )
        .doing("execute", self.arguments.exec_file.display().to_string())
    }
}

/// The steps that are the same for both halves.
fn give_up_privileges(arguments: &Arguments, step: Step) -> Result<()> {
    match step {
        Step::BoundingSet => credentials::empty_bounding_set(),
        Step::User => credentials::become_user(arguments.uid, arguments.gid),
        Step::Capabilities => credentials::drop_capabilities(),
        Step::NoNewPrivileges => credentials::no_new_privileges(),
        other => refused(other.name(), "is not a step of this half"),
    }
}

/// What a daemon says on standard error, a refused config or a seccomp violation, goes to its log if it has one.
fn close_streams(null: Option<&OwnedFd>, log: Option<&OwnedFd>) -> Result<()> {
    let null = required(null, Step::CloseStreams)?;
    dup2_stdin(null).doing("close", "standard input")?;
    dup2_stdout(null).doing("close", "standard output")?;
    dup2_stderr(log.unwrap_or(null)).doing("close", "standard error")
}

fn keep_over_exec(file: &OwnedFd, name: &str) -> Result<()> {
    fcntl(file, FcntlArg::F_SETFD(FdFlag::empty()))
        .map(drop)
        .doing("keep open", name)
}

/// What an earlier step has left; none only if the plan lacks that step.
fn required<T>(value: Option<&T>, step: Step) -> Result<&T> {
    match value {
        Some(value) => Ok(value),
        None => refused(step.name(), "the step before it is missing from the plan"),
    }
}
