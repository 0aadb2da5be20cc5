//! A real `miniupnpd` in a router's namespace.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::clock::wait_for;
use crate::lab::{Host, Namespace, Net};
use crate::process::Daemon;

/// What the router speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaks {
    Upnp,
    NatPmp,
    Pcp,
    All,
}

impl Speaks {
    /// The word of the program under test for the only protocol.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Upnp => "upnp",
            Self::NatPmp => "nat-pmp",
            Self::Pcp | Self::All => "pcp",
        }
    }

    /// One switch turns NAT-PMP and PCP on; the first byte of a request is what tells them apart.
    fn filter(self) -> &'static str {
        match self {
            Self::Upnp | Self::All => "",
            Self::NatPmp => "udp dport 5351 @th,64,8 2 drop",
            Self::Pcp => "udp dport 5351 @th,64,8 0 drop",
        }
    }

    fn switches(self) -> (&'static str, &'static str) {
        match self {
            Self::Upnp => ("yes", "no"),
            Self::NatPmp | Self::Pcp => ("no", "yes"),
            Self::All => ("yes", "yes"),
        }
    }
}

/// The daemon; killed on drop.
pub(crate) struct Upnpd {
    router: Namespace,
    config: PathBuf,
    log: PathBuf,
    daemon: Option<Daemon>,
}

impl Upnpd {
    /// Starts it on the router of `host`.
    pub(crate) fn start(net: &Net, host: &Host, speaks: Speaks) -> Self {
        let router = host.router.as_ref().expect("the host is behind a router").ns.clone();
        router.nft(&format!("{CHAINS}{}", FILTER.replace("RULE", speaks.filter())));
        let (upnp, pcp) = speaks.switches();
        let config = net.dir().join(format!("{}-miniupnpd.conf", host.name));
        let text = CONFIG.replace("UPNP", upnp).replace("PCP", pcp);
        fs::write(&config, text).unwrap();
        let log = net.log_file(&format!("{}-miniupnpd", host.name));
        let mut upnpd = Self { router, config, log, daemon: None };
        upnpd.run();
        upnpd
    }

    /// Starts the process again.
    pub(crate) fn run(&mut self) {
        let mut command = self.router.command("miniupnpd");
        let config = self.config.display().to_string();
        let pid = self.config.with_extension("pid").display().to_string();
        command.args(["-d", "-f", &config, "-P", &pid]);
        let mut daemon = Daemon::start(command, &self.log);
        wait_for("miniupnpd listens", Duration::from_secs(5), || {
            if let Some(status) = daemon.exit() {
                panic!("miniupnpd ended with {status}\n{}", daemon.log());
            }
            let sockets = self.router.run("ss", &["-Hulnt"]).success("ss");
            [":1900", ":5351"].iter().any(|port| sockets.contains(port)).then_some(())
        });
        self.daemon = Some(daemon);
    }

    /// Leaves what goes out to the router's own NAT: only what comes in is mapped from now on.
    pub(crate) fn forward_only(&self) {
        let chain = ["delete", "chain", "inet", "upnp", "post"];
        self.router.run("nft", &chain).success("nft delete chain");
    }

    /// Ends it, and takes every mapping out of the router.
    pub(crate) fn stop(&mut self) {
        let mut daemon = self.daemon.take().expect("miniupnpd runs");
        daemon.signal(Signal::SIGKILL);
        daemon.wait_exit(Duration::from_secs(5));
        self.flush();
    }

    /// Takes every mapping out of the router.
    pub(crate) fn flush(&self) {
        for chain in ["forwarded", "mapped", "sources"] {
            self.router.run("nft", &["flush", "chain", "inet", "upnp", chain]).success("nft");
        }
        // What flows already would flow on.
        self.router.run("conntrack", &["-F"]).success("conntrack -F");
    }

    /// The rules that forward a UDP port of the router.
    pub(crate) fn mappings(&self) -> Vec<String> {
        let rules = self.router.run("nft", &["list", "chain", "inet", "upnp", "mapped"]);
        let rules = rules.success("nft list");
        rules.lines().filter(|line| line.contains("dnat")).map(|it| it.trim().into()).collect()
    }
}

/// As on a router whose firewall makes room for it: what it maps goes before the router's own NAT.
const CHAINS: &str = r#"
table inet upnp {
 chain forwarded {
 }
 chain mapped {
 }
 chain sources {
 }
 chain pre { type nat hook prerouting priority -105; policy accept;
  jump mapped
 }
 chain post { type nat hook postrouting priority 95; policy accept;
  jump sources
 }
}
"#;

const FILTER: &str = r#"
table inet upnpfilter {
 chain input { type filter hook input priority -10; policy accept;
  RULE
 }
}
"#;

const CONFIG: &str = "\
ext_ifname=wan
listening_ip=lan
port=0
enable_upnp=UPNP
enable_natpmp=PCP
secure_mode=yes
min_lifetime=10
max_lifetime=86400
uuid=6a1c7d0e-0000-4000-8000-000000000001
upnp_table_name=upnp
upnp_nat_table_name=upnp
upnp_forward_chain=forwarded
upnp_nat_chain=mapped
upnp_nat_postrouting_chain=sources
allow 1024-65535 192.168.1.0/24 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
";
