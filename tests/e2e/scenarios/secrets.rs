//! No secret is where it does not belong: a whole story is played with everything logged, and all
//! that it left is searched.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use data_encoding::{BASE32_NOPAD, BASE64, BASE64URL_NOPAD, HEXLOWER};
use nix::sys::signal::Signal;

use crate::case::Case;
use crate::clock::wait_for;
use crate::lab::{Host, Net};
use crate::nat::Nat;
use crate::overlay::{Node, PORT, Server, binary, parse, path, text};
use crate::process::{self, Daemon};
use crate::{ping, sandbox};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("secrets::no_secret_is_where_it_does_not_belong", story),
        Case::new("secrets::a_planted_secret_is_found_in_every_form", planted),
        Case::new("secrets::no_core_file_and_no_look_from_outside", no_core),
    ]
}

/// Everything that anybody could want to know, of the libraries too.
const LOG_ALL: &str =
    "OVERLAY_LOG=trace,boringtun=trace,netlink_proto=trace,hyper=trace,sqlx=trace";

/// A secret, and all forms in which it is looked for.
#[derive(Clone)]
struct Secret {
    name: String,
    forms: Vec<(&'static str, Vec<u8>)>,
}

impl Secret {
    /// Of a key or the like. Its first 15 bytes will do: in a larger thing, too, they are whole
    /// characters of every alphabet.
    fn bytes(name: &str, secret: &[u8]) -> Self {
        let start = &secret[..15];
        let decimal = |between: &str| {
            start.iter().map(ToString::to_string).collect::<Vec<_>>().join(between).into_bytes()
        };
        let escaped = |bytes: &[u8]| {
            bytes.iter().flat_map(|byte| std::ascii::escape_default(*byte)).collect::<Vec<u8>>()
        };
        let base32 = BASE32_NOPAD.encode(start);
        let forms = vec![
            ("raw", start.to_vec()),
            ("hexadecimal", HEXLOWER.encode(start).into_bytes()),
            ("base64", BASE64.encode(start).into_bytes()),
            ("base64url", BASE64URL_NOPAD.encode(start).into_bytes()),
            ("base32", base32.clone().into_bytes()),
            ("base32 in small letters", base32.to_lowercase().into_bytes()),
            ("decimal numbers", decimal(", ")),
            ("decimal numbers without blanks", decimal(",")),
            ("escaped bytes", escaped(start)),
        ];
        Self { name: name.into(), forms }
    }

    /// Of a text: as it is, and what it stands for.
    fn text(name: &str, secret: &str) -> Self {
        Self { name: name.into(), forms: vec![("text", secret.as_bytes().to_vec())] }
    }

    fn found_in(&self, place: &[u8]) -> Option<&'static str> {
        let there = |form: &[u8]| place.windows(form.len()).any(|window| same(window, form));
        self.forms.iter().find(|(_, form)| there(form)).map(|(name, _)| *name)
    }
}

/// Hexadecimal numbers are written in letters of both sizes.
fn same(window: &[u8], form: &[u8]) -> bool {
    // Most places differ in the first byte.
    window[0].eq_ignore_ascii_case(&form[0]) && window.eq_ignore_ascii_case(form)
}

/// Searches for all secrets but those of these names.
fn search(what: &str, place: &[u8], secrets: &[Secret], allowed: &[&str], found: &mut Vec<String>) {
    for secret in secrets.iter().filter(|secret| !allowed.contains(&secret.name.as_str())) {
        if let Some(form) = secret.found_in(place) {
            found.push(format!("{} in {what} ({form})", secret.name));
        }
    }
}

