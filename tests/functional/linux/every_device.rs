//! A machine with every device, on each transport: what an unmodified kernel makes of them. Memory that comes and goes is
//! elsewhere (`memory.rs`): it cannot be together with devices of other processes.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use casemate_tests::{Netns, Running, Share, exit, ext4_image, storage_daemon, virtiofsd};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use nix::unistd::Pid;
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};

use crate::guest::{Guest, linux};
use crate::sockets::{call, callee};

const MIB: usize = 1 << 20;
const DRIVERS: [&str; 11] = [
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_console",
    "virtio_balloon",
    "virtio_pmem",
    "nd_pmem",
    "virtiofs",
    "virtio_mmio",
    "virtio_pci",
];
const CHECKS: [&str; 16] = [
    "transport",
    "partuuid",
    "block_queues",
    "block_layer",
    "block_replaced",
    "vhost_user_block",
    "vhost_user_fs",
    "net_config",
    "net_tcp",
    "mmds",
    "entropy",
    "vsock",
    "pmem",
    "identity",
    "balloon",
    "console",
];

#[test]
fn every_device_works_on_mmio() {
    every_device(false);
}

#[test]
fn every_device_works_on_pci() {
    every_device(true);
}

fn every_device(pci: bool) {
    let (transport, version) = if pci { ("pci", "V2") } else { ("mmio", "V1") };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let files = ["root", "base", "layer", "first", "second", "daemon", "pmem"].map(path);
    let [root, base, layer, first, second, daemon, pmem] = &files;
    let shared = path("shared");
    let base_before = make_files(&files, &shared);
    let netns = Netns::with_queues(Some("10.99.0.1/24"));
    let frames = netns.listen();
    setsockopt(&frames, sockopt::RcvBufForce, &(16 * MIB)).unwrap();
    let _storage = storage_daemon(daemon, &path("blk.sock")).unwrap();
    let _fs = virtiofsd(&shared, Share::ToWrite, &path("fs.sock")).unwrap();

    let script = format!("expected={transport}\n{}", include_str!("every_device.sh"));
    let tool = Path::new(env!("CARGO_BIN_EXE_casemate-guest-tool"));
    let mut vm = linux("", &DRIVERS, &script, &[tool])
        .set(
            "/machine-config",
            json!({ "vcpu_count": 2, "mem_size_mib": 192 }),
        )
        .drive("root", root, false)
        .set("/drives/0/is_root_device", json!(true))
        .set("/drives/0/partuuid", json!("ca5e3a7e-01"))
        .set("/drives/0/io_engine", json!("Async"))
        .set("/drives/0/queues", json!(4))
        .drive("layer", base, true)
        .layer(layer, 1)
        .drive("other", first, false)
        .may_open(second)
        .back_end(
            "drives",
            json!({ "drive_id": "daemon", "queues": 4 }),
            &path("blk.sock"),
        )
        .back_end("fs", json!({ "tag": "host" }), &path("fs.sock"))
        .net_with_queues("tap0", 2, "06:00:ac:10:00:02")
        .set("/network-interfaces/0/mtu", json!(1400))
        .set(
            "/mmds-config",
            json!({ "version": version, "network_interfaces": ["eth0"] }),
        )
        .entropy()
        .vsock()
        .console()
        .pmem("memory", pmem, false)
        .set(
            "/balloon",
            json!({ "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1,
                    "free_page_hinting": true, "free_page_reporting": true }),
        )
        .jailer_arg("--netns")
        .jailer_arg(&netns.path())
        .jailer_arg("--grant-append")
        .jailer_arg(&format!("metrics={}", path("metrics").display()))
        .vmm_arg("--metrics-path")
        .vmm_arg("metrics")
        .served();
    if pci {
        vm = vm.pci();
    }
    let calls = callee(&vm.vsock_path());
    let terminal = openpty(None, None).unwrap();
    let (keyboard, theirs) = (File::from(terminal.master), terminal.slave);
    let command = vm.command().unwrap();
    let running = Running::start_with_input(command, Stdio::from(theirs), None).unwrap();
    let mut guest = Guest::new(running, vm);
    guest
        .ask("PUT", "/mmds", &json!({ "latest": { "name": "keep" } }))
        .assert_done();

    guest.says("replace");
    guest.patch(
        "/drives/other",
        &json!({ "drive_id": "other", "path_on_host": second }),
    );
    let servers = [1, 2].map(|number| {
        guest.says(&format!("listen {number}"));
        let mut command = netns.command("busybox");
        let port = format!("800{number}");
        let words = [
            "nc", "-l", "-p", &port, "-e", "busybox", "head", "-c", "200000",
        ];
        command.args(words);
        Running::start(command, None).unwrap()
    });
    guest.says("check net_tcp");
    drop(servers);
    guest.says("serving");
    call(&guest.files.vsock_path(), 52);
    guest.says("check vsock");
    calls.join().unwrap();
    guest.says("balloon now");
    change_balloon(&mut guest);
    guest.says("console: hello");
    (&keyboard).write_all(b"typed on the host\n").unwrap();
    guest.says("resize");
    resize(&keyboard, &guest.vm);
    guest.says("check console");
    (&keyboard).write_all(b"enough\n").unwrap();
    let done = guest.vm.wait().unwrap();
    for check in CHECKS {
        done.assert_line(&format!("check {check} ok"));
    }
    assert_eq!(done.code, exit::GUEST_POWERED_OFF, "{done:#?}");

    assert!(
        std::fs::read(base).unwrap() == base_before,
        "the base was written"
    );
    let (sent, received) = largest_frames(&frames);
    assert!(
        sent > 1514 && received > 1514,
        "no large segments: {sent}, {received}"
    );
    for counter in ["free_page_report_freed", "free_page_hint_freed"] {
        assert!(counted(&path("metrics"), counter) > MIB as u64, "{counter}");
    }
    assert_eq!(&std::fs::read(daemon).unwrap()[7 * 512..][..6], b"answer");
    assert_eq!(std::fs::read(shared.join("answer")).unwrap(), b"answer\n");
    for (file, text) in [(root, "changed"), (pmem, "written by DAX")] {
        let bytes = std::fs::read(file).unwrap();
        let found = bytes
            .windows(text.len())
            .any(|window| window == text.as_bytes());
        assert!(found, "no {text:?} in {}", file.display());
    }
}

