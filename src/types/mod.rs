//! Words of the domain: parse, print, compare, count; nothing else.
//!
//! A value of one of these types was checked when it was made and is valid for ever.

mod candidate;
mod counts;
mod drops;
mod id;
mod key;
mod name;
mod net;
mod rate;
mod reach;
mod sizes;
mod tag;
mod uplink;

pub use candidate::{Candidate, CandidateKind, MAX_CANDIDATES, usable_underlay};
pub use counts::SizeCounts;
pub use drops::{DropCounters, DropReason};
pub use id::{InviteId, NetworkId, NodeId, ParseIdError, SocketId, TxId};
pub use key::{KeyError, PublicKey, SecretKey};
pub use name::{NameError, NodeName};
pub use net::{OverlayAddrs, OverlayRange, RangeError, source_of};
pub use rate::{Account, Rate, SharedAccount};
pub use reach::{is_global_v4, is_inside, is_internal, is_link_local, is_of_one_site, is_private};
pub use sizes::{BASE_MTU, MAX_TRAIN_BYTES, MAX_TRAIN_DATAGRAMS, SEAL_OVERHEAD};
pub use tag::{Tag, TagError};
pub use uplink::Uplink;
