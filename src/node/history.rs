//! What became of the paths to one peer: changes with their cause, round trips, and how long each
//! kind of path carried data. Bounded; it lives as long as the daemon.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::path::Via;

/// Changes that are kept.
const MAX_CHANGES: usize = 64;
/// Paths whose round trips are kept.
const MAX_PATHS: usize = 16;

/// Data went another way from here on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathChange {
    /// When.
    pub at: Instant,
    /// Before.
    pub from: Option<Via>,
    /// After.
    pub to: Option<Via>,
    /// The cause.
    pub cause: &'static str,
    /// The smoothed round trip on the new path at that time.
    pub rtt: Option<Duration>,
}

/// The round trips that were measured on one path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PathRecord {
    /// Which one; our own address does not count, and of the sockets only those of uplinks.
    pub via: Via,
    /// How many round trips.
    pub samples: u64,
    /// The shortest.
    pub rtt_min: Duration,
    /// Their mean.
    pub rtt_avg: Duration,
    /// The newest one.
    pub last: Instant,
    /// Share of lost packets when it was measured last, 0 to 1; none when it never was.
    pub loss: Option<f64>,
}

/// How long data had which kind of path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PathTimes {
    /// Straight.
    pub direct: Duration,
    /// By the server.
    pub relayed: Duration,
    /// None at all.
    pub without: Duration,
}

/// The history of one peer.
#[derive(Debug, Clone)]
pub struct History {
    changes: VecDeque<PathChange>,
    paths: Vec<PathRecord>,
    times: PathTimes,
    current: Option<Via>,
    since: Instant,
    started: Instant,
}

impl History {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            changes: VecDeque::new(),
            paths: Vec::new(),
            times: PathTimes::default(),
            current: None,
            since: now,
            started: now,
        }
    }

    pub(super) fn note_change(&mut self, change: PathChange) {
        self.times = self.times(change.at);
        self.current = change.to;
        self.since = change.at;
        if self.changes.len() == MAX_CHANGES {
            self.changes.pop_front();
        }
        self.changes.push_back(change);
    }

    /// Takes an answer on a path, and how many of a thousand packets were lost there lately.
    pub(super) fn note_answer(
        &mut self,
        via: Via,
        rtt: Duration,
        loss_permille: Option<u16>,
        now: Instant,
    ) {
        let via = by_remote(via);
        let loss = loss_permille.map(|permille| f64::from(permille) / 1000.0);
        if let Some(record) = self.paths.iter_mut().find(|record| record.via == via) {
            record.samples += 1;
            record.rtt_min = record.rtt_min.min(rtt);
            let count = record.samples as f64;
            record.rtt_avg = record.rtt_avg.mul_f64((count - 1.0) / count) + rtt.div_f64(count);
            record.last = now;
            record.loss = loss.or(record.loss);
            return;
        }
        if self.paths.len() == MAX_PATHS
            && let Some(oldest) = (0..MAX_PATHS).min_by_key(|place| self.paths[*place].last)
        {
            self.paths.swap_remove(oldest);
        }
        let (rtt_min, rtt_avg) = (rtt, rtt);
        self.paths.push(PathRecord { via, samples: 1, rtt_min, rtt_avg, last: now, loss });
    }

    /// The machine was suspended for so long, in which no time went by on the clock that this is written
    /// with: all that was before is longer ago than that clock says. A path carried nothing meanwhile, so
    /// the times by kind of path stay.
    pub(super) fn handle_sleep(&mut self, away: Duration) {
        let earlier = |at: Instant| at.checked_sub(away).unwrap_or(at);
        self.started = earlier(self.started);
        for change in &mut self.changes {
            change.at = earlier(change.at);
        }
        for path in &mut self.paths {
            path.last = earlier(path.last);
        }
    }

    /// The changes, oldest first; the last 64.
    pub fn changes(&self) -> impl Iterator<Item = &PathChange> {
        self.changes.iter()
    }

    /// The paths that answered, in no order; 16 at the most.
    #[must_use]
    pub fn paths(&self) -> &[PathRecord] {
        &self.paths
    }

    /// The times up to now.
    #[must_use]
    pub fn times(&self, now: Instant) -> PathTimes {
        let mut times = self.times;
        let slot = match self.current {
            Some(Via::Direct { .. }) => &mut times.direct,
            Some(Via::RelayUdp | Via::RelayTcp) => &mut times.relayed,
            None => &mut times.without,
        };
        *slot += now.saturating_duration_since(self.since);
        times
    }

    /// Since when this is written.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }
}

