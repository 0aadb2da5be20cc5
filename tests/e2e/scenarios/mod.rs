//! The tests by subject.

use crate::case::Case;

mod commands;
mod enrol;
mod lab;
mod local;
mod matrix;
mod members;
mod netcheck;
mod offload;
mod policy;
mod recipes;
mod relay;
mod server;
mod server_loss;
mod service;
mod spoof;

/// All tests; those that check the lab itself come first.
pub(crate) fn all() -> Vec<Case> {
    let subjects = [
        recipes::cases(),
        matrix::cases(),
        relay::cases(),
        server_loss::cases(),
        server::cases(),
        enrol::cases(),
        members::cases(),
        spoof::cases(),
        policy::cases(),
        offload::cases(),
        netcheck::cases(),
        commands::cases(),
        local::cases(),
        lab::cases(),
        service::cases(),
    ];
    subjects.into_iter().flatten().collect()
}
