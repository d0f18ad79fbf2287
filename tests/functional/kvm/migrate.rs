//! `casemate migrate`: a machine moves by a command, here and over TLS, or stays where it is.

use std::path::Path;
use std::process::Command;

use casemate_tests::{Machine, Running, bin, exit};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::migration::{Pair, assert_goes_on};

/// The command's exit code when a machine has not moved.
const FAILED: u8 = 125;

fn migrate(args: &[&str]) -> Running {
    let mut command = Command::new(bin("casemate"));
    command.arg("migrate").args(args);
    Running::start(command, None).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// It runs there, and no round is missing or there twice.
fn assert_moved(pair: Pair, target: Machine) {
    let gone = pair.source.vm.wait().unwrap();
    assert_eq!(gone.code, exit::MOVED, "{gone:#?}");
    assert_goes_on(gone.stdout, &target);
    target.kill();
}

/// What the command says of a machine that has moved: rounds, MiB and a standstill that is none of nothing.
#[track_caller]
fn assert_figures(said: &str) {
    let words: Vec<&str> = said.split_whitespace().collect();
    let [
        "moved:",
        rounds,
        "rounds,",
        mib,
        "MiB,",
        "standstill",
        ms,
        "ms",
    ] = words[..]
    else {
        panic!("{said}");
    };
    assert!(rounds.parse::<u32>().unwrap() > 0, "{said}");
    mib.parse::<u64>().unwrap();
    assert!(ms.parse::<f64>().unwrap() > 0.0, "{said}");
}

#[test]
fn a_machine_moves_by_a_command() {
    let pair = Pair::new(true);
    let (target, api) = pair.target();
    let moved = migrate(&[text(&pair.source_api), text(&api), "--downtime", "10s"]);
    let moved = moved.wait().unwrap();
    assert_eq!(moved.code, 0, "{moved:#?}");
    assert_figures(&moved.stdout);
    assert_moved(pair, target);
}

/// One that never gets to its standstill: it is under way until somebody ends that.
fn under_way(pair: &mut Pair, args: &[&str]) -> Running {
    let endless = ["--downtime", "1ms", "--max-rounds", "4000000000"];
    let running = migrate(&[args, &endless].concat());
    pair.source.wait_until("it is under way", |machine| {
        let progress = machine.get("/migration");
        // Not what is left of another one.
        progress["phase"] != "failed" && progress["round"].as_u64() > Some(3)
    });
    running
}

#[test]
fn whatever_ends_the_way_the_machine_stays() {
    let mut pair = Pair::new(true);
    let source = pair.source_api.clone();
    // The other VMM dies.
    let (target, api) = pair.target();
    let running = under_way(&mut pair, &[text(&source), text(&api)]);
    assert_walled(running.pid());
    // And it tells meanwhile.
    running.wait_for_error_line("MiB sent").unwrap();
    target.kill();
    let ended = running.wait().unwrap();
    assert_eq!(ended.code, FAILED, "{ended:#?}");
    assert!(ended.stderr.contains("the machine runs on in"), "{ended:?}");
    pair.assert_stayed("connection");
    // Somebody does not want it any more.
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (mut target, api) = pair.target();
        let running = under_way(&mut pair, &[text(&source), text(&api)]);
        running.signal(signal).unwrap();
        let ended = running.wait().unwrap();
        assert_eq!(ended.code, FAILED, "{ended:#?}");
        assert!(ended.stderr.contains("cancelled"), "{ended:?}");
        pair.assert_stayed("cancelled");
        target.wait_until("it is as before", |it| {
            it.get("/")["state"] == "Not started"
        });
        target.kill();
    }
    // The command itself dies.
    let (target, api) = pair.target();
    let running = under_way(&mut pair, &[text(&source), text(&api)]);
    running.signal(Signal::SIGKILL).unwrap();
    running.wait().unwrap();
    pair.assert_stayed("connection");
    target.kill();
    // The guest is too fast.
    let (target, api) = pair.target();
    let few = ["--downtime", "1ms", "--max-rounds", "2"];
    let ended = migrate(&[&[text(&source), text(&api)], &few[..]].concat());
    let ended = ended.wait().unwrap();
    ended.assert_refused(FAILED, &["the machine runs on in", "after 2 rounds"]);
    // Neither a machine nor a socket.
    for args in [
        ["no-such", text(&api)],
        [text(&source), "/nowhere/api.sock"],
    ] {
        let ended = migrate(&args).wait().unwrap();
        assert_eq!(ended.code, FAILED, "{ended:#?}");
    }
    // One that is somebody's already.
    let ended = migrate(&[text(&source), text(&source)]).wait().unwrap();
    ended.assert_refused(FAILED, &["refuses", "runs on where it is"]);
    // Nothing of all that is in the way.
    let ended = migrate(&[text(&source), text(&api), "--downtime", "10s"]);
    assert_eq!(ended.wait().unwrap().code, 0);
    assert_moved(pair, target);
}

/// Nothing of root, and a filter.
fn assert_walled(pid: Pid) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().split_whitespace().collect::<Vec<_>>()
    };
    let id = 0x6361_0003.to_string();
    assert_eq!(field("Uid:"), [id.as_str(); 4]);
    assert_eq!(field("Gid:"), [id.as_str(); 4]);
    assert_eq!(field("CapEff:"), ["0000000000000000"]);
    assert_eq!(field("CapBnd:"), ["0000000000000000"]);
    assert_eq!(field("Seccomp:"), ["2"]);
    assert_eq!(field("NoNewPrivs:"), ["1"]);
}

