//! `overlay service`: node and server as services of systemd.
//!
//! The unit files are part of the program, so that nothing has to be fetched or found. `install`
//! and `uninstall` are the two ways, `system` is what they need of the machine.

mod install;
mod system;
mod uninstall;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};

use super::fail::{Failure, NOT_RUNNING, USAGE};
use super::{Done, print};
use crate::config::paths::{Paths, Role};
use system::UnitState;

/// Arguments of `overlay service`.
#[derive(Debug, Clone, Args)]
#[command(about = "Run a node or a server as a service of systemd, from the start of the machine")]
pub struct ServiceArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Subcommand)]
enum Command {
    /// Install or update a service, start it and wait until it is ready
    #[command(
        after_help = "A node joins with the join line from `overlay server invite`, or uses \
                            the membership that this machine has already. Given as an argument the \
                            line can be seen by other users of this machine for a moment; `-` \
                            (standard input) and file:PATH keep it private."
    )]
    Install {
        /// Which one
        service: Service,
        /// Of a node: join line, file:PATH or - [default: the membership that is there]
        #[arg(value_name = "JOINLINE")]
        join: Option<String>,
    },
    /// Stop a service and remove it; its keys and state stay
    Uninstall {
        /// Which one
        service: Service,
        /// Remove keys and state too
        #[arg(long)]
        purge: bool,
    },
    /// Show what is installed and runs
    Status {
        /// Which one [default: both]
        service: Option<Service>,
    },
}

/// One of the two services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Service {
    /// `overlay up`.
    Node,
    /// `overlay server`.
    Server,
}

impl Service {
    fn word(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Server => "server",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Node => "overlay.service",
            Self::Server => "overlay-server.service",
        }
    }

    /// The content of the unit file, for a program at [`system::USUAL_PROGRAM`].
    fn unit_text(self) -> &'static str {
        match self {
            Self::Node => include_str!("../../systemd/overlay.service"),
            Self::Server => include_str!("../../systemd/overlay-server.service"),
        }
    }

    /// The units that hold its ports open, with their content.
    fn sockets(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Node => &[],
            Self::Server => &[
                (
                    "overlay-server-443.socket",
                    include_str!("../../systemd/overlay-server-443.socket"),
                ),
                (
                    "overlay-server-443.target",
                    include_str!("../../systemd/overlay-server-443.target"),
                ),
            ],
        }
    }

    /// Units of older versions, which would hold ports that the newer ones want.
    fn stale(self) -> &'static [&'static str] {
        match self {
            Self::Node => &[],
            Self::Server => &["overlay-server.socket"],
        }
    }

    fn unit_file(self) -> PathBuf {
        Path::new("/etc/systemd/system").join(self.unit())
    }

    fn paths(self) -> Paths {
        Paths::of_system(match self {
            Self::Node => Role::Node,
            Self::Server => Role::Server,
        })
    }
}

/// Runs it.
///
/// # Errors
/// When it does not do its work; `status` also when a service does not run.
pub fn run(args: ServiceArgs) -> Done {
    match args.command {
        Command::Install { service: Service::Server, join: Some(_) } => {
            let cause = "it is the one that makes them";
            let help = "sudo overlay service install server";
            Err(Failure::new("a server takes no join line", cause, help).code(USAGE))
        }
        Command::Install { service, join } => install::run(service, join.as_deref()),
        Command::Uninstall { service, purge } => uninstall::run(service, purge),
        Command::Status { service } => status(service),
    }
}

fn status(wanted: Option<Service>) -> Done {
    system::need_systemd()?;
    let services = wanted.map_or_else(|| vec![Service::Node, Service::Server], |one| vec![one]);
    let mut table = print::table(&["SERVICE", "UNIT", "INSTALLED", "STATE", "ADDRESS"]);
    let mut missing = None;
    for service in services {
        let state = UnitState::of(service)?;
        let installed = if state.installed { state.enabled.as_str() } else { "no" };
        let address = if state.is_active() { state.text.as_str() } else { "" };
        table.add_row([service.word(), service.unit(), installed, &state.active, address]);
        if !state.is_active() && (state.installed || wanted.is_some()) {
            missing.get_or_insert(if state.installed {
                stopped(service)
            } else {
                not_installed(service)
            });
        }
    }
    print::line(print::table_text(&table))?;
    missing.map_or(Ok(()), Err)
}

fn stopped(service: Service) -> Failure {
    let unit = service.unit();
    Failure::new(
        format!("{unit} does not run"),
        "it was stopped, or it failed",
        format!("see why: journalctl -u {unit}; start it: sudo systemctl start {unit}"),
    )
    .code(NOT_RUNNING)
}

fn not_installed(service: Service) -> Failure {
    let word = service.word();
    let line = if service == Service::Node { " JOINLINE" } else { "" };
    Failure::new(
        format!("the {word} is not installed as a service"),
        format!("there is no unit {}", service.unit()),
        format!("sudo overlay service install {word}{line}"),
    )
    .code(NOT_RUNNING)
}
