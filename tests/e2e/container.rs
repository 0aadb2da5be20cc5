//! A real systemd, booted by `systemd-nspawn` from the machine's own `/usr`.
//!
//! Everything else of the machine's files is hidden from it: `/etc` and `/var` are empty and in
//! memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::clock::wait_for;
use crate::lab::{Host, Net};
use crate::overlay::{binary, path};
use crate::process::{self, Daemon, Output};

/// A running container in the network namespace of a host; powered off on drop.
pub(crate) struct Container {
    daemon: Daemon,
    leader: u32,
    programs: PathBuf,
    /// Removed when all else is gone.
    _group: ControlGroup,
}

impl Container {
    /// Boots a container with the program under test as `/usr/local/bin/overlay`.
    pub(crate) fn boot(net: &Net, host: &Host) -> Self {
        let name = &host.name;
        let programs = net.dir().join(format!("{name}-bin"));
        fs::create_dir(&programs).unwrap();
        fs::copy(binary(), programs.join("overlay")).unwrap();

        let group = ControlGroup::new();
        let mut command = group.command("systemd-nspawn");
        command.args(["--register=no", "--keep-unit", "--volatile=yes", "-M", name, "-D", "/"]);
        command.arg(format!("--network-namespace-path={}", host.ns.path().display()));
        command.arg(format!("--bind-ro={}:/usr/local/bin", path(&programs)));
        command.args(["--bind=/dev/net/tun", "--capability=CAP_NET_ADMIN", "-b"]);
        // Neither has a part in the tests; both would change or report things of their own.
        for unit in ["systemd-firstboot.service", "systemd-networkd.service", "nftables.service"] {
            command.arg(format!("systemd.mask={unit}"));
        }
        let daemon = Daemon::start(command, &net.log_file(&format!("{name}-console")));
        let (leader, _) =
            wait_for("the container's first process", BOOT_LIMIT, || first_process_of(daemon.id()));
        let container = Self { daemon, leader, programs, _group: group };
        wait_for("the container has booted", BOOT_LIMIT, || {
            let state = container.run(&["systemctl", "is-system-running"]).stdout;
            ["running", "degraded"].contains(&state.trim()).then_some(())
        });
        container
    }

    /// Runs a program inside.
    pub(crate) fn run(&self, words: &[&str]) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.leader.to_string(), "--all", "--"]).args(words);
        process::run(command, Duration::from_secs(60))
    }

    /// Runs a program inside that has to succeed, and returns what it printed.
    pub(crate) fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        if output.code != Some(0) {
            let journal = self.run(&["journalctl", "--no-pager", "-n", "60"]).stdout;
            panic!("{words:?} failed: {output:#?}\n{journal}");
        }
        output.stdout
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // nspawn hands this on as an orderly power-off.
        self.daemon.signal(Signal::SIGTERM);
        for _ in 0..500 {
            if self.daemon.exit().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = fs::remove_dir_all(&self.programs);
    }
}

/// A control group of its own: two containers that share one would have one group for the services
/// of the same name in both.
struct ControlGroup {
    folders: Vec<PathBuf>,
}

impl ControlGroup {
    /// Below our own, in each hierarchy that systemd keeps its services in.
    fn new() -> Self {
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let folders = own.lines().filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let roots = match fields.next()? {
                "" => ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"],
                "name=systemd" => ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup/systemd"],
                _ => return None,
            };
            let below = fields.next()?.trim_start_matches('/');
            let own = roots.map(|root| Path::new(root).join(below));
            own.into_iter().find(|folder| folder.join("cgroup.procs").exists())
        });
        let folders: Vec<PathBuf> =
            folders.map(|own| own.join(format!("overlay-test-{}", id.trim()))).collect();
        for folder in &folders {
            fs::create_dir(folder).unwrap();
        }
        Self { folders }
    }

    /// A command that runs `program` in it.
    fn command(&self, program: &str) -> Command {
        let enter = |folder: &PathBuf| format!("echo 0 > {}/cgroup.procs\n", path(folder));
        let script: String = self.folders.iter().map(enter).collect();
        let mut command = Command::new("sh");
        command.args(["-ec", &format!("{script}exec \"$@\""), "sh", program]);
        command
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        self.folders.iter().for_each(|folder| remove_group(folder));
    }
}

/// Removes a control group with all below it. One that still holds somebody stays.
fn remove_group(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

/// The child of `nspawn` that is number one in its own process id namespace.
fn first_process_of(nspawn: u32) -> Option<u32> {
    fs::read_dir("/proc").ok()?.find_map(|entry| {
        let id: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
        let field = |name| status.lines().find_map(|line: &str| line.strip_prefix(name));
        let is_child = field("PPid:")?.trim().parse() == Ok(nspawn);
        let numbers: Vec<&str> = field("NSpid:")?.split_whitespace().collect();
        (is_child && numbers.len() > 1 && numbers.last() == Some(&"1")).then_some(id)
    })
}

/// It takes four seconds on two idle cores.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
