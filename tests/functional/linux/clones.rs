//! Linux guests are saved by `casemate snapshot`, and go on by `casemate clone`: as machines that are not each other.

use std::collections::BTreeSet;
use std::time::Duration;

use casemate_tests::{Casemate, Finished, Netns, Running, exit, unique_id};
use nix::sys::signal::Signal;

/// Turn after turn, without a pause: the host's name, and what the kernel draws. The kernel seeds its generator anew when it is
/// asked and the last time is longer ago than half of its life: so that is done before, and not by chance in between.
const SCRIPT: &str = "
sleep 15
n=0
while :; do
    n=$((n + 1))
    echo \"turn $n $(hostname) $(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n')\"
done
";

fn start(casemate: &Casemate, id: &str, options: &[&str], script: &str) -> Running {
    let own = ["--id", id, "--snapshots", "-m", "128"];
    casemate
        .start(&[&own[..], options].concat(), script)
        .unwrap()
}

/// A command of `casemate` that has nothing to complain about.
#[track_caller]
fn done(casemate: &Casemate, words: &[&str]) {
    let done = casemate.call(words).unwrap();
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:#?}");
}

/// Turns, names and numbers of the lines that begin with `prefix`.
fn turns(said: &str, prefix: &str) -> Vec<(u32, String, String)> {
    let lines = said.lines().filter_map(|line| line.strip_prefix(prefix));
    let words = lines.map(|line| line.split(' ').map(str::to_owned).collect::<Vec<_>>());
    let turn = |words: Vec<String>| match words.as_slice() {
        [turn, number, name, random] if turn == "turn" && random.len() == 32 => {
            Some((number.parse().ok()?, name.clone(), random.clone()))
        }
        _ => None,
    };
    words.filter_map(turn).collect()
}

#[test]
fn clones_are_not_each_other() {
    let casemate = Casemate::new();
    let (id, clones) = (unique_id("origin"), unique_id("clone"));
    let origin = start(&casemate, &id, &[], SCRIPT);
    origin.wait_for_line("turn 3").unwrap();
    done(&casemate, &["snapshot", "create", &id, &id]);
    // It goes on, undisturbed.
    let saved = turns(&origin.said(), "").len();
    origin
        .wait_for_line(&format!("turn {}", saved + 5))
        .unwrap();

    let words = ["clone", "-n", "3", "--id", &clones, &id];
    let run = Running::start(casemate.command(&words), None).unwrap();
    let ids: Vec<String> = (1..=3).map(|number| format!("{clones}-{number}")).collect();
    for id in &ids {
        // Four more than there were, at least.
        run.wait_for_line(&format!("{id}\tturn {}", saved + 5))
            .unwrap();
    }
    let listed = casemate.call(&["ps", "--quiet"]).unwrap().stdout;
    let listed: BTreeSet<&str> = listed.lines().collect();
    let all = ids.iter().chain([&id]).map(String::as_str);
    assert_eq!(listed, all.collect());
    run.signal(Signal::SIGTERM).unwrap();
    let run = run.wait().unwrap();
    assert_eq!(run.code, exit::by_signal(15), "{run:#?}");
    assert_eq!(run.stderr, "");
    origin.signal(Signal::SIGTERM).unwrap();
    let origin = origin.wait().unwrap();
    assert_eq!(origin.stderr, "");
    for id in ids.iter().chain([&id]) {
        casemate.assert_nothing_of(id);
    }

    let first = turns(&origin.stdout, "");
    let numbers: Vec<u32> = first.iter().map(|(number, ..)| *number).collect();
    let last = u32::try_from(first.len()).unwrap();
    assert_eq!(numbers, (1..=last).collect::<Vec<_>>(), "every turn once");
    let mut randoms = BTreeSet::new();
    let mut count = 0;
    for (_, name, random) in &first {
        assert_eq!(*name, id);
        assert!(randoms.insert(random.clone()), "{random} twice");
        count += 1;
    }
    for id in &ids {
        let turns = turns(&run.stdout, &format!("{id}\t"));
        assert!(turns.len() >= 4, "{}", run.stdout);
        for pair in turns.windows(2) {
            assert_eq!(pair[0].0 + 1, pair[1].0, "{turns:?}");
        }
        // What it was at when it was saved may have asked for the name before.
        for (_, name, random) in turns.iter().skip(1) {
            assert_eq!(name, id);
            assert!(randoms.insert(random.clone()), "{random} twice");
            count += 1;
        }
    }
    assert_eq!(randoms.len(), count);
    done(&casemate, &["snapshot", "verify", &id]);
    done(&casemate, &["snapshot", "rm", &id]);
}

