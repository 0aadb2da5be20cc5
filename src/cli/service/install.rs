//! From nothing to a service that is ready.
//!
//! What can be wrong with the request is looked at before anything is changed. Every step leaves
//! alone what is as it should be, so that a second run updates the first.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;
use zeroize::Zeroizing;

use super::Service;
use super::system::{self, Account, USUAL_PROGRAM, UnitState, systemctl};
use crate::cli::ask::SocketArg;
use crate::cli::fail::{FAILED, Failure, NOT_ENROLLED, USAGE};
use crate::cli::print::hint;
use crate::cli::{Done, print, runtime, server, up};
use crate::config::node::NodeConfig;
use crate::config::server::ServerConfig;
use crate::config::{self, Wanted};
use crate::daemon::node::report::Status;
use crate::daemon::node::{Question, try_interface};
use crate::io::files;
use crate::types::NodeName;

/// A child that connects and waits for the server's word; it has shorter limits of its own.
const ENROL_LIMIT: Duration = Duration::from_secs(60);
/// A little more than the units give a start and a stop.
const START_LIMIT: Duration = Duration::from_secs(120);
/// For what systemd does by itself.
const QUICK: Duration = Duration::from_secs(20);

pub(super) fn run(service: Service, join: Option<&str>) -> Done {
    system::need_root(&format!("install {}", service.word()))?;
    system::need_systemd()?;
    let join = join.map(up::join_line).transpose()?.map(|line| line.expose());
    if service == Service::Node && join.is_none() && !is_enrolled(service) {
        return Err(Failure::new(
            "this machine is not enrolled in a network",
            "there is no join line, and no membership from before",
            "on the server: overlay server invite, then on this machine: \
             sudo overlay service install node JOINLINE",
        )
        .code(NOT_ENROLLED));
    }
    let config = Config::read(service)?;
    let socket = config.socket(service)?;
    if service == Service::Node && join.is_some() {
        let wanted = std::env::var_os(NAME_VARIABLE);
        name_is_kept(wanted.as_deref(), config.node.name.as_ref(), &service.paths().config)?;
        if !is_enrolled(service) {
            // An invite that is used up brings no interface.
            let interface = config.node.interface.as_deref().unwrap_or(up::DEFAULT_INTERFACE);
            let trial = runtime::on_this_thread()?.block_on(try_interface(interface));
            trial.map_err(|error| up::interface_failure(&error))?;
        }
    }
    let running = UnitState::of(service)?.is_busy();
    if !running && UnixStream::connect(&socket).is_ok() {
        return Err(Failure::new(
            format!("a {} runs outside of its service", service.word()),
            format!("it answers on {}", socket.display()),
            "stop it (Ctrl-C there, or for a node: sudo overlay down), then try again",
        ));
    }

    let account = system::account()?;
    let program = system::program()?;
    if running {
        // It holds the state directory, or tries to.
        systemctl(&["stop", service.unit()], START_LIMIT)?;
    }
    if let Err(failure) = prepare(service, account, &program, join.as_ref(), &config.server.listen)
    {
        if running {
            // What is wrong with the new one is what has to be told.
            let _ = systemctl(&["start", service.unit()], START_LIMIT);
        }
        return Err(failure);
    }
    // Ends when the service says that it is ready, or gives up.
    systemctl(&["restart", service.unit()], START_LIMIT)
        .map_err(|failure| why(service, failure))?;
    match service {
        Service::Node => tell_node(service, socket),
        Service::Server => tell_server(service, &socket),
    }
}

/// Everything but the start; of a node that cannot join nothing is installed.
fn prepare(
    service: Service,
    account: Account,
    program: &Path,
    join: Option<&Zeroizing<String>>,
    listen: &[SocketAddr],
) -> Done {
    let paths = service.paths();
    if let Some(directory) = paths.config.parent() {
        system::make_config_dir(directory)?;
    }
    system::give_state(&paths.state_dir, account)?;
    if let Some(join) = join {
        enrol(program, service, account, join)?;
    }
    write_unit(service, program, listen)?;
    system::remove_stale(service);
    write_sockets(service, listen)?;
    systemctl(&["daemon-reload"], QUICK)?;
    systemctl(&["enable", "--quiet", service.unit()], QUICK)
}

fn is_enrolled(service: Service) -> bool {
    service.paths().state_dir.join(crate::daemon::node::ENROLMENT_FILE).exists()
}

/// What the service will read; the other one's is as it is without a file.
#[derive(Default)]
struct Config {
    node: NodeConfig,
    server: ServerConfig,
}

