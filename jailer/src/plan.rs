//! The order in which a jail goes up. Pure: arguments in, steps out; nothing is done here.
//!
//! The jailer is one process until [`Plan::fork`]. What is done before it (cgroup, namespaces, the
//! empty root) holds for both halves at once; what comes after it, each half does for itself.

use crate::arguments::{Arguments, GrantKind, Helper};

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Close all descriptors but 0, 1, 2 and `--log-fd`, which must be streams; default signal mask,
    /// SIGCHLD and personality.
    CloseDescriptors,
    /// `--daemonize`: a session of its own, while the caller's child waits for the outcome.
    Daemonize,
    /// An ordinary process: no real-time scheduling, no negative nice value, no protection from the OOM killer.
    Scheduling,
    /// Open `--exec-file`.
    OpenExecFile,
    /// Open `/dev/kvm` and `/dev/null`, and `/dev/userfaultfd` if it is granted.
    OpenDevices,
    /// Open files that are granted.
    OpenFiles,
    /// Open the directories that the broker will look beneath.
    OpenDirectories,
    /// Make granted listeners.
    Listen,
    /// Make and enter the cgroup.
    JoinCgroup,
    /// Enter `--netns` and open taps there.
    OpenTaps,
    /// A helper's user namespace.
    UserNamespace,
    /// New network, mount, IPC, UTS and cgroup namespaces.
    Unshare,
    /// An empty, read-only root.
    EmptyRoot,
    /// Beside the empty root a helper's: read-only, with what it may see.
    HelperRoot,
    /// Into the helper's root.
    EnterHelperRoot,
    /// Into the helper's user namespace.
    EnterUserNamespace,
    /// Leave the capabilities that the helper was given, and no others.
    KeepCapabilities,
    /// Resource limits.
    Limits,
    /// Empty the capability bounding set, and lock the secure bits.
    BoundingSet,
    /// Groups, gid, uid; an empty session keyring.
    User,
    /// Empty every capability set.
    Capabilities,
    /// SIGKILL when the parent ends.
    DieWithParent,
    /// no_new_privs.
    NoNewPrivileges,
    /// `--daemonize`: 0, 1, 2 become `/dev/null`; 2 the log, if there is one.
    CloseStreams,
    /// A Landlock domain.
    Landlock,
    /// The sealed hand-over table; named descriptors survive exec.
    HandOver,
    /// `execveat`.
    Exec,
    /// The broker's seccomp filter.
    Seccomp,
    /// Answer the VMM, forward signals, wait for its end.
    Serve,
}

