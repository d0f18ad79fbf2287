//! A command's streams, byte for byte.

use casemate_tests::Casemate;

#[test]
fn output_and_errors_keep_apart() {
    let done = Casemate::new()
        .run(&[], "echo out; echo err >&2; printf 'no newline'")
        .unwrap();
    assert_eq!(done.stdout, "out\nno newline");
    assert_eq!(done.stderr, "err\n", "{done:#?}");
}

#[test]
fn input_arrives_and_ends() {
    let casemate = Casemate::new();
    let mut run = casemate.start(&[], "wc -c; echo done").unwrap();
    let data = vec![b'x'; 3_000_000];
    run.write(&data).unwrap();
    run.close_stdin();
    let done = run.wait().unwrap();
    assert_eq!(done.stdout, "3000000\ndone\n", "{done:#?}");
}

#[test]
fn a_lot_of_output_arrives_whole() {
    let done = Casemate::new().run(&[], "seq 1 400000").unwrap();
    assert_eq!(done.stdout.lines().count(), 400_000);
    assert!(done.stdout.ends_with("\n399999\n400000\n"));
}
