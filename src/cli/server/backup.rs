//! `overlay server backup` and `restore`.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::cli::fail::{Failure, USAGE};
use crate::cli::print::hint;
use crate::cli::{Done, ask, print, runtime};
use crate::config::paths::{Paths, Role};
use crate::daemon::server::{self, BackupError, Question, StoreAnswer};
use crate::io::clock;
use crate::io::files::{self, FileError, SECRET_MODE};

const WARNING: &str = "it holds the server's secret key: whoever has this file can be the server";
/// What a restore takes back without anybody having asked for it.
const UNDONE: [&str; 2] = [
    "what was done after that moment is undone: a node that was removed is a member again (overlay \
     server nodes), and an invite that was used or revoked is open again until its time is over \
     (overlay server invite list)",
    "the log of changes goes on behind the backup's last line with network-restored (overlay server \
     events)",
];
/// No backup is longer: a quarter of it holds a hundred thousand nodes.
const MAX_BYTES: u64 = 256 << 20;

pub(super) fn write(file: &Path, socket: &Path) -> Done {
    let to_stdout = file == Path::new("-");
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(Failure::new(
            "the backup is not written to a terminal",
            WARNING,
            "overlay server backup FILE; or into a pipe: overlay server backup - | ssh HOST \
             'umask 077; cat > FILE'",
        )
        .code(USAGE));
    }
    let answer: StoreAnswer = ask::ask(Role::Server, socket, &Question::Backup)?;
    let StoreAnswer::Backup(text) = answer else {
        return Err(Failure::new(
            "the server gives no backup",
            "it answers with something else",
            "use the same version for command and server: overlay version",
        ));
    };
    if to_stdout {
        print::line(text.expose().trim_end())?;
        hint(WARNING);
        return Ok(());
    }
    let place = place(file)?;
    files::write_own(&place, text.expose().as_bytes(), SECRET_MODE).map_err(|error| {
        let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new(".")).display();
        Failure::caused_by(
            "the backup cannot be written",
            &error,
            format!("look at the directory: ls -ld {directory}; df -h {directory}"),
        )
    })?;
    hint(format_args!("written to {}; {WARNING}", file.display()));
    hint("a node that joins after this moment is not in it");
    Ok(())
}

/// Where the bytes go: a new file takes the place of the old one, which must not be the place of a
/// device, nor of a link to the file.
fn place(file: &Path) -> Result<PathBuf, Failure> {
    match std::fs::metadata(file) {
        Ok(there) if !there.is_file() => Err(Failure::new(
            "the backup cannot be written",
            format!("{} is there and is no file", file.display()),
            "overlay server backup FILE, a new one or one to replace; for a pipe: overlay server backup -",
        )),
        Ok(_) => Ok(file.canonicalize().unwrap_or_else(|_| file.to_owned())),
        // Whether it can be made is found out by making it.
        Err(_) => Ok(file.to_owned()),
    }
}

pub(super) fn restore(file: &Path, state_dir: &Path, force: bool) -> Done {
    let text = read(file)?;
    let restoring = server::restore(&text, state_dir, force, clock::unix_seconds());
    let restored = runtime::on_this_thread()?
        .block_on(restoring)
        .map_err(|error| explain(&error, file, state_dir))?;
    print::line(format!(
        "restored network {} with {} nodes, as it was at {}, in {}",
        restored.network,
        restored.nodes,
        restored.made,
        state_dir.display()
    ))?;
    if let Some(replaced) = restored.replaced {
        hint(format_args!("what was there before is in {}", replaced.display()));
    }
    UNDONE.iter().for_each(hint);
    let own = Paths::of(Role::Server).state_dir;
    hint(format_args!(
        "start it: {}; never let two machines be this server at the same time",
        start(state_dir, &own)
    ));
    Ok(())
}

/// What starts the server whose state is in `state_dir`; `own` is where that of this user would be.
fn start(state_dir: &Path, own: &Path) -> String {
    let service = Paths::of_system(Role::Server).state_dir;
    if state_dir == service {
        "sudo systemctl start overlay-server, or sudo overlay server".into()
    } else if state_dir == own {
        format!(
            "overlay server, without sudo (the service is another server, with its state in {}; to \
             restore that one: sudo overlay server restore FILE)",
            service.display()
        )
    } else {
        format!("overlay server --state-dir {}", state_dir.display())
    }
}

fn read(file: &Path) -> Result<Zeroizing<String>, Failure> {
    let mut text = Zeroizing::new(String::new());
    // A pipe and a device do not say how much they have, and may have it without end.
    let read = if file == Path::new("-") {
        std::io::stdin().lock().take(MAX_BYTES + 1).read_to_string(&mut text)
    } else {
        let opened = std::fs::File::open(file);
        opened.and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text))
    };
    let help = || format!("look at it: ls -l {}", file.display());
    read.map_err(|error| Failure::caused_by("the backup cannot be read", &error, help()))?;
    if text.len() as u64 > MAX_BYTES {
        let cause = format!("it is too large: more than {MAX_BYTES} bytes");
        return Err(Failure::new("the backup cannot be read", cause, help()));
    }
    Ok(text)
}

fn explain(error: &BackupError, file: &Path, state_dir: &Path) -> Failure {
    let failure = |help: String| Failure::caused_by("the backup is not restored", error, help);
    match error {
        BackupError::Damaged { .. } => {
            failure(format!("nothing was changed; take another backup than {}", file.display()))
        }
        BackupError::Newer { .. } => {
            failure("install that version of this program here: overlay version".into())
        }
        BackupError::Occupied { .. } => failure(format!(
            "nothing was changed; to replace it by the backup: overlay server restore --force {}",
            file.display()
        )),
        BackupError::File(FileError::Locked { .. }) => failure(
            "the server runs: sudo systemctl stop overlay-server (or Ctrl-C where it runs), then \
             type the command again"
                .into(),
        ),
        BackupError::Stuck { aside, .. } => failure(format!(
            "look at the place: df -h {0}; then type the command again, or move the files in {1} \
             back to {0} and remove {0}/restoring",
            state_dir.display(),
            aside.display()
        )),
        BackupError::File(_)
        | BackupError::Store(_)
        | BackupError::Content(_)
        | BackupError::Undone { .. } => failure(format!(
            "run it with sudo, and look at the place: df -h {}",
            state_dir.display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_that_was_restored_is_the_one_to_start() {
        let own = Path::new("/home/ann/.local/state/overlay/server");
        let service = Path::new("/var/lib/overlay/server");
        assert!(start(service, own).contains("systemctl start overlay-server"));
        assert!(start(service, service).contains("systemctl start overlay-server"));
        assert!(!start(own, own).contains("systemctl"));
        assert!(start(own, own).contains("sudo overlay server restore FILE"));
        assert_eq!(start(Path::new("/srv/net"), own), "overlay server --state-dir /srv/net");
    }
}
