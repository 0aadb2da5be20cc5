//! Small files that must survive a power cut, and the lock of a state directory.
//!
//! A file is written beside its place, synced and renamed over it, so that a reader sees the old
//! content or the new one and nothing between.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, OFlag};
use nix::unistd::linkat;
use zeroize::Zeroizing;

/// Mode of a file with a secret in it.
pub const SECRET_MODE: u32 = 0o600;
/// No file of ours is larger; a larger one is not ours.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Nobody writes more than this by hand.
const MAX_TEXT_BYTES: u64 = 1 << 20;
const LOCK_FILE: &str = "lock";

/// Why a state file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "read", "write", "create", "lock".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A secret that others may read is no secret.
    #[error("{} may be read by others (mode {mode:o}); make it private with chmod 600", path.display())]
    TooOpen {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not one of ours: a directory, a device, or a pipe, on which a reader may wait for ever.
    #[error("{} is no ordinary file", path.display())]
    NotAFile {
        /// What it is called.
        path: PathBuf,
    },
    /// Not one of ours.
    #[error("{} is too large: more than {limit} bytes", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// The most that is read, in bytes.
        limit: u64,
    },
    /// Another process uses the directory.
    #[error("another process uses the state directory {}", path.display())]
    Locked {
        /// Which directory.
        path: PathBuf,
    },
}

impl FileError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// Whether the process lacks a right that another user would have.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }
}

/// To whom a new file belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// The owner of the directory, when root writes: see [`leave_to_owner_of`].
    OfDirectory,
    /// Who writes.
    Writer,
}

/// Replaces `path`, a file in a state directory, by `bytes`; when this returns, a power cut cannot
/// undo it. What root writes belongs to the owner of the directory.
///
/// # Errors
/// When a step fails; the old content is then still in place, and the new one nowhere.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    write_as(Owner::OfDirectory, path, bytes, mode)
}

/// Like [`write_atomically`], for a file that a user names: it belongs to that user, in whosever
/// directory it is.
///
/// # Errors
/// When a step fails; the old content is then still in place, and the new one nowhere.
pub fn write_own(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    write_as(Owner::Writer, path, bytes, mode)
}

fn write_as(owner: Owner, path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let beside = beside(path, NEW);
    let mut is_made = false;
    let written = (|| {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // In a directory of ours the next start looks for what was not put in place.
        let nameless = (owner == Owner::Writer).then(|| nameless(directory, mode)).flatten();
        let (mut file, name) = match nameless {
            Some((file, name)) => (file, Some(name)),
            None => {
                let mut new = OpenOptions::new();
                let file = new.write(true).create_new(true).mode(mode).open(&beside)?;
                is_made = true;
                (file, None)
            }
        };
        file.write_all(bytes)?;
        // The umask may have taken bits away that the caller wants.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        if owner == Owner::OfDirectory {
            leave_to_owner_of(directory, &file);
        }
        file.sync_all()?;
        if let Some(name) = name {
            linkat(AT_FDCWD, &name, AT_FDCWD, &beside, AtFlags::AT_SYMLINK_FOLLOW)?;
            is_made = true;
        }
        fs::rename(&beside, path)?;
        is_made = false;
        File::open(directory)?.sync_all()
    })();
    if written.is_err() && is_made {
        // Nobody would look for a secret there. When it cannot be removed, the first error says why.
        let _ = fs::remove_file(&beside);
    }
    written.map_err(FileError::io("write", path))
}

/// A file that has no name yet and goes with this process, and where it can be had from to give it one;
/// `None` where the file system has no such files.
fn nameless(directory: &Path, mode: u32) -> Option<(File, PathBuf)> {
    let mut new = OpenOptions::new();
    let new = new.write(true).mode(mode).custom_flags(OFlag::O_TMPFILE.bits());
    let file = new.open(directory).ok()?;
    let name = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    name.exists().then_some((file, name))
}

/// Like [`write_atomically`], and with a second copy (`.bak`), for what nobody could make again.
///
/// # Errors
/// When a step fails; the old content is then still in one of the places.
pub fn write_twice(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    write_atomically(path, bytes, mode)?;
    write_atomically(&beside(path, BACKUP), bytes, mode)
}

