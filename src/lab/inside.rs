//! The lab's first process: builds the machines and the internet, tells the story, stays up.
//!
//! It is process 1 of a PID namespace, so its end is the end of everything in the lab.

use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use ipnet::Ipv4Net;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::forwarder::Forwarder;
use super::internet::{Internet, Link, Router, Site, UdpPolicy};
use super::machine::{Machine, MachinePlan};
use super::nat::{Nat, NatKind};
use super::ping::ping;
use super::report::{MachineReport, Report, drawing, milliseconds};
use super::state::{LabState, MachineState};
use super::story::{Overlay, socket};
use super::{LabOptions, program};
use crate::io::clock;

/// Runs the lab until its standard input ends. For the process that `overlay lab` starts.
///
/// # Errors
/// When a step fails; the report has been printed then.
pub fn inside(options: &LabOptions, directory: &Path) -> Result<ExitCode> {
    // Before the new /proc is there, this link gives the number that the starter knows.
    let pid = std::fs::read_link("/proc/self").context("reading /proc/self")?;
    let pid = pid.to_string_lossy().parse().context("reading /proc/self")?;
    prepare_mounts(directory)?;
    let mut run = Run {
        options,
        directory,
        pid,
        shutdown: Shutdown::when_stdin_ends(),
        report: Report::new(options),
        overlay: Overlay::default(),
        lab: None,
    };
    let result = run.perform();
    run.overlay.stop();
    let mut report = run.report;
    if let Some(internet) = run.lab.and_then(|lab| lab.forwarder.stop()) {
        report.set_drops(internet.drops());
    }
    match result {
        Err(error) if error.is::<Stopped>() => Ok(ExitCode::from(INTERRUPTED)),
        Err(error) => {
            report.failed(&error);
            report.print_json();
            Err(error)
        }
        Ok(()) => {
            if options.check {
                report.print_json();
            }
            Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// One run from the first machine to the last word.
struct Run<'a> {
    options: &'a LabOptions,
    directory: &'a Path,
    pid: i32,
    shutdown: Shutdown,
    report: Report,
    overlay: Overlay,
    lab: Option<Lab>,
}

impl Run<'_> {
    fn perform(&mut self) -> Result<()> {
        let Self { options, directory, shutdown, report, overlay, .. } = self;
        let lab = self.lab.insert(Lab::build(options, report)?);
        lab.check_links(options, shutdown, report)?;
        let state = lab.state(self.pid, directory, options)?;
        if !options.bare {
            overlay.tell(options, &lab.machines, directory, shutdown, report)?;
        }
        state.write(directory)?;
        // A node that has died is the better explanation of a missing answer.
        overlay.check_running()?;
        let verdict = if options.bare { Ok(()) } else { overlay.verdict(options, report) };
        match verdict {
            Ok(()) => report.ok = true,
            Err(error) if options.check => return Err(error),
            // It stays up, so that one can look for the reason.
            Err(error) => {
                report.failed(&error);
                report.say(&format!("\n  FAIL {error:#}"));
            }
        }
        if options.check {
            return Ok(());
        }
        report.print_json();
        self.stay()
    }

    fn stay(&mut self) -> Result<()> {
        let example = if self.options.bare { "COMMAND" } else { "overlay status" };
        self.report.say("");
        let exec = format!("{} lab exec alice -- {example}", program());
        self.report.say(&format!("  run anything inside:  {exec}"));
        self.report.say("  stop:                 Ctrl-C");
        // To stop the server or a node, and see what the others make of it, is what a lab is for.
        while self.shutdown.sleep(WATCH).is_ok() {
            for end in self.overlay.ends_to_tell() {
                self.report.say(&format!("\n  {end}"));
            }
        }
        Ok(())
    }
}

/// The machines and what connects them.
struct Lab {
    machines: Vec<Machine>,
    forwarder: Forwarder,
}

impl Lab {
    fn build(options: &LabOptions, report: &mut Report) -> Result<Self> {
        report.say(&drawing(options));
        report.begin();
        let mut machines = Vec::new();
        let mut tuns = Vec::new();
        let mut sites = Vec::new();
        for (name, public, kind, link) in homes(options) {
            let gateway = (kind != NatKind::None).then_some(LAN_GATEWAY);
            let address = if gateway.is_some() { LAN_HOST } else { public };
            let plan = MachinePlan { name, address: Ipv4Net::new(address, 24)?, gateway };
            let (machine, tun) = Machine::create(plan)?;
            machines.push(machine);
            tuns.push(tun);
            let nat = Nat::new(kind, public.into(), SEED + u64::from(public.octets()[3]));
            let router = gateway.map(|lan_address| Router { lan_address, nat });
            sites.push(Site { public, router, link });
            report.machines.push(MachineReport {
                name: name.to_owned(),
                address,
                public,
                overlay_ipv4: None,
            });
        }
        let forwarder = Forwarder::start(Internet::new(sites, SEED), tuns)
            .context("starting the internet's thread")?;
        let nats = options.nats.iter().filter(|kind| **kind != NatKind::None).count();
        report.done("internet", &format!("{} machines, {nats} NATs", machines.len()));
        Ok(Self { machines, forwarder })
    }

    /// The kernel of each home must reach the server, before anything else is blamed.
    fn check_links(
        &self,
        options: &LabOptions,
        shutdown: &Shutdown,
        report: &mut Report,
    ) -> Result<()> {
        let timeout = Duration::from_secs(1) + options.round_trip();
        let tries = if options.loss_percent > 0.0 { LOSSY_TRIES } else { 1 };
        let mut times = Vec::new();
        for machine in self.machines.iter().filter(|machine| machine.name != "server") {
            let name = machine.name;
            let mut answer = None;
            for _ in 0..tries {
                shutdown.check()?;
                answer = ping(machine, SERVER, 1, timeout)?.into_iter().flatten().next();
                if answer.is_some() {
                    break;
                }
            }
            let answer = answer.with_context(|| format!("{name} cannot reach {SERVER}"))?;
            times.push(format!("{name} {:.1} ms", milliseconds(answer)));
        }
        report.done("links", &format!("the server answers pings: {}", times.join(", ")));
        Ok(())
    }

    fn state(&self, pid: i32, directory: &Path, options: &LabOptions) -> Result<LabState> {
        let namespace = std::fs::metadata("/proc/self/ns/pid").context("reading /proc")?;
        let machine = |machine: &Machine| MachineState {
            name: machine.name.to_owned(),
            address: machine.address.addr(),
            namespace_fd: machine.namespace_fd(),
            socket: (!options.bare).then(|| socket(directory, machine.name)),
            state_dir: (!options.bare).then(|| directory.join(machine.name)),
        };
        Ok(LabState {
            schema: 1,
            pid,
            pid_namespace: namespace.ino(),
            started_unix: clock::unix_seconds(),
            machines: self.machines.iter().map(machine).collect(),
        })
    }
}

fn homes(options: &LabOptions) -> [(&'static str, Ipv4Addr, NatKind, Link); 3] {
    let [alice, bob] = options.nats;
    let link =
        Link { delay: options.delay, loss: options.loss_percent / 100.0, udp: UdpPolicy::Allowed };
    let udp = if options.block_udp { UdpPolicy::Blocked } else { UdpPolicy::Allowed };
    [
        ("server", SERVER, NatKind::None, Link::default()),
        ("alice", Ipv4Addr::new(203, 0, 113, 10), alice, Link { udp, ..link }),
        ("bob", Ipv4Addr::new(203, 0, 113, 20), bob, link),
    ]
}

/// A mount namespace in which the lab's files are in memory, the processes are the lab's, and an
/// overlay of the machine itself is out of sight.
fn prepare_mounts(directory: &Path) -> Result<()> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("making mounts private")?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), directory, Some("tmpfs"), safe, Some("mode=0700"))
        .with_context(|| format!("mounting a tmpfs on {}", directory.display()))?;
    for hidden in ["/etc/overlay", "/run/overlay", "/var/lib/overlay"] {
        if Path::new(hidden).is_dir() {
            mount(Some("tmpfs"), hidden, Some("tmpfs"), safe, none)
                .with_context(|| format!("hiding {hidden}"))?;
        }
    }
    // In some containers /proc cannot be mounted; the old one shows too much and works as well.
    let _ = mount(Some("proc"), "/proc", Some("proc"), safe | MsFlags::MS_NOEXEC, none);
    Ok(())
}

