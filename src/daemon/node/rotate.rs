//! The node key is renewed by itself, and when somebody asks for it.
//!
//! The order is what makes it safe to be killed at any point: the new key is on disk, beside the old
//! one, before the server hears of it; the server stores it before any peer does; and the old one
//! leaves the disk when nobody can need it. A node that starts again says in its hello which key it
//! has.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::Daemon;
use super::report::{NodeKeyReport, SCHEMA};
use crate::daemon::exit;
use crate::io::clock;
use crate::io::local::Refusal;
use crate::node::RotateError;
use crate::types::{PublicKey, SecretKey};

/// How often it is looked at whether the key is due. The time of day decides that, and a machine may
/// be suspended, or have its clock set.
const LOOK_INTERVAL: Duration = Duration::from_secs(600);
/// The last part of its life is drawn by lot, so that nodes that were set up together do not renew
/// their keys together: a tenth.
const LOT: u64 = 10;

/// `overlay rotate --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotated {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// The new node key, in base64.
    pub public_key: String,
    /// The one before it, which stays good for those who know no other.
    pub old_public_key: String,
}

/// When the key is renewed, and who waits for it.
#[derive(Debug)]
pub(super) struct Rotation {
    look_at: Instant,
    waiting: Option<(Rotated, oneshot::Sender<Result<Rotated, Refusal>>)>,
}

impl Rotation {
    pub(super) fn new(now: Instant) -> Self {
        Self { look_at: now, waiting: None }
    }

    pub(super) fn deadline(&self) -> Instant {
        self.look_at
    }
}

/// How old a key gets, in seconds: the longest time, less a part that the key itself decides.
fn life_s(key: &PublicKey, longest_s: u64) -> u64 {
    let lot = u64::from(u16::from_le_bytes([key.0[0], key.0[1]]));
    longest_s - longest_s / LOT * lot / u64::from(u16::MAX)
}

/// Whether a key of `since` is due at `wall`, whichever way the clock was set in between.
fn is_due(key: &PublicKey, since: u64, longest_s: u64, wall: u64) -> bool {
    wall.abs_diff(since) >= life_s(key, longest_s)
}

impl Daemon {
    /// Renews the key when it is old enough, and the server is there to tell the others.
    pub(super) fn look_at_key(&mut self, now: Instant) {
        if self.rotation.look_at > now {
            return;
        }
        self.rotation.look_at = now + LOOK_INTERVAL;
        let Some(longest) = self.options.rotate_key_after else { return };
        let (key, since) = (self.node.self_status().public_key, self.state.key_since());
        if !is_due(&key, since, longest.as_secs(), clock::unix_seconds()) {
            return;
        }
        match self.rotate(now) {
            Ok(_) => {}
            // It is tried again.
            Err(Failed::Now(error)) => tracing::debug!(%error, "the node key is due"),
            Err(Failed::Store(error)) => tracing::warn!(%error, "a new node key cannot be stored"),
        }
    }

    /// Somebody asks for it; the answer waits until the server has stored the key.
    pub(super) fn handle_rotate(&mut self, reply: oneshot::Sender<Result<Rotated, Refusal>>) {
        match self.rotate(clock::now()) {
            Ok(rotated) => self.rotation.waiting = Some((rotated, reply)),
            Err(failed) => {
                // The command may have gone away meanwhile.
                let _ = reply.send(Err(failed.refusal()));
            }
        }
    }

    fn rotate(&mut self, now: Instant) -> Result<Rotated, Failed> {
        self.node.may_rotate(now).map_err(Failed::Now)?;
        let key = SecretKey::from_bytes(rand::random());
        let old = self.node.self_status().public_key;
        self.state.store_new_key(&key).map_err(|error| Failed::Store(error.to_string()))?;
        let rotated = Rotated {
            schema: SCHEMA,
            public_key: key.public().to_string(),
            old_public_key: old.to_string(),
        };
        tracing::info!(new = key.public().short(), old = old.short(), "the node key is renewed");
        self.node.rotate(key, now).map_err(Failed::Now)?;
        Ok(rotated)
    }

    /// The server has stored the new key.
    pub(super) fn note_key_told(&mut self) {
        if let Err(error) = self.state.note_key_told() {
            tracing::warn!(%error, "the state of the node key could not be saved");
        }
        if let Some((rotated, reply)) = self.rotation.waiting.take() {
            // The command may have gone away meanwhile.
            let _ = reply.send(Ok(rotated));
        }
    }

    /// How old the key is, and whether it is being renewed.
    pub(super) fn key_report(&self) -> NodeKeyReport {
        NodeKeyReport {
            age_s: clock::unix_seconds().saturating_sub(self.state.key_since()),
            stored: self.node.key_is_told(),
            old_accepted: self.node.has_old_key(),
        }
    }

    /// Every peer has been heard under the new key.
    pub(super) fn forget_old_key(&mut self) {
        tracing::info!("every peer uses the new node key, the old one is gone");
        if let Err(error) = self.state.forget_old_key() {
            tracing::warn!(%error, "the old node key is still on disk");
        }
    }
}

enum Failed {
    Now(RotateError),
    Store(String),
}

impl Failed {
    fn refusal(&self) -> Refusal {
        let (cause, help) = match self {
            Self::Now(error @ RotateError::NoServer) => (
                error.to_string(),
                "overlay status shows the way to the server; type the command again when it is there",
            ),
            Self::Now(error @ RotateError::UnderWay) => {
                (error.to_string(), "type the command again in three minutes")
            }
            Self::Store(error) => {
                (error.clone(), "look at the disk of the state directory (df -h), then try again")
            }
        };
        Refusal {
            code: exit::FAILED,
            error: "the node key was not renewed".into(),
            cause,
            help: help.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;

    #[test]
    fn keys_live_up_to_their_time_and_not_all_the_same() {
        let lives: Vec<u64> =
            (0..=255).map(|byte| life_s(&PublicKey([byte; 32]), 30 * DAY)).collect();
        assert!(lives.iter().all(|life| (27 * DAY..=30 * DAY).contains(life)));
        assert_eq!((lives[0], lives[255]), (30 * DAY, 27 * DAY));
        let distinct: std::collections::BTreeSet<u64> = lives.into_iter().collect();
        assert_eq!(distinct.len(), 256);
    }

    #[test]
    fn a_clock_that_was_set_renews_a_key_once_and_not_again_and_again() {
        let key = PublicKey([0; 32]);
        let now = 1_800_000_000;
        assert!(!is_due(&key, now, 30 * DAY, now + 30 * DAY - 1));
        assert!(is_due(&key, now, 30 * DAY, now + 30 * DAY));
        assert!(is_due(&key, now, 30 * DAY, now + 10 * 365 * DAY), "ten years ahead");
        assert!(
            is_due(&key, now, 30 * DAY, 5),
            "no clock at all: once, then the age counts from there"
        );
        assert!(!is_due(&key, 5, 30 * DAY, 600));
        assert!(!is_due(&key, now, 30 * DAY, now - DAY), "a day back");
    }
}
