//! `--daemonize`: how the process that the caller waits for learns how it went.
//!
//! The end of a pipe alone would not tell: it closes at exec, and also when a half is killed on its way there.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use casemate_broker::exit;

use crate::error::{Context, Result, say};

/// What a half writes when all that it can check is done. No error's text contains it.
const DONE: char = '\u{6}';

/// The end that a half holds. Closes at exec.
#[derive(Debug)]
pub(super) struct Outcome(File);

impl Outcome {
    pub(super) fn new(write: OwnedFd) -> Self {
        Self(File::from(write))
    }

    /// If nobody reads it any more, there is nobody to tell.
    pub(super) fn failed(&mut self, why: &str) {
        let _ = self.0.write_all(why.as_bytes());
    }

    /// This half is through.
    pub(super) fn done(&mut self) {
        let _ = self.0.write_all(&[DONE as u8]);
    }
}

/// Waits for so many halves and returns the exit code for the caller.
pub(super) fn wait(read: OwnedFd, halves: usize) -> Result<u8> {
    let mut text = Vec::new();
    File::from(read)
        .read_to_end(&mut text)
        .doing("wait for", "the outcome")?;
    Ok(match judge(&String::from_utf8_lossy(&text), halves) {
        Ok(()) => exit::GUEST_POWERED_OFF,
        Err(why) => {
            say(why);
            exit::JAIL_FAILED
        }
    })
}

fn judge(text: &str, halves: usize) -> std::result::Result<(), String> {
    let why = text.replace(DONE, "");
    if !why.is_empty() {
        return Err(why);
    }
    if text.chars().count() < halves {
        return Err("it was ended before the VMM ran".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_every_half_has_said_is_success() {
        assert_eq!(judge("\u{6}", 1), Ok(()));
        assert_eq!(judge("\u{6}\u{6}", 2), Ok(()));
        for (text, halves) in [("", 1), ("", 2), ("\u{6}", 2)] {
            assert!(judge(text, halves).unwrap_err().contains("before"));
        }
        // Exec has failed after all, or one half has.
        for text in ["\u{6}why", "why\u{6}", "why"] {
            assert_eq!(judge(text, 2), Err("why".to_owned()));
        }
    }
}
