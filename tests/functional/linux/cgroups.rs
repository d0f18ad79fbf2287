//! Jails below a cgroup of the operator's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use casemate_tests::{Vm, exit, kernel_file, unique_id};

/// A cgroup with a process in it; both are gone when it is dropped.
struct Occupied(PathBuf, Child);

impl Occupied {
    fn new(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let occupied = Self(path, Command::new("sleep").arg("1000").spawn().unwrap());
        let procs = occupied.0.join("cgroup.procs");
        fs::write(procs, occupied.1.id().to_string()).unwrap();
        occupied
    }
}

impl Drop for Occupied {
    fn drop(&mut self) {
        let _ = self.1.kill();
        let _ = self.1.wait();
        let _ = fs::remove_dir(&self.0);
    }
}

/// In version 2 cgroups in one that has processes itself can have no limits.
#[test]
fn a_parent_with_processes_is_refused_with_what_to_do() {
    let root = Path::new("/sys/fs/cgroup");
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    if !controllers.contains("pids") {
        eprintln!("this host has no pure version 2, where alone this can happen");
        return;
    }
    let name = unique_id("parent");
    let occupied = Occupied::new(root.join(&name));
    // Of the two kinds of controllers.
    for setting in ["pids.max=40", "memory.max=300M"] {
        let vm = Vm::kernel(&kernel_file("cloud"), "");
        let vm = ["--parent-cgroup", &name, "--cgroup", setting]
            .into_iter()
            .fold(vm, Vm::jailer_arg);
        vm.run().unwrap().assert_refused(
            exit::JAIL_FAILED,
            &[&name, "processes of its own", "--parent-cgroup"],
        );
    }
    let kind = fs::read_to_string(occupied.0.join("cgroup.type")).unwrap();
    assert_eq!(kind, "domain\n", "it was changed");
    let below = fs::read_dir(&occupied.0).unwrap().flatten();
    let left = below.filter(|entry| entry.path().is_dir()).count();
    assert_eq!(left, 0, "a cgroup is left");
}
