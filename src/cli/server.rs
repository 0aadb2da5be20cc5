//! `overlay server`: run a server, or ask the one that runs.

mod admin;
mod backup;
mod events;
mod policy;
mod status;

use std::fmt::Display;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use tracing::info;

use super::fail::{self, Failure};
use super::{print, runtime};
use crate::config::paths::{Paths, Role};
use crate::config::server::ServerConfig;
use crate::config::{self, Wanted};
use crate::daemon::server::{Options, Signals, StartError, start};
use crate::io::files::FileError;
use crate::io::local::LocalError;
use crate::io::memory::keep_memory_private;
use crate::io::service::reload::{Read, Reload};
use crate::server::WHOLE_NETMAP_UP_TO;
use crate::server::relay::limit::Limits;
use crate::store::StoreError;
use crate::wire::join::ServerAddr;

/// Run the server of a network, or manage the nodes of the one that runs.
///
/// Without a subcommand the server runs in the foreground and logs to stderr. The first start makes
/// keys, address range and store, and prints a join line for the first node.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// Configuration file [default: /etc/overlay/server.toml; without root
    /// ~/.config/overlay/server.toml]
    #[arg(long, value_name = "FILE", env = "OVERLAY_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// Listen here, TCP and UDP; may be given more than once [default: port 41820 on all
    /// addresses, and 443/tcp when it is free]
    #[arg(long, value_name = "IP:PORT", env = "OVERLAY_LISTEN", value_delimiter = ',')]
    listen: Vec<SocketAddr>,
    /// Put this address into join lines; may be given more than once [default: the global
    /// addresses of this machine]
    #[arg(long, value_name = "HOST[:PORT]", env = "OVERLAY_PUBLIC_ADDR", value_delimiter = ',')]
    public_addr: Vec<ServerAddr>,
    /// Keep keys and members here [default: /var/lib/overlay/server; without root
    /// ~/.local/state/overlay/server]
    #[arg(long, value_name = "DIR", env = "OVERLAY_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// The server's local socket [default: /run/overlay/server.sock; without root
    /// $XDG_RUNTIME_DIR/overlay/server.sock]
    #[arg(long, value_name = "PATH", env = "OVERLAY_SOCKET", global = true)]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an invite and print its join line, or list and revoke invites
    Invite(admin::InviteArgs),
    /// List the nodes of the network
    Nodes {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what the server does: nodes, relay, what it has dropped
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a node from the network, and tell which nodes have taken note of it
    Remove {
        /// Its name, overlay address or id
        node: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Give a node another name
    Rename {
        /// Its name, overlay address or id
        node: String,
        /// The new name
        name: crate::types::NodeName,
    },
    /// Show who changed what: nodes that joined or were removed, invites
    Events(events::EventsArgs),
    /// Write everything that the running server needs to live on into a file
    Backup {
        /// The file, or - for standard output; it will hold the server's secret key
        file: PathBuf,
    },
    /// Make the server of this machine the one of a backup; it must not run meanwhile
    Restore {
        /// The file, or - for standard input
        file: PathBuf,
        /// Replace the network that is there; it is kept aside
        #[arg(long)]
        force: bool,
        /// The server's state directory [default: /var/lib/overlay/server; without root
        /// ~/.local/state/overlay/server]
        #[arg(long = "state-dir", value_name = "DIR")]
        place: Option<PathBuf>,
    },
    /// Set when a node's membership ends, or how long those of new nodes last
    ///
    /// More time lets an expired node in at once. With --new, nodes that join from now on have a
    /// membership of this length, counted from when each joins; those that are there keep theirs.
    Expire {
        /// Its name, overlay address or id
        #[arg(required_unless_present = "new")]
        node: Option<String>,
        /// The nodes that join from now on, in place of one that is there
        #[arg(long, conflicts_with = "node")]
        new: bool,
        /// In this time, from now or from when a new node joins: 12h, 180d
        #[arg(long = "in", value_name = "TIME", value_parser = admin::duration, required_unless_present = "never")]
        within: Option<std::time::Duration>,
        /// Not at all
        #[arg(long, conflicts_with = "within")]
        never: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Give a node these tags and no others; access rules know nodes by them
    Tag {
        /// Its name, overlay address or id
        node: String,
        /// All its tags; none takes them away
        #[arg(value_name = "TAG")]
        tags: Vec<crate::types::Tag>,
    },
    /// Check, try, set and show the access rules of the network
    Policy(policy::PolicyArgs),
}

/// Runs the command.
///
/// # Errors
/// When it does not do its work.
pub fn run(args: ServerArgs) -> Result<(), Failure> {
    let paths = Paths::of(Role::Server);
    match args.command {
        Some(command) => {
            let ServerArgs { config, state_dir, socket, .. } = args;
            admin::run(command, &Places { config, state_dir, socket })
        }
        None => run_server(args, paths),
    }
}

/// Prints a join line if nobody has joined the running server yet; returns whether it did.
///
/// # Errors
/// When the server cannot be asked.
pub(super) fn first_invite(socket: &std::path::Path) -> Result<bool, Failure> {
    admin::first_invite(socket)
}

/// What the command line says of where things are.
#[derive(Debug)]
struct Places {
    config: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    socket: Option<PathBuf>,
}

impl Places {
    /// Where the running server's socket is.
    fn socket(&self) -> Result<PathBuf, Failure> {
        if let Some(socket) = &self.socket {
            return Ok(socket.clone());
        }
        let Some(file) = &self.config else { return Ok(Paths::socket_to_ask(Role::Server)) };
        Ok(Paths::socket_of_file(Role::Server, load(file, Wanted::Explicitly)?.socket))
    }

    /// Where the server keeps its state.
    fn state_dir(&self) -> Result<PathBuf, Failure> {
        if let Some(state_dir) = &self.state_dir {
            return Ok(state_dir.clone());
        }
        let paths = Paths::of(Role::Server);
        let config = match &self.config {
            Some(file) => load(file, Wanted::Explicitly)?,
            None => load(&paths.config, Wanted::IfThere)?,
        };
        Ok(config.state_dir.unwrap_or(paths.state_dir))
    }
}

fn load(file: &std::path::Path, wanted: Wanted) -> Result<ServerConfig, Failure> {
    Ok(config::load_file(file, wanted)?)
}

fn run_server(args: ServerArgs, paths: Paths) -> Result<(), Failure> {
    let read = move || options(&args, &paths);
    let options = read()?;
    crate::telemetry::start();
    keep_memory_private();
    let read = Box::new(move || read().map_err(|failure| failure.to_string()));
    runtime::on_all_cores()?.block_on(serve(options, read))
}

/// Flags and variables over the file over the defaults.
fn options(args: &ServerArgs, paths: &Paths) -> Result<Options, Failure> {
    let config = match &args.config {
        Some(file) => load(file, Wanted::Explicitly)?,
        None => load(&paths.config, Wanted::IfThere)?,
    };
    let place = |flag: &Option<PathBuf>, file: Option<PathBuf>, default: &PathBuf| {
        flag.clone().or(file).unwrap_or_else(|| default.clone())
    };
    let flags = (args.listen.clone(), args.public_addr.clone());
    Ok(Options {
        relay_limits: relay_limits(&config),
        listen: if flags.0.is_empty() { config.listen } else { flags.0 },
        public_addr: if flags.1.is_empty() { config.public_addr } else { flags.1 },
        state_dir: place(&args.state_dir, config.state_dir, &paths.state_dir),
        socket: place(&args.socket, config.socket, &paths.socket),
        network: config.network,
        network_ipv6: config.network_ipv6,
        metrics: config.metrics,
        whole_netmap_up_to: config.whole_netmap_up_to.unwrap_or(WHOLE_NETMAP_UP_TO),
    })
}

/// The limits of the file over the defaults.
fn relay_limits(config: &ServerConfig) -> Limits {
    let mut limits = Limits::default();
    for (limit, wished) in [
        (&mut limits.node.mbit, config.relay_node_mbit),
        (&mut limits.node.datagrams, config.relay_node_packets),
        (&mut limits.network.mbit, config.relay_network_mbit),
        (&mut limits.network.datagrams, config.relay_network_packets),
    ] {
        *limit = wished.map_or(*limit, NonZeroU32::get);
    }
    limits
}

async fn serve(options: Options, read: Read<Options>) -> Result<(), Failure> {
    let signals = Signals::catch().map_err(|error| explain(&error, &options))?;
    let reload = Reload::new(read);
    let server = start(options.clone()).await.map_err(|error| explain(&error, &options))?;
    if let Some(line) = server.first_join_line() {
        info!("nobody has joined yet: the join line on stdout lets one node in, within one hour");
        info!("type on that machine: sudo overlay up JOINLINE; new lines: overlay server invite");
        print::line_of_daemon(line.expose())?;
    }
    server.run_until_signal(signals, reload).await.map_err(|error| explain(&error, &options))
}

/// Why a server does not start or go on, and what to type next.
fn explain(error: &StartError, options: &Options) -> Failure {
    let failure = |help: &dyn Display| Failure::caused_by("the server cannot start", error, help);
    match error {
        StartError::Listen { source, .. }
            if source.kind() == io::ErrorKind::AddrInUse && answers(&options.socket) =>
        {
            Failure::new(
                "a server runs already on this machine",
                format!("it answers on {}", options.socket.display()),
                "ask it: overlay server nodes; a second one needs a --listen, --socket and \
                 --state-dir of its own",
            )
        }
        StartError::Listen { address, source, .. } => failure(&listen_help(*address, source)),
        StartError::Store(StoreError::File(error)) | StartError::File(error) => {
            failure(&file_help(error))
        }
        StartError::Store(StoreError::Damaged { path, .. } | StoreError::Foreign { path }) => {
            failure(&format_args!("{} was not changed; {RESTORE}", path.display()))
        }
        StartError::Store(
            StoreError::BadSum { .. } | StoreError::Unknown { .. } | StoreError::Empty { .. },
        ) => failure(&format_args!("the store was not changed; {RESTORE}")),
        StartError::HalfRestored { .. } => failure(&RESTORE_AGAIN),
        StartError::Store(StoreError::Newer { .. }) => {
            failure(&"install the newer version again; the store was not changed")
        }
        StartError::Store(StoreError::Conflict { .. } | StoreError::Database(_)) => failure(
            &format_args!("look at the disk of the store: df -h {}", options.state_dir.display()),
        ),
        StartError::StoreLost { key, .. } => failure(&format_args!(
            "{RESTORE}; to start a new network instead, remove {}",
            key.display()
        )),
        StartError::OtherKey { key, .. } => failure(&format_args!(
            "put the network's own key back as {}, mode 600; or {RESTORE}",
            key.display()
        )),
        StartError::KeyLost { .. } => {
            failure(&format_args!("every node trusts this key and no other; {RESTORE}"))
        }
        StartError::Local(LocalError::AlreadyRunning { .. }) => failure(
            &"a server runs already: ask it with `overlay server nodes`, or choose another --socket",
        ),
        StartError::Local(LocalError::NotASocket { path }) => failure(&format_args!(
            "look at it: ls -l {}; or choose another --socket",
            path.display()
        )),
        StartError::Local(_) => failure(&"run it with sudo, or choose another place with --socket"),
        StartError::Range(_) | StartError::RangeFixed { .. } => {
            failure(&"change or remove `network` and `network-ipv6` in the configuration")
                .code(fail::USAGE)
        }
        StartError::Record { .. } => failure(&RESTORE),
        StartError::Metrics { address, .. } => super::up::metrics_failure(address, error),
        StartError::FirstInvite { refusal } => failure(&refusal.help),
        StartError::Died { .. } => Failure::caused_by(
            "the server has stopped",
            error,
            "see what its log says: journalctl -e -u overlay-server (or above, where it runs in the \
             foreground); then start it again: sudo systemctl start overlay-server, or overlay server",
        ),
        StartError::System { .. } => {
            failure(&"see how many threads and open files are allowed: ulimit -u -n")
        }
    }
}

/// Whether a server listens on this local socket.
fn answers(socket: &std::path::Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

const RESTORE: &str = "bring the last backup back: overlay server restore --force FILE (what is \
                       there is kept aside)";
const RESTORE_AGAIN: &str = "restore it once more: overlay server restore FILE";

fn listen_help(address: SocketAddr, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => format!(
            "see who has the port: sudo ss -tulpn 'sport = :{}'; or choose another with --listen",
            address.port()
        ),
        io::ErrorKind::PermissionDenied => {
            "run it with sudo, or choose a port above 1023 with --listen".into()
        }
        _ => format!(
            "see whether {} is an address of this machine: ip addr; choose one with --listen",
            address.ip()
        ),
    }
}

fn file_help(error: &FileError) -> String {
    match error {
        FileError::Locked { .. } => "a server runs already: ask it with `overlay server nodes`, \
                                     or choose another --state-dir"
            .into(),
        FileError::TooOpen { path, .. } => format!("sudo chmod 600 {}", path.display()),
        FileError::TooLarge { path, .. } => {
            format!("restore {} from a backup; it was not changed", path.display())
        }
        FileError::Io { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            "the file system is read-only: choose another place with --state-dir".into()
        }
        FileError::NotAFile { path } => format!("look at it: ls -l {}", path.display()),
        FileError::Io { .. } => "run it with sudo, or choose another place with --state-dir".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::local::Refusal;

    #[test]
    fn what_ends_a_server_that_ran_or_has_no_disk_is_not_told_as_a_limit_of_the_system() {
        let options = Options {
            listen: Vec::new(),
            public_addr: Vec::new(),
            state_dir: "state".into(),
            socket: "socket".into(),
            network: None,
            network_ipv6: None,
            metrics: None,
            whole_netmap_up_to: WHOLE_NETMAP_UP_TO,
            relay_limits: Limits::default(),
        };
        let died = StartError::Died { action: "relay", what: "the thread relay-0".into() };
        let told = explain(&died, &options).to_string();
        assert!(told.starts_with("error: the server has stopped\n"), "{told}");
        assert!(told.contains("cause: cannot relay: the thread relay-0 has ended\n"), "{told}");
        assert!(told.contains("journalctl") && !told.contains("ulimit"), "{told}");
        let refusal = Refusal {
            code: fail::FAILED,
            error: "the change was not made".into(),
            cause: "disk full".into(),
            help: "df -h".into(),
        };
        let told = explain(&StartError::FirstInvite { refusal: Box::new(refusal) }, &options);
        assert_eq!(
            told.to_string(),
            "error: the server cannot start\ncause: the change was not made: disk full\nhelp: df -h"
        );
    }
}
