//! `overlay server events`: who changed what.

use std::path::Path;

use clap::Args;

use crate::cli::Done;
use crate::cli::ask::{self, Answers};
use crate::cli::print::{hint, json, line};
use crate::config::paths::Role;
use crate::daemon::server::{EventInfo, Question, StoreAnswer};

/// So many are shown when nobody says how many.
const NEWEST: u32 = 100;

#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Show so many: of the newest, or with --after of those that follow it [default: 100; with
    /// --after all]
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<u32>,
    /// Only those after this number, the oldest of them first
    #[arg(long, value_name = "SEQ")]
    after: Option<u64>,
    /// Go on with those that come, until Ctrl-C
    #[arg(long, short)]
    follow: bool,
    /// Print JSON, one event a line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: EventsArgs, socket: &Path) -> Done {
    let EventsArgs { lines, after, follow, json: as_json } = args;
    let limit = lines.unwrap_or(if after.is_some() { u32::MAX } else { NEWEST });
    let (after, first) = (after.unwrap_or(0), after.is_some());
    let question = Question::Events { after, limit, first, follow };
    let mut shown = false;
    let mut show = |answer: StoreAnswer| {
        let StoreAnswer::Events(events) = answer else { return Ok(()) };
        shown |= !events.is_empty();
        events.iter().try_for_each(|event| print(event, as_json))
    };
    if !follow {
        show(ask::ask(Role::Server, socket, &question)?)?;
        if !shown {
            hint("there are no events of that kind");
        }
        return Ok(());
    }
    let mut answers = Answers::to(Role::Server, socket, &question)?;
    while let Some(answer) = answers.next_answer()? {
        show(answer)?;
    }
    Err(answers.ended())
}

fn print(event: &EventInfo, as_json: bool) -> Done {
    if as_json {
        return json(event);
    }
    let fields: Vec<String> =
        event.fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
    line(format!("{}  {}  {}  by {}", event.at, event.kind, fields.join(" "), event.actor))
}
