//! What the two ends of the lab's port say to each other: frames of a type byte, a little-endian
//! 32-bit length, and that many bytes.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port.
pub const PORT: &str = "casemate.lab";

/// The most bytes that one frame carries.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// What the host asks the lab to run: the first frame it sends.
#[derive(Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// The working directory.
    pub cwd: String,
    /// Directories below which the host's files must stay visible, though a tmpfs would hide them.
    pub keep: Vec<String>,
    /// `…/lib/modules/RELEASE` on the host, which is shown as the lab's own.
    pub modules: String,
}

/// One frame.
#[derive(Debug)]
pub enum Frame {
    /// Host to lab: a [`Spec`] as JSON.
    Spec(Vec<u8>),
    /// Host to lab: bytes for standard input; none at all closes it.
    Stdin(Vec<u8>),
    /// Host to lab, again and again: nothing but an interrupt. QEMU's software emulator changes the set of
    /// interrupts that wait for a processor from two threads without a lock when a nested guest exits
    /// (`do_vmexit`), and can so lose the one of its only timer: the lab would sleep until the next one.
    Nudge,
    /// Lab to host: everything is mounted, the command starts.
    Ready,
    /// Lab to host, every second: it is not hung.
    Heartbeat,
    /// Lab to host: bytes of standard output.
    Stdout(Vec<u8>),
    /// Lab to host: bytes of standard error.
    Stderr(Vec<u8>),
    /// Lab to host, the last frame: the command's exit code, 128 + n for signal n.
    Exited(u8),
    /// Lab to host, the last frame: the lab could not be set up.
    Failed(Vec<u8>),
}

impl Frame {
    /// Writes the frame in one piece.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload): (u8, &[u8]) = match self {
            Self::Spec(bytes) => (1, bytes),
            Self::Stdin(bytes) => (2, bytes),
            Self::Nudge => (3, &[]),
            Self::Ready => (16, &[]),
            Self::Heartbeat => (17, &[]),
            Self::Stdout(bytes) => (18, bytes),
            Self::Stderr(bytes) => (19, bytes),
            Self::Exited(value) => (20, &[*value]),
            Self::Failed(bytes) => (21, bytes),
        };
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut whole = Vec::with_capacity(payload.len() + 5);
        whole.push(kind);
        whole.extend_from_slice(&length.to_le_bytes());
        whole.extend_from_slice(payload);
        to.write_all(&whole)
    }

    /// Reads one frame, blocking.
    ///
    /// # Errors
    /// Those of the reader; a frame that makes no sense.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; 5];
        from.read_exact(&mut header)?;
        let [kind, length @ ..] = header;
        let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
        // A Spec may be longer than a piece of a stream: environments can be large.
        if length > 16 * MAX_PAYLOAD {
            return Err(io::Error::other(format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(match (kind, payload.first()) {
            (1, _) => Self::Spec(payload),
            (2, _) => Self::Stdin(payload),
            (3, _) => Self::Nudge,
            (16, _) => Self::Ready,
            (17, _) => Self::Heartbeat,
            (18, _) => Self::Stdout(payload),
            (19, _) => Self::Stderr(payload),
            (20, Some(code)) => Self::Exited(*code),
            (21, _) => Self::Failed(payload),
            _ => return Err(io::Error::other(format!("a frame of unknown type {kind}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let mut bytes = Vec::new();
        Frame::Stdout(b"one\0two".to_vec())
            .write(&mut bytes)
            .unwrap();
        Frame::Exited(7).write(&mut bytes).unwrap();
        let mut reader = bytes.as_slice();
        assert!(matches!(Frame::read(&mut reader).unwrap(), Frame::Stdout(b) if b == b"one\0two"));
        assert!(matches!(
            Frame::read(&mut reader).unwrap(),
            Frame::Exited(7)
        ));
        assert!(Frame::read(&mut reader).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Frame::read(&mut [1, 255, 255, 255, 255].as_slice()).is_err());
        assert!(Frame::read(&mut [99, 0, 0, 0, 0].as_slice()).is_err());
        assert!(Frame::read(&mut [20, 0, 0, 0, 0].as_slice()).is_err());
    }
}
