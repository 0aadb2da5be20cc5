//! A small internet in network namespaces.
//!
//! One bridge is the internet, 203.0.113.0/24. A machine stands on it with a public address, or
//! at home behind a router; every home uses the same private range, 192.168.1.0/24.

use std::fs::{self, File};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use crate::nat::{IPV6_FIREWALL, Nat, UDP_BLOCKED};
use crate::process::{self, Output};
use crate::sandbox;

/// The internet and all that hangs on it; gone on drop.
pub(crate) struct Net {
    id: String,
    dir: PathBuf,
    internet: Namespace,
    parts: Mutex<Parts>,
}

#[derive(Default)]
struct Parts {
    namespaces: Vec<Namespace>,
    drawing: Vec<String>,
    logs: Vec<PathBuf>,
    hosts: u8,
}

/// A machine of the lab.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) ns: Namespace,
    /// Its own address: public, or private when it has a router.
    pub(crate) address: Ipv4Addr,
    pub(crate) router: Option<Router>,
}

/// The box between a home and the internet.
#[derive(Clone, Debug)]
pub(crate) struct Router {
    pub(crate) ns: Namespace,
    pub(crate) wan: Ipv4Addr,
}

/// A network namespace by name.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    name: String,
}

impl Net {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("n{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(sandbox::WORK_DIR).join(&id);
        fs::create_dir(&dir).unwrap();
        let internet = Namespace { name: format!("{id}-internet") };
        let net = Self { id, dir, internet: internet.clone(), parts: Mutex::default() };
        net.make_namespace("internet");
        internet.ip("link add br0 type bridge");
        internet.ip("addr add 203.0.113.1/24 dev br0");
        internet.ip("link set br0 up");
        net.draw("internet 203.0.113.0/24".to_owned());
        net
    }

    /// Makes every link of the internet as wide as this.
    pub(crate) fn set_internet_mtu(&self, mtu: u16) {
        for name in self.internet.interfaces() {
            if let Some(name) = name.split('@').next().filter(|name| *name != "lo") {
                self.internet.ip(&format!("link set dev {name} mtu {mtu}"));
            }
        }
    }

    /// A folder for files of the test.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A machine with its own home and router of this kind, or on the internet itself.
    pub(crate) fn machine(&self, name: &str, nat: Nat) -> Host {
        let number = self.next_number();
        let wan = Ipv4Addr::new(203, 0, 113, 20 + number);
        if nat == Nat::None {
            let ns = self.make_namespace(name);
            self.plug(&ns, "eth0", wan, number);
            self.draw(format!(" +- {name} {wan}"));
            return Host { name: name.to_owned(), ns, address: wan, router: None };
        }
        let ns = self.make_namespace(&format!("{name}-router"));
        self.plug(&ns, "wan", wan, number);
        self.draw(format!(" +- [{nat}] {wan}, home 192.168.1.0/24"));
        self.home(name, ns, wan, nat, number)
    }

    /// Makes the namespace `ns`, whose interface `wan` is up, the router of a new home.
    pub(crate) fn home(
        &self,
        name: &str,
        ns: Namespace,
        wan: Ipv4Addr,
        nat: Nat,
        number: u8,
    ) -> Host {
        ns.ip("link add lan type bridge");
        ns.ip("addr add 192.168.1.1/24 dev lan");
        ns.ip("link set lan up");
        ns.sysctl("net/ipv4/ip_forward", "1");
        ns.nft(&nat.rules(wan));
        self.at_home(name, &Router { ns, wan }, Ipv4Addr::new(192, 168, 1, 9 + number))
    }

    /// One more machine in a home that exists; `address` is from 192.168.1.0/24.
    pub(crate) fn at_home(&self, name: &str, router: &Router, address: Ipv4Addr) -> Host {
        let ns = self.make_namespace(name);
        let port = format!("l{}", address.octets()[3]);
        ip(&format!("link add {port} netns {} type veth peer name eth0 netns {ns}", router.ns));
        router.ns.ip(&format!("link set {port} master lan up"));
        ns.ip(&format!("addr add {address}/24 dev eth0"));
        ns.ip("link set eth0 up");
        ns.ip("route add default via 192.168.1.1");
        self.draw(format!(" |    +- {name} {address}"));
        Host { name: name.to_owned(), ns, address, router: Some(router.clone()) }
    }

