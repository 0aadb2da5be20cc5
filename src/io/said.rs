//! First messages of handshakes that were answered already.
//!
//! To answer one takes the server a fifth of a millisecond, and whoever has recorded one can say it
//! as often as he likes. Nobody honest says one twice, since its ephemeral key is made for it: what a
//! source says again is turned away before any Diffie-Hellman. By source, so that a recording that is
//! faster than the message itself keeps nobody out; this machine itself may say what it likes.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use crate::types::source_of;

/// So many of the last ones are remembered at least, and twice as many at most.
const REMEMBERED: usize = 8192;

/// The first messages that each source has said, of the last thousands.
#[derive(Debug, Default)]
pub struct Said {
    /// With keys of its own: nobody outside can make two messages look like one.
    hasher: RandomState,
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    young: HashSet<u64>,
    old: HashSet<u64>,
}

impl Said {
    /// Whether `source` has said a message with this ephemeral key, and it was answered.
    #[must_use]
    pub fn is_known(&self, source: IpAddr, ephemeral: &[u8; 32]) -> bool {
        let mark = self.mark(source, ephemeral);
        let last = self.last();
        last.young.contains(&mark) || last.old.contains(&mark)
    }

    /// It is answered now.
    pub fn note(&self, source: IpAddr, ephemeral: &[u8; 32]) {
        if source.is_loopback() {
            return;
        }
        let mark = self.mark(source, ephemeral);
        let mut last = self.last();
        if last.young.len() >= REMEMBERED {
            last.old = std::mem::take(&mut last.young);
        }
        last.young.insert(mark);
    }

    fn mark(&self, source: IpAddr, ephemeral: &[u8; 32]) -> u64 {
        self.hasher.hash_one((source_of(source), ephemeral))
    }

    fn last(&self) -> std::sync::MutexGuard<'_, Last> {
        // A panic between its changes would at worst forget some messages.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> [u8; 32] {
        let mut key = [7; 32];
        key[..8].copy_from_slice(&number.to_be_bytes());
        key
    }

    #[test]
    fn what_a_source_says_again_is_known_and_others_may_say_it_once() {
        let said = Said::default();
        let [home, same, other]: [IpAddr; 3] =
            ["192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"].map(|ip| ip.parse().unwrap());
        assert!(!said.is_known(home, &key(1)));
        said.note(home, &key(1));
        assert!(said.is_known(home, &key(1)) && said.is_known(same, &key(1)));
        assert!(!said.is_known(home, &key(2)) && !said.is_known(other, &key(1)));
        let here = "127.0.0.1".parse().unwrap();
        said.note(here, &key(1));
        assert!(!said.is_known(here, &key(1)));
    }

    #[test]
    fn the_last_thousands_are_known_and_no_more_is_kept() {
        let (said, home) = (Said::default(), "192.0.2.1".parse().unwrap());
        for number in 0..5 * REMEMBERED {
            said.note(home, &key(number));
            let before = number.saturating_sub(REMEMBERED - 1);
            assert!(said.is_known(home, &key(before)), "{before} of {number}");
        }
        let last = said.last();
        assert!(last.young.len() + last.old.len() <= 2 * REMEMBERED);
    }
}
