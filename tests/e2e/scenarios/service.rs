//! systemd: install, restart, survive, uninstall; on a real one.

use std::time::Duration;

use super::offload::realtime_is_allowed;
use crate::case::{Case, Needs};
use crate::clock::{now, wait_for};
use crate::container::Container;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{Node, assert_error, parse, text};
use crate::ping;
use crate::process::Output;

pub(crate) fn cases() -> Vec<Case> {
    [
        Case::new("service::a_container_boots_with_the_program", boots),
        Case::new("service::server_and_node_install_restart_and_uninstall", install),
        Case::new("service::a_bad_join_line_installs_nothing", bad_join_line),
        Case::new("service::secrets_stay_private_and_root_and_service_share_the_state", shared),
        Case::new(
            "service::a_stopped_server_stays_so_and_one_that_hangs_does_not",
            stops_and_hangs,
        ),
        Case::new("service::a_restart_and_a_crash_of_the_server_refuse_nobody", refuses_nobody),
        Case::new("service::a_removed_node_stops_for_good_and_a_purge_leaves_nothing", removed),
    ]
    .map(|case| case.needs(Needs::Systemd))
    .into()
}

/// The room itself: what the other tests take for granted.
fn boots() {
    let net = Net::new();
    let container = Container::boot(&net, &net.machine("alice", Nat::None));
    container.ok(&["test", "-x", "/usr/local/bin/overlay"]);
    container.ok(&["test", "-c", "/dev/net/tun"]);
    assert_eq!(container.ok(&["systemctl", "--failed", "--quiet"]), "", "failed units");
    assert_eq!(container.ok(&["hostname"]).trim(), "alice");
    assert!(container.ok(&["ip", "-o", "addr"]).contains("203.0.113."), "it is in the lab");
}

fn install() {
    let net = Net::new();
    let hub = net.machine("hub", Nat::None);
    let home = net.machine("alice", Nat::PortRestricted);
    let server = Container::boot(&net, &hub);
    let node = Container::boot(&net, &home);

    let printed = server.ok(&["overlay", "service", "install", "server"]);
    assert!(printed.contains(&hub.address.to_string()), "its address is printed:\n{printed}");
    let invite = || {
        let json = server.ok(&["overlay", "server", "invite", "--json"]);
        text(&parse(&json), "/join")
    };
    let printed = node.ok(&["overlay", "service", "install", "node", &invite()]);
    let alice_ipv4 = node.ok(&["overlay", "ip"]).lines().next().unwrap().trim().to_owned();
    assert!(printed.contains(&alice_ipv4), "its address is printed:\n{printed}");

    let mut bob = Node::new(&net, &net.machine("bob", Nat::PortRestricted));
    bob.up(&invite());
    bob.wait_connected();
    ping::assert_answers(&bob.host, &alice_ipv4);
    ping::assert_answers(&home, &bob.ipv4());

    for (container, unit) in [(&server, SERVER_UNIT), (&node, NODE_UNIT)] {
        container.ok(&["systemctl", "restart", unit]);
        assert_eq!(container.ok(&["systemctl", "is-active", unit]).trim(), "active");
        assert_eq!(container.ok(&["systemctl", "is-enabled", unit]).trim(), "enabled");
        let process = || container.ok(&["systemctl", "show", "-P", "MainPID", unit]);
        let before = process();
        container.ok(&["systemctl", "reload", unit]);
        wait_for("the unit is active again", Duration::from_secs(5), || {
            let state = container.run(&["systemctl", "is-active", unit]).stdout;
            (state.trim() == "active").then_some(())
        });
        assert_eq!(process(), before, "a reload is no restart");
    }
    let addresses = node.ok(&["ip", "-o", "addr", "show", "dev", "overlay0"]);
    assert!(addresses.contains(&alice_ipv4), "ready means that the address is there");
    ping::first_answer(&bob.host, &alice_ipv4, now(), Duration::from_secs(10));
    bob.wait_connected();

    dies_and_comes_back(&node);
    assert_realtime(&node);
    ping::first_answer(&bob.host, &alice_ipv4, now(), Duration::from_secs(10));

    assert_exposure(&server, SERVER_UNIT, 1.2);
    assert_exposure(&node, NODE_UNIT, 1.8);
    node.ok(&["overlay", "service", "status", "node"]);
    server.ok(&["overlay", "service", "status", "server"]);
    let again = node.run(&["overlay", "up"]);
    assert_eq!(again.code, Some(0), "the service already runs: {again:?}");

    node.ok(&["overlay", "service", "uninstall", "node"]);
    assert_not_installed(&node, NODE_UNIT);
    assert!(!node.ok(&["ip", "-o", "link"]).contains("overlay0"), "the interface is gone");
    server.ok(&["overlay", "service", "uninstall", "server"]);
    assert_not_installed(&server, SERVER_UNIT);
}

