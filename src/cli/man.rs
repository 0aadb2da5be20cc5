//! `overlay man`.

use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};

use super::fail::Failure;
use super::{Cli, Done};

/// Arguments of `overlay man`.
#[derive(Debug, Clone, Args)]
#[command(about = "Write the manual pages of all commands into a directory")]
pub struct ManArgs {
    /// The directory; it is made if need be
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Runs it.
///
/// # Errors
/// When the directory cannot be written.
pub fn run(args: &ManArgs) -> Done {
    let failed = |error: std::io::Error| {
        Failure::caused_by(
            format!("cannot write manual pages to {}", args.directory.display()),
            &error,
            "name a directory that you may write to: overlay man ./man",
        )
    };
    std::fs::create_dir_all(&args.directory).map_err(failed)?;
    let mut overlay = Cli::command();
    overlay.build();
    write(&overlay, "overlay", &args.directory).map_err(failed)
}

/// One page for each command, named as in `man overlay-server-invite`.
fn write(command: &Command, name: &str, directory: &Path) -> std::io::Result<()> {
    let page = clap_mangen::Man::new(command.clone()).title(name.to_uppercase());
    let mut text = Vec::new();
    page.render(&mut text)?;
    std::fs::write(directory.join(format!("{name}.1")), text)?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        write(sub, &format!("{name}-{}", sub.get_name()), directory)?;
    }
    Ok(())
}
