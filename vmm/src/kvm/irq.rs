//! Interrupt routes: from global system interrupts (GSIs) to pins.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip,
};

use super::Error;

/// Pins of KVM's I/O APIC.
const IOAPIC_PINS: u32 = 24;
/// Inputs of one i8259.
const PIC_INPUTS: u32 = 8;

/// The table for KVM_SET_GSI_ROUTING: GSI n is pin n of the I/O APIC.
///
/// The table that KVM makes itself also has the i8259 pair. A guest with hardware-reduced ACPI never programs
/// that, and an edge on an unprogrammed i8259 would reach its first vCPU as a stray interrupt;
/// so it is there only for guests that asked for a PIT.
pub fn routes(pic: bool) -> Result<KvmIrqRouting, Error> {
    let ioapic = (0..IOAPIC_PINS).map(|gsi| entry(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    let master = (0..PIC_INPUTS).map(|pin| entry(pin, KVM_IRQCHIP_PIC_MASTER, pin));
    let slave = (0..PIC_INPUTS).map(|pin| entry(PIC_INPUTS + pin, KVM_IRQCHIP_PIC_SLAVE, pin));
    let pics = master.chain(slave).filter(|_| pic);
    let entries: Vec<_> = pics.chain(ioapic).collect();
    KvmIrqRouting::from_entries(&entries).map_err(|_| Error::TooManyEntries("interrupt route"))
}

fn entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pin_has_one_route() {
        let gsis = |pic| {
            let table = routes(pic).unwrap();
            let gsis: Vec<_> = table.as_slice().iter().map(|entry| entry.gsi).collect();
            gsis
        };
        assert_eq!(gsis(false), (0..24).collect::<Vec<_>>());
        assert_eq!(gsis(true), (0..16).chain(0..24).collect::<Vec<_>>());
    }
}