/// The sign that the lab is to end.
#[derive(Debug, Clone)]
pub(super) struct Shutdown {
    asked: Arc<AtomicBool>,
}

/// The lab was asked to end before it was ready.
#[derive(Debug, thiserror::Error)]
#[error("stopped")]
pub(super) struct Stopped;

impl Shutdown {
    fn when_stdin_ends() -> Self {
        let asked = Arc::new(AtomicBool::new(false));
        let shutdown = Self { asked: Arc::clone(&asked) };
        std::thread::spawn(move || {
            let mut stdin = std::io::stdin();
            while stdin.read(&mut [0; 64]).is_ok_and(|length| length > 0) {}
            asked.store(true, Ordering::Relaxed);
            std::thread::sleep(LAST_RESORT);
            std::process::exit(1);
        });
        shutdown
    }

    /// Fails if the lab is to end.
    pub(super) fn check(&self) -> Result<()> {
        if self.asked.load(Ordering::Relaxed) { Err(anyhow!(Stopped)) } else { Ok(()) }
    }

    /// Sleeps, or fails if the lab is to end.
    pub(super) fn sleep(&self, time: Duration) -> Result<()> {
        self.check()?;
        std::thread::sleep(time);
        self.check()
    }
}

const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// The same behind every NAT, to show that it does not matter.
const LAN_HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 2);
const LAN_GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

/// Every lab loses the same packets and gives the same random ports.
const SEED: u64 = 41820;

/// Enough for half of the packets lost.
const LOSSY_TRIES: u32 = 20;

/// How soon the end of a node is noticed.
const WATCH: Duration = Duration::from_millis(100);

/// After this the kernel ends what has not ended in order.
const LAST_RESORT: Duration = Duration::from_secs(6);

/// What shells give for Ctrl-C.
const INTERRUPTED: u8 = 130;