fn planted() {
    let secret: Vec<u8> = (0..32_u8).map(|number| number.wrapping_mul(83) ^ 0xa5).collect();
    let known = [Secret::bytes("key", &secret)];
    assert!(known[0].forms.len() >= 9);
    // As others would write it: the whole of it, and something around it.
    let debug = format!("{secret:?}");
    let whole = [
        secret.clone(),
        format!("key={}", data_encoding::HEXUPPER.encode(&secret)).into_bytes(),
        format!("key={}", HEXLOWER.encode(&secret)).into_bytes(),
        format!("\"{}\"", BASE64.encode(&secret)).into_bytes(),
        format!("?{}", BASE64URL_NOPAD.encode(&secret)).into_bytes(),
        format!("ovl1_{}", BASE32_NOPAD.encode(&secret)).into_bytes(),
        debug.clone().into_bytes(),
        debug.replace(' ', "").into_bytes(),
        secret.iter().flat_map(|byte| std::ascii::escape_default(*byte)).collect(),
    ];
    for content in whole {
        let mut place = b"before ".to_vec();
        place.extend(&content);
        let mut found = Vec::new();
        search("a file", &place, &known, &[], &mut found);
        assert_eq!(found.len(), 1, "not found: {}", String::from_utf8_lossy(&content));
        search("a file", &place, &known, &["key"], &mut found);
        assert_eq!(found.len(), 1, "where it is allowed it is no finding");
    }
    // Also by those who watch the processes.
    let watch = Watch::start();
    let mut command = Command::new("sleep");
    command.arg("0.3").env("SOMETHING", HEXLOWER.encode(&secret));
    process::run(command, Duration::from_secs(5));
    let mut found = Vec::new();
    search("environments", &watch.end(), &known, &[], &mut found);
    assert_eq!(found.len(), 1, "the environment of a process is seen");
}

/// Reads the words and the environment of every process, as often as it can.
struct Watch {
    seen: Arc<Mutex<BTreeSet<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Watch {
    fn start() -> Self {
        let (seen, stop) = (Arc::<Mutex<BTreeSet<_>>>::default(), Arc::<AtomicBool>::default());
        let (into, until) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                for entry in fs::read_dir("/proc").unwrap().flatten() {
                    for file in ["cmdline", "environ"] {
                        if let Ok(content) = fs::read(entry.path().join(file)) {
                            into.lock().unwrap().insert(content);
                        }
                    }
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
        Self { seen, stop, thread }
    }

    fn end(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.seen.lock().unwrap().iter().flatten().copied().collect()
    }
}

/// The secrets of a join line: itself, and the 20 bytes in it that prove the invitation.
fn invitation(name: &str, line: &str) -> Vec<Secret> {
    let body = line.strip_prefix("ovl1_").expect("a join line").to_uppercase();
    let bytes = BASE32_NOPAD.decode(body.as_bytes()).unwrap();
    // In CBOR, a string of 20 bytes; the only one.
    let at: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] == 0x54).collect();
    let at = at.into_iter().rfind(|at| at + 21 <= bytes.len()).expect("the invite's secret");
    vec![Secret::bytes(name, &bytes[at + 1..at + 21]), Secret::text(name, line)]
}

fn node_keys(name: &str, dir: &Path) -> Vec<Secret> {
    let keys = parse(&fs::read_to_string(dir.join("state/node.key")).unwrap());
    let key = |which: &str| {
        let bytes = BASE64.decode(text(&keys, which).as_bytes()).unwrap();
        Secret::bytes(&format!("{name}{which}"), &bytes)
    };
    vec![key("/machine_key"), key("/node_key")]
}

fn verbose(host: &Host) -> Command {
    let mut command = host.ns.command("env");
    command.arg(LOG_ALL);
    command
}

/// All files below a directory.
fn files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files(&entry.path(), into);
        } else if kind.is_file() {
            into.push(entry.path());
        }
    }
}

/// What a person asks a server and a node.
const SERVER_QUESTIONS: [&[&str]; 8] = [
    &["nodes", "--json"],
    &["nodes"],
    &["invite", "list"],
    &["invite", "list", "--json"],
    &["status", "--json"],
    &["events", "--json"],
    &["policy", "show"],
    &["remove", "nobody"],
];
const NODE_QUESTIONS: [&[&str]; 8] = [
    &["status", "--json"],
    &["status"],
    &["netcheck", "--json"],
    &["ip"],
    &["why", "bob", "--json"],
    &["history", "bob", "--json"],
    &["ping", "bob", "-c", "1", "--json"],
    &["ping", "nobody"],
];