impl Step {
    /// What the step is called in an error.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CloseDescriptors => "close descriptors",
            Self::Daemonize => "daemonize",
            Self::Scheduling => "ordinary scheduling",
            Self::OpenExecFile => "open the program",
            Self::OpenDevices => "open devices",
            Self::OpenFiles => "open files",
            Self::OpenDirectories => "open directories",
            Self::Listen => "listen",
            Self::JoinCgroup => "join the cgroup",
            Self::OpenTaps => "open taps",
            Self::Unshare => "new namespaces",
            Self::UserNamespace => "user namespace",
            Self::EmptyRoot => "empty root",
            Self::HelperRoot => "helper's root",
            Self::EnterHelperRoot => "enter the helper's root",
            Self::EnterUserNamespace => "enter the user namespace",
            Self::KeepCapabilities => "keep capabilities",
            Self::Limits => "resource limits",
            Self::BoundingSet => "bounding set",
            Self::User => "drop to the user",
            Self::Capabilities => "drop capabilities",
            Self::DieWithParent => "die with the parent",
            Self::NoNewPrivileges => "no_new_privs",
            Self::CloseStreams => "close standard streams",
            Self::Landlock => "landlock",
            Self::HandOver => "hand over",
            Self::Exec => "exec",
            Self::Seccomp => "seccomp",
            Self::Serve => "serve",
        }
    }

    /// Why it is done, and why here.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::CloseDescriptors => {
                "what the caller left open must not reach the VMM; first, so that every later number is ours"
            }
            Self::Daemonize => {
                "setsid needs a process that leads no group, so it forks: before anything is held"
            }
            Self::Scheduling => {
                "what the caller has would be the guest's: to starve the host of processor time, or to have others killed for its memory. While /proc can be written"
            }
            Self::OpenExecFile => {
                "by descriptor, because the path will not exist in the empty root"
            }
            Self::OpenDevices => "no device node exists in the jail",
            Self::OpenFiles => {
                "with the caller's privileges and mounts; the jail has neither. Bad paths fail before anything is made"
            }
            Self::OpenDirectories => {
                "O_PATH and for the broker alone: a directory's descriptor would be the VMM's way out"
            }
            Self::Listen => {
                "needs the path; the last step that needs one besides cgroups and netns"
            }
            Self::JoinCgroup => {
                "before memory and namespaces are made, so that they are charged to the machine; before the cgroup namespace, which starts here"
            }
            Self::OpenTaps => {
                "a tap is attached by name in its own network namespace; the descriptor works from any"
            }
            Self::Unshare => {
                "after the last host path and interface was used. The network namespace is empty: not even --netns is the VMM's"
            }
            Self::EmptyRoot => {
                "needs CAP_SYS_ADMIN and the mount namespace; before the fork, so that the broker has it too"
            }
            Self::UserNamespace => {
                "its map of ids is written by root, through the host's /proc; before the other namespaces, which so are not its own"
            }
            Self::HelperRoot => {
                "while mounts can be made; what is bound was opened before, and is the same whatever its path leads to now"
            }
            Self::EnterHelperRoot => {
                "by chroot, so that nobody in it gets a user namespace; after the fork, since /proc shows the namespace of whoever mounts it, and the other half needs none of it"
            }
            Self::EnterUserNamespace => {
                "after the last thing that needs a privilege of the host's: from here on every one ends at the helper's own ids"
            }
            Self::KeepCapabilities => {
                "after the change of user, by the capabilities over the namespace; ambient, as the program's file gives none"
            }
            Self::Limits => {
                "after everything is open, before privileges go; for each half after the fork, so that none escapes"
            }
            Self::BoundingSet => {
                "needs CAP_SETPCAP, which the change of user takes away; emptied, so that no exec gains anything"
            }
            Self::User => {
                "groups before gid before uid: each needs a privilege that the next one ends"
            }
            Self::Capabilities => {
                "the change of user empties the effective set alone for sure: empty and check them all"
            }
            Self::DieWithParent => {
                "first of all for the caller, who cannot clean up after itself; again after the change of user, which clears it: for a VMM with a broker that is the parent, which may have died before"
            }
            Self::NoNewPrivileges => {
                "Landlock and seccomp ask for it, and it must hold across exec"
            }
            Self::CloseStreams => "last of what can fail with a message, so that messages are seen",
            Self::Landlock => {
                "the wall for a descriptor that leads somewhere; after mounts, which it forbids"
            }
            Self::HandOver => {
                "until here every descriptor closes at exec: only what the table names survives. After the fork, which makes the broker's socket; before the limits, which hold for the table's memory, too"
            }
            Self::Exec => "with an empty environment, from the descriptor",
            Self::Seccomp => "after the last call that only set-up needs",
            Self::Serve => "in the same jail as the VMM, and with less",
        }
    }
}

/// What only a look at the host tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The operator's chroot exists.
    pub chroot_exists: bool,
}

/// All steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Before the fork, or all of them if there is none.
    pub shared: Vec<Step>,
    /// Whether and how to fork.
    pub fork: Option<Fork>,
    /// By the half that becomes the VMM.
    pub vmm: Vec<Step>,
    /// By the half that stays.
    pub parent: Vec<Step>,
}

/// The jailer's two halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The VMM gets a PID namespace of its own.
    pub new_pid_ns: bool,
    /// The half that stays answers requests.
    pub broker: bool,
    /// Also those of the VMM's control thread.
    pub api: bool,
}

/// Orders the steps.
pub fn plan(arguments: &Arguments, facts: Facts) -> Plan {
    if let Some(helper) = &arguments.helper {
        return plan_helper(arguments, helper);
    }
    let has = |kind| arguments.grants.iter().any(|grant| grant.kind == kind);
    let api = has(GrantKind::Api) || has(GrantKind::ApiSock);
    // Requests of the API name files, too.
    let listens = has(GrantKind::Listen) || api;
    let allows = !arguments.allow_open.is_empty() || !arguments.allow_create.is_empty();
    let looks_beneath = facts.chroot_exists || allows;
    // No broker runs for a VM that needs none.
    let broker = listens || looks_beneath;
    let fork = (broker || arguments.new_pid_ns).then_some(Fork {
        new_pid_ns: arguments.new_pid_ns,
        broker,
        api,
    });
    let files = [
        GrantKind::ReadOnly,
        GrantKind::ReadWrite,
        GrantKind::Append,
        GrantKind::Connect,
    ]
    .into_iter()
    .any(has);
    let cgroup = wants_cgroup(arguments);
    let mut shared = first(arguments);
    shared.extend(steps(&[
        (files, Step::OpenFiles),
        (broker, Step::OpenDirectories),
        (listens, Step::Listen),
        (cgroup, Step::JoinCgroup),
        (
            has(GrantKind::Tap) || arguments.netns.is_some(),
            Step::OpenTaps,
        ),
        (true, Step::Unshare),
        (true, Step::EmptyRoot),
    ]));
    let forked = fork.is_some();
    let vmm = steps(&[
        (true, Step::HandOver),
        (true, Step::Limits),
        (true, Step::BoundingSet),
        (true, Step::User),
        (true, Step::Capabilities),
        (forked || arguments.die_with_parent, Step::DieWithParent),
        (true, Step::NoNewPrivileges),
        (true, Step::Landlock),
        (arguments.daemonize, Step::CloseStreams),
        (true, Step::Exec),
    ]);
    Plan {
        shared,
        fork,
        vmm,
        parent: if forked {
            parent(arguments)
        } else {
            Vec::new()
        },
    }
}

