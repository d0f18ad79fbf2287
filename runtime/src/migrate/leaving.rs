//! The end where the machine is.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::Error;
use super::coming::{LINGER, MAX_LINE, READY};
use super::ends::{End, Socket};
use super::relay::{Relay, Turn};
use super::show::{Show, mib};
use super::tls::Tls;
use super::waiter::{LOOK, PATIENCE, Waiter};
use super::watch::{Progress, Watch};
use crate::{api, say};

/// How long a VMM may take to say where its machine is, once nothing moves any more.
const LAST_WORD: Duration = Duration::from_secs(30);

/// The VMM that the machine leaves.
pub struct Source {
    /// For messages.
    pub name: String,
    /// What becomes the machine's way.
    pub socket: Socket,
    /// Who asks it how far it is.
    pub watch: Watch,
    /// Who tells.
    pub show: Show,
}

/// Makes sure who listens there, and that its VMM takes a machine.
pub fn greet(waiter: &Waiter, target: &mut Tls, name: &str) -> Result<(), Error> {
    waiter.until(target, (name, PATIENCE), |target| {
        Ok(target.shake()?.then_some(()))
    })?;
    let mut line = Vec::new();
    waiter.until(target, (name, PATIENCE), |target| {
        let mut byte = [0];
        loop {
            match target.receive(&mut byte)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                _ if byte == *b"\n" => return Ok(Some(())),
                _ if line.len() >= MAX_LINE => return Err(api::malformed()),
                _ => line.extend(byte),
            }
        }
    })?;
    match String::from_utf8_lossy(&line).as_ref() {
        READY => Ok(()),
        words => Err(Error::Refused(name.to_string(), api::plain(words))),
    }
}

/// Has the machine go, and waits until it is known where it is.
pub fn depart(
    waiter: &Waiter,
    source: Source,
    target: Box<dyn End>,
    limits: &Value,
) -> Result<(), Error> {
    let Source {
        name,
        mut socket,
        mut watch,
        mut show,
    } = source;
    let early = waiter.upgrade(&mut socket, &name, "/migration/send", limits)?;
    let mut relay = Relay::new(Box::new(socket), &early, target);
    let mut more = true;
    // Until when which of the two has to end: to carry, and to say the last word.
    let mut carrying = true;
    let mut linger = None::<Instant>;
    let mut cancelled = None::<Instant>;
    loop {
        let mut watched = relay.watched();
        watched.extend(watch.watched());
        if waiter.wait(watched, if more { 0 } else { LOOK })? {
            cancelled.get_or_insert_with(Instant::now);
            watch.cancel();
        }
        watch.turn();
        if carrying {
            let turn = relay.turn();
            more = turn == Turn::More;
            if turn == Turn::Ended {
                relay.finish();
                carrying = false;
                linger = Some(Instant::now());
            }
            show.show(&watch.progress, relay.forth());
        } else {
            more = false;
            relay.drain();
        }
        let known = watch.progress.is_final() || watch.is_ended();
        let waited = |since: Option<Instant>, most: Duration| {
            since.is_some_and(|since| since.elapsed() > most)
        };
        let over = !carrying && (known || waited(linger, LAST_WORD));
        // A VMM that does not hear a cancellation is not waited for.
        if over || waited(cancelled, LAST_WORD) {
            break;
        }
    }
    if linger.is_some_and(|since| since.elapsed() < LINGER) {
        relay.drain();
    }
    show.end();
    let outcome = judge(&name, &relay, &watch, cancelled.is_some());
    if outcome.is_ok() {
        let farewell = Progress::of(&relay.forth().farewell());
        let until = relay.forth().until(relay.back());
        let standstill = Duration::from_micros(farewell.downtime_us).saturating_add(until);
        say::line(format_args!(
            "moved: {} rounds, {} MiB, standstill {:.1} ms",
            farewell.round,
            mib(relay.forth().bytes()),
            standstill.as_secs_f64() * 1000.0,
        ));
    }
    outcome
}

/// Where the machine is, from what its VMM has said and what has passed.
fn judge(name: &str, relay: &Relay, watch: &Watch, cancelled: bool) -> Result<(), Error> {
    let progress = &watch.progress;
    match progress.phase.as_str() {
        "moved" => Ok(()),
        "failed" => {
            let from = name.to_string();
            let why = match (cancelled, relay.back().refused()) {
                (true, _) => format!("cancelled ({})", progress.error),
                // It may not have come to reading that.
                (false, Some(words)) if !progress.error.contains(&words) => {
                    format!("{} ({words})", progress.error)
                }
                _ => progress.error.clone(),
            };
            Err(Error::Stays { from, why })
        }
        "unknown" => Err(Error::Unknown(progress.error.clone())),
        // It ends when its machine runs elsewhere.
        _ if watch.is_ended() && relay.back().is_running() => Ok(()),
        _ if relay.forth().is_given() => Err(Error::Unknown(format!(
            "the other VMM was told to run it, has not said that it does, and {name} says nothing more: look there"
        ))),
        _ if watch.is_ended() => Err(Error::NotGone(name.to_string())),
        phase => Err(Error::Unknown(format!(
            "{name} does not say (its last word was \u{201c}{phase}\u{201d}): ask it by GET /migration. The other VMM was not told \
             to run it"
        ))),
    }
}
