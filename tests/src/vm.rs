//! A microVM to be: its machine config, and whether it runs in a jail.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::leftovers;
use crate::process::{Finished, Running};
use crate::unique_id;

/// A uid and gid that no account and no other test's VM has: what is left of a VM can be told by it.
pub(crate) fn unique_uid() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed) % 1024;
    // Above those of `Casemate`.
    200_000_000 + (std::process::id() % 100_000) * 1024 + number
}

/// Where the programs under test are: `CASEMATE_BIN_DIR`, or where `cargo xtask build` puts them.
pub fn bin_dir() -> PathBuf {
    std::env::var_os("CASEMATE_BIN_DIR").map_or_else(
        || {
            let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
            let project = tests.parent().unwrap_or(tests);
            project.join("target/x86_64-unknown-linux-gnu/release")
        },
        PathBuf::from,
    )
}

/// One program under test.
pub fn bin(name: &str) -> PathBuf {
    bin_dir().join(name)
}

/// Who configures the machine.
#[derive(Clone, Copy, PartialEq)]
enum Api {
    /// The config file, and nobody afterwards.
    None,
    /// The config file; clients of the API afterwards.
    Afterwards,
    /// Clients of the API.
    Alone,
}

/// A microVM to be.
pub struct Vm {
    dir: TempDir,
    config: Value,
    jailed: bool,
    /// The VMM.
    program: &'static str,
    api: Api,
    id: String,
    uid: u32,
    grants: Vec<(&'static str, String)>,
    jailer_args: Vec<String>,
    vmm_args: Vec<String>,
}

impl Vm {
    /// The probe guest with `task` on its command line: one vCPU, 128 MiB, in the jail.
    pub fn probe(task: &str) -> Self {
        Self::kernel(&bin("casemate-probe"), &format!("{task} acpi=off"))
    }

    /// A guest of `kernel` with the command line `args`: one vCPU, 128 MiB, in the jail.
    #[track_caller]
    pub fn kernel(kernel: &Path, args: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("casemate-test-").tempdir();
        // A harness without a directory has nothing to test with.
        let dir = dir.unwrap_or_else(|error| panic!("no temporary directory: {error}"));
        // The jailed VM's uid must be able to reach the sockets in it.
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap_or_else(|error| panic!("{error}"));
        let kernel = kernel.to_string_lossy().into_owned();
        Self {
            config: json!({
                "boot-source": { "kernel_image_path": kernel, "boot_args": args },
                "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
            }),
            dir,
            jailed: true,
            program: "casemate-vmm",
            api: Api::None,
            id: unique_id("test"),
            uid: unique_uid(),
            grants: vec![("--grant-ro", kernel)],
            jailer_args: Vec::new(),
            vmm_args: Vec::new(),
        }
    }

    /// With the virtio devices on a PCI bus instead of in MMIO windows.
    #[must_use]
    pub fn pci(self) -> Self {
        self.vmm_arg("--enable-pci")
    }

    /// Without the jailer: the VMM opens its own files.
    #[must_use]
    pub fn unjailed(mut self) -> Self {
        self.jailed = false;
        self
    }

    /// With the API on [`Vm::api_path`] and no config file: its clients configure it.
    #[must_use]
    pub fn api(mut self) -> Self {
        self.api = Api::Alone;
        self
    }

    /// Started by its config file, and with the API on [`Vm::api_path`] from then on.
    #[must_use]
    pub fn served(mut self) -> Self {
        self.api = Api::Afterwards;
        self
    }

    /// With one more file that may be read and written, for requests to name.
    #[must_use]
    pub fn may_open(mut self, path: &Path) -> Self {
        let path = path.to_string_lossy().into_owned();
        self.grants.push(("--grant-rw", path));
        self
    }

    /// The API's socket.
    pub fn api_path(&self) -> PathBuf {
        self.path("api.sock")
    }

