//! virtio-vsock and its Unix sockets, in both directions.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use super::probe;
use casemate_tests::{ApiClient, Finished, Running, Vm};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

pub fn connect(path: &Path, port: u32) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut answer = String::new();
    BufReader::with_capacity(1, &stream)
        .read_line(&mut answer)
        .unwrap();
    (stream, answer)
}

/// Sends `data` while it reads the echo, then shuts down: exactly that must come back, and the
/// machine end well.
#[track_caller]
fn assert_echo(vm: Running, mut stream: UnixStream, data: &[u8], expected: &[u8]) -> Finished {
    let mut writer = stream.try_clone().unwrap();
    let mut back = Vec::new();
    let (written, read) = std::thread::scope(|scope| {
        let written = scope.spawn(move || {
            writer.write_all(data)?;
            writer.shutdown(Shutdown::Write)
        });
        let read = stream.read_to_end(&mut back);
        (written.join().unwrap(), read)
    });
    // Looked at together: what the guest says explains a connection that broke.
    let done = vm.wait().unwrap();
    assert!(
        written.is_ok() && read.is_ok() && back == expected,
        "{written:?} {read:?}, {} bytes back of {}: {done:#?}",
        back.len(),
        expected.len()
    );
    done
}

fn megabyte() -> Vec<u8> {
    (0..1u32 << 18)
        .flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_le_bytes())
        .collect()
}

#[test]
fn the_host_connects_and_a_megabyte_comes_back() {
    for jailed in [false, true] {
        let mut vm = probe("probe.task=vsock probe.port=52").vsock();
        if !jailed {
            vm = vm.unjailed();
        }
        let path = vm.vsock_path();
        let vm = vm.start().unwrap();
        vm.wait_for_line("probe: listening on 52").unwrap();
        let (stream, answer) = connect(&path, 52);
        assert!(answer.starts_with("OK "), "{answer}");
        let data = megabyte();
        let done = assert_echo(vm, stream, &data, &data);
        done.assert_line("probe: echoed 1048576 bytes");
        done.assert_line("probe: vsock ok");
    }
}

#[test]
fn a_port_without_a_listener_closes_the_connection() {
    let vm = probe("probe.task=vsock probe.port=52").vsock();
    let path = vm.vsock_path();
    let vm = vm.start().unwrap();
    vm.wait_for_line("probe: listening on 52").unwrap();
    assert_eq!(connect(&path, 53).1, "");
    // The device lives on.
    let (stream, answer) = connect(&path, 52);
    assert!(answer.starts_with("OK "), "{answer}");
    assert_echo(vm, stream, b"still here", b"still here").assert_line("probe: vsock ok");
}

#[test]
fn peers_that_vanish_in_the_handshake_do_no_harm() {
    let vm = probe("probe.task=vsock probe.port=52").vsock();
    let path = vm.vsock_path();
    let vm = vm.start().unwrap();
    vm.wait_for_line("probe: listening on 52").unwrap();
    let request = b"CONNECT 52\n";
    for length in 0..request.len() - 1 {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(&request[..length]).unwrap();
    }
    for garbage in [
        &b"HELLO\n"[..],
        b"CONNECT\n",
        b"CONNECT 99999999999\n",
        &[b'C'; 4096],
    ] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        // It may have hung up already: that is a right answer too.
        let _ = stream.write_all(garbage);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{answer:?}");
    }
    let (stream, answer) = connect(&path, 52);
    assert!(answer.starts_with("OK "), "{answer}");
    assert_echo(vm, stream, b"still here", b"still here").assert_line("probe: vsock ok");
}

#[test]
fn bytes_behind_the_newline_of_the_handshake_arrive() {
    let vm = probe("probe.task=vsock probe.port=52").vsock();
    let path = vm.vsock_path();
    let vm = vm.start().unwrap();
    vm.wait_for_line("probe: listening on 52").unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(b"CONNECT 52\nearly").unwrap();
    let mut answer = String::new();
    BufReader::with_capacity(1, &stream)
        .read_line(&mut answer)
        .unwrap();
    assert!(answer.starts_with("OK "), "{answer}");
    assert_echo(vm, stream, b" bird", b"early bird").assert_line("probe: vsock ok");
}

#[test]
fn the_guest_connects_through_the_broker() {
    for jailed in [false, true] {
        let mut vm = probe("probe.task=vsock-connect probe.port=1024").vsock();
        if !jailed {
            vm = vm.unjailed();
        }
        let path = format!("{}_1024", vm.vsock_path().display());
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let vm = vm.start().unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
        let data = megabyte();
        assert_echo(vm, stream, &data, &data).assert_line("probe: vsock-connect ok");
    }
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let vm = probe("probe.task=vsock-connect probe.port=1024").vsock();
    let done = vm.run().unwrap();
    done.assert_line("probe: vsock-connect FAIL: the host refused the connection");
}

