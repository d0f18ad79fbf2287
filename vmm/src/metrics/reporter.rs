//! The lines: one JSON object each, in Firecracker's form.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use super::fields::{
    ApiServerMetrics, BalloonMetrics, BlockMetrics, DeprecatedApiMetrics, EntropyMetrics,
    GetMetrics, I8042Metrics, InterruptMetrics, LatencyMetrics, LoggerMetrics,
    MemoryHotplugMetrics, MmdsMetrics, NetMetrics, PatchMetrics, PmemMetrics, PutMetrics,
    SeccompMetrics, SignalMetrics, UartMetrics, VcpuMetrics, VmmMetrics, VsockMetrics,
};
use crate::arguments::StartTimes;
use crate::config;
use crate::devices::boot_timer::cpu_time;

use super::{Counters, INTERVAL, Reading, Source};

/// What else stands in each line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The machine's id, as `id`.
    pub id: Option<String>,
    /// The operator's own, as `properties`.
    pub properties: Option<BTreeMap<String, String>>,
}

impl Options {
    /// What `config` asks for, of the machine `id`.
    pub fn of(config: &config::Metrics, id: &str) -> Self {
        Self {
            id: config.emit_id.then(|| id.to_owned()),
            properties: config.properties.clone(),
        }
    }
}

/// What the lines are written from, and where they go.
///
/// It belongs to the control thread. Writing never waits: a line that its reader does not take is
/// kept for the next time, and while it is, newer ones are left out and counted as missed; what they
/// would have said is in the line after.
pub struct Reporter {
    /// The API's own sections.
    pub api: Api,
    logger: &'static LoggerMetrics,
    sources: Vec<Source>,
    /// What each section's counters were in the last line.
    reported: HashMap<String, Vec<u64>>,
    output: Option<Output>,
    due: Option<Instant>,
}

/// What the control thread itself counts.
#[derive(Clone, Default)]
pub struct Api {
    /// `api_server`.
    pub server: Arc<ApiServerMetrics>,
    /// `get_api_requests`.
    pub get: Arc<GetMetrics>,
    /// `put_api_requests`.
    pub put: Arc<PutMetrics>,
    /// `patch_api_requests`.
    pub patch: Arc<PatchMetrics>,
    /// `deprecated_api`.
    pub deprecated: Arc<DeprecatedApiMetrics>,
    /// `latencies_us`.
    pub latencies: Arc<LatencyMetrics>,
}

struct Output {
    file: File,
    options: Options,
    /// The end of a line that its reader has not taken.
    rest: Vec<u8>,
}

