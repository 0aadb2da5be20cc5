//! What is measured: each run has a server and a crowd of its own.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::time::{Duration, Instant};

use overlay::io::clock;
use overlay::server::admin::{Answer, Request};
use overlay::types::NodeId;

use crate::crowd::{Crowd, Times};
use crate::die;
use crate::figures::Figures;
use crate::member::{News, Order, Report};
use crate::server::{Server, Wish};

/// What reaches a peer later than this counts as lost.
const LOST: Duration = Duration::from_secs(10);
/// How long a node that flaps is away.
const AWAY: Duration = Duration::from_millis(300);

/// How long a part of a long run is: each has figures of its own.
const PART: Duration = Duration::from_secs(60);

/// What all runs want to know.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) nodes: usize,
    /// How many others each node uses.
    pub(crate) peers: usize,
    /// How many addresses they share; else 16 nodes have one.
    pub(crate) sources: Option<usize>,
    pub(crate) wish: Wish,
}

impl Size {
    /// Whether every node is told of every other.
    fn is_whole(&self) -> bool {
        self.nodes <= self.wish.whole_netmap_up_to
    }
}

/// A server with a crowd that has joined it; how long each took.
async fn enrolled(size: Size) -> (Server, Crowd, Instant, Times) {
    let server = Server::start(size.wish).await;
    let start = clock::now();
    let mut crowd = Crowd::start(&server, size).await;
    let (_, times) = crowd.all_in(start).await;
    (server, crowd, start, times)
}

async fn settled(size: Size) -> (Server, Crowd) {
    let (server, mut crowd, ..) = enrolled(size).await;
    if !size.is_whole() {
        crowd.use_peers().await;
    }
    crowd.settle().await;
    (server, crowd)
}

/// How fast nodes join, and what they cost.
pub(crate) async fn join(size: Size) -> Figures {
    let (server, mut crowd, start, times) = enrolled(size).await;
    let took = clock::now() - start;
    let mut figures = Figures::of("join");
    figures.add_count("nodes", size.nodes);
    figures.add("rate", size.nodes as f64 / took.as_secs_f64(), "1/s");
    figures.add_times("welcome after hello", times);
    crowd.settle().await;
    if !size.is_whole() {
        crowd.use_peers().await;
    }
    let weight = server.weight();
    figures.add("server cpu", weight.cpu.as_secs_f64(), "s");
    figures.add_memory(weight, size.nodes);
    let idle = Duration::from_secs(5);
    tokio::time::sleep(idle).await;
    let after = server.weight();
    let share = (after.cpu - weight.cpu).as_secs_f64() / idle.as_secs_f64();
    figures.add("server cpu at rest, share of a core", 100.0 * share, "%");
    figures
}

/// The server restarts, and everybody comes back at once.
pub(crate) async fn storm(size: Size) -> Figures {
    let (mut server, mut crowd) = settled(size).await;
    (crowd.whole, crowd.netmap_bytes) = (0, 0);
    server.stop();
    server.restart();
    let start = clock::now();
    let (back, _) = crowd.all_in(start).await;
    let all_back = clock::now() - start;
    // What the return of all these nodes sets off belongs to it.
    let whole = crowd.whole;
    let bytes = crowd.netmap_bytes;
    crowd.settle().await;
    let weight = server.weight();
    let mut figures = Figures::of("storm");
    figures.add_count("nodes", size.nodes);
    figures.add_times("back after the start of the server", back);
    figures.add("all back", all_back.as_secs_f64() * 1e3, "ms");
    figures.add("server cpu", weight.cpu.as_secs_f64(), "s");
    figures.add_memory(weight, size.nodes);
    figures.add_count("whole netmaps", whole);
    figures.add("bytes of netmap per node", bytes as f64 / size.nodes as f64, "B");
    figures.add_count("gaps", crowd.gaps);
    figures
}

/// Marks on their way to those who have to see them.
struct Pending {
    sent: BTreeMap<u32, (Instant, BTreeSet<usize>)>,
    times: Times,
}

