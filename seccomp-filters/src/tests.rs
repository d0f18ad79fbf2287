//! The policies, tested by running the compiled filters on calls.

use libc::{SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_TRAP};

use crate::evaluator::{Call, X86_64, run};
use crate::{
    Patch, Role, SYSCALL_NAMES, Stage, explain, program, syscall_name, syscalls, template,
};

const PATCH: Patch = Patch { tgid: 4321 };

fn number(name: &str) -> i64 {
    let call = SYSCALL_NAMES.iter().find(|(_, known)| *known == name);
    call.unwrap_or_else(|| panic!("no call {name}")).0
}

fn verdict(role: Role, stage: Stage, name: &str, args: &[u64]) -> u32 {
    let mut call = Call {
        arch: X86_64,
        number: number(name),
        args: [0; 6],
    };
    call.args[..args.len()].copy_from_slice(args);
    run(&program(role, stage, &PATCH), &call)
}

fn allows(role: Role, stage: Stage, name: &str, args: &[u64]) -> bool {
    verdict(role, stage, name, args) == SECCOMP_RET_ALLOW
}

fn every_policy() -> impl Iterator<Item = (Role, Stage)> {
    Role::ALL
        .into_iter()
        .flat_map(|role| Stage::ALL.map(|stage| (role, stage)))
}

/// Calls that would let a taken-over VMM out of its walls, or add to what it can reach.
const FORBIDDEN: &[&str] = &[
    "open",
    "openat",
    "openat2",
    "creat",
    "open_by_handle_at",
    "name_to_handle_at",
    "socket",
    "socketpair",
    "connect",
    "bind",
    "listen",
    "execve",
    "execveat",
    "clone",
    "clone3",
    "fork",
    "vfork",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "process_madvise",
    "kcmp",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "move_mount",
    "open_tree",
    "fsopen",
    "fsmount",
    "bpf",
    "io_uring_setup",
    "userfaultfd",
    "perf_event_open",
    "keyctl",
    "add_key",
    "request_key",
    "memfd_create",
    "memfd_secret",
    "pidfd_open",
    "pidfd_getfd",
    "pidfd_send_signal",
    "setuid",
    "setgid",
    "setreuid",
    "setregid",
    "setresuid",
    "setresgid",
    "setgroups",
    "setfsuid",
    "setfsgid",
    "capset",
    "unshare",
    "setns",
    "seccomp",
    "personality",
    "modify_ldt",
    "arch_prctl",
    "kill",
    "tkill",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "rt_sigaction",
    "pkey_mprotect",
    "remap_file_pages",
    "shmat",
    "shmget",
    "init_module",
    "finit_module",
    "kexec_load",
    "reboot",
    "unlink",
    "unlinkat",
    "rename",
    "renameat2",
    "linkat",
    "symlinkat",
    "mkdirat",
    "mknodat",
    "fchmod",
    "fchown",
    "ioperm",
    "iopl",
    "prlimit64",
    "setrlimit",
];

#[test]
fn no_sealed_vmm_thread_may_make_a_call_that_leads_out() {
    for role in Role::VMM {
        for name in FORBIDDEN {
            let listed = syscalls(role, Stage::Sealed).contains(name);
            assert!(!listed, "{role:?} lists {name}");
            // While it starts a thread, the C library blocks SIGSYS: an error instead of a trap.
            let expected = match *name {
                "clone" => SECCOMP_RET_ERRNO | libc::EPERM as u32,
                "clone3" => SECCOMP_RET_ERRNO | libc::ENOSYS as u32,
                _ => SECCOMP_RET_TRAP,
            };
            for args in [[0; 6], [u64::MAX; 6]] {
                let verdict = verdict(role, Stage::Sealed, name, &args);
                assert_eq!(verdict, expected, "{role:?} {name}");
            }
        }
    }
}

/// Those of our own programs: a back-end is somebody else's, loaded after it has entered its policy.
fn every_policy_of_ours() -> impl Iterator<Item = (Role, Stage)> {
    every_policy().filter(|(role, _)| *role != Role::Backend)
}

