//! MSI-X: interrupts as messages, each with an address and data that the guest chose (PCI local bus
//! specification 3.0, section 6.8.2).
//!
//! A message is sent on the device thread only: vCPU threads may not (see `docs/architecture.md`).
//! They write the table; when that lets a pending message go, they ask the device thread to send it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::virtio::queue::MAX_QUEUES;
use crate::virtio::transport::state::RestoreError;

/// "No vector": what is not to interrupt (virtio 1.2, section 4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;
/// Bytes of an entry of the table.
const ENTRY_SIZE: u64 = 16;
/// The one bit of an entry's vector control.
const MASKED: u32 = 1;
/// Where local APICs listen. A message to any other address would be a write to memory.
const APICS: std::ops::Range<u64> = 0xfee0_0000..0xfef0_0000;

/// Bits of the ISR register (section 4.1.4.5): for drivers that poll with MSI-X disabled.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Sends messages to the guest's local APICs.
pub trait MsiSender: Send + Sync {
    /// Sends one; a guest that names an APIC or a vector that is not there gets nothing.
    fn send(&self, address: u64, data: u32);
}

/// What interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Used buffers in this queue.
    Queue(u16),
    /// A change of the device's configuration or status.
    Config,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

/// As after a reset: masked.
const EMPTY: Entry = Entry {
    address: 0,
    data: 0,
    control: MASKED,
};

struct State {
    /// One for each queue, and one for the configuration.
    entries: Vec<Entry>,
    /// Bit n: vector n has a message to send.
    pending: u64,
    enabled: bool,
    masked: bool,
    bus_master: bool,
    queue_vectors: [u16; MAX_QUEUES],
    config_vector: u16,
    isr: u8,
}

impl State {
    fn is_open(&self) -> bool {
        self.enabled && !self.masked && self.bus_master
    }

    /// The next message that may go now.
    fn next(&self) -> Option<(u32, Entry)> {
        if !self.is_open() || self.pending == 0 {
            return None;
        }
        (0..)
            .zip(&self.entries)
            .find(|(vector, entry)| self.pending >> vector & 1 != 0 && entry.control & MASKED == 0)
            .map(|(vector, entry)| (vector, *entry))
    }

    fn vector(&mut self, source: Source) -> Option<&mut u16> {
        match source {
            Source::Queue(queue) => self.queue_vectors.get_mut(usize::from(queue)),
            Source::Config => Some(&mut self.config_vector),
        }
    }

    /// Remembers that `source` has something to say.
    fn note(&mut self, source: Source) {
        if !self.enabled {
            self.isr |= match source {
                Source::Queue(_) => ISR_QUEUE,
                Source::Config => ISR_CONFIG,
            };
            return;
        }
        let vector = self.vector(source).map_or(NO_VECTOR, |vector| *vector);
        if usize::from(vector) < self.entries.len() {
            self.pending |= 1_u64.checked_shl(vector.into()).unwrap_or(0);
        }
    }
}

/// The interrupts as plain data, but for what configuration space has.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// Address, data and vector control of each entry of the table.
    entries: Vec<(u64, u32, u32)>,
    pending: u64,
    queue_vectors: Vec<u16>,
    config_vector: u16,
    isr: u8,
}

/// The interrupts of one function.
pub struct Msix {
    state: Mutex<State>,
    sender: Arc<dyn MsiSender>,
}

