//! The PCI bus: where its configuration space is, and what its bridge forwards.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Memory32Fixed, Name, ONE,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::mcfg::MCFG;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::memory::layout;

/// The one bus.
const BUS: u8 = 0;

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
/// section 4.1.3). There is no `_PRT`: functions have no INTx pins.
pub(super) fn root_bridge(body: &mut Vec<u8>) {
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
    let children: Vec<&dyn Aml> = vec![&hid, &cid, &uid, &segment, &bus, &coherent, &resources];
    let bridge = Device::new("PCI0".into(), children);

    let board_hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let (start, size) = (layout::PCI_ECAM_START as u32, layout::PCI_ECAM_SIZE as u32);
    let ecam = Memory32Fixed::new(true, start, size);
    let board_crs = ResourceTemplate::new(vec![&ecam]);
    let board_resources = Name::new("_CRS".into(), &board_crs);
    let board = Device::new("MBRD".into(), vec![&board_hid, &uid, &board_resources]);

    Scope::new("\\_SB_".into(), vec![&board, &bridge]).to_aml_bytes(body);
}