impl Config {
    fn read(service: Service) -> Result<Self, Failure> {
        let (file, mut config) = (service.paths().config, Self::default());
        match service {
            Service::Node => config.node = config::load_file(&file, Wanted::IfThere)?,
            Service::Server => config.server = config::load_file(&file, Wanted::IfThere)?,
        }
        Ok(config)
    }

    /// Where the service will listen for commands, if its configuration is one that it can use.
    fn socket(&self, service: Service) -> Result<PathBuf, Failure> {
        let paths = service.paths();
        let refused = |key: &str, wanted: &Path, place: &Path| {
            Failure::new(
                format!("{key} = \"{}\" cannot be used by a service", wanted.display()),
                format!("the service may write to {} only", place.display()),
                format!("remove {key} from {}", paths.config.display()),
            )
            .code(USAGE)
        };
        let state_dir = self.node.state_dir.as_ref().or(self.server.state_dir.as_ref());
        if let Some(wanted) = state_dir.filter(|wanted| **wanted != paths.state_dir) {
            return Err(refused("state-dir", wanted, &paths.state_dir));
        }
        let socket = self.node.socket.as_ref().or(self.server.socket.as_ref());
        let socket = socket.unwrap_or(&paths.socket);
        match paths.socket.parent() {
            Some(place) if socket.parent() != Some(place) => Err(refused("socket", socket, place)),
            _ => Ok(socket.clone()),
        }
    }
}

/// A name that only the variable has would last until the service is started: at each start a node
/// tells the server what it would like to be called.
fn name_is_kept(wanted: Option<&OsStr>, config: Option<&NodeName>, file: &Path) -> Done {
    let Some(wanted) = wanted else { return Ok(()) };
    if config.is_some_and(|name| wanted == name.as_str()) {
        return Ok(());
    }
    let (wanted, file) = (wanted.to_string_lossy(), file.display());
    Err(Failure::new(
        format!("the name {wanted} cannot come from {NAME_VARIABLE}"),
        "a service is started without the variables of who installs it, and would ask for another \
         name then",
        format!("write it down as name = \"{wanted}\" in {file}, then type the command again"),
    )
    .code(USAGE))
}

/// Joins as the user of the service, who then owns all that is written.
fn enrol(program: &Path, service: Service, account: Account, join: &Zeroizing<String>) -> Done {
    let paths = service.paths();
    let mut command = Command::new(program);
    command.args(["up", "-", "--enrol-only"]);
    command.arg("--state-dir").arg(&paths.state_dir);
    command.arg("--socket").arg(paths.state_dir.join("enrol.sock"));
    // It sees the configuration that the service will see, and nothing of the user who installs.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OVERLAY_") {
            command.env_remove(name);
        }
    }
    if let Some(directory) = paths.config.parent() {
        command.env("CONFIGURATION_DIRECTORY", directory);
    }
    command.current_dir("/").uid(account.uid.as_raw()).gid(account.gid.as_raw());
    let ran = system::run(command, join, ENROL_LIMIT)?;
    if ran.code == Some(0) {
        return Ok(());
    }
    let code = ran.code.and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED);
    Err(match told(&ran.stderr) {
        Some(Told { error, cause, help }) => Failure::new(error, cause, help),
        None => Failure::new(
            "this machine could not join",
            format!("`overlay up` has ended without a reason: {}", ran.stderr.trim()),
            "try it in the foreground: sudo overlay up JOINLINE",
        ),
    }
    .code(code))
}

/// The failure that a program of ours printed last.
#[derive(Debug, PartialEq, Eq)]
struct Told<'a> {
    error: &'a str,
    cause: &'a str,
    help: &'a str,
}

fn told(stderr: &str) -> Option<Told<'_>> {
    let lines: Vec<&str> = stderr.lines().collect();
    let at = lines.iter().rposition(|line| line.starts_with("error: "))?;
    let part = |name: &str| lines.iter().skip(at).find_map(|line| line.strip_prefix(name));
    Some(Told {
        error: part("error: ")?,
        cause: part("cause: ").unwrap_or("it gave none"),
        help: part("help: ").unwrap_or("see the log"),
    })
}

/// The units that hold the ports open. Where the configuration names other ports than the usual
/// ones, the server opens them itself.
fn write_sockets(service: Service, listen: &[SocketAddr]) -> Done {
    for (name, text) in service.sockets() {
        let path = Path::new("/etc/systemd/system").join(name);
        if listen.is_empty() {
            write_file(&path, text)?;
        } else {
            // One of an earlier configuration would hold a port that nobody wants.
            let _ = systemctl(&["stop", name], QUICK);
            let _ = std::fs::remove_file(&path);
        }
    }
    Ok(())
}

