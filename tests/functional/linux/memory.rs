//! Memory that a Linux guest gives back and gets, with the drivers of an unmodified kernel.

use casemate_tests::{Running, Vm, exit};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::guest::{Guest, linux};

/// What the guest loads.
const DRIVERS: [&str; 4] = ["virtio_mmio", "virtio_pci", "virtio_balloon", "virtio_mem"];

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

/// A machine of 256 MiB with `section` of the config, whose init loads the drivers and runs `script`.
fn start(section: &str, device: Value, script: &str) -> Guest {
    start_on(section, device, script, |vm| vm)
}

/// The same, changed by `transport`.
fn start_on(section: &str, device: Value, script: &str, transport: fn(Vm) -> Vm) -> Guest {
    let args = "memhp_default_state=online_movable";
    let vm = linux(args, &DRIVERS, script, &[])
        .set("/machine-config/mem_size_mib", json!(256))
        .set(section, device)
        .served();
    let vm = transport(vm);
    let running = Running::start(vm.command().unwrap(), None).unwrap();
    let guest = Guest::new(running, vm);
    guest.says("total");
    guest
}

/// The guest's memory at first, in MiB.
fn total(guest: &Guest) -> u64 {
    let line = guest.says("total");
    line.trim().rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_guest_gets_256_mib_more_and_gives_them_back_on_mmio() {
    memory_comes_and_goes(|vm| vm);
}

#[test]
fn a_guest_gets_256_mib_more_and_gives_them_back_on_pci() {
    memory_comes_and_goes(Vm::pci);
}

fn memory_comes_and_goes(transport: fn(Vm) -> Vm) {
    let hotplug = json!({ "total_size_mib": 512 });
    let mut guest = start_on("/memory-hotplug", hotplug, WATCH, transport);
    let size = |size: u64| move |status: &Value| status["plugged_size_mib"] == size;
    let before = total(&guest);
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
    guest.vm.signal(Signal::SIGKILL).unwrap();
}

#[test]
fn a_balloon_takes_what_it_is_told_and_tells_of_it() {
    let balloon =
        json!({ "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1 });
    let mut guest = start("/balloon", balloon, WATCH);
    let before = total(&guest);
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
    guest.vm.signal(Signal::SIGKILL).unwrap();
}

/// The balloon has almost everything; a program that needs 100 MiB gets them out of it.
#[test]
fn a_balloon_gives_way_before_a_process_is_killed() {
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 });
    let script = "echo total > /dev/console; read go < /dev/console; mkdir -p /t; mount -t tmpfs -o size=200m t /t; \
                  head -c 100m /dev/zero > /t/file && echo took $(wc -c < /t/file) > /dev/console; \
                  read go < /dev/console; reboot -f";
    let mut guest = start("/balloon", balloon, script);
    guest.patch("/balloon", &json!({ "amount_mib": 150 }));
    guest.wait_until("/balloon/statistics", |told| told["actual_mib"] == 150);
    guest.vm.write(b"\n").unwrap();
    guest.vm.wait_for_line("took 104857600").unwrap();
    let told = guest.get("/balloon/statistics");
    assert!(told["actual_mib"].as_u64().unwrap() < 150, "{told}");
    guest.vm.write(b"\n").unwrap();
    assert_eq!(guest.vm.wait().unwrap().code, exit::GUEST_RESET);
}
