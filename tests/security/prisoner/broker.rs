//! The real broker under a filter of its own: what it is there for has to work, all of it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use casemate_broker::{AllowedName, BrokerPolicy, ConnectTarget, Operation, spawn_unjailed};
use casemate_seccomp_filters::{Role, Stage, install};

const PATIENCE: Duration = Duration::from_secs(10);

/// Starts a broker sealed as `role`, has it open a file, refuse another, connect, refuse to connect, and
/// make files.
pub fn serve_sealed(role: Role) -> Result<()> {
    let place = tempfile::tempdir()?;
    std::fs::write(place.path().join("disk"), "disk")?;
    let _listener = UnixListener::bind(place.path().join("v.sock_7"))?;
    let directory = || std::fs::File::open(place.path()).map(OwnedFd::from);
    let policy = BrokerPolicy {
        allowed: vec![AllowedName {
            name: PathBuf::from("/images"),
            directory: directory()?,
            file: None,
            create: true,
        }],
        connections: vec![ConnectTarget {
            device: "/run/v.sock".into(),
            directory: directory()?,
            base_name: "v.sock".into(),
        }],
        ..BrokerPolicy::default()
    };
    let mut client = spawn_unjailed(policy, || install(role, Stage::Sealed))?;
    let mut ask = |what: &str, op: Operation| -> Result<()> {
        let answer = if op.gives_descriptor() {
            client.call(op, PATIENCE).map(drop)
        } else {
            client.order(op, PATIENCE)
        };
        match answer {
            Ok(()) => println!("{what}: ok"),
            Err(casemate_broker::ClientError::Refused(why)) => println!("{what}: no: {why}"),
            Err(error) => return Err(error).with_context(|| what.to_owned()),
        }
        Ok(())
    };
    for (name, write) in [
        ("/images/disk", true),
        ("/images/../disk", false),
        ("/etc/passwd", false),
    ] {
        let name = name.to_owned();
        ask(&format!("open {name}"), Operation::Open { name, write })?;
    }
    for port in [7, 8] {
        let device = "/run/v.sock".to_owned();
        ask(
            &format!("connect {port}"),
            Operation::Connect { device, port },
        )?;
    }
    for name in ["/images/new", "/images/disk", "/etc/new"] {
        let create = Operation::Create { name: name.into() };
        ask(&format!("create {name}"), create)?;
        let commit = Operation::Commit { name: name.into() };
        ask(&format!("commit {name}"), commit)?;
    }
    let name = || "/images/given-up".to_owned();
    ask("create another", Operation::Create { name: name() })?;
    ask("discard it", Operation::Discard { name: name() })?;
    Ok(())
}
