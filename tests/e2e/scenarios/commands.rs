//! Exit codes and the commands that need no network.

use std::fs;

use nix::sys::signal::Signal;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::Net;
use crate::nat::Nat;
use crate::overlay::{
    EXIT_LIMIT, Node, START_LIMIT, Server, assert_error, binary, call, overlay, parse, path, text,
};
use crate::ping;
use crate::process::Daemon;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("commands::usage_errors_are_2", usage),
        Case::new("commands::no_daemon_is_3", no_daemon),
        Case::new("commands::an_unknown_peer_is_5_and_no_reply_is_6", unknown_and_silent),
        Case::new("commands::only_relayed_is_7", only_relayed),
        Case::new("commands::until_direct_ends_at_the_first_direct_reply", until_direct),
        Case::new("commands::not_enrolled_is_8", not_enrolled),
        Case::new("commands::unknown_config_keys_are_pointed_at", unknown_keys),
        Case::new("commands::flags_win_over_variables_and_these_over_files", precedence),
        Case::new("commands::ping_prints_json_lines", ping_json),
        Case::new("commands::status_can_be_watched", watched),
        Case::new("commands::version_and_completions", version_and_completions),
    ]
}

fn usage() {
    let net = Net::new();
    let host = net.machine("alice", Nat::None);
    for wrong in [&["upp"][..], &["ping"], &["up", "--mtu", "many"], &["status", "--nonsense"]] {
        assert_eq!(call(&host, wrong).code, Some(2), "{wrong:?}");
    }
    assert_eq!(call(&host, &["--help"]).code, Some(0));
}

fn no_daemon() {
    let net = Net::new();
    let host = net.machine("alice", Nat::None);
    let words = ["not running", "does not run", "no daemon", "no node", "no server"];
    let socket = ["--socket", "/run/e2e/nothing.sock"];
    for command in [&["status"][..], &["down"], &["ping", "bob"], &["ip"], &["status", "--json"]] {
        assert_error(&call(&host, &[command, &socket].concat()), &[3], &words);
    }
    for command in [&["invite"][..], &["nodes"], &["remove", "bob"]] {
        let args = [&["server"], command, &socket].concat();
        assert_error(&call(&host, &args), &[3], &words);
    }
}

fn unknown_and_silent() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", Nat::None), &server);
    let mut bob = Node::start(&net, &net.machine("bob", Nat::None), &server);
    ping::assert_answers(&alice.host, &bob.ipv4());
    assert_error(&alice.cli(&["ping", "bbo", "-c", "1"]), &[5], &["bbo"]);
    assert_error(&alice.cli(&["ip", "bbo"]), &[5], &["bbo"]);
    assert_error(&alice.cli(&["ping", "203.0.113.99", "-c", "1"]), &[5], &["203.0.113.99"]);
    bob.kill();
    let silent = alice.cli(&["ping", "bob", "-c", "2", "--timeout", "1s"]);
    assert_error(&silent, &[6], &["bob", "reply", "answer"]);
}

fn only_relayed() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", Nat::Symmetric), &server);
    let bob = Node::start(&net, &net.machine("bob", Nat::Symmetric), &server);
    ping::assert_answers(&alice.host, &bob.ipv4());
    let relayed = alice.cli(&["ping", "bob", "--until-direct", "--timeout", "2s"]);
    assert_error(&relayed, &[7], &["relay"]);
    assert!(relayed.stdout.contains("relay-udp"), "each reply shows its path: {relayed:?}");
}

fn until_direct() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", Nat::PortRestricted), &server);
    let bob = Node::start(&net, &net.machine("bob", Nat::PortRestricted), &server);
    let direct = alice.cli(&["ping", "bob", "--until-direct", "--timeout", "5s"]);
    let printed = direct.success("ping --until-direct");
    assert!(printed.contains("direct"), "{printed}");
    drop(bob);
}

fn not_enrolled() {
    let net = Net::new();
    let node = Node::new(&net, &net.machine("alice", Nat::None));
    assert_error(&node.up_to_end(""), &[8], &["join line", "enrol", "invite"]);
}

fn unknown_keys() {
    let net = Net::new();
    let host = net.machine("alice", Nat::None);
    let good = net.dir().join("node.toml");
    fs::write(&good, "# a comment\nlisten-port = 45678\n").unwrap();
    call(&host, &["config", "check", &path(&good)]).success("config check of a good file");
    fs::write(&good, "# a comment\nlisten-prot = 45678\n").unwrap();
    let checked = call(&host, &["config", "check", &path(&good)]);
    assert_error(&checked, &[1, 2], &["listen-prot"]);
    assert_points_at(&checked.stderr, "listen-port");

    let bad = net.dir().join("server.toml");
    fs::write(&bad, "# a comment\nnetwrok = \"10.1.0.0/20\"\n").unwrap();
    let args = ["server", "--config", &path(&bad), "--state-dir", &path(&net.dir().join("s"))];
    let started = call(&host, &args);
    assert_error(&started, &[1, 2], &["netwrok"]);
    assert_points_at(&started.stderr, "network");

    let node = Node::with_config(&net, &host, "bad", "# a comment\nmtuu = 1300\n");
    let started = node.up_to_end("");
    assert_error(&started, &[1, 2], &["mtuu"]);
    assert_points_at(&started.stderr, "mtu");
}

