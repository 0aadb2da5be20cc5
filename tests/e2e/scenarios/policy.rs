//! Access rules as programs meet them, and what they are told when nobody is there.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::case::Case;
use crate::clock::{now, wait_for};
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, Server, assert_error, parse, path, text};
use crate::pair::Pair;
use crate::ping;
use crate::process::{self, Daemon};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("policy::rules_let_in_what_they_allow_and_refuse_the_rest_at_once", enforced),
        Case::new("policy::a_change_cuts_what_it_forbids_within_a_second", changed),
        Case::new("policy::a_node_stays_closed_when_it_restarts_without_its_server", restarted),
        Case::new("policy::an_offline_peer_is_unreachable_within_a_second", offline),
        Case::new("policy::an_address_that_nobody_has_is_unreachable_at_once", nobody),
        Case::new("policy::a_file_is_checked_and_tried_before_it_is_set", commands),
    ]
}

/// Lets everybody reach `tag:web` at TCP port 8080, and nothing else.
const WEB_ONLY: &str = "[groups]\nweb = 'tag:web'\n[[rules]]\nfrom = 'any'\nto = 'web'\n\
                        protocol = 'tcp'\nports = 8080\n";
/// The same, and pings.
const WEB_AND_PING: &str = "[groups]\nweb = 'tag:web'\n[[rules]]\nfrom = 'any'\nto = 'web'\n\
                            protocol = 'tcp'\nports = 8080\n[[rules]]\nfrom = 'any'\nto = 'any'\n\
                            protocol = 'icmp'\n";

fn pair() -> Pair {
    let pair = Pair::settled(Nat::PortRestricted, "direct", Duration::from_secs(10));
    pair.server.cli(&["tag", "bob", "web"]).success("tag");
    pair
}

fn set(net: &Net, server: &Server, rules: &str) {
    let file = net.dir().join("policy.toml");
    fs::write(&file, rules).unwrap();
    server.cli(&["policy", "set", &path(&file)]).success("policy set");
}

/// A program that answers TCP and UDP on all addresses, in Python: `echo PORT`.
const ECHO: &str = "
import socket, sys, threading
port = int(sys.argv[1])
def udp():
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::', port))
    while True:
        d, a = s.recvfrom(70000); s.sendto(d, a)
threading.Thread(target=udp, daemon=True).start()
s = socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True)
def serve(c):
    while True:
        d = c.recv(70000)
        if not d: return
        c.sendall(d)
while True:
    c, _ = s.accept(); threading.Thread(target=serve, args=(c,), daemon=True).start()
";

/// Tries one exchange and says how it ended: `ok`, or the name of the error, and after how many
/// milliseconds. `ask KIND ADDRESS PORT SIZE`. To UDP the kernel tells of an unreachable host only
/// who asks for it.
const ASK: &str = "
import errno, socket, sys, time
kind, address, port, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
family = socket.AF_INET6 if ':' in address else socket.AF_INET
s = socket.socket(family, socket.SOCK_STREAM if kind == 'tcp' else socket.SOCK_DGRAM)
if kind == 'udp':
    level, option = (41, 25) if family == socket.AF_INET6 else (0, 11)
    s.setsockopt(level, option, 1)
s.settimeout(5)
start = time.monotonic()
try:
    s.connect((address, port)); s.send(b'x' * size)
    word = 'ok' if s.recv(70000) else 'closed'
except socket.timeout: word = 'timeout'
except OSError as e: word = errno.errorcode[e.errno]
print(word, int((time.monotonic() - start) * 1000))
";

fn python(host: &Host, program: &str, args: &[&str]) -> std::process::Command {
    let mut command = host.ns.command("python3");
    command.args(["-u", "-c", program]).args(args);
    command
}

fn echo(net: &Net, node: &Node, port: &str) -> Daemon {
    let log = net.dir().join(format!("echo-{}-{port}.txt", node.name));
    let daemon = Daemon::start(python(&node.host, ECHO, &[port]), &log);
    wait_for("the echo program listens", Duration::from_secs(5), || {
        let listening = node.host.ns.run("ss", &["-Hltn", &format!("sport = :{port}")]);
        (!listening.stdout.is_empty()).then_some(())
    });
    daemon
}

/// How an exchange ended, and whether that took less than a second.
fn ask(host: &Host, kind: &str, address: &str, port: &str, size: &str) -> (String, bool) {
    let output =
        process::run(python(host, ASK, &[kind, address, port, size]), Duration::from_secs(10));
    let said = output.success("ask");
    let (word, ms) = said.trim().split_once(' ').unwrap();
    (word.to_owned(), ms.parse::<u64>().unwrap() < 1_000)
}

