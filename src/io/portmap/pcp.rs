//! PCP and NAT-PMP. The sockets are connected to the gateway, so nobody else is heard, and an
//! answer longer than the protocol's own limit is cut by its buffer.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::time::Duration;

use crab_nat::pcp::{BaseMapRequest, DropMappingRange, Failure as PcpFailure};
use crab_nat::{
    GatewayAddress, InternetProtocol, PortMappingOptions, PortMappingType, TimeoutConfig, natpmp,
    pcp,
};
use tokio::time::timeout;

use super::lease::{Job, Mapping, Protocol};
use super::{Failure, Gateway, Nonce, tame};

/// Maps by PCP.
pub(super) async fn map_pcp(job: Job, nonce: Nonce, limit: Duration) -> Result<Mapping, Failure> {
    let port = nonzero(job.port)?;
    let router = GatewayAddress::IpV4(job.gateway.router);
    let local = IpAddr::V4(job.gateway.local);
    let base = BaseMapRequest::new(router, local, InternetProtocol::Udp, port);
    let asking = pcp::port_mapping(base, Some(nonce), None, options(job, port, limit));
    let mapped = timeout(limit, asking).await.map_err(|_| Failure::Silent)?.map_err(of_pcp)?;
    let PortMappingType::Pcp { external_ip: IpAddr::V4(external), .. } = mapped.mapping_type()
    else {
        return Err(Failure::Nonsense("no IPv4 address".into()));
    };
    let lease = Duration::from_secs(mapped.lifetime().into());
    Mapping::checked(Protocol::Pcp, external, mapped.external_port().get(), Some(lease))
}

/// Asks by NAT-PMP for the external address.
pub(super) async fn external_address(job: Job, limit: Duration) -> Result<Ipv4Addr, Failure> {
    let router = GatewayAddress::IpV4(job.gateway.router);
    let asking = natpmp::external_address(router, Some(patience(limit)));
    timeout(limit, asking).await.map_err(|_| Failure::Silent)?.map_err(of_nat_pmp)
}

/// Maps by NAT-PMP.
pub(super) async fn map_nat_pmp(
    job: Job,
    external: Ipv4Addr,
    limit: Duration,
) -> Result<Mapping, Failure> {
    let port = nonzero(job.port)?;
    let router = GatewayAddress::IpV4(job.gateway.router);
    let options = options(job, port, limit);
    let asking = natpmp::port_mapping(router, InternetProtocol::Udp, port, options);
    let mapped = timeout(limit, asking).await.map_err(|_| Failure::Silent)?.map_err(of_nat_pmp)?;
    let lease = Duration::from_secs(mapped.lifetime().into());
    Mapping::checked(Protocol::NatPmp, external, mapped.external_port().get(), Some(lease))
}

/// Removes a mapping by PCP.
pub(super) async fn remove_pcp(
    gateway: Gateway,
    port: u16,
    nonce: Nonce,
    limit: Duration,
) -> Result<(), Failure> {
    let internal_port = nonzero(port)?;
    let range = DropMappingRange::Single { protocol: InternetProtocol::Udp, internal_port };
    let router = GatewayAddress::IpV4(gateway.router);
    let local = IpAddr::V4(gateway.local);
    let asking = pcp::try_drop_mapping(router, local, nonce, range, Some(patience(limit)));
    timeout(limit, asking).await.map_err(|_| Failure::Silent)?.map_err(of_pcp)
}

/// Removes a mapping by NAT-PMP.
pub(super) async fn remove_nat_pmp(
    gateway: Gateway,
    port: u16,
    limit: Duration,
) -> Result<(), Failure> {
    let port = nonzero(port)?;
    let router = GatewayAddress::IpV4(gateway.router);
    let asking =
        natpmp::try_drop_mapping(router, InternetProtocol::Udp, Some(port), Some(patience(limit)));
    timeout(limit, asking).await.map_err(|_| Failure::Silent)?.map_err(of_nat_pmp)
}

fn nonzero(port: u16) -> Result<NonZeroU16, Failure> {
    NonZeroU16::new(port).ok_or_else(|| Failure::Nonsense("no local port".into()))
}

/// The port that we have anyway is the best one outside too: it is the same after a restart.
fn options(job: Job, port: NonZeroU16, limit: Duration) -> PortMappingOptions {
    PortMappingOptions {
        external_port: Some(port),
        lifetime_seconds: Some(job.lease_s()),
        timeout_config: Some(patience(limit)),
    }
}

/// Two questions within `limit`, the second wait is twice the first.
fn patience(limit: Duration) -> TimeoutConfig {
    TimeoutConfig { initial_timeout: limit / 3, max_retries: 1, max_retry_timeout: None }
}

fn of_pcp(failure: PcpFailure) -> Failure {
    match failure {
        // A closed port, or a router that speaks only the older protocol.
        PcpFailure::Socket(_) | PcpFailure::Timeout | PcpFailure::UnsupportedVersion(_) => {
            Failure::Silent
        }
        PcpFailure::InvalidResponse(reason) => Failure::Nonsense(tame(&reason)),
        PcpFailure::Nonce => Failure::Nonsense("an answer to another question".into()),
        refusal => Failure::Refused(tame(&refusal)),
    }
}

fn of_nat_pmp(failure: natpmp::Failure) -> Failure {
    use natpmp::Failure as Pmp;
    match failure {
        Pmp::Socket(_) | Pmp::Timeout | Pmp::UnsupportedVersion(_) => Failure::Silent,
        Pmp::InvalidResponse(reason) => Failure::Nonsense(tame(&reason)),
        refusal => Failure::Refused(tame(&refusal)),
    }
}
