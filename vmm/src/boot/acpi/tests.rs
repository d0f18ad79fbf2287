use super::super::testing::machine;
use super::*;

const START: u64 = layout::ACPI_TABLES_START;

/// A table of the blob, its length and checksum checked.
fn table(blob: &[u8], address: u64) -> &[u8] {
    let offset = (address - START) as usize;
    assert_eq!(offset % 16, 0);
    let length = u32::from_le_bytes(blob[offset + 4..offset + 8].try_into().unwrap());
    let table = &blob[offset..offset + length as usize];
    assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
    assert_eq!(&table[10..24], b"CASEMTCASEMATE");
    table
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn long(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

/// Every table, found as a guest finds it.
struct Tables {
    fadt: Vec<u8>,
    madt: Vec<u8>,
    dsdt: Vec<u8>,
}

fn tables(machine: &MachineDescription) -> Tables {
    let blob = build(machine, START).unwrap();
    assert_eq!(&blob[..8], b"RSD PTR ");
    assert_eq!(blob[15], 2);
    assert_eq!(sum(&blob[..20]), 0);
    assert_eq!(sum(&blob[..36]), 0);
    let xsdt = table(&blob, long(&blob, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let nodes = if machine.numa_nodes.is_empty() { 0 } else { 2 };
    assert_eq!(xsdt.len(), 36 + (2 + nodes) * 8);
    for (number, signature) in (0..nodes).zip([b"SRAT", b"SLIT"]) {
        assert_eq!(&table(&blob, long(xsdt, 52 + 8 * number))[..4], signature);
    }
    let fadt = table(&blob, long(xsdt, 36)).to_vec();
    let madt = table(&blob, long(xsdt, 44)).to_vec();
    assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
    assert_eq!(word(&fadt, 40), 0);
    let dsdt = table(&blob, long(&fadt, 140)).to_vec();
    assert_eq!(&dsdt[..4], b"DSDT");
    Tables { fadt, madt, dsdt }
}

fn contains(haystack: &[u8], needle: &[u8]) -> usize {
    haystack
        .windows(needle.len())
        .filter(|window| *window == needle)
        .count()
}

#[test]
fn fadt_is_hardware_reduced() {
    let fadt = tables(&machine(0)).fadt;
    let flags = word(&fadt, 112);
    assert_ne!(flags & (1 << 20), 0, "HW_REDUCED_ACPI");
    assert_ne!(flags & (1 << 10), 0, "RESET_REG_SUP");
    assert_ne!(flags & (1 << 4), 0, "no fixed power button");
    assert_eq!(
        &fadt[109..111],
        &[0b10_0110, 0],
        "8042, no VGA, no CMOS clock"
    );
    // Generic addresses: in memory, one byte wide, byte access.
    let register = |offset: usize| {
        assert_eq!(&fadt[offset..offset + 4], &[0, 8, 0, 1]);
        long(&fadt, offset + 4)
    };
    assert_eq!(register(244), layout::ACPI_REGISTERS_START);
    assert_eq!(register(256), layout::ACPI_REGISTERS_START + 1);
    assert_eq!(register(116), layout::ACPI_REGISTERS_START + 2);
    assert_eq!(fadt[128], 1, "reset value");
    let mut without = machine(0);
    without.has_i8042 = false;
    assert_eq!(tables(&without).fadt[109], 0b10_0100);
}

#[test]
fn madt_names_every_cpu() {
    for (vcpus, pit) in [(1, false), (2, true), (32, false)] {
        let mut machine = machine(0);
        machine.vcpus = vcpus;
        machine.max_vcpus = vcpus;
        machine.pit = pit;
        let madt = tables(&machine).madt;
        assert_eq!(word(&madt, 36), 0xfee0_0000);
        assert_eq!(word(&madt, 40), u32::from(pit), "an 8259 pair with a PIT");
        let (cpus, io_apic) = madt[44..].split_at(usize::from(vcpus) * 8);
        for (id, cpu) in (0..vcpus).zip(cpus.chunks(8)) {
            assert_eq!(cpu, [0, 8, id, id, 1, 0, 0, 0]);
        }
        assert_eq!(io_apic, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }
}

/// A machine with two CPUs that can have four.
fn machine_that_grows() -> MachineDescription {
    MachineDescription {
        vcpus: 2,
        max_vcpus: 4,
        vcpu_hotplug: true,
        ..machine(0)
    }
}

#[test]
fn madt_tells_cpus_that_can_come() {
    let madt = tables(&machine_that_grows()).madt;
    let flags: Vec<u8> = madt[44..76].chunks(8).map(|cpu| cpu[4]).collect();
    assert_eq!(
        flags,
        [1, 1, 2, 2],
        "enabled, enabled, online capable, online capable"
    );
}

#[test]
fn cpus_come_and_go_by_the_dsdt() {
    let dsdt = tables(&machine_that_grows()).dsdt;
    assert_eq!(contains(&dsdt, b"ACPI0007"), 4);
    assert_eq!(contains(&dsdt, b"_STA"), 4);
    assert_eq!(contains(&dsdt, b"_EJ0"), 3, "nobody ejects the first");
    for id in 0..4 {
        // A buffer of eight bytes: the entry in the MADT, enabled.
        let entry = [b'_', b'M', b'A', b'T', 0x11, 11, 0x0a, 8, 0, 8, id, id, 1];
        assert_eq!(contains(&dsdt, &entry), 1, "CPU {id}");
    }
    // The registers: an operation region in memory.
    let region = [
        &b"\x5b\x80CREG\x00\x0c"[..],
        &(layout::VCPU_REGISTERS_START as u32).to_le_bytes(),
        &[0x0a, 0x10],
    ];
    assert_eq!(contains(&dsdt, &region.concat()), 1);
    // If (And (Local0, 4)) Notify (C002, 1); If (And (Local1, 4)) Notify (C002, 3).
    for (local, what) in [(0x60, &b"\x01"[..]), (0x61, b"\x0a\x03")] {
        let condition = [0x92, 0x93, 0x7b, local, 0x0a, 4, 0, 0];
        let notify = [&b"\x86\\\x2e_SB_C002"[..], what].concat();
        assert_eq!(contains(&dsdt, &[&condition[..], &notify].concat()), 1);
    }
    // The generic event device calls the scan on bit 1.
    let call = [
        &[0x92, 0x93, 0x7b, 0x60, 0x0a, 2, 0, 0][..],
        b"\\\x2e_SB_CSCN",
    ]
    .concat();
    assert_eq!(contains(&dsdt, &call), 1);

    let fixed = tables(&machine(0)).dsdt;
    for name in [&b"ACPI0007"[..], b"CSCN", b"CREG"] {
        assert_eq!(contains(&fixed, name), 0);
    }
}

#[test]
fn a_guest_finds_what_tells_that_it_was_cloned() {
    let dsdt = tables(&machine(0)).dsdt;
    for id in [&b"VM_Gen_Counter\0"[..], b"VMCLOCK\0"] {
        for name in [&b"_CID\x0d"[..], b"_DDN\x0d"] {
            assert_eq!(contains(&dsdt, &[name, id].concat()), 1, "{id:?}");
        }
    }
    // A package of two: 0xfd000 and 0.
    let address = b"ADDR\x12\x08\x02\x0c\x00\xd0\x0f\x00\x00";
    assert_eq!(contains(&dsdt, address), 1);
    // Read-only memory: the clock page.
    let memory = [0x86, 9, 0, 0, 0, 0xe0, 0x0f, 0, 0, 0x10, 0, 0];
    assert_eq!(contains(&dsdt, &memory), 1);
    for (bit, name) in [(0x08, &b"VGEN"[..]), (0x10, b"VCLK")] {
        let condition = [0x92, 0x93, 0x7b, 0x60, 0x0a, bit, 0, 0];
        let notify = [&b"\x86\\\x2e_SB_"[..], name, b"\x0a\x80"].concat();
        assert_eq!(contains(&dsdt, &[&condition[..], &notify].concat()), 1);
    }
}

#[test]
fn a_cpu_that_comes_is_in_its_node() {
    let mut machine = machine_that_grows();
    let node = |cpus: &[u8], start| super::super::NumaNodeInfo {
        cpus: cpus.to_vec(),
        memory: vec![(start, 0x1000)],
        distances: vec![10, 20],
    };
    machine.numa_nodes = vec![node(&[0, 1], 0), node(&[2, 3], 0x1000)];
    let dsdt = tables(&machine).dsdt;
    assert_eq!(contains(&dsdt, b"\x08_PXM\x00"), 2);
    assert_eq!(contains(&dsdt, b"\x08_PXM\x01"), 2);
    assert_eq!(contains(&tables(&machine_that_grows()).dsdt, b"_PXM"), 0);
}

#[test]
fn the_largest_number_of_cpus_fits() {
    let mut machine = machine_that_grows();
    machine.max_vcpus = 32;
    let tables = tables(&machine);
    assert_eq!(contains(&tables.dsdt, b"ACPI0007"), 32);
    // The last one's bit as a double word.
    assert_eq!(contains(&tables.dsdt, b"\x0c\x00\x00\x00\x80"), 4);
}

#[test]
fn dsdt_names_every_device() {
    let dsdt = tables(&machine(18)).dsdt;
    assert_eq!(contains(&dsdt, b"LNRO0005"), 18);
    for i in 0..18_u32 {
        let base = (layout::VIRTIO_MMIO_START as u32 + i * 0x1000).to_le_bytes();
        let memory = [&[0x86, 9, 0, 1][..], &base, &0x1000_u32.to_le_bytes()].concat();
        // Extended interrupt descriptor: consumer, edge, active high, exclusive, one.
        let interrupt = [&[0x89, 6, 0, 0b0011, 1][..], &(6 + i).to_le_bytes()].concat();
        assert_eq!(
            contains(&dsdt, &[memory, interrupt].concat()),
            1,
            "device {i}"
        );
    }
    assert_eq!(contains(&dsdt, b"ACPI0013"), 1);
    assert_eq!(contains(&dsdt, b"COM1"), 1);
    assert_eq!(contains(&dsdt, b"PS2K"), 1);
    // \_S5: a package of one element, the byte 5.
    assert_eq!(contains(&dsdt, b"\x08\\_S5_\x12\x04\x01\x0a\x05"), 1);

    let mut bare = machine(0);
    bare.has_com1 = false;
    bare.has_i8042 = false;
    let dsdt = tables(&bare).dsdt;
    for name in [&b"LNRO0005"[..], b"COM1", b"PS2K"] {
        assert_eq!(contains(&dsdt, name), 0);
    }
    assert_eq!(
        contains(&dsdt, b"PWRB"),
        2,
        "the button and its notification"
    );
}

#[test]
fn windows_above_4_gib_are_refused() {
    for (base, size) in [(1 << 32, 0x1000), (0xffff_f000, 0x1001), (u64::MAX, 2)] {
        let mut machine = machine(1);
        machine.mmio_devices[0].base = base;
        machine.mmio_devices[0].size = size;
        let error = build(&machine, START).unwrap_err();
        assert!(matches!(error, Error::DeviceTooHigh { .. }), "{error}");
    }
}

#[test]
fn tables_that_outgrow_their_place_are_refused() {
    let mut machine = machine(1);
    machine.mmio_devices = vec![machine.mmio_devices[0]; 4096];
    let memory = super::super::testing::memory(&[(0, 2 << 20)]);
    let error = write(&memory, &machine).unwrap_err();
    assert!(matches!(error, Error::AcpiTooLarge { .. }), "{error}");
}

#[test]
fn pci_is_named_where_it_is() {
    let machine = MachineDescription {
        has_pci: true,
        ..machine(0)
    };
    let blob = build(&machine, START).unwrap();
    let xsdt = table(&blob, long(&blob, 24));
    assert_eq!(xsdt.len(), 36 + 3 * 8);
    let mcfg = table(&blob, long(xsdt, 52));
    assert_eq!((&mcfg[..4], mcfg.len()), (&b"MCFG"[..], 60));
    assert_eq!(long(mcfg, 44), layout::PCI_ECAM_START);
    assert_eq!(long(mcfg, 52), 0, "segment 0, bus 0 alone");
    let fadt = table(&blob, long(xsdt, 36));
    let dsdt = table(&blob, long(fadt, 140));
    // EISA ids: PNP0A08 and PNP0A03.
    assert_eq!(contains(dsdt, b"PCI0\x08_HID\x0c\x41\xd0\x0a\x08"), 1);
    assert_eq!(contains(dsdt, b"\x08_CID\x0c\x41\xd0\x0a\x03"), 1);
    let start = (layout::PCI_WINDOW_START as u32).to_le_bytes();
    let size = (layout::PCI_WINDOW_SIZE as u32).to_le_bytes();
    let end = (layout::PCI_WINDOW_START as u32 + layout::PCI_WINDOW_SIZE as u32 - 1).to_le_bytes();
    let window = [&start[..], &end, &[0; 4], &size].concat();
    assert_eq!(contains(dsdt, &window), 1);
    // A device for each slot, which can be ejected by its bit of the register.
    assert_eq!(contains(dsdt, b"_ADR"), 31);
    let eject = [b'_', b'E', b'J', b'0', 9, 0x70, 0x0c, 0, 0, 0, 0x80];
    assert_eq!(contains(dsdt, &eject), 1, "of the last");
    let region = [
        &b"\x5b\x80PREG\x00\x0c"[..],
        &(layout::PCI_REGISTERS_START as u32).to_le_bytes(),
        &[0x0a, 0x20],
    ];
    assert_eq!(contains(dsdt, &region.concat()), 1);
    // If (And (Local0, 4)) Notify (S002, 1); If (And (Local1, 4)) Notify (S002, 3).
    for (local, what) in [(0x60, &b"\x01"[..]), (0x61, b"\x0a\x03")] {
        let condition = [0x92, 0x93, 0x7b, local, 0x0a, 4, 0, 0];
        let notify = [&b"\x86S002"[..], what].concat();
        assert_eq!(contains(dsdt, &[&condition[..], &notify].concat()), 1);
    }
    // The generic event device calls the scan on bit 2.
    let pending = [0x92, 0x93, 0x7b, 0x60, 0x0a, 4, 0, 0];
    let call = [&pending[..], b"\\\x2f\x03_SB_PCI0PSCN"].concat();
    assert_eq!(contains(dsdt, &call), 1);
    assert_eq!(
        contains(&tables(&super::super::testing::machine(0)).dsdt, b"PCI0"),
        0
    );
}
