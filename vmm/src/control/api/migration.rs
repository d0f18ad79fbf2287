//! Moves the machine to another VMM, or takes one: the connection of whoever asks becomes the way
//! ([`moving`](crate::machine::moving)). Nothing has to be opened for it, and who may ask may carry it on to wherever he likes.

use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use log::{info, warn};
use nix::errno::Errno;
use serde::Deserialize;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::snapshot::{NetworkOverride, VsockOverride, override_sockets};
use super::{Desk, Fault, Reply};
use crate::config::Config;
use crate::ending::End;
use crate::machine::moving::{Error, Limits, Offer, Phase, Progress};
use crate::machine::{self, Arrival, Restore, RunningMachine, SavedMemory, Stranded};
use crate::resources::{Beginning, Resources};
use crate::snapshot::stream::{Decoder, Frame, Kind, VERSION, frame};
use crate::virtio::vsock::socket;

/// Where the socket is among an event loop's tokens.
pub(super) const TOKEN: u64 = 1 << 33;
/// Bytes read at once, and how often in a turn of the event loop.
const CHUNK: usize = 256 << 10;
const CHUNKS: usize = 32;
/// Most frames in a turn: others are served in between.
const FRAMES: u32 = 1024;

/// `PUT /migration/receive`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveMachine {
    #[serde(default)]
    network_overrides: Vec<NetworkOverride>,
    vsock_override: Option<VsockOverride>,
}

/// What is under way.
#[derive(Default)]
pub(super) enum Moving {
    /// Nothing.
    #[default]
    Nothing,
    /// A client may send on its connection what it has been asked for.
    WillSend(Limits),
    /// Likewise take.
    WillReceive(ReceiveMachine),
    /// The machine goes.
    Sending,
    /// One comes.
    Receiving(Box<Incoming>),
    /// The machine may run elsewhere; its devices rest.
    Stranded(#[allow(dead_code, reason = "what counts is that it is dropped")] Stranded),
}

/// A machine that comes.
pub(super) struct Incoming {
    socket: UnixStream,
    decoder: Decoder,
    request: ReceiveMachine,
    stage: Stage,
    progress: Progress,
}

/// How far it is.
enum Stage {
    /// Nothing is known of it.
    Unknown,
    /// Its memory and its state come.
    Coming(Box<Coming>),
    /// It is built, and is not to run yet.
    Built,
}

struct Coming {
    arrival: Arrival,
    resources: Resources,
    /// As it was offered.
    offered: Config,
    /// As it will be here.
    config: Config,
    options: machine::Options,
}

impl Desk {
    /// Whether the machine is to be left as it is.
    pub(super) fn is_moving(&self) -> bool {
        !matches!(self.moving, Moving::Nothing | Moving::WillReceive(_))
    }

    /// Whoever lets a machine go on that may run elsewhere knows that it does not.
    pub(super) fn settle_doubt(&mut self, machine: &RunningMachine) {
        if matches!(self.moving, Moving::Stranded(_)) {
            self.moving = Moving::Nothing;
            machine.stay(&self.config);
        }
    }

    /// `GET /migration`
    pub(super) fn progress(&self, machine: Option<&RunningMachine>) -> Reply {
        match (&self.moving, machine.and_then(RunningMachine::way)) {
            (Moving::Receiving(incoming), _) => Reply::of(&incoming.progress),
            (_, Some(way)) => Reply::of(&way.progress()),
            (_, None) => Reply::of(&Progress::default()),
        }
    }

    /// `PUT /migration/send`
    pub(super) fn will_send(
        &mut self,
        machine: &RunningMachine,
        limits: Limits,
    ) -> Result<Reply, Fault> {
        if self.paused {
            return Err(Fault::Paused);
        }
        machine.may_depart(&self.config).map_err(Fault::NotMoved)?;
        self.moving = Moving::WillSend(limits);
        Ok(Reply::Upgrade)
    }