/// The sections that every line has, and where they would count if nothing did.
fn sections() -> [(&'static str, Arc<dyn Counters>); 15] {
    [
        ("balloon", Arc::new(BalloonMetrics::default())),
        ("block", Arc::new(BlockMetrics::default())),
        ("entropy", Arc::new(EntropyMetrics::default())),
        ("i8042", Arc::new(I8042Metrics::default())),
        ("interrupts", Arc::new(InterruptMetrics::default())),
        ("memory_hotplug", Arc::new(MemoryHotplugMetrics::default())),
        ("mmds", Arc::new(MmdsMetrics::default())),
        ("net", Arc::new(NetMetrics::default())),
        ("pmem", Arc::new(PmemMetrics::default())),
        ("seccomp", Arc::new(SeccompMetrics::default())),
        ("signals", Arc::new(SignalMetrics::default())),
        ("uart", Arc::new(UartMetrics::default())),
        ("vcpu", Arc::new(VcpuMetrics::default())),
        ("vmm", Arc::new(VmmMetrics::default())),
        ("vsock", Arc::new(VsockMetrics::default())),
    ]
}

impl Reporter {
    /// Writes nothing until it is told where.
    pub fn new(logger: &'static LoggerMetrics) -> Self {
        let api = Api::default();
        let sources = sections()
            .into_iter()
            .map(|(group, counters)| Source::new(group, counters))
            .chain([
                Source::new("api_server", api.server.clone()),
                Source::new("get_api_requests", api.get.clone()),
                Source::new("put_api_requests", api.put.clone()),
                Source::new("patch_api_requests", api.patch.clone()),
                Source::new("deprecated_api", api.deprecated.clone()),
                Source::new("latencies_us", api.latencies.clone()),
            ])
            .collect();
        Self {
            api,
            logger,
            sources,
            reported: HashMap::new(),
            output: None,
            due: None,
        }
    }

    /// Reports how long the start has taken until now.
    pub fn report_start(&self, times: StartTimes) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        if let Some(start) = times.start_us {
            let now =
                clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
            let took = micros(now).saturating_sub(start);
            self.api.server.process_startup_time_us.set(took);
        }
        if let Some(start) = times.start_cpu_us {
            let own = micros(cpu_time()).saturating_sub(start);
            let parent = times.parent_cpu_us.unwrap_or_default();
            let took = own.saturating_add(parent);
            self.api.server.process_startup_time_cpu_us.set(took);
        }
    }

    /// Reports also of these from now on.
    pub fn add(&mut self, sources: impl IntoIterator<Item = Source>) {
        self.sources.extend(sources);
    }

    /// A device of `group` has gone: it has no section of its own any more. What it has counted stays in its group's.
    pub fn retire(&mut self, group: &str, id: &str) {
        for source in &mut self.sources {
            if source.group == group && source.id.as_deref() == Some(id) {
                source.id = None;
            }
        }
    }

    /// Writes to `file` from now on, every [`INTERVAL`]. It should be opened with O_NONBLOCK, unless it
    /// is a regular file.
    pub fn start(&mut self, file: File, options: Options) {
        self.output = Some(Output {
            file,
            options,
            rest: Vec::new(),
        });
        self.due = Instant::now().checked_add(INTERVAL);
    }

    /// Whether [`Reporter::start`] was called.
    pub fn has_started(&self) -> bool {
        self.output.is_some()
    }

    /// When the next line is due; never before there is a file.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Writes a line if one is due.
    pub fn tick(&mut self, now: Instant) {
        if self.due.is_some_and(|due| due <= now) {
            self.due = now.checked_add(INTERVAL);
            // Counted as `metrics_fails`; the next line may fare better.
            let _ = self.flush();
        }
    }

    /// Writes a line now. Without a file it does nothing.
    ///
    /// # Errors
    /// When the file does not take it. A reader that is merely slow is no error.
    pub fn flush(&mut self) -> io::Result<()> {
        let Some(output) = &mut self.output else {
            return Ok(());
        };
        if let Err(error) = output.write_rest() {
            self.logger.metrics_fails.inc();
            return Err(error);
        }
        if !output.rest.is_empty() {
            self.logger.missed_metrics_count.inc();
            return Ok(());
        }
        let line = Line {
            options: &output.options,
            sections: collect(&self.sources, self.logger),
            reported: &self.reported,
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        let reported = line
            .sections
            .into_iter()
            .map(|section| (section.name, section.totals))
            .collect();
        output.rest = text;
        let length = output.rest.len();
        match output.write_rest() {
            Ok(()) if output.rest.len() == length => {
                // Not a byte of it: the next line says it instead.
                output.rest.clear();
                self.logger.missed_metrics_count.inc();
                Ok(())
            }
            Ok(()) => {
                self.reported = reported;
                Ok(())
            }
            Err(error) => {
                output.rest.clear();
                self.logger.metrics_fails.inc();
                Err(error)
            }
        }
    }
}

impl Output {
    /// Writes what it takes of the rest.
    fn write_rest(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.file.write(&self.rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.rest.drain(..count.min(self.rest.len()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A section as it is now: fields, and the totals among them as plain numbers.
struct Section {
    name: String,
    fields: Vec<(&'static str, Reading)>,
    totals: Vec<u64>,
}

impl Section {
    fn new(name: String, fields: Vec<(&'static str, Reading)>) -> Self {
        let totals = fields.iter().map(|(_, reading)| match *reading {
            Reading::Total(total) => total,
            Reading::Value(_) => 0,
            Reading::Latency { sum, .. } => sum,
        });
        let totals = totals.collect();
        Self {
            name,
            fields,
            totals,
        }
    }
}

/// Every section by name: a group's own, which sums up its sources, and one for each device.
fn collect(sources: &[Source], logger: &LoggerMetrics) -> Vec<Section> {
    let mut groups: BTreeMap<&str, Vec<(&'static str, Reading)>> = BTreeMap::new();
    let mut devices = Vec::new();
    groups.insert("logger", logger.read());
    for source in sources {
        let fields = source.counters.read();
        if let Some(id) = &source.id {
            let name = format!("{}_{id}", source.group);
            devices.push(Section::new(name, fields.clone()));
        }
        match groups.get_mut(source.group) {
            None => {
                groups.insert(source.group, fields);
            }
            Some(sums) => {
                for ((_, sum), (_, reading)) in sums.iter_mut().zip(fields) {
                    *sum = add(*sum, reading);
                }
            }
        }
    }
    let groups = groups
        .into_iter()
        .map(|(name, fields)| Section::new(name.to_owned(), fields));
    groups.chain(devices).collect()
}

fn add(left: Reading, right: Reading) -> Reading {
    use Reading::{Latency, Total, Value};
    match (left, right) {
        (Total(a), Total(b)) => Total(a.wrapping_add(b)),
        (Value(a), Value(b)) => Value(a.max(b)),
        (
            Latency { min, max, sum },
            Latency {
                min: other_min,
                max: other_max,
                sum: other_sum,
            },
        ) => Latency {
            min: match (min, other_min) {
                (0, other) | (other, 0) => other,
                (a, b) => a.min(b),
            },
            max: max.max(other_max),
            sum: sum.wrapping_add(other_sum),
        },
        // Sources of one group have the same fields.
        (left, _) => left,
    }
}

struct Line<'a> {
    options: &'a Options,
    sections: Vec<Section>,
    reported: &'a HashMap<String, Vec<u64>>,
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("utc_timestamp_ms", &now)?;
        if let Some(id) = &self.options.id {
            map.serialize_entry("id", id)?;
        }
        if let Some(properties) = &self.options.properties {
            map.serialize_entry("properties", properties)?;
        }
        for section in &self.sections {
            let before = self.reported.get(&section.name);
            let before = before.map(Vec::as_slice).unwrap_or_default();
            map.serialize_entry(&section.name, &Difference { section, before })?;
        }
        map.end()
    }
}

/// What a section says: differences of counters, values as they are.
struct Difference<'a> {
    section: &'a Section,
    before: &'a [u64],
}

impl Serialize for Difference<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.section.fields.len()))?;
        for (at, (name, reading)) in self.section.fields.iter().enumerate() {
            let before = self.before.get(at).copied().unwrap_or_default();
            match *reading {
                Reading::Total(total) => map.serialize_entry(name, &since(before, total))?,
                Reading::Value(value) => map.serialize_entry(name, &value)?,
                Reading::Latency { min, max, sum } => {
                    let sum_us = since(before, sum);
                    map.serialize_entry(
                        name,
                        &LatencyFields {
                            min_us: min,
                            max_us: max,
                            sum_us,
                        },
                    )?;
                }
            }
        }
        map.end()
    }
}

/// How much `total` is more than `before`; all of it where the counter is another one, which began
/// again at zero.
fn since(before: u64, total: u64) -> u64 {
    total.checked_sub(before).unwrap_or(total)
}

#[derive(serde::Serialize)]
struct LatencyFields {
    min_us: u64,
    max_us: u64,
    sum_us: u64,
}

#[cfg(test)]
#[path = "reporter_tests.rs"]
mod tests;
