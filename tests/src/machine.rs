//! A machine that is configured, started and changed by requests.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::api::{ApiAnswer, ApiClient};
use crate::process::{PATIENCE, Running};
use crate::vm::Vm;

/// A machine before its start, and a client of it.
pub struct Machine {
    /// The process.
    pub vm: Running,
    /// Who asks.
    pub client: ApiClient,
}

impl Machine {
    /// Starts a VMM that waits to be configured.
    #[track_caller]
    pub fn new(vm: Vm) -> Self {
        let path = vm.api_path();
        let vm = vm.api().start().unwrap();
        let client = ApiClient::connect(&path).unwrap_or_else(|error| panic!("{error:#}"));
        Self { vm, client }
    }

    /// What a GET answers, which must be 200.
    #[track_caller]
    pub fn get(&mut self, path: &str) -> Value {
        let answer = self.ask("GET", path, Value::Null);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    }

    /// Any request; a null `body` is none.
    #[track_caller]
    pub fn ask(&mut self, method: &str, path: &str, body: Value) -> ApiAnswer {
        self.client
            .ask(method, path, &body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error:#}"))
    }

    /// A PUT.
    #[track_caller]
    pub fn put(&mut self, path: &str, body: Value) -> ApiAnswer {
        self.ask("PUT", path, body)
    }

    /// A PATCH.
    #[track_caller]
    pub fn patch(&mut self, path: &str, body: Value) -> ApiAnswer {
        self.ask("PATCH", path, body)
    }

    /// Puts the kernel of `config`, and the machine's size.
    #[track_caller]
    pub fn describe(&mut self, config: &Value) {
        self.put("/boot-source", config["boot-source"].clone())
            .assert_done();
        self.put("/machine-config", config["machine-config"].clone())
            .assert_done();
    }

    /// Starts the guest.
    #[track_caller]
    pub fn start(&mut self) {
        self.act("InstanceStart").assert_done();
    }

    /// `PUT /actions`
    #[track_caller]
    pub fn act(&mut self, action: &str) -> ApiAnswer {
        self.put("/actions", json!({ "action_type": action }))
    }

    /// Asks `is_so` until it is.
    #[track_caller]
    pub fn wait_until(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "not so: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends a guest that does not by itself.
    pub fn kill(self) {
        self.vm.signal(Signal::SIGKILL).unwrap();
        self.vm.wait().unwrap();
    }
}
