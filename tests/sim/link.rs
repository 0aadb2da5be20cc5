//! The line between an edge and the internet: how long a datagram takes, and whether it arrives.
//!
//! Knows no addresses: the world asks for each datagram and does what it is told. The control
//! connection uses the latency only, as TCP hides the rest.

use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;

/// The quality of a line, the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line {
    /// One way.
    pub(crate) latency: Duration,
    /// Up to so much is added to each datagram.
    pub(crate) jitter: Duration,
    /// Of a thousand datagrams, so many vanish.
    pub(crate) loss_permille: u32,
    /// Of a thousand datagrams, so many come twice.
    pub(crate) twice_permille: u32,
    /// Of a thousand datagrams, so many are held back and come after later ones.
    pub(crate) late_permille: u32,
}

impl Line {
    /// A line that only takes time.
    pub(crate) fn clean(latency: Duration) -> Self {
        Self {
            latency,
            jitter: Duration::ZERO,
            loss_permille: 0,
            twice_permille: 0,
            late_permille: 0,
        }
    }

    /// The same line on a good day: nothing is lost.
    pub(crate) fn calm(self) -> Self {
        Self { loss_permille: 0, ..self }
    }

    /// When the copies of one datagram arrive, as delays; none when it is lost.
    pub(crate) fn delays(&self, rng: &mut StdRng) -> Vec<Duration> {
        let chance = |rng: &mut StdRng, permille: u32| rng.random_range(0..1000) < permille;
        if chance(rng, self.loss_permille) {
            return Vec::new();
        }
        let copies = if chance(rng, self.twice_permille) { 2 } else { 1 };
        (0..copies).map(|_| self.delay(rng)).collect()
    }

    fn delay(&self, rng: &mut StdRng) -> Duration {
        let jitter_us = u64::try_from(self.jitter.as_micros()).unwrap_or(0);
        let jitter = Duration::from_micros(rng.random_range(0..=jitter_us));
        let held = rng.random_range(0..1000) < self.late_permille;
        self.latency + jitter + if held { HELD } else { Duration::ZERO }
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { latency, jitter, loss_permille, twice_permille, late_permille } = self;
        write!(
            f,
            "{latency:?} + {jitter:?}, per 1000: {loss_permille} lost, {twice_permille} twice, \
             {late_permille} late"
        )
    }
}

/// Longer than the gap between the packets of a burst, shorter than any timer looks.
const HELD: Duration = Duration::from_millis(25);
