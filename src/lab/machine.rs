//! One machine of the lab: a network namespace with a TUN called `eth0`, and what runs in it.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context, Result, anyhow};
use ipnet::{IpNet, Ipv4Net};
use nix::sched::{CloneFlags, setns, unshare};

use crate::io::os::{LinkState, Netlink, Route};
use crate::io::tun::{Tun, TunOptions};

/// How a machine is to be connected.
#[derive(Debug, Clone)]
pub(crate) struct MachinePlan {
    pub(crate) name: &'static str,
    pub(crate) address: Ipv4Net,
    /// The home router; none if the machine is on the internet itself.
    pub(crate) gateway: Option<Ipv4Addr>,
}

/// A network namespace, alive as long as this is.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) name: &'static str,
    pub(crate) address: Ipv4Net,
    namespace: File,
}

impl Machine {
    /// Makes the namespace and connects it; the TUN is the other end of its `eth0`.
    pub(crate) fn create(plan: MachinePlan) -> Result<(Self, Tun)> {
        let name = plan.name;
        on_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
            let namespace = File::open("/proc/thread-self/ns/net").context("opening it")?;
            let tun = Tun::open(&TunOptions::named(INTERFACE))?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(connect(&plan, tun.index()))?;
            // Lets programs without privileges ping; not all kernels have the switch.
            let _ = std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0");
            Ok((Self { name: plan.name, address: plan.address, namespace }, tun))
        })
        .with_context(|| format!("making machine {name}"))
    }

    /// The descriptor of the namespace, for whoever wants to join it.
    pub(crate) fn namespace_fd(&self) -> RawFd {
        self.namespace.as_raw_fd()
    }

    /// Runs `work` on a thread inside the machine. A process that it starts is inside, too.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let namespace = self.namespace.try_clone().context("keeping the namespace")?;
        on_thread(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
            work()
        })
        .with_context(|| format!("inside machine {}", self.name))
    }
}

/// Namespaces belong to threads: a thread of its own is how to visit one and never come back.
fn on_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let thread = std::thread::Builder::new().spawn(work).context("starting a thread")?;
    thread.join().map_err(|_| anyhow!("a thread of the lab panicked"))?
}

async fn connect(plan: &MachinePlan, index: u32) -> Result<()> {
    let netlink = Netlink::connect()?;
    if let Some(loopback) = netlink.link_index("lo").await? {
        netlink.set_link(loopback, None, LinkState::Up).await?;
    }
    netlink.set_link(index, Some(MTU_BYTES), LinkState::Up).await?;
    netlink.add_address(index, plan.address.into()).await?;
    let everywhere = IpNet::V4(Ipv4Net::default());
    let gateway = plan.gateway.map(Into::into);
    netlink.add_route(&Route { gateway, ..Route::direct(everywhere, index) }).await?;
    Ok(())
}

const INTERFACE: &str = "eth0";

/// Ethernet's.
const MTU_BYTES: u32 = 1500;
