//! `casemate kernel` as a person drives it: with made-up packages, honest and hostile, and with Debian's own where the
//! tasks have downloaded them. Registering a kernel needs root, and so does this.

use flate2::write::GzEncoder;
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const RELEASE: &str = "9.9.9-test";
/// Every driver that machines need, but for those in [`BUILTIN`].
const MODULES: [(&str, &str); 7] = [
    ("kernel/drivers/virtio/virtio.ko", "depends="),
    ("kernel/drivers/virtio/virtio_mmio.ko", "depends=virtio"),
    ("kernel/drivers/block/virtio_blk.ko", "depends=virtio"),
    (
        "kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko",
        "depends=vsock,virtio",
    ),
    ("kernel/net/vmw_vsock/vsock.ko", "depends="),
    ("kernel/lib/libcrc32c.ko", "depends=\nsoftdep=pre: crc32c"),
    ("kernel/fs/erofs/erofs.ko", "depends=libcrc32c"),
];
const BUILTIN: &str = "kernel/fs/overlayfs/overlay.ko\n";

/// A data directory of its own, and the program.
struct Place(tempfile::TempDir);

struct Done {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "run this as root: registering a kernel changes identities"
        );
        Self(tempfile::tempdir().unwrap())
    }

    fn kernel(&self, arguments: &[&str]) -> Done {
        let output = Command::new(env!("CARGO_BIN_EXE_casemate"))
            .arg("kernel")
            .args(arguments)
            .env("CASEMATE_DATA_DIR", self.0.path().join("data"))
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Done {
            code: output.status.code().unwrap(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// Adds and expects success.
    fn add(&self, arguments: &[&str]) -> String {
        let done = self.kernel(&[&["add"], arguments].concat());
        assert_eq!(done.code, 0, "{}", done.stderr);
        done.stdout
    }

    /// Adds and expects one line that has `word`, and nothing left behind.
    fn refused(&self, arguments: &[&str], word: &str) {
        let done = self.kernel(&[&["add"], arguments].concat());
        assert_ne!(done.code, 0, "{arguments:?} was taken");
        let lines: Vec<&str> = done
            .stderr
            .lines()
            .filter(|line| !line.starts_with("casemate: unpacking "))
            .collect();
        assert_eq!(lines.len(), 1, "one line, not {:?}", done.stderr);
        assert!(
            lines[0].starts_with("casemate: ") && lines[0].contains(word),
            "{word:?} is not in {:?}",
            lines[0]
        );
        let kernels = self.0.path().join("data/kernels");
        let left: Vec<_> = fs::read_dir(kernels)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert!(
            left.iter().all(|name| name == ".lock"),
            "left behind: {left:?}"
        );
    }

    fn write(&self, name: &str, content: &[u8]) -> String {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn list(&self) -> Vec<Value> {
        let done = self.kernel(&["ls", "--json"]);
        assert_eq!(done.code, 0, "{}", done.stderr);
        serde_json::from_str(&done.stdout).unwrap()
    }

    fn stored(&self, path: &str) -> PathBuf {
        self.0.path().join("data/kernels").join(path)
    }
}

/// A package's `data.tar`, with paths as they are given: the library refuses hostile ones.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, path: &str, kind: tar::EntryType, link: &str, content: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o6777);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(path, tar::EntryType::Regular, "", content)
    }

    fn modules(mut self, suffix: &str) -> Self {
        for (path, lines) in MODULES {
            let mut content = module(lines);
            if suffix == ".gz" {
                content = gzip(&content);
            }
            self = self.file(&format!("./lib/modules/{RELEASE}/{path}{suffix}"), &content);
        }
        self.file(
            &format!("./lib/modules/{RELEASE}/modules.builtin"),
            BUILTIN.as_bytes(),
        )
    }

    fn kernel(self) -> Self {
        self.file(&format!("./boot/vmlinuz-{RELEASE}"), &elf())
    }

    fn package(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        package("data.tar.gz", &gzip(&self.0))
    }
}

fn package(data_name: &str, data: &[u8]) -> Vec<u8> {
    let mut archive = ar::Builder::new(Vec::new());
    for (name, content) in [
        ("debian-binary", &b"2.0\n"[..]),
        ("control.tar.gz", b"x"),
        (data_name, data),
    ] {
        archive
            .append(&ar::Header::new(name.into(), content.len() as u64), content)
            .unwrap();
    }
    archive.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The smallest kernel: an ELF file for x86-64 with one segment.
fn elf() -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64 + 56 + 16, 0);
    file[16..24].copy_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    file[24..28].copy_from_slice(&0x0100_0000_u32.to_le_bytes());
    file[32] = 64;
    file[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    file[64] = 1;
    file[72] = 120;
    for physical_or_virtual in [80, 88] {
        file[physical_or_virtual..physical_or_virtual + 4]
            .copy_from_slice(&0x0100_0000_u32.to_le_bytes());
    }
    for size in [96, 104] {
        file[size] = 16;
    }
    file
}

/// A kernel module with this `.modinfo`.
fn module(lines: &str) -> Vec<u8> {
    let modinfo = format!("{lines}\n").replace('\n', "\0").into_bytes();
    let names = b"\0.modinfo\0.shstrtab\0";
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    let (modinfo_at, names_at) = (file.len(), file.len() + modinfo.len());
    file.extend(&modinfo);
    file.extend(names);
    let table_at = file.len();
    for (name, offset, length) in [
        (0u8, 0, 0),
        (1, modinfo_at, modinfo.len()),
        (10, names_at, names.len()),
    ] {
        let mut header = [0; 64];
        header[0] = name;
        header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
        file.extend(header);
    }
    file[16] = 1;
    file[40..48].copy_from_slice(&(table_at as u64).to_le_bytes());
    file[58..64].copy_from_slice(&[64, 0, 3, 0, 2, 0]);
    file
}

#[test]
fn a_release_that_steers_a_terminal_is_refused_whatever_the_name() {
    let place = Place::new();
    let hostile = "./boot/vmlinuz-6.1\x1b[2Jx";
    let package = place.write("p.deb", &Tar::default().file(hostile, &elf()).package());
    place.refused(&["--deb", &package, "--name", "harmless"], "release");
    place.refused(&["--deb", &package], "release");
}

#[test]
fn a_kernel_that_lacks_a_driver_is_taken_and_the_driver_named() {
    let place = Place::new();
    let builtin = format!("./lib/modules/{RELEASE}/modules.builtin");
    let tar = Tar::default()
        .kernel()
        .file(&builtin, b"kernel/fs/erofs/erofs.ko\n");
    let package = place.write("p.deb", &tar.package());
    let done = place.kernel(&["add", "--deb", &package]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.stderr.contains("warning: ") && done.stderr.contains("no driver "),
        "{}",
        done.stderr
    );
}

#[test]
fn an_unpacker_whose_caller_is_gone_does_nothing() {
    let place = Place::new();
    let output = Command::new(env!("CARGO_BIN_EXE_casemate"))
        .args(["kernel", "jailed", "image", "--parent", "999999999"])
        .current_dir(place.0.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("has ended"),
        "{said}"
    );
}

#[test]
fn needs_root_to_change_identity() {
    let place = Place::new();
    // Where another user can reach them.
    fs::set_permissions(place.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = place.0.path().join("casemate");
    fs::copy(env!("CARGO_BIN_EXE_casemate"), &program).unwrap();
    let file = place.write("vmlinux", &elf());
    let output = Command::new(program)
        .args(["kernel", "add", &file])
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("needs root"),
        "{output:?}"
    );
}

#[test]
fn life_of_a_kernel() {
    for suffix in ["", ".gz"] {
        let place = Place::new();
        let package = place.write("p.deb", &Tar::default().modules(suffix).kernel().package());
        assert_eq!(
            place.add(&["--deb", &package]),
            format!("kernel {RELEASE} registered\n")
        );

        let listed = place.list();
        assert_eq!(listed.len(), 1);
        assert_eq!(
            (&listed[0]["name"], &listed[0]["default"]),
            (&RELEASE.into(), &true.into())
        );
        assert_eq!(
            fs::read(place.stored(&format!("{RELEASE}/vmlinux"))).unwrap(),
            elf()
        );
        let meta: Value = serde_json::from_slice(
            &fs::read(place.stored(&format!("{RELEASE}/meta.json"))).unwrap(),
        )
        .unwrap();
        assert_eq!(meta["index"]["builtin"], serde_json::json!(["overlay"]));
        let erofs = &meta["index"]["modules"]["erofs"];
        assert_eq!(erofs["depends"], serde_json::json!(["libcrc32c"]));
        // What the jailed process wrote is root's now, with plain modes.
        let file = place.stored(&format!(
            "{RELEASE}/modules/{}",
            erofs["file"].as_str().unwrap()
        ));
        let data = fs::metadata(&file).unwrap();
        assert_eq!(
            (data.uid(), data.gid(), data.mode() & 0o7777),
            (0, 0, 0o644)
        );
        assert_eq!(fs::read(&file).unwrap(), module(MODULES[6].1));

        // Again is no error; the same name for something else is.
        assert!(place.add(&["--deb", &package]).contains("already"));
        assert!(
            place
                .add(&["--deb", &package, "--name", RELEASE])
                .contains("already")
        );
        let other = place.write("vmlinux", &elf());
        let taken = place.kernel(&["add", &other, "--name", RELEASE]);
        assert!(
            taken.code != 0 && taken.stderr.contains("kernel rm"),
            "{}",
            taken.stderr
        );

        // A plain file beside it, chosen as the default, removed.
        assert_eq!(
            place.add(&[&other, "--name", "plain"]),
            "kernel plain registered\n"
        );
        assert_eq!(place.kernel(&["default"]).stdout.trim(), RELEASE);
        assert_eq!(place.kernel(&["default", "plain"]).code, 0);
        assert_eq!(place.kernel(&["default"]).stdout.trim(), "plain");
        assert_eq!(place.kernel(&["rm", "plain"]).code, 0);
        assert_eq!(place.kernel(&["default"]).stdout.trim(), RELEASE);
        assert_eq!(place.kernel(&["rm", RELEASE]).code, 0);
        assert!(place.list().is_empty());
        let none = place.kernel(&["default"]);
        assert!(
            none.code != 0 && none.stderr.contains("kernel add"),
            "{}",
            none.stderr
        );
    }
}

#[test]
fn a_kernel_of_an_earlier_version_is_registered_anew() {
    let place = Place::new();
    let deb = place.write("k.deb", &Tar::default().modules("").kernel().package());
    place.add(&["--name", "k", "--deb", &deb]);
    assert_eq!(place.list()[0]["outdated"], false);
    // As it was before anybody looked for consoles.
    let meta = place.stored("k/meta.json");
    let mut text: Value = serde_json::from_slice(&fs::read(&meta).unwrap()).unwrap();
    text["index"].as_object_mut().unwrap().remove("looked_for");
    fs::write(&meta, text.to_string()).unwrap();
    assert_eq!(place.list()[0]["outdated"], true);
    assert!(place.add(&["--deb", &deb]).contains("kernel k registered"));
    let list = place.list();
    assert_eq!((list.len(), &list[0]["outdated"]), (1, &Value::Bool(false)));
    assert_eq!(list[0]["default"], true);
    assert!(place.add(&["--deb", &deb]).contains("already"));
}

#[test]
fn modules_may_come_apart() {
    let place = Place::new();
    let kernel = place.write("image.deb", &Tar::default().kernel().package());
    let modules = place.write("modules.deb", &Tar::default().modules("").package());
    place.refused(&["--deb", &modules], "no kernel");
    place.add(&["--deb", &kernel, "--deb", &modules, "--name", "both"]);
    assert_eq!(place.list()[0]["modules"], 7);

    // From a directory.
    let directory = place.0.path().join("modules");
    for (path, lines) in MODULES {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, module(lines)).unwrap();
    }
    std::os::unix::fs::symlink("/etc", directory.join("build")).unwrap();
    fs::write(directory.join("modules.builtin"), BUILTIN).unwrap();
    let image = place.write("vmlinux", &elf());
    place.add(&[
        &image,
        "--modules",
        directory.to_str().unwrap(),
        "--name",
        "apart",
    ]);
    assert_eq!(place.list()[0]["modules"], 7);
    assert!(!place.stored("apart/modules/build").exists());
}

