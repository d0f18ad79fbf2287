//! Bytes of the guest's console and of the VMM's log, made fit to be shown.

use std::collections::VecDeque;

/// Bytes of the console that are kept.
pub const TAIL_BYTES: usize = 8 * 1024;
/// Lines of it that are shown.
const TAIL_LINES: usize = 80;

/// The end of a stream, bounded.
#[derive(Debug, Default)]
pub struct Tail(VecDeque<u8>);

impl Tail {
    /// Adds bytes, forgetting the oldest.
    pub fn push(&mut self, bytes: &[u8]) {
        let keep = bytes.len().saturating_sub(TAIL_BYTES);
        let bytes = bytes.get(keep..).unwrap_or_default();
        let excess = self
            .0
            .len()
            .saturating_add(bytes.len())
            .saturating_sub(TAIL_BYTES);
        self.0.drain(..excess.min(self.0.len()));
        self.0.extend(bytes);
    }

    /// The last lines, fit for a terminal; empty when nothing came.
    pub fn lines(&self) -> Vec<u8> {
        let mut neutral = Vec::new();
        let (front, back) = self.0.as_slices();
        neutralise(front, &mut neutral);
        neutralise(back, &mut neutral);
        while neutral.last() == Some(&b'\n') {
            neutral.pop();
        }
        let start = neutral
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, byte)| **byte == b'\n')
            .nth(TAIL_LINES.saturating_sub(1))
            .map_or(0, |(index, _)| index.saturating_add(1));
        let mut lines = neutral.split_off(start.min(neutral.len()));
        if !lines.is_empty() {
            lines.push(b'\n');
        }
        lines
    }
}

/// Appends `bytes` with all that a terminal could take for a command replaced by `?`: a guest must not move the cursor,
/// set the title, or make the terminal type. Line feeds and tabs stay, carriage returns go; so does what is not ASCII,
/// since 0x80 to 0x9f are commands too and half of a character cannot be judged.
pub fn neutralise(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend(
        bytes
            .iter()
            .filter(|byte| **byte != b'\r')
            .map(|byte| match byte {
                b'\n' | b'\t' | b' '..=b'~' => *byte,
                _ => b'?',
            }),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_neutralised() {
        let mut out = Vec::new();
        neutralise(b"a\x1b[2Jb\r\n\x07\x9b1m\tz\x7f", &mut out);
        assert_eq!(out, b"a?[2Jb\n??1m\tz?");
    }

    #[test]
    fn the_tail_is_bounded() {
        let mut tail = Tail::default();
        assert!(tail.lines().is_empty());
        for line in 0..5000 {
            tail.push(format!("line {line}\r\n").as_bytes());
        }
        assert!(tail.0.len() <= TAIL_BYTES);
        let text = String::from_utf8(tail.lines()).unwrap();
        assert_eq!(text.lines().count(), TAIL_LINES);
        assert_eq!(text.lines().last(), Some("line 4999"));
        tail.push(&vec![b'x'; 10 * TAIL_BYTES]);
        assert_eq!(tail.0.len(), TAIL_BYTES);
    }
}
