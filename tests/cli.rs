//! The command line as it was promised: commands, flags, exit codes, errors, and what the README
//! says of them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use clap::CommandFactory;
use overlay::cli::{Cli, fail};

const BINARY: &str = env!("CARGO_BIN_EXE_overlay");
const README: &str = include_str!("../README.md");

/// Every command with the arguments that it has for ever. Others may come; none of these may go.
const CONTRACT: &[(&str, &[&str])] = &[
    ("server", &["--config", "--listen", "--public-addr", "--state-dir", "--socket"]),
    ("server invite", &["--uses", "--ttl", "--name", "--json", "--socket"]),
    ("server invite list", &["--json", "--socket"]),
    ("server invite revoke", &["ID", "--socket"]),
    ("server nodes", &["--json", "--socket"]),
    ("server remove", &["NODE", "--socket"]),
    ("server rename", &["NODE", "NAME", "--socket"]),
    (
        "up",
        &[
            "JOINLINE",
            "--config",
            "--state-dir",
            "--socket",
            "--interface",
            "--listen-port",
            "--mtu",
            "--name",
        ],
    ),
    ("down", &["--socket"]),
    ("status", &["--json", "--watch", "--socket"]),
    ("ping", &["PEER", "-c", "--json", "--until-direct", "--timeout", "--socket"]),
    ("why", &["PEER", "--json", "--socket"]),
    ("history", &["PEER", "--json", "--socket"]),
    ("netcheck", &["--json", "--socket"]),
    ("ip", &["PEER", "--socket"]),
    ("service install", &["node", "server", "JOINLINE"]),
    ("service uninstall", &["node", "server"]),
    ("service status", &["node", "server"]),
    ("lab", &["--nat", "--delay", "--loss", "--block-udp", "--check", "--json"]),
    ("config check", &["F"]),
    ("completions", &["SHELL"]),
    ("man", &["DIR"]),
    ("version", &["--json"]),
];

/// Runs the program without settings of whoever runs the tests.
fn overlay(line: &str) -> Command {
    let mut command = Command::new(BINARY);
    command.args(line.split_whitespace());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OVERLAY_") {
            command.env_remove(name);
        }
    }
    command
}

fn words(text: &str) -> BTreeSet<&str> {
    let inside = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    text.split(|c| !inside(c)).filter(|word| !word.is_empty()).collect()
}

#[test]
fn the_help_of_every_command_lists_what_was_promised() {
    for (command, arguments) in CONTRACT {
        let output = overlay(&format!("{command} --help")).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{command} --help");
        let help = String::from_utf8(output.stdout).unwrap();
        let listed = words(&help);
        for argument in *arguments {
            assert!(listed.contains(argument), "{command} has no {argument}:\n{help}");
        }
    }
}

#[test]
fn the_table_of_the_readme_names_every_command() {
    let spans: Vec<&str> = README
        .lines()
        .filter(|line| line.starts_with("| `"))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .collect();
    let named: BTreeSet<&str> = spans.iter().flat_map(|span| words(span)).collect();
    let mut found = 0;
    let mut open: Vec<clap::Command> = Cli::command().get_subcommands().cloned().collect();
    while let Some(command) = open.pop() {
        // The commands inside a lab and of a configuration file are told by their own help.
        if command.get_name() != "lab" {
            open.extend(command.get_subcommands().cloned());
        }
        assert!(named.contains(command.get_name()), "{} is not in the table", command.get_name());
        found += 1;
    }
    assert!(found >= CONTRACT.len(), "only {found} commands were looked at");
}

