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
fn the_console_comes_first_and_persistent_memory_when_asked_for() {
    let mut source = distribution();
    source
        .0
        .push(("kernel/virtio_console.ko", info(&["virtio"], &[], &[])));
    for (file, depends) in [
        ("kernel/virtio_pmem.ko", &["libnvdimm", "nd_virtio"][..]),
        ("kernel/nd_virtio.ko", &["libnvdimm"]),
        ("kernel/nd_pmem.ko", &["libnvdimm"]),
        ("kernel/libnvdimm.ko", &[]),
    ] {
        source.0.push((file, info(depends, &[], &[])));
    }
    let index = build(source, BUILTIN, b"");
    assert!(index.has_console());
    assert!(!build(distribution(), BUILTIN, b"").has_console());
    let order = names(&index, &Needs::default());
    assert_eq!(order[..3], ["virtio", "virtio_console", "virtio_ring"]);
    assert!(!order.contains(&"nd_pmem".to_owned()));
    let needs = Needs {
        pmem: true,
        ..Needs::default()
    };
    let order = names(&index, &needs);
    let pmem: Vec<&str> = order.iter().map(String::as_str).collect();
    let pmem: Vec<&str> = pmem
        .into_iter()
        .filter(|name| name.contains("nd_") || name.contains("pmem"))
        .collect();
    assert_eq!(pmem, ["nd_virtio", "virtio_pmem", "nd_pmem"]);
}

#[test]
fn an_index_of_an_earlier_version_is_incomplete() {
    let mut index = build(distribution(), BUILTIN, b"");
    assert!(index.is_complete());
    index.looked_for.remove("virtio_pmem");
    assert!(!index.is_complete());
    let old: Index = serde_json::from_str(r#"{"modules":{},"builtin":[]}"#).unwrap();
    assert!(!old.is_complete());
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
