//! The simulated world: its clock, what is under way in it, and everybody's turn.
//!
//! ```text
//! step: jump to the next flight or timer -> deliver what is due -> give turns until all is quiet
//! ```
//!
//! The same seed gives the same world, but for the bytes of session keys, which nothing here
//! looks at. How datagrams find their way is in `routing`.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use overlay::io::link::GIVEN_UP_AFTER;
use overlay::lab::nat::NatKind;
use overlay::node::NodeSettings;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::control_link::Due;
use crate::edge::Edge;
use crate::evil::Relay;
use crate::host::{Host, spread};
use crate::ledger::Ledger;
use crate::link::Line;
use crate::routing::{Flight, Parcel};
use crate::server::ServerHost;
use crate::spot::Spot;

/// The last things that happened, for whoever has to understand a failure.
pub(crate) type EventLog = Rc<RefCell<VecDeque<String>>>;

/// Datagrams between hosts that disappear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    /// Only those of this host.
    pub(crate) from: Option<usize>,
    /// Only those of so many bytes or more.
    pub(crate) min_len: usize,
    /// Only those that look like data of WireGuard.
    pub(crate) data: bool,
}

impl Filter {
    fn takes(self, from: usize, datagram: &[u8]) -> bool {
        self.from.is_none_or(|it| it == from)
            && datagram.len() >= self.min_len
            && (!self.data || datagram.first() == Some(&4))
    }
}

/// All of it.
#[derive(Debug)]
pub(crate) struct World {
    /// The virtual time.
    pub(crate) now: Instant,
    pub(crate) hosts: Vec<Host>,
    pub(crate) edges: Vec<Edge>,
    pub(crate) server: ServerHost,
    pub(crate) server_line: Line,
    pub(crate) ledger: Ledger,
    pub(super) flights: BinaryHeap<Flight>,
    pub(super) next_seq: u64,
    /// What TCP keeps because its way is dark.
    pub(super) stalled: Vec<Parcel>,
    pub(super) rng: StdRng,
    partitions: BTreeSet<(usize, usize)>,
    /// Something between hosts has let datagrams through again, of which nobody is told.
    pub(crate) healed: bool,
    /// What does not get through between hosts.
    pub(crate) filters: Vec<Filter>,
    /// What the relay does to what it carries.
    pub(crate) relay: Relay,
    /// Of a thousand datagrams straight between hosts, so many vanish.
    pub(crate) loss_between_hosts: u32,
    /// The first messages of handshakes that one host sent straight to another.
    pub(crate) calls: Vec<((usize, usize), Vec<u8>)>,
    /// Bytes that went to addresses where nobody is.
    pub(crate) strays: usize,
    /// When the first packet of data that one host sent straight to another arrived there.
    pub(crate) direct_data: BTreeMap<(usize, usize), Instant>,
    start: Instant,
    seed: u64,
    steps_now: u32,
    log: EventLog,
}

impl World {
    /// A world with a server in it and nobody else.
    pub(crate) fn new(seed: u64, server_line: Line, now: Instant) -> Self {
        Self {
            now,
            hosts: Vec::new(),
            edges: Vec::new(),
            server: ServerHost::new(seed, now),
            server_line,
            ledger: Ledger::default(),
            flights: BinaryHeap::new(),
            next_seq: 0,
            stalled: Vec::new(),
            rng: StdRng::from_seed(spread(seed, 5)),
            partitions: BTreeSet::new(),
            healed: false,
            filters: Vec::new(),
            relay: Relay::Honest,
            loss_between_hosts: 0,
            calls: Vec::new(),
            strays: 0,
            direct_data: BTreeMap::new(),
            start: now,
            seed,
            steps_now: 0,
            log: EventLog::default(),
        }
    }

    /// What happened last, shared, so that it survives a panic in the world.
    pub(crate) fn log(&self) -> EventLog {
        Rc::clone(&self.log)
    }

    /// Writes a line into the log.
    pub(crate) fn note(&self, text: &str) {
        let mut log = self.log.borrow_mut();
        if log.len() == LOG_LINES {
            log.pop_front();
        }
        log.push_back(format!("{:>9.3} s  {text}", (self.now - self.start).as_secs_f64()));
    }

    /// A place where hosts can be.
    pub(crate) fn add_edge(&mut self, kind: NatKind, line: Line) -> usize {
        self.add_spot(Spot::plain(kind), line)
    }

    /// The same with all that a spot can have.
    pub(crate) fn add_spot(&mut self, spot: Spot, line: Line) -> usize {
        let number = u8::try_from(self.edges.len() + 10).expect("worlds are small");
        self.edges.push(Edge::at(spot, number, line, self.seed ^ u64::from(number)));
        self.edges.len() - 1
    }

