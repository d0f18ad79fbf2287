//! gdb itself, as Debian has it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::process::Running;

/// A session of gdb's to be, connected to a VMM's stub.
pub struct Gdb {
    socket: PathBuf,
    commands: Vec<String>,
}

impl Gdb {
    /// Connects to `socket`, which may not be there yet.
    pub fn connect(socket: &Path) -> Self {
        let socket = socket.to_path_buf();
        let connect = format!("target remote {}", socket.display());
        Self {
            socket,
            commands: vec![connect],
        }
    }

    /// One more command.
    #[must_use]
    pub fn then(mut self, command: &str) -> Self {
        self.commands.push(command.to_owned());
        self
    }

    /// Runs the session: what gdb says.
    ///
    /// # Panics
    /// When there is no gdb, or it does not end within two minutes.
    #[track_caller]
    pub fn run(self) -> String {
        let patience = Instant::now() + Duration::from_secs(30);
        while !self.socket.exists() {
            assert!(
                Instant::now() < patience,
                "there is no {}",
                self.socket.display()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut command = Command::new("timeout");
        command.args(["120", "gdb", "-nx", "-quiet", "-batch"]);
        // What the kernel in the guest is, gdb learns from the stub alone.
        command.args([
            "-iex",
            "set pagination off",
            "-iex",
            "set tcp auto-retry off",
        ]);
        for words in &self.commands {
            command.args(["-ex", words]);
        }
        let done = Running::start(command, None).and_then(Running::wait);
        let done = done.unwrap_or_else(|error| panic!("gdb: {error:#}"));
        assert_ne!(done.code, 124, "gdb does not end: {done:#?}");
        format!("{}{}", done.stdout, done.stderr)
    }
}
