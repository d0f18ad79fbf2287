//! How a machine ends, and how whoever notices tells the control thread.

use std::io;
use std::sync::{Mutex, PoisonError};

use casemate_broker::exit;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest switched itself off.
    PoweredOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest cannot go on, and why.
    Crashed(String),
    /// The host ended it.
    ByHost,
    /// It runs in another VMM now.
    Moved,
    /// The VMM cannot go on, and why.
    Failed(String),
}

impl End {
    /// Whether the guest wanted it so.
    pub fn is_by_guest(&self) -> bool {
        matches!(self, Self::PoweredOff | Self::Reset)
    }

    /// The exit code of the VMM.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff => exit::GUEST_POWERED_OFF,
            Self::Reset => exit::GUEST_RESET,
            Self::Crashed(_) => exit::GUEST_CRASHED,
            Self::ByHost => exit::ENDED_BY_HOST,
            Self::Moved => exit::MOVED,
            Self::Failed(_) => exit::VMM_FAILED,
        }
    }
}

/// Where the end is announced. The first announcement counts.
pub struct EndSignal {
    end: Mutex<Option<End>>,
    event: EventFd,
}

impl EndSignal {
    /// Nothing announced yet.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            end: Mutex::new(None),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Announces the end.
    pub fn announce(&self, end: End) {
        let mut slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(end);
            // It fails only if the counter is full: then the control thread knows.
            let _ = self.event.write(1);
        }
    }

    /// The end, once announced.
    pub fn announced(&self) -> Option<End> {
        let slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        slot.clone()
    }

    /// Readable once the end is announced.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts() {
        let signal = EndSignal::new().unwrap();
        assert_eq!(signal.announced(), None);
        signal.announce(End::Reset);
        signal.announce(End::PoweredOff);
        assert_eq!(signal.announced(), Some(End::Reset));
        assert_eq!(signal.event().read().unwrap(), 1);
    }
}
