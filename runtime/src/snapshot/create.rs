//! `casemate snapshot create`: a machine is paused, its VMM writes state and memory, it goes on, and what was written
//! becomes a snapshot.
//!
//! Whatever goes wrong on the way, the machine goes on and nothing is left. What comes from the machine's user is a
//! stranger's: of its two files only the content is taken over, once nobody can write to them any more.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use casemate_broker::exit;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::{Value, json};

use super::guard::Guard;
use super::hold::{self, Held};
use super::meta::{self, LAYER, Meta, VERSION, target};
use super::staged::{self, Staged};
use super::{Error, copy, lease};
use crate::api::{self, Answer};
use crate::cli::SnapshotCreateArgs;
use crate::places::Places;
use crate::run::origin::{self, Origin};
use crate::run::{API_SOCKET, FILES, SAVED, VSOCK_SOCKET};
use crate::{say, state};

/// How long the VMM may take to go on: it answers when it has written what it is at.
const RESUME_PATIENCE: Duration = Duration::from_secs(600);
/// How long VMM and broker may take to close a file that they have written.
const LET_GO: Duration = Duration::from_secs(2);
/// Between two looks at it.
const TURN: Duration = Duration::from_millis(2);

/// A machine that is being saved.
struct Origins<'a> {
    id: String,
    socket: PathBuf,
    /// The socket device's.
    vsock: PathBuf,
    /// Where it writes.
    saved: PathBuf,
    origin: Origin,
    /// The disk that is its own.
    layer: PathBuf,
    signals: &'a SignalFd,
    /// What ends this process once all is in order.
    signal: Option<i32>,
}

/// Makes a snapshot, and returns the exit code.
pub fn create(places: &Places, args: &SnapshotCreateArgs) -> Result<u8, Error> {
    let record = state::find(places, &args.id)?;
    let id = record.id.to_string();
    let directory = places.machine(&id);
    let path = directory.join(origin::FILE);
    let origin = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| Error::BadMeta {
            path,
            why: error.to_string(),
        })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NotSaveable(id));
        }
        Err(source) => return Err(Error::io("cannot read", &path)(source)),
    };
    let target = target(places, &args.name)?;
    let saved = places.saved(&id);
    // Held to the end: of two at once each would take the other's files.
    let lock = staged::lock(&saved).map_err(Error::io("cannot lock", &saved))?;
    let _lock = lock.ok_or_else(|| Error::Busy(id.clone()))?;
    let signals = hold_signals()?;
    let staged = Staged::new(&target)?;
    let socket = directory.join(API_SOCKET);
    let guard = Guard::start(&socket, &saved, staged.path());
    let guard = guard.map_err(Error::system("start a guard"))?;
    let mut machine = Origins {
        layer: places.layer(&id),
        vsock: directory.join(VSOCK_SOCKET),
        id,
        socket,
        saved,
        origin,
        signals: &signals,
        signal: None,
    };
    let made = machine.save(&staged, args.leave_paused);
    let made = made.and_then(|meta| match machine.signal {
        Some(_) => Ok(()),
        None => machine.take_over(staged, &meta, &target),
    });
    machine.remove_files();
    // Not when the machine could not be made to go on: the guard tries on.
    match &made {
        Err(Error::Ask { what: RESUME, .. }) => drop(guard),
        _ => guard.release(),
    }
    made.map(|()| machine.signal.map_or(0, exit::by_signal))
}

const PAUSE: &str = "pause";
const RESUME: &str = "go on";
const SAVE: &str = "save the machine";

fn hold_signals() -> Result<SignalFd, Error> {
    let ending = [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ];
    let set: SigSet = ending.into_iter().collect();
    set.thread_block().map_err(Error::system("hold signals"))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    SignalFd::with_flags(&set, flags).map_err(Error::system("open a signal descriptor"))
}

