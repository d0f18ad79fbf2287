//! An empty root: no file, no device, no way back to the host's.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, chroot, mkdir, pivot_root};

use crate::error::{Context, Result};
use crate::helper::root::{Bind, OWN_PROC, PROC, populate};

/// The empty file system lies over this directory for a moment; `/dev/kvm` was opened in it, so it is there.
const OVER: &str = "/dev";

/// The only directory of the outer file system, and what the inner one is mounted on.
const INNER: &str = "/jail";

/// Another one, beside it, for a helper; with room for so many mount points and directories.
const HELPER: &str = "/helper";
const HELPER_INODES: u32 = 8192;

/// Flags of all these file systems.
const LOCKED: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

const NONE: Option<&str> = None;

/// Makes the root an empty, read-only tmpfs, and takes every other mount away but an equally empty
/// one around it.
///
/// Call it in a new mount namespace.
///
/// # Errors
/// What `mount(2)`, `pivot_root(2)`, `umount2(2)` and `chroot(2)` say.
pub fn empty() -> Result<()> {
    outer(2)?;
    pivot()?;
    // The kernel gives no user namespace to a process whose root is not that of its mount namespace
    // (clone(2), EPERM): so nobody in the jail gets one, nor the capabilities in it, which open the
    // better part of the kernel to attack. The wall is that refusal; what chroot hides is empty.
    inner(INNER, 1)?;
    read_only(INNER)?;
    read_only("/")?;
    enter(INNER)
}

/// Makes two inner file systems in place of one: the empty one, and a helper's with what is bound. The caller's root
/// is the outer one then; [`enter`] and [`enter_helper`] take it to one of them.
///
/// # Errors
/// As for [`empty`], and for [`populate`].
pub fn with_helper(binds: &[Bind], proc: bool) -> Result<()> {
    outer(4)?;
    let mask = umask(Mode::from_bits_truncate(0o022));
    let helper = format!("{OVER}{HELPER}");
    let made = inner(&format!("{OVER}{INNER}"), 1)
        .and_then(|()| inner(&helper, HELPER_INODES))
        .and_then(|()| populate(Path::new(&helper), binds, proc));
    let made = made.and_then(|()| point(&format!("{OVER}{PROC}")));
    umask(mask);
    made?;
    pivot()?;
    for at in [INNER, HELPER, "/"] {
        read_only(at)?;
    }
    Ok(())
}

/// Enters an empty inner file system.
///
/// # Errors
/// What `chroot(2)` says.
pub fn enter_empty() -> Result<()> {
    enter(INNER)
}

/// Enters the helper's. With `proc`, for the first process of a PID namespace, which finds itself in `/proc/self`.
///
/// # Errors
/// What `mount(2)` and `chroot(2)` say.
pub fn enter_helper(proc: bool) -> Result<()> {
    if proc {
        // Of all that is there, the process itself and one number are bound; the rest goes again.
        let kind = Some("proc");
        let flags = LOCKED | MsFlags::MS_RDONLY;
        mount(kind, PROC, kind, flags, NONE).doing("mount", PROC)?;
        for path in OWN_PROC {
            let inside = format!("{HELPER}{path}");
            let bind = MsFlags::MS_BIND;
            mount(Some(path), inside.as_str(), NONE, bind, NONE).doing("bind", path)?;
        }
        umount2(PROC, MntFlags::MNT_DETACH).doing("detach", PROC)?;
    }
    enter(HELPER)
}

fn enter(at: &str) -> Result<()> {
    chroot(at).doing("change the root to", at)?;
    chdir("/").doing("enter", "the inner root")
}

/// The outer file system, with so many inodes: its root directory and those in it.
fn outer(inodes: u32) -> Result<()> {
    // Or what is unmounted later would be unmounted on the host, too.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, "/", NONE, private, NONE).doing("make private", "all mounts")?;
    tmpfs(OVER, inodes)
}

fn pivot() -> Result<()> {
    chdir(OVER).doing("enter", "the empty tmpfs")?;
    // The old root comes to lie over the new one (pivot_root(2), NOTES), and is taken off.
    pivot_root(".", ".").doing("pivot to", "the empty tmpfs")?;
    umount2(".", MntFlags::MNT_DETACH).doing("detach", "the old root")?;
    chdir("/").doing("enter", "the new root")
}

fn inner(at: &str, inodes: u32) -> Result<()> {
    point(at)?;
    tmpfs(at, inodes)
}

fn point(at: &str) -> Result<()> {
    mkdir(at, Mode::from_bits_truncate(0o555)).doing("make", at)
}

fn tmpfs(at: &str, inodes: u32) -> Result<()> {
    let options = format!("size=4k,nr_inodes={inodes},mode=0555");
    let kind = Some("tmpfs");
    mount(kind, at, kind, LOCKED, Some(options.as_str())).doing("mount an empty tmpfs on", at)
}

fn read_only(at: &str) -> Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | LOCKED;
    mount(NONE, at, NONE, flags, NONE).doing("make read-only", at)
}
