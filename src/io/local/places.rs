//! How many commands a daemon serves at a time, and of whom: nobody takes the places of all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Commands that one daemon serves at a time.
pub(super) const ALL: usize = 64;
/// Of these, those of users that may only look. The rest is for root and the daemon's own user.
const LOOKING: usize = 48;
/// Of these, those of one user.
const OF_ONE: usize = 16;
/// What the kernel calls a user whom this process cannot know by number (user_namespaces(7)). Within the
/// server's unit (`PrivateUsers=`) that is everybody but root and the service's own user.
const NAMELESS: u32 = 65_534;

/// How many places a user who may only look can have.
fn limit_of(uid: u32) -> usize {
    // All those whom nobody can tell apart have the part of all.
    if uid == NAMELESS { LOOKING } else { OF_ONE }
}

/// The places that are taken. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Places(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// By user id, of those who may only look.
    looking: BTreeMap<u32, usize>,
}

impl Places {
    fn with<T>(&self, change: impl FnOnce(&mut Taken) -> T) -> T {
        // The numbers are right between any two statements, also after a panic elsewhere.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A place for a command of this user, if there is one left.
    pub(super) fn take(&self, uid: u32, may_write: bool) -> Option<Place> {
        let looks = (!may_write).then_some(uid);
        self.with(|taken| {
            let of_one = looks.map_or(0, |uid| taken.looking.get(&uid).copied().unwrap_or(0));
            let looking: usize = taken.looking.values().sum();
            let is_full = looks.is_some() && (of_one >= limit_of(uid) || looking >= LOOKING);
            if is_full || taken.all >= ALL {
                return None;
            }
            taken.all += 1;
            if let Some(uid) = looks {
                *taken.looking.entry(uid).or_default() += 1;
            }
            Some(Place { places: self.clone(), looks })
        })
    }

    fn give_back(&self, looks: Option<u32>) {
        self.with(|taken| {
            taken.all = taken.all.saturating_sub(1);
            let Some(uid) = looks else { return };
            if let Some(of_one) = taken.looking.get_mut(&uid) {
                *of_one -= 1;
                if *of_one == 0 {
                    taken.looking.remove(&uid);
                }
            }
        });
    }
}

/// A place; it is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    looks: Option<u32>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.give_back(self.looks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_who_may_only_look_leave_room_for_each_other_and_for_root() {
        let places = Places::default();
        let fill = |uid: u32, may_write: bool| {
            let taken = std::iter::from_fn(|| places.take(uid, may_write)).take(ALL + 1);
            taken.collect::<Vec<Place>>()
        };
        let mut of_one = fill(1001, false);
        assert_eq!(of_one.len(), OF_ONE);
        let others: Vec<Place> = (1002..1100).flat_map(|uid| fill(uid, false)).collect();
        assert_eq!(of_one.len() + others.len(), LOOKING);
        let root = fill(0, true);
        assert_eq!(root.len(), ALL - LOOKING);
        assert!(places.take(0, true).is_none(), "there is an end for root, too");

        of_one.pop();
        assert!(places.take(1001, false).is_some(), "and free again at once");
        drop((of_one, others, root));
        assert_eq!(fill(0, true).len(), ALL, "root may have them all when nobody looks");
        assert!(places.0.lock().unwrap().looking.is_empty());
    }

    #[test]
    fn users_whom_the_kernel_does_not_tell_apart_are_not_one_user() {
        let places = Places::default();
        let all = std::iter::from_fn(|| places.take(NAMELESS, false)).take(ALL + 1);
        assert_eq!(all.collect::<Vec<Place>>().len(), LOOKING, "root has the rest");
    }
}
