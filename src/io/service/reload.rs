//! Reading the configuration again, when somebody asks for it by SIGHUP.

use std::io::IsTerminal;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Reads the configuration as at the start, or tells what is wrong with it.
pub type Read<O> = Box<dyn FnMut() -> Result<O, String>>;

/// Whoever asks, and how the answer is found.
pub struct Reload<O> {
    /// None on a terminal: there the signal says that the terminal is gone, and ends the program.
    hangup: Option<Signal>,
    read: Read<O>,
}

impl<O> Reload<O> {
    /// From here on SIGHUP does not end a program that runs without a terminal.
    pub fn new(read: Read<O>) -> Self {
        // Standard input may be the pipe that the join line came by.
        let background = !std::io::stdin().is_terminal() && !std::io::stderr().is_terminal();
        let hangup = background.then(|| signal(SignalKind::hangup()));
        let hangup = hangup.transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "SIGHUP cannot be waited for");
            None
        });
        Self { hangup, read }
    }

    /// Waits until somebody asks. Cancel-safe.
    pub async fn asked(&mut self) {
        match &mut self.hangup {
            Some(hangup) => {
                hangup.recv().await;
            }
            None => std::future::pending().await,
        }
    }

    /// The configuration as it is now; none, and a line in the log, when it is wrong.
    pub fn read(&mut self) -> Option<O> {
        (self.read)()
            .inspect_err(|error| {
                tracing::error!(error, "the configuration is wrong, the old one stays in force");
            })
            .ok()
    }
}

/// Tells what of a new configuration waits for a restart: pairs of a key and whether it changed.
pub fn warn_of_unapplied(changed: &[(&str, bool)]) {
    let keys: Vec<&str> = changed.iter().filter(|(_, it)| *it).map(|(key, _)| *key).collect();
    if !keys.is_empty() {
        tracing::warn!(keys = keys.join(", "), "changed, and in force after a restart only");
    }
}

/// Tells the service manager that the configuration is being read again.
pub fn notify_reloading() {
    let mut states = vec![sd_notify::NotifyState::Reloading];
    states.extend(sd_notify::NotifyState::monotonic_usec_now().ok());
    notify(&states);
}

/// Tells the service manager that this is over.
pub fn notify_reloaded() {
    notify(&[sd_notify::NotifyState::Ready]);
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}
