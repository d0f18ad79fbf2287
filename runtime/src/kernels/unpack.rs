//! The jobs of the jailed processes (see [`super::jail`]). Everything that is read here may be hostile.

use super::deb;
use super::decompress::{copy, reader};
use super::index::{Builder, Index, Source};
use super::modinfo::{self, ModInfo};
use casemate_kernel_image::{BzImage, Elf, ImageKind, ReadAt, Relocations, identify};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// Greatest size of an unpacked kernel, in bytes.
const MAX_KERNEL: u64 = 512 << 20;
/// Greatest size of an unpacked module, in bytes.
const MAX_MODULE: u64 = 64 << 20;
/// Greatest size of a list (of modules, of built-in ones), in bytes.
const MAX_LIST: u64 = 16 << 20;

/// Standard input and output as files.
pub struct Streams {
    input: File,
    input_size: u64,
    output: File,
}

impl Streams {
    /// Takes them.
    pub fn take() -> io::Result<Self> {
        let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Self {
            input_size: input.metadata()?.len(),
            input,
            output,
        })
    }
}

/// A file whose size is known, so that nobody has to ask for it: a sealed unpacker may not.
struct Sized {
    file: File,
    size: u64,
}

impl ReadAt for Sized {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buffer, offset)
    }
}

/// [`super::jail::Job::Package`].
pub fn package(streams: Streams) -> Result<deb::Contents, String> {
    deb::unpack(streams.input)
}

/// What an image turned out to be.
#[derive(Debug, Serialize, Deserialize)]
pub struct Image {
    /// `uname -r` as the boot header has it; empty when there is none.
    pub release: String,
    /// Whether relocations come with it, which the VMM needs for address randomisation.
    pub relocatable: bool,
}

/// [`super::jail::Job::Image`]: a bzImage's payload or a plain ELF file, checked, to standard output.
pub fn image(streams: Streams) -> Result<Image, String> {
    let source = Sized {
        file: streams.input,
        size: streams.input_size,
    };
    let mut output = BufWriter::with_capacity(1 << 20, &streams.output);
    let failed = |error: casemate_kernel_image::Error| error.to_string();
    let (release, size) = match identify(&source).map_err(failed)? {
        ImageKind::BzImage => {
            let image = BzImage::parse(&source).map_err(failed)?;
            let size = image
                .unpack(&source, MAX_KERNEL, &mut output)
                .map_err(failed)?;
            (
                image
                    .release()
                    .and_then(|text| text.split(' ').next())
                    .unwrap_or_default()
                    .to_owned(),
                size,
            )
        }
        ImageKind::Elf => {
            // Before it is copied, so that a bad file costs little.
            Elf::parse(&source).map_err(failed)?;
            let size = copy(&mut &source.file, &mut output, MAX_KERNEL)
                .map_err(|error| error.to_string())?;
            (String::new(), size)
        }
    };
    output
        .flush()
        .map_err(|error| format!("write the kernel: {error}"))?;
    drop(output);
    let unpacked = Sized {
        file: streams.output,
        size,
    };
    let elf = Elf::parse(&unpacked).map_err(failed)?;
    let relocations = Relocations::read(&unpacked, &elf).map_err(failed)?;
    Ok(Image {
        release,
        relocatable: relocations.is_some(),
    })
}

/// [`super::jail::Job::Index`]: standard input lists module files, one a line, relative to `modules/`.
pub fn index(streams: Streams) -> Result<Index, String> {
    let mut list = String::new();
    streams
        .input
        .take(MAX_LIST)
        .read_to_string(&mut list)
        .map_err(|error| format!("list of modules: {error}"))?;
    let files: Vec<String> = list.lines().map(Into::into).collect();
    let builtin = String::from_utf8_lossy(&optional("modules.builtin")?).into_owned();
    let builtin_info = optional("modules.builtin.modinfo")?;
    Builder::new(&mut Modules, &files, &builtin, &builtin_info).build()
}

/// The content of a list that may be absent.
fn optional(name: &str) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    match File::open(format!("modules/{name}")) {
        Ok(file) => file
            .take(MAX_LIST)
            .read_to_end(&mut content)
            .map_err(|error| format!("{name}: {error}"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(format!("{name}: {error}")),
    };
    Ok(content)
}

/// Modules below `modules/` in the working directory.
struct Modules;

impl Modules {
    /// An unpacked module with its description, and the path without the compression's ending.
    fn unpack(path: &str) -> Result<(Vec<u8>, ModInfo, &str), String> {
        let plain = path
            .find(".ko")
            .and_then(|at| path.get(..at.checked_add(3)?))
            .ok_or("not a module's name")?;
        let file = File::open(format!("modules/{path}")).map_err(|error| error.to_string())?;
        let mut content = Vec::new();
        let mut input = reader(path, file).map_err(|error| error.to_string())?;
        copy(&mut input, &mut content, MAX_MODULE).map_err(|error| error.to_string())?;
        let info = modinfo::read(content.as_slice())?;
        Ok((content, info, plain))
    }
}

impl Source for Modules {
    fn store(&mut self, path: &str) -> Result<(ModInfo, String), String> {
        let (content, info, plain) = Self::unpack(path)?;
        if plain != path {
            let target = OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(format!("modules/{plain}"));
            target
                .and_then(|mut file| file.write_all(&content))
                .map_err(|error| format!("store it unpacked: {error}"))?;
        }
        Ok((info, plain.into()))
    }

    fn describe(&mut self, path: &str) -> Result<ModInfo, String> {
        if !path.ends_with(".ko") {
            return Self::unpack(path).map(|(_, info, _)| info);
        }
        // A few small reads in place of the whole file: this is done for thousands.
        let file = File::open(format!("modules/{path}")).map_err(|error| error.to_string())?;
        modinfo::read(&file)
    }
}
