//! The text format of Prometheus, version 0.0.4.

use std::fmt::{Display, Write};
use std::time::Duration;

/// A page of metrics, family by family.
#[derive(Debug, Clone, Default)]
pub struct Page(String);

/// A family whose values are being written.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
}

impl Page {
    /// A number that only rises while the daemon runs; its name ends in `_total`.
    pub fn counter(&mut self, name: &'static str, help: &str) -> Family<'_> {
        debug_assert!(name.ends_with("_total"), "{name}");
        self.family(name, "counter", help)
    }

    /// A number that rises and falls.
    pub fn gauge(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, "gauge", help)
    }

    /// How long something took, each time.
    pub fn durations(&mut self, name: &'static str, help: &str, durations: &Durations) {
        let Family { text, .. } = self.family(name, "histogram", help);
        let mut below = 0;
        for (bound, count) in BOUNDS_S.iter().zip(durations.counts) {
            below += count;
            sample(text, &format!("{name}_bucket"), &[("le", &bound.to_string())], below);
        }
        sample(text, &format!("{name}_bucket"), &[("le", "+Inf")], durations.count);
        sample(text, &format!("{name}_sum"), &[], durations.sum.as_secs_f64());
        sample(text, &format!("{name}_count"), &[], durations.count);
    }

    /// What every daemon tells of itself; `started` in seconds since 1970.
    pub fn process(&mut self, started: u64) {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        self.gauge("overlay_build_info", "The version of the program.").value(&version, 1);
        self.gauge("process_start_time_seconds", "When it was started, in seconds since 1970.")
            .value(&[], started);
    }

    /// The text of the page.
    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }

    fn family(&mut self, name: &'static str, kind: &str, help: &str) -> Family<'_> {
        let help = help.replace('\\', r"\\").replace('\n', r"\n");
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Family { text: &mut self.0, name }
    }
}

impl Family<'_> {
    /// One value, told apart by its labels.
    pub fn value(&mut self, labels: &[(&str, &str)], value: impl Display) -> &mut Self {
        sample(self.text, self.name, labels, value);
        self
    }
}

fn sample(text: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    text.push_str(name);
    for (number, (label, value)) in labels.iter().enumerate() {
        text.push(if number == 0 { '{' } else { ',' });
        let value = value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
        let _ = write!(text, "{label}=\"{value}\"");
    }
    if !labels.is_empty() {
        text.push('}');
    }
    let _ = writeln!(text, " {value}");
}

/// Bounds for a write to disk, in seconds: a fast one takes half a millisecond, a sick one seconds.
const BOUNDS_S: [f64; 11] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

/// Durations of writes to disk, counted by length.
#[derive(Debug, Clone, Default)]
pub struct Durations {
    counts: [u64; BOUNDS_S.len()],
    count: u64,
    sum: Duration,
}

impl Durations {
    /// Counts one.
    pub fn add(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        let fitting = BOUNDS_S.iter().position(|bound| seconds <= *bound);
        if let Some(count) = fitting.and_then(|at| self.counts.get_mut(at)) {
            *count += 1;
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_written_as_the_format_wants_it() {
        let mut page = Page::default();
        page.counter("overlay_x_total", "A \\ and\na line.")
            .value(&[("a", "quote \" slash \\ line \n"), ("b", "2")], 7)
            .value(&[], u64::MAX);
        page.gauge("overlay_y_seconds", "Y.").value(&[], 0.25);
        assert_eq!(
            page.into_text(),
            "# HELP overlay_x_total A \\\\ and\\na line.\n# TYPE overlay_x_total counter\n\
             overlay_x_total{a=\"quote \\\" slash \\\\ line \\n\",b=\"2\"} 7\n\
             overlay_x_total 18446744073709551615\n\
             # HELP overlay_y_seconds Y.\n# TYPE overlay_y_seconds gauge\noverlay_y_seconds 0.25\n"
        );
    }

    #[test]
    fn buckets_hold_all_that_is_shorter() {
        let mut durations = Durations::default();
        for millis in [1, 1, 4, 60_000] {
            durations.add(Duration::from_millis(millis));
        }
        let mut page = Page::default();
        page.durations("took_seconds", "T.", &durations);
        let text = page.into_text();
        for line in [
            "took_seconds_bucket{le=\"0.0005\"} 0",
            "took_seconds_bucket{le=\"0.001\"} 2",
            "took_seconds_bucket{le=\"0.005\"} 3",
            "took_seconds_bucket{le=\"5\"} 3",
            "took_seconds_bucket{le=\"+Inf\"} 4",
            "took_seconds_sum 60.006",
            "took_seconds_count 4",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
        }
    }
}
