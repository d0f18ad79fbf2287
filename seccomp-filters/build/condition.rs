//! A condition on one argument, written as `NAME [& MASK] OPERATOR VALUE`, such as
//! `request == KVM_RUN`, `prot & PROT_EXEC == 0` or `tgid == $TGID`.

use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition};

use crate::constants;

/// The arguments that a policy may look at, by system call, as the manual pages name them.
///
/// An `int` is compared by its low 32 bits, as the kernel takes it; a `long` (marked `*`) in full.
const ARGUMENTS: &[(&str, &[&str])] = &[
    ("accept4", &["sockfd", "addr*", "addrlen*", "flags"]),
    ("clone", &["flags*"]),
    ("fallocate", &["fd", "mode", "offset*", "len*"]),
    ("fcntl", &["fd", "cmd", "arg*"]),
    ("getsockopt", &["sockfd", "level", "optname"]),
    (
        "io_uring_enter",
        &["fd", "to_submit", "min_complete", "flags", "sig*"],
    ),
    ("io_uring_register", &["fd", "opcode", "arg*", "nr_args"]),
    ("ioctl", &["fd", "request", "arg*"]),
    ("kill", &["pid", "sig"]),
    (
        "linkat",
        &["olddirfd", "oldpath*", "newdirfd", "newpath*", "flags"],
    ),
    ("madvise", &["addr*", "length*", "advice"]),
    (
        "mbind",
        &["addr*", "len*", "mode", "nodemask*", "maxnode*", "flags"],
    ),
    (
        "mmap",
        &["addr*", "length*", "prot*", "flags*", "fd", "offset*"],
    ),
    (
        "move_pages",
        &["pid", "count*", "pages*", "nodes*", "status*", "flags"],
    ),
    ("mprotect", &["addr*", "length*", "prot*"]),
    ("newfstatat", &["dirfd", "pathname*", "statbuf*", "flags"]),
    ("pidfd_send_signal", &["pidfd", "sig"]),
    ("prctl", &["option", "arg2*"]),
    ("recvmsg", &["sockfd", "msg*", "flags"]),
    ("rt_sigaction", &["signum"]),
    ("rt_sigprocmask", &["how"]),
    ("sched_setaffinity", &["pid", "cpusetsize*", "mask*"]),
    ("seccomp", &["operation", "flags"]),
    ("sendmsg", &["sockfd", "msg*", "flags"]),
    ("sendto", &["sockfd", "buf*", "len*", "flags", "dest_addr*"]),
    ("setsockopt", &["sockfd", "level", "optname"]),
    ("socket", &["domain", "type", "protocol"]),
    ("socketpair", &["domain", "type", "protocol"]),
    (
        "statx",
        &["dirfd", "pathname*", "flags", "mask", "statxbuf*"],
    ),
    ("tgkill", &["tgid", "tid", "sig"]),
    ("unshare", &["flags*"]),
    ("unlinkat", &["dirfd", "pathname*", "flags"]),
    ("wait4", &["pid", "wstatus*", "options"]),
];

/// What an argument is compared with.
#[derive(Clone, PartialEq, Eq)]
pub enum Value {
    Known(u64),
    /// Filled in when the filter is installed: the process's own id.
    Tgid,
}

/// One condition.
#[derive(Clone)]
pub struct Condition {
    /// As it was written.
    pub text: String,
    pub value: Value,
    index: u8,
    width: SeccompCmpArgLen,
    operator: SeccompCmpOp,
}

impl PartialEq for Condition {
    fn eq(&self, other: &Self) -> bool {
        (self.index, &self.operator, &self.value) == (other.index, &other.operator, &other.value)
    }
}

impl Condition {
    /// Parses `text` as a condition on an argument of `syscall`.
    pub fn parse(syscall: &str, text: &str) -> Result<Self, String> {
        let wrong = |what: &str| format!("`{text}`: {what}");
        let words: Vec<&str> = text.split_whitespace().collect();
        let (name, mask, operator, value) = match words[..] {
            [name, operator, value] => (name, None, operator, value),
            [name, "&", mask, "==", value] => (name, Some(mask), "==", value),
            _ => return Err(wrong("not of the form NAME [& MASK] OPERATOR VALUE")),
        };
        let (index, width) = argument(syscall, name).ok_or_else(|| wrong("unknown argument"))?;
        let operator = match (operator, mask) {
            ("==", Some(mask)) => {
                SeccompCmpOp::MaskedEq(constants::value(mask).ok_or_else(|| wrong("unknown mask"))?)
            }
            ("==", None) => SeccompCmpOp::Eq,
            ("!=", None) => SeccompCmpOp::Ne,
            ("<=", None) => SeccompCmpOp::Le,
            (">=", None) => SeccompCmpOp::Ge,
            _ => return Err(wrong("unknown operator")),
        };
        let value = match value {
            // A process id is an int, and only equality has one place to patch.
            "$TGID" if operator == SeccompCmpOp::Eq && width == SeccompCmpArgLen::Dword => {
                Value::Tgid
            }
            "$TGID" => return Err(wrong("$TGID is compared by == with an int")),
            name => Value::Known(constants::value(name).ok_or_else(|| wrong("unknown value"))?),
        };
        Ok(Self {
            text: words.join(" "),
            value,
            index,
            width,
            operator,
        })
    }

    /// The compiler's form, with `tgid` in the place of `$TGID`.
    pub fn compile(&self, tgid: u32) -> Result<SeccompCondition, String> {
        let value = match self.value {
            Value::Known(value) => value,
            Value::Tgid => u64::from(tgid),
        };
        SeccompCondition::new(self.index, self.width.clone(), self.operator.clone(), value)
            .map_err(|error| format!("`{}`: {error}", self.text))
    }
}

fn argument(syscall: &str, name: &str) -> Option<(u8, SeccompCmpArgLen)> {
    let (_, arguments) = ARGUMENTS.iter().find(|(known, _)| *known == syscall)?;
    let index = arguments
        .iter()
        .position(|argument| argument.trim_end_matches('*') == name)?;
    let width = if arguments[index].ends_with('*') {
        SeccompCmpArgLen::Qword
    } else {
        SeccompCmpArgLen::Dword
    };
    Some((u8::try_from(index).ok()?, width))
}
