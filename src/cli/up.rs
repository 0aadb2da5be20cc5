//! `overlay up`: runs a node in the foreground; systemd starts the same.

mod failure;

use std::io::{BufRead, IsTerminal, Read};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use zeroize::Zeroizing;

use super::fail::{Failure, NOT_ENROLLED, PERMISSION, USAGE};
use super::{Done, print, runtime};
use crate::config::node::{MtuSetting, NodeConfig};
use crate::config::paths::{Paths, Role};
use crate::config::{self, Wanted};
use crate::daemon::node::{Ended, NodeOptions, Offloads, StartError, run as run_node};
use crate::io::memory::keep_memory_private;
use crate::io::tun::check_name;
use crate::node::{Node, NodeSettings};
use crate::telemetry;
use crate::types::NodeName;
use crate::wire::join::{JoinError, JoinLine};
use failure::failure;
pub(super) use failure::{interface_failure, metrics_failure};

pub(super) const DEFAULT_INTERFACE: &str = "overlay0";
/// A node key is renewed after so many days, unless the file says otherwise.
const ROTATE_DAYS: u32 = 30;
/// What RFC 6886 section 3.3 recommends.
const DEFAULT_LEASE: Duration = Duration::from_secs(7200);
/// More than any join line has, in bytes.
const LONGEST_INPUT: u64 = 64 * 1024;
/// How a machine gets in.
const NEW_LINE: &str =
    "on the server: overlay server invite, then on this machine: sudo overlay up JOINLINE";

/// Arguments of `overlay up`.
#[derive(Debug, Clone, Args)]
#[command(
    about = "Join a network, or take part in the one joined before; runs until stopped",
    after_help = "The join line comes from `overlay server invite`. Given as an argument it can \
                  be seen by other users of this machine while the program starts; `-` (standard \
                  input) and file:PATH keep it private."
)]
pub struct UpArgs {
    /// Join line, file:PATH or - [default: the enrolment of the last time]
    #[arg(value_name = "JOINLINE")]
    join: Option<String>,

    /// Configuration file
    #[arg(long, value_name = "F", env = "OVERLAY_CONFIG")]
    config: Option<PathBuf>,

    /// Directory of keys and last netmap
    #[arg(long, value_name = "DIR", env = "OVERLAY_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// Socket for the other commands
    #[arg(long, value_name = "PATH", env = "OVERLAY_SOCKET")]
    socket: Option<PathBuf>,

    /// Name of the network interface [default: overlay0]
    #[arg(long, value_name = "NAME", env = "OVERLAY_INTERFACE")]
    interface: Option<String>,

    /// UDP port [default: a random one, kept for the next start]
    #[arg(long, value_name = "N", env = "OVERLAY_LISTEN_PORT")]
    listen_port: Option<u16>,

    /// Largest packet in bytes, 1280 to 9000, or auto [default: auto]
    #[arg(long, value_name = "N", env = "OVERLAY_MTU")]
    mtu: Option<MtuSetting>,

    /// Name of this node in the network [default: the host name]
    #[arg(long, value_name = "NAME", env = "OVERLAY_NAME")]
    name: Option<NodeName>,

    /// Join, and exit
    #[arg(long, hide = true)]
    enrol_only: bool,
}

/// Runs it.
///
/// # Errors
/// When the node cannot start, or was removed from its network.
pub fn run(args: UpArgs) -> Done {
    // The join line is used once; it may come from standard input.
    let again = UpArgs { join: None, ..args.clone() };
    let read = Box::new(move || options(again.clone()).map_err(|failure| failure.to_string()));
    let options = options(args)?;
    telemetry::start();
    keep_memory_private();
    let enrol_only = options.enrol_only;
    let node = run_node(options, read, move |node| ready(node, enrol_only));
    let end = runtime::run_and_leave(Box::pin(node))?;
    // Nobody is told when there is no service manager.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    match end {
        Ok(Ended::Stopped | Ended::Down) => Ok(()),
        Ok(Ended::Removed) => Err(Failure::new(
            "this machine was removed from its network",
            "the server says that it is not a member any more",
            NEW_LINE,
        )
        .code(NOT_ENROLLED)),
        Err(StartError::AlreadyRunning { socket }) => {
            tracing::info!(socket = %socket.display(), "overlay already runs on this machine");
            Ok(())
        }
        Err(error) => Err(failure(&error)),
    }
}

fn ready(node: &Node, enrol_only: bool) {
    let status = node.self_status();
    let Some(identity) = status.identity else { return };
    if enrol_only {
        tracing::info!(name = %identity.name, address = %identity.addrs.v4, "joined");
        return;
    }
    let text = format!("{} at {}", identity.name, identity.addrs.v4);
    let states = [sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(&text)];
    if let Err(error) = sd_notify::notify(&states) {
        tracing::debug!(%error, "the service manager was not told");
    }
    tracing::info!(name = %identity.name, ipv4 = %identity.addrs.v4, ipv6 = %identity.addrs.v6,
        "ready");
}