/// Where the content of a file may be when the file itself is missing or of no use: one that was
/// written and not yet put in place, then the second copy.
pub fn other_places(path: &Path) -> [PathBuf; 2] {
    [beside(path, NEW), beside(path, BACKUP)]
}

/// Whether this is the second copy of a file.
pub fn is_copy(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(BACKUP.as_bytes())
}

const NEW: &str = ".new";
const BACKUP: &str = ".bak";

fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(end);
    PathBuf::from(name)
}

/// Leaves a file that was made in a state directory to the owner of the directory.
pub(crate) fn leave_to_owner(path: &Path, file: &File) {
    if let Some(directory) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        leave_to_owner_of(directory, file);
    }
}

/// Root works in the state directory of the service now and then; what it leaves there must be of
/// use to the service.
fn leave_to_owner_of(directory: &Path, file: &File) {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let owner = fs::metadata(directory).map(|owner| (owner.uid(), owner.gid()));
    // One with a second name may be somebody else's, linked to here by the directory's owner.
    let is_ours =
        file.metadata().is_ok_and(|file| file.is_dir() || (file.is_file() && file.nlink() <= 1));
    if let Ok((uid, gid)) = owner
        && (uid, gid) != (0, 0)
        && is_ours
    {
        // A root without this right is one in a user namespace, where there is no other user.
        let _ = fchown(file, Some(uid), Some(gid));
    }
}

/// The content of a file, or `None` when there is no such file.
///
/// # Errors
/// When it exists and cannot be read.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    Ok(open(path, Source::State)?.map(|content| content.bytes.to_vec()))
}

/// The content of a file that a person has written, or `None` when there is no such file.
///
/// # Errors
/// When it exists and cannot be read, or has more than a mebibyte: another file, or a device.
pub fn read_text(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    Ok(open(path, Source::Text)?.map(|content| content.bytes.to_vec()))
}

/// The content of a file that only its owner may read, or `None` when there is no such file.
///
/// # Errors
/// When it exists and cannot be read, or others can read it.
pub fn read_secret(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, FileError> {
    let Some(Content { bytes, mode }) = open(path, Source::State)? else {
        return Ok(None);
    };
    if mode & 0o077 != 0 {
        return Err(FileError::TooOpen { path: path.to_path_buf(), mode });
    }
    Ok(Some(bytes))
}

struct Content {
    bytes: Zeroizing<Vec<u8>>,
    mode: u32,
}

/// Who has written a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// This program: it is an ordinary file.
    State,
    /// A person, who may have a program write it at this moment, into a pipe.
    Text,
}

fn open(path: &Path, source: Source) -> Result<Option<Content>, FileError> {
    let (limit, flags) = match source {
        // Else opening a pipe would wait for somebody who writes.
        Source::State => (MAX_FILE_BYTES, OFlag::O_NONBLOCK),
        Source::Text => (MAX_TEXT_BYTES, OFlag::empty()),
    };
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(FileError::io("read", path)(error)),
    };
    let metadata = file.metadata().map_err(FileError::io("read", path))?;
    if source == Source::State && !metadata.is_file() {
        return Err(FileError::NotAFile { path: path.to_path_buf() });
    }
    let too_large = || FileError::TooLarge { path: path.to_path_buf(), limit };
    if metadata.len() > limit {
        return Err(too_large());
    }
    let mut bytes = Zeroizing::new(Vec::new());
    // A device says that it has none, and may have them without end.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(FileError::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(too_large());
    }
    Ok(Some(Content { bytes, mode: metadata.permissions().mode() & 0o777 }))
}

/// Says in the log when others may change a file or directory of ours: they could put in it what they
/// like, or take from it what it keeps.
pub(crate) fn warn_if_open(path: &Path) {
    if let Some(mend) = fs::metadata(path).ok().and_then(|it| mend_of(path, &it)) {
        tracing::warn!(path = %path.display(), "others may write to it; type: sudo {mend}");
    }
}

