//! A guest whose memory is made of pages of 2 MiB: from the host's pool, or such as the host makes of ordinary ones.

use casemate_tests::{Running, Vm, exit};
use serde_json::json;

use crate::guest::{Guest, linux};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

fn pages(file: &str) -> u64 {
    let text = std::fs::read_to_string(format!("{POOL}/{file}")).unwrap();
    text.trim().parse().unwrap()
}

/// So many more pages in the host's pool, as long as it lives.
struct Reserved {
    before: u64,
}

impl Reserved {
    fn new(more: u64) -> Self {
        let before = pages("nr_hugepages");
        let reserved = Self { before };
        reserved.set(before + more);
        assert_eq!(
            pages("nr_hugepages"),
            before + more,
            "the host has too little memory"
        );
        reserved
    }

    fn set(&self, count: u64) {
        std::fs::write(format!("{POOL}/nr_hugepages"), count.to_string()).unwrap();
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.set(self.before);
    }
}

fn guest(pages: &str) -> Vm {
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 128, "huge_pages": pages });
    let script = "exec > /dev/console\nhead -c 40000000 /dev/zero > /tmp/written && echo $(wc -c < /tmp/written) bytes\nsleep 1000";
    linux("", &[], script, &[]).set("/machine-config", machine)
}

/// What the host says of the guest's memory: the sum of `field` of all mappings, in KiB.
fn kib(guest: &Running, field: &str) -> u64 {
    let pid = guest.vmm_pid().unwrap();
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let lines = smaps.lines().filter_map(|line| line.strip_prefix(field));
    lines
        .map(|line| line.trim().trim_end_matches(" kB").parse::<u64>().unwrap())
        .sum()
}

#[test]
fn a_guest_runs_on_pages_of_the_hosts_pool_and_gives_them_back() {
    let _reserved = Reserved::new(64);
    let free = pages("free_hugepages");
    let vm = guest("2M").served();
    let running = Running::start(vm.command().unwrap(), None).unwrap();
    let guest = Guest::new(running, vm);
    guest.says("40000000 bytes");
    let used = kib(&guest.vm, "Private_Hugetlb:");
    assert!((40 << 10..=128 << 10).contains(&used), "{used}");
    // What it has not touched is kept for it.
    assert_eq!(pages("free_hugepages") - pages("resv_hugepages"), free - 64);
    guest.kill();
    assert_eq!(pages("free_hugepages"), free);
    assert_eq!(pages("resv_hugepages"), 0);
}

#[test]
fn a_pool_that_is_too_small_is_refused_by_name() {
    let _reserved = Reserved::new(63);
    let words = ["huge_pages", "needs 64 huge pages", "vm.nr_hugepages"];
    guest("2M").assert_refused(exit::BAD_INPUT, &words);
}

#[test]
fn a_guest_runs_on_huge_pages_that_the_host_makes() {
    let vm = guest("Transparent").served();
    let running = Running::start(vm.command().unwrap(), None).unwrap();
    let guest = Guest::new(running, vm);
    guest.says("40000000 bytes");
    let used = kib(&guest.vm, "AnonHugePages:");
    assert!(used >= 32 << 10, "{used}");
    guest.kill();
}
