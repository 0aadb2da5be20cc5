//! How `overlay up` says why a node does not start.

use std::error::Error;
use std::io;
use std::path::Path;

use super::NEW_LINE;
use crate::cli::fail::{Failure, NOT_ENROLLED, PERMISSION, USAGE, is_denied};
use crate::daemon::node::{InterfaceError, StartError, StateError};
use crate::io::files::FileError;
use crate::io::link::ConnectError;
use crate::io::local::LocalError;
use crate::io::tun::TunError;
use crate::wire::control::RefusedCode;

/// How a node that does not start says so.
pub(super) fn failure(error: &StartError) -> Failure {
    let denied = permission_denied(error);
    let failure = match error {
        StartError::NotEnrolled => Failure::new(
            error,
            "there is no join line, and no enrolment in the state directory",
            NEW_LINE,
        )
        .code(NOT_ENROLLED),
        StartError::OtherNetwork { .. } => Failure::new(
            "this machine is in another network already",
            error,
            "sudo overlay up (stays in that one); to leave it for good, remove its state directory \
             (sudo overlay service uninstall node --purge removes /var/lib/overlay/node) and try \
             again; to be in both, give this one a --state-dir, --socket and --interface of its own",
        ),
        StartError::Connect(error) => connect_failure(error),
        StartError::Refused { code, message } => refused(*code, message),
        StartError::Expired { .. } => Failure::new(
            error,
            "the administrator of the network gave it an end",
            "with more time it is let in, on the server: overlay server expire NODE --in 180d \
             (NODE is in overlay server nodes)",
        ),
        StartError::NoAnswer => Failure::new(NOT_LET_IN, error, SERVER_LOG),
        StartError::ThreadEnded { .. } => Failure::new(
            error,
            "an error of the system or of the program; the lines before this one in its log say which",
            "start it again, as its service does by itself",
        ),
        StartError::PortTaken { port } => Failure::new(
            error,
            format!("port {port} was asked for with --listen-port or in the configuration"),
            format!(
                "choose another port, or none to get a free one; who has this one: \
                 sudo ss -ulpn 'sport = :{port}'"
            ),
        ),
        StartError::Port { .. } => port_failure(error),
        StartError::Interface(error) => interface_failure(error),
        StartError::Local(LocalError::NotASocket { path }) => Failure::caused_by(
            LOCAL_SOCKET,
            error,
            format!("look at it: ls -l {}; or choose another --socket", path.display()),
        ),
        StartError::Local(LocalError::Io { path, source }) if is_full(source) => {
            Failure::caused_by(LOCAL_SOCKET, error, disk_help(path))
        }
        StartError::Local(error) => Failure::caused_by(
            LOCAL_SOCKET,
            error,
            "run it with sudo, or give --socket a place that this user may write to",
        ),
        StartError::State(error) => state_failure(error),
        StartError::Metrics { address, .. } => metrics_failure(address, error),
        StartError::Io { .. } => Failure::caused_by(
            "the node cannot start",
            error,
            "see how many threads and open files are allowed: ulimit -u -n",
        ),
        StartError::RunsOtherwise { .. } => Failure::new(
            "overlay already runs on this machine, and does not take this join line",
            "a node takes a join line when it starts; the line names another address or key of the \
             server, or another network, than the node that runs knows",
            "as a service: sudo overlay service install node JOINLINE; in the foreground: \
             sudo overlay down, then sudo overlay up JOINLINE",
        ),
        StartError::RunsElsewhere { socket, runs, wanted } => Failure::new(
            "another node already answers on this socket",
            format!(
                "the one on {} has the state directory {}, and this one was to have {}",
                socket.display(),
                runs.display(),
                wanted.display()
            ),
            format!(
                "a second node on this machine needs a --state-dir, --socket and --interface of its \
                 own, and another network; to ask the one that runs: overlay status --socket {}",
                socket.display()
            ),
        ),
        StartError::ServerAnswers { socket } => Failure::new(
            "a server answers on this socket",
            format!("{} belongs to an overlay server, and a node wants its own", socket.display()),
            "leave --socket (OVERLAY_SOCKET) out, or give the node another one",
        )
        .code(USAGE),
        StartError::AlreadyRunning { socket } => Failure::new(
            "overlay already runs on this machine",
            format!("it answers on {}", socket.display()),
            "overlay status",
        ),
    };
    if denied { failure.code(PERMISSION) } else { failure }
}

