//! Whether `/dev/kvm` runs guests, and how.

use std::io::ErrorKind;

use kvm_ioctls::Kvm;
use serde::Serialize;

use super::host::Root;
use super::kvm_probe::{self, API_VERSION};
use super::{Finding, Level};

/// How a guest's kernel mode runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestMode {
    /// By the processor.
    Native,
    /// By an interpreter in the host's kernel: no Linux guests.
    Emulated,
    /// Not at all.
    Absent,
}

/// What was found out about KVM.
#[derive(Debug, Serialize)]
pub struct KvmFacts {
    /// `/dev/kvm` opens and speaks the one API.
    pub usable: bool,
    /// How kernel mode runs, measured.
    pub guest_mode: GuestMode,
    /// Nanoseconds per turn of a loop of two instructions in ring 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ring0_ns_per_turn: Option<f64>,
    /// The vendor modules that are loaded.
    pub modules: Vec<String>,
    /// Why it is not usable or could not be measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Opens, asks, measures.
pub fn collect(root: &Root, findings: &mut Vec<Finding>) -> KvmFacts {
    let modules = root.modules_matching(|name| name.starts_with("kvm_"));
    let mut facts = KvmFacts {
        usable: false,
        guest_mode: GuestMode::Absent,
        ring0_ns_per_turn: None,
        modules,
        error: None,
    };
    let opened = Kvm::new().map_err(|error| std::io::Error::from_raw_os_error(error.errno()));
    let kvm = match opened {
        Ok(kvm) => kvm,
        Err(error) => {
            findings.push(cannot_open(root, &error));
            facts.error = Some(error.to_string());
            return facts;
        }
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let found = format!("/dev/kvm speaks API version {version}, not {API_VERSION}");
        findings.push(Finding::new(
            "KVM",
            Level::Bad,
            found.clone(),
            "This is not the KVM of a Linux of this age.",
        ).mend("a kernel of Linux 2.6.22 or later with its own kvm module, and nothing else at /dev/kvm"));
        facts.error = Some(found);
        return facts;
    }
    facts.usable = true;
    let names = if facts.modules.is_empty() {
        "built into the kernel".to_string()
    } else {
        facts.modules.join(", ")
    };
    findings.push(Finding::new(
        "KVM",
        Level::Good,
        format!("usable ({names})"),
        "Machines can be made.",
    ));

    match kvm_probe::time_per_turn(&kvm) {
        Ok(time) => {
            let nanoseconds = time.as_secs_f64() * 1e9;
            facts.ring0_ns_per_turn = Some(nanoseconds);
            let native = kvm_probe::is_native(time);
            facts.guest_mode = if native {
                GuestMode::Native
            } else {
                GuestMode::Emulated
            };
            findings.push(if native {
                Finding::new(
                    "guest kernel mode",
                    Level::Good,
                    format!("native ({nanoseconds:.1} ns a turn)"),
                    "Linux guests run at full speed.",
                )
            } else {
                emulated(&format!("emulated ({nanoseconds:.0} ns a turn)"))
            });
        }
        Err(error) => {
            facts.guest_mode = GuestMode::Emulated;
            facts.error = Some(error.to_string());
            findings.push(emulated(&format!("not measurable: {error}")));
        }
    }
    facts
}

fn emulated(found: &str) -> Finding {
    Finding::new(
        "guest kernel mode",
        Level::Bad,
        found,
        "The host interprets guest kernels: Linux does not boot; bare-metal guests that stay in ring 3 run well.",
    )
    .mend("enable nested virtualization for this virtual machine, or use a host with VMX or SVM; tests: `cargo xtask lab`")
}

fn cannot_open(root: &Root, error: &std::io::Error) -> Finding {
    let meaning = "No machine can be made.";
    match error.kind() {
        ErrorKind::PermissionDenied => Finding::new(
            "KVM",
            Level::Bad,
            "/dev/kvm: no permission",
            meaning,
        )
        .mend(
            "run as root, or join the group of /dev/kvm: `usermod -aG kvm USER` and log in again",
        ),
        ErrorKind::NotFound => {
            let flags = root.cpu_flags();
            let has = |flag: &str| flags.iter().any(|present| present == flag);
            let mend = if has("vmx") {
                "modprobe kvm_intel"
            } else if has("svm") {
                "modprobe kvm_amd"
            } else {
                "the processor shows neither VMX nor SVM: enable virtualization in the firmware, or nested \
                 virtualization for this virtual machine"
            };
            Finding::new("KVM", Level::Bad, "/dev/kvm does not exist", meaning).mend(mend)
        }
        _ => Finding::new("KVM", Level::Bad, format!("/dev/kvm: {error}"), meaning)
            .mend("look for `kvm` in the kernel's log (dmesg)"),
    }
}
