//! A host's end of the control connection: made, lost, made again with growing waits, as the
//! daemon does it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use overlay::io::link::token_grace;
use overlay::server::ConnectionId;
use overlay::wire::control::SILENCE_LIMIT_S;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::host::spread;
use crate::uplinks::Way;

/// What the connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The node does not run.
    Off,
    /// The next attempt is made then.
    Waiting(Instant),
    /// An attempt of this number is under way, and given up then.
    Connecting(u64, Instant),
    /// There is one; something was heard on it then.
    Connected(ConnectionId, Instant),
}

/// The control connection, as the host sees it.
#[derive(Debug)]
pub(crate) struct ControlLink {
    phase: Phase,
    wait: Duration,
    attempts: u64,
    /// How many ways are tried in the attempt under way.
    open: usize,
    /// An attempt at a connection by another way, in place of the one there is.
    better: Option<u64>,
    ways: BTreeMap<ConnectionId, Way>,
    /// The interface of the further uplink by which the server is known to answer.
    pub(crate) favoured: Option<usize>,
    opened_at: Option<Instant>,
    /// TCP is through, and a token is waited for until then.
    tcp_until: Option<Instant>,
    tried_at: Option<Instant>,
    /// The server has made this connection and said something on it already.
    pub(crate) opening: Option<ConnectionId>,
    rng: StdRng,
    /// Nothing gets through to the server's TCP port.
    pub(crate) cut: bool,
    /// In-order delivery: nothing arrives before what was sent earlier.
    pub(crate) up_free_at: Option<Instant>,
    pub(crate) down_free_at: Option<Instant>,
}

