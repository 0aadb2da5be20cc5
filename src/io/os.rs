//! What the kernel knows of networks: links, addresses, routes, and news of their changes.
//!
//! Speaks netlink for IPv4 and IPv6, in the network namespace of the thread that connected. Which
//! address or route belongs where is the caller's business; `conflicts` and `underlay` say what the
//! present ones mean.

mod changes;
mod conflicts;
mod messages;
mod underlay;

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use ipnet::{IpNet, Ipv4Net};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::{LinkUnspec, RouteMessageBuilder};
use tokio::task::JoinHandle;

pub use changes::{ChangeSet, Changes};
pub use conflicts::{Conflict, LocalNet, Overlap, conflicts};
pub use underlay::Underlay;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The interface index.
    pub index: u32,
    /// The interface name.
    pub name: String,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether it is a loopback interface.
    pub loopback: bool,
    /// The largest packet it sends.
    pub mtu_bytes: u32,
    /// What it is.
    pub kind: LinkKind,
    /// Whether its cable, or what stands for one, is plugged in.
    pub carrier: bool,
    /// The bridge or bond that it is a port of.
    pub controller: Option<u32>,
}

/// What an interface is, as far as it matters for who is behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// A network card, or what behaves like one.
    Device,
    /// A bridge.
    Bridge,
    /// One end of a cable between two namespaces.
    Veth,
    /// Ethernet to a program: a virtual machine's, a container's, or a tunnel's.
    Tap,
    /// A line to a provider, or a tunnel that looks like one.
    PointToPoint,
    /// Packets inside packets.
    Tunnel,
}

/// An address on an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The interface index.
    pub index: u32,
    /// The interface name.
    pub name: String,
    /// Whether the interface is switched on.
    pub up: bool,
    /// Whether the interface is a loopback interface.
    pub loopback: bool,
    /// The address and its prefix length.
    pub addr: IpNet,
    /// The address should not be used for anything new.
    pub deprecated: bool,
    /// Duplicate detection has not finished, or has failed: the address does not work yet.
    pub tentative: bool,
    /// A privacy address that will be replaced within hours (RFC 8981).
    pub temporary: bool,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where it leads; a default route has prefix length 0.
    pub dst: IpNet,
    /// The interface it leaves by.
    pub index: u32,
    /// The router to hand packets to; none on a directly connected net.
    pub gateway: Option<IpAddr>,
    /// The source address that this route suggests.
    pub pref_src: Option<IpAddr>,
    /// The kernel's order among routes to the same place, lowest first.
    pub metric: Option<u32>,
    /// The longest packet that goes this way, in bytes, where that is not the interface's.
    pub mtu_bytes: Option<u32>,
    /// The largest TCP segment that is asked for in return, in bytes: what comes back may be longer
    /// than what goes this way now.
    pub advmss_bytes: Option<u32>,
}

impl Route {
    /// A route straight out of interface `index`, without router, hint or metric.
    pub fn direct(dst: IpNet, index: u32) -> Self {
        Self {
            dst,
            index,
            gateway: None,
            pref_src: None,
            metric: None,
            mtu_bytes: None,
            advmss_bytes: None,
        }
    }

    /// Whether this is a default route.
    pub fn is_default(&self) -> bool {
        self.dst.prefix_len() == 0
    }
}

/// What one message of the kernel says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Of an interface.
    Link(Link),
    /// Of an address, if it has what makes one.
    Address(Option<InterfaceAddress>),
    /// Of a route, with several next hops of several.
    Routes(Vec<Route>),
}

/// Reads one netlink message as [`Netlink`] reads the kernel's lists; none when it is about
/// something else, or nothing that the library can read.
pub fn read_message(bytes: &[u8]) -> Option<Heard> {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes).ok()?;
    let NetlinkPayload::InnerMessage(message) = message.payload else { return None };
    match message {
        RouteNetlinkMessage::NewLink(link) => Some(Heard::Link(messages::link(&link))),
        RouteNetlinkMessage::NewAddress(address) => {
            let link = LinkMessage::default();
            let link = Link { index: address.header.index, ..messages::link(&link) };
            Some(Heard::Address(messages::address(&address, &[link])))
        }
        RouteNetlinkMessage::NewRoute(route) => Some(Heard::Routes(messages::routes(&route))),
        _ => None,
    }
}

