use std::io::Read as _;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::pipe;

use super::*;

fn options() -> Options {
    Options {
        level: Some(LevelFilter::Info),
        show_level: false,
        show_origin: false,
        filter: Filter::default(),
    }
}

fn logger(file: File) -> Logger {
    let metrics: &'static LoggerMetrics = Box::leak(Box::default());
    Logger::new("vm-1".into(), options(), Some(file), metrics)
}

/// Logs from a place of its own each time.
fn log(logger: &Logger, line: u32, text: &str) {
    logger.log(
        &Record::builder()
            .args(format_args!("{text}"))
            .level(log::Level::Warn)
            .target("casemate_vmm::some")
            .file(Some("some.rs"))
            .line(Some(line))
            .build(),
    );
}

#[test]
fn unless_it_is_said_a_file_gets_what_went_right_too() {
    let mut options = options();
    options.level = None;
    assert_eq!(options.max_level(true), LevelFilter::Info);
    assert_eq!(options.max_level(false), LevelFilter::Warn);
    options.level = Some(LevelFilter::Off);
    assert_eq!(options.max_level(true), LevelFilter::Off);
}

#[test]
fn a_reader_that_does_not_read_costs_lines_and_nothing_else() {
    let (reader, writer) = pipe().unwrap();
    // A blocking pipe, as standard error often is: a write to it when full would hang this test.
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(8192)).unwrap();
    let logger = logger(writer.into());
    let text = "x".repeat(1000);
    for line in 0..100 {
        log(&logger, line, &text);
    }
    let missed = logger.metrics.missed_log_count.total();
    assert!((90..100).contains(&missed), "{missed}");
    let mut reader = File::from(reader);
    let mut taken = vec![0; 8192];
    let count = reader.read(&mut taken).unwrap();
    taken.truncate(count);
    let lines = String::from_utf8(taken).unwrap();
    assert_eq!(lines.lines().count() as u64, 100 - missed);
    assert!(lines.ends_with('\n'), "no line in parts");
    log(&logger, 200, "again");
    drop(logger);
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    let [notice, again] = rest.lines().collect::<Vec<_>>().try_into().unwrap();
    assert!(
        notice.contains(&format!("{missed} lines dropped")),
        "{notice}"
    );
    assert!(again.ends_with("] again"), "{again}");
}

#[test]
fn a_place_that_logs_too_often_is_held_back() {
    let mut file = tempfile::tempfile().unwrap();
    let logger = logger(file.try_clone().unwrap());
    for _ in 0..50 {
        log(&logger, 1, "again and again");
    }
    log(&logger, 2, "something else");
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("again and again").count(), 10);
    assert_eq!(text.matches("something else").count(), 1);
    assert_eq!(logger.metrics.rate_limited_log_count.total(), 40);
}

#[test]
fn an_unwritable_log_is_counted_and_no_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let logger = logger(full.unwrap());
    log(&logger, 1, "lost");
    assert_eq!(logger.metrics.missed_log_count.total(), 1);
}

#[test]
fn levels_and_modules_are_obeyed() {
    let mut file = tempfile::tempfile().unwrap();
    let logger = logger(file.try_clone().unwrap());
    logger.settings.write().unwrap().options.filter = "some=error".parse().unwrap();
    log(&logger, 1, "hidden");
    logger.settings.write().unwrap().options.filter = "some=warn".parse().unwrap();
    log(&logger, 2, "shown");
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert!(
        text.ends_with("] shown\n") && !text.contains("hidden"),
        "{text}"
    );
}

#[test]
fn a_change_under_way_costs_a_line_and_no_wait() {
    let file = tempfile::tempfile().unwrap();
    let logger = logger(file.try_clone().unwrap());
    // As when a signal interrupts the very thread that changes the log.
    let _changing = logger.settings.write().unwrap();
    log(&logger, 1, "lost");
    assert_eq!(logger.metrics.missed_log_count.total(), 1);
    assert_eq!(file.metadata().unwrap().len(), 0);
}

/// A thread that logs is interrupted all the time by a handler that logs too. Were there a lock or an
/// allocator between a record and its descriptor, this would hang.
#[test]
fn a_signal_handler_may_log() {
    static LOGGED: AtomicUsize = AtomicUsize::new(0);
    static TARGET: OnceLock<Logger> = OnceLock::new();
    extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        if let Some(logger) = TARGET.get() {
            log(
                logger,
                LOGGED.fetch_add(1, Ordering::Relaxed) as u32,
                "handler",
            );
        }
    }
    const LINES: u32 = 5_000;
    let file = tempfile::tempfile().unwrap();
    let signal = vmm_sys_util::signal::SIGRTMIN() + 3;
    vmm_sys_util::signal::register_signal_handler(signal, on_signal).unwrap();
    let target = TARGET.get_or_init(|| logger(file.try_clone().unwrap()));
    let worker = std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut line = 0;
        // A busy host may not let the other thread send anything before these are through.
        while line < LINES || LOGGED.load(Ordering::Relaxed) == 0 && Instant::now() < deadline {
            log(target, 1_000_000 + line, "thread");
            line += 1;
        }
    });
    use vmm_sys_util::signal::Killable as _;
    // One at a time: signals that queue up would keep the thread from ever going on.
    for sent in 0..1000 {
        if worker.is_finished() || worker.kill(signal).is_err() {
            break;
        }
        while LOGGED.load(Ordering::Relaxed) <= sent && !worker.is_finished() {
            std::thread::yield_now();
        }
    }
    worker.join().unwrap();
    assert!(LOGGED.load(Ordering::Relaxed) > 0);
    assert!(file.metadata().unwrap().len() > 0);
}
