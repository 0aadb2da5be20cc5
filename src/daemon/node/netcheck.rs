//! Measures the network in front of this node, with sockets of its own: a port that has never
//! talked to the server is what shows how a NAT filters.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{UdpSocket, lookup_host};
use tokio::time::{sleep_until, timeout};

use super::lines::{family, filters_strictly};
use super::portmap::PortMapping;
use super::report::{
    NatReport, Netcheck, PortMappingReport, SCHEMA, ServerProbe, UplinkProbe, millis,
};
use super::{Daemon, path_mtu};
use crate::io::clock;
use crate::node::UplinkStatus;
use crate::path::side::Facts;
use crate::path::{Filtering, Mapping, NatFacts, NatKind};
use crate::types::{TxId, Uplink, is_of_one_site};
use crate::wire::control::DEFAULT_PORT;
use crate::wire::join::ServerAddr;
use crate::wire::relay::{CONTROL_LEN, Control};

/// A question is sent again after these, in milliseconds from the first.
const REPEAT_MS: [u64; 3] = [0, 150, 400];
/// An answer is waited for this long: no path to a server is slower.
const ANSWER_LIMIT: Duration = Duration::from_millis(1_200);
/// The own router answers faster.
const HAIRPIN_LIMIT: Duration = Duration::from_millis(400);
/// A name is looked up for this long.
const NAME_LIMIT: Duration = Duration::from_secs(1);
/// Servers that are asked.
const MAX_SERVERS: usize = 8;
/// The kind of a network through which UDP does not come.
pub(super) const UDP_BLOCKED: &str = "udp-blocked";
const NO_UDP: &str = "UDP does not reach the server: everything goes through its relay over TCP; \
                      allow outgoing UDP to get direct paths";
const NO_SERVER: &str = "the server does not answer at all, so nothing can be said of the network in \
                         front of this node; direct paths that there are stay";

/// What has to be known to measure.
#[derive(Debug, Clone)]
pub(super) struct Inputs {
    /// The server's two reflector ports, for each of its addresses.
    reflectors: Vec<[SocketAddr; 2]>,
    /// Its addresses whose names have to be looked up first.
    names: Vec<ServerAddr>,
    /// Whether the control connection stands: only then does the silence of a reflector mean that UDP
    /// is blocked.
    connected: bool,
    /// Addresses of this machine.
    local: Vec<IpAddr>,
    /// What the daemon has got from the router.
    mapped: Option<PortMappingReport>,
    /// All default routes, when there are several.
    uplinks: Vec<UplinkStatus>,
}

impl Inputs {
    /// The first reflector port of each server.
    pub(super) fn reflectors(&self) -> Vec<SocketAddr> {
        self.reflectors.iter().map(|[first, _]| *first).collect()
    }

    /// Adds a server, if there is place.
    fn add(&mut self, pair: [SocketAddr; 2]) {
        if !self.reflectors.contains(&pair) && self.reflectors.len() < MAX_SERVERS {
            self.reflectors.push(pair);
        }
    }

    /// Looks the names up. Where that takes too long, whoever knows names is away as well.
    async fn look_up(&mut self) {
        let names = std::mem::take(&mut self.names);
        let found = names.iter().map(|name| async move {
            let found = timeout(NAME_LIMIT, lookup_host((name.host.as_str(), name.port))).await;
            found.into_iter().flatten().flatten().collect::<Vec<_>>()
        });
        for addr in futures_util::future::join_all(found).await.into_iter().flatten() {
            self.add(ports_of(addr));
        }
    }
}

/// The reflector ports of a server with this control port.
fn ports_of(addr: SocketAddr) -> [SocketAddr; 2] {
    // Control also listens on 443, the reflector does not.
    let port = if addr.port() == 443 { DEFAULT_PORT } else { addr.port() };
    [port, port.saturating_add(1)].map(|port| SocketAddr::new(addr.ip(), port))
}

