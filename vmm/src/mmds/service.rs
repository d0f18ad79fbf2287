//! What is answered to whom.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Instant;

use super::http::{Method, Request, Response, StatusCode};
use super::store::{Format, NotShown, Store, show};
use super::token::{LIFETIMES, Tokens};
use crate::metrics::Source;
use crate::metrics::fields::MmdsMetrics;

/// Where tokens are made.
const TOKEN_PATH: [&str; 3] = ["latest", "api", "token"];

/// Whom the service answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// Everybody. Tokens are given to those who ask, and not looked at.
    #[default]
    V1,
    /// Those with a session token.
    V2,
}

/// A metadata service.
#[derive(Debug)]
pub struct ServiceOptions {
    /// What it shows.
    pub store: Arc<Store>,
    /// Where it is: see [`super::is_address_allowed`].
    pub address: Ipv4Addr,
    /// Whom it answers.
    pub version: Version,
    /// Whether it answers in plain text whatever the client would accept, as a cloud's does.
    pub imds_compat: bool,
}

/// A metadata service, shared by the network cards that it is reached by.
pub struct Service {
    options: ServiceOptions,
    tokens: Tokens,
    /// What it counts.
    pub(super) metrics: Arc<MmdsMetrics>,
}

impl Service {
    /// A service with tokens of its own.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn new(options: ServiceOptions) -> io::Result<Self> {
        Ok(Self {
            options,
            tokens: Tokens::new()?,
            metrics: Arc::default(),
        })
    }

    /// Where it is.
    pub fn address(&self) -> Ipv4Addr {
        self.options.address
    }

    /// What it counts, for the metrics.
    pub fn metrics(&self) -> Source {
        Source::new("mmds", self.metrics.clone())
    }

    /// Answers a request.
    ///
    /// None to who may be fooled into asking for somebody else, a proxy: neither a token (as other services of the kind) nor,
    /// by a version without tokens, what it would be for.
    pub(super) fn answer(&self, request: &Request<'_>, now: Instant) -> Response {
        if request.forwarded {
            let why = "nothing for a request with X-Forwarded-For";
            return Response::text(StatusCode::BadRequest, why);
        }
        match (request.method, self.options.version) {
            (Method::Get, Version::V1) => self.show(request),
            (Method::Get, Version::V2) => match request.token {
                Some(token) if self.tokens.is_good(token, now) => self.show(request),
                Some(_) => {
                    self.metrics.rx_invalid_token.inc();
                    let why = "the session token is wrong or has expired";
                    Response::text(StatusCode::Unauthorized, why)
                }
                None => {
                    self.metrics.rx_no_token.inc();
                    Response::text(
                        StatusCode::Unauthorized,
                        "no session token: PUT /latest/api/token makes one, for a header X-metadata-token",
                    )
                }
            },
            (Method::Put, _) => self.make_token(request, now),
            (Method::Other, _) => Response {
                header: Some(("Allow", "GET, PUT".to_owned())),
                ..Response::text(
                    StatusCode::MethodNotAllowed,
                    "only GET and PUT are understood",
                )
            },
        }
    }

    fn show(&self, request: &Request<'_>) -> Response {
        let is_json = request.wants_json && !self.options.imds_compat;
        let format = if is_json { Format::Json } else { Format::Text };
        let document = self.options.store.document();
        match show(document.as_deref(), request.path, format) {
            Ok(body) => Response {
                is_json,
                ..Response::text(StatusCode::Ok, body)
            },
            Err(NotShown::NotFound) => not_found(request.path),
            Err(NotShown::NoText) => Response::text(
                StatusCode::NotImplemented,
                "neither a string nor an object: ask with Accept: application/json",
            ),
        }
    }

    fn make_token(&self, request: &Request<'_>, now: Instant) -> Response {
        let bad = |why: &str| Response::text(StatusCode::BadRequest, why);
        let parts = request.path.split('/').filter(|part| !part.is_empty());
        if !parts.eq(TOKEN_PATH) {
            return not_found(request.path);
        }
        let Some((header, lifetime)) = request.lifetime else {
            return bad("how long shall the token be good? X-metadata-token-ttl-seconds says it");
        };
        match lifetime.parse::<u32>() {
            Ok(seconds) if LIFETIMES.contains(&seconds) => Response {
                header: Some((header, seconds.to_string())),
                ..Response::text(StatusCode::Ok, self.tokens.make(seconds, now))
            },
            _ => bad("a token is good for 1 to 21600 seconds"),
        }
    }
}

