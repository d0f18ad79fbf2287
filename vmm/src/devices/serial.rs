//! The first serial port (16550A): what the guest writes goes straight to standard output, or a file, and what
//! is typed goes into its FIFO.
//!
//! Nothing is buffered here but the FIFO's 64 bytes. A reader of the output that does not
//! read makes the guest wait, at most [`STALLED`] for each byte if the descriptor is non-blocking;
//! the control thread never waits for a vCPU that does ([`SerialPort::offer`]).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use vm_superio::Serial;
use vm_superio::serial::{SerialEvents, SerialState};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Line;
use crate::bus::BusDevice;
use crate::metrics::fields::UartMetrics;
use crate::virtio::rate_limiter::{BucketOptions, LimiterOptions, RateLimiter};

/// Size of its window in ports.
pub const WINDOW: u64 = 8;
/// How long one byte waits for a non-blocking output, in milliseconds.
const STALLED: u16 = 100;

/// Where the guest's output goes, and how much of it.
#[derive(Default)]
pub struct SerialOptions {
    /// A file or pipe; standard output without it.
    pub output: Option<File>,
    /// How many bytes the guest may write. What is beyond is dropped.
    pub limit: Option<BucketOptions>,
}

/// Standard output, without the standard library's lock and buffer, or a file.
struct Output {
    file: Option<File>,
    limiter: RateLimiter,
    metrics: Arc<UartMetrics>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.limiter.wait().is_some() {
            self.metrics
                .rate_limiter_dropped_bytes
                .add(bytes.len() as u64);
            return Ok(bytes.len());
        }
        self.limiter.spend(bytes.len() as u64);
        match &self.file {
            Some(file) => write(file.as_fd(), bytes),
            None => write(io::stdout().as_fd(), bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.metrics.flush_count.inc();
        Ok(())
    }
}

fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::write(fd, bytes) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let mut ready = [PollFd::new(fd, PollFlags::POLLOUT)];
                match poll(&mut ready, STALLED) {
                    Ok(0) => return Err(Errno::EAGAIN.into()),
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            other => return Ok(other?),
        }
    }
}

/// Tells the control thread that the FIFO has room again.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter wakes the control thread as well.
        let _ = self.0.write(1);
    }
}

/// What became of input that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// That many bytes were taken, at least one; there may be room for more.
    Taken(usize),
    /// The FIFO is full: offer it again when [`SerialPort::room`] is readable.
    Full,
    /// A vCPU is at it: offer it again in a moment.
    Busy,
}

/// The port's registers and what was typed and not read yet, as plain data.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSerial {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    typed: Vec<u8>,
}

/// The port.
pub struct SerialPort {
    device: Mutex<Serial<Line, Room, Output>>,
    interrupt: EventFd,
    room: EventFd,
    metrics: Arc<UartMetrics>,
}

