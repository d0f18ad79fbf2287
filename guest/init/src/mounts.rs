//! File systems: the early ones, the root, and the change to it.

use crate::parameters::Parameters;
use crate::{Error, FailureKind, say};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Where the root is put together, inside the initrd.
const NEW_ROOT: &str = "/sysroot";
/// The read-only file system below an overlay.
const LOWER: &str = "/lower";
/// The file system that takes an overlay's writes.
const UPPER: &str = "/upper";

fn error(what: String, errno: Errno) -> Error {
    Error::new(
        FailureKind::Mount,
        format!("cannot mount {what}: {}", errno.desc()),
    )
}

fn mount_on(
    source: &str,
    target: &str,
    fs_type: &str,
    flags: MsFlags,
    data: &str,
) -> Result<(), Error> {
    make_directory(target);
    mount(Some(source), target, Some(fs_type), flags, Some(data))
        .map_err(|errno| error(format!("{fs_type} on {target}"), errno))
}

/// A directory that cannot be made shows in the mount that follows.
fn make_directory(path: &str) {
    let _ = fs::DirBuilder::new().mode(0o755).create(path);
}

/// `/proc`, `/sys` and `/dev`, and the console as our standard streams.
pub fn early() -> Result<(), Error> {
    let common = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    // The console first: errors after this are seen. The kernel may have mounted devtmpfs by itself (EBUSY).
    make_directory("/dev");
    match mount(
        Some("devtmpfs"),
        "/dev",
        Some("devtmpfs"),
        MsFlags::MS_NOSUID,
        Some("mode=0755"),
    ) {
        Ok(()) | Err(Errno::EBUSY) => {}
        Err(errno) => return Err(error("devtmpfs on /dev".into(), errno)),
    }
    open_console();
    mount_on("proc", "/proc", "proc", common | MsFlags::MS_NODEV, "")?;
    mount_on("sysfs", "/sys", "sysfs", common | MsFlags::MS_NODEV, "")
}

/// Makes the console our standard streams.
fn open_console() {
    if let Ok(console) = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console")
    {
        let _ = nix::unistd::dup2_stdin(&console);
        let _ = nix::unistd::dup2_stdout(&console);
        let _ = nix::unistd::dup2_stderr(&console);
    }
}

/// If the virtio console is one of the kernel's by now, it becomes ours, and the kernel is told to leave the serial port alone. One
/// that does not know how (before Linux 5.8) goes on to say everything on both.
pub fn prefer_virtio_console() {
    let consoles = fs::read_to_string("/proc/consoles").unwrap_or_default();
    if consoles.lines().any(|line| line.starts_with("hvc0 ")) {
        open_console();
        let _ = fs::write("/sys/class/tty/ttyS0/console", "N");
    }
}

/// Mounts the root from `device` and makes it `/`, with everything in it that a program expects.
pub fn root(device: &str, parameters: &Parameters, patience: Duration) -> Result<(), Error> {
    wait_for(device, patience)?;
    let fs_type = &parameters.root_fs_type;
    if parameters.overlay {
        mount_device(device, LOWER, fs_type, MsFlags::MS_RDONLY)?;
        match &parameters.upper {
            Some(device) => {
                wait_for(device, patience)?;
                mount_device(device, UPPER, "ext4", MsFlags::empty())?;
            }
            None => mount_on("tmpfs", UPPER, "tmpfs", MsFlags::empty(), "mode=0755")?,
        }
        for directory in ["/upper/data", "/upper/work"] {
            make_directory(directory);
        }
        // An overlay's root has the attributes of its upper directory.
        if let Ok(lower) = fs::metadata(LOWER) {
            let _ = fs::set_permissions("/upper/data", lower.permissions());
        }
        let layers = "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work";
        mount_on("overlay", NEW_ROOT, "overlay", MsFlags::empty(), layers)?;
    } else {
        match mount_device(device, NEW_ROOT, fs_type, MsFlags::empty()) {
            Err(Failure {
                errno: Errno::EACCES | Errno::EROFS,
                ..
            }) => {
                mount_device(device, NEW_ROOT, fs_type, MsFlags::MS_RDONLY)?;
            }
            result => result?,
        }
    }
    populate();
    switch()
}

