//! The commands that ask a running server.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use clap::{Args, Subcommand};

use super::{Command, Places};
use crate::cli::fail::Failure;
use crate::cli::print::{hint, json, line, table, table_text};
use crate::cli::{Done, ask};
use crate::config::paths::Role;
use crate::io::clock;
use crate::server::admin::{
    Answer, InviteInfo, InviteList, Invited, NodeInfo, NodeList, Removal, Request,
};
use crate::types::{InviteId, NodeName, Tag};
use crate::wire::control::EXPIRY_WARNING_S;

/// How long an invite lives if nobody says otherwise; `--ttl` has the same.
const DEFAULT_TTL_S: u64 = 3600;

#[derive(Debug, Args)]
pub(super) struct InviteArgs {
    /// How many nodes may join with it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// How long it can be used: 30m, 1h, 7d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    ttl: Duration,
    /// The name of the node that joins with it
    #[arg(long, value_name = "NAME")]
    name: Option<NodeName>,
    /// A tag of the node that joins with it; may be given more than once
    #[arg(long = "tag", value_name = "TAG", value_delimiter = ',')]
    tags: Vec<Tag>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Option<InviteCommand>,
}

#[derive(Debug, Subcommand)]
enum InviteCommand {
    /// List the invites
    List,
    /// Take an invite back
    Revoke {
        /// Its id, as `invite list` shows it
        id: InviteId,
    },
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "not a time like 30m, 1h or 7d".into())
}

/// How an answer is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Show {
    Text,
    Json,
}

impl Show {
    fn of(json: bool) -> Self {
        if json { Self::Json } else { Self::Text }
    }
}

pub(super) fn run(command: Command, places: &Places) -> Done {
    let (request, show) = match command {
        Command::Nodes { json } => (Request::Nodes, Show::of(json)),
        Command::Remove { node, json } => (Request::Remove { node }, Show::of(json)),
        Command::Rename { node, name } => (Request::Rename { node, name }, Show::Text),
        Command::Invite(InviteArgs { command: Some(InviteCommand::List), json, .. }) => {
            (Request::InviteList, Show::of(json))
        }
        Command::Invite(InviteArgs {
            command: Some(InviteCommand::Revoke { id }), json, ..
        }) => (Request::InviteRevoke { id }, Show::of(json)),
        Command::Status { json } => return super::status::run(json, &places.socket()?),
        Command::Events(args) => return super::events::run(args, &places.socket()?),
        Command::Backup { file } => return super::backup::write(&file, &places.socket()?),
        Command::Restore { file, force, place } => {
            let place = place.map_or_else(|| places.state_dir(), Ok)?;
            return super::backup::restore(&file, &place, force);
        }
        Command::Invite(InviteArgs { uses, ttl, name, tags, json, command: None }) => {
            (Request::Invite { uses, ttl_s: ttl.as_secs(), name, tags }, Show::of(json))
        }
        Command::Expire { node, within, json, .. } => {
            let in_s = within.map(|within| within.as_secs());
            let request = match node {
                Some(node) => Request::Expire { node, in_s },
                None => Request::ExpireNew { in_s },
            };
            (request, Show::of(json))
        }
        Command::Tag { node, tags } => (Request::Tag { node, tags }, Show::Text),
        // These two look at a file and ask nobody.
        Command::Policy(policy) if policy.is_local() => return policy.run_local(),
        Command::Policy(policy) => {
            let json = policy.is_json();
            (policy.request()?, Show::of(json))
        }
    };
    print(&answer(&places.socket()?, &request)?, show)
}

/// Makes and prints an invite when nobody has joined yet; returns whether it did.
pub(super) fn first_invite(socket: &Path) -> Result<bool, Failure> {
    let Answer::Nodes(list) = answer(socket, &Request::Nodes)? else { return Ok(false) };
    if !list.nodes.is_empty() {
        return Ok(false);
    }
    let request = Request::Invite { uses: 1, ttl_s: DEFAULT_TTL_S, name: None, tags: Vec::new() };
    print(&answer(socket, &request)?, Show::Text)?;
    Ok(true)
}

fn answer(socket: &Path, request: &Request) -> Result<Answer, Failure> {
    ask::ask(Role::Server, socket, request)
}

