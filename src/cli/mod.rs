//! What people type: one file per subcommand.

pub mod ask;
pub mod completions;
pub mod config;
pub mod down;
pub mod fail;
pub mod history;
pub mod ip;
pub mod lab;
pub mod man;
pub mod netcheck;
pub mod ping;
mod print;
pub mod rotate;
mod runtime;
pub mod server;
pub mod service;
pub mod status;
pub mod up;
mod usage;
pub mod version;
pub mod why;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use fail::Failure;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "overlay",
    version,
    about = "A self-hosted virtual LAN: server, node and command line in one program",
    after_help = "Start with: overlay lab (a small internet on this machine), or\n  \
                  overlay server              on a machine with a public address, prints a join line\n  \
                  sudo overlay up JOINLINE    on each machine\n  \
                  overlay status              shows the others",
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Server(server::ServerArgs),
    Up(up::UpArgs),
    Down(down::DownArgs),
    Rotate(rotate::RotateArgs),
    Status(status::StatusArgs),
    Ping(ping::PingArgs),
    Why(why::WhyArgs),
    History(history::HistoryArgs),
    Netcheck(netcheck::NetcheckArgs),
    Ip(ip::IpArgs),
    Service(service::ServiceArgs),
    Lab(lab::LabArgs),
    Config(config::ConfigArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
    Version(version::VersionArgs),
}

/// Runs a command; the exit codes are those of [`fail`].
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::end(&error),
    };
    let done = match cli.command {
        // The lab makes namespaces, which must come before any thread.
        Command::Lab(args) => return lab::run(args),
        Command::Server(args) => server::run(args),
        Command::Up(args) => up::run(args),
        Command::Down(args) => down::run(&args),
        Command::Rotate(args) => rotate::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Ping(args) => ping::run(&args),
        Command::Why(args) => why::run(&args),
        Command::History(args) => history::run(&args),
        Command::Netcheck(args) => netcheck::run(&args),
        Command::Ip(args) => ip::run(&args),
        Command::Service(args) => service::run(args),
        Command::Config(args) => config::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
        Command::Version(args) => version::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            print::failure(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

/// What every command returns.
pub type Done = Result<(), Failure>;