impl Pending {
    fn new() -> Self {
        Self { sent: BTreeMap::new(), times: Vec::new() }
    }

    fn saw(&mut self, mark: u32, member: usize, at: Instant) {
        if let Some((sent, waiting)) = self.sent.get_mut(&mark)
            && waiting.remove(&member)
        {
            self.times.push(at.saturating_duration_since(*sent));
            if waiting.is_empty() {
                self.sent.remove(&mark);
            }
        }
    }

    /// Somebody who is away cannot be told; what it misses is in its next netmap.
    fn excuse(&mut self, member: usize) {
        for (_, waiting) in self.sent.values_mut() {
            waiting.remove(&member);
        }
        self.sent.retain(|_, (_, waiting)| !waiting.is_empty());
    }

    fn waiting(&self) -> usize {
        self.sent.values().map(|(_, waiting)| waiting.len()).sum()
    }
}

/// Who has to hear of a change of `member`.
fn audience(crowd: &Crowd, size: Size, member: usize) -> BTreeSet<usize> {
    if size.is_whole() {
        (0..crowd.len()).filter(|other| *other != member).collect()
    } else {
        crowd.watchers[member].iter().copied().collect()
    }
}

/// One node after the other gets another endpoint, and its peers hear of it.
pub(crate) async fn fanout(size: Size, rounds: usize) -> Figures {
    let (server, mut crowd) = settled(size).await;
    let (before, start) = (server.weight(), clock::now());
    let mut pending = Pending::new();
    let mut lost = 0;
    for _ in 0..rounds {
        let (member, mark) = (crowd.random_member(), crowd.next_mark());
        let audience = audience(&crowd, size, member);
        let now = clock::now();
        pending.sent.insert(mark, (now, audience));
        crowd.order(member, Order::Announce(mark));
        while !pending.sent.is_empty() {
            let Some(report) = crowd.next(now + LOST).await else { break };
            if let News::Saw { mark } = report.news {
                pending.saw(mark, report.member, report.at);
            }
        }
        lost += pending.waiting();
        pending.sent.clear();
        // No two changes travel together by chance.
        crowd.next(clock::now() + Duration::from_millis(5)).await;
    }
    let mut figures = Figures::of("fanout");
    figures.add_count("nodes", size.nodes);
    figures.add_times("endpoint seen by peers after", pending.times);
    figures.add_count("lost", lost);
    figures.add_weight(before, server.weight(), clock::now() - start, size.nodes);
    figures.add_count("gaps", crowd.gaps);
    figures
}

/// How latency and memory go in the course of a long run.
struct Curve {
    next: Instant,
    seen: usize,
    parts: Vec<(Times, f64)>,
}

impl Curve {
    fn new(start: Instant) -> Self {
        Self { next: start + PART, seen: 0, parts: Vec::new() }
    }

    /// Closes a part when its time is over; `times` are all so far.
    fn follow(&mut self, now: Instant, times: &Times, server: &Server) {
        if now >= self.next {
            self.next += PART;
            let rss = server.weight().rss_bytes as f64 / 1e6;
            self.parts.push((times[self.seen..].to_vec(), rss));
            self.seen = times.len();
        }
    }

    fn add_to(self, figures: &mut Figures) {
        for (number, (times, rss)) in (1..).zip(self.parts) {
            figures.add_p99(&format!("part {number}: seen after"), times);
            figures.add(&format!("part {number}: server rss"), rss, "MB");
        }
    }
}

