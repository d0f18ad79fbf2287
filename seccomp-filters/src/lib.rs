//! Seccomp policies: which system calls each role may make, in which stage, and why.
//!
//! The policies are `policy/x86_64/*.json`, one file per role over `common.json`, and over
//! `brokers.json` for the two brokers. The build
//! compiles them to BPF [`Template`]s; [`install()`] fills in what only the running process knows
//! and enters the filter. What a policy does not allow raises SIGSYS, which
//! [`install_violation_reporter`] turns into one line on standard error and exit code 159. A call
//! by another architecture's ABI, x32's included, kills the process at once.
//!
//! Filters stack: the kernel asks all of a thread's filters and takes the strictest answer.
//! Therefore the `setup` policy of a role contains its `sealed` one, and that of a role which
//! starts threads contains theirs too.

mod explain;
mod install;

pub use explain::Explanation;
pub use install::{Error, install, install_violation_reporter};
pub use libc::sock_filter;

/// Exit code of a process that a violation ended: 128 + SIGSYS, as a shell would report it.
pub const EXIT_VIOLATION: i32 = 159;

/// What a thread or process is there for, which decides what it may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The VMM's control thread.
    Control,
    /// The same in a VMM that is built with a debugger's stub; sealed, it is [`Role::Control`].
    Debugged,
    /// The VMM's thread that runs virtio devices.
    Device,
    /// A VMM's thread that runs one vCPU.
    Vcpu,
    /// The VMM's thread that writes the guest's console to standard output.
    Console,
    /// The thread of such a VMM that speaks with gdb.
    Gdb,
    /// The VMM's worker for prefault and snapshot.
    Helper,
    /// The VMM's thread that waits for the end of whoever brings its memory.
    Watcher,
    /// The jailer's process beside a VMM that opens and connects for it.
    Broker,
    /// The same beside a VMM without a jail.
    UnjailedBroker,
    /// The `casemate` process that moves a command's streams.
    Monitor,
    /// A process that unpacks a kernel from one open descriptor to another.
    Unpacker,
    /// A process that unpacks an archive below one directory.
    Archive,
    /// The `casemate` process that brings a restored machine's pages.
    PageHandler,
    /// The `casemate` process that carries a machine from one VMM to another.
    Migration,
    /// A program beside a VMM, in a jail of its own.
    Backend,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 16] = [
        Role::Control,
        Role::Debugged,
        Role::Device,
        Role::Vcpu,
        Role::Console,
        Role::Gdb,
        Role::Helper,
        Role::Watcher,
        Role::Broker,
        Role::UnjailedBroker,
        Role::Monitor,
        Role::Unpacker,
        Role::Archive,
        Role::PageHandler,
        Role::Migration,
        Role::Backend,
    ];
    /// The roles whose threads make up a VMM. Threads share memory, so against a takeover the
    /// union of these policies is what counts.
    pub const VMM: [Role; 6] = [
        Role::Control,
        Role::Device,
        Role::Vcpu,
        Role::Console,
        Role::Helper,
        Role::Watcher,
    ];

    /// The name of the policy file.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Control => "control",
            Role::Debugged => "debugged",
            Role::Device => "device",
            Role::Vcpu => "vcpu",
            Role::Console => "console",
            Role::Gdb => "gdb",
            Role::Helper => "helper",
            Role::Watcher => "watcher",
            Role::Broker => "broker",
            Role::UnjailedBroker => "unjailed-broker",
            Role::Monitor => "monitor",
            Role::Unpacker => "unpacker",
            Role::Archive => "archive",
            Role::PageHandler => "page-handler",
            Role::Migration => "migration",
            Role::Backend => "backend",
        }
    }
}

/// How far a thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Nothing hostile runs yet: descriptors are set up and threads are started.
    Setup,
    /// For the rest of the thread's life.
    Sealed,
}

impl Stage {
    /// Both stages, in their order.
    pub const ALL: [Stage; 2] = [Stage::Setup, Stage::Sealed];

    /// The key in the policy file.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Setup => "setup",
            Stage::Sealed => "sealed",
        }
    }
}

/// One rule of a policy.
#[derive(Debug)]
pub struct Rule {
    /// The system call's name.
    pub syscall: &'static str,
    /// Its number on x86_64.
    pub number: i64,
    /// Conditions on its arguments, as written in the policy; all must hold.
    pub conditions: &'static [&'static str],
    /// The error with which the call is answered where no other rule allows it.
    pub errno: Option<&'static str>,
    /// Why the role needs it.
    pub reason: &'static str,
}

/// The compiled policy of a role in a stage, with places left open.
pub struct Template {
    /// Whose policy it is.
    pub role: Role,
    /// In which stage.
    pub stage: Stage,
    /// Who runs under it.
    pub about: &'static str,
    /// What it was compiled from, sorted by name.
    pub rules: &'static [Rule],
    program: Program,
    /// As it was before the build shrank it.
    #[cfg(test)]
    unshrunk: Program,
}

#[derive(Debug)]
struct Program {
    instructions: &'static [sock_filter],
    /// Indices of the instructions whose constant is the process's id.
    tgid_at: &'static [usize],
}

impl Program {
    fn patched(&self, patch: &Patch) -> Vec<sock_filter> {
        let mut program = self.instructions.to_vec();
        for &at in self.tgid_at {
            if let Some(instruction) = program.get_mut(at) {
                instruction.k = patch.tgid;
            }
        }
        program
    }
}

include!(concat!(env!("OUT_DIR"), "/templates.rs"));

/// What only the running process knows.
#[derive(Debug, Clone, Copy)]
pub struct Patch {
    /// The process's id, in its own PID namespace: the `$TGID` of policies.
    pub tgid: u32,
}

impl Patch {
    /// The values of the calling process.
    pub fn of_this_process() -> Self {
        Self {
            tgid: std::process::id(),
        }
    }
}

/// The template of `role` in `stage`.
pub fn template(role: Role, stage: Stage) -> &'static Template {
    TEMPLATES
        .iter()
        .find(|template| template.role == role && template.stage == stage)
        .expect("the build compiles every role in every stage (unit-tested)")
}

/// The filter of `role` in `stage` for the process that `patch` describes.
pub fn program(role: Role, stage: Stage, patch: &Patch) -> Vec<sock_filter> {
    template(role, stage).program.patched(patch)
}

/// The calls that `role` may make in `stage`, whatever the conditions: names, sorted, each once.
pub fn syscalls(role: Role, stage: Stage) -> Vec<&'static str> {
    let allowed = template(role, stage).rules.iter();
    let mut names: Vec<_> = allowed
        .filter(|rule| rule.errno.is_none())
        .map(|rule| rule.syscall)
        .collect();
    names.dedup();
    names
}

/// The policy of `role` in `stage` for people: each call, its conditions, and why it is there.
pub fn explain(role: Role, stage: Stage) -> Explanation {
    Explanation::new(role, stage)
}

/// The name of system call `number` on x86_64.
pub fn syscall_name(number: i64) -> Option<&'static str> {
    let at = SYSCALL_NAMES
        .binary_search_by_key(&number, |(number, _)| *number)
        .ok()?;
    SYSCALL_NAMES.get(at).map(|(_, name)| *name)
}

#[cfg(test)]
mod evaluator;
#[cfg(test)]
mod shrink_tests;
#[cfg(test)]
mod tests;
