//! What can happen in a world.

use std::fmt;
use std::time::Duration;

use overlay::lab::nat::NatKind;

use crate::check::check_settled;
use crate::spot::Spot;
use crate::world::{Filter, World};

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transition {
    /// One sends the other some packets, close together.
    Pings { from: usize, to: usize, packets: usize, payload_bytes: usize },
    /// The server dies.
    KillServer,
    /// The server comes back.
    StartServer,
    /// A node dies.
    Stop(usize),
    /// It comes back with its keys and its netmap.
    Start(usize),
    /// It does both within an instant.
    Restart(usize),
    /// A NAT reboots.
    FlushNat(usize),
    /// A host moves to another place.
    Roam(usize, NatKind),
    /// The edge of a host lets UDP through no more, or again.
    UdpBlock(usize, bool),
    /// Nothing gets through between two hosts, or again.
    Partition(usize, usize, bool),
    /// A host's control connection breaks, or may be made again.
    CutLink(usize, bool),
    /// Nothing happens for long.
    Quiet,
    /// One sends the other more at once than any queue holds.
    Burst { from: usize, to: usize },
    /// A machine is suspended.
    Sleep(usize, Duration),
    /// It is woken before its time.
    Wake(usize),
    /// The administrator ends a membership.
    Remove(usize),
    /// The server restarts at another address.
    MoveServer,
    /// The server's clock is set, by so many hours.
    SetClock(i64),
    /// Nothing that a host sends reaches another host, or all again.
    BlackHole(usize, bool),
    /// What a host sends to other hosts passes but for data, or for what is large.
    Swallow(usize, Swallowed),
    /// A host moves to another place of any sort.
    Move(usize, Spot),
    /// A node renews its key, if it may at this moment.
    Rotate(usize),
    /// The internet behind an interface of a host goes dark, or is lit again.
    Dark { host: usize, interface: usize, dark: bool },
    /// A host loses the default route of an interface, or has it again.
    Route { host: usize, interface: usize, there: bool },
    /// A membership ends in so many seconds, or never.
    Expire(usize, Option<u64>),
}

/// What a filter on the way takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Swallowed {
    /// Data of WireGuard, and no question.
    Data,
    /// What is longer than a narrow link carries.
    Large,
}

