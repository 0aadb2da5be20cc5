//! A bad line between two machines of the lab: it loses, doubles and reorders packets.
//!
//! A TUN device at either end carries what the machines send to each other's outer address, and two
//! threads move the packets between them. The kernel has no netem here, and nothing of the program under
//! test takes part in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::lab::Host;

/// Packets in a thousand that meet each fate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Faults {
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
    /// Held back until some of the following ones have passed.
    pub(crate) late: u64,
}

impl Faults {
    pub(crate) const NONE: Self = Self { lost: 0, doubled: 0, late: 0 };
}

/// What has happened to packets, both ways.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) bytes: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) doubled: AtomicU64,
    pub(crate) late: AtomicU64,
    /// How long each packet takes the line for itself.
    pause_us: AtomicU64,
}

/// A line in use; it ends when this is dropped.
pub(crate) struct Line {
    pub(crate) counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Line {
    /// Joins two machines that have public addresses.
    pub(crate) fn join(a: &Host, b: &Host, faults: Faults) -> Self {
        let (counts, stop) = (Arc::<Counts>::default(), Arc::<AtomicBool>::default());
        let ends = [(a, b), (b, a)].map(|(own, far)| {
            let device = own.ns.enter(open_device);
            own.ns.ip(&format!("link set dev {NAME} mtu 1500 txqueuelen 10000 up"));
            own.ns.ip(&format!("route add {}/32 dev {NAME} src {}", far.address, own.address));
            Arc::new(device)
        });
        let ways = [(0, 1), (1, 0)].map(|(from, to)| {
            let (from, to) = (Arc::clone(&ends[from]), Arc::clone(&ends[to]));
            let (counts, stop) = (Arc::clone(&counts), Arc::clone(&stop));
            thread::spawn(move || carry(&from, &to, faults, &counts, &stop))
        });
        Self { counts, stop, threads: ways.into() }
    }
}

impl Line {
    /// From here on each packet takes the line for so long; others wait in the device's queue.
    pub(crate) fn slow_down(&self, pause: Duration) {
        let pause = u64::try_from(pause.as_micros()).unwrap();
        self.counts.pause_us.store(pause, Ordering::Relaxed);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn open_device() -> tun::Device {
    let mut config = tun::Configuration::default();
    config.tun_name(NAME).platform_config(|platform| {
        platform.ensure_root_privileges(false);
    });
    let device = tun::Device::new(&config).unwrap();
    device.set_nonblock().unwrap();
    device
}

fn carry(from: &tun::Device, to: &tun::Device, faults: Faults, counts: &Counts, stop: &AtomicBool) {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut dice = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    // Packets that are late, and how many have to pass them.
    let mut late: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut buffer = [0; 2_048];
    let add = |count: &AtomicU64, number: u64| count.fetch_add(number, Ordering::Relaxed);
    // A full queue is a loss that nobody counts.
    let send = |packet: &[u8]| drop(to.send(packet));
    while !stop.load(Ordering::Relaxed) {
        let Ok(len) = from.recv(&mut buffer) else {
            late.drain(..).for_each(|(_, packet)| send(&packet));
            thread::sleep(IDLE);
            continue;
        };
        let pause = counts.pause_us.load(Ordering::Relaxed);
        if pause > 0 {
            thread::sleep(Duration::from_micros(pause));
        }
        let packet = &buffer[..len];
        add(&counts.bytes, len as u64);
        let fate = dice() % 1_000;
        if fate < faults.lost {
            add(&counts.lost, 1);
        } else if fate < faults.lost + faults.doubled {
            add(&counts.doubled, 1);
            send(packet);
            late.push((dice() % 8, packet.to_vec()));
        } else if fate < faults.lost + faults.doubled + faults.late {
            add(&counts.late, 1);
            late.push((2 + dice() % 30, packet.to_vec()));
        } else {
            send(packet);
        }
        for (passes, packet) in &mut late {
            if *passes == 0 {
                send(packet);
                packet.clear();
            }
            *passes = passes.saturating_sub(1);
        }
        late.retain(|(_, packet)| !packet.is_empty());
    }
}

const NAME: &str = "line0";

/// How long an end sleeps that has nothing.
const IDLE: Duration = Duration::from_micros(200);
