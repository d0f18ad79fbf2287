//! A network namespace with a tap in it, of a test's own.

use std::process::Command;

use crate::unique_id;

/// The namespace; gone, and the tap with it, when dropped.
pub struct Netns {
    name: String,
}

impl Netns {
    /// A namespace whose `tap0` is up, with `address` (such as `10.0.0.1/24`) if one is given.
    #[track_caller]
    pub fn with_tap(address: Option<&str>) -> Self {
        let netns = Self {
            name: unique_id("cm-net"),
        };
        ip(&["netns", "add", &netns.name]);
        let inside = |args: &[&str]| ip(&[&["-n", &netns.name][..], args].concat());
        inside(&["tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"]);
        if let Some(address) = address {
            inside(&["address", "add", address, "dev", "tap0"]);
        }
        inside(&["link", "set", "tap0", "up"]);
        netns
    }

    /// Where it can be entered.
    pub fn path(&self) -> String {
        format!("/var/run/netns/{}", self.name)
    }

    /// A command that runs `program` in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }
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
