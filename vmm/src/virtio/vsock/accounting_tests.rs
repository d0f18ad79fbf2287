//! What is owed: credit, data that waits for the host, and word of a connection's end.

use std::io::Write as _;

use super::packet::op;
use super::testing::*;

#[test]
fn a_guest_that_says_it_has_no_room_is_not_asked_again() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.called(52);
    guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| header.buf_alloc = 0);
    host.write_all(b"hello").unwrap();
    guest.receive(op::CREDIT_REQUEST);
    for _ in 0..3 {
        guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| header.buf_alloc = 0);
        guest.silent();
    }
    // Room for a part; then it is asked once more.
    guest.send_with(ports, op::CREDIT_UPDATE, &[], |header| header.buf_alloc = 2);
    assert_eq!(guest.receive(op::RW).1, b"he");
    guest.receive(op::CREDIT_REQUEST);
    guest.silent();
    guest.send(ports, op::CREDIT_UPDATE, &[]);
    assert_eq!(guest.receive(op::RW).1, b"llo");
}