#[test]
fn the_exit_codes_of_the_readme_are_those_of_the_program() {
    let codes = [
        (fail::OK, "ok"),
        (fail::FAILED, "failed"),
        (fail::USAGE, "usage"),
        (fail::NOT_RUNNING, "not running"),
        (fail::PERMISSION, "no permission"),
        (fail::UNKNOWN_PEER, "unknown peer"),
        (fail::NO_REPLY, "no reply"),
        (fail::ONLY_RELAYED, "only relayed"),
        (fail::NOT_ENROLLED, "not enrolled"),
    ];
    let constants = include_str!("../src/daemon/exit.rs").matches("pub const ").count();
    assert_eq!(codes.len(), constants, "this test knows every code");
    let text = README.split("Exit codes: ").nth(1).expect("the README tells the exit codes");
    let text = text.split('.').next().unwrap().replace('\n', " ");
    let expected: Vec<String> = codes.iter().map(|(code, word)| format!("{code} {word}")).collect();
    assert_eq!(text, expected.join(", "));
}

#[test]
fn the_examples_of_configuration_files_are_good_ones() {
    for name in ["node.toml", "server.toml"] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name);
        let output = overlay("config check").arg(file).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
    }
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/policy.toml");
    let output = overlay("server policy test").arg(rules).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "policy.toml: {output:?}");
}

/// The rules in the README are good ones, and their test passes.
#[test]
fn the_access_rules_in_the_readme_are_good_ones() {
    let section = README.split("## Access rules").nth(1).expect("there is such a section");
    let lines = section.lines().skip_while(|line| !line.starts_with("    "));
    let text: Vec<&str> =
        lines.take_while(|line| line.is_empty() || line.starts_with("    ")).collect();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("policy.toml");
    fs::write(&file, text.join("\n")).unwrap();
    let output = overlay("server policy test").arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("all 1 tests pass"), "{output:?}");
}

/// What is allowed and hardly meant is told, and changes no exit code.
#[test]
fn a_rule_for_nobody_is_warned_of_and_any_in_a_group_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("policy.toml");
    let look = |text: &str, command: &str| {
        fs::write(&file, text).unwrap();
        overlay(&format!("server policy {command}")).arg(&file).output().unwrap()
    };
    let nobody = "[[rules]]\nfrom = []\nto = 'any'\nprotocol = 'any'\n";
    for command in ["check", "test"] {
        let output = look(nobody, command);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("# warning: line 2: the rule matches nobody"), "{said}");
    }
    let output = look("[groups]\nx = ['any']\n", "check");
    let said = assert_failure("any in a group", &output, fail::USAGE);
    assert!(said.contains("policy.toml:2:5") && said.contains("every member"), "{said}");
}

/// Checks that `output` is an error of three parts with this exit code, and returns the text.
fn assert_failure(what: &str, output: &Output, code: u8) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code.into()), "{what}\n{text}");
    for part in ["error: ", "cause: ", "help: "] {
        let said = text.lines().filter(|line| line.starts_with(part) && line.len() > part.len());
        assert_eq!(said.count(), 1, "{what}: one line starts with `{part}`\n{text}");
    }
    assert!(output.stdout.is_empty(), "{what}: stdout is for data");
    text
}

