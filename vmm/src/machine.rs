//! A machine, from its config to threads that run it. [`build`] is the order of set-up.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::Builder;
use std::time::Duration;

use log::{info, warn};

use crate::boot::{self, GedInfo, MachineDescription};
use crate::bus::Bus;
use crate::config::{self, Config, RateLimiter};
use crate::cpu_template::Template;
use crate::devices::boot_timer::{BootTimer, Moment};
use crate::devices::{
    AcpiRegisters, ClockPage, Generation, I8042, SerialOptions, SerialPort, VcpuRegisters, acpi,
    i8042, serial,
};
use crate::ending::{End, EndSignal};
#[cfg(feature = "gdb")]
use crate::gdb;
use crate::kvm::cpuid::{MachineCpuid, Topology};
use crate::kvm::{self, Vcpu, Vm};
use crate::lockdown::{self, Role, Stage};
use crate::memory::{self, GuestMemory, layout};
use crate::metrics::Source;
use crate::mmds::Store;
use crate::resources::{DriveBackend, Resources, VsockSockets};
use crate::vcpu::{Buses, VcpuThread};
use crate::virtio::pmem::PmemFile;
use crate::virtio::rate_limiter::LimiterOptions;
use crate::virtio::{Balloon, DeviceWorker, Entropy, VirtioDevice, Vsock, VsockOptions};

mod attached;
mod command_line;
mod console;
pub mod devices;
mod drives;
mod error;
mod guest_memory;
pub mod hotplug;
mod network;
pub mod placement;
mod plug;
mod pmem;
pub mod vcpus;

use attached::{Attached, OnMmio, OnPci};
use command_line::command_line;
pub use console::ConsolePanel;
use devices::Devices;
pub use error::Error;
use error::host;
use hotplug::Hotplug;
use network::Metadata;
pub use pmem::explain;
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
    #[cfg(feature = "gdb")]
    gdb: Option<gdb::Stub>,
}

/// What the control thread has in its hands.
pub struct Panel {
    /// The serial port, which is the console of a guest that has not found another one.
    pub serial: Arc<SerialPort>,
    /// The virtio console, if there is one.
    pub console: Option<ConsolePanel>,
    /// The power button.
    pub acpi: Arc<AcpiRegisters>,
    /// The keyboard.
    pub i8042: Arc<I8042>,
    /// Adds and removes vCPUs, where that is possible.
    pub vcpus: Option<Arc<VcpuRegisters>>,
    /// Tells the guest that it is another machine than before.
    pub generation: Generation,
    /// Tells the guest that its time has jumped.
    pub clock: ClockPage,
    /// What the metadata service shows.
    pub metadata: Arc<Store>,
    /// The files in the guest's address space.
    pub pmem: Vec<Arc<PmemFile>>,
    /// Where the machine's end is announced.
    pub ends: Arc<EndSignal>,
    /// What the machine counts.
    pub metrics: Vec<Source>,
}

impl Panel {
    /// Asks the guest to end: by Ctrl+Alt+Del, or by the power button where the guest has no driver for a keyboard.
    pub fn press_ctrl_alt_del(&self) {
        if !self.i8042.press_ctrl_alt_del() {
            self.acpi.press_power_button();
        }
    }
}

/// A machine with its threads, sealed and paused.
pub struct RunningMachine {
    /// What the control thread has in its hands.
    pub panel: Panel,
    /// Adds and removes devices, on a PCI bus.
    pub hotplug: Option<Hotplug>,
    /// The virtio devices by their names.
    pub devices: Devices,
    /// What cards that come may lead to.
    metadata: Metadata,
    vcpus: Vcpus,
    /// How far the guest's physical addresses reach.
    address_bits: u8,
    /// Where the memory of each pmem device is.
    pmem_places: BTreeMap<String, u64>,
    /// The memslots stay valid as long as this does.
    vm: Vm,
}

