//! A client of a machine's API, whose socket is in the machine's directory.
//!
//! The VMM may have been taken over by its guest: what it answers is bounded in size and time, and nothing of it is
//! shown but a number or a line of plain characters.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Most bytes of an answer.
pub const MAX_ANSWER: usize = 16 << 10;
/// How long the VMM may take for what it does at once.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How often whoever waits is asked whether he still does.
const TURN: Duration = Duration::from_millis(50);
/// Most characters of its words that are shown.
const MAX_WORDS: usize = 400;

/// Asks, and waits for the answer as long as `PATIENCE`.
pub fn ask(socket: &Path, method: &str, path: &str, body: &Value) -> io::Result<Answer> {
    let end = Instant::now() + PATIENCE;
    ask_while(socket, method, path, body, &mut || Instant::now() < end)
}

/// Asks, and waits for the answer as long as `waits` says so.
pub fn ask_while(
    socket: &Path,
    method: &str,
    path: &str,
    body: &Value,
    waits: &mut dyn FnMut() -> bool,
) -> io::Result<Answer> {
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    exchange(socket, &request(method, path, &body), waits)
}

/// The bytes of a request, after which the connection can be used for another one.
pub fn request(method: &str, path: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// What is no answer.
pub fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a malformed answer")
}

/// Words of others, fit for a terminal.
pub fn plain(words: &str) -> String {
    let plain = words.chars().filter(|c| !c.is_control());
    plain.take(MAX_WORDS).collect()
}

/// What the VMM says.
#[derive(Debug, PartialEq)]
pub struct Answer {
    /// Of HTTP.
    pub status: u16,
    /// Null without one.
    pub body: Value,
}

impl Answer {
    /// The answer that these bytes begin with, and how many of them it is; none if they are only its beginning.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, io::Error> {
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            return Ok(None);
        };
        let (head, rest) = bytes.split_at_checked(end).ok_or_else(malformed)?;
        let rest = rest.get(4..).unwrap_or_default();
        let head = std::str::from_utf8(head).map_err(|_| malformed())?;
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        let status = status
            .and_then(|word| word.parse().ok())
            .ok_or_else(malformed)?;
        let length = lines.find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim())
        });
        let length: usize = match length {
            Some(text) => text.parse().map_err(|_| malformed())?,
            None => 0,
        };
        if length > MAX_ANSWER {
            return Err(malformed());
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let body = match body {
            [] => Value::Null,
            text => serde_json::from_slice(text).map_err(|_| malformed())?,
        };
        let size = end.saturating_add(4).saturating_add(length);
        Ok(Some((Self { status, body }, size)))
    }

    /// Whether it did as it was told.
    pub fn is_done(&self) -> bool {
        self.status == 204
    }

    /// Its words, fit for a terminal.
    pub fn words(&self) -> String {
        let words = self.body.get("fault_message").and_then(Value::as_str);
        plain(words.unwrap_or("the VMM refuses without a reason"))
    }
}

fn exchange(socket: &Path, request: &str, waits: &mut dyn FnMut() -> bool) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    stream.set_read_timeout(Some(TURN))?;
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if bytes.len() > MAX_ANSWER {
            return Err(malformed());
        }
        if !waits() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let length = match stream.read(&mut chunk) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                continue;
            }
            other => other?,
        };
        bytes.extend_from_slice(chunk.get(..length).unwrap_or_default());
        match Answer::parse(&bytes)? {
            Some((answer, _)) => return Ok(answer),
            None if length == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::net::UnixListener;

    fn parse(text: &str) -> Option<(Answer, usize)> {
        Answer::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn answers_are_read_whole() {
        let done = "HTTP/1.1 204 \r\nServer: x\r\n\r\n";
        let (status, body) = (204, Value::Null);
        assert_eq!(parse(done), Some((Answer { status, body }, done.len())));
        let text = "HTTP/1.1 200 \r\ncontent-LENGTH: 16\r\n\r\n{\"vcpu_count\":3}";
        let (status, body) = (200, json!({"vcpu_count": 3}));
        let whole = Some((Answer { status, body }, text.len()));
        assert_eq!(parse(text), whole);
        // What follows is no part of it.
        assert_eq!(parse(&format!("{text}{done}")), whole);
        for length in 0..text.len() {
            assert_eq!(parse(&text[..length]), None, "{length}");
        }
    }

    #[test]
    fn what_a_vmm_says_is_not_believed() {
        for bad in [
            "\r\n\r\n",
            "HTTP/1.1\r\n\r\n",
            "HTTP/1.1 x\r\n\r\n",
            "HTTP/1.1 99999\r\n\r\n",
            "HTTP/1.1 200\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200\r\nContent-Length: 99999999\r\n\r\n",
            "HTTP/1.1 200\r\nContent-Length: 3\r\n\r\n{x}",
        ] {
            assert!(Answer::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(Answer::parse(b"\xff\r\n\r\n").is_err());
        let words = |body| Answer { status: 400, body }.words();
        assert_eq!(words(json!({"fault_message": "no\x1b[2J\n"})), "no[2J");
        let long = "x".repeat(10_000);
        assert_eq!(words(json!({ "fault_message": long })).len(), MAX_WORDS);
        assert!(words(json!([1])).contains("without a reason"));
    }

    #[test]
    fn a_vmm_that_talks_for_ever_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let vmm = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(&[b'x'; 1024]).is_ok() {}
        });
        assert!(ask(&path, "GET", "/", &Value::Null).is_err());
        vmm.join().unwrap();
    }

    #[test]
    fn a_vmm_that_says_nothing_is_waited_for_as_long_as_somebody_waits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut turns = 0;
        let mut waits = || {
            turns += 1;
            turns < 3
        };
        let error = ask_while(&path, "GET", "/", &Value::Null, &mut waits).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(turns, 3);
    }
}
