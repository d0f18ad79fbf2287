//! The half of the jailer that stays, on its way to [`broker::serve`].

use std::os::fd::OwnedFd;

use casemate_broker::{BrokerPolicy, Server, exit};
use casemate_seccomp_filters::{Role, Stage};
use nix::sys::signalfd::SignalFd;

use super::helper::Parts;
use super::{Failure, Jail, close_streams, give_up_privileges};
use crate::broker::{self, Child};
use crate::credentials::{self, Parent};
use crate::error::{Context, Result, say};
use crate::landlock;
use crate::plan::Step;
use crate::root;

/// The half that stays, with only what it needs.
pub(super) struct Stay {
    pub(super) policy: BrokerPolicy,
    pub(super) sockets: Vec<OwnedFd>,
    pub(super) child: Child,
    pub(super) signals: SignalFd,
}

impl Stay {
    /// Takes the steps that make it the broker, and serves. Returns the exit code.
    pub(super) fn run(self, mut jail: Jail<'_>, steps: &[Step]) -> u8 {
        let arguments = jail.arguments;
        let Self {
            policy,
            sockets,
            child,
            signals,
        } = self;
        // Everything that is the VMM's alone: KVM, taps, listeners, the program.
        jail.named.clear();
        jail.exec_file = None;
        jail.parts = Parts::default();
        for step in steps {
            let done = match step {
                Step::EmptyRoot => root::enter_empty(),
                Step::Limits => credentials::limit(&arguments.limits).map(drop),
                // The VMM's half says what this kernel lacks.
                Step::Landlock => {
                    landlock::enter(&broker::domain(&policy), arguments.allow_missing_landlock)
                        .map(drop)
                }
                Step::DieWithParent => credentials::die_with_parent(&Parent::Caller(jail.caller)),
                Step::CloseStreams => close_streams(jail.null.as_ref(), jail.log.as_deref()),
                Step::Seccomp => seal(),
                Step::Serve => {
                    if let Some(outcome) = &mut jail.outcome {
                        outcome.done();
                    }
                    // What is left of the jail; its end of the outcome above all.
                    drop(jail);
                    let server = Some(Server::with_sockets(sockets, policy));
                    return match broker::serve(server, &child, &signals) {
                        Ok(code) => code,
                        Err(error) => {
                            say(error);
                            exit::JAIL_FAILED
                        }
                    };
                }
                other => give_up_privileges(arguments, *other),
            };
            if let Err(error) = done {
                // The VMM's half is killed when this one ends, or notices that it has ended.
                return jail.fail(&Failure { step: *step, error }.to_string());
            }
        }
        exit::JAIL_FAILED
    }
}

fn seal() -> Result<()> {
    casemate_seccomp_filters::install_violation_reporter().doing("handle", "SIGSYS")?;
    casemate_seccomp_filters::install(Role::Broker, Stage::Sealed)?;
    Ok(())
}
