//! One node: everything of a real one that its server can see, and no interface.
//!
//! It connects, says hello, binds at the relay from a UDP socket of its own, keeps the epoch of its
//! netmap, acknowledges what takes something away, and comes back with the real node's waits when the
//! connection is lost. What it sees it reports to the run.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};

use overlay::io::clock;
use overlay::io::link::{Backoff, ConnectError, Inbound, Link, LinkSender, connect_over};
use overlay::types::{CandidateKind, NodeId, SecretKey};
use overlay::wire::control::{
    ClientMessage, Hello, InviteUse, NetmapUpdate, ServerMessage, WireCandidate, decode, encode,
};
use overlay::wire::join::JoinLine;
use overlay::wire::relay::{Control, RelayKey};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio::time::{sleep, sleep_until};

/// As long as a real node waits between two binds when all is well.
const BIND_INTERVAL: Duration = Duration::from_secs(20);
/// Candidates in this /16 are marks: the last two bytes count them.
const MARK: [u8; 2] = [172, 30];

/// What all members have in common.
pub(crate) struct Common {
    pub(crate) line: JoinLine,
    pub(crate) server: SocketAddr,
    pub(crate) reports: mpsc::UnboundedSender<Report>,
    /// So many have a UDP socket; the others are behind firewalls that let out TCP only.
    pub(crate) with_udp: usize,
    /// How many addresses they share; else 16 members have one.
    pub(crate) sources: Option<usize>,
    /// How many may join at the same time; coming back knows no such limit.
    pub(crate) joining: Semaphore,
}

/// What a member tells the run.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) member: usize,
    pub(crate) at: Instant,
    pub(crate) news: News,
}

#[derive(Debug)]
pub(crate) enum News {
    /// The hello is under way.
    Hello,
    /// It is in, and has its netmap.
    In { id: u32, whole: bool, bytes: usize },
    /// A change of the netmap shows a peer with this mark.
    Saw { mark: u32 },
    /// A change took this peer away; the server is told of it right behind this.
    Gone { peer: u32 },
    /// The connection ended.
    Lost,
    /// A change did not follow on the last one.
    Gap,
}

/// What a run tells a member.
#[derive(Debug)]
pub(crate) enum Order {
    /// Announce an endpoint with this mark.
    Announce(u32),
    /// Ask for these peers, and go on using them.
    Use(Vec<u32>),
    /// Hang up, stay away, and come back with an endpoint of this mark.
    Flap(Duration, u32),
}

pub(crate) struct Member {
    number: usize,
    common: Arc<Common>,
    machine_key: SecretKey,
    /// Members share addresses as people behind one NAT do.
    source: Ipv4Addr,
    mark: u32,
    joined: bool,
    epoch: u64,
    has_netmap: bool,
    uses: BTreeSet<u32>,
    id: u32,
}

/// Why a connection was left.
enum End {
    Lost,
    Flap(Duration),
    Over,
}

impl Member {
    pub(crate) fn new(number: usize, common: Arc<Common>) -> Self {
        let mut key = [0x5a; 32];
        // The lowest bits of a key do not count (RFC 7748 section 5).
        key[8..16].copy_from_slice(&(number as u64).to_le_bytes());
        // Never the server's own.
        let group = common.sources.map_or(number / 16, |sources| number % sources);
        let [a, b] = u16::try_from(group).unwrap_or(u16::MAX).to_be_bytes();
        let source = match common.server.ip().is_loopback() {
            true => Ipv4Addr::new(127, a + 1, b, 1),
            false => Ipv4Addr::new(198, 19, a, b),
        };
        Self {
            number,
            common,
            machine_key: SecretKey::from_bytes(key),
            source,
            mark: 0,
            joined: false,
            epoch: 0,
            has_netmap: false,
            uses: BTreeSet::new(),
            id: 0,
        }
    }

