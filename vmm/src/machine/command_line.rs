//! The kernel's command line.

use crate::config::Config;

/// The configured command line and, with a root drive, where the root file system is: as
/// Firecracker does it. Behind a `--` it would be an argument of init.
pub(super) fn command_line(config: &Config) -> String {
    let args = config.boot_source.args();
    let Some(root) = config.drives.iter().find(|drive| drive.is_root_device) else {
        return args.to_owned();
    };
    let device = match &root.partuuid {
        Some(uuid) => format!("PARTUUID={uuid}"),
        None => "/dev/vda".to_owned(),
    };
    let mode = if root.is_read_only { "ro" } else { "rw" };
    let (kernel, init) = args.split_at_checked(init_args(args)).unwrap_or((args, ""));
    let root = format!("root={device} {mode}");
    let parts = [kernel.trim_end(), &root, init];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join(" ")
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