#[test]
fn every_failure_says_what_and_why_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = dir.path().join("nothing.sock");
    let nothing = nothing.display();
    let bad = dir.path().join("server.toml");
    fs::write(&bad, "lisen = []\n").unwrap();
    let bad = bad.display();
    let range = dir.path().join("node.toml");
    fs::write(&range, "rekey-after-s = 121\n").unwrap();
    let range = range.display();
    let cases = [
        (String::new(), fail::USAGE),
        ("upp".into(), fail::USAGE),
        ("ping".into(), fail::USAGE),
        ("server".to_owned() + " --listen nowhere", fail::USAGE),
        ("up --mtu many".into(), fail::USAGE),
        ("up --interface= --state-dir /nonexistent".into(), fail::USAGE),
        ("up --interface a/b --state-dir /nonexistent".into(), fail::USAGE),
        ("why".into(), fail::USAGE),
        (format!("why bob --socket {nothing}"), fail::NOT_RUNNING),
        (format!("history bob --socket {nothing}"), fail::NOT_RUNNING),
        ("lab --nat cone".into(), fail::USAGE),
        (format!("up hello --state-dir {nothing}"), fail::USAGE),
        (format!("up file:{nothing} --state-dir {nothing}"), fail::USAGE),
        (format!("config check {bad}"), fail::USAGE),
        (format!("config check {nothing}"), fail::USAGE),
        (format!("server --config {bad}"), fail::USAGE),
        (format!("up --config {nothing}"), fail::USAGE),
        (format!("config check {}", dir.path().display()), fail::FAILED),
        ("config check /dev/zero".into(), fail::FAILED),
        ("up --config /dev/zero".into(), fail::FAILED),
        ("server --config /dev/zero".into(), fail::FAILED),
        ("server policy check /dev/zero".into(), fail::FAILED),
        (format!("config check {range}"), fail::USAGE),
        (format!("up --config {range}"), fail::USAGE),
        (format!("status --socket {nothing}"), fail::NOT_RUNNING),
        (format!("server nodes --socket {nothing}"), fail::NOT_RUNNING),
        (format!("lab exec --pid {} alice", i32::MAX), fail::NOT_RUNNING),
        (
            format!("up --state-dir {0}/state --socket {0}/x.sock", dir.path().display()),
            fail::NOT_ENROLLED,
        ),
    ];
    for (line, code) in cases {
        let output = overlay(&line).env("XDG_RUNTIME_DIR", dir.path()).output().unwrap();
        assert_failure(&format!("overlay {line}"), &output, code);
    }
}

#[test]
fn a_command_asks_on_the_socket_that_the_configuration_file_names() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("elsewhere.sock");
    for (file, line) in [("node.toml", "status"), ("server.toml", "server nodes")] {
        let file = dir.path().join(file);
        fs::write(&file, format!("socket = \"{}\"\n", socket.display())).unwrap();
        let places = [("CONFIGURATION_DIRECTORY", dir.path()), ("OVERLAY_CONFIG", file.as_path())];
        for (variable, value) in places {
            let output = overlay(line).env(variable, value).output().unwrap();
            let text = assert_failure(line, &output, fail::NOT_RUNNING);
            assert!(text.contains("elsewhere.sock"), "{variable}: {text}");
        }
    }
}

#[test]
fn the_file_of_the_other_daemon_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("some.toml");
    let cases = [
        ("listen = [\"127.0.0.1:0\"]\n", "setting of a server", ["status", "up"]),
        ("interface = \"x0\"\n", "setting of a node", ["server nodes", "server"]),
    ];
    for (text, said, lines) in cases {
        fs::write(&file, text).unwrap();
        let good = overlay(&format!("config check {}", file.display())).output().unwrap();
        assert_eq!(good.status.code(), Some(0), "of its own kind it is good: {good:?}");
        for line in lines {
            let output = overlay(line).env("OVERLAY_CONFIG", &file).output().unwrap();
            let told = assert_failure(line, &output, fail::USAGE);
            assert!(told.contains(said) && told.contains("some.toml:1:1"), "{line}: {told}");
        }
    }
}

/// A node that is killed while it answers: what came before is told, and not taken for all.
#[test]
fn a_ping_whose_node_vanishes_has_failed() {
    let reply = r#"{"ok":{"seq":1,"name":"bob","ipv4":"10.77.0.2","rtt_ms":1.5,"kind":"direct","remote":null}}"#;
    let end = r#"{"ok":null}"#;
    let cases = [
        (vec![reply], fail::FAILED),
        (vec![], fail::FAILED),
        (vec![reply, end], fail::OK),
        (vec![end], fail::NO_REPLY),
    ];
    for (said, code) in cases {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("node.sock");
        // Somebody goes on to listen, like a node with no place left for a command.
        let listener = UnixListener::bind(&socket).unwrap();
        let line = format!("ping bob --socket {}", socket.display());
        let ping = overlay(&line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stream, _) = listener.accept().unwrap();
        BufReader::new(&stream).read_line(&mut String::new()).unwrap();
        said.iter().for_each(|line| writeln!(&stream, "{line}").unwrap());
        drop(stream);
        let output = ping.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code.into()), "{said:?}: {text}");
        assert_eq!(text.contains("hung up"), code == fail::FAILED, "{said:?}: {text}");
        let summary = String::from_utf8_lossy(&output.stdout);
        assert!(summary.contains(" received"), "what was received is told: {summary}");
    }
}

