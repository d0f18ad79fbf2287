//! One machine's pages, until it ends.

use std::collections::VecDeque;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use casemate_broker::fdpass;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::regions::{self, Contents, MAX_MESSAGE, Regions};
use super::source::{PAGE, Source};
use super::userfault::{Event, Outcome, Userfault};
use super::{Error, call};

/// Most faults that can wait for something else to be read: more than a VMM has threads.
const MAX_WAITING: usize = 4096;
/// How long the kernel is given, in milliseconds, to be done with what was given back.
const PAUSE: u8 = 1;

/// A machine as its VMM has described it.
struct Session {
    regions: Regions,
    userfault: Userfault,
    /// Addresses that somebody waits for.
    waiting: VecDeque<u64>,
}

/// Serves whoever is at the other end, until that ends.
pub fn serve(machine: &UnixStream, source: &Source) -> Result<(), Error> {
    let mut session: Option<Session> = None;
    loop {
        let timeout = match &session {
            Some(session) if !session.waiting.is_empty() => PollTimeout::from(PAUSE),
            _ => PollTimeout::NONE,
        };
        let mut watched = vec![PollFd::new(machine.as_fd(), PollFlags::POLLIN)];
        if let Some(session) = &session {
            watched.push(PollFd::new(session.userfault.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut watched, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(source) => return Err(call("wait for faults")(source)),
        }
        let said = |index: usize| {
            let found = watched.get(index).and_then(PollFd::revents);
            found.unwrap_or(PollFlags::empty())
        };
        let (by_machine, by_kernel) = (said(0), said(1));
        // A VMM whose first attempt failed describes itself again: that one's memory is gone.
        if !by_machine.is_empty() {
            match receive(machine, source)? {
                Some(new) => session = Some(new),
                None => return Ok(()),
            }
            continue;
        }
        if by_kernel.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL) {
            return Err(Error::Descriptor(
                "it is no userfaultfd that does not block",
            ));
        }
        if let Some(session) = &mut session
            && session.turn(source, by_kernel.contains(PollFlags::POLLIN))? == Outcome::Ended
        {
            return Ok(());
        }
    }
}

/// The VMM's message; none when it has ended.
fn receive(machine: &UnixStream, source: &Source) -> Result<Option<Session>, Error> {
    // One byte more than is allowed tells.
    let mut message = vec![0; MAX_MESSAGE.saturating_add(1)];
    let received = match fdpass::receive(machine.as_fd(), &mut message) {
        Ok(received) if received.length > 0 => received,
        Ok(_) | Err(Errno::ECONNRESET) => return Ok(None),
        Err(error) => return Err(call("receive the VMM's message")(error)),
    };
    let message = message.get(..received.length).unwrap_or_default();
    let regions = Regions::parse(message, source.ram())?;
    let descriptor = received.descriptor.filter(|_| !received.truncated);
    let descriptor = descriptor.ok_or(regions::Error::NoDescriptor)?;
    Ok(Some(Session {
        regions,
        userfault: Userfault::new(descriptor),
        waiting: VecDeque::new(),
    }))
}

impl Session {
    /// Reads what the kernel says, if it has something to, and brings pages.
    fn turn(&mut self, source: &Source, ready: bool) -> Result<Outcome, Error> {
        if ready {
            let events = self.userfault.read();
            let events = events.map_err(|_| Error::Descriptor("it is no userfaultfd"))?;
            for event in events {
                match event {
                    Event::Fault(address) => self.waiting.push_back(address),
                    // Before the faults that came with it: they may be of what was given back.
                    Event::Removed(start, end) => self.regions.remove(start, end),
                }
            }
            if self.waiting.len() > MAX_WAITING {
                return Err(Error::Descriptor("too many faults wait"));
            }
        }
        while let Some(address) = self.waiting.pop_front() {
            match self.bring(source, address)? {
                Outcome::Done => {}
                Outcome::Later => {
                    self.waiting.push_front(address);
                    break;
                }
                Outcome::Ended => return Ok(Outcome::Ended),
            }
        }
        Ok(Outcome::Done)
    }

    fn bring(&self, source: &Source, address: u64) -> Result<Outcome, Error> {
        let page = self.regions.page(address);
        let (start, contents) = page.ok_or(Error::Descriptor("a fault outside of the memory"))?;
        let brought = match contents {
            Contents::Zero => self.userfault.zero(start),
            Contents::At(offset) => {
                let mut page = [0; PAGE];
                source.page(offset, &mut page)?;
                if page == [0; PAGE] {
                    self.userfault.zero(start)
                } else {
                    self.userfault.copy(start, &page)
                }
            }
        };
        brought.map_err(call("bring a page"))
    }
}