fn not_found(path: &str) -> Response {
    Response::text(StatusCode::NotFound, format!("there is nothing at {path}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    pub fn service(version: Version, imds_compat: bool) -> Service {
        let store = Arc::new(Store::new(1000));
        store
            .put(json!({"latest": {"meta-data": {"id": "i-1", "n": 7}}}))
            .unwrap();
        Service::new(ServiceOptions {
            store,
            address: super::super::DEFAULT_ADDRESS,
            version,
            imds_compat,
        })
        .unwrap()
    }

    fn request(method: Method, path: &str) -> Request<'_> {
        Request {
            method,
            path,
            wants_json: false,
            token: None,
            lifetime: None,
            forwarded: false,
            keep_alive: true,
        }
    }

    fn token_request(lifetime: &str) -> Request<'_> {
        Request {
            lifetime: Some(("X-metadata-token-ttl-seconds", lifetime)),
            ..request(Method::Put, "/latest/api/token")
        }
    }

    #[test]
    fn the_first_version_answers_everybody() {
        let service = service(Version::V1, false);
        let now = Instant::now();
        for token in [None, Some("x")] {
            let get = Request {
                token,
                ..request(Method::Get, "/latest/meta-data/id")
            };
            let answer = service.answer(&get, now);
            assert_eq!(
                (answer.status, answer.body.as_str()),
                (StatusCode::Ok, "i-1")
            );
        }
        assert_eq!(
            service.answer(&token_request("5"), now).status,
            StatusCode::Ok
        );
    }

    #[test]
    fn the_second_version_wants_a_token() {
        let service = service(Version::V2, false);
        let now = Instant::now();
        let get = |token| Request {
            token,
            ..request(Method::Get, "/latest/")
        };
        let status = |token, now| service.answer(&get(token), now).status;
        assert_eq!(status(None, now), StatusCode::Unauthorized);
        assert_eq!(status(Some("x"), now), StatusCode::Unauthorized);
        let answer = service.answer(&token_request("60"), now);
        assert_eq!(answer.status, StatusCode::Ok);
        let expected = ("X-metadata-token-ttl-seconds", "60".to_owned());
        assert_eq!(answer.header, Some(expected));
        let token = Some(answer.body.as_str());
        assert_eq!(status(token, now), StatusCode::Ok);
        let later = now + Duration::from_secs(61);
        assert_eq!(status(token, later), StatusCode::Unauthorized);
    }

    #[test]
    fn tokens_are_made_for_direct_requests_with_a_lifetime() {
        let service = service(Version::V2, false);
        let status = |request: Request<'_>| service.answer(&request, Instant::now()).status;
        for (lifetime, expected) in [
            ("1", StatusCode::Ok),
            ("21600", StatusCode::Ok),
            ("0", StatusCode::BadRequest),
            ("21601", StatusCode::BadRequest),
            ("-1", StatusCode::BadRequest),
            ("4294967297", StatusCode::BadRequest),
            ("", StatusCode::BadRequest),
            ("1 ", StatusCode::BadRequest),
        ] {
            assert_eq!(status(token_request(lifetime)), expected, "{lifetime}");
        }
        let forwarded = Request {
            forwarded: true,
            ..token_request("60")
        };
        assert_eq!(status(forwarded), StatusCode::BadRequest);
        for version in [Version::V1, Version::V2] {
            let service = self::service(version, false);
            let token = service.tokens.make(60, Instant::now());
            for (forwarded, expected) in [(false, StatusCode::Ok), (true, StatusCode::BadRequest)] {
                let get = Request {
                    forwarded,
                    token: Some(&token),
                    ..request(Method::Get, "/")
                };
                let answer = service.answer(&get, Instant::now());
                assert_eq!(answer.status, expected, "{version:?}");
            }
        }
        let endless = request(Method::Put, "/latest/api/token");
        assert_eq!(status(endless), StatusCode::BadRequest);
        for (path, expected) in [
            ("//latest/api//token", StatusCode::Ok),
            ("/latest/api", StatusCode::NotFound),
            ("/latest/api/token/x", StatusCode::NotFound),
        ] {
            let elsewhere = Request {
                path,
                ..token_request("60")
            };
            assert_eq!(status(elsewhere), expected, "{path}");
        }
    }

    #[test]
    fn a_client_chooses_the_format_unless_there_is_only_one() {
        let now = Instant::now();
        for (imds_compat, body, is_json) in [
            (false, r#"{"id":"i-1","n":7}"#, true),
            (true, "id\nn", false),
        ] {
            let get = Request {
                wants_json: true,
                ..request(Method::Get, "/latest/meta-data")
            };
            let answer = service(Version::V1, imds_compat).answer(&get, now);
            assert_eq!((answer.body.as_str(), answer.is_json), (body, is_json));
        }
    }

    #[test]
    fn what_cannot_be_shown_has_a_status() {
        let service = service(Version::V1, false);
        let status = |method, path| {
            service
                .answer(&request(method, path), Instant::now())
                .status
        };
        assert_eq!(status(Method::Get, "/x"), StatusCode::NotFound);
        assert_eq!(
            status(Method::Get, "/latest/meta-data/n"),
            StatusCode::NotImplemented
        );
        assert_eq!(
            status(Method::Other, "/latest"),
            StatusCode::MethodNotAllowed
        );
    }
}