fn write_unit(service: Service, program: &Path, listen: &[SocketAddr]) -> Done {
    let mut text = service.unit_text().replace(USUAL_PROGRAM, &program.to_string_lossy());
    if listen.iter().any(|it| it.port() < 1024) {
        // The server opens such a port itself, on UDP too, and needs the right to.
        text = text.replace(NO_RIGHTS, LOW_PORTS);
    }
    write_file(&service.unit_file(), &text)
}

/// What `overlay up --name` can be given by, too.
const NAME_VARIABLE: &str = "OVERLAY_NAME";
const NO_RIGHTS: &str = "CapabilityBoundingSet=\nAmbientCapabilities=\nPrivateUsers=yes\n";
const LOW_PORTS: &str = "CapabilityBoundingSet=CAP_NET_BIND_SERVICE\n\
                         AmbientCapabilities=CAP_NET_BIND_SERVICE\n";

fn write_file(path: &Path, text: &str) -> Done {
    files::write_atomically(path, text.as_bytes(), 0o644).map_err(|error| {
        let directory = path.parent().unwrap_or(path).display();
        Failure::caused_by(
            "the unit file cannot be written",
            &error,
            format!("see whether its directory can be written: df -h {directory}"),
        )
    })
}

/// Why a service does not start: what it wrote before it ended.
fn why(service: Service, failure: Failure) -> Failure {
    let unit = service.unit();
    let journal = system::journal(service);
    // To the right, as the failure in it is not yet the one that this command ends with.
    let lines = journal.trim_end().replace('\n', "\n    ");
    hint(format_args!("the last lines of journalctl -u {unit}:\n    {lines}\n"));
    let then = format!(
        "then: sudo systemctl restart {unit}; or give up: sudo overlay service uninstall {}",
        service.word()
    );
    match told(&journal) {
        Some(Told { error, cause, help }) => Failure::new(
            format!("{unit} does not start: {error}"),
            cause,
            format!("{help}; {then}"),
        ),
        None => Failure::new(
            format!("{unit} does not start"),
            failure.to_string().replace('\n', "; "),
            format!("see the lines above; {then}"),
        ),
    }
}

fn tell_node(service: Service, socket: PathBuf) -> Done {
    let status: Status = SocketArg { socket: Some(socket) }.ask(&Question::Status)?;
    let own = status.own;
    print::line(format!(
        "{} is ready: {} at {} and {}",
        service.unit(),
        own.name,
        own.ipv4,
        own.ipv6
    ))?;
    hint("overlay status shows the others");
    Ok(())
}

fn tell_server(service: Service, socket: &Path) -> Done {
    let state = UnitState::of(service)?;
    print::line(format!("{} is ready: {}", service.unit(), state.text))?;
    if !server::first_invite(socket)? {
        hint("overlay server invite prints a join line for one more node");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_failure_of_a_program_is_understood() {
        let printed = "error: old\ncause: old\n2026-01-01T00:00:00Z  INFO connected\n\
                       error: no\ncause: because\nhelp: do this\n";
        assert_eq!(told(printed), Some(Told { error: "no", cause: "because", help: "do this" }));
        assert_eq!(told("error: alone").unwrap().error, "alone");
        assert_eq!(told("Segmentation fault"), None);
    }

    #[test]
    fn a_name_that_the_service_would_not_know_is_refused_with_the_key_that_it_does() {
        let file = Path::new("/etc/overlay/node.toml");
        let name = |text: &str| text.parse::<NodeName>().unwrap();
        let check = |wanted: Option<&str>, config: Option<&NodeName>| {
            name_is_kept(wanted.map(OsStr::new), config, file)
        };
        assert!(check(None, None).is_ok());
        assert!(check(None, Some(&name("bob"))).is_ok());
        assert!(check(Some("bob"), Some(&name("bob"))).is_ok());
        for config in [None, Some(name("alice"))] {
            let failure = check(Some("bob"), config.as_ref()).unwrap_err().to_string();
            assert!(failure.contains("name = \"bob\" in /etc/overlay/node.toml"), "{failure}");
        }
    }

    #[test]
    fn the_server_gets_the_right_to_low_ports_only_where_it_is_told_to() {
        let text = Service::Server.unit_text();
        assert_eq!(text.matches(NO_RIGHTS).count(), 1);
        assert!(!text.contains("CAP_NET_BIND_SERVICE"));
    }

    #[test]
    fn every_unit_names_the_program_once_where_it_is_started() {
        for service in [Service::Node, Service::Server] {
            let text = service.unit_text();
            assert_eq!(text.matches(USUAL_PROGRAM).count(), 1, "{}", service.unit());
            assert!(text.contains(&format!("\nExecStart={USUAL_PROGRAM} ")), "{}", service.unit());
        }
    }
}
