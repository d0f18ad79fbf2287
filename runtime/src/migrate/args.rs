//! What `casemate migrate` is asked for.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::units::parse_duration;

/// `casemate migrate`.
#[derive(Debug, Args)]
#[command(
    allow_missing_positional = true,
    override_usage = "casemate migrate [OPTIONS] FROM TO\n       casemate migrate [OPTIONS] --listen tcp:ADDRESS:PORT TO",
    after_help = "To another host, start the second form there first. Both then need --cert, --key and --ca: each end takes \
                  only one with a certificate of that authority, and FROM's end looks at the name in it, too. \
                  SIGINT and SIGTERM cancel the move. \
                  Exit code: 0 when the machine has moved, 125 when not: the message says where it is."
)]
pub struct MigrateArgs {
    /// The machine: its id, or the path of its VMM's API socket
    #[arg(value_name = "FROM", required_unless_present = "listen")]
    pub from: Option<String>,
    /// Where it goes: the path of the API socket of a VMM that waits, or tcp:HOST:PORT
    #[arg(value_name = "TO", required = true)]
    pub to: String,
    /// Wait here for one that comes from another host
    #[arg(long, value_name = "tcp:ADDRESS:PORT", value_parser = parse_tcp, conflicts_with_all = ["from", "downtime", "max_rounds"])]
    pub listen: Option<Tcp>,
    /// How long the guest may stand still
    #[arg(long, value_name = "DURATION", default_value = "30ms", value_parser = parse_duration)]
    pub downtime: Duration,
    /// Give up after so many rounds
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: u32,
    /// The tap that a network interface has there
    #[arg(long, value_name = "INTERFACE=TAP", value_parser = parse_tap)]
    pub tap: Vec<(String, String)>,
    /// The path that the machine's vsock has there
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<String>,
    /// This end's certificate, and those between it and the authority's: PEM
    #[arg(long, value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// Its private key: PEM
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// The authority of whose certificates the other end must have one: PEM
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The name in the other end's certificate [default: TO's host]
    #[arg(long, value_name = "NAME", conflicts_with = "listen")]
    pub peer_name: Option<String>,
    /// Leave one of the walls out where this host lacks it
    #[arg(long, value_name = "WALL", value_parser = ["landlock"])]
    pub allow_missing: Option<String>,
}

/// A host, or an address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// Without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

fn parse_tcp(text: &str) -> Result<Tcp, String> {
    let wanted = || "tcp:HOST:PORT, such as tcp:10.0.0.2:7000 or tcp:[::1]:7000".to_string();
    let rest = text.strip_prefix("tcp:").ok_or_else(wanted)?;
    let (host, port) = rest.rsplit_once(':').ok_or_else(wanted)?;
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let host = match bare {
        Some(bare) => bare,
        None if host.contains(':') => return Err(wanted()),
        None => host,
    };
    let port = port.parse().map_err(|_| wanted())?;
    match host.is_empty() {
        true => Err(wanted()),
        false => Ok(Tcp {
            host: host.to_string(),
            port,
        }),
    }
}

fn parse_tap(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((interface, tap)) if !interface.is_empty() && !tap.is_empty() => {
            Ok((interface.to_string(), tap.to_string()))
        }
        _ => Err("INTERFACE=TAP, such as eth0=tap7".to_string()),
    }
}

/// Where a machine goes.
#[derive(Debug, PartialEq, Eq)]
pub enum To {
    /// To a VMM here.
    Here(PathBuf),
    /// To another host.
    There(Tcp),
}

impl MigrateArgs {
    /// Where it goes.
    pub fn to(&self) -> Result<To, String> {
        if !self.to.starts_with("tcp:") {
            return Ok(To::Here(PathBuf::from(&self.to)));
        }
        match self.listen {
            Some(_) => Err(format!(
                "{}: a machine that comes goes to a VMM here",
                self.to
            )),
            None if self.tap.is_empty() && self.vsock.is_none() => {
                parse_tcp(&self.to).map(To::There)
            }
            None => Err("--tap and --vsock are for the other end, which listens".to_string()),
        }
    }

    /// The body of `PUT /migration/send`.
    pub fn limits(&self) -> Value {
        let downtime = u32::try_from(self.downtime.as_millis()).unwrap_or(u32::MAX);
        json!({ "downtime_ms": downtime, "max_rounds": self.max_rounds })
    }

    /// The body of `PUT /migration/receive`.
    pub fn overrides(&self) -> Value {
        let taps = self.tap.iter();
        let taps: Vec<Value> = taps
            .map(|(interface, tap)| json!({ "iface_id": interface, "host_dev_name": tap }))
            .collect();
        let mut body = json!({ "network_overrides": taps });
        if let (Some(path), Some(body)) = (&self.vsock, body.as_object_mut()) {
            body.insert("vsock_override".to_string(), json!({ "uds_path": path }));
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: MigrateArgs,
    }

    fn parse(words: &str) -> Result<MigrateArgs, clap::Error> {
        let line = Line::try_parse_from(["migrate"].into_iter().chain(words.split(' ')))?;
        Ok(line.args)
    }

    #[test]
    fn both_forms_are_read() {
        let args = parse("vm1 /run/b.sock --downtime 200ms --tap eth0=tap7 --vsock /v").unwrap();
        assert_eq!(args.from.as_deref(), Some("vm1"));
        assert_eq!(args.to(), Ok(To::Here("/run/b.sock".into())));
        assert_eq!(
            args.limits(),
            json!({ "downtime_ms": 200, "max_rounds": 30 })
        );
        assert_eq!(
            args.overrides(),
            json!({
                "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap7" }],
                "vsock_override": { "uds_path": "/v" },
            })
        );
        let args = parse("vm1 tcp:[::1]:70").unwrap();
        let (host, port) = ("::1".to_string(), 70);
        assert_eq!(args.to(), Ok(To::There(Tcp { host, port })));
        assert_eq!(args.overrides(), json!({ "network_overrides": [] }));
        let args = parse("--listen tcp:0.0.0.0:70 /b.sock").unwrap();
        let (host, port) = ("0.0.0.0".to_string(), 70);
        assert_eq!((args.from.as_deref(), args.to.as_str()), (None, "/b.sock"));
        assert_eq!(args.listen, Some(Tcp { host, port }));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "/b.sock",
            "--listen tcp::70 /b.sock",
            "--listen tcp:host /b.sock",
            "--listen tcp:::1:70 /b.sock",
            "--listen tcp:host:70000 /b.sock",
            "--listen host:70 /b.sock",
            "--listen tcp:host:70 vm1 /b.sock",
            "--listen tcp:host:70 --downtime 1s /b.sock",
            "--listen tcp:host:70 --peer-name x /b.sock",
            "vm1 /b.sock --tap eth0",
            "vm1 /b.sock --tap =tap0",
            "vm1 /b.sock --max-rounds 0",
            "vm1 /b.sock --downtime 0",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for bad in [
            "vm1 tcp:host:70 --tap eth0=tap0",
            "vm1 tcp:host:70 --vsock /v",
            "vm1 tcp:host",
            "--listen tcp:host:70 tcp:host:71",
        ] {
            assert!(parse(bad).unwrap().to().is_err(), "{bad}");
        }
    }
}
