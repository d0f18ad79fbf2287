//! The HTTP API: Firecracker's, on a Unix socket, served by the control thread between its other work.
//!
//! [`http`] turns bytes into requests and answers into bytes, [`connection`] and [`server`] move them without
//! ever waiting, [`routes`] says what a request asks for ([`action`]), and the desk does it: [`before`] the
//! machine is started it collects a config, [`after`] that it changes what runs.

pub mod action;
mod after;
mod balloon;
mod before;
mod connection;
mod counting;
mod fault;
pub mod http;
mod memory;
mod migration;
mod plug;
pub mod routes;
mod server;
mod snapshot;
mod working_set;

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Instant;

use log::{debug, info};
use serde::Serialize;
use vmm_sys_util::epoll::{Epoll, EventSet};

use self::action::{Action, MmdsAction};
use self::connection::Request;
pub use self::fault::Fault;
use self::http::Response;
use self::migration::Moving;
use self::server::Server;
use self::working_set::Recording;
use crate::config::Config;
use crate::machine::{self, RunningMachine};
use crate::metrics::Reporter;
use crate::mmds::Store;
use crate::resources::Source;

/// The version of Firecracker whose API this is: what clients decide by.
pub const API_VERSION: &str = "1.16.0";
/// The `app_name` of `GET /`: clients look for this one.
const APP_NAME: &str = "Firecracker";

/// What the API is told at the start.
pub struct Options {
    /// Where it listens; non-blocking.
    pub listener: UnixListener,
    /// Most bytes of a request's body.
    pub max_payload: usize,
    /// The machine's name.
    pub id: String,
    /// What the command line adds to the machine.
    pub machine: machine::Options,
    /// What there is of a machine already.
    pub config: Config,
    /// What the guest finds at the metadata service.
    pub metadata: Arc<Store>,
}

/// The API.
pub struct Api {
    server: Server,
    desk: Desk,
    /// Whether a client may have another request ready.
    more: bool,
    /// Whether more has come of a machine from another VMM.
    more_comes: bool,
}

/// What answers requests.
struct Desk {
    id: String,
    config: Config,
    source: Source,
    options: machine::Options,
    metadata: Arc<Store>,
    /// Whether the guest is stopped, after the start.
    paused: bool,
    /// The working set that is still to be recorded.
    recording: Option<Recording>,
    /// The machine's way to or from another VMM.
    moving: Moving,
    /// The machine that the last request has started.
    started: Option<RunningMachine>,
    /// Why that could not be done, and nothing can be any more.
    failed: Option<crate::Error>,
}

/// What is answered to a request that was done.
#[derive(Debug)]
enum Reply {
    /// Nothing.
    Done,
    /// JSON.
    Json(String),
    /// The connection becomes something else.
    Upgrade,
}

impl Reply {
    fn of(value: &impl Serialize) -> Self {
        // What is written here has string keys and finite numbers: it can be written.
        Self::Json(serde_json::to_string(value).unwrap_or_default())
    }
}

/// `GET /`
#[derive(Serialize)]
struct Instance<'a> {
    id: &'a str,
    state: &'static str,
    vmm_version: &'static str,
    app_name: &'static str,
}

impl Api {
    /// An API whose machine is made from `source`.
    ///
    /// # Errors
    /// When the kernel refuses to watch its socket.
    pub(super) fn new(options: Options, source: Source, epoll: &Epoll) -> std::io::Result<Self> {
        Ok(Self {
            server: Server::new(options.listener, options.max_payload, epoll)?,
            desk: Desk {
                id: options.id,
                config: options.config,
                source,
                options: options.machine,
                metadata: options.metadata,
                paused: false,
                recording: None,
                moving: Moving::Nothing,
                started: None,
                failed: None,
            },
            more: false,
            more_comes: false,
        })
    }

    /// Takes note of an event. Whether it was one of the API's.
    pub(super) fn on_event(&mut self, token: u64, events: EventSet, epoll: &Epoll) -> bool {
        if token == migration::TOKEN {
            self.more_comes = true;
            return true;
        }
        self.server.on_event(token, events, epoll)
    }

