//! What a dynamically linked program needs to start: its loader and its libraries, found as the loader would
//! find them, by reading files alone. Nothing is executed for it.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use elf::ElfStream;
use elf::abi;
use elf::dynamic::DynamicTable;
use elf::endian::LittleEndian;
use elf::file::Class;
use elf::segment::ProgramHeader;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag, fstat};

use super::ld_cache;
use crate::error::{Context, Error, Result, refused};
use crate::grants::{file_type, open_strictly};

/// Where loaders look at last, whatever the distribution.
const DEFAULT_DIRECTORIES: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];
/// Most libraries of one program.
const MAX_LIBRARIES: usize = 512;
/// Longest dynamic section and path that are read.
const MAX_DYNAMIC: u64 = 1 << 20;
const MAX_PATH: usize = 4096;

/// A file, and where the loader looks for it.
#[derive(Debug)]
pub struct Placed {
    /// Absolute, without `.` and `..`.
    pub path: PathBuf,
    /// It, open for reading.
    pub file: File,
}

/// A program, with all that it is linked with.
#[derive(Debug)]
pub struct Program {
    /// Itself.
    pub executable: Placed,
    /// Its loader and libraries; none if it is static.
    pub libraries: Vec<Placed>,
    /// Where the loader must be told to look, as it has no cache in a jail.
    pub library_path: Vec<PathBuf>,
}

impl Program {
    /// Opens the program, its loader and its libraries.
    ///
    /// # Errors
    /// If it is no program of this machine, is setuid or setgid, or a library is not found.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::from(open_strictly(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?);
        let object = path.display().to_string();
        let stat = fstat(&file).doing("look at", &object)?;
        if file_type(&stat) != SFlag::S_IFREG {
            return refused(object, "not a regular file");
        }
        if Mode::from_bits_truncate(stat.st_mode).intersects(Mode::S_ISUID | Mode::S_ISGID) {
            return refused(
                object,
                "setuid or setgid, which means nothing in a jail: use a copy that is not",
            );
        }
        let object = Object::read(&file, path)?;
        let mut search = Search {
            cache: std::fs::read(ld_cache::PATH).unwrap_or_default(),
            wanted: Vec::new(),
            seen: HashSet::new(),
            libraries: Vec::new(),
            library_path: Vec::new(),
        };
        if let Some(loader) = &object.loader {
            let Some((file, _)) = open_library(loader)? else {
                return refused(
                    loader.display().to_string(),
                    format!("the loader of {}, is not there", path.display()),
                );
            };
            // The C library names its loader as if it were a library.
            search.seen.extend(name_of(loader));
            search.libraries.push(Placed {
                path: plain(loader),
                file,
            });
            search.all_of(path, object)?;
        }
        Ok(Self {
            executable: Placed {
                path: path.to_owned(),
                file,
            },
            libraries: search.libraries,
            library_path: search.library_path,
        })
    }
}

/// The search for libraries.
struct Search {
    cache: Vec<u8>,
    /// Names still to be found, with who needs them and the directories that it names.
    wanted: Vec<(String, PathBuf, Vec<PathBuf>)>,
    seen: HashSet<String>,
    libraries: Vec<Placed>,
    library_path: Vec<PathBuf>,
}

impl Search {
    fn all_of(&mut self, program: &Path, object: Object) -> Result<()> {
        let own = object.directories.clone();
        self.want(program, object);
        while let Some((name, by, directories)) = self.wanted.pop() {
            if self.libraries.len() >= MAX_LIBRARIES {
                return refused(program.display().to_string(), "it has too many libraries");
            }
            let (path, file, object) = self.find(&name, &by, &directories, &own)?;
            self.libraries.push(Placed {
                path: plain(&path),
                file,
            });
            self.want(&path, object);
        }
        Ok(())
    }

    fn want(&mut self, by: &Path, object: Object) {
        for name in object.needed {
            if self.seen.insert(name.clone()) {
                let directories = object.directories.clone();
                self.wanted.push((name, by.to_owned(), directories));
            }
        }
    }

