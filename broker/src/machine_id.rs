//! The name of a machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest machine id, in bytes (as in Firecracker).
pub const MAX_LENGTH: usize = 64;

/// The name of a machine: 1 to 64 characters of `A-Z a-z 0-9 -`.
///
/// It becomes a cgroup's and a directory's name, so a value of this type is safe as one path
/// component: it is never empty, `.` or `..`, and holds no `/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineId(String);

/// Why a string is not a machine id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineIdError {
    /// No character at all.
    #[error("the machine id is empty: use 1 to {MAX_LENGTH} letters, digits and hyphens")]
    Empty,
    /// More than [`MAX_LENGTH`] characters.
    #[error("the machine id has {0} characters: at most {MAX_LENGTH} are allowed")]
    TooLong(usize),
    /// A character that is not allowed.
    #[error("the machine id contains {0:?}: only letters, digits and hyphens are allowed")]
    Character(char),
}

impl MachineId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MachineId {
    type Err = MachineIdError;

    fn from_str(text: &str) -> Result<Self, MachineIdError> {
        if text.is_empty() {
            return Err(MachineIdError::Empty);
        }
        if let Some(bad) = text
            .chars()
            .find(|c| !c.is_ascii_alphanumeric() && *c != '-')
        {
            return Err(MachineIdError::Character(bad));
        }
        if text.len() > MAX_LENGTH {
            return Err(MachineIdError::TooLong(text.len()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for MachineId {
    type Error = MachineIdError;

    fn try_from(text: String) -> Result<Self, MachineIdError> {
        text.parse()
    }
}

impl From<MachineId> for String {
    fn from(id: MachineId) -> Self {
        id.0
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_firecracker_accepts() {
        for good in ["a", "vm-1", "-", "A9", &"x".repeat(64)] {
            assert_eq!(good.parse::<MachineId>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn refuses_what_could_walk_or_overflow() {
        assert_eq!("".parse::<MachineId>(), Err(MachineIdError::Empty));
        for bad in ["a/b", "..", "a b", "a\0", "a\n", "é", "a_b"] {
            assert!(
                matches!(bad.parse::<MachineId>(), Err(MachineIdError::Character(_))),
                "{bad:?}"
            );
        }
        assert_eq!(
            "x".repeat(300).parse::<MachineId>(),
            Err(MachineIdError::TooLong(300))
        );
    }

    #[test]
    fn is_checked_when_read_from_json() {
        assert!(serde_json::from_str::<MachineId>("\"../x\"").is_err());
    }
}