/// Orders the steps of a helper's jail. It always has a PID namespace, so there always is a half that stays.
fn plan_helper(arguments: &Arguments, helper: &Helper) -> Plan {
    let mut shared = first(arguments);
    shared.extend(steps(&[
        (!helper.binds.is_empty(), Step::OpenFiles),
        (!helper.listeners.is_empty(), Step::Listen),
        (wants_cgroup(arguments), Step::JoinCgroup),
        (true, Step::UserNamespace),
        (true, Step::Unshare),
        (true, Step::HelperRoot),
    ]));
    let fork = Fork {
        new_pid_ns: true,
        broker: false,
        api: false,
    };
    let vmm = steps(&[
        (true, Step::EnterHelperRoot),
        (true, Step::Limits),
        (true, Step::EnterUserNamespace),
        (true, Step::User),
        (true, Step::KeepCapabilities),
        (true, Step::DieWithParent),
        (true, Step::NoNewPrivileges),
        (true, Step::Landlock),
        (arguments.daemonize, Step::CloseStreams),
        (true, Step::Seccomp),
        (true, Step::Exec),
    ]);
    let enter = [Step::EmptyRoot];
    Plan {
        shared,
        fork: Some(fork),
        vmm,
        parent: enter.into_iter().chain(parent(arguments)).collect(),
    }
}

/// How every jail begins.
fn first(arguments: &Arguments) -> Vec<Step> {
    steps(&[
        (true, Step::CloseDescriptors),
        (arguments.die_with_parent, Step::DieWithParent),
        (arguments.daemonize, Step::Daemonize),
        (true, Step::Scheduling),
        (true, Step::OpenExecFile),
        (true, Step::OpenDevices),
    ])
}

/// What the half that stays does in every jail.
fn parent(arguments: &Arguments) -> Vec<Step> {
    steps(&[
        (true, Step::Limits),
        (true, Step::BoundingSet),
        (true, Step::User),
        (true, Step::Capabilities),
        (arguments.die_with_parent, Step::DieWithParent),
        (true, Step::NoNewPrivileges),
        (true, Step::Landlock),
        (arguments.daemonize, Step::CloseStreams),
        (true, Step::Seccomp),
        (true, Step::Serve),
    ])
}

fn wants_cgroup(arguments: &Arguments) -> bool {
    !arguments.cgroups.is_empty() || arguments.parent_cgroup.is_some()
}

