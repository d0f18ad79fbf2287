//! Guest kernels: registering them, and making what a machine boots from one.
//!
//! `casemate kernel add` ([`add`]) takes a kernel apart once, in jailed processes ([`jail`], [`unpack`]): the image becomes an
//! ELF file that the VMM loads as it is, and the modules' own descriptions ([`modinfo`]) become an index ([`index`]). At a
//! start, [`resolve`] picks the kernel and composes the initrd ([`initrd`]): init and just the modules that the
//! machine needs, cached by content.

mod add;
mod cli;
mod cpio;
mod deb;
mod decompress;
mod index;
mod initrd;
mod jail;
mod modinfo;
mod store;
mod unpack;

use std::io;
use std::path::{Path, PathBuf};

use index::Index;

pub use cli::cli;
pub use jail::UNPACKER_ID;

/// What a machine's kernel must have drivers for, besides a root disk, vsock, entropy and overlay.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// A network interface.
    pub net: bool,
    /// Persistent memory.
    pub pmem: bool,
    /// A disk for what is written to the root.
    pub layer: bool,
    /// File system type of the root; `None` is erofs.
    pub fs_type: Option<String>,
}

/// What to boot a machine with.
#[derive(Debug, Clone)]
pub struct BootFiles {
    /// The kernel: ELF as unpacked, or for an unregistered file whatever it is.
    pub vmlinux: PathBuf,
    /// The initial RAM disk with init and modules.
    pub initrd: Option<PathBuf>,
    /// Whether the kernel may have a driver for the virtio console: it is not known to have none.
    pub console: bool,
}

/// Why there is no kernel to boot, or one could not be registered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is wrong. Printed as it is.
    #[error("{0}")]
    Usage(String),
    /// No kernel is registered and none was named.
    #[error(
        "no guest kernel is registered: add one with `casemate kernel add --deb PACKAGE.deb`, `--host` or a FILE"
    )]
    NoKernel,
    /// Several are registered and none is the default.
    #[error("no default kernel: choose one with `casemate kernel default NAME` (there are: {0})")]
    NoDefault(String),
    /// No such name, and no such file.
    #[error("kernel {0}: not registered (see `casemate kernel ls`) and no such file")]
    Unknown(String),
    /// The name is taken.
    #[error(
        "kernel {0} is registered already with other content: remove it with `casemate kernel rm {0}`, or choose another --name"
    )]
    Exists(String),
    /// Not a name.
    #[error("kernel name {0:?}: use 1-64 of [A-Za-z0-9._+-], beginning with a letter or digit")]
    BadName(String),
    /// The package or image calls itself what no kernel is called.
    #[error("the kernel's release is {0:?}, which is none: 1-64 of [A-Za-z0-9._+-] are expected")]
    BadRelease(String),
    /// A file or directory could not be used.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Unpacking needs an identity of its own.
    #[error("registering a kernel needs root: the unpacker changes to a user id of its own")]
    NotRoot,
    /// The unpacker refused its input or failed.
    #[error("{input}: {message}")]
    Unpack {
        /// The file that was unpacked.
        input: String,
        /// What the unpacker said.
        message: String,
    },
    /// The package has no kernel in it.
    #[error("{0}: no kernel (boot/vmlinuz-*) in this package")]
    NoKernelInPackage(String),
    /// The stored description cannot be read.
    #[error(
        "kernel {name} is damaged ({why}): remove it with `casemate kernel rm {name}` and add it again"
    )]
    Damaged {
        /// The kernel.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The kernel lacks a driver.
    #[error(
        "kernel {kernel} has no driver {driver}, neither built in nor as a module: {purpose}{hint}"
    )]
    NoDriver {
        /// The kernel.
        kernel: String,
        /// The module's name.
        driver: String,
        /// What it is for.
        purpose: &'static str,
        /// What may help.
        hint: &'static str,
    },
}

impl Error {
    fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            what,
            path: path.display().to_string(),
            source,
        }
    }
}

/// Picks the kernel named by `selector` (a registered name, or a file), or the default one, and composes its initrd.
pub fn resolve(selector: Option<&str>, needs: &Needs) -> Result<BootFiles, Error> {
    let store = store::Store::open();
    let name = match selector {
        None => store.default_name()?,
        Some(name) if store.has(name) => name.to_owned(),
        Some(path) => return unregistered(&store, Path::new(path)),
    };
    let meta = store.meta(&name)?;
    let modules = match &meta.index {
        Some(index) => index.load_order(&name, needs)?,
        // Nothing is known about its drivers: init reports a missing one by name.
        None => Vec::new(),
    };
    let initrd = initrd::compose(&store, &name, &modules)?;
    Ok(BootFiles {
        vmlinux: store.vmlinux(&name),
        initrd: Some(initrd),
        console: meta.index.as_ref().is_none_or(Index::has_console),
    })
}

/// A kernel file that nobody registered: no modules, so what it needs must be built in.
fn unregistered(store: &store::Store, path: &Path) -> Result<BootFiles, Error> {
    if !path.is_file() {
        return Err(Error::Unknown(path.display().to_string()));
    }
    let initrd = initrd::compose(store, "", &[])?;
    Ok(BootFiles {
        vmlinux: path.to_owned(),
        initrd: Some(initrd),
        console: true,
    })
}
