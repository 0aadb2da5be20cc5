//! A steady one-way flow of UDP between two machines, and how much of it arrives.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::clock::now;
use crate::lab::Host;
use crate::probe::open_socket;

/// Packets of 1200 bytes at a steady rate; over on drop.
pub(crate) struct Steady {
    over: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Steady {
    /// From `from` to `address` of `to`. The receiver asked first, as who downloads does.
    pub(crate) fn start(from: &Host, to: &Host, address: &str, per_second: u64) -> Self {
        let address: IpAddr = address.parse().unwrap();
        let receiver = open_socket(to, SocketAddr::new(address, 0));
        let target = receiver.local_addr().unwrap();
        let unspecified = SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, 0));
        let sender = open_socket(from, unspecified);
        let over = Arc::new(AtomicBool::new(false));
        let [sent, received] = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
        let mut threads = Vec::new();
        let (until, count) = (Arc::clone(&over), Arc::clone(&received));
        threads.push(thread::spawn(move || {
            let mut packet = [0; 2048];
            while !until.load(Ordering::Relaxed) {
                if receiver.recv(&mut packet).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
        let (until, count) = (Arc::clone(&over), Arc::clone(&sent));
        threads.push(thread::spawn(move || {
            let start = now();
            let mut next: u64 = 0;
            while !until.load(Ordering::Relaxed) {
                let due = start.elapsed().as_millis() as u64 * per_second / 1000;
                while next < due {
                    // A full queue here is a packet that is lost, like any other.
                    let _ = sender.send_to(&[0x5a; 1200], target);
                    count.fetch_add(1, Ordering::Relaxed);
                    next += 1;
                }
                thread::sleep(Duration::from_millis(1));
            }
        }));
        Self { over, sent, received, threads }
    }

    /// What part of it arrives during `span`.
    pub(crate) fn share(&self, span: Duration) -> f64 {
        let both = || [&self.sent, &self.received].map(|count| count.load(Ordering::Relaxed));
        let before = both();
        thread::sleep(span);
        let [sent, received] = [0, 1].map(|i: usize| both()[i].saturating_sub(before[i]));
        received as f64 / sent.max(1) as f64
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