/// A failed mount with its reason, which decides what is tried next.
struct Failure {
    errno: Errno,
    error: Error,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

fn mount_device(device: &str, target: &str, fs_type: &str, flags: MsFlags) -> Result<(), Failure> {
    make_directory(target);
    mount(Some(device), target, Some(fs_type), flags, None::<&str>).map_err(|errno| {
        let why = match errno {
            Errno::ENODEV => format!("the kernel has no {fs_type} driver"),
            Errno::EINVAL => format!("it holds no valid {fs_type}"),
            _ => errno.desc().into(),
        };
        let message = format!("cannot mount {device} as {fs_type}: {why}");
        Failure {
            errno,
            error: Error::new(FailureKind::Mount, message),
        }
    })
}

/// Waits until the block device is there: a driver may find it some time after it was loaded.
fn wait_for(device: &str, patience: Duration) -> Result<(), Error> {
    let deadline = Instant::now() + patience;
    while !Path::new(device).exists() {
        if Instant::now() >= deadline {
            return Err(Error::new(FailureKind::Mount, absence(device)));
        }
        sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Says why a device is absent, as far as can be told.
fn absence(device: &str) -> String {
    let drivers = [
        ("virtio_mmio", "/sys/bus/platform/drivers/virtio-mmio"),
        ("virtio_blk", "/sys/bus/virtio/drivers/virtio_blk"),
    ];
    for (name, path) in drivers {
        if !Path::new(path).exists() {
            return format!("{device} did not appear: the kernel has no {name} driver");
        }
    }
    format!("{device} did not appear: the machine has no such drive")
}

/// What a program expects besides the root itself. A read-only root without the directories goes without.
fn populate() {
    let under = |path: &str| format!("{NEW_ROOT}{path}");
    for path in ["/dev", "/proc", "/sys"] {
        let target = under(path);
        make_directory(&target);
        if let Err(errno) = mount(
            Some(path),
            target.as_str(),
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        ) {
            say(&format!("cannot move {path} into the root: {errno}"));
        }
    }
    let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let more = [
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "gid=5,mode=0620,ptmxmode=0666",
        ),
        ("tmpfs", "/dev/shm", strict, "mode=1777"),
        ("mqueue", "/dev/mqueue", strict | MsFlags::MS_NOEXEC, ""),
        ("cgroup2", "/sys/fs/cgroup", strict | MsFlags::MS_NOEXEC, ""),
        ("tmpfs", "/run", strict, "mode=0755"),
        ("tmpfs", "/tmp", strict, "mode=1777"),
    ];
    for (fs_type, path, flags, data) in more {
        // mqueue and cgroup2 are not in every kernel, the directories not in every read-only root.
        let _ = mount_on(fs_type, &under(path), fs_type, flags, data);
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "fd/0"),
        ("/dev/stdout", "fd/1"),
        ("/dev/stderr", "fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(target, under(link));
    }
}

/// Makes the new root `/` and frees what the initrd held. (The initial root cannot be pivoted away: it is moved over.)
fn switch() -> Result<(), Error> {
    let failed = |what: &str, errno: Errno| {
        Error::new(
            FailureKind::Mount,
            format!("cannot change the root: {what}: {}", errno.desc()),
        )
    };
    let _ = fs::remove_dir_all(crate::modules::DIRECTORY);
    let _ = fs::remove_file("/init");
    nix::unistd::chdir(NEW_ROOT).map_err(|errno| failed("chdir", errno))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|errno| failed("move", errno))?;
    nix::unistd::chroot(".").map_err(|errno| failed("chroot", errno))?;
    nix::unistd::chdir("/").map_err(|errno| failed("chdir", errno))
}
