//! Loads the initrd's kernel modules.

use crate::{Error, FailureKind, say};
use std::ffi::c_int;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The directory of the initrd that has the modules and [`LIST`].
pub const DIRECTORY: &str = "/modules";
/// The list in [`DIRECTORY`]: a file name a line, in load order, followed by ` optional` for one that the guest can do without.
pub const LIST: &str = "list";
/// Marks an optional module in [`LIST`].
pub const OPTIONAL: &str = "optional";

/// Loads every listed module in order, frees its memory in the initrd, and returns the problems of optional ones.
///
/// No list means that the kernel has everything built in.
pub fn load_all() -> Result<Vec<String>, Error> {
    let directory = Path::new(DIRECTORY);
    let list = match fs::read_to_string(directory.join(LIST)) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(Error::new(
                FailureKind::Module,
                format!("cannot read {DIRECTORY}/{LIST}: {error}"),
            ));
        }
    };
    let mut problems = Vec::new();
    for line in list.lines() {
        let (name, optional) = match line.split_once(' ') {
            Some((name, mark)) => (name, mark == OPTIONAL),
            None => (line, false),
        };
        let path = directory.join(name);
        let result = File::open(&path).and_then(|file| finit_module(&file));
        let _ = fs::remove_file(&path);
        if let Err(error) = result {
            let problem = format!("module {name} does not load: {}", explain(&error));
            if !optional {
                return Err(Error::new(FailureKind::Module, problem));
            }
            say(&problem);
            problems.push(problem);
        }
    }
    Ok(problems)
}

fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "it needs a symbol that no loaded module has".into(),
        Some(libc::ENOEXEC) => "it was built for another kernel, or is damaged".into(),
        Some(libc::EKEYREJECTED) => "the kernel refuses its signature".into(),
        _ => error.to_string(),
    }
}

/// finit_module(2). A module that is there already is a success.
#[allow(unsafe_code)] // There is no safe wrapper among our dependencies' features.
fn finit_module(file: &File) -> io::Result<()> {
    let flags: c_int = 0;
    // SAFETY: the descriptor is open for the call, the parameter string is NUL-terminated and static, and the kernel
    // reads no other memory of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}