#[test]
fn hostile_packages_are_refused() {
    let place = Place::new();
    let refused = |content: &[u8], word: &str| {
        let path = place.write("hostile.deb", content);
        place.refused(&["--deb", &path], word);
    };
    let base = || Tar::default().modules("").kernel();
    for path in [
        "../../../../etc/casemate-escape",
        "/etc/casemate-escape",
        "./lib/modules/../../../x",
        "./boot/../../x",
    ] {
        refused(
            &base().file(path, b"x").package(),
            "leads out of the package",
        );
    }
    assert!(!Path::new("/etc/casemate-escape").exists());
    // A link in the kernel's place is never followed, nor made.
    for kind in [tar::EntryType::Symlink, tar::EntryType::Link] {
        let path = format!("./boot/vmlinuz-{RELEASE}");
        refused(
            &Tar::default()
                .modules("")
                .entry(&path, kind, "/etc/passwd", b"")
                .package(),
            "no kernel",
        );
    }
    // A directory that is a link first: only real directories are made, so the file lands below ours.
    let link = format!("./lib/modules/{RELEASE}/kernel");
    let tricked = Tar::default()
        .entry(&link, tar::EntryType::Symlink, "/etc", b"")
        .modules("")
        .kernel()
        .package();
    let path = place.write("tricked.deb", &tricked);
    let own = Place::new();
    own.add(&["--deb", &path]);
    assert!(!Path::new("/etc/fs").exists());

    refused(&base().kernel().package(), "vmlinuz");
    refused(
        &base().file("./boot/vmlinuz-8.8.8", &elf()).package(),
        "two kernels",
    );
    let path = format!("./lib/modules/{RELEASE}/kernel/drivers/net/virtio_net.ko");
    refused(
        &base().file(&path, b"not a module").package(),
        "virtio_net.ko",
    );
    refused(
        &Tar::default()
            .modules("")
            .file(&format!("./boot/vmlinuz-{RELEASE}"), b"not a kernel")
            .package(),
        "hostile.deb",
    );
    let whole = base().package();
    refused(&whole[..whole.len() / 2], "hostile.deb");
    refused(b"!<arch>\n", "no data.tar");
    refused(b"plain text\n", "not a Debian package");
    refused(b"", "Debian package");
    refused(
        &package("data.tar.lzma", b""),
        "compression is not supported",
    );
    refused(&package("data.tar.gz", b"\x1f\x8bgarbage"), "data.tar.gz");
    refused(&package("data.tar.xz", b"\xfd7zXZ\0garbage"), "data.tar.xz");
    refused(&package("data.tar.zst", b"garbage"), "data.tar.zst");
}

