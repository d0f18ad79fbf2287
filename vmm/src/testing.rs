//! Help for tests that change the process they run in.

use std::process::Command;

const MARK: &str = "CASEMATE_TEST_ALONE";

/// Runs the test called `name` (with its modules) in a process of its own, and fails unless it passes
/// there. True in that process: it is then to do its work.
pub fn alone(name: &str) -> bool {
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", name])
        .env(MARK, "1")
        // As `memory::heap` does for the VMM, but before the harness starts a thread: a thread with a heap of
        // its own opens a file before it gives memory back.
        .env("MALLOC_ARENA_MAX", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{}: {text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    false
}
