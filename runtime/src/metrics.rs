//! `casemate metrics`: a VMM's JSON lines as Prometheus text.
//!
//! The lines come from a process that a guest may have taken over, so they are bounded, and nothing of
//! them reaches the output but numbers, names of plain letters, and quoted labels.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::path::Path;

use serde_json::{Map, Value};
use thiserror::Error;

/// Longest line in bytes.
const MAX_LINE: u64 = 1 << 20;
/// Most numbers that are kept.
const MAX_SERIES: usize = 20_000;
/// Sections of which there is one for each device: `block_rootfs` is drive `rootfs`.
const PER_DEVICE: [&str; 4] = ["block", "net", "pmem", "vhost_user"];
/// Sections whose numbers are repeated until they change, instead of counting on.
const VALUES: [&str; 5] = ["api_server", "latencies_us", "seccomp", "signals", "vmm"];

/// Why there is no text.
#[derive(Debug, Error)]
pub enum Error {
    /// The file.
    #[error("metrics {name:?}: {source}")]
    Read {
        /// Its name.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// A line.
    #[error("metrics {name:?}, line {line}: {why}")]
    Line {
        /// The file's name.
        name: String,
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// Standard output.
    #[error("cannot write: {0}")]
    Write(#[source] io::Error),
}

/// Prints the lines of `path` (`-`: standard input), added up.
///
/// # Errors
/// When it cannot be read, or has no such lines.
pub fn run(path: &Path) -> Result<(), Error> {
    let name = path.display().to_string();
    let read = |source| Error::Read {
        name: name.clone(),
        source,
    };
    let text = if path == Path::new("-") {
        add_up(io::stdin().lock(), &name)?
    } else {
        add_up(BufReader::new(File::open(path).map_err(read)?), &name)?
    };
    match io::stdout().lock().write_all(text.to_string().as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(Error::Write),
    }
}

fn add_up(mut source: impl BufRead, name: &str) -> Result<Series, Error> {
    let mut series = Series::default();
    for number in 1.. {
        let mut line = Vec::new();
        let wrong = |why: String| Error::Line {
            name: name.to_owned(),
            line: number,
            why,
        };
        let mut limited = source.by_ref().take(MAX_LINE);
        let read = limited.read_until(b'\n', &mut line);
        let count = read.map_err(|source| Error::Read {
            name: name.to_owned(),
            source,
        })?;
        if count == 0 {
            break;
        }
        if line.last() != Some(&b'\n') {
            if count as u64 == MAX_LINE {
                return Err(wrong("longer than 1 MiB".to_owned()));
            }
            // The VMM is writing it.
            break;
        }
        let line: Map<String, Value> =
            serde_json::from_slice(&line).map_err(|error| wrong(error.to_string()))?;
        series.add(&line).map_err(|why| wrong(why.to_owned()))?;
    }
    Ok(series)
}

/// One number: its metric, its labels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    metric: String,
    labels: Vec<(&'static str, String)>,
}

#[derive(Debug, Default)]
struct Series {
    counters: BTreeMap<Key, u64>,
    values: BTreeMap<Key, u64>,
    /// Kinds of devices that have sections of their own: the sum over them would count twice.
    split: BTreeSet<&'static str>,
}

impl Series {
    fn add(&mut self, line: &Map<String, Value>) -> Result<(), &'static str> {
        let vm = line.get("id").and_then(Value::as_str);
        let labels: Vec<_> = vm.map(|vm| ("vm", vm.to_owned())).into_iter().collect();
        if let Some(time) = line.get("utc_timestamp_ms").and_then(Value::as_u64) {
            let key = key("last_line_timestamp_ms", &labels);
            self.values.insert(key, time);
        }
        for (section, fields) in line {
            // `properties` holds no numbers.
            let Value::Object(fields) = fields else {
                continue;
            };
            let mut labels = labels.clone();
            let device = PER_DEVICE.iter().find_map(|kind| {
                let id = section.strip_prefix(kind)?.strip_prefix('_')?;
                Some((*kind, id))
            });
            let name = match device {
                Some((kind, id)) => {
                    self.split.insert(kind);
                    labels.push(("device", id.to_owned()));
                    kind
                }
                None => section,
            };
            for (field, number) in fields {
                self.add_field(name, field, number, &labels);
            }
            if self.counters.len().saturating_add(self.values.len()) > MAX_SERIES {
                return Err("too many different numbers");
            }
        }
        Ok(())
    }

    fn add_field(
        &mut self,
        section: &str,
        field: &str,
        number: &Value,
        labels: &[(&'static str, String)],
    ) {
        match number {
            Value::Object(parts) => {
                for (part, number) in parts {
                    self.add_field(section, &format!("{field}_{part}"), number, labels);
                }
            }
            number => {
                let Some(number) = number.as_u64() else {
                    return;
                };
                let name = format!("{section}_{field}");
                if is_value(section, field) {
                    self.values.insert(key(&name, labels), number);
                } else {
                    let total = self.counters.entry(key(&format!("{name}_total"), labels));
                    let total = total.or_default();
                    *total = total.saturating_add(number);
                }
            }
        }
    }
}

fn is_value(section: &str, field: &str) -> bool {
    let set = VALUES.contains(&section) && field != "sigpipe";
    set || ["_min_us", "_max_us", "_time_us"]
        .iter()
        .any(|end| field.ends_with(end))
}

/// A metric's name has plain letters only, whatever the line says.
fn key(name: &str, labels: &[(&'static str, String)]) -> Key {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    Key {
        metric: format!("casemate_{}", name.chars().map(plain).collect::<String>()),
        labels: labels.to_vec(),
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (numbers, kind) in [(&self.counters, "counter"), (&self.values, "gauge")] {
            let mut last = "";
            for (key, number) in numbers {
                let summed = self.split.iter().any(|device| {
                    let of = key.metric.strip_prefix("casemate_");
                    let of = of.and_then(|name| name.strip_prefix(device));
                    of.is_some_and(|rest| rest.starts_with('_'))
                });
                let device = key.labels.iter().any(|(name, _)| *name == "device");
                if summed && !device {
                    continue;
                }
                if key.metric != last {
                    writeln!(f, "# TYPE {} {kind}", key.metric)?;
                    last = &key.metric;
                }
                writeln!(f, "{key} {number}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.metric)?;
        for (at, (name, value)) in self.labels.iter().enumerate() {
            f.write_str(if at == 0 { "{" } else { "," })?;
            write!(f, "{name}=\"")?;
            for c in value.chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    '"' => f.write_str("\\\"")?,
                    '\n' => f.write_str("\\n")?,
                    c if c.is_control() => f.write_char('?')?,
                    c => f.write_char(c)?,
                }
            }
            f.write_char('"')?;
        }
        if self.labels.is_empty() {
            return Ok(());
        }
        f.write_char('}')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(lines: &str) -> String {
        add_up(lines.as_bytes(), "test").unwrap().to_string()
    }

    #[test]
    fn counters_add_up_and_values_are_the_last() {
        let text = text(concat!(
            r#"{"utc_timestamp_ms":1,"id":"vm-1","vcpu":{"exit_io_in":3,"exit_io_in_agg":{"min_us":2,"max_us":9,"sum_us":20}},"latencies_us":{"pause_vm":5}}"#,
            "\n",
            r#"{"utc_timestamp_ms":2,"id":"vm-1","vcpu":{"exit_io_in":4,"exit_io_in_agg":{"min_us":1,"max_us":9,"sum_us":3}},"latencies_us":{"pause_vm":6}}"#,
            "\n",
        ));
        for line in [
            "# TYPE casemate_vcpu_exit_io_in_total counter",
            "casemate_vcpu_exit_io_in_total{vm=\"vm-1\"} 7",
            "casemate_vcpu_exit_io_in_agg_sum_us_total{vm=\"vm-1\"} 23",
            "# TYPE casemate_vcpu_exit_io_in_agg_min_us gauge",
            "casemate_vcpu_exit_io_in_agg_min_us{vm=\"vm-1\"} 1",
            "casemate_latencies_us_pause_vm{vm=\"vm-1\"} 6",
            "casemate_last_line_timestamp_ms{vm=\"vm-1\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }

    #[test]
    fn devices_are_labels_and_are_not_counted_twice() {
        let text = text(concat!(
            r#"{"block":{"read_bytes":3},"block_a":{"read_bytes":1},"block_b":{"read_bytes":2},"net":{"tx_count":0}}"#,
            "\n"
        ));
        assert!(text.contains("casemate_block_read_bytes_total{device=\"a\"} 1\n"));
        assert!(text.contains("casemate_block_read_bytes_total{device=\"b\"} 2\n"));
        assert!(
            !text.contains("casemate_block_read_bytes_total 3"),
            "{text}"
        );
        assert!(text.contains("casemate_net_tx_count_total 0\n"));
    }

    #[test]
    fn hostile_lines_break_nothing_out() {
        let line = r#"{"id":"a\"} 1\nevil 2","block_x\u001b\"":{"a b\nevil":1},"properties":{"x":"y"},"vcpu":{"n":-1,"s":"t","f":1.5}}"#;
        let text = text(&format!("{line}\n"));
        assert!(text.lines().all(|line| !line.starts_with("evil")), "{text}");
        assert!(!text.contains('\x1b'));
        assert!(text.contains(r#"vm="a\"} 1\nevil 2""#), "{text}");
        for wrong in ["[]\n", "{\"a\":\n", "x\n"] {
            let error = add_up(wrong.as_bytes(), "m").unwrap_err().to_string();
            assert!(error.contains("line 1"), "{error}");
        }
        let many: String = (0..30_000).map(|n| format!("\"f{n}\":1,")).collect();
        let many = format!("{{\"vcpu\":{{{}\"z\":1}}}}\n", many);
        let error = add_up(many.as_bytes(), "m").unwrap_err().to_string();
        assert!(error.contains("too many"), "{error}");
        let long = vec![b' '; (MAX_LINE + 5) as usize];
        assert!(add_up(long.as_slice(), "m").is_err());
        // The last line is still being written.
        assert!(add_up(&b"{\"vcpu\":{\"a\":1}}\n{\"vc"[..], "m").is_ok());
    }
}
