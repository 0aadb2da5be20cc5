//! When to ask the router for what, decided without a clock or a socket.
//!
//! A mapping is found, renewed at half of its lease, and checked by *knocks*: the server is asked
//! to send to it, and the arrival proves it. One that stops to let knocks in is removed and asked
//! for again; when the router does not give it back it is lost, and the search starts over. A router
//! that gives nothing is asked for longer each time and ever more rarely, until there is another one, or
//! we have slept and may be elsewhere: other changes of the network do not make it answer. A knock that does not come says nothing while the server itself is not heard.

use std::net::{SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use super::Gateway;
use super::lease::{Goal, Job, Mapping, Outcome, Protocol};

/// How long each protocol is tried in the first search after a change, in the next, and in all
/// others: a device that keeps to the standard may take a second or more to answer a search.
const BUDGETS: [Duration; 3] =
    [Duration::from_millis(250), Duration::from_millis(1_500), Duration::from_millis(4_000)];
/// Waits between searches without a result; the last one repeats.
const SEARCH_AGAIN: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(30),
    Duration::from_secs(300),
    Duration::from_secs(1_200),
];
/// A renewal that failed is tried again no sooner.
const RENEW_SPACING: Duration = Duration::from_secs(5);
/// A mapping without end is asked for again after this, in case the router has lost it.
const REFRESH: Duration = Duration::from_secs(3_600);
/// A mapping that works is checked this often.
const CHECK: Duration = Duration::from_secs(30);
/// While the server cannot be asked, it is tried again after this.
const CHECK_SOON: Duration = Duration::from_secs(1);
/// Knocks of one check, and the wait for each.
const KNOCKS: u8 = 3;
const KNOCK_WAIT: Duration = Duration::from_millis(500);
/// Repairs that did not help are repeated after this, doubled each time.
const REPAIR_AGAIN: Duration = Duration::from_secs(60);
const LONGEST_REPAIR_WAIT: u32 = 5;

/// What the keeper wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Carry out a job, and hand in its outcome.
    Start(Job),
    /// Ask the server to send to this port of our external address.
    Knock(u16),
    /// Remove a mapping that is of no use any more; nobody waits for it.
    Remove(Gateway, Mapping),
}

/// What came of a knock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KnockAnswer {
    /// The server could not be asked.
    Unasked,
    /// The server is heard, whether or not the knock comes.
    ServerHeard,
    /// The knock came in, sent to this endpoint.
    Arrived(SocketAddr),
}

/// How things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// There is no router that could be asked.
    NoGateway,
    /// The router is being asked.
    Searching,
    /// It gave nothing.
    Unmapped,
    /// It gave a mapping.
    Mapped,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    mapping: Mapping,
    renew_at: Instant,
    expires: Option<Instant>,
    /// Where a knock has arrived.
    proof: Option<SocketAddr>,
    check_at: Instant,
    knocks: u8,
    server_heard: bool,
    repairs: u32,
    repair_at: Instant,
}

/// Keeps one port mapped.
#[derive(Debug)]
pub struct Keeper {
    port: u16,
    lease: Duration,
    gateway: Option<Gateway>,
    held: Option<Held>,
    running: Option<Job>,
    next_id: u64,
    search_at: Option<Instant>,
    failures: usize,
    answered: Option<Vec<Protocol>>,
    error: Option<String>,
    trash: Vec<(Gateway, Mapping)>,
}

impl Keeper {
    /// Keeps the local `port` mapped, with leases of `lease`, as soon as there is a gateway.
    #[must_use]
    pub fn new(port: u16, lease: Duration) -> Self {
        Self {
            port,
            lease,
            gateway: None,
            held: None,
            running: None,
            next_id: 0,
            search_at: None,
            failures: 0,
            answered: None,
            error: None,
            trash: Vec::new(),
        }
    }

