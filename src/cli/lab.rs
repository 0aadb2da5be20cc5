//! `overlay lab`: a small internet on this machine, and commands inside it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::fail::{Failure, NOT_RUNNING, PERMISSION, USAGE};
use super::print;
use crate::io::tun::TunError;
use crate::lab::nat::{NatKind, UnknownNatKind};
use crate::lab::{
    self, ExecRequest, LabOptions, NamespacesForbidden, NoLab, NoMachine, NotStarted,
};

/// Arguments of `overlay lab`.
#[derive(Debug, Clone, Args)]
#[command(
    about = "A small internet on this machine: a server, two homes behind NATs, a ping across",
    long_about = "A small internet on this machine: a server and two homes behind NATs that use \
                  the same private range, all in namespaces of their own. Needs no root and no \
                  other program.",
    args_conflicts_with_subcommands = true
)]
pub struct LabArgs {
    #[command(subcommand)]
    command: Option<LabCommand>,

    /// NAT of alice's home and of bob's: none, full-cone, address-restricted, port-restricted or
    /// symmetric; one word means both
    #[arg(
        long,
        value_name = "KIND,KIND",
        default_value = "port-restricted",
        value_parser = Nats::from_str
    )]
    nat: Nats,

    /// Milliseconds that a packet takes on the line of each home, one way
    #[arg(long, value_name = "MS", default_value = "0", value_parser = delay)]
    delay: Duration,

    /// Percent of the packets that the line of each home loses, in each direction
    #[arg(long, value_name = "PCT", default_value = "0", value_parser = percent)]
    loss: f64,

    /// Drop UDP on alice's line
    #[arg(long)]
    block_udp: bool,

    /// Exit with 0 if the ping took the path it must, with 1 if not, and do not stay up
    #[arg(long)]
    check: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    /// Only the machines, NATs and lines: start nothing on them
    #[arg(long)]
    bare: bool,

    /// Be the first process of a lab with this directory
    #[arg(long, value_name = "DIR", hide = true)]
    inside: Option<PathBuf>,
}

