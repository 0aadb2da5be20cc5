//! Figures of a run: as a table for people, as JSON for programs.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::server::Weight;

/// What one run found out.
pub(crate) struct Figures {
    run: &'static str,
    rows: Vec<(String, f64, &'static str)>,
}

impl Figures {
    pub(crate) fn of(run: &'static str) -> Self {
        Self { run, rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, name: &str, value: f64, unit: &'static str) {
        self.rows.push((name.into(), value, unit));
    }

    pub(crate) fn add_count(&mut self, name: &str, value: usize) {
        self.add(name, value as f64, "");
    }

    /// Median, the tail and the slowest.
    pub(crate) fn add_times(&mut self, name: &str, mut times: Vec<Duration>) {
        times.sort_unstable();
        self.add(&format!("{name} count"), times.len() as f64, "");
        for (label, share) in [("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0)] {
            let at = ((times.len() as f64 * share).ceil() as usize).max(1) - 1;
            if let Some(time) = times.get(at) {
                self.add(&format!("{name} {label}"), time.as_secs_f64() * 1e3, "ms");
            }
        }
    }

    /// The tail alone.
    pub(crate) fn add_p99(&mut self, name: &str, mut times: Vec<Duration>) {
        times.sort_unstable();
        let at = ((times.len() as f64 * 0.99).ceil() as usize).max(1) - 1;
        if let Some(time) = times.get(at) {
            self.add(&format!("{name} p99"), time.as_secs_f64() * 1e3, "ms");
        }
    }

    /// What the server has used between two looks, and what it holds at the second.
    pub(crate) fn add_weight(
        &mut self,
        before: Weight,
        after: Weight,
        over: Duration,
        nodes: usize,
    ) {
        let cpu = after.cpu.saturating_sub(before.cpu);
        self.add("server cpu", cpu.as_secs_f64(), "s");
        self.add("server cpu share of a core", 100.0 * cpu.as_secs_f64() / over.as_secs_f64(), "%");
        self.add_memory(after, nodes);
    }

    pub(crate) fn add_memory(&mut self, weight: Weight, nodes: usize) {
        self.add("server rss", weight.rss_bytes as f64 / 1e6, "MB");
        self.add("server peak rss", weight.peak_rss_bytes as f64 / 1e6, "MB");
        self.add("server rss per node", weight.rss_bytes as f64 / 1024.0 / nodes as f64, "KiB");
    }

    /// The figure with this name.
    #[allow(dead_code, reason = "the program prints all of them, the tests look at some")]
    pub(crate) fn get(&self, name: &str) -> f64 {
        let row = self.rows.iter().find(|row| row.0 == name);
        row.unwrap_or_else(|| crate::die("a figure", &name)).1
    }

    pub(crate) fn json(&self) -> Value {
        let rows: Map<String, Value> = self
            .rows
            .iter()
            .map(|(name, value, unit)| {
                let key = format!("{name} {unit}").trim().replace(' ', "_").replace('%', "percent");
                (key, json!((value * 1e3).round() / 1e3))
            })
            .collect();
        json!({ "schema": 1, "run": self.run, "figures": rows })
    }

    pub(crate) fn table(&self) -> String {
        let mut text = format!("{}\n", self.run);
        for (name, value, unit) in &self.rows {
            let digits = if value.fract() == 0.0 { 0 } else { 1 };
            text.push_str(&format!("  {name:<34}{value:>12.digits$} {unit}\n"));
        }
        text
    }
}
