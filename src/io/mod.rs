//! The world: sockets, devices, netlink, clock. No decisions are made here.
