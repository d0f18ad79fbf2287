//! What becomes of a machine whose memory is mapped from a file that somebody cuts off: an end with a name.
//!
//! A guest's access to what is gone fails in KVM, and its vCPU's thread says so. One of this process's own, to a ring, say, is
//! a SIGBUS: its handler allocates nothing, takes no lock, and uses only calls that every policy allows.
#![allow(unsafe_code)] // A signal handler has no safe form.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::sync::Arc;

use casemate_broker::exit::VMM_FAILED;
use vmm_sys_util::signal::register_signal_handler;

const LINE: &[u8] = b"casemate-vmm: the snapshot's memory file was cut off while the machine had it mapped (SIGBUS): leave \
such files alone while machines run from them\n";

/// A file that a machine's memory is mapped from.
#[derive(Debug)]
pub struct MappedFile {
    file: Arc<File>,
    len: u64,
}

impl MappedFile {
    /// Of a file that has just been mapped. From now on a SIGBUS ends the process with a line that says what it means.
    ///
    /// # Errors
    /// When the file's length cannot be had, or the kernel refuses the handler.
    pub fn watch(file: &Arc<File>) -> io::Result<Self> {
        register_signal_handler(libc::SIGBUS, on_bus_error).map_err(io::Error::from)?;
        Ok(Self {
            file: Arc::clone(file),
            len: file.metadata()?.len(),
        })
    }

    /// If it has become shorter, so that accesses to the rest fail: in words.
    pub fn cut_off(&self) -> Option<String> {
        let now = shorter(&self.file, self.len)?;
        Some(format!(
            "the snapshot's memory file was cut off to {now} bytes of {} while the machine had it mapped: \
             leave such files alone while machines run from them",
            self.len
        ))
    }
}

/// How many bytes a file has that had `len` when it was mapped, if those are fewer. It moves the place where the file is read
/// from, by a call that every sealed thread which asks has.
pub fn shorter(mut file: &File, len: u64) -> Option<u64> {
    let now = file.seek(SeekFrom::End(0)).ok()?;
    (now < len).then_some(now)
}

extern "C" fn on_bus_error(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: it writes a constant, and ends the process without running anything of it; both calls are
    // async-signal-safe.
    unsafe {
        let _ = libc::write(libc::STDERR_FILENO, LINE.as_ptr().cast(), LINE.len());
        libc::_exit(VMM_FAILED.into())
    }
}
