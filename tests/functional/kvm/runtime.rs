//! `casemate` as a user drives it, with the bare-metal guest: what works, and what is refused.

use std::fs;
use std::path::Path;

use casemate_tests::{Casemate, Finished, Running, bin, broken_kernels, exit, unique_id};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A command line that makes no sense.
const USAGE: u8 = 2;
/// casemate failed, as container tools have it.
const FAILED: u8 = 125;
const ACPI_OFF: [&str; 2] = ["--append", "acpi=off"];

/// The probe with these options.
#[track_caller]
fn probe(options: &[&str]) -> Finished {
    let options = [&ACPI_OFF, options].concat();
    Casemate::new().run_bare(&bin("casemate-probe"), &options)
}

/// A machine with `id` that idles.
fn idle(casemate: &Casemate, id: &str) -> Running {
    let kernel = bin("casemate-probe");
    let words = ["run", "--bare", "--id", id, "--append", "idle acpi=off"];
    let kernel = ["--kernel", kernel.to_str().unwrap()];
    let run = Running::start(casemate.command(&[&words[..], &kernel].concat()), None).unwrap();
    run.wait_for_line("probe: idle").unwrap();
    run
}

/// Every file and directory below `dir`.
fn tree(dir: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let below = |path: std::path::PathBuf| [vec![path.clone()], tree(&path)].concat();
    entries
        .flatten()
        .flat_map(|entry| below(entry.path()))
        .collect()
}

#[test]
fn a_bare_kernel_gives_the_code_of_its_vmm() {
    for (end, code) in [
        ("poweroff", exit::GUEST_POWERED_OFF),
        ("reset", exit::GUEST_RESET),
        ("crash", exit::GUEST_CRASHED),
    ] {
        let append = format!("acpi=off probe.end={end}");
        let kernel = bin("casemate-probe");
        let done = Casemate::new().run_bare(&kernel, &["--append", &append, "--cpus", "2"]);
        done.assert_line("probe: boot ok");
        assert_eq!(done.code, code, "{end}: {done:#?}");
    }
}

#[test]
fn a_kernel_file_that_is_not_there_or_no_file() {
    for (path, words) in [
        ("/nonexistent/kernel", "No such file"),
        ("/tmp", "not a regular file"),
        ("/dev/null", "not a regular file"),
    ] {
        let done = Casemate::new().run_bare(Path::new(path), &[]);
        done.assert_refused(FAILED, &["--kernel", path, words]);
    }
}

#[test]
fn kernels_that_are_none() {
    let (_dir, kernels) = broken_kernels();
    for kernel in kernels {
        let done = Casemate::new().run_bare(&kernel, &[]);
        done.assert_refused(FAILED, &["kernel"]);
        assert_eq!(done.stdout, "", "{}", kernel.display());
    }
}

#[test]
fn disks_that_are_none() {
    for path in ["/nonexistent/disk", "/tmp", "/dev/null"] {
        probe(&["--disk", path]).assert_refused(FAILED, &["--disk", path]);
    }
}

#[test]
fn processors_and_memory_out_of_range() {
    for (option, value) in [
        ("--cpus", "0"),
        ("--cpus", "33"),
        ("--cpus", "many"),
        ("--memory", "0"),
        ("--memory", "-1"),
        ("--memory", "lots"),
    ] {
        probe(&[&format!("{option}={value}")]).assert_refused(USAGE, &[option, value, "--help"]);
    }
    // More than an address space, and more than this host: a number can be read and not be had.
    let done = probe(&["--memory", "16777216G"]);
    assert!([USAGE, FAILED].contains(&done.code), "{done:#?}");
    assert_eq!(done.stderr.trim_end().lines().count(), 1, "{done:#?}");
}

#[test]
fn options_that_do_not_exist() {
    probe(&["--vcpus", "2"]).assert_refused(USAGE, &["--vcpus", "--help"]);
    let done = Casemate::new().call(&["rum"]).unwrap();
    done.assert_refused(USAGE, &["rum", "--help"]);
}

