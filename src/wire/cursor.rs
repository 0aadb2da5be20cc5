//! Reading and writing fixed layouts without indexing.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// A message ends before its last field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("message ends too early")]
pub struct UnexpectedEnd;

/// Takes fields from the front of a slice. Network byte order.
#[derive(Debug)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], UnexpectedEnd> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(UnexpectedEnd)?;
        self.0 = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], UnexpectedEnd> {
        self.bytes(N)?.try_into().map_err(|_| UnexpectedEnd)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, UnexpectedEnd> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, UnexpectedEnd> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, UnexpectedEnd> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, UnexpectedEnd> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// 16 bytes of address (IPv4 as IPv4-mapped IPv6, RFC 4291 section 2.5.5.2) and 2 of port.
    pub(crate) fn endpoint(&mut self) -> Result<SocketAddr, UnexpectedEnd> {
        let ip = Ipv6Addr::from(self.array::<16>()?);
        let ip = ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4);
        Ok(SocketAddr::new(ip, self.u16()?))
    }
}

/// Bytes of an endpoint in our layouts.
pub(crate) const ENDPOINT_LEN: usize = 18;

/// The 18 bytes that [`Reader::endpoint`] reads.
pub(crate) fn endpoint_bytes(endpoint: SocketAddr) -> [u8; ENDPOINT_LEN] {
    let ip = match endpoint.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; ENDPOINT_LEN];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&endpoint.port().to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_of_both_families_survive() {
        for text in ["192.0.2.1:65535", "[2001:db8::1]:1", "0.0.0.0:0"] {
            let endpoint: SocketAddr = text.parse().unwrap();
            assert_eq!(Reader(&endpoint_bytes(endpoint)).endpoint(), Ok(endpoint));
        }
    }

    #[test]
    fn reading_past_the_end_is_an_error_and_takes_nothing() {
        let mut reader = Reader(&[1, 2, 3]);
        assert_eq!(reader.u32(), Err(UnexpectedEnd));
        assert_eq!(reader.u16(), Ok(0x0102));
        assert_eq!(reader.u8(), Ok(3));
        assert_eq!(reader.u8(), Err(UnexpectedEnd));
    }
}
