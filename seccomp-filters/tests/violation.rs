//! Real filters in a real kernel: each test starts this binary again as a child, which enters a
//! filter and does what it must not. The child's last words and exit code are the evidence.

use std::fs::File;
use std::process::{Command, Output};

use casemate_seccomp_filters::{EXIT_VIOLATION, Role, Stage, install, install_violation_reporter};

/// Set in the child.
const CHILD: &str = "CASEMATE_SECCOMP_TEST_CHILD";

/// In the parent: runs the test called `name` in a child and returns how that ended. In the child:
/// runs `body` in a thread called `vcpu7`, and returns nothing.
fn in_a_child(name: &str, body: fn()) -> Option<Output> {
    if std::env::var_os(CHILD).is_some() {
        install_violation_reporter().unwrap();
        let thread = std::thread::Builder::new().name("vcpu7".into());
        thread.spawn(body).unwrap().join().unwrap();
        return None;
    }
    let this = std::env::current_exe().unwrap();
    let child = Command::new(this)
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, "1")
        .output();
    Some(child.unwrap())
}

fn assert_violation(output: &Output, line: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(EXIT_VIOLATION), "{stderr}");
    let reports: Vec<_> = stderr
        .lines()
        .filter(|line| line.starts_with("seccomp violation"))
        .collect();
    assert_eq!(reports.len(), 1, "{stderr}");
    assert!(reports[0].starts_with(line), "{stderr}");
}

#[test]
fn opening_a_file_is_reported() {
    let outcome = in_a_child("opening_a_file_is_reported", || {
        install(Role::Vcpu, Stage::Sealed).unwrap();
        let _ = File::open("/etc/passwd");
    });
    if let Some(output) = outcome {
        let line = "seccomp violation: thread vcpu7 called openat (257) with 0xffffff9c, 0x";
        assert_violation(&output, line);
    }
}

#[test]
fn a_thread_that_holds_locks_is_reported() {
    let outcome = in_a_child("a_thread_that_holds_locks_is_reported", || {
        let _stderr = std::io::stderr().lock();
        let _stdout = std::io::stdout().lock();
        install(Role::Device, Stage::Sealed).unwrap();
        let _ = std::net::TcpListener::bind("127.0.0.1:0");
    });
    if let Some(output) = outcome {
        let line = "seccomp violation: thread vcpu7 called socket (41) with 0x2, 0x80001, 0x";
        assert_violation(&output, line);
    }
}

#[test]
fn sealing_takes_away_what_setup_allowed() {
    let outcome = in_a_child("sealing_takes_away_what_setup_allowed", || {
        install(Role::Control, Stage::Setup).unwrap();
        let started = std::thread::spawn(|| {
            install(Role::Vcpu, Stage::Sealed).unwrap();
            vec![1_u8; 1 << 20].len()
        });
        assert_eq!(started.join().unwrap(), 1 << 20);
        println!("a sealed thread ran and ended");
        install(Role::Control, Stage::Sealed).unwrap();
        let refused = std::thread::Builder::new().spawn(|| ()).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        let refused = Command::new("/bin/true").spawn().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        let _ = std::net::UdpSocket::bind("127.0.0.1:0");
    });
    if let Some(output) = outcome {
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(stdout.contains("a sealed thread ran and ended"), "{stdout}");
        assert_violation(
            &output,
            "seccomp violation: thread vcpu7 called socket (41)",
        );
    }
}

#[test]
fn a_blocked_sigsys_is_unblocked() {
    let outcome = in_a_child("a_blocked_sigsys_is_unblocked", || {
        block_all_signals();
        install(Role::Vcpu, Stage::Sealed).unwrap();
        let _ = File::open("/etc/passwd");
    });
    if let Some(output) = outcome {
        assert_violation(
            &output,
            "seccomp violation: thread vcpu7 called openat (257)",
        );
    }
}

#[test]
fn a_32_bit_call_is_reported() {
    let outcome = in_a_child("a_32_bit_call_is_reported", || {
        install(Role::Vcpu, Stage::Sealed).unwrap();
        call_32_bit(295, 0x11, 0x22);
    });
    let Some(output) = outcome else { return };
    use std::os::unix::process::ExitStatusExt as _;
    if output.status.signal() == Some(libc::SIGSEGV) {
        eprintln!("this kernel has no 32-bit calls");
        return;
    }
    let line = "seccomp violation: thread vcpu7 called unknown of the 32-bit ABI (295) with 0x11, 0x22, 0x";
    assert_violation(&output, line);
}

#[test]
fn a_call_of_x32_is_reported() {
    let outcome = in_a_child("a_call_of_x32_is_reported", || {
        install(Role::Vcpu, Stage::Sealed).unwrap();
        close_by_x32();
    });
    if let Some(output) = outcome {
        let line =
            "seccomp violation: thread vcpu7 called unknown of x32 (1073741827) with 0x63, 0x";
        assert_violation(&output, line);
    }
}

#[test]
fn an_abort_ends_as_an_abort_does() {
    let outcome = in_a_child("an_abort_ends_as_an_abort_does", || {
        install(Role::Device, Stage::Sealed).unwrap();
        std::process::abort();
    });
    if let Some(output) = outcome {
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    }
}

#[allow(unsafe_code)] // An attack that no safe call offers.
fn call_32_bit(number: u32, first: u32, second: u32) {
    // SAFETY: `int 0x80` enters the kernel, which refuses the call before it looks at arguments.
    // RBX belongs to the compiler, so it is exchanged and put back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {first}",
            "int 0x80",
            "xchg rbx, {first}",
            first = inout(reg) u64::from(first) => _,
            inout("rax") u64::from(number) => _,
            in("rcx") u64::from(second),
            lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
        );
    }
}

#[allow(unsafe_code)] // An attack that no safe call offers.
fn close_by_x32() {
    // SAFETY: the descriptor does not exist, so not even an allowed call would do anything.
    unsafe { libc::syscall(0x4000_0000 | libc::SYS_close, 0x63) };
}

#[allow(unsafe_code)] // The standard library has no words for signal masks.
fn block_all_signals() {
    // SAFETY: sigset_t is plain data that sigfillset initializes.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
}