#[test]
fn ids_that_are_none() {
    let kernel = bin("casemate-probe");
    let kernel = kernel.to_str().unwrap();
    for id in ["", "a/b", "..", "../../etc", "a b", "ä", &"x".repeat(300)] {
        let casemate = Casemate::new();
        let done = casemate.call(&["run", "--bare", "--kernel", kernel, "--id", id]);
        done.unwrap().assert_refused(FAILED, &["--id"]);
        casemate.assert_state_clean();
    }
}

#[test]
fn a_tap_that_does_not_exist() {
    probe(&["--net", "notap0"]).assert_refused(FAILED, &["--net", "notap0"]);
    assert!(!fs::exists("/sys/class/net/notap0").unwrap(), "it was made");
    let done = probe(&["--netns", "/nonexistent/ns"]);
    done.assert_refused(FAILED, &["--netns", "/nonexistent/ns"]);
}

#[test]
fn a_command_that_is_too_long() {
    let long = "x".repeat(100 << 10);
    let variable = format!("LONG={long}");
    for words in [&["--", &long][..], &["--env", &variable, "--", "true"]] {
        let casemate = Casemate::new();
        let done = casemate.call(&[&["run", "--rootfs", "/tmp"], words].concat());
        done.unwrap().assert_refused(FAILED, &["65536"]);
        casemate.assert_state_clean();
    }
}

#[test]
fn two_machines_with_one_id() {
    let casemate = Casemate::new();
    let id = unique_id("twin");
    let first = idle(&casemate, &id);
    let kernel = bin("casemate-probe");
    let words = [
        "run",
        "--bare",
        "--id",
        &id,
        "--kernel",
        kernel.to_str().unwrap(),
    ];
    casemate
        .call(&words)
        .unwrap()
        .assert_refused(FAILED, &[&id]);
    // The first is as it was.
    let listed = casemate.call(&["ps", "--quiet"]).unwrap();
    assert_eq!(listed.stdout.trim(), id);
    first.signal(Signal::SIGTERM).unwrap();
    assert_eq!(first.wait().unwrap().code, exit::by_signal(15));
    casemate.assert_nothing_of(&id);
}