#[test]
fn no_policy_of_ours_allows_an_executable_mapping() {
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    for (role, stage) in every_policy_of_ours() {
        for others in 0..4 {
            let exec = libc::PROT_EXEC as u64 | others;
            for flags in [anonymous, libc::MAP_PRIVATE as u64, libc::MAP_SHARED as u64] {
                let args = [0, 4096, exec, flags, 3, 0];
                assert!(!allows(role, stage, "mmap", &args), "{role:?} {stage:?}");
            }
            let args = [0, 4096, exec];
            assert!(
                !allows(role, stage, "mprotect", &args),
                "{role:?} {stage:?}"
            );
        }
    }
}

/// But for the control thread, which maps files of pmem devices that come.
#[test]
fn sealed_threads_map_private_anonymous_memory_only() {
    let data = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
    for (role, _) in every_policy_of_ours() {
        assert!(allows(
            role,
            Stage::Sealed,
            "mmap",
            &[0, 4096, data, private, u64::MAX, 0]
        ));
        for flags in [
            libc::MAP_SHARED,
            libc::MAP_PRIVATE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED,
            libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_LOCKED,
            libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED,
        ] {
            assert!(!allows(
                role,
                Stage::Sealed,
                "mmap",
                &[0, 4096, data, flags as u64, 3, 0]
            ));
        }
        let file = (libc::MAP_SHARED | libc::MAP_NORESERVE) as u64;
        for (prot, allowed) in [
            (data, is_control(role)),
            (data | libc::PROT_EXEC as u64, false),
        ] {
            let args = [0, 4096, prot, file, 3, 0];
            assert_eq!(
                allows(role, Stage::Sealed, "mmap", &args),
                allowed,
                "{role:?}"
            );
        }
    }
}

fn is_control(role: Role) -> bool {
    matches!(role, Role::Control | Role::Debugged)
}

/// What a debugger's stub needs is there where one is built in, and nowhere else.
#[test]
fn a_debugger_reads_and_stops_vcpus_and_nobody_else_does() {
    for (name, request) in [
        ("KVM_GET_REGS", 0x8090_ae81),
        ("KVM_GET_FPU", 0x81a0_ae8c),
        ("KVM_TRANSLATE", 0xc018_ae85),
        ("KVM_SET_GUEST_DEBUG", 0x4048_ae9b),
    ] {
        let may = |role, stage| allows(role, stage, "ioctl", &[9, request]);
        // A back-end has no vCPU's descriptor, and its policy no list of what may be asked of one.
        for role in Role::ALL.into_iter().filter(|role| *role != Role::Backend) {
            // The thread that saves a machine reads registers, too.
            let saved = name == "KVM_GET_REGS";
            let asks = role == Role::Gdb || saved && role == Role::Helper;
            assert_eq!(may(role, Stage::Sealed), asks, "{name} {role:?}");
            let starts = role == Role::Debugged || saved && role == Role::Control;
            assert_eq!(may(role, Stage::Setup), asks || starts, "{name} {role:?}");
        }
    }
    assert_eq!(
        syscalls(Role::Control, Stage::Sealed),
        syscalls(Role::Debugged, Stage::Sealed)
    );
}

