//! `overlay`: a self-hosted virtual LAN.
//!
//! One binary is server, node and command line. The crate is cut into two planes. The *control
//! plane* decides: `node`, `server`, `path` and `policy` are state machines that are given inputs
//! and the time, and give outputs; they know no socket, file, clock, task or lock. The *data plane*
//! moves packets: `dataplane` holds plain functions over per-peer state that two threads, the
//! simulator and the tests all call. `io` is the world, `daemon` joins a core to it, `cli` is what
//! people type. Imports point from right to left only:
//!
//! ```text
//! types <- wire <- { path, policy } <- dataplane <- node
//! types <- wire <- policy <- server
//! types <- wire <- io <- { config, store } <- daemon
//! { node, server, dataplane, io, store, config } <- daemon <- lab <- cli
//! ```
//!
//! `tests/architecture.rs` holds this to be true. `docs/architecture.md` is the longer map.

pub mod cli;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod io;
pub mod lab;
pub mod node;
pub mod path;
pub mod policy;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod types;
pub mod wire;

#[cfg(test)]
pub(crate) mod testing;