fn story() {
    let net = Net::new();
    let hub = net.machine("hub", Nat::None);
    let at = format!("{}:{PORT}", hub.address);
    let config = "metrics = \"127.0.0.1:9586\"\n";
    let mut server = Server::prepare(&net, &hub, "server", &[&at], &[&at], config);
    let watch = Watch::start();
    server.run_by(verbose(&hub));
    server.wait_ready();

    let mut secrets = Vec::new();
    let mut invite = |server: &Server, flags: &[&str]| {
        let line = text(&server.invite(flags), "/join");
        secrets.extend(invitation("an invitation", &line));
        line
    };
    // Between these two only the relay leads.
    let mut nodes: Vec<Node> = ["alice", "bob", "carol"]
        .map(|name| {
            let nat = if name == "carol" { Nat::None } else { Nat::Symmetric };
            Node::with_config(&net, &net.machine(name, nat), name, "metrics = \"127.0.0.1:9587\"\n")
        })
        .into();
    for node in &mut nodes {
        let line = invite(&server, &["--ttl", "10m"]);
        let words = node.up_args(&line);
        let mut command = verbose(&node.host);
        command.arg(binary()).args(words);
        node.up_by(command);
        node.wait_connected();
    }
    let [alice, bob, carol] = &mut nodes[..] else { unreachable!() };
    ping::assert_answers(&alice.host, &bob.ipv4());
    ping::assert_answers(&alice.host, &carol.ipv4());

    // Updates, errors, removal.
    let mut told: Vec<(String, String)> = Vec::new();
    let mut ask = |who: &str, output: process::Output| {
        told.push((format!("an answer of {who}"), format!("{}{}", output.stdout, output.stderr)));
    };
    ask("the server", server.cli(&["rename", "carol", "caroline"]));
    ask("the server", server.cli(&["tag", "bob", "office"]));
    let invited = server.invite(&[]);
    let (revoked, id) = (text(&invited, "/join"), text(&invited, "/id"));
    secrets.extend(invitation("an invitation", &revoked));
    ask("the server", server.cli(&["invite", "revoke", &id]));
    let dave = Node::new(&net, &net.machine("dave", Nat::None));
    for line in
        [&revoked, &lines_of(&secrets)[0], &format!("{revoked}a"), &revoked.replace('a', "b")]
    {
        let mut command = verbose(&dave.host);
        command.arg(binary()).args(dave.up_args(line));
        let output = process::run(command, Duration::from_secs(30));
        assert_ne!(output.code, Some(0), "{output:?}");
        ask("a node that is not let in", output);
    }
    for words in SERVER_QUESTIONS {
        ask("the server", server.cli(words));
    }
    for node in [&*alice, bob, carol] {
        for words in NODE_QUESTIONS {
            ask(&node.name, node.cli(words));
        }
    }
    for (host, port) in [(&hub, 9586), (&alice.host, 9587)] {
        let page = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{port}; printf 'GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3; cat <&3"
        );
        let page = host.ns.run("bash", &["-c", &page]);
        assert!(page.stdout.contains("overlay_"), "{page:?}");
        ask("Prometheus", page);
    }
    let backup = net.dir().join("backup");
    let warned = server.cli(&["backup", &path(&backup)]);
    assert!(warned.stderr.contains("secret key"), "a backup warns: {warned:?}");
    ask("the server", warned);
    assert_eq!(fs::metadata(&backup).unwrap().permissions().mode() & 0o777, 0o600);

    for node in [&*alice, bob, carol] {
        secrets.extend(node_keys(&node.name, &node.dir));
    }
    let key = fs::read_to_string(net.dir().join("server/state/server.key")).unwrap();
    let key = BASE64.decode(key.trim().as_bytes()).unwrap();
    secrets.push(Secret::bytes("the server's key", &key));

    server.cli(&["remove", "bob"]).success("remove");
    bob.daemon().wait_exit(Duration::from_secs(20));
    alice.stop();
    carol.kill();
    alice.up_again();
    alice.wait_connected();
    alice.stop();
    server.stop();

    assert_clean(&net, &watch.end(), &told, &secrets);
}

