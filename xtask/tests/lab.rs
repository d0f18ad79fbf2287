//! The lab, driven as a person drives it.

use std::fs;
use std::process::{Command, Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// On a fresh checkout the first lab downloads a kernel and says so, which is no output of the command's.
fn prepare() {
    static PREPARED: Once = Once::new();
    PREPARED.call_once(|| {
        let done = start(&[], &["true"]).output().unwrap();
        assert_eq!(done.status.code(), Some(0), "{done:?}");
    });
}

fn lab(options: &[&str], command: &[&str]) -> Command {
    prepare();
    start(options, command)
}

fn start(options: &[&str], command: &[&str]) -> Command {
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    xtask
        .arg("lab")
        .args(options)
        .arg("--")
        .args(command)
        .stdin(Stdio::null());
    xtask
}

fn run(command: &[&str]) -> Output {
    lab(&["--timeout", "120"], command).output().unwrap()
}

#[test]
fn streams_arrive_apart_and_exact() {
    // More than a pipe and a frame hold, with bytes that no line discipline would leave alone.
    let script = "i=0; while [ $i -lt 40 ]; do head -c 10000 /bin/busybox; i=$((i+1)); done; \
                  printf 'e\\r\\n\\000' >&2; exit 7";
    let output = run(&["sh", "-c", script]);
    let start = &fs::read("/bin/busybox").unwrap()[..10_000];
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(output.stderr, b"e\r\n\0");
    assert!(
        output.stdout == start.repeat(40),
        "{} bytes",
        output.stdout.len()
    );
}

#[test]
fn it_is_a_clean_host_with_kvm() {
    let script = "grep -q Debian /proc/version && test -c /dev/kvm && test -c /dev/net/tun && \
                  test -d /sys/module/kvm_amd && grep -qw memory /sys/fs/cgroup/cgroup.subtree_control && \
                  grep -q landlock /sys/kernel/security/lsm && modprobe vhost_net && \
                  test $(id -u) = 0 && touch /etc/x && test $CASEMATE_LAB = 1 && \
                  test $(cat /sys/devices/system/node/has_memory) = 0-1 && \
                  (sleep 1000 &) && echo all";
    // The process that it leaves behind, which holds its streams, delays nobody.
    let output = run(&["sh", "-c", script]);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "all\n",
        "{output:?}"
    );
    assert!(!fs::exists("/etc/x").unwrap(), "the lab wrote to the host");
}

#[test]
fn exit_codes_are_what_a_shell_makes_of_them() {
    assert_eq!(run(&["/nonexistent/program"]).status.code(), Some(127));
    assert_eq!(run(&["/etc/passwd"]).status.code(), Some(126));
    assert_eq!(run(&["sh", "-c", "kill -9 $$"]).status.code(), Some(137));
}

#[test]
fn a_late_command_and_a_dead_machine_have_codes_of_their_own() {
    let late = lab(&["--timeout", "12"], &["sleep", "1000"])
        .output()
        .unwrap();
    assert_eq!(late.status.code(), Some(121), "{late:?}");
    let dead = run(&[
        "sh",
        "-c",
        "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger",
    ]);
    assert_eq!(dead.status.code(), Some(122), "{dead:?}");
    assert!(
        String::from_utf8_lossy(&dead.stderr).contains("sysrq_handle_crash"),
        "{dead:?}"
    );
}

#[test]
fn a_hung_lab_is_noticed_and_a_killed_one_takes_its_machine_along() {
    let mut child = lab(&["--silence", "5"], &["sh", "-c", "echo up; sleep 1000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let machine = machine_of(child.id());
    wait_until_up(&mut child);
    kill(machine, Signal::SIGSTOP).unwrap();
    let stopped = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(120), "{output:?}");
    assert!(stopped.elapsed() < Duration::from_secs(15));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("the lab hung"),
        "{output:?}"
    );

    let mut child = lab(&[], &["sleep", "1000"]).spawn().unwrap();
    let machine = machine_of(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while is_running(machine) {
        assert!(Instant::now() < end, "QEMU outlived xtask");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wait_until_up(child: &mut std::process::Child) {
    let mut line = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    assert_eq!(&line, b"up\n");
}

/// The QEMU that a lab has started.
fn machine_of(lab: u32) -> Pid {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let children = fs::read_to_string(format!("/proc/{lab}/task/{lab}/children")).unwrap();
        for child in children.split_whitespace() {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if name.starts_with("qemu") {
                return Pid::from_raw(child.parse().unwrap());
            }
        }
        assert!(Instant::now() < end, "no QEMU");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// False for a zombie, which only waits for its new parent.
fn is_running(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}
