//! The names that a policy may use for numbers.

/// The value of `text`: a decimal or hexadecimal number, a name, or names joined by `|`.
pub fn value(text: &str) -> Option<u64> {
    text.split('|')
        .try_fold(0, |all, part| Some(all | one(part)?))
}

fn one(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).ok();
    }
    if text.starts_with(|first: char| first.is_ascii_digit()) {
        return text.parse().ok();
    }
    let of_libc = |(name, _): &&(&str, i64)| *name == text;
    if let Some((_, value)) = LIBC.iter().find(of_libc) {
        return u64::try_from(*value).ok();
    }
    if let Some((_, value)) = IO_URING.iter().find(|(name, _)| *name == text) {
        return Some(*value);
    }
    let request = |(name, ..): &&(&str, _, _, _, _)| *name == text;
    let (_, direction, kind, number, size) = IOCTLS.iter().find(request)?;
    Some((direction << 30) | (size << 16) | (kind << 8) | number)
}

macro_rules! libc_constants {
    ($($name:ident)*) => { &[$((stringify!($name), libc::$name as i64)),*] };
}

const LIBC: &[(&str, i64)] = libc_constants! {
    AF_UNIX AT_EMPTY_PATH
    CLONE_CHILD_CLEARTID CLONE_FILES CLONE_FS CLONE_PARENT_SETTID CLONE_SETTLS CLONE_SIGHAND
    CLONE_SYSVSEM CLONE_THREAD CLONE_VM
    ENOSYS EPERM
    FALLOC_FL_KEEP_SIZE FALLOC_FL_PUNCH_HOLE FALLOC_FL_ZERO_RANGE
    F_ADD_SEALS F_DUPFD_CLOEXEC F_GETFD F_GETFL F_GET_SEALS F_OFD_SETLK F_SETFD F_SETFL
    MADV_DONTNEED MADV_HUGEPAGE MADV_POPULATE_READ MADV_POPULATE_WRITE
    MAP_ANONYMOUS MAP_HUGETLB MAP_HUGE_2MB MAP_LOCKED MAP_NORESERVE MAP_PRIVATE MAP_SHARED
    MPOL_BIND
    MSG_CMSG_CLOEXEC MSG_DONTWAIT MSG_NOSIGNAL MSG_PEEK
    PROT_EXEC PROT_WRITE
    PR_CAPBSET_DROP PR_CAPBSET_READ PR_CAP_AMBIENT PR_GET_DUMPABLE PR_GET_KEEPCAPS PR_GET_NAME PR_GET_NO_NEW_PRIVS
    PR_GET_SECCOMP PR_GET_SECUREBITS PR_SET_DUMPABLE PR_SET_KEEPCAPS PR_SET_NAME PR_SET_NO_NEW_PRIVS
    PR_SET_PDEATHSIG PR_SET_SECCOMP PR_SET_TIMERSLACK PR_SET_VMA
    SECCOMP_SET_MODE_FILTER
    SIGINT SIGTERM
    SOCK_CLOEXEC SOCK_NONBLOCK
    SOL_SOCKET SO_ACCEPTCONN SO_TYPE
    FIONBIO TCGETS TCSETS TIOCGWINSZ TIOCLINUX TIOCSTI
};

/// Opcodes of io_uring_register(2) (linux/io_uring.h), which libc has no names for.
const IO_URING: &[(&str, u64)] = &[
    ("IORING_REGISTER_FILES", 2),
    ("IORING_REGISTER_EVENTFD", 4),
    ("IORING_REGISTER_FILES_UPDATE", 6),
    ("IORING_REGISTER_RESTRICTIONS", 11),
    ("IORING_REGISTER_ENABLE_RINGS", 12),
    ("IORING_REGISTER_IOWQ_MAX_WORKERS", 19),
];

const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const TUN: u64 = b'T' as u64;
const KVM: u64 = 0xae;
const USERFAULTFD: u64 = 0xaa;

