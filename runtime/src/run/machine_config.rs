//! The machine config for the VMM, and the jailer's command line: two views of one [`Plan`].
//!
//! In the config, resources have names (`kernel`, `rootfs`, `disk0`); the jailer is told which path each name stands for, and
//! the VMM never learns a path of the host.

use std::ffi::OsString;
use std::path::Path;

use serde_json::{Value, json};

use super::plan::{Plan, Saved};
use super::taps::Tap;
use crate::cgroups::{self, Hierarchies};

/// The vsock device's name: the jailer makes its socket, the broker connects beside it.
pub const VSOCK: &str = "vsock";
/// The metadata's name.
const METADATA: &str = "metadata";
/// File name of that socket in the machine's directory.
pub const VSOCK_SOCKET: &str = "v.sock";
/// The API's socket: a name for the jailer and the VMM, and a file in the machine's directory.
const API: &str = "api";
/// Its file name.
pub const API_SOCKET: &str = "api.sock";
/// What the files of a snapshot are called that a machine may make, and of the one that it goes on from.
pub const SAVED: [&str; 2] = ["saved-state", "saved-memory"];
/// The latter: the state, and the memory.
pub const FROM: [&str; 2] = ["state", "memory"];
/// File names of a snapshot's state and memory.
pub const FILES: [&str; 2] = ["state", "memory"];
/// Most bytes of a state (docs/snapshot-format.md), and what a memory file has beside the memory.
const STATE_BYTES: u64 = 64 << 20;
/// The guest's vsock address. Every machine has its own device, so all may have the same.
const GUEST_CID: u32 = 3;

/// The config in the VMM's (Firecracker's) schema.
pub fn machine_config(plan: &Plan) -> Value {
    let mut boot = json!({ "kernel_image_path": "kernel", "boot_args": plan.cmdline });
    if plan.initrd.is_some() {
        set(&mut boot, "initrd_path", json!("initrd"));
    }
    let drives: Vec<Value> = plan
        .disks
        .iter()
        .map(|disk| {
            json!({
                "drive_id": disk.name,
                "path_on_host": disk.name,
                "is_root_device": false,
                "is_read_only": disk.read_only,
                "cache_type": if disk.durable { "Writeback" } else { "Unsafe" },
            })
        })
        .collect();
    let interfaces: Vec<Value> = plan
        .taps
        .iter()
        .enumerate()
        .map(|(number, tap)| {
            json!({
                "iface_id": format!("net{number}"),
                "host_dev_name": tap.name,
                "queues": tap.queues,
            })
        })
        .collect();
    let mut config = json!({
        "boot-source": boot,
        "machine-config": { "vcpu_count": plan.cpus, "mem_size_mib": plan.memory_mib },
        "drives": drives,
        "network-interfaces": interfaces,
    });
    if plan.metadata.is_some() {
        let cards: Vec<_> = (0..plan.taps.len()).map(|n| format!("net{n}")).collect();
        let service = json!({ "version": "V2", "network_interfaces": cards });
        set(&mut config, "mmds-config", service);
    }
    if let Some(max) = plan.max_cpus
        && let Some(machine) = config.get_mut("machine-config")
    {
        set(machine, "max_vcpu_count", json!(max));
    }
    if plan.spec.is_some() {
        set(
            &mut config,
            "vsock",
            json!({ "guest_cid": GUEST_CID, "uds_path": VSOCK }),
        );
        set(&mut config, "entropy", json!({}));
    }
    if plan.console {
        set(&mut config, "console", json!({}));
    }
    config
}

fn set(object: &mut Value, key: &str, value: Value) {
    if let Some(map) = object.as_object_mut() {
        map.insert(key.to_string(), value);
    }
}

