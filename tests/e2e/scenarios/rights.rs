//! Who may do what on a machine with both services, and what its programs open to others.

use std::collections::BTreeSet;

use crate::case::{Case, Needs};
use crate::container::Container;
use crate::lab::Net;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("service::every_command_is_for_those_whom_it_is_for", rights)
            .needs(Needs::Systemd),
    ]
}

/// What a command needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Right {
    /// To be root, or the user of the service.
    Change,
    /// To be a member of the group `overlay`.
    Look,
    /// Nothing.
    None,
}

/// Those that run a daemon, or all of a lab.
const DAEMONS: &[&str] = &["up", "server", "lab", "lab exec"];

/// Every command that there is, less [`DAEMONS`]. What changes something stands last and is tried by
/// those first who may not.
const COMMANDS: &[(&str, Right)] = &[
    ("status", Right::Look),
    ("status --json", Right::Look),
    ("ip", Right::Look),
    ("ip alice", Right::Look),
    ("ping nobody -c 1", Right::Look),
    ("why nobody", Right::Look),
    ("history nobody", Right::Look),
    ("netcheck --json", Right::Look),
    ("server status", Right::Look),
    ("server nodes", Right::Look),
    ("server nodes --json", Right::Look),
    ("server invite list", Right::Look),
    ("server events", Right::Look),
    ("server policy show", Right::Look),
    ("server policy check /etc/overlay/none.toml", Right::None),
    ("server policy test /etc/overlay/none.toml", Right::None),
    ("config check /etc/overlay/none.toml", Right::None),
    ("completions bash", Right::None),
    ("man /tmp/pages", Right::None),
    ("version", Right::None),
    ("service status", Right::None),
    ("server backup /tmp/backup", Right::Change),
    ("server invite", Right::Change),
    ("server invite revoke 00000000", Right::Change),
    ("server rename alice alicia", Right::Change),
    ("server tag alicia office", Right::Change),
    ("server expire alicia --in 180d", Right::Change),
    ("server policy set /etc/overlay/none.toml", Right::Change),
    ("server policy clear", Right::Change),
    ("server restore /etc/overlay/backup", Right::Change),
    ("rotate", Right::Change),
    ("service install node", Right::Change),
    ("server remove nobody", Right::Change),
    ("down", Right::Change),
    ("service uninstall node", Right::Change),
];

fn rights() {
    let net = Net::new();
    let container = super::service::both(&net);
    assert_ports(&container);
    assert_all_there(&container);
    container.ok(&["sh", "-c", "mkdir -p /etc/overlay; echo > /etc/overlay/none.toml"]);
    container.ok(&["overlay", "server", "backup", "/etc/overlay/backup"]);
    container.ok(&["chmod", "644", "/etc/overlay/backup"]);
    let group = container.ok(&["id", "-g", "overlay"]).trim().to_owned();
    let user = ["setpriv", "--reuid=4711", "--regid=4711"];
    let members = format!("--groups={group}");
    let stranger = [&user[..], &["--clear-groups"]].concat();
    let member = [&user[..], &[&members]].concat();
    let denied = |who: &[&str], command: &str| {
        let output = container.run(&[who, &["overlay"], &words(command)[..]].concat());
        assert!(output.code.is_some_and(|code| code != 2), "{command}: {output:?}");
        output.code == Some(4)
    };
    for (command, right) in COMMANDS {
        assert_eq!(denied(&stranger, command), *right != Right::None, "a stranger: {command}");
        assert_eq!(denied(&member, command), *right == Right::Change, "a member: {command}");
    }
    follow_no_links(&container);
    for (command, _) in COMMANDS {
        assert!(!denied(&[], command), "root: {command}");
    }
}

/// No command has been forgotten above.
fn assert_all_there(container: &Container) {
    let mut open = vec![String::new()];
    let mut found = 0;
    while let Some(command) = open.pop() {
        let help = container.ok(&[&["overlay"], &words(&command)[..], &["--help"]].concat());
        let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        let names = lines.take_while(|line| !line.is_empty());
        // Names stand two columns in, what is wrapped further.
        let below: Vec<String> = names
            .filter_map(|line| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')))
            .filter_map(|rest| rest.split_whitespace().next())
            .map(|name| format!("{command} {name}").trim().to_owned())
            .collect();
        if below.is_empty() {
            found += 1;
            let known = COMMANDS.iter().any(|(it, _)| words(it).starts_with(&words(&command)));
            assert!(known || DAEMONS.contains(&command.as_str()), "who may `{command}`?");
        }
        open.extend(below);
    }
    assert!(found > 25, "{found} commands");
}

fn words(command: &str) -> Vec<&str> {
    command.split_whitespace().collect()
}

/// Nothing listens on TCP but what the documents name.
fn assert_ports(container: &Container) {
    let tables = container.ok(&["cat", "/proc/net/tcp", "/proc/net/tcp6"]);
    let listening = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (address, state) = (words.get(1)?, words.get(3)?);
        let port = address.rsplit(':').next().filter(|_| *state == "0A")?;
        u16::from_str_radix(port, 16).ok()
    };
    let ports: BTreeSet<u16> = tables.lines().filter_map(listening).collect();
    assert_eq!(ports, BTreeSet::from([443, 41820]));
}

/// The user of the services puts links into its directories, and root then works there.
fn follow_no_links(container: &Container) {
    let node = "/var/lib/overlay/node";
    let links = format!(
        "echo precious > /var/lib/precious; chmod 600 /var/lib/precious; \
         ln -sf /var/lib/precious {node}/soft; ln -f /var/lib/precious {node}/hard; \
         ln -sf /var/lib/precious {node}/netmap.json.new; ln -sf /var/lib/precious {node}/lock; \
         ln -sf /var/lib/precious /run/overlay/node.sock.new"
    );
    let owner = || container.ok(&["stat", "-c", "%U:%G %a %s", "/var/lib/precious"]);
    container.ok(&["systemctl", "stop", "overlay.service"]);
    container.ok(&["sh", "-c", &links]);
    let before = owner();
    // The lock is not found where a link is.
    assert_ne!(container.run(&["overlay", "service", "install", "node"]).code, Some(0));
    assert_eq!(owner(), before);
    container.ok(&["rm", &format!("{node}/lock")]);
    container.ok(&["overlay", "service", "install", "node"]);
    assert_eq!(owner(), before, "another's file was given away");
    let modes = container.ok(&["stat", "-c", "%a %U", node, "/var/lib/overlay/server"]);
    assert_eq!(modes, "700 overlay\n700 overlay\n");
    container.ok(&["rm", &format!("{node}/hard")]);
}
