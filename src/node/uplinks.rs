//! Several uplinks: interfaces with a default route each.
//!
//! The main socket leaves by the preferred one, as the kernel's routes say. Each further one, a
//! *line*, has a socket that is bound to its interface and lives as long as its route. The server is
//! asked by it now and then where it sees that socket: this keeps the NAT in front of it open, says
//! that the line works, and gives the peers an endpoint to probe before they need it.
//!
//! ```text
//! the relay answers no bind --------> all other lines are asked --> it is bound by one that answers
//! the preferred line answers again for a while -------------------> it is bound by that one
//! ```
//!
//! Paths to peers need none of this: each peer's agent has places by every line.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;

use super::asks::Asks;
use super::relay::{REFRESH, RETRY};
use super::{Event, Node};
use crate::dataplane::Target;
use crate::path::{Line as LineSocket, PathAgent, Soonest};
use crate::types::{Candidate, CandidateKind, SocketId, TxId, Uplink};
use crate::wire::relay::Control;

/// The relay is silent, and not only slow, when a bind is not answered within this or
const SILENCE: Duration = Duration::from_millis(350);
/// within this and one and a half round trips, or
const SILENCE_BESIDE_RTT: Duration = Duration::from_millis(300);
/// within this when no round trip is known.
const SILENCE_UNMEASURED: Duration = Duration::from_secs(1);
/// The preferred line is asked so often while the relay goes by another one,
const RETURN_SPACING: Duration = Duration::from_secs(1);
/// has to answer for so long, twice as long after each return that did not last,
const RETURN_AFTER: Duration = Duration::from_secs(3);
/// up to this, to be used again.
const LONGEST_RETURN: Duration = Duration::from_secs(96);
/// A return has lasted after this.
const LASTED: Duration = Duration::from_secs(120);
/// A socket whose line the main one goes by now stays open for the paths by it, this long at least.
const RETIREMENT: Duration = Duration::from_secs(10);
/// A line whose socket was lost is opened again after this.
const REOPENING: Duration = Duration::from_secs(5);

/// One further uplink.
#[derive(Debug)]
struct Line {
    uplink: Uplink,
    socket: SocketId,
    asks: Asks,
    reflexive: Option<SocketAddr>,
    /// The main socket leaves by this interface now: closed after this, once no path needs it.
    retires_at: Option<Instant>,
}

/// All uplinks; nothing when there is one.
#[derive(Debug, Default)]
pub(super) struct Uplinks {
    /// The preferred one of each family first.
    known: Vec<Uplink>,
    lines: Vec<Line>,
    /// When the lines that were lost are opened again.
    reopen_at: Option<Instant>,
    /// Questions by the preferred one, while the relay goes by another or is silent.
    main: Asks,
    /// When the socket in use was asked what another one has answered.
    compared_at: Option<Instant>,
    returned_at: Option<Instant>,
    /// Returns in a row that did not last.
    failed_returns: u32,
}

/// How an uplink does, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UplinkStatus {
    /// Which one.
    pub uplink: Uplink,
    /// Whether the kernel sends by it.
    pub preferred: bool,
    /// Whether the server answers by it; none when that is not known.
    pub answers: Option<bool>,
    /// Where the server sees us by it.
    pub reflexive: Option<SocketAddr>,
    /// The round trip of its last answer.
    pub rtt: Option<Duration>,
    /// Whether the relay and the reflexive address in use are by it.
    pub in_use: bool,
}

impl Uplinks {
    /// The endpoints that further uplinks have, for the peers.
    pub(super) fn candidates(&self) -> impl Iterator<Item = Candidate> {
        let active = self.lines.iter().filter(|line| line.retires_at.is_none());
        active.filter_map(|line| line.reflexive).map(|at| Candidate::new(at, CandidateKind::Uplink))
    }

    pub(super) fn next_at(&self) -> Option<Instant> {
        let asks = self.lines.iter().map(|line| line.asks.next_at);
        let retirements = self.lines.iter().map(|line| line.retires_at);
        asks.chain(retirements).chain([self.main.next_at, self.reopen_at]).flatten().min()
    }

