//! Faults of the machine itself: devices, rights, names, ports and routes that are taken.

use std::fs::{self, Permissions};
use std::io::Write;
use std::net::{Shutdown, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{self, Node, PORT, Server, assert_error, binary, text};
use crate::process::{self, Output};
use crate::{ping, sandbox};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("local::no_tun_device_is_an_error", no_tun_device),
        Case::new("local::no_permission_is_an_error_of_its_own", no_permission),
        Case::new("local::a_taken_interface_name_is_left_alone", interface_taken),
        Case::new("local::a_taken_udp_port_is_an_error", udp_port_taken),
        Case::new("local::taken_server_ports_are_an_error", server_ports_taken),
        Case::new("local::a_network_that_meets_a_local_route_is_an_error", route_taken),
        Case::new("local::a_second_up_says_that_the_node_runs", second_up),
        Case::new("local::sigterm_takes_everything_away", || leaves_nothing(Node::stop)),
        Case::new("local::down_takes_everything_away", || leaves_nothing(down)),
        Case::new("local::a_start_after_sigkill_cleans_up_and_works", restart_after_kill),
        Case::new("local::garbage_on_the_local_sockets_does_no_harm", garbage_on_sockets),
        Case::new("local::interface_name_port_and_mtu_are_as_asked", asked_interface),
        Case::new("local::a_machine_without_ipv6_is_a_member", without_ipv6),
        Case::new("local::an_interface_that_others_took_apart_is_mended", interface_mended),
    ]
}

struct Place {
    net: Net,
    server: Server,
    host: Host,
}

fn place_with(server_config: &str) -> Place {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    let at = format!("{}:{PORT}", host.address);
    let server = Server::start_at(&net, &host, &[&at], &[&at], server_config);
    let host = net.machine("alice", Nat::PortRestricted);
    Place { net, server, host }
}

fn place() -> Place {
    place_with("")
}

/// What the kernel has of interfaces, addresses and routes, less what changes by itself: IPv6
/// link-local addresses, which become usable a second or two after their link came up.
fn network_state(host: &Host) -> String {
    let words = ["-o addr", "route show table all", "-6 route show table all", "rule"];
    let mut state: Vec<String> = words
        .iter()
        .flat_map(|words| host.ns.ip(words).lines().map(str::to_owned).collect::<Vec<_>>())
        .filter(|line| !line.contains("fe80:") && !line.contains("ff00::/8"))
        .map(|line| line.split(" valid_lft").next().unwrap_or_default().replace(" tentative", ""))
        .collect();
    state.extend(host.ns.interfaces());
    state.sort();
    state.join("\n")
}

/// Runs `up`, which has to fail and to leave the kernel as it was.
fn up_fails(place: &Place, node: &Node, join: &str, word: &str) -> Output {
    let before = network_state(&place.host);
    let output = node.up_to_end(join);
    assert_error(&output, &[1], &[word]);
    assert_eq!(network_state(&place.host), before, "nothing is left behind");
    output
}

/// Who cannot be a node has not joined: the line is as good as before.
fn assert_nobody_joined(server: &Server) {
    assert_eq!(server.nodes()["nodes"].as_array().map(Vec::len), Some(0));
}

fn no_tun_device() {
    let place = place();
    let node = Node::new(&place.net, &place.host);
    let mut command = place.host.ns.command("unshare");
    let script = "mount -t tmpfs none /dev/net && exec \"$0\" \"$@\"";
    command.args(["--mount", "sh", "-c", script, &binary()]);
    command.args(node.up_args(&place.server.join()));
    let output = process::run(command, Duration::from_secs(20));
    assert_error(&output, &[1], &["/dev/net/tun"]);
}

fn no_permission() {
    let place = place();
    let node = Node::new(&place.net, &place.host);
    let join = place.server.join();
    let args = node.up_args(&join);
    // Whoever may not read the folder of the build can still run a copy.
    let copy = place.net.dir().join("overlay");
    fs::copy(binary(), &copy).unwrap();
    fs::set_permissions(&node.dir, Permissions::from_mode(0o777)).unwrap();
    let mut command = place.host.ns.command("setpriv");
    if sandbox::is_real_root() {
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    } else {
        command.args(["--bounding-set", "-all", "--inh-caps", "-all"]);
    }
    // Nor is the home of whoever runs the tests that user's.
    command.arg(&copy).args(args).env("HOME", &node.dir);
    let output = process::run(command, Duration::from_secs(20));
    fs::remove_file(&copy).unwrap();
    assert_error(&output, &[4], &["cap_net_admin"]);
    assert_nobody_joined(&place.server);
    let mut node = Node::with_config(&place.net, &place.host, "again", "");
    node.up(&join);
    node.wait_connected();
}

