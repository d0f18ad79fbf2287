//! What is granted by name: `--grant-…` and `--allow-create`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use casemate_broker::{handover, protocol};

use super::{ArgumentError, Arguments, bad};

/// Most queues of one interface.
const MAX_QUEUES: u8 = 8;

/// One `--grant-…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Of what kind.
    pub kind: GrantKind,
    /// Its name in the machine config.
    pub name: String,
    /// The path, or the interface's name.
    pub path: PathBuf,
    /// How many queues of an interface; 1 of anything else.
    pub queues: u8,
}

/// One `--allow-create`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creatable {
    /// Its name in the machine config and the API.
    pub name: PathBuf,
    /// The file, or the directory.
    pub path: PathBuf,
}

/// The kinds of grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantKind {
    /// `--grant-ro`
    ReadOnly,
    /// `--grant-rw`
    ReadWrite,
    /// `--grant-append`
    Append,
    /// `--grant-tap`
    Tap,
    /// `--grant-listen`
    Listen,
    /// `--grant-connect`
    Connect,
    /// `--grant-api`
    Api,
    /// `--api-sock` among the VMM's arguments: beneath the chroot, if there is one
    ApiSock,
}

/// Names that the hand-over uses itself.
const RESERVED: [&str; 5] = [
    handover::KVM,
    handover::USERFAULTFD,
    handover::BROKER,
    handover::CONTROL_BROKER,
    handover::LOG,
];

/// `[NAME=]PATH`. A name may be a path itself (`/images/a=/real/a`) and a path may hold `=`
/// (`/images/a=b`): so a name ends at `=/`, or at the first `=` if it is no path.
fn split_name(text: &str) -> (&str, &str) {
    match (text.split_once("=/"), text.split_once('=')) {
        (Some((name, _)), _) => (name, text.get(name.len().saturating_add(1)..).unwrap_or("")),
        (None, Some((name, path))) if !name.contains('/') => (name, path),
        _ => (text, text),
    }
}

/// What is wrong with a grant that is written `text`.
fn wrong_name(name: &str, path: &str, text: &str) -> Option<&'static str> {
    if path.is_empty() {
        Some("the path is empty")
    } else if text.contains(char::is_control) {
        Some("it contains a control character")
    } else if protocol::check_name(name).is_err() {
        Some("the name is empty or contains `..`: give another one with NAME=PATH")
    } else if RESERVED.contains(&name) {
        Some("kvm, userfaultfd, broker, broker-control and log are the jailer's own names")
    } else {
        None
    }
}

fn utf8<'a>(option: &'static str, value: &'a OsString) -> Result<&'a str, ArgumentError> {
    let text = value.to_str();
    text.ok_or_else(|| bad(option, &value.to_string_lossy(), "the path must be UTF-8"))
}

pub(super) fn creatable(value: OsString) -> Result<Creatable, ArgumentError> {
    let option = "allow-create";
    let text = utf8(option, &value)?;
    let (name, path) = split_name(text);
    match wrong_name(name, path, text) {
        Some(why) => Err(bad(option, text, why)),
        None => Ok(Creatable {
            name: name.into(),
            path: path.into(),
        }),
    }
}

pub(super) fn grant(kind: GrantKind, value: OsString) -> Result<Grant, ArgumentError> {
    let option = match kind {
        GrantKind::ReadOnly => "grant-ro",
        GrantKind::ReadWrite => "grant-rw",
        GrantKind::Append => "grant-append",
        GrantKind::Tap => "grant-tap",
        GrantKind::Listen => "grant-listen",
        GrantKind::Connect => "grant-connect",
        GrantKind::Api => "grant-api",
        GrantKind::ApiSock => "api-sock",
    };
    let text = utf8(option, &value)?;
    let (name, path) = split_name(text);
    let (name, path, queues) = match (kind, path.rsplit_once(':')) {
        (GrantKind::Tap, Some((interface, count))) => {
            let name = if name == path { interface } else { name };
            (name, interface, count.parse().unwrap_or(0))
        }
        // The VMM looks for it by all of its own argument.
        (GrantKind::ApiSock, _) => (text, text, 1),
        _ => (name, path, 1),
    };
    let wrong = if let Some(why) = wrong_name(name, path, text) {
        Some(why)
    } else if !(1..=MAX_QUEUES).contains(&queues) {
        Some("an interface gives 1 to 8 queues")
    } else if kind == GrantKind::Tap && (path.len() > 15 || path.contains(['/', ' ', '%'])) {
        Some("an interface's name has 1 to 15 characters, and no `/`, ` ` or `%`")
    } else {
        None
    };
    if let Some(why) = wrong {
        return Err(bad(option, text, why));
    }
    Ok(Grant {
        kind,
        name: name.to_owned(),
        path: path.into(),
        queues,
    })
}

pub(super) fn check_names(arguments: &Arguments) -> Result<(), ArgumentError> {
    let grants = arguments.grants.iter();
    let grants = grants.map(|grant| Path::new(&grant.name));
    let created = arguments.allow_create.iter();
    let mut names: Vec<&Path> = grants
        .chain(created.map(|created| created.name.as_path()))
        .collect();
    names.sort_unstable();
    for pair in names.windows(2) {
        if let [a, b] = pair
            && a == b
        {
            return Err(ArgumentError::Twice(a.display().to_string()));
        }
    }
    Ok(())
}
