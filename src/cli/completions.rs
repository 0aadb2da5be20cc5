//! `overlay completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Done, print};

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
/// When stdout is gone.
pub fn run(args: &CompletionsArgs) -> Done {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "overlay", &mut script);
    print::line(String::from_utf8_lossy(&script).trim_end())
}
