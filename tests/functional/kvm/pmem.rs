//! virtio-pmem against the probe's driver.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use super::probe;
use casemate_tests::{Running, Vm, exit, pattern_disk, pattern_word};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::json;

/// Three and a half MiB and one sector: neither whole pages nor whole large pages.
const SECTORS: u64 = 7 * 1024 + 1;
const LEN: u64 = SECTORS * 512;

/// A test's directory with a pattern file in it.
fn file() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    pattern_disk(&path, SECTORS).unwrap();
    (dir, path)
}

fn pmem(options: &str, path: &Path, read_only: bool) -> Vm {
    probe(&format!("probe.task=pmem probe.len={LEN} {options}")).pmem("mem", path, read_only)
}

#[test]
fn the_guest_reads_what_the_file_holds() {
    let (_dir, path) = file();
    for (read_only, jailed) in [(true, true), (false, true), (true, false), (false, false)] {
        let mut vm = pmem("", &path, read_only);
        if !jailed {
            vm = vm.unjailed();
        }
        let done = vm.run().unwrap();
        done.assert_line("probe: pmem at 0x100000000, 4194304 bytes");
        done.assert_line("probe: pmem ok");
        assert_eq!(done.code, exit::GUEST_RESET);
    }
}

#[test]
fn what_the_guest_writes_is_in_the_file() {
    let (_dir, path) = file();
    let done = pmem("probe.write=1", &path, false).run().unwrap();
    done.assert_line("probe: pmem ok");
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len() as u64, LEN);
    for (index, word) in bytes.chunks_exact(8).enumerate() {
        let offset = index as u64 * 8;
        let right = pattern_word(offset);
        let right = if offset == LEN - 8 { !right } else { right };
        assert_eq!(word, right.to_le_bytes(), "at byte {offset}");
    }
}

#[test]
fn a_guest_that_may_only_read_writes_nothing() {
    let (_dir, path) = file();
    let before = std::fs::read(&path).unwrap();
    let done = pmem("probe.write=1", &path, true).run().unwrap();
    done.assert_line("probe: pmem FAIL: the memory does not take a write");
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn several_lie_one_above_the_other() {
    let (_dir, path) = file();
    let small = path.with_file_name("small");
    std::fs::write(&small, [1]).unwrap();
    let task = format!("probe.task=pmem probe.device=1 probe.len={LEN}");
    let vm = probe(&task).pmem("small", &small, true);
    let done = vm.pmem("mem", &path, true).run().unwrap();
    done.assert_line("probe: pmem at 0x100200000, 4194304 bytes");
    done.assert_line("probe: pmem ok");
}

#[test]
fn the_device_touches_no_memory_of_its_own() {
    let (_dir, path) = file();
    let done = pmem("probe.inside=1", &path, false).run().unwrap();
    done.assert_line("probe: pmem ok");
    assert!(done.stderr.contains("not guest memory"), "{done:#?}");
}

/// Cut off under a guest that reads it: the machine ends with what happened, and nothing dies of a signal.
#[test]
fn a_file_that_is_cut_off_is_a_named_end() {
    for (read_only, jailed) in [(true, true), (false, true), (true, false)] {
        let (_dir, path) = file();
        let mut vm = pmem("probe.stay=1", &path, read_only);
        if !jailed {
            vm = vm.unjailed();
        }
        let running = vm.start().unwrap();
        running.wait_for_line("probe: reading").unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(4096).unwrap();
        let done = running.wait().unwrap();
        assert_eq!(done.code, exit::VMM_FAILED, "{done:#?}");
        let words =
            "the file of pmem mem was cut to 4096 bytes while the guest had 3670528 of it mapped";
        assert!(done.stderr.contains(words), "{done:#?}");
    }
}

#[test]
fn what_is_no_memory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let vm = probe("").pmem("mem", &empty, true);
    vm.assert_refused(exit::BAD_INPUT, &["pmem mem", "it is empty"]);
    // More than a guest's addresses reach; the host has none of it.
    let huge = dir.path().join("huge");
    let file = std::fs::File::create(&huge).unwrap();
    if file.set_len(8 << 40).is_ok() {
        let before = probe("").set("/machine-config/mem_size_mib", json!(128));
        let done = before.pmem("mem", &huge, true).run().unwrap();
        assert!(
            done.code == exit::GUEST_RESET || done.stderr.lines().count() == 1,
            "{done:#?}"
        );
    }
}

/// Lets go of the machine that `running` is.
fn end(running: Running) {
    for _ in 0..2 {
        // The first presses the power button, the second ends it at once.
        running.signal(Signal::SIGTERM).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    running.wait().unwrap();
}

#[test]
fn a_file_has_one_writer_or_many_readers() {
    let (_dir, path) = file();
    let machine = |args: &str, read_only| probe(args).pmem("mem", &path, read_only);
    for (first, second) in [(true, false), (false, true), (false, false)] {
        let running = machine("idle", first).start().unwrap();
        running.wait_for_line("probe: idle").unwrap();
        let words = ["pmem mem", "another machine uses its file"];
        machine("", second).assert_refused(exit::BAD_INPUT, &words);
        end(running);
        machine("", second)
            .run()
            .unwrap()
            .assert_line("probe: boot ok");
    }
    // A drive of the same file counts, too.
    let running = machine("idle", true).start().unwrap();
    running.wait_for_line("probe: idle").unwrap();
    let drive = probe("").drive("data", &path, false);
    drive.assert_refused(exit::BAD_INPUT, &["drive data", "another machine uses"]);
    end(running);
}

/// Two machines that read one file share its pages: the host counts half of each of them to either.
#[test]
fn machines_share_the_pages_of_one_file() {
    let (_dir, path) = file();
    let machine = || {
        pmem("probe.stay=1", &path, true)
            .unjailed()
            .start()
            .unwrap()
    };
    let (first, second) = (machine(), machine());
    for running in [&first, &second] {
        running.wait_for_line("probe: reading").unwrap();
    }
    for running in [&first, &second] {
        let memory = mapping(running.pid(), &path);
        let of = |field: &str| {
            let line = memory.iter().find(|line| line.starts_with(field)).unwrap();
            let kib = line.split_ascii_whitespace().nth(1).unwrap();
            kib.parse::<u64>().unwrap() << 10
        };
        assert_eq!(of("Private_Dirty:"), 0, "{memory:#?}");
        let (resident, shared) = (of("Rss:"), of("Pss:"));
        // All of it was read. The file is written by this very test, so its pages may be dirty, but never private.
        assert!(resident >= LEN / 2, "{memory:#?}");
        assert!(shared <= resident / 2 + 4096, "{memory:#?}");
    }
    end(first);
    end(second);
}

/// What `/proc/PID/smaps` says of the mapping of `path`.
fn mapping(pid: Pid, path: &Path) -> Vec<String> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let name = path.to_str().unwrap();
    let lines = smaps.lines().skip_while(|line| !line.ends_with(name));
    let rest = lines.skip(1).take_while(|line| !line.contains('/'));
    rest.map(str::to_owned).collect()
}
