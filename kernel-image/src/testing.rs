//! Images made for tests.

/// An ELF file with one segment of `content`, linked at 16 MiB, and `memory` bytes in memory.
pub(crate) fn elf(content: &[u8], memory: u64) -> Vec<u8> {
    let physical = 0x100_0000_u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    file.extend(physical.to_le_bytes()); // entry
    file.extend(64_u64.to_le_bytes()); // program headers
    file.extend(0_u64.to_le_bytes()); // section headers
    file.extend(0_u32.to_le_bytes());
    for word in [64_u16, 56, 1, 64, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    file.extend(7_u32.to_le_bytes());
    for long in [
        120,
        crate::KERNEL_MAP + physical,
        physical,
        content.len() as u64,
        memory,
        0x20_0000,
    ] {
        file.extend(long.to_le_bytes());
    }
    file.extend(content);
    file
}

/// A bzImage around `payload`, protocol 2.15, with a version string.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    file[0x20e..0x210].copy_from_slice(&0x180_u16.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file[0x380..0x38f].copy_from_slice(b"6.1.0-test (me)");
    file.extend([0xcc; 16]);
    file.extend(payload);
    file
}
