use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use super::*;

struct Fixture {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    epoll: Epoll,
    server: Server,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let epoll = Epoll::new().unwrap();
        let server = Server::new(listener, 100, &epoll).unwrap();
        Self {
            _dir: dir,
            path,
            epoll,
            server,
        }
    }

    fn client(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// Does what there is to do. Returns the paths that were asked for.
    fn turn(&mut self) -> Vec<String> {
        let mut paths = Vec::new();
        loop {
            let mut events = [EpollEvent::default(); 32];
            let count = self.epoll.wait(0, &mut events).unwrap();
            for event in &events[..count] {
                let event = (event.data(), event.event_set());
                assert!(self.server.on_event(event.0, event.1, &self.epoll));
            }
            let more = self.server.serve(&self.epoll, |request| {
                paths.push(request.head.path.clone());
                Response::done()
            });
            if count == 0 && !more {
                return paths;
            }
        }
    }
}

fn read(client: &mut UnixStream) -> String {
    client.set_nonblocking(true).unwrap();
    let mut text = Vec::new();
    let _ = client.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn other_events_are_not_its_own() {
    let mut fixture = Fixture::new();
    let event = |server: &mut Server, token| server.on_event(token, EventSet::IN, &fixture.epoll);
    assert!(!event(&mut fixture.server, 3));
    assert!(event(&mut fixture.server, TOKENS));
    assert!(event(&mut fixture.server, TOKENS + 1));
    assert!(event(&mut fixture.server, u64::MAX));
}

#[test]
fn serves_several_clients_in_turn() {
    let mut fixture = Fixture::new();
    let mut clients: Vec<_> = (0..5).map(|_| fixture.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let text = format!("GET /{number} HTTP/1.1\r\n\r\n").repeat(3);
        client.write_all(text.as_bytes()).unwrap();
    }
    let mut asked = fixture.turn();
    asked.sort();
    assert_eq!(asked.len(), 15);
    for client in &mut clients {
        assert_eq!(read(client).matches("204").count(), 3);
    }
    assert_eq!(fixture.server.deadline(), None);
    drop(clients);
    fixture.turn();
    assert!(fixture.server.clients.iter().all(Option::is_none));
}

#[test]
fn one_client_too_many_takes_the_place_of_an_idle_one() {
    let mut fixture = Fixture::new();
    let mut clients: Vec<_> = (0..MAX_CLIENTS)
        .map(|_| {
            let client = fixture.client();
            fixture.turn();
            client
        })
        .collect();
    // All but the third have half a request under way.
    for (number, client) in clients.iter_mut().enumerate() {
        if number != 3 {
            client.write_all(b"GET / HT").unwrap();
        }
    }
    fixture.turn();
    let mut another = fixture.client();
    another
        .write_all(b"GET /another HTTP/1.1\r\n\r\nGET /half HT")
        .unwrap();
    assert_eq!(fixture.turn(), ["/another"]);
    clients[3].set_nonblocking(false).unwrap();
    assert_eq!(clients[3].read(&mut [0]).unwrap(), 0, "it was let go");
    let mut turned_away = fixture.client();
    turned_away
        .write_all(b"GET /late HTTP/1.1\r\n\r\n")
        .unwrap();
    assert!(fixture.turn().is_empty());
    let said = read(&mut turned_away);
    assert!(said.starts_with("HTTP/1.1 503"), "{said}");
    // The first of those that hold a place to be through makes room.
    clients[0]
        .write_all(b"TP/1.1\r\nConnection: close\r\n\r\n")
        .unwrap();
    assert_eq!(fixture.turn(), ["/"]);
    let mut at_last = fixture.client();
    at_last.write_all(b"GET /last HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(fixture.turn(), ["/last"]);
}

#[test]
fn clients_that_are_too_slow_are_let_go() {
    let mut fixture = Fixture::new();
    let mut client = fixture.client();
    client.write_all(b"GET / HT").unwrap();
    fixture.turn();
    assert!(fixture.server.deadline().is_some());
    for client in fixture.server.clients.iter_mut().flatten() {
        let deadline = client.connection.deadline().unwrap();
        client.connection.expire(deadline);
    }
    fixture.server.expire(&fixture.epoll);
    assert_eq!(fixture.server.deadline(), None);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

/// Without a descriptor for one more client nobody is woken for it again and again, and it is served later.
#[test]
fn clients_wait_while_descriptors_are_short() {
    let name = "control::api::server::tests::clients_wait_while_descriptors_are_short";
    if !crate::testing::alone(name) {
        return;
    }
    let mut fixture = Fixture::new();
    let mut client = fixture.client();
    client.write_all(b"GET /late HTTP/1.1\r\n\r\n").unwrap();
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (soft, hard) = nix::sys::resource::getrlimit(limit).unwrap();
    // The first three are taken, so there is none below this.
    nix::sys::resource::setrlimit(limit, 3, hard).unwrap();
    assert!(fixture.turn().is_empty());
    // Nothing wakes us.
    let mut events = [EpollEvent::default(); 4];
    assert_eq!(fixture.epoll.wait(0, &mut events).unwrap(), 0);
    let due = fixture.server.deadline().unwrap();
    nix::sys::resource::setrlimit(limit, soft, hard).unwrap();
    std::thread::sleep(due.saturating_duration_since(Instant::now()));
    fixture.server.expire(&fixture.epoll);
    assert_eq!(fixture.turn(), ["/late"]);
    assert!(read(&mut client).starts_with("HTTP/1.1 204"));
}
