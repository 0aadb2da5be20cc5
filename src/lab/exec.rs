//! `overlay lab exec MACHINE -- COMMAND`: runs any command inside a machine of a running lab.
//!
//! The command sees the machine's network, the lab's files and processes, and dies with the lab.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use super::start::exit_code;
use super::state::{self, LabState, MachineState};

/// What to run, and where.
#[derive(Debug, Clone)]
pub struct ExecRequest {
    /// The name of the machine.
    pub machine: String,
    /// Which lab, if several run; the newest otherwise.
    pub lab_pid: Option<i32>,
    /// The program and its arguments; a shell if empty.
    pub command: Vec<OsString>,
}

/// Runs the command from a process that has no other thread yet.
///
/// # Errors
/// When there is no such lab or machine, or when the command cannot be started.
pub fn exec(request: &ExecRequest) -> Result<ExitCode> {
    let running = state::running(&state::labs_directory()?)?;
    let wanted = |lab: &&LabState| request.lab_pid.is_none_or(|pid| pid == lab.pid);
    let Some(lab) = running.iter().find(wanted) else {
        bail!(NoLab { pid: request.lab_pid });
    };
    let Some(machine) = lab.machines.iter().find(|machine| machine.name == request.machine) else {
        let machines = lab.machines.iter().map(|machine| machine.name.clone()).collect();
        bail!(NoMachine { name: request.machine.clone(), machines });
    };
    let us = std::env::current_exe().ok();
    enter(lab, machine)?;
    run(command(request, machine, us.as_deref()))
}

/// There is nothing to run a command in.
#[derive(Debug, thiserror::Error)]
#[error("no lab of yours is running")]
pub struct NoLab {
    /// The lab that was asked for, if it was a certain one.
    pub pid: Option<i32>,
}

/// The lab has no such machine.
#[derive(Debug, thiserror::Error)]
#[error("there is no machine \"{name}\" in the lab")]
pub struct NoMachine {
    /// What was asked for.
    pub name: String,
    /// What there is.
    pub machines: Vec<String>,
}

/// The command cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("{program} cannot be started")]
pub struct NotStarted {
    /// The command.
    pub program: String,
    /// What the kernel said.
    #[source]
    pub source: std::io::Error,
}

fn enter(lab: &LabState, machine: &MachineState) -> Result<()> {
    let here = std::env::current_dir().ok();
    let open = |what: String| {
        let path = format!("/proc/{}/{what}", lab.pid);
        File::open(&path).with_context(|| format!("opening {path}"))
    };
    let user = open("ns/user".to_owned())?;
    let rest = [
        (open("ns/pid".to_owned())?, CloneFlags::CLONE_NEWPID),
        (open("ns/mnt".to_owned())?, CloneFlags::CLONE_NEWNS),
        (open(format!("fd/{}", machine.namespace_fd))?, CloneFlags::CLONE_NEWNET),
    ];
    let ours = std::fs::metadata("/proc/self/ns/user")?.ino();
    if user.metadata()?.ino() != ours {
        setns(&user, CloneFlags::CLONE_NEWUSER).context("entering the lab's user namespace")?;
    }
    for (namespace, kind) in rest {
        setns(&namespace, kind).context("entering the lab's namespaces")?;
    }
    if let Some(here) = here {
        // Entering a mount namespace leads to its root.
        let _ = std::env::set_current_dir(here);
    }
    Ok(())
}

fn command(request: &ExecRequest, machine: &MachineState, us: Option<&Path>) -> Command {
    let shell = || std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into());
    let mut words = request.command.iter().cloned();
    let mut command = Command::new(words.next().unwrap_or_else(shell));
    command.args(words);
    if let Some(socket) = &machine.socket {
        command.env("OVERLAY_SOCKET", socket);
    }
    if let Some(state_dir) = &machine.state_dir {
        command.env("OVERLAY_STATE_DIR", state_dir).env("OVERLAY_NAME", &machine.name);
    }
    // `overlay status` shall mean this very program, installed or not.
    if let Some(directory) = us.and_then(Path::parent) {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let all = std::iter::once(PathBuf::from(directory)).chain(std::env::split_paths(&path));
        if let Ok(path) = std::env::join_paths(all) {
            command.env("PATH", path);
        }
    }
    command
}

fn run(command: Command) -> Result<ExitCode> {
    let program = command.get_program().to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut child = tokio::process::Command::from(command)
            .spawn()
            .map_err(|source| NotStarted { program: program.display().to_string(), source })?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
        // The terminal sends these two to the command as well: it decides what they mean.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut quit = signal(SignalKind::quit())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        loop {
            let forward = tokio::select! {
                status = child.wait() => return Ok(exit_code(status?)),
                _ = interrupt.recv() => None,
                _ = quit.recv() => None,
                _ = terminate.recv() => Some(Signal::SIGTERM),
                _ = hangup.recv() => Some(Signal::SIGHUP),
            };
            if let (Some(pid), Some(forward)) = (pid, forward) {
                let _ = kill(pid, forward);
            }
        }
    })
}
