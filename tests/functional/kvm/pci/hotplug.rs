//! Devices that come and go while the guest runs: by requests, and the guest is told by ACPI.

use std::fs::Permissions;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use casemate_tests::{Machine, Netns, Vm, exit, is_free, pattern_disk};
use nix::sys::socket::{MsgFlags, send};
use serde_json::{Value, json};

use super::net::{MAC, MAC_BYTES, SENDER, frame, inside, receive, wait_for_guest};
use super::vsock::connect;

/// A guest that waits for devices, uses each by `task`, and lets `rounds` of them go.
fn guest(task: &str, rounds: u32) -> Vm {
    Vm::probe(&format!(
        "probe.task=hotplug probe.use={task} probe.rounds={rounds}"
    ))
    .pci()
}

/// Without a jail, and in one that may open what is beneath the test's directory.
fn both(vm: impl Fn() -> Vm) -> [Vm; 2] {
    let jailed = vm();
    let dir = format!("{}/", jailed.dir().display());
    let jailed = jailed.jailer_arg("--allow-open").jailer_arg(&dir);
    [vm().unjailed(), jailed]
}

/// A started machine, and where its test's files are.
fn start(vm: Vm) -> (Machine, PathBuf) {
    let (config, dir) = (vm.config().clone(), vm.dir().to_owned());
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    machine.start();
    machine.vm.wait_for_line("probe: waiting").unwrap();
    (machine, dir)
}

/// A disk with the pattern that anybody may open.
fn disk(dir: &Path, name: &str, sectors: u64) -> PathBuf {
    let path = dir.join(name);
    pattern_disk(&path, sectors).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    path
}

fn drive(id: &str, path: &Path) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": false})
}

/// Removes a device, and waits until the guest has let it go, with `left` more to go, and the config says so.
fn remove(machine: &mut Machine, path: &str, section: &str, left: u32) {
    machine.ask("DELETE", path, Value::Null).assert_done();
    let line = format!("probe: ejected, {left} to go");
    machine.vm.wait_for_line(&line).unwrap();
    machine.wait_until("the device is gone", |machine| {
        machine.get("/vm/config")[section]
            .as_array()
            .unwrap()
            .is_empty()
    });
}

#[test]
fn drives_come_and_go() {
    for vm in both(|| guest("blk", 3)) {
        let (mut machine, dir) = start(vm);
        // The second time with the same name and file, the third with others.
        for (round, name) in [(1, "a"), (2, "a"), (3, "b")] {
            let image = disk(&dir, name, 32 * round);
            let path = format!("/drives/{name}");
            machine.put(&path, drive(name, &image)).assert_done();
            let line = format!("probe: drive {name} sectors {} read-only false", 32 * round);
            machine.vm.wait_for_line(&line).unwrap();
            assert!(!is_free(&image).unwrap());
            machine
                .put(&path, drive(name, &image))
                .assert_refused("there is a drive");
            if round == 3 {
                machine.ask("DELETE", &path, Value::Null).assert_done();
                break;
            }
            remove(&mut machine, &path, "drives", 3 - round as u32);
            assert!(is_free(&image).unwrap(), "{round}");
        }
        let done = machine.vm.wait().unwrap();
        done.assert_line("probe: hotplug ok");
        assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
    }
}

/// The second DELETE finds a device that was asked already, or one that has just gone; whichever it is, it is not about
/// the next device, which takes the same name and slot as soon as they are free.
#[test]
fn a_drive_that_is_asked_twice_to_go_comes_again_and_stays() {
    for vm in both(|| guest("blk", 3)) {
        let (mut machine, dir) = start(vm);
        let plug = |machine: &mut Machine, left: u64| {
            let sectors = 32 + left;
            let image = disk(&dir, &format!("image{left}"), sectors);
            machine.wait_until("the name is free", |machine| {
                let answer = machine.put("/drives/a", drive("a", &image));
                if answer.status != 204 {
                    answer.assert_refused("there is a drive a already");
                }
                answer.status == 204
            });
            let line = format!("probe: drive a sectors {sectors} ");
            machine.vm.wait_for_line(&line).unwrap();
        };
        for left in [2, 1] {
            plug(&mut machine, left);
            machine
                .ask("DELETE", "/drives/a", Value::Null)
                .assert_done();
            let again = machine.ask("DELETE", "/drives/a", Value::Null);
            if again.status != 204 {
                again.assert_refused("no drive a");
            }
            let line = format!("probe: ejected, {left} to go");
            machine.vm.wait_for_line(&line).unwrap();
        }
        plug(&mut machine, 0);
        assert_eq!(machine.get("/vm/config")["drives"][0]["drive_id"], "a");
        machine
            .ask("DELETE", "/drives/a", Value::Null)
            .assert_done();
        let done = machine.vm.wait().unwrap();
        done.assert_line("probe: hotplug ok");
        assert_eq!(done.stdout.matches("probe: added 0x2").count(), 3);
    }
}

