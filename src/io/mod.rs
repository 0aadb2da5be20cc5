//! The world: sockets, devices, netlink, clock. No decisions are made here.

pub mod clock;
pub mod os;
mod sys;
pub mod tun;