/// What the command line adds to a machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Whether there is a boot timer, and when it started.
    pub boot_timer: Option<Moment>,
    /// Whether virtio devices sit on a PCI bus instead of in MMIO windows.
    pub enable_pci: bool,
}

/// Builds the machine of `config`.
///
/// # Errors
/// See [`Error`]; nothing has run then.
pub fn build(config: &Config, resources: Resources, options: Options) -> Result<Machine, Error> {
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
    let supported = template.apply(&supported)?;
    let mut cpuid = MachineCpuid::new(&supported, topology(config), vm.has_tsc_deadline());
    if config.machine_config.numa_nodes.len() > 1 {
        cpuid.set_nodes(placement::nodes_of_vcpus(&config.machine_config));
    }
    let memory = memory::Options {
        huge_pages: config.machine_config.huge_pages,
        track_dirty_pages: config.machine_config.track_dirty_pages,
        free_huge_pages,
        shared: config.shares_memory(),
    };
    let memory = guest_memory::allocate(config, memory)?;
    placement::bind_memory(&memory, &config.machine_config)?;
    let address_bits = cpuid.physical_address_bits();
    vm.set_memory(&memory, address_bits)?;
    let pmem = pmem::add(&config.pmem, pmem, &mut vm, &memory, address_bits)?;
    vm.create_irqchip(pit)?;
    vm.disable_pmu();

    let vcpus = vm.create_vcpus(max_vcpus)?;
    for vcpu in &vcpus {
        vcpu.set_features(&cpuid.of_vcpu(vcpu.id())?)?;
        vcpu.change_msrs(&template.msr_changes())?;
    }
    vm.set_gsi_routing(pit)?;

    let ends = Arc::new(EndSignal::new().map_err(host("make an eventfd"))?);
    let mut panel = panel(config, &memory, ends, metadata, serial)?;
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
    let counting = devices.iter().filter_map(|device| device.metrics());
    panel.metrics.extend(counting);
    let devices = if options.enable_pci {
        Attached::Pci(OnPci::attach(
            devices,
            &memory,
            vm.msi_port()?,
            Arc::clone(&panel.acpi),
        )?)
    } else {
        Attached::Mmio(OnMmio::attach(devices, &memory)?)
    };

    let description = describe(config, &devices);
    let boot_args = command_line(config);
    let protocol = config.boot_source.protocol;
    let entry = boot::load(
        &memory,
        &kernel,
        initrd.as_ref(),
        &boot_args,
        protocol,
        &description,
    )
    .map_err(|source| Error::Boot {
        path: config.boot_source.kernel_image_path.clone(),
        source,
    })?;
    info!(
        "kernel: {:?} at {:#x}, KASLR {:?}",
        entry.protocol, entry.rip, entry.kaslr
    );
    if let Some(first) = vcpus.first() {
        first.set_entry(&entry)?;
    }

    let buses = Arc::new(buses(&panel, &devices, options)?);
    panel
        .metrics
        .push(Source::new("vcpu", buses.metrics.clone()));
    vm.register_irqfd(panel.serial.interrupt(), layout::COM1_GSI)?;
    vm.register_irqfd(panel.acpi.interrupt(), layout::GED_GSI)?;
    vm.register_irqfd(panel.i8042.interrupt(), layout::I8042_GSI)?;
    devices.bind_interrupts(&vm)?;
    // Last: from the first one on, changing a memslot waits for milliseconds.
    devices.bind_doorbells(&vm)?;
    let (worker, hotplug) = devices.into_worker(&names)?;
    #[cfg(feature = "gdb")]
    let gdb = match gdb {
        Some(listener) => {
            let handles = vm.debug_vcpus(&vcpus)?;
            Some(gdb::Stub::new(listener, handles, memory.clone()))
        }
        None => None,
    };
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
        #[cfg(feature = "gdb")]
        gdb,
    })
}

