//! The conversation between the runtime on the host and init in the guest.
//!
//! Init connects to the host's [`PORT`] over vsock and sends [`Ready`]; the host answers with one [`Spec`]; then streams,
//! window sizes and signals flow until init sends [`Exited`] or [`Failed`] and powers off. In a machine that goes on from a
//! snapshot the connection is gone: init connects again and sends [`Resumed`]; the host answers with one [`Identity`], and
//! all goes on from there, the window of standard input being full again. Each frame is one type byte, a
//! little-endian `u32` length of at most [`MAX_PAYLOAD`], and the payload.
//!
//! Both sides treat the other as hostile: a frame of the wrong direction, of an unknown type or too long is an error
//! as soon as its header is seen, and a [`Decoder`] never buffers more than one frame plus what it is fed.
//!
//! Standard input has a window: the host keeps at most [`STDIN_WINDOW`] bytes sent and not yet reported as taken by
//! [`Frame::StdinTaken`]. A command that never reads thus never fills the connection, and a signal or a new window
//! size always gets through.

use serde::{Deserialize, Serialize};

/// The context id of the host, as every guest sees it (`VMADDR_CID_HOST`, vsock(7)).
pub const HOST_CID: u32 = 2;
/// The host's vsock port that init connects to.
pub const PORT: u32 = 1024;
/// The guest's vsock port at which the host has everything in it held while it is saved, for as long as it is connected. What
/// it reads is `F` when all is held, `N` when it could not be.
pub const FREEZE_PORT: u32 = 1025;
/// Version of this protocol, in [`Ready`].
pub const VERSION: u32 = 2;
/// Bytes of a frame's header: type and length.
pub const HEADER_SIZE: usize = 5;
/// Greatest length of a frame's payload, in bytes.
pub const MAX_PAYLOAD: usize = 65536;
/// Bytes of entropy in an [`Identity`]: twice what the kernel's generator has.
pub const ENTROPY_BYTES: usize = 64;
/// Longest host name of Linux (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;
/// Most network cards of which an [`Identity`] speaks.
const MAX_CARDS: usize = 32;
/// Greatest number of bytes of standard input that the host may have under way.
pub const STDIN_WINDOW: usize = 256 * 1024;

/// Why a frame was not accepted or not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The type byte names no frame.
    #[error("frame of unknown type {0}")]
    UnknownType(u8),
    /// The type exists, but only in the other direction.
    #[error("frame of type {0} sent in the wrong direction")]
    WrongDirection(u8),
    /// The announced length is above [`MAX_PAYLOAD`], or wrong for this type.
    #[error("frame of type {kind} with a length of {length} bytes")]
    BadLength {
        /// The type byte.
        kind: u8,
        /// The announced length.
        length: usize,
    },
    /// The payload is not what its type asks for.
    #[error("frame of type {kind} with a bad payload: {source}")]
    BadPayload {
        /// The type byte.
        kind: u8,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// What should be sent does not fit into one frame.
    #[error("{what} takes {length} bytes, more than the {MAX_PAYLOAD} of a frame")]
    TooLong {
        /// What was to be sent.
        what: &'static str,
        /// Its encoded length.
        length: usize,
    },
}

/// What to run. Sent once by the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Program and arguments; a program without a slash is looked up in the `PATH` of `env`.
    pub argv: Vec<String>,
    /// The whole environment, in order.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory; `/` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Give the command a terminal. Its output then comes as [`Frame::Stdout`] only.
    #[serde(default)]
    pub tty: bool,
    /// Rows of the terminal; 0 is unknown.
    #[serde(default)]
    pub rows: u16,
    /// Columns of the terminal; 0 is unknown.
    #[serde(default)]
    pub cols: u16,
    /// The guest's host name; empty leaves the kernel's.
    #[serde(default)]
    pub hostname: String,
    /// User id of the command; 0 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group id of the command; 0 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
}

/// Who a machine is that goes on from a snapshot, as others may: what makes it another one than they are. Sent by the host
/// in answer to [`Resumed`], and before the [`Spec`] to a machine that was saved before it was ready.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The guest's host name.
    pub hostname: String,
    /// Random bytes that no other machine gets: [`ENTROPY_BYTES`].
    pub entropy: Vec<u8>,
    /// Nanoseconds since 1970.
    pub time: u64,
    /// Hardware addresses of its network cards, in their order; those of cards beyond them stay.
    #[serde(default)]
    pub addresses: Vec<[u8; 6]>,
}

