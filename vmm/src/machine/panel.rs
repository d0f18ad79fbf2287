//! What is neither virtio nor a CPU, and the control thread's hands on all of it.

use std::fs::File;
use std::sync::Arc;

use super::error::host;
use super::restoring::Restore;
use super::{ConsolePanel, Error};
use crate::config::Config;
use crate::devices::{
    AcpiRegisters, ClockPage, Generation, I8042, SerialOptions, SerialPort, VcpuRegisters,
};
use crate::ending::{End, EndSignal};
use crate::memory::GuestMemory;
use crate::memory::cut_off::MappedFile;
use crate::metrics::Source;
use crate::mmds::Store;
use crate::virtio::pmem::PmemFile;

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
    /// What the memory is mapped from, if the machine goes on from a snapshot.
    pub memory_file: Option<MappedFile>,
    /// Where the machine's end is announced.
    pub ends: Arc<EndSignal>,
    /// What the machine counts.
    pub metrics: Vec<Source>,
}

impl Panel {
    /// The end of a machine; one whose guest could not go on because the host cut a file off under it has that as its
    /// cause, and not the guest.
    pub fn explain(&self, end: End) -> End {
        let End::Crashed(why) = end else {
            return end;
        };
        let memory = self.memory_file.as_ref().and_then(MappedFile::cut_off);
        let pmem = || self.pmem.iter().find_map(|file| file.truncated());
        match memory.or_else(pmem) {
            Some(words) => End::Failed(format!("{words} ({why})")),
            None => End::Crashed(why),
        }
    }

    /// Asks the guest to end: by Ctrl+Alt+Del, or by the power button where the guest has no driver for a keyboard.
    pub fn press_ctrl_alt_del(&self) {
        if !self.i8042.press_ctrl_alt_del() {
            self.acpi.press_power_button();
        }
    }
}

/// What is neither virtio nor a CPU.
pub(super) fn panel(
    config: &Config,
    memory: &GuestMemory,
    ends: Arc<EndSignal>,
    metadata: Arc<Store>,
    output: Option<File>,
    restore: Option<&Restore>,
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
    let options = SerialOptions {
        output,
        limit: limit.map(Into::into),
    };
    let serial = match restore {
        Some(restore) => restore.serial(options)?,
        None => SerialPort::new(options).map_err(host("make the serial port"))?,
    };
    let serial = Arc::new(serial);
    let i8042 = I8042::new(Arc::clone(&ends)).map_err(host("make an eventfd"))?;
    let metrics = vec![
        Source::new("uart", serial.metrics()),
        Source::new("i8042", i8042.metrics()),
    ];
    let console = config.console.as_ref().map(|_| ConsolePanel::new());
    Ok(Panel {
        console: console.transpose()?,
        serial,
        generation: match restore {
            Some(restore) if restore.is_moved() => {
                Generation::kept(memory.clone(), Arc::clone(&acpi))
            }
            _ => Generation::new(memory.clone(), Arc::clone(&acpi))?,
        },
        clock: ClockPage::new(memory.clone(), Arc::clone(&acpi))?,
        acpi,
        i8042: Arc::new(i8042),
        vcpus: vcpus.transpose()?,
        metadata,
        ends,
        pmem: Vec::new(),
        memory_file: restore.map(Restore::watch).transpose()?.flatten(),
        metrics,
    })
}
