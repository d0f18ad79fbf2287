//! What a taken-over VMM would try. An attempt that succeeds undoes nothing and harms nothing: run
//! bare, as root, each of them still leaves the machine as it was.

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::kill;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::Mode;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::{Pid, chdir, chroot, execv, getpid, getppid, setgroups, setuid};

/// The abstract socket that the tests listen on.
pub const ABSTRACT_SOCKET: &str = "casemate-security-test";

/// Name of the key that the tests have.
const SESSION_KEY: &std::ffi::CStr = c"casemate-security-test";

/// What the prisoner had open before its walls went up.
pub struct Held {
    /// A device, as a VMM holds `/dev/kvm`. None in an empty root.
    zero: Option<File>,
    /// A directory: what never enters a jail, held here to see what Landlock does about it.
    directory: Option<OwnedFd>,
}

impl Held {
    /// Opens what can be opened.
    pub fn open() -> Self {
        // The C library prepares itself at a process's first thread, which no VMM seals without.
        drop(std::thread::spawn(|| ()).join());
        Self {
            zero: File::open("/dev/zero").ok(),
            directory: File::open("/").ok().map(OwnedFd::from),
        }
    }
}

type Attempt = fn(&Held) -> io::Result<()>;

/// Every attempt by name.
pub const ALL: &[(&str, Attempt)] = &[
    ("read-held", read_held),
    ("open-root", |_| File::open("/").map(drop)),
    ("open-passwd", |_| File::open("/etc/passwd").map(drop)),
    ("open-proc", |_| File::open("/proc/self/status").map(drop)),
    ("open-upwards", |_| {
        File::open("../../../../../../../../etc/passwd").map(drop)
    }),
    ("open-from-directory", open_from_directory),
    ("open-from-inherited", open_from_inherited),
    ("open-device", |_| File::open("/dev/kvm").map(drop)),
    ("create-file", create_file),
    ("tcp-connect", |_| {
        TcpStream::connect("127.0.0.1:9").map(drop)
    }),
    ("tcp-bind", |_| TcpListener::bind("127.0.0.1:0").map(drop)),
    ("udp-send", udp_send),
    ("raw-socket", |_| {
        any_socket(AddressFamily::Inet, SockType::Raw)
    }),
    ("packet-socket", |_| {
        any_socket(AddressFamily::Packet, SockType::Raw)
    }),
    ("abstract-connect", abstract_connect),
    ("signal-parent", signal_parent),
    ("signal-others", signal_others),
    ("read-parents-memory", |_| read_memory(getppid())),
    ("read-others-memory", read_others_memory),
    ("become-root", |_| Ok(setuid(0.into())?)),
    ("join-group", |_| Ok(setgroups(&[0.into()])?)),
    ("user-namespace", |_| {
        Ok(unshare(CloneFlags::CLONE_NEWUSER)?)
    }),
    ("mount-namespace", |_| Ok(unshare(CloneFlags::CLONE_NEWNS)?)),
    ("network-namespace", |_| {
        Ok(unshare(CloneFlags::CLONE_NEWNET)?)
    }),
    ("mount", mount_something),
    ("chroot", |_| Ok(chroot("/")?)),
    ("raise-limit", raise_limit),
    ("session-key", session_key),
    ("run-data", |_| {
        protect(data, libc::PROT_READ | libc::PROT_EXEC)
    }),
    ("write-code", |_| {
        protect(code, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
    }),
    ("map-executable", map_executable),
    ("new-process", |_| {
        Command::new("/bin/true").status().map(drop)
    }),
    ("exec", exec),
    ("new-thread", new_thread),
    // Last, as it changes what every path means.
    ("climb-out", climb_out),
];

/// The one attempt that must stay possible: Landlock is about opening, not about what is open.
fn read_held(held: &Held) -> io::Result<()> {
    let mut zero = held.zero.as_ref().ok_or(io::ErrorKind::NotFound)?;
    zero.read_exact(&mut [1])
}

fn open_from_directory(held: &Held) -> io::Result<()> {
    let directory = held.directory.as_ref().ok_or(io::ErrorKind::NotFound)?;
    openat(
        directory.as_fd(),
        "etc/passwd",
        OFlag::O_RDONLY,
        Mode::empty(),
    )?;
    Ok(())
}

/// By every descriptor that the prisoner began with, whatever it is.
fn open_from_inherited(_: &Held) -> io::Result<()> {
    for number in 0..2048 {
        #[allow(unsafe_code)]
        // SAFETY: borrowed for the loop's body; a number that is not open is answered by EBADF.
        let from = unsafe { BorrowedFd::borrow_raw(number) };
        for path in ["../../../../../../etc/passwd", "etc/passwd", "."] {
            if openat(from, path, OFlag::O_RDONLY, Mode::empty()).is_ok() {
                return Ok(());
            }
        }
        for path in [
            format!("/proc/self/fd/{number}"),
            format!("/dev/fd/{number}"),
        ] {
            if File::open(path).is_ok() {
                return Ok(());
            }
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn udp_send(_: &Held) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.send_to(b"x", "127.0.0.1:9").map(drop)
}

fn any_socket(family: AddressFamily, kind: SockType) -> io::Result<()> {
    socket(family, kind, SockFlag::empty(), None)?;
    Ok(())
}

fn signal_parent(_: &Held) -> io::Result<()> {
    match getppid() {
        // In a PID namespace of its own it has none; to kill(2) 0 is the own process group.
        none if none.as_raw() == 0 => Err(Errno::ESRCH.into()),
        parent => Ok(kill(parent, None)?),
    }
}

/// Signal 0 is only the question whether one would arrive.
fn signal_others(_: &Held) -> io::Result<()> {
    if kill(Pid::from_raw(-1), None).is_ok() {
        return Ok(());
    }
    others(|process| Ok(kill(process, None)?))
}

fn read_others_memory(_: &Held) -> io::Result<()> {
    others(read_memory)
}

fn read_memory(of: Pid) -> io::Result<()> {
    let mut byte = [0];
    // Where, matters only after the kernel has found that it may be read.
    let from = RemoteIoVec { base: 0, len: 1 };
    match process_vm_readv(of, &mut [IoSliceMut::new(&mut byte)], &[from]) {
        Err(Errno::EFAULT) => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

/// Whether it works with any process but this one; process ids are no secret.
fn others(works: impl Fn(Pid) -> io::Result<()>) -> io::Result<()> {
    let mut last = io::ErrorKind::NotFound.into();
    for process in (1..1 << 15).map(Pid::from_raw).filter(|p| *p != getpid()) {
        let mut result = works(process);
        if result.is_ok() {
            // The thread of `Held::open` has a number, too, for a moment after it was joined.
            std::thread::sleep(Duration::from_millis(200));
            result = works(process);
        }
        match result {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn mount_something(_: &Held) -> io::Result<()> {
    let none: Option<&str> = None;
    // Run bare: not in the host's namespace.
    if unshare(CloneFlags::CLONE_NEWNS).is_ok() {
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    }
    mount(none, "/", Some("tmpfs"), MsFlags::empty(), none)?;
    Ok(())
}

fn raise_limit(_: &Held) -> io::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let more = most.saturating_add(1);
    Ok(setrlimit(Resource::RLIMIT_NOFILE, more, more)?)
}

/// Looks for the key that the tests put into the session keyring of whoever started the jail.
fn session_key(_: &Held) -> io::Result<()> {
    #[allow(unsafe_code)]
    // SAFETY: two strings that end in a NUL and live through the call, which changes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_SEARCH,
            libc::KEY_SPEC_SESSION_KEYRING,
            c"user".as_ptr(),
            SESSION_KEY.as_ptr(),
            0,
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

/// Changes the protection of the page at an address of this program.
fn protect(page: fn() -> io::Result<usize>, protection: i32) -> io::Result<()> {
    let start = page()? & !0xfff;
    #[allow(unsafe_code)]
    // SAFETY: the page stays mapped, and is readable still; nothing relies on its being unwritable.
    let result = unsafe { libc::mprotect(start as *mut libc::c_void, 4096, protection) };
    Ok(Errno::result(result).map(drop)?)
}

fn code() -> io::Result<usize> {
    Ok(protect as *const () as usize)
}

/// A page of its own, or the stack would run.
fn data() -> io::Result<usize> {
    anonymous(libc::PROT_READ | libc::PROT_WRITE)
}

fn map_executable(_: &Held) -> io::Result<()> {
    anonymous(libc::PROT_READ | libc::PROT_EXEC).map(drop)
}

fn anonymous(protection: i32) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    #[allow(unsafe_code)]
    // SAFETY: new memory, wherever there is room, which nobody else uses.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(page as usize)
}

fn create_file(_: &Held) -> io::Result<()> {
    let path = std::env::temp_dir().join(format!("casemate-prisoner-{}", std::process::id()));
    drop(File::create(&path)?);
    std::fs::remove_file(path)
}

fn abstract_connect(_: &Held) -> io::Result<()> {
    let address = SocketAddr::from_abstract_name(ABSTRACT_SOCKET)?;
    UnixStream::connect_addr(&address).map(drop)
}

fn exec(_: &Held) -> io::Result<()> {
    match execv(c"/bin/true", &[c"/bin/true"])? {}
}

/// Who may change its root can leave the one that it has: by a root below where it is.
fn climb_out(_: &Held) -> io::Result<()> {
    chroot("/dev")?;
    for _ in 0..16 {
        chdir("..")?;
    }
    chroot(".")?;
    File::open("/etc/passwd").map(drop)
}

fn new_thread(_: &Held) -> io::Result<()> {
    let thread = std::thread::Builder::new().spawn(|| ())?;
    thread.join().map_err(|_| io::Error::other("it panicked"))
}
