//! A network namespace with a tap in it, of a test's own.

use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, bind, socket};

use crate::process::PATIENCE;
use crate::unique_id;

/// The namespace; gone, and the tap with it, when dropped.
pub struct Netns {
    name: String,
}

impl Netns {
    /// A namespace whose `tap0` is up, with `address` (such as `10.0.0.1/24`) if one is given.
    #[track_caller]
    pub fn with_tap(address: Option<&str>) -> Self {
        Self::with_tap_of(&[], address)
    }

    /// The same, and the tap has several queues.
    #[track_caller]
    pub fn with_queues(address: Option<&str>) -> Self {
        Self::with_tap_of(&["multi_queue"], address)
    }

    #[track_caller]
    fn with_tap_of(flags: &[&str], address: Option<&str>) -> Self {
        let netns = Self {
            name: unique_id("cm-net"),
        };
        ip(&["netns", "add", &netns.name]);
        let inside = |args: &[&str]| ip(&[&["-n", &netns.name][..], args].concat());
        let tap = ["tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"];
        inside(&[&tap[..], flags].concat());
        if let Some(address) = address {
            inside(&["address", "add", address, "dev", "tap0"]);
        }
        inside(&["link", "set", "tap0", "up"]);
        netns
    }

    /// One more tap, which is up.
    #[track_caller]
    pub fn add_tap(&self, name: &str) {
        let inside = |args: &[&str]| ip(&[&["-n", &self.name][..], args].concat());
        inside(&["tuntap", "add", name, "mode", "tap", "vnet_hdr"]);
        inside(&["link", "set", name, "up"]);
    }

    /// Has everything leave it by the tap, through a gateway that nobody has to be.
    #[track_caller]
    pub fn route_by(&self, gateway: &str) {
        let route = ["route", "add", "default", "via", gateway, "dev", "tap0"];
        ip(&[&["-n", &self.name][..], &route].concat());
    }

    /// Where it can be entered.
    pub fn path(&self) -> String {
        format!("/var/run/netns/{}", self.name)
    }

    /// A packet socket on the tap: it sees every frame in both directions.
    #[track_caller]
    pub fn listen(&self) -> OwnedFd {
        let namespace = File::open(self.path()).unwrap_or_else(|error| panic!("{error}"));
        // The thread ends in that namespace; the socket stays of it.
        let thread = std::thread::spawn(move || -> nix::Result<OwnedFd> {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            packet_socket("tap0")
        });
        let socket = thread.join().map_err(|_| "a panic");
        socket
            .unwrap_or_else(|what| panic!("{what}"))
            .unwrap_or_else(|error| panic!("a packet socket: {error}"))
    }

    /// A command that runs `program` in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }
}

/// Waits, in the calling thread's namespace, until the kernel sends frames out by `interface`. It learns a little later
/// (IFF_RUNNING) that a program has come to a tap's other end, and drops what is sent before.
#[track_caller]
pub fn wait_until_running(interface: &str) {
    let deadline = Instant::now() + PATIENCE;
    let running = || -> nix::Result<bool> {
        let mut found = getifaddrs()?.filter(|found| found.interface_name == interface);
        Ok(found.any(|found| found.flags.contains(InterfaceFlags::IFF_RUNNING)))
    };
    while !running().unwrap_or_else(|error| panic!("{interface}: {error}")) {
        assert!(Instant::now() < deadline, "{interface} does not come up");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn packet_socket(interface: &str) -> nix::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )?;
    let address = getifaddrs()?
        .filter(|found| found.interface_name == interface)
        .find_map(|found| found.address?.as_link_addr().copied())
        .ok_or(Errno::ENODEV)?;
    bind(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
    }
}

#[track_caller]
fn ip(args: &[&str]) {
    match Command::new("ip").args(args).output() {
        Ok(done) => assert!(done.status.success(), "ip {args:?}: {done:?}"),
        Err(error) => panic!("ip (package iproute2): {error}"),
    }
}
