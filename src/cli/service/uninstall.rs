//! From a service to none; keys and state go only when that is asked for.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::Service;
use super::system::{self, UnitState, systemctl};
use crate::cli::fail::Failure;
use crate::cli::print::hint;
use crate::cli::{Done, print};

/// A little more than the units give a stop.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// For what systemd does by itself.
const QUICK: Duration = Duration::from_secs(20);

pub(super) fn run(service: Service, purge: bool) -> Done {
    system::need_root(&format!("uninstall {}", service.word()))?;
    system::need_systemd()?;
    let unit = service.unit();
    let installed = UnitState::of(service)?.installed;
    system::remove_stale(service);
    if installed {
        systemctl(&["disable", "--quiet", "--now", unit], STOP_LIMIT)?;
        for (socket, _) in service.sockets() {
            // One that was never started is as good as one that is stopped.
            let _ = systemctl(&["stop", socket], STOP_LIMIT);
            remove(&service.unit_file().with_file_name(socket), |path| fs::remove_file(path))?;
        }
        remove(&service.unit_file(), |path| fs::remove_file(path))?;
        systemctl(&["daemon-reload"], QUICK)?;
        // A unit that has failed would be remembered; one that has not is unknown by now.
        let _ = systemctl(&["reset-failed", unit], QUICK);
        print::line(format!("{unit} is stopped and removed"))?;
    } else {
        hint(format_args!("{unit} is not installed"));
    }
    let paths = service.paths();
    if purge {
        if UnixStream::connect(&paths.socket).is_ok() {
            return Err(Failure::new(
                format!("the state of a running {} stays", service.word()),
                format!("it answers on {}", paths.socket.display()),
                "stop it first (Ctrl-C there, or for a node: sudo overlay down)",
            ));
        }
        remove(&paths.state_dir, |path| fs::remove_dir_all(path))?;
        print::line(format!("{} is removed", paths.state_dir.display()))?;
        if service == Service::Node {
            hint("the server still lists this machine: overlay server remove NODE");
        }
    } else if paths.state_dir.exists() {
        hint(format_args!(
            "keys and state stay in {}; sudo overlay service uninstall {} --purge removes them",
            paths.state_dir.display(),
            service.word()
        ));
    }
    if paths.config.exists() {
        hint(format_args!("the configuration stays in {}", paths.config.display()));
    }
    // Only when the other service has nothing in them any more.
    for directory in [paths.state_dir.parent(), paths.socket.parent()].into_iter().flatten() {
        let _ = fs::remove_dir(directory);
    }
    Ok(())
}

fn remove(path: &Path, how: impl FnOnce(&Path) -> io::Result<()>) -> Done {
    match how(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::caused_by(
            format!("{} cannot be removed", path.display()),
            &error,
            format!("look at what holds it (lsattr, mount), then: rm -r {}", path.display()),
        )),
        _ => Ok(()),
    }
}
