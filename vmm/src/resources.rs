//! Where the machine's files, taps and sockets come from.
//!
//! In a jail they were all opened by the jailer: they are taken from its hand-over by name, and what is
//! not there is asked of the broker. Without a jail this process opens them itself, before its
//! setup filter, which allows no opening.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate_broker::{
    Client, ClientError, Handover, HandoverError, Kind, Operation, UnjailedError,
};
use thiserror::Error;

use crate::config::{self, Config, CpuConfig, Drive, NetworkInterface, Serial};
use crate::memory::{HugePages, huge};
use crate::mmds::{self, Store};

mod append;
mod direct;
mod drive;
mod listener;
mod page_handler;
mod served;
mod tap;

use direct::{fork_broker, open_device, open_file, open_listener, open_taps};
pub use drive::{CardBackend, DriveBackend};
pub use page_handler::PageHandlerParts;
pub use served::Served;

/// How long the broker may take for an answer during setup.
const BROKER_PATIENCE: Duration = Duration::from_secs(5);

/// Why something that the machine needs is not there.
#[derive(Debug, Error)]
pub enum Error {
    /// It could not be opened.
    #[error("{what} {name:?}: {source}{hint}")]
    Open {
        /// What it is for.
        what: &'static str,
        /// Its name in the config.
        name: String,
        /// What the host said.
        source: io::Error,
        /// What to do, where that is known.
        hint: &'static str,
    },
    /// It is a directory, a pipe, a character device...
    #[error("{what} {name:?} is {found}: it must be a regular file or a block device")]
    NotAFile {
        /// What it is for.
        what: &'static str,
        /// Its name in the config.
        name: String,
        /// What it is.
        found: &'static str,
    },
    /// The jailer handed over none, or another kind.
    #[error("{what}: {source}")]
    Handover {
        /// What it is for.
        what: &'static str,
        /// What is wrong.
        source: HandoverError,
    },
    /// The broker gave none.
    #[error("{what} {name:?}: {source}")]
    Broker {
        /// What it is for.
        what: &'static str,
        /// Its name in the config.
        name: String,
        /// Why.
        source: ClientError,
    },
    /// A machine without a jail that could not be started before.
    #[error(
        "{what} {name:?}: after a start that failed nothing new of this kind can be opened: start a new VMM"
    )]
    TooLate {
        /// What it is for.
        what: &'static str,
        /// Its name in the config.
        name: String,
    },
    /// No broker beside an unjailed VMM.
    #[error(transparent)]
    NoBroker(#[from] UnjailedError),
    /// The config is refused.
    #[error("machine config {name:?}: {source}")]
    Config {
        /// Where it was read from.
        name: String,
        /// Why.
        source: config::Error,
    },
    /// The config is implausibly long.
    #[error("machine config {name:?} has more than {max} bytes", max = config::MAX_FILE_SIZE)]
    ConfigTooLong {
        /// Where it was read from.
        name: String,
    },
}

/// What a machine is built from: everything open.
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: File,
    /// The kernel image, of a machine that boots.
    pub kernel: Option<File>,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// One for each of [`Config::drives_in_order`].
    pub drives: Vec<DriveBackend>,
    /// One for each of the config's persistent memory devices.
    pub pmem: Vec<File>,
    /// One for each of the config's network cards.
    pub cards: Vec<CardBackend>,
    /// The vsock device's.
    pub vsock: Option<VsockSockets>,
    /// What the metadata service shows.
    pub metadata: Arc<Store>,
    /// One for each of the config's shared directories.
    pub fs: Vec<UnixStream>,
    /// What the serial port writes to, if not standard output.
    pub serial: Option<File>,
    /// Huge pages that the host has free, where that could be read.
    pub free_huge_pages: Option<u64>,
    /// Where a debugger connects.
    #[cfg(feature = "gdb")]
    pub gdb: Option<Arc<UnixListener>>,
}

/// How a machine begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// It boots a kernel.
    Boot,
    /// It goes on from a saved one, whose kernel is in its memory.
    Snapshot,
}

/// What a vsock device works with.
pub struct VsockSockets {
    /// Host programs connect here.
    pub listener: Arc<UnixListener>,
    /// Connects to host programs for the guest.
    pub broker: Option<Arc<Mutex<Client>>>,
}