impl Identity {
    /// Whether it is one: what it has is bounded, and enough.
    pub fn is_valid(&self) -> bool {
        self.entropy.len() == ENTROPY_BYTES
            && (1..=MAX_HOSTNAME).contains(&self.hostname.len())
            && self.addresses.len() <= MAX_CARDS
            // Neither of a group, nor none.
            && self.addresses.iter().all(|address| address[0] & 1 == 0 && *address != [0; 6])
    }
}

/// Init goes on from a snapshot, and waits for its [`Identity`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resumed {
    /// [`VERSION`] of the guest's side.
    pub version: u32,
    /// Whether the command runs; if not, init waits for the [`Spec`], too.
    pub running: bool,
}

/// Init is up and waits for its [`Spec`]: all mounts are in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// [`VERSION`] of the guest's side.
    pub version: u32,
    /// Release of the guest's kernel (`uname -r`).
    pub kernel: String,
}

/// How the command ended, all its output having been sent before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exited {
    /// It exited with this code, 0–255.
    Code(u8),
    /// It was killed by this signal.
    Signal(u8),
}

impl Exited {
    /// The code that a shell would report: the command's own, or 128 + signal.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128u8.saturating_add(signal),
        }
    }
}

/// Why the command was not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// What kind of failure it was.
    pub kind: FailureKind,
    /// One line for a person.
    pub message: String,
}

/// Kinds of [`Failed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// No such program (exit code 127).
    NotFound,
    /// The program cannot be executed (exit code 126).
    NotExecutable,
    /// A file system could not be mounted, or its device did not appear.
    Mount,
    /// A kernel module could not be loaded.
    Module,
    /// Anything else.
    Other,
}

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// The runtime.
    Host,
    /// Init.
    Guest,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Host: what to run.
    Spec(Spec),
    /// Host: standard input, within the window of [`STDIN_WINDOW`].
    Stdin(Vec<u8>),
    /// Host: end of standard input.
    StdinClose,
    /// Host: the terminal's new size.
    Resize {
        /// Rows of text.
        rows: u16,
        /// Columns of text.
        cols: u16,
    },
    /// Host: send this signal to the command's process group.
    Signal(u32),
    /// Host: who the guest is from now on.
    Identity(Identity),
    /// Guest: waiting for the [`Spec`].
    Ready(Ready),
    /// Guest: waiting for the [`Identity`].
    Resumed(Resumed),
    /// Guest: the command's standard output, or its terminal's output.
    Stdout(Vec<u8>),
    /// Guest: the command's standard error.
    Stderr(Vec<u8>),
    /// Guest: the command ended. The last frame.
    Exited(Exited),
    /// Guest: the command did not run. The last frame.
    Failed(Failed),
    /// Guest: that many more bytes of standard input were taken by the command (or discarded, if it closed its end).
    StdinTaken(u32),
}

const SPEC: u8 = 1;
const STDIN: u8 = 2;
const STDIN_CLOSE: u8 = 3;
const RESIZE: u8 = 4;
const SIGNAL: u8 = 5;
const IDENTITY: u8 = 6;
const READY: u8 = 16;
const STDOUT: u8 = 17;
const STDERR: u8 = 18;
const EXITED: u8 = 19;
const FAILED: u8 = 20;
const STDIN_TAKEN: u8 = 21;
const RESUMED: u8 = 22;

