//! How often a member may have something new about itself written down: each time is a write to disk
//! that everything else waits for, lines in the log of changes, and news for every peer.
//!
//! It counts for the member, whatever connections it makes.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::types::{Account, NodeId, Rate};

/// So many at once, for a node that is set up, moved and set up again, and then one a minute.
const CHANGES: Rate = Rate::new(5, Duration::from_secs(60));

/// What each member has had of its changes, in time since the Unix epoch. As many as there are members.
#[derive(Debug, Default)]
pub(super) struct Pace(BTreeMap<NodeId, Account<Duration>>);

impl Pace {
    /// Whether a change of this member is taken now, in Unix seconds.
    pub(super) fn allows(&self, node: NodeId, wall: u64) -> bool {
        let now = Duration::from_secs(wall);
        self.account(node, now).has(CHANGES, 1, now)
    }

    /// One that was allowed was taken.
    pub(super) fn note(&mut self, node: NodeId, wall: u64) {
        let now = Duration::from_secs(wall);
        let mut account = self.account(node, now);
        account.take(CHANGES, 1, now);
        self.0.insert(node, account);
    }

    fn account(&self, node: NodeId, now: Duration) -> Account<Duration> {
        self.0.get(&node).copied().unwrap_or_default().unless_set_back(CHANGES, now)
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
