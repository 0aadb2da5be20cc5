//! Costly ways to a peer that the cheap ones did not reach: when one is tried, and what the two
//! sides agree on. Carrying it out is in `birthday`; which way fits is in `path::birthday`.
//!
//! ```text
//! A: waited long enough    --offer-->    B: which way fits both?
//!                         <--accept--       does its part
//! A: does its part
//! either: direct, or done  --stop-->     gives up its part
//! ```
//!
//! All of it goes by relay. One run at a time per node; of two offers that cross, the one of the
//! lower id stands. Who does not know the message never answers, and is spared the costly ways.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;

use super::Node;
use super::birthday::{Part, Probes};
use crate::path::Via;
use crate::path::birthday::{Budget, History, Targets, way};
use crate::types::{NodeId, usable_underlay};
use crate::wire::disco::Message;
use crate::wire::punch::{NatHint, Punch, Step, Way};

/// The node with the higher id lets the other one offer first.
const AFTER_YOU: Duration = Duration::from_millis(300);
/// An offer is answered by then, or never.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Who is busy is asked again after this and a random part of it.
const BUSY_WAIT: Duration = Duration::from_secs(4);
/// Who has no way that could work is asked again after this.
const HOPELESS_WAIT: Duration = Duration::from_secs(600);
/// A run that the other side stopped is not started over before this.
const STOPPED_WAIT: Duration = Duration::from_secs(5);

/// What costly ways have cost and brought, since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PunchCounters {
    /// Runs of birthday probing.
    pub birthday_runs: u64,
    /// Tries with a fresh local port.
    pub fresh_ports: u64,
    /// Either, that ended with a direct path.
    pub found: u64,
    /// Extra sockets opened.
    pub sockets: u64,
    /// Ports probed.
    pub probes: u64,
}

/// The costly ways of one node.
#[derive(Debug, Default)]
pub(super) struct Punching {
    pub(super) run: Option<Run>,
    pub(super) counters: PunchCounters,
    pub(super) budget: Budget,
    pub(super) probes: Probes,
    targets: Targets,
    histories: BTreeMap<NodeId, History>,
}

/// The run of this moment.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) peer: NodeId,
    pub(super) number: u32,
    pub(super) part: Part,
    pub(super) costly: bool,
    /// Nobody answered our offer.
    pub(super) silent: bool,
    pub(super) next_at: Instant,
    pub(super) end_at: Instant,
}

impl Punching {
    /// The peer is gone.
    pub(super) fn forget_peer(&mut self, id: NodeId) {
        self.histories.remove(&id);
        if let Some(run) = self.run.take_if(|run| run.peer == id) {
            self.budget.spend(run.part.probes_sent(), run.next_at);
        }
    }

    pub(super) fn history(&mut self, id: NodeId) -> &mut History {
        self.histories.entry(id).or_default()
    }
}

impl Node {
    /// When a costly way has something to do.
    pub(super) fn punch_next_at(&self) -> Option<Instant> {
        if let Some(run) = &self.punching.run {
            return Some(run.next_at.min(run.end_at));
        }
        self.next_stuck().map(|(at, _)| at)
    }

    /// Does what is due.
    pub(super) fn handle_punch_timeout(&mut self, now: Instant) {
        if let Some(run) = &self.punching.run {
            let (next_at, end_at) = (run.next_at, run.end_at);
            if end_at <= now {
                self.end_run(false, now);
            } else if next_at <= now {
                self.drive_run(now);
            }
        }
        // Each of them is offered a run, or has to wait.
        while self.punching.run.is_none()
            && let Some((_, id)) = self.next_stuck().filter(|(at, _)| *at <= now)
        {
            self.offer(id, now);
        }
    }

    /// The peer whose turn is next. Without a known IPv4 endpoint of ours there is nothing to try.
    fn next_stuck(&self) -> Option<(Instant, NodeId)> {
        self.reflexive_v4()?;
        let own = self.netmap.identity.as_ref()?.id;
        let fresh = History::default();
        let due = |(id, peer): (&NodeId, &super::PeerControl)| {
            let history = self.punching.histories.get(id).unwrap_or(&fresh);
            let late = if own > *id { AFTER_YOU } else { Duration::ZERO };
            Some((history.due_at(peer.agent.stuck_since()? + late), *id))
        };
        self.peers.iter().filter_map(due).min()
    }

    /// Where the server sees our main socket, over IPv4; none if we can send nothing by it.
    fn reflexive_v4(&self) -> Option<SocketAddr> {
        self.prediction.first_mapping().filter(|seen| seen.is_ipv4() && self.has_ipv4())
    }

    fn can_probe(&self, now: Instant) -> bool {
        self.settings.birthday_probing && self.punching.budget.probes(now).is_some()
    }