fn steps(all: &[(bool, Step)]) -> Vec<Step> {
    let wanted = all.iter().filter(|(wanted, _)| *wanted);
    wanted.map(|(_, step)| *step).collect()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::arguments::{Command, parse};

    fn planned(more: &str, facts: Facts) -> Plan {
        let text = format!("--id a --exec-file /v --uid 5 --gid 5 {more}");
        match parse(text.split_whitespace().map(OsString::from)).unwrap() {
            Command::Run(arguments) => plan(&arguments, facts),
            other => panic!("{other:?}"),
        }
    }

    fn everything() -> Plan {
        planned(
            "--grant-ro /a --grant-rw /b --grant-tap t --grant-listen /l --allow-open /o \
             --cgroup memory.max=1 --netns /n --new-pid-ns --daemonize",
            Facts {
                chroot_exists: true,
            },
        )
    }

    /// Asserts that the steps occur in this order.
    fn in_order(steps: &[Step], wanted: &[Step]) {
        let mut at = steps.iter();
        for step in wanted {
            assert!(at.any(|other| other == step), "{step:?} in {steps:?}");
        }
    }

    #[test]
    fn the_whole_order() {
        use Step::*;
        let plan = everything();
        assert_eq!(
            plan.shared,
            [
                CloseDescriptors,
                Daemonize,
                Scheduling,
                OpenExecFile,
                OpenDevices,
                OpenFiles,
                OpenDirectories,
                Listen,
                JoinCgroup,
                OpenTaps,
                Unshare,
                EmptyRoot
            ]
        );
        assert_eq!(
            plan.vmm,
            [
                HandOver,
                Limits,
                BoundingSet,
                User,
                Capabilities,
                DieWithParent,
                NoNewPrivileges,
                Landlock,
                CloseStreams,
                Exec
            ]
        );
        assert_eq!(
            plan.parent,
            [
                Limits,
                BoundingSet,
                User,
                Capabilities,
                NoNewPrivileges,
                Landlock,
                CloseStreams,
                Seccomp,
                Serve
            ]
        );
    }

    #[test]
    fn no_broker_without_need() {
        let plan = planned("--grant-ro /a --grant-tap t", Facts::default());
        assert_eq!(plan.fork, None);
        assert!(plan.parent.is_empty());
        assert!(!plan.vmm.contains(&Step::DieWithParent));
        for (more, facts) in [
            ("--grant-listen /l", Facts::default()),
            ("--grant-api /l", Facts::default()),
            ("-- --api-sock /l", Facts::default()),
            ("--allow-open /o", Facts::default()),
            ("--allow-create /o", Facts::default()),
            (
                "",
                Facts {
                    chroot_exists: true,
                },
            ),
        ] {
            let fork = planned(more, facts).fork.unwrap();
            assert!(fork.broker && !fork.new_pid_ns);
        }
        let fork = planned("--new-pid-ns", Facts::default()).fork.unwrap();
        assert!(!fork.broker && fork.new_pid_ns);
    }

    #[test]
    fn every_wall_stands_in_every_plan_and_in_both_halves() {
        use Step::*;
        let all = [
            planned("", Facts::default()),
            planned("--new-pid-ns", Facts::default()),
            planned("--die-with-parent", Facts::default()),
            everything(),
        ];
        for plan in &all {
            in_order(
                &plan.shared,
                &[CloseDescriptors, Scheduling, Unshare, EmptyRoot],
            );
            let walls = [
                Limits,
                BoundingSet,
                User,
                Capabilities,
                NoNewPrivileges,
                Landlock,
            ];
            in_order(&plan.vmm, &walls);
            assert_eq!(plan.vmm.last(), Some(&Exec));
            if plan.fork.is_some() {
                in_order(&plan.parent, &walls);
                in_order(&plan.parent, &[Landlock, Seccomp, Serve]);
                // A uid change clears it.
                in_order(&plan.vmm, &[User, DieWithParent]);
            }
        }
    }

    fn planned_helper(more: &str) -> Plan {
        let text = format!("helper --id a --exec-file /v --uid 5 --gid 5 {more}");
        match parse(text.split_whitespace().map(OsString::from)).unwrap() {
            Command::Run(arguments) => plan(&arguments, Facts::default()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_helpers_jail_has_every_wall_too() {
        use Step::*;
        for more in [
            "",
            "--bind-ro /a --listen /l --cgroup memory.max=1 --daemonize --proc",
        ] {
            let plan = planned_helper(more);
            let shared = [
                CloseDescriptors,
                Scheduling,
                OpenExecFile,
                UserNamespace,
                Unshare,
                HelperRoot,
            ];
            in_order(&plan.shared, &shared);
            let fork = plan.fork.unwrap();
            assert!(fork.new_pid_ns && !fork.broker);
            in_order(
                &plan.vmm,
                &[
                    EnterHelperRoot,
                    Limits,
                    EnterUserNamespace,
                    User,
                    KeepCapabilities,
                    DieWithParent,
                    NoNewPrivileges,
                    Landlock,
                    Seccomp,
                    Exec,
                ],
            );
            assert_eq!(plan.vmm.last(), Some(&Exec));
            let walls = [
                EmptyRoot,
                Limits,
                BoundingSet,
                User,
                Capabilities,
                NoNewPrivileges,
                Landlock,
                Seccomp,
            ];
            in_order(&plan.parent, &walls);
            for step in plan.shared.iter().chain(&plan.vmm).chain(&plan.parent) {
                assert!(!step.reason().is_empty() && !step.name().is_empty());
            }
        }
        in_order(
            &planned_helper("--bind-ro /a --listen /l").shared,
            &[OpenFiles, Listen, Unshare],
        );
    }

    #[test]
    fn a_caller_that_must_outlive_the_vmm_is_watched_from_the_start() {
        use Step::*;
        let plan = planned("--die-with-parent", Facts::default());
        assert_eq!(plan.shared.get(1), Some(&DieWithParent));
        in_order(&plan.vmm, &[User, DieWithParent]);
    }

    #[test]
    fn every_step_has_a_reason() {
        let plan = everything();
        for step in plan.shared.iter().chain(&plan.vmm).chain(&plan.parent) {
            assert!(!step.reason().is_empty() && !step.name().is_empty());
        }
    }
}
