//! What links the two files of a snapshot.

use std::fmt;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// A snapshot's name for itself: 128 random bits, the same in its state file and its memory file. Not a
/// secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotId([u8; 16]);

impl SnapshotId {
    /// One that no other snapshot has.
    ///
    /// # Errors
    /// When the kernel has no random bytes (getrandom(2)).
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        // Up to 256 bytes come whole and uninterrupted once the pool is ready (getrandom(2)).
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    /// That of these bytes, as a file has them.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes, as a file has them.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

/// 32 hexadecimal digits, in the order of the bytes.
impl fmt::Display for SnapshotId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_shown_as_digits_and_never_the_same() {
        let bytes = *b"\0\x01\x0f\xf0\xffabcdefghijk";
        let id = SnapshotId::from_bytes(bytes);
        assert_eq!(id.to_string(), "00010ff0ff6162636465666768696a6b");
        assert_eq!(id.to_bytes(), bytes);
        let (one, other) = (SnapshotId::random().unwrap(), SnapshotId::random().unwrap());
        assert_ne!(one, other);
    }
}
