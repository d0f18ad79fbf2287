//! gdb debugs a guest, through a VMM that is built for it.
//!
//! Where ring 0 is emulated, KVM stops for the debugger there and not in ring 3: the probe is stepped before it leaves it.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use casemate_tests::{Gdb, Vm, exit};

use crate::probe;

/// Where the probe begins, and its instruction after the next two.
const ENTRY: &str = "0x10000a";
const THIRD: &str = "0x100012";

#[test]
fn the_guest_waits_and_is_stepped() {
    for jailed in [true, false] {
        let vm = probe("probe.task=boot").debugged();
        let vm = if jailed { vm } else { vm.unjailed() };
        let socket = vm.gdb_path();
        let running = vm.start().unwrap();
        let said = Gdb::connect(&socket)
            .then("printf \"at %#lx\\n\", $pc")
            .then("stepi 2")
            .then(&format!("printf \"third: %d\\n\", $pc == {THIRD}"))
            .then("set $r15 = 0x1234567890")
            .then("printf \"r15 %#lx\\n\", $r15")
            .then("set {long}0x5000 = 42")
            .then("printf \"memory %d\\n\", {long}0x5000")
            .then("x/1bx 0xffff800000000000")
            .then("set $xmm0.uint128 = 1")
            .then("hbreak *0x100015")
            .then("continue")
            .then("printf \"then %#lx\\n\", $pc")
            .then("detach")
            .run();
        for words in [
            &format!("at {ENTRY}\n"),
            "third: 1\n",
            "r15 0x1234567890\n",
            "memory 42\n",
            "Cannot access memory at address 0xffff800000000000",
            "Could not write registers",
            "then 0x100015\n",
        ] {
            assert!(
                said.contains(words),
                "{words:?}: {said}\n{}",
                running.said()
            );
        }
        let done = running.wait().unwrap();
        done.assert_line("probe: boot ok");
        assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
    }
}

#[test]
fn a_running_guest_is_stopped_and_goes_on() {
    let vm = probe("probe.task=tick").debugged();
    let socket = vm.gdb_path();
    let running = vm.start().unwrap();
    Gdb::connect(&socket).then("detach").run();
    running.wait_for_line("probe: tick 2").unwrap();
    let said = Gdb::connect(&socket)
        .then("printf \"ring %d\\n\", $cs & 3")
        .then("info threads")
        .then("detach")
        .run();
    assert!(said.contains("ring 3\n"), "{said}");
    let ticks = running.said().matches("probe: tick").count();
    running
        .wait_for_line(&format!("probe: tick {}", ticks + 2))
        .unwrap();
    // One that breaks off in the middle of something is as if it had left.
    let mut rude = UnixStream::connect(&socket).unwrap();
    rude.write_all(b"$Z1,100015,1#77$m1000").unwrap();
    drop(rude);
    let ticks = running.said().matches("probe: tick").count();
    running
        .wait_for_line(&format!("probe: tick {}", ticks + 2))
        .unwrap();
    // Nonsense ends its connection, and nothing more.
    let mut nonsense = UnixStream::connect(&socket).unwrap();
    nonsense.write_all(&[0xff; 10_000]).unwrap();
    let _ = nonsense.write_all(b"$mffffffffffffffff,ffffffff#00$X#00");
    drop(nonsense);
    // A key that interrupts, as gdb's own session has it.
    let mut keyboard = UnixStream::connect(&socket).unwrap();
    keyboard
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    keyboard.write_all(b"$c#63").unwrap();
    let ticks = running.said().matches("probe: tick").count();
    running
        .wait_for_line(&format!("probe: tick {}", ticks + 2))
        .unwrap();
    keyboard.write_all(b"\x03").unwrap();
    let mut said = String::new();
    while !said.contains("#b") {
        let mut bytes = [0; 100];
        let count = keyboard.read(&mut bytes).unwrap();
        said.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
    assert!(said.contains("$S02#b5"), "{said}");
    drop(keyboard);
    Gdb::connect(&socket).then("kill").run();
    let done = running.wait().unwrap();
    assert_eq!(done.code, exit::ENDED_BY_HOST, "{done:#?}");
}

#[test]
fn other_programs_have_no_debugger() {
    let path = "/machine-config/gdb_socket_path";
    let vm = Vm::probe("probe.task=boot").set(path, "/run/gdb.sock".into());
    vm.assert_refused(
        exit::BAD_INPUT,
        &["machine-config.gdb_socket_path", "--features gdb"],
    );
}