/// The sandbox lets the packet threads run ahead of ordinary programs, and starts with the device that
/// it has kept.
fn assert_realtime(node: &Container) {
    let limit = node.ok(&["systemctl", "show", "-P", "LimitRTPRIO", NODE_UNIT]);
    assert_eq!(limit.trim(), "1", "the lowest priority alone");
    // Some machines let no limit be raised; there the right comes by another way.
    let by_limit = node.run(&["prlimit", "--rtprio=1", "true"]).code == Some(0);
    eprintln!("the right to run ahead comes by {}", if by_limit { "limit" } else { "capability" });
    let folder = "/run/systemd/system/overlay.service.d";
    if !by_limit {
        let rights = "CAP_NET_ADMIN CAP_SYS_NICE";
        node.ok(&[
            "sh",
            "-c",
            &format!(
                "mkdir -p {folder}; printf '[Service]\nCapabilityBoundingSet={rights}\n\
                 AmbientCapabilities={rights}\n' > {folder}/test.conf; systemctl daemon-reload; \
                 systemctl restart {NODE_UNIT}"
            ),
        ]);
    }
    let status = parse(&node.ok(&["overlay", "status", "--json"]));
    assert_eq!(status["self"]["realtime"], realtime_is_allowed(), "{status}");
    if !by_limit {
        let end = format!("rm -r {folder}; systemctl daemon-reload; systemctl restart {NODE_UNIT}");
        node.ok(&["sh", "-c", &end]);
    }
}

/// Kills the node and waits until systemd has another one ready.
fn dies_and_comes_back(node: &Container) {
    let process = || node.ok(&["systemctl", "show", "-P", "MainPID", NODE_UNIT]).trim().to_owned();
    let before = process();
    node.ok(&["systemctl", "kill", "--kill-who=main", "--signal=KILL", NODE_UNIT]);
    wait_for("systemd starts the node again", Duration::from_secs(20), || {
        let active = node.run(&["systemctl", "is-active", NODE_UNIT]).stdout;
        (active.trim() == "active" && ![before.as_str(), "0"].contains(&process().as_str()))
            .then_some(())
    });
}

fn assert_exposure(container: &Container, unit: &str, limit: f32) {
    let report = container.ok(&["systemd-analyze", "security", "--no-pager", unit]);
    let line = report.lines().find(|line| line.contains("Overall exposure level")).unwrap();
    let after = line.split_once(&format!("{unit}: ")).expect("unit and level").1;
    let level: f32 = after.split(' ').next().unwrap().parse().unwrap();
    eprintln!("systemd-analyze security {unit}: {level} (at most {limit})");
    assert!(level <= limit, "{unit} is exposed at {level}, {limit} is allowed\n{report}");
}

fn bad_join_line() {
    let net = Net::new();
    let container = Container::boot(&net, &net.machine("alice", Nat::None));
    let bad = container.run(&["overlay", "service", "install", "node", "ovl1_abcdefgh"]);
    assert_error(&bad, &[1, 2], &["join line", "checksum"]);
    assert_not_installed(&container, NODE_UNIT);
    let output = container.run(&["overlay", "service", "install", "node"]);
    assert_error(&output, &[8], &["join line", "enrol", "invite"]);
    assert_not_installed(&container, NODE_UNIT);
}

