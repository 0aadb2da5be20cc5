//! The thread that carries packets between the machines' TUNs and the lab's internet.
//!
//! Reads, hands over, writes; what happens to a packet is [`super::internet`]'s business.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::internet::Internet;
use crate::io::clock;
use crate::io::tun::Tun;

/// The running thread; it ends when this is dropped.
pub(crate) struct Forwarder {
    /// Closing it is the sign to stop.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<Internet>>,
}

impl Forwarder {
    /// Starts carrying; `tuns` are in the order of the internet's sites.
    pub(crate) fn start(internet: Internet, tuns: Vec<Tun>) -> io::Result<Self> {
        let (stopped, stop) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let thread = std::thread::Builder::new()
            .name("internet".to_owned())
            .spawn(move || run(internet, &tuns, &stopped))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }

    /// Stops, and returns the internet with its counters.
    pub(crate) fn stop(mut self) -> Option<Internet> {
        self.halt()
    }

    fn halt(&mut self) -> Option<Internet> {
        drop(self.stop.take());
        self.thread.take()?.join().ok()
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.halt();
    }
}

fn run(mut internet: Internet, tuns: &[Tun], stopped: &OwnedFd) -> Internet {
    let mut buffer = vec![0; PACKET_BYTES];
    loop {
        let mut polled: Vec<PollFd<'_>> =
            tuns.iter().map(|tun| PollFd::new(tun.as_fd(), PollFlags::POLLIN)).collect();
        polled.push(PollFd::new(stopped.as_fd(), PollFlags::POLLIN));
        let now = clock::now();
        match ppoll(&mut polled, timeout(internet.poll_timeout(), now), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return internet,
        }
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if ready.last() == Some(&true) {
            return internet;
        }
        let now = clock::now();
        for (site, tun) in tuns.iter().enumerate().filter(|(site, _)| ready[*site]) {
            for _ in 0..BATCH_PACKETS {
                let Ok(length) = tun.read(&mut buffer) else {
                    break;
                };
                internet.handle_packet(site, buffer[..length].to_vec(), now);
            }
        }
        while let Some((site, packet)) = internet.poll_delivery(now) {
            // A host that is going away takes no more packets: they are lost, as on a real line.
            let _ = tuns[site].write(&packet);
        }
    }
}

fn timeout(due: Option<Instant>, now: Instant) -> Option<TimeSpec> {
    due.map(|due| TimeSpec::from_duration(due.saturating_duration_since(now).min(LONGEST_WAIT)))
}

/// The MTU of the lab's interfaces is 1500; no TUN gives more than this.
const PACKET_BYTES: usize = 65_536;

/// One busy machine must not starve the others.
const BATCH_PACKETS: usize = 64;

/// Any bound will do; this one keeps the conversion in range.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
