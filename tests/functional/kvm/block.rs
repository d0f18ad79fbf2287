//! virtio-block against the probe's driver.

use super::probe;
use casemate_tests::{exit, pattern_disk, pattern_word};
use nix::sys::signal::Signal;

const SECTORS: u64 = 2048 + 3;

#[test]
fn reads_what_the_file_holds() {
    let vm = probe("probe.task=blk");
    let disk = vm.path("disk");
    pattern_disk(&disk, SECTORS).unwrap();
    let done = vm.drive("data", &disk, true).run().unwrap();
    done.assert_line(&format!(
        "probe: drive data sectors {SECTORS} read-only true"
    ));
    done.assert_line("probe: blk ok");
    assert_eq!(done.code, exit::GUEST_RESET);
}

#[test]
fn notices_a_sector_that_differs() {
    let vm = probe("probe.task=blk");
    let disk = vm.path("disk");
    pattern_disk(&disk, SECTORS).unwrap();
    let mut bytes = std::fs::read(&disk).unwrap();
    bytes[1000 * 512 + 100] ^= 1;
    std::fs::write(&disk, bytes).unwrap();
    let done = vm.drive("data", &disk, true).run().unwrap();
    done.assert_line("probe: blk FAIL: a sector does not hold the pattern");
}

#[test]
fn writes_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    pattern_disk(&disk, 64).unwrap();
    let done = probe("probe.task=blk probe.write=1")
        .drive("data", &disk, false)
        .run()
        .unwrap();
    done.assert_line("probe: blk ok");
    let bytes = std::fs::read(&disk).unwrap();
    assert_eq!(bytes.len(), 64 * 512);
    for (index, word) in bytes.chunks_exact(8).enumerate() {
        let offset = index as u64 * 8;
        let right = pattern_word(offset);
        let right = if offset >= 63 * 512 { !right } else { right };
        assert_eq!(word, right.to_le_bytes(), "at byte {offset}");
    }
}

#[test]
fn a_read_only_drive_takes_no_writes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    pattern_disk(&disk, 64).unwrap();
    let before = std::fs::read(&disk).unwrap();
    let done = probe("probe.task=blk probe.write=1")
        .drive("data", &disk, true)
        .run()
        .unwrap();
    done.assert_line("probe: blk ok");
    assert_eq!(std::fs::read(&disk).unwrap(), before);
}

#[test]
fn several_drives_keep_apart() {
    let mut vm = probe("probe.task=blk probe.drive=2");
    for name in ["a", "b", "c"] {
        let disk = vm.path(name);
        if name == "c" {
            pattern_disk(&disk, 32).unwrap();
        } else {
            std::fs::write(&disk, vec![0; 4096]).unwrap();
        }
        vm = vm.drive(name, &disk, true);
    }
    let done = vm.run().unwrap();
    done.assert_line("probe: drive c sectors 32 read-only true");
    done.assert_line("probe: blk ok");
}

#[test]
fn gives_sectors_back_to_the_host() {
    for jailed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        pattern_disk(&disk, 64).unwrap();
        let mut before = std::fs::read(&disk).unwrap();
        let mut vm = probe("probe.task=blk probe.discard=1").drive("data", &disk, false);
        if !jailed {
            vm = vm.unjailed();
        }
        vm.run().unwrap().assert_line("probe: blk ok");
        before[..1024].fill(0);
        assert!(std::fs::read(&disk).unwrap() == before);
    }
}

#[test]
fn a_drive_that_shall_keep_its_blocks_takes_no_discard() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    pattern_disk(&disk, 64).unwrap();
    let done = probe("probe.task=blk probe.discard=1")
        .drive("data", &disk, false)
        .set("/drives/0/discard", serde_json::json!(false))
        .run()
        .unwrap();
    done.assert_line("probe: blk FAIL: the drive takes no discard");
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    let machine = |args: &str, read_only| probe(args).drive("data", &disk, read_only);
    for (first, second) in [(true, false), (false, true), (false, false)] {
        let running = machine("idle", first).start().unwrap();
        running.wait_for_line("probe: idle").unwrap();
        let refused = machine("", second).run().unwrap();
        refused.assert_refused(
            exit::BAD_INPUT,
            &["drive data", "another machine uses its image"],
        );
        // Readers do not exclude each other; and the lock goes with its machine.
        if first {
            machine("", true)
                .run()
                .unwrap()
                .assert_line("probe: boot ok");
        }
        for _ in 0..2 {
            // The first presses the power button, the second ends it at once.
            running.signal(Signal::SIGTERM).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        running.wait().unwrap();
        machine("", second)
            .run()
            .unwrap()
            .assert_line("probe: boot ok");
    }
}

