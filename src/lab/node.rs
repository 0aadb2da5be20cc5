//! The real `overlay` processes of the lab: started inside a machine, watched, and ended.
//!
//! They are run through the commands and JSON that everybody uses; nothing here knows their insides.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::inside::Shutdown;
use super::machine::Machine;
use super::program;
use crate::io::clock;

/// A process of the lab; it is killed when this is dropped.
pub(super) struct Node {
    what: String,
    machine: &'static str,
    child: Child,
    log: PathBuf,
    end_told: bool,
}

impl Node {
    /// Starts `overlay ARGS` in a machine; what it says goes to `NAME.log` in the lab's directory.
    pub(super) fn start(
        machine: &Machine,
        directory: &Path,
        name: &str,
        args: Vec<OsString>,
        stdout: Stdout,
    ) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let what = format!(
            "overlay {}",
            args.first().map(|it| it.display().to_string()).unwrap_or_default()
        );
        let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let shown = what.clone();
        let child = machine.run(move || {
            let stdout = match stdout {
                Stdout::Log => Stdio::from(file.try_clone()?),
                Stdout::Lines => Stdio::piped(),
            };
            Command::new("/proc/self/exe")
                .arg0("overlay")
                .args(args)
                .stdin(Stdio::null())
                .stdout(stdout)
                .stderr(file)
                .process_group(0)
                .spawn()
                .with_context(|| format!("starting {shown}"))
        })?;
        Ok(Self { what, machine: machine.name, child, log, end_told: false })
    }

    /// Fails with the end of its log if it is no longer running.
    pub(super) fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended: {status}{}", self.what, self.log_tail()),
        }
    }

    /// What to tell a person about its end, the first time that this is asked after it.
    pub(super) fn end_to_tell(&mut self) -> Option<String> {
        if self.end_told {
            return None;
        }
        let status = self.child.try_wait().ok().flatten()?;
        self.end_told = true;
        let (what, machine) = (&self.what, self.machine);
        Some(format!(
            "{what} on {machine} has ended ({status})\n  \
             start it again:       {} lab exec {machine} -- {what}",
            program()
        ))
    }

    /// Waits until `ready` has something, trying again and again.
    pub(super) fn wait_until<T>(
        &mut self,
        goal: &str,
        shutdown: &Shutdown,
        mut ready: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = clock::now() + READY;
        loop {
            if let Some(value) = ready()? {
                return Ok(value);
            }
            self.check_running()?;
            if clock::now() >= deadline {
                let (what, seconds) = (&self.what, READY.as_secs());
                bail!("{what}: {goal} not reached in {seconds} s{}", self.log_tail());
            }
            shutdown.sleep(BETWEEN_TRIES)?;
        }
    }

    /// The lines that it writes to standard output, each with the time when it came.
    pub(super) fn lines(&mut self) -> Lines {
        let (sender, receiver) = sync_channel(LINES);
        if let Some(stdout) = self.child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send((clock::now(), line)).is_err() {
                        return;
                    }
                }
            });
        }
        Lines { receiver }
    }

    /// Waits for its end, at most until `deadline`; then it is killed.
    pub(super) fn wait(&mut self, deadline: Instant, shutdown: &Shutdown) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if clock::now() >= deadline {
                bail!("{} does not come to an end{}", self.what, self.log_tail());
            }
            shutdown.sleep(BETWEEN_TRIES)?;
        }
    }

    /// Asks it to end.
    pub(super) fn ask_to_end(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// The end of its log, as a part of an error message.
    pub(super) fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        if lines.is_empty() {
            return String::from("; it has said nothing");
        }
        let tail = lines.get(lines.len().saturating_sub(LOG_TAIL)..).unwrap_or_default();
        format!("; its last words:\n    {}", tail.join("\n    "))
    }

    fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(pid), signal);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.signal(Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Where a process writes its data.
#[derive(Clone, Copy)]
pub(super) enum Stdout {
    /// To the log.
    Log,
    /// To [`Node::lines`].
    Lines,
}

/// Lines of a process.
pub(super) struct Lines {
    receiver: Receiver<(Instant, String)>,
}

impl Lines {
    /// The next line; nothing if there is none yet.
    pub(super) fn next(&self, wait: Duration) -> Next {
        match self.receiver.recv_timeout(wait) {
            Ok((at, line)) => Next::Line(at, line),
            Err(RecvTimeoutError::Timeout) => Next::Nothing,
            Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }
}

/// What comes next from a process.
pub(super) enum Next {
    /// A line, and when it came.
    Line(Instant, String),
    /// Nothing yet.
    Nothing,
    /// It has closed its output.
    End,
}

/// Runs `overlay ARGS` in a machine to its end and returns what it wrote; its exit status too.
pub(super) fn run(
    machine: &Machine,
    directory: &Path,
    args: Vec<OsString>,
    shutdown: &Shutdown,
) -> Result<(ExitStatus, String, String)> {
    let mut node = Node::start(machine, directory, "command", args, Stdout::Lines)?;
    let lines = node.lines();
    let deadline = clock::now() + COMMAND;
    let mut output = String::new();
    loop {
        match lines.next(BETWEEN_TRIES) {
            Next::Line(_, line) => {
                output.push_str(&line);
                output.push('\n');
            }
            Next::Nothing if clock::now() < deadline => shutdown.check()?,
            Next::Nothing | Next::End => break,
        }
    }
    let status = node.wait(deadline, shutdown)?;
    Ok((status, output, node.log_tail()))
}

/// A node has its address within a second on any machine; a debug build on a busy one needs more.
const READY: Duration = Duration::from_secs(20);

/// A command that only asks a local daemon.
const COMMAND: Duration = Duration::from_secs(10);

/// Short against what a person notices, long against the cost of a try.
const BETWEEN_TRIES: Duration = Duration::from_millis(20);

const LINES: usize = 1024;
const LOG_TAIL: usize = 20;
