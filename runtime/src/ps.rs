//! `casemate ps`: the machines that run.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::cli::PsArgs;
use crate::places::Places;
use crate::state;

/// Prints them.
pub fn run(args: &PsArgs) -> io::Result<()> {
    let records = state::list(&Places::from_env());
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &records)?;
        return writeln!(out);
    }
    if args.quiet {
        return records
            .iter()
            .try_for_each(|record| writeln!(out, "{}", record.id));
    }
    writeln!(
        out,
        "{:<20} {:>8} {:>4} {:>8} {:>8}  COMMAND",
        "ID", "UID", "CPUS", "MEMORY", "AGE"
    )?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    for record in records {
        // A command may hold anything; one line each, whatever it is.
        let command: String = record
            .command
            .join(" ")
            .chars()
            .filter(|c| !c.is_control())
            .take(60)
            .collect();
        let age = format!("{}s", now.saturating_sub(record.created));
        let memory = format!("{}M", record.memory_mib);
        writeln!(
            out,
            "{:<20} {:>8} {:>4} {memory:>8} {age:>8}  {command}",
            record.id.to_string(),
            record.uid,
            record.cpus
        )?;
    }
    Ok(())
}
