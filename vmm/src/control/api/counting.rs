//! What the API counts of the requests that it answers.

use std::time::Instant;

use super::http::Method;
use crate::metrics::fields::{GetMetrics, PatchMetrics, PutMetrics};
use crate::metrics::{self, Counter};

/// Counts a request for `path`, and whether it was refused.
pub fn count(api: &metrics::Api, method: Method, path: &str, refused: bool) {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let parts = (parts.next().unwrap_or_default(), parts.next());
    let counters = match method {
        Method::Get => get(&api.get, parts).map(|count| (count, None)),
        Method::Put => put(&api.put, parts).map(|(count, fails)| (count, Some(fails))),
        Method::Patch => patch(&api.patch, parts).map(|(count, fails)| (count, Some(fails))),
        Method::Delete => None,
    };
    let Some((count, fails)) = counters else {
        return;
    };
    count.inc();
    if let Some(fails) = fails.filter(|_| refused) {
        fails.inc();
    }
}

/// Says how long stopping or going on took.
pub fn state_changed(api: &metrics::Api, paused: bool, start: Instant) {
    let took = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    let latencies = &api.latencies;
    let (seen, done) = if paused {
        (&latencies.pause_vm, &latencies.vmm_pause_vm)
    } else {
        (&latencies.resume_vm, &latencies.vmm_resume_vm)
    };
    // The thread that serves the API is the one that does it.
    seen.set(took);
    done.set(took);
}

type Parts<'a> = (&'a str, Option<&'a str>);

fn get<'a>(metrics: &'a GetMetrics, parts: Parts<'_>) -> Option<&'a Counter> {
    Some(match parts {
        ("", None) => &metrics.instance_info_count,
        ("version", None) => &metrics.vmm_version_count,
        ("machine-config", None) => &metrics.machine_cfg_count,
        ("mmds", None) => &metrics.mmds_count,
        ("hotplug", Some("memory")) => &metrics.hotplug_memory_count,
        _ => return None,
    })
}

fn put<'a>(metrics: &'a PutMetrics, parts: Parts<'_>) -> Option<(&'a Counter, &'a Counter)> {
    let m = metrics;
    Some(match parts {
        ("actions", _) => (&m.actions_count, &m.actions_fails),
        ("boot-source", _) => (&m.boot_source_count, &m.boot_source_fails),
        ("drives", _) => (&m.drive_count, &m.drive_fails),
        ("logger", _) => (&m.logger_count, &m.logger_fails),
        ("machine-config", _) => (&m.machine_cfg_count, &m.machine_cfg_fails),
        ("cpu-config", _) => (&m.cpu_cfg_count, &m.cpu_cfg_fails),
        ("metrics", _) => (&m.metrics_count, &m.metrics_fails),
        ("network-interfaces", _) => (&m.network_count, &m.network_fails),
        ("mmds", _) => (&m.mmds_count, &m.mmds_fails),
        ("vsock", _) => (&m.vsock_count, &m.vsock_fails),
        ("pmem", _) => (&m.pmem_count, &m.pmem_fails),
        ("serial", _) => (&m.serial_count, &m.serial_fails),
        ("hotplug", Some("memory")) => (&m.hotplug_memory_count, &m.hotplug_memory_fails),
        _ => return None,
    })
}

fn patch<'a>(metrics: &'a PatchMetrics, parts: Parts<'_>) -> Option<(&'a Counter, &'a Counter)> {
    let m = metrics;
    Some(match parts {
        ("drives", _) => (&m.drive_count, &m.drive_fails),
        ("network-interfaces", _) => (&m.network_count, &m.network_fails),
        ("machine-config", _) => (&m.machine_cfg_count, &m.machine_cfg_fails),
        ("mmds", _) => (&m.mmds_count, &m.mmds_fails),
        ("hotplug", Some("memory")) => (&m.hotplug_memory_count, &m.hotplug_memory_fails),
        ("pmem", _) => (&m.pmem_count, &m.pmem_fails),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_refusals_are_counted_apart() {
        let api = metrics::Api::default();
        count(&api, Method::Put, "/drives/root", false);
        count(&api, Method::Put, "/drives/data", true);
        count(&api, Method::Patch, "/drives/data", true);
        count(&api, Method::Get, "/", false);
        count(&api, Method::Put, "/nothing", true);
        assert_eq!(
            (api.put.drive_count.total(), api.put.drive_fails.total()),
            (2, 1)
        );
        assert_eq!(api.patch.drive_fails.total(), 1);
        assert_eq!(api.get.instance_info_count.total(), 1);
    }
}
