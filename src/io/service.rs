//! The service manager: what it hands over, and what it is told.

pub mod reload;

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::sys;
use super::tun::Tun;

/// The service manager's name for the TUN device of a node.
const TUN_NAME: &str = "tun";

/// The descriptors that the service manager has for this process (`LISTEN_FDS`,
/// sd_listen_fds(3)), with its names for them. They are handed out once; without a service manager
/// there are none.
fn handed() -> Vec<(String, OwnedFd)> {
    sys::inherited_descriptors().unwrap_or_else(|error| {
        tracing::warn!(%error, "what the service manager handed over is not understood");
        Vec::new()
    })
}

/// Gives the service manager a copy of a descriptor. It is handed over again after a restart and a
/// crash, and closed when the service is stopped (`FileDescriptorStoreMax=`, systemd.service(5)).
/// Whether there is a service manager that was told so.
fn store(name: &str, descriptor: &impl AsFd) -> bool {
    let states = [sd_notify::NotifyState::FdStore, sd_notify::NotifyState::FdName(name)];
    let told = sd_notify::notify_with_fds(&states, &[descriptor.as_fd()]);
    if let Err(error) = &told {
        tracing::warn!(%error, name, "the service manager keeps no descriptor for us");
    }
    told.is_ok() && std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Lets the service manager close what [`store`] gave it, in this run or an earlier one.
fn forget(name: &str) {
    let states = [sd_notify::NotifyState::FdStoreRemove, sd_notify::NotifyState::FdName(name)];
    if let Err(error) = sd_notify::notify(&states) {
        tracing::warn!(%error, name, "cannot tell the service manager");
    }
}

/// What the service manager keeps and this program has no use for, of another version perhaps.
fn refuse(name: &str, what: &dyn std::fmt::Display) {
    tracing::warn!(name, %what, "the service manager hands over what is not used here");
    forget(name);
}

/// The descriptor is a listening TCP socket when this works.
fn listening(fd: OwnedFd) -> Option<(SocketAddr, TcpListener)> {
    let listener = TcpListener::from(fd);
    let is_listening = socket2::SockRef::from(&listener).is_listener().ok()?;
    let address = listener.local_addr().ok().filter(|_| is_listening)?;
    listener.set_nonblocking(true).ok()?;
    Some((address, listener))
}

/// The listening TCP sockets that the service manager has for this process.
#[must_use]
pub fn handed_listeners() -> Vec<(SocketAddr, TcpListener)> {
    let listener = |(name, fd): (String, OwnedFd)| {
        let listener = listening(fd);
        if listener.is_none() {
            refuse(&name, &"no listening TCP socket");
        }
        listener
    };
    handed().into_iter().filter_map(listener).collect()
}

/// The service manager's name for the listener of this address; a name has no colon.
fn stored_name(address: SocketAddr) -> String {
    format!("tcp-{address}").replace(':', ".")
}

/// Has the service manager keep a listening socket: nobody who connects while the server is
/// restarted is refused.
pub fn store_listener(address: SocketAddr, listener: &impl AsFd) {
    let _ = store(&stored_name(address), listener);
}

/// Lets the service manager close what [`store_listener`] gave it in an earlier run.
pub fn forget_listener(address: SocketAddr) {
    forget(&stored_name(address));
}

/// The TUN devices of an earlier run, their interfaces still there with addresses and routes.
#[must_use]
pub fn handed_tuns() -> Vec<Tun> {
    let tun = |(name, fd): (String, OwnedFd)| {
        Tun::from_descriptor(fd).inspect_err(|error| refuse(&name, error)).ok()
    };
    handed().into_iter().filter_map(tun).collect()
}

/// Has the service manager keep this TUN device and no other: the interface stays while the node is
/// restarted. Whether it does.
pub fn store_tun(tun: &Tun) -> bool {
    forget_tun();
    store(TUN_NAME, tun)
}

/// Lets the service manager close the TUN device that it keeps.
pub fn forget_tun() {
    forget(TUN_NAME);
}

/// How far somebody has come: it rises as long as that one does its work, also when there is none.
#[derive(Debug, Default)]
pub struct Progress(AtomicU64);

impl Progress {
    /// One round more.
    pub fn step(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn rounds(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Tells the service manager that all is well, as long as all who are watched come further.
#[derive(Debug)]
pub struct Watchdog {
    /// How often it looks; none when nobody wants to know.
    interval: Option<Duration>,
    next: Instant,
    watched: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    name: String,
    progress: Arc<Progress>,
    seen: u64,
}

impl Watchdog {
    /// Looks four times in the time that the service manager allows (`WatchdogSec=`).
    #[must_use]
    pub fn new(watched: Vec<(String, Arc<Progress>)>, now: Instant) -> Self {
        Self::looking(sd_notify::watchdog_enabled().map(|limit| limit / 4), watched, now)
    }

    fn looking(
        interval: Option<Duration>,
        watched: Vec<(String, Arc<Progress>)>,
        now: Instant,
    ) -> Self {
        let watched = watched
            .into_iter()
            .map(|(name, progress)| Watched { name, seen: progress.rounds(), progress })
            .collect();
        Self { interval, next: now + interval.unwrap_or_default(), watched }
    }

    /// When [`Self::look`] has something to do.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        self.interval.map(|_| self.next)
    }

    /// Feeds the watchdog if everybody has come further since it was fed last. Whoever calls this
    /// has come further by calling it.
    pub fn look(&mut self, now: Instant) {
        if self.is_well(now)
            && let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog])
        {
            tracing::warn!(%error, "cannot tell the service manager");
        }
    }

    fn is_well(&mut self, now: Instant) -> bool {
        let Some(interval) = self.interval.filter(|_| self.next <= now) else { return false };
        self.next = now + interval;
        let stuck = self.watched.iter().find(|watched| watched.progress.rounds() == watched.seen);
        if let Some(stuck) = stuck {
            tracing::warn!(who = stuck.name, "no progress, the watchdog is not fed");
            return false;
        }
        for watched in &mut self.watched {
            watched.seen = watched.progress.rounds();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock;

    #[test]
    fn the_watchdog_is_fed_only_while_everybody_comes_further() {
        let (now, second) = (clock::now(), Duration::from_secs(1));
        let [a, b] = [(); 2].map(|()| Arc::new(Progress::default()));
        let watched = vec![("a".into(), Arc::clone(&a)), ("b".into(), Arc::clone(&b))];
        let mut dog = Watchdog::looking(Some(second), watched, now);
        a.step();
        b.step();
        assert!(!dog.is_well(now), "it is not time yet");
        assert!(dog.is_well(now + second));
        a.step();
        assert!(!dog.is_well(now + 2 * second), "b stands still");
        assert!(!dog.is_well(now + 3 * second), "and a has moved since, which does not help");
        b.step();
        assert!(dog.is_well(now + 4 * second));
        assert!(Watchdog::looking(None, Vec::new(), now).next().is_none());
    }
}
