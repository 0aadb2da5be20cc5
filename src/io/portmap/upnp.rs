//! UPnP-IGD.
//!
//! The crate searches by multicast and believes whoever answers. So it is given a socket of ours on
//! the loopback interface to search by, which passes on what the gateway itself answers, and it is
//! told to follow no link to any other address. It reads a megabyte of XML at the most; that and a
//! panic happen on a thread of its own, which nobody waits for longer than the limit.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use igd_next::aio::Gateway as Igd;
use igd_next::aio::tokio::{Tokio, search_gateway};
use igd_next::{
    AddPortError, GatewayIpVersion, PortMappingProtocol, RemovePortError, RequestError,
    SearchError, SearchOptions,
};
use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::lease::{Job, Mapping, Protocol};
use super::{Failure, Gateway, tame};

/// Where UPnP devices listen.
const SSDP: (Ipv4Addr, u16) = (Ipv4Addr::new(239, 255, 255, 250), 1900);
/// Answers of the gateway that are looked at; a sane one sends one or two for each question.
const MAX_ANSWERS: usize = 16;
/// An answer or question is shorter, as the crate's own buffer is.
const DATAGRAM_BYTES: usize = 1500;
/// What the router's user sees in its list.
const DESCRIPTION: &str = "overlay";
/// Ports that are tried while others have them.
const PORT_ATTEMPTS: u16 = 4;

/// A router that was found, and its external address.
pub(super) struct Router {
    igd: Igd<Tokio>,
    external: Ipv4Addr,
}

/// A UPnP service, and the gateway that has it.
type Found = (Gateway, Igd<Tokio>);

/// The one that was found last. A search takes several exchanges; who
/// ends has time for one.
#[derive(Debug, Clone, Default)]
pub(super) struct Known(Arc<Mutex<Option<Found>>>);

impl Known {
    fn at(&self, gateway: Gateway) -> Option<Igd<Tokio>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().filter(|(at, _)| *at == gateway).map(|(_, igd)| igd.clone())
    }

    fn note(&self, gateway: Gateway, igd: &Igd<Tokio>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((gateway, igd.clone()));
    }
}

/// Finds the gateway's UPnP service and asks for the external address.
pub(super) async fn find(
    known: Known,
    gateway: Gateway,
    limit: Duration,
) -> Result<Router, Failure> {
    on_thread(limit, move || async move {
        let igd = search(gateway, limit).await?;
        known.note(gateway, &igd);
        let external = igd.get_external_ip().await.map_err(|error| refusal(&error))?;
        match external {
            IpAddr::V4(external) => Ok(Router { igd, external }),
            IpAddr::V6(_) => Err(Failure::Nonsense("no IPv4 address".into())),
        }
    })
    .await
}

/// Maps; `wanted` is the external port of a mapping that is renewed.
pub(super) async fn map(
    router: Router,
    job: Job,
    wanted: Option<u16>,
    limit: Duration,
) -> Result<Mapping, Failure> {
    on_thread(limit, move || async move {
        let Router { igd, external } = router;
        let local = SocketAddr::from((job.gateway.local, job.port));
        let mut ports = wanted.into_iter().chain((0..PORT_ATTEMPTS).map(|n| port(job.port, n)));
        let mut lease_s = job.lease_s();
        let mut next = ports.next();
        // Each turn tries another port, or the same one in another way.
        for _ in 0..=PORT_ATTEMPTS + 2 {
            let Some(port) = next else { break };
            let udp = PortMappingProtocol::UDP;
            match igd.add_port(udp, port, local, lease_s, DESCRIPTION).await {
                Ok(()) => {
                    let lease = (lease_s != 0).then(|| Duration::from_secs(lease_s.into()));
                    return Mapping::checked(Protocol::Upnp, external, port, lease);
                }
                Err(error) if lease_s != 0 && wants_permanent(&error) => lease_s = 0,
                Err(AddPortError::SamePortValuesRequired) if port != job.port => {
                    next = Some(job.port);
                }
                Err(AddPortError::PortInUse) => next = ports.next(),
                Err(error) => return Err(refusal(&error)),
            }
        }
        Err(Failure::Refused("every port that was asked for is taken".into()))
    })
    .await
}

/// Removes the mapping of this external port, at the service that is known or else at the one that is
/// found.
pub(super) async fn remove(
    known: Known,
    gateway: Gateway,
    external_port: u16,
    limit: Duration,
) -> Result<(), Failure> {
    on_thread(limit, move || async move {
        if let Some(igd) = known.at(gateway)
            && unmap(&igd, external_port).await.is_ok()
        {
            return Ok(());
        }
        unmap(&search(gateway, limit).await?, external_port).await
    })
    .await
}