/// How a state directory that is of no use says so.
fn state_failure(error: &StateError) -> Failure {
    match error {
        StateError::Damaged { path, .. } => Failure::caused_by(
            STATE,
            error,
            format!("restore {} from a backup, or remove it and join anew", path.display()),
        ),
        StateError::KeysLost { path, .. } | StateError::OtherKeys { path, .. } => {
            Failure::caused_by(STATE, error, keys_help(path))
        }
        StateError::File(FileError::Locked { .. }) => Failure::caused_by(
            STATE,
            error,
            "stop the other node (sudo overlay down), or choose another --state-dir",
        ),
        StateError::File(FileError::TooOpen { path, .. }) => {
            Failure::caused_by(STATE, error, format!("sudo chmod 600 {}", path.display()))
        }
        StateError::File(FileError::NotAFile { path }) => Failure::caused_by(
            STATE,
            error,
            format!("look at it: ls -l {0}; remove it, then: overlay up", path.display()),
        ),
        StateError::File(FileError::Io { source, .. })
            if source.kind() == io::ErrorKind::ReadOnlyFilesystem =>
        {
            Failure::caused_by(
                STATE,
                error,
                "the file system is read-only: choose another place with --state-dir",
            )
        }
        StateError::File(FileError::Io { source, path, .. }) if is_full(source) => {
            Failure::caused_by(STATE, error, disk_help(path))
        }
        StateError::File(_) => Failure::caused_by(
            STATE,
            error,
            "run it with sudo, or give --state-dir a place that this user may write to",
        ),
    }
}

/// Whether a disk, or this user's part of it, has no room left.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What to do about a disk without room.
fn disk_help(path: &Path) -> String {
    let dir = path.parent().unwrap_or(path);
    format!("this machine's disk is full: make room on it, then try again; df -h {}", dir.display())
}

/// What to do about a member without its keys.
fn keys_help(path: &Path) -> String {
    let dir = path.parent().unwrap_or(path);
    format!(
        "restore {} from a backup; or give the membership up: remove {} and join anew with a line \
         of the server, sudo overlay up JOINLINE",
        path.display(),
        dir.display()
    )
}

/// A port that was asked for, and is not taken either.
fn port_failure(error: &StartError) -> Failure {
    let help = match is_denied(error) {
        true => String::from(
            "choose a port from 1024 on; to let the service have this one: sudo systemctl edit \
             overlay, with [Service], CapabilityBoundingSet=CAP_NET_BIND_SERVICE and \
             AmbientCapabilities=CAP_NET_BIND_SERVICE on three lines",
        ),
        false => "choose another --listen-port, or none to get a free one".into(),
    };
    Failure::caused_by("the node cannot start", error, help)
}

