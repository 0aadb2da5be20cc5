//! What has to be on disk, and what may be told of it. The server waits for a node that says which
//! rules and which removals are in effect with it: that is said once a restart would not undo them.

use std::time::{Duration, Instant};

use super::Daemon;
use super::state::StateError;
use crate::io::clock;
use crate::node::Clocks;
use crate::wire::control::{self, ClientMessage};

/// The netmap changes in groups, and a change that is lost only costs a re-fetch.
const SAVE_DELAY: Duration = Duration::from_millis(500);
/// What could not be saved is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// When the netmap is saved next, and what waits for that.
#[derive(Debug, Default)]
pub(super) struct Saving {
    due: Option<Instant>,
    /// The server has said something since the netmap was saved.
    has_news: bool,
    /// The last attempt has failed.
    fails: bool,
    /// What is told when it has been saved.
    held: Option<ClientMessage>,
}

impl Saving {
    /// Something has changed that is to be saved soon.
    pub(super) fn plan(&mut self, now: Instant) {
        self.due.get_or_insert(now + SAVE_DELAY);
    }

    /// When it is to be saved.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The server has said something about the network.
    pub(super) fn note_news(&mut self) {
        self.has_news = true;
    }

    /// There is another control connection: what was held is not for that.
    pub(super) fn forget_held(&mut self) {
        self.held = None;
    }

    /// An attempt was made. Returns whether all is on disk.
    fn note_attempt(&mut self, result: Result<(), StateError>, now: Instant) -> bool {
        match result {
            Ok(()) => *self = Self { held: self.held.take(), ..Self::default() },
            Err(error) => {
                if !self.fails {
                    tracing::warn!(%error, "the netmap could not be saved; the server is not told \
                        that its changes are in effect before that works");
                }
                self.fails = true;
                self.due = Some(now + RETRY);
            }
        }
        !self.fails
    }
}

impl Daemon {
    /// Writes the netmap. Returns whether that has worked; it is tried again by itself if not.
    pub(super) fn save(&mut self) -> bool {
        let mut netmap = self.node.netmap().clone();
        let (own, now) = (clock::unix_seconds(), clock::now());
        netmap.clocks = self.node.server_time(now).map(|server| Clocks { server, own });
        netmap.call_epoch = Some(self.node.call_epoch());
        self.saving.note_attempt(self.state.save_netmap(&netmap), now)
    }

    /// Saves if it is time to.
    pub(super) fn save_when_due(&mut self, now: Instant) {
        if self.saving.due().is_some_and(|due| due <= now)
            && self.save()
            && let Some(held) = self.saving.held.take()
        {
            self.tell_server(&held);
        }
    }

    /// Tells the server, of what is in effect here only what is on disk as well.
    pub(super) fn say(&mut self, message: ClientMessage) {
        if message.applied.is_some() && self.saving.has_news && !self.save() {
            self.saving.held = Some(message);
        } else {
            self.tell_server(&message);
        }
    }

    fn tell_server(&self, message: &ClientMessage) {
        if let Some(link) = self.ports.link() {
            // When the link is full or gone, the next hello says the same.
            let _ = link.try_send_control(control::encode(message));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::StateDir;
    use super::*;
    use crate::node::{Identity, Netmap};
    use crate::testing::epoch;
    use crate::types::{NetworkId, NodeId, OverlayRange};

    #[test]
    fn what_could_not_be_saved_is_tried_again_until_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("state");
        let state = StateDir::open(&place).unwrap();
        let range =
            OverlayRange::new("10.77.0.0/20".parse().unwrap(), "fd00:1:2::/48".parse().unwrap());
        let range = range.unwrap();
        let identity = Identity {
            network: NetworkId([1; 8]),
            id: NodeId::new(1).unwrap(),
            name: "alice".parse().unwrap(),
            addrs: range.addresses(1).unwrap(),
            range,
        };
        let netmap = Netmap { identity: Some(identity), ..Netmap::default() };
        let (mut saving, mut now) = (Saving::default(), epoch());
        saving.note_news();
        saving.plan(now);
        assert_eq!(saving.due(), Some(now + SAVE_DELAY));
        std::fs::remove_dir_all(&place).unwrap();
        for _ in 0..3 {
            now += RETRY;
            assert!(!saving.note_attempt(state.save_netmap(&netmap), now), "there is no place");
            assert_eq!(saving.due(), Some(now + RETRY));
            assert!(saving.has_news, "nothing of it may be told");
        }
        saving.held = Some(ClientMessage::default());
        std::fs::create_dir(&place).unwrap();
        assert!(saving.note_attempt(state.save_netmap(&netmap), now));
        assert!(saving.due().is_none() && !saving.has_news);
        assert!(saving.held.is_some(), "now it is told");
    }
}
