//! An empty root: no file, no device, no way back to the host's.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, mkdir, pivot_root};

use crate::error::{Context, Result};

/// The empty file system lies over this directory for a moment; `/dev/kvm` was opened in it, so it is there.
const OVER: &str = "/dev";

/// The only directory of the outer file system, and what the inner one is mounted on.
const INNER: &str = "/jail";

/// Flags of both file systems.
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
    // Or what is unmounted below would be unmounted on the host, too.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, "/", NONE, private, NONE).doing("make private", "all mounts")?;
    // Two inodes: the root directory and the one in it.
    tmpfs(OVER, 2)?;
    chdir(OVER).doing("enter", "the empty tmpfs")?;
    // The old root comes to lie over the new one (pivot_root(2), NOTES), and is taken off.
    pivot_root(".", ".").doing("pivot to", "the empty tmpfs")?;
    umount2(".", MntFlags::MNT_DETACH).doing("detach", "the old root")?;
    chdir("/").doing("enter", "the new root")?;
    // The kernel gives no user namespace to a process whose root is not that of its mount namespace
    // (clone(2), EPERM): so nobody in the jail gets one, nor the capabilities in it, which open the
    // better part of the kernel to attack. The wall is that refusal; what chroot hides is empty.
    mkdir(INNER, Mode::from_bits_truncate(0o555)).doing("make", INNER)?;
    tmpfs(INNER, 1)?;
    read_only(INNER)?;
    read_only("/")?;
    chroot(INNER).doing("change the root to", INNER)?;
    chdir("/").doing("enter", "the inner root")
}

fn tmpfs(at: &'static str, inodes: u32) -> Result<()> {
    let options = format!("size=4k,nr_inodes={inodes},mode=0555");
    let kind = Some("tmpfs");
    mount(kind, at, kind, LOCKED, Some(options.as_str())).doing("mount an empty tmpfs on", at)
}

fn read_only(at: &'static str) -> Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | LOCKED;
    mount(NONE, at, NONE, flags, NONE).doing("make read-only", at)
}