    /// Moves the router of `host` to an address that is not reserved for documentation: programs
    /// for routers may not take those for the internet's.
    pub(crate) fn move_router(&self, host: &mut Host) {
        let router = host.router.as_mut().expect("the host is behind a router");
        let wan = Ipv4Addr::new(11, 0, 0, router.wan.octets()[3]);
        self.internet.sysctl("net/ipv4/ip_forward", "1");
        self.internet.ip("addr replace 11.0.0.1/24 dev br0");
        router.ns.ip("addr flush dev wan");
        router.ns.ip(&format!("addr add {wan}/24 dev wan"));
        router.ns.ip("route add default via 11.0.0.1");
        router.wan = wan;
        self.draw(format!(" |    (the router of {} moved to {wan})", host.name));
    }

    /// Gives `host` and its router IPv6 with a firewall as homes have it: no NAT, answers only.
    pub(crate) fn add_ipv6(&self, host: &Host) -> Ipv6Addr {
        self.internet.sysctl("net/ipv6/conf/all/forwarding", "1");
        self.internet.ip("addr replace 2001:db8::1/64 dev br0 nodad");
        let last = u16::from(host.address.octets()[3]);
        let Some(router) = &host.router else {
            let address = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last);
            host.ns.ip(&format!("addr add {address}/64 dev eth0 nodad"));
            host.ns.ip("route add default via 2001:db8::1");
            return address;
        };
        self.add_ipv6_by(host, router, "eth0", 0)
    }

    /// The same for the interface of `host` that leads to this router, with a metric of its own unless
    /// that is 0.
    pub(crate) fn add_ipv6_by(
        &self,
        host: &Host,
        router: &Router,
        interface: &str,
        metric: u32,
    ) -> Ipv6Addr {
        self.internet.sysctl("net/ipv6/conf/all/forwarding", "1");
        self.internet.ip("addr replace 2001:db8::1/64 dev br0 nodad");
        let last = u16::from(host.address.octets()[3]);
        let home = u16::from(router.wan.octets()[3]);
        let wan = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, home);
        let lan = Ipv6Addr::new(0x2001, 0xdb8, home, 0, 0, 0, 0, 1);
        let address = Ipv6Addr::new(0x2001, 0xdb8, home, 0, 0, 0, 0, last);
        router.ns.sysctl("net/ipv6/conf/all/forwarding", "1");
        router.ns.ip(&format!("addr add {wan}/64 dev wan nodad"));
        router.ns.ip(&format!("addr add {lan}/64 dev lan nodad"));
        router.ns.ip("route add default via 2001:db8::1");
        router.ns.nft(IPV6_FIREWALL);
        self.internet.ip(&format!("route add 2001:db8:{home:x}::/64 via {wan}"));
        host.ns.ip(&format!("addr add {address}/64 dev {interface} nodad"));
        let metric = if metric == 0 { String::new() } else { format!(" metric {metric}") };
        host.ns.ip(&format!("route add default via {lan} dev {interface}{metric}"));
        self.draw(format!(" |    ({} also has {address})", host.name));
        address
    }

    /// Names a file whose tail is printed when the test fails.
    pub(crate) fn log_file(&self, name: &str) -> PathBuf {
        let path = self.dir.join(format!("{name}.log"));
        let mut parts = self.parts.lock().unwrap();
        if !parts.logs.contains(&path) {
            parts.logs.push(path.clone());
        }
        path
    }

    pub(crate) fn next_number(&self) -> u8 {
        let mut parts = self.parts.lock().unwrap();
        parts.hosts += 1;
        parts.hosts
    }

    pub(crate) fn draw(&self, line: String) {
        self.parts.lock().unwrap().drawing.push(line);
    }

    pub(crate) fn make_namespace(&self, name: &str) -> Namespace {
        let ns = Namespace { name: format!("{}-{name}", self.id) };
        ip(&format!("netns add {ns}"));
        self.parts.lock().unwrap().namespaces.push(ns.clone());
        // A new IPv6 address is otherwise tried out for a second or two before neighbours are told.
        ns.sysctl("net/ipv6/conf/all/accept_dad", "0");
        ns.sysctl("net/ipv6/conf/default/accept_dad", "0");
        ns.ip("link set lo up");
        ns
    }

    /// Joins `ns` to the internet by an interface of this name.
    pub(crate) fn plug(&self, ns: &Namespace, interface: &str, address: Ipv4Addr, number: u8) {
        self.plug_without_route(ns, interface, address, number);
        ns.ip("route add default via 203.0.113.1");
    }

    pub(crate) fn plug_without_route(
        &self,
        ns: &Namespace,
        interface: &str,
        address: Ipv4Addr,
        number: u8,
    ) {
        let internet = &self.internet;
        ip(&format!(
            "link add p{number} netns {internet} type veth peer name {interface} netns {ns}"
        ));
        internet.ip(&format!("link set p{number} master br0 up"));
        ns.ip(&format!("addr add {address}/24 dev {interface}"));
        ns.ip(&format!("link set {interface} up"));
    }

    fn report(&self) -> String {
        let parts = self.parts.lock().unwrap();
        let mut report = format!("the lab of the failed test:\n{}\n", parts.drawing.join("\n"));
        for log in &parts.logs {
            let text = fs::read_to_string(log).unwrap_or_default();
            let skip = text.lines().count().saturating_sub(LOG_TAIL_LINES);
            report.push_str(&format!("--- {}\n", log.display()));
            text.lines().skip(skip).for_each(|line| report.push_str(&format!("    {line}\n")));
        }
        report
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.report());
        }
        if let Ok(parts) = self.parts.lock() {
            for ns in &parts.namespaces {
                let _ = Command::new("ip").args(["netns", "del", &ns.name]).output();
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Router {
    /// Lets no UDP through from now on.
    pub(crate) fn block_udp(&self) {
        self.ns.nft(UDP_BLOCKED);
    }

    /// Forgets every flow, as a router does that was switched off and on.
    pub(crate) fn forget_flows(&self) {
        self.ns.run("conntrack", &["-F"]).success("conntrack -F");
    }

    /// The same, and every flow gets another port than it had: one of this thousand.
    pub(crate) fn reboot_with_ports(&self, first: u16) {
        self.ns.nft(&Nat::rules_with_ports(first));
        self.forget_flows();
    }
}

impl Namespace {
    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// A command that runs `program` in here, with the process id that the command gets.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    pub(crate) fn run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = self.command(program);
        command.args(args);
        process::run(command, TOOL_LIMIT)
    }

    /// Runs `ip` with these words and returns what it printed.
    pub(crate) fn ip(&self, words: &str) -> String {
        ip(&format!("-n {self} {words}"))
    }

    /// The names of its interfaces; what else `ip link` shows may change while a link comes up.
    pub(crate) fn interfaces(&self) -> Vec<String> {
        let links = self.ip("-o link");
        let name = |line: &str| line.split(": ").nth(1).map(str::to_owned);
        links.lines().filter_map(name).collect()
    }

    pub(crate) fn nft(&self, rules: &str) {
        let mut command = self.command("nft");
        command.args(["-f", "-"]);
        process::run_with_input(command, rules, TOOL_LIMIT).success("nft");
    }

    pub(crate) fn sysctl(&self, key: &str, value: &str) {
        self.enter(|| fs::write(Path::new("/proc/sys").join(key), value).unwrap());
    }

    /// Runs `work` on a thread inside the namespace; sockets made there stay there.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(File::open(self.path()).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl std::fmt::Display for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

pub(crate) fn ip(words: &str) -> String {
    let mut command = Command::new("ip");
    command.args(words.split(' '));
    process::run(command, TOOL_LIMIT).success(&format!("ip {words}"))
}

/// Tools answer in milliseconds; a loaded machine may take longer.
const TOOL_LIMIT: Duration = Duration::from_secs(20);

/// Enough to see how a program came to its end.
const LOG_TAIL_LINES: usize = 40;
