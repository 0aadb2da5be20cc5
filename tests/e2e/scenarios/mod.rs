//! The tests by subject.

use crate::case::Case;

mod candidates;
mod commands;
mod crowd;

mod enrol;
mod expiry;
mod failover;
mod fair;
mod fallback;
mod flood;
mod hard;
mod idle;
mod kept;
mod lab;
mod large;
mod leak;
mod limits;
mod line;
mod local;
mod matrix;
mod members;
mod metrics;
mod mtu;
mod netcheck;
mod offload;
mod places;
mod policy;
mod portmap;
mod recipes;
mod relay;
mod reload;
mod rights;
mod roam;
mod rotation;
mod secrets;
mod server;
mod server_loss;
mod service;
mod spoof;
mod two_uplinks;
mod uplinks;
mod why;

/// All tests; those that check the lab itself come first.
pub(crate) fn all() -> Vec<Case> {
    let subjects = [
        recipes::cases(),
        candidates::cases(),
        matrix::cases(),
        places::cases(),
        roam::cases(),
        two_uplinks::cases(),
        uplinks::cases(),
        rotation::cases(),
        hard::cases(),
        idle::cases(),
        relay::cases(),
        limits::cases(),
        server_loss::cases(),
        server::cases(),
        enrol::cases(),
        members::cases(),
        spoof::cases(),
        flood::cases(),
        crowd::cases(),
        policy::cases(),
        offload::cases(),
        fallback::cases(),
        fair::cases(),
        line::cases(),
        leak::cases(),
        mtu::cases(),
        expiry::cases(),
        large::cases(),
        failover::cases(),
        netcheck::cases(),
        portmap::cases(),
        why::cases(),
        commands::cases(),
        local::cases(),
        metrics::cases(),
        reload::cases(),
        lab::cases(),
        service::cases(),
        kept::cases(),
        rights::cases(),
        secrets::cases(),
    ];
    subjects.into_iter().flatten().collect()
}