    fn is_active(&self, socket: SocketId) -> bool {
        let line = self.lines.iter().find(|line| line.socket == socket);
        line.is_some_and(|line| line.retires_at.is_none())
    }

    /// What the path agents are told of the lines.
    pub(super) fn sockets(&self) -> Vec<LineSocket> {
        let of = |line: &Line| LineSocket {
            socket: line.socket,
            ipv6: line.uplink.ipv6,
            retiring: line.retires_at.is_some(),
        };
        self.lines.iter().map(of).collect()
    }

    fn asks_of(&mut self, socket: SocketId) -> Option<&mut Asks> {
        if socket == SocketId::MAIN {
            return Some(&mut self.main);
        }
        self.lines.iter_mut().find(|line| line.socket == socket).map(|line| &mut line.asks)
    }

    pub(super) fn has_socket(&self, socket: SocketId) -> bool {
        self.lines.iter().any(|line| line.socket == socket)
    }

    /// Whether there is another way to the server than the preferred one.
    pub(super) fn has_choice(&self, server: SocketAddr) -> bool {
        let leads_there =
            |line: &Line| line.retires_at.is_none() && line.uplink.ipv6 == server.is_ipv6();
        self.lines.iter().any(leads_there)
    }

    fn is_preferred(known: &[Uplink], uplink: &Uplink) -> bool {
        known.iter().find(|it| it.ipv6 == uplink.ipv6) == Some(uplink)
    }
}

impl Node {
    /// The uplinks of this machine, the preferred one of each family first, also when it is the only
    /// one: it may have been a further one until now.
    pub fn handle_uplinks(&mut self, known: Vec<Uplink>, now: Instant) {
        if known == self.uplinks.known {
            return;
        }
        let gone: Vec<SocketId> = self
            .uplinks
            .lines
            .extract_if(.., |line| !known.contains(&line.uplink))
            .map(|line| line.socket)
            .collect();
        for line in &mut self.uplinks.lines {
            let preferred = Uplinks::is_preferred(&known, &line.uplink);
            if !preferred && line.retires_at.is_some() {
                line.asks.hurry(now);
            }
            line.retires_at = preferred.then(|| line.retires_at.unwrap_or(now + RETIREMENT));
        }
        self.uplinks.known = known;
        self.open_lines(now);
        self.forget_lines(&gone, now);
        self.handle_uplinks_timeout(now);
    }

    /// Opens a socket for each further uplink that has none.
    fn open_lines(&mut self, now: Instant) {
        let Uplinks { known, lines, .. } = &self.uplinks;
        let has_line = |uplink: &Uplink| lines.iter().any(|line| line.uplink == *uplink);
        let missing = known.iter().filter(|it| !Uplinks::is_preferred(known, it) && !has_line(it));
        for uplink in missing.cloned().collect::<Vec<Uplink>>() {
            let socket = self.open_line(&uplink);
            self.uplinks.lines.push(Line {
                uplink,
                socket,
                asks: Asks::start(now),
                reflexive: None,
                retires_at: None,
            });
        }
    }

    /// The daemon could not open the socket of a line, or has lost it: another one later.
    pub(super) fn handle_line_lost(&mut self, socket: SocketId, now: Instant) {
        self.uplinks.lines.retain(|line| line.socket != socket);
        self.uplinks.reopen_at = Some(now + REOPENING);
        self.forget_lines(&[socket], now);
    }

    fn forget_lines(&mut self, gone: &[SocketId], now: Instant) {
        for socket in gone {
            self.close_line(*socket);
        }
        let by = self.relay.socket();
        if by != SocketId::MAIN && !self.uplinks.is_active(by) {
            self.bind_by(SocketId::MAIN, now);
        }
        let lines = self.uplinks.sockets();
        self.tell_agents(now, |agent, now| {
            for socket in gone {
                agent.handle_socket_closed(*socket, now);
            }
            agent.set_uplinks(&lines, now);
        });
        self.announce(None, now);
    }

