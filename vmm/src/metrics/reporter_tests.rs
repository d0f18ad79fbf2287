use super::*;
use serde_json::Value as Json;
use std::io::Read as _;
use std::time::Duration;

fn reporter() -> Reporter {
    let logger: &'static LoggerMetrics = Box::leak(Box::default());
    Reporter::new(logger)
}

/// A pipe as metrics files are opened: writing never waits.
fn pipe() -> (File, File) {
    use nix::fcntl::OFlag;
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    (reader.into(), writer.into())
}

fn read(reader: &mut File) -> String {
    let mut text = String::new();
    let end = reader.read_to_string(&mut text);
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    text
}

fn lines(reader: &mut File) -> Vec<Json> {
    let text = read(reader);
    assert!(text.ends_with('\n'), "{text}");
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

#[test]
fn what_a_device_that_is_gone_has_counted_stays_in_the_sum() {
    let mut reporter = reporter();
    let counters = [(); 3].map(|()| Arc::new(BlockMetrics::default()));
    let source = |id: &str, at: usize| Source::device("block", id.into(), counters[at].clone());
    reporter.add([source("a", 0), source("b", 1)]);
    let (mut reader, writer) = pipe();
    reporter.start(writer, Options::default());
    counters[0].read_bytes.add(512);
    reporter.flush().unwrap();
    reporter.retire("block", "a");
    reporter.retire("net", "b");
    counters[1].read_bytes.add(1);
    reporter.flush().unwrap();
    // Another one of the same name begins at zero.
    reporter.add([source("a", 2)]);
    counters[2].read_bytes.add(2);
    reporter.flush().unwrap();
    let lines = lines(&mut reader);
    let said = |at: usize, section: &str| lines[at][section]["read_bytes"].clone();
    assert_eq!([said(0, "block"), said(0, "block_a")], [512, 512]);
    assert_eq!([said(1, "block"), said(1, "block_b")], [1, 1]);
    assert!(lines[1].get("block_a").is_none());
    assert_eq!([said(2, "block"), said(2, "block_a")], [2, 2]);
}

#[test]
fn counts_are_since_the_last_line_and_devices_are_summed_up() {
    let mut reporter = reporter();
    let [root, data] = [(); 2].map(|()| Arc::new(BlockMetrics::default()));
    reporter.add([
        Source::device("block", "root".into(), root.clone()),
        Source::device("block", "data".into(), data.clone()),
    ]);
    let (mut reader, writer) = pipe();
    reporter.start(writer, Options::default());
    root.read_bytes.add(512);
    data.read_bytes.add(1024);
    reporter.api.put.drive_count.inc();
    reporter.api.latencies.pause_vm.set(7);
    reporter.flush().unwrap();
    data.read_bytes.add(1);
    reporter.flush().unwrap();
    let lines = lines(&mut reader);
    let [first, second] = lines.as_slice() else {
        panic!("{lines:?}")
    };
    assert_eq!(first["block"]["read_bytes"], 1536);
    assert_eq!(first["block_root"]["read_bytes"], 512);
    assert_eq!(first["block_data"]["read_bytes"], 1024);
    assert_eq!(first["block_data"]["read_agg"]["sum_us"], 0);
    assert_eq!(first["put_api_requests"]["drive_count"], 1);
    assert_eq!(second["block"]["read_bytes"], 1);
    assert_eq!(second["block_root"]["read_bytes"], 0);
    assert_eq!(second["put_api_requests"]["drive_count"], 0);
    for line in [first, second] {
        assert_eq!(line["latencies_us"]["pause_vm"], 7, "a value stays");
        assert!(line["utc_timestamp_ms"].as_u64() > Some(1_700_000_000_000));
        assert!(line.get("id").is_none() && line.get("properties").is_none());
    }
}

#[test]
fn every_line_has_every_section() {
    let mut reporter = reporter();
    let (mut reader, writer) = pipe();
    let properties = BTreeMap::from([("team".to_owned(), "a \"quoted\" one".to_owned())]);
    let options = Options {
        id: Some("vm-1".into()),
        properties: Some(properties),
    };
    assert!(reporter.due().is_none() && reporter.flush().is_ok());
    reporter.start(writer, options);
    reporter.flush().unwrap();
    let text = read(&mut reader);
    assert!(text.starts_with("{\"utc_timestamp_ms\":"), "{text}");
    let line: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(line["id"], "vm-1");
    assert_eq!(line["properties"]["team"], "a \"quoted\" one");
    for section in [
        "api_server",
        "balloon",
        "block",
        "deprecated_api",
        "entropy",
        "get_api_requests",
        "i8042",
        "interrupts",
        "latencies_us",
        "logger",
        "memory_hotplug",
        "mmds",
        "net",
        "patch_api_requests",
        "pmem",
        "put_api_requests",
        "seccomp",
        "signals",
        "uart",
        "vcpu",
        "vmm",
        "vsock",
    ] {
        assert!(line[section].is_object(), "{section}");
        assert_eq!(text.matches(&format!("\"{section}\":{{")).count(), 1);
    }
}

#[test]
fn a_reader_that_does_not_read_costs_lines_and_nothing_else() {
    let mut reporter = reporter();
    let vsock = Arc::new(VsockMetrics::default());
    reporter.add([Source::new("vsock", vsock.clone())]);
    let (mut reader, writer) = pipe();
    reporter.start(writer, Options::default());
    for _ in 0..100 {
        vsock.conns_added.inc();
        reporter.flush().unwrap();
    }
    let missed = reporter.logger.missed_metrics_count.total();
    assert!(missed > 0 && missed < 100, "{missed}");
    let mut text = read(&mut reader);
    // The end of the line that was begun, and one that makes up for those that are missing.
    reporter.flush().unwrap();
    text.push_str(&read(&mut reader));
    let lines: Vec<Json> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    let counted: u64 = lines
        .iter()
        .map(|line| line["vsock"]["conns_added"].as_u64().unwrap())
        .sum();
    assert_eq!(counted, 100, "nothing is lost");
    let missed_lines: u64 = lines
        .iter()
        .map(|line| line["logger"]["missed_metrics_count"].as_u64().unwrap())
        .sum();
    assert_eq!(missed_lines, missed);
}

#[test]
fn a_reader_that_is_gone_is_an_error() {
    let mut reporter = reporter();
    let (reader, writer) = pipe();
    drop(reader);
    reporter.start(writer, Options::default());
    let error = reporter.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(reporter.logger.metrics_fails.total(), 1);
}

#[test]
fn the_start_is_measured() {
    let reporter = reporter();
    let server = &reporter.api.server;
    reporter.report_start(StartTimes::default());
    assert_eq!(server.process_startup_time_us.get(), 0);
    assert_eq!(server.process_startup_time_cpu_us.get(), 0);
    reporter.report_start(StartTimes {
        start_us: Some(1),
        start_cpu_us: Some(0),
        parent_cpu_us: Some(5_000_000),
    });
    assert!(server.process_startup_time_us.get() > 0);
    assert!(server.process_startup_time_cpu_us.get() >= 5_000_000);
    let future = StartTimes {
        start_us: Some(u64::MAX),
        start_cpu_us: Some(u64::MAX),
        parent_cpu_us: Some(u64::MAX),
    };
    reporter.report_start(future);
    assert_eq!(server.process_startup_time_us.get(), 0);
}

#[test]
fn a_line_is_due_every_minute() {
    let mut reporter = reporter();
    let (mut reader, writer) = pipe();
    let before = Instant::now();
    reporter.start(writer, Options::default());
    let due = reporter.due().unwrap();
    assert!(due >= before + INTERVAL);
    reporter.tick(due - Duration::from_millis(1));
    assert_eq!(read(&mut reader), "");
    reporter.tick(due);
    assert_eq!(lines(&mut reader).len(), 1);
    assert_eq!(reporter.due(), Some(due + INTERVAL));
}
