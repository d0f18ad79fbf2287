//! A Linux guest without an agent: the distribution's kernel and modules, busybox, and a script for its process 1.

use std::path::Path;

use casemate_tests::{ApiAnswer, ApiClient, Running, Vm, kernel_file, modules};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::vmm::busybox_initrd;

/// Where the guest keeps its hands off: what every script starts with.
const PRELUDE: &str = "#!/bin/sh
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /tmp /mnt; mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
";

/// A machine whose init loads the modules `drivers`, and what they depend on, and runs `script`. `tools` are programs that it finds in /bin.
pub fn linux(args: &str, drivers: &[&str], script: &str, tools: &[&Path]) -> Vm {
    let args = format!("console=ttyS0 panic=-1 quiet rdinit=/init {args}");
    let vm = Vm::kernel(&kernel_file("cloud"), &args);
    let initrd = vm.path("initrd");
    let root = vm.path("initrd-root");
    for name in ["modules", "bin"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    for tool in tools {
        std::fs::copy(tool, root.join("bin").join(tool.file_name().unwrap())).unwrap();
    }
    let mut init = PRELUDE.to_owned();
    for module in modules(drivers).unwrap() {
        let name = module.file_name().unwrap().to_str().unwrap();
        std::fs::copy(&module, root.join("modules").join(name)).unwrap();
        init.push_str(&format!("insmod /modules/{name} || echo no {name}\n"));
    }
    init.push_str(script);
    busybox_initrd(vm.dir(), &initrd, &init);
    let path = initrd.to_str().unwrap();
    vm.set("/boot-source/initrd_path", json!(path))
        .jailer_arg("--grant-ro")
        .jailer_arg(path)
}

/// A running machine, and a client of its API.
pub struct Guest {
    pub vm: Running,
    client: ApiClient,
    /// Its directory, with the socket in it.
    pub files: Vm,
}

impl Guest {
    /// Of `running`, which was started by `files.served().command()`.
    pub fn new(running: Running, files: Vm) -> Self {
        let client = ApiClient::connect(&files.api_path()).unwrap();
        Self {
            vm: running,
            client,
            files,
        }
    }

    /// Waits for a line of the guest's.
    #[track_caller]
    pub fn says(&self, words: &str) -> String {
        let line = self.vm.wait_for_line(words);
        line.unwrap_or_else(|error| panic!("{error:#}"))
    }

    #[track_caller]
    pub fn ask(&mut self, method: &str, path: &str, body: &Value) -> ApiAnswer {
        let answer = self.client.ask(method, path, body);
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error:#}: {}", self.vm.said()))
    }

    #[track_caller]
    pub fn get(&mut self, path: &str) -> Value {
        let answer = self.ask("GET", path, &Value::Null);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    }

    #[track_caller]
    pub fn patch(&mut self, path: &str, body: &Value) {
        self.ask("PATCH", path, body).assert_done();
    }

    /// Asks until `path` shows what is wanted.
    #[track_caller]
    pub fn wait_until(&mut self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let start = std::time::Instant::now();
        loop {
            let found = self.get(path);
            if wanted(&found) {
                return found;
            }
            assert!(start.elapsed().as_secs() < 120, "{path}: {found}");
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }
    /// Ends a guest that does not by itself.
    pub fn kill(self) {
        self.vm.signal(Signal::SIGKILL).unwrap();
        self.vm.wait().unwrap();
    }
}