    /// `PUT /migration/receive`
    pub(super) fn will_receive(&mut self, request: ReceiveMachine) -> Result<Reply, Fault> {
        if self.is_moving() {
            return Err(Fault::Moving);
        }
        if !self.config.is_untouched() {
            return Err(Fault::Configured);
        }
        self.moving = Moving::WillReceive(request);
        Ok(Reply::Upgrade)
    }

    /// `PUT /migration/cancel`
    pub(super) fn cancel(&mut self, machine: &RunningMachine) -> Result<Reply, Fault> {
        let is_sending = matches!(self.moving, Moving::WillSend(_) | Moving::Sending);
        let way = machine.way().filter(|_| is_sending);
        way.ok_or(Fault::NotMoving)?.cancel();
        Ok(Reply::Done)
    }

    /// The connection of who was told that it would be the way, with what it has sent since.
    pub(super) fn take_connection(
        &mut self,
        machine: Option<&RunningMachine>,
        connection: Option<(UnixStream, Vec<u8>)>,
        epoll: &Epoll,
    ) {
        let is_awaited = matches!(self.moving, Moving::WillSend(_) | Moving::WillReceive(_));
        let Some((socket, early)) = connection else {
            if is_awaited {
                // Whoever asked has gone before it was answered.
                self.moving = Moving::Nothing;
            }
            return;
        };
        match (std::mem::take(&mut self.moving), machine) {
            (Moving::WillSend(limits), Some(machine)) => {
                // It tells of a machine that runs undisturbed.
                self.recording = None;
                match machine.depart(&self.config, limits, socket) {
                    Ok(()) => self.moving = Moving::Sending,
                    Err(error) => warn!("the machine does not go: {error}"),
                }
            }
            // Another client may have started a machine in this very turn.
            (Moving::WillReceive(request), None) if self.started.is_none() => {
                let event = EpollEvent::new(EventSet::IN, TOKEN);
                if let Err(error) = epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), event) {
                    return warn!("no machine comes: cannot watch its connection: {error}");
                }
                let mut decoder = Decoder::default();
                decoder.feed(&early);
                self.moving = Moving::Receiving(Box::new(Incoming {
                    socket,
                    decoder,
                    request,
                    stage: Stage::Unknown,
                    progress: Progress::default(),
                }));
            }
            (Moving::WillSend(_) | Moving::WillReceive(_), _) => {}
            (other, _) => self.moving = other,
        }
    }

    /// Does what a machine that goes waits for.
    pub(super) fn go_on_sending(&mut self, machine: &mut RunningMachine) {
        let Some(way) = machine.way().cloned() else {
            return;
        };
        // Only a wake-up.
        let _ = way.news().read();
        if !matches!(self.moving, Moving::Sending) {
            return;
        }
        match way.progress().phase {
            Phase::WantsRound => {
                way.update(|progress| progress.phase = Phase::Copying);
                if let Err(error) = machine.next_round() {
                    warn!("the machine does not go: {error}");
                    machine.call_back();
                }
            }
            Phase::WantsStop => self.stop_and_go(machine),
            Phase::Failed => {
                self.moving = Moving::Nothing;
                machine.stay(&self.config);
                let error = way.progress().error.unwrap_or_default();
                warn!("the machine stays here: {error}");
            }
            _ => {}
        }
    }

    fn stop_and_go(&mut self, machine: &mut RunningMachine) {
        let Some(way) = machine.way().cloned() else {
            return;
        };
        way.update(|progress| progress.phase = Phase::Stopped);
        let start = Instant::now();
        if let Err(fault) = self.pause(machine) {
            machine.call_back();
            return warn!("the machine stays here: {fault}");
        }
        if machine.panel.ends.announced().is_some() {
            // It ended with its last instruction here: there is nothing that could go on elsewhere.
            return machine.call_back();
        }
        let held = match machine.hold(&self.config) {
            Ok(held) => held,
            Err(error) => {
                machine.call_back();
                machine.resume();
                self.paused = false;
                return warn!("the machine stays here: {error}");
            }
        };
        let gone = machine.go(held);
        let stood_still = start.elapsed();
        way.update(|progress| {
            progress.downtime_us = u64::try_from(stood_still.as_micros()).ok();
        });
        match gone {
            Ok(last) => {
                way.announce(Phase::Moved);
                let Progress { round, .. } = way.progress();
                info!(
                    "the machine has moved: it stood still for {stood_still:?}, with {} pages left after {round} rounds",
                    last.pages
                );
                machine.panel.ends.announce(End::Moved);
            }
            Err((error, Some(stranded))) => {
                way.announce(Phase::Unknown);
                warn!("{error}");
                self.moving = Moving::Stranded(stranded);
            }
            Err((error, None)) => {
                machine.resume();
                self.paused = false;
                way.announce(Phase::Failed);
                self.moving = Moving::Nothing;
                machine.stay(&self.config);
                warn!("the machine stays here, after {stood_still:?}: {error}");
            }
        }
    }

    /// Takes what has come of a machine. Whether there is more to do at once.
    pub(super) fn go_on_receiving(&mut self, mut machine: Option<&mut RunningMachine>) -> bool {
        let mut chunk = vec![0; CHUNK];
        let mut frames = FRAMES;
        for _ in 0..CHUNKS {
            // What came with the request, or in the turn before, first.
            if let Err(why) = self.take_frames(machine.as_deref_mut(), &mut frames) {
                self.give_up(machine, &why);
                return false;
            }
            if frames == 0 {
                return true;
            }
            // It is built: what comes now is for who has it in his hands.
            if machine.is_none() && self.started.is_some() {
                return false;
            }
            let Moving::Receiving(incoming) = &mut self.moving else {
                return false;
            };
            let why = match socket::receive(&incoming.socket, &mut chunk) {
                Err(Errno::EAGAIN) => return false,
                Ok(0) => Error::Closed,
                Err(error) => Error::Broken(error.into()),
                Ok(count) => {
                    let came = chunk.get(..count).unwrap_or_default();
                    incoming.decoder.feed(came);
                    continue;
                }
            };
            self.give_up(machine, &why.to_string());
            return false;
        }
        true
    }

    fn take_frames(
        &mut self,
        mut machine: Option<&mut RunningMachine>,
        most: &mut u32,
    ) -> Result<(), String> {
        while *most > 0 {
            let Moving::Receiving(incoming) = &mut self.moving else {
                return Ok(());
            };
            let next = incoming.decoder.next_frame();
            let Some(frame) = next.map_err(|error| error.to_string())? else {
                return Ok(());
            };
            *most = most.saturating_sub(1);
            self.take_frame(machine.as_deref_mut(), &frame)?;
        }
        Ok(())
    }

    fn take_frame(
        &mut self,
        machine: Option<&mut RunningMachine>,
        frame: &Frame,
    ) -> Result<(), String> {
        let Moving::Receiving(incoming) = &mut self.moving else {
            return Ok(());
        };
        let Incoming {
            stage, progress, ..
        } = &mut **incoming;
        let words = |error: &dyn std::fmt::Display| error.to_string();
        match (frame.kind, stage, machine) {
            (Kind::Offer, Stage::Unknown, None) => {
                let coming = self.accept(frame).map_err(|error| words(&error))?;
                if let Moving::Receiving(incoming) = &mut self.moving {
                    incoming.stage = Stage::Coming(Box::new(coming));
                    incoming.progress.phase = Phase::Copying;
                    return incoming.say(Kind::Accepted, &[]);
                }
                Ok(())
            }
            (Kind::Pages, Stage::Coming(coming), _) => {
                progress.sent_pages = progress
                    .sent_pages
                    .saturating_add((frame.payload.len() / 4096) as u64);
                let taken = coming.arrival.pages(frame.number, &frame.payload);
                taken.map_err(|error| words(&error))
            }
            (Kind::Zeroes, Stage::Coming(coming), _) => {
                let count = frame.payload.as_slice().try_into().map(u64::from_le_bytes);
                let taken = coming.arrival.zeroes(frame.number, count.unwrap_or(0));
                taken.map_err(|error| words(&error))
            }
            (Kind::State, Stage::Coming(coming), _) => {
                let taken = coming.arrival.state(frame.number, &frame.payload);
                taken.map_err(|error| words(&error))
            }
            (Kind::Build, stage @ Stage::Coming(_), _) => {
                let Stage::Coming(coming) = std::mem::replace(stage, Stage::Built) else {
                    return Ok(());
                };
                progress.phase = Phase::Built;
                self.build_arrived(*coming).map_err(|error| words(&error))?;
                match &mut self.moving {
                    Moving::Receiving(incoming) => incoming.say(Kind::Built, &[]),
                    _ => Ok(()),
                }
            }
            (Kind::Go, Stage::Built, Some(machine)) => {
                machine.resume();
                self.paused = false;
                info!("the machine has come, and runs");
                let told = incoming.say(Kind::Running, &[]);
                self.moving = Moving::Nothing;
                if let Err(error) = told {
                    // It runs here all the same: it was told to.
                    warn!("the other end is not told that the machine runs: {error}");
                }
                Ok(())
            }
            (found, ..) => Err(Error::Unexpected {
                found,
                expected: "something else",
            }
            .to_string()),
        }
    }

    fn accept(&mut self, frame: &Frame) -> Result<Coming, Fault> {
        if frame.number != VERSION {
            return Err(Fault::NotReceived(Error::Version(frame.number)));
        }
        let offer: Offer = serde_json::from_slice(&frame.payload)
            .map_err(|error| Fault::NotReceived(error.into()))?;
        let mut config = offer.config.clone();
        let Moving::Receiving(incoming) = &self.moving else {
            return Err(Fault::NotMoving);
        };
        let request = &incoming.request;
        override_sockets(
            &mut config,
            &request.network_overrides,
            request.vsock_override.as_ref(),
        )?;
        config.check()?;
        self.source.forget();
        let mut resources = self.source.open(&config, Beginning::Snapshot)?;
        resources.metadata = std::sync::Arc::clone(&self.metadata);
        Ok(Coming {
            arrival: Arrival::new(&offer, &resources.kvm)?,
            resources,
            offered: offer.config,
            config,
            options: machine::Options {
                enable_pci: offer.enable_pci,
                boot_timer: None,
                ..self.options
            },
        })
    }

    fn build_arrived(&mut self, coming: Coming) -> Result<(), Fault> {
        let Coming {
            arrival,
            resources,
            offered,
            config,
            options,
        } = coming;
        let (mut saved, memory) = arrival.complete()?;
        if !saved.machine.config.is_same(&offered) {
            return Err(Fault::OtherMachine);
        }
        saved.machine.config = config.clone();
        let restore = Restore {
            saved,
            memory: SavedMemory::Here(memory),
            working_set: None,
            by_wall_clock: true,
        };
        self.source.lock_down()?;
        let machine = machine::build(&config, resources, options, Some(restore))?;
        self.config = config;
        self.options = options;
        self.paused = true;
        self.take_over(machine.start()).map(drop)
    }

    /// No machine comes.
    fn give_up(&mut self, machine: Option<&mut RunningMachine>, why: &str) {
        warn!("no machine comes: {why}");
        if let Moving::Receiving(mut incoming) = std::mem::take(&mut self.moving) {
            // Whoever has gone is not told.
            let _ = incoming.say(Kind::Refused, why.as_bytes());
        }
        // One that was built is not to run: nobody has said that it does not run there.
        let ends = machine
            .map(|machine| &*machine)
            .or(self.started.as_ref())
            .map(|machine| &machine.panel.ends);
        if let Some(ends) = ends {
            ends.announce(End::Failed(format!("the machine did not come: {why}")));
        }
    }
}

impl Incoming {
    /// Says something short, which has room in any socket that is read from.
    fn say(&mut self, kind: Kind, payload: &[u8]) -> Result<(), String> {
        let mut bytes = Vec::new();
        frame(kind, 0, payload, &mut bytes);
        match socket::send(&self.socket, [&bytes, &[]]) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(Error::Silent.to_string()),
            Err(error) => Err(Error::Broken(error.into()).to_string()),
        }
    }
}
