//! The command `overlay lab` as the terminal sees it: makes the user and PID namespaces, starts the
//! lab inside them, waits for it, and tidies up.
//!
//! The lab itself is a second process of this program ([`super::inside`]), the first one of a PID
//! namespace. When it dies, for whatever reason, the kernel kills everything else in there. It dies
//! when its standard input ends, so it cannot outlive this process either.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use tokio::signal::unix::{SignalKind, signal};

use super::{LabOptions, program, state};

/// Why there can be no lab here.
#[derive(Debug, thiserror::Error)]
#[error("this machine does not allow user namespaces")]
pub struct NamespacesForbidden {
    errno: Errno,
    settings: Vec<Setting>,
}

/// A kernel setting that can forbid namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    name: &'static str,
    value: String,
    forbids: bool,
    remedy: &'static str,
}

/// Runs a lab from a process that has no other thread yet.
///
/// # Errors
/// When the lab cannot be started; what goes wrong in it is told by its exit code.
pub fn start(options: &LabOptions) -> Result<ExitCode> {
    let labs = state::labs_directory()?;
    state::running(&labs)?;
    isolate()?;
    let directory = state::create_lab_directory(&labs)?;
    let result = supervise(options, &directory);
    state::remove_lab_files(&directory);
    result
}

fn supervise(options: &LabOptions, directory: &Path) -> Result<ExitCode> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(program())
        .args(["lab", "--inside"])
        .arg(directory)
        .args(options.to_args())
        .stdin(Stdio::piped())
        // Ctrl-C is for this process, which ends the lab in order.
        .process_group(0);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OVERLAY_") && name != "OVERLAY_LOG" {
            command.env_remove(name);
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut lab = tokio::process::Command::from(command);
        let mut child =
            lab.kill_on_drop(true).spawn().context("starting the lab's first process")?;
        let lifeline = child.stdin.take();
        tokio::select! {
            status = child.wait() => return Ok(status?),
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        drop(lifeline);
        if let Ok(status) = tokio::time::timeout(GRACE, child.wait()).await {
            return Ok(status?);
        }
        child.kill().await?;
        anyhow::Ok(child.wait().await?)
    })?;
    Ok(exit_code(status))
}

/// The exit code of a shell for a child that ended so.
pub(super) fn exit_code(status: ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// Goes into a new PID namespace for the children, by way of a user namespace where that is needed.
fn isolate() -> Result<()> {
    let user = nix::unistd::geteuid();
    let group = nix::unistd::getegid();
    if user.is_root() && unshare(CloneFlags::CLONE_NEWPID).is_ok() {
        return Ok(());
    }
    let forbidden = |errno| NamespacesForbidden { errno, settings: settings() };
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID).map_err(forbidden)?;
    // Some systems allow the namespace and then take every right in it away: here it shows.
    for (file, content) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {user} 1")),
        ("/proc/self/gid_map", format!("0 {group} 1")),
    ] {
        std::fs::write(file, content).map_err(|error| {
            forbidden(error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw))
        })?;
    }
    unshare(CloneFlags::CLONE_NEWNS).map_err(forbidden)?;
    Ok(())
}

impl NamespacesForbidden {
    /// The kernel settings that forbid it with their values; if none does, what else there is.
    pub fn cause(&self) -> String {
        let show = |setting: &Setting| format!("{} = {}", setting.name, setting.value);
        let forbidding: Vec<String> =
            self.settings.iter().filter(|setting| setting.forbids).map(show).collect();
        if !forbidding.is_empty() {
            return format!("{} ({})", forbidding.join(", "), self.errno);
        }
        let all: Vec<String> = self.settings.iter().map(show).collect();
        let known =
            if all.is_empty() { "no kernel setting is known".into() } else { all.join(", ") };
        format!("{}; the kernel settings allow it ({known}), so a container forbids it", self.errno)
    }

    /// What a person can do about it.
    pub fn help(&self) -> String {
        let sudo = "or run it as root: sudo overlay lab";
        match self.settings.iter().find(|setting| setting.forbids) {
            Some(setting) => format!("{}, {sudo}", setting.remedy),
            None => format!(
                "in a container allow it (docker run --privileged --device /dev/net/tun), {sudo}"
            ),
        }
    }
}

fn settings() -> Vec<Setting> {
    let known = [
        ("kernel.unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
        ("user.max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=10000"),
        ("user.max_pid_namespaces", "0", "sudo sysctl user.max_pid_namespaces=10000"),
        ("user.max_net_namespaces", "0", "sudo sysctl user.max_net_namespaces=10000"),
        (
            "kernel.apparmor_restrict_unprivileged_userns",
            "1",
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ];
    known
        .into_iter()
        .filter_map(|(name, forbidding, remedy)| {
            let file = format!("/proc/sys/{}", name.replace('.', "/"));
            let value = std::fs::read_to_string(file).ok()?.trim().to_owned();
            Some(Setting { name, forbids: value == forbidding, value, remedy })
        })
        .collect()
}

/// The lab ends its nodes in order first, within less than this.
const GRACE: Duration = Duration::from_secs(8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forbidden_namespace_names_the_setting_its_value_and_the_sudo_way() {
        let settings = vec![
            Setting {
                name: "user.max_user_namespaces",
                value: "7000".to_owned(),
                forbids: false,
                remedy: "",
            },
            Setting {
                name: "kernel.apparmor_restrict_unprivileged_userns",
                value: "1".to_owned(),
                forbids: true,
                remedy: "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
            },
        ];
        let error = NamespacesForbidden { errno: Errno::EPERM, settings };
        let cause = error.cause();
        assert!(cause.contains("EPERM"), "{cause}");
        assert!(cause.starts_with("kernel.apparmor_restrict_unprivileged_userns = 1"), "{cause}");
        let help = error.help();
        assert!(help.starts_with("sudo sysctl kernel.apparmor"), "{help}");
        assert!(help.ends_with("sudo overlay lab"), "{help}");
    }
}
