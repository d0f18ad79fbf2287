//! A machine, from its config to threads that run it. [`build`] is the order of set-up.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::Builder;

use kvm_bindings::CpuId;
use log::{info, warn};

use crate::boot::{self, EntryState, GedInfo, MachineDescription};
use crate::bus::Bus;
use crate::config::{self, Config, RateLimiter};
use crate::cpu_template::Template;
use crate::devices::boot_timer::{BootTimer, Moment};
use crate::devices::{acpi, i8042, serial};
use crate::ending::{End, EndSignal};
#[cfg(feature = "gdb")]
use crate::gdb;
use crate::kvm::cpuid::{MachineCpuid, Topology};
use crate::kvm::{self, StateReader, Vcpu, Vm};
use crate::lockdown::{self, Role, Stage};
use crate::memory::touched::Untouched;
use crate::memory::{self, GuestMemory, layout};
use crate::metrics::Source;
use crate::resources::{DriveBackend, Resources, VsockSockets};
use crate::snapshot::SnapshotId;
use crate::snapshot::working_set::Run;
use crate::vcpu::{Buses, VcpuThread};
use crate::virtio::rate_limiter::LimiterOptions;
use crate::virtio::transport::mmio::MmioTransport;
use crate::virtio::worker::Restored;
use crate::virtio::{Balloon, DeviceWorker, Entropy, VirtioDevice, Vsock, VsockOptions};

mod arrival;
mod attached;
mod changes;
mod command_line;
mod console;
mod departure;
pub mod devices;
mod drives;
mod error;
mod guest_memory;
pub mod hotplug;
pub mod moving;
mod network;
mod page_handler;
mod panel;
pub mod placement;
mod plug;
mod pmem;
mod restoring;
mod running;
mod saving;
mod sending;
pub mod state;
pub mod vcpus;
mod warming;

pub use arrival::Arrival;
use attached::{Attached, OnMmio, OnPci, Working};
use command_line::command_line;
pub use console::ConsolePanel;
use devices::Devices;
pub use error::Error;
use error::host;
use hotplug::Hotplug;
use moving::Way;
use network::Metadata;
use page_handler::PageHandler;
pub use panel::Panel;
use panel::panel;
pub use restoring::{Restore, SavedMemory};
pub use running::RunningMachine;
use saving::Saver;
pub use saving::{Error as SaveError, Files, HeldMachine, Kind, Stranded};
use vcpus::Vcpus;

/// A machine whose guest has not run yet.
pub struct Machine {
    vm: Vm,
    vcpus: Vec<Vcpu>,
    /// The CPUs of the host for each of them; all where there is none.
    host_cpus: Vec<Vec<u16>>,
    buses: Arc<Buses>,
    worker: Option<DeviceWorker>,
    hotplug: Option<Hotplug>,
    devices: Devices,
    metadata: Metadata,
    address_bits: u8,
    pmem_places: BTreeMap<String, u64>,
    panel: Panel,
    windows: Vec<Arc<MmioTransport>>,
    reader: Option<StateReader>,
    memory: GuestMemory,
    /// Who brings the memory, if it comes page by page.
    page_handler: Option<PageHandler>,
    /// How the devices go on from a saved machine's; none for a new machine.
    restored: Option<Vec<Restored>>,
    /// Whether it is another one's, come here.
    is_moved: bool,
    /// The snapshot that it goes on from.
    base: Option<SnapshotId>,
    /// Pages that it will use first.
    working_set: Option<Vec<Run>>,
    #[cfg(feature = "gdb")]
    gdb: Option<gdb::Stub>,
}

/// What the command line adds to a machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Whether there is a boot timer, and when it started.
    pub boot_timer: Option<Moment>,
    /// Whether virtio devices sit on a PCI bus instead of in MMIO windows.
    pub enable_pci: bool,
    /// Whether the machine can be saved: there is a thread for it then.
    pub can_be_saved: bool,
}