fn print(answer: &Answer, show: Show) -> Done {
    match (answer, show) {
        (Answer::Invited(invited), Show::Json) => json(invited),
        (Answer::Invites(list), Show::Json) => json(list),
        (Answer::Revoked(invite), Show::Json) => json(invite),
        (Answer::Nodes(list), Show::Json) => json(list),
        (Answer::Removed(removal), Show::Json) => json(removal),
        (Answer::Renamed(node) | Answer::Tagged(node) | Answer::Expiring(node), Show::Json) => {
            json(node)
        }
        (Answer::Expiring(node), Show::Text) => {
            let ends = node.expires.as_deref().unwrap_or("never");
            line(format!("the membership of {} ({}) ends: {ends}", node.name, node.ipv4))
        }
        (Answer::ExpiringNew(members), Show::Json) => json(members),
        (Answer::ExpiringNew(members), Show::Text) => line(format!(
            "{}; memberships of nodes that are there end when they did before",
            lasting(members.members_last_s)
        )),
        (Answer::Acknowledged(progress), _) => json(progress),
        (Answer::Policy(policy), Show::Json) => json(policy),
        (Answer::Policy(policy), Show::Text) => super::policy::print(policy),
        (Answer::Tagged(node), Show::Text) => {
            let tags = if node.tags.is_empty() { "no tags".into() } else { words(&node.tags) };
            line(format!("{} ({}) has {tags} now", node.name, node.ipv4))
        }
        (Answer::Invited(invited), Show::Text) => print_invited(invited),
        (Answer::Invites(list), Show::Text) => print_invites(list),
        (Answer::Revoked(invite), Show::Text) => line(format!("revoked {}", invite.id)),
        (Answer::Nodes(list), Show::Text) => print_nodes(list),
        (Answer::Removed(removal), Show::Text) => {
            line(removal_text(removal))?;
            removal.invite_revoked.iter().for_each(|invite| hint(same_again(invite)));
            Ok(())
        }
        (Answer::Renamed(node), Show::Text) => {
            line(format!("{} is called {} now", node.ipv4, node.name))
        }
    }
}

/// How long the memberships of new nodes last, as a sentence.
pub(super) fn lasting(seconds: Option<u64>) -> String {
    let time = match seconds {
        None => "ever".into(),
        Some(86_400) => "a day".into(),
        Some(seconds) if seconds % 86_400 == 0 => format!("{} days", seconds / 86_400),
        Some(seconds) => humantime::format_duration(Duration::from_secs(seconds)).to_string(),
    };
    format!("nodes that join are members for {time}")
}

fn print_invited(invited: &Invited) -> Done {
    line(invited.join.expose())?;
    let nodes = match invited.uses {
        1 => "one node".to_string(),
        uses => format!("{uses} nodes"),
    };
    hint(format!(
        "invite {} lets {nodes} in until {}; type there: sudo overlay up JOINLINE",
        invited.id, invited.expires
    ));
    invited.warning.iter().for_each(hint);
    Ok(())
}

fn print_invites(list: &InviteList) -> Done {
    if list.invites.is_empty() {
        hint("there are no invites; make one with `overlay server invite`");
        return Ok(());
    }
    let row = |invite: &InviteInfo| {
        let name = invite.name.as_ref().map_or("-", NodeName::as_str);
        let uses = format!("{}/{}", invite.used, invite.uses);
        [invite.id.to_string(), invite.state.clone(), uses, invite.expires.clone(), name.into()]
    };
    let mut table = table(&["ID", "STATE", "USED", "EXPIRES", "NAME"]);
    table.add_rows(list.invites.iter().map(row));
    line(table_text(&table))
}

/// Names in a sentence are no more than this.
const NAMED: usize = 8;

/// What a removal has done so far.
fn removal_text(removal: &Removal) -> String {
    let (node, progress) = (&removal.removed, &removal.progress);
    let nodes = if progress.online == 1 { "node has" } else { "nodes have" };
    let mut text = format!("removed {} ({}); ", node.name, node.ipv4);
    text += &match (progress.acknowledged, progress.online) {
        (_, 0) => "no other node is online".to_string(),
        (all, online) if all == online => format!("{all} of {online} {nodes} acknowledged"),
        (some, online) => {
            let waiting = names(&progress.waiting);
            format!("{some} of {online} {nodes} acknowledged, waiting for {waiting}")
        }
    };
    if let Some(invite) = &removal.invite_revoked {
        text += &format!("; its invite {} is revoked as well", invite.id);
    }
    if !progress.offline.is_empty() {
        let they = if progress.offline.len() == 1 { "it comes" } else { "they come" };
        text += &format!("; {} will learn it when {they} back", names(&progress.offline));
    }
    text
}

