//! `fs`: says hello to the file server of a shared directory (FUSE, linux/fuse.h), looks for `hello` in it
//! and says how large it is; finds that `nothing` is not there. Then it asks as no kernel would, for ways out.

use super::Failure;
use crate::cmdline::Cmdline;
use crate::serial;
use crate::virtio::{Buffer, Device, Queue};

const FS: u32 = 26;
/// The first queue is for what cannot wait.
const REQUESTS: u32 = 1;

const LOOKUP: u32 = 1;
const INIT: u32 = 26;
const ROOT: u64 = 1;
const ENOENT: i32 = -2;

/// Sends one request about `node`, with `body` behind its header; the error, and what came behind the answer's header.
fn call(
    queue: &mut Queue,
    opcode: u32,
    node: u64,
    body: &[u8],
) -> Result<(i32, [u8; 128]), Failure> {
    let mut header = [0u8; 40];
    let len = header.len() + body.len();
    header[..4].copy_from_slice(&(len as u32).to_le_bytes());
    header[4..8].copy_from_slice(&opcode.to_le_bytes());
    header[8..16].copy_from_slice(&7u64.to_le_bytes());
    header[16..24].copy_from_slice(&node.to_le_bytes());
    let (mut answer, mut rest) = ([0u8; 16], [0u8; 128]);
    queue.call(&[
        Buffer::out(&header),
        Buffer::out(body),
        Buffer::into(&mut answer),
        Buffer::into(&mut rest),
    ])?;
    // SAFETY: the device wrote both behind the compiler's back.
    let (answer, rest) = unsafe {
        (
            (&raw const answer).read_volatile(),
            (&raw const rest).read_volatile(),
        )
    };
    if answer[8..] != 7u64.to_le_bytes() {
        return Err("an answer to another request");
    }
    let [_, _, _, _, e0, e1, e2, e3, ..] = answer;
    Ok((i32::from_le_bytes([e0, e1, e2, e3]), rest))
}

pub fn run(cmdline: &Cmdline) -> Result<(), Failure> {
    let device = Device::find(cmdline, FS, 0, 0)?;
    let _urgent = device.queue(0, 0)?;
    let mut queue = device.queue(REQUESTS, 1)?;
    device.finish()?;
    let mut tag = [0u8; 36];
    for (offset, byte) in (0..).zip(&mut tag) {
        *byte = device.config8(offset);
    }
    let text = tag.split(|&byte| byte == 0).next().unwrap_or_default();
    let text = core::str::from_utf8(text).unwrap_or("?");
    // Version 7.31, with nothing that is optional.
    let mut init = [0u8; 16];
    init[..4].copy_from_slice(&7u32.to_le_bytes());
    init[4..8].copy_from_slice(&31u32.to_le_bytes());
    let (error, version) = call(&mut queue, INIT, 0, &init)?;
    if error != 0 || version[..4] != 7u32.to_le_bytes() {
        return Err("the file server does not greet");
    }
    let (error, entry) = call(&mut queue, LOOKUP, ROOT, b"hello\0")?;
    if error != 0 {
        return Err("there is no hello");
    }
    let [s0, s1, s2, s3, ..] = *entry
        .get(48..)
        .and_then(<[u8]>::first_chunk::<8>)
        .ok_or("size")?;
    serial::line(format_args!(
        "probe: fs {text} hello {}",
        u32::from_le_bytes([s0, s1, s2, s3])
    ));
    if call(&mut queue, LOOKUP, ROOT, b"nothing\0")?.0 != ENOENT {
        return Err("there is something called nothing");
    }
    stay(&mut queue)
}

/// That what is outside the directory, a file beside it, is not found: by its path, nor in what `..` and the link `up` lead to.
fn stay(queue: &mut Queue) -> Result<(), Failure> {
    for path in [&b"../outside\0"[..], b"up/outside\0", b"/outside\0"] {
        if call(queue, LOOKUP, ROOT, path)?.0 == 0 {
            return Err("the file server follows a path");
        }
    }
    for parent in [&b"..\0"[..], b"up\0"] {
        let (error, entry) = call(queue, LOOKUP, ROOT, parent)?;
        let node = u64::from_le_bytes(*entry.first_chunk().ok_or("node")?);
        if error == 0 && call(queue, LOOKUP, node, b"outside\0")?.0 == 0 {
            return Err("the file server leaves its directory");
        }
    }
    Ok(())
}
