//! Data goes to stdout, all else to stderr. A reader that went away ends the command quietly.

use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::Done;
use super::fail::Failure;

/// Writes a line of data.
pub(super) fn line(text: impl std::fmt::Display) -> Done {
    match write(text) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.map_err(|error| unwritable(&error)),
    }
}

/// Writes a line of data that a daemon has to tell; it goes on when nobody reads it.
pub(super) fn line_of_daemon(text: impl std::fmt::Display) -> Done {
    match write(text) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|error| unwritable(&error)),
    }
}

fn write(text: impl std::fmt::Display) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush())
}

fn unwritable(error: &std::io::Error) -> Failure {
    Failure::caused_by(
        "the result cannot be written to standard output",
        error,
        "look at where the output goes (a full disk: df -h), then type the command again",
    )
}

/// Tells people on stderr what programs do not want to read.
pub(super) fn hint(text: impl std::fmt::Display) {
    // When stderr is closed nobody misses it.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Writes a value as one line of JSON.
pub(super) fn json(value: &impl Serialize) -> Done {
    let text = serde_json::to_string(value).map_err(|error| {
        Failure::caused_by(
            "the result cannot be written as JSON",
            &error,
            "type the command without --json",
        )
    })?;
    line(text)
}

/// Writes how a command failed.
pub(super) fn failure(failure: &Failure) {
    hint(failure);
}

/// A table of plain aligned columns, easy on `grep` and `awk`.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.to_vec());
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// A table as text, without blanks at the ends of lines.
pub(super) fn table_text(table: &Table) -> String {
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_string()).collect();
    lines.join("\n")
}

/// A number of bytes for people.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
