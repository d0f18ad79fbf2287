//! Reading the host's files, and what they say about its processors.

use std::path::PathBuf;

use rustix::io::Errno;
use rustix::process::getpid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
use serde::Serialize;

use super::{Finding, Level};

/// Where the host's files are: `/`, or a made-up tree in a test.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

impl Default for Root {
    fn default() -> Self {
        Self(PathBuf::from("/"))
    }
}

impl Root {
    #[cfg(test)]
    pub fn at(path: &std::path::Path) -> Self {
        Self(path.to_path_buf())
    }

    /// An absolute path of the host, in this tree.
    pub fn path(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    /// A small file's content without the white space around it.
    pub fn read(&self, path: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_string())
    }

    /// True when the path exists.
    pub fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// Names in a directory, sorted; none when it cannot be read.
    pub fn list(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.path(path))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Modules, loaded or built in with parameters, whose names match.
    pub fn modules_matching(&self, matches: impl Fn(&str) -> bool) -> Vec<String> {
        let mut names = self.list("/sys/module");
        names.retain(|name| matches(name));
        names
    }

    /// Feature flags of the first processor.
    pub fn cpu_flags(&self) -> Vec<String> {
        self.read("/proc/cpuinfo")
            .unwrap_or_default()
            .lines()
            .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
            .map(|(_, flags)| flags.split_whitespace().map(str::to_string).collect())
            .unwrap_or_default()
    }
}

/// What was found out about the processors.
#[derive(Debug, Serialize)]
pub struct CpuFacts {
    /// Two threads of a core run at once.
    smt_active: bool,
    /// The kernel can keep strangers off a core's other thread.
    core_scheduling: bool,
    /// Names of the vulnerabilities that the kernel calls vulnerable.
    vulnerable: Vec<String>,
}

/// Whether the running kernel has core scheduling: it is asked for this thread's cookie.
pub fn has_core_scheduling() -> bool {
    let cookie = core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread);
    // Known, and of no use while no core has two threads.
    matches!(cookie, Ok(_) | Err(Errno::NODEV))
}

/// Vulnerabilities, SMT, core scheduling.
pub fn cpu(root: &Root, core_scheduling: bool, findings: &mut Vec<Finding>) -> CpuFacts {
    let directory = "/sys/devices/system/cpu/vulnerabilities";
    let names = root.list(directory);
    let vulnerable: Vec<String> = names
        .iter()
        .filter(|name| {
            root.read(&format!("{directory}/{name}"))
                .is_some_and(|text| text.to_ascii_lowercase().contains("vulnerable"))
        })
        .cloned()
        .collect();
    findings.push(if names.is_empty() {
        Finding::new(
            "CPU vulnerabilities",
            Level::Note,
            "the kernel does not say",
            "Whether guests can read across the wall through the processor is unknown.",
        )
        .mend("a kernel of Linux 4.15 or later, with /sys mounted")
    } else if vulnerable.is_empty() {
        Finding::new(
            "CPU vulnerabilities",
            Level::Good,
            format!("{} known to the kernel, none open", names.len()),
            "The kernel mitigates what it knows.",
        )
    } else {
        Finding::new(
            "CPU vulnerabilities",
            Level::Bad,
            format!("open: {}", vulnerable.join(", ")),
            "A guest may read the memory of others through the processor.",
        )
        .mend("update microcode and kernel, and leave `mitigations=` at its default")
    });

    let smt_active = root.read("/sys/devices/system/cpu/smt/active").as_deref() == Some("1");
    findings.push(if smt_active {
        Finding::new(
            "SMT",
            Level::Bad,
            "on",
            "Two guests may share a core: its caches and buffers can leak between them.",
        )
        .mend("echo off > /sys/devices/system/cpu/smt/control")
    } else {
        Finding::new(
            "SMT",
            Level::Good,
            "off, or not shown",
            "No stranger shares a core with a guest at the same moment.",
        )
    });
    findings.push(if core_scheduling {
        Finding::new(
            "core scheduling",
            Level::Good,
            "the kernel has it",
            "Strangers can be kept off a core's other thread; machines do not use it yet, so SMT is as it says above.",
        )
    } else {
        Finding::new(
            "core scheduling",
            Level::Note,
            "absent",
            "Where SMT is on, nothing can keep strangers off a core's other thread.",
        )
        .mend("a kernel with CONFIG_SCHED_CORE (Linux 5.14 or later)")
    });
    CpuFacts {
        smt_active,
        core_scheduling,
        vulnerable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let root = Root::at(directory.path());
        (directory, root)
    }

    #[test]
    fn open_vulnerabilities_are_named() {
        let base = "sys/devices/system/cpu";
        let (_guard, root) = tree(&[
            (
                &format!("{base}/vulnerabilities/mds"),
                "Vulnerable: Clear CPU buffers attempted, no microcode\n",
            ),
            (&format!("{base}/vulnerabilities/l1tf"), "Not affected\n"),
            (&format!("{base}/smt/active"), "1\n"),
        ]);
        let mut findings = Vec::new();
        let facts = cpu(&root, false, &mut findings);
        assert_eq!(facts.vulnerable, ["mds"]);
        assert!(facts.smt_active);
        assert!(
            findings
                .iter()
                .all(|finding| finding.level != Level::Good && finding.mend.is_some())
        );
    }

    #[test]
    fn modules_and_flags_are_read() {
        let (_guard, root) = tree(&[
            ("sys/module/kvm_amd/refcnt", "1\n"),
            ("sys/module/kvm/refcnt", "2\n"),
            ("proc/cpuinfo", "processor: 0\nflags\t\t: fpu svm lm\n"),
        ]);
        assert_eq!(
            root.modules_matching(|name| name.starts_with("kvm_")),
            ["kvm_amd"]
        );
        assert_eq!(root.cpu_flags(), ["fpu", "svm", "lm"]);
    }
}