fn interface_taken() {
    let place = place();
    place.host.ns.ip("link add overlay0 type veth peer name other");
    place.host.ns.ip("addr add 198.18.0.1/24 dev overlay0");
    place.host.ns.ip("link set overlay0 up");
    place.host.ns.ip("link set other up");
    let node = Node::new(&place.net, &place.host);
    // A link without IPv6 address yet would change while we look.
    place.host.ns.ip("-6 addr flush dev overlay0");
    place.host.ns.ip("-6 addr flush dev other");
    let join = place.server.join();
    up_fails(&place, &node, &join, "overlay0");
    assert_nobody_joined(&place.server);

    let mut node = Node::with_config(&place.net, &place.host, "second", "");
    node.add_args(&["--interface", "overlay7"]);
    node.up(&join);
    node.wait_connected();
}

fn udp_port_taken() {
    let place = place();
    let mut node = Node::new(&place.net, &place.host);
    let _taken = place
        .host
        .ns
        .enter(|| (UdpSocket::bind("0.0.0.0:45678").unwrap(), UdpSocket::bind("[::]:45678").ok()));
    node.add_args(&["--listen-port", "45678"]);
    up_fails(&place, &node, &place.server.join(), "45678");
    assert_nobody_joined(&place.server);
}

fn server_ports_taken() {
    let net = Net::new();
    let host = net.machine("server", Nat::None);
    let at = format!("{}:{PORT}", host.address);
    let server = Server::prepare(&net, &host, "server", &[&at], &[&at], "");
    let taken = host.ns.enter(|| TcpListener::bind(&at).unwrap());
    assert_error(&server.run_to_end(), &[1], &["41820"]);
    drop(taken);
    let taken = host.ns.enter(|| UdpSocket::bind(&at).unwrap());
    assert_error(&server.run_to_end(), &[1], &["41820"]);
    drop(taken);
    let mut server = server;
    server.run();
    server.wait_ready();
    // Who has the ports is the server itself, and that is what one is told.
    let again = Server::prepare(&net, &host, "server", &[&at], &[&at], "").run_to_end();
    assert_error(&again, &[1], &["a server runs already on this machine"]);
    assert!(again.stderr.contains("overlay server nodes"), "{}", again.stderr);
}

fn route_taken() {
    let place = place_with("network = \"10.77.0.0/20\"\n");
    place.host.ns.ip("link add office type veth peer name far");
    place.host.ns.ip("link set office up");
    place.host.ns.ip("link set far up");
    place.host.ns.ip("-6 addr flush dev office");
    place.host.ns.ip("-6 addr flush dev far");
    place.host.ns.ip("addr add 10.77.3.1/24 dev office");
    let mut node = Node::new(&place.net, &place.host);
    let failed = up_fails(&place, &node, &place.server.join(), "10.77.3.");
    assert!(failed.stderr.contains("office"), "{failed:?}");
    assert!(failed.stderr.contains("overlay server remove NODE"), "it is a member now: {failed:?}");

    place.host.ns.ip("addr del 10.77.3.1/24 dev office");
    node.up(&place.server.join());
    let status = node.wait_connected();
    assert!(text(&status, "/self/ipv4").starts_with("10.77."), "{status}");
}

fn second_up() {
    let Place { net, server, host } = place();
    let mut node = Node::new(&net, &host);
    node.add_args(&["--listen-port", "45678"]);
    node.up(&server.join());
    node.wait_connected();
    let again = node.up_to_end("");
    assert_eq!(again.code, Some(0), "{again:?}");
    let said = format!("{}{}", again.stdout, again.stderr).to_lowercase();
    assert!(said.contains("already runs") || said.contains("already running"), "{said}");
    let same = node.up_to_end(&server.join());
    assert_eq!(same.code, Some(0), "the line says nothing new: {same:?}");
    // It would do nothing, so it must not look as if it had.
    let other = node.up_to_end(include_str!("../../golden/join-line.txt").trim());
    assert_error(&other, &[1], &["overlay down"]);
    node.wait_connected();
    // When `down` has ended, the directory, the interface and the port are free.
    for _ in 0..2 {
        node.down_and_up();
        node.wait_connected();
    }
}

fn down(node: &mut Node) -> Option<i32> {
    node.cli(&["down"]).success("down");
    node.daemon().wait_exit(overlay::EXIT_LIMIT)
}

fn leaves_nothing(end: fn(&mut Node) -> Option<i32>) {
    let Place { net, server, host } = place();
    let before = network_state(&host);
    let mut node = Node::start(&net, &host, &server);
    assert_ne!(network_state(&host), before);
    assert_eq!(end(&mut node), Some(0), "a clean end");
    assert_eq!(network_state(&host), before, "interface, addresses and routes are gone");
    assert!(!node.dir.join("socket").exists(), "the socket is gone");
    assert_not_running(&node.cli(&["status"]));
}

fn assert_not_running(output: &Output) {
    assert_error(output, &[3], &["not running", "does not run", "no daemon", "no node"]);
}

