//! Namespaces for the whole run: the tests start themselves again inside them.
//!
//! Inside, the run has its own mounts, network and process ids, and the kernel ends and frees all
//! of it with the run, also when the run is killed. As a plain user a user namespace comes first,
//! in which the run is root over its own things only.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::mount::{MsFlags, mount};
use nix::unistd::Uid;

use crate::case::Needs;

/// Where the run keeps its files: memory that is gone with the run.
pub(crate) const WORK_DIR: &str = "/run/e2e";

/// What the run cannot do here.
pub(crate) struct Limits {
    /// Why no test at all can run.
    all: Option<String>,
    /// Why no systemd can be booted.
    systemd: Option<String>,
    /// A test that cannot run has failed (set by `tests/run`).
    pub(crate) strict: bool,
}

impl Limits {
    pub(crate) fn none() -> Self {
        Self { all: None, systemd: None, strict: false }
    }

    pub(crate) fn reason_against(&self, needs: Needs) -> Option<String> {
        match needs {
            Needs::Namespaces => self.all.clone(),
            Needs::Systemd => self.all.clone().or_else(|| self.systemd.clone()),
        }
    }
}

/// How the attempt to get into the namespaces went.
pub(crate) enum Entry {
    /// This process is inside.
    Inside(Limits),
    /// Another process was inside, has run the tests and has ended so.
    Done(ExitCode),
    /// Nothing can be run here.
    Impossible(Limits),
}

/// Whether the run has the machine's own root rights.
pub(crate) fn is_real_root() -> bool {
    env::var_os(INSIDE).is_some_and(|who| who == "root")
}

pub(crate) fn enter() -> Entry {
    let strict = env::var_os("OVERLAY_TEST_STRICT").is_some_and(|value| value == "1");
    if env::var_os(INSIDE).is_some() {
        prepare_inside();
        return Entry::Inside(Limits { all: None, systemd: systemd_limit(), strict });
    }
    let all = match missing_tools(&TOOLS) {
        Some(reason) => Some(reason),
        None => trial_run(),
    };
    if let Some(reason) = all {
        return Entry::Impossible(Limits { all: Some(reason), systemd: None, strict });
    }
    let status = inside(&env::current_exe().unwrap())
        .args(env::args_os().skip(1))
        .env(INSIDE, if Uid::effective().is_root() { "root" } else { "user" })
        .status()
        .unwrap();
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Entry::Done(ExitCode::from(code))
}

/// A command that runs `program` in new namespaces which die with this process.
fn inside(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare"]);
    if !Uid::effective().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL"]);
    command.args(["--mount-proc", "--"]).arg(program).env("PATH", search_path());
    // Settings of the user for the program under test have no place in its tests.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("OVERLAY_") && !name.starts_with("OVERLAY_TEST_") {
            command.env_remove(name.as_ref());
        }
    }
    command
}

/// Tries what every test needs; the answer is the reason why it cannot be had.
fn trial_run() -> Option<String> {
    let script = "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip netns add a && \
                  ip -n a link set lo up && ip -n a tuntap add dev t mode tun && \
                  ip netns exec a nft add table ip nat";
    let output = inside(Path::new("sh")).args(["-ec", script]).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let line = stderr.lines().last().unwrap_or("no reason given").to_owned();
            Some(format!("network namespaces cannot be made here ({line})"))
        }
        Err(error) => Some(format!("network namespaces cannot be made here ({error})")),
    }
}

fn prepare_inside() {
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
    fs::create_dir("/run/netns").unwrap();
    fs::create_dir(WORK_DIR).unwrap();
}

fn systemd_limit() -> Option<String> {
    if !is_real_root() {
        return Some("booting a systemd needs root".to_owned());
    }
    missing_tools(&["systemd-nspawn", "dbus-daemon"])
}

fn missing_tools(tools: &[&str]) -> Option<String> {
    let path = search_path();
    let missing: Vec<&str> = tools
        .iter()
        .copied()
        .filter(|tool| !env::split_paths(&path).any(|folder| folder.join(tool).is_file()))
        .collect();
    (!missing.is_empty()).then(|| format!("not installed: {}", missing.join(", ")))
}

/// The user's `PATH`, and the folders of system programs that a plain user's `PATH` may lack.
fn search_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

/// Set inside the namespaces; the value says who the run is outside of them.
const INSIDE: &str = "OVERLAY_TEST_INSIDE";

const TOOLS: [&str; 9] =
    ["ip", "nft", "ping", "conntrack", "miniupnpd", "unshare", "nsenter", "setpriv", "sh"];
