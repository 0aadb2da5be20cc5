//! Two running machines with the same keys: a copied disk, container or state directory.
//!
//! The newest connection of a node counts, so two such machines would throw each other out for ever,
//! and every peer would hear of each turn. Each run of a node's program has a number. One that has
//! ended never connects again; so when a number comes back after another one has taken its place, and
//! that other one is connected at this moment, two are running. To be sure that it is not a hello
//! that was long on its way, it has to happen twice. From then on, who is connected stays, and the
//! other one is turned away.
//!
//! A node that moves, or whose old connection is half open, keeps its number; one that starts again
//! takes a new one and leaves the old one for good.

use std::collections::{BTreeMap, VecDeque};

use super::{Act, ConnectionId, Server};
use crate::types::NodeId;
use crate::wire::control::{RefusedCode, ServerMessage};

/// Returns count together that are no further apart, in seconds.
const WINDOW_S: u64 = 600;
/// So many returns make a clone.
const RETURNS: usize = 2;
/// It is one for so long after the last try of the other, in seconds; nodes try once a minute.
const MARK_S: u64 = 300;
/// Runs of one node that are remembered.
const RUNS: usize = 8;

/// What is known of the runs of each node.
#[derive(Debug, Default)]
pub(super) struct Clones(BTreeMap<NodeId, Runs>);

#[derive(Debug, Default)]
struct Runs {
    seen: VecDeque<u64>,
    /// When a run came back while another was connected, in Unix seconds.
    returns: Vec<u64>,
    /// When the last machine was turned away, in Unix seconds.
    marked: Option<u64>,
}

/// What to do about an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Welcome,
    Found,
    Known,
}

impl Clones {
    fn look(&mut self, node: NodeId, run: u64, present: Option<u64>, wall: u64) -> Verdict {
        let cloned = self.is_cloned(node, wall);
        let runs = self.0.entry(node).or_default();
        let rival = present.is_some_and(|present| present != run);
        if rival && cloned {
            runs.marked = Some(wall);
            return Verdict::Known;
        }
        if rival && runs.seen.contains(&run) {
            runs.returns.retain(|at| wall.abs_diff(*at) < WINDOW_S);
            runs.returns.push(wall);
            if runs.returns.len() >= RETURNS {
                runs.marked = Some(wall);
                return Verdict::Found;
            }
        }
        if !runs.seen.contains(&run) {
            runs.seen.push_back(run);
            if runs.seen.len() > RUNS {
                runs.seen.pop_front();
            }
        }
        Verdict::Welcome
    }

    /// Whether two running machines have the node's keys.
    pub(super) fn is_cloned(&self, node: NodeId, wall: u64) -> bool {
        let marked = self.0.get(&node).and_then(|runs| runs.marked);
        marked.is_some_and(|at| wall.abs_diff(at) < MARK_S)
    }

    pub(super) fn forget(&mut self, node: NodeId) {
        self.0.remove(&node);
    }
}

impl Server {
    /// What is to be done about a node whose twin is connected; none when it has no twin.
    pub(super) fn rival(
        &mut self,
        connection: ConnectionId,
        node: NodeId,
        run: u64,
        wall: u64,
    ) -> Option<Act> {
        let present = self.online.get(&node).and_then(|id| self.connections.get(id));
        let present = present.and_then(|present| present.instance);
        match self.clones.look(node, run, present, wall) {
            Verdict::Welcome => None,
            Verdict::Found => Some(Act::Rival { connection, node, first: true }),
            Verdict::Known => Some(Act::Rival { connection, node, first: false }),
        }
    }

    /// Tells both machines of each other; who is connected stays.
    pub(super) fn turn_away(&mut self, connection: ConnectionId, node: NodeId) {
        let rival = self.connections.get(&connection).map(|known| known.about.observed);
        if let Some(present) = self.online.get(&node).copied() {
            self.send(present, &ServerMessage { rival, ..Default::default() });
        }
        self.refuse(connection, RefusedCode::Cloned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_does_not_outlive_a_clock_that_is_set_back() {
        const WALL: u64 = 1_800_000_000;
        let node = NodeId::new(1).unwrap();
        let mut clones = Clones::default();
        clones.look(node, 1, None, WALL);
        clones.look(node, 2, Some(1), WALL);
        assert_eq!(clones.look(node, 1, Some(2), WALL), Verdict::Welcome, "once may be chance");
        assert_eq!(clones.look(node, 2, Some(1), WALL + 1), Verdict::Found);
        assert!(clones.is_cloned(node, WALL + 2) && !clones.is_cloned(node, WALL + 1 + MARK_S));
        let earlier = WALL - 86_400;
        assert!(!clones.is_cloned(node, earlier));
        assert_eq!(clones.look(node, 3, Some(2), earlier), Verdict::Welcome);
    }
}
