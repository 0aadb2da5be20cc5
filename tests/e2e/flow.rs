//! Numbered datagrams at a steady rate, as a scale for what arrives, how often, and in what order.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::clock::now;
use crate::lab::Host;

/// Datagrams that are on their way.
pub(crate) struct Flow {
    sender: JoinHandle<u32>,
    receiver: JoinHandle<Vec<u32>>,
    stop: Arc<AtomicBool>,
}

/// What became of them.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) sent: u32,
    /// Their numbers, as they came.
    pub(crate) numbers: Vec<u32>,
}

impl Arrived {
    /// Different ones that came, as a part of those that were sent.
    pub(crate) fn part(&self) -> f64 {
        let mut numbers = self.numbers.clone();
        numbers.sort_unstable();
        numbers.dedup();
        f64::from(u32::try_from(numbers.len()).unwrap()) / f64::from(self.sent.max(1))
    }

    /// How many came twice, or after a later one.
    pub(crate) fn out_of_order(&self) -> usize {
        self.numbers.windows(2).filter(|pair| pair[1] <= pair[0]).count()
    }
}

impl Flow {
    /// Sends datagrams of `bytes` from `from` to `to`, which has `address`, for as long as it lives.
    pub(crate) fn start(from: &Host, to: &Host, address: &str, bytes: usize, mbit: u64) -> Self {
        let address: IpAddr = address.parse().unwrap();
        let far = to.ns.enter(|| UdpSocket::bind((address, 0)).unwrap());
        far.set_read_timeout(Some(SILENCE)).unwrap();
        let any: SocketAddr =
            if address.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
        let near = from.ns.enter(|| UdpSocket::bind(any).unwrap());
        near.connect(far.local_addr().unwrap()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, asked) = (Arc::clone(&stop), Arc::clone(&stop));
        let per_second = mbit * 125_000 / u64::try_from(bytes).unwrap();
        let sender = thread::spawn(move || {
            let (start, mut sent) = (now(), 0u32);
            let mut datagram = vec![0; bytes];
            while !asked.load(Ordering::Relaxed) {
                let due = start.elapsed().as_micros() * u128::from(per_second) / 1_000_000;
                while u128::from(sent) < due {
                    datagram[..4].copy_from_slice(&sent.to_be_bytes());
                    // A queue that is full, or a peer that is gone, is a loss like any other.
                    let _ = near.send(&datagram);
                    sent += 1;
                }
                thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        let receiver = thread::spawn(move || {
            let (mut numbers, mut buffer) = (Vec::new(), vec![0; bytes]);
            loop {
                match far.recv(&mut buffer) {
                    Ok(got) if got == bytes => {
                        numbers.push(u32::from_be_bytes(buffer[..4].try_into().unwrap()));
                    }
                    Ok(got) => panic!("{got} bytes instead of {bytes}"),
                    Err(_) if ended.load(Ordering::Relaxed) => return numbers,
                    Err(_) => {}
                }
            }
        });
        Self { sender, receiver, stop }
    }

    /// Ends it, and waits for what is still on the way.
    pub(crate) fn finish(self) -> Arrived {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        Arrived { sent, numbers: self.receiver.join().unwrap() }
    }
}

/// After such a silence nothing is on the way any more.
const SILENCE: Duration = Duration::from_millis(200);
