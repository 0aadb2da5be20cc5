//! The `overlay` binary.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use overlay::cli::server;

/// A self-hosted virtual LAN.
#[derive(Parser)]
#[command(version)]
struct Overlay {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server of a network, or manage its nodes
    Server(server::ServerArgs),
}

fn main() -> ExitCode {
    let result = match Overlay::parse().command {
        Command::Server(args) => server::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // When stderr is closed there is still the exit code.
            let _ = writeln!(std::io::stderr(), "{failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}
