//! How a command fails: what happened, why, and the next thing to type.

use std::error::Error;
use std::fmt;
use std::io;

use nix::errno::Errno;

pub use crate::daemon::exit::*;
use crate::io::local::Refusal;
use crate::wire::join::without_lines;

/// The end of a command that did not do its work; printed to stderr as it displays.
///
/// No part can be left out: whoever reads it may never have seen this program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    error: String,
    cause: String,
    help: String,
    code: u8,
}

impl Failure {
    /// A failure with exit code 1: what happened, why, and what to type next.
    pub fn new(
        error: impl fmt::Display,
        cause: impl fmt::Display,
        help: impl fmt::Display,
    ) -> Self {
        Self {
            error: error.to_string(),
            cause: cause.to_string(),
            help: help.to_string(),
            code: FAILED,
        }
    }

    /// A failure whose cause is `error` with all that lies under it. A missing right anywhere in
    /// there sets the exit code.
    pub fn caused_by(
        what: impl fmt::Display,
        error: &(dyn Error + 'static),
        help: impl fmt::Display,
    ) -> Self {
        let code = if is_denied(error) { PERMISSION } else { FAILED };
        Self::new(what, causes(error), help).code(code)
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
        writeln!(f, "error: {}", indented(&self.error))?;
        writeln!(f, "cause: {}", indented(&self.cause))?;
        write!(f, "help: {}", indented(&self.help))
    }
}

impl Error for Failure {}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let Refusal { code, error, cause, help } = refusal;
        Self { error, cause, help, code }
    }
}

/// Further lines of a part stand to the right, so that each of the three words starts one line. A join
/// line that was typed in the wrong place is not repeated: it has a secret.
fn indented(text: &str) -> String {
    without_lines(text.trim()).replace('\n', "\n       ")
}

/// The text of an error and of what lies under it. Many errors repeat their source in their own
/// text; it is said once.
pub(super) fn causes(error: &(dyn Error + 'static)) -> String {
    let mut said = error.to_string();
    let mut all = said.clone();
    for cause in chain(error).skip(1).map(ToString::to_string) {
        if !said.contains(&cause) {
            all = format!("{all}: {cause}");
        }
        said = cause;
    }
    all
}

/// Whether the kernel refused something that another user would have got.
pub(super) fn is_denied(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(|cause| {
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        let number = cause.downcast_ref::<Errno>();
        kind == Some(io::ErrorKind::PermissionDenied)
            || matches!(number, Some(Errno::EPERM | Errno::EACCES))
    })
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn each_part_starts_one_line() {
        let failure = Failure::new("cannot bind", "taken\nby error: nobody", "try another port");
        assert_eq!(
            failure.to_string(),
            "error: cannot bind\ncause: taken\n       by error: nobody\nhelp: try another port"
        );
        assert_eq!(failure.exit_code(), FAILED);
    }

    #[test]
    fn a_missing_right_anywhere_below_sets_the_code() {
        for denied in [
            anyhow::Error::new(io::Error::from(io::ErrorKind::PermissionDenied)),
            anyhow::Error::new(Errno::EPERM),
        ] {
            let error = Err::<(), _>(denied).context("opening the store").unwrap_err();
            let failure = Failure::caused_by("cannot start", error.as_ref(), "use sudo");
            assert_eq!(failure.exit_code(), PERMISSION);
            let text = failure.to_string();
            assert!(text.contains("\ncause: opening the store: "), "{text}");
        }
    }

    #[test]
    fn a_source_that_an_error_repeats_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("reading x: {source}")]
        struct Repeats {
            source: io::Error,
        }
        let source = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(causes(&Repeats { source }), "reading x: entity not found");
    }
}
