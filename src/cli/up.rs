//! `overlay up`: runs a node in the foreground; systemd starts the same.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use zeroize::Zeroizing;

use super::ask::runtime;
use super::fail::{Failure, NOT_ENROLLED, PERMISSION};
use super::{Done, config as config_command};
use crate::config::node::NodeConfig;
use crate::config::paths::{Paths, Role};
use crate::config::{self, Wanted};
use crate::daemon::node::{Ended, NodeOptions, Offloads, StartError, run as run_node};
use crate::io::link::ConnectError;
use crate::io::tun::TunError;
use crate::node::{Node, NodeSettings};
use crate::telemetry;
use crate::types::NodeName;
use crate::wire::control::RefusedCode;
use crate::wire::join::JoinLine;

const DEFAULT_INTERFACE: &str = "overlay0";
/// The IPv6 minimum; fits every path with all headers on top.
const DEFAULT_MTU: u16 = 1280;

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

    /// MTU of the interface in bytes [default: 1280]
    #[arg(long, value_name = "N", env = "OVERLAY_MTU",
          value_parser = clap::value_parser!(u16).range(1280..=9000))]
    mtu: Option<u16>,

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
    let options = options(args)?;
    telemetry::start();
    let enrol_only = options.enrol_only;
    let end = runtime()?.block_on(Box::pin(run_node(options, move |node| ready(node, enrol_only))));
    // Nobody is told when there is no service manager.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    match end {
        Ok(Ended::Stopped) => Ok(()),
        Ok(Ended::Removed) => Err(Failure::new("this machine was removed from its network")
            .cause("the server does not know it any more")
            .help("ask for a new join line, then: sudo overlay up JOINLINE")
            .code(NOT_ENROLLED)),
        Err(StartError::AlreadyRunning { socket }) => {
            tracing::info!(socket = %socket.display(), "overlay already runs on this machine");
            Ok(())
        }
        Err(error) => Err(failure(error)),
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
    let file: NodeConfig =
        config::load_file(&path, wanted).map_err(|error| config_command::failure(&error))?;
    let defaults = NodeSettings::default();
    let rekey_after = match file.rekey_after_s {
        None => defaults.rekey_after,
        Some(seconds @ 5..=120) => Duration::from_secs(u64::from(seconds)),
        Some(seconds) => {
            return Err(Failure::usage(format!("rekey-after-s = {seconds} cannot be used"))
                .cause("keys are renewed after 5 to 120 seconds")
                .help(format!("edit {}", path.display())));
        }
    };
    let mtu = args.mtu.or(file.mtu).unwrap_or(DEFAULT_MTU);
    if !(1280..=9000).contains(&mtu) {
        return Err(Failure::usage(format!("mtu = {mtu} cannot be used"))
            .cause("IPv6 needs 1280, and no underlay carries more than 9000")
            .help(format!("edit {}", path.display())));
    }
    let listen_port = args.listen_port.or(file.listen_port);
    Ok(NodeOptions {
        join: args.join.as_deref().map(join_line).transpose()?,
        name: Some(args.name.or(file.name).unwrap_or_else(|| {
            let host = nix::unistd::gethostname().unwrap_or_default();
            NodeName::from_hostname(&host.to_string_lossy())
        })),
        state_dir: args.state_dir.or(file.state_dir).unwrap_or(paths.state_dir),
        socket: args.socket.or(file.socket).unwrap_or(paths.socket),
        interface: args.interface.or(file.interface).unwrap_or_else(|| DEFAULT_INTERFACE.into()),
        listen_port,
        mtu,
        settings: NodeSettings {
            rekey_after,
            eager_peers: file.eager_peers.map_or(defaults.eager_peers, usize::from),
        },
        offloads: Offloads {
            tun: file.tun_offload.unwrap_or(true),
            udp_gso: file.udp_gso.unwrap_or(true),
            udp_gro: file.udp_gro.unwrap_or(true),
        },
        enrol_only: args.enrol_only,
    })
}

/// Reads a join line from the argument, a file or standard input.
pub(super) fn join_line(argument: &str) -> Result<JoinLine, Failure> {
    let text = if argument == "-" {
        let mut text = Zeroizing::new(String::new());
        std::io::stdin().lock().take(64 * 1024).read_to_string(&mut text).map_err(|error| {
            Failure::new("cannot read the join line from standard input").cause(error)
        })?;
        text
    } else if let Some(path) = argument.strip_prefix("file:") {
        std::fs::read_to_string(path).map(Zeroizing::new).map_err(|error| {
            Failure::new("cannot read the file with the join line")
                .cause(format!("{path}: {error}"))
                .help("file:PATH names a file that holds the join line and nothing else")
        })?
    } else {
        Zeroizing::new(argument.to_string())
    };
    text.parse().map_err(|error| {
        Failure::new("this is no join line")
            .cause(error)
            .help("copy the whole line that `overlay server invite` prints; it is one word")
    })
}

