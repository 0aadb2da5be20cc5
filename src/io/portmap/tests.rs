//! The keeper's decisions.