/// Builds the machine of `config`; with `restore` it goes on from a saved one, whose config that is.
///
/// # Errors
/// See [`Error`]; nothing has run then.
pub fn build(
    config: &Config,
    resources: Resources,
    options: Options,
    restore: Option<Restore>,
) -> Result<Machine, Error> {
    let lost = restore.as_ref().and_then(Restore::lost);
    let built = assemble(config, resources, options, restore);
    // Without its memory whatever else is wrong follows from that.
    match lost.as_ref().and_then(|lost| lost.get()) {
        Some(lost) => Err(lost.clone().into()),
        None => built,
    }
}

fn assemble(
    config: &Config,
    resources: Resources,
    options: Options,
    mut restore: Option<Restore>,
) -> Result<Machine, Error> {
    let Resources {
        kvm,
        kernel,
        initrd,
        drives,
        pmem,
        cards,
        vsock,
        metadata,
        fs,
        serial,
        free_huge_pages,
        #[cfg(feature = "gdb")]
        gdb,
    } = resources;
    let max_vcpus = config.machine_config.max_vcpus();
    let pit = config.machine_config.pit;

    // First of all, while little is mapped; and memory before anything sits on KVM's buses.
    let mut vm = Vm::new(kvm)?;
    let supported = vm.supported_cpuid()?;
    let template = Template::of(config, &vm, &supported)?;
    template.warn();
    let cpuid = cpuid(config, &vm, &template, &supported)?;
    let memory = memory_options(config, free_huge_pages);
    let (memory, page_handler) = match &mut restore {
        Some(restore) => restore.memory(memory)?,
        None => (guest_memory::allocate(config, memory)?, None),
    };
    placement::bind_memory(&memory, &config.machine_config)?;
    let address_bits = cpuid.physical_address_bits();
    vm.set_memory(&memory, address_bits)?;
    let pmem = pmem::add(&config.pmem, pmem, &mut vm, &memory, address_bits)?;
    vm.create_irqchip(pit)?;
    vm.disable_pmu();

    let vcpus = vm.create_vcpus(max_vcpus)?;
    vm.set_gsi_routing(pit)?;
    let cpuids = match &restore {
        Some(restore) => restore.processors(&vm, &vcpus, &cpuid)?,
        None => new_processors(&vcpus, &cpuid, &template)?,
    };
    let reader = options
        .can_be_saved
        .then(|| vm.state_reader(vcpus.iter().zip(cpuids), pit));
    let reader = reader.transpose()?;

    let ends = Arc::new(EndSignal::new().map_err(host("make an eventfd"))?);
    let mut panel = panel(config, &memory, ends, metadata, serial, restore.as_ref())?;
    let metadata = Metadata::new(config, &panel.metadata)?;
    panel.metrics.extend(metadata.metrics());
    let cards = network::cards(config, cards, &metadata)?;
    let mut devices = virtio_devices(config, drives, cards, vsock)?;
    let mut pmem_places = BTreeMap::new();
    for device in pmem {
        pmem_places.insert(device.file().id().to_owned(), device.address());
        panel.pmem.push(Arc::clone(device.file()));
        devices.push(Box::new(device));
    }
    devices.extend(guest_memory::device(config, &memory)?);
    devices.extend(panel.console.as_ref().map(ConsolePanel::device));
    devices.extend(drives::directories(config, fs)?);
    let names = devices::names(config, &devices);
    let places = restore.as_ref().map(|restore| {
        restore.check_pmem(&pmem_places)?;
        restore.places(&names, options.enable_pci)
    });
    let places = places.transpose()?;
    let counting = devices.iter().filter_map(|device| device.metrics());
    panel.metrics.extend(counting);
    let devices = if options.enable_pci {
        Attached::Pci(OnPci::attach(
            devices,
            &memory,
            vm.msi_port()?,
            Arc::clone(&panel.acpi),
            places.as_deref(),
        )?)
    } else {
        Attached::Mmio(OnMmio::attach(devices, &memory)?)
    };

    if let (None, Some(kernel)) = (&restore, &kernel) {
        let description = describe(config, &devices);
        let entry = load_kernel(config, &memory, kernel, initrd.as_ref(), &description)?;
        if let Some(first) = vcpus.first() {
            first.set_entry(&entry)?;
        }
    }

    let buses = Arc::new(buses(&panel, &devices, options)?);
    panel
        .metrics
        .push(Source::new("vcpu", buses.metrics.clone()));
    vm.register_irqfd(panel.serial.interrupt(), layout::COM1_GSI)?;
    vm.register_irqfd(panel.acpi.interrupt(), layout::GED_GSI)?;
    vm.register_irqfd(panel.i8042.interrupt(), layout::I8042_GSI)?;
    devices.bind_interrupts(&vm)?;
    if let Some(restore) = &restore {
        restore.panel(&panel)?;
    }
    // Last: from the first one on, changing a memslot waits for milliseconds.
    devices.bind_doorbells(&vm)?;
    let Working {
        worker,
        windows,
        hotplug,
    } = devices.into_worker(&names)?;
    let is_moved = restore.as_ref().is_some_and(Restore::is_moved);
    let base = restore.as_ref().map(|restore| restore.saved.id);
    let base = base.filter(|_| !is_moved);
    let working_set = restore.as_mut().and_then(|it| it.working_set.take());
    let restored = restore.map(|restore| restore.devices(&names, &windows, hotplug.as_ref()));
    let restored = restored.transpose()?;
    #[cfg(feature = "gdb")]
    let gdb = match gdb {
        Some(listener) => {
            let handles = vm.debug_vcpus(&vcpus)?;
            Some(gdb::Stub::new(listener, handles, memory.clone()))
        }
        None => None,
    };
    // Last: nobody touches the memory between this and the start of the threads that do.
    if let Some(handler) = &page_handler {
        handler.settle(&panel.ends)?;
    }
    Ok(Machine {
        vm,
        vcpus,
        host_cpus: placement::host_cpus(&config.machine_config),
        buses,
        devices: Devices::new(names, worker.as_ref().map(DeviceWorker::handle)),
        worker,
        hotplug,
        metadata,
        address_bits,
        pmem_places,
        panel,
        windows,
        reader,
        memory,
        page_handler,
        restored,
        is_moved,
        base,
        working_set,
        #[cfg(feature = "gdb")]
        gdb,
    })
}