    /// Packets leave by another way than before, and this is the gateway now. When it is the same,
    /// only what it gave is looked at: what it did not give, it does not give now either.
    pub fn handle_network(&mut self, gateway: Option<Gateway>, now: Instant) {
        if gateway == self.gateway {
            return self.check_soon(now);
        }
        if let (Some(old), Some(held)) = (self.gateway, self.held.take()) {
            self.trash.push((old, held.mapping));
        }
        self.gateway = gateway;
        self.running = None;
        self.answered = None;
        self.error = None;
        self.start_over(now);
    }

    /// We were asleep: the router may be another one with the same address.
    pub fn handle_sleep(&mut self, now: Instant) {
        match self.held {
            Some(_) => self.check_soon(now),
            None => self.start_over(now),
        }
    }

    fn check_soon(&mut self, now: Instant) {
        if let Some(held) = self.held.as_mut().filter(|held| held.knocks == 0) {
            held.check_at = now;
        }
    }

    fn start_over(&mut self, now: Instant) {
        self.failures = 0;
        self.search_at = self.gateway.map(|_| now);
    }

    /// A job has ended.
    pub fn handle_outcome(&mut self, outcome: Outcome, now: Instant) {
        let Some(job) = self.running.filter(|job| job.id == outcome.id) else {
            return;
        };
        self.running = None;
        if let Some(answered) = outcome.answered {
            self.answered = Some(answered);
        }
        match outcome.result {
            Ok(mapping) => self.hold(mapping, now),
            Err(error) => {
                self.error = Some(error);
                self.handle_failure(job.goal, now);
            }
        }
    }

    fn hold(&mut self, mapping: Mapping, now: Instant) {
        self.error = None;
        self.failures = 0;
        self.search_at = None;
        let renew_at = now + mapping.lease.map_or(REFRESH, |lease| lease / 2);
        let expires = mapping.lease.map(|lease| now + lease);
        let same = self.held.filter(|held| held.mapping.external == mapping.external);
        self.held = Some(match same {
            Some(held) => Held { mapping, renew_at, expires, check_at: now, ..held },
            None => Held {
                mapping,
                renew_at,
                expires,
                proof: None,
                check_at: now,
                knocks: 0,
                server_heard: false,
                repairs: 0,
                repair_at: now,
            },
        });
    }

    fn handle_failure(&mut self, goal: Goal, now: Instant) {
        let Some(held) = &mut self.held else {
            let wait = SEARCH_AGAIN[self.failures.min(SEARCH_AGAIN.len() - 1)];
            self.failures += 1;
            self.search_at = Some(now + wait);
            return;
        };
        match (goal, held.expires) {
            (Goal::Renew(_), Some(expires)) if now < expires => {
                let left = expires.saturating_duration_since(now);
                held.renew_at = now + (left / 2).max(RENEW_SPACING);
            }
            (Goal::Renew(_), None) => held.renew_at = now + REFRESH,
            // Removed, and not given back.
            _ => self.lose(now),
        }
    }

    fn lose(&mut self, now: Instant) {
        self.held = None;
        self.search_at = Some(now + SEARCH_AGAIN[0]);
    }

    /// What came of a knock.
    pub fn handle_knock(&mut self, answer: KnockAnswer, now: Instant) {
        let Some(held) = &mut self.held else { return };
        match answer {
            KnockAnswer::Unasked => {
                held.knocks = 0;
                held.check_at = now + CHECK_SOON;
            }
            KnockAnswer::ServerHeard => held.server_heard = true,
            KnockAnswer::Arrived(at) if at.port() == held.mapping.external.port() => {
                held.proof = Some(at);
                held.knocks = 0;
                held.repairs = 0;
                held.repair_at = now;
                held.check_at = now + CHECK;
            }
            KnockAnswer::Arrived(_) => {}
        }
    }

