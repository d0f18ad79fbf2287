//! What a driver may and may not change of a function that runs.

use super::TABLE;
use super::tests::Machine;
use crate::virtio::testing::{DATA, END};

/// Has the device serve one request.
fn serve(machine: &mut Machine) {
    machine.driver.add(&[(DATA, 1, true)]);
    machine.ring();
    machine.used();
}

#[test]
fn a_started_queue_does_not_change() {
    let machine = Machine::new();
    machine.start();
    let state = machine.driver.state;
    machine.bar(0x18, &16_u16.to_le_bytes());
    machine.bar(0x20, &0_u64.to_le_bytes());
    machine.bar(0x28, &0_u64.to_le_bytes());
    machine.bar(0x0c, &u32::MAX.to_le_bytes());
    assert_eq!(machine.read(0x18, 2), u64::from(state.size));
    assert_eq!(machine.read(0x20, 8), state.descriptors);
    assert_eq!(machine.read(0x28, 4), state.available);
    assert_eq!(machine.read(0x0c, 4), 0);
}

/// Only a message to an APIC leaves, and `interrupt` refuses any other: so one that was sent in between would be found.
#[test]
fn vectors_and_messages_change_and_the_queue_goes_on() {
    let mut machine = Machine::new();
    machine.enable_msix();
    machine.start();
    serve(&mut machine);
    assert_eq!(machine.interrupt(), 0x31);
    // None that is there.
    for vector in [2_u16, 17, 0xfffe, 0xffff] {
        machine.bar(0x1a, &vector.to_le_bytes());
        machine.bar(0x10, &vector.to_le_bytes());
        assert_eq!(
            (machine.read(0x1a, 2), machine.read(0x10, 2)),
            (0xffff, 0xffff)
        );
        serve(&mut machine);
    }
    // Nor an APIC's address: RAM, the registers, the last of all.
    machine.bar(0x1a, &1_u16.to_le_bytes());
    machine.driver.put(DATA, &[7; 64]);
    for address in [DATA, END, 0xc000_1050, 0xfec0_0000, 1 << 32, u64::MAX] {
        machine.bar(TABLE + 16, &address.to_le_bytes());
        serve(&mut machine);
    }
    assert_eq!(machine.driver.get(DATA, 64), [7; 64]);
    // Another message is as good as the first.
    machine.bar(TABLE + 16, &0xfee0_0000_u64.to_le_bytes());
    for data in [0x55, 0x56] {
        machine.bar(TABLE + 24, &u32::to_le_bytes(data));
        serve(&mut machine);
        // What was used before may have been told of late.
        while machine.interrupt() != data {}
    }
    assert_eq!(machine.status(), 15);
}