/// What the memory is made of.
fn memory_options(config: &Config, free_huge_pages: Option<u64>) -> memory::Options {
    memory::Options {
        huge_pages: config.machine_config.huge_pages,
        track_dirty_pages: config.machine_config.track_dirty_pages,
        free_huge_pages,
        shared: config.shares_memory(),
    }
}

/// What a new vCPU of `config`'s machine would be told of this host's CPU.
fn cpuid(
    config: &Config,
    vm: &Vm,
    template: &Template,
    supported: &CpuId,
) -> Result<MachineCpuid, Error> {
    let offered = template.apply(supported)?;
    let mut cpuid = MachineCpuid::new(&offered, topology(config), vm.has_tsc_deadline());
    if config.machine_config.numa_nodes.len() > 1 {
        cpuid.set_nodes(placement::nodes_of_vcpus(&config.machine_config));
    }
    Ok(cpuid)
}

/// Makes the vCPUs those of a new machine, and returns what CPUID says on each.
fn new_processors(
    vcpus: &[Vcpu],
    cpuid: &MachineCpuid,
    template: &Template,
) -> Result<Vec<CpuId>, Error> {
    let mut cpuids = Vec::with_capacity(vcpus.len());
    for vcpu in vcpus {
        let cpuid = cpuid.of_vcpu(vcpu.id())?;
        vcpu.set_features(&cpuid)?;
        vcpu.change_msrs(&template.msr_changes())?;
        cpuids.push(cpuid);
    }
    Ok(cpuids)
}

