//! Attacks on the broker of a jail, from where its VMM is.
//!
//! Each word is one attack; one line says how it went:
//!
//! - `read:NAME`, `write:NAME`, `connect:DEVICE:PORT`: a request. Backslash-zero in a name stands for a NUL.
//! - `create:NAME`, `commit:NAME`, `discard:NAME`: likewise.
//! - `flood:COUNT:NAME`: that many requests for a file before any answer is read.
//! - `long`, `garbage`, `gift`: no request at all; with a descriptor. Each is the last.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use casemate_broker::protocol::{Reply, Request, decode, encode};
use casemate_broker::{Handover, Kind, Operation, fdpass};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const PATIENCE: Duration = Duration::from_secs(20);

/// Makes the attacks, then stays until standard input ends.
pub fn run(table: i32, words: &[String]) -> Result<()> {
    let mut handover = Handover::from_inherited(table)?;
    let socket = handover.take("broker", &[Kind::Broker])?;
    for word in words {
        println!("{word}: {}", attack(&socket, word)?);
    }
    println!("stays");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

fn attack(socket: &OwnedFd, word: &str) -> Result<String> {
    let (kind, rest) = word.split_once(':').unwrap_or((word, ""));
    let name = rest.replace("\\0", "\0");
    let op = match kind {
        "read" | "write" => Operation::Open {
            name,
            write: kind == "write",
        },
        "connect" => {
            let (device, port) = name.rsplit_once(':').context("DEVICE:PORT")?;
            Operation::Connect {
                device: device.to_owned(),
                port: port.parse()?,
            }
        }
        "create" => Operation::Create { name },
        "commit" => Operation::Commit { name },
        "discard" => Operation::Discard { name },
        "flood" => {
            let (count, name) = name.split_once(':').context("COUNT:NAME")?;
            return flood(socket, count.parse()?, name);
        }
        "long" => return end_of(socket, &[b' '; 5000], false),
        "garbage" => return end_of(socket, b"{\"id\":1", false),
        "gift" => {
            let op = Operation::Open {
                name: "x".to_owned(),
                write: false,
            };
            return end_of(socket, &encode(&Request { id: 1, op })?, true);
        }
        _ => bail!("no attack {word}"),
    };
    send(socket, &encode(&Request { id: 1, op })?, false)?;
    let (reply, descriptor) = answer(socket)?.context("the broker has gone")?;
    match (reply.error, descriptor) {
        (Some(why), None) => Ok(format!("no: {why}")),
        (None, Some(_)) if kind == "connect" => Ok("connected".to_owned()),
        (None, Some(descriptor)) if kind == "create" => {
            std::fs::File::from(descriptor).write_all(b"made")?;
            Ok("made".to_owned())
        }
        (None, None) if matches!(kind, "commit" | "discard") => Ok("done".to_owned()),
        (None, Some(descriptor)) => {
            let mut text = String::new();
            std::fs::File::from(descriptor).read_to_string(&mut text)?;
            Ok(format!("got {text:?}"))
        }
        other => bail!("success and descriptor disagree: {other:?}"),
    }
}

/// Sends until the socket is full, and only then reads; until all are sent and answered.
fn flood(socket: &OwnedFd, count: u64, name: &str) -> Result<String> {
    let (mut sent, mut most) = (0, 0);
    let mut open = BTreeSet::new();
    let mut kept = Vec::new();
    while sent < count || !open.is_empty() {
        let op = Operation::Open {
            name: name.to_owned(),
            write: false,
        };
        let request = encode(&Request { id: sent, op })?;
        if sent < count && send(socket, &request, false)? {
            open.insert(sent);
            sent += 1;
            most = most.max(open.len());
            continue;
        }
        let (reply, descriptor) = answer(socket)?.context("the broker has gone")?;
        if !open.remove(&reply.id) {
            bail!("{} is answered twice", reply.id);
        }
        // Kept until the end: what is not closed counts against this process alone.
        kept.extend(descriptor);
    }
    Ok(format!("{} of {count} granted, {most} at once", kept.len()))
}

/// Sends what is no request; what follows must be the end.
fn end_of(socket: &OwnedFd, bytes: &[u8], gift: bool) -> Result<String> {
    send(socket, bytes, gift)?;
    match answer(socket)? {
        None => Ok("the end".to_owned()),
        Some((reply, _)) => Ok(format!("an answer: {reply:?}")),
    }
}

/// Whether there was room for it.
fn send(socket: &OwnedFd, bytes: &[u8], gift: bool) -> Result<bool> {
    let descriptor = gift.then(|| socket.as_fd());
    match fdpass::send(socket.as_fd(), bytes, descriptor) {
        Ok(()) => Ok(true),
        Err(Errno::EAGAIN) => Ok(false),
        Err(error) => Err(error).context("sending"),
    }
}

/// The next answer; none when the broker has closed its end.
fn answer(socket: &OwnedFd) -> Result<Option<(Reply, Option<OwnedFd>)>> {
    let started = Instant::now();
    let mut buffer = [0; 8192];
    loop {
        match fdpass::receive(socket.as_fd(), &mut buffer) {
            Err(Errno::EAGAIN) => {}
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(error) => return Err(error).context("receiving"),
            Ok(received) if received.length == 0 => return Ok(None),
            Ok(received) if received.truncated => bail!("an answer was cut"),
            Ok(received) => {
                let bytes = buffer.get(..received.length).unwrap_or_default();
                return Ok(Some((decode(bytes)?, received.descriptor)));
            }
        }
        if started.elapsed() > PATIENCE {
            bail!("no answer");
        }
        let mut wait = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut wait, PollTimeout::from(1000_u16))?;
    }
}