/// Certificates as an operator would have them made.
struct Authority {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(dir.path().join("ca"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    fn path(&self, name: &str) -> String {
        text(&self.dir.path().join(name)).to_owned()
    }

    /// Options for an end with this name, which believes `other`.
    fn options(&self, name: &str, other: &Self) -> Vec<String> {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (cert, private) = (
            self.path(&format!("{name}.cert")),
            self.path(&format!("{name}.key")),
        );
        std::fs::write(&cert, certificate.pem()).unwrap();
        std::fs::write(&private, key.serialize_pem()).unwrap();
        let ca = other.path("ca");
        ["--cert", &cert, "--key", &private, "--ca", &ca]
            .map(str::to_owned)
            .to_vec()
    }
}

fn with<'a>(first: &[&'a str], options: &'a [String]) -> Vec<&'a str> {
    let options = options.iter().map(String::as_str);
    first.iter().copied().chain(options).collect()
}

/// The other end, and where it listens.
fn listen(api: &Path, options: &[String]) -> (Running, String) {
    let running = migrate(&with(&["--listen", "tcp:127.0.0.1:0", text(api)], options));
    let line = running.wait_for_line("listening on ").unwrap();
    let to = line.replace("listening on ", "tcp:");
    (running, to)
}

#[test]
fn a_machine_moves_over_tls() {
    let authority = Authority::new();
    let there = authority.options("there.example", &authority);
    let here = authority.options("here.example", &authority);
    let pair = Pair::new(true);
    let (target, api) = pair.target();
    let (listener, to) = listen(&api, &there);
    assert_walled(listener.pid());
    let name = ["--downtime", "10s", "--peer-name", "there.example"];
    let first = [&[text(&pair.source_api), to.as_str()], &name[..]].concat();
    let moved = migrate(&with(&first, &here)).wait().unwrap();
    assert_eq!(moved.code, 0, "{moved:#?}");
    assert_figures(&moved.stdout);
    let arrived = listener.wait().unwrap();
    assert_eq!(arrived.code, 0, "{arrived:#?}");
    assert!(arrived.stdout.contains("arrived: "), "{arrived:#?}");
    assert_moved(pair, target);
}

/// Whoever cannot show the right certificate gets nothing, and does not hear of the machine.
#[test]
fn who_is_not_of_the_authority_is_sent_away() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let there = ours.options("127.0.0.1", &ours);
    let mut pair = Pair::new(true);
    let source = pair.source_api.clone();
    let (mut target, api) = pair.target();
    let (listener, to) = listen(&api, &there);
    let stranger = theirs.options("stranger", &ours);
    let distrustful = ours.options("distrustful", &theirs);
    let here = ours.options("here", &ours);
    let no_options = Vec::new();
    for (options, more, words) in [
        // Of an authority that they do not know there.
        (&stranger, &[][..], "alert"),
        // Who does not know theirs.
        (&distrustful, &[], "invalid peer certificate"),
        // Who wants to speak with somebody else.
        (
            &here,
            &["--peer-name", "elsewhere.example"],
            "not valid for name",
        ),
        // Who has none: there is no way without.
        (&no_options, &[], "--cert"),
    ] {
        let first = [&[text(&source), to.as_str()], more].concat();
        let ended = migrate(&with(&first, options)).wait().unwrap();
        assert_eq!(ended.code, FAILED, "{ended:#?}");
        assert!(ended.stderr.contains(words), "{words}: {ended:#?}");
        assert_eq!(pair.source.get("/migration")["phase"], "offered");
        assert_eq!(pair.source.get("/migration")["round"], 0);
    }
    // Who speaks no TLS at all.
    let mut plain = std::net::TcpStream::connect(to.strip_prefix("tcp:").unwrap()).unwrap();
    std::io::Write::write_all(&mut plain, b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = std::io::Read::read_to_end(&mut plain, &mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    assert_eq!(target.get("/")["state"], "Not started");
    // The one that is meant still gets through; and its way breaks.
    let running = under_way(&mut pair, &with(&[text(&source), to.as_str()], &here));
    assert_walled(running.pid());
    listener.signal(Signal::SIGKILL).unwrap();
    let ended = running.wait().unwrap();
    assert_eq!(ended.code, FAILED, "{ended:#?}");
    assert!(ended.stderr.contains("the machine runs on in"), "{ended:?}");
    pair.assert_stayed("connection");
    // Its VMM is somebody's already: that is said across.
    target.put("/entropy", serde_json::json!({})).assert_done();
    let (listener, to) = listen(&api, &there);
    let ended = migrate(&with(&[text(&source), to.as_str()], &here));
    ended.wait().unwrap().assert_refused(FAILED, &["refuses"]);
    let ended = listener.wait().unwrap();
    ended.assert_refused(FAILED, &["refuses"]);
    // What the other VMM says when it cannot have the machine arrives as it was said.
    target.kill();
    let (target, api) = pair.target();
    let (listener, to) = listen(&api, &there);
    let running = under_way(&mut pair, &with(&[text(&source), to.as_str()], &here));
    running.signal(Signal::SIGINT).unwrap();
    let ended = running.wait().unwrap();
    assert!(ended.stderr.contains("cancelled"), "{ended:#?}");
    pair.assert_stayed("cancelled");
    listener
        .wait()
        .unwrap()
        .assert_refused(FAILED, &["no machine has come"]);
    target.kill();
    pair.source.kill();
}
