//! The user's terminal: raw while the command has one of its own, and always given back as it was.

use std::io;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Raw mode, until dropped.
pub struct RawMode(Termios);

impl RawMode {
    /// Makes the terminal of standard input raw; none when it is no terminal.
    pub fn enter() -> Option<Self> {
        let saved = tcgetattr(io::stdin()).ok()?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(saved))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Not TCSADRAIN: output to a terminal that nobody reads must not hold us up.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

/// Rows and columns of the terminal; zeros when unknown.
pub fn size() -> (u16, u16) {
    rustix::termios::tcgetwinsize(io::stdin()).map_or((0, 0), |size| (size.ws_row, size.ws_col))
}
