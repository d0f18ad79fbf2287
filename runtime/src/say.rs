//! Lines for people. That nobody reads them is no reason to abort, as it is to `println!`: a run must clean up first.

use std::fmt::Display;
use std::io::{self, Write};

/// One line to standard error, with our name before it.
pub fn warn(text: impl Display) {
    error_text(format_args!("casemate: {text}\n"));
}

/// Text to standard error as it is.
pub fn error_text(text: impl Display) {
    // Formatted first, so that it is one write.
    let _ = io::stderr().write_all(text.to_string().as_bytes());
}

/// One line to standard output.
pub fn line(text: impl Display) {
    let _ = io::stdout().write_all(format!("{text}\n").as_bytes());
}
