//! Compiles `policy/x86_64/*.json` to BPF templates and writes them as Rust data.
//!
//! A policy that is not understood in full fails the build: an unknown system call, argument or
//! constant, a rule without a reason, a rule that another one repeats.

mod compile;
mod condition;
mod constants;
mod emit;
mod policy;
mod shrink;

use std::path::Path;
use std::process::exit;

const POLICIES: &str = "policy/x86_64";

fn main() {
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed={POLICIES}");
    if let Err(message) = build() {
        // Cargo shows such a line as the error of this crate.
        println!("cargo::error=seccomp policy: {message}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let variable = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
    if variable("CARGO_CFG_TARGET_ARCH")? != "x86_64" {
        return Err("there are policies for x86_64 alone".into());
    }
    let policies = policy::load(Path::new(POLICIES))?;
    let templates = compile::templates(&policies)?;
    let out = Path::new(&variable("OUT_DIR")?).join("templates.rs");
    std::fs::write(&out, emit::rust(&templates)?)
        .map_err(|error| format!("write {}: {error}", out.display()))
}