impl Msix {
    /// For a device of `queues` queues: one vector each, and one for the configuration.
    pub fn new(queues: usize, sender: Arc<dyn MsiSender>) -> Self {
        let vectors = queues.min(MAX_QUEUES).saturating_add(1);
        Self {
            state: Mutex::new(State {
                entries: vec![EMPTY; vectors],
                pending: 0,
                enabled: false,
                masked: false,
                bus_master: false,
                queue_vectors: [NO_VECTOR; MAX_QUEUES],
                config_vector: NO_VECTOR,
                isr: 0,
            }),
            sender,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Interrupts for `source`. On the device thread only.
    pub fn raise(&self, source: Source) {
        self.note(source);
        self.flush();
    }

    /// Remembers to interrupt for `source`; whoever calls this on another thread than the device's asks
    /// that to [`Msix::flush`].
    pub fn note(&self, source: Source) {
        self.state().note(source);
    }

    /// Sends what may go. On the device thread only.
    pub fn flush(&self) {
        let mut state = self.state();
        while let Some((vector, entry)) = state.next() {
            state.pending &= !1_u64.checked_shl(vector).unwrap_or(0);
            if APICS.contains(&entry.address) {
                // With the state held: after a guest has masked a vector, no message of it comes.
                self.sender.send(entry.address, entry.data);
            }
        }
    }

    /// Whether [`Msix::flush`] would send something.
    pub fn has_something_to_send(&self) -> bool {
        self.state().next().is_some()
    }

    /// Takes over the bits of configuration space that let messages go.
    pub fn control(&self, enabled: bool, masked: bool, bus_master: bool) {
        let mut state = self.state();
        if !enabled {
            state.pending = 0;
        }
        (state.enabled, state.masked, state.bus_master) = (enabled, masked, bus_master);
    }

    /// The vector of `source`.
    pub fn vector(&self, source: Source) -> u16 {
        self.state()
            .vector(source)
            .map_or(NO_VECTOR, |vector| *vector)
    }

    /// Chooses the vector of `source`. One that is not there becomes [`NO_VECTOR`], by which the driver learns it.
    pub fn set_vector(&self, source: Source, vector: u16) {
        let mut state = self.state();
        let exists = usize::from(vector) < state.entries.len();
        if let Some(place) = state.vector(source) {
            *place = if exists { vector } else { NO_VECTOR };
        }
    }

    /// Reads and clears the ISR register.
    pub fn take_isr(&self) -> u8 {
        std::mem::take(&mut self.state().isr)
    }

    /// The interrupts as plain data.
    pub fn save(&self) -> MsixState {
        let state = self.state();
        let entry = |entry: &Entry| (entry.address, entry.data, entry.control);
        MsixState {
            entries: state.entries.iter().map(entry).collect(),
            pending: state.pending,
            queue_vectors: state.queue_vectors.to_vec(),
            config_vector: state.config_vector,
            isr: state.isr,
        }
    }

    /// Takes the interrupts of another function of the kind, as its driver would have set them up. Before
    /// [`Msix::control`], which lets them go.
    ///
    /// # Errors
    /// When the table has another size.
    pub fn restore(&self, saved: &MsixState) -> Result<(), RestoreError> {
        {
            let mut state = self.state();
            let (found, expected) = (saved.entries.len(), state.entries.len());
            if found != expected {
                return Err(RestoreError::Vectors { found, expected });
            }
            for (at, (address, data, control)) in (0..=u64::MAX)
                .step_by(ENTRY_SIZE as usize)
                .zip(&saved.entries)
            {
                let halves = [*address as u32, (*address >> 32) as u32, *data, *control];
                for (at, half) in (at..=u64::MAX).step_by(4).zip(halves) {
                    state.set_table_long(at, half);
                }
            }
            let vectors = u32::try_from(expected).unwrap_or(u32::MAX);
            let known = !u64::MAX.checked_shl(vectors).unwrap_or(0);
            state.pending = saved.pending & known;
            state.isr = saved.isr & (ISR_QUEUE | ISR_CONFIG);
        }
        for (queue, vector) in (0..).zip(saved.queue_vectors.iter().take(MAX_QUEUES)) {
            self.set_vector(Source::Queue(queue), *vector);
        }
        self.set_vector(Source::Config, saved.config_vector);
        Ok(())
    }

    /// What a reset of the virtio device changes. The table and its control are the function's and stay.
    pub fn reset(&self) {
        let mut state = self.state();
        state.queue_vectors = [NO_VECTOR; MAX_QUEUES];
        state.config_vector = NO_VECTOR;
        (state.pending, state.isr) = (0, 0);
    }

    /// Reads the table: four or eight bytes, aligned (section 6.8.2); anything else reads as zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !is_wide(offset, data.len()) {
            return;
        }
        let state = self.state();
        for (long, at) in data.chunks_mut(4).zip((offset..=u64::MAX).step_by(4)) {
            for (to, from) in long.iter_mut().zip(state.table_long(at).to_le_bytes()) {
                *to = from;
            }
        }
    }

