//! The host's side of a guest's sockets; `casemate-guest-tool` is the other one.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// A connection to the guest's server on `port`.
pub fn connect(path: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut answer = [0];
    while answer != *b"\n" {
        stream.read_exact(&mut answer).unwrap();
    }
    stream
}

/// Twenty connections to the guest's server on `port` at once; on each what is said comes back, and its length when no more is.
pub fn call(path: &Path, port: u32) {
    let streams: Vec<UnixStream> = (0..20).map(|_| connect(path, port)).collect();
    for (number, mut stream) in streams.into_iter().enumerate() {
        let said = "x".repeat(number * 100);
        stream.write_all(said.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = String::new();
        stream.read_to_string(&mut back).unwrap();
        assert_eq!(back, format!("{said}{}", said.len()));
    }
}

/// Serves the guest's calls: what is said on each comes back when no more is.
pub fn callee(vsock: &Path) -> std::thread::JoinHandle<()> {
    let path = format!("{}_1024", vsock.display());
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    std::thread::spawn(move || {
        let streams: Vec<UnixStream> = (0..20).map(|_| listener.accept().unwrap().0).collect();
        for mut stream in streams {
            let mut said = Vec::new();
            stream.read_to_end(&mut said).unwrap();
            stream.write_all(&said).unwrap();
        }
        std::fs::remove_file(path).unwrap();
    })
}
