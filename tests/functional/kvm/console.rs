//! virtio-console against the probe's driver.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::probe;
use casemate_tests::{exit, pattern_disk, pattern_word, resident_mib};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::termios::{Winsize, tcsetwinsize};

#[test]
fn speaks_and_listens() {
    for jailed in [true, false] {
        let mut vm = probe("probe.task=console").console();
        if !jailed {
            vm = vm.unjailed();
        }
        let mut running = vm.start().unwrap();
        running.wait_for_line("probe: hello, console").unwrap();
        // More than fits anywhere at once.
        let line = "word ".repeat(1500);
        running.write(format!("{line}\n").as_bytes()).unwrap();
        let done = running.wait().unwrap();
        done.assert_line("probe: 0 columns, 0 rows");
        // The last words come from the serial port, letter by letter, perhaps in the middle of what the
        // console still has to say: so letters are counted that only one of them uses.
        let letters = |letter| done.stdout.matches(letter).count();
        assert_eq!(letters('w'), 1500 + "rows".matches('w').count());
        assert_eq!(letters('d'), 1500 + "heard".matches('d').count());
        assert_eq!(letters('k'), "ok".matches('k').count());
        assert_eq!(done.code, exit::GUEST_RESET);
    }
}

/// What is typed before a driver listens to the console goes to the serial port, not to both.
#[test]
fn the_serial_port_listens_where_the_console_has_no_driver() {
    let mut running = probe("probe.task=serial").console().start().unwrap();
    running.wait_for_line("probe: type a line").unwrap();
    running.write(b"to COM1\n").unwrap();
    running.wait().unwrap().assert_line("probe: heard to COM1");
}

#[test]
fn a_reader_that_stops_reading_neither_stops_the_guest_nor_fills_the_host() {
    const FLOOD: u64 = 4096 << 10;
    let vm = probe("probe.task=console probe.flood=4096").console();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    pattern_disk(&disk, 8).unwrap();
    let vm = vm.drive("data", &disk, false);
    let mut command = vm.command().unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    let last = 7 * 512;
    while std::fs::read(&disk).unwrap()[last..last + 8] == pattern_word(last as u64).to_le_bytes() {
        let ended = child.try_wait().unwrap();
        if ended.is_some() || began.elapsed() > Duration::from_secs(100) {
            child.kill().unwrap();
            let mut errors = String::new();
            child.stderr.unwrap().read_to_string(&mut errors).unwrap();
            panic!("the guest does not get on: {ended:?} {errors}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // Nobody has read a byte so far. Now what was kept: a pipe's worth, and the buffer's.
    let mut said = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(exit::GUEST_RESET.into()));
    let kept = said.iter().filter(|byte| **byte == b'~').count() as u64;
    assert!(kept > 64 << 10 && kept < FLOOD / 8, "{kept}");
    // The last words come from the serial port, letter by letter, between what the console still had.
    said.retain(|byte| *byte != b'~');
    let words = String::from_utf8_lossy(&said);
    assert!(words.contains("probe: console ok"), "{words}");
    let mut errors = String::new();
    child.stderr.unwrap().read_to_string(&mut errors).unwrap();
    let lines = errors
        .lines()
        .filter(|line| line.contains("nobody reads standard output"));
    assert_eq!(lines.count(), 8, "said, and not over and over: {errors}");
}

fn resize(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}

#[test]
fn a_terminal_is_as_large_in_the_guest() {
    let terminal = openpty(None, None).unwrap();
    let (ours, theirs) = (File::from(terminal.master), File::from(terminal.slave));
    resize(&ours, 120, 40);
    let vm = probe("probe.task=console probe.resize=1").console();
    let vm = vm.unjailed();
    let mut command = vm.command().unwrap();
    command.stdin(theirs).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mut seen = Vec::new();
    // The probe waits some seconds for whatever it waits for, so this ends.
    for line in output.lines() {
        let line = line.unwrap();
        match line.as_str() {
            "probe: hello, console" => {
                (&ours).write_all(b"x\n").unwrap();
            }
            "probe: resize me" => {
                resize(&ours, 90, 30);
                kill(Pid::from_raw(child.id() as i32), Signal::SIGWINCH).unwrap();
            }
            _ => {}
        }
        seen.push(line);
    }
    child.wait().unwrap();
    for line in [
        "probe: 120 columns, 40 rows",
        "probe: heard x",
        "probe: 90 columns, 30 rows",
        "probe: console ok",
    ] {
        assert!(seen.iter().any(|other| other == line), "{seen:#?}");
    }
}

/// Megabytes typed into a guest that never listens: whoever types waits, and nothing grows.
#[test]
fn a_guest_that_never_listens_keeps_nothing_of_what_is_typed() {
    const TYPED: usize = 8 << 20;
    for with_console in [false, true] {
        let vm = probe("idle").unjailed();
        let vm = if with_console { vm.console() } else { vm };
        let mut command = vm.command().unwrap();
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("probe: idle") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0);
        }
        let pid = Pid::from_raw(child.id() as i32);
        let before = resident_mib(pid).unwrap();
        let mut keyboard = child.stdin.take().unwrap();
        let typing = std::thread::spawn(move || keyboard.write_all(&vec![b'x'; TYPED]));
        std::thread::sleep(Duration::from_millis(500));
        assert!(!typing.is_finished(), "it was taken");
        let grown = resident_mib(pid).unwrap() - before;
        assert!(grown < 2, "{grown} MiB more");
        // It still does what it is told.
        kill(pid, Signal::SIGTERM).unwrap();
        kill(pid, Signal::SIGTERM).unwrap();
        assert_eq!(
            child.wait().unwrap().code(),
            Some(exit::ENDED_BY_HOST.into())
        );
        assert!(
            typing.join().unwrap().is_err(),
            "nobody was there to take it"
        );
    }
}