async fn unmap(igd: &Igd<Tokio>, external_port: u16) -> Result<(), Failure> {
    match igd.remove_port(PortMappingProtocol::UDP, external_port).await {
        Ok(()) | Err(RemovePortError::NoSuchPortMapping) => Ok(()),
        Err(error) => Err(refusal(&error)),
    }
}

/// The same port as inside, and then others, always the same ones: what an earlier run of this
/// node left behind is taken over.
fn port(local: u16, attempt: u16) -> u16 {
    const FIRST: u32 = 1024;
    const STEP: u32 = 7919;
    if attempt == 0 {
        return local;
    }
    let offset = u32::from(local) + STEP * u32::from(attempt);
    u16::try_from(FIRST + offset % (65_536 - FIRST)).unwrap_or(local)
}

/// Routers that know only mappings without end say so in one of two ways.
fn wants_permanent(error: &AddPortError) -> bool {
    matches!(
        error,
        AddPortError::OnlyPermanentLeasesSupported
            | AddPortError::RequestError(RequestError::ErrorCode(402, _))
    )
}

fn refusal(error: &(impl std::error::Error + 'static)) -> Failure {
    Failure::Refused(tame(&error))
}

/// Searches at the gateway alone.
async fn search(gateway: Gateway, limit: Duration) -> Result<Igd<Tokio>, Failure> {
    let nothing = |_| Failure::Silent;
    let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(nothing)?;
    let front_addr = front.local_addr().map_err(nothing)?;
    let mut options = SearchOptions::default();
    options.bind_addr = (Ipv4Addr::LOCALHOST, 0).into();
    options.broadcast_address = front_addr;
    options.timeout = Some(limit);
    options.single_search_timeout = Some(limit);
    options.gateway_ip_version = GatewayIpVersion::V4;
    options.allowed_gateway_ips = vec![IpAddr::V4(gateway.router)];
    let found = tokio::select! {
        found = search_gateway(options) => found,
        _ = pass_on(&front, front_addr, gateway) => return Err(Failure::Silent),
    };
    found.map_err(|error| match error {
        SearchError::NoResponseWithinTimeout | SearchError::IoError(_) => Failure::Silent,
        error => Failure::Nonsense(tame(&error)),
    })
}

/// Passes the crate's questions on to the network, and the gateway's answers back.
async fn pass_on(
    front: &UdpSocket,
    front_addr: SocketAddr,
    gateway: Gateway,
) -> std::io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((gateway.local, 0)).into())?;
    socket.set_multicast_if_v4(&gateway.local)?;
    let ssdp = UdpSocket::from_std(socket.into())?;
    let mut asker = None;
    let mut answers = 0;
    let (mut question, mut answer) = ([0; DATAGRAM_BYTES], [0; DATAGRAM_BYTES]);
    loop {
        tokio::select! {
            received = front.recv_from(&mut question) => {
                let (len, from) = received?;
                asker = Some(from);
                let text = String::from_utf8_lossy(question.get(..len).unwrap_or_default());
                // The names of the front and of a long wait are not for the network.
                let (ip, port) = SSDP;
                let text = text.replace(&front_addr.to_string(), &format!("{ip}:{port}"));
                let text = text.replace("MX:3", "MX:1");
                // Some routers hear only the one, some only the other.
                for to in [SSDP, (gateway.router, port)] {
                    if let Err(error) = ssdp.send_to(text.as_bytes(), to).await {
                        tracing::debug!(%error, "UPnP search not sent");
                    }
                }
            }
            received = ssdp.recv_from(&mut answer) => {
                // An error is the news that an earlier question found a closed port.
                let Ok((len, from)) = received else { continue };
                if let (Some(asker), true) = (asker, from.ip() == IpAddr::V4(gateway.router))
                    && answers < MAX_ANSWERS
                {
                    answers += 1;
                    front.send_to(answer.get(..len).unwrap_or_default(), asker).await?;
                }
            }
        }
    }
}

/// Runs `work` on a thread of its own, and gives up on both after `limit`.
pub(super) async fn on_thread<T, F>(
    limit: Duration,
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<T, Failure>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Failure>>,
{
    let (sender, receiver) = oneshot::channel();
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        let result = runtime.block_on(async { timeout(limit, work()).await });
        // Nobody waits any more when the limit is over.
        let _ = sender.send(result.unwrap_or(Err(Failure::Silent)));
    };
    std::thread::Builder::new().name("upnp".into()).spawn(run).map_err(|_| Failure::Silent)?;
    match timeout(limit, receiver).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Failure::Nonsense("the answer could not be read".into())),
        Err(_) => Err(Failure::Silent),
    }
}