/// Nodes go and come all the time, each with another endpoint.
pub(crate) async fn churn(size: Size, per_second: u32, time: Duration) -> Figures {
    let (server, mut crowd) = settled(size).await;
    let (before, start) = (server.weight(), clock::now());
    let mut pending = Pending::new();
    let mut flapping: BTreeMap<usize, u32> = BTreeMap::new();
    let (mut next, mut flaps, mut lost) = (start, 0, 0);
    let end = start + time;
    let mut curve = Curve::new(start);
    while clock::now() < end + LOST && (clock::now() < end || !pending.sent.is_empty()) {
        let now = clock::now();
        if now >= next && now < end {
            next += Duration::from_secs(1) / per_second;
            let member = crowd.random_member();
            if let Entry::Vacant(place) = flapping.entry(member) {
                let mark = crowd.next_mark();
                place.insert(mark);
                pending.excuse(member);
                crowd.order(member, Order::Flap(AWAY, mark));
                flaps += 1;
            }
        }
        curve.follow(now, &pending.times, &server);
        let until = if now < end { next.min(end) } else { end + LOST };
        let Some(Report { member, at, news }) = crowd.next(until).await else { continue };
        match news {
            News::Hello => {
                if let Some(mark) = flapping.get(&member) {
                    let mut audience = audience(&crowd, size, member);
                    audience.retain(|other| !flapping.contains_key(other));
                    pending.sent.insert(*mark, (at, audience));
                }
            }
            News::In { .. } => drop(flapping.remove(&member)),
            News::Saw { mark } => pending.saw(mark, member, at),
            _ => {}
        }
    }
    lost += pending.waiting();
    let mut figures = Figures::of("churn");
    figures.add_count("nodes", size.nodes);
    figures.add_count("flaps", flaps);
    curve.add_to(&mut figures);
    figures.add_times("return seen by peers after", pending.times);
    figures.add_count("lost", lost);
    figures.add_weight(before, server.weight(), clock::now() - start, size.nodes);
    figures.add_count("gaps", crowd.gaps);
    figures
}

/// Nodes are removed one after the other; all others drop them and say so.
pub(crate) async fn revoke(size: Size, rounds: usize) -> Figures {
    let (server, mut crowd) = settled(size).await;
    let mut out = BTreeSet::new();
    let (mut applied, mut acknowledged) = (Vec::new(), Vec::new());
    let (before, start) = (server.weight(), clock::now());
    let mut lost = 0;
    while out.len() < rounds {
        let member = crowd.random_member();
        if !out.insert(member) {
            continue;
        }
        let peer = crowd.ids[member];
        let node = NodeId::new(peer).unwrap_or_else(|| die("a number", &peer)).to_string();
        let mut waiting: BTreeSet<usize> =
            (0..crowd.len()).filter(|other| !out.contains(other)).collect();
        let now = clock::now();
        let (epoch, acknowledging) = {
            let Answer::Removed(removal) = server.ask(Request::Remove { node }).await else {
                die("a removal", &"the answer is another one")
            };
            (removal.epoch, removal.progress.online)
        };
        // Asked as the command line asks: again and again, until nobody is waited for.
        let all = async {
            loop {
                let Answer::Acknowledged(progress) =
                    server.ask(Request::Acknowledged { epoch }).await
                else {
                    die("acknowledgements", &"the answer is another one")
                };
                if progress.waiting.is_empty() {
                    return Some((clock::now() - now, progress.acknowledged));
                }
                if clock::now() > now + LOST {
                    return None;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let seen = async {
            while !waiting.is_empty() {
                let Some(report) = crowd.next(now + LOST).await else { break };
                if let News::Gone { peer: gone } = report.news
                    && gone == peer
                    && waiting.remove(&report.member)
                {
                    applied.push(report.at.saturating_duration_since(now));
                }
            }
            waiting.len()
        };
        let (all, not_seen) = tokio::join!(all, seen);
        lost += not_seen;
        match all {
            Some((time, count)) => {
                acknowledged.push(time);
                if count + 1 < acknowledging {
                    die("all acknowledged", &format!("{count} of {acknowledging}"));
                }
            }
            None => lost += 1,
        }
    }
    let mut figures = Figures::of("revoke");
    figures.add_count("nodes", size.nodes);
    figures.add_times("dropped by a node after", applied);
    figures.add_times("acknowledged by all after", acknowledged);
    figures.add_count("lost", lost);
    figures.add_weight(before, server.weight(), clock::now() - start, size.nodes);
    figures.add_count("gaps", crowd.gaps);
    figures
}
