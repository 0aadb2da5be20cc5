//! What waits for a socket that is full: a short queue for each node, served in turn.
//!
//! A node that is sent more than the way to it takes fills its own queue and loses its own oldest
//! datagrams; the others get their share of the socket by deficit round robin (RFC 8290 section
//! 4.1 has the same scheme). Old datagrams go first, since a transport learns of the loss sooner.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use super::{Arrival, SocketId};

/// Bytes that may wait for one node: some milliseconds at a gigabit per second.
pub const NODE_BYTES: usize = 512 << 10;
/// Bytes that may wait in all.
pub const TOTAL_BYTES: usize = 16 << 20;
/// Bytes that a node may send in its turn: the longest train that can be received, and so any other.
const QUANTUM: usize = 65_536;

/// Datagrams of `segment_bytes` each (the last may be shorter) for one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Train {
    /// Where to, and from which socket and address.
    pub exit: Arrival,
    /// Their content, one behind the other.
    pub bytes: Vec<u8>,
    /// Length of each datagram but the last.
    pub segment_bytes: usize,
}

impl Train {
    /// How many datagrams it is.
    #[must_use]
    pub fn datagrams(&self) -> usize {
        self.bytes.len().div_ceil(self.segment_bytes.max(1))
    }
}

type Key = (SocketId, SocketAddr);

#[derive(Debug, Default)]
struct Queue {
    trains: VecDeque<Train>,
    bytes: usize,
    /// What is left of its turn.
    credit: usize,
}

/// The queues of all nodes.
#[derive(Debug, Default)]
pub struct FairQueues {
    queues: BTreeMap<Key, Queue>,
    turns: VecDeque<Key>,
    bytes: usize,
}

fn key_of(exit: &Arrival) -> Key {
    (exit.socket, exit.source)
}

impl FairQueues {
    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Bytes that wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether something waits for this node: what comes later must wait behind it.
    #[must_use]
    pub fn waits(&self, exit: &Arrival) -> bool {
        self.queues.contains_key(&key_of(exit))
    }

    /// The sockets that are waited for.
    pub fn sockets(&self) -> impl Iterator<Item = SocketId> {
        self.turns.iter().map(|(socket, _)| *socket)
    }

    /// Puts a train at the end of its node's queue; returns how many datagrams were lost for it.
    pub fn push(&mut self, train: Train) -> usize {
        let key = key_of(&train.exit);
        let mut lost = 0;
        while self.bytes + train.bytes.len() > TOTAL_BYTES {
            // The longest queue has the least right to the room.
            let bytes_of = |key: &Key| self.queues.get(key).map_or(0, |queue| queue.bytes);
            let Some(longest) = self.turns.iter().copied().max_by_key(bytes_of) else { break };
            lost += self.drop_oldest(longest);
        }
        while self.queues.get(&key).is_some_and(|q| q.bytes + train.bytes.len() > NODE_BYTES) {
            lost += self.drop_oldest(key);
        }
        self.bytes += train.bytes.len();
        let queue = self.queues.entry(key).or_insert_with(|| {
            self.turns.push_back(key);
            Queue::default()
        });
        queue.bytes += train.bytes.len();
        queue.trains.push_back(train);
        lost
    }

    fn drop_oldest(&mut self, key: Key) -> usize {
        self.take(key).map_or(0, |train| train.datagrams())
    }

    /// Takes the oldest train of one node.
    fn take(&mut self, key: Key) -> Option<Train> {
        let queue = self.queues.get_mut(&key)?;
        let train = queue.trains.pop_front()?;
        queue.bytes -= train.bytes.len();
        self.bytes -= train.bytes.len();
        if queue.trains.is_empty() {
            self.queues.remove(&key);
            self.turns.retain(|turn| *turn != key);
        }
        Some(train)
    }

    /// The next train in turn for a socket that is not in `full`.
    pub fn pop(&mut self, full: &[SocketId]) -> Option<Train> {
        // Each pass gives every node at least one more quantum, and no train is longer.
        for _ in 0..=2 * self.turns.len() {
            let key = *self.turns.front()?;
            if let Some(queue) = self.queues.get_mut(&key).filter(|_| !full.contains(&key.0)) {
                let next = queue.trains.front().map_or(0, |train| train.bytes.len());
                if next <= queue.credit {
                    queue.credit -= next;
                    return self.take(key);
                }
                queue.credit += QUANTUM;
            }
            self.turns.rotate_left(1);
        }
        None
    }

