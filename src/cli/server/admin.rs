//! The commands that ask a running server.

use std::path::Path;
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use super::{Command, say};
use crate::cli::fail::{self, Failure};
use crate::io::local::{LocalClient, LocalError, Reply};
use crate::server::admin::{Answer, InviteInfo, InviteList, Invited, NodeInfo, NodeList, Request};
use crate::types::{InviteId, NodeName};

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

fn duration(text: &str) -> Result<Duration, String> {
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

pub(super) fn run(command: Command, socket: &Path) -> Result<(), Failure> {
    let (request, show) = match command {
        Command::Nodes { json } => (Request::Nodes, Show::of(json)),
        Command::Remove { node } => (Request::Remove { node }, Show::Text),
        Command::Rename { node, name } => (Request::Rename { node, name }, Show::Text),
        Command::Invite(InviteArgs { command: Some(InviteCommand::List), json, .. }) => {
            (Request::InviteList, Show::of(json))
        }
        Command::Invite(InviteArgs {
            command: Some(InviteCommand::Revoke { id }), json, ..
        }) => (Request::InviteRevoke { id }, Show::of(json)),
        Command::Invite(InviteArgs { uses, ttl, name, json, command: None }) => {
            (Request::Invite { uses, ttl_s: ttl.as_secs(), name }, Show::of(json))
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start").cause(error))?;
    match runtime.block_on(ask(socket, &request)).map_err(|error| unreachable(&error))? {
        Reply::Ok(answer) => print(&answer, show),
        Reply::Error(refusal) => {
            let failure = Failure::new(refusal.error).code(refusal.code);
            Err(match refusal.help {
                Some(help) => failure.help(help),
                None => failure,
            })
        }
    }
}

async fn ask(socket: &Path, request: &Request) -> Result<Reply<Answer>, LocalError> {
    let mut client = LocalClient::connect(socket).await?;
    client.ask(request).await?;
    let reply = client.next().await?;
    reply.ok_or_else(|| LocalError::NotRunning { path: socket.to_path_buf() })
}

fn unreachable(error: &LocalError) -> Failure {
    let failure = Failure::new("cannot ask the server").cause(error);
    match error {
        LocalError::NotRunning { .. } => failure
            .code(fail::NOT_RUNNING)
            .help("start it with `overlay server`, or say where its socket is with --socket"),
        LocalError::Permission { .. } => {
            failure.code(fail::PERMISSION).help("run the same command with sudo")
        }
        _ => failure,
    }
}

fn print(answer: &Answer, show: Show) -> Result<(), Failure> {
    match (answer, show) {
        (Answer::Invited(invited), Show::Json) => json(invited),
        (Answer::Invites(list), Show::Json) => json(list),
        (Answer::Revoked(invite), Show::Json) => json(invite),
        (Answer::Nodes(list), Show::Json) => json(list),
        (Answer::Removed(node) | Answer::Renamed(node), Show::Json) => json(node),
        (Answer::Invited(invited), Show::Text) => print_invited(invited),
        (Answer::Invites(list), Show::Text) => print_invites(list),
        (Answer::Revoked(invite), Show::Text) => say(&format!("revoked {}", invite.id)),
        (Answer::Nodes(list), Show::Text) => print_nodes(list),
        (Answer::Removed(node), Show::Text) => {
            say(&format!("removed {} ({})", node.name, node.ipv4))
        }
        (Answer::Renamed(node), Show::Text) => {
            say(&format!("{} is called {} now", node.ipv4, node.name))
        }
    }
}

fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string(value);
    say(&text.map_err(|error| Failure::new("cannot print the answer").cause(error))?)
}

fn print_invited(invited: &Invited) -> Result<(), Failure> {
    say(invited.join.expose())?;
    let nodes = match invited.uses {
        1 => "one node".to_string(),
        uses => format!("{uses} nodes"),
    };
    hint(&format!(
        "invite {} lets {nodes} in until {}; type there: sudo overlay up JOINLINE",
        invited.id, invited.expires
    ));
    Ok(())
}

fn print_invites(list: &InviteList) -> Result<(), Failure> {
    if list.invites.is_empty() {
        hint("there are no invites; make one with `overlay server invite`");
        return Ok(());
    }
    let row = |invite: &InviteInfo| {
        let name = invite.name.as_ref().map_or("-", NodeName::as_str);
        let uses = format!("{}/{}", invite.used, invite.uses);
        [invite.id.to_string(), invite.state.clone(), uses, invite.expires.clone(), name.into()]
    };
    table(["ID", "STATE", "USED", "EXPIRES", "NAME"], list.invites.iter().map(row))
}

fn print_nodes(list: &NodeList) -> Result<(), Failure> {
    if list.nodes.is_empty() {
        hint("nobody has joined yet; make an invite with `overlay server invite`");
        return Ok(());
    }
    let row = |node: &NodeInfo| {
        let state = if node.online { "online" } else { "offline" };
        let seen = if node.online { "now".into() } else { node.last_seen.clone() };
        [
            node.name.clone(),
            node.ipv4.to_string(),
            state.into(),
            seen,
            node.ipv6.to_string(),
            node.id.clone(),
        ]
    };
    let header = ["NAME", "IPV4", "STATE", "LAST SEEN", "IPV6", "ID"];
    table(header, list.nodes.iter().map(row))
}

/// Columns with two spaces between them: good to read, and good for `awk`.
fn table<const N: usize>(
    header: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.to_string().lines().try_for_each(|line| say(line.trim_end()))
}

/// Tells people what programs do not want to read.
fn hint(text: &str) {
    use std::io::Write;
    // When stderr is closed nobody misses it.
    let _ = writeln!(std::io::stderr(), "{text}");
}
