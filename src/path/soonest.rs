//! The soonest of several deadlines, and what it is for.

use std::time::Instant;

/// Takes deadlines one by one. They are asked for after every packet, so this is a plain
/// comparison each, and of two at the same instant the first one stays.
#[derive(Debug, Default)]
pub struct Soonest(Option<(Instant, &'static str)>);

impl Soonest {
    /// Takes a deadline, if there is one.
    pub fn add(&mut self, at: Option<Instant>, what: &'static str) {
        if let Some(at) = at
            && self.0.is_none_or(|(soonest, _)| at < soonest)
        {
            self.0 = Some((at, what));
        }
    }

    /// The soonest one.
    #[must_use]
    pub fn get(self) -> Option<(Instant, &'static str)> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::epoch;

    #[test]
    fn the_first_of_the_soonest_is_kept() {
        let at = |ms| Some(epoch() + Duration::from_millis(ms));
        let mut soonest = Soonest::default();
        for (at, what) in [(None, "never"), (at(5), "a"), (at(3), "b"), (at(3), "c"), (at(9), "d")]
        {
            soonest.add(at, what);
        }
        assert_eq!(soonest.get(), at(3).map(|at| (at, "b")));
        assert_eq!(Soonest::default().get(), None);
    }
}