fn is(word: &str) -> (String, bool) {
    (word.to_owned(), true)
}

fn enforced() {
    let Pair { net, server, alice, bob } = pair();
    let addresses = [bob.ipv4(), bob.ipv6()];
    let _programs =
        [echo(&net, &bob, "8080"), echo(&net, &bob, "9090"), echo(&net, &alice, "8080")];
    for address in &addresses {
        assert_eq!(ask(&alice.host, "udp", address, "9090", "5"), is("ok"), "no rules yet");
    }
    set(&net, &server, WEB_ONLY);
    wait_for("the rules hold", Duration::from_secs(2), || {
        (ask(&alice.host, "tcp", &addresses[0], "9090", "5") == is("EHOSTUNREACH")).then_some(())
    });
    for (address, refused) in addresses.iter().zip(["EHOSTUNREACH", "EACCES"]) {
        assert_eq!(ask(&alice.host, "tcp", address, "8080", "60000"), is("ok"), "{address}");
        assert_eq!(ask(&alice.host, "tcp", address, "9090", "5"), is(refused), "{address}");
        assert_eq!(ask(&alice.host, "udp", address, "8080", "5"), is(refused), "{address}");
        let (word, _) = ask(&alice.host, "udp", address, "9090", "4000");
        assert_eq!(word, "timeout", "fragments are refused in silence");
    }
    // The other way nothing is allowed, and what bob asks for is answered all the same.
    assert_eq!(ask(&bob.host, "tcp", &alice.ipv4(), "8080", "5"), is("EHOSTUNREACH"));
    let ping = alice.host.ns.run("ping", &["-n", "-c", "1", "-W", "2", &addresses[0]]);
    assert!(ping.stdout.contains("Packet filtered"), "{}", ping.stdout);
    let drops = &bob.status().unwrap()["self"]["drops"]["filtered"];
    assert!(drops.as_u64() > Some(5), "every refused packet is counted: {drops}");

    set(&net, &server, WEB_AND_PING);
    ping::assert_answers(&alice.host, &addresses[0]);
    ping::assert_answers(&bob.host, &alice.ipv6());
    server.cli(&["policy", "clear"]).success("policy clear");
    wait_for("everything is allowed again", Duration::from_secs(2), || {
        (ask(&alice.host, "udp", &addresses[0], "9090", "4000") == is("ok")).then_some(())
    });
}

/// Sends a byte every 20 ms and prints a line for each that comes back: `talk ADDRESS PORT`.
const TALK: &str = "
import socket, sys, threading, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def hear():
    while s.recv(100): print('heard')
threading.Thread(target=hear, daemon=True).start()
while True:
    s.send(b'x'); time.sleep(0.02)
";

fn changed() {
    let Pair { net, server, alice, bob } = pair();
    let _program = echo(&net, &bob, "8080");
    let log = net.dir().join("talk.txt");
    let mut talk = Daemon::start(python(&alice.host, TALK, &[&bob.ipv4(), "8080"]), &log);
    let heard = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    wait_for("the connection talks", Duration::from_secs(5), || (heard() > 20).then_some(()));

    // A change that does not forbid it does not disturb it, be it the first one.
    for rules in [WEB_AND_PING, WEB_ONLY] {
        set(&net, &server, rules);
        std::thread::sleep(Duration::from_millis(500));
        let before = heard();
        wait_for("it goes on", Duration::from_secs(2), || (heard() > before + 20).then_some(()));
    }

    server.cli(&["tag", "bob"]).success("no tags");
    let start = now();
    wait_for("a new connection is refused", Duration::from_secs(2), || {
        (ask(&alice.host, "tcp", &bob.ipv4(), "8080", "5") == is("EHOSTUNREACH")).then_some(())
    });
    assert!(start.elapsed() < Duration::from_secs(1), "it took {:?}", start.elapsed());
    let before = heard();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(heard(), before, "the open connection is cut too");
    talk.signal(Signal::SIGKILL);
    talk.wait_exit(Duration::from_secs(5));
}

fn restarted() {
    let Pair { net, mut server, alice, mut bob } = pair();
    let address = bob.ipv4();
    let _programs = [echo(&net, &bob, "8080"), echo(&net, &bob, "9090")];
    set(&net, &server, WEB_ONLY);
    wait_for("the rules hold", Duration::from_secs(2), || {
        (ask(&alice.host, "tcp", &address, "9090", "5") == is("EHOSTUNREACH")).then_some(())
    });
    server.kill();
    bob.kill();
    bob.up_again();
    wait_for("bob lets in what he should", Duration::from_secs(15), || {
        (ask(&alice.host, "tcp", &address, "8080", "5") == is("ok")).then_some(())
    });
    assert_eq!(ask(&alice.host, "tcp", &address, "9090", "5"), is("EHOSTUNREACH"));
    ping::assert_silent(&alice.host, &address);

    // And so does a server that starts again.
    server.run();
    server.wait_ready();
    bob.wait_connected();
    assert_eq!(ask(&alice.host, "tcp", &address, "9090", "5"), is("EHOSTUNREACH"));
    let shown = parse(&server.cli(&["policy", "show", "--json"]).success("policy show"));
    assert_eq!(text(&shown, "/text"), WEB_ONLY);
}

