//! Lists, descriptions and checks of snapshots.
//!
//! What a guest's VMM wrote is read by a VMM in a jail of its own, as a user that has nothing.

use std::io::{self, Read, Write as _};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::{Error, Snapshot};
use crate::cli::PsArgs;
use crate::kernels::UNPACKER_ID;
use crate::places::Places;
use crate::run::FILES;
use crate::say;
use casemate_broker::exit;

/// Most that is read of what the jailed process says, in bytes.
const MAX_REPORT: u64 = 64 << 10;
/// Most characters of its words in one line.
const MAX_WORDS: usize = 400;

/// Prints them.
pub fn list(snapshots: &[Snapshot], args: &PsArgs) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        let lines = snapshots.iter().map(|one| {
            json!({
                "name": one.name,
                "id": one.meta.id,
                "created": one.meta.created,
                "memory_mib": one.meta.origin.memory_mib,
                "cpus": one.meta.origin.cpus,
                "kernel": one.meta.origin.kernel,
                "command": command(one),
                "bytes": one.size(),
            })
        });
        let lines: Vec<_> = lines.collect();
        serde_json::to_writer_pretty(&mut out, &lines)?;
        return writeln!(out);
    }
    if args.quiet {
        return snapshots
            .iter()
            .try_for_each(|one| writeln!(out, "{}", one.name));
    }
    writeln!(
        out,
        "{:<20} {:<20} {:>8} {:>8} {:>8}  COMMAND",
        "NAME", "OF", "MEMORY", "ON DISK", "AGE"
    )?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_secs());
    for one in snapshots {
        let memory = format!("{}M", one.meta.origin.memory_mib);
        let size = format!("{}M", one.size().div_ceil(1 << 20));
        let age = format!("{}s", now.saturating_sub(one.meta.created));
        let words = plain(&command(one).join(" "), 60);
        let (name, id) = (&one.name, plain(&one.meta.id, 64));
        writeln!(
            out,
            "{name:<20} {id:<20} {memory:>8} {size:>8} {age:>8}  {words}"
        )?;
    }
    Ok(())
}

fn command(snapshot: &Snapshot) -> Vec<String> {
    let spec = snapshot.meta.origin.spec.as_ref();
    spec.map(|spec| spec.argv.clone()).unwrap_or_default()
}

/// Prints what it is.
pub fn describe(places: &Places, snapshot: &Snapshot) -> Result<(), Error> {
    let meta = &snapshot.meta;
    let origin = &meta.origin;
    let line =
        |what: &str, text: String| say::line(format_args!("{what:<10} {}", plain(&text, 200)));
    line("snapshot", snapshot.directory.display().to_string());
    line("of", meta.id.clone());
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_secs());
    line("age", format!("{} s", now.saturating_sub(meta.created)));
    line("kernel", origin.kernel.clone());
    let most = origin.max_cpus.map(|most| format!(", at most {most}"));
    line(
        "cpus",
        format!("{}{}", origin.cpus, most.unwrap_or_default()),
    );
    line("memory", format!("{} MiB", origin.memory_mib));
    match &origin.spec {
        Some(spec) => line("command", spec.argv.join(" ")),
        None => line("command", "none: a bare kernel".to_owned()),
    }
    for disk in &origin.disks {
        let how = match (disk.name == crate::layer::NAME, disk.read_only) {
            (true, _) => "the machine's own: a copy of it is in the snapshot",
            (false, true) => "read-only",
            (false, false) => "writable: not in the snapshot",
        };
        line("disk", format!("{} ({how})", disk.path.display()));
    }
    for tap in &origin.taps {
        line("net", tap.name.clone());
    }
    for file in FILES {
        let said = ask(places, snapshot, "--describe-snapshot", &[file])?;
        for text in said.lines() {
            line(file, text.to_owned());
        }
    }
    Ok(())
}

/// Prints whether it is whole.
pub fn verify(places: &Places, snapshot: &Snapshot) -> Result<(), Error> {
    let said = ask(places, snapshot, "--verify-snapshot", &FILES)?;
    for text in said.lines() {
        say::line(plain(text, MAX_WORDS));
    }
    Ok(())
}

/// What a jailed VMM says of some files of a snapshot.
fn ask(
    places: &Places,
    snapshot: &Snapshot,
    option: &str,
    files: &[&str],
) -> Result<String, Error> {
    let jailer = places.program("casemate-jailer")?;
    let vmm = places.program("casemate-vmm")?;
    let vmm = std::fs::canonicalize(&vmm).map_err(Error::io("cannot find", &vmm))?;
    let user = UNPACKER_ID.to_string();
    let own = std::process::id();
    let mut command = Command::new(jailer);
    command
        .args(["--id", &format!("look-{own}"), "--new-pid-ns"])
        .args(["--uid", &user, "--gid", &user, "--exec-file"])
        .arg(vmm)
        .arg(format!("--die-with-parent={own}"));
    for file in files {
        let mut grant = std::ffi::OsString::from(format!("{file}="));
        grant.push(snapshot.path(file));
        command.arg("--grant-ro").arg(grant);
    }
    command.args(["--", option]).args(files);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_clear();
    let failed = |words: String| Error::Look {
        name: snapshot.name.clone(),
        words,
    };
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
    let words = child
        .stderr
        .take()
        .map(|stderr| thread::spawn(move || bounded(stderr)));
    let said = child.stdout.take().map(bounded).unwrap_or_default();
    let words = words
        .and_then(|reader| reader.join().ok())
        .unwrap_or_default();
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    if status.success() {
        return Ok(said);
    }
    let first = words.lines().next().unwrap_or_default();
    let first = first.strip_prefix("casemate-vmm: ").unwrap_or(first);
    let words = plain(first, MAX_WORDS);
    if status.code() == Some(exit::BAD_INPUT.into()) {
        let name = snapshot.name.clone();
        return Err(Error::Damaged { name, words });
    }
    Err(failed(format!("{words} ({status})")))
}

fn bounded(source: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = source.take(MAX_REPORT).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Text in one line, without what could steer a terminal.
fn plain(text: &str, most: usize) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(most)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_plain_and_bounded() {
        assert_eq!(plain("a\x1b[2J\nb", 99), "a[2Jb");
        assert_eq!(plain(&"x".repeat(99), 5), "xxxxx");
        assert_eq!(bounded(io::repeat(b'x')).len(), 64 << 10);
    }
}
