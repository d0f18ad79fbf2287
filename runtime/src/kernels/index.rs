//! Which drivers a kernel has, and which of its modules a machine needs in which order.
//!
//! Made once, in a jailed process, from the modules themselves ([`Builder`]); used at each start ([`Index::load_order`]).

use super::modinfo::ModInfo;
use super::{Error, Needs};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A driver that machines need, and what for.
type Driver = (&'static str, &'static str);

/// What every machine needs.
const ALWAYS: [Driver; 4] = [
    ("virtio_mmio", "no device would be found"),
    ("virtio_blk", "there would be no root disk"),
    (
        "vmw_vsock_virtio_transport",
        "the guest could not talk to the host",
    ),
    ("overlay", "the root file system could not be written to"),
];
/// What is loaded when the kernel has it: entropy (many kernels have enough without) and the power button.
const IF_PRESENT: [&str; 3] = ["virtio_rng", "button", "evdev"];
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

impl Index {
    /// The modules that a machine needs, each after those that it depends on.
    pub fn load_order(&self, kernel: &str, needs: &Needs) -> Result<Vec<Load>, Error> {
        let mut wanted: Vec<Driver> = ALWAYS.to_vec();
        if needs.net {
            wanted.push(NET);
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
                });
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
        let names = ALWAYS
            .iter()
            .chain([&NET])
            .map(|(name, _)| *name)
            .chain(IF_PRESENT)
            .chain(FILE_SYSTEMS);
        for name in names {
            self.module(name, 0)?;
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
mod tests {
    use super::*;

    /// Modules as a list of (file, description).
    struct Synthetic(Vec<(&'static str, ModInfo)>);

    impl Source for Synthetic {
        fn store(&mut self, path: &str) -> Result<(ModInfo, String), String> {
            Ok((self.describe(path)?, path.trim_end_matches(".xz").into()))
        }

        fn describe(&mut self, path: &str) -> Result<ModInfo, String> {
            let info = &self
                .0
                .iter()
                .find(|(file, _)| *file == path)
                .ok_or("absent")?
                .1;
            Ok(ModInfo {
                depends: info.depends.clone(),
                soft_before: info.soft_before.clone(),
                soft_after: info.soft_after.clone(),
                aliases: info.aliases.clone(),
            })
        }
    }

    fn info(depends: &[&str], soft: &[&str], aliases: &[&str]) -> ModInfo {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        ModInfo {
            depends: own(depends),
            soft_before: own(soft),
            soft_after: Vec::new(),
            aliases: own(aliases),
        }
    }

    const BUILTIN: &str = "kernel/drivers/virtio/virtio_mmio.ko\nkernel/fs/overlayfs/overlay.ko\n";

    fn distribution() -> Synthetic {
        Synthetic(vec![
            ("kernel/virtio.ko.xz", info(&[], &[], &[])),
            ("kernel/virtio_ring.ko", info(&[], &[], &[])),
            (
                "kernel/virtio_blk.ko.xz",
                info(&["virtio", "virtio_ring"], &[], &["virtio:d2v*"]),
            ),
            (
                "kernel/vmw_vsock_virtio_transport.ko",
                info(&["vsock", "virtio"], &[], &[]),
            ),
            ("kernel/vsock.ko", info(&[], &[], &[])),
            ("kernel/virtio-rng.ko", info(&["virtio"], &[], &[])),
            ("kernel/libcrc32c.ko", info(&[], &["crc32c"], &[])),
            ("kernel/crc32c-generic.ko", info(&[], &[], &["crc32c"])),
            ("kernel/erofs.ko", info(&["libcrc32c"], &[], &["fs-erofs"])),
            ("kernel/unrelated.ko", info(&["nothing"], &[], &[])),
        ])
    }

    fn build(mut source: Synthetic, builtin: &str, builtin_info: &[u8]) -> Index {
        let files: Vec<String> = source
            .0
            .iter()
            .map(|(file, _)| (*file).to_owned())
            .collect();
        Builder::new(&mut source, &files, builtin, builtin_info)
            .build()
            .unwrap()
    }

    fn names(index: &Index, needs: &Needs) -> Vec<String> {
        index
            .load_order("k", needs)
            .unwrap()
            .into_iter()
            .map(|load| load.name)
            .collect()
    }

    #[test]
    fn each_module_comes_after_its_dependencies() {
        let index = build(distribution(), BUILTIN, b"");
        assert!(!index.modules.contains_key("unrelated"));
        let order = names(&index, &Needs::default());
        let want = [
            "virtio",
            "virtio_ring",
            "virtio_blk",
            "vsock",
            "vmw_vsock_virtio_transport",
            "crc32c_generic",
            "libcrc32c",
            "erofs",
            "virtio_rng",
        ];
        assert_eq!(order, want);
        let loads = index.load_order("k", &Needs::default()).unwrap();
        let optional: Vec<&str> = loads
            .iter()
            .filter(|load| load.optional)
            .map(|load| load.name.as_str())
            .collect();
        assert_eq!(optional, ["crc32c_generic", "virtio_rng"]);
        assert_eq!(loads[0].file, "kernel/virtio.ko");
    }

    #[test]
    fn a_built_in_alias_satisfies_a_soft_dependency() {
        let index = build(
            distribution(),
            BUILTIN,
            b"crc32c_generic.alias=crc32c\0x.license=GPL\0",
        );
        assert!(!index.modules.contains_key("crc32c_generic"));
        assert!(names(&index, &Needs::default()).contains(&"libcrc32c".to_owned()));
    }

    #[test]
    fn a_missing_driver_is_named() {
        let index = build(distribution(), BUILTIN, b"");
        let lacks = |index: &Index, needs: &Needs| match index.load_order("k", needs) {
            Err(Error::NoDriver { driver, .. }) => driver,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            lacks(
                &index,
                &Needs {
                    net: true,
                    ..Needs::default()
                }
            ),
            "virtio_net"
        );
        assert_eq!(
            lacks(
                &index,
                &Needs {
                    fs_type: Some("ext4".into()),
                    ..Needs::default()
                }
            ),
            "ext4"
        );
        assert_eq!(
            lacks(&build(distribution(), "", b""), &Needs::default()),
            "virtio_mmio"
        );
        // A module whose dependency is missing is as good as missing.
        let mut broken = distribution();
        broken.0.retain(|(file, _)| !file.ends_with("/vsock.ko"));
        assert_eq!(
            lacks(&build(broken, BUILTIN, b""), &Needs::default()),
            "vmw_vsock_virtio_transport"
        );
    }

    #[test]
    fn everything_built_in_needs_no_modules() {
        let builtin = [
            "virtio_mmio",
            "virtio_blk",
            "virtio_net",
            "vmw_vsock_virtio_transport",
            "overlay",
            "erofs",
        ];
        let list: String = builtin
            .iter()
            .map(|name| format!("kernel/x/{name}.ko\n"))
            .collect();
        let index = build(Synthetic(Vec::new()), &list, b"");
        assert!(
            names(
                &index,
                &Needs {
                    net: true,
                    ..Needs::default()
                }
            )
            .is_empty()
        );
    }

    #[test]
    fn circles_end() {
        let mut source = distribution();
        source
            .0
            .push(("kernel/overlay.ko", info(&["loop-a"], &["loop-a"], &[])));
        source
            .0
            .push(("kernel/loop-a.ko", info(&["loop-b"], &[], &[])));
        source
            .0
            .push(("kernel/loop-b.ko", info(&["loop-a"], &["overlay"], &[])));
        let index = build(source, "kernel/drivers/virtio/virtio_mmio.ko", b"");
        assert!(names(&index, &Needs::default()).contains(&"loop_a".to_owned()));
    }

    #[test]
    fn names_of_files() {
        assert_eq!(
            module_name("kernel/a/virtio-rng.ko.xz").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(module_name("x.ko").as_deref(), Some("x"));
        assert_eq!(module_name("x.ko.exe"), None);
        assert_eq!(module_name("modules.dep"), None);
    }
}
