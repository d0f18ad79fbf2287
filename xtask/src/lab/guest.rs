//! Process 1 of the lab: loads modules, mounts the host's files under an overlay, runs the command.
//!
//! It stays process 1 while the command runs: it reaps orphans, carries the streams and ticks.

use std::collections::HashMap;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, chroot, getpid, sethostname};

use super::wire::{Frame, MAX_PAYLOAD, PORT, Spec};

/// How long the streams may stay open after the command itself has ended.
const DRAIN: Duration = Duration::from_secs(2);

type Port = Arc<Mutex<File>>;

/// Whether this program was started as the lab's `/init`, and not by a person.
pub fn is_process_one() -> bool {
    getpid() == Pid::from_raw(1) && env::args_os().next().as_deref() == Some(OsStr::new("/init"))
}

/// Runs the lab from inside. The host ends the machine when it has the exit code.
pub fn main() -> ! {
    if let Err(error) = set_up_and_run() {
        // On the console, which the host shows when nothing came over the port.
        eprintln!("lab: {error:#}");
    }
    thread::sleep(Duration::from_secs(10));
    let _ = reboot(RebootMode::RB_POWER_OFF);
    loop {
        thread::park();
    }
}

fn set_up_and_run() -> Result<()> {
    mount_fs("devtmpfs", "/dev", "devtmpfs", "")?;
    mount_fs("proc", "/proc", "proc", "")?;
    mount_fs("sysfs", "/sys", "sysfs", "")?;
    load_modules(Path::new("/modules"))?;
    let mut reader = open_port()?;
    let port = Arc::new(Mutex::new(reader.try_clone()?));
    let Frame::Spec(spec) = Frame::read(&mut reader).context("read the port")? else {
        bail!("the host sent something else than a command");
    };
    match prepare(&spec) {
        Ok(spec) => run(&spec, reader, &port),
        Err(error) => send(&port, &Frame::Failed(format!("{error:#}").into_bytes())),
    }
}

fn send(port: &Port, frame: &Frame) -> Result<()> {
    let mut port = port
        .lock()
        .map_err(|_| anyhow::anyhow!("a thread died with the port"))?;
    frame.write(&mut *port).context("write to the port")
}

fn mount_fs(source: &str, target: &str, kind: &str, options: &str) -> Result<()> {
    mount_with(source, target, kind, MsFlags::empty(), options)
}

fn mount_with(source: &str, target: &str, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    mount(Some(source), target, Some(kind), flags, Some(options))
        .with_context(|| format!("mount {kind} at {target} ({options})"))
}

fn load_modules(dir: &Path) -> Result<()> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    for file in files {
        finit_module(File::open(&file)?, c"", ModuleInitFlags::empty())
            .with_context(|| format!("load {}", file.display()))?;
    }
    Ok(())
}