    /// When [`Api::turn`] wants to be called again at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.more || self.more_comes {
            return Some(Instant::now());
        }
        [self.server.deadline(), self.desk.recording_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Starts the machine of the config that was given at the start.
    ///
    /// # Errors
    /// When that cannot be done.
    pub(super) fn start(&mut self) -> Result<RunningMachine, crate::Error> {
        self.desk.build_and_start()
    }

    /// Does what clients have asked for before the start. Returns the machine once one of them has
    /// started it.
    ///
    /// # Errors
    /// When the start failed so far on that nothing can be done any more.
    pub(super) fn turn_before(
        &mut self,
        metrics: &mut Reporter,
        epoll: &Epoll,
    ) -> Result<Option<RunningMachine>, crate::Error> {
        let desk = &mut self.desk;
        self.server.expire(epoll);
        self.more = self
            .server
            .serve(epoll, |request| desk.answer(None, metrics, &request));
        let connection = self.server.take_upgraded();
        self.more_comes |= connection.is_some();
        desk.take_connection(None, connection, epoll);
        if std::mem::take(&mut self.more_comes) {
            self.more_comes = desk.go_on_receiving(None);
        }
        match self.desk.failed.take() {
            Some(error) => Err(error),
            None => Ok(self.desk.started.take()),
        }
    }

    /// Whether the machine that was started is to run at once: one from a snapshot may wait to be resumed.
    pub(super) fn starts_running(&self) -> bool {
        !self.desk.paused
    }

    /// The guest has ended by itself.
    pub(super) fn at_end(&mut self, machine: &RunningMachine) {
        self.desk.record_working_set(machine, true);
    }

    /// Does what clients have asked for of the running machine.
    pub(super) fn turn(
        &mut self,
        machine: &mut RunningMachine,
        metrics: &mut Reporter,
        epoll: &Epoll,
    ) {
        let desk = &mut self.desk;
        desk.record_working_set(machine, false);
        self.server.expire(epoll);
        self.more = self.server.serve(epoll, |request| {
            desk.answer(Some(machine), metrics, &request)
        });
        let connection = self.server.take_upgraded();
        desk.take_connection(Some(machine), connection, epoll);
        if std::mem::take(&mut self.more_comes) {
            self.more_comes = desk.go_on_receiving(Some(machine));
        }
        desk.go_on_sending(machine);
    }
}

impl Desk {
    fn answer(
        &mut self,
        machine: Option<&mut RunningMachine>,
        metrics: &mut Reporter,
        request: &Request,
    ) -> Response {
        let (method, path) = (request.head.method, request.head.path.as_str());
        debug!("API: {} {path}", method.name());
        let route = match routes::route(method, path, &request.body) {
            Ok(route) => route,
            Err(error) => {
                counting::count(&metrics.api, method, path, true);
                return Fault::from(error).response();
            }
        };
        // Another client may have started it in this very turn.
        let mut started = self.started.take();
        let result = match machine.or(started.as_mut()) {
            Some(machine) => self.after(machine, metrics, route.action),
            None if self.failed.is_some() => Err(Fault::Started),
            None => self.before(metrics, route.action),
        };
        if started.is_some() {
            self.started = started;
        }
        counting::count(&metrics.api, method, path, result.is_err());
        if route.deprecated {
            metrics.api.deprecated.deprecated_http_api_calls.inc();
        }
        let mut response = match result {
            Ok(Reply::Done) => Response::done(),
            Ok(Reply::Json(body)) => Response::json(body),
            Ok(Reply::Upgrade) => Response::upgrade(),
            Err(fault) => {
                info!("API: refused {} {path}: {fault}", method.name());
                fault.response()
            }
        };
        response.deprecated = route.deprecated;
        response
    }

    /// What is asked of the metadata, before and after the start.
    fn metadata(&self, action: MmdsAction) -> Result<Reply, Fault> {
        let result = match action {
            MmdsAction::Get => {
                return Ok(match self.metadata.document() {
                    Some(document) => Reply::of(document.as_ref()),
                    None => Reply::Json("{}".to_owned()),
                });
            }
            MmdsAction::Put(document) => self.metadata.put(document),
            MmdsAction::Patch(change) => self.metadata.patch(&change),
        };
        result.map_err(Fault::Metadata)?;
        Ok(Reply::Done)
    }

    /// What is the same before and after the start.
    fn look(&self, action: &Action, state: &'static str) -> Option<Reply> {
        Some(match action {
            Action::GetInstance => Reply::of(&Instance {
                id: &self.id,
                state,
                vmm_version: API_VERSION,
                app_name: APP_NAME,
            }),
            Action::GetVersion => {
                Reply::of(&serde_json::json!({ "firecracker_version": API_VERSION }))
            }
            Action::GetConfig => Reply::of(&self.config),
            Action::GetMachineConfig => Reply::of(&self.config.machine_config),
            _ => return None,
        })
    }
}