/// The first that is drawn after machines have parted, in a guest where nothing else goes on that could make a difference: the
/// kernel seeds its generator anew when it is asked and the last time is longer ago than half of its life. So that is done
/// just before.
#[test]
fn what_clones_draw_first_is_their_own() {
    let casemate = Casemate::new();
    let (id, clones) = (unique_id("origin"), unique_id("clone"));
    let script = "sleep 15; head -c 1 /dev/urandom > /dev/null; echo ready; read line; head -c 16 /dev/urandom | od -An -tx1";
    let mut origin = start(&casemate, &id, &[], script);
    origin.wait_for_line("ready").unwrap();
    done(&casemate, &["snapshot", "create", &id, &id]);
    origin.write(b"\n").unwrap();
    let words = ["clone", "-n", "4", "--id", &clones, &id];
    let run = casemate.call(&words).unwrap();
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:#?}");
    let origin = origin.wait().unwrap();
    let own = origin.stdout.lines().filter(|line| *line != "ready");
    let others = run.stdout.lines().filter_map(|line| line.split_once('\t'));
    let drawn: Vec<&str> = own.chain(others.map(|(_, drawn)| drawn)).collect();
    let different: BTreeSet<&str> = drawn.iter().copied().collect();
    assert_eq!((drawn.len(), different.len()), (5, 5), "{drawn:#?}");
    done(&casemate, &["snapshot", "rm", &id]);
}

#[test]
fn a_clone_has_streams_and_an_end_of_its_own() {
    let casemate = Casemate::new();
    let (id, clone) = (unique_id("origin"), unique_id("clone"));
    let script = "echo ready; read line; echo got $line in $(hostname); exit $line";
    let mut origin = start(&casemate, &id, &[], script);
    origin.wait_for_line("ready").unwrap();
    done(&casemate, &["snapshot", "create", &id, &id]);
    origin.write(b"5\n").unwrap();
    let origin = origin.wait().unwrap();
    assert_eq!((origin.code, origin.stderr.as_str()), (5, ""));
    assert_eq!(origin.stdout, format!("ready\ngot 5 in {id}\n"));
    for code in [0, 6] {
        let words = ["clone", "--id", &clone, &id];
        let mut run = Running::start(casemate.command(&words), None).unwrap();
        run.write(format!("{code}\n").as_bytes()).unwrap();
        let run = run.wait().unwrap();
        assert_eq!((run.code, run.stderr.as_str()), (code, ""));
        assert_eq!(run.stdout, format!("got {code} in {clone}\n"));
        casemate.assert_nothing_of(&clone);
    }
    done(&casemate, &["snapshot", "rm", &id]);
}

