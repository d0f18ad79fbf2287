use super::*;
use crate::bus::BusDevice;
use crate::devices::AcpiRegisters;
use crate::ending::EndSignal;
use crate::memory::layout;
use crate::pci::PciBus;
use crate::pci::bus::{BarWindow, Ecam};
use crate::virtio::DeviceWorker;
use crate::virtio::testing::{DATA, Driver, memory};
use crate::virtio::transport::pci;
use crate::virtio::transport::testing::Echo;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Silent;

impl MsiSender for Silent {
    fn send(&self, _: u64, _: u32) {}
}

/// A bus with two slots, the first with one doorbell, and a guest.
struct Machine {
    hotplug: Hotplug,
    ecam: Ecam,
    window: BarWindow,
    memory: GuestMemory,
}

impl Machine {
    fn new() -> Self {
        let ends = Arc::new(EndSignal::new().unwrap());
        let acpi = Arc::new(AcpiRegisters::new(ends).unwrap());
        let bus = Arc::new(PciBus::new());
        let worker = DeviceWorker::new().unwrap();
        let memory = memory();
        let slots = [(1, 1), (2, QUEUES)];
        let hotplug = Hotplug {
            registers: Arc::new(HotplugRegisters::new(Arc::clone(&bus), acpi).unwrap()),
            memory: memory.clone(),
            sender: Arc::new(Silent),
            worker: worker.handle(),
            slots: slots
                .map(|(number, queues)| Slot {
                    number,
                    doorbells: Doorbells::new(queues).unwrap(),
                    occupant: None,
                })
                .into(),
        };
        // It ends with the test's process, as in the machine.
        std::thread::spawn(move || worker.run());
        Self {
            hotplug,
            ecam: Ecam(Arc::clone(&bus)),
            window: BarWindow(bus),
            memory,
        }
    }

    fn vendor(&self, slot: u64) -> u16 {
        let mut data = [0; 2];
        self.ecam.read(slot << 15, &mut data);
        u16::from_le_bytes(data)
    }

    fn bar(&self, slot: u64, offset: u64, data: &[u8]) {
        let at = (slot - 1) * layout::PCI_BAR_SIZE + offset;
        self.window.write(at, data);
    }

    fn status(&self, slot: u64) -> u8 {
        let mut data = [0];
        self.window
            .read((slot - 1) * layout::PCI_BAR_SIZE + 0x14, &mut data);
        data[0]
    }

    /// As a driver does; returns what was used.
    fn drive(&self, slot: u64) -> (u32, u32) {
        self.ecam.write(slot << 15 | 4, &[6]);
        for (offset, data) in [(0x14, 0_u32), (0x14, 1), (0x14, 3)] {
            self.bar(slot, offset, &data.to_le_bytes()[..1]);
        }
        self.bar(slot, 8, &1_u32.to_le_bytes());
        self.bar(slot, 0xc, &1_u32.to_le_bytes());
        self.bar(slot, 0x14, &[11]);
        let mut driver = Driver::new(&self.memory, slot as u16, 8);
        let state = driver.state;
        driver.put(state.available, &[0; 32]);
        driver.put(state.used, &[0; 80]);
        self.bar(slot, 0x18, &8_u16.to_le_bytes());
        self.bar(slot, 0x20, &state.descriptors.to_le_bytes());
        self.bar(slot, 0x28, &state.available.to_le_bytes());
        self.bar(slot, 0x30, &state.used.to_le_bytes());
        self.bar(slot, 0x1c, &[1, 0]);
        self.bar(slot, 0x14, &[15]);
        assert_eq!(self.status(slot), 15);
        driver.add(&[(DATA, 1, true)]);
        let home = layout::PCI_WINDOW_START + (slot - 1) * layout::PCI_BAR_SIZE;
        self.bar(slot, pci::doorbells(slot as usize) - home, &[0, 0]);
        for _ in 0..10_000 {
            if let Some(used) = driver.used() {
                return used;
            }
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
        panic!("the device used nothing");
    }

    /// What the guest reads of who came and who shall go.
    fn told(&self) -> (u32, u32) {
        let mut data = [[0; 4]; 2];
        self.hotplug.registers().read(0, &mut data[0]);
        self.hotplug.registers().read(4, &mut data[1]);
        (u32::from_le_bytes(data[0]), u32::from_le_bytes(data[1]))
    }

    fn eject(&self, slots: u32) {
        self.hotplug.registers().write(8, &slots.to_le_bytes());
    }
}

fn drive(id: &str) -> DeviceName {
    DeviceName::Drive(id.to_owned())
}

fn echo() -> (Box<Echo>, Arc<AtomicUsize>) {
    let device = Box::<Echo>::default();
    let stops = Arc::clone(&device.stops);
    (device, stops)
}

#[test]
fn a_device_comes_works_goes_and_another_takes_its_place() {
    let mut machine = Machine::new();
    assert_eq!(machine.vendor(1), 0xffff);
    for round in 0..3 {
        let (device, stops) = echo();
        let name = drive(&round.to_string());
        machine.hotplug.add(&name, || Ok(device)).unwrap();
        assert_eq!(machine.told(), (1 << 1, 0));
        assert_eq!(machine.vendor(1), 0x1af4);
        machine.drive(1);

        machine.hotplug.remove(&name).unwrap();
        assert_eq!(machine.told(), (0, 1 << 1));
        assert_eq!(machine.hotplug.settle(), [], "not before the guest");
        machine.drive(1);
        machine.eject(1 << 1);
        assert_eq!(machine.vendor(1), 0xffff);
        // By the reset of the second driver, and by the end.
        assert_eq!(stops.load(Ordering::SeqCst), 2);
        assert!(machine.hotplug.registers().ejected().read().is_ok());
        assert_eq!(machine.hotplug.settle(), [name]);
        assert_eq!(Arc::strong_count(&stops), 1, "the device is dropped");
    }
}

#[test]
fn names_and_slots_are_taken_once() {
    let mut machine = Machine::new();
    let [a, b, c] = ["a", "b", "c"].map(drive);
    let make = || Ok(echo().0 as Box<dyn VirtioDevice>);
    machine.hotplug.add(&a, make).unwrap();
    let error = machine.hotplug.add(&a, make).err().unwrap();
    assert!(error.to_string().contains("drive a"), "{error}");
    machine.hotplug.add(&b, make).unwrap();
    let error = machine.hotplug.add(&c, make).err().unwrap();
    assert!(matches!(error, Error::NoSlot), "{error}");
    let error = machine.hotplug.remove(&c).unwrap_err();
    assert!(error.to_string().contains("drive c"), "{error}");
    assert_eq!(machine.told(), (1 << 1 | 1 << 2, 0));
    // What was not asked for stays.
    machine.eject(u32::MAX);
    assert_eq!(machine.hotplug.settle(), []);
    assert_eq!((machine.vendor(1), machine.vendor(2)), (0x1af4, 0x1af4));
}

#[test]
fn a_device_needs_a_doorbell_for_every_queue() {
    use crate::virtio::transport::testing::Wide;
    let mut machine = Machine::new();
    // The first slot has one doorbell.
    let make = || Ok(Box::new(Wide::<2>) as Box<dyn VirtioDevice>);
    machine.hotplug.add(&drive("wide"), make).unwrap();
    assert_eq!(machine.told(), (1 << 2, 0));
    let make = || Ok(Box::new(Wide::<5>) as Box<dyn VirtioDevice>);
    let error = machine.hotplug.add(&drive("wider"), make).err().unwrap();
    let expected = matches!(error, Error::TooManyQueues { wanted: 5, most: 1 });
    assert!(expected, "{error}");
}
