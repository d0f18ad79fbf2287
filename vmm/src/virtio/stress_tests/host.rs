//! Programs on the host, of which few behave.

use std::fs::File;
use std::io::{PipeReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::spawn;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{DISK, Random};
use crate::lockdown::{self, Role, Stage};
use crate::virtio::console::{Output, Port, Size};

pub struct Host {
    pub random: Random,
    /// Where the socket device listens.
    pub vsock: PathBuf,
    /// The other ends of the cards' taps.
    pub taps: Vec<File>,
    /// What the disk is on.
    pub disk: File,
    /// The console: what is typed, and what it says.
    pub port: Arc<Port>,
    pub said: PipeReader,
    callers: Vec<UnixStream>,
    /// For so many acts more nobody listens to the console.
    deaf: u64,
}

impl Host {
    pub fn new(
        vsock: PathBuf,
        taps: Vec<File>,
        disk: File,
        port: Arc<Port>,
        said: PipeReader,
    ) -> Self {
        Self {
            random: Random(3),
            vsock,
            taps,
            disk,
            port,
            said,
            callers: Vec::new(),
            deaf: 0,
        }
    }

    /// Everybody does something.
    pub fn act(&mut self) {
        let random = &mut self.random;
        let mut data = vec![0; 1 << 16];
        for tap in &mut self.taps {
            let _ = tap.write(&vec![1; random.one(&[13, 72, 1500, 60_000])]);
            // Now and then nobody listens, and a tap gets full.
            while random.below(64) > 0 && tap.read(&mut data).is_ok_and(|count| count > 0) {}
        }
        if random.below(16) == 0 {
            let len = random.one(&[0, 7 * 512, 63 * 512 + 1, DISK]);
            self.disk.set_len(len).unwrap();
        }
        self.console(&mut data);
        self.call(&mut data);
    }

    fn console(&mut self, data: &mut [u8]) {
        let random = &mut self.random;
        let typed = random.one(&[0, 1, 5000]);
        self.port.offer(&data[..typed]);
        if random.below(16) == 0 {
            self.port.resize(Size {
                columns: random.below(3) as u16,
                rows: 24,
            });
        }
        if random.below(1000) == 0 {
            self.deaf = random.below(2000);
        }
        self.deaf = self.deaf.saturating_sub(1);
        if self.deaf == 0 {
            let _ = self.said.read(data);
        }
    }

    /// Programs that talk to the guest's socket device.
    fn call(&mut self, data: &mut [u8]) {
        let random = &mut self.random;
        // The listener's queue may be full while the device is not running.
        if let Ok(mut caller) = connect(&self.vsock) {
            let line = b"CONNECT 2\nhello";
            let count = random.one(&[0, 5, 10, line.len()]);
            let _ = caller.write(&line[..count]);
            self.callers.push(caller);
        }
        if self.callers.len() > 16 {
            self.callers.swap_remove(random.below(16) as usize);
        }
        for caller in &mut self.callers {
            let _ = caller.write(&data[..random.one(&[0, 1, 9000])]);
            if random.below(2) == 0 {
                let _ = caller.read(data);
            }
        }
    }

    /// A frame comes by every tap that has room for it, and so does what was sent.
    pub fn send_frames(&mut self) {
        let mut data = vec![0; 1 << 16];
        for tap in &mut self.taps {
            let _ = tap.write(&[0; 72]);
            while tap.read(&mut data).is_ok_and(|count| count > 0) {}
        }
    }

    /// Listens until the console has said `text` last.
    pub fn await_said(&mut self, text: &[u8]) {
        let (mut tail, mut data) = (Vec::new(), [0; 4096]);
        while !tail.ends_with(text) {
            match self.said.read(&mut data) {
                Ok(count) => tail.extend(&data[..count]),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
            tail.drain(..tail.len().saturating_sub(text.len()));
        }
    }
}

/// Starts the thread that writes what the console says, as sealed as it is in a machine; returns where it can be
/// read, never waiting.
pub fn speak(output: Arc<Output>) -> PipeReader {
    let (said, pipe) = std::io::pipe().unwrap();
    fcntl(&said, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    spawn(move || {
        lockdown::enter(Role::Console, Stage::Sealed).unwrap();
        output.run(|bytes| (&pipe).write(bytes));
    });
    said
}

/// Connects without waiting for anybody to accept.
fn connect(path: &std::path::Path) -> nix::Result<UnixStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use std::os::fd::AsRawFd as _;
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}