/// One that was saved on its way to its command goes on to that, and is who it is.
#[test]
fn a_guest_that_is_saved_while_it_boots_runs_its_command() {
    let casemate = Casemate::new();
    for wait in [0, 1500, 3000] {
        let (id, clone) = (unique_id("origin"), unique_id("clone"));
        let origin = start(&casemate, &id, &[], "echo ran in $(hostname); exit 3");
        std::thread::sleep(Duration::from_millis(wait));
        let words = ["snapshot", "create", &id, &id];
        // Until the machine is there.
        let mut calls = (0..200).map(|_| casemate.call(&words).unwrap());
        assert!(calls.any(|saved| saved.code == 0), "{}", origin.said());
        let check = |run: Finished, id: &str| {
            assert_eq!((run.code, run.stderr.as_str()), (3, ""), "{wait}: {run:#?}");
            assert_eq!(run.stdout, format!("ran in {id}\n"));
        };
        check(origin.wait().unwrap(), &id);
        let words = ["clone", "--id", &clone, &id];
        check(casemate.call(&words).unwrap(), &clone);
        done(&casemate, &["snapshot", "rm", &id]);
    }
}

#[test]
fn each_clone_has_a_tap_and_an_address_of_its_own() {
    let casemate = Casemate::new();
    let netns = Netns::with_tap(None);
    netns.add_tap("own1");
    netns.add_tap("own2");
    let (id, clones) = (unique_id("origin"), unique_id("clone"));
    let card = "/sys/class/net/eth0";
    let script = format!(
        "ip link set eth0 up; echo ready; read line; ip link set eth0 up; echo $(cat {card}/address) $(cat {card}/carrier)"
    );
    let options = ["--net", "tap0", "--netns", &netns.path()];
    let mut origin = start(&casemate, &id, &options, &script);
    origin.wait_for_line("ready").unwrap();
    done(&casemate, &["snapshot", "create", &id, &id]);
    let refused = casemate.call(&["clone", "-n", "2", &id]).unwrap();
    refused.assert_refused(125, &["--net tap0", "%d"]);
    // While the first has its own.
    let words = ["clone", "-n", "2", "--id", &clones, "--net", "own%d", &id];
    let run = casemate.call(&words).unwrap();
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:#?}");
    origin.write(b"\n").unwrap();
    let origin = origin.wait().unwrap();
    let own = origin.stdout.lines().filter(|line| *line != "ready");
    let others = run.stdout.lines().filter_map(|line| line.split_once('\t'));
    let said: Vec<&str> = own.chain(others.map(|(_, said)| said)).collect();
    let addresses: BTreeSet<&str> = said
        .iter()
        .filter_map(|said| said.strip_suffix(" 1"))
        .collect();
    assert_eq!((said.len(), addresses.len()), (3, 3), "{said:?}");
    done(&casemate, &["snapshot", "rm", &id]);
}

/// What each writes to its root is its own, from the moment on at which it was saved; and clones can be saved.
#[test]
fn each_clone_has_a_disk_of_its_own() {
    let casemate = Casemate::new();
    let (id, clones) = (unique_id("origin"), unique_id("clone"));
    let script = "echo first > /file; sync; echo ready; while [ ! -e /go ]; do sleep 0.2; read -t 1 go && touch /go; \
                  [ $(hostname) = $HOST ] || touch /go; done; hostname >> /file; sync; cat /file | tr '\\n' ' '; echo";
    let host = format!("HOST={id}");
    let options = ["--root-size", "32M", "--env", &host];
    let mut origin = start(&casemate, &id, &options, script);
    origin.wait_for_line("ready").unwrap();
    done(&casemate, &["snapshot", "create", &id, &id]);
    origin.write(b"go\n").unwrap();
    origin.wait_for_line(&format!("first {id}")).unwrap();
    let words = ["clone", "-n", "2", "--id", &clones, &id];
    let run = casemate.call(&words).unwrap();
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:#?}");
    let mut lines: Vec<&str> = run.stdout.lines().map(str::trim_end).collect();
    lines.sort_unstable();
    let wanted = [1, 2].map(|number| format!("{clones}-{number}\tfirst {clones}-{number}"));
    assert_eq!(lines, wanted);
    assert_eq!(origin.wait().unwrap().code, 0);
    for id in [&id, &format!("{clones}-1"), &format!("{clones}-2")] {
        casemate.assert_nothing_of(id);
    }
    done(&casemate, &["snapshot", "rm", &id]);
}
