//! The tests by subject.

use crate::case::Case;

mod recipes;
mod service;

pub(crate) fn all() -> Vec<Case> {
    [recipes::cases(), service::cases()].into_iter().flatten().collect()
}