impl ControlLink {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            phase: Phase::Off,
            wait: MIN_WAIT,
            attempts: 0,
            open: 0,
            better: None,
            ways: BTreeMap::new(),
            favoured: None,
            opened_at: None,
            tcp_until: None,
            tried_at: None,
            opening: None,
            rng: StdRng::from_seed(spread(seed, 3)),
            cut: false,
            up_free_at: None,
            down_free_at: None,
        }
    }

    pub(crate) fn start(&mut self, now: Instant) {
        self.wait = MIN_WAIT;
        self.better = None;
        self.phase = Phase::Waiting(now);
    }

    pub(crate) fn stop(&mut self) {
        self.phase = Phase::Off;
    }

    /// The connection that is up.
    pub(crate) fn connection(&self) -> Option<ConnectionId> {
        match self.phase {
            Phase::Connected(connection, _) => Some(connection),
            Phase::Off | Phase::Waiting(_) | Phase::Connecting(..) => None,
        }
    }

    /// The way that a connection goes.
    pub(crate) fn way(&self, connection: ConnectionId) -> Way {
        self.ways.get(&connection).copied().unwrap_or_default()
    }

    /// The server has made a connection, by this way.
    pub(crate) fn note_way(&mut self, connection: ConnectionId, way: Way) {
        self.ways.insert(connection, way);
    }

    /// The number of an attempt at a connection that replaces the one there is.
    pub(crate) fn improve(&mut self) -> u64 {
        self.attempts += 1;
        self.better = Some(self.attempts);
        self.attempts
    }

    /// Whether an attempt is one at a better connection than there is.
    pub(crate) fn is_better(&self, attempt: u64) -> bool {
        self.better == Some(attempt)
    }

    /// The attempt under way goes by one more way, a little later.
    pub(crate) fn try_another(&mut self, later: Duration) {
        self.open += 1;
        if let Phase::Connecting(_, until) = &mut self.phase {
            *until += later;
        }
    }

    /// Since when there is the connection that is up.
    pub(crate) fn connected_since(&self) -> Option<Instant> {
        self.connection().and(self.opened_at)
    }

    /// When [`Self::handle_timeout`] has something to do.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match self.phase {
            Phase::Off => None,
            Phase::Waiting(at) => Some(at),
            Phase::Connecting(_, at) => Some(self.tcp_until.map_or(at, |until| until.min(at))),
            Phase::Connected(_, heard) => Some(heard + Duration::from_secs(SILENCE_LIMIT_S)),
        }
    }

    /// Does what is due.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Due {
        if self.poll_timeout().is_none_or(|at| at > now) {
            return Due::Nothing;
        }
        match self.phase {
            Phase::Waiting(_) => {
                self.attempts += 1;
                self.open = 1;
                self.phase = Phase::Connecting(self.attempts, now + CONNECT_LIMIT);
                (self.tried_at, self.tcp_until, self.opening) = (Some(now), None, None);
                Due::Connect(self.attempts)
            }
            Phase::Connecting(attempt, _) if self.tcp_until.take().is_some() => {
                Due::Upgrade(attempt)
            }
            Phase::Connecting(..) => {
                self.retry(now);
                Due::Nothing
            }
            Phase::Connected(..) => {
                self.retry(now);
                Due::Lost
            }
            Phase::Off => Due::Nothing,
        }
    }

    /// TCP is through: tells whether the upgrade goes out now, and it does in a moment if not, or when
    /// there is a token.
    pub(crate) fn handle_tcp(&mut self, attempt: u64, has_token: bool, now: Instant) -> bool {
        let wanted = matches!(self.phase, Phase::Connecting(current, _) if current == attempt);
        let took = self.tried_at.map_or(Duration::ZERO, |at| now - at);
        self.tcp_until = (wanted && !has_token).then(|| now + token_grace(took));
        wanted && has_token
    }

    /// There is a token: the upgrade that waits for it, if one does.
    pub(crate) fn handle_token(&mut self) -> Option<u64> {
        self.tcp_until.take()?;
        match self.phase {
            Phase::Connecting(attempt, _) => Some(attempt),
            Phase::Off | Phase::Waiting(_) | Phase::Connected(..) => None,
        }
    }

    /// The server has made a connection of the attempt of this number and talks on it.
    pub(crate) fn handle_opening(&mut self, attempt: u64, connection: ConnectionId) {
        if matches!(self.phase, Phase::Connecting(current, _) if current == attempt) {
            self.opening = Some(connection);
        }
    }

    /// The attempt of this number has led to a connection; tells whether anybody still wants it.
    pub(crate) fn handle_opened(
        &mut self,
        attempt: u64,
        connection: ConnectionId,
        now: Instant,
    ) -> bool {
        let first = matches!(self.phase, Phase::Connecting(current, _) if current == attempt);
        let wanted = first || self.connection().is_some() && self.better == Some(attempt);
        if wanted {
            self.better = None;
            self.phase = Phase::Connected(connection, now);
            (self.opened_at, self.opening) = (Some(now), None);
        }
        wanted
    }

    /// The attempt of this number has failed.
    pub(crate) fn handle_failed(&mut self, attempt: u64, now: Instant) {
        if matches!(self.phase, Phase::Connecting(current, _) if current == attempt) {
            self.open -= 1;
            if self.open == 0 {
                self.retry(now);
            }
        }
    }

    /// Something came on the connection; tells whether it is the one that counts.
    pub(crate) fn handle_heard(&mut self, connection: ConnectionId, now: Instant) -> bool {
        let current = self.connection() == Some(connection);
        if current {
            self.wait = MIN_WAIT;
            self.phase = Phase::Connected(connection, now);
        }
        current
    }

    /// Drops what there is and tries again after a wait.
    pub(crate) fn retry(&mut self, now: Instant) {
        if self.phase == Phase::Off {
            return;
        }
        (self.tcp_until, self.opening, self.better) = (None, None, None);
        let longest = self.wait.max(MIN_WAIT + Duration::from_millis(2));
        let wait = self.rng.random_range(MIN_WAIT..longest);
        self.wait = (self.wait * 3).min(MAX_WAIT);
        self.phase = Phase::Waiting(now + wait);
    }
}

/// What the connection wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Nothing.
    Nothing,
    /// Start an attempt of this number.
    Connect(u64),
    /// Go on with the attempt of this number, without a token.
    Upgrade(u64),
    /// The connection was silent for too long: it is gone.
    Lost,
}

/// The first wait after a loss.
const MIN_WAIT: Duration = Duration::from_millis(200);
/// The longest wait between two attempts.
const MAX_WAIT: Duration = Duration::from_secs(6);
/// An attempt that is not answered is given up after this.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
