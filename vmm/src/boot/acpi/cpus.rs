//! The machine's CPUs: those that are there, and how others come and go.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, BufferData, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, MethodCall, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Path, Return, Scope,
    Store, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::bytes;
use super::dsdt::{device_in_sb, window};
use super::events::Handler;
use super::numa;
use crate::boot::{Error, MachineDescription};
use crate::devices::acpi::Event;
use crate::memory::layout;

/// `_STA`: present, enabled, shown, functioning.
const STATUS_PRESENT: u8 = 0xf;
/// Notifications of ACPI 6.5, table 5.162.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// The registers of `devices::vcpus`, in their order.
const PRESENT: &str = "\\_SB_.CPRS";
const ADDED: &str = "\\_SB_.CADD";
const LEAVING: &str = "\\_SB_.CLVG";
const EJECT: &str = "\\_SB_.CEJT";
/// The method that tells of what these have to say.
const SCAN: &str = "\\_SB_.CSCN";

/// The entry of CPU `id` in the MADT: one that is not there yet can be brought online later.
pub(super) fn local_apic(id: u8, machine: &MachineDescription) -> ProcessorLocalApic {
    let status = if id < machine.vcpus {
        EnabledStatus::Enabled
    } else {
        EnabledStatus::DisabledOnlineCapable
    };
    ProcessorLocalApic::new(id, id, status)
}

/// Appends a device for each CPU of a machine whose number of CPUs can change, and what the guest has to do
/// when it does.
pub(super) fn hotplug(
    body: &mut Vec<u8>,
    machine: &MachineDescription,
) -> Result<Option<Handler>, Error> {
    if !machine.vcpu_hotplug {
        return Ok(None);
    }
    registers(body)?;
    for id in 0..machine.max_vcpus {
        cpu(body, id, numa::node_of_vcpu(machine, id));
    }
    scan(body, machine.max_vcpus);
    let scan = MethodCall::new(SCAN.into(), Vec::new());
    Ok(Some(Handler {
        event: Event::Vcpus,
        code: bytes(&scan),
    }))
}

fn registers(body: &mut Vec<u8>) -> Result<(), Error> {
    let (base, size) = window(layout::VCPU_REGISTERS_START, layout::VCPU_REGISTERS_SIZE)?;
    let region = OpRegion::new("CREG".into(), OpRegionSpace::SystemMemory, &base, &size);
    let field = Field::new(
        "CREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        [*b"CPRS", *b"CADD", *b"CLVG", *b"CEJT"]
            .map(|name| FieldEntry::Named(name, 32))
            .into(),
    );
    Scope::new("\\_SB_".into(), vec![&region, &field]).to_aml_bytes(body);
    Ok(())
}

fn device_name(id: u8) -> String {
    format!("C{id:03X}")
}

fn bit(id: u8) -> u32 {
    1_u32.checked_shl(id.into()).unwrap_or(0)
}

/// A processor device (ACPI 6.5, section 8.4). Its `_MAT` says what its entry in the MADT says once it is
/// there; every guest keeps the first CPU, so that one cannot be ejected.
fn cpu(body: &mut Vec<u8>, id: u8, node: Option<usize>) {
    let bit = bit(id);
    let present: Path = PRESENT.into();
    let is_present = And::new(&ZERO, &present, &bit);
    let is_present = NotEqual::new(&is_present, &ZERO);
    let here = Return::new(&STATUS_PRESENT);
    let if_present = If::new(&is_present, vec![&here]);
    let absent = Return::new(&ZERO);
    let status = Method::new("_STA".into(), 0, true, vec![&if_present, &absent]);

    let entry = ProcessorLocalApic::new(id, id, EnabledStatus::Enabled);
    let entry = BufferData::new(bytes(&entry));
    let entry = Name::new("_MAT".into(), &entry);

    let register: Path = EJECT.into();
    let let_go = Store::new(&register, &bit);
    let eject = Method::new("_EJ0".into(), 1, true, vec![&let_go]);

    let node = node.map(|node| Name::new("_PXM".into(), &node));
    let mut more: Vec<&dyn Aml> = vec![&status, &entry];
    more.extend(node.iter().map(|node| node as &dyn Aml));
    if id > 0 {
        more.push(&eject);
    }
    device_in_sb(body, &device_name(id), &"ACPI0007", id.into(), &more, None);
}

/// The method that passes on which CPUs came and which are asked to go.
fn scan(body: &mut Vec<u8>, max: u8) {
    let (added, leaving) = (Local(0), Local(1));
    let (added_register, leaving_register): (Path, Path) = (ADDED.into(), LEAVING.into());
    let mut code = bytes(&Store::new(&added, &added_register));
    code.extend(bytes(&Store::new(&leaving, &leaving_register)));
    for id in 0..max {
        for (set, what) in [(&added, DEVICE_CHECK), (&leaving, EJECT_REQUEST)] {
            let bit = bit(id);
            let device: Path = format!("\\_SB_.{}", device_name(id)).as_str().into();
            let concerned = And::new(&ZERO, set, &bit);
            let concerned = NotEqual::new(&concerned, &ZERO);
            let notify = Notify::new(&device, &what);
            code.extend(bytes(&If::new(&concerned, vec![&notify])));
        }
    }
    let code = super::events::Code(&code);
    let scan = Method::new(SCAN.into(), 0, true, vec![&code]);
    scan.to_aml_bytes(body);
}