#[test]
fn bad_files_are_refused() {
    let place = Place::new();
    let refused = |content: &[u8], word: &str| {
        let path = place.write("image", content);
        place.refused(&[&path], word);
    };
    refused(b"", "image");
    refused(b"#!/bin/sh\n", "image");
    let whole = elf();
    refused(&whole[..whole.len() - 1], "image");
    refused(&whole[..40], "image");
    let mut huge = elf();
    huge[96..104].copy_from_slice(&(100u64 << 30).to_le_bytes());
    refused(&huge, "image");
    place.refused(&["/nowhere/vmlinuz"], "No such file");
    place.refused(&["/etc"], "not a regular file");
    place.refused(&["/dev/zero"], "not a regular file");
    let fifo = place.0.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    place.refused(&[fifo.to_str().unwrap()], "not a regular file");
    let good = place.write("good", &elf());
    for name in ["../x", "a/b", "", ".hidden", &"x".repeat(300)] {
        place.refused(&[&good, "--name", name], "kernel name");
    }
    place.refused(&[&good, "--modules", "/nowhere", "--name", "x"], "nowhere");
}

/// Debian's packages, where `cargo xtask` has downloaded them: the kernels that people will really use.
#[test]
#[ignore = "full: takes the packages that cargo xtask downloads, and ten seconds for each"]
fn real_packages() {
    let downloads = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kernels");
    let mut tried = 0;
    let packages = fs::read_dir(downloads)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    for package in packages.filter(|path| path.extension().is_some_and(|ending| ending == "deb")) {
        let place = Place::new();
        place.add(&["--deb", package.to_str().unwrap()]);
        let listed = place.list();
        let name = listed[0]["name"].as_str().unwrap();
        assert!(package.to_str().unwrap().contains(name), "{name}");
        let meta: Value =
            serde_json::from_slice(&fs::read(place.stored(&format!("{name}/meta.json"))).unwrap())
                .unwrap();
        let modules = meta["index"]["modules"].as_object().unwrap();
        for driver in [
            "virtio_mmio",
            "virtio_blk",
            "virtio_net",
            "vmw_vsock_virtio_transport",
            "virtio_rng",
            "overlay",
            "erofs",
            "libcrc32c",
        ] {
            assert!(modules.contains_key(driver), "{driver} of {name}");
        }
        tried += 1;
    }
    assert!(
        tried > 0,
        "no package in target/kernels: cargo xtask demo downloads one"
    );
}