impl Daemon {
    pub(super) fn netcheck_inputs(&self) -> Inputs {
        let connected = self.server.map(|server| {
            let (first, second) = self.reflector_ports;
            let first = first.unwrap_or_else(|| server.port());
            [first, second.unwrap_or_else(|| first.saturating_add(1))]
                .map(|port| SocketAddr::new(server.ip(), port))
        });
        let local = self.node.host_endpoints().iter().map(SocketAddr::ip).collect();
        let mapped = self.port_mapping.as_ref().map(PortMapping::report);
        let uplinks = self.node.uplink_statuses();
        let reflectors = connected.into_iter().collect();
        let is_connected = self.server.is_some();
        let mut inputs = Inputs {
            reflectors,
            names: Vec::new(),
            connected: is_connected,
            local,
            mapped,
            uplinks,
        };
        for server in self.state.enrolment().into_iter().flat_map(|known| &known.servers) {
            match server.literal() {
                Some(addr) => inputs.add(ports_of(addr)),
                None => inputs.names.push(server.clone()),
            }
        }
        inputs
    }
}

/// Measures; takes four seconds at the most.
pub(super) async fn run(mut inputs: Inputs) -> Netcheck {
    inputs.look_up().await;
    let v4 = inputs.reflectors.iter().find(|pair| pair[0].is_ipv4()).copied();
    let v6 = inputs.reflectors.iter().find(|pair| pair[0].is_ipv6()).copied();
    let (nat, ipv6, servers, uplinks) = tokio::join!(
        async {
            match v4 {
                Some(pair) => measure_nat(pair, &inputs.local).await,
                None => None,
            }
        },
        async {
            let pair = v6?;
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).await.ok()?;
            reflect(&socket, pair[0], false).await.map(|(observed, _)| observed)
        },
        probe_servers(&inputs),
        probe_uplinks(&inputs.uplinks, &inputs.reflectors),
    );
    let udp = servers.iter().any(|server| server.rtt_ms.is_some());
    let global_v6 = inputs.local.iter().find(|ip| ip.is_ipv6() && !is_of_one_site(**ip));
    let kind = nat.as_ref().map(|nat| nat.facts.kind());
    Netcheck {
        schema: SCHEMA,
        udp,
        ipv4: nat.as_ref().map(|nat| nat.observed.to_string()),
        ipv6: ipv6
            .map(|observed| observed.to_string())
            .or_else(|| global_v6.map(ToString::to_string)),
        nat: NatReport {
            mapping: nat.as_ref().map_or("unknown", |nat| nat.facts.mapping.as_str()).into(),
            filtering: nat
                .as_ref()
                .and_then(|nat| nat.facts.filtering)
                .map_or("unknown", |filtering| filtering.as_str())
                .into(),
            kind: match kind {
                Some(kind) => kind.as_str(),
                None if !udp && inputs.connected => UDP_BLOCKED,
                None => "unknown",
            }
            .into(),
            hairpin: nat.as_ref().and_then(|nat| nat.hairpin),
            port_mapping: inputs.mapped.as_ref().and_then(|mapped| mapped.protocols.clone()),
            mapped: inputs.mapped,
        },
        servers,
        uplinks,
        verdict: match (udp, inputs.connected) {
            (true, _) => verdict(kind, ipv6.is_some()),
            (false, true) => NO_UDP,
            (false, false) => NO_SERVER,
        }
        .into(),
        forecast: Vec::new(),
    }
}

/// What a measurement says, where it says anything.
pub(super) fn facts_of(report: &Netcheck) -> Facts {
    let mapping = [Mapping::None, Mapping::EndpointIndependent, Mapping::AddressAndPortDependent];
    let filtering =
        [Filtering::EndpointIndependentOrAddressDependent, Filtering::AddressAndPortDependent];
    Facts {
        // Silence of a server that is away is none of a blocked network.
        udp: (report.udp || report.nat.kind == UDP_BLOCKED).then_some(report.udp),
        mapping: mapping.into_iter().find(|it| it.as_str() == report.nat.mapping),
        filtering: filtering.into_iter().find(|it| it.as_str() == report.nat.filtering),
        ..Facts::default()
    }
}

