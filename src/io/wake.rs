//! Notices that the machine slept or that this process stood still.
//!
//! A timer of the boot-time clock, which goes on while the machine is suspended, fires at the moment
//! of waking up. How often it should have fired meanwhile tells how long we were away.

use std::io;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::sync::mpsc;

use super::clock;

/// The timer's interval.
const TICK: Duration = Duration::from_secs(1);
/// So many ticks at once: we were away for more than two seconds.
const MISSED_TICKS: u64 = 3;
/// The clock that timers go by has lost so much against the boot-time clock: the machine slept.
const SUSPENDED: Duration = Duration::from_secs(2);

/// Absences that nobody has asked for yet.
const QUEUE: usize = 4;

/// We are back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Woke {
    /// For so long nothing ran here.
    pub away: Duration,
    /// The machine was suspended: [`std::time::Instant`]s stood still.
    pub suspended: bool,
}

/// Waits for the end of an absence. The thread behind it ends within a tick after this is dropped.
#[derive(Debug)]
pub struct WakeWatch {
    news: mpsc::Receiver<Woke>,
}

impl WakeWatch {
    /// Starts watching.
    ///
    /// # Errors
    /// When the kernel gives no timer or no thread.
    pub fn start() -> io::Result<Self> {
        let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC)?;
        timer.set(Expiration::Interval(TimeSpec::from(TICK)), TimerSetTimeFlags::empty())?;
        let (sender, news) = mpsc::channel(QUEUE);
        thread::Builder::new().name("wake".into()).spawn(move || watch(&timer, &sender))?;
        Ok(Self { news })
    }

    /// Returns after an absence. Cancel-safe.
    pub async fn woke(&mut self) -> Woke {
        match self.news.recv().await {
            Some(woke) => woke,
            None => std::future::pending().await,
        }
    }
}

fn watch(timer: &TimerFd, news: &mpsc::Sender<Woke>) {
    let mut ticked_at = clock::now();
    while !news.is_closed() {
        let mut count = [0; 8];
        match nix::unistd::read(timer, &mut count) {
            Ok(8) => {}
            Err(Errno::EINTR) => continue,
            Ok(_) | Err(_) => return,
        }
        let now = clock::now();
        let ran = now.saturating_duration_since(ticked_at);
        ticked_at = now;
        if let Some(woke) = judge(u64::from_ne_bytes(count), ran) {
            // Who has not read the last absence learns nothing by one more.
            let _ = news.try_send(woke);
        }
    }
}

/// What it means that the boot-time clock went on by so many ticks while timers went on by `ran`.
fn judge(ticks: u64, ran: Duration) -> Option<Woke> {
    let away = TICK.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX));
    let suspended = away.saturating_sub(ran) >= SUSPENDED;
    (ticks >= MISSED_TICKS).then_some(Woke { away, suspended })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_jump_is_an_absence() {
        let seconds = Duration::from_secs;
        assert_eq!(judge(1, seconds(1)), None);
        assert_eq!(judge(2, seconds(2)), None, "a busy machine");
        let away = seconds(20);
        assert_eq!(judge(20, away), Some(Woke { away, suspended: false }), "the process stopped");
        let away = seconds(3600);
        assert_eq!(judge(3600, seconds(1)), Some(Woke { away, suspended: true }));
    }

    #[tokio::test]
    async fn a_process_that_does_not_stand_still_is_told_nothing() {
        let mut watch = WakeWatch::start().unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(2_500), watch.woke()).await;
        assert!(quiet.is_err(), "{quiet:?}");
    }
}