/// A program that was taken over executes nothing but the files of its jail, and starts nothing.
#[test]
fn a_back_end_gets_no_further_than_its_files() {
    let allows = |name, args: &[u64]| allows(Role::Backend, Stage::Sealed, name, args);
    let code = libc::PROT_READ as u64 | libc::PROT_EXEC as u64;
    let (private, anonymous) = (libc::MAP_PRIVATE as u64, libc::MAP_ANONYMOUS as u64);
    assert!(allows("mmap", &[0, 4096, code, private, 3]));
    for refused in [
        [0, 4096, code | libc::PROT_WRITE as u64, private, 3],
        [0, 4096, code, private | anonymous, u64::MAX],
    ] {
        assert!(!allows("mmap", &refused));
    }
    assert!(!allows("mprotect", &[0, 4096, code]));
    assert!(allows("unshare", &[libc::CLONE_FS as u64]));
    for namespace in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET] {
        assert!(!allows("unshare", &[namespace as u64]));
        assert!(!allows("clone", &[namespace as u64]));
    }
    let signal = libc::SIGCHLD as u64;
    assert!(!allows("clone", &[signal]) && !allows("clone", &[0x3d_0f00 | signal]));
    let never = "fork vfork execveat socket connect bind setns mount umount2 pivot_root move_mount open_tree fsopen \
                 fsmount mount_setattr ptrace process_vm_readv process_vm_writev pidfd_open pidfd_getfd bpf \
                 perf_event_open keyctl add_key request_key open_by_handle_at io_uring_setup io_uring_enter \
                 io_uring_register userfaultfd kill tkill init_module kexec_load reboot personality swapon quotactl";
    for name in never.split_whitespace() {
        assert!(!allows(name, &[0; 6]), "{name}");
    }
}

/// All that the violation report itself calls; a refusal in the handler would be a silent death.
#[test]
fn every_policy_allows_the_violation_report() {
    for (role, stage) in every_policy() {
        assert!(allows(role, stage, "prctl", &[libc::PR_GET_NAME as u64]));
        assert!(allows(role, stage, "poll", &[0, 1, 100]));
        assert!(allows(role, stage, "write", &[2]));
        assert!(allows(role, stage, "exit_group", &[159]));
    }
}

#[test]
fn signals_go_to_the_own_process_only() {
    for (role, stage) in every_policy() {
        assert!(allows(role, stage, "tgkill", &[4321, 4322, 34]));
        assert!(!allows(role, stage, "tgkill", &[4320, 4322, 34]));
        assert!(!allows(role, stage, "tgkill", &[0, 4322, 34]));
        // A pid is an int: the kernel ignores the high half, and so must the filter.
        assert!(allows(
            role,
            stage,
            "tgkill",
            &[0xffff_ffff_0000_0000 | 4321, 1, 34]
        ));
    }
}

#[test]
fn a_patch_changes_the_placeholders_and_nothing_else() {
    for (role, stage) in every_policy() {
        let one = program(role, stage, &Patch { tgid: 1 });
        let two = program(role, stage, &Patch { tgid: 2 });
        let differing = one
            .iter()
            .zip(&two)
            .filter(|(one, two)| one.k != two.k)
            .count();
        let rules = template(role, stage).rules.iter();
        let expected = rules
            .flat_map(|rule| rule.conditions)
            .filter(|condition| condition.contains("$TGID"))
            .count();
        assert_eq!(differing, expected);
        assert!(expected > 0);
    }
}

#[test]
fn vcpus_run_the_guest_and_make_no_other_ioctl() {
    const KVM_RUN: u64 = 0xae80;
    const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    assert!(allows(Role::Vcpu, Stage::Sealed, "ioctl", &[9, KVM_RUN]));
    for request in (0..0x1_0000).chain([KVM_SET_USER_MEMORY_REGION, libc::TIOCSTI]) {
        let allowed = allows(Role::Vcpu, Stage::Sealed, "ioctl", &[9, request]);
        assert_eq!(allowed, request == KVM_RUN, "{request:#x}");
    }
    // Setup creates the machine, sealing takes that away; the control thread gives the guest files and takes them back.
    const KVM_CREATE_VCPU: u64 = 0xae41;
    for role in Role::VMM {
        let memory = [9, KVM_SET_USER_MEMORY_REGION];
        let allowed = allows(role, Stage::Sealed, "ioctl", &memory);
        assert_eq!(allowed, role == Role::Control, "{role:?}");
        assert!(!allows(role, Stage::Sealed, "ioctl", &[9, KVM_CREATE_VCPU]));
    }
    for request in [KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION] {
        assert!(allows(Role::Control, Stage::Setup, "ioctl", &[9, request]));
    }
}