fn offline() {
    let Pair { mut alice, mut bob, net: _net, server: _server } = pair();
    let addresses = [bob.ipv4(), bob.ipv6()];
    bob.stop();
    alice.wait_path("bob", "offline", Duration::from_secs(10));
    for address in &addresses {
        assert_eq!(ask(&alice.host, "tcp", address, "80", "5"), is("EHOSTUNREACH"), "{address}");
        assert_eq!(ask(&alice.host, "udp", address, "80", "5"), is("EHOSTUNREACH"), "{address}");
    }
    let start = now();
    let ping = alice.host.ns.run("ping", &["-n", "-c", "1", "-W", "5", &addresses[0]]);
    assert!(ping.stdout.contains("Destination Host Unreachable"), "{}", ping.stdout);
    assert!(start.elapsed() < Duration::from_secs(1), "it took {:?}", start.elapsed());
    bob.up_again();
    ping::assert_answers(&alice.host, &addresses[0]);
}

fn nobody() {
    let Pair { alice, bob, net: _net, server: _server } = pair();
    let address = bob.ipv4();
    let (prefix, last) = address.rsplit_once('.').unwrap();
    let unused = format!("{prefix}.{}", last.parse::<u8>().unwrap() + 100);
    assert_eq!(ask(&alice.host, "tcp", &unused, "80", "5"), is("EHOSTUNREACH"));
    assert_eq!(ask(&alice.host, "udp", &unused, "80", "5"), is("EHOSTUNREACH"));
}

fn commands() {
    let net = Net::new();
    let server = Server::start(&net, &net.machine("server", Nat::None));
    let file = net.dir().join("policy.toml");
    let name = path(&file);
    let policy = |command: &str, rules: &str| {
        fs::write(&file, rules).unwrap();
        server.cli(&["policy", command, &name])
    };
    let failing = format!(
        "{WEB_ONLY}[[tests]]\nfrom = 'alice'\nto = 'tag:web'\nprotocol = 'tcp'\nport = 8080\n\
         expect = 'allow'\n[[tests]]\nfrom = 'alice'\nto = 'tag:web'\nprotocol = 'tcp'\n\
         port = 22\nexpect = 'allow'\n"
    );
    let passing = failing.replace("port = 22\nexpect = 'allow'", "port = 22\nexpect = 'refuse'");
    for command in ["check", "test", "set"] {
        let wrong = policy(command, "[groups]\nweb = 'tag:web'\n[[rule]]\n");
        assert_error(&wrong, &[2], &["policy.toml:3:3: unknown key \"rule\"; did you mean"]);
        let missing = server.cli(&["policy", command, "/nonexistent"]);
        assert_error(&missing, &[2], &["there is no file /nonexistent"]);
    }
    assert!(policy("check", &failing).success("check").contains("1 rules, 2 tests"));
    for command in ["test", "set"] {
        let failed = policy(command, &failing);
        assert_error(&failed, &[1], &["1 of 2 tests fail"]);
        assert!(failed.stdout.contains("FAIL  line 14: alice to tag:web: tcp/22: allow"));
    }
    let shown = parse(&server.cli(&["policy", "show", "--json"]).success("show"));
    assert!(shown["text"].is_null(), "nothing was set: {shown}");
    assert!(policy("test", &passing).success("test").contains("all 2 tests pass"));
    policy("set", &passing).success("set");
    let shown = server.cli(&["policy", "show"]).success("show");
    assert_eq!(shown.trim(), passing.trim());
    assert_error(&server.cli(&["tag", "nobody", "web"]), &[5], &["nobody"]);
    assert_error(&server.cli(&["tag", "nobody", "a b"]), &[2], &["is no tag"]);
    let invite = server.invite(&["--tag", "web", "--tag", "tag:db"]);
    let list = parse(&server.cli(&["invite", "list", "--json"]).success("list"));
    let listed = list["invites"].as_array().unwrap().iter().find(|i| i["id"] == invite["id"]);
    assert_eq!(listed.unwrap()["tags"], serde_json::json!(["db", "web"]));
}
