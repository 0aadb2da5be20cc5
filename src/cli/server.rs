//! `overlay server`: run a server, or ask the one that runs.

mod admin;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use tracing::info;

use super::fail::{self, Failure};
use crate::config::paths::{Paths, Role};
use crate::config::server::ServerConfig;
use crate::config::{self, ConfigError, Wanted};
use crate::daemon::server::{Options, StartError, start};
use crate::io::local::LocalError;
use crate::store::StoreError;
use crate::store::files::FileError;
use crate::wire::join::ServerAddr;

/// Run the server of a network, or manage the nodes of the one that runs.
///
/// Without a subcommand the server runs in the foreground and logs to stderr. The first start makes
/// keys, address range and store, and prints a join line for the first node.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// Configuration file [default: /etc/overlay/server.toml]
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
    /// Keep keys and members here [default: /var/lib/overlay/server]
    #[arg(long, value_name = "DIR", env = "OVERLAY_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// The server's local socket [default: /run/overlay/server.sock]
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
    /// Remove a node from the network
    Remove {
        /// Its name, overlay address or id
        node: String,
    },
    /// Give a node another name
    Rename {
        /// Its name, overlay address or id
        node: String,
        /// The new name
        name: crate::types::NodeName,
    },
}

/// Runs the command.
///
/// # Errors
/// When it does not do its work.
pub fn run(args: ServerArgs) -> Result<(), Failure> {
    let paths = Paths::of(Role::Server);
    match args.command {
        Some(command) => {
            let socket = match args.socket {
                Some(socket) => socket,
                None => socket_of_config(args.config)?,
            };
            admin::run(command, &socket)
        }
        None => run_server(args, paths),
    }
}

/// Where the running server's socket is, if nobody says so on the command line.
fn socket_of_config(file: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let config = match file {
        Some(file) => load(&file, Wanted::Explicitly)?,
        // An administrator may not be allowed to read it; then the default place has to do.
        None => load(&Paths::of(Role::Server).config, Wanted::IfThere).unwrap_or_default(),
    };
    Ok(config.socket.unwrap_or_else(|| Paths::socket_to_ask(Role::Server)))
}

fn load(file: &std::path::Path, wanted: Wanted) -> Result<ServerConfig, Failure> {
    config::load_file(file, wanted).map_err(|error| {
        let code = match &error {
            ConfigError::File(error) if error.is_permission() => fail::PERMISSION,
            ConfigError::File(_) => fail::FAILED,
            ConfigError::Missing { .. } | ConfigError::Content { .. } => fail::USAGE,
        };
        Failure::new("cannot use the configuration").cause(error).code(code)
    })
}

fn run_server(args: ServerArgs, paths: Paths) -> Result<(), Failure> {
    let config = match args.config {
        Some(file) => load(&file, Wanted::Explicitly)?,
        None => load(&paths.config, Wanted::IfThere)?,
    };
    let first = |flags: Vec<_>, file| if flags.is_empty() { file } else { flags };
    let public_addr =
        if args.public_addr.is_empty() { config.public_addr } else { args.public_addr };
    let options = Options {
        listen: first(args.listen, config.listen),
        public_addr,
        state_dir: args.state_dir.or(config.state_dir).unwrap_or(paths.state_dir),
        socket: args.socket.or(config.socket).unwrap_or(paths.socket),
        network: config.network,
        network_ipv6: config.network_ipv6,
    };
    crate::telemetry::start();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start").cause(error))?;
    runtime.block_on(serve(options))
}

async fn serve(options: Options) -> Result<(), Failure> {
    let server = start(options.clone()).await.map_err(|error| explain(&error, &options))?;
    if let Some(line) = server.first_join_line() {
        info!("nobody has joined yet: the join line on stdout lets one node in, within one hour");
        info!("type on that machine: sudo overlay up JOINLINE");
        say(line.expose())?;
    }
    server.run_until_signal().await.map_err(|error| explain(&error, &options))
}

/// Prints a line to stdout. Who does not want to read it any more is no failure.
fn say(line: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new("cannot write to stdout").cause(error))
        }
        _ => Ok(()),
    }
}

/// Why a server does not start, and what to type next.
fn explain(error: &StartError, options: &Options) -> Failure {
    let failure = Failure::new("the server cannot start").cause(error);
    match error {
        StartError::Listen { address, source, .. } => listen_failure(failure, *address, source),
        StartError::Store(StoreError::File(error)) | StartError::File(error) => {
            file_failure(failure, error)
        }
        StartError::Store(StoreError::Damaged { path, .. } | StoreError::Foreign { path }) => {
            failure.help(format!("restore {} from a backup; it was not changed", path.display()))
        }
        StartError::Store(StoreError::Newer { .. }) => {
            failure.help("install the newer version again; the store was not changed")
        }
        StartError::StoreLost { key, .. } => failure.help(format!(
            "restore the store from a backup; to start a new network instead, remove {}",
            key.display()
        )),
        StartError::KeyLost { .. } => {
            failure.help("restore the key from a backup: every node trusts this key and no other")
        }
        StartError::Local(LocalError::AlreadyRunning { .. }) => failure.help(
            "a server runs already: ask it with `overlay server nodes`, or choose another --socket",
        ),
        StartError::Local(LocalError::Permission { .. }) => failure
            .code(fail::PERMISSION)
            .help("run it with sudo, or choose another place with --socket"),
        StartError::Range(_) | StartError::RangeFixed { .. } => failure
            .code(fail::USAGE)
            .help("change or remove the keys `network` and `network-ipv6` in the configuration"),
        StartError::Record { .. } => failure.help(format!(
            "restore {} from a backup",
            options.state_dir.join("server.db").display()
        )),
        StartError::Store(_) | StartError::Local(_) | StartError::System { .. } => failure,
    }
}

fn listen_failure(failure: Failure, address: SocketAddr, source: &io::Error) -> Failure {
    match source.kind() {
        io::ErrorKind::AddrInUse => failure.help(format!(
            "see who has the port with `ss -tulpn 'sport = :{}'`, or choose another with --listen",
            address.port()
        )),
        io::ErrorKind::PermissionDenied => failure
            .code(fail::PERMISSION)
            .help("run it with sudo, or choose a port above 1023 with --listen"),
        io::ErrorKind::AddrNotAvailable => failure.help(format!(
            "{} is no address of this machine; list them with `ip addr`",
            address.ip()
        )),
        _ => failure,
    }
}

fn file_failure(failure: Failure, error: &FileError) -> Failure {
    match error {
        FileError::Locked { .. } => failure.help(
            "a server runs already: ask it with `overlay server nodes`, or choose another --state-dir",
        ),
        FileError::TooOpen { path, .. } => failure.help(format!("chmod 600 {}", path.display())),
        _ if error.is_permission() => failure
            .code(fail::PERMISSION)
            .help("run it with sudo, or choose another place with --state-dir"),
        _ => failure,
    }
}
