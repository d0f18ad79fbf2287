//! A client of the VMM's API, as plain as can be.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::PATIENCE;

/// A connection that is kept from request to request.
pub struct ApiClient {
    stream: UnixStream,
    /// What has been read beyond the last answer.
    rest: Vec<u8>,
}

/// What the API says to a request.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiAnswer {
    /// The status code.
    pub status: u16,
    /// The header fields, in lower case.
    pub head: String,
    /// The body; null without one.
    pub body: Value,
}

impl ApiAnswer {
    /// Asserts that it was done and nothing was said.
    #[track_caller]
    pub fn assert_done(&self) {
        assert_eq!((self.status, &self.body), (204, &Value::Null), "{self:?}");
    }

    /// Asserts that it was refused, in words that contain `words`.
    #[track_caller]
    pub fn assert_refused(&self, words: &str) {
        assert_eq!(self.status, 400, "{self:?}");
        let said = self.body["fault_message"].as_str().unwrap_or_default();
        assert!(said.contains(words), "`{words}` not in {said}");
    }
}

impl ApiClient {
    /// Connects to the socket as soon as it is there.
    pub fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    let rest = Vec::new();
                    return Ok(Self { stream, rest });
                }
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("connecting to {}", path.display()));
                }
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(2)),
            }
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Sends a request; a null `body` is none.
    pub fn ask(&mut self, method: &str, path: &str, body: &Value) -> Result<ApiAnswer> {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
        self.send(format!("{head}{body}").as_bytes())?;
        self.answer()
    }

    /// Sends a request after which the connection is something else: that, and what has come of it already.
    pub fn upgrade(mut self, path: &str, body: &Value) -> Result<(UnixStream, Vec<u8>)> {
        let answer = self.ask("PUT", path, body)?;
        anyhow::ensure!(answer.status == 101, "{answer:?}");
        self.stream.set_read_timeout(None)?;
        Ok((self.stream, self.rest))
    }

    /// Reads the next answer.
    pub fn answer(&mut self) -> Result<ApiAnswer> {
        let end = loop {
            let end = self.rest.windows(4).position(|four| four == b"\r\n\r\n");
            match end {
                Some(end) => break end + 4,
                None => self.read()?,
            }
        };
        let body = self.rest.split_off(end);
        let head = std::mem::replace(&mut self.rest, body);
        let head = String::from_utf8(head)?.to_lowercase();
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(Ok(0), str::parse)?;
        while self.rest.len() < length {
            self.read()?;
        }
        let rest = self.rest.split_off(length);
        let body = std::mem::replace(&mut self.rest, rest);
        let body = match body.as_slice() {
            [] => Value::Null,
            body => serde_json::from_slice(body)?,
        };
        Ok(ApiAnswer { status, head, body })
    }

    /// Whether the API has ended the connection and said nothing more.
    pub fn is_ended(&mut self) -> Result<bool> {
        Ok(self.rest.is_empty() && self.stream.read(&mut [0])? == 0)
    }

    fn read(&mut self) -> Result<()> {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk)? {
            0 => bail!("the API ended the connection"),
            count => self.rest.extend_from_slice(&chunk[..count]),
        }
        Ok(())
    }
}
