//! What a service keeps while it is restarted, and that it leaves nothing when it is stopped.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use crate::case::{Case, Needs};
use crate::clock::wait_for;
use crate::container::Container;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, Server, find_peer};
use crate::ping;
use crate::process::Daemon;

pub(crate) fn cases() -> Vec<Case> {
    let systemd = [
        Case::timed("service::tcp_survives_a_restart_and_a_crash_of_the_node", tcp_survives),
        Case::new("service::a_node_with_another_configuration_gets_another_interface", changed),
        Case::new("service::stopped_services_leave_nothing_behind", left_behind),
    ];
    let mut cases: Vec<Case> = systemd.into_iter().map(|case| case.needs(Needs::Systemd)).collect();
    cases.push(Case::new("service::descriptors_of_a_foreign_kind_are_refused", foreign));
    cases
}

/// Bob: answers each byte on one port, and speaks without end on the other.
const PARTNER: &str = "
import socket, threading, time
def serve(port, talk):
    listener = socket.create_server(('0.0.0.0', port))
    while True:
        threading.Thread(target=talk, args=(listener.accept()[0],)).start()
def echo(stream):
    while data := stream.recv(4096): stream.sendall(data)
def speak(stream):
    while True:
        stream.sendall(b'x' * 1000)
        time.sleep(0.01)
threading.Thread(target=serve, args=(7001, echo)).start()
serve(7002, speak)
";

/// Alice: one connection that asks and is answered, one that only listens, and a look at the
/// interface every 5 ms. Each writes down how much there was and the longest silence in ms, or how
/// often the interface was not there as it had been; a file of the name says to begin anew.
const FLOWS: &str = r"
import os, socket, sys, threading, time
def account(name, step):
    count, silence, last = 0, 0.0, time.monotonic()
    while True:
        step()
        now = time.monotonic()
        count, silence, last = count + 1, max(silence, now - last), now
        if os.path.exists('/run/anew-' + name):
            os.unlink('/run/anew-' + name)
            count, silence = 0, 0.0
        with open('/run/.flow-' + name, 'w') as file: file.write(f'{count} {silence * 1000:.0f}')
        os.rename('/run/.flow-' + name, '/run/flow-' + name)
def ask():
    asking.sendall(b'?')
    if not asking.recv(100): os._exit(1)
    time.sleep(0.01)
def listen():
    if not listening.recv(65536): os._exit(1)
def look():
    lost = 0
    want = state()
    while True:
        lost += state() != want
        open('/run/interface', 'w').write(str(lost))
        time.sleep(0.005)
def state():
    try:
        routes = [line.split()[1] for line in open('/proc/net/route') if line.startswith('overlay0')]
        return open('/sys/class/net/overlay0/ifindex').read(), sorted(routes)[:1]
    except OSError: return None
def connect(port):
    while True:
        try: return socket.create_connection((sys.argv[1], port), 5)
        except OSError: time.sleep(0.1)
asking, listening = connect(7001), connect(7002)
asking.settimeout(None)
listening.settimeout(None)
threading.Thread(target=look).start()
threading.Thread(target=account, args=('listen', listen)).start()
account('ask', ask)
";

/// The longest silence of both connections while `disturb` happens and for a while after, in ms.
fn longest_silence(container: &Container, what: &str, disturb: impl FnOnce()) -> u32 {
    let anew = |name: &str| format!("/run/anew-{name}");
    container.ok(&["touch", &anew("ask"), &anew("listen")]);
    wait_for("the count begins anew", Duration::from_secs(5), || {
        (container.run(&["ls", &anew("ask"), &anew("listen")]).stdout.is_empty()).then_some(())
    });
    disturb();
    let told = |name: &str| {
        let told = container.run(&["cat", &format!("/run/flow-{name}")]).stdout;
        let (count, silence) = told.trim().split_once(' ')?;
        Some((count.parse::<u32>().ok()?, silence.parse::<u32>().ok()?))
    };
    let before = ["ask", "listen"].map(|name| told(name).map_or(0, |(count, _)| count));
    let silences = ["ask", "listen"].into_iter().zip(before).map(|(name, before)| {
        let flows = || told(name).filter(|(count, _)| *count > before + 50);
        wait_for(&format!("{name} goes on after {what}"), Duration::from_secs(15), flows).0.1
    });
    let silences: Vec<u32> = silences.collect();
    eprintln!("{what}: longest silences of TCP connections (asks, listens) {silences:?} ms");
    silences.into_iter().max().unwrap_or_default()
}

