//! Memory that a Linux guest gives back and gets, with the drivers of an unmodified kernel.

use std::path::Path;
use std::process::Command;

use casemate_tests::{ApiClient, Running, Vm, bin, exit, kernel_file, packaged_kernel};
use serde_json::{Value, json};

use crate::vmm::busybox_initrd;

/// The modules that the guest loads, in this order.
const MODULES: [&str; 5] = [
    "virtio",
    "virtio_ring",
    "virtio_mmio",
    "virtio_balloon",
    "virtio_mem",
];

/// What the guest says: its memory in MiB, looked at once a second, whenever it changes.
const WATCH: &str = r#"
    last=
    while :; do
        while read name size _; do [ $name = MemTotal: ] && now=$((size / 1024)); done < /proc/meminfo
        if [ -z "$last" ]; then first=$now; elif [ $now != $last ] && [ $now = $first ]; then echo "as at first" > /dev/console; fi
        [ "$now" = "$last" ] || echo "total $now" > /dev/console
        last=$now
        sleep 1
    done
"#;

struct Guest {
    vm: Running,
    /// Its directory, with the socket in it.
    _files: Vm,
    client: ApiClient,
}

impl Guest {
    /// A machine of 256 MiB with `section` of the config, whose init loads the drivers and runs `script`.
    fn start(section: &str, device: Value, script: &str) -> Self {
        let args = "console=ttyS0 panic=-1 quiet rdinit=/init memhp_default_state=online_movable";
        let vm = Vm::kernel(&kernel_file("cloud"), args).unjailed();
        let initrd = vm.path("initrd");
        modules(&vm.path("initrd-root/modules"));
        let load = MODULES.map(|name| format!("insmod /modules/{name}.ko\n"));
        let init = format!(
            "#!/bin/sh\n/bin/busybox --install -s /bin\nmkdir /proc /sys; mount -t proc p /proc; \
             mount -t sysfs s /sys; mount -t devtmpfs d /dev\n{}{script}",
            load.concat()
        );
        busybox_initrd(vm.dir(), &initrd, &init);
        let vm = vm
            .set("/boot-source/initrd_path", json!(initrd))
            .set("/machine-config/mem_size_mib", json!(256))
            .set(section, device);
        let config = vm.path("c.json");
        std::fs::write(&config, vm.config().to_string()).unwrap();
        let socket = vm.api_path();
        let mut command = Command::new(bin("casemate-vmm"));
        command.arg("--config-file").arg(config);
        command.arg("--api-sock").arg(&socket);
        let running = Running::start(command, None).unwrap();
        let client = ApiClient::connect(&socket).unwrap();
        running.wait_for_line("total").unwrap();
        Self {
            vm: running,
            _files: vm,
            client,
        }
    }

    fn get(&mut self, path: &str) -> Value {
        let answer = self.client.ask("GET", path, &Value::Null).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    }

    fn patch(&mut self, path: &str, body: &Value) {
        self.client.ask("PATCH", path, body).unwrap().assert_done();
    }

    /// Asks until `path` shows what is wanted.
    fn wait_until(&mut self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
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

    /// The guest's memory at first, in MiB.
    fn total(&self) -> u64 {
        let line = self.vm.wait_for_line("total").unwrap();
        line.trim().rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// The drivers, out of the distribution's package.
fn modules(to: &Path) {
    let packages = packaged_kernel();
    let packages = packages.parent().and_then(Path::parent).unwrap();
    let packages = packages.join("kernels").read_dir().unwrap();
    let mut packages = packages.map(|entry| entry.unwrap().path());
    let package = packages.find(|path| {
        let name = path.to_string_lossy();
        name.contains("cloud") && name.ends_with(".deb")
    });
    std::fs::create_dir_all(to).unwrap();
    let script = r#"dpkg-deb --fsys-tarfile "$0" | tar -x -C "$1" --strip-components 7 --wildcards '*/drivers/virtio/*.ko'"#;
    let unpacked = Command::new("sh")
        .args(["-c", script])
        .args([&package.unwrap(), to])
        .output()
        .unwrap();
    assert!(unpacked.status.success(), "{unpacked:?}");
}

#[test]
fn a_guest_gets_256_mib_more_and_gives_them_back() {
    let hotplug = json!({ "total_size_mib": 512 });
    let mut guest = Guest::start("/memory-hotplug", hotplug, WATCH);
    let size = |size: u64| move |status: &Value| status["plugged_size_mib"] == size;
    let before = guest.total();
    guest.patch("/hotplug/memory", &json!({ "requested_size_mib": 256 }));
    let status = guest.wait_until("/hotplug/memory", size(256));
    assert_eq!(
        status,
        json!({ "total_size_mib": 512, "slot_size_mib": 128, "block_size_mib": 2,
                "plugged_size_mib": 256, "requested_size_mib": 256 })
    );
    let grown = before + 256;
    guest.vm.wait_for_line(&format!("total {grown}")).unwrap();
    guest.patch("/hotplug/memory", &json!({ "requested_size_mib": 0 }));
    guest.wait_until("/hotplug/memory", size(0));
    guest.vm.wait_for_line("as at first").unwrap();
    guest.vm.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn a_balloon_takes_what_it_is_told_and_tells_of_it() {
    let balloon =
        json!({ "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1 });
    let mut guest = Guest::start("/balloon", balloon, WATCH);
    let before = guest.total();
    let told = guest.wait_until("/balloon/statistics", |told| told["total_memory"].is_u64());
    assert_eq!(
        told["total_memory"].as_u64().unwrap() >> 20,
        before,
        "{told}"
    );
    guest.patch("/balloon", &json!({ "amount_mib": 64 }));
    let told = guest.wait_until("/balloon/statistics", |told| told["actual_mib"] == 64);
    assert_eq!(told["target_pages"], 64 * 256, "{told}");
    let less = before - 64;
    guest.vm.wait_for_line(&format!("total {less}")).unwrap();
    guest.wait_until("/balloon/statistics", |told| {
        told["total_memory"].as_u64().unwrap() >> 20 == less
    });
    guest.patch("/balloon", &json!({ "amount_mib": 0 }));
    guest.wait_until("/balloon/statistics", |told| told["actual_mib"] == 0);
    guest.vm.wait_for_line("as at first").unwrap();
    guest.vm.signal(nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// The balloon has almost everything; a program that needs 100 MiB gets them out of it.
#[test]
fn a_balloon_gives_way_before_a_process_is_killed() {
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 });
    let script = "echo total > /dev/console; read go < /dev/console; mkdir -p /t; mount -t tmpfs -o size=200m t /t; \
                  head -c 100m /dev/zero > /t/file && echo took $(wc -c < /t/file) > /dev/console; \
                  read go < /dev/console; reboot -f";
    let mut guest = Guest::start("/balloon", balloon, script);
    guest.patch("/balloon", &json!({ "amount_mib": 150 }));
    guest.wait_until("/balloon/statistics", |told| told["actual_mib"] == 150);
    guest.vm.write(b"\n").unwrap();
    guest.vm.wait_for_line("took 104857600").unwrap();
    let told = guest.get("/balloon/statistics");
    assert!(told["actual_mib"].as_u64().unwrap() < 150, "{told}");
    guest.vm.write(b"\n").unwrap();
    assert_eq!(guest.vm.wait().unwrap().code, exit::GUEST_RESET);
}