/// Does one thing.
pub(crate) fn apply(world: &mut World, step: Transition) {
    match step {
        Transition::Pings { from, to, packets, payload_bytes } => {
            for _ in 0..packets {
                world.ping(from, to, payload_bytes);
                world.run_for(Duration::from_millis(2));
            }
        }
        Transition::KillServer => world.kill_server(),
        Transition::StartServer => world.start_server(),
        Transition::Stop(host) => world.stop_host(host),
        Transition::Start(host) => world.start_host(host),
        Transition::Restart(host) => {
            world.stop_host(host);
            world.start_host(host);
        }
        Transition::FlushNat(host) => {
            let edge = world.hosts[host].edge;
            world.edges[edge].flush();
        }
        Transition::Roam(host, kind) => {
            let line = world.edges[world.hosts[host].edge].line;
            world.roam(host, kind, line);
        }
        Transition::UdpBlock(host, blocked) => world.hosts[host].udp_blocked = blocked,
        Transition::Partition(a, b, partitioned) => world.set_partitioned(a, b, partitioned),
        Transition::CutLink(host, true) => world.cut_link(host),
        Transition::CutLink(host, false) => world.hosts[host].control_link.cut = false,
        Transition::Quiet => {
            world.run_for(Duration::from_secs(40));
            check_settled(world);
        }
        Transition::Burst { from, to } => {
            for _ in 0..BURST {
                world.ping(from, to, 100);
            }
        }
        Transition::Sleep(host, time) => world.sleep(host, time),
        Transition::Wake(host) => world.wake(host),
        Transition::Remove(host) => drop(world.remove(host)),
        Transition::MoveServer => world.move_server(),
        Transition::SetClock(hours) => world.server.shift_clock(hours * 3600),
        Transition::BlackHole(host, true) => {
            world.filters.push(Filter { from: Some(host), ..Filter::default() });
        }
        Transition::Swallow(host, what) => {
            let filter = match what {
                Swallowed::Data => Filter { data: true, ..Filter::default() },
                Swallowed::Large => Filter { min_len: LARGE, ..Filter::default() },
            };
            world.filters.push(Filter { from: Some(host), ..filter });
        }
        Transition::BlackHole(host, false) => {
            world.filters.retain(|it| it.from != Some(host));
            world.healed = true;
        }
        Transition::Dark { host, interface, dark } => world.set_dark(host, interface, dark),
        Transition::Route { host, interface, there } => world.set_route(host, interface, there),
        Transition::Rotate(host) => drop(world.rotate(host)),
        Transition::Expire(host, in_s) => drop(world.expire(host, in_s)),
        Transition::Move(host, spot) => {
            let line = world.edges[world.hosts[host].edge].line;
            world.roam_to(host, spot, line);
        }
    }
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pings { from, to, packets, payload_bytes } => {
                write!(f, "{packets} packets of {payload_bytes} bytes from {from} to {to}")
            }
            Self::KillServer => f.write_str("the server dies"),
            Self::StartServer => f.write_str("the server starts"),
            Self::Stop(host) => write!(f, "node {host} dies"),
            Self::Start(host) => write!(f, "node {host} starts"),
            Self::Restart(host) => write!(f, "node {host} restarts"),
            Self::FlushNat(host) => write!(f, "the NAT of host {host} forgets everything"),
            Self::Roam(host, kind) => write!(f, "host {host} moves to a new place: {kind}"),
            Self::UdpBlock(host, true) => write!(f, "UDP of host {host} is blocked"),
            Self::UdpBlock(host, false) => write!(f, "UDP of host {host} is free"),
            Self::Partition(a, b, true) => write!(f, "hosts {a} and {b} are parted"),
            Self::Partition(a, b, false) => write!(f, "hosts {a} and {b} meet again"),
            Self::CutLink(host, true) => write!(f, "host {host} loses its control connection"),
            Self::CutLink(host, false) => write!(f, "host {host} may connect"),
            Self::Quiet => f.write_str("nothing, for 40 s"),
            Self::Burst { from, to } => write!(f, "{BURST} packets at once from {from} to {to}"),
            Self::Sleep(host, time) => write!(f, "host {host} is suspended for {time:?}"),
            Self::Wake(host) => write!(f, "host {host} is woken"),
            Self::Remove(host) => write!(f, "host {host} is removed from the network"),
            Self::MoveServer => f.write_str("the server moves to another address"),
            Self::SetClock(hours) => write!(f, "the server's clock is {hours} hours off"),
            Self::BlackHole(host, true) => write!(f, "nobody hears host {host} directly"),
            Self::BlackHole(host, false) => write!(f, "host {host} is heard again"),
            Self::Swallow(host, what) => write!(f, "{what:?} of host {host} is swallowed"),
            Self::Expire(host, None) => write!(f, "the membership of host {host} goes on"),
            Self::Expire(host, Some(in_s)) => {
                write!(f, "the membership of host {host} ends in {in_s} s")
            }
            Self::Dark { host, interface, dark } => {
                write!(
                    f,
                    "uplink {interface} of host {host} is {}",
                    if *dark { "dark" } else { "lit" }
                )
            }
            Self::Route { host, interface, there } => {
                let word = if *there { "has" } else { "loses" };
                write!(f, "host {host} {word} the default route by uplink {interface}")
            }
            Self::Rotate(host) => write!(f, "host {host} renews its node key"),
            Self::Move(host, spot) => write!(f, "host {host} moves to a new place: {spot}"),
        }
    }
}

/// Datagrams that a narrow link does not carry.
const LARGE: usize = 1_000;
/// More packets than wait for one peer (64), and than a turn may send beside them.
const BURST: usize = 200;