fn load_kernel(
    config: &Config,
    memory: &GuestMemory,
    kernel: &File,
    initrd: Option<&File>,
    description: &MachineDescription,
) -> Result<EntryState, Error> {
    let boot_args = command_line(config);
    let protocol = config.boot_source.protocol;
    let entry = boot::load(memory, kernel, initrd, &boot_args, protocol, description);
    let entry = entry.map_err(|source| Error::Boot {
        path: config.boot_source.kernel_image_path.clone(),
        source,
    })?;
    info!(
        "kernel: {:?} at {:#x}, KASLR {:?}",
        entry.protocol, entry.rip, entry.kaslr
    );
    Ok(entry)
}

/// The virtio devices in the order of their windows.
fn virtio_devices(
    config: &Config,
    drives: Vec<DriveBackend>,
    cards: Vec<Box<dyn VirtioDevice>>,
    vsock: Option<VsockSockets>,
) -> Result<Vec<Box<dyn VirtioDevice>>, Error> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::with_capacity(config.device_count());
    for (drive, files) in config.drives_in_order().zip(drives) {
        devices.push(drives::device(drive, files)?);
    }
    devices.extend(cards);
    if let (Some(config), Some(sockets)) = (&config.vsock, vsock) {
        devices.push(Box::new(Vsock::new(vsock_options(config, sockets))?));
    }
    if let Some(config) = &config.balloon {
        devices.push(Box::new(Balloon::new(config.into())?));
    }
    if let Some(entropy) = &config.entropy {
        devices.push(Box::new(Entropy::new(limits(entropy.rate_limiter))));
    }
    Ok(devices)
}

/// With `smt` two vCPUs are a core, unless there is one only.
fn topology(config: &Config) -> Topology {
    let vcpus = config.machine_config.max_vcpus();
    let threads = if config.machine_config.smt && vcpus > 1 {
        2
    } else {
        1
    };
    Topology { vcpus, threads }
}

fn vsock_options(config: &config::Vsock, sockets: VsockSockets) -> VsockOptions {
    VsockOptions {
        guest_cid: config.guest_cid,
        uds_path: config.uds_path.clone(),
        listener: sockets.listener,
        broker: sockets.broker,
    }
}

fn limits(configured: Option<RateLimiter>) -> LimiterOptions {
    configured.map(Into::into).unwrap_or_default()
}

/// What the ACPI tables say of the machine.
fn describe(config: &Config, devices: &Attached) -> MachineDescription {
    let machine = &config.machine_config;
    MachineDescription {
        vcpus: machine.vcpu_count,
        max_vcpus: machine.max_vcpus(),
        vcpu_hotplug: machine.max_vcpu_count.is_some(),
        numa_nodes: placement::nodes(machine),
        mmio_devices: devices.windows(),
        has_pci: matches!(devices, Attached::Pci(_)),
        has_com1: true,
        has_i8042: true,
        ged: GedInfo {
            gsi: layout::GED_GSI,
            event_register: layout::ACPI_REGISTERS_START.saturating_add(acpi::EVENTS),
        },
        pit: machine.pit,
    }
}

fn buses(panel: &Panel, devices: &Attached, options: Options) -> Result<Buses, Error> {
    let mut ports = Bus::new();
    ports.insert(
        layout::COM1_PORT.into(),
        serial::WINDOW,
        panel.serial.clone(),
    )?;
    let i8042 = panel.i8042.clone();
    ports.insert(layout::I8042_PORT.into(), i8042::WINDOW, i8042)?;
    let mut mmio = Bus::new();
    mmio.insert(
        layout::ACPI_REGISTERS_START,
        layout::ACPI_REGISTERS_SIZE,
        match options.boot_timer {
            None => panel.acpi.clone(),
            Some(start) => Arc::new(BootTimer::new(start, panel.acpi.clone())),
        },
    )?;
    if let Some(vcpus) = &panel.vcpus {
        let (start, size) = (layout::VCPU_REGISTERS_START, layout::VCPU_REGISTERS_SIZE);
        mmio.insert(start, size, vcpus.clone())?;
    }
    devices.put_on(&mut mmio)?;
    Ok(Buses {
        ports,
        mmio,
        metrics: Arc::default(),
    })
}

