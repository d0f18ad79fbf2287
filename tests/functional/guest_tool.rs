//! Inside a Linux guest: what busybox cannot do there, sockets to the host (vsock).
//!
//! `casemate-guest-tool serve PORT COUNT` takes COUNT connections, all open before the first is served; sends back
//! what each says until it says no more, then how many bytes that were, and ends it.
//! `casemate-guest-tool call PORT COUNT` makes COUNT connections to the host, says a line on each, ends its half, and
//! expects the line back.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, socket,
};

/// Any address of one's own (VMADDR_CID_ANY), and the host's.
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-guest-tool: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [task, port, count] = words.as_slice() else {
        bail!("use serve|call PORT COUNT");
    };
    let (port, count) = (port.parse()?, count.parse()?);
    match task.as_str() {
        "serve" => serve(port, count),
        "call" => call(port, count),
        other => bail!("{other} is no task"),
    }
}

/// A stream socket like any other, once it is connected.
fn stream(socket: OwnedFd) -> UnixStream {
    UnixStream::from(socket)
}

fn vsock() -> Result<OwnedFd> {
    let kind = (AddressFamily::Vsock, SockType::Stream);
    Ok(socket(kind.0, kind.1, SockFlag::SOCK_CLOEXEC, None)?)
}

fn serve(port: u32, count: usize) -> Result<()> {
    use std::os::fd::FromRawFd as _;
    let listener = vsock()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANY, port)).context("bind")?;
    listen(&listener, Backlog::new(128)?)?;
    println!("serving {port}");
    let mut streams = Vec::new();
    for _ in 0..count {
        let accepted = accept(listener.as_raw_fd())?;
        // SAFETY: a descriptor that was made just now, and has no other owner.
        #[allow(unsafe_code, reason = "nix returns a number")]
        streams.push(stream(unsafe { OwnedFd::from_raw_fd(accepted) }));
    }
    for mut stream in streams {
        let (mut bytes, mut chunk) = (0, [0; 1 << 16]);
        loop {
            let count = stream.read(&mut chunk)?;
            if count == 0 {
                break;
            }
            stream.write_all(&chunk[..count])?;
            bytes += count;
        }
        // The host says no more, and still listens.
        stream.write_all(format!("{bytes}").as_bytes())?;
    }
    Ok(())
}

fn call(port: u32, count: usize) -> Result<()> {
    let mut streams = Vec::new();
    for _ in 0..count {
        let socket = vsock()?;
        connect(socket.as_raw_fd(), &VsockAddr::new(HOST, port)).context("connect")?;
        streams.push(stream(socket));
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(format!("line {number}").as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
    }
    for (number, mut stream) in streams.into_iter().enumerate() {
        let mut back = String::new();
        stream.read_to_string(&mut back)?;
        ensure!(back == format!("line {number}"), "{number}: {back:?}");
    }
    Ok(())
}
