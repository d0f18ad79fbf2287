//! Blocks that a guest gives back to the host.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use casemate_tests::Casemate;

#[test]
fn what_a_guest_discards_is_free_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![7; 8 << 20]).unwrap();
    let before = std::fs::metadata(&disk).unwrap();
    // All but the first megabyte; then zeros over half of what is left.
    let script = "blkdiscard -o 1048576 /dev/vdb && \
                  dd if=/dev/zero of=/dev/vdb bs=512k count=1 conv=notrunc 2>/dev/null; sync; \
                  cat /sys/block/vdb/queue/discard_max_bytes /sys/block/vdb/queue/write_zeroes_max_bytes";
    let done = Casemate::new()
        .run(&["--disk", disk.to_str().unwrap()], script)
        .unwrap();
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (0, "1073741824\n4194304\n"),
        "{done:#?}"
    );
    let after = std::fs::metadata(&disk).unwrap();
    assert_eq!(after.len(), before.len());
    let allocated = |metadata: &Metadata| metadata.blocks() * 512;
    assert!(allocated(&before) >= 8 << 20, "{before:?}");
    assert!(allocated(&after) <= 2 << 20, "{after:?}");
    let bytes = std::fs::read(&disk).unwrap();
    let (first, rest) = bytes.split_at(1 << 20);
    assert!(first[..512 << 10].iter().all(|&byte| byte == 0));
    assert!(first[512 << 10..].iter().all(|&byte| byte == 7));
    assert!(rest.iter().all(|&byte| byte == 0));
}
