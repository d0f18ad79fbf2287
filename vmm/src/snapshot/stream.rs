//! A machine on its way to another VMM: frames on a stream socket, in both directions.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | kind |
//! | 4 | 4 | length of the payload, at most [`MAX_PAYLOAD`] |
//! | 8 | 8 | a number: what it means depends on the kind |
//! | 16 | | the payload |
//!
//! All numbers are little-endian. Who sends what, and when, is in docs/snapshot-format.md.

use thiserror::Error;

use super::format::{u32_at, u64_at};
use super::memory::PAGE;

/// Bytes before the payload.
const HEADER: usize = 16;
/// Most bytes of a payload.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// The version of what is said here: both ends must have the same.
pub const VERSION: u64 = 1;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A machine wants to come. The number is [`VERSION`], the payload says in JSON which.
    Offer = 1,
    /// Pages. The number is the first one's, as in a memory file.
    Pages = 2,
    /// Pages have become zero. The number is the first one's; the payload has their count, 8 bytes.
    Zeroes = 3,
    /// Bytes of the state file, of which the number is the place.
    State = 4,
    /// All is there: build it.
    Build = 5,
    /// It is yours now: let it run. The payload says in JSON what it has taken until now, as `GET /migration` does: for whoever
    /// carries these bytes, not for the other end.
    Go = 6,
    /// It may come.
    Accepted = 17,
    /// It may not, or cannot be built. The payload says why.
    Refused = 18,
    /// It is built, and waits.
    Built = 19,
    /// It runs.
    Running = 20,
}

impl Kind {
    fn of(number: u32) -> Option<Self> {
        let all = [
            Self::Offer,
            Self::Pages,
            Self::Zeroes,
            Self::State,
            Self::Build,
            Self::Go,
            Self::Accepted,
            Self::Refused,
            Self::Built,
            Self::Running,
        ];
        all.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// Why bytes are no frames.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Of no kind that there is.
    #[error("a frame of kind {0}, which is unknown: is the other end of this version?")]
    Kind(u32),
    /// Too long.
    #[error("a frame of {0} bytes, and {MAX_PAYLOAD} are allowed")]
    Length(u32),
}

/// Appends a frame to `out`.
pub fn frame(kind: Kind, number: u64, payload: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(kind as u32).to_le_bytes());
    // Nobody here makes one that is longer than MAX_PAYLOAD.
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(payload);
}

/// A frame that has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// See [`Kind`].
    pub number: u64,
    /// Likewise.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The payload as words for a log or a user: what the other end wants to say, and nothing that a terminal obeys.
    pub fn words(&self) -> String {
        const MOST: usize = 400;
        let text = String::from_utf8_lossy(&self.payload);
        let plain = text.chars().filter(|char| !char.is_control());
        plain.take(MOST).collect()
    }
}

/// Makes frames of bytes as they arrive.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// How many of them were frames already.
    taken: usize,
}

impl Decoder {
    /// Takes bytes that have arrived. To be followed by [`Decoder::next_frame`] until that has none, so that never more than
    /// a frame and what came with its end is kept.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next frame that is whole.
    ///
    /// # Errors
    /// When what has arrived is none: the stream is of no use any more.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Error> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let (Some(kind), Some(length), Some(number)) =
            (u32_at(rest, 0), u32_at(rest, 4), u64_at(rest, 8))
        else {
            return Ok(None);
        };
        let kind = Kind::of(kind).ok_or(Error::Kind(kind))?;
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        if size > MAX_PAYLOAD {
            return Err(Error::Length(length));
        }
        let end = HEADER.saturating_add(size);
        let Some(payload) = rest.get(HEADER..end) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.taken = self.taken.saturating_add(end);
        Ok(Some(Frame {
            kind,
            number,
            payload,
        }))
    }
}

/// How many pages so many bytes are; none if they are not whole ones.
pub fn whole_pages(bytes: usize) -> Option<u64> {
    let bytes = bytes as u64;
    (bytes > 0 && bytes.is_multiple_of(PAGE)).then_some(bytes / PAGE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_come_whole_however_they_arrive() {
        let mut bytes = Vec::new();
        frame(Kind::Pages, 7, &[9; 4096], &mut bytes);
        frame(Kind::Go, 0, &[], &mut bytes);
        let mut decoder = Decoder::default();
        let mut found = Vec::new();
        for piece in bytes.chunks(5) {
            decoder.feed(piece);
            while let Some(frame) = decoder.next_frame().unwrap() {
                found.push((frame.kind, frame.number, frame.payload.len()));
            }
        }
        assert_eq!(found, [(Kind::Pages, 7, 4096), (Kind::Go, 0, 0)]);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for (kind, length, error) in [
            (0, 0, Error::Kind(0)),
            (7, 0, Error::Kind(7)),
            (u32::MAX, 0, Error::Kind(u32::MAX)),
            (2, 1 << 21, Error::Length(1 << 21)),
            (2, u32::MAX, Error::Length(u32::MAX)),
        ] {
            let mut decoder = Decoder::default();
            decoder.feed(&u32::to_le_bytes(kind));
            decoder.feed(&u32::to_le_bytes(length));
            decoder.feed(&[0; 8]);
            assert_eq!(decoder.next_frame(), Err(error));
        }
        assert_eq!(
            (whole_pages(8192), whole_pages(0), whole_pages(5000)),
            (Some(2), None, None)
        );
    }

    #[test]
    fn words_are_plain() {
        let frame = Frame {
            kind: Kind::Refused,
            number: 0,
            payload: b"no\x1b[31m \xff".to_vec(),
        };
        assert_eq!(frame.words(), "no[31m \u{fffd}");
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..10)) {
            let mut decoder = Decoder::default();
            for piece in pieces {
                decoder.feed(&piece);
                while let Ok(Some(_)) = decoder.next_frame() {}
            }
        }
    }
}