impl Frame {
    /// Appends the encoded frame to `out`, which is left as it was when the frame is too long.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        match self {
            Self::Spec(spec) => put_json(out, SPEC, "the command with its environment", spec),
            Self::Stdin(data) => put(out, STDIN, "input", data),
            Self::StdinClose => put(out, STDIN_CLOSE, "", &[]),
            Self::Resize { rows, cols } => {
                let [a, b] = rows.to_le_bytes();
                let [c, d] = cols.to_le_bytes();
                put(out, RESIZE, "", &[a, b, c, d])
            }
            Self::Signal(number) => put(out, SIGNAL, "", &number.to_le_bytes()),
            Self::Identity(identity) => put_json(out, IDENTITY, "the identity", identity),
            Self::Ready(ready) => put_json(out, READY, "ready", ready),
            Self::Resumed(resumed) => put_json(out, RESUMED, "resumed", resumed),
            Self::Stdout(data) => put(out, STDOUT, "output", data),
            Self::Stderr(data) => put(out, STDERR, "output", data),
            Self::Exited(exited) => put_json(out, EXITED, "exit status", exited),
            Self::Failed(failed) => put_json(out, FAILED, "failure", failed),
            Self::StdinTaken(bytes) => put(out, STDIN_TAKEN, "", &bytes.to_le_bytes()),
        }
    }

    /// The encoded frame by itself.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        self.encode(&mut out)?;
        Ok(out)
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, Error> {
        Ok(match kind {
            SPEC => Self::Spec(json(kind, payload)?),
            STDIN => Self::Stdin(payload.to_vec()),
            STDIN_CLOSE => Self::StdinClose,
            RESIZE => {
                let [a, b, c, d] = four(kind, payload)?;
                Self::Resize {
                    rows: u16::from_le_bytes([a, b]),
                    cols: u16::from_le_bytes([c, d]),
                }
            }
            SIGNAL => Self::Signal(u32::from_le_bytes(four(kind, payload)?)),
            IDENTITY => Self::Identity(json(kind, payload)?),
            READY => Self::Ready(json(kind, payload)?),
            RESUMED => Self::Resumed(json(kind, payload)?),
            STDOUT => Self::Stdout(payload.to_vec()),
            STDERR => Self::Stderr(payload.to_vec()),
            EXITED => Self::Exited(json(kind, payload)?),
            FAILED => Self::Failed(json(kind, payload)?),
            STDIN_TAKEN => Self::StdinTaken(u32::from_le_bytes(four(kind, payload)?)),
            _ => return Err(Error::UnknownType(kind)),
        })
    }
}

