//! The messages between a VMM and its broker.
//!
//! One `SOCK_SEQPACKET` packet is one JSON message of at most [`MAX_MESSAGE`] bytes. Every request
//! gets exactly one reply with its `id`; where a descriptor was asked for, it travels with the reply by
//! `SCM_RIGHTS`.
//!
//! ```text
//! → {"id":7,"op":{"open":{"name":"/images/disk.img","write":false}}}
//! ← {"id":7,"ok":true}                                   and one descriptor
//! → {"id":8,"op":{"connect":{"device":"/run/v.sock","port":5000}}}
//! ← {"id":8,"error":"..."}
//! → {"id":9,"op":{"create":{"name":"/snapshots/state"}}}
//! ← {"id":9,"ok":true}                                   and one descriptor
//! → {"id":10,"op":{"commit":{"name":"/snapshots/state"}}}
//! ← {"id":10,"ok":true}                                  and none
//! ```
//!
//! Requests are hostile (a guest may have taken the VMM over): they are bounded before they are
//! parsed, unknown fields are refused, and names are checked before they are looked up. A message
//! that is no request at all ends the conversation.

use serde::{Deserialize, Serialize};

/// Largest message in bytes, in either direction.
pub const MAX_MESSAGE: usize = 4096;

/// Most requests that may wait for their reply.
pub const MAX_IN_FLIGHT: usize = 64;

/// Longest error text in a reply, in bytes, so that a reply always fits [`MAX_MESSAGE`]
/// even where JSON escapes every byte of it (`\u0000`, six for one).
const MAX_ERROR: usize = 600;

/// One thing asked of the broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the client; comes back in the reply.
    pub id: u64,
    /// What is asked.
    pub op: Operation,
}

/// What the broker can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Operation {
    /// A file by its name: one passed at start, on the allow-list, or beneath the operator's chroot.
    Open {
        /// The name as the machine config or the API spells it.
        name: String,
        /// For reading and writing; else for reading.
        write: bool,
    },
    /// A queue of a tap, only without a jail: in one, taps are handed over at start.
    Tap {
        /// The interface.
        name: String,
        /// Whether it is to be one of several queues.
        several: bool,
    },
    /// A new Unix socket that listens, only without a jail.
    Listen {
        /// Its path.
        path: String,
    },
    /// A connection to the Unix socket `<device>_<port>`.
    Connect {
        /// The vsock device's `uds_path`, as granted.
        device: String,
        /// The guest's destination port.
        port: u32,
    },
    /// A new, empty file for reading and writing, which is to become the one of that name: until it is
    /// committed nobody sees it, and what has the name keeps it. It is gone when it is discarded, or
    /// when the conversation ends first.
    Create {
        /// The name: on the list of what may be made, or beneath the operator's chroot.
        name: String,
    },
    /// The file that was made for this name takes it, in one step; a regular file that has it is
    /// replaced. What it holds is to be synced by whoever wrote it; that it has the name is synced by the
    /// broker. Answered without a descriptor. If it fails, the file can be committed again, or discarded.
    Commit {
        /// The name as in `create`.
        name: String,
    },
    /// The file that was made for this name is given up. Answered without a descriptor.
    Discard {
        /// The name as in `create`.
        name: String,
    },
}

impl Operation {
    /// Whether a descriptor comes with the answer if it succeeds.
    pub fn gives_descriptor(&self) -> bool {
        !matches!(self, Self::Commit { .. } | Self::Discard { .. })
    }
}

/// The broker's answer to one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// The request's id.
    pub id: u64,
    /// Whether it succeeded; a descriptor comes with the reply exactly then, if the request was for one
    /// ([`Operation::gives_descriptor`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ok: bool,
    /// Why it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Why a message is not one of this protocol.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// Longer than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes: at most {MAX_MESSAGE} are allowed")]
    TooLong(usize),
    /// Not JSON, or not of the right shape.
    #[error("a malformed message: {0}")]
    Malformed(#[source] serde_json::Error),
}

/// Why a name is refused before it is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// An empty name.
    #[error("the name is empty")]
    Empty,
    /// A NUL byte or another control character.
    #[error("the name contains a control character")]
    Control,
    /// A `..` component.
    #[error("the name contains `..`")]
    Parent,
}

impl Reply {
    /// The request succeeded.
    pub fn ok(id: u64) -> Self {
        Self {
            id,
            ok: true,
            error: None,
        }
    }

    /// The request failed; the text is cut where it would not fit a message.
    pub fn error(id: u64, text: impl Into<String>) -> Self {
        let mut text: String = text.into();
        if text.len() > MAX_ERROR {
            let end = (0..=MAX_ERROR)
                .rev()
                .find(|at| text.is_char_boundary(*at))
                .unwrap_or(0);
            text.truncate(end);
            text.push('…');
        }
        Self {
            id,
            ok: false,
            error: Some(text),
        }
    }
}

