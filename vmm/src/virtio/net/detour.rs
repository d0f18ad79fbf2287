//! The way to the metadata service, and back: frames that never see the tap.

use std::time::Instant;

use super::HEADER_LEN;
use crate::memory::GuestMemory;
use crate::mmds::{PEEK, Stack};
use crate::virtio::chain::Chain;
use crate::virtio::queue::Progress;

/// A service's stack, and when it has something to do by itself.
pub struct Detour {
    stack: Stack,
    due: Option<Instant>,
}

impl Detour {
    pub fn new(stack: Stack) -> Self {
        Self { stack, due: None }
    }

    /// Takes the packet of `len` bytes, a header and a frame, if it is for the service.
    pub fn take(&mut self, memory: &GuestMemory, chain: &Chain, len: u64) -> bool {
        // A packet is not that long.
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let len = len.saturating_sub(HEADER_LEN);
        let mut head = [0; PEEK];
        let peek = head.get_mut(..len.min(PEEK)).unwrap_or_default();
        let copy = |to: &mut [u8]| chain.read_at(memory, HEADER_LEN as u64, to).is_ok();
        if !copy(peek) || !self.stack.wants(peek) {
            return false;
        }
        let now = Instant::now();
        self.stack.receive(len, copy, now);
        self.due = self.stack.next_turn(now);
        true
    }

    /// The next frame for the guest.
    pub fn frame(&self) -> Option<&[u8]> {
        self.stack.outgoing()
    }

    /// The guest has it.
    pub fn sent(&mut self) {
        self.stack.sent();
        if self.stack.outgoing().is_none() {
            self.go_on(Instant::now());
        }
    }

    /// Does what is due, and says when the next thing is.
    pub fn tick(&mut self) -> Progress {
        let Some(due) = self.due else {
            return Progress::Done;
        };
        let now = Instant::now();
        if due <= now {
            self.go_on(now);
        }
        self.due.map_or(Progress::Done, Progress::Later)
    }

    pub fn reset(&mut self) {
        self.stack.reset();
        self.due = None;
    }

    fn go_on(&mut self, now: Instant) {
        self.stack.go_on(now);
        self.due = self.stack.next_turn(now);
    }
}
