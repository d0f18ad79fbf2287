//! Streams of the compressions that packages and modules come in. Used in jailed processes alone.

use std::io::{self, Read};

/// Most memory that a decompressor may take for its dictionary, in bytes. `xz -9` needs 64 MiB.
const MAX_WINDOW: u64 = 128 << 20;

/// What `input`, named `name`, holds when unpacked; told by the name's ending, as it is for dpkg and kmod.
pub fn reader<'a>(name: &str, input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let ending = name.rsplit('.').next().unwrap_or_default();
    Ok(match ending {
        "xz" => Box::new(lzma_rust2::XzReader::new_mem_limit(
            input,
            true,
            (MAX_WINDOW >> 10) as u32,
        )),
        "gz" => Box::new(flate2::read::MultiGzDecoder::new(input)),
        "zst" => Box::new(
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(input, MAX_WINDOW)
                .map_err(io::Error::other)?,
        ),
        _ => Box::new(input),
    })
}

/// Copies at most `limit` bytes; more is an error. (`io::copy` would pick system calls that a jail refuses.)
pub fn copy(from: &mut dyn Read, to: &mut dyn io::Write, limit: u64) -> io::Result<u64> {
    let mut buffer = vec![0; 128 << 10];
    let mut total: u64 = 0;
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        total = total.saturating_add(length as u64);
        if total > limit {
            return Err(io::Error::other(format!(
                "more than {limit} bytes when unpacked"
            )));
        }
        to.write_all(buffer.get(..length).unwrap_or_default())?;
    }
}