/// For node and server.
pub(in crate::cli) fn metrics_failure(address: &str, error: &(dyn Error + 'static)) -> Failure {
    let port = address.rsplit(':').next().unwrap_or_default();
    let help = format!(
        "choose another port for `metrics` in the configuration; who has this one: sudo ss -tlpn \
         'sport = :{port}'"
    );
    Failure::caused_by("the listener for metrics cannot be opened", error, help)
}

const NOT_LET_IN: &str = "the server did not let this machine in";
const SERVER_LOG: &str = "look at what the server says (on it: journalctl -u overlay-server), then \
                          try again";
const LOCAL_SOCKET: &str = "the socket for the other commands cannot be made";
const STATE: &str = "the state directory cannot be used";

pub(in crate::cli) fn interface_failure(error: &InterfaceError) -> Failure {
    match error {
        InterfaceError::Tun(error) => {
            Failure::caused_by("the network interface cannot be made", error, error.help())
        }
        InterfaceError::Conflict(conflict) => Failure::new(
            "the overlay's addresses are in use on this machine",
            conflict,
            "remove that local route or address, then: sudo overlay up; or give the network another \
             range, which it takes while it has no node: on the server, overlay server remove NODE \
             (this machine is one now, it is in overlay server nodes), then network = \
             \"10.x.y.0/20\" in its configuration, a restart, and a new join line",
        ),
        InterfaceError::Netlink(error) => Failure::caused_by(
            "the network interface cannot be configured",
            error,
            "run it with sudo; in a container add --cap-add NET_ADMIN",
        ),
    }
}

/// Some parts of the kernel have numbers of their own for it.
fn permission_denied(error: &StartError) -> bool {
    match error {
        StartError::Interface(InterfaceError::Tun(TunError::NoPermission { .. })) => true,
        StartError::Interface(InterfaceError::Netlink(error)) => {
            error.kernel_error() == Some(nix::errno::Errno::EPERM)
        }
        _ => is_denied(error),
    }
}

fn connect_failure(error: &ConnectError) -> Failure {
    let help = match error {
        ConnectError::WrongKey { .. } => {
            "the line is of another server, or this server was set up anew; get a new line on it: \
             overlay server invite"
        }
        ConnectError::NotOurProtocol { .. } => {
            "another program listens there; tell the server its own address and port, then make a \
             new line: overlay server --public-addr HOST:PORT"
        }
        ConnectError::Resolve { host, .. } => {
            return Failure::caused_by(
                NO_CONNECTION,
                error,
                format!("check the name and this machine's DNS: getent hosts {host}"),
            );
        }
        ConnectError::Unreachable { .. }
        | ConnectError::TimedOut { .. }
        | ConnectError::Closed { .. } => {
            "check that the server runs (on it: overlay server nodes), and that its TCP port is \
             open in its firewall"
        }
    };
    Failure::caused_by(NO_CONNECTION, error, help)
}

const NO_CONNECTION: &str = "this machine cannot connect to the server";

fn refused(code: RefusedCode, message: &str) -> Failure {
    let help = match code {
        RefusedCode::NetworkFull => "on the server, remove nodes: overlay server remove NODE",
        RefusedCode::Version => "install the same version here and on the server: overlay version",
        RefusedCode::Unavailable => {
            "ask who runs the server to look at its disk (on it: df -h, journalctl -u \
             overlay-server), then type the command again; the join line is still good"
        }
        RefusedCode::TooOften => {
            "wait some minutes (the server takes one change a minute), then type the command again; \
             what gave this machine new keys so often: journalctl -u overlay"
        }
        RefusedCode::Replaced | RefusedCode::BadRequest => SERVER_LOG,
        RefusedCode::Cloned => {
            "give one of the two keys of its own: stop it, remove its state directory, and join \
             with it anew: sudo overlay up JOINLINE"
        }
        RefusedCode::NotAccepted
        | RefusedCode::InviteExpired
        | RefusedCode::InviteUsedUp
        | RefusedCode::InviteRevoked
        | RefusedCode::NotMember
        | RefusedCode::WrongNetwork => NEW_LINE,
    };
    let cause = if code.is_about_the_invite() {
        // Of a member nobody asks for an invite.
        format!(
            "{message}; and by its keys this machine is no member: it never joined, was removed, \
             or has lost its state directory"
        )
    } else {
        message.to_owned()
    };
    let failure = Failure::new(NOT_LET_IN, cause, help);
    if code == RefusedCode::NotMember { failure.code(NOT_ENROLLED) } else { failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named_and_no_matter_of_rights() {
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            let path = "/var/lib/overlay/node/node.key".into();
            let file = FileError::Io { action: "write", path, source: kind.into() };
            let path = "/run/overlay/node.sock".into();
            let local = LocalError::Io { path, source: kind.into() };
            for error in [StartError::State(file.into()), StartError::Local(local)] {
                let said = failure(&error).to_string();
                assert!(said.contains("disk is full") && said.contains("df -h /"), "{said}");
                assert!(!said.contains("sudo"), "{said}");
            }
        }
    }

    #[test]
    fn who_is_refused_for_the_servers_disk_hears_of_the_disk() {
        let said = refused(RefusedCode::Unavailable, "the server cannot store it").to_string();
        assert!(said.contains("cause: the server cannot store it\nhelp: ask who runs"), "{said}");
        assert!(said.contains("df -h"), "{said}");
        let said = refused(RefusedCode::TooOften, RefusedCode::TooOften.text()).to_string();
        assert!(said.contains("too often\nhelp: wait") && !said.contains("df -h"), "{said}");
    }
}
