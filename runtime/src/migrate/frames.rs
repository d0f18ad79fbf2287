//! What passes by: only as much of a machine's frames as it takes to say where the machine is.
//!
//! A frame is its kind, the length of its payload, 4 bytes each, a number of 8 bytes, and the payload; all little-endian.

use std::time::{Duration, Instant};

use serde_json::Value;

/// Bytes before the payload.
const HEADER: usize = 16;
/// Most bytes of a payload that are looked at.
const MAX_WORDS: usize = 4096;
/// It is the other end's now.
const GO: u32 = 6;
/// The other end does not take it.
const REFUSED: u32 = 18;
/// It runs.
const RUNNING: u32 = 20;

/// One direction.
#[derive(Debug, Default)]
pub struct Frames {
    /// The beginning of a frame.
    header: Vec<u8>,
    /// Bytes that are left of its payload.
    left: u64,
    /// Which of them are kept.
    words: Vec<u8>,
    /// All that has passed.
    bytes: u64,
    go: Option<(Instant, Vec<u8>)>,
    refused: Option<Vec<u8>>,
    running: Option<Instant>,
}

impl Frames {
    /// Sees what passes.
    pub fn see(&mut self, mut bytes: &[u8]) {
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        while !bytes.is_empty() {
            let missing = HEADER.saturating_sub(self.header.len());
            if missing > 0 {
                let (head, rest) = bytes.split_at(missing.min(bytes.len()));
                self.header.extend_from_slice(head);
                bytes = rest;
                if self.header.len() < HEADER {
                    return;
                }
                self.left = u64::from(self.field(4));
                self.words.clear();
            } else {
                let left = usize::try_from(self.left).unwrap_or(usize::MAX);
                let (part, rest) = bytes.split_at(left.min(bytes.len()));
                if [GO, REFUSED].contains(&self.field(0)) {
                    let room = MAX_WORDS.saturating_sub(self.words.len());
                    let part = part.get(..room).unwrap_or(part);
                    self.words.extend_from_slice(part);
                }
                self.left = self.left.saturating_sub(part.len() as u64);
                bytes = rest;
            }
            if self.left == 0 {
                self.note();
                self.header.clear();
            }
        }
    }

    fn field(&self, at: usize) -> u32 {
        let bytes = self.header.get(at..at.saturating_add(4));
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }

    /// A frame is whole.
    fn note(&mut self) {
        let words = std::mem::take(&mut self.words);
        match self.field(0) {
            GO => self.go = Some((Instant::now(), words)),
            REFUSED => self.refused = Some(words),
            RUNNING => self.running = Some(Instant::now()),
            _ => {}
        }
    }

    /// How much has passed.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the machine was handed over.
    pub fn is_given(&self) -> bool {
        self.go.is_some()
    }

    /// Whether the other end has said that it runs there.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// What the other end said when it did not take the machine.
    pub fn refused(&self) -> Option<String> {
        self.refused
            .as_ref()
            .map(|words| crate::api::plain(&String::from_utf8_lossy(words)))
    }

    /// What was said when the machine was handed over: how far it was.
    pub fn farewell(&self) -> Value {
        let words = self.go.as_ref();
        words
            .and_then(|(_, words)| serde_json::from_slice(words).ok())
            .unwrap_or_default()
    }

    /// How long after that it was said that it runs.
    pub fn until(&self, back: &Self) -> Duration {
        match (&self.go, back.running) {
            (Some((go, _)), Some(running)) => running.saturating_duration_since(*go),
            _ => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        let mut bytes = [kind.to_le_bytes(), length.to_le_bytes()].concat();
        bytes.extend([9; 8]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn what_passes_is_understood_however_it_is_cut() {
        let go = frame(GO, br#"{"round":3,"downtime_us":7}"#);
        let bytes = [frame(2, &[GO as u8; 5000]), go, frame(RUNNING, b"")].concat();
        for size in [1, 7, 16, 17, 4096, bytes.len()] {
            let mut frames = Frames::default();
            for chunk in bytes[..bytes.len() - 1].chunks(size) {
                frames.see(chunk);
            }
            assert!(frames.is_given() && !frames.is_running(), "{size}");
            frames.see(&bytes[bytes.len() - 1..]);
            assert!(frames.is_running(), "{size}");
            assert_eq!(frames.farewell()["round"], 3);
            assert_eq!(frames.bytes(), bytes.len() as u64);
        }
    }

    #[test]
    fn nonsense_does_no_harm() {
        let mut frames = Frames::default();
        frames.see(&[0xff; 100_000]);
        assert!(!frames.is_given() && !frames.is_running());
        let mut frames = Frames::default();
        frames.see(&frame(GO, &[b'x'; 100_000]));
        assert_eq!(frames.farewell(), Value::Null);
        frames.see(&frame(REFUSED, b"no\x1b[2J"));
        assert_eq!(frames.refused().unwrap(), "no[2J");
    }
}
