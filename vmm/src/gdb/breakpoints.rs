//! Where a guest is to stop: four places, by the CPU's debug registers.
//!
//! gdb's ordinary breakpoints are there, too, and not by `int3` in the guest's code: that stops no guest whose host emulates its kernel or is
//! emulated itself, as many a cloud's is; it is lost when the guest loads its code later, or moves; and a guest has breakpoints of its own.

/// How many addresses the debug registers can name.
const REGISTERS: usize = 4;
/// DR7: breakpoints are exact, and a bit that is always set.
const DR7_ALWAYS: u64 = 1 << 9 | 1 << 10;

/// What a debug register stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An instruction, before it is executed: gdb's ordinary breakpoint.
    Breakpoint,
    /// The same: gdb's hardware breakpoint.
    HardwareBreakpoint,
    /// A write, after it.
    Write,
    /// A read or a write, after it.
    Access,
}

/// What a debug register names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its linear address.
    pub address: u64,
    /// 1, 2, 4 or 8 bytes, and aligned to that; 1 for instructions.
    pub len: u64,
    /// What stops there.
    pub kind: Kind,
}

/// The debug registers (Intel SDM 3B, 18.2).
#[derive(Default)]
pub struct DebugRegisters([Option<Place>; REGISTERS]);

impl DebugRegisters {
    /// False if the registers cannot name it, or all are in use.
    pub fn add(&mut self, place: Place) -> bool {
        let can_be = match place.kind {
            Kind::Breakpoint | Kind::HardwareBreakpoint => place.len == 1,
            _ => matches!(place.len, 1 | 2 | 4 | 8) && place.address.is_multiple_of(place.len),
        };
        if !can_be {
            return false;
        }
        let free = self.0.iter_mut().find(|register| register.is_none());
        free.is_some_and(|free| {
            *free = Some(place);
            true
        })
    }

    /// False if it was not there.
    pub fn remove(&mut self, place: Place) -> bool {
        let found = self.0.iter_mut().find(|it| **it == Some(place));
        found.is_some_and(|found| found.take().is_some())
    }

    /// What stopped a vCPU, by the bits of its DR6.
    pub fn hit(&self, dr6: u64) -> Option<Place> {
        let bits = (0..).map(|n| dr6 >> n & 1 == 1);
        let hits = self.0.iter().zip(bits).filter(|(_, bit)| *bit);
        hits.filter_map(|(place, _)| *place).next()
    }

    /// DR0 to DR3, and DR7; None if they name nothing.
    pub fn values(&self) -> Option<([u64; REGISTERS], u64)> {
        if self.0.iter().all(Option::is_none) {
            return None;
        }
        let mut dr7 = DR7_ALWAYS;
        for (n, place) in self.0.iter().enumerate() {
            let Some(place) = place else { continue };
            let kind = match place.kind {
                Kind::Breakpoint | Kind::HardwareBreakpoint => 0b00,
                Kind::Write => 0b01,
                Kind::Access => 0b11,
            };
            let len = match place.len {
                2 => 0b01,
                4 => 0b11,
                8 => 0b10,
                _ => 0b00,
            };
            dr7 |= 0b10 << (2 * n) | (len << 2 | kind) << (16 + 4 * n);
        }
        Some((self.0.map(|place| place.map_or(0, |it| it.address)), dr7))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(address: u64, len: u64, kind: Kind) -> Place {
        Place { address, len, kind }
    }

    #[test]
    fn dr7_says_where_and_what() {
        let mut registers = DebugRegisters::default();
        assert_eq!(registers.values(), None);
        assert!(registers.add(place(0x1234, 1, Kind::Breakpoint)));
        assert!(registers.add(place(0x2000, 8, Kind::Write)));
        assert!(registers.add(place(0x3004, 4, Kind::Access)));
        assert!(registers.add(place(0x4002, 2, Kind::Write)));
        // G0 to G3, GE and bit 10; then RW and LEN of each, none of the first.
        let dr7 = 0xaa | 0x600 | 0b1001 << 20 | 0b1111 << 24 | 0b0101 << 28;
        let addresses = [0x1234, 0x2000, 0x3004, 0x4002];
        assert_eq!(registers.values(), Some((addresses, dr7)));
        assert!(
            !registers.add(place(0x5000, 1, Kind::Breakpoint)),
            "all in use"
        );
        assert!(registers.remove(place(0x2000, 8, Kind::Write)));
        assert!(!registers.remove(place(0x2000, 8, Kind::Write)));
        assert_eq!(registers.values().unwrap().1, dr7 & !0x00f0_0008);
    }

    #[test]
    fn dr6_says_which() {
        let mut registers = DebugRegisters::default();
        let [first, second] = [0x10, 0x20].map(|at| place(at, 1, Kind::Breakpoint));
        assert!(registers.add(first) && registers.add(second));
        assert_eq!(registers.hit(0xffff_0ff1), Some(first));
        assert_eq!(registers.hit(0xffff_0ff2), Some(second));
        // Nobody's.
        assert_eq!(registers.hit(0xffff_0ff8), None);
        assert_eq!(registers.hit(0xffff_4ff0), None);
    }

    #[test]
    fn refuses_what_no_register_can_name() {
        let mut registers = DebugRegisters::default();
        for refused in [
            place(0x1000, 2, Kind::Breakpoint),
            place(0x1000, 3, Kind::Write),
            place(0x1000, 0, Kind::Write),
            place(0x1000, 16, Kind::Access),
            place(0x1001, 2, Kind::Access),
        ] {
            assert!(!registers.add(refused), "{refused:?}");
        }
    }
}