/// How a node that does not start says so.
fn failure(error: StartError) -> Failure {
    use crate::daemon::node::InterfaceError;
    let new_line = "on the server: overlay server invite, then here: sudo overlay up JOINLINE";
    let denied = permission_denied(&error);
    let text = error.to_string();
    let failure = match error {
        StartError::NotEnrolled => Failure::new(text)
            .cause("there is no join line, and no enrolment in the state directory")
            .help(new_line)
            .code(NOT_ENROLLED),
        StartError::OtherNetwork { .. } => Failure::new(text)
            .cause("one state directory holds one membership")
            .help("use another --state-dir, --socket and --interface, or remove the old state"),
        StartError::Connect(error) => connect_failure(&error),
        StartError::Refused { code, message } => refused(code, message),
        StartError::NoAnswer => Failure::new("the server did not let this machine in")
            .cause(text)
            .help("look at the server's log; then try again"),
        StartError::PortTaken { port } => Failure::new(text)
            .cause(format!("port {port} was asked for with --listen-port or in the configuration"))
            .help("choose another port, or leave it out to get a free one"),
        StartError::Interface(InterfaceError::Tun(error)) => {
            let help = error.help().unwrap_or("see the log of the kernel: dmesg");
            let code = if matches!(error, TunError::NoPermission { .. }) { PERMISSION } else { 1 };
            Failure::new("the network interface cannot be made").cause(error).help(help).code(code)
        }
        StartError::Interface(InterfaceError::Conflict(conflict)) => {
            Failure::new("the overlay's addresses are in use on this machine").cause(conflict).help(
                "remove that local route or address, or give the network another range: \
                 `network = \"10.x.y.0/20\"` in the server's configuration before the first node \
                 joins",
            )
        }
        StartError::Interface(InterfaceError::Netlink(error)) => {
            Failure::new("the network interface cannot be configured")
                .cause(error)
                .help("run it with sudo; in a container add --cap-add NET_ADMIN")
        }
        error @ (StartError::Local(_)
        | StartError::State(_)
        | StartError::Io { .. }
        | StartError::AlreadyRunning { .. }) => Failure::from(anyhow::Error::from(error)).help(
            "run it with sudo, or give --state-dir and --socket in a place that you may write to",
        ),
    };
    if denied { failure.code(PERMISSION) } else { failure }
}

fn permission_denied(error: &StartError) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        let kernel = error.downcast_ref::<std::io::Error>();
        if kernel.is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied) {
            return true;
        }
        source = error.source();
    }
    match error {
        StartError::Local(crate::io::local::LocalError::Permission { .. }) => true,
        StartError::Interface(crate::daemon::node::InterfaceError::Netlink(error)) => {
            error.kernel_error() == Some(nix::errno::Errno::EPERM)
        }
        _ => false,
    }
}

fn connect_failure(error: &ConnectError) -> Failure {
    let help = match error {
        ConnectError::WrongKey { .. } => {
            "the join line is from another server, or the server was set up anew: get a new one \
             with overlay server invite"
        }
        ConnectError::NotOurProtocol { .. } => {
            "another program listens there: check address and port of the server \
             (overlay server --public-addr)"
        }
        ConnectError::Resolve { .. } => "check the server's name and this machine's DNS",
        ConnectError::Unreachable { .. }
        | ConnectError::TimedOut { .. }
        | ConnectError::Closed { .. } => {
            "check that the server runs, and that its TCP port is open in its firewall"
        }
    };
    Failure::new("cannot connect to the server").cause(error).help(help)
}

fn refused(code: RefusedCode, message: String) -> Failure {
    let help = match code {
        RefusedCode::NetworkFull => "remove nodes that are gone: overlay server remove NODE",
        RefusedCode::Version => "install the same version here and on the server",
        RefusedCode::Unavailable | RefusedCode::Replaced | RefusedCode::BadRequest => {
            "look at the server's log; then try again"
        }
        RefusedCode::NotAccepted
        | RefusedCode::InviteExpired
        | RefusedCode::InviteUsedUp
        | RefusedCode::InviteRevoked
        | RefusedCode::NotMember
        | RefusedCode::WrongNetwork => "get a new join line, on the server: overlay server invite",
    };
    let failure = Failure::new("the server did not let this machine in").cause(message).help(help);
    if code == RefusedCode::NotMember { failure.code(NOT_ENROLLED) } else { failure }
}