    /// A host behind an edge, with an invite, switched off.
    pub(crate) fn add_host(&mut self, edge: usize, port: u16, settings: NodeSettings) -> usize {
        let address = self.edges[edge].next_address();
        let number = self.hosts.len() as u64;
        let endpoint = SocketAddr::new(address, port);
        let mut host = Host::new(self.seed << 8 | number, edge, endpoint, settings);
        host.ipv6 = self.edges[edge].last_ipv6().map(|address| SocketAddr::new(address, port));
        host.invite = Some(self.server.invite(1, self.now));
        self.hosts.push(host);
        self.hosts.len() - 1
    }

    /// Has the router of a host forward a port to it.
    pub(crate) fn forward_port(&mut self, host: usize) {
        self.hosts[host].forwarded = true;
        let endpoint = self.hosts[host].endpoint;
        let mapped = self.edges[self.hosts[host].edge].forward(endpoint);
        self.hosts[host].handle_mapped(mapped, self.now);
        self.settle(host);
    }

    /// Starts a host's node, unless it knows that it is no member any more.
    pub(crate) fn start_host(&mut self, host: usize) {
        self.wake(host);
        if !self.hosts[host].expelled {
            let wall = self.server.wall(self.now);
            self.hosts[host].start(self.server.control_endpoint(), wall, self.now);
            self.settle(host);
        }
    }

    /// Kills a host's node; its operating system ends the control connection.
    pub(crate) fn stop_host(&mut self, host: usize) {
        self.wake(host);
        self.close_link(host);
        let (wall, now) = (self.server.wall(self.now), self.now);
        self.hosts[host].stop(wall, now);
    }

    /// Moves a host to a new place. The daemon sees new addresses and makes a new connection.
    pub(crate) fn roam(&mut self, host: usize, kind: NatKind, line: Line) {
        self.roam_to(host, Spot::plain(kind), line);
    }

    /// The same to a place of any sort.
    pub(crate) fn roam_to(&mut self, host: usize, spot: Spot, line: Line) {
        self.wake(host);
        let edge = self.add_spot(spot, line);
        let port = self.hosts[host].endpoint.port();
        let endpoint = SocketAddr::new(self.edges[edge].next_address(), port);
        self.hosts[host].ipv6 =
            self.edges[edge].last_ipv6().map(|address| SocketAddr::new(address, port));
        let link = &self.hosts[host].control_link;
        if link.connection().is_none_or(|connection| link.way(connection).interface == 0) {
            self.leave_link(host);
            self.retry_link(host);
        }
        let now = self.now;
        self.hosts[host].forwarded = false;
        self.hosts[host].handle_mapped(None, now);
        self.hosts[host].handle_roam(edge, endpoint, now);
        self.settle(host);
        if spot.forwards {
            self.forward_port(host);
        }
    }

    /// Breaks a host's control connection, for good or until it is mended.
    pub(crate) fn cut_link(&mut self, host: usize) {
        self.wake(host);
        self.hosts[host].control_link.cut = true;
        self.lose_link(host);
        self.settle(host);
    }

    fn lose_link(&mut self, host: usize) {
        self.close_link(host);
        self.retry_link(host);
    }

    fn retry_link(&mut self, host: usize) {
        self.hosts[host].control_link.retry(self.now);
        let now = self.now;
        self.hosts[host].handle_link_down(now);
    }

    /// Suspends a host: for so long it neither hears nor says anything, and no timer of it runs.
    pub(crate) fn sleep(&mut self, host: usize, time: Duration) {
        if self.hosts[host].asleep_until.is_none() {
            self.hosts[host].asleep_since = self.now;
            self.hosts[host].asleep_until = Some(self.now + time);
            self.leave_link(host);
        }
    }

    /// Ends a host's sleep. To its node it is as if the clock had jumped.
    pub(crate) fn wake(&mut self, host: usize) {
        if self.hosts[host].asleep_until.take().is_none() {
            return;
        }
        self.note(&format!("host {host}: awake"));
        let slept = self.now.saturating_duration_since(self.hosts[host].asleep_since);
        self.hosts[host].asleep_since = self.now;
        let held = std::mem::take(&mut self.hosts[host].held_frames);
        if slept < GIVEN_UP_AFTER {
            self.ledger.slack = slept;
            for (connection, frame) in held {
                self.deliver_down(host, connection, frame);
            }
            self.ledger.slack = Duration::ZERO;
        } else if self.hosts[host].control_link.connection().is_some() {
            self.lose_link(host);
            // The daemon knows that there is nothing to wait for.
            self.hosts[host].control_link.start(self.now);
        }
        if slept >= NOTICED {
            let now = self.now;
            self.hosts[host].handle_wake(now);
        }
        self.settle(host);
    }

