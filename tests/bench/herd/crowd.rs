//! All members of a run, and what they report.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use overlay::io::clock;
use rand::rngs::StdRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::die;
use crate::member::{Common, Member, News, Order, Report};
use crate::runs::Size;
use crate::server::Server;

/// Nodes that join at the same time; the server takes 384 strangers.
const JOIN_AT_ONCE: usize = 256;
/// The same where nodes share few addresses: a source has places for 64 strangers.
const JOIN_FROM_FEW: usize = 48;
/// More time than any of these waits may take.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Crowd {
    orders: Vec<mpsc::UnboundedSender<Order>>,
    reports: mpsc::UnboundedReceiver<Report>,
    _tasks: JoinSet<()>,
    /// The number of each member at the server.
    pub(crate) ids: Vec<u32>,
    /// Whom each member uses, by member.
    pub(crate) uses: Vec<Vec<usize>>,
    /// Who has to hear of each member, by member.
    pub(crate) watchers: Vec<Vec<usize>>,
    pub(crate) gaps: usize,
    /// Whole netmaps, and the bytes of all first netmaps.
    pub(crate) whole: usize,
    pub(crate) netmap_bytes: usize,
    pub(crate) rng: StdRng,
    mark: u32,
}

/// What the limit of open files leaves for UDP, besides a connection of each node.
fn udp_sockets(nodes: usize) -> usize {
    let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(1_024, |(soft, _)| soft);
    usize::try_from(soft).unwrap_or(usize::MAX).saturating_sub(nodes + 200)
}

/// How each of many things took, in the order in which they were done.
pub(crate) type Times = Vec<Duration>;

impl Crowd {
    /// Sends off so many nodes. Each will use some others.
    pub(crate) async fn start(server: &Server, size: Size) -> Self {
        let Size { nodes, peers, sources, .. } = size;
        let (sender, reports) = mpsc::unbounded_channel();
        let common = Arc::new(Common {
            line: server.invite(nodes).await,
            server: server.address,
            reports: sender,
            with_udp: udp_sockets(nodes),
            sources,
            // Those who share one address have fewer places for strangers.
            joining: Semaphore::new(if sources.is_some() { JOIN_FROM_FEW } else { JOIN_AT_ONCE }),
        });
        let mut rng = StdRng::seed_from_u64(7);
        let mut uses = Vec::with_capacity(nodes);
        let mut watchers = vec![Vec::new(); nodes];
        for number in 0..nodes {
            let others = index::sample(&mut rng, nodes, (peers + 1).min(nodes));
            let others: Vec<usize> =
                others.into_iter().filter(|other| *other != number).take(peers).collect();
            for other in &others {
                // Whoever is used hears of who uses it, and the other way round.
                watchers[*other].push(number);
                watchers[number].push(*other);
            }
            uses.push(others);
        }
        for list in &mut watchers {
            list.sort_unstable();
            list.dedup();
        }
        let mut tasks = JoinSet::new();
        let mut orders = Vec::with_capacity(nodes);
        for number in 0..nodes {
            let (order, inbox) = mpsc::unbounded_channel();
            orders.push(order);
            tasks.spawn(Member::new(number, Arc::clone(&common)).live(inbox));
        }
        Self {
            orders,
            reports,
            _tasks: tasks,
            ids: vec![0; nodes],
            uses,
            watchers,
            gaps: 0,
            whole: 0,
            netmap_bytes: 0,
            rng,
            mark: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.orders.len()
    }

    pub(crate) fn order(&self, member: usize, order: Order) {
        if self.orders[member].send(order).is_err() {
            die("a member", &"its task has ended");
        }
    }

    /// A mark that nobody has had.
    pub(crate) fn next_mark(&mut self) -> u32 {
        self.mark += 1;
        self.mark
    }

    pub(crate) fn random_member(&mut self) -> usize {
        self.rng.random_range(0..self.orders.len())
    }

    /// The next report before `deadline`.
    pub(crate) async fn next(&mut self, deadline: Instant) -> Option<Report> {
        let report = tokio::time::timeout_at(deadline.into(), self.reports.recv()).await.ok()??;
        match &report.news {
            News::In { id, whole, bytes, .. } => {
                self.ids[report.member] = *id;
                self.whole += usize::from(*whole);
                self.netmap_bytes += bytes;
            }
            News::Gap => self.gaps += 1,
            _ => {}
        }
        Some(report)
    }

    /// Waits until everybody is in; how long after `start` each was, and from its hello on.
    pub(crate) async fn all_in(&mut self, start: Instant) -> (Times, Times) {
        let deadline = start + PATIENCE;
        let mut hello = vec![None; self.len()];
        let mut times: Vec<Option<(Duration, Duration)>> = vec![None; self.len()];
        let mut missing = self.len();
        while missing > 0 {
            let Some(Report { member, at, news }) = self.next(deadline).await else {
                die("everybody in", &format!("{missing} nodes are missing"))
            };
            match news {
                News::Hello => hello[member] = Some(at),
                News::In { .. } if at >= start => {
                    let since_hello = at - hello[member].unwrap_or(start).max(start);
                    missing -= usize::from(times[member].is_none());
                    times[member] = Some((at - start, since_hello));
                }
                News::Lost if at >= start => {
                    missing += usize::from(times[member].take().is_some());
                }
                _ => {}
            }
        }
        times.into_iter().flatten().unzip()
    }

    /// Everybody asks for the peers that it uses.
    pub(crate) async fn use_peers(&mut self) {
        for member in 0..self.len() {
            let ids = self.uses[member].iter().map(|peer| self.ids[*peer]).collect();
            self.order(member, Order::Use(ids));
        }
        self.settle().await;
    }

    /// Waits until the server has had nothing to say about marks for a while.
    pub(crate) async fn settle(&mut self) {
        while self.next(clock::now() + Duration::from_millis(700)).await.is_some() {}
    }
}