/// Through the jail, with its bound of descriptors, in both directions; between them peers that vanish.
#[test]
fn a_thousand_connections_are_open_at_once() {
    const COUNT: usize = 1000;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(8192).min(hard), hard).unwrap();
    let vm = probe(&format!(
        "probe.task=vsock-many probe.port=52 probe.count={COUNT}"
    ))
    .vsock();
    let path = vm.vsock_path();
    let listening = format!("{}_53", path.display());
    let listener = UnixListener::bind(&listening).unwrap();
    std::fs::set_permissions(&listening, std::fs::Permissions::from_mode(0o666)).unwrap();
    let vm = vm.start().unwrap();
    vm.wait_for_line("probe: listening on 52").unwrap();

    for length in 0..64 {
        // A host that vanishes, without a look at what comes back; a guest that does.
        connect(&path, 54).0.write_all(&[7; 64][..length]).unwrap();
        let (mut stream, _) = connect(&path, 54);
        let data = [&[7; 64][..length], b"!"].concat();
        stream.write_all(&data).unwrap();
        let mut back = Vec::new();
        let _ = stream.read_to_end(&mut back);
        assert!(data.starts_with(&back), "{back:?}");
    }

    let streams: Vec<UnixStream> = (0..COUNT).map(|_| connect(&path, 52).0).collect();
    vm.wait_for_line("probe: all are open").unwrap();
    for (number, mut stream) in streams.iter().enumerate() {
        write!(stream, "{number}").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    }
    for (number, stream) in streams.into_iter().enumerate() {
        assert_eq!(
            std::io::read_to_string(stream).unwrap(),
            format!("{number}bye")
        );
    }

    let streams: Vec<UnixStream> = (0..COUNT).map(|_| listener.accept().unwrap().0).collect();
    vm.wait_for_line("probe: all are called").unwrap();
    for mut stream in streams {
        let line = std::io::read_to_string(&stream).unwrap();
        assert_eq!(line, "line");
        stream.write_all(line.as_bytes()).unwrap();
    }
    let done = vm.wait().unwrap();
    done.assert_line("probe: vsock-many ok");
}

/// The machine that `vm` is, and a client of its API.
fn served(vm: Vm) -> (Running, ApiClient) {
    let api = vm.api_path();
    let running = vm.served().start().unwrap();
    (running, ApiClient::connect(&api).unwrap())
}

#[track_caller]
fn set_state(api: &mut ApiClient, state: &str) {
    let answer = api.ask("PATCH", "/vm", &json!({ "state": state }));
    answer.unwrap().assert_done();
}

/// What is said to a paused guest, more than there is room for anywhere, arrives when it runs on; who vanishes meanwhile does no
/// harm.
#[test]
fn a_connection_outlives_a_pause_in_both_directions() {
    for task in ["vsock", "vsock-connect"] {
        let vm = probe(&format!("probe.task={task} probe.port=1024")).vsock();
        let path = vm.vsock_path();
        let called = format!("{}_1024", path.display());
        let listener = UnixListener::bind(&called).unwrap();
        std::fs::set_permissions(&called, std::fs::Permissions::from_mode(0o666)).unwrap();
        let (running, mut api) = served(vm);
        let mut stream = if task == "vsock" {
            running.wait_for_line("probe: listening on 1024").unwrap();
            connect(&path, 1024).0
        } else {
            let mut stream = listener.accept().unwrap().0;
            stream.read_exact(&mut [0; 5]).unwrap();
            stream
        };
        stream.write_all(b"before").unwrap();
        stream.read_exact(&mut [0; 6]).unwrap();
        set_state(&mut api, "Paused");
        let data = megabyte();
        let mut writer = stream.try_clone().unwrap();
        let said = data.clone();
        let writing = std::thread::spawn(move || {
            writer.write_all(&said).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        for length in 0..10 {
            let mut vanishing = UnixStream::connect(&path).unwrap();
            vanishing.write_all(&b"CONNECT 52"[..length]).unwrap();
        }
        stream
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let early = stream.read(&mut [0]);
        assert!(early.is_err(), "a paused guest answers: {early:?}");
        assert!(!writing.is_finished(), "a megabyte was taken");
        set_state(&mut api, "Resumed");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        writing.join().unwrap();
        let done = running.wait().unwrap();
        assert!(back == data, "{} bytes: {done:#?}", back.len());
        done.assert_line(&format!("probe: {task} ok"));
    }
}

/// Ends that come during a pause, and connections that are made after it.
#[test]
fn connections_end_and_begin_around_a_pause() {
    const COUNT: usize = 20;
    let vm = probe(&format!(
        "probe.task=vsock-many probe.port=52 probe.count={COUNT}"
    ));
    let vm = vm.vsock();
    let path = vm.vsock_path();
    let called = format!("{}_53", path.display());
    let listener = UnixListener::bind(&called).unwrap();
    std::fs::set_permissions(&called, std::fs::Permissions::from_mode(0o666)).unwrap();
    let (running, mut api) = served(vm);
    running.wait_for_line("probe: listening on 52").unwrap();
    let streams: Vec<UnixStream> = (0..COUNT).map(|_| connect(&path, 52).0).collect();
    running.wait_for_line("probe: all are open").unwrap();
    set_state(&mut api, "Paused");
    for (number, mut stream) in streams.iter().enumerate() {
        write!(stream, "{number}").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    }
    set_state(&mut api, "Resumed");
    for (number, stream) in streams.into_iter().enumerate() {
        let said = std::io::read_to_string(stream).unwrap();
        assert_eq!(said, format!("{number}bye"));
    }
    let streams: Vec<UnixStream> = (0..COUNT).map(|_| listener.accept().unwrap().0).collect();
    running.wait_for_line("probe: all are called").unwrap();
    set_state(&mut api, "Paused");
    let answers: Vec<_> = streams
        .into_iter()
        .map(|mut stream| {
            std::thread::spawn(move || {
                let line = std::io::read_to_string(&stream).unwrap();
                stream.write_all(line.as_bytes()).unwrap();
                line
            })
        })
        .collect();
    set_state(&mut api, "Resumed");
    for answer in answers {
        assert_eq!(answer.join().unwrap(), "line");
    }
    running.wait().unwrap().assert_line("probe: vsock-many ok");
}
