//! The conversation with the guest's init: frames in, frames out. Everything here is hostile until decoded.

use std::os::fd::AsRawFd;

use casemate_init::protocol::{self, Failed, FailureKind, Frame, STDIN_WINDOW, VERSION};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::{Phase, Session};
use crate::monitor::console::neutralise;
use crate::monitor::wire::{self, Event};

impl Session {
    pub(super) fn accept(&mut self) {
        if let Some(Ok((connection, _))) = self
            .streams
            .listener
            .as_ref()
            .map(|listener| listener.accept())
        {
            self.connection = Some(connection);
            // One conversation; whatever else the guest tries is refused by the kernel from now on.
            self.streams.listener = None;
        }
    }

    pub(super) fn read_guest(&mut self, buffer: &mut [u8]) {
        let Some(connection) = &self.connection else {
            return;
        };
        if self.is_full() {
            return;
        }
        let flags = MsgFlags::MSG_DONTWAIT;
        match recv(connection.as_raw_fd(), buffer, flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(0) | Err(_) => self.hang_up(),
            Ok(length) => {
                self.decoder.feed(buffer.get(..length).unwrap_or_default());
                loop {
                    match self.decoder.next_frame() {
                        Ok(Some(frame)) => self.take_frame(frame),
                        Ok(None) => break,
                        Err(error) => {
                            self.protest(&error);
                            break;
                        }
                    }
                }
            }
        }
    }

    fn take_frame(&mut self, frame: Frame) {
        match (frame, &self.phase) {
            (Frame::Ready(ready), Phase::Booting) if ready.version == VERSION => {
                self.identify();
                self.phase = Phase::Waiting;
                self.report(Event::Ready);
            }
            (Frame::Resumed(resumed), Phase::Booting)
                if resumed.version == VERSION && !self.identity.is_empty() =>
            {
                self.identify();
                self.phase = match resumed.running {
                    true => Phase::Running,
                    false => Phase::Waiting,
                };
                self.report(Event::Ready);
            }
            (Frame::Stdout(data), Phase::Running) => self.stdout.push(&data),
            (Frame::Stderr(data), Phase::Running) => self.stderr.push(&data),
            (Frame::StdinTaken(bytes), Phase::Running) => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                // More than was sent would be a lie; it only ever opens the window as far as it goes.
                self.window = self.window.saturating_add(bytes).min(STDIN_WINDOW);
            }
            (Frame::Exited(exited), Phase::Running) => self.end(match exited {
                protocol::Exited::Code(code) => Event::Exited(code),
                protocol::Exited::Signal(signal) => Event::Signaled(signal),
            }),
            (Frame::Failed(failed), Phase::Booting | Phase::Waiting | Phase::Running) => {
                self.fail(&failed)
            }
            (_, Phase::Over) => {}
            (Frame::Ready(ready), _) if ready.version != VERSION => {
                self.protest(&format!(
                    "its init speaks version {} of the protocol, not {VERSION}",
                    ready.version
                ));
            }
            (Frame::Resumed(resumed), _) if resumed.version != VERSION => {
                self.protest(&format!(
                    "its init, as it was saved, speaks version {} of the protocol, not {VERSION}",
                    resumed.version
                ));
            }
            _ => self.protest(&"a message out of turn"),
        }
    }

    /// Tells the guest who it is, if it goes on from a snapshot. Nothing else is sent to it before.
    fn identify(&mut self) {
        let identity = std::mem::take(&mut self.identity);
        self.to_guest.extend_from_slice(&identity);
    }

    fn fail(&mut self, failed: &Failed) {
        self.say("casemate: ", failed.message.as_bytes());
        self.end(Event::Failed(match failed.kind {
            FailureKind::NotFound => 127,
            FailureKind::NotExecutable => 126,
            FailureKind::Mount | FailureKind::Module | FailureKind::Other => 125,
        }));
    }

    fn end(&mut self, event: Event) {
        self.phase = Phase::Over;
        self.report(event);
    }

    fn protest(&mut self, what: &dyn std::fmt::Display) {
        self.say(
            "casemate: the guest broke the protocol: ",
            what.to_string().as_bytes(),
        );
        self.hang_up();
    }

    fn hang_up(&mut self) {
        self.connection = None;
        self.to_guest.clear();
        if self.phase != Phase::Over {
            self.end(Event::Broken);
        }
    }

    pub(super) fn report(&self, event: Event) {
        wire::report(self.control(), event);
    }

    /// One line on standard error, with guest bytes neutralised.
    fn say(&mut self, prefix: &str, message: &[u8]) {
        let mut line = prefix.as_bytes().to_vec();
        let first = message
            .split(|byte| *byte == b'\n')
            .next()
            .unwrap_or_default();
        neutralise(first, &mut line);
        line.push(b'\n');
        self.stderr.push(&line);
    }

    pub(super) fn write_guest(&mut self) {
        let Some(connection) = &self.connection else {
            return;
        };
        if self.to_guest.is_empty() {
            return;
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(connection.as_raw_fd(), &self.to_guest, flags) {
            Ok(sent) => drop(self.to_guest.drain(..sent.min(self.to_guest.len()))),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // What the guest sent before may still be there: its end is found by reading.
            Err(_) => self.to_guest.clear(),
        }
    }
}