    /// There is another server, or another key for it: whether the lines lead there is asked anew.
    pub(super) fn hurry_lines(&mut self, now: Instant) {
        for line in &mut self.uplinks.lines {
            line.asks.hurry(now);
        }
    }

    /// Asks what is due, and goes by another line when the one in use is silent.
    pub(super) fn handle_uplinks_timeout(&mut self, now: Instant) {
        if self.uplinks.reopen_at.take_if(|at| *at <= now).is_some() {
            self.open_lines(now);
            self.forget_lines(&[], now);
        }
        if self.uplinks.lines.is_empty() {
            self.uplinks.main = Asks::default();
            return;
        }
        if self.relay.wants_another() {
            // The one in use, too: a server that has started anew answers these before it knows who
            // may bind.
            self.hurry_lines(now);
            self.uplinks.main.hurry(now);
        }
        self.ask_lines(now);
        self.leave_silent_line(now);
        let retired = |line: &mut Line| {
            line.retires_at.is_some_and(|at| at <= now)
                && !self.peers.values().any(|peer| peer.agent.uses_socket(line.socket))
        };
        let retired: Vec<SocketId> =
            self.uplinks.lines.extract_if(.., retired).map(|line| line.socket).collect();
        if !retired.is_empty() {
            self.forget_lines(&retired, now);
        }
        for line in &mut self.uplinks.lines {
            // A path goes by it still: looked at again later.
            line.retires_at =
                line.retires_at.map(|at| if at <= now { now + RETIREMENT } else { at });
        }
    }

    fn ask_lines(&mut self, now: Instant) {
        let Some(server) = self.relay.server() else {
            for line in &mut self.uplinks.lines {
                line.asks.next_at = None;
            }
            self.uplinks.main.next_at = None;
            return;
        };
        let mut questions = Vec::new();
        for line in &mut self.uplinks.lines {
            if line.uplink.ipv6 != server.is_ipv6() || line.retires_at.is_some() {
                line.asks.next_at = None;
            }
            let tx = TxId(self.rng.random());
            questions.extend(line.asks.take_due(tx, now).map(|tx| (line.socket, tx)));
        }
        let by_main = self.relay.socket() == SocketId::MAIN;
        if by_main && self.relay.silent_since().is_none() {
            self.uplinks.main.next_at = None;
        }
        let tx = TxId(self.rng.random());
        let main = self.uplinks.main.take_due(tx, now);
        if main.is_some() && !by_main {
            // However long it has been silent, it is the one that is wanted.
            self.uplinks.main.next_at = Some(now + RETURN_SPACING);
        }
        questions.extend(main.map(|tx| (SocketId::MAIN, tx)));
        for (socket, tx) in questions {
            let question = Control::Reflect { tx, from_other_port: false }.encode(None);
            self.datagrams
                .push_bytes(Target::Udp { remote: server, local: None, socket }, &question);
        }
    }

    /// The server has seen the socket of a line. Tells whether it was asked here.
    pub(super) fn handle_line_seen(
        &mut self,
        socket: SocketId,
        tx: TxId,
        observed: SocketAddr,
        now: Instant,
    ) -> bool {
        if socket == SocketId::MAIN {
            let by_main = self.relay.socket() == SocketId::MAIN;
            let again = if by_main { REFRESH } else { RETURN_SPACING };
            let ours = self.uplinks.main.handle_answer(tx, again, now);
            if ours {
                self.leave_silent_line(now);
                self.return_to_preferred(now);
            }
            return ours;
        }
        let line = self.uplinks.lines.iter_mut().find(|line| line.socket == socket);
        let Some(line) = line else { return false };
        if !line.asks.handle_answer(tx, REFRESH, now) {
            return false;
        }
        self.note_line_endpoint(socket, observed, now);
        self.leave_silent_line(now);
        true
    }