    fn offer(&mut self, id: NodeId, now: Instant) {
        let birthday = self.settings.birthday_probing;
        if birthday && !self.can_probe(now) && self.prediction.nat_hint() != NatHint::Varies {
            // The entries of the last run have to go first. Without a word of birthday probing the
            // peer would call it hopeless.
            return self.wait_for_turn(id, now);
        }
        let history = self.punching.history(id);
        history.postpone(ANSWER_LIMIT, now);
        let tries = history.tries();
        let number = self.rng.random();
        self.punching.run = Some(Run {
            peer: id,
            number,
            part: Part::Offered,
            costly: false,
            silent: false,
            next_at: now + ANSWER_LIMIT,
            end_at: now + ANSWER_LIMIT * 2,
        });
        self.say(id, number, Step::Offer { birthday, tries });
    }

    fn wait_for_turn(&mut self, id: NodeId, now: Instant) {
        let wait = BUSY_WAIT.mul_f64(self.rng.random_range(1.0..2.0));
        self.punching.history(id).ask_again(wait, now);
    }

    /// By relay, like everything here.
    fn say(&mut self, id: NodeId, run: u32, step: Step) {
        let Some(via) = self.relay_path() else { return };
        let (nat, reflexive) = (self.prediction.nat_hint(), self.reflexive_v4());
        self.send_disco(id, via, &Message::Punch(Punch { step, run, nat, reflexive }));
    }

    /// Something arrived about a run.
    pub(super) fn handle_punch(&mut self, id: NodeId, via: Via, punch: &Punch, now: Instant) {
        if !via.is_relay() {
            return;
        }
        self.punching.history(id).hear();
        let ours = |run: &&Run| run.peer == id && run.number == punch.run;
        let open = self.punching.run.as_ref().filter(ours);
        let offered = open.is_some_and(|run| matches!(run.part, Part::Offered));
        match punch.step {
            Step::Offer { birthday, tries } => self.answer_offer(id, punch, birthday, tries, now),
            Step::Accept { way } if offered => {
                let tries = self.punching.history(id).tries();
                self.start_run(id, punch, way, true, tries, now);
            }
            // Also when it had agreed, and something else has come between: nothing was tried.
            Step::Busy if open.is_some() => {
                self.clear_run(now);
                self.wait_for_turn(id, now);
            }
            Step::Hopeless if offered => {
                self.punching.run = None;
                self.punching.history(id).postpone(HOPELESS_WAIT, now);
            }
            Step::Stop { found: false } if open.is_some() => self.end_run(true, now),
            // Its path is about to be proved on our side, too.
            Step::Stop { found: true } if open.is_some() => {
                self.punching.counters.found += 1;
                self.clear_run(now);
                self.punching.history(id).postpone(STOPPED_WAIT, now);
            }
            _ => {}
        }
    }

    fn answer_offer(&mut self, id: NodeId, offer: &Punch, birthday: bool, tries: u8, now: Instant) {
        if !self.has_ipv4() {
            return self.refuse_offer(id, offer, now);
        }
        let own = self.netmap.identity.as_ref().map(|identity| identity.id);
        let crossed = self.punching.run.as_ref().is_some_and(|run| {
            run.peer == id && matches!(run.part, Part::Offered) && own > Some(id)
        });
        if crossed {
            self.punching.run = None;
            self.punching.history(id).postpone(Duration::ZERO, now);
        }
        let direct = self.is_direct(id);
        if let Some(peer) = self.peers.get_mut(&id).filter(|_| direct) {
            // The peer is not direct: does our path still lead to it?
            peer.agent.verify(now);
            self.drain_agent(id, now);
        }
        let busy = self.punching.run.is_some()
            || direct
            || self.reflexive_v4().is_none()
            || !self.punching.history(id).allows(now);
        if busy {
            return self.say(id, offer.run, Step::Busy);
        }
        let tries = tries.max(self.punching.history(id).tries());
        let on = birthday && self.settings.birthday_probing;
        let free = offer.reflexive.is_none_or(|at| self.punching.targets.allows(at.ip(), now));
        match way(offer.nat, self.prediction.nat_hint(), on, tries, own > Some(id)) {
            Some(way) if way.is_birthday() && !(self.can_probe(now) && free) => {
                self.say(id, offer.run, Step::Busy);
            }
            Some(way) => {
                self.say(id, offer.run, Step::Accept { way });
                self.start_run(id, offer, way, false, tries, now);
            }
            None => self.refuse_offer(id, offer, now),
        }
    }

    /// There is no way that could work.
    fn refuse_offer(&mut self, id: NodeId, offer: &Punch, now: Instant) {
        self.say(id, offer.run, Step::Hopeless);
        self.punching.history(id).postpone(HOPELESS_WAIT, now);
    }

