//! `overlay completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Done};

/// Arguments of `overlay completions`.
#[derive(Debug, Clone, Args)]
#[command(about = "Print a completion script for a shell")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// Runs it.
///
/// # Errors
/// Never.
pub fn run(args: &CompletionsArgs) -> Done {
    clap_complete::generate(args.shell, &mut Cli::command(), "overlay", &mut std::io::stdout());
    Ok(())
}
