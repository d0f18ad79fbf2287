//! Which drivers a kernel has, and which of its modules a machine needs in which order.
//!
//! Made once, in a jailed process, from the modules themselves ([`Builder`]); used at each start ([`Index::load_order`]).

use super::modinfo::ModInfo;
use super::{Error, Needs};
use crate::layer;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A driver that machines need, and what for.
type Driver = (&'static str, &'static str);

/// How the guest finds its devices.
const TRANSPORT: &str = "virtio_mmio";
/// What every machine needs.
const ALWAYS: [Driver; 4] = [
    (TRANSPORT, "no device would be found"),
    ("virtio_blk", "there would be no root disk"),
    (
        "vmw_vsock_virtio_transport",
        "the guest could not talk to the host",
    ),
    ("overlay", "the root file system could not be written to"),
];
/// What is loaded when the kernel has it: entropy (many kernels have enough without) and the power button.
const IF_PRESENT: [&str; 3] = ["virtio_rng", "button", "evdev"];
/// The console, used when the kernel has it: loaded right after its transport, so that what follows shows on it.
const CONSOLE: &str = "virtio_console";
/// For persistent memory: the device, and the block device that it becomes.
const PMEM: [Driver; 2] = [
    ("virtio_pmem", "the persistent memory would not be found"),
    ("nd_pmem", "there would be no /dev/pmem0"),
];
/// For network interfaces.
const NET: Driver = ("virtio_net", "there would be no network");
/// For the root.
const ROOT_PURPOSE: &str = "the root file system could not be mounted";
/// Root file systems whose modules are indexed.
const FILE_SYSTEMS: [&str; 5] = ["erofs", "ext4", "squashfs", "xfs", "btrfs"];
/// Deepest chain of dependencies that is followed.
const MAX_DEPTH: usize = 32;

/// One module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its uncompressed file, relative to the kernel's `modules` directory.
    pub file: String,
    /// SHA-256 of that file, in hexadecimal; filled in outside the jail.
    pub digest: String,
    /// Modules that must be loaded before; built-in ones are left out.
    pub depends: Vec<String>,
    /// Modules that should be loaded before.
    pub soft_before: Vec<String>,
    /// Modules that should be loaded after.
    pub soft_after: Vec<String>,
}

/// The drivers of a kernel, as far as machines may need them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// Modules by name, with underscores.
    pub modules: BTreeMap<String, Module>,
    /// Names of the wanted drivers that are built in.
    pub builtin: BTreeSet<String>,
    /// Names of the drivers that were looked for.
    #[serde(default)]
    pub looked_for: BTreeSet<String>,
}

/// A module in load order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Its name.
    pub name: String,
    /// Its file, relative to `modules`.
    pub file: String,
    /// SHA-256 of the file.
    pub digest: String,
    /// Whether the guest can do without.
    pub optional: bool,
}

/// Names of all drivers that machines may need.
fn wanted() -> impl Iterator<Item = &'static str> {
    ALWAYS
        .iter()
        .chain([&NET])
        .chain(&PMEM)
        .map(|(name, _)| *name)
        .chain([CONSOLE])
        .chain(IF_PRESENT)
        .chain(FILE_SYSTEMS)
}

impl Index {
    /// False when it was made by a version of this program that did not know of all drivers.
    pub fn is_complete(&self) -> bool {
        wanted().all(|name| self.looked_for.contains(name))
    }

    /// Whether there is a driver for the virtio console, as a module or built in.
    pub fn has_console(&self) -> bool {
        self.modules.contains_key(CONSOLE) || self.builtin.contains(CONSOLE)
    }

    /// The modules that a machine needs, each after those that it depends on.
    pub fn load_order(&self, kernel: &str, needs: &Needs) -> Result<Vec<Load>, Error> {
        let mut wanted: Vec<Driver> = ALWAYS.to_vec();
        if needs.net {
            wanted.push(NET);
        }
        if needs.pmem {
            wanted.extend(PMEM);
        }
        if needs.layer {
            wanted.push((layer::FS_TYPE, "the disk of --root-size"));
        }
        let mut order = Order {
            index: self,
            done: BTreeMap::new(),
            loads: Vec::new(),
        };
        let fs_type = needs.fs_type.as_deref().unwrap_or("erofs");
        let drivers = wanted.into_iter().chain([(fs_type, ROOT_PURPOSE)]);
        for (driver, purpose) in drivers {
            if !order.add(driver, false, 0) {
                return Err(Error::NoDriver {
                    kernel: kernel.into(),
                    driver: driver.into(),
                    purpose,
                    hint: if self.is_complete() {
                        ""
                    } else {
                        " (it was registered by an earlier version, which did not look for all drivers: add it again)"
                    },
                });
            }
            if driver == TRANSPORT {
                order.add(CONSOLE, true, 0);
            }
        }
        for driver in IF_PRESENT {
            order.add(driver, true, 0);
        }
        Ok(order.loads)
    }
}

struct Order<'a> {
    index: &'a Index,
    /// Names seen, with whether they can be had.
    done: BTreeMap<String, bool>,
    loads: Vec<Load>,
}