impl Machine {
    /// Starts every thread, seals each of them and this one, and returns with the vCPUs paused:
    /// nothing of the guest has run.
    ///
    /// # Errors
    /// When the host gives no thread, or one of them could not be sealed.
    pub fn start(self) -> Result<RunningMachine, Error> {
        kvm::install_kick_handler()?;
        let ends = &self.panel.ends;
        let (sealed, results) = channel();
        if let Some(worker) = self.worker {
            let seal = seal(Role::Device, &sealed);
            let ends = Arc::clone(ends);
            let run = move || {
                if seal().is_ok() {
                    worker.run();
                    ends.announce(End::Failed("the device thread has ended".to_owned()));
                }
            };
            let thread = Builder::new().name("device".to_owned()).spawn(run);
            thread.map_err(host("start the device thread"))?;
        }
        if let Some(console) = &self.panel.console {
            console.start(seal(Role::Console, &sealed))?;
        }
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        for (vcpu, cpus) in self.vcpus.into_iter().zip(self.host_cpus) {
            let (buses, ends) = (Arc::clone(&self.buses), Arc::clone(ends));
            let seal = seal(Role::Vcpu, &sealed);
            let thread = placement::on_cpus(vcpu.id(), &cpus, || {
                VcpuThread::start(vcpu, buses, ends, seal)
            });
            vcpus.push(Arc::new(thread??));
        }
        #[cfg(feature = "gdb")]
        if let Some(stub) = self.gdb {
            let seal = seal(Role::Gdb, &sealed);
            let started = stub.start(&vcpus, Arc::clone(ends), seal);
            started.map_err(host("start the debugger's stub"))?;
        }
        // Made while descriptors may be.
        let way = self.reader.is_some().then(Way::new).transpose();
        let way = way.map_err(host("make an eventfd"))?;
        let memory = self.memory;
        let saver = self.reader.map(|reader| {
            let seal = seal(Role::Helper, &sealed);
            // What a handler would bring looks as if there were nothing.
            let untouched = match &self.page_handler {
                Some(_) => Untouched::Elsewhere,
                None => Untouched::Mapped,
            };
            let saver = Saver::start(reader, memory.clone(), untouched, self.base, seal);
            saver.map_err(host("start the thread that saves the machine"))
        });
        let saver = saver.transpose()?;
        drop(sealed);
        // The barrier: the channel closes once every thread has said how its sealing went.
        for result in results {
            result?;
        }
        lockdown::enter(Role::Control, Stage::Sealed)?;
        let registers = self.panel.vcpus.clone();
        let is_restored = self.restored.is_some();
        let resting = self.devices.restore(self.restored.unwrap_or_default())?;
        // What the driver of a machine that comes has asked for is done where it still is, as long as it is not here.
        let resting = resting.filter(|_| self.is_moved);
        let running = RunningMachine {
            panel: self.panel,
            hotplug: self.hotplug,
            devices: self.devices,
            metadata: self.metadata,
            vcpus: Vcpus::new(vcpus, registers),
            address_bits: self.address_bits,
            pmem_places: self.pmem_places,
            windows: self.windows,
            saver,
            way,
            resting,
            memory,
            working_set: self.working_set,
            _page_handler: self.page_handler,
            vm: self.vm,
        };
        if is_restored {
            running.regenerate(!self.is_moved)?;
        }
        Ok(running)
    }
}

/// Seals the thread that calls it and says how that went.
fn seal(
    role: Role,
    results: &Sender<Result<(), lockdown::Error>>,
) -> impl FnOnce() -> Result<(), ()> + Send + use<> {
    let results = results.clone();
    move || {
        let result = lockdown::enter(role, Stage::Sealed);
        let sealed = if result.is_ok() { Ok(()) } else { Err(()) };
        if results.send(result).is_err() {
            warn!("nobody waits for this thread any more");
        }
        sealed
    }
}
