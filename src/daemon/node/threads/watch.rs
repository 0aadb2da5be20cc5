//! What a packet thread waits for.
//!
//! An epoll instance of its own, so that what is watched is told to the kernel once and not before every
//! wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::io::tun::Tun;

/// Whoever waits gets no more than this many at a time; the others are still ready the next time.
const READY: usize = 8;
/// The number of the interface; those of the others are given by the caller.
const TUN: u64 = u64::MAX;

/// The descriptors that a thread waits for.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: Epoll,
    tun: Option<Arc<Tun>>,
    events: [EpollEvent; READY],
    count: usize,
}

impl Watch {
    /// Watches these, each of which has its place in the list as number.
    pub(super) fn new<'f>(fds: impl IntoIterator<Item = BorrowedFd<'f>>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for (number, fd) in (0..).zip(fds) {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
        }
        Ok(Self { epoll, tun: None, events: [EpollEvent::empty(); READY], count: 0 })
    }

    /// Watches this interface and no other from here on.
    pub(super) fn set_tun(&mut self, tun: Option<Arc<Tun>>) -> io::Result<()> {
        let is_same = match (&self.tun, &tun) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (None, None) => true,
            _ => false,
        };
        if is_same {
            return Ok(());
        }
        if let Some(old) = self.tun.take() {
            // Somebody else may hold the device open: it is not forgotten by itself.
            self.epoll.delete(old.as_fd())?;
        }
        if let Some(new) = tun {
            self.epoll.add(new.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, TUN))?;
            self.tun = Some(new);
        }
        Ok(())
    }

    /// The interface that is watched.
    pub(super) fn tun(&self) -> Option<&Arc<Tun>> {
        self.tun.as_ref()
    }

    /// Waits until something is ready, or for so many milliseconds; a signal ends it, too.
    pub(super) fn wait(&mut self, millis: u16) -> io::Result<()> {
        self.count = match self.epoll.wait(&mut self.events, EpollTimeout::from(millis)) {
            Err(Errno::EINTR) => 0,
            count => count?,
        };
        Ok(())
    }

    /// Whether the descriptor with this number has become ready.
    pub(super) fn is_ready(&self, number: u64) -> bool {
        self.event(number).is_some()
    }

    /// Whether the interface has become ready; or it is gone.
    pub(super) fn tun_is_ready(&self) -> Option<bool> {
        let flags = self.event(TUN)?;
        Some(!flags.contains(EpollFlags::EPOLLERR))
    }

    fn event(&self, number: u64) -> Option<EpollFlags> {
        let mut events = self.events[..self.count].iter();
        events.find(|event| event.data() == number).map(EpollEvent::events)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::eventfd::EventFd;

    use super::*;

    #[test]
    fn what_is_ready_is_told_by_its_number_until_it_was_read() {
        let fds: Vec<EventFd> = (0..3).map(|_| EventFd::new().unwrap()).collect();
        let mut watch = Watch::new(fds.iter().map(AsFd::as_fd)).unwrap();
        watch.wait(0).unwrap();
        assert!(!(0..3).any(|number| watch.is_ready(number)), "nothing is ready");
        fds[1].write(1).unwrap();
        for _ in 0..2 {
            watch.wait(2_000).unwrap();
            assert_eq!([0, 1, 2].map(|number| watch.is_ready(number)), [false, true, false]);
        }
        assert_eq!(watch.tun_is_ready(), None, "no interface is watched");
        fds[1].read().unwrap();
        fds[2].write(1).unwrap();
        watch.wait(2_000).unwrap();
        assert_eq!([0, 1, 2].map(|number| watch.is_ready(number)), [false, false, true]);
    }
}
