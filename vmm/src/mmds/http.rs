//! Requests and answers: as much of HTTP/1 (RFC 9112) as metadata clients speak.

use httparse::{EMPTY_HEADER, Header, Status};

/// Longest request in bytes, with its headers and its body.
pub const MAX_REQUEST: usize = 4096;
/// Most headers of a request.
const MAX_HEADERS: usize = 48;

/// What a request wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Read.
    Get,
    /// Make a token.
    Put,
    /// Anything else.
    Other,
}

/// A request, as far as anybody here cares.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// What it wants done.
    pub method: Method,
    /// To what: a path that starts with a slash, without its query.
    pub path: &'a str,
    /// Whether JSON is asked for.
    pub wants_json: bool,
    /// The session token, if one is given.
    pub token: Option<&'a str>,
    /// The header that says how long a token shall be good, and what it says.
    pub lifetime: Option<(&'static str, &'a str)>,
    /// Whether a proxy has passed it on.
    pub forwarded: bool,
    /// Whether the connection lives on.
    pub keep_alive: bool,
}

/// Why a request is not understood. The connection then ends: where the next one starts is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is malformed, or in a form that a client of this service has no use for.
    Malformed(&'static str),
    /// It has more than [`MAX_REQUEST`] bytes or [`MAX_HEADERS`] headers.
    TooLarge,
}

const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const LIFETIME: [&str; 2] = [
    "X-metadata-token-ttl-seconds",
    "X-aws-ec2-metadata-token-ttl-seconds",
];

/// The request at the start of `bytes` and its length in bytes; `None` if it is not all there.
///
/// # Errors
/// When no more bytes would make a request of it.
pub fn parse(bytes: &[u8]) -> Result<Option<(Request<'_>, usize)>, Refusal> {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let head_len = match head.parse(bytes) {
        Ok(Status::Complete(len)) => len,
        Ok(Status::Partial) if bytes.len() < MAX_REQUEST => return Ok(None),
        Ok(Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Err(Refusal::TooLarge);
        }
        Err(_) => return Err(Refusal::Malformed("this is no HTTP request")),
    };
    let (Some(method), Some(target), Some(minor)) = (head.method, head.path, head.version) else {
        return Err(Refusal::Malformed("this is no HTTP request"));
    };
    let headers = Headers(head.headers);
    let len = head_len.saturating_add(body_len(&headers)?);
    if len > MAX_REQUEST {
        return Err(Refusal::TooLarge);
    }
    if bytes.len() < len {
        return Ok(None);
    }
    let request = Request {
        method: match method {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            _ => Method::Other,
        },
        path: path(target)?,
        wants_json: headers.lists("Accept", "application/json"),
        token: headers.first(&TOKEN).transpose()?.map(|(_, value)| value),
        lifetime: headers.first(&LIFETIME).transpose()?,
        forwarded: headers.named("X-Forwarded-For").next().is_some(),
        keep_alive: match minor {
            0 => headers.lists("Connection", "keep-alive"),
            _ => !headers.lists("Connection", "close"),
        },
    };
    Ok(Some((request, len)))
}

/// The path of a request's target: `/a/b?c` or `http://host/a/b`.
fn path(target: &str) -> Result<&str, Refusal> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => target,
    };
    let path = path.split(['?', '#']).next().unwrap_or(path);
    if path.starts_with('/') {
        Ok(path)
    } else {
        Err(Refusal::Malformed("the target is no path"))
    }
}

/// How many bytes follow the headers. They mean nothing here, but have to be passed over.
fn body_len(headers: &Headers<'_, '_>) -> Result<usize, Refusal> {
    if headers.named("Transfer-Encoding").next().is_some() {
        return Err(Refusal::Malformed("a body in chunks is not understood"));
    }
    let mut lengths = headers.named("Content-Length");
    let Some(length) = lengths.next() else {
        return Ok(0);
    };
    let digits = length.iter().all(u8::is_ascii_digit);
    let text = str::from_utf8(length).ok().filter(|_| digits);
    match text.and_then(|text| text.parse().ok()) {
        Some(length) if lengths.next().is_none() => Ok(length),
        _ => Err(Refusal::Malformed("the content's length is no number")),
    }
}

struct Headers<'h, 'b>(&'h [Header<'b>]);

impl<'b> Headers<'_, 'b> {
    fn named(&self, name: &'static str) -> impl Iterator<Item = &'b [u8]> {
        let found = self.0.iter();
        found
            .filter(move |header| header.name.eq_ignore_ascii_case(name))
            .map(|header| header.value)
    }

    /// The first header that has any of these names.
    fn first(&self, names: &[&'static str; 2]) -> Option<Result<(&'static str, &'b str), Refusal>> {
        self.0.iter().find_map(|header| {
            let is_it = |name: &&&'static str| header.name.eq_ignore_ascii_case(name);
            let name = *names.iter().find(is_it)?;
            let value = str::from_utf8(header.value);
            let malformed = Refusal::Malformed("a header's value is no text");
            Some(value.map(|value| (name, value)).map_err(|_| malformed))
        })
    }

    /// Whether the list in a header has this item, whatever its parameters are.
    fn lists(&self, name: &'static str, wanted: &str) -> bool {
        self.named(name)
            .filter_map(|value| str::from_utf8(value).ok())
            .flat_map(|value| value.split(','))
            .filter_map(|item| item.split(';').next())
            .any(|item| item.trim().eq_ignore_ascii_case(wanted))
    }
}

/// An answer's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusCode {
    /// 200
    Ok,
    /// 400
    BadRequest,
    /// 401
    Unauthorized,
    /// 404
    NotFound,
    /// 405
    MethodNotAllowed,
    /// 413
    ContentTooLarge,
    /// 501
    NotImplemented,
}

