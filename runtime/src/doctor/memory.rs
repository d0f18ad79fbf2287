//! The host's memory: huge pages, sharing, swap.

use serde::Serialize;

use super::host::Root;
use super::{Finding, Level};

/// What was found out about memory.
#[derive(Debug, Serialize)]
pub struct MemoryFacts {
    /// Reserved huge pages of 2 MiB, and how many of them are free.
    huge_pages_total: u64,
    huge_pages_free: u64,
    /// Mode of transparent huge pages.
    transparent_huge_pages: String,
    /// Kernel samepage merging runs.
    ksm: bool,
    /// Bytes of swap, 0 is none.
    swap_bytes: u64,
}

/// Huge pages, KSM, swap.
pub fn collect(root: &Root, findings: &mut Vec<Finding>) -> MemoryFacts {
    let number = |path: &str| {
        root.read(path)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0u64)
    };
    let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let huge_pages_total = number(&format!("{pool}/nr_hugepages"));
    let huge_pages_free = number(&format!("{pool}/free_hugepages"));
    let huge = |level| {
        Finding::new(
            "huge pages",
            level,
            format!("{huge_pages_free} of {huge_pages_total} reserved pages of 2 MiB are free"),
            "Reserved huge pages make guests' memory faster; nothing needs them yet.",
        )
    };
    findings.push(if huge_pages_total > 0 {
        huge(Level::Good)
    } else {
        huge(Level::Note).mend(&format!("echo NUMBER > {pool}/nr_hugepages"))
    });

    let modes = root
        .read("/sys/kernel/mm/transparent_hugepage/enabled")
        .unwrap_or_default();
    let mode = modes
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("absent", |(mode, _)| mode)
        .to_string();
    let level = if matches!(mode.as_str(), "always" | "madvise") {
        Level::Good
    } else {
        Level::Note
    };
    let finding = Finding::new(
        "transparent huge pages",
        level,
        mode.clone(),
        "Guest memory is backed by huge pages where the kernel finds some.",
    );
    findings.push(if level == Level::Good {
        finding
    } else {
        finding.mend("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
    });

    let ksm = number("/sys/kernel/mm/ksm/run") == 1;
    findings.push(if ksm {
        Finding::new(
            "KSM",
            Level::Bad,
            "merges equal pages",
            "A guest can find out by timing what another has in memory.",
        )
        .mend("echo 2 > /sys/kernel/mm/ksm/run")
    } else {
        Finding::new(
            "KSM",
            Level::Good,
            "off",
            "Guests share no page that timing could reveal.",
        )
    });

    let swap_kib: u64 = root
        .read("/proc/swaps")
        .unwrap_or_default()
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok())
        .sum();
    findings.push(if swap_kib == 0 {
        Finding::new(
            "swap",
            Level::Good,
            "none",
            "Guest memory is never written to a disk of the host.",
        )
    } else {
        Finding::new(
            "swap",
            Level::Note,
            format!("{} MiB", swap_kib / 1024),
            "Guest memory, secrets included, may be written to a disk of the host.",
        )
        .mend("swapoff -a, or encrypt the swap space")
    });
    MemoryFacts {
        huge_pages_total,
        huge_pages_free,
        transparent_huge_pages: mode,
        ksm,
        swap_bytes: swap_kib.saturating_mul(1024),
    }
}
