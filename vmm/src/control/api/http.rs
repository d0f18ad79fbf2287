//! HTTP/1.1 as bytes: a request out of what has arrived, an answer into what is sent (RFC 9112).
//!
//! Nothing here waits or knows sockets. What a client sends is bounded before it is looked at.

use std::fmt::Write as _;

use serde_json::json;

/// Most bytes of a request before its body.
pub const MAX_HEAD: usize = 8 << 10;
/// Most header fields of a request.
const MAX_HEADERS: usize = 64;
/// The version that answers carry, and the name of whoever answers.
const SERVER: &str = "Casemate API";

/// What a request wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "methods have no other names")]
pub enum Method {
    Get,
    Put,
    Patch,
    Delete,
}

impl Method {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }

    fn named(name: &str) -> Option<Self> {
        let all = [Self::Get, Self::Put, Self::Patch, Self::Delete];
        all.into_iter().find(|method| method.name() == name)
    }
}

/// A request's line and header fields, as far as they matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// What is wanted.
    pub method: Method,
    /// Of what: the path, without scheme and host.
    pub path: String,
    /// Bytes of the body.
    pub body: usize,
    /// Whether the client waits for leave to send the body.
    pub expects: bool,
    /// Whether the client wants the connection to end after the answer.
    pub close: bool,
}

/// What the bytes that have arrived begin with.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Not a whole head yet.
    Partial,
    /// A head of so many bytes.
    Head(Head, usize),
}

/// Looks for a request's head at the start of `bytes`, whose body may have `max_body` bytes.
///
/// # Errors
/// The answer that ends the connection: where the next request would start is not known.
pub fn parse(bytes: &[u8], max_body: usize) -> Result<Parsed, Response> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut fields);
    let window = bytes.get(..bytes.len().min(MAX_HEAD)).unwrap_or_default();
    let length = match request.parse(window) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(Parsed::Partial),
        Ok(httparse::Status::Partial) => {
            return Err(bad(&format!("the header has more than {MAX_HEAD} bytes")));
        }
        Err(httparse::Error::TooManyHeaders) => {
            return Err(bad(&format!("more than {MAX_HEADERS} header fields")));
        }
        Err(error) => return Err(bad(&format!("this is no HTTP request: {error}"))),
    };
    let method = request.method.unwrap_or_default();
    let method = Method::named(method)
        .ok_or_else(|| bad(&format!("the method {method:.20?} is not one of this API")))?;
    let path = absolute_path(request.path.unwrap_or_default()).to_owned();
    let mut head = Head {
        method,
        path,
        body: 0,
        expects: false,
        close: request.version == Some(0),
    };
    let mut lengths = None;
    for field in request.headers.iter() {
        let value = std::str::from_utf8(field.value)
            .unwrap_or("\u{fffd}")
            .trim();
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            let digits = !value.is_empty() && value.bytes().all(|c| c.is_ascii_digit());
            let length = digits.then(|| value.parse::<usize>().unwrap_or(usize::MAX));
            let length = length.ok_or_else(|| bad("Content-Length is no number"))?;
            if lengths.replace(length).is_some_and(|other| other != length) {
                return Err(bad("there are two different Content-Lengths"));
            }
        } else if is("transfer-encoding") && !value.eq_ignore_ascii_case("identity") {
            return Err(Response::fault(
                Status::LengthRequired,
                "a body in chunks is not taken: send it whole, with its Content-Length",
            ));
        } else if is("expect") {
            if !value.eq_ignore_ascii_case("100-continue") {
                return Err(bad("only 100-continue can be expected"));
            }
            head.expects = true;
        } else if is("connection") {
            let mut words = value.split(',').map(str::trim);
            if words.clone().any(|word| word.eq_ignore_ascii_case("close")) {
                head.close = true;
            } else if words.any(|word| word.eq_ignore_ascii_case("keep-alive")) {
                head.close = false;
            }
        }
    }
    head.body = lengths.unwrap_or(0);
    if head.body > max_body {
        return Err(Response::fault(
            Status::PayloadTooLarge,
            &format!(
                "the body has {} bytes, and {max_body} are allowed (--http-api-max-payload-size)",
                head.body
            ),
        ));
    }
    Ok(Parsed::Head(head, length))
}

/// `http://host/path` and `/path` are the same.
fn absolute_path(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or(""),
        None => target,
    }
}

fn bad(why: &str) -> Response {
    Response::fault(Status::BadRequest, why)
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "RFC 9110, section 15, has the meanings")]
pub enum Status {
    SwitchingProtocols = 101,
    Ok = 200,
    NoContent = 204,
    BadRequest = 400,
    LengthRequired = 411,
    PayloadTooLarge = 413,
    Unavailable = 503,
}

impl Status {
    fn reason(self) -> &'static str {
        match self {
            Self::SwitchingProtocols => "Switching Protocols",
            Self::Ok => "OK",
            Self::NoContent => "No Content",
            Self::BadRequest => "Bad Request",
            Self::LengthRequired => "Length Required",
            Self::PayloadTooLarge => "Content Too Large",
            Self::Unavailable => "Service Unavailable",
        }
    }
}

/// Leave to send a body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What a connection becomes that carries a machine to another VMM.
pub const PROTOCOL: &str = "casemate-migration";

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// What came of the request.
    pub status: Status,
    /// JSON; none for [`Status::NoContent`] and [`Status::SwitchingProtocols`].
    pub body: String,
    /// Whether the request used something that will go.
    pub deprecated: bool,
}

