//! Clients of the API that are slow, wrong, too large or too many.

use casemate_tests::{ApiClient, Running, Vm, exit};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

struct Machine {
    vm: Running,
    path: std::path::PathBuf,
}

impl Machine {
    fn new(vm: Vm) -> Self {
        let path = vm.api_path();
        let vm = vm.api().start().unwrap();
        let machine = Self { vm, path };
        machine.client();
        machine
    }

    fn client(&self) -> ApiClient {
        ApiClient::connect(&self.path).unwrap()
    }

    /// A new client is still served.
    #[track_caller]
    fn assert_serves(&self) {
        let answer = self.client().ask("GET", "/", &Value::Null).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    fn end(self) {
        self.assert_serves();
        self.vm.signal(Signal::SIGTERM).unwrap();
        assert_eq!(self.vm.wait().unwrap().code, exit::ENDED_BY_HOST);
    }
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let machine = Machine::new(Vm::probe(""));
    let mut client = machine.client();
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\n\r\n");
    let paths = ["/", "/version", "/nothing", "/machine-config"];
    let text: String = paths.iter().map(|path| request(path)).collect();
    client.send(text.repeat(20).as_bytes()).unwrap();
    for _ in 0..20 {
        let answers = paths.map(|_| client.answer().unwrap());
        assert_eq!(answers.each_ref().map(|a| a.status), [200, 200, 400, 200]);
        assert!(answers[1].body["firecracker_version"].is_string());
        assert_eq!(answers[3].body["vcpu_count"], 1);
    }
    machine.end();
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let machine = Machine::new(Vm::probe("").unjailed());
    let mut client = machine.client();
    let body = json!({"vcpu_count": 2, "mem_size_mib": 64}).to_string();
    let length = body.len();
    let text = format!("PUT /machine-config HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
    for byte in text.as_bytes() {
        client.send(&[*byte]).unwrap();
        // Others do not wait for it.
        if *byte == b'\n' {
            machine.assert_serves();
        }
    }
    assert_eq!(client.answer().unwrap().status, 204);
    machine.end();
}

#[test]
fn leave_to_send_a_body_is_given() {
    let machine = Machine::new(Vm::probe(""));
    let mut client = machine.client();
    let head = "PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
    client.send(head.as_bytes()).unwrap();
    assert_eq!(client.answer().unwrap().status, 100);
    client.send(b"{}").unwrap();
    client.answer().unwrap().assert_done();
    machine.end();
}

#[test]
fn what_cannot_be_bounded_is_refused_and_the_connection_ends() {
    let machine = Machine::new(
        Vm::probe("")
            .vmm_arg("--http-api-max-payload-size")
            .vmm_arg("100"),
    );
    let chunked =
        b"PUT /entropy HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n";
    let large = format!(
        "PUT /entropy HTTP/1.1\r\nContent-Length: 101\r\n\r\n{}",
        " ".repeat(101)
    );
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000));
    for (bytes, status) in [
        (&chunked[..], 411),
        (large.as_bytes(), 413),
        (long.as_bytes(), 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n\r\n", 400),
    ] {
        let mut client = machine.client();
        client.send(bytes).unwrap();
        let answer = client.answer().unwrap();
        assert_eq!(answer.status, status);
        assert!(
            answer.body["fault_message"].is_string() && answer.head.contains("connection: close")
        );
        assert!(client.is_ended().unwrap_or(true));
    }
    let mut client = machine.client();
    let fits = json!({"rate_limiter": null});
    client.ask("PUT", "/entropy", &fits).unwrap().assert_done();
    machine.end();
}

#[test]
fn many_clients_are_served_and_idle_ones_make_room() {
    let machine = Machine::new(Vm::probe(""));
    let mut idle: Vec<_> = (0..100).map(|_| machine.client()).collect();
    machine.assert_serves();
    // The last ones are connected still, the first are not.
    let last = idle.last_mut().unwrap();
    assert_eq!(last.ask("GET", "/", &Value::Null).unwrap().status, 200);
    assert!(idle[0].ask("GET", "/", &Value::Null).is_err());
    // Descriptors are bounded: not one for each of these.
    machine.end();
}

/// Clients that stop in the middle hold their places, and no more than those: the guest runs on.
#[test]
fn half_sent_requests_and_clients_that_do_not_read_hold_nobody_up() {
    for jailed in [false, true] {
        let mut vm = Vm::probe("probe.task=serial");
        if !jailed {
            vm = vm.unjailed();
        }
        let config = vm.config().clone();
        let mut machine = Machine::new(vm);
        let mut client = machine.client();
        for section in ["boot-source", "machine-config"] {
            let path = format!("/{section}");
            client
                .ask("PUT", &path, &config[section])
                .unwrap()
                .assert_done();
        }
        let start = json!({"action_type": "InstanceStart"});
        client.ask("PUT", "/actions", &start).unwrap().assert_done();
        machine.vm.wait_for_line("probe: type a line").unwrap();
        let mut half: Vec<_> = (0..7).map(|_| machine.client()).collect();
        for client in &mut half {
            client.send(b"PUT /entropy HTTP/1.1\r\nContent-Le").unwrap();
        }
        let mut deaf: Vec<_> = (0..7).map(|_| machine.client()).collect();
        for client in &mut deaf {
            client
                .send(&b"GET /vm/config HTTP/1.1\r\n\r\n".repeat(200))
                .unwrap();
        }
        machine.assert_serves();
        machine.vm.write(b"hello\n").unwrap();
        let done = machine.vm.wait().unwrap();
        done.assert_line("probe: heard hello");
        done.assert_line("probe: serial ok");
    }
}
