//! A broker forked by a process of its own, as a VMM without a jailer does it.

use std::os::unix::net::UnixListener;
use std::time::Duration;

use casemate_broker::{BrokerPolicy, ConnectTarget, Operation, spawn_unjailed};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, wait};

fn main() {
    let base = tempfile::tempdir().unwrap();
    let policy = || BrokerPolicy {
        connections: vec![ConnectTarget {
            device: "v".into(),
            directory: open(
                base.path(),
                OFlag::O_PATH | OFlag::O_DIRECTORY,
                Mode::empty(),
            )
            .unwrap(),
            base_name: "v".into(),
        }],
        ..BrokerPolicy::default()
    };
    let _listener = UnixListener::bind(base.path().join("v_1")).unwrap();
    let connect = |port| Operation::Connect {
        device: "v".into(),
        port,
    };
    let wait_for = Duration::from_secs(5);

    let mut client = spawn_unjailed(policy(), || Ok::<(), String>(())).unwrap();
    client.call(connect(1), wait_for).unwrap();
    client.call(connect(2), wait_for).unwrap_err();
    drop(client);
    assert!(matches!(wait().unwrap(), WaitStatus::Exited(_, 0)));

    // A broker that cannot seal itself answers nothing.
    let mut client = spawn_unjailed(policy(), || Err("no")).unwrap();
    client.call(connect(1), wait_for).unwrap_err();
    assert!(matches!(wait().unwrap(), WaitStatus::Exited(_, 1)));

    // It does what its user may, and clears up after a VMM that has gone.
    let policy_of_all = BrokerPolicy {
        unconfined: true,
        ..BrokerPolicy::default()
    };
    let name = base.path().join("made").display().to_string();
    let mut client = spawn_unjailed(policy_of_all, || Ok::<(), String>(())).unwrap();
    let create = || Operation::Create { name: name.clone() };
    let commit = Operation::Commit { name: name.clone() };
    client.call(create(), wait_for).unwrap();
    client.order(commit, wait_for).unwrap();
    client.call(create(), wait_for).unwrap();
    drop(client);
    assert!(matches!(wait().unwrap(), WaitStatus::Exited(_, 0)));
    let left = std::fs::read_dir(base.path()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "the socket and the file: {left:?}");

    std::thread::scope(|scope| {
        let refused = scope.spawn(|| spawn_unjailed(policy(), || Ok::<(), String>(())).is_err());
        assert!(refused.join().unwrap(), "forked with several threads");
    });
    println!("unjailed: ok");
}