#[test]
fn the_walls_around_an_idle_machine_stand() {
    let casemate = Casemate::new();
    let id = unique_id("walls");
    let run = idle(&casemate, &id);
    let text = casemate.call(&["inspect", "--confinement", &id]).unwrap();
    assert_eq!((text.code, text.stderr.as_str()), (0, ""), "{text:#?}");
    assert!(text.stdout.contains(&id), "{text:#?}");
    assert!(!text.stdout.contains("MISSING"), "{}", text.stdout);

    let done = casemate.call(&["inspect", "--confinement", "--json", &id]);
    let report: Value = serde_json::from_str(&done.unwrap().stdout).unwrap();
    assert_eq!(report["id"], id.as_str());
    let verdicts = report["verdicts"].as_array().unwrap();
    assert!(verdicts.len() >= 8, "{report:#}");
    for verdict in verdicts {
        assert_eq!(verdict["holds"], true, "{verdict:#}");
    }
    let roles: Vec<&Value> = report["processes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|process| &process["role"])
        .collect();
    assert!(
        roles.contains(&&Value::from("vmm")) && roles.contains(&&Value::from("monitor")),
        "{roles:?}"
    );

    let machines = casemate.call(&["ps", "--json"]).unwrap();
    let machines: Value = serde_json::from_str(&machines.stdout).unwrap();
    assert_eq!(machines[0]["id"], id.as_str(), "{machines:#}");
    run.signal(Signal::SIGINT).unwrap();
    assert_eq!(run.wait().unwrap().code, exit::by_signal(2));
    casemate.assert_nothing_of(&id);
}

#[test]
fn a_timeout_ends_a_bare_machine() {
    let append = [
        "--append",
        "idle acpi=off",
        "--timeout",
        "1s",
        "--stop-grace",
        "1s",
    ];
    let done = Casemate::new().run_bare(&bin("casemate-probe"), &append);
    assert_eq!(done.code, 124, "{done:#?}");
}

#[test]
fn nobody_reads_what_is_said_and_still_all_is_cleaned_up() {
    let casemate = Casemate::new();
    let id = unique_id("deaf");
    let kernel = bin("casemate-probe");
    let words = ["run", "--bare", "--id", &id, "--append", "idle acpi=off"];
    let times = ["--timeout", "1s", "--stop-grace", "1s", "--kernel"];
    let mut command = casemate.command(&[&words[..], &times].concat());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let null = std::process::Stdio::null;
    let mut command = command
        .arg(kernel)
        .stdin(null())
        .stdout(null())
        .stderr(writer)
        .spawn()
        .unwrap();
    assert_eq!(command.wait().unwrap().code(), Some(124));
    casemate.assert_nothing_of(&id);
}

#[test]
fn a_reader_that_is_stuck_does_not_outlast_the_timeout() {
    let casemate = Casemate::new();
    let id = unique_id("stuck");
    let kernel = bin("casemate-probe");
    let words = [
        "run",
        "--bare",
        "--id",
        &id,
        "--append",
        "acpi=off probe.end=reset",
    ];
    let times = ["--timeout", "2s", "--kernel"];
    let mut command = casemate.command(&[&words[..], &times].concat());
    // A pipe that is full, and never read.
    let (reader, mut writer) = std::io::pipe().unwrap();
    let full = std::thread::spawn({
        let mut writer = writer.try_clone().unwrap();
        move || while std::io::Write::write(&mut writer, &[b'x'; 4096]).is_ok() {}
    });
    std::thread::sleep(std::time::Duration::from_millis(200));
    let null = std::process::Stdio::null;
    command.arg(kernel).stdin(null()).stderr(null());
    let started = std::time::Instant::now();
    let mut run = command.stdout(writer.try_clone().unwrap()).spawn().unwrap();
    drop(command);
    assert_eq!(run.wait().unwrap().code(), Some(124));
    assert!(started.elapsed().as_secs() < 15, "{:?}", started.elapsed());
    casemate.assert_nothing_of(&id);
    drop(reader);
    let _ = std::io::Write::flush(&mut writer);
    drop(writer);
    full.join().unwrap();
}

#[test]
fn the_confinement_of_nobody() {
    for id in ["nobody", "../etc", ""] {
        let done = Casemate::new()
            .call(&["inspect", "--confinement", id])
            .unwrap();
        done.assert_refused(FAILED, &[id]);
    }
}

#[test]
fn the_doctor_speaks_json() {
    let done = Casemate::new().call(&["doctor", "--json"]).unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    let report: Value = serde_json::from_str(&done.stdout).unwrap();
    let mode = report["kvm"]["guest_mode"].as_str().unwrap();
    assert!(["native", "emulated"].contains(&mode), "{mode}");
    assert!(!report["findings"].as_array().unwrap().is_empty());
}

#[test]
fn kernel_packages_that_are_none_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    // A package as `ar` has it whose one member claims more than there is.
    let mut cut = b"!<arch>\n".to_vec();
    cut.extend(
        format!(
            "{:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
            "data.tar.xz",
            0,
            0,
            0,
            644,
            1 << 30
        )
        .bytes(),
    );
    cut.extend([0xfd, b'7', b'z', b'X', b'Z', 0]);
    let garbage: Vec<u8> = (0..100_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for (name, bytes) in [("empty", &b""[..]), ("garbage", &garbage), ("cut", &cut)] {
        let file = dir.path().join(name);
        fs::write(&file, bytes).unwrap();
        let file = file.to_str().unwrap();
        for how in [
            &["kernel", "add", "--deb", file][..],
            &["kernel", "add", file],
        ] {
            let mut command = Casemate::new().command(how);
            command.env("CASEMATE_DATA_DIR", &data);
            let done = Running::start(command, None).unwrap().wait().unwrap();
            // A line of progress may come before the one that says why.
            assert_eq!(done.code, FAILED, "{done:#?}");
            let why = done.stderr.lines().last().unwrap_or_default();
            assert!(why.contains(name), "{done:#?}");
            // The store's lock is no part of any kernel.
            let left: Vec<_> = tree(&data)
                .into_iter()
                .filter(|path| !path.is_dir() && !path.ends_with(".lock"))
                .collect();
            assert!(left.is_empty(), "{left:?}");
            assert!(!data.join("kernels").join(name).exists());
        }
    }
}
