//! News from the kernel: something about links, addresses or routes has changed.
//!
//! Says what kind of thing changed, never what it is: whoever cares reads the state again, so a
//! hundred changes are as cheap as one and none can be lost.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

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

/// Waits for changes. The tasks behind it end when this is dropped.
#[derive(Debug)]
pub struct Changes {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<ChangeSet>,
    news: Notify,
}

impl Changes {
    pub(super) fn listen() -> io::Result<Self> {
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])?;
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        let reader = tokio::spawn(async move {
            while let Some((message, _)) = messages.next().await {
                writer.note(&message.payload);
            }
        });
        Ok(Self { shared, tasks: [tokio::spawn(connection), reader] })
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
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, ChangeSet> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, payload: &NetlinkPayload<RouteNetlinkMessage>) {
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
                    *pending = ChangeSet { links: true, addresses: true, routes: true };
                }
                _ => return,
            }
        }
        self.news.notify_one();
    }
}
