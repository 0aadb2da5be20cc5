//! The system's own `ping`, as a stopwatch and as a loss detector.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::clock::{now, wait_for};
use crate::lab::{Host, Net};
use crate::process::{self, Daemon};

/// Pings `address` from `host` until the first answer; returns the time since `start`.
///
/// # Panics
/// When there is none within `limit`.
pub(crate) fn first_answer(
    host: &Host,
    address: &str,
    start: Instant,
    limit: Duration,
) -> Duration {
    loop {
        // The interface may not be there yet, then ping fails at once.
        let mut command = host.ns.command("ping");
        command.args(["-n", "-q", "-i", "0.02", "-c", "1", "-w", "1", address]);
        if process::run(command, TOOL_LIMIT).code == Some(0) {
            return start.elapsed();
        }
        let name = &host.name;
        assert!(start.elapsed() < limit, "{name} got no answer from {address} within {limit:?}");
    }
}

/// Asserts that `address` answers `host` now.
pub(crate) fn assert_answers(host: &Host, address: &str) {
    first_answer(host, address, now(), Duration::from_secs(5));
}

/// Asserts that `address` does not answer `host` during two seconds of asking.
pub(crate) fn assert_silent(host: &Host, address: &str) {
    assert!(!answers_once(host, address, "2"), "{} got an answer from {address}", host.name);
}

/// Whether one of the pings sent during `seconds` is answered.
pub(crate) fn answers_once(host: &Host, address: &str, seconds: &str) -> bool {
    let mut command = host.ns.command("ping");
    command.args(["-n", "-q", "-i", "0.1", "-c", "1", "-w", seconds, address]);
    process::run(command, TOOL_LIMIT).code == Some(0)
}

/// Pings in the background.
pub(crate) struct Stream {
    daemon: Daemon,
    what: String,
    log: PathBuf,
}

/// What became of a stream.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) packets: usize,
    /// Numbers of the lost ones.
    pub(crate) lost: Vec<u32>,
}

impl Stream {
    /// A ping every 10 ms.
    pub(crate) fn start(net: &Net, host: &Host, address: &str) -> Self {
        Self::every(net, host, address, "0.01")
    }

    /// A ping every so many seconds.
    pub(crate) fn every(net: &Net, host: &Host, address: &str, seconds: &str) -> Self {
        let log = net.dir().join(format!("ping-{}-{address}.txt", host.name));
        let _ = std::fs::remove_file(&log);
        let mut command: Command = host.ns.command("ping");
        command.args(["-n", "-i", seconds, address]);
        let what = format!("ping from {} to {address}", host.name);
        Self { daemon: Daemon::start(command, &log), what, log }
    }

    /// Waits until `packets` more answers have come, and so proves that the stream flows.
    pub(crate) fn wait_for_more(&self, packets: usize) {
        let before = self.answers().len();
        let limit = Duration::from_secs(10) + Duration::from_millis(20) * packets as u32;
        wait_for(&format!("{packets} answers to the {}", self.what), limit, || {
            (self.answers().len() >= before + packets).then_some(())
        });
    }

    /// Ends the stream and asserts that every packet was answered.
    pub(crate) fn stop_without_loss(self) -> Received {
        let what = self.what.clone();
        let received = self.stop();
        assert!(received.packets > 0, "{what}: no answer at all");
        assert!(received.lost.is_empty(), "{what}: lost {:?}", received.lost);
        received
    }

    /// Ends the stream. What has been sent until now counts, and has the time to be answered: on a
    /// machine that does much else some packets are under way.
    pub(crate) fn stop(mut self) -> Received {
        self.daemon.signal(Signal::SIGQUIT);
        let what = format!("the {} to say how much it has sent", self.what);
        let (sent, _) = wait_for(&what, TOOL_LIMIT, || self.sent_so_far());
        let asked = now();
        while !(1..=sent).all(|number| self.answers().contains(&number))
            && asked.elapsed() < ANSWER_LIMIT
        {
            sleep(Duration::from_millis(10));
        }
        self.daemon.signal(Signal::SIGINT);
        self.daemon.wait_exit(Duration::from_secs(5));
        let answers = self.answers();
        let lost = (1..=sent).filter(|number| !answers.contains(number)).collect();
        Received { packets: answers.len(), lost }
    }

    fn answers(&self) -> BTreeSet<u32> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        text.lines()
            .filter(|line| line.contains(" time="))
            .filter_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok())
            .collect()
    }

    /// The number of the last packet, in the answer to SIGQUIT: `17/18 packets, 5% loss, ...`.
    fn sent_so_far(&self) -> Option<u32> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        let line = text.lines().find(|line| line.contains(" packets, "))?;
        line.split(" packets, ").next()?.rsplit('/').next()?.parse().ok()
    }
}

/// What is answered later than this is lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
const TOOL_LIMIT: Duration = Duration::from_secs(20);