#[test]
fn what_cannot_come_or_go_is_refused() {
    for vm in both(|| guest("boot", 1)) {
        let root = disk(vm.dir(), "root", 8);
        let config = vm.config().clone();
        let dir = vm.dir().to_owned();
        let mut machine = Machine::new(vm);
        machine.describe(&config);
        let body = json!({"drive_id": "root", "path_on_host": root, "is_root_device": true});
        machine.put("/drives/root", body.clone()).assert_done();
        machine.start();
        machine.vm.wait_for_line("probe: waiting").unwrap();

        let image = disk(&dir, "a", 8);
        let before = machine.get("/vm/config");
        for (change, words) in [
            (json!({"is_root_device": true}), "root device"),
            (json!({"io_engine": "Async"}), "io_engine"),
            (json!({"socket": image, "path_on_host": null}), "socket"),
            (json!({"queues": 8}), "8 queues"),
            (json!({"path_on_host": root}), "used twice"),
            (json!({"path_on_host": dir.join("none")}), "none"),
            (json!({"path_on_host": "/dev/null"}), "/dev/null"),
            (json!({"queues": 9}), "1 to 8"),
        ] {
            let mut body = drive("a", &image);
            for (key, value) in change.as_object().unwrap() {
                body[key] = value.clone();
            }
            machine.put("/drives/a", body).assert_refused(words);
            assert_eq!(machine.get("/vm/config"), before, "{words}");
            assert!(is_free(&image).unwrap(), "{words}");
        }
        for (path, words) in [
            ("/drives/root", "cannot be removed"),
            ("/drives/none", "no drive none"),
            ("/network-interfaces/none", "no network interface none"),
            ("/pmem/none", "no pmem none"),
        ] {
            machine
                .ask("DELETE", path, Value::Null)
                .assert_refused(words);
        }
        // All slots but that of the host bridge, of the root device and of one device that is built in by nobody.
        for slot in 1..31 {
            let id = format!("d{slot}");
            let image = disk(&dir, &id, 1);
            machine
                .put(&format!("/drives/{id}"), drive(&id, &image))
                .assert_done();
        }
        machine
            .put("/drives/a", drive("a", &image))
            .assert_refused("no PCI slot is free");
        assert_eq!(
            machine.get("/vm/config")["drives"]
                .as_array()
                .unwrap()
                .len(),
            31
        );
        machine.kill();
    }
}

#[test]
fn without_pci_nothing_comes_or_goes() {
    let vm = Vm::probe("probe.task=spin").unjailed();
    let (image, dir) = (disk(vm.dir(), "a", 8), vm.dir().to_owned());
    let config = vm.config().clone();
    let mut machine = Machine::new(vm);
    machine.describe(&config);
    machine.put("/drives/a", drive("a", &image)).assert_done();
    machine.start();
    machine
        .put("/drives/b", drive("b", &image))
        .assert_refused("--enable-pci");
    for (path, body) in [
        ("/pmem/m", json!({"id": "m", "path_on_host": image})),
        (
            "/network-interfaces/n",
            json!({"iface_id": "n", "host_dev_name": "tap7"}),
        ),
        (
            "/vsock",
            json!({"guest_cid": 3, "uds_path": dir.join("v.sock")}),
        ),
        ("/drives/a", Value::Null),
    ] {
        if body != Value::Null {
            machine.put(path, body).assert_refused("--enable-pci");
        }
        machine
            .ask("DELETE", path, Value::Null)
            .assert_refused("--enable-pci");
    }
    machine.kill();
}