    /// Puts a train back that the socket did not take.
    pub fn put_back(&mut self, train: Train) {
        let key = key_of(&train.exit);
        self.bytes += train.bytes.len();
        let queue = self.queues.entry(key).or_insert_with(|| {
            self.turns.push_front(key);
            Queue::default()
        });
        queue.bytes += train.bytes.len();
        queue.credit += train.bytes.len();
        queue.trains.push_front(train);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(port: u16, mark: u8, len: usize) -> Train {
        let source = SocketAddr::new([192, 0, 2, 1].into(), port);
        let exit = Arrival { socket: SocketId(0), source, local: None };
        Train { exit, bytes: vec![mark; len], segment_bytes: 1_000 }
    }

    fn drain(queues: &mut FairQueues) -> Vec<(u16, u8)> {
        std::iter::from_fn(|| queues.pop(&[])).map(|t| (t.exit.source.port(), t.bytes[0])).collect()
    }

    #[test]
    fn a_node_keeps_its_order_and_a_flood_to_one_does_not_hold_up_the_other() {
        let mut queues = FairQueues::default();
        for mark in 0..8 {
            assert_eq!(queues.push(train(1, mark, 60_000)), 0);
        }
        assert_eq!(queues.push(train(2, 100, 200)), 0);
        assert_eq!(queues.push(train(2, 101, 200)), 0);
        let order = drain(&mut queues);
        let of = |port| order.iter().filter(move |(p, _)| *p == port).map(|(_, mark)| *mark);
        assert_eq!(of(1).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
        assert_eq!(of(2).collect::<Vec<_>>(), [100, 101]);
        let small = order.iter().position(|(port, _)| *port == 2).unwrap();
        assert!(small <= 1, "after one train of the flood at most: {order:?}");
        assert!(queues.is_empty() && queues.bytes == 0);
    }

    #[test]
    fn bytes_are_shared_alike_whatever_the_size_of_the_trains() {
        let mut queues = FairQueues::default();
        for mark in 0..5 {
            queues.push(train(1, mark, 60_000));
        }
        for mark in 0..200 {
            queues.push(train(2, mark, 1_500));
        }
        let mut sent = BTreeMap::new();
        for _ in 0..85 {
            let train = queues.pop(&[]).unwrap();
            *sent.entry(train.exit.source.port()).or_insert(0) += train.bytes.len();
        }
        let (large, small) = (sent[&1], sent[&2]);
        assert!(large.abs_diff(small) <= 2 * QUANTUM, "{large} and {small}");
    }

    #[test]
    fn the_oldest_makes_room_within_its_own_queue() {
        let mut queues = FairQueues::default();
        queues.push(train(2, 7, 1_000));
        let lost: usize = (0..20).map(|mark| queues.push(train(1, mark, 50_000))).sum();
        let kept = drain(&mut queues);
        let first = kept.iter().find(|(port, _)| *port == 1).unwrap().1;
        assert!(kept.len() - 1 <= NODE_BYTES / 50_000 && lost == usize::from(first) * 50);
        assert!(kept.contains(&(2, 7)), "the other node lost nothing");
        assert_eq!(kept.last().unwrap().1, 19, "the newest is there");
    }

    #[test]
    fn all_queues_together_are_bounded() {
        let mut queues = FairQueues::default();
        for port in 1..200 {
            for mark in 0..8 {
                queues.push(train(port, mark, 60_000));
            }
        }
        assert!(queues.bytes <= TOTAL_BYTES);
        let held: usize = queues.queues.values().map(|queue| queue.bytes).sum();
        assert_eq!(held, queues.bytes);
    }

    #[test]
    fn what_a_full_socket_refuses_stays_first_and_others_go_on() {
        let mut queues = FairQueues::default();
        queues.push(train(1, 0, 30_000));
        queues.push(train(1, 1, 30_000));
        let mut elsewhere = train(9, 50, 100);
        elsewhere.exit.socket = SocketId(2);
        queues.push(elsewhere);
        let refused = queues.pop(&[]).unwrap();
        assert_eq!(refused.bytes[0], 0);
        queues.put_back(refused);
        assert_eq!(queues.pop(&[SocketId(0)]).unwrap().bytes[0], 50);
        assert_eq!(queues.pop(&[SocketId(0)]), None, "the rest waits for the full socket");
        assert_eq!(drain(&mut queues), [(1, 0), (1, 1)]);
    }
}
