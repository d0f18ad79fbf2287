//! What the machine tells its guest while the command runs: the power button, and new CPUs.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use crate::cpus::Arrivals;
use crate::{button, say};

/// Where the machine's news come from.
#[derive(Default)]
pub struct Hardware {
    buttons: Vec<File>,
    cpus: Option<Arrivals>,
}

impl Hardware {
    /// Listens. What this kernel does not tell is left out.
    pub fn listen() -> Self {
        let cpus = Arrivals::listen().map_err(|error| {
            say(&format!("added CPUs will not be brought online: {error}"));
        });
        Self {
            buttons: button::open_all(),
            cpus: cpus.ok(),
        }
    }

    /// What becomes readable when there are news.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let buttons = self.buttons.iter().map(AsFd::as_fd);
        buttons.chain(self.cpus.as_ref().map(AsFd::as_fd))
    }

    /// Takes the news from the descriptor with this index; true when the power button was pressed.
    pub fn take(&self, index: usize) -> bool {
        match (self.buttons.get(index), &self.cpus) {
            (Some(button), _) => return button::pressed(button),
            (None, Some(cpus)) => cpus.take(),
            (None, None) => {}
        }
        false
    }
}
