//! cgroups: version 1, 2, or both at once (hybrid).
//!
//! For every controller that a setting names, its hierarchy is looked up among the host's mounts;
//! `<parent>/<id>` is made there, the settings are written, and this process moves in. Symbolic
//! links are followed: `/sys/fs/cgroup` is root's alone and made of them on hybrid hosts.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::arguments::{Arguments, CgroupSetting, CgroupVersion};
use crate::error::{Context, Error, Result, refused};

/// How often a parent may go while it is being descended into: whoever cleans up after another
/// machine removes the parent that they share as soon as it is empty.
const RETRIES: u32 = 100;

/// A hierarchy, as it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    version: CgroupVersion,
    /// Version 1: mount options, among them the controllers. Version 2: `cgroup.controllers`.
    controllers: Vec<String>,
}

/// What was made, to take it back if the jail fails.
#[derive(Debug, Default)]
pub struct Made {
    /// `cgroup.procs` of the cgroups that this process came from.
    origins: Vec<File>,
    /// Directories that were made: what holds them, and their names.
    directories: Vec<(OwnedFd, PathBuf)>,
}

impl Made {
    /// Leaves the cgroups and removes what was made, as far as that goes.
    pub fn undo(&mut self) {
        // The jail has failed already: that is the error to report.
        for origin in &mut self.origins {
            let _ = origin.write_all(b"0");
        }
        while let Some((parent, name)) = self.directories.pop() {
            let _ = unlinkat(&parent, &name, UnlinkatFlags::RemoveDir);
        }
    }
}

/// Makes and enters the cgroups that the arguments ask for.
///
/// `made` holds what was made even when this fails: undo it then.
///
/// # Errors
/// If a controller is not there, or a file cannot be written.
pub fn join(arguments: &Arguments, made: &mut Made) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").doing("read", "/proc/self/mounts")?;
    let mut hierarchies = parse_mounts(&mounts);
    hierarchies.retain(|h| {
        arguments
            .cgroup_version
            .is_none_or(|version| version == h.version)
    });
    for hierarchy in &mut hierarchies {
        if hierarchy.version == CgroupVersion::V2 {
            let file = hierarchy.mount.join("cgroup.controllers");
            let text = std::fs::read_to_string(&file).doing("read", file.display().to_string())?;
            hierarchy.controllers = text.split_whitespace().map(str::to_owned).collect();
        }
    }
    let default_parent = PathBuf::from(&arguments.exec_name);
    let parent = arguments.parent_cgroup.as_ref().unwrap_or(&default_parent);
    let origins =
        std::fs::read_to_string("/proc/self/cgroup").doing("read", "/proc/self/cgroup")?;

    if arguments.cgroups.is_empty() {
        // As in Firecracker: no settings, so no cgroup of its own; it joins the parent.
        let Some(unified) = hierarchies.iter().find(|h| h.version == CgroupVersion::V2) else {
            return refused(
                "--parent-cgroup",
                "without --cgroup it is a version 2 cgroup, which this host does not have",
            );
        };
        let directory = unified.mount.join(parent);
        make_directories(&unified.mount, parent, &[], made)?;
        return enter(unified, &directory, &origins, made);
    }

    for (hierarchy, settings) in by_hierarchy(&hierarchies, &arguments.cgroups)? {
        let path = parent.join(arguments.id.as_str());
        let directory = hierarchy.mount.join(&path);
        make_directories(
            &hierarchy.mount,
            &path,
            &controllers(hierarchy, &settings),
            made,
        )?;
        refuse_if_used(&directory)?;
        if hierarchy.version == CgroupVersion::V1
            && settings.iter().any(|s| s.controller == "cpuset")
        {
            inherit_cpuset(&hierarchy.mount, &path)?;
        }
        for setting in &settings {
            let file = directory.join(&setting.file);
            if !setting.optional || file.exists() {
                write(&file, &setting.value)?;
            }
        }
        enter(hierarchy, &directory, &origins, made)?;
    }
    Ok(())
}

