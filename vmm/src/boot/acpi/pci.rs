//! The PCI bus: where its configuration space is, and what its bridge forwards.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, If, Local, Memory32Fixed, Method, MethodCall, Name, NotEqual,
    Notify, ONE, OpRegion, OpRegionSpace, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::mcfg::MCFG;

use super::dsdt::window;
use super::events::{Code, Handler};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::boot::Error;
use crate::devices::acpi::Event;
use crate::memory::layout;
use crate::pci::SLOTS;

/// The one bus.
const BUS: u8 = 0;
/// Notifications of ACPI 6.5, table 5.162.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// The registers of `pci::hotplug`, in their order.
const ADDED: &str = "\\_SB_.PCI0.PADD";
const LEAVING: &str = "\\_SB_.PCI0.PLVG";
const EJECT: &str = "\\_SB_.PCI0.PEJT";
/// The method that tells of what these have to say.
const SCAN: &str = "\\_SB_.PCI0.PSCN";

const WINDOW_END: u64 = layout::PCI_WINDOW_START + layout::PCI_WINDOW_SIZE - 1;
// Both are told in 32 bits.
const _: () = assert!(WINDOW_END >> 32 == 0);
const _: () = assert!(layout::PCI_ECAM_START >> 32 == 0);

/// The table that names configuration space (PCI firmware specification 3.2, section 4.1.2).
pub(super) fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM_START, 0, BUS, BUS);
    bytes(&mcfg)
}

/// Appends the root bridge, and configuration space as a resource of the board (same specification,
/// section 4.1.3). There is no `_PRT`: functions have no INTx pins. Below the bridge there is a device for each
/// slot. Returns what the guest has to do when devices come and go.
pub(super) fn root_bridge(body: &mut Vec<u8>) -> Result<Handler, Error> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &ZERO);
    let segment = Name::new("_SEG".into(), &ZERO);
    let bus = Name::new("_BBN".into(), &BUS);
    let coherent = Name::new("_CCA".into(), &ONE);
    let numbers = AddressSpace::new_bus_number(u16::from(BUS), u16::from(BUS));
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW_START as u32,
        WINDOW_END as u32,
        None,
    );
    let forwarded = ResourceTemplate::new(vec![&numbers, &window]);
    let resources = Name::new("_CRS".into(), &forwarded);
    let hotplug = hotplug()?;
    let hotplug = Code(&hotplug);
    let children: Vec<&dyn Aml> = vec![
        &hid, &cid, &uid, &segment, &bus, &coherent, &resources, &hotplug,
    ];
    let bridge = Device::new("PCI0".into(), children);

    let board_hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let (start, size) = (layout::PCI_ECAM_START as u32, layout::PCI_ECAM_SIZE as u32);
    let ecam = Memory32Fixed::new(true, start, size);
    let board_crs = ResourceTemplate::new(vec![&ecam]);
    let board_resources = Name::new("_CRS".into(), &board_crs);
    let board = Device::new("MBRD".into(), vec![&board_hid, &uid, &board_resources]);

    Scope::new("\\_SB_".into(), vec![&board, &bridge]).to_aml_bytes(body);
    let scan = MethodCall::new(SCAN.into(), Vec::new());
    Ok(Handler {
        event: Event::Pci,
        code: bytes(&scan),
    })
}

/// Registers, slots, and the method that passes on which devices came and which are asked to go.
fn hotplug() -> Result<Vec<u8>, Error> {
    let (base, size) = window(layout::PCI_REGISTERS_START, layout::PCI_REGISTERS_SIZE)?;
    let region = OpRegion::new("PREG".into(), OpRegionSpace::SystemMemory, &base, &size);
    let field = Field::new(
        "PREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        [*b"PADD", *b"PLVG", *b"PEJT"]
            .map(|name| FieldEntry::Named(name, 32))
            .into(),
    );
    let mut body = bytes(&region);
    body.extend(bytes(&field));
    // Number 0 is the host bridge.
    let numbers = 1..u32::try_from(SLOTS).unwrap_or(0);
    for number in numbers.clone() {
        slot(&mut body, number);
    }

    let (added, leaving) = (Local(0), Local(1));
    let (added_register, leaving_register): (Path, Path) = (ADDED.into(), LEAVING.into());
    let mut code = bytes(&Store::new(&added, &added_register));
    code.extend(bytes(&Store::new(&leaving, &leaving_register)));
    for number in numbers {
        for (set, what) in [(&added, DEVICE_CHECK), (&leaving, EJECT_REQUEST)] {
            let bit = bit(number);
            let device: Path = slot_name(number).as_str().into();
            let concerned = And::new(&ZERO, set, &bit);
            let concerned = NotEqual::new(&concerned, &ZERO);
            let notify = Notify::new(&device, &what);
            code.extend(bytes(&If::new(&concerned, vec![&notify])));
        }
    }
    let code = Code(&code);
    body.extend(bytes(&Method::new("PSCN".into(), 0, true, vec![&code])));
    Ok(body)
}

fn slot_name(number: u32) -> String {
    format!("S{number:03X}")
}

fn bit(number: u32) -> u32 {
    1_u32.checked_shl(number).unwrap_or(0)
}

/// Function 0 of device `number`, which may be there or not.
fn slot(body: &mut Vec<u8>, number: u32) {
    let address = Name::new("_ADR".into(), &(number << 16));
    let user_number = Name::new("_SUN".into(), &number);
    let register: Path = EJECT.into();
    let bit = bit(number);
    let let_go = Store::new(&register, &bit);
    let eject = Method::new("_EJ0".into(), 1, true, vec![&let_go]);
    let name: Path = slot_name(number).as_str().into();
    Device::new(name, vec![&address, &user_number, &eject]).to_aml_bytes(body);
}
