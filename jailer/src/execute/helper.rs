//! The steps that a helper's jail takes otherwise than a VMM's.

use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use casemate_seccomp_filters::{Role, Stage};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{execve, getegid, geteuid};

use super::{Jail, required};
use crate::arguments::Helper;
use crate::broker;
use crate::credentials;
use crate::error::{Context, Result, refused};
use crate::grants::{self, Listener};
use crate::helper::program::Program;
use crate::helper::root::{self as binds, Bind, Use};
use crate::helper::users;
use crate::landlock::{self, Domain, HelperRule};
use crate::plan::Step;
use crate::{root, sys};

/// The first descriptor that a helper has beside its streams.
const FIRST_LISTENER: RawFd = 3;
const NULL: &str = "/dev/null";
/// Above every number that listeners will have.
const ASIDE: RawFd = 64;

/// What is held for a helper.
#[derive(Debug, Default)]
pub(super) struct Parts {
    binds: Vec<Bind>,
    /// Where its loader has to look.
    library_path: OsString,
    pub(super) listeners: Vec<Listener>,
    namespace: Option<OwnedFd>,
}

impl Jail<'_> {
    /// Takes the step as a helper's jail takes it. None if that is as a VMM's.
    pub(super) fn perform_for_helper(&mut self, step: Step, helper: &Helper) -> Option<Result<()>> {
        let arguments = self.arguments;
        Some(match step {
            Step::OpenExecFile => self.open_program(),
            Step::OpenDevices => self.open_null(),
            Step::OpenFiles => self.open_binds(helper),
            Step::Listen => self.listen(helper),
            Step::UserNamespace => users::make(arguments.uid, arguments.gid, helper.ids)
                .map(|namespace| self.parts.namespace = Some(namespace)),
            Step::HelperRoot => binds::check(&self.parts.binds)
                .and_then(|()| root::with_helper(&self.parts.binds, helper.proc)),
            Step::EnterHelperRoot => root::enter_helper(helper.proc),
            Step::Limits => self.helper_limits(),
            Step::EnterUserNamespace => {
                required(self.parts.namespace.as_ref(), step).and_then(users::enter)
            }
            Step::User => credentials::become_user(0, 0),
            Step::KeepCapabilities => users::keep_capabilities(&helper.capabilities),
            Step::Landlock => self.helper_landlock(helper),
            Step::Seccomp => {
                casemate_seccomp_filters::install(Role::Backend, Stage::Sealed).map_err(Into::into)
            }
            _ => return None,
        })
    }

    fn open_program(&mut self) -> Result<()> {
        let program = Program::open(&self.arguments.exec_file)?;
        let placed = [&program.executable].into_iter().chain(&program.libraries);
        for placed in placed {
            let bind = Bind::new(&placed.path, &placed.file, Use::Execute)?;
            self.parts.binds.push(bind);
        }
        let path = program.library_path.iter().map(|path| path.as_os_str());
        self.parts.library_path = path.collect::<Vec<_>>().join(OsStr::new(":"));
        Ok(())
    }

    /// The one device that every program counts on.
    fn open_null(&mut self) -> Result<()> {
        let null = grants::open_device(NULL)?;
        let bind = Bind::new(NULL.as_ref(), &null, Use::Device)?;
        self.parts.binds.push(bind);
        self.null = Some(null);
        Ok(())
    }

    fn open_binds(&mut self, helper: &Helper) -> Result<()> {
        for (write, path) in &helper.binds {
            let file = grants::open_bind(path, *write)?;
            let stat = fstat(&file).doing("look at", path.display().to_string())?;
            let usage = match (write, grants::file_type(&stat)) {
                (_, SFlag::S_IFBLK) => Use::Device,
                (true, _) => Use::Write,
                (false, _) => Use::Read,
            };
            self.parts.binds.push(Bind::new(path, &file, usage)?);
        }
        // While nothing is made.
        binds::check(&self.parts.binds)
    }

    fn listen(&mut self, helper: &Helper) -> Result<()> {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        for path in &helper.listeners {
            let listener = grants::make_listener(path, uid, gid)?;
            self.parts.listeners.push(listener);
            // A program that was made for it waits in accept(2).
            if let Some(listener) = self.parts.listeners.last() {
                fcntl(&listener.socket, FcntlArg::F_SETFL(OFlag::empty()))
                    .doing("set flags of", path.display().to_string())?;
            }
        }
        Ok(())
    }

    fn helper_limits(&mut self) -> Result<()> {
        // Held back since the fork, for a VMM, which asks for them.
        broker::unblock_signals()?;
        for note in credentials::limit(&self.arguments.limits)? {
            self.tell(&note);
        }
        Ok(())
    }

    /// What is bound, by the paths that it has in the jail.
    fn helper_landlock(&self, helper: &Helper) -> Result<()> {
        let at = |path: &std::path::Path| {
            let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
            open(path, flags, Mode::empty()).doing("open", path.display().to_string())
        };
        let mut rules = Vec::new();
        for bind in &self.parts.binds {
            rules.push(HelperRule {
                file: at(&bind.path)?,
                usage: bind.usage,
                directory: bind.is_directory(),
            });
        }
        if helper.proc {
            for (path, directory) in binds::OWN_PROC.into_iter().zip([true, false]) {
                rules.push(HelperRule {
                    file: at(path.as_ref())?,
                    usage: Use::Read,
                    directory,
                });
            }
        }
        let note = landlock::enter(
            &Domain::Helper(rules),
            self.arguments.allow_missing_landlock,
        )?;
        if let Some(note) = note {
            self.note(&note);
        }
        Ok(())
    }

    /// Executes the program, by the path that it has in the jail.
    pub(super) fn exec_helper(&mut self) -> Result<std::convert::Infallible> {
        let program = self.arguments.exec_file.as_os_str();
        let all = [program]
            .into_iter()
            .chain(self.arguments.vmm_arguments.iter().map(AsRef::as_ref));
        let text = |text: &OsStr| match CString::new(text.as_bytes()) {
            Ok(text) => Ok(text),
            Err(_) => refused("the program's arguments", "one contains a NUL"),
        };
        let arguments = all.map(text).collect::<Result<Vec<_>>>()?;
        let mut environment = Vec::new();
        if !self.parts.library_path.is_empty() {
            let mut variable = OsString::from("LD_LIBRARY_PATH=");
            variable.push(&self.parts.library_path);
            environment.push(text(&variable)?);
        }
        let path = text(program)?;
        self.place_listeners()?;
        execve(&path, &arguments, &environment)
            .doing("execute", self.arguments.exec_file.display().to_string())
    }

    /// 3 and on, in the order of the options.
    fn place_listeners(&mut self) -> Result<()> {
        let mut aside = Vec::new();
        for listener in &self.parts.listeners {
            let socket = sys::duplicate_from(listener.socket.as_fd(), ASIDE);
            aside.push(socket.doing("move", "a listener")?);
        }
        for (number, socket) in (FIRST_LISTENER..).zip(&aside) {
            sys::duplicate_as(socket.as_fd(), number).doing("place", "a listener")?;
        }
        Ok(())
    }
}
