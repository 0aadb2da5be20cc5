//! Threads that run until they are told to stop. When one ends before, of an error or a panic, the
//! program has no business to go on: whoever supervises it starts it anew.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use tokio::sync::watch;

/// The thread that has ended without having been told to, if one has.
#[derive(Debug, Clone)]
pub struct Fallen(Arc<watch::Sender<Option<String>>>);

impl Default for Fallen {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl Fallen {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Waits until there is one. Cancel-safe.
    pub async fn wait(&self) {
        // There is a sender for as long as this is there.
        let _ = self.0.subscribe().wait_for(Option::is_some).await;
    }

    /// Starts a thread. When it ends, `is_told` says whether that is as it should be.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn spawn(
        &self,
        name: &str,
        is_told: impl Fn() -> bool + Send + 'static,
        run: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let end = End { name: name.to_owned(), fallen: self.clone(), is_told };
        Builder::new().name(name.to_owned()).spawn(move || {
            let _end = end;
            run();
        })
    }
}

/// Dropped by a thread in its end, a panic included.
struct End<F: Fn() -> bool> {
    name: String,
    fallen: Fallen,
    is_told: F,
}

impl<F: Fn() -> bool> Drop for End<F> {
    fn drop(&mut self) {
        if !(self.is_told)() {
            tracing::error!(thread = self.name, "a thread has ended, and nobody told it to");
            self.fallen.0.send_replace(Some(std::mem::take(&mut self.name)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_thread_that_ends_by_itself_is_told_of_and_one_that_was_told_to_is_not() {
        let fallen = Fallen::default();
        fallen.spawn("told", || true, || ()).unwrap().join().unwrap();
        assert!(timeout(Duration::from_millis(1), fallen.wait()).await.is_err());
        let broken = fallen.spawn("broken", || false, || panic!("what it met")).unwrap();
        fallen.wait().await;
        assert_eq!(fallen.name().as_deref(), Some("broken"));
        assert!(broken.join().is_err());
        fallen.wait().await;
    }
}