/// What a ring may do was settled before the seal. `enter` has no flag that would name another ring or
/// lead past its restrictions, and `register` changes the file in it and nothing else.
#[test]
fn sealed_threads_use_rings_and_neither_make_nor_loosen_them() {
    const FILES_UPDATE: u64 = 6;
    for role in Role::VMM {
        let device = role == Role::Device;
        for flags in 0..64 {
            let enter = allows(role, Stage::Sealed, "io_uring_enter", &[9, 1, 1, flags]);
            assert_eq!(enter, device && flags <= 1, "{role:?} {flags:#x}");
        }
        for opcode in (0..64).chain([1 << 31 | FILES_UPDATE]) {
            let register = allows(role, Stage::Sealed, "io_uring_register", &[9, opcode]);
            assert_eq!(
                register,
                device && opcode == FILES_UPDATE,
                "{role:?} {opcode}"
            );
        }
        assert!(!allows(role, Stage::Sealed, "io_uring_setup", &[128]));
    }
    for opcode in [2, 4, 11, 12, 19] {
        assert!(allows(
            Role::Control,
            Stage::Setup,
            "io_uring_register",
            &[9, opcode]
        ));
    }
    assert!(allows(
        Role::Control,
        Stage::Setup,
        "io_uring_setup",
        &[128]
    ));
    // Personalities, and rings of a kernel thread's own.
    assert!(!allows(
        Role::Control,
        Stage::Setup,
        "io_uring_register",
        &[9, 9]
    ));
}

/// Not every host's KVM has the switch, so a machine that starts does not show it.
/// Interrupts of PCI devices need no route: nobody may set one after the guest's first instruction.
#[test]
fn the_device_thread_alone_sends_messages_and_nobody_routes_interrupts() {
    const KVM_SIGNAL_MSI: u64 = 0x4020_aea5;
    const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
    const KVM_IRQFD: u64 = 0x4020_ae76;
    const KVM_IOEVENTFD: u64 = 0x4040_ae79;
    for role in Role::VMM {
        let sends = allows(role, Stage::Sealed, "ioctl", &[9, KVM_SIGNAL_MSI]);
        assert_eq!(sends, role == Role::Device, "{role:?}");
        for request in [KVM_SET_GSI_ROUTING, KVM_IRQFD, KVM_IOEVENTFD] {
            assert!(!allows(role, Stage::Sealed, "ioctl", &[9, request]));
        }
    }
}

/// A sealed VMM has its userfaultfd, and none of its requests: taking memory out of its reach would show the guest zeroes.
#[test]
fn only_setup_makes_userfaultfds_and_only_a_handler_brings_pages() {
    const IOC_NEW: u64 = 0xaa00;
    const API: u64 = 0xc018_aa3f;
    const REGISTER: u64 = 0xc020_aa00;
    const UNREGISTER: u64 = 0x8010_aa01;
    const COPY: u64 = 0xc028_aa03;
    const ZEROPAGE: u64 = 0xc020_aa04;
    for request in [IOC_NEW, API, REGISTER, UNREGISTER, COPY, ZEROPAGE] {
        let brings = [COPY, ZEROPAGE].contains(&request);
        let allowed = |role, stage| allows(role, stage, "ioctl", &[9, request]);
        assert_eq!(
            allowed(Role::Control, Stage::Setup),
            !brings,
            "{request:#x}"
        );
        assert_eq!(
            allowed(Role::PageHandler, Stage::Sealed),
            brings,
            "{request:#x}"
        );
        for role in Role::VMM {
            assert!(!allowed(role, Stage::Sealed), "{role:?} {request:#x}");
        }
    }
}