/// ioctl requests that libc has no name for: name, direction, kind, number, size of the argument
/// (`_IOC` of ioctl(2); linux/kvm.h, linux/if_tun.h, linux/userfaultfd.h).
const IOCTLS: &[(&str, u64, u64, u64, u64)] = &[
    ("KVM_CHECK_EXTENSION", NONE, KVM, 0x03, 0),
    ("KVM_CREATE_IRQCHIP", NONE, KVM, 0x60, 0),
    ("KVM_CREATE_PIT2", WRITE, KVM, 0x77, 64),
    ("KVM_CREATE_VCPU", NONE, KVM, 0x41, 0),
    ("KVM_CREATE_VM", NONE, KVM, 0x01, 0),
    ("KVM_ENABLE_CAP", WRITE, KVM, 0xa3, 104),
    ("KVM_GET_API_VERSION", NONE, KVM, 0x00, 0),
    ("KVM_GET_CLOCK", READ, KVM, 0x7c, 48),
    ("KVM_GET_DEBUGREGS", READ, KVM, 0xa1, 128),
    ("KVM_GET_DIRTY_LOG", WRITE, KVM, 0x42, 16),
    ("KVM_GET_FPU", READ, KVM, 0x8c, 416),
    ("KVM_GET_IRQCHIP", READ_WRITE, KVM, 0x62, 520),
    ("KVM_GET_LAPIC", READ, KVM, 0x8e, 1024),
    ("KVM_GET_MP_STATE", READ, KVM, 0x98, 4),
    ("KVM_GET_MSRS", READ_WRITE, KVM, 0x88, 8),
    ("KVM_GET_MSR_INDEX_LIST", READ_WRITE, KVM, 0x02, 4),
    ("KVM_GET_PIT2", READ, KVM, 0x9f, 112),
    ("KVM_GET_REGS", READ, KVM, 0x81, 144),
    ("KVM_GET_SREGS", READ, KVM, 0x83, 312),
    ("KVM_GET_SUPPORTED_CPUID", READ_WRITE, KVM, 0x05, 8),
    ("KVM_GET_TSC_KHZ", NONE, KVM, 0xa3, 0),
    ("KVM_GET_VCPU_EVENTS", READ, KVM, 0x9f, 64),
    ("KVM_GET_VCPU_MMAP_SIZE", NONE, KVM, 0x04, 0),
    ("KVM_GET_XCRS", READ, KVM, 0xa6, 392),
    ("KVM_GET_XSAVE", READ, KVM, 0xa4, 4096),
    ("KVM_IOEVENTFD", WRITE, KVM, 0x79, 64),
    ("KVM_IRQFD", WRITE, KVM, 0x76, 32),
    ("KVM_KVMCLOCK_CTRL", NONE, KVM, 0xad, 0),
    ("KVM_RUN", NONE, KVM, 0x80, 0),
    ("KVM_SET_CLOCK", WRITE, KVM, 0x7b, 48),
    ("KVM_SET_CPUID2", WRITE, KVM, 0x90, 8),
    ("KVM_SET_DEBUGREGS", WRITE, KVM, 0xa2, 128),
    ("KVM_SET_GSI_ROUTING", WRITE, KVM, 0x6a, 8),
    ("KVM_SET_GUEST_DEBUG", WRITE, KVM, 0x9b, 72),
    ("KVM_SET_IDENTITY_MAP_ADDR", WRITE, KVM, 0x48, 8),
    ("KVM_SET_IRQCHIP", READ, KVM, 0x63, 520),
    ("KVM_SET_LAPIC", WRITE, KVM, 0x8f, 1024),
    ("KVM_SET_MP_STATE", WRITE, KVM, 0x99, 4),
    ("KVM_SET_MSRS", WRITE, KVM, 0x89, 8),
    ("KVM_SET_PIT2", WRITE, KVM, 0xa0, 112),
    ("KVM_SET_REGS", WRITE, KVM, 0x82, 144),
    ("KVM_SET_SREGS", WRITE, KVM, 0x84, 312),
    ("KVM_SET_TSC_KHZ", NONE, KVM, 0xa2, 0),
    ("KVM_SET_TSS_ADDR", NONE, KVM, 0x47, 0),
    ("KVM_SET_USER_MEMORY_REGION", WRITE, KVM, 0x46, 32),
    ("KVM_SET_VCPU_EVENTS", WRITE, KVM, 0xa0, 64),
    ("KVM_SET_XCRS", WRITE, KVM, 0xa7, 392),
    ("KVM_SET_XSAVE", WRITE, KVM, 0xa5, 4096),
    ("KVM_SIGNAL_MSI", WRITE, KVM, 0xa5, 32),
    ("KVM_TRANSLATE", READ_WRITE, KVM, 0x85, 24),
    ("TUNGETIFF", READ, TUN, 210, 4),
    ("TUNSETIFF", WRITE, TUN, 202, 4),
    ("TUNSETOFFLOAD", WRITE, TUN, 208, 4),
    ("TUNSETQUEUE", WRITE, TUN, 217, 4),
    ("TUNSETVNETHDRSZ", WRITE, TUN, 216, 4),
    ("UFFDIO_API", READ_WRITE, USERFAULTFD, 0x3f, 24),
    ("UFFDIO_COPY", READ_WRITE, USERFAULTFD, 0x03, 40),
    ("UFFDIO_REGISTER", READ_WRITE, USERFAULTFD, 0x00, 32),
    ("UFFDIO_UNREGISTER", READ, USERFAULTFD, 0x01, 16),
    ("UFFDIO_ZEROPAGE", READ_WRITE, USERFAULTFD, 0x04, 32),
    ("USERFAULTFD_IOC_NEW", NONE, USERFAULTFD, 0x00, 0),
];
