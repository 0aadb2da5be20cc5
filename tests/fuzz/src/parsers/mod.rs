//! What reads bytes of others, one function for each: it must not panic on any, and what it has read
//! and can write must read the same again.
//!
//! Shared by the fuzz targets, of which each is a program that holds no more than it plays, and by
//! `cargo test`, which plays the committed corpora. Which part of the program each belongs to is told
//! in `docs/security.md`.
#![allow(dead_code, reason = "a fuzz target uses one of them")]

pub(crate) mod cores;
pub(crate) mod http;
pub(crate) mod packets;
pub(crate) mod texts;
pub(crate) mod wire;

use std::sync::OnceLock;
use std::time::Instant;

/// A function that takes any bytes.
pub(crate) type Parser = fn(&[u8]);

/// Name, where its function is and the function of each.
macro_rules! parsers {
    ($($name:literal: $module:ident::$function:ident,)*) => {
        &[$(($name, concat!(stringify!($module), "::", stringify!($function)), $module::$function)),*]
    };
}

/// All of them: the name of their program and corpus, the path of the function, and the function.
pub(crate) const ALL: &[(&str, &str, Parser)] = parsers! {
    "backup": texts::backup,
    "classify": wire::classify,
    "config-node": texts::config_node,
    "config-server": texts::config_server,
    "control-client": wire::control_client,
    "control-server": wire::control_server,
    "disco": wire::disco,
    "filter": packets::filter,
    "frame": wire::frame,
    "http-answer": http::answer,
    "http-metrics": http::metrics,
    "http-request": http::request,
    "icmp": packets::icmp,
    "ip": packets::ip,
    "join": wire::join,
    "lab": packets::lab,
    "local-node": texts::local_node,
    "local-server": texts::local_server,
    "merge": packets::merge,
    "netlink": packets::netlink,
    "node": cores::node,
    "policy": texts::policy,
    "relay": wire::relay,
    "report": wire::report,
    "server": cores::server,
    "state-node": texts::state_node,
    "tun": packets::tun,
};

/// Some time.
fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    #[expect(clippy::disallowed_methods, reason = "the one instant that all others are made of")]
    *EPOCH.get_or_init(Instant::now)
}

/// Bytes that are taken piece by piece.
struct Feed<'b>(&'b [u8]);

impl<'b> Feed<'b> {
    fn new(bytes: &'b [u8]) -> Self {
        Self(bytes)
    }

    /// The next byte; none at the end.
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    /// So many bytes as the next two say, or what there is.
    fn part(&mut self) -> &'b [u8] {
        let (low, high) = (self.byte().unwrap_or_default(), self.byte().unwrap_or_default());
        let len = usize::from(u16::from_le_bytes([low, high & 0x0f]));
        let (part, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        part
    }
}
