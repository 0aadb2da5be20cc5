//! News from the kernel: something about links, addresses or routes has changed.
//!
//! Says what kind of thing changed, never what it is: whoever cares reads the state again, so a
//! hundred changes are as cheap as one and none can be lost.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// When the news have ended, they are asked for again after this.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

type News = NetlinkPayload<RouteNetlinkMessage>;

/// What has changed since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChangeSet {
    /// An interface came, went, or changed its state.
    pub links: bool,
    /// An address came, went, or changed its state.
    pub addresses: bool,
    /// A route came or went.
    pub routes: bool,
}

impl ChangeSet {
    /// Whether nothing changed.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// Waits for changes. The task behind it ends when this is dropped.
#[derive(Debug)]
pub struct Changes {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<ChangeSet>,
    news: Notify,
}

impl Changes {
    pub(super) fn listen() -> io::Result<Self> {
        Self::listen_by(|| {
            let (connection, _, messages) = rtnetlink::new_multicast_connection(&[
                MulticastGroup::Link,
                MulticastGroup::Ipv4Ifaddr,
                MulticastGroup::Ipv6Ifaddr,
                MulticastGroup::Ipv4Route,
                MulticastGroup::Ipv6Route,
            ])?;
            Ok((connection, messages.map(|(message, _)| message.payload)))
        })
    }

    /// Takes news from what `open` gives: what has to run for them, and the news.
    fn listen_by<C, M>(
        mut open: impl FnMut() -> io::Result<(C, M)> + Send + 'static,
    ) -> io::Result<Self>
    where
        C: Future<Output = ()> + Send + 'static,
        M: Stream<Item = News> + Unpin + Send + 'static,
    {
        let mut source = open()?;
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            loop {
                let (connection, messages) = source;
                tokio::select! {
                    () = connection => {}
                    () = writer.take(messages) => {}
                }
                tracing::debug!("the kernel's news have ended, listening anew");
                source = loop {
                    tokio::time::sleep(LISTEN_AGAIN).await;
                    match open() {
                        Ok(source) => break source,
                        Err(error) => tracing::debug!(%error, "the kernel gives no news"),
                    }
                };
                // What has happened meanwhile nobody has told.
                writer.note_all();
            }
        });
        Ok(Self { shared, task })
    }

    /// Waits until something has changed since the last call; several changes are one. Dropping
    /// the future loses nothing.
    pub async fn changed(&mut self) -> ChangeSet {
        loop {
            let changes = std::mem::take(&mut *self.shared.pending());
            if !changes.is_empty() {
                return changes;
            }
            self.shared.news.notified().await;
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, ChangeSet> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, mut messages: impl Stream<Item = News> + Unpin) {
        while let Some(news) = messages.next().await {
            self.note(&news);
        }
    }

    fn note_all(&self) {
        *self.pending() = ChangeSet { links: true, addresses: true, routes: true };
        self.news.notify_one();
    }

    fn note(&self, payload: &News) {
        {
            let mut pending = self.pending();
            match payload {
                NetlinkPayload::InnerMessage(message) => match message {
                    RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => {
                        pending.links = true;
                    }
                    RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => {
                        pending.addresses = true;
                    }
                    RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => {
                        pending.routes = true;
                    }
                    _ => return,
                },
                // The kernel had more news than the socket could hold: anything may have changed.
                NetlinkPayload::Overrun(_) => {
                    drop(pending);
                    return self.note_all();
                }
                _ => return,
            }
        }
        self.news.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn news_that_end_are_asked_for_again_and_nothing_is_missed() {
        let mut opened = 0;
        let mut changes = Changes::listen_by(move || {
            opened += 1;
            // The first source ends at once, the second cannot be had, the third is silent.
            match opened {
                2 => Err(io::ErrorKind::OutOfMemory.into()),
                1 => Ok((std::future::pending().boxed(), futures_util::stream::empty().boxed())),
                _ => Ok((std::future::pending().boxed(), futures_util::stream::pending().boxed())),
            }
        })
        .unwrap();
        let all = ChangeSet { links: true, addresses: true, routes: true };
        let changed = tokio::time::timeout(LISTEN_AGAIN * 20, changes.changed()).await;
        assert_eq!(changed.unwrap(), all);
    }
}