/// Opens the virtio-serial port by its name; it appears a moment after its driver.
fn open_port() -> Result<File> {
    for _ in 0..500 {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
        {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT {
                let device = Path::new("/dev").join(entry.file_name());
                return OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&device)
                    .with_context(|| format!("open {}", device.display()));
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("no virtio-serial port {PORT} after ten seconds")
}

fn prepare(spec: &[u8]) -> Result<Spec> {
    let spec: Spec = serde_json::from_slice(spec).context("read the command")?;
    enter_host_files()?;
    mount_kernel_file_systems(&spec.keep)?;
    show_modules(Path::new(&spec.modules))?;
    fs::write("/sys/class/net/lo/flags", "0x9").context("bring lo up")?; // IFF_UP | IFF_LOOPBACK
    sethostname("lab").context("set the host name")?;
    env::set_current_dir(&spec.cwd)
        .with_context(|| format!("enter {} (a tmpfs in the lab?)", spec.cwd))?;
    Ok(spec)
}

/// Makes the host's `/`, under an overlay that keeps every change in memory, the root.
fn enter_host_files() -> Result<()> {
    mount_with(
        "host",
        "/host",
        "9p",
        MsFlags::MS_RDONLY,
        "trans=virtio,version=9p2000.L,cache=loose,msize=512000",
    )?;
    mount_fs("tmpfs", "/run", "tmpfs", "mode=755")?;
    for dir in ["/run/upper", "/run/work"] {
        fs::create_dir(dir)?;
    }
    let layers = "lowerdir=/host,upperdir=/run/upper,workdir=/run/work";
    mount_fs("overlay", "/root", "overlay", layers)?;
    // The way out of an initramfs: its root can be neither unmounted nor pivoted.
    env::set_current_dir("/root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the root")?;
    chroot(".").context("chroot")?;
    env::set_current_dir("/")?;
    // As an init system leaves it on a real host: what a jail must undo.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_SHARED | MsFlags::MS_REC,
        None::<&str>,
    )
    .context("make the root shared")
}

fn mount_kernel_file_systems(keep: &[String]) -> Result<()> {
    for (kind, target, options) in [
        ("devtmpfs", "/dev", ""),
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", ""),
        ("securityfs", "/sys/kernel/security", ""),
        ("tmpfs", "/run", "mode=755"),
        ("tmpfs", "/tmp", "mode=1777"),
        ("tmpfs", "/var/lib/containers", ""),
    ] {
        // A checkout below /tmp must not vanish: the overlay is writable there too.
        if kind == "tmpfs" && keep.iter().any(|path| Path::new(path).starts_with(target)) {
            continue;
        }
        fs::create_dir_all(target).with_context(|| format!("create {target}"))?;
        mount_fs(kind, target, kind, options)?;
    }
    for (name, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let link = Path::new("/dev").join(name);
        if link.symlink_metadata().is_err() {
            symlink(to, &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    for controller in controllers.split_whitespace() {
        fs::write(
            "/sys/fs/cgroup/cgroup.subtree_control",
            format!("+{controller}"),
        )
        .with_context(|| format!("enable the {controller} controller"))?;
    }
    Ok(())
}

/// Shows the lab kernel's modules where `modprobe` looks, and loads tun.
fn show_modules(modules: &Path) -> Result<()> {
    let release = modules.file_name().context("no kernel release")?;
    let target = Path::new("/lib/modules").join(release);
    fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
    mount(
        Some(modules),
        &target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| format!("bind {} to {}", modules.display(), target.display()))?;
    if !Path::new("/sbin/modprobe").exists() {
        symlink("/bin/busybox", "/sbin/modprobe").context("make a modprobe of busybox")?;
    }
    let status = Command::new("/sbin/modprobe")
        .arg("tun")
        .status()
        .context("run modprobe tun")?;
    if !status.success() {
        bail!("modprobe tun: {status}");
    }
    Ok(())
}

fn run(spec: &Spec, reader: File, port: &Port) -> Result<()> {
    send(port, &Frame::Ready)?;
    let ticking = Arc::clone(port);
    thread::spawn(move || {
        while send(&ticking, &Frame::Heartbeat).is_ok() {
            thread::sleep(Duration::from_secs(1));
        }
    });
    let mut child = match spawn(spec) {
        Ok(child) => child,
        Err(error) => {
            let (program, code) = (&spec.argv[0], if is_not_found(&error) { 127 } else { 126 });
            send(
                port,
                &Frame::Stderr(format!("lab: {program}: {error}\n").into_bytes()),
            )?;
            return send(port, &Frame::Exited(code));
        }
    };
    let (done, drained) = mpsc::channel();
    pump(
        child.stdout.take(),
        Frame::Stdout,
        Arc::clone(port),
        done.clone(),
    );
    pump(child.stderr.take(), Frame::Stderr, Arc::clone(port), done);
    forward_stdin(reader, child.stdin.take());
    let code = wait_for(&child)?;
    // A daemon that the command left behind may hold the streams for ever.
    while let Ok(()) = drained.recv_timeout(DRAIN) {}
    send(port, &Frame::Exited(code))
}

fn is_not_found(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

fn spawn(spec: &Spec) -> std::io::Result<Child> {
    let environment: HashMap<_, _> = spec.env.iter().map(|(name, value)| (name, value)).collect();
    let Some((program, arguments)) = spec.argv.split_first() else {
        return Err(std::io::Error::other("no command"));
    };
    Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(environment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
}

/// Carries one stream of the command to the host until it ends.
fn pump(
    stream: Option<impl Read + Send + 'static>,
    wrap: fn(Vec<u8>) -> Frame,
    port: Port,
    done: Sender<()>,
) {
    let Some(mut stream) = stream else { return };
    thread::spawn(move || {
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    if send(&port, &wrap(buffer[..length].to_vec())).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        // The other end is gone only when the whole lab is about to be.
        let _ = done.send(());
    });
}

/// Carries the host's frames to the command's standard input; an empty one closes it.
fn forward_stdin(mut reader: File, mut stdin: Option<impl Write + Send + 'static>) {
    thread::spawn(move || {
        while let Ok(frame) = Frame::read(&mut reader) {
            match (frame, &mut stdin) {
                (Frame::Stdin(bytes), Some(to)) => {
                    if bytes.is_empty() || to.write_all(&bytes).is_err() {
                        stdin = None;
                    }
                }
                // Being woken was all.
                (Frame::Nudge, _) | (Frame::Stdin(_), None) => {}
                _ => break,
            }
        }
    });
}

/// Waits for the command, and reaps every orphan that ends before it.
fn wait_for(child: &Child) -> Result<u8> {
    let child = Pid::from_raw(i32::try_from(child.id())?);
    loop {
        match wait().context("wait for the command")? {
            WaitStatus::Exited(pid, code) if pid == child => return Ok(u8::try_from(code & 0xff)?),
            WaitStatus::Signaled(pid, signal, _) if pid == child => {
                return Ok(u8::try_from(128 + signal as i32)?);
            }
            _ => {}
        }
    }
}