/// A netlink connection. The task behind it ends when this is dropped.
#[derive(Debug)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    task: JoinHandle<()>,
}

impl Netlink {
    /// Connects to the kernel. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When no netlink socket can be opened.
    pub fn connect() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Connect)?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// When the kernel refuses, as every request here.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let stream = self.handle.link().get().execute();
        let messages: Vec<LinkMessage> =
            stream.try_collect().await.map_err(refused(|| Request::ListLinks))?;
        Ok(messages.iter().map(messages::link).collect())
    }

    /// The index of interface `name`, if there is one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn link_index(&self, name: &str) -> Result<Option<u32>, NetlinkError> {
        let links = self.links().await?;
        Ok(links.iter().find(|link| link.name == name).map(|link| link.index))
    }

    /// Sets the MTU, if one is given, and switches the interface on or off.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn set_link(
        &self,
        index: u32,
        mtu_bytes: Option<u32>,
        state: LinkState,
    ) -> Result<(), NetlinkError> {
        let mut builder = LinkUnspec::new_with_index(index);
        if let Some(mtu) = mtu_bytes {
            builder = builder.mtu(mtu);
        }
        builder = match state {
            LinkState::Up => builder.up(),
            LinkState::Down => builder.down(),
        };
        let request = self.handle.link().change(builder.build());
        request.execute().await.map_err(refused(|| Request::SetLink { index }))
    }

    /// Removes an interface.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn delete_link(&self, index: u32) -> Result<(), NetlinkError> {
        let request = self.handle.link().del(index);
        request.execute().await.map_err(refused(|| Request::DeleteLink { index }))
    }

    /// Adds an address; one that is already there is no error. An IPv6 address skips duplicate
    /// detection, so that it works at once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn add_address(&self, index: u32, addr: IpNet) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(index, addr.addr(), addr.prefix_len());
        if addr.addr().is_ipv6() {
            messages::skip_duplicate_detection(request.message_mut());
        }
        let result = request.replace().execute().await;
        result.map_err(refused(|| Request::AddAddress { index, addr }))
    }

    /// Takes all addresses from an interface.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn del_addresses(&self, index: u32) -> Result<(), NetlinkError> {
        let stream = self.handle.address().get().execute();
        let messages: Vec<AddressMessage> =
            stream.try_collect().await.map_err(refused(|| Request::ListAddresses))?;
        for message in messages.into_iter().filter(|message| message.header.index == index) {
            let result = self.handle.address().del(message).execute().await;
            result.map_err(refused(|| Request::DeleteAddresses { index }))?;
        }
        Ok(())
    }

    /// All addresses of all interfaces, both families.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn addresses(&self) -> Result<Vec<InterfaceAddress>, NetlinkError> {
        let links = self.links().await?;
        let stream = self.handle.address().get().execute();
        let messages: Vec<_> =
            stream.try_collect().await.map_err(refused(|| Request::ListAddresses))?;
        Ok(messages.iter().filter_map(|message| messages::address(message, &links)).collect())
    }

    /// Adds a route to the main table; one that is already there is replaced.
    ///
    /// # Errors
    /// When the kernel refuses, or when the families of the addresses differ.
    pub async fn add_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let message = messages::route_message(route)?;
        let result = self.handle.route().add(message).replace().execute().await;
        result.map_err(refused(|| Request::AddRoute { route: route.clone() }))
    }

    /// Answers that `dst` is unreachable where no other route leads there, for as long as this machine
    /// has the address `own`: when an IPv4 address goes, the kernel takes the routes that name it. It is
    /// behind all other routes to the same place; one that is already there is replaced.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn guard(&self, dst: Ipv4Net, own: Ipv4Addr) -> Result<(), NetlinkError> {
        let (pref_src, metric) = (Some(IpAddr::V4(own)), Some(u32::MAX));
        let route = Route { pref_src, metric, ..Route::direct(dst.into(), 0) };
        let message = messages::unreachable_message(&route)?;
        let result = self.handle.route().add(message).replace().execute().await;
        result.map_err(refused(|| Request::AddRoute { route }))
    }

    /// Removes a route from the main table.
    ///
    /// # Errors
    /// When the kernel refuses, or has no such route.
    pub async fn del_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let message = messages::route_message(route)?;
        let result = self.handle.route().del(message).execute().await;
        result.map_err(refused(|| Request::DeleteRoute { route: route.clone() }))
    }

    /// The unicast routes of the main table, both families. A route with several next hops is
    /// several routes here.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let mut routes = Vec::new();
        for question in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let stream = self.handle.route().get(question).execute();
            let messages: Vec<_> =
                stream.try_collect().await.map_err(refused(|| Request::ListRoutes))?;
            routes.extend(messages.iter().flat_map(messages::routes));
        }
        Ok(routes)
    }

    /// Listens for changes of links, addresses and routes, from now on. Must be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// When no netlink socket can be opened.
    pub fn changes() -> Result<Changes, NetlinkError> {
        Changes::listen().map_err(NetlinkError::Connect)
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether an interface is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// Switched on.
    Up,
    /// Switched off.
    Down,
}

