//! A Landlock domain that allows nothing: what is open stays usable, and nothing is opened,
//! created, bound or connected by name any more.

use std::fmt::{Display, Formatter};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Erratum, LandlockStatus, Ruleset,
    RulesetAttr, RulesetStatus, Scope,
};

use super::Error;

/// The newest rights asked for; the kernel's own are the limit. None is ever granted, so rights
/// that this code was not written for can't weaken the domain.
const NEWEST: ABI = ABI::V10;

/// What the kernel enforces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LandlockOutcome {
    /// The ABI of which all rights are handled; 0 when nothing is enforced.
    pub abi: u32,
    /// TCP ports can't be bound or connected to (ABI 4).
    pub tcp: bool,
    /// Abstract Unix sockets outside can't be connected to (ABI 6).
    pub abstract_sockets: bool,
    /// Processes outside can't be signalled (ABI 6 with its erratum mended).
    pub signals: bool,
}

impl LandlockOutcome {
    const NOTHING: Self = Self {
        abi: 0,
        tcp: false,
        abstract_sockets: false,
        signals: false,
    };
}

impl Display for LandlockOutcome {
    fn fmt(&self, out: &mut Formatter<'_>) -> std::fmt::Result {
        if self.abi == 0 {
            return out.write_str("Landlock: not enforced");
        }
        write!(out, "Landlock ABI {}: no files", self.abi)?;
        for (enforced, what) in [
            (self.tcp, "no TCP"),
            (self.abstract_sockets, "no abstract sockets"),
            (self.signals, "no signals to others"),
        ] {
            if enforced {
                write!(out, ", {what}")?;
            }
        }
        Ok(())
    }
}

/// Puts the calling thread, and all that it starts from now on, in a domain that allows nothing.
///
/// Rights that the kernel does not know are left out; the outcome says which there are. Without
/// any Landlock this is an error, unless `allow_missing`.
///
/// # Errors
/// When the kernel has no Landlock and `allow_missing` is false, or refuses the domain.
pub fn landlock_nothing(allow_missing: bool) -> Result<LandlockOutcome, Error> {
    // Before the mending of its erratum, the signal scope refuses signals between threads of one
    // process that are in different domains: the kicks that stop a vCPU.
    let mended = Erratum::current().contains(Erratum::ScopedSignalHandling);
    let scope = if mended {
        Scope::AbstractUnixSocket | Scope::Signal
    } else {
        Scope::AbstractUnixSocket.into()
    };
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(scope)?
        .create()?
        .restrict_self()?;
    let reason = match status.landlock {
        LandlockStatus::Available { effective_abi, .. }
            if status.ruleset != RulesetStatus::NotEnforced =>
        {
            return Ok(LandlockOutcome {
                abi: effective_abi as u32,
                tcp: effective_abi >= ABI::V4,
                abstract_sockets: effective_abi >= ABI::V6,
                signals: effective_abi >= ABI::V6 && mended,
            });
        }
        LandlockStatus::Available { .. } => "it enforced nothing",
        LandlockStatus::NotEnabled => "built in, but not enabled at boot",
        LandlockStatus::NotImplemented => "not built in",
    };
    if allow_missing {
        return Ok(LandlockOutcome::NOTHING);
    }
    Err(Error::NoLandlock(reason))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{ErrorKind, Read};
    use std::net::{TcpListener, TcpStream};

    use super::{LandlockOutcome, landlock_nothing};

    /// Everything in a thread of its own, for there is no way out of a domain.
    fn in_the_domain<T: Send>(test: impl FnOnce(LandlockOutcome) -> T + Send) -> T {
        std::thread::scope(|scope| {
            let domain = scope.spawn(|| test(landlock_nothing(false).unwrap()));
            domain.join().unwrap()
        })
    }

    #[test]
    fn nothing_is_opened_and_what_was_open_works() {
        let mut zero = File::open("/dev/zero").unwrap();
        in_the_domain(|outcome| {
            assert!(outcome.abi >= 1);
            let mut byte = [1];
            zero.read_exact(&mut byte).unwrap();
            for path in ["/dev/zero", "/etc/passwd", "/proc/self/status", "."] {
                let refused = File::open(path).unwrap_err().kind();
                assert_eq!(refused, ErrorKind::PermissionDenied, "{path}");
            }
            let created = File::create(std::env::temp_dir().join("casemate-landlock-test"));
            assert_eq!(created.unwrap_err().kind(), ErrorKind::PermissionDenied);
        });
    }

    #[test]
    fn no_tcp_from_abi_4() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        in_the_domain(|outcome| {
            let connected = TcpStream::connect(address).map(drop);
            let bound = TcpListener::bind("127.0.0.1:0").map(drop);
            for result in [connected, bound] {
                let refused =
                    result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
                assert_eq!(refused, outcome.tcp);
            }
        });
    }

    #[test]
    fn outcomes_read_well() {
        let outcome = LandlockOutcome {
            abi: 4,
            tcp: true,
            abstract_sockets: false,
            signals: false,
        };
        assert_eq!(outcome.to_string(), "Landlock ABI 4: no files, no TCP");
        assert_eq!(
            LandlockOutcome::NOTHING.to_string(),
            "Landlock: not enforced"
        );
    }
}