/// The guest is asked as often as the operator likes, and lets go when it likes: after a pause, say.
#[test]
fn a_paused_guest_is_told_when_it_runs_on() {
    let (mut machine, dir) = start(guest("blk", 1).unjailed());
    let image = disk(&dir, "a", 32);
    let state = |machine: &mut Machine, state: &str| {
        machine
            .patch("/vm", json!({ "state": state }))
            .assert_done();
    };
    state(&mut machine, "Paused");
    machine.put("/drives/a", drive("a", &image)).assert_done();
    state(&mut machine, "Resumed");
    machine.vm.wait_for_line("probe: used").unwrap();
    state(&mut machine, "Paused");
    for _ in 0..3 {
        machine
            .ask("DELETE", "/drives/a", Value::Null)
            .assert_done();
    }
    // It is there until the guest lets it go.
    assert_eq!(machine.get("/vm/config")["drives"][0]["drive_id"], "a");
    machine
        .put("/drives/a", drive("a", &image))
        .assert_refused("there is a drive a already");
    assert!(!is_free(&image).unwrap());
    state(&mut machine, "Resumed");
    let done = machine.vm.wait().unwrap();
    done.assert_line("probe: hotplug ok");
    assert_eq!(
        done.stdout.matches("probe: leaving").count(),
        1,
        "{done:#?}"
    );
}

/// A guest that lets go unasked, with requests in flight, and again and again.
#[test]
fn a_hostile_guest_takes_nothing_away_but_its_own_device() {
    for vm in both(|| guest("blk probe.hostile=1", 8)) {
        let (mut machine, dir) = start(vm);
        let image = disk(&dir, "a", 64);
        for round in 1..=8 {
            let (id, path) = (format!("d{round}"), format!("/drives/d{round}"));
            machine.put(&path, drive(&id, &image)).assert_done();
            let line = format!("probe: drive {id} sectors 64");
            machine.vm.wait_for_line(&line).unwrap();
            if round == 8 {
                machine.ask("DELETE", &path, Value::Null).assert_done();
                break;
            }
            remove(&mut machine, &path, "drives", 8 - round);
            assert!(is_free(&image).unwrap());
        }
        let done = machine.vm.wait().unwrap();
        done.assert_line("probe: hotplug ok");
        assert_eq!(done.stdout.matches("probe: used").count(), 8, "{done:#?}");
    }
}

#[test]
fn cards_come_and_go() {
    for jailed in [false, true] {
        let netns = Netns::with_tap(None);
        let vm = guest("net", 2);
        let vm = if jailed {
            let words = ["--netns", &netns.path(), "--grant-tap", "tap0"];
            words.iter().fold(vm, |vm, word| vm.jailer_arg(word))
        } else {
            vm.unjailed()
        };
        // Without a jail the broker attaches to the tap in the namespace that the VMM is started in: this thread's.
        inside(&netns, |socket| {
            let (mut machine, _) = start(vm);
            let card = |id: &str, tap: &str| json!({"iface_id": id, "host_dev_name": tap, "guest_mac": MAC});
            machine
                .put("/network-interfaces/none", card("none", "tap7"))
                .assert_refused(if jailed {
                    "--grant-tap"
                } else {
                    "no such interface"
                });
            // The second has the tap that the first has left.
            for (id, left) in [("eth0", 1), ("eth1", 0)] {
                let path = format!("/network-interfaces/{id}");
                machine.put(&path, card(id, "tap0")).assert_done();
                wait_for_guest(socket);
                let sent = frame(MAC_BYTES, SENDER, b"one");
                send(socket.as_raw_fd(), &sent, MsgFlags::empty()).unwrap();
                assert_eq!(receive(socket), frame(SENDER, MAC_BYTES, b"one"));
                machine
                    .put(&path, card(id, "tap0"))
                    .assert_refused("there is a network interface");
                if left == 0 {
                    machine.ask("DELETE", &path, Value::Null).assert_done();
                } else {
                    remove(&mut machine, &path, "network-interfaces", left);
                }
            }
            machine.vm.wait().unwrap().assert_line("probe: hotplug ok");
        });
    }
}

/// What the jailer granted is open in the broker, too: its lock goes with the device, not with the jail.
#[test]
fn a_granted_image_is_free_once_its_drive_is_gone() {
    let vm = guest("blk", 2);
    let image = disk(vm.dir(), "a", 32);
    let vm = vm
        .jailer_arg("--grant-rw")
        .jailer_arg(image.to_str().unwrap());
    let (mut machine, _) = start(vm);
    for (id, left) in [("a", 1), ("b", 0)] {
        let path = format!("/drives/{id}");
        machine.put(&path, drive(id, &image)).assert_done();
        machine
            .vm
            .wait_for_line(&format!("probe: drive {id} sectors 32"))
            .unwrap();
        assert!(!is_free(&image).unwrap());
        if left == 0 {
            machine.ask("DELETE", &path, Value::Null).assert_done();
        } else {
            remove(&mut machine, &path, "drives", left);
            assert!(is_free(&image).unwrap());
        }
    }
    machine.vm.wait().unwrap().assert_line("probe: hotplug ok");
}