/// Reads `/proc/self/mounts` (fstab(5)); of several mounts of one hierarchy the first.
fn parse_mounts(text: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(' ');
        let (Some(_), Some(mount), Some(kind), Some(options)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = match kind {
            "cgroup" => CgroupVersion::V1,
            "cgroup2" => CgroupVersion::V2,
            _ => continue,
        };
        let controllers: Vec<String> = match version {
            CgroupVersion::V1 => options.split(',').map(str::to_owned).collect(),
            CgroupVersion::V2 => Vec::new(),
        };
        let hierarchy = Hierarchy {
            mount: mount.into(),
            version,
            controllers,
        };
        let known = |h: &Hierarchy| h.version == version && h.controllers == hierarchy.controllers;
        if !found.iter().any(known) {
            found.push(hierarchy);
        }
    }
    found
}

/// Which settings go to which hierarchy, each hierarchy once.
fn by_hierarchy<'a>(
    hierarchies: &'a [Hierarchy],
    settings: &'a [CgroupSetting],
) -> Result<Vec<(&'a Hierarchy, Vec<&'a CgroupSetting>)>> {
    let mut result: Vec<(&Hierarchy, Vec<&CgroupSetting>)> = Vec::new();
    for setting in settings {
        // A controller is in one hierarchy only; `rw` and the like are no controllers.
        let has = |h: &&Hierarchy| h.controllers.contains(&setting.controller);
        let Some(hierarchy) = hierarchies.iter().find(has) else {
            if setting.optional {
                continue;
            }
            return refused(
                format!("--cgroup {}={}", setting.file, setting.value),
                format!(
                    "no cgroup hierarchy of this host has the controller {}",
                    setting.controller
                ),
            );
        };
        match result.iter_mut().find(|(known, _)| *known == hierarchy) {
            Some((_, list)) => list.push(setting),
            None => result.push((hierarchy, vec![setting])),
        }
    }
    Ok(result)
}

fn controllers<'a>(hierarchy: &Hierarchy, settings: &[&'a CgroupSetting]) -> Vec<&'a str> {
    match hierarchy.version {
        CgroupVersion::V1 => Vec::new(),
        CgroupVersion::V2 => settings.iter().map(|s| s.controller.as_str()).collect(),
    }
}

/// Makes every directory of `path` below `mount`, and enables the controllers on the way down.
fn make_directories(mount: &Path, path: &Path, enable: &[&str], made: &mut Made) -> Result<()> {
    for _ in 0..RETRIES {
        match try_make_directories(mount, path, enable, made) {
            Err(Error::Call {
                source: Errno::ENOENT,
                ..
            }) => {}
            other => return other,
        }
    }
    try_make_directories(mount, path, enable, made)
}

fn try_make_directories(mount: &Path, path: &Path, enable: &[&str], made: &mut Made) -> Result<()> {
    let mut holder = mount.to_owned();
    for part in path.components() {
        for controller in enable {
            let file = holder.join("cgroup.subtree_control");
            let enabled = std::fs::read_to_string(&file)
                .doing("read", file.display().to_string())?
                .split_whitespace()
                .any(|name| name == *controller);
            if !enabled {
                refuse_if_occupied(&holder)?;
                write(&file, &format!("+{controller}"))?;
            }
        }
        let directory = holder.join(part);
        match std::fs::create_dir(&directory) {
            Ok(()) => {
                let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                let opened = open(&holder, flags, Mode::empty())
                    .doing("open", holder.display().to_string())?;
                made.directories
                    .push((opened, PathBuf::from(part.as_os_str())));
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.doing("make cgroup", directory.display().to_string())?,
        }
        holder = directory;
    }
    Ok(())
}

/// A version 2 cgroup with processes gives domain controllers to no cgroup in it, and by others it would become
/// threaded, which no process could then enter. The hierarchy's root alone may do both (cgroups(7)), and has no type.
fn refuse_if_occupied(holder: &Path) -> Result<()> {
    let file = holder.join("cgroup.procs");
    let processes = std::fs::read_to_string(&file).doing("read", file.display().to_string())?;
    if processes.is_empty() || !holder.join("cgroup.type").exists() {
        return Ok(());
    }
    refused(
        format!("cgroup {}", holder.display()),
        "it has processes of its own, so cgroups in it can have no limits: move them into a cgroup beside, or choose \
         another --parent-cgroup",
    )
}

/// Two machines of one name would share one budget, and the first to end would remove it.
fn refuse_if_used(directory: &Path) -> Result<()> {
    let file = directory.join("cgroup.procs");
    let processes = std::fs::read_to_string(&file).doing("read", file.display().to_string())?;
    match processes.lines().next() {
        None => Ok(()),
        Some(process) => refused(
            directory.display().to_string(),
            format!(
                "process {process} runs in this cgroup: does a machine of this id run already?"
            ),
        ),
    }
}

/// A new version 1 cpuset has no CPU and no memory node: nothing can move in before it has some.
fn inherit_cpuset(mount: &Path, path: &Path) -> Result<()> {
    let mut holder = mount.to_owned();
    for part in path.components() {
        let directory = holder.join(part);
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let file = directory.join(name);
            let read = |file: &Path| {
                std::fs::read_to_string(file).doing("read", file.display().to_string())
            };
            if read(&file)?.trim().is_empty() {
                write(&file, read(&holder.join(name))?.trim())?;
            }
        }
        holder = directory;
    }
    Ok(())
}

