//! Carries bytes between two ends until one of them has ended.

use std::io::ErrorKind;
use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags};

use super::ends::End;
use super::frames::Frames;

/// Bytes that are carried at once, and how often in a turn.
const CHUNK: usize = 256 << 10;
const CHUNKS: usize = 16;

/// What a turn has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is nothing more to do now.
    Idle,
    /// There may be.
    More,
    /// One end has ended, and the other one has had all of it.
    Ended,
}

/// One direction.
struct Flow {
    bytes: Vec<u8>,
    /// What of them has come, and what of that was passed on.
    came: usize,
    passed: usize,
    /// Nothing more comes.
    ended: bool,
    /// Whoever it is for does not take it.
    dead: bool,
    frames: Frames,
}

impl Flow {
    /// Begins with what has come already.
    fn new(early: &[u8]) -> Self {
        let mut bytes = vec![0; CHUNK.max(early.len())];
        for (place, byte) in bytes.iter_mut().zip(early) {
            *place = *byte;
        }
        let mut frames = Frames::default();
        frames.see(early);
        Self {
            bytes,
            came: early.len(),
            passed: 0,
            ended: false,
            dead: false,
            frames,
        }
    }

    fn is_empty(&self) -> bool {
        self.came == self.passed
    }

    fn carry(&mut self, from: &mut dyn End, to: &mut dyn End) -> Turn {
        if self.dead {
            return Turn::Idle;
        }
        let turn = self.try_carry(from, to);
        turn.unwrap_or_else(|()| {
            // It may have said why, and that is on its way in the other direction.
            self.dead = true;
            Turn::More
        })
    }

    fn try_carry(&mut self, from: &mut dyn End, to: &mut dyn End) -> Result<Turn, ()> {
        for _ in 0..CHUNKS {
            if self.is_empty() && self.ended {
                return match to.flush() {
                    Ok(true) => Ok(Turn::Ended),
                    Ok(false) => Ok(Turn::Idle),
                    Err(_) => Err(()),
                };
            }
            if self.is_empty() {
                match from.receive(&mut self.bytes) {
                    Ok(count @ 1..) => {
                        self.frames.see(self.bytes.get(..count).unwrap_or_default());
                        (self.came, self.passed) = (count, 0);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        return to.flush().map(|_| Turn::Idle).map_err(|_| ());
                    }
                    // However it has ended: what was said before counts, and who needs more will say so.
                    Ok(0) | Err(_) => self.ended = true,
                }
                continue;
            }
            let rest = self.bytes.get(self.passed..self.came).unwrap_or_default();
            match to.send(rest) {
                Ok(count) => self.passed = self.passed.saturating_add(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return to.flush().map(|_| Turn::Idle).map_err(|_| ());
                }
                Err(_) => return Err(()),
            }
        }
        Ok(Turn::More)
    }
}

/// Both.
pub struct Relay {
    from: Box<dyn End>,
    to: Box<dyn End>,
    forth: Flow,
    back: Flow,
}

impl Relay {
    /// Between where a machine is, of which the first bytes have come already, and where it goes.
    pub fn new(from: Box<dyn End>, early: &[u8], to: Box<dyn End>) -> Self {
        Self {
            from,
            to,
            forth: Flow::new(early),
            back: Flow::new(&[]),
        }
    }

    /// What to wait for.
    pub fn watched(&mut self) -> Vec<PollFd<'_>> {
        let events = |takes: &Flow, gives: &Flow, kept: bool| {
            let mut events = PollFlags::empty();
            events.set(
                PollFlags::POLLIN,
                takes.is_empty() && !takes.ended && !takes.dead,
            );
            events.set(PollFlags::POLLOUT, kept || !gives.is_empty() && !gives.dead);
            events
        };
        let kept = |end: &mut Box<dyn End>| !end.flush().unwrap_or(true);
        let (from_keeps, to_keeps) = (kept(&mut self.from), kept(&mut self.to));
        let from = events(&self.forth, &self.back, from_keeps);
        let to = events(&self.back, &self.forth, to_keeps);
        [(self.from.as_fd(), from), (self.to.as_fd(), to)]
            .into_iter()
            // One that has hung up would wake us for nothing.
            .filter(|(_, events)| !events.is_empty())
            .map(|(fd, events)| PollFd::new(fd, events))
            .collect()
    }

    /// Carries what there is.
    pub fn turn(&mut self) -> Turn {
        let forth = self.forth.carry(&mut *self.from, &mut *self.to);
        let back = self.back.carry(&mut *self.to, &mut *self.from);
        if self.forth.dead && self.back.dead {
            return Turn::Ended;
        }
        match [forth, back] {
            turns if turns.contains(&Turn::Ended) => Turn::Ended,
            turns if turns.contains(&Turn::More) => Turn::More,
            _ => Turn::Idle,
        }
    }

    /// Tells both ends that this was all.
    pub fn finish(&mut self) {
        self.from.finish();
        self.to.finish();
    }

    /// What they still say, which nobody needs: to close before it has come could destroy what was said last. True when
    /// both have nothing more.
    pub fn drain(&mut self) -> bool {
        let mut over = true;
        for (end, flow) in [
            (&mut self.from, &mut self.forth),
            (&mut self.to, &mut self.back),
        ] {
            (flow.came, flow.passed) = (0, 0);
            flow.dead = flow.ended;
            for _ in 0..CHUNKS {
                match end.receive(&mut flow.bytes) {
                    Ok(1..) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Ok(0) | Err(_) => {
                        flow.ended = true;
                        break;
                    }
                }
            }
            over &= flow.ended;
        }
        over
    }

    /// What has passed on the way there.
    pub fn forth(&self) -> &Frames {
        &self.forth.frames
    }

    /// What has passed on the way back.
    pub fn back(&self) -> &Frames {
        &self.back.frames
    }
}
