//! Knows the whole world, and so what the nodes have to find out.

use overlay::lab::nat::{Dependence, NatKind};

use crate::world::World;

/// Whether the nodes of two hosts can reach each other without the server.
pub(crate) fn direct_path_possible(world: &World, a: usize, b: usize) -> bool {
    if world.is_partitioned(a, b) || world.is_black_hole(a) || world.is_black_hole(b) {
        return false;
    }
    let (a, b) = (&world.hosts[a], &world.hosts[b]);
    if a.edge == b.edge {
        return true;
    }
    if a.udp_blocked || b.udp_blocked {
        return false;
    }
    // A firewall lets in what answers: both sides send, and know each other's address.
    if a.ipv6.is_some() && b.ipv6.is_some() {
        return true;
    }
    // Whoever sends to a forwarded port is answered from it.
    if a.mapped.is_some() || b.mapped.is_some() {
        return true;
    }
    can_punch(world.edges[a.edge].kind, world.edges[b.edge].kind)
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
    let (a, b) = (&world.hosts[a], &world.hosts[b]);
    let maps = |kind: NatKind| kind == NatKind::Symmetric;
    let (kind_a, kind_b) = (world.edges[a.edge].kind, world.edges[b.edge].kind);
    maps(kind_a) != maps(kind_b)
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
