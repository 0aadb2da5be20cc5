//! A way from this machine to everywhere.

/// An interface with a default route, of one address family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uplink {
    /// The name of the interface.
    pub device: String,
    /// Its number: one that was made anew under the same name is another one.
    pub index: u32,
    /// Whether its route is one of IPv6.
    pub ipv6: bool,
}