    /// Has a host renew its node key; tells whether it did.
    pub(crate) fn rotate(&mut self, host: usize) -> bool {
        let now = self.now;
        let rotated = self.hosts[host].asleep_until.is_none() && self.hosts[host].rotate(now);
        self.settle(host);
        rotated
    }

    /// Ends a host's membership; tells whether it had one and the server could be asked.
    pub(crate) fn remove(&mut self, host: usize) -> bool {
        let Some(id) = self.hosts[host].id() else { return false };
        let removed = self.hosts[host].removed_at.is_none() && self.server.remove(id, self.now);
        if removed {
            self.hosts[host].removed_at = Some(self.now);
            self.route_server();
        }
        removed
    }

    /// Sets in how many seconds a membership ends, if ever; tells whether the server could be asked.
    pub(crate) fn expire(&mut self, host: usize, in_s: Option<u64>) -> bool {
        let Some(id) = self.hosts[host].id() else { return false };
        let set = self.hosts[host].removed_at.is_none() && self.server.expire(id, in_s, self.now);
        if set {
            self.hosts[host].may_end = in_s.is_some();
            self.route_server();
        }
        set
    }

    /// Takes note of whose membership the server has ended, or lets go on.
    pub(super) fn note_over(&mut self) {
        for (id, over) in self.server.take_over() {
            let now = self.now;
            let Some(number) = self.hosts.iter().position(|host| host.id() == Some(id)) else {
                continue;
            };
            let host = &mut self.hosts[number];
            if host.over_at.is_some() != over {
                host.over_at = over.then_some(now);
                let what = if over { "has ended" } else { "goes on" };
                self.note(&format!("host {number}: its membership {what}"));
            }
        }
    }

    /// Whether `host` has had the time to hear that `other` is no member any more, or not at this time: it
    /// has been connected to the server for long enough since.
    pub(crate) fn must_know_removed(&self, host: usize, other: usize) -> bool {
        let long_ago = |at: Instant| self.now.saturating_duration_since(at) > REVOCATION;
        let other = &self.hosts[other];
        other.removed_at.or(other.over_at).is_some_and(long_ago)
            && self.hosts[host].control_link.connected_since().is_some_and(long_ago)
            // What waited for a sleeper in its connection is older than what comes behind it.
            && long_ago(self.hosts[host].asleep_since)
            && self.server.is_running()
            && self.is_connected(host)
    }

    /// Whether a host has a control connection, by a way that leads there.
    pub(crate) fn is_connected(&self, host: usize) -> bool {
        let link = &self.hosts[host].control_link;
        let connection = link.connection();
        connection.is_some_and(|connection| self.leads_out(host, link.way(connection).interface))
    }

    /// Kills the server; every connection ends.
    pub(crate) fn kill_server(&mut self) {
        self.server.kill();
        for host in 0..self.hosts.len() {
            self.tell_server_gone(host);
        }
    }

    /// Starts the server again with its records.
    pub(crate) fn start_server(&mut self) {
        self.server.start(self.now);
        self.route_server();
    }

    /// The server dies and comes back at another address, to which its name leads from now on.
    pub(crate) fn move_server(&mut self) {
        self.kill_server();
        self.server.relocate();
        self.start_server();
    }

    /// Lets no datagram between two hosts through, or all again.
    pub(crate) fn set_partitioned(&mut self, a: usize, b: usize, partitioned: bool) {
        let pair = (a.min(b), a.max(b));
        if partitioned {
            self.partitions.insert(pair);
        } else {
            self.partitions.remove(&pair);
            self.healed = true;
        }
    }

    pub(crate) fn is_partitioned(&self, a: usize, b: usize) -> bool {
        self.partitions.contains(&(a.min(b), a.max(b)))
    }

    /// Whether nothing that this host sends reaches another host.
    pub(crate) fn is_black_hole(&self, host: usize) -> bool {
        self.filters.contains(&Filter { from: Some(host), ..Filter::default() })
    }