/// A command whose answers go on, and whose daemon is gone in the middle of them.
#[test]
fn a_daemon_that_ends_while_it_is_asked_is_one_that_does_not_run() {
    let status = r#"{"schema":1,"self":{"id":"00000001","name":"alice","ipv4":"10.77.0.1",
        "ipv6":"fd00::1","interface":"overlay0","mtu":1280,"listen_port":4711,"public_key":"",
        "network":"","drops":{},"version":""},"server":{"state":"connected","address":null,
        "rtt_ms":null},"peers":[]}"#;
    let status = format!("{{\"ok\":{}}}", status.replace('\n', ""));
    let reply = r#"{"ok":{"seq":1,"name":"bob","ipv4":"10.77.0.2","rtt_ms":1.5,"kind":"direct","remote":null}}"#;
    for (line, said) in [
        ("ping bob", reply),
        ("status --watch", &status),
        ("server events --follow", r#"{"ok":{"events":[]}}"#),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("daemon.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = overlay(&format!("{line} --socket {}", socket.display()));
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stream, _) = listener.accept().unwrap();
        BufReader::new(&stream).read_line(&mut String::new()).unwrap();
        writeln!(&stream, "{said}").unwrap();
        drop((stream, listener));
        let output = command.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(fail::NOT_RUNNING.into()), "{line}: {text}");
    }
}