struct Measured {
    facts: NatFacts,
    observed: SocketAddr,
    hairpin: Option<bool>,
}

async fn measure_nat(reflectors: [SocketAddr; 2], local: &[IpAddr]) -> Option<Measured> {
    let mapping = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.ok()?;
    let port = mapping.local_addr().ok()?.port();
    // A port that talks to nobody else: an answer from the second port must find its own way in.
    let filtering = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.ok()?;
    let (both, open) = tokio::join!(
        async {
            let (first, _) = reflect(&mapping, reflectors[0], false).await?;
            let (second, _) = reflect(&mapping, reflectors[1], false).await?;
            Some((first, second))
        },
        reflect(&filtering, reflectors[0], true),
    );
    let (first, second) = both?;
    let local: Vec<SocketAddr> = local.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
    let facts = NatFacts::observe(&local, first, second, Some(open.is_some()));
    let behind_nat = !local.contains(&first);
    let hairpin = if behind_nat { Some(hairpins(&mapping, first).await) } else { None };
    Some(Measured { facts, observed: first, hairpin })
}

/// Whether the router turns a packet to our own external endpoint around (RFC 4787 section 6).
async fn hairpins(inside: &UdpSocket, external: SocketAddr) -> bool {
    let Ok(other) = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await else { return false };
    let tx = TxId(rand::random());
    let probe = Control::Reflect { tx, from_other_port: false }.encode(None);
    if other.send_to(&probe, external).await.is_err() {
        return false;
    }
    let arrived = async {
        let mut buffer = [0; CONTROL_LEN + 1];
        loop {
            match inside.recv_from(&mut buffer).await {
                Ok((len, _)) if buffer[..len] == probe => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    };
    timeout(HAIRPIN_LIMIT, arrived).await.unwrap_or(false)
}

async fn probe_servers(inputs: &Inputs) -> Vec<ServerProbe> {
    let connected = inputs.connected;
    let probes = inputs.reflectors.iter().map(|pair| probe_server(pair[0], connected));
    let mut probes: Vec<(usize, ServerProbe)> = tokio::task::JoinSet::from_iter(
        probes.enumerate().map(|(place, probe)| async move { (place, probe.await) }),
    )
    .join_all()
    .await;
    probes.sort_by_key(|(place, _)| *place);
    probes.into_iter().map(|(_, probe)| probe).collect()
}

async fn probe_uplinks(
    uplinks: &[UplinkStatus],
    reflectors: &[[SocketAddr; 2]],
) -> Vec<UplinkProbe> {
    let mut probes = Vec::new();
    for status in uplinks {
        let uplink = status.uplink.clone();
        let server = reflectors.iter().map(|pair| pair[0]).find(|it| it.is_ipv6() == uplink.ipv6);
        let preferred = status.preferred;
        probes.push(async move {
            let seen = match server {
                Some(server) => seen_by(&uplink, server).await,
                None => None,
            };
            UplinkProbe {
                strict_filter: !preferred && filters_strictly(&uplink),
                interface: uplink.device,
                family: family(uplink.ipv6).into(),
                preferred,
                endpoint: seen.map(|(observed, _)| observed.to_string()),
                rtt_ms: seen.map(|(_, rtt)| millis(rtt)),
            }
        });
    }
    futures_util::future::join_all(probes).await
}

/// Where the server sees a socket that is bound to this interface.
async fn seen_by(uplink: &Uplink, server: SocketAddr) -> Option<(SocketAddr, Duration)> {
    let any: IpAddr =
        if uplink.ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    SockRef::from(&socket).bind_device(Some(uplink.device.as_bytes())).ok()?;
    reflect(&socket, server, false).await
}

async fn probe_server(server: SocketAddr, connected: bool) -> ServerProbe {
    let bind: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let rtt = match UdpSocket::bind(bind).await {
        Ok(socket) => reflect(&socket, server, false).await.map(|(_, rtt)| rtt),
        Err(_) => None,
    };
    let path_mtu = match rtt {
        Some(_) => path_mtu::measure(server).await,
        None => None,
    };
    ServerProbe {
        address: server.to_string(),
        rtt_ms: rtt.map(millis),
        udp_blocked: rtt.is_none() && connected,
        path_mtu,
    }
}

/// Asks a reflector where it sees `socket`.
async fn reflect(
    socket: &UdpSocket,
    server: SocketAddr,
    from_other_port: bool,
) -> Option<(SocketAddr, Duration)> {
    let start = clock::now();
    let tx = TxId(rand::random());
    let question = Control::Reflect { tx, from_other_port }.encode(None);
    let mut repeats = REPEAT_MS.iter().map(|ms| start + Duration::from_millis(*ms));
    let mut next = repeats.next();
    let mut sent_at = start;
    let exchange = async {
        let mut buffer = [0; CONTROL_LEN + 1];
        loop {
            let due = next.unwrap_or(start + ANSWER_LIMIT * 2);
            tokio::select! {
                () = sleep_until(due.into()) => {
                    next = repeats.next();
                    sent_at = clock::now();
                    // An error here is one more question without an answer.
                    let _ = socket.send_to(&question, server).await;
                }
                received = socket.recv_from(&mut buffer) => {
                    let (len, from) = received.ok()?;
                    let answer = buffer.get(..len).and_then(|bytes| Control::parse(bytes).ok());
                    if let Some(Control::Reflected { tx: answered, observed, .. }) = answer
                        && answered == tx
                        && from.ip() == server.ip()
                    {
                        return Some((observed, clock::now().saturating_duration_since(sent_at)));
                    }
                }
            }
        }
    };
    timeout(ANSWER_LIMIT, exchange).await.ok().flatten()
}

fn verdict(kind: Option<NatKind>, ipv6: bool) -> &'static str {
    match kind {
        Some(NatKind::None) => {
            "no NAT and no filter: every peer can be talked to directly, whatever it is behind"
        }
        Some(NatKind::Firewall) => {
            "no NAT, and a firewall that lets in only answers: direct paths work with all peers, \
             with those behind a symmetric NAT after some seconds on the relay"
        }
        Some(NatKind::FullConeOrAddressRestricted) => {
            "an open NAT: direct paths work with every peer that has UDP"
        }
        Some(NatKind::PortRestricted) => {
            "an ordinary NAT: direct paths work with all peers, with those behind a symmetric NAT \
             after some seconds on the relay"
        }
        Some(NatKind::Symmetric) if ipv6 => {
            "a symmetric NAT, and IPv6: direct paths work over IPv6, and over IPv4 with peers that \
             are not behind a symmetric NAT themselves"
        }
        Some(NatKind::Symmetric) => {
            "a symmetric NAT: direct paths work with peers in the open or behind an open NAT, after \
             some seconds on the relay behind an ordinary one, and not behind another symmetric \
             NAT, unless one of the two gives its ports in order"
        }
        None => "UDP works; the NAT for IPv4 could not be measured",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn silence_means_blocked_udp_only_while_the_control_connection_stands() {
        // Bound, so that nobody else answers there.
        let silent = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = silent.local_addr().unwrap().port();
        let named = |connected| Inputs {
            reflectors: Vec::new(),
            names: vec![ServerAddr { host: "localhost".into(), port }],
            connected,
            local: Vec::new(),
            mapped: None,
            uplinks: Vec::new(),
        };
        let (away, blocked) = tokio::join!(run(named(false)), run(named(true)));
        for report in [&away, &blocked] {
            let asked = |at: &str| report.servers.iter().any(|server| server.address == at);
            let places = [format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
            assert!(places.iter().any(|at| asked(at)), "the name was looked up: {report:?}");
            assert!(!report.udp);
        }
        assert_eq!((away.nat.kind.as_str(), away.verdict.as_str()), ("unknown", NO_SERVER));
        assert!(away.servers.iter().all(|server| !server.udp_blocked), "{away:?}");
        assert_eq!((blocked.nat.kind.as_str(), blocked.verdict.as_str()), (UDP_BLOCKED, NO_UDP));
        assert!(blocked.servers.iter().all(|server| server.udp_blocked), "{blocked:?}");
    }
}