fn enter(hierarchy: &Hierarchy, directory: &Path, origins: &str, made: &mut Made) -> Result<()> {
    if let Some(origin) = origin(hierarchy, origins) {
        let file = hierarchy.mount.join(origin).join("cgroup.procs");
        // Not there if the mount shows another part of the tree; then there is no way back.
        made.origins
            .extend(OpenOptions::new().write(true).open(file));
    }
    write(&directory.join("cgroup.procs"), "0")
}

/// This process's place in the hierarchy, from `/proc/self/cgroup` (cgroups(7)), without the `/`.
fn origin<'a>(hierarchy: &Hierarchy, text: &'a str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (names, path) = rest.split_once(':')?;
        let mine = match hierarchy.version {
            CgroupVersion::V2 => names.is_empty(),
            CgroupVersion::V1 => {
                !names.is_empty()
                    && names
                        .split(',')
                        .all(|name| hierarchy.controllers.iter().any(|c| c == name))
            }
        };
        mine.then(|| path.trim_start_matches('/'))
    })
}

/// Writes a value in one `write`, as control files want it.
fn write(file: &Path, value: &str) -> Result<()> {
    let object = || format!("{value:?} to {}", file.display());
    let mut opened = OpenOptions::new()
        .write(true)
        .open(file)
        .doing("write", object())?;
    opened.write_all(value.as_bytes()).doing("write", object())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /mnt/again cgroup rw,relatime,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
";
    const PROC: &str = "4:memory:/a/b\n2:cpu,cpuacct:/\n1:name=systemd:/x\n0::/user\n";

    fn setting(file: &str) -> CgroupSetting {
        CgroupSetting {
            controller: file.split('.').next().unwrap().to_owned(),
            file: file.to_owned(),
            value: "1".to_owned(),
            optional: false,
        }
    }

    #[test]
    fn finds_hierarchies_and_our_place_in_them() {
        let found = parse_mounts(HYBRID);
        let mounts: Vec<_> = found.iter().map(|h| h.mount.to_str().unwrap()).collect();
        assert_eq!(
            mounts,
            [
                "/sys/fs/cgroup/cpu,cpuacct",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/unified"
            ]
        );
        let places: Vec<_> = found.iter().map(|h| origin(h, PROC).unwrap()).collect();
        assert_eq!(places, ["", "a/b", "user"]);
    }

    #[test]
    fn each_hierarchy_is_entered_once() {
        let found = parse_mounts(HYBRID);
        let settings = [
            setting("cpu.shares"),
            setting("memory.x"),
            setting("cpuacct.y"),
        ];
        let groups = by_hierarchy(&found, &settings).unwrap();
        assert_eq!(groups.len(), 2);
        assert_eq!(groups[0].1.len(), 2);
        let error = by_hierarchy(&found, &[setting("rdma.max")]).unwrap_err();
        assert!(error.to_string().contains("rdma"), "{error}");
        let optional = CgroupSetting {
            optional: true,
            ..setting("rdma.max")
        };
        assert_eq!(by_hierarchy(&found, &[optional]).unwrap(), []);
    }

    #[test]
    fn a_parent_that_comes_and_goes_is_made_again() {
        let base = tempfile::tempdir().unwrap();
        let parent = base.path().join("parent");
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = std::fs::remove_dir(&parent);
                    std::thread::sleep(std::time::Duration::from_micros(20));
                }
            });
            for _ in 0..500 {
                let path = Path::new("parent/machine");
                let made = make_directories(base.path(), path, &[], &mut Made::default());
                let removed = std::fs::remove_dir(parent.join("machine"));
                stop.store(made.is_err(), std::sync::atomic::Ordering::Relaxed);
                made.unwrap();
                removed.unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