    /// Whether a datagram from one host to another gets through.
    pub(super) fn passes(&mut self, from: usize, to: usize, datagram: &[u8]) -> bool {
        if self.loss_between_hosts > 0 && self.rng.random_range(0..1_000) < self.loss_between_hosts
        {
            return false;
        }
        let passes = !self.is_partitioned(from, to)
            && !self.filters.iter().any(|it| it.takes(from, datagram));
        if passes && datagram.first() == Some(&4) && datagram.len() > EMPTY_DATA {
            self.direct_data.entry((from, to)).or_insert(self.now);
        }
        if passes && datagram.first() == Some(&1) {
            self.calls.push(((from, to), datagram.to_vec()));
        }
        passes
    }

    /// Sends an inner packet; none when one of the two has no address yet or does not run.
    pub(crate) fn ping(&mut self, from: usize, to: usize, payload_bytes: usize) -> Option<u64> {
        let src = self.hosts[from].address()?;
        let dst = self.hosts[to].address()?;
        self.hosts[from].node()?;
        if self.hosts[from].asleep_until.is_some() {
            return None;
        }
        let now = self.now;
        let (number, packet) = self.ledger.send((from, src), (to, dst), payload_bytes, now);
        self.hosts[from].handle_packet(packet);
        self.settle(from);
        Some(number)
    }

    /// Lets virtual time pass.
    pub(crate) fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(at) = self.next_at().filter(|at| *at <= until) {
            self.step(at);
        }
        self.now = until;
    }

    /// Lets time pass until something is true, for `limit` at most; tells whether it came true.
    pub(crate) fn run_until(
        &mut self,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> bool {
        let until = self.now + limit;
        while !done(self) {
            match self.next_at().filter(|at| *at <= until) {
                Some(at) => self.step(at),
                None => {
                    self.now = until;
                    return done(self);
                }
            }
        }
        true
    }

    fn next_at(&self) -> Option<Instant> {
        let hosts = self.hosts.iter().filter_map(Host::next_at);
        hosts
            .chain(self.flights.peek().map(|flight| flight.at))
            .chain(self.server.poll_timeout())
            .min()
    }

    fn step(&mut self, at: Instant) {
        if at > self.now {
            self.now = at;
            self.steps_now = 0;
        }
        self.steps_now += 1;
        assert!(self.steps_now < MAX_STEPS, "time does not pass any more");
        assert!(self.flights.len() < MAX_FLIGHTS, "too much is under way");
        while self.flights.peek().is_some_and(|flight| flight.at <= self.now) {
            if let Some(flight) = self.flights.pop() {
                self.deliver(flight.parcel);
            }
        }
        for host in 0..self.hosts.len() {
            let now = self.now;
            if self.hosts[host].next_at().is_none_or(|at| at > now) {
                continue;
            }
            self.wake(host);
            match self.hosts[host].control_link.handle_timeout(now) {
                Due::Nothing => {}
                Due::Connect(attempt) => self.connect(host, attempt),
                Due::Upgrade(attempt) => self.upgrade(host, attempt),
                Due::Lost => {
                    self.note(&format!("host {host}: the server is silent"));
                    self.hosts[host].handle_link_down(now);
                    self.settle(host);
                }
            }
            if self.hosts[host].wake_at().is_some_and(|at| at <= now) {
                self.settle(host);
            }
        }
        if self.server.poll_timeout().is_some_and(|at| at <= self.now) {
            self.server.turn(self.now);
            self.route_server();
        }
    }

    /// Gives a host turns until it has nothing more to do at this instant.
    pub(crate) fn settle(&mut self, host: usize) {
        if self.hosts[host].asleep_until.is_some() {
            return;
        }
        for _ in 0..MAX_TURNS {
            let connection = self.hosts[host].control_link.connection();
            let going = self.hosts[host].turn(connection, self.now);
            let expelled = going.expelled;
            self.route_host(host, going);
            if expelled {
                self.note(&format!("host {host}: no member any more"));
                self.stop_host(host);
                return;
            }
            if self.hosts[host].wake_at().is_none_or(|at| at > self.now) {
                return;
            }
        }
        panic!("host {host} does not come to rest");
    }
}

/// A shorter sleep is not noticed by the daemon.
const NOTICED: Duration = Duration::from_secs(5);
/// The longest that a connected node may not know of a removal: the way from the server is a tenth.
const REVOCATION: Duration = Duration::from_secs(1);
/// A keepalive of WireGuard.
const EMPTY_DATA: usize = 32;
/// Lines kept for a failure report.
const LOG_LINES: usize = 80;
/// More turns of one host at one instant than any chain of events needs.
const MAX_TURNS: usize = 32;
/// More steps at one instant than there are flights and timers in a small world.
const MAX_STEPS: u32 = 10_000;
/// More than every host talking to every other at the highest rate.
const MAX_FLIGHTS: usize = 20_000;