#[test]
fn a_rate_limit_slows_a_drive_down() {
    let run = |limiter| {
        let vm = probe("probe.task=blk");
        let disk = vm.path("disk");
        pattern_disk(&disk, SECTORS).unwrap();
        let began = std::time::Instant::now();
        let vm = vm.drive("data", &disk, true);
        let done = vm.set("/drives/0/rate_limiter", limiter).run().unwrap();
        done.assert_line("probe: blk ok");
        began.elapsed()
    };
    // A MiB: 64 KiB at once, the rest at 1 MiB a second. No faster, however fast the host is.
    let bandwidth = serde_json::json!({"bandwidth": {"size": 65536, "refill_time": 62}});
    let slowed = run(bandwidth);
    assert!(slowed.as_millis() > 800, "{slowed:?}");
    // 130 requests: 30 at once, and 200 a second.
    let ops = serde_json::json!({"ops": {"size": 20, "one_time_burst": 10, "refill_time": 100}});
    let slowed = run(ops);
    assert!(slowed.as_millis() > 400, "{slowed:?}");
}

/// In the jail and without: the ring must be made before the seal and work behind it.
#[test]
fn the_ring_serves_what_the_thread_does() {
    for jailed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        pattern_disk(&disk, 64).unwrap();
        let mut vm = probe("probe.task=blk probe.write=1 probe.discard=1")
            .drive("data", &disk, false)
            .set("/drives/0/cache_type", serde_json::json!("Writeback"))
            .set("/drives/0/io_engine", serde_json::json!("Async"));
        if !jailed {
            vm = vm.unjailed();
        }
        vm.run().unwrap().assert_line("probe: blk ok");
        let bytes = std::fs::read(&disk).unwrap();
        assert_eq!(bytes[..1024], [0; 1024]);
        assert_eq!(
            bytes[63 * 512..][..8],
            (!pattern_word(63 * 512)).to_le_bytes()
        );
    }
}

#[test]
fn every_queue_works() {
    for engine in ["Sync", "Async"] {
        let machine = |queue: u16| {
            let vm = probe(&format!("probe.task=blk probe.queue={queue}"));
            let disk = vm.path("disk");
            pattern_disk(&disk, 64).unwrap();
            vm.drive("data", &disk, true)
                .set("/drives/0/queues", serde_json::json!(8))
                .set("/drives/0/io_engine", serde_json::json!(engine))
                .run()
                .unwrap()
        };
        for queue in [0, 7] {
            machine(queue).assert_line("probe: blk ok");
        }
        machine(8).assert_line("probe: blk FAIL: the queue is missing or too small");
    }
}

#[test]
fn machines_share_an_image_and_keep_what_they_write_apart() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    pattern_disk(&disk, 2048).unwrap();
    let before = std::fs::read(&disk).unwrap();
    let layer = |name: &str| {
        let path = dir.path().join(name);
        let file = std::fs::File::create(&path).unwrap();
        // A MiB of disk, a block of bitmap and one that says what it is.
        file.set_len((1 << 20) + 8192).unwrap();
        path
    };
    let machine = |layer: &std::path::Path, task: &str| {
        probe(task)
            .drive("data", &disk, true)
            .layer(layer, 1)
            .set("/drives/0/cache_type", serde_json::json!("Writeback"))
    };
    let (one, two) = (layer("one"), layer("two"));
    let idle = probe("idle")
        .drive("data", &disk, true)
        .layer(&two, 1)
        .start()
        .unwrap();
    idle.wait_for_line("probe: idle").unwrap();
    let write = "probe.task=blk probe.write=1";
    machine(&one, write)
        .run()
        .unwrap()
        .assert_line("probe: blk ok");
    assert!(std::fs::read(&disk).unwrap() == before);
    // The layer remembers, and only for whoever has it.
    let differs = "probe: blk FAIL: a sector does not hold the pattern";
    machine(&one, "probe.task=blk")
        .run()
        .unwrap()
        .assert_line(differs);
    machine(&two, "probe.task=blk")
        .run()
        .unwrap()
        .assert_refused(
            exit::BAD_INPUT,
            &["drive data", "another machine uses its image"],
        );
    for _ in 0..2 {
        idle.signal(Signal::SIGTERM).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    idle.wait().unwrap();
    machine(&two, "probe.task=blk")
        .run()
        .unwrap()
        .assert_line("probe: blk ok");
    std::fs::File::create(&two).unwrap().set_len(4096).unwrap();
    machine(&two, "probe.task=blk")
        .run()
        .unwrap()
        .assert_refused(exit::BAD_INPUT, &["drive data", "truncate -s 1056768"]);
}