    /// What would be in the config file.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Changes the machine config: `pointer` as in RFC 6901.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap_or(("", pointer));
        if let Some(object) = self
            .config
            .pointer_mut(parent)
            .and_then(Value::as_object_mut)
        {
            object.insert(key.to_owned(), value);
        }
        self
    }

    /// Adds a drive.
    #[must_use]
    pub fn drive(mut self, id: &str, path: &Path, read_only: bool) -> Self {
        let path = path.to_string_lossy().into_owned();
        self.push(
            "drives",
            json!({ "drive_id": id, "path_on_host": path, "is_root_device": false,
                    "is_read_only": read_only, "cache_type": "Writeback" }),
        );
        self.grants.push((
            if read_only {
                "--grant-ro"
            } else {
                "--grant-rw"
            },
            path,
        ));
        self
    }

    /// Has the writes to the drive that was added last go to `layer`, `size_mib` of them at most.
    #[must_use]
    pub fn layer(mut self, layer: &Path, size_mib: u64) -> Self {
        let path = layer.to_string_lossy().into_owned();
        let last = self.config["drives"].as_array_mut();
        if let Some(drive) = last.and_then(|drives| drives.last_mut()) {
            drive["is_read_only"] = json!(false);
            drive["copy_on_write"] = json!({ "path_on_host": path, "size_mib": size_mib });
        }
        self.grants.push(("--grant-rw", path));
        self
    }

    /// Adds persistent memory.
    #[must_use]
    pub fn pmem(mut self, id: &str, path: &Path, read_only: bool) -> Self {
        let path = path.to_string_lossy().into_owned();
        self.push(
            "pmem",
            json!({ "id": id, "path_on_host": path, "read_only": read_only }),
        );
        let grant = if read_only {
            "--grant-ro"
        } else {
            "--grant-rw"
        };
        self.grants.push((grant, path));
        self
    }

    /// Adds `device` to `list`, with the back-end that listens on `socket`.
    #[must_use]
    pub fn back_end(mut self, list: &str, mut device: Value, socket: &Path) -> Self {
        let path = socket.to_string_lossy().into_owned();
        device["socket"] = json!(path);
        self.push(list, device);
        self.grants.push(("--grant-connect", path));
        self
    }

    /// Adds a network interface on the tap `tap`.
    #[must_use]
    pub fn net(mut self, tap: &str, mac: &str) -> Self {
        self.push(
            "network-interfaces",
            json!({ "iface_id": "eth0", "host_dev_name": tap, "guest_mac": mac }),
        );
        self.grants.push(("--grant-tap", tap.to_owned()));
        self
    }

    /// Adds a network interface on `queues` queues of the tap `tap`.
    #[must_use]
    pub fn net_with_queues(mut self, tap: &str, queues: u8, mac: &str) -> Self {
        self.push(
            "network-interfaces",
            json!({ "iface_id": "eth0", "host_dev_name": tap, "guest_mac": mac, "queues": queues }),
        );
        self.grants.push(("--grant-tap", format!("{tap}:{queues}")));
        self
    }

    /// Adds a vsock device with guest CID 3; its socket is [`Vm::vsock_path`].
    #[must_use]
    pub fn vsock(mut self) -> Self {
        let path = self.vsock_path().to_string_lossy().into_owned();
        self.config["vsock"] = json!({ "guest_cid": 3, "uds_path": path });
        self.grants.push(("--grant-listen", path));
        self
    }

    /// With a VMM that is built with a debugger's stub, which listens on [`Vm::gdb_path`].
    #[must_use]
    pub fn debugged(mut self) -> Self {
        let path = self.gdb_path().to_string_lossy().into_owned();
        self.program = "casemate-vmm-gdb";
        self.grants.push(("--grant-listen", path.clone()));
        self.set("/machine-config/gdb_socket_path", json!(path))
    }