/// Both daemons know some of the same questions, and none of the other's answers.
#[test]
fn a_command_that_meets_the_other_daemon_says_which_one_that_is() {
    let node = r#"{"ok":{"schema":1,"self":{"id":"00000001"},"peers":[]}}"#;
    let server = r#"{"ok":{"status":{"schema":1}}}"#;
    let refused = r#"{"error":{"code":2,"error":"?","cause":"not understood","help":"?"}}"#;
    for (line, first, second, said) in [
        ("status", server, server, "a server answers on this socket"),
        ("why bob", refused, server, "a server answers on this socket"),
        ("down", refused, server, "a server answers on this socket"),
        ("server status", node, node, "a node answers on this socket"),
        ("server nodes", refused, node, "a node answers on this socket"),
        // Of its own kind it is as the daemon says.
        ("server nodes", refused, server, "not understood"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("daemon.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = overlay(&format!("{line} --socket {}", socket.display()));
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut streams = Vec::new();
        for answer in [first, second] {
            let (stream, _) = listener.accept().unwrap();
            BufReader::new(&stream).read_line(&mut String::new()).unwrap();
            writeln!(&stream, "{answer}").unwrap();
            streams.push(stream);
        }
        let text = assert_failure(line, &command.wait_with_output().unwrap(), fail::USAGE);
        assert!(text.contains(said), "{line}: {text}");
        let named = text.contains(&socket.display().to_string());
        assert_eq!(named, said.contains("socket"), "{line}: {text}");
    }
}

/// A node that is started on the socket of another one, or of a server.
#[test]
fn a_second_node_on_the_socket_of_another_daemon_is_told_whose_it_is() {
    let line = include_str!("golden/join-line.txt").trim();
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = dir.path().join("elsewhere");
    let node = |state: &Path| {
        serde_json::json!({"ok": {"self": {"state_dir": state}, "peers": []}}).to_string()
    };
    let server = r#"{"ok":{"status":{}}}"#.to_owned();
    for (answer, code, said) in [
        (node(&elsewhere), fail::FAILED, ["another node", elsewhere.to_str().unwrap()]),
        (node(dir.path()), fail::FAILED, ["already runs", "overlay down"]),
        (server, fail::USAGE, ["a server answers", "leave --socket"]),
    ] {
        let socket = dir.path().join("daemon.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = overlay(&format!("up {line} --socket {}", socket.display()));
        command.arg("--state-dir").arg(dir.path().join("."));
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // The first one only looks whether somebody listens.
        drop(listener.accept().unwrap());
        let (stream, _) = listener.accept().unwrap();
        BufReader::new(&stream).read_line(&mut String::new()).unwrap();
        writeln!(&stream, "{answer}").unwrap();
        let output = command.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code.into()), "{text}");
        assert!(said.iter().all(|said| text.contains(said)), "{said:?}: {text}");
        fs::remove_file(socket).unwrap();
    }
}

/// The line of an invite is a secret, also where it was typed in the wrong place.
#[test]
fn no_error_repeats_a_join_line() {
    let line = include_str!("golden/join-line.txt").trim();
    for typed in [
        format!("up {line} {line}"),
        format!("up --config {line}"),
        format!("up {line}x --state-dir /nonexistent"),
        format!("up file:{line} --state-dir /nonexistent"),
        format!("service install {line}"),
        format!("config check {line}"),
        line.to_uppercase(),
    ] {
        let output = overlay(&typed).output().unwrap();
        let text = assert_failure("a join line", &output, fail::USAGE).to_lowercase();
        assert!(!text.contains(&line[..12]), "{text}");
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for line in ["--help", "--version", "server --help", "server invite -h"] {
        let output = overlay(line).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{line}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{line}: {output:?}");
    }
}

#[test]
fn a_configuration_that_may_not_be_read_is_a_missing_right() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    // A user without rights may not be allowed to enter the folder of the build.
    let copy = dir.path().join("overlay");
    fs::copy(BINARY, &copy).unwrap();
    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::set_permissions(&home, Permissions::from_mode(0o000)).unwrap();
    let named = home.join("server.toml");
    let named = named.to_str().unwrap();
    for args in
        [&["up"][..], &["server"], &["server", "--config", named], &["config", "check", named]]
    {
        let mut command = Command::new(&copy);
        command.args(args).env_clear().env("HOME", &home);
        if nix::unistd::geteuid().is_root() {
            command.uid(65534).gid(65534);
        }
        // While another test starts a program, that one has the copy open for writing for a moment.
        let output = (0..100).find_map(|_| match command.output() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(std::time::Duration::from_millis(20));
                None
            }
            output => Some(output.unwrap()),
        });
        let output = output.expect("nobody writes to a program for two seconds");
        let text = assert_failure(&args.join(" "), &output, fail::PERMISSION);
        assert!(text.contains("cause: cannot read "), "{text}");
        assert!(text.contains("sudo"), "{text}");
    }
    fs::set_permissions(&home, Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_file_without_end_is_no_join_line() {
    assert_no_join_line("file:/dev/zero", "");
}

/// Who pastes a line into a terminal does not end the input.
#[test]
fn a_join_line_on_standard_input_ends_with_its_line() {
    assert_no_join_line("-", "\nhello\n");
}

/// Has `up` take no join line, although its input goes on without end.
fn assert_no_join_line(argument: &str, input: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = overlay(&format!("up {argument} --state-dir"));
    command.arg(dir.path()).arg("--socket").arg(dir.path().join("socket"));
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    let ended = (0..200).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        child.try_wait().unwrap()
    });
    // It would go on to wait, or to eat all memory.
    child.kill().unwrap();
    drop(stdin);
    assert_eq!(ended.and_then(|status| status.code()), Some(i32::from(fail::USAGE)));
}
