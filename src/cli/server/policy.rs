//! `overlay server policy`: the access rules of the network.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use crate::cli::Done;
use crate::cli::fail::{self, Failure};
use crate::cli::print::{hint, line};
use crate::io::files;
use crate::policy::Policy;
use crate::server::admin::{PolicyInfo, Request};
use crate::wire::strict::TextError;

#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Read a file of access rules as the server would; say what is wrong or matches nobody
    Check {
        /// The file
        file: PathBuf,
    },
    /// The same, and try the tests in it; exit code 1 when one fails
    Test {
        /// The file
        file: PathBuf,
    },
    /// The same, and put it in force; names and tags that no member has are told
    Set {
        /// The file
        file: PathBuf,
    },
    /// Print the rules of the running server
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take the rules away: every member may send everything again
    Clear,
}

impl PolicyArgs {
    /// Whether no server is asked.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.command, PolicyCommand::Check { .. } | PolicyCommand::Test { .. })
    }

    pub(super) fn is_json(&self) -> bool {
        matches!(self.command, PolicyCommand::Show { json: true })
    }

    /// Looks at a file.
    pub(super) fn run_local(&self) -> Done {
        match &self.command {
            PolicyCommand::Check { file } => {
                let policy = parse(file, &read(file)?)?;
                let (rules, tests) = (policy.rule_count(), policy.case_count());
                warn(policy.warnings());
                line(format!("{} is a good policy: {rules} rules, {tests} tests", file.display()))
            }
            PolicyCommand::Test { file } => {
                let policy = parse(file, &read(file)?)?;
                warn(policy.warnings());
                test(file, &policy)
            }
            PolicyCommand::Set { .. } | PolicyCommand::Show { .. } | PolicyCommand::Clear => Ok(()),
        }
    }

    /// What the server is asked for. Rules that it would not take are not sent.
    pub(super) fn request(self) -> Result<Request, Failure> {
        match self.command {
            PolicyCommand::Check { file }
            | PolicyCommand::Test { file }
            | PolicyCommand::Set { file } => {
                let text = read(&file)?;
                let policy = parse(&file, &text)?;
                if policy.try_cases().iter().any(|case| !case.passed) {
                    test(&file, &policy)?;
                }
                Ok(Request::PolicySet { text })
            }
            PolicyCommand::Show { .. } => Ok(Request::PolicyShow),
            PolicyCommand::Clear => Ok(Request::PolicyClear),
        }
    }
}

/// Prints the rules of the server.
pub(super) fn print(policy: &PolicyInfo) -> Done {
    match &policy.text {
        Some(text) => {
            hint(format!(
                "# {} rules, {} tests, set {}",
                policy.rules,
                policy.tests,
                policy.set.as_deref().unwrap_or("at an unknown time")
            ));
            warn(&policy.warnings);
            if policy.rules == 0 {
                hint(
                    "# no rule allows anything: nobody may send anything to anybody; to take the \
                     rules away: overlay server policy clear",
                );
            }
            line(text.trim_end())
        }
        None => {
            hint(
                "there are no access rules: every member may send everything to every other; set \
                 some with `overlay server policy set FILE`",
            );
            Ok(())
        }
    }
}

/// What is allowed and hardly meant.
fn warn(warnings: &[String]) {
    for warning in warnings {
        hint(format!("# warning: {warning}"));
    }
}

fn read(file: &Path) -> Result<String, Failure> {
    let what = "the access rules cannot be read";
    let bytes = match files::read_text(file) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => {
            let cause = format!("there is no file {}", file.display());
            let help = "correct the path; an example is in the documentation: config/policy.toml";
            return Err(Failure::new(what, cause, help).code(fail::USAGE));
        }
        Err(error) => {
            let help = "name a file that this user can read, or use sudo";
            return Err(Failure::caused_by(what, &error, help));
        }
    };
    String::from_utf8(bytes).map_err(|_| {
        let cause = format!("{} is no text in UTF-8", file.display());
        Failure::new(what, cause, "save it as UTF-8").code(fail::USAGE)
    })
}

fn parse(file: &Path, text: &str) -> Result<Policy, Failure> {
    Policy::parse_new(text).map_err(|error: TextError| {
        let TextError { line, column, mistake } = error;
        let file = file.display();
        Failure::new(
            "the access rules are wrong",
            format_args!("{file}:{line}:{column}: {mistake}"),
            format_args!("edit line {line}, then: overlay server policy test {file}"),
        )
        .code(fail::USAGE)
    })
}

/// Tries the tests, and prints what came out of each.
fn test(file: &Path, policy: &Policy) -> Done {
    let cases = policy.try_cases();
    for case in &cases {
        let word = if case.passed { "ok  " } else { "FAIL" };
        let (place, question, expected) = (case.line, &case.question, case.expected);
        line(format!("{word}  line {place}: {question}: {expected}"))?;
    }
    let failed = cases.iter().filter(|case| !case.passed).count();
    match (failed, cases.len()) {
        (0, 0) => {
            hint(format!("{} has no tests; add some as [[tests]]", file.display()));
            Ok(())
        }
        (0, all) => line(format!("all {all} tests pass")),
        (failed, all) => Err(Failure::new(
            format!("{failed} of {all} tests fail"),
            "the rules allow something else than the tests in the file expect",
            format!(
                "change the rules or the tests, then: overlay server policy test {}",
                file.display()
            ),
        )),
    }
}