/// Where everything comes from.
pub enum Source {
    /// This process opens it.
    Direct,
    /// The jailer has opened it.
    Jailed(Jail),
    /// Either, for a machine that is configured by requests.
    Served(Box<Served>),
}

/// What a jailed process has instead of a file system.
pub struct Jail {
    handover: Handover,
    broker: Option<Client>,
}

impl Jail {
    /// What the jailer handed over.
    ///
    /// # Errors
    /// When the broker's descriptor is not one.
    pub fn new(mut handover: Handover) -> Result<Self, Error> {
        let named = handover.remaining().any(|(_, kind)| kind == Kind::Broker);
        let socket = named.then(|| handover.take("broker", &[Kind::Broker]));
        let socket = socket.transpose().map_err(|source| Error::Handover {
            what: "broker",
            source,
        })?;
        Ok(Self {
            handover,
            broker: socket.map(Client::new),
        })
    }

    /// A descriptor from the hand-over.
    fn take(&mut self, what: &'static str, name: &str, kind: Kind) -> Result<OwnedFd, Error> {
        let taken = self.handover.take(name, &[kind]);
        taken.map_err(|source| Error::Handover { what, source })
    }

    /// A file from the hand-over, or else from the broker.
    fn file(&mut self, what: &'static str, name: &str, write: bool) -> Result<OwnedFd, Error> {
        let kinds: &[Kind] = if write {
            &[Kind::FileRw]
        } else {
            &[Kind::FileRo, Kind::FileRw]
        };
        match (self.handover.take(name, kinds), &mut self.broker) {
            (Err(HandoverError::Missing(..)), Some(broker)) => {
                let name = name.to_owned();
                let op = Operation::Open {
                    name: name.clone(),
                    write,
                };
                let answer = broker.call(op, BROKER_PATIENCE);
                answer.map_err(|source| Error::Broker { what, name, source })
            }
            (result, _) => result.map_err(|source| Error::Handover { what, source }),
        }
    }
}

impl Source {
    /// Reads the machine config.
    ///
    /// # Errors
    /// When it cannot be opened or is refused.
    pub fn config(&mut self, name: &str) -> Result<Config, Error> {
        let text = self.text("machine config", name)?;
        let failed = |name: &str| {
            let name = name.to_owned();
            move |source| Error::Config { name, source }
        };
        let mut config = Config::from_json(&text).map_err(failed(name))?;
        if let Some(CpuConfig::Path(path)) = &config.cpu_config {
            let text = self.text("CPU template", path)?;
            let template = serde_json::from_slice(&text).map_err(config::Error::Json);
            let template = template.map_err(failed(path))?;
            config.cpu_config = Some(CpuConfig::Template(template));
        }
        Ok(config)
    }

    /// A file of JSON, whole.
    fn text(&mut self, what: &'static str, name: &str) -> Result<Vec<u8>, Error> {
        let file = self.file(what, name, false)?;
        let mut text = Vec::new();
        file.take(config::MAX_FILE_SIZE.saturating_add(1))
            .read_to_end(&mut text)
            .map_err(|source| open(what, name, source))?;
        if text.len() as u64 > config::MAX_FILE_SIZE {
            let name = name.to_owned();
            return Err(Error::ConfigTooLong { name });
        }
        Ok(text)
    }

    /// Opens a file to append lines to, which is made if there is none; or a named pipe. Writing to
    /// a pipe never waits.
    ///
    /// # Errors
    /// When it cannot be opened, or was not handed over.
    pub fn append(&mut self, what: &'static str, name: &str) -> Result<File, Error> {
        match self {
            Self::Direct => append::open(name).map_err(|source| open(what, name, source)),
            Self::Jailed(jail) => jail.take(what, name, Kind::Append).map(File::from),
            Self::Served(served) => served.append(what, name),
        }
    }