/// What was asked of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// List the interfaces.
    ListLinks,
    /// List the addresses.
    ListAddresses,
    /// List the routes.
    ListRoutes,
    /// Set MTU and state of interface `index`.
    #[expect(missing_docs, reason = "the fields are what the request names")]
    SetLink { index: u32 },
    /// Remove interface `index`.
    #[expect(missing_docs, reason = "the fields are what the request names")]
    DeleteLink { index: u32 },
    /// Put `addr` on interface `index`.
    #[expect(missing_docs, reason = "the fields are what the request names")]
    AddAddress { index: u32, addr: IpNet },
    /// Take all addresses from interface `index`.
    #[expect(missing_docs, reason = "the fields are what the request names")]
    DeleteAddresses { index: u32 },
    /// Add `route`.
    #[expect(missing_docs, reason = "the fields are what the request names")]
    AddRoute { route: Route },
    /// Remove `route`.
    #[expect(missing_docs, reason = "the fields are what the request names")]
    DeleteRoute { route: Route },
}

impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ListLinks => write!(f, "listing interfaces"),
            Self::ListAddresses => write!(f, "listing addresses"),
            Self::ListRoutes => write!(f, "listing routes"),
            Self::SetLink { index } => write!(f, "setting up interface {index}"),
            Self::DeleteLink { index } => write!(f, "removing interface {index}"),
            Self::AddAddress { index, addr } => write!(f, "adding {addr} to interface {index}"),
            Self::DeleteAddresses { index } => write!(f, "emptying interface {index}"),
            Self::AddRoute { route } => {
                write!(f, "adding a route to {} by interface {}", route.dst, route.index)
            }
            Self::DeleteRoute { route } => {
                write!(f, "removing the route to {} by interface {}", route.dst, route.index)
            }
        }
    }
}

/// Why netlink did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Connect(#[source] io::Error),
    /// The kernel said no.
    #[error("{request} was refused by the kernel")]
    Refused {
        /// What was asked.
        request: Request,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The conversation with the kernel broke.
    #[error("{request} failed")]
    Broken {
        /// What was asked.
        request: Request,
        /// What went wrong.
        source: Box<rtnetlink::Error>,
    },
    /// A route whose destination, router and source are not of one family.
    #[error("route to {} mixes IPv4 and IPv6", route.dst)]
    MixedFamilies {
        /// The route.
        route: Box<Route>,
    },
}

impl NetlinkError {
    /// The kernel's error number, if it gave one.
    pub fn kernel_error(&self) -> Option<nix::errno::Errno> {
        match self {
            Self::Connect(source) | Self::Refused { source, .. } => {
                source.raw_os_error().map(nix::errno::Errno::from_raw)
            }
            Self::Broken { .. } | Self::MixedFamilies { .. } => None,
        }
    }
}

fn refused(request: impl FnOnce() -> Request) -> impl FnOnce(rtnetlink::Error) -> NetlinkError {
    move |error| match error {
        rtnetlink::Error::NetlinkError(answer) => {
            NetlinkError::Refused { request: request(), source: answer.to_io() }
        }
        source => NetlinkError::Broken { request: request(), source: Box::new(source) },
    }
}

#[cfg(test)]
mod tests;