/// Checks a name that came in a request.
///
/// # Errors
/// If it is empty, holds a control character (NUL included), or a `..` component.
pub fn check_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.chars().any(char::is_control) {
        return Err(NameError::Control);
    }
    if name.split('/').any(|part| part == "..") {
        return Err(NameError::Parent);
    }
    Ok(())
}

/// Turns a message into its bytes.
///
/// # Errors
/// If it is longer than [`MAX_MESSAGE`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, ProtocolError> {
    let bytes = serde_json::to_vec(message).map_err(ProtocolError::Malformed)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(ProtocolError::TooLong(bytes.len()));
    }
    Ok(bytes)
}

/// Reads a message.
///
/// # Errors
/// If it is too long, or not exactly one message of the type asked for.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, ProtocolError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(ProtocolError::TooLong(bytes.len()));
    }
    serde_json::from_slice(bytes).map_err(ProtocolError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_look_as_documented() {
        let open = Request {
            id: 7,
            op: Operation::Open {
                name: "x".into(),
                write: false,
            },
        };
        let text = r#"{"id":7,"op":{"open":{"name":"x","write":false}}}"#;
        assert_eq!(encode(&open).unwrap(), text.as_bytes());
        assert_eq!(decode::<Request>(text.as_bytes()).unwrap(), open);
        assert_eq!(encode(&Reply::ok(8)).unwrap(), br#"{"id":8,"ok":true}"#);
        assert_eq!(
            encode(&Reply::error(8, "no")).unwrap(),
            br#"{"id":8,"error":"no"}"#
        );
        let name = || "x".to_owned();
        for (op, word, gives) in [
            (Operation::Create { name: name() }, "create", true),
            (Operation::Commit { name: name() }, "commit", false),
            (Operation::Discard { name: name() }, "discard", false),
        ] {
            assert_eq!(op.gives_descriptor(), gives);
            let text = format!(r#"{{"id":9,"op":{{"{word}":{{"name":"x"}}}}}}"#);
            let request = Request { id: 9, op };
            assert_eq!(encode(&request).unwrap(), text.as_bytes());
            assert_eq!(decode::<Request>(text.as_bytes()).unwrap(), request);
        }
    }

    #[test]
    fn refuses_what_is_no_request() {
        let deep = "[".repeat(MAX_MESSAGE);
        let nested = format!(
            r#"{{"id":1,"op":{{"open":{{"name":{}1{},"write":true}}}}}}"#,
            "[".repeat(1000),
            "]".repeat(1000)
        );
        for bad in [
            "",
            "null",
            "{}",
            deep.as_str(),
            nested.as_str(),
            r#"{"id":-1,"op":{"connect":{"device":"a","port":1}}}"#,
            r#"{"id":1,"op":{"connect":{"device":"a","port":4294967296}}}"#,
            r#"{"id":1,"op":{"connect":{"device":"a","port":1.5}}}"#,
            r#"{"id":1,"op":{"connect":{"device":"a","port":1,"x":1}}}"#,
            r#"{"id":1,"op":{"connect":{"device":"a","port":1}},"id":2}"#,
            r#"{"id":1,"op":{"exec":{"path":"/bin/sh"}}}"#,
            r#"{"id":1,"op":{"open":{"name":"a","write":true}}} {}"#,
            r#"{"id":1,"op":{"create":{"name":"a","mode":511}}}"#,
            r#"{"id":1,"op":{"commit":{}}}"#,
            r#"{"id":1,"op":{"discard":"a"}}"#,
        ] {
            assert!(decode::<Request>(bad.as_bytes()).is_err(), "{bad:.80}");
        }
        assert!(matches!(
            decode::<Request>(&vec![b' '; MAX_MESSAGE + 1]),
            Err(ProtocolError::TooLong(_))
        ));
        assert!(decode::<Request>(b"\xff\xfe").is_err());
    }

    #[test]
    fn names_cannot_climb_or_hide() {
        assert_eq!(check_name(""), Err(NameError::Empty));
        for bad in ["a\0b", "a\nb", "\x1b[2J"] {
            assert_eq!(check_name(bad), Err(NameError::Control));
        }
        for bad in ["..", "../x", "/a/../b", "a/.."] {
            assert_eq!(check_name(bad), Err(NameError::Parent));
        }
        for good in ["/a/b", "a..b", "...", "tap0"] {
            assert_eq!(check_name(good), Ok(()));
        }
    }

    #[test]
    fn an_error_always_fits() {
        for text in ["\u{1}".repeat(5000), "é".repeat(5000), "x".repeat(601)] {
            assert!(encode(&Reply::error(u64::MAX, text)).is_ok());
        }
    }
}
