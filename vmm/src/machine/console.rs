//! The virtio console's parts: what the control thread holds of it, and the thread that speaks for it.

use std::sync::Arc;
use std::thread::Builder;

use super::{Error, host};
use crate::virtio::console::{Output, Port, Size, to_stdout};
use crate::virtio::{Console, VirtioDevice};

/// A console, as the control thread has it.
pub struct ConsolePanel {
    /// What is typed, and the size of the terminal.
    pub port: Arc<Port>,
    /// What the guest says.
    pub output: Arc<Output>,
}

impl ConsolePanel {
    /// A console on standard input and output.
    ///
    /// # Errors
    /// When the kernel gives no eventfd.
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            port: Port::new(Size::default()).map_err(host("make an eventfd"))?,
            output: Arc::new(Output::new().map_err(host("make an eventfd"))?),
        })
    }

    /// Its device.
    pub fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Console::new(
            Arc::clone(&self.port),
            Arc::clone(&self.output),
        ))
    }

    /// Starts the thread that writes to standard output. It calls `seal` first of all.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub fn start(
        &self,
        seal: impl FnOnce() -> Result<(), ()> + Send + 'static,
    ) -> Result<(), Error> {
        let output = Arc::clone(&self.output);
        let thread = Builder::new().name("console".to_owned()).spawn(move || {
            if seal().is_ok() {
                output.run(to_stdout);
            }
        });
        thread.map_err(host("start the console's thread"))?;
        Ok(())
    }
}