/// Who carries a machine reads and writes what it has, and gets nothing else: no other peer, no file.
#[test]
fn a_migration_has_its_connections_and_no_others() {
    const NOSIGNAL: u64 = 0x4000;
    const CLOEXEC: u64 = 0o2_000_000;
    let allowed = |call, args: &[u64]| allows(Role::Migration, Stage::Sealed, call, args);
    assert!(allowed("recvfrom", &[3, 0, 1, 0x40, 0, 0]));
    assert!(allowed("sendto", &[3, 0, 1, NOSIGNAL, 0, 0]));
    assert!(allowed("shutdown", &[3, 1]));
    assert!(allowed("accept4", &[3, 0, 0, CLOEXEC]));
    // To an address, or with a signal at the end.
    assert!(!allowed("sendto", &[3, 0, 1, NOSIGNAL, 4096, 16]));
    assert!(!allowed("sendto", &[3, 0, 1, 0, 0, 0]));
    for call in [
        "socket",
        "connect",
        "bind",
        "listen",
        "openat",
        "sendmsg",
        "recvmsg",
        "setsockopt",
        "ioctl",
    ] {
        assert!(!allowed(call, &[3, 0, 0, 0, 0, 0]), "{call}");
    }
}

#[test]
fn setup_may_take_the_performance_counters_away() {
    const KVM_ENABLE_CAP: [u64; 2] = [9, 0x4068_aea3];
    assert!(allows(
        Role::Control,
        Stage::Setup,
        "ioctl",
        &KVM_ENABLE_CAP
    ));
    for role in Role::VMM {
        assert!(!allows(role, Stage::Sealed, "ioctl", &KVM_ENABLE_CAP));
    }
}

#[test]
fn no_policy_types_into_a_terminal() {
    for (role, stage) in every_policy() {
        assert!(!allows(role, stage, "ioctl", &[0, libc::TIOCSTI]));
        assert!(!allows(role, stage, "ioctl", &[0, libc::TIOCLINUX]));
    }
}

#[test]
fn setup_starts_threads_but_no_processes() {
    // What the C library passes for a thread.
    let thread = 0x3d_0f00;
    assert!(allows(Role::Control, Stage::Setup, "clone", &[thread]));
    for flags in [
        libc::SIGCHLD as u64,
        thread | libc::CLONE_NEWUSER as u64,
        thread & !(libc::CLONE_THREAD as u64),
        0,
    ] {
        let refused = SECCOMP_RET_ERRNO | libc::EPERM as u32;
        let verdict = verdict(Role::Control, Stage::Setup, "clone", &[flags]);
        assert_eq!(verdict, refused, "{flags:#x}");
    }
    let answer = SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    assert_eq!(verdict(Role::Control, Stage::Setup, "clone3", &[]), answer);
}

#[test]
fn the_vmm_opens_nothing_even_in_setup() {
    for role in Role::VMM {
        for name in [
            "open", "openat", "openat2", "socket", "connect", "execve", "ptrace",
        ] {
            assert!(!allows(role, Stage::Setup, name, &[]), "{role:?} {name}");
        }
    }
}

#[test]
fn messages_never_wait_and_never_raise_sigpipe() {
    let receive = libc::MSG_DONTWAIT as u64;
    let send = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
    let receive_descriptors = receive | libc::MSG_CMSG_CLOEXEC as u64;
    for role in [Role::Device, Role::Broker, Role::UnjailedBroker] {
        let recvmsg = |flags| allows(role, Stage::Sealed, "recvmsg", &[5, 0, flags]);
        let sendmsg = |flags| allows(role, Stage::Sealed, "sendmsg", &[5, 0, flags]);
        assert!(recvmsg(receive_descriptors) && !recvmsg(0));
        assert!(sendmsg(send) && !sendmsg(0) && !sendmsg(receive));
        // Fast open is a connect, a zero-copy send keeps the sender's pages, an error queue is no stream.
        for more in [libc::MSG_FASTOPEN, libc::MSG_ZEROCOPY, libc::MSG_OOB] {
            assert!(!sendmsg(send | more as u64), "{role:?} {more:#x}");
        }
        assert!(!recvmsg(receive | libc::MSG_ERRQUEUE as u64));
    }
    // With an address, sendto would be a way around connect.
    let sendto = |address| {
        let args = [5, 0, 9, send, address];
        allows(Role::Monitor, Stage::Sealed, "sendto", &args)
    };
    assert!(sendto(0) && !sendto(0x1000) && !sendto(1 << 32));
}

