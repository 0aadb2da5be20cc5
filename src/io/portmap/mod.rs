//! Port mappings: asks the home's router to forward a UDP port to us, by PCP (RFC 6887), NAT-PMP
//! (RFC 6886) or UPnP-IGD.
//!
//! [`Keeper`] decides when to ask for what, and knows no clock and no socket; [`run`] carries out
//! one of its jobs. The router is not trusted: only the default gateway is talked to, every job
//! has a time limit, every answer a size limit, and a panic in a parser ends the job and nothing
//! else.

mod keeper;
mod lease;
mod pcp;
#[cfg(test)]
mod tests;
mod upnp;

pub use keeper::{Keeper, KnockAnswer, Order, Standing};
pub use lease::{Goal, Job, Mapping, Outcome, Protocol};

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::io::os::Route;
use crate::io::udp::source_towards;
use crate::types::is_global_v4;

/// A router has this long to carry out what it said it can do.
const MAPPING_LIMIT: Duration = Duration::from_secs(2);
/// How long a router is waited for when a mapping is removed.
const REMOVAL_LIMIT: Duration = Duration::from_millis(400);

/// The way out of this machine's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gateway {
    /// The router.
    pub router: Ipv4Addr,
    /// Our address towards it.
    pub local: Ipv4Addr,
}

/// What PCP tells two clients of one address apart by (RFC 6887 section 11.2). A mapping can be
/// renewed and removed only with the nonce that it was made with.
pub type Nonce = [u32; 3];

/// Who asks: what a router knows us by, and what is known of it.
#[derive(Debug, Clone)]
pub struct Asker {
    nonce: Nonce,
    upnp: upnp::Known,
}

impl Asker {
    /// One that knows nothing of any router yet.
    #[must_use]
    pub fn new(nonce: Nonce) -> Self {
        Self { nonce, upnp: upnp::Known::default() }
    }
}

/// The router of the IPv4 default route in use, one of [`Underlay::gateways`]; none when there is none,
/// or when our own address is public and there is nothing to map.
///
/// [`Underlay::gateways`]: crate::io::os::Underlay::gateways
#[must_use]
pub fn gateway_of(ways_out: &[Route]) -> Option<Gateway> {
    let router = ways_out.iter().find_map(|way| match way.gateway {
        Some(IpAddr::V4(router)) if way.dst.addr().is_ipv4() => Some(router),
        _ => None,
    })?;
    // Sends nothing: the kernel says which address it would send from.
    let IpAddr::V4(local) =
        source_towards(SocketAddr::from((router, crab_nat::GATEWAY_PORT))).ok()?
    else {
        return None;
    };
    (!is_global_v4(local)).then_some(Gateway { router, local })
}

/// Carries out a job. Takes the job's budget for finding out what the router speaks, and then two
/// seconds at the most.
pub async fn run(job: Job, asker: Asker) -> Outcome {
    let id = job.id;
    // A task of its own: a panic in a parser ends there.
    let task = tokio::spawn(async move {
        match job.goal {
            Goal::Find => find(job, &asker).await,
            Goal::Renew(mapping) => {
                let result = renew(job, mapping, &asker).await;
                Outcome { id: job.id, answered: None, result }
            }
            Goal::Repair(mapping) => {
                // A mapping that is listed and does nothing is not mended by asking for it again.
                remove(job.gateway, job.port, mapping, asker.clone()).await;
                let result = renew(job, mapping, &asker).await;
                Outcome { id: job.id, answered: None, result }
            }
        }
    });
    task.await.unwrap_or_else(|_| Outcome {
        id,
        answered: None,
        result: Err("the router's answer could not be handled".into()),
    })
}

