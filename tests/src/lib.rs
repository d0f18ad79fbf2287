//! The harness: what a test needs to start a microVM as a user would, and to look at it.
//!
//! ```no_run
//! use casemate_tests::{Vm, exit};
//! let vm = Vm::probe("probe.task=rng").entropy();
//! let done = vm.run().unwrap();
//! done.assert_line("probe: rng ok");
//! assert_eq!(done.code, exit::GUEST_RESET);
//! ```

mod api;
mod back_end;
mod disk;
mod gdb;
mod kernels;
mod leftovers;
mod machine;
mod net_back_end;
mod netns;
mod placement;
mod process;
mod relay;
mod run;
mod vm;

pub use api::{ApiAnswer, ApiClient};
pub use back_end::{Share, storage_daemon, virtiofsd};
pub use casemate_broker::exit;
pub use disk::{ext4_image, is_free, pattern_disk, pattern_word};
pub use gdb::Gdb;
pub use kernels::broken_kernels;
pub use machine::Machine;
pub use net_back_end::{NetBackEnd, neighbour};
pub use netns::{Netns, wait_until_running};
pub use placement::{cpus_of_thread, memory_nodes};
pub use process::{Finished, Running, resident_mib};
pub use relay::Relay;
pub use run::{Casemate, kernel_file, modules, packaged_kernel, rootfs};
pub use vm::{Vm, bin, bin_dir};

use std::sync::atomic::{AtomicU32, Ordering};

/// An id that no other test uses, also when several test programs run at once.
pub fn unique_id(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}-{}-{number}", std::process::id())
}

/// The version of Landlock that this host has, 0 without it. What it governs depends on it.
pub fn landlock_abi() -> u64 {
    let output = Casemate::new().command(&["doctor", "--json"]).output();
    // A harness that cannot ask has nothing to test with.
    let output = output.unwrap_or_else(|error| panic!("casemate doctor: {error}"));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("casemate doctor --json: {error}"));
    report
        .pointer("/landlock/abi")
        .and_then(serde_json::Value::as_u64)
        .unwrap_or(0)
}