    /// Opens everything that `config` names.
    ///
    /// Without a jail this also forks the broker of a vsock device, so the process may have one
    /// thread only.
    ///
    /// # Errors
    /// See [`Error`]; the first thing that is not there.
    pub fn open(&mut self, config: &Config, from: Beginning) -> Result<Resources, Error> {
        // A broker that is forked here comes first, so that it holds nothing opened later.
        let forked = match (&*self, &config.vsock) {
            (Self::Direct, Some(vsock)) => Some(fork_broker(&vsock.uds_path)?),
            _ => None,
        };
        // A jailed process can open nothing: it does without the number.
        let pool = config.machine_config.huge_pages == HugePages::TwoMegabytes;
        let free_huge_pages = match &self {
            Self::Direct if pool => huge::free_pages(),
            _ => None,
        };
        let boot = &config.boot_source;
        let kvm = self.kvm()?;
        let boots = from == Beginning::Boot;
        let kernel = boots.then(|| self.file("kernel", &boot.kernel_image_path, false));
        let kernel = kernel.transpose()?;
        let initrd = boot.initrd_path.as_ref().filter(|_| boots);
        let initrd = initrd.map(|path| self.file("initrd", path, false));
        let initrd = initrd.transpose()?;
        let drives = config.drives_in_order();
        let drives = drives.map(|drive| self.drive(drive));
        let drives = drives.collect::<Result<_, _>>()?;
        let pmem = config.pmem.iter();
        let pmem = pmem.map(|pmem| self.file("pmem", &pmem.path_on_host, !pmem.read_only));
        let pmem = pmem.collect::<Result<_, _>>()?;
        if let Self::Served(served) = self {
            served.prepare_taps();
        }
        let cards = config.network_interfaces.iter();
        let cards = cards.map(|card| self.card(card));
        let cards = cards.collect::<Result<_, _>>()?;
        let fs = config.fs.iter().map(|fs| self.back_end(&fs.socket));
        let fs = fs.collect::<Result<_, _>>()?;
        let serial = config.serial.as_ref().and_then(Serial::output);
        let serial = serial.map(|path| self.append(Serial::WHAT, path));
        let serial = serial.transpose()?;
        // The listener last: without a jail it leaves a name behind.
        let vsock = match &config.vsock {
            Some(vsock) => Some(VsockSockets {
                listener: self.listener("vsock", &vsock.uds_path)?,
                // A broker's one user is the vsock device: all else has been opened.
                broker: match self {
                    Self::Direct => shared(forked),
                    Self::Jailed(jail) => shared(jail.broker.take()),
                    Self::Served(served) => served.device_broker(),
                },
            }),
            None => None,
        };
        #[cfg(feature = "gdb")]
        let gdb = {
            let path = config.machine_config.gdb_socket_path.as_ref();
            let listener = path.map(|path| self.listener("gdb_socket_path", path));
            listener.transpose()?
        };
        Ok(Resources {
            kvm,
            kernel,
            initrd,
            drives,
            pmem,
            cards,
            vsock,
            metadata: Arc::new(Store::new(mmds::DEFAULT_LIMIT)),
            fs,
            serial,
            free_huge_pages,
            #[cfg(feature = "gdb")]
            gdb,
        })
    }

    /// Metadata of at most `limit` bytes: what the file `name` says, if one is given.
    ///
    /// # Errors
    /// When the file cannot be opened, is no JSON, or is too large.
    pub fn metadata(&mut self, name: Option<&str>, limit: usize) -> Result<Arc<Store>, Error> {
        let what = "metadata";
        let store = Store::new(limit);
        let Some(name) = name else {
            return Ok(Arc::new(store));
        };
        let file = self.file(what, name, false)?;
        // Spaces between the values do not count, within reason.
        let most = limit.saturating_mul(4).saturating_add(4096) as u64;
        let refused = |source| open(what, name, source);
        let document = serde_json::from_reader(io::BufReader::new(file.take(most)));
        let document = document.map_err(|error| refused(error.into()))?;
        let put = store.put(document);
        put.map_err(|error| refused(io::Error::other(error)))?;
        Ok(Arc::new(store))
    }

    /// Whether a file can be had: before a config that names it is accepted.
    ///
    /// # Errors
    /// When not.
    pub fn probe_file(&mut self, what: &'static str, name: &str, write: bool) -> Result<(), Error> {
        self.file(what, name, write).map(drop)
    }