/// What makes a file or directory private to which everybody may write. In a directory with the sticky
/// bit nobody takes away what is another's.
fn mend_of(path: &Path, metadata: &fs::Metadata) -> Option<String> {
    let (mode, is_dir) = (metadata.mode(), metadata.is_dir());
    let is_open = mode & 0o002 != 0 && !(is_dir && mode & 0o1000 != 0);
    let private = if is_dir { "700" } else { "600" };
    is_open.then(|| format!("chmod {private} {}", path.display()))
}

/// Makes sure that a directory exists; one that is made here is for its owner alone.
///
/// # Errors
/// When it cannot be made.
pub fn private_dir(path: &Path) -> Result<(), FileError> {
    if path.is_dir() {
        warn_if_open(path);
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(FileError::io("create", path))?;
    }
    DirBuilder::new().mode(0o700).create(path).map_err(FileError::io("create", path))
}

/// Holds a state directory for this process; let go when dropped, and by the kernel when killed.
#[derive(Debug)]
pub struct DirLock {
    _file: Flock<File>,
}

impl DirLock {
    /// Takes the lock of `directory`, which must exist.
    ///
    /// # Errors
    /// [`FileError::Locked`] when another process has it.
    pub fn acquire(directory: &Path) -> Result<Self, FileError> {
        let path = directory.join(LOCK_FILE);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(SECRET_MODE)
            // The owner of the directory must not lead root to another file.
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(&path)
            .map_err(FileError::io("lock", &path))?;
        leave_to_owner_of(directory, &file);
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Self { _file: file }),
            Err((_, Errno::EWOULDBLOCK)) => {
                Err(FileError::Locked { path: directory.to_path_buf() })
            }
            Err((_, errno)) => Err(FileError::io("lock", &path)(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_is_whole_private_and_replaced_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.key");
        assert!(read_secret(&path).unwrap().is_none());
        // What a killed predecessor left does not stand in the way.
        fs::write(dir.path().join("server.key.new"), "half").unwrap();
        for content in ["first", "second, longer", "3"] {
            write_atomically(&path, content.as_bytes(), SECRET_MODE).unwrap();
            assert_eq!(read_secret(&path).unwrap().unwrap().as_slice(), content.as_bytes());
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn what_cannot_be_put_in_place_leaves_no_secret_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup");
        fs::create_dir(&path).unwrap();
        for write in [write_atomically, write_own] {
            let error = write(&path, b"secret", SECRET_MODE).unwrap_err();
            assert!(matches!(error, FileError::Io { action: "write", .. }), "{error}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only what was there");
        }
        // What somebody else has there stays.
        fs::create_dir(beside(&path, NEW)).unwrap();
        write_own(&path, b"secret", SECRET_MODE).unwrap_err();
        assert!(beside(&path, NEW).is_dir());
    }

    #[test]
    fn a_file_for_a_user_has_no_name_before_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let count = || fs::read_dir(dir.path()).unwrap().count();
        match nameless(dir.path(), SECRET_MODE) {
            Some((mut file, name)) => {
                file.write_all(b"secret").unwrap();
                assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, SECRET_MODE);
                assert_eq!((count(), fs::read(name).unwrap()), (0, b"secret".to_vec()));
            }
            None => println!("this file system has no files without a name"),
        }
        assert_eq!(count(), 0, "it is gone with its descriptor");
        // What an older version left when it was killed, for others to read.
        let path = dir.path().join("backup");
        fs::write(beside(&path, NEW), "half").unwrap();
        for content in [&b"first"[..], b"second"] {
            write_own(&path, content, SECRET_MODE).unwrap();
            assert_eq!(read_secret(&path).unwrap().unwrap().as_slice(), content);
            assert_eq!(count(), 1, "nothing is left beside it");
        }
    }

