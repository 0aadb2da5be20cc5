//! ICMP echo through the kernel, without a `ping` program.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use super::machine::Machine;
use super::packet::{EchoReply, echo_request, parse_echo_reply};
use crate::io::clock;

/// Sends `count` echo requests from a machine, one after the other, and returns the round trip of
/// each; nothing where no answer came in time.
pub(super) fn ping(
    machine: &Machine,
    to: Ipv4Addr,
    count: u16,
    timeout: Duration,
) -> Result<Vec<Option<Duration>>> {
    machine.run(move || {
        let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))
            .context("opening an ICMP socket")?;
        (1..=count).map(|seq| echo(&mut socket, to, seq, timeout)).collect()
    })
}

fn echo(
    socket: &mut Socket,
    to: Ipv4Addr,
    seq: u16,
    timeout: Duration,
) -> Result<Option<Duration>> {
    let sent_at = clock::now();
    let address = SocketAddrV4::new(to, 0).into();
    socket.send_to(&echo_request(IDENTIFIER, seq, PAYLOAD), &address).context("sending a ping")?;
    let expected = EchoReply { from: to, id: IDENTIFIER, seq };
    let deadline = sent_at + timeout;
    let mut buffer = [0; 2048];
    while let Some(left) = left(deadline) {
        socket.set_read_timeout(Some(left)).context("setting a timeout")?;
        match socket.read(&mut buffer) {
            Ok(length) => {
                if buffer.get(..length).and_then(parse_echo_reply) == Some(expected) {
                    return Ok(Some(clock::now().saturating_duration_since(sent_at)));
                }
            }
            Err(error) if is_passing(error.kind()) => {}
            Err(error) => return Err(error).context("waiting for a pong"),
        }
    }
    Ok(None)
}

fn left(deadline: Instant) -> Option<Duration> {
    let left = deadline.saturating_duration_since(clock::now());
    (!left.is_zero()).then_some(left)
}

fn is_passing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

const IDENTIFIER: u16 = 0x0715;
const PAYLOAD: &[u8] = b"a small internet on your machine";
