//! Runs where the VMM runs, and says on standard output what it finds there: one JSON line.
//!
//! Arguments as the jailer passes them, then a word for what to do besides reporting.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use casemate_broker::{Client, Handover, Kind, Operation};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

const WAIT: Duration = Duration::from_secs(5);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |name: &str| {
        let at = arguments.iter().position(|a| a == name)?;
        arguments.get(at + 1).cloned()
    };
    // Before anything is opened: numbers are the jailer's.
    let open = open_descriptors();
    let table: i32 = number("--handover-fd").unwrap().parse().unwrap();
    let mut handover = Handover::from_inherited(table).unwrap();
    let words: Vec<&str> = arguments.iter().skip(5).map(String::as_str).collect();
    // What the broker is making ends with the conversation.
    let mut conversation = None;
    match words.as_slice() {
        ["exit", code] => std::process::exit(code.parse().unwrap()),
        ["signal"] => wait_for_signal(),
        ["broker", requests @ ..] => {
            let socket = handover.take("broker", &[Kind::Broker]).unwrap();
            let client = conversation.insert(Client::new(socket));
            let answers: Vec<Value> = requests.iter().map(|r| ask(client, r)).collect();
            say(&json!({ "answers": answers }));
        }
        ["misbehave"] => {
            let socket = handover.take("broker", &[Kind::Broker]).unwrap();
            casemate_broker::fdpass::send(socket.as_fd(), b"{\"id\":1", None).unwrap();
            let gone = Client::new(socket)
                .call(
                    Operation::Open {
                        name: "x".into(),
                        write: false,
                    },
                    WAIT,
                )
                .unwrap_err();
            say(&json!({ "gone": gone.to_string() }));
        }
        ["accept", name] => {
            let listener = handover.take(name, &[Kind::Listener]).unwrap();
            let listener = std::os::unix::net::UnixListener::from(listener);
            listener.set_nonblocking(false).unwrap();
            say(&json!({}));
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(b"hello").unwrap();
        }
        _ => say(&report(&arguments, open, &mut handover)),
    }
    // Stay for whoever looks from outside.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    drop(conversation);
}

fn say(value: &Value) {
    println!("{value}");
    std::io::stdout().flush().unwrap();
}

fn open_descriptors() -> Vec<i32> {
    #[allow(unsafe_code)]
    let is_open = |number: &i32| {
        // SAFETY: borrowed for one call, which asks whether it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        fcntl(fd, FcntlArg::F_GETFD).is_ok()
    };
    (0..2048).filter(is_open).collect()
}

fn report(arguments: &[String], open: Vec<i32>, handover: &mut Handover) -> Value {
    let named: Vec<_> = handover
        .remaining()
        .map(|(n, k)| json!([n, format!("{k:?}")]))
        .collect();
    let mut contents = serde_json::Map::new();
    let files: Vec<String> = handover
        .remaining()
        .filter(|(_, kind)| matches!(kind, Kind::FileRo | Kind::FileRw))
        .map(|(name, _)| name.to_owned())
        .collect();
    for name in files {
        let fd = handover.take(&name, &[Kind::FileRo, Kind::FileRw]).unwrap();
        let mut text = String::new();
        std::fs::File::from(fd).read_to_string(&mut text).unwrap();
        contents.insert(name, text.into());
    }
    let attempts: Vec<_> = [
        "/",
        "/dev/null",
        "/proc/self/status",
        "/etc/passwd",
        "../../../etc/passwd",
        ".",
    ]
    .iter()
    .map(|path| json!([path, std::fs::File::open(path).is_ok()]))
    .collect();
    let uids = nix::unistd::getresuid().unwrap();
    let gids = nix::unistd::getresgid().unwrap();
    let interfaces: Vec<_> = nix::ifaddrs::getifaddrs()
        .map(|list| list.map(|i| (i.interface_name, i.flags.bits())).collect())
        .unwrap_or_default();
    json!({
        "arguments": arguments,
        "id": handover.id().as_str(),
        "jailed": handover.jailed(),
        "open": open,
        "named": named,
        "contents": contents,
        "attempts": attempts,
        "create": std::fs::write("/x", "x").is_ok(),
        "readdir": std::fs::read_dir("/").is_ok(),
        "uids": [uids.real.as_raw(), uids.effective.as_raw(), uids.saved.as_raw()],
        "gids": [gids.real.as_raw(), gids.effective.as_raw(), gids.saved.as_raw()],
        "groups": nix::unistd::getgroups().unwrap().len(),
        "environment": std::env::vars_os().count(),
        "pid": std::process::id(),
        "parent": nix::unistd::getppid().as_raw(),
        "interfaces": interfaces,
        "tcp": std::net::TcpStream::connect("127.0.0.1:1").err().and_then(|e| e.raw_os_error()),
        "no_file": nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap(),
        "chroot": nix::unistd::chroot("/").is_ok(),
        "setuid": nix::unistd::setuid(nix::unistd::Uid::from_raw(0)).is_ok(),
        "tcp_bind": std::net::TcpListener::bind("127.0.0.1:0").is_ok(),
    })
}

fn ask(client: &mut Client, request: &str) -> Value {
    let op = match request.split_once(':') {
        Some(("connect", rest)) => {
            let (device, port) = rest.rsplit_once(':').unwrap();
            Operation::Connect {
                device: device.into(),
                port: port.parse().unwrap(),
            }
        }
        Some(("create", name)) => Operation::Create { name: name.into() },
        Some((how @ ("commit" | "discard"), name)) => {
            let name = name.to_owned();
            let op = match how {
                "commit" => Operation::Commit { name },
                _ => Operation::Discard { name },
            };
            return match client.order(op, WAIT) {
                Ok(()) => json!("done"),
                Err(error) => json!({ "error": error.to_string() }),
            };
        }
        Some((how, name)) => Operation::Open {
            name: name.into(),
            write: how == "write",
        },
        None => panic!("{request}"),
    };
    match client.call(op.clone(), WAIT) {
        Ok(fd) if matches!(op, Operation::Connect { .. }) => {
            let mut stream = std::os::unix::net::UnixStream::from(fd);
            stream.write_all(b"from the jail").unwrap();
            json!("connected")
        }
        Ok(fd) if matches!(op, Operation::Create { .. }) => {
            let mut file = std::fs::File::from(fd);
            match file.write_all(&[b'x'; 8192]).and_then(|()| file.sync_all()) {
                Ok(()) => json!("made"),
                Err(error) => json!({ "error": error.to_string() }),
            }
        }
        Ok(fd) => {
            let mut text = String::new();
            std::fs::File::from(fd).read_to_string(&mut text).unwrap();
            json!({ "text": text })
        }
        Err(error) => json!({ "error": error.to_string() }),
    }
}

/// Ends as a VMM does that the host ends: with 12.
fn wait_for_signal() {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.thread_block().unwrap();
    say(&json!({}));
    assert_eq!(set.wait().unwrap(), Signal::SIGTERM);
    std::process::exit(i32::from(casemate_broker::exit::ENDED_BY_HOST));
}