    #[test]
    fn what_root_writes_belongs_to_the_owner_of_the_directory() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        if std::os::unix::fs::chown(dir.path(), Some(4711), Some(4712)).is_err() {
            return; // root of a user namespace that knows no other user
        }
        let path = dir.path().join("server.key");
        write_atomically(&path, b"secret", SECRET_MODE).unwrap();
        let _lock = DirLock::acquire(dir.path()).unwrap();
        let backup = dir.path().join("backup");
        write_own(&backup, b"secret", SECRET_MODE).unwrap();
        let file = fs::metadata(&backup).unwrap();
        assert_eq!((file.uid(), file.mode() & 0o777), (0, 0o600), "it is root's, and a secret");
        for path in [path, dir.path().join(LOCK_FILE)] {
            let file = fs::metadata(&path).unwrap();
            assert_eq!((file.uid(), file.gid()), (4711, 4712), "{}", path.display());
        }
    }

    #[test]
    fn the_lock_is_never_a_way_to_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        fs::write(&other, "precious").unwrap();
        std::os::unix::fs::symlink(&other, dir.path().join(LOCK_FILE)).unwrap();
        assert!(matches!(DirLock::acquire(dir.path()), Err(FileError::Io { .. })));
    }

    #[test]
    fn writing_follows_no_link_and_changes_no_file_with_another_name() {
        let dir = tempfile::tempdir().unwrap();
        let (state, other) = (dir.path().join("state"), dir.path().join("other"));
        private_dir(&state).unwrap();
        let path = state.join("node.key");
        let precious = || {
            assert_eq!(fs::read(&other).unwrap(), b"precious");
            assert_eq!(fs::metadata(&other).unwrap().permissions().mode() & 0o777, 0o644);
        };
        fs::write(&other, "precious").unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o644)).unwrap();
        let [new, backup] = other_places(&path);
        let make: [fn(&Path, &Path) -> io::Result<()>; 2] = [
            |original, link| std::os::unix::fs::symlink(original, link),
            |original, link| fs::hard_link(original, link),
        ];
        for link in make {
            for place in [&path, &new, &backup] {
                let _ = fs::remove_file(place);
                link(&other, place).unwrap();
            }
            write_twice(&path, b"secret", SECRET_MODE).unwrap();
            precious();
            for place in [&path, &backup] {
                let written = fs::symlink_metadata(place).unwrap();
                assert!(written.is_file() && written.nlink() == 1, "a file of its own");
                assert_eq!(read_secret(place).unwrap().unwrap().as_slice(), b"secret");
            }
            assert!(fs::symlink_metadata(&new).is_err(), "nothing is left beside it");
        }
        // One that leads nowhere is no way to make a file there.
        let nowhere = dir.path().join("nowhere");
        for place in [&path, &new, &backup] {
            let _ = fs::remove_file(place);
            std::os::unix::fs::symlink(&nowhere, place).unwrap();
        }
        write_twice(&path, b"secret", SECRET_MODE).unwrap();
        assert!(fs::symlink_metadata(&nowhere).is_err());
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.key");
        write_atomically(&path, b"secret", 0o644).unwrap();
        assert!(matches!(read_secret(&path), Err(FileError::TooOpen { mode: 0o644, .. })));
        assert_eq!(read(&path).unwrap().unwrap(), b"secret");
    }

    #[test]
    fn nobody_waits_for_a_pipe_in_the_place_of_a_state_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        assert!(matches!(read_secret(&path), Err(FileError::NotAFile { .. })));
        assert!(matches!(read(&path), Err(FileError::NotAFile { .. })));
        assert!(matches!(read(dir.path()), Err(FileError::NotAFile { .. })));
        fs::rename(&path, dir.path().join(LOCK_FILE)).unwrap();
        assert!(matches!(DirLock::acquire(dir.path()), Err(FileError::Io { .. })));
    }

    #[test]
    fn what_everybody_may_write_to_is_named_with_what_mends_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("server.db");
        fs::write(&file, "").unwrap();
        let mend = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            mend_of(path, &fs::metadata(path).unwrap())
        };
        for (mode, is_open) in [(0o700, false), (0o755, false), (0o1777, false), (0o777, true)] {
            let command = format!("chmod 700 {}", dir.path().display());
            assert_eq!(mend(dir.path(), mode), is_open.then_some(command), "{mode:o}");
        }
        assert_eq!(mend(&file, 0o644), None);
        assert_eq!(mend(&file, 0o666), Some(format!("chmod 600 {}", file.display())));
    }

    #[test]
    fn a_state_directory_has_one_user_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");
        private_dir(&state).unwrap();
        assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o700);
        let first = DirLock::acquire(&state).unwrap();
        assert!(matches!(DirLock::acquire(&state), Err(FileError::Locked { .. })));
        drop(first);
        DirLock::acquire(&state).unwrap();
    }
}
