//! How often a member may have something new about itself written down: each time is a write to disk
//! that everything else waits for, lines in the log of changes, and news for every peer.
//!
//! It counts for the member, whatever connections it makes.

use std::collections::BTreeMap;

use crate::types::NodeId;

/// A member changes something no more often than this in the long run, in seconds.
const SPACING_S: u64 = 60;
/// So many changes may come at once: a node that is set up, moved and set up again.
const AT_ONCE_S: u64 = 5 * SPACING_S;

/// Until when each member has used up its changes, in Unix seconds. As many as there are members.
#[derive(Debug, Default)]
pub(super) struct Pace(BTreeMap<NodeId, u64>);

impl Pace {
    /// Whether a change of this member is taken now.
    pub(super) fn allows(&self, node: NodeId, wall: u64) -> bool {
        self.used_until(node, wall) + SPACING_S <= wall.saturating_add(AT_ONCE_S)
    }

    /// One was taken.
    pub(super) fn note(&mut self, node: NodeId, wall: u64) {
        let until = self.used_until(node, wall) + SPACING_S;
        self.0.insert(node, until);
    }

    /// No earlier than now. A time that no change can have led to is of a clock that was set back.
    fn used_until(&self, node: NodeId, wall: u64) -> u64 {
        let possible = wall..=wall.saturating_add(AT_ONCE_S);
        self.0.get(&node).copied().filter(|until| possible.contains(until)).unwrap_or(wall)
    }

    pub(super) fn forget(&mut self, node: NodeId) {
        self.0.remove(&node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_changes_at_once_then_one_a_minute_and_each_member_by_itself() {
        let mut pace = Pace::default();
        let [one, other] = [1, 2].map(|number| NodeId::new(number).unwrap());
        let mut taken = |node, from: u64, until: u64| {
            let take = |wall: &u64| {
                let allowed = pace.allows(node, *wall);
                if allowed {
                    pace.note(node, *wall);
                }
                allowed
            };
            (from..until).filter(take).count()
        };
        assert_eq!(taken(one, 10_000, 10_010), 5);
        assert_eq!(taken(one, 10_010, 10_610), 10, "in ten minutes");
        assert_eq!(taken(other, 10_000, 10_010), 5);
        assert_eq!(taken(one, 20_000, 20_010), 5, "after a silence");
        assert_eq!(taken(one, 1_000, 1_010), 5, "a clock that was set back keeps nobody out");
    }
}
