//! What a run comes to: its exit code, and the words for it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use casemate_broker::exit;

use super::{FAILED, Reason, Supervisor, TIMED_OUT};
use crate::monitor::wire::Event;
use crate::say::warn as say;

/// Whether the jailer's end is that of all the machine's processes: not if it was killed, by a signal, for what its policy
/// forbids or by a step that failed. The kernel then kills the VMM, but nobody has waited for it.
pub(super) fn all_ended(jailer: Option<ExitStatus>) -> bool {
    let code = jailer.and_then(|status| status.code());
    code.is_some_and(|code| {
        ![exit::SECCOMP_VIOLATION, exit::JAIL_FAILED]
            .map(i32::from)
            .contains(&code)
    })
}

impl Supervisor {
    /// Turns all that happened into an exit code, and says why when it is not the command's own.
    pub(super) fn conclude(&self) -> u8 {
        match self.reason {
            Some(Reason::Timeout) => {
                say("the time of --timeout is over");
                return TIMED_OUT;
            }
            Some(Reason::BootTimeout) => {
                say(
                    "the guest was not ready in the time of --boot-timeout: see its console with --console",
                );
                return FAILED;
            }
            Some(Reason::MonitorLost) => {
                say("the monitor ended before the machine, which was ended too");
                return FAILED;
            }
            _ => {}
        }
        match self.result {
            Some(Event::Exited(code) | Event::Failed(code)) => return code,
            Some(Event::Signaled(signal)) => return exit::by_signal(signal.into()),
            _ => {}
        }
        if let Some(Reason::Signal(signal)) = self.reason {
            return exit::by_signal(signal as i32);
        }
        let status = self.jailer_status.unwrap_or_default();
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        if self.bare
            && matches!(
                code,
                Some(exit::GUEST_POWERED_OFF | exit::GUEST_RESET | exit::GUEST_CRASHED)
            )
        {
            return code.unwrap_or(FAILED);
        }
        match (code, status.signal()) {
            // Nothing was started, and the VMM or the jailer has said in one line why: it went through the log.
            (Some(exit::BAD_INPUT | exit::JAIL_FAILED), _) => {}
            (Some(exit::GUEST_POWERED_OFF), _) => {
                say("the guest powered off before the command ended")
            }
            (Some(exit::GUEST_RESET), _) => {
                say(
                    "the guest reset itself before the command ended (as after a kernel panic): see --console",
                );
            }
            (Some(exit::GUEST_CRASHED), _) => {
                say("the guest crashed (triple fault, or an error in KVM)")
            }
            (Some(exit::MOVED), _) => say("the machine has moved to another VMM"),
            (Some(exit::ENDED_BY_HOST), _) => say("the machine was ended from outside"),
            (Some(exit::SECCOMP_VIOLATION), _) => {
                say("the VMM was ended: it made a system call that it may not")
            }
            (Some(code), _) => say(format!("the VMM failed with code {code}")),
            (None, Some(signal)) => say(format!("the jailer was ended by signal {signal}")),
            (None, None) => say("the jailer ended in an unknown way"),
        }
        FAILED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_jailer_that_saw_the_end_is_believed() {
        let exited = |code: u8| Some(ExitStatus::from_raw(i32::from(code) << 8));
        for code in [0, 1, 2, 10, 11, 12] {
            assert!(all_ended(exited(code)), "{code}");
        }
        for code in [exit::SECCOMP_VIOLATION, exit::JAIL_FAILED] {
            assert!(!all_ended(exited(code)), "{code}");
        }
        for signal in [9, 31] {
            assert!(!all_ended(Some(ExitStatus::from_raw(signal))), "{signal}");
        }
        assert!(!all_ended(None));
    }
}
