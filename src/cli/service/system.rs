//! What a service needs of the machine: systemd, a user, a program that it may run.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::unistd::{Gid, Group, Uid, User, geteuid};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::Service;
use crate::cli::fail::{Failure, PERMISSION};
use crate::cli::print::hint;
use crate::cli::runtime;

/// User and group of both services; members of the group may ask the daemons.
const ACCOUNT: &str = "overlay";
/// Where the unit files say that the program is, and where it is put if it cannot stay.
pub(super) const USUAL_PROGRAM: &str = "/usr/local/bin/overlay";
/// For commands that only look or write small files.
const QUICK: Duration = Duration::from_secs(20);

/// The user that the services run as.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
}

/// What a program left.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) code: Option<i32>,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Ran {
    fn success(self, what: &str) -> Result<Self, Failure> {
        if self.code == Some(0) {
            return Ok(self);
        }
        let cause = match (self.stderr.trim(), self.code) {
            ("", Some(code)) => format!("it ended with exit code {code} and no word"),
            ("", None) => "it was killed".into(),
            (said, _) => said.to_string(),
        };
        let help = format!("try it by hand: sudo {what}");
        Err(Failure::new(format!("`{what}` did not work"), cause, help))
    }
}

pub(super) fn need_root(command: &str) -> Result<(), Failure> {
    if geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::new(
        "only root may do that",
        "services belong to the whole machine",
        format!("sudo overlay service {command}"),
    )
    .code(PERMISSION))
}

/// systemd itself says that this is how to know (sd_booted(3)).
pub(super) fn need_systemd() -> Result<(), Failure> {
    if Path::new("/run/systemd/system").is_dir() {
        return Ok(());
    }
    Err(Failure::new(
        "systemd does not run here",
        "there is no /run/systemd/system, as in most containers",
        "without systemd: sudo overlay up JOINLINE, or overlay server",
    ))
}

/// Runs a program to its end with `input` on its standard input.
pub(super) fn run(mut command: Command, input: &str, limit: Duration) -> Result<Ran, Failure> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let failed = |error: io::Error| {
        let help = format!("see whether it is installed: command -v {name}");
        Failure::caused_by(format!("{name} cannot be run"), &error, help)
    };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let ending = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program may end without having read its input.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    // The clock of the limit is the runtime's, so it is made inside.
    let done =
        runtime::on_this_thread()?.block_on(async { tokio::time::timeout(limit, ending).await });
    let Ok(output) = done else {
        return Err(Failure::new(
            format!("{name} takes too long"),
            format!("it did not end within {} s", limit.as_secs()),
            "see what systemd is busy with: systemctl list-jobs",
        ));
    };
    let output = output.map_err(failed)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Ran {
        code: output.status.code(),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    })
}

fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Runs systemctl, which has to succeed.
pub(super) fn systemctl(arguments: &[&str], limit: Duration) -> Result<(), Failure> {
    let what = format!("systemctl {}", arguments.join(" "));
    run(command("systemctl", arguments), "", limit)?.success(&what).map(drop)
}

/// Stops and removes the units that older versions have installed. One that nobody can remove is
/// told of when its port is wanted.
pub(super) fn remove_stale(service: Service) {
    for unit in service.stale() {
        let file = service.unit_file().with_file_name(unit);
        if file.exists() {
            let _ = systemctl(&["disable", "--quiet", "--now", unit], QUICK);
            let _ = fs::remove_file(&file);
            hint(format_args!("removed {unit}, which an older version has installed"));
        }
    }
}

/// The last lines that a service wrote.
pub(super) fn journal(service: Service) -> String {
    let arguments = ["-u", service.unit(), "-n", "20", "--no-pager", "-o", "cat"];
    run(command("journalctl", &arguments), "", QUICK).map(|ran| ran.stdout).unwrap_or_default()
}

/// What systemd knows of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnitState {
    pub(super) installed: bool,
    /// `enabled`, `disabled`, ...
    pub(super) enabled: String,
    /// `active`, `inactive`, `failed`, `activating`, ...
    pub(super) active: String,
    /// What the daemon says about itself.
    pub(super) text: String,
}

impl UnitState {
    pub(super) fn of(service: Service) -> Result<Self, Failure> {
        let properties = "-pLoadState,UnitFileState,ActiveState,StatusText";
        let arguments = ["show", "--no-pager", properties, service.unit()];
        let ran = run(command("systemctl", &arguments), "", QUICK)?.success("systemctl show")?;
        Ok(Self::parse(&ran.stdout))
    }