fn tcp_survives() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("hub", Nat::None));
    let home = net.machine("alice", Nat::PortRestricted);
    let container = Container::boot(&net, &home);
    container.ok(&["overlay", "service", "install", "node", &server.join()]);
    let mut bob = Node::start(&net, &net.machine("bob", Nat::PortRestricted), &server);
    let mut partner: Command = bob.host.ns.command("python3");
    partner.args(["-c", PARTNER]);
    let _partner = Daemon::start(partner, &net.log_file("partner"));
    bob.wait_path("alice", "direct", Duration::from_secs(20));
    let link = || container.ok(&["ip", "-o", "link", "show", "dev", "overlay0"]);
    let index = || link().split(':').next().map(str::to_owned);
    let before = index();
    let address = bob.ipv4();
    container.ok(&["systemd-run", "-q", "--unit=flows", "python3", "-c", FLOWS, &address]);
    wait_for("the connections are there", Duration::from_secs(15), || {
        let there = container.run(&["ls", "/run/flow-ask", "/run/flow-listen"]);
        (there.code == Some(0)).then_some(())
    });

    for round in 1..=2 {
        let silence = longest_silence(&container, &format!("restart {round}"), || {
            container.ok(&["systemctl", "restart", UNIT]);
        });
        assert!(silence <= RESTART_LIMIT_MS, "silent for {silence} ms");
    }
    let silence = longest_silence(&container, "a crash", || {
        let process =
            || container.ok(&["systemctl", "show", "-P", "MainPID", UNIT]).trim().to_owned();
        let before = process();
        container.ok(&["systemctl", "kill", "--kill-who=main", "--signal=KILL", UNIT]);
        wait_for("systemd starts the node again", Duration::from_secs(20), || {
            let active = container.run(&["systemctl", "is-active", UNIT]).stdout;
            (active.trim() == "active" && ![before.as_str(), "0"].contains(&process().as_str()))
                .then_some(())
        });
    });
    assert!(silence <= CRASH_LIMIT_MS, "silent for {silence} ms");
    assert_eq!(index(), before, "it is the same interface");
    let lost = container.ok(&["cat", "/run/interface"]);
    assert_eq!(lost, "0", "the interface was there all the time, with its routes");
    let status = bob.status().expect("bob answers");
    assert_eq!(find_peer(&status, "alice")["online"], true);

    container.ok(&["systemctl", "stop", UNIT]);
    assert!(!container.ok(&["ip", "-o", "link"]).contains("overlay0"), "stopped is stopped");
}

fn changed() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("hub", Nat::None));
    let container = Container::boot(&net, &net.machine("alice", Nat::None));
    container.ok(&["overlay", "service", "install", "node", &server.join()]);
    let bob = Node::start(&net, &net.machine("bob", Nat::None), &server);
    let alice = container.ok(&["overlay", "ip"]).lines().next().unwrap().trim().to_owned();
    let links = || container.ok(&["ip", "-o", "link"]);
    for (config, there, gone) in [
        ("interface = \"lan7\"", "lan7", "overlay0"),
        ("interface = \"lan7\"\ntun-offload = false", "lan7", "overlay0"),
        ("mtu = 1300", "overlay0: <POINTOPOINT,MULTICAST,NOARP,UP,LOWER_UP> mtu 1300", "lan7"),
    ] {
        let write = format!("echo '{config}' > /etc/overlay/node.toml");
        container.ok(&["sh", "-c", &write]);
        container.ok(&["systemctl", "restart", UNIT]);
        let links = links();
        assert!(links.contains(there) && !links.contains(gone), "{config}:\n{links}");
        ping::first_answer(&bob.host, &alice, crate::clock::now(), Duration::from_secs(10));
    }
    // What the node is told to stop by does not matter.
    container.ok(&["overlay", "down"]);
    assert!(!links().contains("overlay0"), "down is down");
    container.ok(&["systemctl", "start", UNIT]);
    assert!(links().contains("overlay0"));
    server.cli(&["remove", "alice"]).success("remove");
    wait_for("the removed node's interface goes", Duration::from_secs(10), || {
        (!links().contains("overlay0")).then_some(())
    });
}

