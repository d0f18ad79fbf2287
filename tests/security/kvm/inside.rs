//! A prisoner where the VMM would be, without the VMM's own walls: what the jailer's are alone.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use casemate_tests::landlock_abi;

use crate::outside::*;

/// What no prisoner may manage, whatever the age of the kernel.
pub const ATTEMPTS: &[&str] = &[
    "open-root",
    "open-passwd",
    "open-proc",
    "open-upwards",
    "open-from-inherited",
    "open-device",
    "create-file",
    "tcp-connect",
    "tcp-bind",
    "udp-send",
    "raw-socket",
    "packet-socket",
    "abstract-connect",
    "signal-parent",
    "signal-others",
    "read-parents-memory",
    "read-others-memory",
    "become-root",
    "join-group",
    "mount-namespace",
    "network-namespace",
    "user-namespace",
    "mount",
    "chroot",
    "raise-limit",
    "exec",
    "new-process",
];

/// A network namespace with a tap that is up, gone at the end.
struct Netns(String);

impl Netns {
    fn new() -> Self {
        let netns = Self(casemate_tests::unique_id("ct"));
        ip(&["netns", "add", &netns.0]);
        for words in [
            "tuntap add ctap0 mode tap",
            "address add 10.99.0.1/24 dev ctap0",
            "link set ctap0 up",
            "link set lo up",
        ] {
            let mut arguments = vec!["-n", netns.0.as_str()];
            arguments.extend(words.split(' '));
            ip(&arguments);
        }
        netns
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip")
            .args(["netns", "del", &self.0])
            .status();
    }
}

fn ip(arguments: &[&str]) {
    let output = std::process::Command::new("ip").args(arguments).output();
    let output = output.expect("`ip` is needed: install iproute2");
    assert!(output.status.success(), "ip {arguments:?}: {output:?}");
}

#[test]
fn nothing_gets_out_of_a_full_jail() {
    let netns = Netns::new();
    let address = SocketAddr::from_abstract_name("casemate-security-test").unwrap();
    // Another test of this host may listen there: any listener will do.
    let _listener = UnixListener::bind_addr(&address);
    let jail = Jail::new();
    let disk = jail.file("disk", "disk");
    let mut jail = jail.args(&["--new-pid-ns", "--grant-ro"]);
    let socket = jail.path("v.sock");
    jail = jail.args(&[
        format!("disk={disk}"),
        "--grant-tap".into(),
        "net0=ctap0".into(),
        "--grant-listen".into(),
        format!("v={socket}"),
        "--netns".into(),
        format!("/run/netns/{}", netns.0),
    ]);
    jail.command.env("SECRET", "x").env("LD_PRELOAD", "/x.so");
    let user = jail.user;
    let mut words = ATTEMPTS.to_vec();
    words.push("stay");
    let mut running = jail.start(&words);
    running.wait_for_line("stays").unwrap();
    let (broker, prisoner) = (running.pid().as_raw().unsigned_abs(), prisoner_of(&running));
    eventually("the broker serves", || {
        status(&broker.to_string(), "Seccomp") == "2"
    });
    for process in [broker, prisoner] {
        assert_confined(process, user);
    }
    assert_no_way_out(prisoner);
    assert_ne!(
        namespace(prisoner, "pid"),
        namespace(std::process::id(), "pid")
    );
    let environment = fs::read(format!("/proc/{prisoner}/environ")).unwrap();
    assert_eq!(environment, b"", "an empty environment");

    // Streams, KVM, the disk, the tap, the listener, the broker, and the table. Nothing else.
    let open = descriptors(prisoner);
    let named = |part: &str| {
        let found = open
            .values()
            .filter(|to| to.to_string_lossy().contains(part));
        found.count()
    };
    assert_eq!(open.len(), 9, "{open:?}");
    for (part, count) in [
        ("pipe:", 3),
        ("/dev/kvm", 1),
        ("/disk", 1),
        ("/dev/net/tun", 1),
        ("socket:", 2),
        ("memfd:", 1),
    ] {
        assert_eq!(named(part), count, "{part} in {open:?}");
    }
    // The broker has nothing of the machine's: it could be taken over, too.
    let open = descriptors(broker);
    for part in ["kvm", "tun", "memfd", "casemate-prisoner"] {
        let found = open.values().any(|to| to.to_string_lossy().contains(part));
        assert!(!found, "{part} in {open:?}");
    }
    let sockets = open
        .values()
        .filter(|to| to.to_string_lossy().starts_with("socket:"));
    assert_eq!(
        sockets.count(),
        1,
        "its end of the pair, no listener: {open:?}"
    );

    running.close_stdin();
    let done = running.wait().unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    let mut lines: Vec<_> = done.stdout.lines().collect();
    assert_eq!(lines.pop(), Some("stays"));
    assert_eq!(lines.len(), ATTEMPTS.len(), "{done:#?}");
    // Landlock governs TCP from its version 4 on; before, a port of a network with nobody in it is had.
    let older = landlock_abi() < 4;
    for (line, attempt) in lines.iter().zip(ATTEMPTS) {
        if older && *attempt == "tcp-bind" {
            continue;
        }
        assert!(line.starts_with(&format!("{attempt}: refused: ")), "{line}");
    }
}

/// Signals and memory again without a PID namespace, where other processes have numbers.
#[test]
fn other_processes_are_out_of_reach_by_number_too() {
    let attempts = [
        "signal-parent",
        "read-parents-memory",
        "read-others-memory",
        "user-namespace",
    ];
    let jail = Jail::new();
    let socket = jail.path("v.sock");
    let jail = jail.args(&["--grant-listen", &format!("v={socket}")]);
    let mut running = jail.start(&attempts);
    running.close_stdin();
    let done = running.wait().unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    // Landlock governs signals from its version 6 on; the broker does not listen to them before.
    let older = landlock_abi() < 6;
    for attempt in attempts {
        let older = older && attempt == "signal-parent";
        let refused = done.stdout.contains(&format!("{attempt}: refused: "));
        assert!(refused || older, "{attempt}: {done:#?}");
    }
}
