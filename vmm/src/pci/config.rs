//! The configuration space of one function (PCI local bus specification 3.0, chapter 6): bytes, and
//! which of their bits the guest may write.

/// Bytes of conventional configuration space. What follows it up to 4 KiB reads as zero: no
/// extended capability.
const SIZE: usize = 256;
/// Capabilities lie behind the header.
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
/// Command: the function decodes its BARs.
const MEMORY_SPACE: u8 = 1 << 1;
/// Command: the function may write to memory, which a message-signalled interrupt is.
const BUS_MASTER: u8 = 1 << 2;
/// Command: INTx disable, in the second byte. There is no INTx; drivers set it all the same.
const INTX_DISABLE: u8 = 1 << 2;
/// Status: there is a list of capabilities.
const HAS_CAPABILITIES: u8 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class code: class, subclass, programming interface, as in 0x02_00_00.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Configuration space.
#[derive(Clone, Debug)]
pub struct FunctionConfig {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the next capability goes, and where the pointer to it is.
    end: usize,
    link: usize,
}

impl FunctionConfig {
    /// That of a function without a BAR or capabilities, which decodes nothing yet.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            end: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        let class = identity.class << 8 | u32::from(identity.revision);
        space.put(0x08, &class.to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &[MEMORY_SPACE | BUS_MASTER, INTX_DISABLE]);
        // Interrupt line: a byte for software to keep.
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Gives the function BAR 0: 32-bit memory at `base`, `size` bytes (a power of two, 16 at least).
    pub fn set_bar(&mut self, base: u32, size: u32) {
        self.put(BAR0, &base.to_le_bytes());
        // What cannot be written reads back as zero: that is how software learns the size.
        self.allow(BAR0, &(!size.saturating_sub(1)).to_le_bytes());
    }

    /// Appends a capability: what follows its id and the pointer to the next, and which bits of that may be
    /// written. Returns its offset. To be called while the function is made.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        self.put(self.link, &[at as u8]);
        self.put(at, &[id, 0]);
        let start = at.saturating_add(2);
        self.put(start, body);
        self.allow(start, writable);
        if let Some(status) = self.bytes.get_mut(STATUS) {
            *status |= HAS_CAPABILITIES;
        }
        self.link = at.saturating_add(1);
        self.end = start.saturating_add(body.len()).next_multiple_of(4);
        at
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(mask) {
            *to = *from;
        }
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads at `offset`.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *to = *from;
        }
    }

    /// Writes at `offset` the bits that may be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let masks = self.writable.iter().skip(offset);
        for ((to, mask), from) in self.bytes.iter_mut().skip(offset).zip(masks).zip(data) {
            *to = *to & !mask | from & mask;
        }
    }

    /// One byte; 0 where there is none.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    /// Four bytes.
    pub fn long(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Where BAR 0 lies, while the function decodes it. It is wherever the guest put it: see
    /// [`super::bus`] for why that is harmless.
    pub fn bar(&self) -> Option<u64> {
        let decodes = self.byte(COMMAND) & MEMORY_SPACE != 0;
        decodes.then(|| u64::from(self.long(BAR0)))
    }

    /// Whether the function may send interrupts.
    pub fn is_bus_master(&self) -> bool {
        self.byte(COMMAND) & BUS_MASTER != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> FunctionConfig {
        let mut config = FunctionConfig::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_80_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        config.set_bar(0xe100_4000, 0x4000);
        config
    }

    #[test]
    fn introduces_itself() {
        let config = function();
        assert_eq!(config.long(0), 0x1042_1af4);
        assert_eq!(config.long(8), 0x0180_0001);
        assert_eq!(config.long(0x2c), 0x0040_1af4);
        assert_eq!(config.long(0x34), 0, "no capability");
        assert_eq!(config.byte(0x0e), 0, "one function, ordinary header");
        assert_eq!(config.byte(0x3d), 0, "no INTx pin");
        assert_eq!(config.long(0x100), 0, "no extended capability");
        assert_eq!(config.long(usize::MAX), 0);
    }

    #[test]
    fn a_bar_says_its_size_and_moves() {
        let mut config = function();
        assert_eq!(config.bar(), None, "not decoded");
        config.write(4, &[7, 0]);
        assert_eq!(config.bar(), Some(0xe100_4000));
        config.write(0x10, &[0xff; 4]);
        assert_eq!(config.long(0x10), 0xffff_c000);
        config.write(0x10, &0x1234_7fff_u32.to_le_bytes());
        assert_eq!(config.bar(), Some(0x1234_4000));
        // The other BARs and the ROM are not there.
        for offset in [0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
            config.write(offset, &[0xff; 4]);
            assert_eq!(config.long(offset), 0);
        }
    }

    #[test]
    fn only_what_may_be_written_is() {
        let mut config = function();
        let before = config.bytes;
        let first = config.add_capability(9, &[1, 2, 3], &[0, 0xf0]);
        let second = config.add_capability(0x11, &[4], &[]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(config.byte(0x34), 0x40);
        assert_eq!(config.long(0x40), 0x0201_4809);
        assert_eq!(config.long(0x48), 0x0004_0011);
        assert_ne!(config.byte(6) & 0x10, 0);
        for offset in 0..SIZE {
            config.write(offset, &[0xff]);
        }
        let changed: Vec<_> = (0..0x40)
            .filter(|&at| config.bytes[at] != before[at])
            .collect();
        assert_eq!(changed, [0x04, 0x05, 0x06, 0x11, 0x12, 0x13, 0x34, 0x3c]);
        assert_eq!((config.bytes[4], config.bytes[5]), (6, 4));
        assert_eq!(config.long(0x40), 0xf201_4809);
        config.write(SIZE - 1, &[0xff; 8]);
        config.write(usize::MAX, &[0xff; 8]);
    }
}