    /// Opens a file that is read, before the start.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn open_file(&mut self, what: &'static str, name: &str) -> Result<File, Error> {
        self.file(what, name, false)
    }

    /// The same as [`Source::probe_file`] for a drive's files.
    ///
    /// # Errors
    /// When not.
    pub fn probe_drive(&mut self, drive: &Drive) -> Result<(), Error> {
        // A back-end takes one connection, which is the machine's.
        if drive.socket.is_some() {
            return Ok(());
        }
        self.drive(drive).map(drop)
    }

    /// The same for a network card's tap.
    ///
    /// # Errors
    /// When not.
    pub fn probe_card(&mut self, card: &NetworkInterface) -> Result<(), Error> {
        if card.socket.is_some() {
            return Ok(());
        }
        self.card(card).map(drop)
    }

    fn kvm(&mut self) -> Result<File, Error> {
        match self {
            Self::Direct => open_device("/dev/kvm"),
            Self::Jailed(jail) => jail.take("KVM", "kvm", Kind::Kvm).map(File::from),
            Self::Served(served) => served.kvm(),
        }
    }

    fn file(&mut self, what: &'static str, name: &str, write: bool) -> Result<File, Error> {
        let file = match self {
            Self::Direct => open_file(what, name, write)?,
            Self::Jailed(jail) => File::from(jail.file(what, name, write)?),
            Self::Served(served) => served.file(what, name, write)?,
        };
        check_file(what, name, &file)?;
        Ok(file)
    }

    /// The queues of a tap. In the hand-over the first has the tap's name, the others with `:1`,
    /// `:2`... behind it.
    fn taps(&mut self, name: &str, queues: u8) -> Result<Vec<Arc<File>>, Error> {
        match self {
            Self::Direct => Ok(open_taps(name, queues)?.into_iter().map(Arc::new).collect()),
            Self::Jailed(jail) => {
                let queue = |name: String| jail.take("tap", &name, Kind::Tap);
                let queues = queue_names(name, queues).map(queue);
                queues.map(|queue| Ok(Arc::new(queue?.into()))).collect()
            }
            Self::Served(served) => served.taps(name, queues),
        }
    }

    fn listener(&mut self, what: &'static str, path: &str) -> Result<Arc<UnixListener>, Error> {
        match self {
            Self::Direct => open_listener(what, path).map(Arc::new),
            Self::Jailed(jail) => {
                let listener = jail.take(what, path, Kind::Listener)?;
                Ok(Arc::new(listener.into()))
            }
            Self::Served(served) => served.listener(what, path),
        }
    }
}

fn shared(broker: Option<Client>) -> Option<Arc<Mutex<Client>>> {
    broker.map(Mutex::new).map(Arc::new)
}

/// What the queues of a tap are called in the hand-over.
fn queue_names(tap: &str, queues: u8) -> impl Iterator<Item = String> {
    (0..queues).map(move |index| match index {
        0 => tap.to_owned(),
        _ => format!("{tap}:{index}"),
    })
}

fn open(what: &'static str, name: &str, source: io::Error) -> Error {
    Error::Open {
        what,
        name: name.to_owned(),
        source,
        hint: "",
    }
}

fn check_file(what: &'static str, name: &str, file: &File) -> Result<(), Error> {
    let metadata = file.metadata().map_err(|source| open(what, name, source))?;
    let kind = metadata.file_type();
    let found = match () {
        () if kind.is_file() || kind.is_block_device() => return Ok(()),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(Error::NotAFile {
        what,
        name: name.to_owned(),
        found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(name: &str, write: bool) -> String {
        let error = Source::Direct.file("drive", name, write).unwrap_err();
        error.to_string()
    }

    #[test]
    fn refuses_what_is_no_file() {
        assert!(refused("/nonexistent/x", false).contains("\"/nonexistent/x\": No such file"));
        for write in [false, true] {
            assert!(refused("/", write).contains("is a directory"));
        }
        assert!(refused("/dev/null", false).contains("is a device"));
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(refused(pipe.to_str().unwrap(), false).contains("is a pipe"));
    }

    #[test]
    fn makes_no_tap() {
        let name = "casemate-none0";
        let error = Source::Direct.taps(name, 1).unwrap_err().to_string();
        assert!(error.contains("no such interface"), "{error}");
        assert!(nix::net::if_::if_nametoindex(name).is_err());
        let error = Source::Direct.taps("a-name-far-too-long", 2).unwrap_err();
        assert!(error.to_string().contains("no such interface"));
    }

    #[test]
    fn bounds_the_config() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        std::fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
        let error = Source::Direct.config(path.to_str().unwrap()).unwrap_err();
        assert!(matches!(error, Error::ConfigTooLong { .. }));
    }
}