    /// The server sees a line there.
    pub(super) fn note_line_endpoint(&mut self, by: SocketId, observed: SocketAddr, now: Instant) {
        let line = self.uplinks.lines.iter_mut().find(|line| line.socket == by);
        if let Some(line) = line
            && line.reflexive.replace(observed) != Some(observed)
        {
            self.announce(None, now);
        }
    }

    /// The relay has been silent for long enough, and the server answers by another line, but not by the
    /// one in use.
    fn leave_silent_line(&mut self, now: Instant) {
        let Some((since, other, asked_at)) = self.other_that_answers() else { return };
        let mut compared_at = self.uplinks.compared_at.filter(|at| *at >= since);
        if compared_at.is_none()
            && let Some(asks) = self.uplinks.asks_of(self.relay.socket())
        {
            compared_at = asks.owes_since(asked_at);
            if compared_at.is_none() {
                asks.next_at = Some(now);
                compared_at = Some(now);
            }
        }
        self.uplinks.compared_at = compared_at;
        if self.leaving_at(since).is_some_and(|at| at <= now) {
            self.bind_by(other, now);
        }
    }

    /// Since when the relay is silent, the socket by which the server answers instead, and when it was
    /// asked; none while the server answers by the one in use as well.
    fn other_that_answers(&self) -> Option<(Instant, SocketId, Instant)> {
        let since = self.relay.silent_since()?;
        let by = self.relay.socket();
        let main = (SocketId::MAIN, &self.uplinks.main);
        let active = self.uplinks.lines.iter().filter(|line| line.retires_at.is_none());
        let all = || [main].into_iter().chain(active.clone().map(|line| (line.socket, &line.asks)));
        if all().any(|(socket, asks)| socket == by && asks.answers_since(since)) {
            return None;
        }
        let mut others = all().filter(|(socket, asks)| *socket != by && asks.answers_since(since));
        others.find_map(|(socket, asks)| Some((since, socket, asks.answer_to?)))
    }

    /// When the silence was long enough, and the question by the socket in use has had its time.
    fn leaving_at(&self, since: Instant) -> Option<Instant> {
        let compared_at = self.uplinks.compared_at.filter(|at| *at >= since)?;
        Some((since + self.patience()).max(compared_at + self.patience() - RETRY[0]))
    }

    fn patience(&self) -> Duration {
        let slow = |rtt: Duration| SILENCE.max(SILENCE_BESIDE_RTT + rtt * 3 / 2);
        self.relay.rtt().map_or(SILENCE_UNMEASURED, slow)
    }

    fn return_to_preferred(&mut self, now: Instant) {
        let hold = RETURN_AFTER * 2u32.pow(self.uplinks.failed_returns.min(5));
        let good = self.uplinks.main.good_since;
        let proved = good.is_some_and(|at| now >= at + hold.min(LONGEST_RETURN));
        if self.relay.socket() != SocketId::MAIN && proved {
            self.bind_by(SocketId::MAIN, now);
        }
    }

    /// The relay goes by this socket from here on.
    fn bind_by(&mut self, socket: SocketId, now: Instant) {
        self.relay.set_socket(socket, now);
        self.uplinks.compared_at = None;
        self.publish();
        self.handle_relay_timeout(now);
        self.events.push_back(Event::Uplink(self.uplink_of(socket).cloned()));
        if socket == SocketId::MAIN {
            self.uplinks.main = Asks::default();
            self.uplinks.returned_at = Some(now);
            self.tell_agents(now, PathAgent::handle_uplink_back);
        } else {
            let lasted = |at: Instant| now.saturating_duration_since(at) >= LASTED;
            let failed = !self.uplinks.returned_at.is_none_or(lasted);
            self.uplinks.failed_returns =
                if failed { self.uplinks.failed_returns.saturating_add(1) } else { 0 };
            self.uplinks.main = Asks::start(now + RETURN_SPACING);
            // Has the control connection gone the same way?
            self.ask_server(now);
        }
    }