    /// Writes the table: four or eight bytes, aligned; anything else writes nothing.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !is_wide(offset, data.len()) {
            return;
        }
        let mut state = self.state();
        for (long, at) in data.chunks(4).zip((offset..=u64::MAX).step_by(4)) {
            if let Ok(long) = <[u8; 4]>::try_from(long) {
                state.set_table_long(at, u32::from_le_bytes(long));
            }
        }
    }

    /// Reads the array of pending bits; nobody writes it.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.state().pending.to_le_bytes();
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if is_wide(offset, data.len()) {
            for (to, from) in data.iter_mut().zip(bytes.iter().skip(start)) {
                *to = *from;
            }
        }
    }
}

fn is_wide(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

impl State {
    fn table_long(&self, offset: u64) -> u32 {
        let index = usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX);
        let Some(entry) = self.entries.get(index) else {
            return 0;
        };
        match offset % ENTRY_SIZE {
            0 => entry.address as u32,
            4 => (entry.address >> 32) as u32,
            8 => entry.data,
            _ => entry.control,
        }
    }

    fn set_table_long(&mut self, offset: u64, value: u32) {
        let index = usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX);
        let Some(entry) = self.entries.get_mut(index) else {
            return;
        };
        let long = u64::from(value);
        match offset % ENTRY_SIZE {
            0 => entry.address = entry.address & !0xffff_ffff | long & !3,
            4 => entry.address = entry.address & 0xffff_ffff | long << 32,
            8 => entry.data = value,
            _ => entry.control = value & MASKED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Sent(Mutex<Vec<(u64, u32)>>);

    impl MsiSender for Sent {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    impl Sent {
        fn take(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    const QUEUE: Source = Source::Queue(0);

    /// Two queues and three vectors, enabled: queue 0 has vector 1, the configuration has vector 2.
    fn ready() -> (Msix, Arc<Sent>) {
        let sent = Arc::new(Sent::default());
        let msix = Msix::new(2, Arc::clone(&sent) as Arc<dyn MsiSender>);
        msix.set_vector(QUEUE, 1);
        msix.set_vector(Source::Config, 2);
        for vector in 0..3 {
            let entry = vector * 16;
            msix.write_table(entry, &(0xfee0_1000_u64).to_le_bytes());
            msix.write_table(entry + 8, &(0x40 + vector).to_le_bytes());
        }
        msix.control(true, false, true);
        (msix, sent)
    }

    #[test]
    fn messages_are_what_the_guest_wrote() {
        let (msix, sent) = ready();
        msix.raise(QUEUE);
        msix.raise(Source::Config);
        assert_eq!(sent.take(), [(0xfee0_1000, 0x41), (0xfee0_1000, 0x42)]);
        // A queue without a vector, and one that is not there.
        msix.raise(Source::Queue(1));
        msix.raise(Source::Queue(99));
        assert_eq!(sent.take(), []);
        let mut data = [0; 8];
        msix.read_table(16, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0xfee0_1000);
        msix.read_table(24, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x41);
    }

    #[test]
    fn what_waits_goes_along_to_another_machine() {
        let (msix, sent) = ready();
        msix.control(true, true, true);
        msix.raise(QUEUE);
        let (other, other_sent) = ready();
        other.control(false, false, false);
        other.restore(&msix.save()).unwrap();
        other.control(true, true, true);
        other.flush();
        assert_eq!((sent.take(), other_sent.take()), (vec![], vec![]));
        other.control(true, false, true);
        other.flush();
        assert_eq!(other_sent.take(), [(0xfee0_1000, 0x41)]);
        let wide = Msix::new(3, sent);
        assert!(wide.restore(&msix.save()).is_err());
    }

    #[test]
    fn what_is_masked_waits() {
        let pending = |msix: &Msix| {
            let mut data = [0; 8];
            msix.read_pending(0, &mut data);
            u64::from_le_bytes(data)
        };
        let (msix, sent) = ready();
        let close: [&dyn Fn(); 3] = [
            &|| msix.write_table(28, &1_u32.to_le_bytes()),
            &|| msix.control(true, true, true),
            &|| msix.control(true, false, false),
        ];
        let open: [&dyn Fn(); 3] = [
            &|| msix.write_table(28, &0_u32.to_le_bytes()),
            &|| msix.control(true, false, true),
            &|| msix.control(true, false, true),
        ];
        for (close, open) in close.iter().zip(open) {
            close();
            msix.raise(QUEUE);
            msix.raise(QUEUE);
            assert_eq!((sent.take(), pending(&msix)), (vec![], 2));
            assert!(!msix.has_something_to_send());
            open();
            assert!(msix.has_something_to_send());
            assert_eq!(sent.take(), [], "not on the thread that writes");
            msix.flush();
            assert_eq!(sent.take(), [(0xfee0_1000, 0x41)], "once");
            assert_eq!(pending(&msix), 0);
        }
        // Nobody waits for what was pending when MSI-X went away, or before a reset.
        close[0]();
        msix.raise(QUEUE);
        msix.control(false, false, true);
        msix.control(true, false, true);
        msix.raise(QUEUE);
        msix.reset();
        open[0]();
        msix.flush();
        assert_eq!((sent.take(), pending(&msix)), (vec![], 0));
        assert_eq!(msix.vector(QUEUE), NO_VECTOR);
    }

    #[test]
    fn without_msix_there_is_the_isr() {
        let (msix, sent) = ready();
        msix.control(false, false, true);
        msix.raise(QUEUE);
        assert_eq!((msix.take_isr(), msix.take_isr()), (1, 0));
        msix.raise(Source::Config);
        msix.raise(QUEUE);
        assert_eq!((msix.take_isr(), sent.take()), (3, vec![]));
    }

    #[test]
    fn vectors_that_are_not_there_are_refused() {
        let (msix, _) = ready();
        for vector in [3, 17, 64, 0xfffe] {
            msix.set_vector(QUEUE, vector);
            assert_eq!(msix.vector(QUEUE), NO_VECTOR);
            msix.set_vector(QUEUE, 0);
            assert_eq!(msix.vector(QUEUE), 0);
        }
        msix.set_vector(Source::Queue(u16::MAX), 0);
        assert_eq!(msix.vector(Source::Queue(u16::MAX)), NO_VECTOR);
    }

    #[test]
    fn messages_go_to_apics_only() {
        let (msix, sent) = ready();
        for address in [
            0_u64,
            0x1000,
            0xfef0_0000,
            0xfedf_fffc,
            1 << 32 | 0xfee0_0000,
        ] {
            msix.write_table(16, &address.to_le_bytes());
            msix.raise(QUEUE);
            assert_eq!(sent.take(), [], "{address:#x}");
        }
        msix.write_table(16, &0xfeef_ffff_u64.to_le_bytes());
        msix.raise(QUEUE);
        assert_eq!(sent.take(), [(0xfeef_fffc, 0x41)]);
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let (msix, sent) = ready();
        for len in 0..=8 {
            for offset in (0..64).chain([u64::MAX - 8, u64::MAX]) {
                if is_wide(offset, len) && offset < 48 {
                    continue;
                }
                let mut data = vec![0xff; len];
                msix.write_table(offset, &data);
                msix.read_table(offset, &mut data);
                assert_eq!(data, vec![0; len]);
                msix.read_pending(offset, &mut data);
                assert_eq!(data, vec![0; len]);
            }
        }
        msix.raise(QUEUE);
        assert_eq!(sent.take(), [(0xfee0_1000, 0x41)]);
    }
}
