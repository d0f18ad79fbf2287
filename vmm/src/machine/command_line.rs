//! The kernel's command line.

use crate::config::Config;

/// The configured command line and, with a root device, where the root file system is: as
/// Firecracker does it. Behind a `--` it would be an argument of init.
pub(super) fn command_line(config: &Config) -> String {
    let args = config.boot_source.args();
    let Some((device, read_only)) = root(config) else {
        return args.to_owned();
    };
    let mode = if read_only { "ro" } else { "rw" };
    let (kernel, init) = args.split_at_checked(init_args(args)).unwrap_or((args, ""));
    let root = format!("root={device} {mode}");
    let parts = [kernel.trim_end(), &root, init];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join(" ")
}

/// The root device in the guest, if there is one, and whether it is read-only.
fn root(config: &Config) -> Option<(String, bool)> {
    let drive = config.drives.iter().find(|drive| drive.is_root_device);
    if let Some(drive) = drive {
        let device = match &drive.partuuid {
            Some(uuid) => format!("PARTUUID={uuid}"),
            None => "/dev/vda".to_owned(),
        };
        return Some((device, drive.is_read_only));
    }
    let mut pmem = config.pmem.iter().enumerate();
    let (number, pmem) = pmem.find(|(_, pmem)| pmem.root_device)?;
    Some((format!("/dev/pmem{number}"), pmem.read_only))
}

/// Where the `--` is that starts the arguments of init: a word of its own outside quotes.
fn init_args(args: &str) -> usize {
    let is_word = |at: &usize| {
        let (before, rest) = args.split_at_checked(*at).unwrap_or_default();
        let after = rest.strip_prefix("--").unwrap_or_default();
        let quoted = !before.matches('"').count().is_multiple_of(2);
        let alone = |side: Option<char>| side.is_none_or(char::is_whitespace);
        !quoted && alone(before.chars().next_back()) && alone(after.chars().next())
    };
    let mut found = args.match_indices("--").map(|(at, _)| at).filter(is_word);
    found.next().unwrap_or(args.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(drives: &str) -> String {
        line_with("quiet", drives)
    }

    #[test]
    fn the_root_may_be_in_memory() {
        let line = |pmem: &str| {
            let text = format!(
                r#"{{"boot-source":{{"kernel_image_path":"/k","boot_args":"quiet -- a"}},"pmem":[{pmem}]}}"#
            );
            command_line(&Config::from_json(text.as_bytes()).unwrap())
        };
        let data = r#"{"id":"a","path_on_host":"/a"}"#;
        assert_eq!(line(data), "quiet -- a");
        let root = r#"{"id":"b","path_on_host":"/b","root_device":true}"#;
        assert_eq!(line(root), "quiet root=/dev/pmem0 rw -- a");
        let root = r#"{"id":"b","path_on_host":"/b","root_device":true,"read_only":true}"#;
        let second = format!("{data},{root}");
        assert_eq!(line(&second), "quiet root=/dev/pmem1 ro -- a");
    }

    fn line_with(args: &str, drives: &str) -> String {
        let args = serde_json::json!(args);
        let text = format!(
            r#"{{"boot-source":{{"kernel_image_path":"/k","boot_args":{args}}},
                "machine-config":{{"vcpu_count":1,"mem_size_mib":1}},"drives":[{drives}]}}"#
        );
        command_line(&Config::from_json(text.as_bytes()).unwrap())
    }

    #[test]
    fn the_root_drive_is_named() {
        assert_eq!(line(r#"{"drive_id":"a","path_on_host":"/a"}"#), "quiet");
        assert_eq!(
            line(r#"{"drive_id":"a","path_on_host":"/a","is_root_device":true}"#),
            "quiet root=/dev/vda rw"
        );
        assert_eq!(
            line(
                r#"{"drive_id":"a","path_on_host":"/a","is_root_device":true,"is_read_only":true,"partuuid":"0eaa91a0-01"}"#
            ),
            "quiet root=PARTUUID=0eaa91a0-01 ro"
        );
    }

    #[test]
    fn the_root_drive_is_no_argument_of_init() {
        let drive = r#"{"drive_id":"a","path_on_host":"/a","is_root_device":true}"#;
        for (args, expected) in [
            ("", "root=/dev/vda rw"),
            ("quiet -- a -- b", "quiet root=/dev/vda rw -- a -- b"),
            ("quiet --", "quiet root=/dev/vda rw --"),
            ("-- a", "root=/dev/vda rw -- a"),
            ("a=--b --c d--", "a=--b --c d-- root=/dev/vda rw"),
            (r#"a="b -- c" -- d"#, r#"a="b -- c" root=/dev/vda rw -- d"#),
        ] {
            assert_eq!(line_with(args, drive), expected);
        }
        assert_eq!(line_with("quiet -- a", ""), "quiet -- a");
    }
}