impl Origins<'_> {
    /// Whether a signal asks for the end.
    fn is_interrupted(&mut self) -> bool {
        if let Ok(Some(info)) = self.signals.read_signal() {
            self.signal = Some(info.ssi_signo.cast_signed());
        }
        self.signal.is_some()
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let id = self.id.clone();
        move |source| Error::Ask { id, what, source }
    }

    fn refused(&self, what: &'static str, answer: &Answer) -> Error {
        Error::Refused {
            id: self.id.clone(),
            what,
            words: answer.words(),
        }
    }

    fn is_paused(&self) -> Result<bool, Error> {
        let answer = api::ask(&self.socket, "GET", "/", &Value::Null);
        let answer = answer.map_err(self.failed("say how it is"))?;
        Ok(answer.body.get("state").and_then(Value::as_str) == Some("Paused"))
    }

    fn set(&self, what: &'static str, state: &str, patience: Duration) -> Result<(), Error> {
        let end = Instant::now() + patience;
        let mut waits = || Instant::now() < end;
        let body = json!({ "state": state });
        let answer = api::ask_while(&self.socket, "PATCH", "/vm", &body, &mut waits);
        let answer = answer.map_err(self.failed(what))?;
        match answer.is_done() {
            true => Ok(()),
            false => Err(self.refused(what, &answer)),
        }
    }

    /// Has the VMM write its files, and copies the machine's own disk, while it is paused. Then it goes on, unless it was
    /// paused before or is to be from now on.
    fn save(&mut self, staged: &Staged, leave_paused: bool) -> Result<Meta, Error> {
        let was_paused = self.is_paused()?;
        // Until it goes on, or it is asked for once more.
        let _held = match was_paused {
            true => None,
            false => self.hold(),
        };
        if !was_paused {
            self.set(PAUSE, "Paused", api::PATIENCE)?;
        }
        let saved = self.save_paused(staged);
        let stays = was_paused || (leave_paused && saved.is_ok() && self.signal.is_none());
        if !stays {
            self.set(RESUME, "Resumed", RESUME_PATIENCE)?;
        }
        saved
    }

    /// Has the guest hold all but its init. Without that, too, a snapshot is whole: its clones are less apart.
    fn hold(&self) -> Option<Held> {
        self.origin.spec.as_ref()?;
        let held = hold::hold(&self.vsock).ok().flatten();
        if held.is_none() {
            say::warn(
                "the guest does not hold its processes while it is saved: in machines that go on from the snapshot they may \
                 run, and draw random numbers, for a moment before those are the machine's own",
            );
        }
        held
    }

    fn save_paused(&mut self, staged: &Staged) -> Result<Meta, Error> {
        let [state, memory] = SAVED;
        let body = json!({ "snapshot_path": state, "mem_file_path": memory });
        let socket = self.socket.clone();
        let asked = api::ask_while(&socket, "PUT", "/snapshot/create", &body, &mut || {
            !self.is_interrupted()
        });
        match asked {
            Ok(answer) if answer.is_done() => {}
            Ok(answer) => return Err(self.refused(SAVE, &answer)),
            // What it is at comes to its end, and is removed.
            Err(_) if self.signal.is_some() => return self.meta(),
            Err(error) => return Err(self.failed(SAVE)(error)),
        }
        if self.origin.has_layer() {
            let from = File::open(&self.layer).map_err(Error::io("cannot open", &self.layer))?;
            let to = staged.path().join(LAYER);
            copy(&from, &to).map_err(Error::io("cannot write", &to))?;
        }
        self.meta()
    }

    /// Its description, with the disks as they are now.
    fn meta(&self) -> Result<Meta, Error> {
        let disks = self.origin.disks.iter().map(|disk| {
            origin::fingerprint(&disk.path).map_err(Error::io("cannot look at", &disk.path))
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Meta {
            version: VERSION,
            id: self.id.clone(),
            created: now.map_or(0, |since| since.as_secs()),
            origin: self.origin.clone(),
            disks: disks.collect::<Result<_, _>>()?,
        })
    }

    /// Makes the files that the VMM wrote root's, and a snapshot of all.
    fn take_over(&self, staged: Staged, meta: &Meta, target: &Path) -> Result<(), Error> {
        for file in FILES {
            self.take_file(&staged, file)?;
        }
        let text = serde_json::to_vec_pretty(meta).map_err(Error::system("describe it"))?;
        staged.write(meta::FILE, &text)?;
        staged.give_name(target)
    }

    fn take_file(&self, staged: &Staged, file: &'static str) -> Result<(), Error> {
        let (from, to) = (self.saved.join(file), staged.path().join(file));
        let failed = |what| Error::io(what, &to);
        let no_follow = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let mut options = File::options();
        let opened = options
            .read(true)
            .custom_flags(no_follow.bits())
            .open(&from);
        let opened = opened.map_err(Error::io("cannot open", &from))?;
        let data = opened
            .metadata()
            .map_err(Error::io("cannot look at", &from))?;
        // One more name would be somebody else's way to it.
        if !data.is_file() || data.nlink() != 1 {
            let id = self.id.clone();
            return Err(Error::NoFile { id, file });
        }
        // Root's first: then nobody can open it any more, and those who have it open are seen.
        fchown(opened.as_fd(), Some(0), Some(0)).map_err(failed("cannot change the owner of"))?;
        let owner_only = fs::Permissions::from_mode(0o600);
        let changed = opened.set_permissions(owner_only);
        changed.map_err(failed("cannot change the mode of"))?;
        let end = Instant::now() + LET_GO;
        let is_ours = loop {
            match lease::nobody_writes(&opened) {
                Ok(true) => break true,
                Ok(false) if Instant::now() < end => sleep(TURN),
                Ok(false) => {
                    let id = self.id.clone();
                    return Err(Error::NotLetGo { id, file });
                }
                // Nobody knows: a copy is ours alone.
                Err(_) => break false,
            }
        };
        // By name; what is there now may be another file than the one looked at, but then it was the VMM's doing.
        let same = || fs::symlink_metadata(&from).is_ok_and(|now| now.ino() == data.ino());
        let renamed = is_ours && same() && fs::rename(&from, &to).is_ok();
        let moved = || fs::symlink_metadata(&to).is_ok_and(|now| now.ino() == data.ino());
        if renamed && moved() {
            return opened.sync_all().map_err(failed("cannot sync"));
        }
        if renamed {
            let id = self.id.clone();
            return Err(Error::NoFile { id, file });
        }
        // Another file system.
        copy(&opened, &to).map(drop).map_err(failed("cannot write"))
    }

    /// What the VMM wrote and nobody took over.
    fn remove_files(&self) {
        for file in FILES {
            let _ = fs::remove_file(self.saved.join(file));
        }
    }
}