/// Searches all that was seen of processes, said by commands and left in files.
fn assert_clean(net: &Net, processes: &[u8], told: &[(String, String)], secrets: &[Secret]) {
    let mut found = Vec::new();
    search("words or environment of a process", processes, secrets, &[], &mut found);
    for (what, said) in told {
        search(what, said.as_bytes(), secrets, &[], &mut found);
    }
    let mut places = Vec::new();
    files(net.dir(), &mut places);
    let mut logged = 0;
    for place in &places {
        let content = fs::read(place).unwrap();
        let name = path(place.strip_prefix(net.dir()).unwrap());
        // The one place of each secret; a join line lies where this test has put it.
        let own = name.split('/').next().unwrap_or_default();
        let (machine, node) = (format!("{own}/machine_key"), format!("{own}/node_key"));
        let allowed: Vec<&str> = match name.rsplit('/').next().unwrap_or_default() {
            "join" => vec!["an invitation"],
            "server.key" | "server.key.bak" | "backup" => vec!["the server's key"],
            "node.key" | "node.key.bak" => vec![&machine, &node],
            _ => vec![],
        };
        logged += usize::from(name.ends_with(".log")) * content.len();
        search(&name, &content, secrets, &allowed, &mut found);
    }
    assert!(logged > 200_000, "the most is logged, and not {logged} bytes");
    let mut key = Vec::new();
    search("the backup", &fs::read(net.dir().join("backup")).unwrap(), secrets, &[], &mut key);
    assert_eq!(key.len(), 1, "what is in the backup is seen: {key:?}");
    eprintln!("{} secrets, {} files, {logged} bytes of logs", secrets.len(), places.len());
    assert!(found.is_empty(), "secrets where they do not belong: {found:#?}");
}

/// The join lines among the secrets.
fn lines_of(secrets: &[Secret]) -> Vec<String> {
    let forms = secrets.iter().flat_map(|secret| &secret.forms);
    let lines = forms.filter(|(form, _)| *form == "text");
    lines.map(|(_, line)| String::from_utf8(line.clone()).unwrap()).collect()
}

/// Aborts both daemons where core files are wanted.
fn no_core() {
    let net = Net::new();
    let hub = net.machine("hub", Nat::None);
    let at = format!("{}:{PORT}", hub.address);
    let wants_core = |host: &Host| {
        let mut command = host.ns.command("sh");
        command.args(["-c", "ulimit -c unlimited 2>/dev/null; exec \"$@\"", "sh"]);
        command
    };
    let mut server = Server::prepare(&net, &hub, "server", &[&at], &[&at], "");
    server.run_by(wants_core(&hub));
    server.wait_ready();
    let mut alice = Node::new(&net, &net.machine("alice", Nat::None));
    let words = alice.up_args(&server.join());
    let mut command = wants_core(&alice.host);
    command.arg(binary()).args(words);
    alice.up_by(command);
    alice.wait_connected();
    for daemon in [server.daemon(), alice.daemon()] {
        assert_private(daemon);
        daemon.signal(Signal::SIGABRT);
        let (status, _) = wait_for("the end", Duration::from_secs(10), || daemon.exit());
        assert_eq!(status.signal(), Some(Signal::SIGABRT as i32));
        assert!(!status.core_dumped(), "it has left a core file");
    }
    if !sandbox::is_real_root() {
        return;
    }
    // A process that may be looked into belongs to its user, and one that may not to root.
    let copy = net.dir().join("overlay");
    fs::copy(binary(), &copy).unwrap();
    let home = net.dir().join("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(65534), Some(65534)).unwrap();
    let mut command = hub.ns.command("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    command.env("HOME", &home).env_remove("XDG_CONFIG_HOME").arg(&copy).args([
        "server",
        "--listen",
        &at,
        "--state-dir",
        &path(&home.join("state")),
    ]);
    command.args(["--socket", &path(&home.join("socket"))]);
    let daemon = Daemon::start(command, &net.log_file("stranger"));
    wait_for("it runs", Duration::from_secs(10), || home.join("socket").exists().then_some(()));
    let owner = |file: &str| fs::metadata(format!("/proc/{}/{file}", daemon.id())).unwrap().uid();
    assert_eq!(owner("mem"), 0, "its user can read its memory");
    fs::remove_file(&copy).unwrap();
}

fn assert_private(daemon: &Daemon) {
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(&words[4..6], ["0", "0"], "{line}");
}