    /// Lives until the run is over.
    pub(crate) async fn live(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let mut backoff = Backoff::default();
        loop {
            let common = Arc::clone(&self.common);
            let place = match self.joined {
                true => None,
                false => common.joining.acquire().await.ok(),
            };
            let end = match self.enter().await {
                Ok(link) => {
                    backoff.reset();
                    let end = self.stay(link, &mut orders, place).await;
                    self.report(News::Lost);
                    end
                }
                Err(_) => End::Lost,
            };
            match end {
                End::Lost => sleep(backoff.next_wait()).await,
                End::Flap(away) => sleep(away).await,
                End::Over => return,
            }
        }
    }

    fn report(&self, news: News) {
        // At the end of a run nobody listens any more.
        let _ = self.common.reports.send(Report { member: self.number, at: clock::now(), news });
    }

    async fn enter(&self) -> Result<Link, ConnectError> {
        let server = self.common.server.into();
        let unreachable =
            |source| ConnectError::Unreachable { address: self.common.server.into(), source };
        let socket = TcpSocket::new_v4().map_err(unreachable)?;
        socket.set_nodelay(true).map_err(unreachable)?;
        socket.bind(SocketAddrV4::new(self.source, 0).into()).map_err(unreachable)?;
        let stream = socket.connect(self.common.server).await.map_err(unreachable)?;
        connect_over(stream, &server, &self.common.line.server_key, &self.machine_key).await
    }

    async fn stay(
        &mut self,
        link: Link,
        orders: &mut mpsc::UnboundedReceiver<Order>,
        place: Option<SemaphorePermit<'_>>,
    ) -> End {
        let Link { sender, mut receiver, .. } = link;
        if !say(&sender, &ClientMessage { hello: Some(self.hello()), ..Default::default() }) {
            return End::Lost;
        }
        self.report(News::Hello);
        let end = self.talk(&sender, &mut receiver, orders, place).await;
        drop(sender);
        receiver.close().await;
        end
    }

    async fn talk(
        &mut self,
        sender: &LinkSender,
        receiver: &mut overlay::io::link::LinkReceiver,
        orders: &mut mpsc::UnboundedReceiver<Order>,
        mut place: Option<SemaphorePermit<'_>>,
    ) -> End {
        let mut relay: Option<Relay> = None;
        let with_udp = self.common.with_udp;
        self.has_netmap = false;
        loop {
            let bind_at = relay.as_ref().map(|relay| relay.next);
            tokio::select! {
                inbound = receiver.next() => match inbound {
                    Ok(Inbound::Control(bytes)) => {
                        let Ok(message) = decode::<ServerMessage>(&bytes) else { return End::Lost };
                        if message.refused.is_some() {
                            return End::Lost;
                        }
                        if let Some(welcome) = &message.welcome {
                            (self.joined, self.id) = (true, welcome.id);
                            // The next may join.
                            drop(place.take());
                            if self.number < with_udp {
                                let (port, key) = (welcome.relay_port, welcome.relay_key);
                                relay = Relay::open(self, port, key).await;
                            }
                        }
                        if let Some(update) = &message.netmap {
                            self.apply(update, bytes.len(), sender);
                        }
                    }
                    Ok(Inbound::Relay(_)) => {}
                    Err(_) => return End::Lost,
                },
                () = sleep_until(bind_at.unwrap_or_else(clock::now).into()), if bind_at.is_some() => {
                    if let Some(relay) = &mut relay {
                        relay.bind().await;
                    }
                }
                // A run may give orders only to those that are in.
                order = orders.recv(), if self.has_netmap => match order {
                    Some(Order::Announce(mark)) => {
                        self.mark = mark;
                        let candidates = Some(self.candidates());
                        say(sender, &ClientMessage { candidates, ..Default::default() });
                    }
                    Some(Order::Use(peers)) => {
                        let find = peers.iter().filter_map(|id| NodeId::new(*id));
                        let find = Some(find.map(|id| id.to_string()).collect());
                        self.uses.extend(peers);
                        say(sender, &ClientMessage { find, ..Default::default() });
                    }
                    Some(Order::Flap(away, mark)) => {
                        self.mark = mark;
                        return End::Flap(away);
                    }
                    None => return End::Over,
                },
            }
        }
    }

