//! Sending datagrams of one length to one address: as trains where those work, else one by one.

use std::io;
use std::net::IpAddr;

use super::gso::{Gso, is_refusal};

/// Datagrams to one address.
#[derive(Debug, Clone, Copy)]
pub struct Train<'a> {
    /// Their content, one behind the other.
    pub bytes: &'a [u8],
    /// Length of each datagram but the last, which may be shorter.
    pub segment: usize,
    /// The address of ours that they leave from, when it matters.
    pub local: Option<IpAddr>,
    /// Where they may leave from another one when they cannot leave from that.
    pub may_leave_elsewhere: bool,
}

/// What became of datagrams that were to be sent.
#[derive(Debug, Default)]
pub struct Sent {
    /// Bytes that are done with; what is behind them has found the socket full.
    pub done: usize,
    /// Datagrams of those that could not be sent,
    pub lost: usize,
    /// and why the last of them could not.
    pub error: Option<io::Error>,
}

/// Sends `train` by `call`, which takes the bytes of one system call, the length of each datagram in
/// them if they are several, and the address they leave from. Ends where the socket is full.
pub fn send_train(
    gso: &Gso,
    train: Train<'_>,
    mut call: impl FnMut(&[u8], Option<usize>, Option<IpAddr>) -> io::Result<()>,
) -> Sent {
    let segment = train.segment.max(1);
    let mut local = train.local;
    let mut sent = Sent::default();
    let mut longest = gso.longest();
    // A train was refused for what it is, unless its datagrams do not leave singly either.
    let mut is_refused = false;
    let mut tried_again = false;
    while let Some(rest) = train.bytes.get(sent.done..).filter(|rest| !rest.is_empty()) {
        let part = &rest[..rest.len().min(segment.saturating_mul(longest))];
        let is_train = part.len() > segment;
        let error = match call(part, is_train.then_some(segment), local) {
            Ok(()) => {
                sent.done += part.len();
                tried_again = false;
                if is_train {
                    gso.worked();
                } else if std::mem::take(&mut is_refused) {
                    gso.refuse();
                }
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => error,
        };
        let code = error.raw_os_error();
        if is_train && matches!(code, Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)) {
            // Perhaps the device cannot cut it, and a train is not cut into fragments, but its
            // datagrams are.
            is_refused = is_refusal(&error, segment);
            longest = 1;
        } else if code == Some(libc::EMSGSIZE) && !tried_again {
            // Fragments are forbidden for the instant in which a probe is sent.
            tried_again = true;
        } else if train.may_leave_elsewhere
            && local.is_some()
            && !matches!(code, Some(libc::EPERM | libc::EACCES | libc::EMSGSIZE))
        {
            // An address that we no longer have must not hold the datagrams back; but a rule is a
            // rule, and too long is too long.
            local = None;
            is_refused = false;
            longest = gso.longest();
        } else {
            is_refused = false;
            tried_again = false;
            sent.done += part.len();
            sent.lost += part.len().div_ceil(segment);
            sent.error = Some(error);
        }
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One system call: the first byte and the length of what it was given.
    type Call = (u8, usize, Option<IpAddr>);

    /// Five datagrams of 1000 bytes, numbered, to a kernel that answers so.
    fn send(gso: &Gso, local: Option<IpAddr>, answer: impl Fn(Call) -> i32) -> (Sent, Vec<Call>) {
        let bytes: Vec<u8> = (0..5).flat_map(|number| [number; 1_000]).collect();
        let train = Train { bytes: &bytes, segment: 1_000, local, may_leave_elsewhere: true };
        let mut calls = Vec::new();
        let sent = send_train(gso, train, |bytes, _, local| {
            let call = (bytes[0], bytes.len(), local);
            calls.push(call);
            match answer(call) {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(code)),
            }
        });
        (sent, calls)
    }

    const HERE: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)));

    #[test]
    fn a_full_socket_ends_it_and_what_has_left_does_not_leave_again() {
        let (sent, calls) = send(&Gso::new(1), HERE, |(first, ..)| match first {
            3 => libc::EAGAIN,
            _ => 0,
        });
        assert_eq!((sent.done, sent.lost), (3_000, 0));
        assert_eq!(calls.len(), 4, "{calls:?}");
        let (sent, calls) = send(&Gso::new(2), HERE, |(first, ..)| match first {
            2 => libc::EAGAIN,
            _ => 0,
        });
        assert_eq!((sent.done, sent.lost), (2_000, 0));
        assert_eq!(calls, [(0, 2_000, HERE), (2, 2_000, HERE)]);
        let (sent, _) = send(&Gso::new(64), HERE, |_| libc::EAGAIN);
        assert_eq!((sent.done, sent.lost), (0, 0));
    }

    #[test]
    fn one_datagram_that_fails_takes_no_other_with_it() {
        let (sent, calls) = send(&Gso::new(1), None, |(first, ..)| match first {
            1 => libc::ENOBUFS,
            _ => 0,
        });
        assert_eq!((sent.done, sent.lost, calls.len()), (5_000, 1, 5));
        assert_eq!(sent.error.unwrap().raw_os_error(), Some(libc::ENOBUFS));
    }

    #[test]
    fn what_the_kernel_cannot_cut_leaves_singly_once_each() {
        for (code, works) in [(libc::EIO, false), (libc::EINVAL, false), (libc::EMSGSIZE, true)] {
            let gso = Gso::new(64);
            let (sent, calls) = send(&gso, HERE, |(_, len, _)| if len > 1_000 { code } else { 0 });
            assert_eq!((sent.done, sent.lost, calls.len()), (5_000, 0, 6), "{calls:?}");
            assert_eq!(gso.works(), works, "{code}");
        }
    }

    #[test]
    fn a_datagram_that_met_a_probe_is_sent_again_and_one_that_is_too_long_is_lost() {
        let met = std::cell::Cell::new(false);
        let (sent, calls) = send(&Gso::new(1), None, |(first, ..)| {
            if first == 1 && !met.replace(true) { libc::EMSGSIZE } else { 0 }
        });
        assert_eq!((sent.done, sent.lost, calls.len()), (5_000, 0, 6));
        let (sent, calls) = send(&Gso::new(1), None, |_| libc::EMSGSIZE);
        assert_eq!((sent.done, sent.lost, calls.len()), (5_000, 5, 10));
    }

    #[test]
    fn an_address_that_is_gone_holds_nothing_back_and_ends_no_offload() {
        let gso = Gso::new(64);
        let gone = |(_, _, local): Call| if local.is_some() { libc::EINVAL } else { 0 };
        let (sent, calls) = send(&gso, HERE, gone);
        assert_eq!((sent.done, sent.lost), (5_000, 0));
        assert_eq!(calls, [(0, 5_000, HERE), (0, 1_000, HERE), (0, 5_000, None)]);
        assert!(gso.works());
        for rule in [libc::EPERM, libc::EACCES] {
            let (sent, calls) = send(&gso, HERE, |_| rule);
            assert_eq!((sent.done, sent.lost, calls.len()), (5_000, 5, 1), "a rule is a rule");
        }
        let (sent, calls) = send(&Gso::new(1), HERE, |_| libc::EMSGSIZE);
        assert_eq!((sent.done, sent.lost), (5_000, 5), "too long is too long");
        assert!(calls.iter().all(|(.., local)| *local == HERE));
        assert!(gso.works());
    }
}