impl Response {
    /// Done, and nothing to say.
    pub fn done() -> Self {
        Self {
            status: Status::NoContent,
            body: String::new(),
            deprecated: false,
        }
    }

    /// From here on the connection is something else.
    pub fn upgrade() -> Self {
        Self {
            status: Status::SwitchingProtocols,
            ..Self::done()
        }
    }

    /// What was asked for, as JSON.
    pub fn json(body: String) -> Self {
        Self {
            status: Status::Ok,
            body,
            deprecated: false,
        }
    }

    /// Refused, and why.
    pub fn fault(status: Status, message: &str) -> Self {
        Self {
            status,
            body: json!({ "fault_message": message }).to_string(),
            deprecated: false,
        }
    }

    /// Appends it as bytes. With `close`, the client is told that the connection ends.
    pub fn write(&self, close: bool, out: &mut Vec<u8>) {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\nServer: {SERVER}\r\nConnection: {}\r\n",
            self.status as u16,
            self.status.reason(),
            match self.status {
                Status::SwitchingProtocols => "Upgrade",
                _ if close => "close",
                _ => "keep-alive",
            }
        );
        if self.status == Status::SwitchingProtocols {
            // Writing to a string does not fail.
            let _ = write!(head, "Upgrade: {PROTOCOL}\r\n");
        }
        if self.deprecated {
            head.push_str("Deprecation: true\r\n");
        }
        if !matches!(self.status, Status::NoContent | Status::SwitchingProtocols) {
            // Writing to a string does not fail.
            let _ = write!(
                head,
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                self.body.len()
            );
        }
        head.push_str("\r\n");
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(self.body.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(text: &str) -> Result<Parsed, Response> {
        parse(text.as_bytes(), 100)
    }

    #[track_caller]
    fn refused(text: &str, status: Status) -> String {
        let response = head(text).expect_err(text);
        assert_eq!(response.status, status, "{text:.200}");
        let body: serde_json::Value = serde_json::from_str(&response.body).unwrap();
        body["fault_message"].as_str().unwrap().to_owned()
    }

    #[test]
    fn reads_requests() {
        let text = "PUT /drives/a HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\nExpect: 100-continue\r\n\r\n{rest}";
        let Ok(Parsed::Head(head, length)) = head(text) else {
            panic!("not read");
        };
        assert_eq!(
            head,
            Head {
                method: Method::Put,
                path: "/drives/a".into(),
                body: 7,
                expects: true,
                close: false,
            }
        );
        assert_eq!(&text[length..], "{rest}");
        for (text, close) in [
            ("GET / HTTP/1.0\r\n\r\n", true),
            ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nconnection: x, Close\r\n\r\n", true),
            ("GET http://localhost/ HTTP/1.1\r\n\r\n", false),
        ] {
            let Ok(Parsed::Head(head, _)) = super::parse(text.as_bytes(), 0) else {
                panic!("{text}");
            };
            assert_eq!((head.path.as_str(), head.close), ("/", close), "{text}");
        }
        for (cut, _) in text.char_indices().filter(|(at, _)| *at < text.len() - 6) {
            assert_eq!(
                super::parse(&text.as_bytes()[..cut], 100),
                Ok(Parsed::Partial)
            );
        }
    }

    #[test]
    fn refuses_what_it_cannot_bound() {
        let bad = Status::BadRequest;
        refused("POST / HTTP/1.1\r\n\r\n", bad);
        refused("GET / HTTP/2.0\r\n\r\n", bad);
        refused("\0\0\0\0", bad);
        for length in ["-1", "+1", "1x", "", "1, 1"] {
            let text = format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
            refused(&text, bad);
        }
        let twice = "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n";
        refused(twice, bad);
        refused("PUT / HTTP/1.1\r\nExpect: money\r\n\r\n", bad);
        for length in ["101", "18446744073709551616"] {
            let text = format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
            let why = refused(&text, Status::PayloadTooLarge);
            assert!(why.contains("--http-api-max-payload-size"), "{why}");
        }
        let chunks = "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        refused(chunks, Status::LengthRequired);
        refused(&format!("GET /{} HTTP/1.1\r\n", "x".repeat(MAX_HEAD)), bad);
        let fields = "A: b\r\n".repeat(MAX_HEADERS + 1);
        refused(&format!("GET / HTTP/1.1\r\n{fields}\r\n"), bad);
    }

    #[test]
    fn writes_answers() {
        let mut out = Vec::new();
        Response::done().write(false, &mut out);
        Response::fault(Status::BadRequest, "no \"x\"").write(true, &mut out);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "HTTP/1.1 204 No Content\r\nServer: Casemate API\r\nConnection: keep-alive\r\n\r\n\
             HTTP/1.1 400 Bad Request\r\nServer: Casemate API\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: 28\r\n\r\n\
             {\"fault_message\":\"no \\\"x\\\"\"}"
        );
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), lead in "(GET|PUT) /[a-z]{0,5} HTTP/1.1\r\n") {
            let _ = parse(&bytes, 100);
            let mut whole = lead.into_bytes();
            whole.extend(bytes);
            if let Ok(Parsed::Head(head, length)) = parse(&whole, 100) {
                prop_assert!(length <= whole.len() && head.body <= 100);
            }
        }
    }
}
