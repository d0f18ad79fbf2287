//! CPUs that are added while the guest runs: the kernel makes a device of them and leaves it to us to bring
//! them online. One that the host takes away the kernel brings offline by itself.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket,
};

use crate::say;

/// Where the kernel has its CPUs; as the kernel's messages name it, without `/sys`.
const CPUS: &str = "/devices/system/cpu/";
/// The group of the kernel's own messages (`udev`'s are in another).
const KERNEL_GROUP: u32 = 1;
/// The kernel's messages are shorter (`UEVENT_BUFFER_SIZE` and a path).
const MESSAGE_SIZE: usize = 8192;
/// Messages that are taken before anything else is looked at.
const MESSAGES_A_TURN: u32 = 32;

/// The kernel's messages about devices (`NETLINK_KOBJECT_UEVENT`).
pub struct Arrivals(OwnedFd);

impl Arrivals {
    /// Listens from now on, and brings online what has come before.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn listen() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        bring_all_online();
        Ok(Self(socket))
    }

    /// Brings online the CPUs of the messages that wait. What is left wakes us again.
    pub fn take(&self) {
        let mut message = [0; MESSAGE_SIZE];
        for _ in 0..MESSAGES_A_TURN {
            match recvfrom::<NetlinkAddr>(self.0.as_raw_fd(), &mut message) {
                Ok((length, sender)) => {
                    // The kernel's number is 0, and no process has it.
                    let from_kernel = sender.is_some_and(|sender| sender.pid() == 0);
                    let message = message.get(..length).unwrap_or_default();
                    if let Some(cpu) = added_cpu(message).filter(|_| from_kernel) {
                        bring_online(&directory(cpu));
                    }
                }
                // Messages were lost.
                Err(Errno::ENOBUFS) => bring_all_online(),
                Err(_) => return,
            }
        }
    }
}

impl AsFd for Arrivals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The number of the CPU of which `message` says that it was added: `add@PATH`, then fields that say the same.
fn added_cpu(message: &[u8]) -> Option<u32> {
    let head = message.split(|byte| *byte == 0).next()?;
    let path = std::str::from_utf8(head).ok()?.strip_prefix("add@")?;
    number(path.strip_prefix(CPUS)?)
}

/// The number in a name such as `cpu12`.
fn number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("cpu")?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

fn directory(cpu: u32) -> PathBuf {
    Path::new("/sys").join(format!("{}cpu{cpu}", CPUS.trim_start_matches('/')))
}

fn bring_all_online() {
    let entries = fs::read_dir(Path::new("/sys").join(CPUS.trim_start_matches('/')));
    for entry in entries.into_iter().flatten().flatten() {
        if number(&entry.file_name().to_string_lossy()).is_some() {
            bring_online(&entry.path());
        }
    }
}

/// Brings a CPU online if it is not. The first one has no such file.
fn bring_online(directory: &Path) {
    let file = directory.join("online");
    if !fs::read(&file).is_ok_and(|state| state.starts_with(b"0")) {
        return;
    }
    if let Err(error) = fs::write(&file, "1") {
        say(&format!(
            "cannot bring a CPU online ({}): {error}",
            file.display()
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_added_cpus_count() {
        let cpu = |message: &str| added_cpu(message.as_bytes());
        let fields = "\0ACTION=add\0DEVPATH=/devices/system/cpu/cpu3\0SUBSYSTEM=cpu\0";
        assert_eq!(
            cpu(&format!("add@/devices/system/cpu/cpu3{fields}")),
            Some(3)
        );
        assert_eq!(cpu("add@/devices/system/cpu/cpu31"), Some(31));
        for other in [
            "",
            "\0",
            "add@",
            "add@/devices/system/cpu/",
            "add@/devices/system/cpu/cpu",
            "add@/devices/system/cpu/cpu+3",
            "add@/devices/system/cpu/cpu3/cache",
            "add@/devices/system/cpu/cpuidle",
            "add@/devices/system/cpu/cpu99999999999",
            "add@/devices/system/memory/memory3",
            "offline@/devices/system/cpu/cpu3",
            "remove@/devices/system/cpu/cpu3",
            "libudev\0add@/devices/system/cpu/cpu3",
        ] {
            assert_eq!(cpu(other), None, "{other:?}");
        }
        assert_eq!(added_cpu(&[0xff, 0xfe, b'@']), None);
    }

    #[test]
    fn a_cpu_that_is_offline_is_brought_online() {
        let written = |state: &str| {
            let directory = std::env::temp_dir().join(format!(
                "casemate-cpu-{}-{}",
                std::process::id(),
                state.trim()
            ));
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("online"), state).unwrap();
            bring_online(&directory);
            let now = fs::read_to_string(directory.join("online")).unwrap();
            fs::remove_dir_all(&directory).unwrap();
            now
        };
        assert_eq!(written("0\n"), "1");
        assert_eq!(written("1\n"), "1\n");
    }

    #[test]
    fn paths_are_the_kernels() {
        assert_eq!(directory(7), Path::new("/sys/devices/system/cpu/cpu7"));
    }
}