/// Asks by all protocols at the same time, and maps by the best one that works.
async fn find(job: Job, asker: &Asker) -> Outcome {
    let (pcp, nat_pmp, upnp) = tokio::join!(
        pcp::map_pcp(job, asker.nonce, job.budget),
        pcp::external_address(job, job.budget),
        upnp::find(asker.upnp.clone(), job.gateway, job.budget),
    );
    let mut answered = Vec::new();
    let mut errors = Vec::new();
    let mut note = |protocol: Protocol, failure: Option<&Failure>| match failure {
        Some(Failure::Silent) => {}
        Some(failure) => {
            if failure.speaks() {
                answered.push(protocol);
            }
            errors.push(format!("{protocol}: {failure}"));
        }
        None => answered.push(protocol),
    };
    note(Protocol::Pcp, pcp.as_ref().err());
    note(Protocol::NatPmp, nat_pmp.as_ref().err());
    note(Protocol::Upnp, upnp.as_ref().err());
    let mut mapping = pcp.ok();
    if let (None, Ok(external)) = (&mapping, nat_pmp) {
        match pcp::map_nat_pmp(job, external, MAPPING_LIMIT).await {
            Ok(found) => mapping = Some(found),
            Err(failure) => errors.push(format!("{}: {failure}", Protocol::NatPmp)),
        }
    }
    if let (None, Ok(router)) = (&mapping, upnp) {
        match upnp::map(router, job, None, MAPPING_LIMIT).await {
            Ok(found) => mapping = Some(found),
            Err(failure) => errors.push(format!("{}: {failure}", Protocol::Upnp)),
        }
    }
    let result = mapping.ok_or_else(|| {
        if errors.is_empty() {
            "the router answers to none of UPnP, NAT-PMP and PCP".into()
        } else {
            errors.join("; ")
        }
    });
    Outcome { id: job.id, answered: Some(answered), result }
}

async fn renew(job: Job, old: Mapping, asker: &Asker) -> Result<Mapping, String> {
    let renewed = match old.protocol {
        Protocol::Pcp => pcp::map_pcp(job, asker.nonce, MAPPING_LIMIT).await,
        Protocol::NatPmp => match pcp::external_address(job, MAPPING_LIMIT).await {
            Ok(external) => pcp::map_nat_pmp(job, external, MAPPING_LIMIT).await,
            Err(failure) => Err(failure),
        },
        Protocol::Upnp => match upnp::find(asker.upnp.clone(), job.gateway, MAPPING_LIMIT).await {
            Ok(router) => upnp::map(router, job, Some(old.external.port()), MAPPING_LIMIT).await,
            Err(failure) => Err(failure),
        },
    };
    renewed.map_err(|failure| format!("{}: {failure}", old.protocol))
}

/// Removes a mapping of ours; silently gives up after 0.4 s, the lease ends by itself.
pub async fn remove(gateway: Gateway, port: u16, mapping: Mapping, asker: Asker) {
    let removed = match mapping.protocol {
        Protocol::Pcp => pcp::remove_pcp(gateway, port, asker.nonce, REMOVAL_LIMIT).await,
        Protocol::NatPmp => pcp::remove_nat_pmp(gateway, port, REMOVAL_LIMIT).await,
        Protocol::Upnp => {
            upnp::remove(asker.upnp, gateway, mapping.external.port(), REMOVAL_LIMIT).await
        }
    };
    if let Err(error) = removed {
        tracing::debug!(%error, external = %mapping.external, "port mapping not removed");
    }
}

/// Why a router gave us nothing.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// Nobody speaks this protocol.
    #[error("no answer")]
    Silent,
    /// It answered, and refused.
    #[error("refused: {0}")]
    Refused(String),
    /// What it said makes no sense.
    #[error("bad answer: {0}")]
    Nonsense(String),
}

impl Failure {
    /// Whether the router is known to speak the protocol.
    fn speaks(&self) -> bool {
        matches!(self, Self::Refused(_))
    }
}

/// An error text that came from a router, fit for a log line.
fn tame(text: &impl ToString) -> String {
    let text = text.to_string();
    let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(LONGEST_ERROR).collect()
}

/// Characters of a router's error that are worth telling.
const LONGEST_ERROR: usize = 120;
