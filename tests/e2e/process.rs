//! Child processes: run to an end within a time limit, or kept and killed on drop.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::clock::{now, wait_for};

/// What a finished program left.
#[derive(Debug)]
pub(crate) struct Output {
    /// `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// Returns what was printed to stdout.
    ///
    /// # Panics
    /// When the program failed.
    pub(crate) fn success(self, what: &str) -> String {
        assert_eq!(self.code, Some(0), "{what} failed\n{}{}", self.stdout, self.stderr);
        self.stdout
    }
}

/// Runs `command` with nothing on stdin and collects what it prints.
///
/// # Panics
/// When it does not end within `limit`.
pub(crate) fn run(command: Command, limit: Duration) -> Output {
    run_with_input(command, "", limit)
}

pub(crate) fn run_with_input(mut command: Command, input: &str, limit: Duration) -> Output {
    let what = format!("{command:?}");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {what}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    // A program may end without having read its input.
    let _ = std::io::Write::write_all(&mut stdin, input.as_bytes());
    drop(stdin);
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let start = now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            let printed = format!("{}{}", stdout.join().unwrap(), stderr.join().unwrap());
            panic!("{what} did not end within {limit:?}\n{printed}");
        }
        thread::sleep(Duration::from_millis(2));
    };
    Output { code: status.code(), stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A program that runs beside the test, with both outputs in one file; killed on drop.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
    exit: Option<ExitStatus>,
}

impl Daemon {
    /// Starts `command`; `log` is appended to, so that a restart keeps the story in one file.
    pub(crate) fn start(mut command: Command, log: &Path) -> Self {
        let file = File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        Self { child, log: log.to_owned(), exit: None }
    }

    /// The process id. The commands of these tests run their program by `exec`, so it is its own.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if self.exit.is_none() {
            let _ = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
        }
    }

    /// Whether it has ended, and how.
    pub(crate) fn exit(&mut self) -> Option<ExitStatus> {
        if self.exit.is_none() {
            self.exit = self.child.try_wait().unwrap();
        }
        self.exit
    }

    /// Waits for the end and returns the exit code.
    pub(crate) fn wait_exit(&mut self, limit: Duration) -> Option<i32> {
        let what = format!("the end of the program that logs to {}", self.log.display());
        wait_for(&what, limit, || self.exit()).0.code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.exit().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
