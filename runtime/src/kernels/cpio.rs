//! Writes an initial RAM disk: a cpio archive in the `newc` format, uncompressed.
//!
//! The format is the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`: a header of hexadecimal numbers,
//! the name, and the content, each padded to four bytes.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// An archive in the making. Owners are root, times zero: equal content gives equal archives.
pub struct Archive<W> {
    output: W,
    inode: u32,
    offset: usize,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(output: W) -> Self {
        Self {
            output,
            inode: 0,
            offset: 0,
        }
    }

    /// Adds a directory; its parent must be there already.
    pub fn directory(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(path, DIRECTORY | permissions, 2, &[])
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | permissions, 1, content)
    }

    /// Writes the end and gives the output back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, 1, &[])?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other(format!("{path}: larger than 4 GiB")))?;
        let name_size =
            u32::try_from(path.len() + 1).map_err(|_| io::Error::other("name too long"))?;
        let inode = self.inode;
        self.inode += 1;
        // Magic; inode, mode, uid, gid, links, mtime, size, device (2), device of the file (2), length of the name, checksum.
        let header = format!(
            "070701{inode:08X}{mode:08X}{z}{z}{links:08X}{z}{size:08X}{z}{z}{z}{z}{name_size:08X}{z}",
            z = "00000000"
        );
        self.write(header.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(b"\0")?;
        self.pad()?;
        self.write(content)?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.offset += bytes.len();
        self.output.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.offset.wrapping_neg() % 4;
        self.write(b"\0\0\0".get(..missing).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_laid_out_as_documented() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("d", 0o755).unwrap();
        archive.file("d/f", 0o644, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert!(bytes.len() % 4 == 0);
        // Walk it as the kernel does.
        let (mut at, mut seen) = (0, Vec::new());
        loop {
            let field = |n: usize| {
                let start = at + 6 + n * 8;
                usize::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16)
                    .unwrap()
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = at + 110;
            let content = (name + name_size).next_multiple_of(4);
            assert_eq!(bytes[name + name_size - 1], 0);
            seen.push((
                String::from_utf8(bytes[name..name + name_size - 1].to_vec()).unwrap(),
                mode,
                bytes[content..content + size].to_vec(),
            ));
            at = (content + size).next_multiple_of(4);
            if seen.last().unwrap().0 == "TRAILER!!!" {
                break;
            }
        }
        assert_eq!(at, bytes.len());
        assert_eq!(seen[0], ("d".into(), 0o40755, vec![]));
        assert_eq!(seen[1], ("d/f".into(), 0o100644, b"hello".to_vec()));
    }
}
