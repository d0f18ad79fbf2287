//! The SIGSYS handler: one line that names the thread and the call, then the end.
//!
//! A handler may interrupt any code, with any lock held, so this one allocates nothing, takes no
//! lock, and uses only calls that every policy allows (`common.json`, unit-tested).

use std::ffi::{c_int, c_void};
use std::io;

use crate::{EXIT_VIOLATION, syscall_name};

/// How long a full pipe at standard error may hold up the end of the process, in milliseconds.
const PATIENCE_MS: c_int = 100;

/// Makes a seccomp violation in any thread end the process with the line
/// `seccomp violation: thread NAME called SYSCALL (NUMBER) with ARG0, ARG1, ARG2` on standard error
/// and exit code [`EXIT_VIOLATION`]. A call of another ABI is named by that and its number alone. To be called once, early, before any filter is entered.
///
/// # Errors
/// When the kernel refuses the handler.
pub fn install_violation_reporter() -> io::Result<()> {
    // SAFETY: sigaction is plain data for which zeroes are valid; the handler has the signature
    // that SA_SIGINFO asks for and keeps to async-signal-safe calls.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = report as *const () as usize;
        // The thread's own stack may be the trouble; the standard library gives each thread a
        // signal stack, so asking for it costs nothing.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// siginfo_t as the kernel fills it in for SIGSYS (`_sigsys` in asm-generic/siginfo.h).
#[repr(C)]
struct SigsysInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    _padding: c_int,
    call_addr: *mut c_void,
    syscall: c_int,
    arch: u32,
}

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` (linux/audit.h).
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
/// Calls with this bit are x32's.
const X32_BIT: i64 = 0x4000_0000;

/// `si_code` of a SIGSYS that a seccomp filter raised (asm-generic/siginfo.h).
const SYS_SECCOMP: c_int = 1;

extern "C" fn report(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t, which is larger than and aligned like SigsysInfo,
    // and a ucontext_t, both valid while the handler runs.
    let (info, registers) = unsafe {
        (
            &*info.cast::<SigsysInfo>(),
            &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs,
        )
    };
    let mut line = Line::new();
    if info.code == SYS_SECCOMP {
        let number = i64::from(info.syscall);
        line.text(b"seccomp violation: thread ");
        line.text(until_nul(&thread_name()));
        line.text(b" called ");
        // Numbers mean other calls in other ABIs.
        let name = match info.arch {
            X86_64 if number & X32_BIT != 0 => "unknown of x32",
            X86_64 => syscall_name(number).unwrap_or("unknown"),
            I386 => "unknown of the 32-bit ABI",
            _ => "unknown of another ABI",
        };
        line.text(name.as_bytes());
        line.text(b" (");
        line.decimal(info.syscall.unsigned_abs());
        line.text(b") with ");
        let arguments = if info.arch == I386 {
            [libc::REG_RBX, libc::REG_RCX, libc::REG_RDX]
        } else {
            [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX]
        };
        for (index, register) in arguments.into_iter().enumerate() {
            if index > 0 {
                line.text(b", ");
            }
            let value = usize::try_from(register).ok();
            let value = value.and_then(|register| registers.get(register));
            line.hexadecimal(value.copied().unwrap_or(0).cast_unsigned());
        }
    } else {
        // Somebody sent the signal: no violation, but neither something to go on after.
        line.text(b"seccomp violation: SIGSYS was sent to this process by another one");
    }
    line.text(b"\n");
    line.write();
    // SAFETY: exit_group ends the process without running anything of it; `_exit` is that call.
    unsafe { libc::_exit(EXIT_VIOLATION) }
}

/// The calling thread's name, as the kernel knows it.
fn thread_name() -> [u8; 16] {
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes (prctl(2)) to a live local.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr(), 0, 0, 0) };
    name
}

fn until_nul(name: &[u8]) -> &[u8] {
    name.split(|&byte| byte == 0).next().unwrap_or(name)
}

/// A line built without allocation; what does not fit is cut off.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Line {
    fn new() -> Self {
        Self {
            bytes: [0; 256],
            length: 0,
        }
    }

    fn text(&mut self, text: &[u8]) {
        for &byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length = self.length.saturating_add(1);
            }
        }
    }

    fn decimal(&mut self, value: u32) {
        self.number(u64::from(value), 10);
    }

    fn hexadecimal(&mut self, value: u64) {
        self.text(b"0x");
        self.number(value, 16);
    }

    fn number(&mut self, mut value: u64, base: u64) {
        let mut digits = [0_u8; 20];
        let mut start = digits.len();
        for place in digits.iter_mut().rev() {
            let digit = value.checked_rem(base).unwrap_or(0);
            *place = *b"0123456789abcdef".get(digit as usize).unwrap_or(&b'?');
            start = start.saturating_sub(1);
            value = value.checked_div(base).unwrap_or(0);
            if value == 0 {
                break;
            }
        }
        self.text(digits.get(start..).unwrap_or_default());
    }

    /// Writes the line to standard error, without waiting for long for one who does not read it.
    fn write(&self) {
        let mut wait = libc::pollfd {
            fd: libc::STDERR_FILENO,
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: one live pollfd; and the first `length` bytes of a live array.
        unsafe {
            if libc::poll(&raw mut wait, 1, PATIENCE_MS) > 0 {
                libc::write(
                    libc::STDERR_FILENO,
                    self.bytes.as_ptr().cast(),
                    self.length.min(self.bytes.len()),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Line;

    #[test]
    fn a_line_has_decimal_and_hexadecimal_numbers() {
        let mut line = Line::new();
        line.decimal(0);
        line.text(b" ");
        line.decimal(4_294_967_295);
        line.text(b" ");
        line.hexadecimal(u64::MAX);
        line.text(b" ");
        line.hexadecimal(0x10);
        let text = std::str::from_utf8(&line.bytes[..line.length]);
        assert_eq!(text, Ok("0 4294967295 0xffffffffffffffff 0x10"));
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_off() {
        let mut line = Line::new();
        line.text(&[b'x'; 1000]);
        assert_eq!(line.length, 256);
    }
}