impl Order<'_> {
    /// Adds a module after its dependencies. False when it or one of them is neither a module nor built in.
    fn add(&mut self, name: &str, optional: bool, depth: usize) -> bool {
        if let Some(there) = self.done.get(name) {
            if !optional {
                // Wanted by something that cannot do without it.
                self.loads
                    .iter_mut()
                    .filter(|load| load.name == name)
                    .for_each(|load| load.optional = false);
            }
            return *there;
        }
        let Some(module) = self.index.modules.get(name) else {
            let builtin = self.index.builtin.contains(name);
            self.done.insert(name.into(), builtin);
            return builtin;
        };
        // Set first: a circle of dependencies ends here, and the kernel says what it thinks of it.
        self.done.insert(name.into(), true);
        if depth >= MAX_DEPTH {
            return false;
        }
        for soft in &module.soft_before {
            self.add(soft, true, depth + 1);
        }
        let complete = module
            .depends
            .iter()
            .all(|hard| self.add(hard, optional, depth + 1));
        self.done.insert(name.into(), complete);
        if complete {
            self.loads.push(Load {
                name: name.into(),
                file: module.file.clone(),
                digest: module.digest.clone(),
                optional,
            });
        }
        for soft in &module.soft_after {
            self.add(soft, true, depth + 1);
        }
        complete
    }
}

/// A module's name from its file's: `kernel/crypto/crc32c-intel.ko.xz` is `crc32c_intel`.
pub fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (name, suffix) = file.split_once(".ko")?;
    matches!(suffix, "" | ".xz" | ".gz" | ".zst").then(|| normal(name))
}

/// Modules are named with underscores, their files and dependants often with dashes.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Where a [`Builder`] gets modules from.
pub trait Source {
    /// Reads a module's description, stores it uncompressed, and returns the stored file's path too.
    fn store(&mut self, path: &str) -> Result<(ModInfo, String), String>;
    /// Reads a module's description alone.
    fn describe(&mut self, path: &str) -> Result<ModInfo, String>;
}

/// Makes an [`Index`] from a list of module files and the kernel's lists of what is built in.
pub struct Builder<'a, S> {
    source: &'a mut S,
    /// Files by module name.
    files: BTreeMap<String, String>,
    /// Built-in names.
    builtin: BTreeSet<String>,
    /// Built-in aliases.
    builtin_aliases: BTreeSet<String>,
    /// Aliases without patterns of all modules; read when first needed, as that takes every file.
    aliases: Option<BTreeMap<String, Vec<String>>>,
    index: Index,
}

impl<'a, S: Source> Builder<'a, S> {
    /// A builder for these files; `builtin` is `modules.builtin`, `builtin_info` is `modules.builtin.modinfo`.
    pub fn new(source: &'a mut S, files: &[String], builtin: &str, builtin_info: &[u8]) -> Self {
        let files = files
            .iter()
            .filter_map(|file| Some((module_name(file)?, file.clone())))
            .collect();
        let aliases = builtin_info.split(|byte| *byte == 0).filter_map(|line| {
            // `crc32c_generic.alias=crc32c`
            let (key, value) = std::str::from_utf8(line).ok()?.split_once('=')?;
            key.ends_with(".alias").then(|| value.to_owned())
        });
        Self {
            source,
            files,
            builtin: builtin.lines().filter_map(module_name).collect(),
            builtin_aliases: aliases.collect(),
            aliases: None,
            index: Index::default(),
        }
    }

    /// Follows everything that a machine may ever need.
    pub fn build(mut self) -> Result<Index, String> {
        for name in wanted() {
            self.module(name, 0)?;
            self.index.looked_for.insert(name.into());
        }
        Ok(self.index)
    }

    fn module(&mut self, name: &str, depth: usize) -> Result<(), String> {
        if self.index.modules.contains_key(name) || depth > MAX_DEPTH {
            return Ok(());
        }
        let Some(path) = self.files.get(name).cloned() else {
            if self.builtin.contains(name) {
                self.index.builtin.insert(name.into());
            }
            return Ok(());
        };
        let (info, file) = self
            .source
            .store(&path)
            .map_err(|error| format!("module {path}: {error}"))?;
        let depends: Vec<String> = info.depends.iter().map(|name| normal(name)).collect();
        let module = Module {
            file,
            digest: String::new(),
            depends: depends.clone(),
            soft_before: Vec::new(),
            soft_after: Vec::new(),
        };
        // Before its dependencies: a circle of them must end.
        self.index.modules.insert(name.into(), module);
        for name in &depends {
            self.module(name, depth + 1)?;
        }
        let soft_before = self.soft(&info.soft_before, depth)?;
        let soft_after = self.soft(&info.soft_after, depth)?;
        if let Some(module) = self.index.modules.get_mut(name) {
            (module.soft_before, module.soft_after) = (soft_before, soft_after);
        }
        Ok(())
    }

    /// Resolves names or aliases to modules; one that is built in needs nothing.
    fn soft(&mut self, names: &[String], depth: usize) -> Result<Vec<String>, String> {
        let mut modules = Vec::new();
        for name in names {
            let normal = normal(name);
            if self.builtin.contains(&normal) || self.builtin_aliases.contains(name) {
                continue;
            }
            let found = if self.files.contains_key(&normal) {
                vec![normal]
            } else {
                self.by_alias(name)?
            };
            for name in found {
                self.module(&name, depth + 1)?;
                modules.push(name);
            }
        }
        Ok(modules)
    }

    fn by_alias(&mut self, alias: &str) -> Result<Vec<String>, String> {
        if self.aliases.is_none() {
            let mut aliases: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for (name, path) in &self.files {
                let info = self
                    .source
                    .describe(path)
                    .map_err(|error| format!("module {path}: {error}"))?;
                for alias in info
                    .aliases
                    .into_iter()
                    .filter(|alias| !alias.contains(['*', '?', '[']))
                {
                    aliases.entry(alias).or_default().push(name.clone());
                }
            }
            self.aliases = Some(aliases);
        }
        Ok(self
            .aliases
            .as_ref()
            .and_then(|aliases| aliases.get(alias))
            .cloned()
            .unwrap_or_default())
    }
}

#[cfg(test)]
mod tests;
