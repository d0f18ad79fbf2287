use std::io::{Read as _, Write as _};

use super::super::http::Status;
use super::*;

const MAX_BODY: usize = 100;

fn pair() -> (UnixStream, Connection) {
    let (client, server) = UnixStream::pair().unwrap();
    (client, Connection::new(server))
}

/// The requests that come of `bytes`, each answered at once.
fn serve(connection: &mut Connection) -> Vec<Request> {
    connection.receive(MAX_BODY);
    let mut requests = Vec::new();
    while let Some(request) = connection.next(MAX_BODY) {
        let close = request.head.close;
        connection.answer(&Response::done(), close);
        requests.push(request);
    }
    requests
}

fn said(client: &mut UnixStream) -> String {
    client.set_nonblocking(true).unwrap();
    let mut text = Vec::new();
    let _ = client.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn requests_may_come_byte_by_byte_or_several_at_once() {
    let text = b"PUT /a HTTP/1.1\r\nContent-Length: 3\r\n\r\n{1}GET /b HTTP/1.1\r\n\r\n";
    let (mut client, mut connection) = pair();
    let mut found = Vec::new();
    for byte in text {
        client.write_all(&[*byte]).unwrap();
        found.extend(serve(&mut connection));
    }
    client.write_all(text).unwrap();
    found.extend(serve(&mut connection));
    let paths: Vec<_> = found.iter().map(|r| r.head.path.as_str()).collect();
    assert_eq!(paths, ["/a", "/b", "/a", "/b"]);
    assert_eq!(found[2].body, b"{1}");
    assert_eq!(said(&mut client).matches("204 No Content").count(), 4);
    assert!(connection.is_idle() && connection.deadline().is_none());
}

#[test]
fn half_a_request_has_a_deadline_that_its_bytes_do_not_move() {
    let (mut client, mut connection) = pair();
    assert!(connection.is_idle());
    client.write_all(b"GET / HT").unwrap();
    assert!(serve(&mut connection).is_empty());
    let deadline = connection.deadline().unwrap();
    client.write_all(b"TP/1").unwrap();
    assert!(serve(&mut connection).is_empty());
    assert_eq!(connection.deadline(), Some(deadline));
    connection.expire(deadline - Duration::from_millis(1));
    assert!(!connection.is_closed() && !connection.is_idle());
    connection.expire(deadline);
    assert!(connection.is_closed());
}

#[test]
fn a_client_that_does_not_read_gets_no_more_work_done() {
    let (mut client, mut connection) = pair();
    client
        .write_all(&b"GET / HTTP/1.1\r\n\r\n".repeat(10))
        .unwrap();
    connection.receive(MAX_BODY);
    connection.next(MAX_BODY).unwrap();
    let large = Response::json("x".repeat(4 << 20));
    connection.answer(&large, false);
    assert!(connection.is_sending());
    assert!(connection.next(MAX_BODY).is_none());
    let deadline = connection.deadline().unwrap();
    connection.expire(deadline);
    assert!(connection.is_closed());
}

#[test]
fn an_answer_is_sent_in_the_pieces_that_the_client_takes() {
    let (mut client, mut connection) = pair();
    client
        .write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        .unwrap();
    connection.receive(MAX_BODY);
    connection.next(MAX_BODY).unwrap();
    connection.answer(&Response::json("x".repeat(4 << 20)), true);
    let mut text = String::new();
    while connection.is_sending() {
        text.push_str(&said(&mut client));
        connection.send();
    }
    text.push_str(&said(&mut client));
    assert!(text.len() > 4 << 20);
    assert!(connection.is_closed());
}

#[test]
fn leave_to_send_a_body_is_given_once() {
    let (mut client, mut connection) = pair();
    let head = b"PUT / HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n";
    client.write_all(head).unwrap();
    assert!(serve(&mut connection).is_empty());
    assert_eq!(said(&mut client), "HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"{1").unwrap();
    assert!(serve(&mut connection).is_empty());
    assert_eq!(said(&mut client), "");
    client.write_all(b"}").unwrap();
    assert_eq!(serve(&mut connection)[0].body, b"{1}");
    assert!(said(&mut client).starts_with("HTTP/1.1 204"));
}

#[test]
fn a_client_that_is_refused_may_read_why() {
    for bytes in [
        &b"PUT / HTTP/1.1\r\nContent-Length: 101\r\n\r\n"[..],
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        &[b'x'; MAX_HEAD + MAX_BODY],
        b"\r\n\x16\x03\x01",
    ] {
        let (mut client, mut connection) = pair();
        client.write_all(bytes).unwrap();
        assert!(serve(&mut connection).is_empty());
        assert!(!connection.is_idle());
        // What it sends on is thrown away, and only so much and so long.
        client.write_all(&[b'y'; 5000]).unwrap();
        assert!(serve(&mut connection).is_empty());
        let said = said(&mut client);
        assert!(said.starts_with("HTTP/1.1 4"), "{said}");
        assert!(said.contains("Connection: close") && said.contains("fault_message"));
        assert!(connection.input.is_empty());
        connection.expire(Instant::now() + LINGER);
        assert!(connection.is_closed());
    }
}

#[test]
fn a_client_that_goes_is_forgotten() {
    let (mut client, mut connection) = pair();
    client.write_all(b"GET / HT").unwrap();
    drop(client);
    assert!(serve(&mut connection).is_empty());
    assert!(!connection.is_closed());
    assert!(serve(&mut connection).is_empty());
    assert!(connection.is_closed());
    let (mut client, mut connection) = pair();
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    connection.receive(MAX_BODY);
    drop(client);
    connection.next(MAX_BODY).unwrap();
    connection.answer(&Response::fault(Status::BadRequest, "x"), false);
    assert!(connection.is_closed());
}

#[test]
fn what_is_kept_is_bounded() {
    let (client, mut connection) = pair();
    client.set_nonblocking(true).unwrap();
    let mut client = client;
    // Never answered: nobody asks for the next request.
    for _ in 0..1000 {
        let _ = client.write(&[b'x'; 4096]);
        connection.receive(MAX_BODY);
    }
    assert!(connection.input.len() <= MAX_HEAD + MAX_BODY);
}
