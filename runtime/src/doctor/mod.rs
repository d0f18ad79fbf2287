//! `casemate doctor`: what this host offers, what it means and how to mend it.
//!
//! Everything is measured or read from the kernel now; nothing is taken from a version number.

mod host;
mod kernel;
mod kvm;
mod kvm_probe;
mod memory;
mod tools;

use std::io::Write;

use serde::Serialize;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Good,
    /// Works, and could be better or safer.
    Note,
    /// A wall or a feature is missing.
    Bad,
}

/// One line of the report.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub subject: &'static str,
    /// How good it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What it means for machines on this host.
    pub meaning: String,
    /// What to do about it, when there is something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    fn new(subject: &'static str, level: Level, found: impl Into<String>, meaning: &str) -> Self {
        Self {
            subject,
            level,
            found: found.into(),
            meaning: meaning.to_string(),
            mend: None,
        }
    }

    fn mend(mut self, how: &str) -> Self {
        self.mend = Some(how.to_string());
        self
    }
}

/// The whole report.
#[derive(Debug, Serialize)]
pub struct Report {
    kvm: kvm::KvmFacts,
    landlock: kernel::LandlockFacts,
    cgroup: kernel::CgroupFacts,
    namespaces: Vec<String>,
    seccomp: bool,
    userfaultfd: bool,
    memory: memory::MemoryFacts,
    cpu: host::CpuFacts,
    tools: tools::ToolFacts,
    /// Each line for a person, in the order of the text report.
    findings: Vec<Finding>,
}

impl Report {
    /// Looks at this host.
    pub fn collect() -> Self {
        let mut findings = Vec::new();
        let root = host::Root::default();
        let kvm = kvm::collect(&root, &mut findings);
        let landlock = kernel::landlock(&mut findings);
        let seccomp = kernel::seccomp(&root, &mut findings);
        let namespaces = kernel::namespaces(&root, &mut findings);
        let cgroup = kernel::cgroup(&root, &mut findings);
        let userfaultfd = kernel::userfaultfd(&root, &mut findings);
        let tools = tools::collect(&root, &mut findings);
        let memory = memory::collect(&root, &mut findings);
        let cpu = host::cpu(&root, host::has_core_scheduling(), &mut findings);
        Self {
            kvm,
            landlock,
            cgroup,
            namespaces,
            seccomp,
            userfaultfd,
            memory,
            cpu,
            tools,
            findings,
        }
    }
}

/// Prints the report. It is not a test: the exit code is 0 whatever was found.
pub fn run(json: bool) -> std::io::Result<()> {
    let report = Report::collect();
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        return writeln!(out);
    }
    for finding in &report.findings {
        let mark = match finding.level {
            Level::Good => "ok  ",
            Level::Note => "note",
            Level::Bad => "BAD ",
        };
        writeln!(out, "{mark} {:<22} {}", finding.subject, finding.found)?;
        writeln!(out, "{:27} {}", "", finding.meaning)?;
        if let Some(mend) = &finding.mend {
            writeln!(out, "{:27} -> {mend}", "")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_good_can_be_mended() {
        // As on a host that has nothing, and on this one.
        let empty = tempfile::tempdir().unwrap();
        let root = host::Root::at(empty.path());
        let mut findings = Report::collect().findings;
        kernel::namespaces(&root, &mut findings);
        kernel::cgroup(&root, &mut findings);
        kernel::userfaultfd(&root, &mut findings);
        memory::collect(&root, &mut findings);
        host::cpu(&root, false, &mut findings);
        let without: Vec<&str> = findings
            .iter()
            .filter(|finding| finding.level != Level::Good && finding.mend.is_none())
            .map(|finding| finding.subject)
            .collect();
        assert_eq!(without, Vec::<&str>::new());
    }
}