/// For those who have the join line of an invite that went with a node.
fn same_again(invite: &InviteInfo) -> String {
    let mut command = format!("overlay server invite --uses {}", invite.uses - invite.used);
    let time = |text: &str| humantime::parse_rfc3339(text).ok();
    let ttl = time(&invite.expires).zip(time(&invite.created));
    if let Some(ttl) = ttl.and_then(|(end, start)| end.duration_since(start).ok()) {
        command += &format!(" --ttl {}s", ttl.as_secs());
    }
    command.extend(invite.name.iter().map(|name| format!(" --name {name}")));
    command.extend(invite.tags.iter().map(|tag| format!(" --tag {tag}")));
    format!(
        "with its line the node could have come back; a new one for others who have it: {command}"
    )
}

fn names(all: &[String]) -> String {
    let mut text = all.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    if all.len() > NAMED {
        text += &format!(" and {} more", all.len() - NAMED);
    }
    text
}

fn words(tags: &[Tag]) -> String {
    let words: Vec<String> = tags.iter().map(ToString::to_string).collect();
    words.join(" ")
}

/// Whether a node's membership has ended or will within the time in which everybody is warned.
fn ends_soon(node: &NodeInfo, now: u64) -> bool {
    let end = node.expires.as_deref().and_then(|end| humantime::parse_rfc3339(end).ok());
    let end = end.and_then(|end| end.duration_since(UNIX_EPOCH).ok());
    node.expired || end.is_some_and(|end| end.as_secs() <= now.saturating_add(EXPIRY_WARNING_S))
}

fn print_nodes(list: &NodeList) -> Done {
    if list.nodes.is_empty() {
        hint("nobody has joined yet; make an invite with `overlay server invite`");
        return Ok(());
    }
    let row = |node: &NodeInfo| {
        let state = match (node.online, node.cloned) {
            (_, true) => "CLONED",
            _ if node.expired => "EXPIRED",
            (true, false) => "online",
            (false, false) => "offline",
        };
        let seen = if node.online { "now".into() } else { node.last_seen.clone() };
        [
            node.name.clone(),
            node.ipv4.to_string(),
            state.into(),
            seen,
            node.ipv6.to_string(),
            node.id.clone(),
            words(&node.tags),
        ]
    };
    let mut table = table(&["NAME", "IPV4", "STATE", "LAST SEEN", "IPV6", "ID", "TAGS"]);
    table.add_rows(list.nodes.iter().map(row));
    line(table_text(&table))?;
    let now = clock::unix_seconds();
    for node in list.nodes.iter().filter(|node| ends_soon(node, now)) {
        if let Some(expires) = &node.expires {
            let ends = if node.expired { "has ended" } else { "ends" };
            hint(format!(
                "the membership of {0} {ends} at {expires}; more time: overlay server expire {0} \
                 --in 180d (or --never)",
                node.name
            ));
        }
    }
    for node in list.nodes.iter().filter(|node| node.cloned) {
        hint(format!(
            "two running machines have the keys of {0}; stop one, remove its state directory, and \
             join with it anew (where they are: overlay server events, node-cloned)",
            node.name
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::admin::rfc3339;

    #[test]
    fn an_end_is_worth_a_word_within_the_time_of_the_warnings() {
        const NOW: u64 = 1_800_000_000;
        let node = |expires: Option<u64>, expired| NodeInfo {
            id: "00000001".into(),
            name: "bob".into(),
            ipv4: "10.77.0.1".parse().unwrap(),
            ipv6: "fd00::1".parse().unwrap(),
            online: false,
            last_seen: rfc3339(0),
            joined: rfc3339(0),
            public_key: String::new(),
            remote: None,
            tags: Vec::new(),
            key_since: None,
            expires: expires.map(rfc3339),
            expired,
            cloned: false,
        };
        let warned = NOW + EXPIRY_WARNING_S;
        for (expires, expired, said) in [
            (None, false, false),
            (Some(NOW + 400 * 86_400), false, false),
            (Some(warned + 1), false, false),
            (Some(warned), false, true),
            (Some(NOW - 1), true, true),
            (Some(NOW + 400 * 86_400), true, true),
        ] {
            assert_eq!(ends_soon(&node(expires, expired), NOW), said, "{expires:?} {expired}");
        }
    }

    #[test]
    fn who_has_the_line_of_a_revoked_invite_can_be_given_one_like_it() {
        let invite = InviteInfo {
            id: InviteId([0xab; 4]),
            name: None,
            uses: 20,
            used: 3,
            created: rfc3339(1_000),
            expires: rfc3339(1_000 + 7 * 86_400),
            state: "revoked".into(),
            tags: vec!["web".parse().unwrap()],
        };
        let said = same_again(&invite);
        assert!(
            said.ends_with(": overlay server invite --uses 17 --ttl 604800s --tag tag:web"),
            "{said}"
        );
    }
}