impl SerialPort {
    /// A port that writes where `options` say.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new(options: SerialOptions) -> io::Result<Self> {
        Self::with(options, &SerialState::default())
    }

    fn with(options: SerialOptions, state: &SerialState) -> io::Result<Self> {
        let metrics = Arc::<UartMetrics>::default();
        let output = Output {
            file: options.output,
            limiter: RateLimiter::new(LimiterOptions {
                bandwidth: options.limit,
                ops: None,
            }),
            metrics: Arc::clone(&metrics),
        };
        let line = Line::new()?;
        let interrupt = line.try_clone()?;
        let room = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let events = Room(room.try_clone()?);
        let device = Serial::from_state(state, line, events, output);
        let device = device.map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(Self {
            device: Mutex::new(device),
            interrupt,
            room,
            metrics,
        })
    }

    /// The port as plain data.
    pub fn save(&self) -> SavedSerial {
        let device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        let state = device.state();
        SavedSerial {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            typed: state.in_buffer,
        }
    }

    /// A port that goes on from a saved one.
    ///
    /// # Errors
    /// When the kernel gives no eventfd, or more was typed than it has room for.
    pub fn restored(options: SerialOptions, saved: &SavedSerial) -> io::Result<Self> {
        let [baud_divisor_low, baud_divisor_high] = saved.baud_divisor;
        Self::with(
            options,
            &SerialState {
                baud_divisor_low,
                baud_divisor_high,
                interrupt_enable: saved.interrupt_enable,
                interrupt_identification: saved.interrupt_identification,
                line_control: saved.line_control,
                line_status: saved.line_status,
                modem_control: saved.modem_control,
                modem_status: saved.modem_status,
                scratch: saved.scratch,
                in_buffer: saved.typed.clone(),
            },
        )
    }

    /// Its interrupt.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// What it counts.
    pub fn metrics(&self) -> Arc<UartMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Readable when the FIFO has become empty.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// Offers input to the guest, never waiting.
    pub fn offer(&self, input: &[u8]) -> Offer {
        let mut device = match self.device.try_lock() {
            Ok(device) => device,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Offer::Busy,
        };
        match device.enqueue_raw_bytes(input) {
            Ok(0) => Offer::Busy,
            Ok(taken) => Offer::Taken(taken),
            // The other error is an interrupt that could not be raised, and eventfds do not fail.
            Err(_) => Offer::Full,
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            *value = device.read(offset);
            self.metrics.read_count.inc();
        } else {
            self.metrics.missed_read_count.inc();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            self.metrics.write_count.inc();
            // A byte that nobody takes is lost, as on a real line. The guest is not told.
            if device.write(offset, *value).is_err() {
                self.metrics.error_count.inc();
            }
        } else {
            self.metrics.missed_write_count.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const MCR: u64 = 4;
    const LSR: u64 = 5;

    fn read(port: &SerialPort, offset: u64) -> u8 {
        let mut data = [0];
        port.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn input_stops_at_a_full_fifo_and_goes_on_when_it_is_empty() {
        let port = SerialPort::new(SerialOptions::default()).unwrap();
        port.write(IER, &[1]);
        assert_eq!(port.offer(&[7; 100]), Offer::Taken(64));
        assert_eq!(port.offer(&[7; 36]), Offer::Full);
        assert_eq!(port.interrupt().read().unwrap(), 1);
        for left in (0..64).rev() {
            assert_eq!(read(&port, LSR) & 1, 1);
            assert_eq!(read(&port, DATA), 7);
            assert_eq!(port.room().read().is_ok(), left == 0);
        }
        assert_eq!(read(&port, LSR) & 1, 0);
        assert_eq!(port.offer(&[7; 36]), Offer::Taken(36));
    }

    #[test]
    fn input_waits_while_the_line_is_looped_back() {
        let port = SerialPort::new(SerialOptions::default()).unwrap();
        port.write(MCR, &[0x10]);
        assert_eq!(port.offer(b"x"), Offer::Busy);
        // A guest can fill the FIFO by itself that way, and no more than the FIFO.
        for _ in 0..1000 {
            port.write(DATA, b"y");
        }
        port.write(MCR, &[0]);
        assert_eq!(port.offer(b"x"), Offer::Full);
    }

    #[test]
    fn output_goes_to_a_file_up_to_a_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let port = SerialPort::new(SerialOptions {
            output: Some(file.reopen().unwrap()),
            limit: Some(BucketOptions {
                size: 3,
                one_time_burst: 2,
                refill_time: std::time::Duration::from_secs(3600),
            }),
        })
        .unwrap();
        for byte in b"hello, world" {
            port.write(DATA, &[*byte]);
        }
        assert_eq!(std::fs::read(file.path()).unwrap(), b"hello");
        let metrics = port.metrics();
        assert_eq!(metrics.write_count.total(), 12);
        assert_eq!(metrics.rate_limiter_dropped_bytes.total(), 7);
    }

    #[test]
    fn odd_widths_and_offsets_do_nothing() {
        let port = SerialPort::new(SerialOptions::default()).unwrap();
        let mut data = [0xff; 4];
        port.read(0, &mut data);
        assert_eq!(data, [0; 4]);
        port.write(0, b"xx");
        port.write(0, b"");
        port.write(u64::MAX, b"x");
        port.read(u64::MAX, &mut data);
    }
}
