//! Saves a paused machine: [`RunningMachine::hold`] has the devices rest and says what they are, and the [`Saver`], a thread
//! of its own, adds the vCPUs and writes all of it and the memory to two files.
//!
//! It is a thread of its own so that no other one may ask KVM for a vCPU's registers or write to files by `pwrite`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::Builder;

use log::info;
use thiserror::Error;

use super::changes::Changes;
use super::devices::DeviceName;
use super::moving::{self, Phase, Wire};
use super::sending::{Bitmaps, Departure, Sending, Word};
use super::state::{DeviceState, MachineState, sections};
use super::warming::{self, Warming};
use super::{RunningMachine, attached};
use crate::config::Config;
use crate::kvm::{self, StateReader};
use crate::memory::GuestMemory;
use crate::memory::touched::Untouched;
use crate::snapshot::working_set::Run;
use crate::snapshot::writer::{self, Written};
use crate::snapshot::{SnapshotId, format, memory};
use crate::virtio::worker::Held;

/// Why a machine was not saved. It is as before.
#[derive(Debug, Error)]
pub enum Error {
    /// A device that cannot move.
    #[error("{device} cannot be in a snapshot: {why}")]
    Obstacle {
        /// Which one.
        device: DeviceName,
        /// Why.
        why: &'static str,
    },
    /// A device that cannot move, and could be saved.
    #[error("{device} stays where it is: {why}")]
    Stays {
        /// Which one.
        device: DeviceName,
        /// Why.
        why: &'static str,
    },
    /// A device is on its way out.
    #[error("the guest is letting go of a device: try again")]
    Leaving,
    /// Nobody is there to do it.
    #[error("this machine was started without what saves it: start it with an API")]
    NoSaver,
    /// A thread has ended.
    #[error("the {0} thread has ended")]
    NoThread(&'static str),
    /// KVM does not say what it has.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// It cannot be written down.
    #[error("the state cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// It is too large.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// The memory file.
    #[error("the memory file: {0}")]
    Memory(#[from] memory::Error),
    /// One of the files.
    #[error("cannot {action} the {file}: {source}")]
    Write {
        /// What was being done.
        action: &'static str,
        /// To which of them.
        file: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// On its way.
    #[error(transparent)]
    Moving(#[from] moving::Error),
    /// Nobody keeps what the guest writes, or what we do.
    #[error("cannot keep which pages are written: {0}")]
    Log(#[source] kvm::Error),
    /// The working set.
    #[error(transparent)]
    WorkingSet(#[from] warming::Error),
    /// No random bytes.
    #[error("cannot draw an id (getrandom): {0}")]
    Random(#[source] io::Error),
}

/// The two files of a snapshot, new and empty.
#[derive(Debug)]
pub struct Files {
    /// For the state.
    pub state: File,
    /// For the memory.
    pub memory: File,
}

/// How much of the memory a snapshot has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of it.
    Full,
    /// What has changed since the last snapshot, made or loaded; all of it if there was none.
    Differences,
}

/// What the thread is asked for.
pub(super) enum Order {
    Save(Box<Job>),
    /// What was saved last has its names.
    Named,
    /// Bring these pages.
    Warm(Vec<Run>),
    /// Write down which pages were used.
    Record(File),
    /// Send the machine to another VMM.
    Send(Box<Departure>),
    /// What whoever sends it waits for.
    Word(Word),
}

pub(super) struct Job {
    machine: MachineState,
    files: Files,
    kind: Kind,
}

/// The way to the thread that saves.
pub struct Saver {
    orders: Sender<Order>,
    results: Receiver<Result<Written, Error>>,
    /// Whether the memory comes page by page from a snapshot's file.
    is_mapped: bool,
}

impl Saver {
    /// Starts the thread, which calls `seal` first of all, and does nothing if that fails. The machine goes on from snapshot
    /// `base`, if from any.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub(super) fn start(
        reader: StateReader,
        memory: GuestMemory,
        untouched: Untouched,
        base: Option<SnapshotId>,
        seal: impl FnOnce() -> Result<(), ()> + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, to_do) = channel();
        let (done, results) = channel();
        let is_mapped = warming::is_mapped(&memory);
        let keeper = Keeper {
            changes: Changes::since(base, &memory),
            reader,
            memory,
            untouched,
            loaded: base,
        };
        let run = move || {
            if seal().is_ok() {
                keeper.run(&to_do, &done);
            }
        };
        Builder::new().name("snapshot".to_owned()).spawn(run)?;
        Ok(Self {
            orders,
            results,
            is_mapped,
        })
    }

    fn save(&self, job: Job) -> Result<Written, Error> {
        self.ask(Order::Save(Box::new(job)))
    }

    fn ask(&self, order: Order) -> Result<Written, Error> {
        let gone = || Error::NoThread("snapshot");
        self.orders.send(order).map_err(|_| gone())?;
        self.results.recv().map_err(|_| gone())?
    }

    pub(super) fn tell(&self, order: Order) {
        // Of a thread that has ended the next snapshot hears.
        let _ = self.orders.send(order);
    }

    /// Brings the pages of `runs`, while the guest runs.
    pub(super) fn warm(&self, runs: Vec<Run>) {
        self.tell(Order::Warm(runs));
    }
}

/// What the thread has.
struct Keeper {
    reader: StateReader,
    memory: GuestMemory,
    untouched: Untouched,
    changes: Changes,
    /// The snapshot that the machine goes on from.
    loaded: Option<SnapshotId>,
}

impl Keeper {
    fn run(mut self, orders: &Receiver<Order>, results: &Sender<Result<Written, Error>>) {
        let mut warming: Option<Warming> = None;
        loop {
            let order = match &mut warming {
                None => orders.recv().ok(),
                // Between two steps whoever asks for something gets it.
                Some(pages) => match orders.try_recv() {
                    Err(TryRecvError::Empty) => {
                        if !pages.step() {
                            warming = None;
                            info!("working set: all of it is there");
                        }
                        continue;
                    }
                    order => order.ok(),
                },
            };
            let result = match order {
                None => return,
                Some(Order::Named) => {
                    self.changes.named();
                    continue;
                }
                Some(Order::Warm(runs)) => {
                    warming = Some(Warming::new(&self.memory, runs));
                    continue;
                }
                Some(Order::Send(departure)) => match self.send(*departure, orders) {
                    Some(result) => result,
                    None => continue,
                },
                // Nothing is being sent any more, and whoever stopped the guest for it shall know.
                Some(Order::Word(Word::Stopped(_, written))) => {
                    self.changes.add(&written);
                    Err(moving::Error::Cancelled.into())
                }
                Some(Order::Word(Word::Round(written))) => {
                    self.changes.add(&written);
                    continue;
                }
                Some(Order::Word(Word::Stay)) => continue,
                Some(Order::Save(job)) => self.save(*job),
                Some(Order::Record(file)) => self.record(&file),
            };
            if results.send(result).is_err() {
                return;
            }
        }
    }

    /// Sends the machine. There is a result once the guest was stopped for it: somebody waits for it then.
    fn send(
        &mut self,
        departure: Departure,
        orders: &Receiver<Order>,
    ) -> Option<Result<Written, Error>> {
        let Departure {
            socket,
            mut offer,
            limits,
            way,
            written,
        } = departure;
        offer.cpuid = self.reader.first_cpuid().to_vec();
        let Self {
            reader,
            memory,
            untouched,
            changes,
            ..
        } = self;
        changes.add(&written);
        let mut stopped = false;
        let sent = Sending {
            reader,
            memory,
            untouched: *untouched,
            way: &way,
            wire: Wire::new(socket, Arc::clone(&way)),
            limits,
            taken: &mut |pages| changes.add(pages),
        }
        .run(&offer, || {
            let word = await_word(orders)?;
            stopped |= matches!(word, Word::Stopped(..));
            Ok(word)
        });
        if let Err(error) = &sent {
            let error = error.to_string();
            way.update(|progress| progress.error = Some(error));
        }
        if stopped {
            return Some(sent.map_err(Error::from));
        }
        way.announce(Phase::Failed);
        None
    }

    fn record(&self, file: &File) -> Result<Written, Error> {
        let id = self.loaded.ok_or(warming::Error::NotMapped)?;
        Ok(warming::record(&self.memory, id, file)?)
    }

    /// The memory first: a state file says that all of the snapshot is there.
    fn save(&mut self, job: Job) -> Result<Written, Error> {
        let Self {
            reader,
            memory,
            untouched,
            changes,
            ..
        } = self;
        let Job {
            mut machine,
            files,
            kind,
        } = job;
        machine.memory = writer::regions(memory);
        let sections = sections(&machine, &reader.vcpus()?, &reader.vm()?)?;
        let id = SnapshotId::random().map_err(Error::Random)?;
        let state = format::encode(id, &sections)?;
        changes.take(reader, memory)?;
        let written = match (kind, changes.base()) {
            (Kind::Differences, Some(base)) => {
                let pages = changes.pages();
                writer::write_diff(memory, *untouched, &files.memory, id, base, pages)?
            }
            _ => writer::write(memory, *untouched, &files.memory, id)?,
        };
        let failed = |action, file| {
            move |source| Error::Write {
                action,
                file,
                source,
            }
        };
        let synced = files.memory.sync_all();
        synced.map_err(failed("sync", "memory file"))?;
        let put = files.state.write_all_at(&state, 0);
        put.map_err(failed("write", "state file"))?;
        let synced = files.state.sync_all();
        synced.map_err(failed("sync", "state file"))?;
        changes.written(id);
        Ok(written)
    }
}

/// The control thread's next word to whoever sends the machine.
fn await_word(orders: &Receiver<Order>) -> Result<Word, moving::Error> {
    loop {
        match orders.recv() {
            Ok(Order::Word(word)) => return Ok(word),
            // Of a snapshot that was made just before, or of no use now. Nothing else is asked for meanwhile.
            Ok(_) => {}
            Err(_) => return Err(moving::Error::Cancelled),
        }
    }
}

/// A paused machine, whose devices rest as long as this lives.
pub struct HeldMachine<'a> {
    saver: &'a Saver,
    machine: MachineState,
    held: Option<Held>,
}

/// The devices of a machine that may run elsewhere: they rest as long as this lives.
pub struct Stranded(#[allow(dead_code, reason = "what counts is that it is dropped")] Option<Held>);

impl HeldMachine<'_> {
    /// Saves it to `files`; then its devices go on. Say [`RunningMachine::snapshot_named`] once those have their names.
    ///
    /// # Errors
    /// When the host refuses. The machine is as before.
    pub fn save(self, files: Files, kind: Kind) -> Result<Written, Error> {
        let machine = self.machine;
        let written = self.saver.save(Job {
            machine,
            files,
            kind,
        });
        drop(self.held);
        written
    }
}

impl HeldMachine<'_> {
    /// Sends the rest of the machine, of which this process has written `pages` since the last time, and has it run at the
    /// other end. It never goes on here, unless that fails.
    ///
    /// # Errors
    /// When it does. The devices of a machine that may run at the other end rest until the second part is dropped.
    pub(super) fn send(self, pages: Bitmaps) -> Result<Written, (Error, Option<Stranded>)> {
        let Self {
            saver,
            machine,
            held,
        } = self;
        let word = Word::Stopped(Box::new(machine), pages);
        match saver.ask(Order::Word(word)) {
            Ok(written) => {
                std::mem::forget(held);
                Ok(written)
            }
            Err(Error::Moving(error)) if error.is_unknown() => {
                Err((error.into(), Some(Stranded(held))))
            }
            Err(error) => Err((error, None)),
        }
    }
}

impl RunningMachine {
    /// The files that were written last have their names: differences are against that snapshot from now on.
    pub fn snapshot_named(&self) {
        if let Some(saver) = &self.saver {
            saver.tell(Order::Named);
        }
    }

    /// Whether [`RunningMachine::record_working_set`] can be.
    pub fn has_working_set(&self) -> bool {
        self.saver.as_ref().is_some_and(|saver| saver.is_mapped)
    }

    /// Writes to `file`, which is new and empty, which pages of its snapshot's memory the machine has used so far.
    ///
    /// # Errors
    /// When the machine does not go on from a memory file, or the host refuses.
    pub fn record_working_set(&self, file: File) -> Result<Written, Error> {
        let saver = self.saver.as_ref().ok_or(Error::NoSaver)?;
        saver.ask(Order::Record(file))
    }

    /// Has the devices of the machine, whose vCPUs are paused, rest, and says what all of it is. Its config is `config`.
    ///
    /// # Errors
    /// When something of it cannot be in a snapshot. The machine is as before.
    pub fn hold(&self, config: &Config) -> Result<HeldMachine<'_>, Error> {
        let saver = self.saver.as_ref().ok_or(Error::NoSaver)?;
        let panel = &self.panel;
        let pci = self.hotplug.as_ref().map(|it| it.registers().save());
        if pci.is_some_and(|pci| pci.is_leaving()) {
            return Err(Error::Leaving);
        }
        let (saved, held) = self
            .devices
            .hold()
            .map_err(|()| Error::NoThread("device"))?;
        let mut devices = Vec::with_capacity(saved.len());
        for saved in saved {
            let name = self.devices.name(saved.index).cloned();
            let attached = attached::find(&self.windows, self.hotplug.as_ref(), saved.index);
            let (Some(name), Some((place, transport))) = (name, attached) else {
                continue;
            };
            if let Some(why) = saved.obstacle {
                return Err(Error::Obstacle { device: name, why });
            }
            devices.push(DeviceState {
                name,
                place,
                transport: transport.save(&saved.queues.unwrap_or_default()),
                data: saved.data,
            });
        }
        let machine = MachineState {
            config: config.clone(),
            enable_pci: self.hotplug.is_some(),
            memory: Vec::new(),
            pmem: self.pmem_places.clone(),
            serial: panel.serial.save(),
            i8042: panel.i8042.save(),
            acpi_events: panel.acpi.pending(),
            clock: panel.clock.save(),
            vcpus: panel.vcpus.as_ref().map(|vcpus| vcpus.save()),
            pci,
            devices,
        };
        Ok(HeldMachine {
            saver,
            machine,
            held,
        })
    }
}