/// Server and node on one machine.
pub(super) fn both(net: &Net) -> Container {
    let container = Container::boot(net, &net.machine("alice", Nat::None));
    let output = container.run(&["overlay", "service", "install", "server"]);
    assert_eq!(output.code, Some(0), "{output:#?}");
    let line = output.stdout.lines().find(|line| line.starts_with("ovl1_"));
    let line = line.expect("a server that nobody has joined prints a join line");
    // The shell is there to hide the line from the process list, as an administrator would.
    container.ok(&["sh", "-c", &format!("umask 077; echo {line} > /root/line")]);
    container.ok(&["overlay", "service", "install", "node", "file:/root/line"]);
    container
}

fn shared() {
    let net = Net::new();
    let container = both(&net);
    let journal = container.ok(&["journalctl", "--no-pager"]);
    assert!(!journal.contains("ovl1_"), "a join line is in the journal");
    let owner = |path: &str| container.ok(&["stat", "-c", "%U:%G %a", path]).trim().to_owned();
    assert_eq!(owner("/var/lib/overlay/node"), "overlay:overlay 700");
    assert_eq!(owner("/var/lib/overlay/server"), "overlay:overlay 700");
    assert_eq!(owner("/var/lib/overlay/node/node.key"), "overlay:overlay 600");
    assert_eq!(owner("/run/overlay/node.sock"), "overlay:overlay 660");
    assert_eq!(owner("/run/overlay/server.sock"), "overlay:overlay 660");
    assert_eq!(owner("/etc/overlay"), "root:root 755");

    // Members of the group may look and others may not; nobody but root installs.
    let group = container.ok(&["id", "-g", "overlay"]).trim().to_owned();
    let member = ["setpriv", "--reuid=4711", "--regid=4711", "--groups", group.as_str()];
    let stranger = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups"];
    container.ok(&[&member[..], &["overlay", "status"]].concat());
    let output = container.run(&[&stranger[..], &["overlay", "status"]].concat());
    assert_error(&output, &[4], &["permission"]);
    let output = container.run(&[&member[..], &["overlay", "down"]].concat());
    assert_eq!(output.code, Some(4), "{output:?}");
    let output =
        container.run(&[&stranger[..], &["overlay", "service", "install", "node"]].concat());
    assert_error(&output, &[4], &["root"]);

    // The service runs on with what root has written in between.
    container.ok(&["systemctl", "stop", NODE_UNIT]);
    let run = "timeout --preserve-status 10 overlay up & for i in $(seq 100); do \
               overlay ip >/dev/null 2>&1 && break; sleep 0.1; done; \
               overlay service install node; echo $? >/root/code; overlay down; wait";
    container.ok(&["sh", "-c", run]);
    assert_eq!(container.ok(&["cat", "/root/code"]).trim(), "1", "a node runs in the foreground");
    assert_eq!(owner("/var/lib/overlay/node/netmap.json"), "overlay:overlay 600");
    container.ok(&["overlay", "service", "install", "node"]);

    // A configuration that the service cannot use is refused before anything is changed.
    let set = |line: &str| {
        container.ok(&["sh", "-c", &format!("echo '{line}' > /etc/overlay/node.toml")]);
        container.run(&["overlay", "service", "install", "node"])
    };
    assert_error(&set("statedir = 1"), &[2], &["state-dir"]);
    assert_error(&set("state-dir = \"/srv/x\""), &[2], &["/var/lib/overlay/node"]);
    container.ok(&["overlay", "ip"]);
    let failed = set("interface = \"lo\"");
    assert_error(&failed, &[1], &["interface"]);
    assert!(failed.stderr.contains("journalctl"), "it shows the last lines:\n{}", failed.stderr);
    // systemd tries again and again by now; that is no node outside of the service.
    container.ok(&["rm", "/etc/overlay/node.toml"]);
    container.ok(&["overlay", "service", "install", "node"]);

    // A join line that does not work leaves the service as it was.
    container.ok(&["systemctl", "stop", SERVER_UNIT]);
    let line = "file:/root/line";
    let output = container.run(&["overlay", "service", "install", "node", line]);
    assert_error(&output, &[1], &["connect"]);
    assert_eq!(container.ok(&["systemctl", "is-active", NODE_UNIT]).trim(), "active");
}

