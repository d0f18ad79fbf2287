//! As much of an HTTP client as the API needs, with nothing between a request and its first byte.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Longest wait for anything: far more than any of it takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often a socket is looked for that is not there yet: this much a start may be measured too long.
const LOOK: Duration = Duration::from_micros(20);

/// A connection to a VMM's API.
pub struct Client(UnixStream);

impl Client {
    /// Connects as soon as there is a socket.
    ///
    /// # Errors
    /// When none comes.
    pub fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    return Ok(Self(stream));
                }
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("connect to {}", path.display()));
                }
                Err(_) => thread::sleep(LOOK),
            }
        }
    }

    /// A request's bytes.
    pub fn request(method: &str, path: &str, body: &Value) -> Vec<u8> {
        let body = body.to_string();
        let length = body.len();
        let kind = "Content-Type: application/json";
        format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {length}\r\n\r\n{body}")
            .into_bytes()
    }

    /// Sends a request.
    ///
    /// # Errors
    /// When there is nobody to take it.
    pub fn send(&mut self, request: &[u8]) -> Result<()> {
        self.0.write_all(request).context("send a request")
    }

    /// Sends a request after which the connection is something else: that, and what has come of it.
    ///
    /// # Errors
    /// When it is refused.
    pub fn upgrade(mut self, path: &str, body: &Value) -> Result<(UnixStream, Vec<u8>)> {
        self.send(&Self::request("PUT", path, body))?;
        let mut answer = self.answer("101")?;
        let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
        let early = answer.split_off(head.unwrap_or(answer.len()) + 4);
        self.0.set_read_timeout(None)?;
        Ok((self.0, early))
    }

    /// Waits for the answer, which must be that it was done.
    ///
    /// # Errors
    /// When it is another, or none.
    pub fn done(&mut self) -> Result<()> {
        self.answer("204").map(drop)
    }

    /// The answer, at least all of its head, which must have this status.
    fn answer(&mut self, status: &str) -> Result<Vec<u8>> {
        let mut answer = Vec::new();
        let mut chunk = [0; 4096];
        while !answer.windows(4).any(|four| four == b"\r\n\r\n") {
            let length = self.0.read(&mut chunk).context("read an answer")?;
            if length == 0 {
                bail!("the API ended the connection");
            }
            answer.extend_from_slice(chunk.get(..length).unwrap_or_default());
        }
        if !answer.starts_with(format!("HTTP/1.1 {status}").as_bytes()) {
            bail!(
                "the request was refused: {}",
                String::from_utf8_lossy(&answer)
            );
        }
        Ok(answer)
    }

    /// Sends a request and waits until it is done.
    ///
    /// # Errors
    /// When it is not.
    pub fn ask(&mut self, method: &str, path: &str, body: &Value) -> Result<()> {
        self.send(&Self::request(method, path, body))?;
        self.done().with_context(|| format!("{method} {path}"))
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
