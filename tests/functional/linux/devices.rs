//! Disk, network and entropy under the guest kernel's own drivers.

use casemate_tests::{Casemate, Netns};

#[test]
fn a_disk_is_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let mut bytes = vec![0; 1 << 20];
    bytes[..5].copy_from_slice(b"hello");
    std::fs::write(&disk, bytes).unwrap();
    let script = "dd if=/dev/vdb bs=5 count=1 2>/dev/null; \
                  printf world | dd of=/dev/vdb bs=512 seek=2047 conv=sync 2>/dev/null; sync; \
                  cat /sys/block/vdb/size";
    let done = Casemate::new()
        .run(&["--disk", disk.to_str().unwrap()], script)
        .unwrap();
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (0, "hello2048\n"),
        "{done:#?}"
    );
    assert_eq!(&std::fs::read(&disk).unwrap()[2047 * 512..][..5], b"world");
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![7; 1 << 16]).unwrap();
    let option = format!("{}:ro", disk.display());
    let script = "cat /sys/block/vdb/ro; echo x > /dev/vdb && echo written";
    let done = Casemate::new().run(&["--disk", &option], script).unwrap();
    assert_eq!(done.stdout, "1\n", "{done:#?}");
    assert_eq!(std::fs::read(&disk).unwrap(), vec![7; 1 << 16]);
}

#[test]
fn entropy_comes_from_the_host() {
    let script = "cat /sys/class/misc/hw_random/rng_current; head -c 32 /dev/hwrng | wc -c";
    let done = Casemate::new().run(&[], script).unwrap();
    done.assert_line("virtio_rng.0");
    done.assert_line("32");
}

#[test]
fn tcp_with_offloads_carries_data_both_ways() {
    let netns = Netns::with_tap(Some("10.99.0.1/24"));
    // The host's end: sends a megabyte back for every connection. `nc` is busybox's, as in the guest.
    let mut command = netns.command("busybox");
    command.args(["nc", "-l", "-p", "8000", "-e", "busybox", "cat"]);
    let mut server = command.spawn().unwrap();
    let script = "ip link set eth0 up; ip address add 10.99.0.2/24 dev eth0; \
                  ping -c 2 -W 10 10.99.0.1 > /dev/null && echo pong; \
                  head -c 1000000 /dev/urandom > /tmp/sent; \
                  nc 10.99.0.1 8000 < /tmp/sent | head -c 1000000 > /tmp/back; \
                  cmp /tmp/sent /tmp/back && echo same";
    let options = ["--net", "tap0", "--netns", &netns.path()];
    let done = Casemate::new().run(&options, script);
    let _ = server.kill();
    let _ = server.wait();
    let done = done.unwrap();
    assert_eq!(done.stdout, "pong\nsame\n", "{done:#?}");
}

#[test]
fn the_confinement_report_finds_every_wall() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report");
    let done = Casemate::new()
        .run(
            &[
                "--cpus",
                "2",
                "--confinement-report",
                report.to_str().unwrap(),
            ],
            "true",
        )
        .unwrap();
    assert_eq!(done.code, 0, "{done:#?}");
    let report = std::fs::read_to_string(report).unwrap();
    for thread in ["control", "device", "vcpu0", "vcpu1"] {
        let line = report
            .lines()
            .find(|line| line.contains(&format!(" {thread} ")))
            .unwrap();
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        assert_eq!(words[2..5], ["filter", "2", "yes"], "{line}");
        assert!(line.ends_with("none in all five sets"), "{line}");
    }
    let verdicts: Vec<&str> = report
        .lines()
        .skip_while(|line| !line.starts_with("Verdict"))
        .skip(1)
        .collect();
    assert!(verdicts.len() >= 12, "{report}");
    for verdict in verdicts.iter().filter(|line| !line.trim().is_empty()) {
        assert!(verdict.trim_start().starts_with("holds"), "{verdict}");
    }
}
