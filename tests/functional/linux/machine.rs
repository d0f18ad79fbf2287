//! What the guest finds: processors, memory, ACPI devices, its root file system.

use casemate_tests::Casemate;

#[test]
fn the_guest_is_what_was_asked_for() {
    let script =
        "uname -s; nproc; grep MemTotal /proc/meminfo; hostname; pwd; echo $COLOUR; exit 7";
    let options = [
        "--cpus",
        "4",
        "--memory",
        "256",
        "--hostname",
        "quarry",
        "--workdir",
        "/tmp",
        "--env",
        "COLOUR=teal",
    ];
    let done = Casemate::new().run(&options, script).unwrap();
    assert_eq!(done.code, 7, "{done:#?}");
    let lines: Vec<&str> = done.stdout.lines().collect();
    let [system, cpus, memory, host, dir, colour] = lines[..] else {
        panic!("{done:#?}");
    };
    assert_eq!(
        (system, cpus, host, dir, colour),
        ("Linux", "4", "quarry", "/tmp", "teal")
    );
    let kib: u64 = memory
        .split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    assert!((180 << 10..=256 << 10).contains(&kib), "{memory}");
}

#[test]
fn a_guest_with_eight_processors() {
    let script = "nproc; cat /sys/devices/system/cpu/online";
    let done = Casemate::new().run(&["--cpus", "8"], script).unwrap();
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (0, "8\n0-7\n"),
        "{done:#?}"
    );
}

#[test]
#[ignore = "full: the generic kernel is large, and takes half a minute in the lab"]
fn the_generic_kernel_boots() {
    let done = Casemate::new()
        .run(&["--kernel", "generic"], "uname -r")
        .unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    assert!(
        done.stdout.trim_end().ends_with("-amd64") && !done.stdout.contains("cloud"),
        "{done:#?}"
    );
}

#[test]
#[ignore = "full: only the generic kernel has this driver, and it takes half a minute in the lab"]
fn a_driver_takes_the_generation_id() {
    let script = "ls /sys/bus/acpi/drivers/vmgenid; grep Reserved /proc/iomem; \
                  dd if=/dev/mem bs=16 skip=64768 count=1 2>/dev/null | od -An -tx8";
    let done = Casemate::new()
        .run(&["--kernel", "generic"], script)
        .unwrap();
    done.assert_line("VMGENCTR:00");
    // The memory of both is kept from the kernel.
    assert!(
        done.stdout.contains("000fd000-000fefff : Reserved\n"),
        "{done:#?}"
    );
    let words: Vec<&str> = done
        .stdout
        .lines()
        .last()
        .unwrap()
        .split_whitespace()
        .collect();
    assert!(
        words.len() == 2
            && words
                .iter()
                .all(|word| word.len() == 16 && !word.trim_matches('0').is_empty()),
        "no random number there: {done:#?}"
    );
}

#[test]
fn acpi_names_the_devices() {
    let script = "ls /sys/bus/acpi/devices; grep -o 'virtio_mmio.device' /proc/cmdline; \
                  cat /sys/class/tty/ttyS0/type; ls /sys/bus/virtio/devices";
    let done = Casemate::new().run(&[], script).unwrap();
    // Virtio windows, serial port, keyboard controller, power button, generic event device.
    for id in [
        "LNRO0005:00",
        "PNP0501:00",
        "PNP0303:00",
        "PNP0C0C:00",
        "ACPI0013:00",
        "VMGENCTR:00",
        "AMZNC10C:00",
    ] {
        done.assert_line(id);
    }
    done.assert_line("virtio0");
    // A 16550A was found there.
    done.assert_line("4");
    assert!(
        !done.stdout.contains("virtio_mmio.device"),
        "named twice: {done:#?}"
    );
}

/// The virtio console once there is a driver; the serial port is for what comes before, and says nothing twice.
#[test]
fn the_console_is_virtio_s() {
    let script = "cat /proc/consoles; echo '<1>said of hvc0' > /dev/kmsg; sleep 1";
    let done = Casemate::new().run(&["--console"], script).unwrap();
    let consoles: Vec<_> = done
        .stdout
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(consoles, ["hvc0"], "{done:#?}");
    assert_eq!(done.stderr.matches("said of hvc0").count(), 1, "{done:#?}");
}

#[test]
fn the_paravirtual_clock_is_offered() {
    let script = "cd /sys/devices/system/clocksource/clocksource0; cat available_clocksource current_clocksource";
    let done = Casemate::new().run(&[], script).unwrap();
    let lines: Vec<&str> = done.stdout.lines().collect();
    let [available, current] = lines[..] else {
        panic!("{done:#?}");
    };
    let offered = available
        .split_whitespace()
        .any(|clock| clock == "kvm-clock");
    assert!(offered, "{available}");
    assert!(["kvm-clock", "tsc"].contains(&current), "{current}");
}

#[test]
fn each_boot_has_its_own_kernel_addresses() {
    let address = || {
        let done = Casemate::new()
            .run(&[], "grep -m1 ' _text$' /proc/kallsyms")
            .unwrap();
        assert_eq!(done.code, 0, "{done:#?}");
        done.stdout
    };
    // One chance in 470 that two boots agree, one in 220,900 that three do.
    let first = address();
    assert!(
        first != address() || first != address(),
        "no KASLR: {first}"
    );
}

#[test]
fn the_root_can_be_written_and_forgets() {
    let casemate = Casemate::new();
    let done = casemate
        .run(&[], "echo changed > /etc/passwd && cat /etc/passwd")
        .unwrap();
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (0, "changed\n"),
        "{done:#?}"
    );
    let done = casemate.run(&[], "cat /etc/passwd").unwrap();
    assert!(done.stdout.starts_with("root:x:0:0"), "{done:#?}");
}
