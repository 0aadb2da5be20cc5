//! Whether the kernel takes trains of datagrams from a socket: UDP generic segmentation offload.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::io::clock;
use crate::types::{BASE_MTU, MAX_TRAIN_DATAGRAMS};

/// Every IPv6 link takes a datagram of this length, with its 48 bytes of headers.
const SHORT_DATAGRAM: usize = BASE_MTU as usize - 48;
/// A socket whose trains were refused is tried again after this: its routes may lead by a device that
/// takes trains and by one that does not.
const PAUSE: Duration = Duration::from_secs(60);

/// What is known of one socket.
#[derive(Debug)]
pub struct Gso {
    /// Datagrams in the longest train; 1 when there are none.
    longest: usize,
    refused: AtomicBool,
    /// When a train is tried again, once they have been refused.
    again: Mutex<Option<Instant>>,
}

impl Gso {
    /// Of a socket that takes trains of so many datagrams, of which no more are used than every kernel
    /// takes; 1 when it takes none.
    #[must_use]
    pub fn new(longest: usize) -> Self {
        let longest = longest.clamp(1, MAX_TRAIN_DATAGRAMS);
        Self { longest, refused: AtomicBool::new(false), again: Mutex::new(None) }
    }

    /// Whether trains leave in one call, as far as is known.
    pub fn works(&self) -> bool {
        self.longest > 1 && !self.refused.load(Ordering::Relaxed)
    }

    /// Datagrams that the next call may send.
    pub fn longest(&self) -> usize {
        if self.works() { self.longest } else { self.longest_at(clock::now()) }
    }

    fn longest_at(&self, now: Instant) -> usize {
        let again = *self.again.lock().unwrap_or_else(PoisonError::into_inner);
        if again.is_none_or(|again| again <= now) { self.longest } else { 1 }
    }

    /// A train has left.
    pub fn worked(&self) {
        if self.refused.load(Ordering::Relaxed) && self.refused.swap(false, Ordering::Relaxed) {
            tracing::info!("the kernel takes UDP trains again");
        }
    }

    /// A train failed with a [refusal](is_refusal), and its datagrams have left singly.
    pub fn refuse(&self) {
        self.refuse_at(clock::now());
    }

    fn refuse_at(&self, now: Instant) {
        *self.again.lock().unwrap_or_else(PoisonError::into_inner) = Some(now + PAUSE);
        if !self.refused.swap(true, Ordering::Relaxed) {
            tracing::warn!("the kernel takes no UDP trains, going on without");
        }
    }
}

/// Whether a train of datagrams of `segment` bytes failed for what it is: the device has no checksum
/// offload, or something on the way takes no trains. An address of ours that is gone looks the same;
/// then single datagrams fail, too.
///
/// Before 6.14 Linux says `EINVAL` as well when a datagram is longer than the path takes, where it says
/// `EMSGSIZE` today: that is nothing against shorter ones, or against the trains of others.
pub(super) fn is_refusal(error: &io::Error, segment: usize) -> bool {
    match error.raw_os_error() {
        Some(libc::EIO) => true,
        Some(libc::EINVAL) => segment <= SHORT_DATAGRAM,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_train_pauses_them_and_one_that_leaves_ends_that() {
        let gso = Gso::new(128);
        let start = clock::now();
        assert!(gso.works() && gso.longest() == MAX_TRAIN_DATAGRAMS);
        gso.refuse_at(start);
        assert!(!gso.works());
        assert_eq!(gso.longest_at(start + PAUSE / 2), 1);
        assert_eq!(gso.longest_at(start + PAUSE), MAX_TRAIN_DATAGRAMS, "it is tried again");
        assert!(!gso.works(), "until one has left they do not");
        gso.refuse_at(start + PAUSE);
        assert_eq!(gso.longest_at(start + PAUSE + PAUSE / 2), 1);
        gso.worked();
        assert!(gso.works() && gso.longest() == MAX_TRAIN_DATAGRAMS);
        let none = Gso::new(1);
        none.worked();
        assert!(!none.works() && none.longest() == 1);
    }

    #[test]
    fn what_is_too_long_for_a_path_says_nothing_of_other_trains() {
        let is = |code, segment| is_refusal(&io::Error::from_raw_os_error(code), segment);
        assert!(is(libc::EINVAL, 1_160) && is(libc::EIO, 1_160) && is(libc::EIO, 1_472));
        assert!(!is(libc::EINVAL, 1_312), "longer than a link of 1280 takes");
        assert!(!is(libc::EINVAL, 9_000) && !is(libc::EMSGSIZE, 1_160) && !is(libc::EPERM, 9));
    }
}