/// Line 2, column 1, and the name that was meant.
fn assert_points_at(stderr: &str, meant: &str) {
    let place = ["line 2, column 1", "line 2 column 1", ":2:1"];
    assert!(place.iter().any(|place| stderr.contains(place)), "no line and column:\n{stderr}");
    assert!(stderr.contains(meant), "the nearest name is {meant}:\n{stderr}");
}

fn precedence() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let host = net.machine("alice", Nat::None);
    let file = "interface = \"file0\"\nmtu = 1300\nlisten-port = 45001\n";
    let mut node = Node::with_config(&net, &host, "alice", file);
    node.add_args(&["--listen-port", "45003"]);
    let args = node.up_args(&server.join());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut command = overlay(&host, &args);
    command.env("OVERLAY_MTU", "1310").env("OVERLAY_LISTEN_PORT", "45002");
    node.up_by(command);
    let status = node.wait_connected();
    assert_eq!(status["self"]["interface"], "file0", "only the file names an interface");
    assert_eq!(status["self"]["mtu"], 1310, "the variable wins over the file");
    assert_eq!(status["self"]["listen_port"], 45003, "the flag wins over both");
}

fn ping_json() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", Nat::PortRestricted), &server);
    let bob = Node::start(&net, &net.machine("bob", Nat::FullCone), &server);
    ping::assert_answers(&alice.host, &bob.ipv4());
    let printed = alice.cli(&["ping", "bob", "-c", "3", "--json"]).success("ping --json");
    let lines: Vec<_> = printed.lines().map(parse).collect();
    assert_eq!(lines.len(), 4, "three replies and a summary:\n{printed}");
    for reply in &lines[..3] {
        assert!(reply["seq"].is_u64() && reply["rtt_ms"].is_number(), "{reply}");
        let kind = text(reply, "/path/kind");
        assert!(["direct", "relay-udp", "relay-tcp"].contains(&kind.as_str()), "{reply}");
    }
    let summary = &lines[3];
    assert_eq!((&summary["sent"], &summary["received"]), (&3.into(), &3.into()), "{summary}");
    for key in ["min_ms", "avg_ms", "max_ms"] {
        assert!(summary[key].is_number(), "{summary}");
    }
}

fn version_and_completions() {
    let net = Net::new();
    let host = net.machine("alice", Nat::None);
    let version = call(&host, &["version"]).success("version");
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    let json = parse(&call(&host, &["version", "--json"]).success("version --json"));
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"), "{json}");
    let script = call(&host, &["completions", "bash"]).success("completions bash");
    assert!(script.contains("netcheck"), "the script knows the commands");
}

fn watched() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let alice = Node::start(&net, &net.machine("alice", Nat::None), &server);
    // What this run was started with would be handed on.
    let start = |signals: &str| {
        let mut command = alice.host.ns.command("env");
        command.arg(signals).arg(binary());
        command.args(["status", "--watch", "--socket", &alice.socket()]);
        Daemon::start(command, &net.log_file(signals))
    };
    let mut watch = start("--default-signal=INT");
    // As in a script that is not to be interrupted.
    let mut deaf = start("--ignore-signal=INT");
    wait_for("the first picture", START_LIMIT, || watch.log().contains("alice").then_some(()));
    let _bob = Node::start(&net, &net.machine("bob", Nat::None), &server);
    wait_for("a picture with bob", START_LIMIT, || watch.log().contains("bob").then_some(()));
    assert!(watch.exit().is_none(), "it goes on until it is told to stop");
    deaf.signal(Signal::SIGINT);
    watch.signal(Signal::SIGINT);
    watch.wait_exit(EXIT_LIMIT);
    assert!(deaf.exit().is_none(), "what ignores interrupts goes on");
    deaf.signal(Signal::SIGTERM);
    deaf.wait_exit(EXIT_LIMIT);

    let mut command = alice.host.ns.command("env");
    command.arg("--default-signal=INT").arg(binary());
    command.args(["ping", "bob", "--count", "1000", "--socket", &alice.socket()]);
    let mut pings = Daemon::start(command, &net.log_file("pings"));
    wait_for("a reply", START_LIMIT, || pings.log().contains("reply from bob").then_some(()));
    pings.signal(Signal::SIGINT);
    assert_eq!(pings.wait_exit(EXIT_LIMIT), Some(0));
    assert!(pings.log().contains("ms min/avg/max"), "what came is told: {}", pings.log());
}