/// Flags and variables over the file over the defaults.
fn options(args: UpArgs) -> Result<NodeOptions, Failure> {
    let paths = Paths::of(Role::Node);
    let (path, wanted) = match args.config {
        Some(path) => (path, Wanted::Explicitly),
        None => (paths.config, Wanted::IfThere),
    };
    let file: NodeConfig = config::load_file(&path, wanted)?;
    let defaults = NodeSettings::default();
    let seconds = |number: u32| Duration::from_secs(u64::from(number));
    let rekey_after = file.rekey_after_s.map_or(defaults.rekey_after, seconds);
    let rotate_key_after = match file.rotate_key_after_d.unwrap_or(ROTATE_DAYS) {
        0 => None,
        days => Some(seconds(days * 86_400)),
    };
    let port_mapping = file.port_mapping_lease_s.map_or(DEFAULT_LEASE, seconds);
    let mtu = args.mtu.or(file.mtu).and_then(MtuSetting::bytes);
    let interface = args.interface.or(file.interface).unwrap_or_else(|| DEFAULT_INTERFACE.into());
    check_name(&interface).map_err(|error| {
        let cause = "the name comes from --interface, OVERLAY_INTERFACE or the configuration";
        Failure::new(&error, cause, error.help()).code(USAGE)
    })?;
    let listen_port = args.listen_port.or(file.listen_port);
    Ok(NodeOptions {
        join: args.join.as_deref().map(join_line).transpose()?,
        name: Some(args.name.or(file.name).unwrap_or_else(|| {
            let host = nix::unistd::gethostname().unwrap_or_default();
            NodeName::from_hostname(&host.to_string_lossy())
        })),
        state_dir: args.state_dir.or(file.state_dir).unwrap_or(paths.state_dir),
        socket: args.socket.or(file.socket).unwrap_or(paths.socket),
        interface,
        listen_port,
        mtu,
        settings: NodeSettings {
            rekey_after,
            eager_peers: file.eager_peers.map_or(defaults.eager_peers, usize::from),
            birthday_probing: file.birthday_probing.unwrap_or(defaults.birthday_probing),
            second_lane_from: match file.second_session {
                Some(false) => u64::MAX,
                _ => defaults.second_lane_from,
            },
            ..defaults
        },
        offloads: Offloads {
            tun: file.tun_offload.unwrap_or(true),
            udp_gso: file.udp_gso.unwrap_or(true),
            udp_gro: file.udp_gro.unwrap_or(true),
        },
        realtime: file.realtime.unwrap_or(true),
        port_mapping: file.port_mapping.unwrap_or(true).then_some(port_mapping),
        all_uplinks: file.all_uplinks.unwrap_or(true),
        metrics: file.metrics,
        rotate_key_after,
        enrol_only: args.enrol_only,
    })
}

/// The start of a file: a wrong one may be of any size, or without end.
fn read_start(path: &str) -> std::io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::new());
    std::fs::File::open(path)?.take(LONGEST_INPUT).read_to_string(&mut text)?;
    Ok(text)
}

/// The first line with something in it: who pastes it into a terminal does not end the input.
fn first_line(input: impl BufRead) -> std::io::Result<Zeroizing<String>> {
    let mut input = input.take(LONGEST_INPUT);
    loop {
        let mut line = Zeroizing::new(String::new());
        if input.read_line(&mut line)? == 0 || !line.trim().is_empty() {
            return Ok(line);
        }
    }
}

/// Reads a join line from the argument, a file or standard input.
pub(super) fn join_line(argument: &str) -> Result<JoinLine, Failure> {
    let text = if argument == "-" {
        if std::io::stdin().is_terminal() {
            print::hint("paste the join line, then press Enter");
        }
        first_line(std::io::stdin().lock()).map_err(|error| {
            Failure::caused_by(
                "the join line cannot be read from standard input",
                &error,
                "overlay server invite | ssh MACHINE sudo overlay up -",
            )
        })?
    } else if let Some(path) = argument.strip_prefix("file:") {
        read_start(path).map_err(|error| {
            let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
            Failure::new(
                "the file with the join line cannot be read",
                format!("{path}: {error}"),
                "sudo overlay up file:PATH (PATH is a file that holds the join line and nothing \
                 else)",
            )
            .code(if denied { PERMISSION } else { USAGE })
        })?
    } else {
        Zeroizing::new(argument.to_string())
    };
    text.parse().map_err(|error: JoinError| {
        let help = match error {
            JoinError::Version { .. } => "install the version of this program that the server has",
            _ => "copy the whole line that `overlay server invite` prints on the server; it is one word",
        };
        Failure::caused_by("this is no join line", &error, help).code(USAGE)
    })
}