    fn hello(&self) -> Hello {
        let line = &self.common.line;
        let invite = (!self.joined).then(|| InviteUse {
            id: line.invite.0,
            secret: line.secret.clone(),
            network: line.network.0,
        });
        Hello {
            min_version: 1,
            max_version: 1,
            software: "herd".into(),
            node_key: self.machine_key.public().0,
            name: Some(format!("node-{}", self.number)),
            invite,
            candidates: self.candidates(),
            instance: Some(self.number as u64),
            known: Some(self.uses.iter().copied().collect()),
        }
    }

    /// What a home has: two addresses of its own, and the router's.
    fn candidates(&self) -> Vec<WireCandidate> {
        let [_, a, b, c] = u32::try_from(self.number).unwrap_or(0).to_be_bytes();
        let mark = u16::try_from(self.mark & 0xffff).unwrap_or(0).to_be_bytes();
        [
            (CandidateKind::Host, Ipv4Addr::new(192, 168, b, c)),
            (CandidateKind::Reflexive, Ipv4Addr::new(198, 18 + a, b, c)),
            (CandidateKind::PortMapped, Ipv4Addr::new(MARK[0], MARK[1], mark[0], mark[1])),
        ]
        .map(|(kind, ip)| WireCandidate {
            kind: kind.code(),
            endpoint: SocketAddrV4::new(ip, 40_000).into(),
        })
        .to_vec()
    }

    fn apply(&mut self, update: &NetmapUpdate, bytes: usize, sender: &LinkSender) {
        if update.from.is_some_and(|from| from != self.epoch) {
            self.report(News::Gap);
        }
        self.epoch = update.to;
        let whole = update.from.is_none();
        for peer in &update.removed {
            self.uses.remove(peer);
            self.report(News::Gone { peer: *peer });
        }
        if whole || !update.removed.is_empty() || update.filter.is_some() {
            let applied = Some(self.epoch);
            say(sender, &ClientMessage { applied, ..Default::default() });
        }
        if whole {
            self.has_netmap = true;
            let whole = update.members.is_none();
            return self.report(News::In { id: self.id, whole, bytes });
        }
        for peer in &update.peers {
            for candidate in &peer.candidates {
                if let SocketAddr::V4(at) = candidate.endpoint
                    && let [a, b, high, low] = at.ip().octets()
                    && [a, b] == MARK
                {
                    self.report(News::Saw { mark: u16::from_be_bytes([high, low]).into() });
                }
            }
        }
    }
}

fn say(sender: &LinkSender, message: &ClientMessage) -> bool {
    sender.try_send_control(encode(message)).is_ok()
}

/// The way by the relay: a socket, and the binds that keep it known.
struct Relay {
    socket: UdpSocket,
    node: NodeId,
    key: RelayKey,
    counter: u64,
    next: Instant,
}

impl Relay {
    async fn open(member: &Member, port: Option<u16>, key: [u8; 32]) -> Option<Self> {
        let socket = UdpSocket::bind(SocketAddrV4::new(member.source, 0)).await.ok()?;
        let at = SocketAddr::new(member.common.server.ip(), port?);
        socket.connect(at).await.ok()?;
        let node = NodeId::new(member.id)?;
        Some(Self { socket, node, key: RelayKey(key), counter: 0, next: clock::now() })
    }

    async fn bind(&mut self) {
        self.counter += 1;
        let bind = Control::Bind { node: self.node, counter: self.counter, proof: None };
        // A full socket buffer loses it, as the Internet may.
        let _ = self.socket.send(&bind.encode(Some(&self.key))).await;
        self.next = clock::now() + BIND_INTERVAL;
    }
}