/// What the drives and the memory hold; the base's content.
fn make_files(files: &[PathBuf; 7], shared: &Path) -> Vec<u8> {
    let [root, base, layer, first, second, daemon, pmem] = files;
    // Persistent memory is a file system.
    ext4_image(pmem, "16M", "root of it").unwrap();
    // The root is the first partition, of 8 MiB, on a disk of 12.
    ext4_image(root, "8M", "root of it").unwrap();
    let mut disk = vec![0; MIB];
    disk[440..444].copy_from_slice(&0xca5e_3a7e_u32.to_le_bytes());
    disk[450] = 0x83;
    disk[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    disk[458..462].copy_from_slice(&(8 * 2048_u32).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(std::fs::read(root).unwrap());
    disk.resize(12 * MIB, 0);
    std::fs::write(root, disk).unwrap();
    let base_before = vec![b'b'; 8 * MIB];
    std::fs::write(base, &base_before).unwrap();
    let file = File::create(layer).unwrap();
    // The base's size, a block of bitmap and one that says what it is; of which the guest may fill a MiB.
    file.set_len((8 * MIB + 8192) as u64).unwrap();
    for (file, word, len) in [
        (first, "first", MIB),
        (second, "second", 2 * MIB),
        (daemon, "daemon", MIB),
    ] {
        let mut bytes = word.as_bytes().to_vec();
        bytes.resize(len, 0);
        std::fs::write(file, bytes).unwrap();
    }
    std::fs::create_dir(shared).unwrap();
    std::fs::write(shared.join("hello"), "hi").unwrap();
    base_before
}

fn change_balloon(guest: &mut Guest) {
    for (amount, next) in [(16, "balloon back"), (0, "check balloon")] {
        guest.patch("/balloon", &json!({ "amount_mib": amount }));
        guest.wait_until("/balloon/statistics", |told| told["actual_mib"] == amount);
        guest.says(next);
    }
    guest.wait_until("/balloon/statistics", |told| told["total_memory"].is_u64());
    // The guest ends its list, the host says that it has done its part.
    guest.patch("/balloon/hinting/start", &json!({}));
    guest.wait_until("/balloon/hinting/status", |status| status["host_cmd"] == 1);
}

/// The terminal on the host gets another size.
fn resize(terminal: &File, vm: &Running) {
    let size = Winsize {
        ws_row: 30,
        ws_col: 90,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
    let vmm = vm.vmm_pid().unwrap();
    kill(Pid::from_raw(vmm as i32), Signal::SIGWINCH).unwrap();
}

/// What the counter `name` of the balloon came to.
fn counted(metrics: &Path, name: &str) -> u64 {
    let lines = std::fs::read_to_string(metrics).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .map(|line| line["balloon"][name].as_u64().unwrap())
        .sum()
}

/// The largest frames with IPv4 packets that the guest sent, and that it got.
fn largest_frames(socket: &OwnedFd) -> (usize, usize) {
    const GUEST: [u8; 6] = [6, 0, 0xac, 0x10, 0, 2];
    let (mut sent, mut received) = (0, 0);
    let mut bytes = vec![0; 1 << 17];
    while let Ok(len) = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
        if bytes[12..14] != [8, 0] {
            continue;
        }
        if bytes[6..12] == GUEST {
            sent = sent.max(len);
        } else if bytes[..6] == GUEST {
            received = received.max(len);
        }
    }
    (sent, received)
}