const BROKERS: [Role; 2] = [Role::Broker, Role::UnjailedBroker];

#[test]
fn a_broker_makes_unix_sockets_only() {
    let kind = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
    for role in BROKERS {
        let socket = |family: i32, kind| {
            let args = [family as u64, kind];
            allows(role, Stage::Sealed, "socket", &args)
        };
        assert!(socket(libc::AF_UNIX, kind));
        // A connect that waits for a host program would hold up every other request.
        assert!(!socket(libc::AF_UNIX, libc::SOCK_STREAM as u64));
        for family in [
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_NETLINK,
            libc::AF_PACKET,
            libc::AF_VSOCK,
        ] {
            assert!(!socket(family, kind));
        }
    }
}

#[test]
fn a_broker_gives_names_to_files_that_it_has_and_takes_them_from_files_alone() {
    for role in BROKERS {
        let allows = |name, args: &[u64]| allows(role, Stage::Sealed, name, args);
        let (empty, follow) = (libc::AT_EMPTY_PATH as u64, libc::AT_SYMLINK_FOLLOW as u64);
        // Without the flag it would link by name, and with the other one through a symbolic link.
        for (flags, allowed) in [(empty, true), (0, false), (follow, false)] {
            assert_eq!(allows("linkat", &[5, 0x1000, 6, 0x2000, flags]), allowed);
        }
        assert!(!allows("linkat", &[5, 0x1000, 6, 0x2000, empty | follow]));
        assert!(allows("unlinkat", &[5, 0x1000, 0]));
        let directory = libc::AT_REMOVEDIR as u64;
        assert!(!allows("unlinkat", &[5, 0x1000, directory]));
        assert!(allows("renameat", &[5, 0x1000, 5, 0x2000]) && allows("fsync", &[5]));
        for name in ["renameat2", "rename", "mkdirat", "mknodat", "symlinkat"] {
            assert!(!allows(name, &[5, 0x1000, 5, 0x2000]), "{role:?} {name}");
        }
        for name in ["getdents64", "fchmod", "fchown", "ftruncate", "syncfs"] {
            assert!(!allows(name, &[5, 0x1000]), "{role:?} {name}");
        }
    }
}

/// Each of the two has what it alone does, and nothing of the other's.
#[test]
fn only_an_unjailed_broker_listens_and_attaches_to_taps() {
    let both = |name, args: &[u64]| BROKERS.map(|role| allows(role, Stage::Sealed, name, args));
    let (bind, listen) = (both("bind", &[5, 0, 20]), both("listen", &[5, 128]));
    assert_eq!([bind, listen], [[false, true]; 2]);
    // The last makes a tap somebody's.
    for (request, unjailed) in [
        (libc::TUNGETIFF, true),
        (libc::TUNSETIFF, true),
        (libc::TUNSETVNETHDRSZ, true),
        (libc::TUNSETOWNER, false),
    ] {
        assert_eq!(both("ioctl", &[5, request]), [false, unjailed]);
    }
}

#[test]
fn only_the_jailers_broker_waits_and_forwards_signals() {
    let both = |name, args: &[u64]| BROKERS.map(|role| allows(role, Stage::Sealed, name, args));
    assert_eq!(both("wait4", &[7]), [true, false]);
    for (signal, forwarded) in [
        (libc::SIGINT, true),
        (libc::SIGTERM, true),
        (libc::SIGKILL, false),
    ] {
        let send = both("pidfd_send_signal", &[5, signal as u64]);
        assert_eq!(send, [forwarded, false], "{signal}");
    }
}

