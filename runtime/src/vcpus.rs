//! `casemate vcpus`: how many virtual CPUs a running machine has.
//!
//! Asked of the VMM's API.

use std::io;

use serde_json::{Value, json};
use thiserror::Error;

use crate::places::Places;
use crate::run::API_SOCKET;
use crate::{api, say, state};

/// Why the number is not known, or not changed.
#[derive(Debug, Error)]
pub enum Error {
    /// The machine.
    #[error(transparent)]
    State(#[from] state::Error),
    /// It has no API.
    #[error("the number of CPUs of {0} is fixed: start it with --max-cpus")]
    Fixed(String),
    /// Its API cannot be used.
    #[error("cannot ask the VMM of {id}: {source}")]
    Ask {
        /// The machine.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// It refuses.
    #[error("{id}: {words}")]
    Refused {
        /// The machine.
        id: String,
        /// What it says.
        words: String,
    },
}

/// Sets the number to `count`, or prints it.
pub fn run(id: &str, count: Option<u8>) -> Result<(), Error> {
    let places = Places::from_env();
    let record = state::find(&places, id)?;
    let socket = places.machine(record.id.as_str()).join(API_SOCKET);
    let (method, body) = match count {
        Some(count) => ("PATCH", json!({ "vcpu_count": count })),
        None => ("GET", Value::Null),
    };
    let id = || record.id.to_string();
    let answer = match api::ask(&socket, method, "/hotplug/vcpus", &body) {
        Ok(answer) => answer,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::Fixed(id())),
        Err(source) => return Err(Error::Ask { id: id(), source }),
    };
    match (answer.status, count) {
        (204, Some(_)) => Ok(()),
        (200, None) => {
            let number = answer.body.get("vcpu_count").and_then(Value::as_u64);
            let number = number.ok_or_else(|| Error::Ask {
                id: id(),
                source: io::ErrorKind::InvalidData.into(),
            })?;
            say::line(number);
            Ok(())
        }
        _ => Err(Error::Refused {
            id: id(),
            words: answer.words(),
        }),
    }
}
