//! Where on the host a process is: its threads on CPUs, its memory on NUMA nodes.

use std::fs;

use anyhow::{Context, Result};

/// The CPUs that the thread called `name` of process `pid` may run on, as the kernel lists them (`0-3,7`).
pub fn cpus_of_thread(pid: u32, name: &str) -> Result<String> {
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = entry?.path();
        if fs::read_to_string(thread.join("comm"))?.trim_end() != name {
            continue;
        }
        let status = fs::read_to_string(thread.join("status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        return Ok(line.context("no Cpus_allowed_list")?.trim().to_owned());
    }
    anyhow::bail!("process {pid} has no thread called {name:?}")
}

/// The policies of process `pid`'s memory that bind it to nodes, and how many of the pages of each lie on which
/// node: lines such as `bind:1 N1=20`.
pub fn memory_nodes(pid: u32) -> Result<Vec<String>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/numa_maps"))
        .context("a kernel without NUMA, or not root")?;
    let bound = maps.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let policy = words.next().filter(|policy| policy.starts_with("bind"))?;
        let on_node = |word: &&str| {
            word.strip_prefix('N')
                .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
        };
        let pages: Vec<&str> = words.filter(on_node).collect();
        Some(
            format!("{policy} {}", pages.join(" "))
                .trim_end()
                .to_owned(),
        )
    });
    Ok(bound.collect())
}