fn by_remote(via: Via) -> Via {
    match via {
        Via::Direct { remote, socket, .. } => Via::Direct { remote, local: None, socket },
        relay => relay,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    fn direct(port: u16) -> Via {
        let remote = std::net::SocketAddr::new("198.51.100.7".parse().unwrap(), port);
        let socket = crate::types::SocketId::MAIN;
        Via::Direct { remote, local: "192.168.1.2".parse().ok(), socket }
    }

    fn change(seconds: u64, from: Option<Via>, to: Option<Via>) -> PathChange {
        let at = epoch() + Duration::from_secs(seconds);
        PathChange { at, from, to, cause: "a test", rtt: None }
    }

    #[test]
    fn times_are_counted_by_kind_of_path() {
        let mut history = History::new(epoch());
        history.note_change(change(2, None, Some(Via::RelayUdp)));
        history.note_change(change(5, Some(Via::RelayUdp), Some(direct(1))));
        history.note_change(change(15, Some(direct(1)), Some(Via::RelayTcp)));
        let times = history.times(epoch() + Duration::from_secs(16));
        let seconds = |time: Duration| time.as_secs();
        assert_eq!(
            (seconds(times.direct), seconds(times.relayed), seconds(times.without)),
            (10, 4, 2)
        );
    }

    #[test]
    fn only_the_newest_changes_and_paths_are_kept() {
        let mut history = History::new(epoch());
        for second in 0..100 {
            history.note_change(change(second, None, Some(direct(1))));
            let at = epoch() + Duration::from_secs(second);
            let port = u16::try_from(second).unwrap() + 1;
            history.note_answer(direct(port), Duration::from_millis(5), None, at);
        }
        assert_eq!(history.changes().count(), MAX_CHANGES);
        assert_eq!(history.changes().next().unwrap().at, epoch() + Duration::from_secs(36));
        assert_eq!(history.paths().len(), MAX_PATHS);
        assert!(history.paths().iter().all(|path| path.last >= epoch() + Duration::from_secs(84)));
    }

    #[test]
    fn what_was_before_a_sleep_is_longer_ago() {
        let seconds = Duration::from_secs;
        let start = epoch() + seconds(100_000);
        let mut history = History::new(start);
        let at = start + seconds(5);
        history.note_change(PathChange {
            at,
            from: None,
            to: Some(direct(1)),
            cause: "",
            rtt: None,
        });
        history.note_answer(direct(1), seconds(1), None, start + seconds(8));
        history.handle_sleep(seconds(3600));
        let now = start + seconds(10);
        let ago = |at: Instant| (now - at).as_secs();
        assert_eq!(history.changes().map(|change| ago(change.at)).collect::<Vec<_>>(), [3605]);
        assert_eq!(ago(history.paths()[0].last), 3602);
        assert_eq!(ago(history.started()), 3610);
        let times = history.times(now);
        assert_eq!((times.direct, times.without), (seconds(5), seconds(5)), "asleep is no path");
    }

    #[test]
    fn round_trips_have_their_shortest_and_their_mean() {
        let mut history = History::new(epoch());
        for ms in [10, 20, 30] {
            history.note_answer(direct(1), Duration::from_millis(ms), Some(50), epoch());
        }
        let [path] = history.paths() else { panic!("one path") };
        assert_eq!((path.samples, path.rtt_min), (3, Duration::from_millis(10)));
        assert_eq!(path.loss, Some(0.05));
        assert!((path.rtt_avg.as_secs_f64() - 0.02).abs() < 1e-6, "{:?}", path.rtt_avg);
    }
}