/// All that a service could leave in a machine's network; numbers that count up are left out.
const TRACES: &str = r"
ip -o link | sed 's/ qlen .*//'
ip -o addr | sed 's/valid_lft.*//'
for family in -4 -6; do ip $family route show table all; ip $family rule; done
nft -s list ruleset
ls -l /etc/resolv.conf /run/systemd/resolve /etc/NetworkManager /run/resolvconf 2>/dev/null
cat /etc/resolv.conf /etc/hosts /etc/nsswitch.conf 2>/dev/null
sysctl -a 2>/dev/null | grep -E '^net\.ipv[46]\.(conf|ip_forward|tcp|udp)'
ss -Hltun
";

fn left_behind() {
    let net = Net::new();
    let container = super::service::both(&net);
    let traces = || container.ok(&["sh", "-c", TRACES]);
    let stop = || container.ok(&["systemctl", "stop", UNIT, SERVER_UNIT]);
    let start = || container.ok(&["systemctl", "start", SERVER_UNIT, UNIT]);
    let kill = |unit| {
        container.ok(&["systemctl", "kill", "--kill-who=main", "--signal=KILL", unit]);
    };
    // Some of it has to be there while they run, or nothing was looked at.
    let running = traces();
    for trace in ["overlay0", ":41820", ":443"] {
        assert!(running.contains(trace), "{trace} is not seen:\n{running}");
    }
    container.ok(&["overlay", "service", "uninstall", "node"]);
    container.ok(&["overlay", "service", "uninstall", "server"]);
    let before = traces();
    assert!(!before.contains("overlay0") && !before.contains(":41820"), "{before}");

    container.ok(&["overlay", "service", "install", "server"]);
    container.ok(&["overlay", "service", "install", "node"]);
    stop();
    assert_same(&before, &traces(), "after a stop");
    // Killed, and stopped before or after systemd has started another one.
    for pause in [Duration::ZERO, Duration::from_millis(1_500)] {
        start();
        kill(UNIT);
        kill(SERVER_UNIT);
        std::thread::sleep(pause);
        stop();
        assert_same(&before, &traces(), &format!("killed, and stopped after {pause:?}"));
    }
}

fn assert_same(before: &str, after: &str, when: &str) {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (before, after) = (lines(before), lines(after));
    let different: Vec<&String> = before.symmetric_difference(&after).collect();
    assert!(different.is_empty(), "{when}, these lines are new or gone: {different:#?}");
}

/// As if another program, or another version, had left them.
fn foreign() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("hub", Nat::None));
    let mut alice = Node::new(&net, &net.machine("alice", Nat::None));
    let words = alice.up_args(&server.join());
    let mut command = alice.host.ns.command("sh");
    let script = "LISTEN_PID=$$ LISTEN_FDS=3 LISTEN_FDNAMES=null:tun:tun exec \"$@\" \
                  3</dev/null 4</etc/passwd 5<>/dev/net/tun";
    command.args(["-c", script, "sh", &crate::overlay::binary()]).args(words);
    alice.up_by(command);
    alice.wait_connected();
    let log = alice.log();
    let refusals = log.matches("hands over what is not used here").count();
    assert_eq!(refusals, 3, "{log}");
}

const UNIT: &str = "overlay.service";
const SERVER_UNIT: &str = "overlay-server.service";
/// The bar for a restart.
const RESTART_LIMIT_MS: u32 = 1_500;
/// systemd waits for half a second before it starts again what has crashed.
const CRASH_LIMIT_MS: u32 = 3_000;
