//! Knows the whole world, and so what the nodes have to find out.

use overlay::lab::nat::{Dependence, NatKind};

use crate::world::World;

/// Whether the nodes of two hosts can reach each other without the server.
pub(crate) fn direct_path_possible(world: &World, a: usize, b: usize) -> bool {
    possible(world, [a, b], |host, interface| world.leads_out(host, interface))
}

/// Whether two hosts reach each other directly by a further uplink of either and by no other way. The
/// nodes look for such a path when the preferred one fails, and no costly way is tried for its sake.
pub(crate) fn needs_further_uplink(world: &World, a: usize, b: usize) -> bool {
    let preferred = |host: usize, interface| {
        world.leads_out(host, interface) && world.hosts[host].gateway() == Some(interface)
    };
    direct_path_possible(world, a, b) && !possible(world, [a, b], preferred)
}

/// The same when only these interfaces of a host lead out.
fn possible(world: &World, [a, b]: [usize; 2], leads_out: impl Fn(usize, usize) -> bool) -> bool {
    if world.is_partitioned(a, b) || world.is_black_hole(a) || world.is_black_hole(b) {
        return false;
    }
    let number = [a, b];
    let (a, b) = (&world.hosts[a], &world.hosts[b]);
    if a.is_behind(b.edge_of(0)) || a.is_behind(b.edge_of(1)) {
        return true;
    }
    if a.udp_blocked || b.udp_blocked {
        return false;
    }
    let by_first = number.map(|host| leads_out(host, 0));
    // A firewall lets in what answers: both sides send, and know each other's address.
    if a.ipv6.is_some() && b.ipv6.is_some() && by_first == [true; 2] {
        return true;
    }
    // Whoever sends to a forwarded port is answered from it.
    let ways_out = number.map(|host| leads_out(host, 0) || leads_out(host, 1));
    if ways_out == [true; 2]
        && (a.mapped.is_some() && by_first[0] || b.mapped.is_some() && by_first[1])
    {
        return true;
    }
    any_kinds(world, number, leads_out, can_punch)
}

/// Whether this is so of the NATs on some way out of each of two hosts.
fn any_kinds(
    world: &World,
    [a, b]: [usize; 2],
    leads_out: impl Fn(usize, usize) -> bool,
    holds: impl Fn(NatKind, NatKind) -> bool,
) -> bool {
    let kinds = |host: usize| -> Vec<NatKind> {
        let lit = [0, 1].into_iter().filter(|interface| leads_out(host, *interface));
        lit.map(|interface| world.edges[world.hosts[host].edge_of(interface)].kind).collect()
    };
    let there = kinds(b);
    kinds(a).into_iter().any(|a| there.iter().any(|b| holds(a, *b)))
}

/// The word in `path.kind` that host `a` must show for host `b` when all is quiet.
pub(crate) fn expected_path(world: &World, a: usize, b: usize) -> &'static str {
    if direct_path_possible(world, a, b) { "direct" } else { relay(world, a) }
}

/// The word for the relay path of host `a`.
pub(crate) fn relay(world: &World, a: usize) -> &'static str {
    if world.hosts[a].udp_blocked { "relay-tcp" } else { "relay-udp" }
}

/// Whether data may vanish between two hosts where questions do not: nobody can know before there is
/// data, so either way is right when all is quiet.
pub(crate) fn may_swallow(world: &World, a: usize, b: usize) -> bool {
    world.filters.iter().any(|it| it.from.is_none_or(|from| from == a || from == b))
}

/// Whether birthday probing may have led to a direct path by now, or may not: it is left to chance
/// and takes its time, so either is right.
pub(crate) fn may_be_found_by_chance(world: &World, a: usize, b: usize) -> bool {
    let maps = |kind: NatKind| kind == NatKind::Symmetric;
    let differ =
        any_kinds(world, [a, b], |host, it| world.leads_out(host, it), |a, b| maps(a) != maps(b));
    let (a, b) = (&world.hosts[a], &world.hosts[b]);
    differ
        && a.settings.birthday_probing
        && b.settings.birthday_probing
        && !a.udp_blocked
        && !b.udp_blocked
}

/// Simultaneous sending fails only where one side cannot know the port that the other's datagrams
/// come from, and cannot let them in unknown.
fn can_punch(a: NatKind, b: NatKind) -> bool {
    let maps = |kind: NatKind| {
        kind.behaviour().is_some_and(|nat| nat.mapping != Dependence::EndpointIndependent)
    };
    let filters_ports = |kind: NatKind| {
        kind.behaviour().is_some_and(|nat| nat.filtering == Dependence::AddressAndPort)
    };
    let blocked = |a, b| maps(a) && (maps(b) || filters_ports(b));
    !blocked(a, b) && !blocked(b, a)
}

#[test]
fn only_symmetric_with_a_port_filter_cannot_be_punched() {
    use NatKind::{PortRestricted, Symmetric};
    for a in NatKind::ALL {
        for b in NatKind::ALL {
            let hard = [(Symmetric, Symmetric), (Symmetric, PortRestricted)];
            let expected = !(hard.contains(&(a, b)) || hard.contains(&(b, a)));
            assert_eq!(can_punch(a, b), expected, "{a} with {b}");
        }
    }
}
