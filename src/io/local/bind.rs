//! Making a local socket that only the daemon's user and the group `overlay` can open.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::fchownat;
use tokio::net::{UnixListener, UnixStream};

use super::LocalError;

/// Whose members may ask a daemon that runs as root.
const GROUP: &str = "overlay";

/// Makes the socket. What a killed daemon left is removed; a living one is not disturbed.
pub(super) async fn socket(path: &Path) -> Result<UnixListener, LocalError> {
    let io = |source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied => {
            LocalError::Permission { path: path.to_path_buf(), source }
        }
        _ => LocalError::Io { path: path.to_path_buf(), source },
    };
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(io)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(LocalError::NotASocket { path: path.to_path_buf() });
        }
        Ok(_) => match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
            Ok(_) => return Err(LocalError::AlreadyRunning { path: path.to_path_buf() }),
        },
        Err(_) => {}
    }
    // Bound beside its place and moved there once its mode is right: whatever the umask, there
    // is no moment at which a stranger can open it.
    let mut beside = path.as_os_str().to_os_string();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let _ = fs::remove_file(&beside);
    let listener = UnixListener::bind(&beside).map_err(io)?;
    open_to_group(&beside).map_err(io)?;
    fs::rename(&beside, path).map_err(io)?;
    Ok(listener)
}

/// Lets the group `overlay` in, and nobody else.
///
/// Root may do this in the directory of the service, whose user could put a link in the place of
/// the socket: so the very file that was looked at is changed, by its descriptor.
fn open_to_group(socket: &Path) -> io::Result<()> {
    // Not std's `OpenOptions`: on musl it takes O_PATH for a part of the access mode, and drops it.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = fs::File::from(open(socket, flags, Mode::empty())?);
    if !file.metadata()?.file_type().is_socket() {
        return Err(io::Error::from(io::ErrorKind::AlreadyExists));
    }
    // fchmod(2) refuses such a descriptor; its name in /proc leads to the same file.
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(name, fs::Permissions::from_mode(0o660))?;
    if let Ok(Some(group)) = nix::unistd::Group::from_name(GROUP) {
        // Only root and members can give the socket to the group; for others it stays theirs.
        let _ = fchownat(&file, "", None, Some(group.gid), AtFlags::AT_EMPTY_PATH);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_is_opened_to_the_group() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "precious").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        open_to_group(&file).unwrap_err();
        open_to_group(&link).unwrap_err();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
