//! A borrowed look at an IP packet: just what routing and filters need (RFC 791, RFC 8200).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes that are not one whole IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a whole IPv4 or IPv6 packet")]
pub struct NotIp;

/// The header fields of one IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpView {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// The packet's length by its own header; never more than the bytes given.
    pub len: usize,
}

impl IpView {
    /// Reads the header of the packet at the start of `bytes`.
    ///
    /// # Errors
    /// When the bytes are not IP, or fewer than the header says.
    pub fn parse(bytes: &[u8]) -> Result<Self, NotIp> {
        let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
        let view = match bytes.first().map(|first| first >> 4) {
            Some(4) => {
                let header_len = usize::from(bytes[0] & 0x0f) * 4;
                let len = usize::from(word(2).ok_or(NotIp)?);
                if header_len < 20 || len < header_len {
                    return Err(NotIp);
                }
                let addr = |at: usize| -> Option<Ipv4Addr> {
                    Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?))
                };
                Self { src: addr(12).ok_or(NotIp)?.into(), dst: addr(16).ok_or(NotIp)?.into(), len }
            }
            Some(6) => {
                let addr = |at: usize| -> Option<Ipv6Addr> {
                    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?))
                };
                Self {
                    src: addr(8).ok_or(NotIp)?.into(),
                    dst: addr(24).ok_or(NotIp)?.into(),
                    len: 40 + usize::from(word(4).ok_or(NotIp)?),
                }
            }
            _ => return Err(NotIp),
        };
        if view.len > bytes.len() { Err(NotIp) } else { Ok(view) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn ipv4(src: [u8; 4], dst: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let len = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        let mut packet = vec![0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend_from_slice(&src);
        packet.extend_from_slice(&dst);
        packet.extend_from_slice(payload);
        packet
    }

    #[test]
    fn addresses_and_length_are_read() {
        let packet = ipv4([10, 0, 0, 1], [10, 0, 0, 2], b"hello");
        let view = IpView::parse(&packet).unwrap();
        assert_eq!(
            (view.src.to_string(), view.dst.to_string()),
            ("10.0.0.1".into(), "10.0.0.2".into())
        );
        assert_eq!(view.len, 25);
        assert_eq!(IpView::parse(&packet[..24]), Err(NotIp), "a cut packet is none");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(0u8.., 0..100)) {
            if let Ok(view) = IpView::parse(&bytes) {
                proptest::prop_assert!(view.len <= bytes.len());
            }
        }
    }
}