    /// When [`Self::handle_uplinks_timeout`] has something to do.
    pub(super) fn uplinks_next_at(&self) -> Option<Instant> {
        let mut soonest = Soonest::default();
        soonest.add(self.uplinks.next_at(), "uplinks");
        if let Some((since, ..)) = self.other_that_answers() {
            soonest.add(self.leaving_at(since), "the relay by another uplink");
        }
        soonest.get().map(|(at, _)| at)
    }

    /// The uplink that a socket is bound to; none for those that go where the routes say.
    #[must_use]
    pub fn uplink_of(&self, socket: SocketId) -> Option<&Uplink> {
        self.uplinks.lines.iter().find(|line| line.socket == socket).map(|line| &line.uplink)
    }

    /// The uplink that the relay goes by, when it is not the preferred one.
    #[must_use]
    pub fn relay_uplink(&self) -> Option<&Uplink> {
        self.uplink_of(self.relay.socket())
    }

    /// Whether this interface is an uplink, the preferred one or another.
    #[must_use]
    pub fn has_uplink(&self, device: &str, ipv6: bool) -> bool {
        self.uplinks.known.iter().any(|it| it.device == device && it.ipv6 == ipv6)
    }

    /// All uplinks; none when there is no choice.
    #[must_use]
    pub fn uplink_statuses(&self) -> Vec<UplinkStatus> {
        let by = self.relay.socket();
        let server = self.relay.server();
        let known = &self.uplinks.known;
        let several = |ipv6| known.iter().filter(|it| it.ipv6 == ipv6).count() > 1;
        let statuses = known.iter().filter(|it| several(it.ipv6)).map(|uplink| {
            let asked = server.is_some_and(|server| server.is_ipv6() == uplink.ipv6);
            let uplink = uplink.clone();
            if Uplinks::is_preferred(known, &uplink) {
                let by_main = by == SocketId::MAIN;
                let answers = if by_main {
                    self.relay.udp_works()
                } else {
                    Some(self.uplinks.main.unanswered < 2)
                };
                return UplinkStatus {
                    uplink,
                    preferred: true,
                    answers: answers.filter(|_| asked),
                    reflexive: self.reflexive.filter(|_| asked),
                    rtt: if by_main { self.relay.rtt() } else { self.uplinks.main.rtt }
                        .filter(|_| asked),
                    in_use: by_main && asked,
                };
            }
            let line = self.uplinks.lines.iter().find(|line| line.uplink == uplink);
            let answers =
                line.and_then(|line| match (line.asks.unanswered, line.asks.answered_at) {
                    (0..2, Some(_)) => Some(true),
                    (2.., _) => Some(false),
                    (_, None) => None,
                });
            UplinkStatus {
                uplink,
                preferred: false,
                answers,
                reflexive: line.and_then(|line| line.reflexive),
                rtt: line.and_then(|line| line.asks.rtt),
                in_use: line.is_some_and(|line| line.socket == by),
            }
        });
        statuses.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::dataplane::UdpBatch;
    use crate::node::{Netmap, NodeSettings, SocketOrder};
    use crate::testing::epoch;
    use crate::wire::control::{ServerMessage, Welcome};
    use crate::wire::relay::RelayKey;

    const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
    const KEY: [u8; 32] = [9; 32];
    const STEP: Duration = Duration::from_millis(5);

    fn uplink(device: &str, index: u32, ipv6: bool) -> Uplink {
        Uplink { device: device.into(), index, ipv6 }
    }

    fn two() -> Vec<Uplink> {
        vec![uplink("e0", 1, false), uplink("e1", 2, false)]
    }

    /// A node and its server; what the server lets pass is up to the test.
    struct World {
        node: Node,
        now: Instant,
    }

    impl World {
        fn new(uplinks: Vec<Uplink>) -> Self {
            let now = epoch();
            let key = crate::types::SecretKey::from_bytes([1; 32]);
            let settings = NodeSettings::default();
            let node = Node::new(key, Netmap::default(), settings, [7; 32], 1, now);
            let mut world = Self { node, now };
            world.node.handle_uplinks(uplinks, now);
            world
        }

        fn welcome(&mut self, server: IpAddr) {
            let welcome = Welcome {
                version: 1,
                network: [7; 8],
                id: 1,
                name: "own".into(),
                ipv4: Ipv4Addr::new(10, 77, 0, 1),
                ipv6: "fd00:1:2::1".parse().unwrap(),
                ipv4_prefix_len: 20,
                ipv6_prefix_len: 48,
                relay_key: KEY,
                relay_port: Some(41820),
                second_port: None,
                observed: None,
                server_addresses: Vec::new(),
            };
            let message = ServerMessage { welcome: Some(welcome), ..ServerMessage::default() };
            self.node.handle_message(&message, SocketAddr::new(server, 443), self.now);
        }

        fn line(&self, device: &str) -> Option<SocketId> {
            let mut lines = self.node.uplinks.lines.iter();
            lines.find(|line| line.uplink.device == device).map(|line| line.socket)
        }

        /// Runs for this long; the server answers what `passes` lets through, by each socket after its
        /// own time. Gives the sockets that were asked.
        fn run(
            &mut self,
            span: Duration,
            passes: impl Fn(SocketId, &Control) -> Option<Duration>,
        ) -> Vec<SocketId> {
            let (until, mut asked) = (self.now + span, Vec::new());
            let mut answers: Vec<(Instant, SocketId, SocketAddr, Vec<u8>)> = Vec::new();
            while self.now < until {
                self.now += STEP;
                let now = self.now;
                for (_, socket, from, bytes) in answers.extract_if(.., |(at, ..)| *at <= now) {
                    let _ = self.node.handle_relay_control(from, socket, &bytes, now);
                }
                self.node.handle_timeout(now);
                let mut out = UdpBatch::default();
                self.node.take_datagrams(&mut out);
                for (target, bytes) in out.datagrams() {
                    let Target::Udp { remote, socket, .. } = target else { continue };
                    let Ok(question) = Control::parse(bytes) else { continue };
                    if matches!(question, Control::Reflect { .. }) {
                        asked.push(socket);
                    }
                    let Some(rtt) = passes(socket, &question) else { continue };
                    let observed = SocketAddr::from(([203, 0, 113, 1], 5000));
                    let answer = match question {
                        Control::Bind { node, counter, .. } => {
                            Control::Bound { node, counter, observed, proof: None }
                                .encode(Some(&RelayKey(KEY)))
                        }
                        Control::Reflect { tx, .. } => {
                            Control::Reflected { tx, observed, token: None }.encode(None)
                        }
                        _ => continue,
                    };
                    answers.push((now + rtt, socket, remote, answer.to_vec()));
                }
            }
            asked
        }
    }

    const FAST: Duration = Duration::from_millis(10);
    const SLOW: Duration = Duration::from_millis(30);

    fn is_bind(question: &Control) -> bool {
        matches!(question, Control::Bind { .. })
    }

    #[test]
    fn a_line_outlives_the_preferred_uplink() {
        let mut world = World::new(two());
        world.welcome(SERVER);
        world.run(Duration::from_secs(1), |_, _| Some(FAST));
        let line = world.line("e1").unwrap();
        world.node.take_socket_orders();

        let closed = |world: &mut World| {
            world.node.take_socket_orders().contains(&SocketOrder::Close { socket: line })
        };
        world.node.handle_uplinks(vec![uplink("e1", 2, false)], world.now);
        world.run(RETIREMENT / 2, |_, _| Some(FAST));
        assert!(!closed(&mut world), "its paths are needed now");
        assert!(world.node.uplink_statuses().is_empty(), "the only one is no choice");

        world.node.handle_uplinks(two(), world.now);
        let asked = world.run(Duration::from_millis(200), |_, _| Some(FAST));
        assert!(asked.contains(&line), "a further one again");
        assert_eq!(world.node.uplink_statuses().len(), 2);
        world.run(RETIREMENT * 2, |_, _| Some(FAST));
        assert!(!closed(&mut world));

        world.node.handle_uplinks(vec![uplink("e1", 2, false)], world.now);
        world.run(RETIREMENT * 2, |_, _| Some(FAST));
        assert!(closed(&mut world), "nothing goes by it");
    }

    #[test]
    fn a_server_that_starts_anew_moves_nobody_to_another_uplink() {
        let mut world = World::new(two());
        world.welcome(SERVER);
        let line = world.line("e1").unwrap();
        // The further line is the faster one.
        let rtt = |socket| if socket == SocketId::MAIN { SLOW } else { FAST };
        world.run(Duration::from_secs(5), |socket, _| Some(rtt(socket)));
        for down in [50, 500, 1_200, 4_000] {
            world.node.handle_link_down(world.now);
            world.run(Duration::from_millis(down), |_, _| None);
            // It tells anybody where it sees them, and knows no key yet.
            world.run(Duration::from_secs(40), |socket, question| {
                (!is_bind(question)).then_some(rtt(socket))
            });
            assert_eq!(world.node.relay.socket(), SocketId::MAIN, "down for {down} ms");
            world.welcome(SERVER);
            world.run(Duration::from_secs(1), |socket, _| Some(rtt(socket)));
            assert_eq!(world.node.relay.udp_works(), Some(true));
        }
        let asked = world.run(Duration::from_secs(60), |socket, _| Some(rtt(socket)));
        assert!(asked.iter().all(|socket| *socket == line), "the main socket has its binds");

        // A dark uplink is left as soon as ever.
        world.node.handle_link_down(world.now);
        let dark = |socket, _: &Control| (socket != SocketId::MAIN).then_some(FAST);
        world.run(SILENCE + STEP * 2, dark);
        assert_eq!(world.node.relay.socket(), line);
        world.run(Duration::from_secs(10), dark);
        assert_eq!(world.node.relay.socket(), line);

        // Nor does a server that starts anew move who goes by the further one.
        world.node.handle_link_down(world.now);
        let no_key = |socket, question: &Control| {
            (socket != SocketId::MAIN && !is_bind(question)).then_some(FAST)
        };
        world.run(Duration::from_secs(30), no_key);
        assert_eq!(world.node.relay.socket(), line);
        world.run(Duration::from_secs(30), |socket, _| (socket == SocketId::MAIN).then_some(SLOW));
        assert_eq!(world.node.relay.socket(), SocketId::MAIN, "the only one that answers");
    }

    #[test]
    fn a_line_that_is_lost_or_made_anew_is_opened_again() {
        let mut world = World::new(two());
        world.welcome(SERVER);
        let first = world.line("e1").unwrap();
        world.node.handle_socket_lost(first, world.now);
        assert_eq!(world.line("e1"), None);
        world.node.handle_uplinks(two(), world.now);
        world.run(REOPENING + STEP * 2, |_, _| Some(FAST));
        let second = world.line("e1").expect("another socket");
        assert_ne!(second, first);
        assert_eq!(world.node.uplink_statuses()[1].answers, Some(true));

        world.node.take_socket_orders();
        let again = vec![uplink("e0", 1, false), uplink("e1", 3, false)];
        world.node.handle_uplinks(again, world.now);
        let orders = world.node.take_socket_orders();
        assert!(orders.contains(&SocketOrder::Close { socket: second }), "{orders:?}");
        assert_ne!(world.line("e1"), Some(second), "bound to an interface that is gone");
    }

    #[test]
    fn an_uplink_of_another_family_than_the_servers_is_no_choice() {
        let mut world = World::new(two());
        for (server, choice) in [("198.51.100.7", true), ("2001:db8::7", false)] {
            let server = server.parse().unwrap();
            assert_eq!(world.node.uplinks.has_choice(SocketAddr::new(server, 1)), choice);
        }
        world.node.handle_uplinks(vec![uplink("e1", 2, false)], world.now);
        assert!(!world.node.uplinks.has_choice(SocketAddr::new(SERVER, 1)), "it retires");
    }
}