#[derive(Debug, Clone, Subcommand)]
enum LabCommand {
    /// Run a command inside a machine of the running lab: server, alice or bob
    Exec {
        /// The machine
        #[arg(value_name = "MACHINE")]
        machine: String,

        /// The lab with this process id, if several run
        #[arg(long, value_name = "PID")]
        pid: Option<i32>,

        /// The command; a shell if none is given
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
}

/// Runs the command. The calling process must have no other thread yet: namespaces are entered.
pub fn run(args: LabArgs) -> ExitCode {
    match dispatch(args) {
        Ok(code) => code,
        Err(error) => {
            let failure = failure(&error);
            print::failure(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn dispatch(args: LabArgs) -> Result<ExitCode> {
    if let Some(LabCommand::Exec { machine, pid, command }) = args.command {
        return lab::exec(&ExecRequest { machine, lab_pid: pid, command });
    }
    let options = LabOptions {
        nats: args.nat.0,
        delay: args.delay,
        loss_percent: args.loss,
        block_udp: args.block_udp,
        check: args.check,
        json: args.json,
        bare: args.bare,
    };
    match args.inside {
        Some(directory) => lab::inside(&options, &directory),
        None => lab::start(&options),
    }
}

/// The NAT of alice's home and of bob's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Nats([NatKind; 2]);

impl FromStr for Nats {
    type Err = UnknownNatKind;

    fn from_str(text: &str) -> Result<Self, UnknownNatKind> {
        let (alice, bob) = text.split_once(',').unwrap_or((text, text));
        Ok(Self([alice.parse()?, bob.parse()?]))
    }
}

fn delay(text: &str) -> Result<Duration, String> {
    let milliseconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.0..=LONGEST_DELAY_MS).contains(&milliseconds) {
        return Ok(Duration::from_secs_f64(milliseconds / 1000.0));
    }
    Err(format!("must be from 0 to {LONGEST_DELAY_MS} milliseconds"))
}

fn percent(text: &str) -> Result<f64, String> {
    let percent: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.0..=HIGHEST_LOSS_PERCENT).contains(&percent) {
        return Ok(percent);
    }
    Err(format!("must be from 0 to {HIGHEST_LOSS_PERCENT} percent"))
}

/// How a lab that does not work is told.
fn failure(error: &anyhow::Error) -> Failure {
    for cause in error.chain() {
        if let Some(forbidden) = cause.downcast_ref::<NamespacesForbidden>() {
            return Failure::new(forbidden, forbidden.cause(), forbidden.help()).code(PERMISSION);
        }
        if let Some(tun) = cause.downcast_ref::<TunError>() {
            let failure = Failure::caused_by(FAILED_LAB, error.as_ref(), tun.help());
            let denied = matches!(tun, TunError::NoPermission { .. });
            return if denied { failure.code(PERMISSION) } else { failure };
        }
        if let Some(NoLab { pid }) = cause.downcast_ref::<NoLab>() {
            let cause = match pid {
                Some(pid) => format!("process {pid} is no lab that this user has started"),
                None => "exec runs a command inside a lab that this user has started before".into(),
            };
            let help = format!("start one in another terminal: {} lab", lab::program());
            return Failure::new(error, cause, help).code(NOT_RUNNING);
        }
        if let Some(NotStarted { source, .. }) = cause.downcast_ref::<NotStarted>() {
            let help = format!(
                "a command of this machine, by name or path: {} lab exec alice -- sh",
                lab::program()
            );
            let denied = source.kind() == std::io::ErrorKind::PermissionDenied;
            let failure = Failure::new(error, source, help);
            return failure.code(if denied { PERMISSION } else { USAGE });
        }
        if let Some(NoMachine { machines, .. }) = cause.downcast_ref::<NoMachine>() {
            let machine = machines.last().map_or("alice", String::as_str);
            return Failure::new(
                error,
                format!("its machines are {}", machines.join(", ")),
                format!("{} lab exec {machine} -- overlay status", lab::program()),
            )
            .code(USAGE);
        }
    }
    Failure::caused_by(
        FAILED_LAB,
        error.as_ref(),
        format!(
            "start it without --check, then look inside from another terminal: \
             {} lab exec alice -- overlay status",
            lab::program()
        ),
    )
}

const FAILED_LAB: &str = "the lab has failed";

/// A minute one way is beyond any line on earth.
const LONGEST_DELAY_MS: f64 = 60_000.0;

/// Above this nothing gets through in a time that anybody waits for.
const HIGHEST_LOSS_PERCENT: f64 = 90.0;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        lab: LabArgs,
    }

    fn parse(line: &str) -> Result<LabArgs, clap::Error> {
        let words = std::iter::once("lab").chain(line.split_whitespace());
        Command::try_parse_from(words).map(|command| command.lab)
    }

    #[test]
    fn one_nat_kind_means_both_homes_and_three_are_refused() {
        let nats = |line: &str| parse(line).map(|args| args.nat.0);
        assert_eq!(nats("").unwrap(), [NatKind::PortRestricted; 2]);
        assert_eq!(nats("--nat full-cone").unwrap(), [NatKind::FullCone; 2]);
        let two = nats("--nat symmetric,none").unwrap();
        assert_eq!(two, [NatKind::Symmetric, NatKind::None]);
        assert!(nats("--nat cone").is_err(), "no such kind");
        assert!(nats("--nat none,none,none").is_err(), "there are two homes");
        assert!(parse("--delay -1").is_err() && parse("--loss 101").is_err());
    }

    #[test]
    fn the_command_of_exec_is_taken_as_it_is() {
        let args = parse("exec alice -- overlay ping bob --json").unwrap();
        let Some(LabCommand::Exec { machine, pid: None, command }) = args.command else {
            panic!("exec was not understood");
        };
        assert_eq!(machine, "alice");
        assert_eq!(command, ["overlay", "ping", "bob", "--json"]);
        assert!(parse("exec").is_err(), "which machine?");
    }

    #[test]
    fn a_missing_lab_is_told_with_the_command_that_starts_one() {
        let failure = failure(&anyhow::Error::new(NoLab { pid: None }));
        assert_eq!(failure.exit_code(), NOT_RUNNING);
        let text = failure.to_string();
        let command = format!("help: start one in another terminal: {} lab", lab::program());
        assert!(text.ends_with(&command), "{text}");
    }
}
