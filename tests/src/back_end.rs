//! Back-ends of vhost-user devices, from Debian's packages, each in a helper's jail.

use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::process::{PATIENCE, Running};
use crate::vm::unique_uid;
use crate::{bin, unique_id};

/// What a guest may do with a shared directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Read it.
    ToRead,
    /// Write to it, too.
    ToWrite,
}

/// QEMU's storage daemon, which serves `disk` on `socket`. It has no capability.
///
/// # Errors
/// If it cannot be started.
pub fn storage_daemon(disk: &Path, socket: &Path) -> Result<Running> {
    let user = unique_uid();
    chown(disk, Some(user), Some(user))?;
    let disk = disk.display().to_string();
    let blockdev = format!("driver=file,node-name=disk,filename={disk}");
    let export = "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=4,\
                  addr.type=fd,addr.str=3";
    let words = ["--blockdev", &blockdev, "--export", export];
    let options = ["--bind-rw", &disk];
    start(
        "/usr/bin/qemu-storage-daemon",
        user,
        socket,
        &options,
        &words,
    )
}

/// QEMU's virtiofsd, which serves the directory `shared` on `socket`.
///
/// # Errors
/// If it cannot be started.
pub fn virtiofsd(shared: &Path, how: Share, socket: &Path) -> Result<Running> {
    let user = unique_uid();
    chown(shared, Some(user), Some(user))?;
    let shared = shared.display().to_string();
    // What it needs to enter the directory, and to give up what it has no use for.
    let mut capabilities = vec!["sys_chroot", "setpcap"];
    // What it keeps for a guest that makes files of several users.
    let owners = [
        "chown",
        "dac_override",
        "fowner",
        "fsetid",
        "setgid",
        "setuid",
        "mknod",
        "setfcap",
    ];
    let mut source = format!("source={shared},sandbox=chroot");
    let bind = match how {
        Share::ToRead => {
            source.push_str(",modcaps=-");
            source.push_str(&owners.join(":-"));
            "--bind-ro"
        }
        Share::ToWrite => {
            capabilities.extend(owners);
            "--bind-rw"
        }
    };
    let mut options = vec![bind, &shared, "--proc", "--id-count", "65536"];
    options.extend(capabilities.iter().flat_map(|name| ["--cap", name]));
    let words = ["-f", "-o", &source, "--rlimit-nofile=0", "--fd=3"];
    start("/usr/lib/qemu/virtiofsd", user, socket, &options, &words)
}

/// Starts `program` in a helper's jail with these options; `socket` is its descriptor 3.
fn start(
    program: &str,
    user: u32,
    socket: &Path,
    options: &[&str],
    words: &[&str],
) -> Result<Running> {
    let (id, user) = (unique_id("back-end"), user.to_string());
    let mut command = Command::new(bin("casemate-jailer"));
    command
        .args(["helper", "--id", &id, "--exec-file", program])
        .args(["--uid", &user, "--gid", &user, "--listen"])
        .arg(socket)
        .args(options)
        .arg("--")
        .args(words);
    let running = Running::start(command, None)?;
    let children = format!("/proc/{0}/task/{0}/children", running.pid());
    let began = Instant::now();
    // It listens before it forks; who connects then is served in time.
    while std::fs::read_to_string(&children)?.is_empty() || !socket.exists() {
        ensure!(began.elapsed() < PATIENCE, "{program} does not start");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    Ok(running)
}
