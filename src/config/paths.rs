//! Where files are, unless somebody says otherwise.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::node::NodeConfig;
use super::server::ServerConfig;
use super::{Wanted, load_file};

/// Which program the files belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `overlay server`.
    Server,
    /// `overlay up`.
    Node,
}

impl Role {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Node => "node",
        }
    }
}

/// The three default places of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The directory with keys and state.
    pub state_dir: PathBuf,
    /// The local socket.
    pub socket: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
}

impl Paths {
    /// The places for the user that runs this process, or those that a service manager gives it.
    #[must_use]
    pub fn of(role: Role) -> Self {
        let variable = |name: &str| std::env::var_os(name);
        let paths = if nix::unistd::geteuid().is_root() {
            Self::of_system(role)
        } else {
            Self::of_user(role, variable)
        };
        paths.within_service(role, variable)
    }

    /// The places of root and of the services.
    #[must_use]
    pub fn of_system(role: Role) -> Self {
        let word = role.word();
        Self {
            state_dir: format!("/var/lib/overlay/{word}").into(),
            socket: format!("/run/overlay/{word}.sock").into(),
            config: format!("/etc/overlay/{word}.toml").into(),
        }
    }

    /// The XDG base directories; a relative path in a variable counts as none, as the standard says.
    fn of_user(role: Role, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let word = role.word();
        let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = absolute("HOME").unwrap_or_else(|| "/".into());
        let state = absolute("XDG_STATE_HOME").unwrap_or_else(|| home.join(".local/state"));
        let config = absolute("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config"));
        let runtime = absolute("XDG_RUNTIME_DIR").unwrap_or_else(|| state.clone());
        Self {
            state_dir: state.join("overlay").join(word),
            socket: runtime.join("overlay").join(format!("{word}.sock")),
            config: config.join("overlay").join(format!("{word}.toml")),
        }
    }

    /// A service has a user without a home and may write to few places; systemd names the ones of
    /// its unit in these variables (`StateDirectory=` and its like in systemd.exec(5)).
    fn within_service(self, role: Role, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let word = role.word();
        let given = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        Self {
            state_dir: given("STATE_DIRECTORY").unwrap_or(self.state_dir),
            socket: given("RUNTIME_DIRECTORY")
                .map_or(self.socket, |dir| dir.join(format!("{word}.sock"))),
            config: given("CONFIGURATION_DIRECTORY")
                .map_or(self.config, |dir| dir.join(format!("{word}.toml"))),
        }
    }

    /// The socket that a command should talk to: the user's own daemon if there is one, else the
    /// system's, each where its configuration file says.
    #[must_use]
    pub fn socket_to_ask(role: Role) -> PathBuf {
        Self::of(role).or_systems(role, &Self::of_system(role))
    }

    /// Like [`Self::socket_to_ask`], for a daemon with a configuration file of its own, which reads no
    /// other; `named` is the socket in that file.
    #[must_use]
    pub fn socket_of_file(role: Role, named: Option<PathBuf>) -> PathBuf {
        named.unwrap_or_else(|| Self::of(role).running_or(Self::of_system(role).socket))
    }

    /// The socket of these places if there is one, else the system's.
    fn running_or(self, system: PathBuf) -> PathBuf {
        if !self.socket.exists() && system.exists() { system } else { self.socket }
    }

    /// The socket of these places, or the system's, where only that one can be meant.
    fn or_systems(self, role: Role, system: &Self) -> PathBuf {
        if let Some(named) = socket_in(role, &self.config) {
            return named;
        }
        if self.socket.exists() {
            return self.socket;
        }
        socket_in(role, &system.config).unwrap_or_else(|| self.running_or(system.socket.clone()))
    }
}

/// The socket that a configuration file names. One that cannot be read or is wrong names none: who asks
/// may have no right to read it, and the daemon goes on with what it has read before.
fn socket_in(role: Role, file: &Path) -> Option<PathBuf> {
    match role {
        Role::Node => load_file::<NodeConfig>(file, Wanted::IfThere).ok()?.socket,
        Role::Server => load_file::<ServerConfig>(file, Wanted::IfThere).ok()?.socket,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_the_systems_places_and_others_their_own() {
        assert_eq!(Paths::of_system(Role::Node).state_dir, PathBuf::from("/var/lib/overlay/node"));
        let user = Paths::of_user(Role::Server, |name| match name {
            "HOME" => Some("/home/ann".into()),
            "XDG_RUNTIME_DIR" => Some("/run/user/1000".into()),
            "XDG_CONFIG_HOME" => Some("relative".into()),
            _ => None,
        });
        assert_eq!(user.state_dir, PathBuf::from("/home/ann/.local/state/overlay/server"));
        assert_eq!(user.socket, PathBuf::from("/run/user/1000/overlay/server.sock"));
        assert_eq!(user.config, PathBuf::from("/home/ann/.config/overlay/server.toml"));
    }

    #[test]
    fn a_command_asks_where_the_users_file_says_and_else_where_the_systems_does() {
        let dir = tempfile::tempdir().unwrap();
        let paths = |word: &str| Paths {
            state_dir: dir.path().join(format!("{word}.state")),
            socket: dir.path().join(format!("{word}.sock")),
            config: dir.path().join(format!("{word}.toml")),
        };
        let (own, system) = (paths("own"), paths("system"));
        let asked = |role| own.clone().or_systems(role, &system);
        let write = |file: &Path, text: &str| std::fs::write(file, text).unwrap();
        for role in [Role::Node, Role::Server] {
            assert_eq!(asked(role), own.socket, "nobody runs, and nothing is written");
            write(&system.socket, "");
            assert_eq!(asked(role), system.socket, "only the system's daemon runs");
            write(&system.config, "socket = \"/run/elsewhere.sock\"\n");
            assert_eq!(asked(role), Path::new("/run/elsewhere.sock"), "the system's file");
            write(&own.socket, "");
            assert_eq!(asked(role), own.socket, "the user's own daemon runs");
            write(&own.config, "socket = \"/tmp/mine.sock\"\n");
            assert_eq!(asked(role), Path::new("/tmp/mine.sock"), "the user's own file");
            write(&own.config, "sockt = 1\n");
            assert_eq!(asked(role), own.socket, "a wrong file does not keep a command from asking");
            for file in [&own.config, &own.socket, &system.config, &system.socket] {
                std::fs::remove_file(file).unwrap();
            }
        }
    }

    #[test]
    fn a_service_has_the_systems_places_whoever_its_user_is() {
        let user = Paths::of_user(Role::Node, |_| None);
        let service = user.clone().within_service(Role::Node, |name| match name {
            "STATE_DIRECTORY" => Some("/var/lib/overlay/node".into()),
            "RUNTIME_DIRECTORY" => Some("/run/overlay".into()),
            "CONFIGURATION_DIRECTORY" => Some("/etc/overlay".into()),
            _ => None,
        });
        assert_eq!(service, Paths::of_system(Role::Node));
        assert_eq!(user.clone().within_service(Role::Node, |_| None), user);
    }
}