    /// In the loader's order (ld.so(8)): directories that the object names, the program's own, the cache, the
    /// usual ones.
    fn find(
        &mut self,
        name: &str,
        by: &Path,
        directories: &[PathBuf],
        own: &[PathBuf],
    ) -> Result<(PathBuf, File, Object)> {
        let named = directories.iter().chain(own).map(|d| (d.join(name), false));
        let cached = ld_cache::lookup(&self.cache, name);
        let cached = cached.into_iter().map(|path| (path, true));
        let usual = DEFAULT_DIRECTORIES.iter().map(Path::new);
        let usual = usual.map(|directory| (directory.join(name), true));
        let candidates: Vec<_> = if name.contains('/') {
            vec![(PathBuf::from(name), false)]
        } else {
            named.chain(cached).chain(usual).collect()
        };
        for (path, tell) in candidates {
            if let Some((file, object)) = open_library(&path)? {
                if let Some(directory) = path.parent().filter(|_| tell)
                    && !self.library_path.iter().any(|known| known == directory)
                {
                    self.library_path.push(directory.to_owned());
                }
                return Ok((path, file, object));
            }
        }
        refused(
            name,
            format!("this library, which {} needs, is not found", by.display()),
        )
    }
}

/// Opens a library, whatever links lead to it: those of the directories that the loader trusts. None if there is none
/// for this machine.
fn open_library(path: &Path) -> Result<Option<(File, Object)>> {
    if !path.is_absolute() {
        return Ok(None);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let Ok(file) = nix::fcntl::open(path, flags, Mode::empty()) else {
        return Ok(None);
    };
    let file = File::from(file);
    let stat = fstat(&file).doing("look at", path.display().to_string())?;
    if file_type(&stat) != SFlag::S_IFREG {
        return Ok(None);
    }
    match Object::read(&file, path) {
        Ok(object) => Ok(Some((file, object))),
        // As the loader does: one for another machine is passed over.
        Err(Error::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What an ELF file says of what it needs.
#[derive(Debug)]
struct Object {
    loader: Option<PathBuf>,
    needed: Vec<String>,
    /// DT_RUNPATH, or else DT_RPATH.
    directories: Vec<PathBuf>,
}

impl Object {
    fn read(file: &File, path: &Path) -> Result<Self> {
        let object = path.display().to_string();
        let mut magic = [0; 4];
        let length = file.read_at(&mut magic, 0).doing("read", &object)?;
        match magic.get(..length) {
            Some([b'#', b'!', ..]) => {
                return refused(
                    object,
                    "a script: name the program that runs it, and bind what it needs",
                );
            }
            Some(b"\x7fELF") => {}
            _ => return refused(object, "not an ELF program"),
        }
        match Self::parse(file, path) {
            Ok(Some(parsed)) => Ok(parsed),
            Ok(None) => refused(object, "not an ELF program for 64-bit x86"),
            Err(error) => refused(object, format!("not a sound ELF program: {error}")),
        }
    }

    /// None if it is for another machine.
    fn parse(file: &File, path: &Path) -> std::result::Result<Option<Self>, elf::ParseError> {
        let mut elf = ElfStream::<LittleEndian, _>::open_stream(file)?;
        let kinds = [abi::ET_EXEC, abi::ET_DYN];
        if elf.ehdr.class != Class::ELF64
            || elf.ehdr.e_machine != abi::EM_X86_64
            || !kinds.contains(&elf.ehdr.e_type)
        {
            return Ok(None);
        }
        let segments = elf.segments().clone();
        let of = |kind| segments.iter().find(|segment| segment.p_type == kind);
        let loader = match of(abi::PT_INTERP) {
            Some(segment) if segment.p_filesz <= MAX_PATH as u64 => {
                Some(until_nul(elf.segment_data(segment)?).into())
            }
            _ => None,
        };
        let mut words = Vec::new();
        if let Some(segment) = of(abi::PT_DYNAMIC).filter(|s| s.p_filesz <= MAX_DYNAMIC) {
            let bytes = elf.segment_data(segment)?;
            let table = DynamicTable::new(LittleEndian, Class::ELF64, bytes);
            words = table
                .iter()
                .map(|word| (word.d_tag, word.d_val()))
                .collect();
            let end = words.iter().position(|(tag, _)| *tag == abi::DT_NULL);
            words.truncate(end.unwrap_or(words.len()));
        }
        let strings = words.iter().find(|(tag, _)| *tag == abi::DT_STRTAB);
        let strings = strings.and_then(|(_, address)| offset(&segments, *address));
        let texts = |tag| {
            let offsets = words.iter().filter(move |word| word.0 == tag);
            offsets.filter_map(|word| read_text(file, strings?.checked_add(word.1)?))
        };
        let needed = texts(abi::DT_NEEDED).collect();
        let lists: Vec<String> = match texts(abi::DT_RUNPATH).next() {
            Some(list) => vec![list],
            None => texts(abi::DT_RPATH).collect(),
        };
        let lists = lists.iter().flat_map(|list| list.split(':'));
        Ok(Some(Self {
            loader,
            needed,
            directories: lists.filter_map(|text| expand(text, path)).collect(),
        }))
    }
}

/// Where in the file an address of the loaded program is.
fn offset(segments: &[ProgramHeader], address: u64) -> Option<u64> {
    segments
        .iter()
        .filter(|segment| segment.p_type == abi::PT_LOAD)
        .find_map(|segment| {
            let into = address.checked_sub(segment.p_vaddr)?;
            (into < segment.p_filesz).then(|| segment.p_offset.checked_add(into))?
        })
}

fn read_text(file: &File, at: u64) -> Option<String> {
    let mut bytes = [0; MAX_PATH];
    let length = file.read_at(&mut bytes, at).ok()?;
    let bytes = bytes.get(..length)?;
    let end = bytes.iter().position(|byte| *byte == 0)?;
    String::from_utf8(bytes.get(..end)?.to_vec()).ok()
}

fn until_nul(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// A directory as an object at `path` names it; none with what only a loader knows, or if it is not absolute.
fn expand(text: &str, path: &Path) -> Option<PathBuf> {
    let origin = path.parent()?.to_str()?;
    let text = text.replace("${ORIGIN}", origin).replace("$ORIGIN", origin);
    (text.starts_with('/') && !text.contains('$')).then(|| text.into())
}

fn name_of(path: &Path) -> Option<String> {
    path.file_name()?.to_str().map(str::to_owned)
}

/// Without `.` and `..`. In the jail no component is a link, so that means the same there.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn refusal(path: &Path) -> String {
        Program::open(path).unwrap_err().to_string()
    }

    #[test]
    fn finds_what_a_program_of_this_host_is_linked_with() {
        let program = Program::open(Path::new("/usr/bin/env")).unwrap();
        let has = |name: &str| program.libraries.iter().any(|l| l.path.ends_with(name));
        assert!(
            has("libc.so.6") && has("ld-linux-x86-64.so.2"),
            "{program:?}"
        );
        assert_eq!(program.libraries.len(), 2, "{program:?}");
        for library in &program.libraries {
            assert!(library.path.is_absolute());
        }
        assert!(!program.library_path.is_empty());
    }

    #[test]
    fn refuses_what_cannot_run_there() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8], mode| {
            let path = directory.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let good = std::fs::read("/usr/bin/env").unwrap();
        let mut other = good.clone();
        other[18] = 183; // Arm
        for (path, word) in [
            (file("script", b"#!/bin/sh\n", 0o755), "a script"),
            (file("text", b"hello", 0o755), "not an ELF program"),
            (file("empty", b"", 0o755), "not an ELF program"),
            (file("arm", &other, 0o755), "64-bit x86"),
            (file("half", &good[..100], 0o755), "not a sound ELF"),
            (file("setuid", &good, 0o4755), "setuid"),
            (file("setgid", &good, 0o2755), "setgid"),
            (directory.path().to_owned(), "not a regular file"),
            (directory.path().join("none"), "ENOENT"),
        ] {
            let text = refusal(&path);
            assert!(text.contains(word), "{word}: {text}");
        }
    }

    #[test]
    fn a_library_that_is_missing_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut bytes = std::fs::read("/usr/bin/env").unwrap();
        let name = b"libc.so.6\0";
        let at = bytes.windows(name.len()).position(|w| w == name).unwrap();
        bytes[at..at + 4].copy_from_slice(b"libX");
        let path = directory.path().join("env");
        std::fs::write(&path, &bytes).unwrap();
        let text = refusal(&path);
        assert!(text.starts_with("libX.so.6: "), "{text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }

    /// Whatever is in the file, it is refused or resolved, at once.
    #[test]
    fn a_broken_program_breaks_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("env");
        let good = std::fs::read("/usr/bin/env").unwrap();
        for at in 4..64 + 56 * 13 {
            let mut bytes = good.clone();
            bytes[at] ^= 0xff;
            std::fs::write(&path, &bytes).unwrap();
            let _ = Program::open(&path);
        }
    }

    #[test]
    fn directories_of_an_object_are_understood() {
        let at = Path::new("/opt/x/bin/prog");
        let expanded = |text| expand(text, at);
        assert_eq!(expanded("$ORIGIN/../lib"), Some("/opt/x/bin/../lib".into()));
        assert_eq!(expanded("${ORIGIN}"), Some("/opt/x/bin".into()));
        for none in ["", "lib", "$LIB/x", "/usr/$PLATFORM"] {
            assert_eq!(expanded(none), None);
        }
        assert_eq!(
            plain(Path::new("/opt/x/bin/../lib/./a.so")),
            Path::new("/opt/x/lib/a.so")
        );
    }
}