#[test]
fn persistent_memory_comes_and_goes() {
    for read_only in [false, true] {
        for vm in both(|| guest(&format!("pmem probe.len={}", 8 * 512), 2)) {
            let (mut machine, dir) = start(vm);
            for (id, left) in [("m", 1), ("n", 0)] {
                let (file, path) = (disk(&dir, id, 8), format!("/pmem/{id}"));
                let body = json!({"id": id, "path_on_host": file, "read_only": read_only});
                let mut root = body.clone();
                root["root_device"] = json!(true);
                machine.put(&path, root).assert_refused("root device");
                machine.put(&path, body.clone()).assert_done();
                // The second is where the first was.
                let line = "probe: pmem at 0x100000000, 2097152 bytes";
                machine.vm.wait_for_line(line).unwrap();
                assert!(!is_free(&file).unwrap());
                assert!(machine.vm.has_mapped(&file).unwrap(), "{read_only} {left}");
                machine.put(&path, body).assert_refused("there is a pmem");
                if left == 0 {
                    machine.ask("DELETE", &path, Value::Null).assert_done();
                } else {
                    remove(&mut machine, &path, "pmem", left);
                    assert!(is_free(&file).unwrap());
                    assert!(!machine.vm.has_mapped(&file).unwrap(), "{read_only} {left}");
                }
            }
            machine.vm.wait().unwrap().assert_line("probe: hotplug ok");
        }
    }
}

/// Files that cannot be memory leave nothing behind: no lock, no mapping, no slot.
#[test]
fn what_is_no_memory_is_refused() {
    for vm in both(|| guest("boot", 1)) {
        let (mut machine, dir) = start(vm);
        let empty = disk(&dir, "empty", 0);
        for _ in 0..40 {
            let body = json!({"id": "m", "path_on_host": empty});
            machine.put("/pmem/m", body).assert_refused("it is empty");
            assert!(is_free(&empty).unwrap());
        }
        let body = json!({"id": "m", "path_on_host": "/dev/null"});
        machine.put("/pmem/m", body).assert_refused("/dev/null");
        assert_eq!(machine.get("/vm/config")["pmem"], json!([]));
        machine.kill();
    }
}

/// In both directions; the second device listens where the first did, and has the same way to the broker.
#[test]
fn the_socket_device_comes_and_goes() {
    for jailed in [false, true] {
        for task in ["vsock", "vsock-connect"] {
            let vm = guest(task, 2);
            let path = vm.vsock_path();
            let vm = if jailed {
                let words = ["--grant-listen", path.to_str().unwrap()];
                words.iter().fold(vm, |vm, word| vm.jailer_arg(word))
            } else {
                vm.unjailed()
            };
            let called = PathBuf::from(format!("{}_5000", path.display()));
            let listener = UnixListener::bind(&called).unwrap();
            std::fs::set_permissions(&called, Permissions::from_mode(0o666)).unwrap();
            let (mut machine, _) = start(vm);
            let body = json!({"guest_cid": 3, "uds_path": path});
            for left in [1, 0] {
                machine.put("/vsock", body.clone()).assert_done();
                machine
                    .put("/vsock", body.clone())
                    .assert_refused("there is a Vsock device");
                let mut stream = if task == "vsock" {
                    let (stream, answer) = connect(&path, 5000);
                    assert!(answer.starts_with("OK "), "{answer}");
                    stream
                } else {
                    let (mut stream, _) = listener.accept().unwrap();
                    let mut hello = [0; 5];
                    stream.read_exact(&mut hello).unwrap();
                    stream
                };
                stream.write_all(b"to and fro").unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut back = String::new();
                stream.read_to_string(&mut back).unwrap();
                assert_eq!(back, "to and fro");
                machine.ask("DELETE", "/vsock", Value::Null).assert_done();
                if left > 0 {
                    let line = format!("probe: ejected, {left} to go");
                    machine.vm.wait_for_line(&line).unwrap();
                    machine.wait_until("the device is gone", |machine| {
                        machine.get("/vm/config")["vsock"].is_null()
                    });
                    machine
                        .ask("DELETE", "/vsock", Value::Null)
                        .assert_refused("no Vsock device");
                }
            }
            machine.vm.wait().unwrap().assert_line("probe: hotplug ok");
        }
    }
}