impl StatusCode {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::Unauthorized => "401 Unauthorized",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::ContentTooLarge => "413 Content Too Large",
            Self::NotImplemented => "501 Not Implemented",
        }
    }
}

/// What is answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    /// How it went.
    pub status: StatusCode,
    /// Whether `body` is JSON; else it is plain text.
    pub is_json: bool,
    /// One header more: its name and its value.
    pub header: Option<(&'static str, String)>,
    /// What is said.
    pub body: String,
}

impl Response {
    /// Plain text.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self {
            status,
            is_json: false,
            header: None,
            body: body.into(),
        }
    }

    /// As bytes on the wire.
    pub fn encode(&self, keep_alive: bool) -> Vec<u8> {
        let kind = if self.is_json {
            "application/json"
        } else {
            "text/plain"
        };
        let mut text = format!(
            "HTTP/1.1 {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n",
            self.status.line(),
            self.body.len()
        );
        if let Some((name, value)) = &self.header {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        let connection = if keep_alive { "keep-alive" } else { "close" };
        text.push_str(&format!("Connection: {connection}\r\n\r\n"));
        text.push_str(&self.body);
        text.into_bytes()
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Malformed(why) => Self::text(StatusCode::BadRequest, why),
            Refusal::TooLarge => {
                let what = format!("the request has more than {MAX_REQUEST} bytes");
                Self::text(StatusCode::ContentTooLarge, what)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(text: &str) -> Request<'_> {
        let (request, len) = parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!(len, text.len());
        request
    }

    #[test]
    fn reads_what_clients_send() {
        let plain = whole("GET /a/b?c=d HTTP/1.1\r\nHost: 169.254.169.254\r\nAccept: */*\r\n\r\n");
        let expected = Request {
            method: Method::Get,
            path: "/a/b",
            wants_json: false,
            token: None,
            lifetime: None,
            forwarded: false,
            keep_alive: true,
        };
        assert_eq!(plain, expected);
        let token = whole(
            "PUT http://169.254.169.254/latest/api/token HTTP/1.1\r\nContent-Length: 3\r\n\
             x-AWS-ec2-metadata-token-ttl-seconds: 60\r\nx-forwarded-for: \r\n\
             Connection: Foo, Close\r\n\r\nabc",
        );
        assert_eq!(
            (token.method, token.path),
            (Method::Put, "/latest/api/token")
        );
        assert_eq!(token.lifetime, Some((LIFETIME[1], "60")));
        assert!(token.forwarded && !token.keep_alive);
        let old = whole(
            "GET / HTTP/1.0\r\nX-Metadata-Token: T\r\nAccept: a/b, Application/JSON;q=1\r\n\r\n",
        );
        assert_eq!(old.token, Some("T"));
        assert!(old.wants_json && !old.keep_alive);
        assert_eq!(whole("HEAD http://x HTTP/1.1\r\n\r\n").path, "/");
        assert_eq!(
            whole("HEAD http://x HTTP/1.1\r\n\r\n").method,
            Method::Other
        );
    }

    #[test]
    fn waits_for_the_rest() {
        let text = "PUT /t HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
        for len in 0..text.len() {
            assert_eq!(parse(&text.as_bytes()[..len]), Ok(None), "{len}");
        }
        let pipelined = [text, "GET "].concat();
        assert_eq!(parse(pipelined.as_bytes()).unwrap().unwrap().1, text.len());
    }

    #[test]
    fn refuses_the_rest() {
        for (lines, expected) in [
            ("GET / HTTP/2.0\r\n\r\n", None),
            ("GET /\r\n\r\n", None),
            ("\0\0\0", None),
            ("GET x HTTP/1.1\r\n\r\n", None),
            ("OPTIONS * HTTP/1.1\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", None),
            ("GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", None),
            (
                "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
                None,
            ),
            (
                "GET / HTTP/1.1\r\nX-metadata-token: \u{e9}\r\n\r\n",
                Some("token"),
            ),
            (
                "GET / HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\n",
                None,
            ),
        ] {
            let refused = parse(lines.as_bytes());
            if expected.is_none() {
                assert!(
                    matches!(refused, Err(Refusal::Malformed(_))),
                    "{lines}: {refused:?}"
                );
            }
        }
        for large in [
            format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_REQUEST)),
            format!(
                "GET / HTTP/1.1\r\n{}\r\n",
                "A: b\r\n".repeat(MAX_HEADERS + 1)
            ),
            format!("GET / HTTP/1.1\r\nContent-Length: {MAX_REQUEST}\r\n\r\n"),
            format!("GET / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", u64::MAX),
        ] {
            assert_eq!(parse(large.as_bytes()), Err(Refusal::TooLarge));
        }
    }

    #[test]
    fn answers_as_clients_read_it() {
        let mut response = Response::text(StatusCode::NotFound, "no");
        response.header = Some(("Allow", "GET".to_owned()));
        let expected = "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\n\
                        Content-Length: 2\r\nAllow: GET\r\nConnection: close\r\n\r\nno";
        assert_eq!(String::from_utf8(response.encode(false)).unwrap(), expected);
    }

    proptest! {
        #[test]
        fn never_panics_nor_reads_too_far(
            lines in prop::collection::vec("[ -~é]{0,40}", 0..8), cut in 0usize..400,
        ) {
            let mut bytes = format!("PUT /x HTTP/1.1\r\n{}\r\n\r\nxyz", lines.join("\r\n")).into_bytes();
            bytes.truncate(cut);
            if let Ok(Some((_, len))) = parse(&bytes) {
                prop_assert!(len <= bytes.len());
            }
        }

        #[test]
        fn bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