    /// Both have agreed: our part.
    fn start_run(
        &mut self,
        id: NodeId,
        said: &Punch,
        way: Way,
        we_offered: bool,
        tries: u8,
        now: Instant,
    ) {
        self.punching.run = None;
        self.punching.history(id).start(tries);
        // A lying peer could turn our probes against a stranger.
        let known = |at: &SocketAddr| {
            let agent = self.peers.get(&id).map(|peer| &peer.agent);
            at.is_ipv4()
                && usable_underlay(*at)
                && agent.is_some_and(|agent| agent.has_address(at.ip()))
        };
        let Some(target) = said.reflexive.filter(known) else {
            self.punching.history(id).postpone(HOPELESS_WAIT, now);
            return self.say(id, said.run, Step::Stop { found: false });
        };
        if way.is_birthday() && !self.punching.targets.start(target.ip(), now) {
            // Whoever claimed that address last got nowhere.
            self.wait_for_turn(id, now);
            return self.say(id, said.run, Step::Busy);
        }
        let part = match (way, we_offered) {
            (Way::BothMove, _) => Part::moving(),
            (Way::OffererOpens, true) | (Way::AccepterOpens, false) => Part::opening(target),
            (Way::OffererOpens, false) | (Way::AccepterOpens, true) => {
                match self.punching.budget.probes(now) {
                    Some(probes) => Part::probing(target.ip(), probes),
                    None => return self.say(id, said.run, Step::Busy),
                }
            }
        };
        let counters = &mut self.punching.counters;
        if way.is_birthday() {
            counters.birthday_runs += 1;
        } else {
            counters.fresh_ports += 1;
        }
        self.punching.run = Some(Run {
            peer: id,
            number: said.run,
            next_at: now + part.delay(),
            end_at: now + part.limit(),
            costly: way.is_birthday(),
            silent: false,
            part,
        });
        self.drive_run(now);
    }

    /// A peer that is direct needs no costly way. `newly` tells that it was not direct before.
    pub(super) fn note_direct(&mut self, id: NodeId, newly: bool, now: Instant) {
        let run = self.punching.run.as_ref().filter(|run| run.peer == id);
        if let Some((number, offered)) =
            run.map(|run| (run.number, matches!(run.part, Part::Offered)))
        {
            self.punching.counters.found += u64::from(!offered);
            self.clear_run(now);
            self.say(id, number, Step::Stop { found: true });
        }
        if let Some(history) = self.punching.histories.get_mut(&id).filter(|_| newly) {
            history.succeed(now);
        }
        let primary = self.peers.get(&id).and_then(|peer| peer.agent.choice().primary);
        if let Some(Via::Direct { remote, .. }) = primary {
            self.punching.targets.found(remote.ip());
        }
    }

    /// The run has found nothing.
    pub(super) fn end_run(&mut self, told: bool, now: Instant) {
        let Some(run) = &self.punching.run else { return };
        let (id, number, costly, silent) = (run.peer, run.number, run.costly, run.silent);
        self.clear_run(now);
        let history = self.punching.history(id);
        if silent {
            history.note_silence(now);
        } else {
            history.fail(costly, now);
        }
        if !told {
            self.say(id, number, Step::Stop { found: false });
        }
    }

    /// Ends our part: what it sent is accounted for, and sockets without a path are closed.
    pub(super) fn clear_run(&mut self, now: Instant) {
        let Some(run) = self.punching.run.take() else { return };
        self.punching.budget.spend(run.part.probes_sent(), now);
        self.release_sockets(run.peer, now);
    }

    /// The network is another one: all can be different.
    pub(super) fn forget_punching(&mut self, now: Instant) {
        self.clear_run(now);
        self.punching.histories.clear();
        self.punching.targets = Targets::default();
    }

    /// What costly ways have cost and brought so far.
    #[must_use]
    pub fn punch_counters(&self) -> PunchCounters {
        self.punching.counters
    }
}

impl super::predict::Prediction {
    /// What the two reflector ports tell.
    pub(super) fn nat_hint(&self) -> NatHint {
        match self.mappings() {
            Some((first, second)) if first == second => NatHint::Steady,
            Some(_) => NatHint::Varies,
            // Its NAT has started over, and is still the same one.
            None if self.has_guesses() => NatHint::Varies,
            None => NatHint::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::{Netmap, NodeSettings};
    use crate::testing::epoch;
    use crate::types::SecretKey;

    #[test]
    fn an_endpoint_behind_a_translator_starts_no_run_that_cannot_send() {
        let key = SecretKey::from_bytes([1; 32]);
        let settings = NodeSettings::default();
        let mut node = Node::new(key, Netmap::default(), settings, [7; 32], 1, epoch());
        node.note_first_port("198.51.100.9:4000".parse().unwrap(), epoch());
        assert!(node.reflexive_v4().is_some() && node.facts(epoch()).ipv4.is_none());
        let [six, four] = ["[2001:db8::7]:4000", "192.168.1.7:4000"].map(|it| it.parse().unwrap());
        node.handle_host_endpoints(vec![six], epoch());
        node.note_first_port("198.51.100.9:4000".parse().unwrap(), epoch());
        assert_eq!((node.reflexive_v4(), node.facts(epoch()).ipv4), (None, Some(false)));
        node.handle_host_endpoints(vec![six, four], epoch());
        assert!(node.reflexive_v4().is_some() && node.facts(epoch()).ipv4 == Some(true));
    }
}
