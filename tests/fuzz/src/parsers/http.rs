//! HTTP: the upgrade of a control connection, both sides of it, and the page of metrics.

use std::cell::OnceCell;

use overlay::io::link;
use overlay::io::listen;
use overlay::io::metrics::{self, Page};
use overlay::types::SecretKey;
use overlay::wire::join::ServerAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::Runtime;

/// More than any of these says or is told.
const ROOM: usize = 1 << 16;

/// Plays a stranger who says `bytes` and hangs up, and hears what it is told.
fn play<F: Future>(bytes: &[u8], other: impl FnOnce(DuplexStream) -> F) -> Vec<u8> {
    thread_local! {
        static RUNTIME: OnceCell<Runtime> = const { OnceCell::new() };
    }
    RUNTIME.with(|runtime| {
        let runtime = runtime.get_or_init(|| {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_time().build().expect("there is memory for a runtime")
        });
        runtime.block_on(async {
            let (mut ours, theirs) = duplex(ROOM);
            let bytes = &bytes[..bytes.len().min(ROOM)];
            let stranger = async {
                // It may have been hung up on.
                let _ = ours.write_all(bytes).await;
                let _ = ours.shutdown().await;
                let mut heard = Vec::new();
                let _ = ours.read_to_end(&mut heard).await;
                heard
            };
            let served = async {
                other(theirs).await;
            };
            tokio::join!(stranger, served).0
        })
    })
}

fn server_key() -> SecretKey {
    SecretKey::from_bytes([1; 32])
}

/// What strangers send to the port of the server: nobody gets a link without the right request.
pub(crate) fn request(bytes: &[u8]) {
    let key = server_key();
    let mut upgraded = false;
    let heard = play(bytes, |stream| async {
        upgraded = listen::exchange(stream, &key).await.is_ok();
    });
    assert_eq!(upgraded, heard.starts_with(b"HTTP/1.1 101 "), "who is in is told so");
    assert!(heard.len() < 1024, "strangers are told little");
}

/// What something else than the server answers to a node: no link without the right key.
pub(crate) fn answer(bytes: &[u8]) {
    let server: ServerAddr = "192.0.2.1".parse().expect("an address");
    let mut upgraded = false;
    let heard = play(bytes, |stream| async {
        upgraded = link::ask(stream, &server, "AAAA").await.is_ok();
    });
    assert!(heard.is_empty() || heard.starts_with(b"GET "), "a request, if there was time for it");
    // A handshake is dear, and made only when there is something for it to read.
    if upgraded {
        let (key, machine) = (server_key().public(), SecretKey::from_bytes([2; 32]));
        play(bytes, |stream| async {
            let exchanged = link::exchange(stream, &server, &key, &machine).await;
            assert!(exchanged.is_err(), "nobody guesses the answer to a fresh handshake");
        });
    }
}

/// What a program on this machine asks where the metrics are.
pub(crate) fn metrics(bytes: &[u8]) {
    let heard = play(bytes, |stream| async {
        // The page is not empty, and there is nothing else to find.
        let _ = metrics::serve(stream, || async { Some(Page::default()) }).await;
    });
    assert!(heard.is_empty() || heard.starts_with(b"HTTP/1."), "HTTP is answered");
}