/// The jailer's arguments.
pub fn jailer_arguments(
    plan: &Plan,
    uid: u32,
    config: &Path,
    socket: &Path,
    saved: &Path,
    host: &Hierarchies,
) -> Vec<OsString> {
    let mut args = Arguments(Vec::new());
    args.option("--id", plan.id.as_str());
    args.option("--exec-file", &plan.vmm);
    args.option("--uid", uid.to_string());
    args.option("--gid", uid.to_string());
    args.flag("--new-pid-ns");
    // Should this process be killed, nobody would end the machine.
    args.flag(&format!("--die-with-parent={}", std::process::id()));
    let limits = host.limits(plan.memory_mib, plan.max_cpus.unwrap_or(plan.cpus));
    if !limits.is_empty() {
        args.option("--parent-cgroup", cgroups::PARENT);
    }
    for limit in limits {
        let option = if limit.optional {
            "--cgroup-if-there"
        } else {
            "--cgroup"
        };
        args.option(option, format!("{}={}", limit.file, limit.value));
    }
    match &plan.from {
        Some(Saved { state, memory }) => {
            for (name, path) in FROM.into_iter().zip([state, memory]) {
                args.grant("--grant-ro", name, path);
            }
        }
        None => {
            args.grant("--grant-ro", "config", config);
            args.grant("--grant-ro", "kernel", &plan.kernel);
            if let Some(initrd) = &plan.initrd {
                args.grant("--grant-ro", "initrd", initrd);
            }
        }
    }
    if plan.saveable {
        // These two files and no others, each bounded: it may not fill the host's disk.
        for (name, file) in SAVED.into_iter().zip(FILES) {
            args.grant("--allow-create", name, &saved.join(file));
        }
        args.option("--resource-limit", format!("fsize={}", largest_file(plan)));
    }
    for disk in &plan.disks {
        let option = if disk.read_only {
            "--grant-ro"
        } else {
            "--grant-rw"
        };
        args.grant(option, &disk.name, &disk.path);
    }
    for tap in &plan.taps {
        let Tap {
            name,
            interface,
            queues,
        } = tap;
        args.option("--grant-tap", format!("{name}={interface}:{queues}"));
    }
    if let Some(metadata) = &plan.metadata {
        args.grant("--grant-ro", METADATA, metadata);
    }
    if let Some(netns) = &plan.netns {
        args.option("--netns", netns);
    }
    if plan.spec.is_some() {
        args.grant("--grant-listen", VSOCK, socket);
    }
    // Only where there is something to ask of the running machine.
    if plan.has_api() {
        args.grant("--grant-api", API, &socket.with_file_name(API_SOCKET));
    }
    if plan.allow_missing_landlock {
        args.flag("--allow-missing=landlock");
    }
    args.flag("--");
    match plan.has_api() {
        true => args.option("--api-sock", API),
        false => args.flag("--no-api"),
    }
    if plan.from.is_none() {
        args.option("--config-file", "config");
    }
    args.option("--level", "warn");
    if plan.metadata.is_some() {
        args.option("--metadata", METADATA);
    }
    args.0
}

/// The size of the largest file that it writes, in bytes: a disk, or its memory in a snapshot.
fn largest_file(plan: &Plan) -> u64 {
    let disks = plan.disks.iter().filter(|disk| !disk.read_only);
    let disks = disks.filter_map(|disk| std::fs::metadata(&disk.path).ok());
    let memory = (plan.memory_mib << 20).saturating_add(STATE_BYTES);
    disks.map(|disk| disk.len()).fold(memory, u64::max)
}

struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) {
        self.0.push(name.into());
        self.0.push(value.as_ref().to_os_string());
    }

    fn grant(&mut self, option: &str, name: &str, path: &Path) {
        let mut value = OsString::from(format!("{name}="));
        value.push(path);
        self.option(option, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::plan::Disk;

    fn plan() -> Plan {
        Plan {
            id: "m1".parse().unwrap(),
            vmm: "/x/casemate-vmm".into(),
            jailer: "/x/casemate-jailer".into(),
            kernel: "/k/vmlinux".into(),
            kernel_name: "k".into(),
            initrd: Some("/k/initrd".into()),
            cmdline: "console=ttyS0".into(),
            console: true,
            disks: vec![
                Disk {
                    name: "rootfs".into(),
                    path: "/cache/r.erofs".into(),
                    read_only: true,
                    durable: false,
                },
                Disk {
                    name: "disk0".into(),
                    path: "/data/d".into(),
                    read_only: false,
                    durable: true,
                },
            ],
            taps: vec![Tap {
                name: "tap7".into(),
                interface: "tap7".into(),
                queues: 2,
            }],
            metadata: Some("/m.json".into()),
            netns: None,
            cpus: 2,
            max_cpus: None,
            memory_mib: 256,
            spec: Some(Default::default()),
            from: None,
            saveable: false,
            allow_missing_landlock: false,
            allow_missing_cgroup: false,
        }
    }

    fn words(plan: &Plan) -> String {
        let (config, socket) = (Path::new("/s/config.json"), Path::new("/s/v.sock"));
        let hierarchies = Hierarchies::default();
        let args = jailer_arguments(plan, 1, config, socket, Path::new("/d"), &hierarchies);
        let args: Vec<_> = args.iter().map(|word| word.to_string_lossy()).collect();
        args.join(" ")
    }

    #[test]
    fn every_name_in_the_config_is_granted() {
        let plan = plan();
        let config = machine_config(&plan);
        let args = jailer_arguments(
            &plan,
            900_000,
            Path::new("/s/config.json"),
            Path::new("/s/v.sock"),
            Path::new("/d"),
            &Hierarchies::default(),
        );
        let args: Vec<_> = args.iter().map(|word| word.to_str().unwrap()).collect();
        let after = |option: &str, value: &str| args.windows(2).any(|pair| pair == [option, value]);
        assert!(after("--grant-ro", "rootfs=/cache/r.erofs"));
        assert!(after("--grant-rw", "disk0=/data/d"));
        assert!(after("--grant-ro", "kernel=/k/vmlinux"));
        assert!(after("--grant-ro", "initrd=/k/initrd"));
        assert!(after("--grant-ro", "config=/s/config.json"));
        assert!(after("--grant-tap", "tap7=tap7:2"));
        assert!(after("--grant-ro", "metadata=/m.json"));
        assert!(after("--metadata", "metadata"));
        assert!(after("--grant-listen", "vsock=/s/v.sock"));
        assert!(after("--uid", "900000") && after("--gid", "900000"));
        assert_eq!(config["drives"][0]["path_on_host"], "rootfs");
        assert_eq!(config["drives"][0]["is_read_only"], true);
        assert_eq!(config["drives"][1]["cache_type"], "Writeback");
        assert_eq!(config["network-interfaces"][0]["host_dev_name"], "tap7");
        assert_eq!(config["network-interfaces"][0]["queues"], 2);
        assert_eq!(config["mmds-config"]["network_interfaces"][0], "net0");
        assert_eq!(config["vsock"]["uds_path"], "vsock");
        assert_eq!(config["console"], json!({}));
        assert!(
            !config.to_string().contains("/cache"),
            "the VMM learns no path"
        );
    }

    #[test]
    fn a_machine_may_grow() {
        let grows = Plan {
            max_cpus: Some(4),
            ..plan()
        };
        assert_eq!(
            machine_config(&grows)["machine-config"],
            json!({ "vcpu_count": 2, "max_vcpu_count": 4, "mem_size_mib": 256 })
        );
        let said = words(&grows);
        assert!(said.contains("--grant-api api=/s/api.sock"), "{said}");
        assert!(said.contains("-- --api-sock api --config-file"), "{said}");
        let said = words(&plan());
        assert!(said.contains("-- --no-api --config-file"), "{said}");
    }

    #[test]
    fn a_machine_that_can_be_saved_makes_two_bounded_files() {
        let plan = Plan {
            saveable: true,
            ..plan()
        };
        let said = words(&plan);
        let grants = "--allow-create saved-state=/d/state --allow-create saved-memory=/d/memory";
        assert!(said.contains(grants), "{said}");
        let limit = (256 + 64) << 20;
        let limit = format!("--resource-limit fsize={limit}");
        assert!(said.contains(&limit), "{said}");
        assert!(said.contains("-- --api-sock api"), "{said}");
    }

    #[test]
    fn a_machine_that_goes_on_reads_its_snapshot() {
        let tap = Tap {
            name: "tap7".into(),
            interface: "tap8".into(),
            queues: 1,
        };
        let plan = Plan {
            from: Some(Saved {
                state: "/sn/state".into(),
                memory: "/sn/memory".into(),
            }),
            taps: vec![tap],
            ..plan()
        };
        let said = words(&plan);
        let grants = "--grant-ro state=/sn/state --grant-ro memory=/sn/memory --grant-ro rootfs=";
        assert!(said.contains(grants), "{said}");
        assert!(said.contains("--grant-tap tap7=tap8:1"), "{said}");
        assert!(said.contains("-- --api-sock api --level warn"), "{said}");
        assert!(
            !said.contains("kernel=") && !said.contains("config"),
            "{said}"
        );
    }

    #[test]
    fn a_bare_kernel_has_no_socket() {
        let plan = Plan {
            spec: None,
            initrd: None,
            console: false,
            ..plan()
        };
        let config = machine_config(&plan);
        assert!(
            config.get("vsock").is_none() && config["boot-source"].get("initrd_path").is_none()
        );
        assert!(config.get("console").is_none());
    }
}
