//! Memory that a vhost-user back-end maps, too.

use std::fs::File;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

/// A memfd of `size` zero bytes that keeps that size: whoever it is passed to could otherwise shorten it,
/// and this process would die at its next access.
///
/// # Errors
/// What the host says.
pub fn memfd(size: u64) -> Result<Arc<File>, Errno> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"guest-memory", flags)?);
    ftruncate(&file, i64::try_from(size).map_err(|_| Errno::EFBIG)?)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(Arc::new(file))
}

#[cfg(test)]
mod tests {
    use crate::memory::{Options, allocate_with};
    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

    fn shared() -> Options {
        Options {
            shared: true,
            ..Options::default()
        }
    }

    #[test]
    fn who_maps_it_sees_it_and_cannot_take_it_away() {
        let memory = allocate_with(3073 << 20, shared()).unwrap();
        let regions: Vec<_> = memory
            .iter()
            .map(|region| {
                let file = region.file_offset().unwrap();
                (
                    region.start_addr().0,
                    region.len() >> 20,
                    file.start() >> 20,
                )
            })
            .collect();
        assert_eq!(regions, [(0, 3072, 0), (1 << 32, 1, 3072)]);
        memory.write_slice(b"high", GuestAddress(1 << 32)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().arc().clone();
        let mut there = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&*file, &mut there, 3072 << 20).unwrap();
        assert_eq!(&there, b"high");
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 40).is_err());
    }
}
