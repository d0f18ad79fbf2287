use super::*;

const GOOD: &str = "--id vm-1 --exec-file /usr/bin/casemate-vmm --uid 1001 --gid 1002";

fn parse_text(text: &str) -> Result<Command, ArgumentError> {
    parse(text.split_whitespace().map(OsString::from))
}

fn good(more: &str) -> Arguments {
    match parse_text(&format!("{GOOD} {more}")) {
        Ok(Command::Run(arguments)) => *arguments,
        other => panic!("{more}: {other:?}"),
    }
}

#[test]
fn firecrackers_flags() {
    let arguments = good(
        "--chroot-base-dir /srv/x --netns /var/run/netns/a --daemonize --new-pid-ns \
         --cgroup cpuset.cpus=0 --cgroup memory.limit_in_bytes=1 --cgroup-version 1 \
         --parent-cgroup a/b --resource-limit fsize=5 --resource-limit no-file=9 -- --a --id z",
    );
    assert_eq!(arguments.exec_name, "casemate-vmm");
    assert_eq!((arguments.uid, arguments.gid), (1001, 1002));
    assert_eq!(arguments.cgroups.len(), 2);
    assert_eq!(arguments.cgroups[1].controller, "memory");
    assert_eq!(arguments.limits.fsize, Some(5));
    assert_eq!(arguments.limits.no_file, 9);
    assert_eq!(arguments.vmm_arguments, ["--a", "--id", "z"]);
    assert_eq!(arguments.id.as_str(), "vm-1");
}

#[test]
fn grants_have_names() {
    for (text, name, path) in [
        ("/a/b", "/a/b", "/a/b"),
        ("config=/a/b", "config", "/a/b"),
        ("config=b.json", "config", "b.json"),
        ("/a=/b", "/a", "/b"),
        ("/a/x=y", "/a/x=y", "/a/x=y"),
    ] {
        let arguments = good(&format!("--grant-ro {text}"));
        assert_eq!(arguments.grants[0].name, name);
        assert_eq!(arguments.grants[0].path, Path::new(path));
        let arguments = good(&format!("--allow-create {text}"));
        assert_eq!(arguments.allow_create[0].name, Path::new(name));
        assert_eq!(arguments.allow_create[0].path, Path::new(path));
    }
}

#[test]
fn no_machine_can_make_userfaultfds_unless_that_is_asked_for() {
    assert!(!good("").userfaultfd);
    assert!(good("--grant-userfaultfd --grant-connect /s").userfaultfd);
}

#[test]
fn refuses_with_the_options_name() {
    for (more, word) in [
        ("--uid 0", "uid"),
        ("--gid 0", "gid"),
        ("--uid root", "uid"),
        ("--uid -1", "uid"),
        ("--uid 4294967295", "uid"),
        ("--id ../x", "--id"),
        ("--cgroup memory.max", "cgroup"),
        ("--cgroup ../memory.max=1", "cgroup"),
        ("--cgroup memory/max=1", "cgroup"),
        ("--cgroup cgroup.procs=1", "cgroup"),
        ("--cgroup-version 3", "cgroup-version"),
        ("--parent-cgroup ../x", "parent-cgroup"),
        ("--parent-cgroup /x", "parent-cgroup"),
        ("--resource-limit core=1", "resource-limit"),
        ("--resource-limit no-file=many", "resource-limit"),
        ("--grant-ro kvm=/a", "grant-ro"),
        ("--grant-ro userfaultfd=/a", "grant-ro"),
        ("--grant-ro ../a", "grant-ro"),
        ("--grant-ro a=", "grant-ro"),
        ("--grant-tap averyveryverylongname", "grant-tap"),
        ("--grant-tap tap0:0", "1 to 8 queues"),
        ("--grant-tap tap0:9", "1 to 8 queues"),
        ("--grant-tap tap0:x", "1 to 8 queues"),
        ("--grant-tap a=tap0:", "1 to 8 queues"),
        ("--grant-ro /a --grant-rw /a", "/a"),
        ("--grant-append ../a", "grant-append"),
        ("--allow-create ../a", "allow-create"),
        ("--allow-create a=", "the path is empty"),
        ("--allow-create =/a", "the name is empty"),
        ("--allow-create log=/a", "the jailer's own names"),
        ("--allow-create /a --allow-create /a", "/a"),
        ("--allow-create a=/b --grant-rw a=/c", "granted twice"),
        ("--log-fd 2", "log-fd"),
        ("--allow-missing seccomp", "allow-missing"),
        ("--exec-file /", "exec-file"),
        ("--daemonize --die-with-parent", "die-with-parent"),
        ("--keep-fd 5", "keep-fd"),
        ("stray", "stray"),
    ] {
        let error = parse_text(&format!("{GOOD} {more}"))
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{more}: {error}");
        assert_eq!(error.lines().count(), 1);
    }
    for missing in ["id", "exec-file", "uid", "gid"] {
        let text = GOOD.replace(&format!("--{missing} "), "--netns ");
        let error = parse_text(&text).unwrap_err();
        assert!(matches!(error, ArgumentError::Missing(name) if name == missing));
    }
}

#[test]
fn a_helpers_options_are_its_own() {
    let text = "helper --id h --exec-file /usr/bin/x --uid 1000 --gid 1001 --id-count 5 --cap Chown --cap CAP_SETUID \
                --bind-ro /a --bind-rw /b --listen /s --proc --die-with-parent -- --id z";
    let Command::Run(arguments) = parse_text(text).unwrap() else {
        panic!("{text}");
    };
    assert_eq!(arguments.vmm_arguments, ["--id", "z"]);
    let helper = arguments.helper.unwrap();
    assert_eq!((helper.ids, helper.proc), (5, true));
    assert_eq!(helper.capabilities.len(), 2);
    assert_eq!(helper.binds, [(false, "/a".into()), (true, "/b".into())]);
    assert_eq!(helper.listeners, [Path::new("/s")]);
    // Not a VMM's, and a VMM has none of these.
    for option in [
        "--bind-ro /a",
        "--cap chown",
        "--proc",
        "--listen /s",
        "--id-count 2",
    ] {
        assert!(parse_text(&format!("{GOOD} {option}")).is_err(), "{option}");
    }
    for option in [
        "--grant-ro /a",
        "--grant-api /a",
        "--allow-open /a",
        "--allow-create /a",
        "--grant-userfaultfd",
        "--new-pid-ns",
        "--netns /n",
    ] {
        assert!(
            parse_text(&format!("helper {GOOD} {option}")).is_err(),
            "{option}"
        );
    }
    assert!(matches!(
        parse_text("helper --help"),
        Ok(Command::HelperHelp)
    ));
}
