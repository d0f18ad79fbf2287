//! The end where the machine goes, when that is another host's.

use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use rustls::{ServerConfig, ServerConnection};
use serde_json::Value;

use super::Error;
use super::ends::{End as _, Socket};
use super::places::Listener;
use super::relay::{Relay, Turn};
use super::show::mib;
use super::tls::Tls;
use super::waiter::{LOOK, PATIENCE, Waiter};
use crate::say;

/// How long one that connects may take to show who it is.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long what was said last may take to arrive.
pub const LINGER: Duration = Duration::from_secs(2);
/// What is said first to who may send a machine. Anything else is a refusal.
pub const READY: &str = "ready";
/// Most bytes of that.
pub const MAX_LINE: usize = 2048;

/// The first one that shows a certificate of the authority. Others are sent away, one after the other.
pub fn accept(
    waiter: &Waiter,
    listener: &Listener,
    config: &Arc<ServerConfig>,
) -> Result<Tls, Error> {
    loop {
        let socket = match listener.accept() {
            Ok(socket) => socket,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let watched = PollFd::new(listener.as_fd(), PollFlags::POLLIN);
                if waiter.wait(vec![watched], LOOK.saturating_mul(20))? {
                    return Err(Error::NotBegun);
                }
                continue;
            }
            // Whoever it was has gone, or there is no room now.
            Err(error) => {
                say::warn(format_args!("accept: {error}"));
                if waiter.wait(Vec::new(), LOOK)? {
                    return Err(Error::NotBegun);
                }
                continue;
            }
        };
        let connection = ServerConnection::new(Arc::clone(config)).map_err(super::tls::config)?;
        let mut tls = Tls::new(socket, connection.into());
        let shaken = waiter.until(&mut tls, ("who connects", HANDSHAKE), |tls| {
            Ok(tls.shake()?.then_some(()))
        });
        match shaken {
            Ok(()) => return Ok(tls),
            Err(Error::NotAsked { why, .. }) => say::warn(format_args!("sent away: {why}")),
            Err(error) => return Err(error),
        }
    }
}

/// Has the VMM take the machine, and waits until it runs there or does not come.
pub fn arrive(
    waiter: &Waiter,
    mut network: Tls,
    (mut api, name): (Socket, &str),
    overrides: &Value,
) -> Result<(), Error> {
    let upgraded = waiter.upgrade(&mut api, name, "/migration/receive", overrides);
    let line = match &upgraded {
        Ok(_) => format!("{READY}\n"),
        Err(error) => format!("{error}\n"),
    };
    let mut rest = line.as_bytes();
    waiter.until(&mut network, ("the other end", PATIENCE), |network| {
        while !rest.is_empty() {
            let count = network.send(rest)?;
            rest = rest.get(count..).unwrap_or_default();
        }
        Ok(network.flush()?.then_some(()))
    })?;
    if upgraded.is_err() {
        network.finish();
    }
    upgraded?;
    let mut relay = Relay::new(Box::new(network), &[], Box::new(api));
    let mut more = true;
    loop {
        if waiter.wait(relay.watched(), if more { 0 } else { LOOK })? {
            break;
        }
        match relay.turn() {
            Turn::Ended => break,
            turn => more = turn == Turn::More,
        }
    }
    relay.finish();
    let end = Instant::now();
    while !relay.drain() && end.elapsed() < LINGER {
        waiter.wait(relay.watched(), LOOK)?;
    }
    match (relay.back().is_running(), relay.back().refused()) {
        (true, _) => {
            say::line(format_args!("arrived: {} MiB", mib(relay.forth().bytes())));
            Ok(())
        }
        (false, Some(why)) => Err(Error::NotCome(format!("the VMM here refuses it: {why}"))),
        (false, None) if relay.forth().is_given() => Err(Error::Unknown(
            "the VMM here was told to run it, and has not said that it does: look there (GET /)"
                .to_string(),
        )),
        (false, None) => Err(Error::NotCome("the connection has ended".to_string())),
    }
}
