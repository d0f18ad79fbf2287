//! Guest memory whose pages another process brings: userfaultfd(2).
//!
//! Unsafe code lives here because ioctl(2) has no safe form. It is sound because each request is given its own structure,
//! alive for the call, and because the ranges are those of mapped guest memory, whose contents nothing in this process
//! makes a Rust reference to.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_EVENT_REMOVE, UFFDIO_REGISTER_MODE_MISSING, USERFAULTFD_IOC, uffdio_api,
    uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER};
use nix::request_code_none;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::GuestMemory;

/// Where the host gives them: a descriptor of it is all that it takes.
pub const DEVICE: &str = "/dev/userfaultfd";

nix::ioctl_write_int_bad!(
    /// Makes one (`USERFAULTFD_IOC_NEW`).
    ioc_new,
    request_code_none!(USERFAULTFD_IOC, 0)
);
nix::ioctl_readwrite_bad!(
    /// Agrees on what it does.
    uffdio_api_request,
    UFFDIO_API,
    uffdio_api
);
nix::ioctl_readwrite_bad!(
    /// From now on it is asked for the pages of a range.
    uffdio_register_request,
    UFFDIO_REGISTER,
    uffdio_register
);
nix::ioctl_readwrite_bad!(
    /// From now on the kernel fills the range with zeroes, for those who wait already, too.
    uffdio_unregister_request,
    UFFDIO_UNREGISTER,
    uffdio_range
);

/// A userfaultfd of this process, which is closed when it is replaced: those who wait for pages would find zeroes.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Made by the host's device, for the faults of the kernel, and with them KVM's, too. It also tells of memory that is
    /// given back.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(device: &File) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the request takes a number; what it returns is a descriptor that nobody else has.
        let fd = unsafe {
            let fd = ioc_new(device.as_raw_fd(), flags)?;
            OwnedFd::from_raw_fd(fd)
        };
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: UFFD_FEATURE_EVENT_REMOVE.into(),
            ioctls: 0,
        };
        // SAFETY: see the module's words.
        unsafe { uffdio_api_request(fd.as_raw_fd(), &mut api) }?;
        Ok(Self(fd))
    }

    /// Has it be asked for every page of `memory` that is not there.
    ///
    /// # Errors
    /// What the host says.
    pub fn register(&self, memory: &GuestMemory) -> io::Result<()> {
        for region in memory.iter() {
            let mut register = uffdio_register {
                range: range(region.as_ptr() as u64, region.len()),
                mode: UFFDIO_REGISTER_MODE_MISSING.into(),
                ioctls: 0,
            };
            // SAFETY: see the module's words.
            unsafe { uffdio_register_request(self.0.as_raw_fd(), &mut register) }?;
        }
        Ok(())
    }

    /// Has pages that are not there be zeroes, so that nobody waits for them any more. For memory that is given up: a
    /// guest must never see that.
    ///
    /// # Errors
    /// What the host says.
    pub fn unregister(&self, memory: &GuestMemory) -> io::Result<()> {
        for region in memory.iter() {
            let mut range = range(region.as_ptr() as u64, region.len());
            // SAFETY: see the module's words.
            unsafe { uffdio_unregister_request(self.0.as_raw_fd(), &mut range) }?;
        }
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn range(start: u64, len: u64) -> uffdio_range {
    uffdio_range { start, len }
}