    /// Adds an entropy device.
    #[must_use]
    pub fn entropy(mut self) -> Self {
        self.config["entropy"] = json!({});
        self
    }

    /// Adds a virtio console.
    #[must_use]
    pub fn console(mut self) -> Self {
        self.config["console"] = json!({});
        self
    }

    /// One more flag for the jailer.
    #[must_use]
    pub fn jailer_arg(mut self, arg: &str) -> Self {
        self.jailer_args.push(arg.to_owned());
        self
    }

    /// One more flag for the VMM.
    #[must_use]
    pub fn vmm_arg(mut self, arg: &str) -> Self {
        self.vmm_args.push(arg.to_owned());
        self
    }

    /// With this id instead of one of the harness's.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        id.clone_into(&mut self.id);
        self
    }

    /// The VM's id.
    pub fn name(&self) -> &str {
        &self.id
    }

    /// The test's own directory, gone when the VM is.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A file of the test's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where a debugger connects.
    pub fn gdb_path(&self) -> PathBuf {
        self.path("gdb.sock")
    }

    /// The vsock device's socket.
    pub fn vsock_path(&self) -> PathBuf {
        self.path("v.sock")
    }

    fn push(&mut self, list: &str, item: Value) {
        if let Some(items) = self.config[list].as_array_mut() {
            items.push(item);
        } else {
            self.config[list] = json!([item]);
        }
    }

    /// The command that starts it; the config is written to the test's directory.
    pub fn command(&self) -> Result<Command> {
        let config = self.path("config.json");
        let has_config = self.api != Api::Alone;
        if has_config {
            let text = self.config.to_string();
            std::fs::write(&config, text).context("writing the machine config")?;
        }
        let mut command;
        if self.jailed {
            command = Command::new(bin("casemate-jailer"));
            command.args(["--id", &self.id, "--new-pid-ns", "--exec-file"]);
            command.arg(bin(self.program));
            let uid = self.uid.to_string();
            command.args(["--uid", &uid, "--gid", &uid]);
            for (flag, value) in &self.grants {
                command.args([*flag, value]);
            }
            if has_config {
                let grant = format!("config={}", config.display());
                command.args(["--grant-ro", &grant]);
            }
            command.args(&self.jailer_args);
            command.arg("--");
        } else {
            command = Command::new(bin(self.program));
            command.args(["--id", &self.id]);
        }
        match self.api {
            Api::None => command.arg("--no-api"),
            Api::Afterwards | Api::Alone => command.arg("--api-sock").arg(self.api_path()),
        };
        if has_config {
            let name = if self.jailed {
                Path::new("config")
            } else {
                &config
            };
            command.arg("--config-file").arg(name);
        }
        command.args(&self.vmm_args);
        Ok(command)
    }

    /// Starts it.
    pub fn start(self) -> Result<Running> {
        let command = self.command()?;
        Running::start(command, Some(self.dir))
    }

    /// Starts it, asserts that it is refused with `code` and one line that says `words`, and that nothing is left of
    /// it on the host.
    #[track_caller]
    pub fn assert_refused(self, code: u8, words: &[&str]) {
        match self.command() {
            Ok(command) => self.assert_command_refused(command, code, words),
            Err(error) => panic!("{error:#}"),
        }
    }

    /// The same for a command made of [`Vm::command`].
    #[track_caller]
    pub fn assert_command_refused(&self, command: Command, code: u8, words: &[&str]) {
        let before = leftovers::below(self.dir());
        let done = Running::start(command, None).and_then(Running::wait);
        done.unwrap_or_else(|error| panic!("{error:#}"))
            .assert_refused(code, words);
        assert_eq!(leftovers::below(self.dir()), before, "files were made");
        let mut left = leftovers::cgroups(&self.id);
        left.extend(leftovers::processes(&self.id, self.uid));
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    /// Starts it, and waits for its end.
    pub fn run(self) -> Result<Finished> {
        self.start()?.wait()
    }
}
