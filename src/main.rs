//! The `overlay` binary.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use overlay::cli::lab;

/// A self-hosted virtual LAN.
#[derive(Parser)]
#[command(version, about)]
struct Overlay {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Lab(lab::LabArgs),
}

fn main() -> ExitCode {
    match Overlay::parse().command {
        Command::Lab(args) => lab::run(args),
    }
}
