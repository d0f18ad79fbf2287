//! A guest whose driver is hostile, to every device over real KVM.

use super::probe;
use casemate_tests::{Netns, exit};
use serde_json::json;

#[test]
fn queues_that_cannot_be_break_no_device_but_their_own_for_a_while() {
    let netns = Netns::with_tap(None);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        path
    };
    let (disk, pmem) = (file("disk"), file("pmem"));
    for engine in ["Sync", "Async"] {
        let done = probe("probe.task=hostile")
            .drive("disk", &disk, true)
            .set("/drives/0/io_engine", json!(engine))
            .pmem("memory", &pmem, true)
            .net("tap0", "06:00:ac:10:00:02")
            .set(
                "/balloon",
                json!({ "amount_mib": 0, "deflate_on_oom": false }),
            )
            .set("/memory-hotplug", json!({ "total_size_mib": 128 }))
            .vsock()
            .entropy()
            .console()
            .jailer_arg("--netns")
            .jailer_arg(&netns.path())
            .run()
            .unwrap();
        done.assert_line("probe: hostile ok");
        assert_eq!(done.code, exit::GUEST_RESET, "{done:#?}");
        assert_eq!(done.stdout.matches(" lives").count(), 8, "{done:#?}");
    }
    for path in [disk, pmem] {
        assert!(std::fs::read(path).unwrap() == vec![7; 1 << 20]);
    }
}
