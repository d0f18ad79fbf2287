//! A vCPU of a guest that means no good.

use vm_memory::{Bytes as _, GuestAddress};

use super::{Devices, QUEUES, Random, SIZE};
use crate::memory::GuestMemory;
use crate::virtio::net;
use crate::virtio::testing::{DATA, Driver, INDIRECT, NEXT, WRITE};

/// The start of a frame, as often as not one for the metadata service.
fn frame(random: &mut Random, bytes: &mut [u8]) {
    let service = crate::mmds::DEFAULT_ADDRESS.octets();
    match random.below(4) {
        // An ARP request for its address.
        0 => {
            let packet = &net::testing::who_has(service)[12..];
            bytes[..packet.len()].copy_from_slice(packet);
        }
        // TCP over IPv4 to its port, more or less.
        1 => {
            bytes[12..15].copy_from_slice(&[8, 0, 0x45]);
            bytes[20..22].fill(0);
            bytes[23] = 6;
            bytes[30..34].copy_from_slice(&service);
            bytes[36..38].copy_from_slice(&[0, 80]);
            bytes[46] = 0x50;
            bytes[47] &= 0x1f;
        }
        _ => {}
    }
}

pub struct Vcpu {
    pub random: Random,
    pub memory: GuestMemory,
    pub devices: Devices,
}

impl Vcpu {
    pub fn driver(&self, device: usize, queue: u64) -> Driver {
        let index = device as u64 * QUEUES + queue;
        Driver::new(&self.memory, index as u16, SIZE)
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        // What lies outside of memory is for the device to notice.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    /// Starts a device as a driver does; `honest`, or with rings anywhere.
    pub fn start(&mut self, device: usize, honest: bool) {
        let features = if honest { 0 } else { self.random.next() as u32 };
        let registers = self.devices.at(device);
        registers.reach();
        for status in [0, 1, 3] {
            registers.set_status(status);
        }
        for page in [0, 1] {
            let offered = registers.offered(page);
            registers.accept(page, if page == 1 { 1 } else { offered & features });
        }
        registers.set_status(11);
        for queue in 0..QUEUES {
            let state = self.driver(device, queue).state;
            let areas = [state.descriptors, state.available, state.used].map(|place| {
                let wild = !honest && self.random.below(64) == 0;
                if wild { self.random.edge() } else { place }
            });
            registers.set_up_queue(queue as u16, SIZE, areas);
        }
        registers.set_status(15);
    }

    /// Something that a device may take for a header.
    fn header(&mut self) -> Vec<u8> {
        let random = &mut self.random;
        let mut bytes: Vec<u8> = (0..64).map(|_| random.next() as u8).collect();
        match random.below(5) {
            // A packet of the socket device: few ports, so that they meet.
            0 | 1 => {
                bytes[..16].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
                for (at, end) in [(16, 4), (20, 4), (24, 9000)] {
                    let value = random.below(end) as u32;
                    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
                bytes[28..32].copy_from_slice(&[1, 0, random.below(9) as u8, 0]);
                bytes[32] &= 3;
            }
            // A request for the disk.
            2 => {
                bytes[..4].copy_from_slice(&random.one(&[0_u32, 1, 4, 8, 9]).to_le_bytes());
                let sector = random.one(&[0, 1, 63, 64, 200, u64::MAX]);
                bytes[8..16].copy_from_slice(&sector.to_le_bytes());
            }
            // A request for memory: few blocks, so that they come and go.
            3 if random.below(2) == 0 => {
                bytes[..2].copy_from_slice(&[random.below(5) as u8, 0]);
                let block = (4 << 30) + random.below(33) * (2 << 20);
                bytes[8..16].copy_from_slice(&block.to_le_bytes());
                bytes[16..18].copy_from_slice(&[random.below(4) as u8, 0]);
            }
            // How many pairs of queues of a card are used.
            3 => bytes[..4].copy_from_slice(&[4, 0, random.below(4) as u8, 0]),
            _ => {
                bytes[..12].fill(0);
                frame(random, &mut bytes[12..]);
            }
        }
        bytes
    }

    /// Makes a chain available: likely, odd or malformed.
    fn offer(&mut self, device: usize, queue: u64) {
        let mut driver = self.driver(device, queue);
        let place = DATA + self.random.below(8) * 0x1_0000;
        let header = self.header();
        self.put(place, &header);
        let head = self.random.below(u64::from(SIZE)) as u16;
        let (table, first) = if self.random.below(4) == 0 {
            driver.describe(head, DATA + 0x18_0000, 64, INDIRECT, 0);
            (DATA + 0x18_0000, 0)
        } else {
            (driver.state.descriptors, head)
        };
        let sizes = [0, 1, 16, 20, 44, 64, 512, 1024, 4096, 0x1_0000, 0x10_0000];
        let mut writable = self.random.below(3) == 0;
        let count = 1 + self.random.below(4) as u16;
        for n in 0..count {
            let wild = self.random.below(200) == 0;
            let address = if wild {
                self.random.edge()
            } else {
                place + u64::from(n) * 0x40
            };
            let len = if n == 0 && !writable {
                self.random.one(&[16, 44, 64, 2048])
            } else {
                self.random.one(&sizes)
            };
            let more = if n + 1 < count { NEXT } else { 0 };
            let write = if writable { WRITE } else { 0 };
            let odd = self.random.below(300) == 0;
            let flags = if odd {
                self.random.next() as u16
            } else {
                more | write
            };
            driver.describe_at(
                table,
                (first + n) % SIZE,
                address,
                len,
                flags,
                (first + n + 1) % SIZE,
            );
            writable |= self.random.below(2) == 0;
        }
        let mut index = [0; 2];
        let at = GuestAddress(driver.state.available + 2);
        self.memory.read_slice(&mut index, at).unwrap();
        driver.set_available_index(u16::from_le_bytes(index));
        driver.offer(head);
        if self.random.below(500) == 0 {
            driver.set_available_index(self.random.next() as u16);
        }
        self.devices.at(device).ring(queue as u16);
    }

    pub fn act(&mut self) {
        let device = self.random.below(self.devices.len() as u64) as usize;
        let queue = self.random.below(QUEUES);
        let registers = self.devices.at(device);
        match self.random.below(64) {
            0 | 1 => registers.set_status(0),
            2..=5 => self.start(device, false),
            6..=8 => {
                let value = self.random.next().to_le_bytes();
                let offset = self.random.one(registers.places()) + self.random.below(3);
                let len = self.random.below(9) as usize;
                registers.write(offset, &value[..len]);
            }
            9 => {
                let len = self.random.below(9) as usize;
                let offset = self.random.edge();
                registers.read(offset, &mut [0; 8][..len]);
            }
            10 => {
                let ring = self.driver(device, queue).state.descriptors;
                let bytes = self.random.next().to_le_bytes();
                let at = ring + self.random.below(0x4000);
                self.put(at, &bytes);
            }
            11 if registers.status() & 64 != 0 => self.start(device, false),
            _ => self.offer(device, queue),
        }
    }
}