fn put(out: &mut Vec<u8>, kind: u8, what: &'static str, payload: &[u8]) -> Result<(), Error> {
    let too_long = || Error::TooLong {
        what,
        length: payload.len(),
    };
    if payload.len() > MAX_PAYLOAD {
        return Err(too_long());
    }
    let length = u32::try_from(payload.len()).map_err(|_| too_long())?;
    out.push(kind);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

fn put_json(
    out: &mut Vec<u8>,
    kind: u8,
    what: &'static str,
    value: &impl Serialize,
) -> Result<(), Error> {
    let payload = serde_json::to_vec(value).map_err(|source| Error::BadPayload { kind, source })?;
    put(out, kind, what, &payload)
}

fn json<'a, T: Deserialize<'a>>(kind: u8, payload: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(payload).map_err(|source| Error::BadPayload { kind, source })
}

fn four(kind: u8, payload: &[u8]) -> Result<[u8; 4], Error> {
    payload.try_into().map_err(|_| Error::BadLength {
        kind,
        length: payload.len(),
    })
}

/// Refuses what `sender` may not send, from the header alone.
fn check_header(sender: Sender, kind: u8, length: usize) -> Result<(), Error> {
    let (from, fits) = match kind {
        STDIN => (Sender::Host, true),
        STDIN_CLOSE => (Sender::Host, length == 0),
        RESIZE | SIGNAL => (Sender::Host, length == 4),
        SPEC | IDENTITY => (Sender::Host, true),
        READY | RESUMED | STDOUT | STDERR | EXITED | FAILED => (Sender::Guest, true),
        STDIN_TAKEN => (Sender::Guest, length == 4),
        _ => return Err(Error::UnknownType(kind)),
    };
    if from != sender {
        return Err(Error::WrongDirection(kind));
    }
    if !fits || length > MAX_PAYLOAD {
        return Err(Error::BadLength { kind, length });
    }
    Ok(())
}

/// Cuts a stream of bytes into frames.
///
/// Feed what was read, then call [`Decoder::next_frame`] until it returns `None`, then read again: so it holds at most
/// one incomplete frame and the last chunk. After an error the stream cannot be resumed: close it.
#[derive(Debug)]
pub struct Decoder {
    from: Sender,
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// A decoder of what `from` sends.
    pub fn new(from: Sender) -> Self {
        Self {
            from,
            buffer: Vec::new(),
            start: 0,
        }
    }

    /// Adds bytes as they came.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` when more bytes are needed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Error> {
        let rest = self.buffer.get(self.start..).unwrap_or_default();
        let Some((&[kind, a, b, c, d], body)) = rest.split_first_chunk::<HEADER_SIZE>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        check_header(self.from, kind, length)?;
        let Some(payload) = body.get(..length) else {
            return Ok(None);
        };
        let frame = Frame::decode(kind, payload)?;
        self.start = self
            .start
            .saturating_add(HEADER_SIZE)
            .saturating_add(length);
        Ok(Some(frame))
    }

    /// True when the stream ended in the middle of a frame.
    pub fn is_midway(&self) -> bool {
        self.start < self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(from: Sender, bytes: &[u8], chunk: usize) -> Result<Vec<Frame>, Error> {
        let mut decoder = Decoder::new(from);
        let mut frames = Vec::new();
        for part in bytes.chunks(chunk) {
            decoder.feed(part);
            while let Some(frame) = decoder.next_frame()? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    fn spec() -> Spec {
        Spec {
            argv: vec!["uname".into(), "-a".into()],
            env: vec![("PATH".into(), "/bin".into())],
            tty: true,
            rows: 24,
            cols: 80,
            hostname: "guest".into(),
            uid: Some(1000),
            ..Spec::default()
        }
    }

    fn identity() -> Identity {
        Identity {
            hostname: "clone-1".into(),
            entropy: vec![0xa5; ENTROPY_BYTES],
            time: u64::MAX,
            addresses: vec![[2, 0, 0, 0, 0, 1]],
        }
    }

    #[test]
    fn an_identity_is_whole() {
        assert!(identity().is_valid());
        let long = "x".repeat(MAX_HOSTNAME + 1);
        for bad in [
            Identity {
                hostname: String::new(),
                ..identity()
            },
            Identity {
                hostname: long,
                ..identity()
            },
            Identity {
                entropy: vec![1; ENTROPY_BYTES - 1],
                ..identity()
            },
            Identity {
                entropy: vec![1; 60_000],
                ..identity()
            },
            Identity {
                addresses: vec![[1, 0, 0, 0, 0, 1]],
                ..identity()
            },
            Identity {
                addresses: vec![[0; 6]],
                ..identity()
            },
            Identity {
                addresses: vec![[2; 6]; MAX_CARDS + 1],
                ..identity()
            },
        ] {
            assert!(!bad.is_valid(), "{bad:?}");
        }
    }

    #[test]
    fn frames_survive_any_cut() {
        let host = vec![
            Frame::Spec(spec()),
            Frame::Stdin(b"hello".to_vec()),
            Frame::Stdin(Vec::new()),
            Frame::Resize {
                rows: 50,
                cols: 132,
            },
            Frame::Signal(15),
            Frame::StdinClose,
            Frame::Identity(identity()),
        ];
        let guest = vec![
            Frame::Ready(Ready {
                version: VERSION,
                kernel: "6.1.0".into(),
            }),
            Frame::Stdout(vec![0; MAX_PAYLOAD]),
            Frame::Stderr(b"x".to_vec()),
            Frame::StdinTaken(5),
            Frame::Resumed(Resumed {
                version: VERSION,
                running: true,
            }),
            Frame::Exited(Exited::Signal(9)),
            Frame::Failed(Failed {
                kind: FailureKind::NotFound,
                message: "x: not found".into(),
            }),
        ];
        for (from, frames) in [(Sender::Host, host), (Sender::Guest, guest)] {
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.encode(&mut bytes).unwrap();
            }
            for chunk in [1, 2, 7, 4096, bytes.len()] {
                assert_eq!(
                    all(from, &bytes, chunk).unwrap(),
                    frames,
                    "chunks of {chunk}"
                );
            }
        }
    }

    #[test]
    fn json_is_as_documented() {
        let text = |frame: Frame| {
            String::from_utf8(frame.to_bytes().unwrap().split_off(HEADER_SIZE)).unwrap()
        };
        assert_eq!(text(Frame::Exited(Exited::Code(3))), r#"{"code":3}"#);
        assert_eq!(text(Frame::Exited(Exited::Signal(9))), r#"{"signal":9}"#);
        let failed = Failed {
            kind: FailureKind::NotExecutable,
            message: "m".into(),
        };
        assert_eq!(
            text(Frame::Failed(failed)),
            r#"{"kind":"not-executable","message":"m"}"#
        );
    }

    #[test]
    fn hostile_headers_are_refused_at_once() {
        let header = |kind: u8, length: u32| {
            let mut bytes = vec![kind];
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes
        };
        let refused = |from, kind, length| all(from, &header(kind, length), 64).unwrap_err();
        assert!(matches!(
            refused(Sender::Guest, 99, 0),
            Error::UnknownType(99)
        ));
        assert!(matches!(
            refused(Sender::Guest, SPEC, 2),
            Error::WrongDirection(SPEC)
        ));
        assert!(matches!(
            refused(Sender::Host, STDOUT, 2),
            Error::WrongDirection(STDOUT)
        ));
        assert!(matches!(
            refused(Sender::Guest, STDOUT, u32::MAX),
            Error::BadLength { .. }
        ));
        assert!(matches!(
            refused(Sender::Guest, STDOUT, 65537),
            Error::BadLength { .. }
        ));
        assert!(matches!(
            refused(Sender::Host, SIGNAL, 3),
            Error::BadLength { .. }
        ));
        assert!(matches!(
            refused(Sender::Host, STDIN_CLOSE, 1),
            Error::BadLength { .. }
        ));
    }

    #[test]
    fn bad_payloads_are_errors() {
        let frame = |kind, payload: &[u8]| {
            let mut bytes = Vec::new();
            put(&mut bytes, kind, "", payload).unwrap();
            bytes
        };
        for payload in [
            &b"{}"[..],
            b"",
            b"\xff",
            b"{\"code\":256}",
            b"{\"code\":1,\"signal\":2}",
            b"{\"signal\":-1}",
        ] {
            let error = all(Sender::Guest, &frame(EXITED, payload), 64).unwrap_err();
            assert!(
                matches!(error, Error::BadPayload { kind: EXITED, .. }),
                "{error}"
            );
        }
        assert!(
            all(
                Sender::Host,
                &frame(SPEC, b"{\"argv\":[\"a\"],\"what\":1}"),
                64
            )
            .is_err()
        );
    }

    #[test]
    fn too_long_is_refused_when_sending() {
        let mut out = b"kept".to_vec();
        let error = Frame::Stdin(vec![0; MAX_PAYLOAD + 1])
            .encode(&mut out)
            .unwrap_err();
        assert!(matches!(error, Error::TooLong { .. }));
        assert_eq!(out, b"kept");
        let long = Spec {
            argv: vec!["x".repeat(MAX_PAYLOAD)],
            ..Spec::default()
        };
        assert!(
            Frame::Spec(long)
                .to_bytes()
                .unwrap_err()
                .to_string()
                .contains("environment")
        );
    }

    #[test]
    fn an_interrupted_frame_is_noticed() {
        let mut decoder = Decoder::new(Sender::Guest);
        decoder.feed(&Frame::StdinTaken(1).to_bytes().unwrap());
        assert!(decoder.next_frame().unwrap().is_some());
        assert!(!decoder.is_midway());
        decoder.feed(&[STDOUT, 4, 0]);
        assert!(decoder.next_frame().unwrap().is_none());
        assert!(decoder.is_midway());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096), chunk in 1usize..600) {
            for from in [Sender::Host, Sender::Guest] {
                let _ = all(from, &bytes, chunk);
            }
        }

        #[test]
        fn almost_valid_frames_never_panic(
            kind in prop_oneof![0u8..9, 14u8..25],
            payload in proptest::collection::vec(any::<u8>(), 0..200),
            cut in 0usize..220,
        ) {
            let mut bytes = Vec::new();
            put(&mut bytes, kind, "", &payload).unwrap();
            bytes.truncate(cut);
            for from in [Sender::Host, Sender::Guest] {
                let _ = all(from, &bytes, 16);
            }
        }

        #[test]
        fn data_comes_back_whole(data in proptest::collection::vec(any::<u8>(), 0..2000), chunk in 1usize..300) {
            let frame = Frame::Stdin(data);
            let bytes = frame.to_bytes().unwrap();
            prop_assert_eq!(all(Sender::Host, &bytes, chunk).unwrap(), vec![frame]);
        }
    }
}
