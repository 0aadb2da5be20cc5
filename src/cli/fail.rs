//! How a command fails: what happened, why, and the next thing to type.

use std::fmt;
use std::io;

pub use crate::daemon::exit::*;

/// The end of a command that did not do its work; printed to stderr as it displays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    error: String,
    cause: Option<String>,
    help: Option<String>,
    code: u8,
}

impl Failure {
    /// A failure with exit code 1.
    pub fn new(error: impl Into<String>) -> Self {
        Self { error: error.into(), cause: None, help: None, code: FAILED }
    }

    /// A command line or configuration that makes no sense.
    pub fn usage(error: impl Into<String>) -> Self {
        Self::new(error).code(USAGE)
    }

    /// Adds why it happened.
    #[must_use]
    pub fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// Adds what to type next.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Sets the exit code: one of the constants of this module.
    #[must_use]
    pub fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// The exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        self.code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.error)?;
        if let Some(cause) = &self.cause {
            write!(f, "\ncause: {cause}")?;
        }
        if let Some(help) = &self.help {
            write!(f, "\nhelp: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

impl From<anyhow::Error> for Failure {
    /// The outermost message is the error, what lies under it the cause. A missing right anywhere
    /// in the chain sets the exit code.
    fn from(error: anyhow::Error) -> Self {
        if let Some(failure) = error.downcast_ref::<Self>() {
            return failure.clone();
        }
        let mut causes: Vec<String> = Vec::new();
        let mut said = error.to_string();
        for cause in error.chain().skip(1).map(ToString::to_string) {
            // Many errors repeat their source in their own text.
            if !said.contains(&cause) {
                causes.push(cause.clone());
            }
            said = cause;
        }
        let denied = error.chain().any(|cause| {
            cause
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
        });
        let failure = Self::new(error.to_string()).code(if denied { PERMISSION } else { FAILED });
        if causes.is_empty() { failure } else { failure.cause(causes.join(": ")) }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_failure_is_printed_on_one_line_for_each_part() {
        let failure = Failure::new("cannot bind").cause("taken").help("try another port");
        assert_eq!(failure.to_string(), "error: cannot bind\ncause: taken\nhelp: try another port");
        assert_eq!(failure.exit_code(), FAILED);
    }

    #[test]
    fn a_missing_right_anywhere_below_sets_the_code() {
        let error = Err::<(), _>(io::Error::from(io::ErrorKind::PermissionDenied))
            .context("opening the store")
            .unwrap_err();
        let failure = Failure::from(error);
        assert_eq!(failure.exit_code(), PERMISSION);
        assert_eq!(failure.to_string(), "error: opening the store\ncause: permission denied");
    }
}
