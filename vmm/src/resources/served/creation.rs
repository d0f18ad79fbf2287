//! Files that a machine makes while it runs: a snapshot's. The broker makes them, and gives them their names
//! once they are whole.

use std::fs::File;
use std::io;
use std::time::Duration;

use casemate_broker::{Client, Operation};

use super::Served;
use crate::resources::{BROKER_PATIENCE, Error, Source};

/// How long the broker may take to commit: it waits for the disk that holds the directory.
const COMMIT_PATIENCE: Duration = Duration::from_secs(60);

impl Served {
    /// A new, empty file for reading and writing, which takes the name when it is [committed](Self::commit),
    /// and is gone when it is [discarded](Self::discard) or this process ends. At most 4 at once.
    ///
    /// # Errors
    /// When it cannot be made; in a jail the error names the jailer's flag that allows it.
    pub fn create_later(&mut self, what: &'static str, name: &str) -> Result<File, Error> {
        let op = Operation::Create {
            name: name.to_owned(),
        };
        let made = self.maker(what, name)?.call(op, BROKER_PATIENCE);
        made.map(File::from).map_err(broker_error(what, name))
    }

    /// Gives a file that was made its name, whatever has it now, for good. What the file holds is to be synced before.
    ///
    /// # Errors
    /// When it does not get the name: what had it is still there, and the file can be committed again or discarded.
    /// The error says so where only the host's crash could undo it.
    pub fn commit(&mut self, what: &'static str, name: &str) -> Result<(), Error> {
        let op = Operation::Commit {
            name: name.to_owned(),
        };
        let done = self.maker(what, name)?.order(op, COMMIT_PATIENCE);
        done.map_err(broker_error(what, name))
    }

    /// Gives up a file that was made.
    ///
    /// # Errors
    /// When none was made for this name.
    pub fn discard(&mut self, what: &'static str, name: &str) -> Result<(), Error> {
        let op = Operation::Discard {
            name: name.to_owned(),
        };
        let done = self.maker(what, name)?.order(op, BROKER_PATIENCE);
        done.map_err(broker_error(what, name))
    }

    fn maker(&mut self, what: &'static str, name: &str) -> Result<&mut Client, Error> {
        self.broker.as_mut().ok_or_else(|| nobody(what, name))
    }
}

/// Only a machine that is configured by requests makes files.
impl Source {
    /// See [`Served::create_later`].
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_later(&mut self, what: &'static str, name: &str) -> Result<File, Error> {
        self.served(what, name)?.create_later(what, name)
    }

    /// See [`Served::commit`].
    ///
    /// # Errors
    /// When it does not get the name.
    pub fn commit(&mut self, what: &'static str, name: &str) -> Result<(), Error> {
        self.served(what, name)?.commit(what, name)
    }

    /// See [`Served::discard`].
    ///
    /// # Errors
    /// When none was made for this name.
    pub fn discard(&mut self, what: &'static str, name: &str) -> Result<(), Error> {
        self.served(what, name)?.discard(what, name)
    }

    fn served(&mut self, what: &'static str, name: &str) -> Result<&mut Served, Error> {
        match self {
            Self::Served(served) => Ok(served),
            Self::Direct | Self::Jailed(_) => Err(nobody(what, name)),
        }
    }
}

/// There is no broker that this thread could ask.
fn nobody(what: &'static str, name: &str) -> Error {
    Error::Open {
        what,
        name: name.to_owned(),
        source: io::ErrorKind::PermissionDenied.into(),
        hint: "; files are made by the broker of a machine that has an API, in a jail with the jailer's `--allow-create`",
    }
}

fn broker_error(
    what: &'static str,
    name: &str,
) -> impl FnOnce(casemate_broker::ClientError) -> Error {
    let name = name.to_owned();
    move |source| Error::Broker { what, name, source }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Write;

    use casemate_broker::{BrokerPolicy, Server};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::resources::served::Origin;

    const WHAT: &str = "snapshot";

    fn served(broker: Option<Client>) -> Served {
        Served {
            origin: Origin::Direct {
                locked: true,
                kept: BTreeMap::new(),
            },
            broker,
            device_broker: None,
            listeners: BTreeMap::new(),
        }
    }

    fn with_broker(policy: BrokerPolicy) -> Served {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        std::thread::spawn(move || Server::new(theirs, policy).serve(None));
        served(Some(Client::new(ours)))
    }

    #[test]
    fn a_file_is_made_and_takes_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let name = path.to_str().unwrap();
        let policy = BrokerPolicy {
            unconfined: true,
            ..BrokerPolicy::default()
        };
        let mut served = with_broker(policy);
        let mut file = served.create_later(WHAT, name).unwrap();
        file.write_all(b"whole").unwrap();
        assert!(!path.exists());
        file.sync_all().unwrap();
        served.commit(WHAT, name).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        drop(served.create_later(WHAT, name).unwrap());
        served.discard(WHAT, name).unwrap();
        let error = served.commit(WHAT, name).unwrap_err().to_string();
        assert!(error.contains("is not being made"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
    }

    #[test]
    fn a_refusal_names_the_flag() {
        let mut refusing = with_broker(BrokerPolicy::default());
        let refused = refusing.create_later(WHAT, "/s/x").unwrap_err().to_string();
        assert!(refused.contains("--allow-create /s/x"), "{refused}");
        let mut alone = served(None);
        for error in [
            alone.create_later(WHAT, "/s/x").unwrap_err(),
            alone.commit(WHAT, "/s/x").unwrap_err(),
            alone.discard(WHAT, "/s/x").unwrap_err(),
            Source::Direct.create_later(WHAT, "/s/x").unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(
                text.contains("--allow-create") && text.contains("/s/x"),
                "{text}"
            );
        }
    }
}
