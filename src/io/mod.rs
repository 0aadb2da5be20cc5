//! The world: sockets, devices, netlink, clock. No decisions are made here.

pub mod clock;
pub mod files;
pub mod link;
pub mod listen;
pub mod local;
pub mod memory;
pub mod metrics;
pub mod opener;
pub mod os;
pub mod portmap;
pub mod said;
pub mod sched;
pub mod service;
mod sys;
pub mod threads;
pub mod tun;
pub mod udp;
pub mod wake;