fn restart_after_kill() {
    let Place { net, server, host } = place();
    let bob = Node::start(&net, &net.machine("bob", Nat::PortRestricted), &server);
    let mut node = Node::start(&net, &host, &server);
    ping::assert_answers(&host, &bob.ipv4());
    node.kill();
    assert_not_running(&node.cli(&["status"]));
    // What a daemon could leave that was killed while it worked on the routes.
    let bob_ipv4 = bob.ipv4();
    node.up_again();
    node.wait_connected();
    ping::assert_answers(&host, &bob_ipv4);
    ping::assert_answers(&bob.host, &node.ipv4());
    assert_eq!(node.stop(), Some(0));
    let left = network_state(&host);
    assert!(!left.contains("overlay0"), "a trace is left:\n{left}");
}

fn asked_interface() {
    let Place { net, server, host } = place();
    let mut node = Node::new(&net, &host);
    node.add_args(&["--interface", "lan7", "--listen-port", "45678", "--mtu", "1320"]);
    node.up(&server.join());
    let status = node.wait_connected();
    assert_eq!(status["self"]["interface"], "lan7");
    assert_eq!(status["self"]["listen_port"], 45678);
    assert_eq!(status["self"]["mtu"], 1320);
    let link = host.ns.ip("-o addr show dev lan7");
    for address in [node.ipv4(), node.ipv6()] {
        assert!(link.contains(&address), "{address} is not in {link}");
    }
    assert!(host.ns.ip("-o link show dev lan7").contains("mtu 1320"));
}

fn without_ipv6() {
    let Place { net, server, host } = place();
    for which in ["all", "default"] {
        host.ns.sysctl(&format!("net/ipv6/conf/{which}/disable_ipv6"), "1");
    }
    let other = net.machine("bob", Nat::PortRestricted);
    let peer = Node::start(&net, &other, &server);
    let mut node = Node::start(&net, &host, &server);
    node.wait_path("bob", "direct", Duration::from_secs(10));
    ping::assert_answers(&host, &peer.ipv4());
    assert!(node.log().contains("IPv6 is disabled"), "{}", node.log());
}

fn interface_mended() {
    let Place { net, server, host } = place();
    let other = net.machine("bob", Nat::PortRestricted);
    let mut node = Node::start(&net, &host, &server);
    let mut peer = Node::start(&net, &other, &server);
    peer.wait_connected();
    node.wait_path("bob", "direct", Duration::from_secs(10));
    let address = peer.ipv4();
    ping::assert_answers(&host, &address);
    let is_off = |status: &Value| status["self"]["warnings"].to_string().contains("switched off");
    let harm = [
        "route flush dev overlay0",
        "addr flush dev overlay0",
        "link set dev overlay0 down",
        "link del dev overlay0",
    ];
    for words in harm {
        host.ns.ip(words);
        if words.ends_with("down") {
            // That is a person's decision, of which the status tells; what goes with it comes back with it.
            node.wait_status("the interface is off", Duration::from_secs(10), is_off);
            let socket = host.ns.enter(|| UdpSocket::bind((node.ipv4(), 0)).unwrap());
            let error =
                socket.connect((address.as_str(), 9)).expect_err("not by the default route");
            assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{error}");
            host.ns.ip("link set dev overlay0 up");
        }
        wait_for(&format!("bob answers again after `ip {words}`"), Duration::from_secs(5), || {
            ping::answers_once(&host, &address, "1").then_some(())
        });
        let addresses = host.ns.ip("-o addr show dev overlay0");
        assert!(addresses.contains(&node.ipv6()), "{} is not in {addresses}", node.ipv6());
        let guard = host.ns.ip("route show type unreachable");
        assert!(guard.contains(&node.ipv4()), "no guard in {guard}");
        let routes = host.ns.ip("-6 route show dev overlay0");
        assert!(routes.contains("/48"), "no IPv6 route in {routes}");
    }
    node.wait_status("it is on again", Duration::from_secs(10), |status| !is_off(status));
    assert!(node.log().contains("the interface was removed"), "{}", node.log());
}

fn garbage_on_sockets() {
    let Place { net, server, host } = place();
    let mut node = Node::start(&net, &host, &server);
    let mut silent = Vec::new();
    for socket in [net.dir().join("server/socket"), node.dir.join("socket")] {
        let lines = [&b""[..], b"\n", b"{", b"{\"nonsense\":1}\n", b"\xff\xfe\n", &[b'a'; 300_000]];
        for line in lines {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
            // It may hang up in the middle of it.
            let _ = stream.write_all(line);
            let _ = stream.shutdown(Shutdown::Write);
        }
        silent.extend((0..50).filter_map(|_| UnixStream::connect(&socket).ok()));
    }
    assert!(node.status().is_some(), "the node answers");
    server.cli(&["nodes"]).success("nodes");
    node.wait_connected();
}