    fn parse(shown: &str) -> Self {
        let value = |name: &str| {
            let values = shown.lines().filter_map(|line| line.split_once('='));
            values
                .filter(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .next()
                .unwrap_or_default()
        };
        Self {
            installed: value("LoadState") != "not-found",
            enabled: value("UnitFileState").into(),
            active: value("ActiveState").into(),
            text: value("StatusText").into(),
        }
    }

    /// Whether it runs, or is about to: also one that fails and is started again and again.
    pub(super) fn is_busy(&self) -> bool {
        self.installed && !["inactive", "failed"].contains(&self.active.as_str())
    }

    pub(super) fn is_active(&self) -> bool {
        self.active == "active"
    }
}

/// The user of the services, made if it is not there.
pub(super) fn account() -> Result<Account, Failure> {
    if let Some(account) = find_account() {
        return Ok(account);
    }
    let line = format!("u {ACCOUNT} - \"overlay virtual LAN\"");
    let useradd = [
        "--system",
        "--user-group",
        "--no-create-home",
        "--home-dir",
        "/",
        "--shell",
        "/usr/sbin/nologin",
        ACCOUNT,
    ];
    let mut causes = Vec::new();
    for (program, arguments) in
        [("systemd-sysusers", ["--inline", line.as_str()].as_slice()), ("useradd", &useradd)]
    {
        let made = run(command(program, arguments), "", QUICK).and_then(|ran| ran.success(program));
        if let Some(account) = find_account() {
            return Ok(account);
        }
        if let Err(failure) = made {
            causes.push(failure.to_string().replace('\n', ", "));
        }
    }
    Err(Failure::new(
        format!("the user {ACCOUNT} cannot be made"),
        causes.join("; "),
        format!("make a system user and a group, both with the name {ACCOUNT}, and try again"),
    ))
}

fn find_account() -> Option<Account> {
    let user = User::from_name(ACCOUNT).ok()??;
    let group = Group::from_name(ACCOUNT).ok()??;
    Some(Account { uid: user.uid, gid: group.gid })
}

/// Makes the state directory, and gives it and what is in it to the user of the services.
pub(super) fn give_state(directory: &Path, account: Account) -> Result<(), Failure> {
    let (uid, gid) = (Some(account.uid.as_raw()), Some(account.gid.as_raw()));
    let give = || {
        if let Some(parent) = directory.parent() {
            fs::create_dir_all(parent)?;
        }
        if !directory.is_dir() {
            fs::DirBuilder::new().mode(0o700).create(directory)?;
        }
        // As long as the directory is root's, nobody else can exchange what is in it; and a file
        // with a second name may be one that is only linked to here.
        lchown(directory, Some(0), Some(0))?;
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.metadata()?.nlink() == 1 {
                lchown(entry.path(), uid, gid)?;
            }
        }
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
        lchown(directory, uid, gid)
    };
    give().map_err(|error: io::Error| {
        Failure::caused_by(
            format!("the state directory {} cannot be prepared", directory.display()),
            &error,
            format!("look at it: sudo ls -la {}", directory.display()),
        )
    })
}

/// Makes the directory of the configuration. systemd would give it to the user of the service,
/// and root reads it too.
pub(super) fn make_config_dir(directory: &Path) -> Result<(), Failure> {
    if directory.is_dir() {
        return Ok(());
    }
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(directory);
    made.and_then(|()| fs::set_permissions(directory, fs::Permissions::from_mode(0o755))).map_err(
        |error| {
            Failure::caused_by(
                format!("the directory {} cannot be made", directory.display()),
                &error,
                format!("make it by hand: sudo mkdir -p {}", directory.display()),
            )
        },
    )
}

/// The path of this program as the service will run it; it is copied if it cannot stay.
pub(super) fn program() -> Result<PathBuf, Failure> {
    let running = std::env::current_exe().map_err(|error| {
        let help = format!("run it as {USUAL_PROGRAM}, with /proc mounted");
        Failure::caused_by("it cannot be found out where this program is", &error, help)
    })?;
    if can_stay(&running) {
        return Ok(running);
    }
    let failed = |error: io::Error| {
        Failure::caused_by(
            format!("this program cannot be copied to {USUAL_PROGRAM}"),
            &error,
            "put it into /usr/local/bin or /opt by hand, and run it from there",
        )
    };
    let usual = PathBuf::from(USUAL_PROGRAM);
    let beside = usual.with_extension("new");
    (|| {
        if let Some(parent) = usual.parent() {
            fs::create_dir_all(parent)?;
        }
        // The program as it runs, also when its file was replaced meanwhile.
        fs::copy("/proc/self/exe", &beside)?;
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o755))?;
        fs::rename(&beside, &usual)
    })()
    .map_err(failed)?;
    hint(format_args!(
        "copied {} to {USUAL_PROGRAM}: the service sees no home directory and no /tmp",
        running.display()
    ));
    Ok(usual)
}

/// Whether a service can run the program where it is, and the path needs no quotes in a unit file.
fn can_stay(program: &Path) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._+-".contains(byte);
    let text: &OsStr = program.as_os_str();
    ["/usr", "/opt"].iter().any(|root| program.starts_with(root))
        && text.as_encoded_bytes().iter().all(plain)
        && program.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_in_a_home_or_with_a_strange_name_cannot_stay() {
        for path in ["/home/ann/overlay", "/tmp/overlay", "/root/target/debug/overlay"] {
            assert!(!can_stay(Path::new(path)), "{path}");
        }
        assert!(!can_stay(Path::new("/usr/bin/no such")));
        assert!(!can_stay(Path::new("/usr/bin/overlay (deleted)")));
        assert!(can_stay(Path::new("/usr/bin/env")));
    }

    #[test]
    fn what_systemd_says_about_a_unit_is_understood() {
        let shown = "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n\
                     StatusText=alice at 10.0.0.1=x\n";
        let state = UnitState::parse(shown);
        assert!(state.installed && state.is_active());
        assert_eq!(
            (state.enabled.as_str(), state.text.as_str()),
            ("enabled", "alice at 10.0.0.1=x")
        );
        let state = UnitState::parse("LoadState=not-found\nActiveState=inactive\n");
        assert!(!state.installed && !state.is_active() && !state.is_busy());
        assert!(UnitState::parse("LoadState=loaded\nActiveState=activating\n").is_busy());
    }

    #[test]
    fn a_program_that_hangs_is_not_waited_for() {
        let limit = Duration::from_millis(50);
        let failure = run(command("sleep", &["60"]), "", limit).unwrap_err();
        assert!(failure.to_string().contains("takes too long"), "{failure}");
        let ran = run(command("cat", &[]), "text", QUICK).unwrap();
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), "text"));
    }
}
