//! Sizes and durations as people write them.

use std::time::Duration;

/// Longest duration accepted: a hundred days.
const MAX_SECONDS: f64 = 100.0 * 24.0 * 3600.0;
/// Greatest guest memory accepted, in MiB: 16 TiB.
const MAX_MEMORY_MIB: u64 = 16 << 20;

/// Reads `512`, `512M` or `2G` as MiB.
pub fn parse_memory_mib(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.strip_suffix(['M', 'm']) {
        Some(digits) => (digits, 1),
        None => match text.strip_suffix(['G', 'g']) {
            Some(digits) => (digits, 1024),
            None => (text, 1),
        },
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .filter(|mib| (1..=MAX_MEMORY_MIB).contains(mib))
        .ok_or_else(|| {
            "a whole number of MiB from 1 to 16 TiB, such as 512, 512M or 2G".to_string()
        })
}

/// Reads `90`, `0.5`, `30s`, `200ms`, `5m`, `2h` or `1d`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let units = [
        ("ms", 0.001),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
        ("d", 86400.0),
    ];
    let (digits, factor) = units
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))
        .unwrap_or((text, 1.0));
    digits
        .parse::<f64>()
        .ok()
        .map(|number| number * factor)
        .filter(|seconds| (0.0..=MAX_SECONDS).contains(seconds) && *seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| {
            "a positive duration of at most 100 days, such as 90, 30s, 200ms, 5m or 2h".to_string()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory() {
        assert_eq!(parse_memory_mib("128"), Ok(128));
        assert_eq!(parse_memory_mib("128M"), Ok(128));
        assert_eq!(parse_memory_mib("2g"), Ok(2048));
        for bad in [
            "",
            "0",
            "M",
            "-1",
            "1.5G",
            "99999999999999999999",
            "18446744073709551615G",
            "1T",
        ] {
            assert!(parse_memory_mib(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("200ms"), Ok(Duration::from_millis(200)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["", "0", "-5", "NaN", "inf", "1e99", "5x", "101d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