    /// What is due; call until none.
    pub fn poll(&mut self, now: Instant) -> Option<Order> {
        if let Some((gateway, mapping)) = self.trash.pop() {
            return Some(Order::Remove(gateway, mapping));
        }
        let gateway = self.gateway?;
        if self.running.is_some() {
            return None;
        }
        if self.held.is_some_and(|held| held.expires.is_some_and(|at| at <= now)) {
            self.lose(now);
        }
        let Some(held) = &mut self.held else {
            self.search_at.take_if(|at| *at <= now)?;
            let budget = BUDGETS[self.failures.min(BUDGETS.len() - 1)];
            return Some(self.start(gateway, Goal::Find, budget));
        };
        let mapping = held.mapping;
        if held.renew_at <= now {
            return Some(self.start(gateway, Goal::Renew(mapping), BUDGETS[0]));
        }
        if held.check_at > now {
            return None;
        }
        if held.knocks < KNOCKS {
            if held.knocks == 0 {
                held.server_heard = false;
            }
            held.knocks += 1;
            held.check_at = now + KNOCK_WAIT;
            return Some(Order::Knock(mapping.external.port()));
        }
        held.knocks = 0;
        held.check_at = now + CHECK;
        if !held.server_heard {
            return None;
        }
        let worked = held.proof.take().is_some();
        // Behind a second NAT no knock can come, whatever this router does.
        if (worked || mapping.is_public()) && held.repair_at <= now {
            held.repair_at = now + REPAIR_AGAIN * (1 << held.repairs.min(LONGEST_REPAIR_WAIT));
            held.repairs += 1;
            return Some(self.start(gateway, Goal::Repair(mapping), BUDGETS[0]));
        }
        None
    }

    fn start(&mut self, gateway: Gateway, goal: Goal, budget: Duration) -> Order {
        self.next_id += 1;
        let job =
            Job { id: self.next_id, gateway, port: self.port, lease: self.lease, goal, budget };
        self.running = Some(job);
        Order::Start(job)
    }

    /// When [`Self::poll`] has something next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.gateway?;
        match (self.running, &self.held) {
            (Some(_), _) => None,
            (None, None) => self.search_at,
            (None, Some(held)) => {
                [Some(held.renew_at), Some(held.check_at), held.expires].into_iter().flatten().min()
            }
        }
    }

    /// Whether a job is under way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.running.is_some()
    }

    /// The mapping that there is, and the gateway that keeps it.
    #[must_use]
    pub fn mapping(&self) -> Option<(Gateway, Mapping)> {
        self.gateway.zip(self.held.map(|held| held.mapping))
    }

    /// The endpoints that the mapping gives us, and whether a knock has come in there. Behind a
    /// second NAT that forwards everything there are two.
    #[must_use]
    pub fn endpoints(&self) -> Vec<(SocketAddr, bool)> {
        let Some(held) = &self.held else { return Vec::new() };
        let told = SocketAddr::V4(held.mapping.external);
        let seen = held.proof.filter(|seen| *seen != told);
        let told_works = held.proof == Some(told);
        seen.map(|seen| (seen, true)).into_iter().chain([(told, told_works)]).collect()
    }

    /// Whether something sent to the mapping has arrived.
    #[must_use]
    pub fn verified(&self) -> bool {
        self.held.is_some_and(|held| held.proof.is_some())
    }

    /// How things are.
    #[must_use]
    pub fn standing(&self) -> Standing {
        match (self.gateway, &self.held) {
            (None, _) => Standing::NoGateway,
            (Some(_), Some(_)) => Standing::Mapped,
            (Some(_), None) if self.answered.is_none() => Standing::Searching,
            (Some(_), None) => Standing::Unmapped,
        }
    }

    /// The external endpoint as the router told it.
    #[must_use]
    pub fn external(&self) -> Option<SocketAddrV4> {
        self.held.map(|held| held.mapping.external)
    }

    /// The protocols that the router answered in the last search; none before the first.
    #[must_use]
    pub fn answered(&self) -> Option<&[Protocol]> {
        self.answered.as_deref()
    }

    /// What the router refused last, in words for people.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }
}