/// What is neither virtio nor a CPU.
fn panel(
    config: &Config,
    memory: &GuestMemory,
    ends: Arc<EndSignal>,
    metadata: Arc<Store>,
    output: Option<File>,
) -> Result<Panel, Error> {
    let acpi = AcpiRegisters::new(Arc::clone(&ends)).map_err(host("make an eventfd"))?;
    let acpi = Arc::new(acpi);
    let machine = &config.machine_config;
    let vcpus = machine.max_vcpu_count.map(|most| {
        let registers = VcpuRegisters::new(machine.vcpu_count, most, Arc::clone(&acpi));
        registers.map(Arc::new).map_err(host("make an eventfd"))
    });
    let limit = config
        .serial
        .as_ref()
        .and_then(|serial| serial.rate_limiter);
    let serial = SerialPort::new(SerialOptions {
        output,
        limit: limit.map(Into::into),
    });
    let serial = Arc::new(serial.map_err(host("make the serial port"))?);
    let i8042 = I8042::new(Arc::clone(&ends)).map_err(host("make an eventfd"))?;
    let metrics = vec![
        Source::new("uart", serial.metrics()),
        Source::new("i8042", i8042.metrics()),
    ];
    let console = config.console.as_ref().map(|_| ConsolePanel::new());
    Ok(Panel {
        console: console.transpose()?,
        serial,
        generation: Generation::new(memory.clone(), Arc::clone(&acpi))?,
        clock: ClockPage::new(memory.clone(), Arc::clone(&acpi))?,
        acpi,
        i8042: Arc::new(i8042),
        vcpus: vcpus.transpose()?,
        metadata,
        ends,
        pmem: Vec::new(),
        metrics,
    })
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
        drop(sealed);
        // The barrier: the channel closes once every thread has said how its sealing went.
        for result in results {
            result?;
        }
        lockdown::enter(Role::Control, Stage::Sealed)?;
        let registers = self.panel.vcpus.clone();
        Ok(RunningMachine {
            panel: self.panel,
            hotplug: self.hotplug,
            devices: self.devices,
            metadata: self.metadata,
            vcpus: Vcpus::new(vcpus, registers),
            address_bits: self.address_bits,
            pmem_places: self.pmem_places,
            vm: self.vm,
        })
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

impl RunningMachine {
    /// Lets the guest run.
    pub fn resume(&mut self) {
        self.vcpus.resume();
    }

    /// Stops the guest: each vCPU at its next instruction, without waiting for that.
    pub fn pause(&mut self) {
        self.vcpus.pause();
    }

    /// Waits until the guest has stopped after [`RunningMachine::pause`]; else the number of a vCPU that has
    /// not by then.
    ///
    /// # Errors
    /// That number.
    pub fn wait_until_paused(&self, patience: Duration) -> Result<(), usize> {
        self.vcpus.wait_until_paused(patience)
    }

    /// Adds vCPUs, or asks the guest to let go of some, until there are `count`.
    ///
    /// # Errors
    /// When their number is fixed, or cannot be that.
    pub fn set_vcpus(&mut self, count: u8) -> Result<(), vcpus::Error> {
        self.vcpus.set_count(count)
    }

    /// Stops the vCPUs that the guest has let go.
    pub fn park_ejected_vcpus(&mut self) {
        if let Some(registers) = &self.panel.vcpus {
            // First forgotten, then looked at: what comes later wakes us again.
            let _ = registers.ejected().read();
        }
        self.vcpus.settle();
    }

    /// Tells the guest that it is another machine than before and that its time has jumped: after a restore,
    /// before it runs on.
    ///
    /// # Errors
    /// When there are no random bytes.
    pub fn regenerate(&self) -> Result<(), Error> {
        self.panel.generation.regenerate()?;
        Ok(self.panel.clock.disrupt()?)
    }

    /// How many vCPUs there are now.
    pub fn vcpu_count(&self) -> u8 {
        u8::try_from(self.vcpus.present().count_ones()).unwrap_or(u8::MAX)
    }
}