#[test]
fn another_abi_traps() {
    for (role, stage) in every_policy() {
        let program = program(role, stage, &PATCH);
        let read = Call {
            arch: X86_64,
            number: number("read"),
            args: [0; 6],
        };
        assert_eq!(run(&program, &read), SECCOMP_RET_ALLOW);
        let x32 = Call {
            number: read.number | 0x4000_0000,
            ..read
        };
        assert_eq!(run(&program, &x32), SECCOMP_RET_TRAP);
        let i386 = Call {
            arch: 0x4000_0003,
            ..read
        };
        assert_eq!(run(&program, &i386), SECCOMP_RET_TRAP);
        let aarch64 = Call {
            arch: 0xc000_00b7,
            ..read
        };
        assert_eq!(run(&program, &aarch64), SECCOMP_RET_TRAP);
    }
}

/// Whatever the number, and with the arguments all zero or all one: a filter ends with one of the
/// four verdicts, and what the policy does not list traps.
#[test]
fn what_no_rule_lists_traps() {
    for (role, stage) in every_policy() {
        let program = program(role, stage, &PATCH);
        let rules = template(role, stage).rules;
        for number in 0..1024 {
            if rules.iter().any(|rule| rule.number == number) {
                continue;
            }
            for args in [[0; 6], [u64::MAX; 6]] {
                let call = Call {
                    arch: X86_64,
                    number,
                    args,
                };
                assert_eq!(run(&program, &call), SECCOMP_RET_TRAP, "{role:?} {number}");
            }
        }
    }
}

#[test]
fn rules_without_conditions_allow_whatever_the_arguments() {
    for (role, stage) in every_policy() {
        let rules = template(role, stage).rules.iter();
        for rule in rules.filter(|rule| rule.conditions.is_empty() && rule.errno.is_none()) {
            for args in [[0; 6], [u64::MAX; 6]] {
                assert!(
                    allows(role, stage, rule.syscall, &args),
                    "{role:?} {}",
                    rule.syscall
                );
            }
        }
    }
}

/// Threads inherit the setup filter of the thread that starts them, and filters stack.
#[test]
fn setup_allows_what_the_threads_it_starts_may_call() {
    let control: Vec<_> = syscalls(Role::Control, Stage::Setup);
    for role in Role::VMM {
        for name in syscalls(role, Stage::Sealed) {
            assert!(control.contains(&name), "{role:?} {name}");
        }
    }
    assert!(allows(Role::Control, Stage::Setup, "ioctl", &[9, 0xae80]));
}

#[test]
fn policies_explain_themselves() {
    for (role, stage) in every_policy() {
        let text = explain(role, stage).to_string();
        for rule in template(role, stage).rules {
            assert!(text.contains(rule.syscall) && text.contains(rule.reason));
            assert!(!rule.reason.is_empty());
        }
    }
    let vcpu = explain(Role::Vcpu, Stage::Sealed).to_string();
    assert!(
        vcpu.contains("[request == KVM_RUN] The guest runs."),
        "{vcpu}"
    );
}

#[test]
fn calls_have_names() {
    assert_eq!(syscall_name(0), Some("read"));
    assert_eq!(syscall_name(libc::SYS_openat2), Some("openat2"));
    assert_eq!(syscall_name(-1), None);
    assert_eq!(syscall_name(100_000), None);
    assert!(SYSCALL_NAMES.is_sorted());
}

/// The kernel walks a filter on every call whose verdict it could not cache.
#[test]
fn filters_fit_the_kernel() {
    for (role, stage) in every_policy() {
        assert!(template(role, stage).program.instructions.len() <= 4096);
    }
}

/// The table in docs/policies.md: a role, who it is, and how many calls it has in each stage.
#[test]
fn the_documented_counts_are_true() {
    let text = include_str!("../../docs/policies.md");
    for role in Role::ALL {
        let start = format!("| `{}` |", role.name());
        let row = text.lines().find(|line| line.starts_with(&start));
        let row = row.unwrap_or_else(|| panic!("no row for {role:?}"));
        let counts = row.split('|').skip(3).take(2).map(|cell| {
            let digits = cell.trim_matches([' ', '(', ')']);
            digits.parse::<usize>().unwrap()
        });
        let expected = Stage::ALL.map(|stage| syscalls(role, stage).len());
        assert_eq!(counts.collect::<Vec<_>>(), expected, "{role:?}");
    }
}
