//! A command line that makes no sense, told as every other failure is.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory, Error};

use super::fail::{Failure, USAGE};
use super::{Cli, print};

/// Prints what the parser has to say: the help that was asked for, or what is wrong.
pub(super) fn end(error: &Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that went away has seen enough.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            print::hint(error);
        }
        _ => {}
    }
    let failure = failure(error, &Typed::by(std::env::args_os().skip(1)));
    print::failure(&failure);
    ExitCode::from(failure.exit_code())
}

fn failure(error: &Error, typed: &Typed) -> Failure {
    let path = &typed.path;
    if let Some(number) = negative(error) {
        return Failure::new(
            format!("{number} is negative, and no value here is"),
            format!("`{path}` takes numbers and times from 0 or 1 on"),
            format!("{path} --help"),
        )
        .code(USAGE);
    }
    let argument = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    let what =
        argument(ContextKind::InvalidSubcommand).or_else(|| argument(ContextKind::InvalidArg));
    let what = what.as_deref().unwrap_or_default();
    let cause = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            format!("`{path}` needs one of its commands: {}", typed.subcommands())
        }
        ErrorKind::InvalidSubcommand => format!("`{path}` has no command \"{what}\""),
        ErrorKind::UnknownArgument => format!("`{path}` has no argument \"{what}\" here"),
        ErrorKind::MissingRequiredArgument => format!("`{path}` cannot do without {what}"),
        ErrorKind::ArgumentConflict => format!("`{path}` does not take {what} together with that"),
        _ if what.is_empty() => format!("the command is `{path}`"),
        _ => format!("`{path}` got it for {what}{}", typed.variable(what)),
    };
    let (said, tip) = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            ("a command is missing".into(), None)
        }
        _ => split(&error.to_string()),
    };
    let help = tip.unwrap_or_else(|| format!("{path} --help"));
    Failure::new(said, cause, help).code(USAGE)
}

/// The number that was taken for a flag, since it starts as one.
fn negative(error: &Error) -> Option<&String> {
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(text)) if error.kind() == ErrorKind::UnknownArgument => {
            let number = text.strip_prefix('-')?;
            Some(text).filter(|_| number.starts_with(|c: char| c.is_ascii_digit()))
        }
        _ => None,
    }
}

/// What the parser says, without its prefix, its usage lines and its tips; and the tips.
fn split(text: &str) -> (String, Option<String>) {
    let mut said: Vec<&str> = Vec::new();
    for line in text.lines().map(str::trim).take_while(|line| !line.is_empty()) {
        said.push(line.strip_prefix("error: ").unwrap_or(line));
    }
    let tips: Vec<&str> =
        text.lines().filter_map(|line| line.trim().strip_prefix("tip: ")).collect();
    (said.join(" "), (!tips.is_empty()).then(|| tips.join("; ")))
}

/// The subcommand that was typed, as far as it is one.
struct Typed {
    path: String,
    command: Command,
}

impl Typed {
    fn by(words: impl IntoIterator<Item = OsString>) -> Self {
        let mut command = Cli::command();
        // Tells every subcommand of the arguments that are for all.
        command.build();
        let mut path = command.get_name().to_owned();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let word = word.to_string_lossy();
            if let Some(flag) = word.strip_prefix("--") {
                let takes_value = command
                    .get_arguments()
                    .find(|arg| arg.get_long() == Some(flag))
                    .is_some_and(|arg| arg.get_action().takes_values());
                if takes_value {
                    words.next();
                }
                continue;
            }
            if let Some(found) = command.find_subcommand(&*word) {
                path = format!("{path} {}", found.get_name());
                command = found.clone();
            }
        }
        Self { path, command }
    }

    fn subcommands(&self) -> String {
        let names = self.command.get_subcommands().filter(|command| !command.is_hide_set());
        let names: Vec<&str> = names.map(Command::get_name).collect();
        names.join(", ")
    }

    /// The variable that an argument may have its value from, if it is set.
    fn variable(&self, argument: &str) -> String {
        let mut all = self.command.get_arguments();
        let variable = all.find(|arg| arg.to_string() == argument).and_then(|arg| arg.get_env());
        match variable.filter(|name| std::env::var_os(name).is_some()) {
            Some(name) => format!(", which the variable {} may have set", name.to_string_lossy()),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn told(line: &str) -> String {
        let words = || line.split(' ').map(OsString::from);
        let error = Cli::try_parse_from(words()).unwrap_err();
        let failure = failure(&error, &Typed::by(words().skip(1)));
        assert_eq!(failure.exit_code(), USAGE, "{line}");
        failure.to_string()
    }

    #[test]
    fn a_wrong_command_line_is_told_in_three_lines() {
        for (line, error, cause, help) in [
            (
                "overlay upp",
                "unrecognized subcommand 'upp'",
                "`overlay` has no command \"upp\"",
                "a similar subcommand exists: 'up'",
            ),
            (
                "overlay status --nonsense",
                "unexpected argument '--nonsense' found",
                "`overlay status` has no argument \"--nonsense\" here",
                "overlay status --help",
            ),
            (
                "overlay server --state-dir nodes invite --uses none",
                "invalid value 'none' for '--uses <N>': invalid digit found in string",
                "`overlay server invite` got it for --uses <N>",
                "overlay server invite --help",
            ),
            (
                "overlay ping bob -c -1",
                "-1 is negative, and no value here is",
                "`overlay ping` takes numbers and times from 0 or 1 on",
                "overlay ping --help",
            ),
            (
                "overlay ping bob -c 0",
                "invalid value '0' for '--count <N>': at least one ping",
                "`overlay ping` got it for --count <N>",
                "overlay ping --help",
            ),
            (
                "overlay ping bob --timeout 0s",
                "invalid value '0s' for '--timeout <D>': a time longer than that, for example 5s",
                "`overlay ping` got it for --timeout <D>",
                "overlay ping --help",
            ),
            (
                "overlay up ovl1_abcd ovl1_efgh",
                "unexpected argument 'ovl1_...' found",
                "`overlay up` has no argument \"ovl1_...\" here",
                "overlay up --help",
            ),
            (
                "overlay ping",
                "the following required arguments were not provided: <PEER>",
                "`overlay ping` cannot do without <PEER>",
                "overlay ping --help",
            ),
            (
                "overlay config",
                "a command is missing",
                "`overlay config` needs one of its commands: check",
                "overlay config --help",
            ),
        ] {
            assert_eq!(
                told(line),
                format!("error: {error}\ncause: {cause}\nhelp: {help}"),
                "{line}"
            );
        }
    }
}