/// The ports go with the service, and come back with it.
fn stops_and_hangs() {
    let net = Net::new();
    let container = Container::boot(&net, &net.machine("alice", Nat::None));
    container.ok(&["overlay", "service", "install", "server"]);
    let socket = "overlay-server-443.socket";
    assert_eq!(container.ok(&["systemctl", "is-active", socket]).trim(), "active");
    let pid = || container.ok(&["systemctl", "show", "-P", "MainPID", SERVER_UNIT]);
    for port in ["41820", "443"] {
        container.ok(&["bash", "-c", &format!("exec 3<>/dev/tcp/127.0.0.1/{port}")]);
    }

    // Stopped is stopped: nobody can start it by knocking.
    container.ok(&["systemctl", "stop", SERVER_UNIT]);
    let knock = container.run(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/41820"]);
    assert_ne!(knock.code, Some(0), "somebody still listens");
    std::thread::sleep(Duration::from_millis(500));
    assert_ne!(container.run(&["systemctl", "is-active", SERVER_UNIT]).stdout.trim(), "active");
    // An older version had a unit for the main port.
    let stale = "/etc/systemd/system/overlay-server.socket";
    for command in ["install", "uninstall"] {
        let unit = format!(
            "printf '[Socket]\nListenStream=41820\n[Install]\nWantedBy=sockets.target\n' > {stale}; \
             systemctl daemon-reload; systemctl stop {SERVER_UNIT}; \
             systemctl enable --now overlay-server.socket"
        );
        container.ok(&["sh", "-c", &unit]);
        container.ok(&["overlay", "service", command, "server"]);
        let left = container.run(&["systemctl", "list-unit-files", "overlay-server.socket"]);
        assert!(!left.stdout.contains("overlay-server.socket"), "{}", left.stdout);
        assert_eq!(container.run(&["test", "-e", stale]).code, Some(1), "{stale} is still there");
    }
    container.ok(&["overlay", "service", "install", "server"]);
    container.ok(&["overlay", "server", "nodes"]);

    // A main thread that hangs is no progress, and systemd ends it.
    let before = pid();
    container.ok(&["kill", "-STOP", before.trim()]);
    wait_for("the watchdog bites", Duration::from_secs(60), || {
        let active = container.run(&["systemctl", "is-active", SERVER_UNIT]).stdout;
        let now = pid();
        (active.trim() == "active" && now != before && now.trim() != "0").then_some(())
    });
}

/// Asserts that this is the end of the server, and that nobody can start it by knocking.
fn assert_stops(container: &Container, what: &str, end: impl FnOnce()) {
    for port in ["41820", "443"] {
        container.ok(&["bash", "-c", &format!("exec 3<>/dev/tcp/127.0.0.1/{port}")]);
    }
    end();
    for port in ["41820", "443"] {
        wait_for(&format!("port {port} is closed after {what}"), Duration::from_secs(5), || {
            let knock = format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
            (container.run(&["bash", "-c", &knock]).code != Some(0)).then_some(())
        });
    }
    let active = container.run(&["systemctl", "is-active", SERVER_UNIT]).stdout;
    assert!(["inactive", "failed"].contains(&active.trim()), "{active}");
}

/// Somebody knocks all the time, and counts how often nobody opens.
const KNOCKER: &str = "
import socket, time, os
tries = {41820: 0, 443: 0}
refused = {41820: 0, 443: 0}
open('/run/knocking', 'w').close()
while not os.path.exists('/run/enough'):
    for port in tries:
        tries[port] += 1
        try:
            socket.create_connection(('127.0.0.1', port), 5).close()
        except ConnectionRefusedError:
            refused[port] += 1
    time.sleep(0.002)
open('/run/counted', 'w').write(f'{min(tries.values())} {refused}')
";

fn refuses_nobody() {
    let net = Net::new();
    let container = Container::boot(&net, &net.machine("alice", Nat::None));
    container.ok(&["overlay", "service", "install", "server"]);
    let knocker = ["systemd-run", "--quiet", "--unit=knocker", "python3", "-c", KNOCKER];
    container.ok(&knocker);
    wait_for("somebody knocks", Duration::from_secs(10), || {
        (container.run(&["test", "-e", "/run/knocking"]).code == Some(0)).then_some(())
    });
    let pid = || container.ok(&["systemctl", "show", "-P", "MainPID", SERVER_UNIT]);
    for _ in 0..5 {
        let before = pid();
        container.ok(&["systemctl", "restart", SERVER_UNIT]);
        assert_ne!(pid(), before);
    }
    for _ in 0..2 {
        let before = pid();
        let kill = ["systemctl", "kill", "--kill-who=main", "--signal=KILL", SERVER_UNIT];
        container.ok(&kill);
        wait_for("systemd starts the server again", Duration::from_secs(20), || {
            let active = container.run(&["systemctl", "is-active", SERVER_UNIT]).stdout;
            (active.trim() == "active" && ![before.as_str(), "0\n"].contains(&pid().as_str()))
                .then_some(())
        });
    }
    container.ok(&["touch", "/run/enough"]);
    wait_for("it was counted", Duration::from_secs(10), || {
        (container.run(&["test", "-s", "/run/counted"]).code == Some(0)).then_some(())
    });
    let counted = container.ok(&["cat", "/run/counted"]);
    eprintln!("five restarts and two crashes, knocks and refusals: {counted}");
    let (tries, refused) = counted.trim().split_once(' ').unwrap();
    assert!(tries.parse::<u32>().unwrap() > 100, "{counted}");
    assert_eq!(refused, "{41820: 0, 443: 0}", "{counted}");

    assert_stops(&container, "a stop", || {
        container.ok(&["systemctl", "stop", SERVER_UNIT]);
    });
    container.ok(&["systemctl", "start", SERVER_UNIT]);
    assert_stops(&container, "a configuration that makes no sense", || {
        container.ok(&["sh", "-c", "echo nonsense > /etc/overlay/server.toml"]);
        container.run(&["systemctl", "restart", SERVER_UNIT]);
    });
}

fn removed() {
    let net = Net::new();
    let container = both(&net);
    container.ok(&["overlay", "server", "remove", "alice"]);
    wait_for("the node gives up", Duration::from_secs(10), || {
        let state = container.run(&["systemctl", "is-active", NODE_UNIT]).stdout;
        (state.trim() == "failed").then_some(())
    });
    let restarts = container.ok(&["systemctl", "show", "-P", "NRestarts", NODE_UNIT]);
    assert_eq!(restarts.trim(), "0", "a node without a network is not started again");
    let status = container.run(&["overlay", "service", "status", "node"]);
    assert_error(&status, &[3], &["journalctl"]);
    let line = container.ok(&["overlay", "server", "invite"]);
    container.ok(&["overlay", "service", "install", "node", line.trim()]);

    for role in ["node", "server"] {
        container.ok(&["overlay", "service", "uninstall", role]);
        container.ok(&["test", "-d", &format!("/var/lib/overlay/{role}")]);
        container.ok(&["overlay", "service", "uninstall", role, "--purge"]);
    }
    for path in ["/var/lib/overlay", "/run/overlay"] {
        assert_eq!(container.run(&["test", "-e", path]).code, Some(1), "{path} is still there");
    }
}

fn assert_not_installed(container: &Container, unit: &str) {
    let Output { code, stdout, .. } = container.run(&["systemctl", "cat", unit]);
    assert_ne!(code, Some(0), "{unit} is still there:\n{stdout}");
    assert_ne!(container.run(&["systemctl", "is-active", unit]).stdout.trim(), "active");
}

const SERVER_UNIT: &str = "overlay-server.service";
const NODE_UNIT: &str = "overlay.service";
