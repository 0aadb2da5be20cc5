//! What a node has to say in the first message of a connection, which is ready about when TCP is: a
//! token that the server's reflector gives out, and the hello.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::io::clock;
use crate::wire::frame::Early;
use crate::wire::relay::Token;

/// A token that was given out longer ago may be too old when it arrives.
const USABLE: Duration = Duration::from_secs(5);

/// How long a connection that took so long waits for the token: the question left with its first
/// packet, and the answer may have stood in a longer queue.
#[must_use]
pub fn token_grace(took: Duration) -> Duration {
    (took / 4).clamp(Duration::from_millis(10), Duration::from_millis(50))
}

/// Who was asked for a token, and what came back.
#[derive(Debug, Clone, Default)]
pub struct Offers {
    asked: Vec<IpAddr>,
    tokens: Vec<(IpAddr, Token, Instant)>,
    hello: Vec<u8>,
}

impl Offers {
    /// These servers have been asked: their answers are worth a moment.
    pub fn expect(&mut self, servers: impl IntoIterator<Item = IpAddr>) {
        self.asked.extend(servers);
    }

    /// Whether one of them has answered.
    #[must_use]
    pub fn has_token(&self, server: IpAddr) -> bool {
        self.tokens.iter().any(|(it, ..)| *it == server)
    }

    /// One has answered; the hello is what there is to say now.
    pub fn put(&mut self, server: IpAddr, token: Token, hello: Vec<u8>) {
        self.tokens.retain(|(it, ..)| *it != server);
        self.tokens.push((server, token, clock::now()));
        self.hello = hello;
    }

    /// The payload of a first message to `server`, waited for if it may still come.
    pub(super) async fn early(
        offers: &mut watch::Receiver<Self>,
        server: IpAddr,
    ) -> Option<Vec<u8>> {
        let server = server.to_canonical();
        let known = |it: &Self| it.has_token(server) || !it.asked.contains(&server);
        // It fails when nobody is left to offer anything.
        let offers = offers.wait_for(known).await.ok()?;
        let now = clock::now();
        let (_, token, _) = offers
            .tokens
            .iter()
            .find(|(ip, _, at)| *ip == server && now.saturating_duration_since(*at) < USABLE)?;
        Early { token: *token, hello: &offers.hello }.encode()
    }
}
