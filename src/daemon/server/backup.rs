//! A server as one file, and a server out of one file.
//!
//! The file has two lines of JSON: what it is, with a sum of the second line; and the server's
//! secret key with everything in the store.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use blake2::{Blake2s256, Digest};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::StartError;
use super::state::{self, KEY_FILE, RESTORING_FILE, STORE_FILE};
use crate::io::files::{self, DirLock, FileError, SECRET_MODE};
use crate::server::admin::rfc3339;
use crate::server::events::Event;
use crate::server::records::Records;
use crate::store::{SCHEMA, Snapshot, Store, StoreError, StoredEvent};
use crate::types::{NetworkId, SecretKey};

/// The version of the file.
const FORMAT: u32 = 1;

/// A text that is a secret: a key, or a backup with the key in it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
pub struct SecretText(String);

impl SecretText {
    /// The text, for the file.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(***)")
    }
}

/// Why a backup is not restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// No backup, or not the whole of one.
    #[error("it is no backup of a server, or a damaged one: {reason}")]
    Damaged {
        /// What is wrong.
        reason: String,
    },
    /// Made by a newer program.
    #[error("a newer version of this program made it ({of} {found})")]
    Newer {
        /// The version of what it is: of the file's format, or of the store in it.
        of: &'static str,
        /// The one that was found.
        found: i64,
    },
    /// There is a network already.
    #[error("there is a network in {} already", state_dir.display())]
    Occupied {
        /// The state directory.
        state_dir: PathBuf,
    },
    /// The state directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is in it.
    #[error(transparent)]
    Content(#[from] StartError),
    /// It could not be written to the end, and nor could what was there be put back.
    #[error("{failed}; what was in {} before is now in {} ({undoing})", state_dir.display(), aside.display())]
    Stuck {
        /// Why it was not restored.
        failed: Box<Self>,
        /// Why what was there is not back.
        undoing: FileError,
        /// The state directory.
        state_dir: PathBuf,
        /// Where it is.
        aside: PathBuf,
    },
    /// It could not be written to the end; what was there before is there again.
    #[error("{failed}; {} is as it was before", state_dir.display())]
    Undone {
        /// Why it was not restored.
        failed: Box<Self>,
        /// The state directory.
        state_dir: PathBuf,
    },
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The network.
    pub network: NetworkId,
    /// When the backup was made (RFC 3339, UTC).
    pub made: String,
    /// How many nodes are in it.
    pub nodes: usize,
    /// Where the network is that was there before.
    pub replaced: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    overlay_server_backup: u32,
    network: NetworkId,
    made: String,
    software: String,
    sum: String,
}

#[derive(Serialize, Deserialize)]
struct Content {
    key: SecretText,
    store: Snapshot,
}

fn sum_of(line: &str) -> String {
    HEXLOWER.encode(&Blake2s256::digest(line))
}

/// The text of a backup.
pub(super) fn write(
    network: NetworkId,
    made: u64,
    key: &SecretKey,
    store: Snapshot,
) -> Result<SecretText, serde_json::Error> {
    let key = SecretText(key.expose_base64().to_string());
    let content = Zeroizing::new(serde_json::to_string(&Content { key, store })?);
    let header = Header {
        overlay_server_backup: FORMAT,
        network,
        made: rfc3339(made),
        software: env!("CARGO_PKG_VERSION").into(),
        sum: sum_of(&content),
    };
    let header = serde_json::to_string(&header)?;
    Ok(SecretText(format!("{header}\n{}\n", *content)))
}

fn read(text: &str) -> Result<(Header, Content), BackupError> {
    let damaged = |reason: String| BackupError::Damaged { reason };
    let (header, rest) =
        text.split_once('\n').ok_or_else(|| damaged("it has no first line".into()))?;
    let header: Header =
        serde_json::from_str(header).map_err(|error| damaged(error.to_string()))?;
    if header.overlay_server_backup > FORMAT {
        let found = header.overlay_server_backup.into();
        return Err(BackupError::Newer { of: "format", found });
    }
    let content = rest.strip_suffix('\n').ok_or_else(|| damaged("its end is missing".into()))?;
    if sum_of(content) != header.sum {
        return Err(damaged("its content is not the one that was written".into()));
    }
    let content = serde_json::from_str(content).map_err(|error| damaged(error.to_string()))?;
    Ok((header, content))
}

/// The key and the records, if a server can start with them.
fn checked(content: &Content) -> Result<(SecretKey, Records), BackupError> {
    let damaged = |reason: &str| BackupError::Damaged { reason: reason.into() };
    if content.store.schema > SCHEMA {
        return Err(BackupError::Newer { of: "store", found: content.store.schema });
    }
    let key = state::parse_key(content.key.expose().as_bytes())
        .ok_or_else(|| damaged("its key is none"))?;
    let records = state::parse(&content.store.records)?
        .ok_or_else(|| damaged("there is no network in it"))?;
    Ok((key, records))
}

/// What the server of the backup `text` has on record, checked as [`restore`] checks it.
///
/// # Errors
/// When the backup is damaged.
pub fn records_in(text: &str) -> Result<Records, BackupError> {
    let (_, content) = read(text)?;
    Ok(checked(&content)?.1)
}

/// Puts the backup `text` in place in `state_dir`. A network that is there is refused, or with
/// `replace` moved into a directory beside the new one. Killed on the way, it leaves a directory
/// that no server starts from; the same call again completes it.
///
/// # Errors
/// When the backup is damaged, a server uses the directory, or a file cannot be written. What was
/// there is then still there.
pub async fn restore(
    text: &str,
    state_dir: &Path,
    replace: bool,
    wall: u64,
) -> Result<Restored, BackupError> {
    let (header, mut content) = read(text)?;
    let (key, records) = checked(&content)?;
    content.store.events.push(restored(&header, &content.store, wall)?);
    files::private_dir(state_dir)?;
    let _lock = DirLock::acquire(state_dir)?;
    let marker = state_dir.join(RESTORING_FILE);
    let occupied = [KEY_FILE, STORE_FILE].iter().any(|name| state_dir.join(name).exists());
    // With the marker there, what is in place is the first half of an interrupted attempt.
    if occupied && !replace && !marker.exists() {
        return Err(BackupError::Occupied { state_dir: state_dir.to_path_buf() });
    }
    // It may be there from such an attempt; then it stays when this one fails, too.
    let resumed = marker.exists();
    let aside = if occupied { Some(free_place(state_dir, wall)) } else { None };
    let mut moved = false;
    let placing = async {
        files::write_atomically(&marker, b"overlay server restore\n", SECRET_MODE)?;
        if let Some(aside) = &aside {
            set_aside(state_dir, aside).map_err(FileError::io("move aside to", aside))?;
        }
        moved = true;
        put_in_place(state_dir, &key, &content.store).await
    };
    if let Err(failed) = placing.await {
        let (failed, state_dir) = (Box::new(failed), state_dir.to_path_buf());
        return Err(match put_back(&state_dir, aside.as_deref(), moved, resumed) {
            Ok(()) => BackupError::Undone { failed, state_dir },
            Err(undoing) => {
                let aside = aside.unwrap_or_else(|| state_dir.clone());
                BackupError::Stuck { failed, undoing, state_dir, aside }
            }
        });
    }
    fs::remove_file(&marker)
        .and_then(|()| File::open(state_dir)?.sync_all())
        .map_err(FileError::io("remove", &marker))?;
    let nodes = records.members.len();
    Ok(Restored { network: header.network, made: header.made, nodes, replaced: aside })
}

/// The line of the log that says so. Its number is above all that were given after the backup was made,
/// here or where it was restored before: so many changes as 256 a second are not written down. Who
/// collects the log misses no line for having seen such numbers before.
fn restored(header: &Header, store: &Snapshot, wall: u64) -> Result<StoredEvent, BackupError> {
    let last = store.events.last().map_or(0, |event| event.seq);
    let event = Event::network_restored(wall, &header.made, last);
    let seq = last.saturating_add(1).max(wall.saturating_mul(256));
    let event = state::line_of(&event)?;
    Ok(StoredEvent { seq, event })
}

async fn put_in_place(
    state_dir: &Path,
    key: &SecretKey,
    store: &Snapshot,
) -> Result<(), BackupError> {
    Store::create_from(&state_dir.join(STORE_FILE), store).await?.close().await;
    let line = Zeroizing::new(format!("{}\n", *key.expose_base64()));
    Ok(files::write_atomically(&state_dir.join(KEY_FILE), line.as_bytes(), SECRET_MODE)?)
}

/// All that a server is made of.
fn parts() -> impl Iterator<Item = String> {
    let beside = ["-wal", "-shm", "-journal"].map(|end| format!("{STORE_FILE}{end}"));
    [KEY_FILE.to_string(), STORE_FILE.to_string()].into_iter().chain(beside)
}

/// A directory of its own for what is there.
fn free_place(state_dir: &Path, wall: u64) -> PathBuf {
    (0..1000)
        .map(|number| state_dir.join(format!("replaced-{}", wall.saturating_add(number))))
        .find(|path| !path.exists())
        .unwrap_or_else(|| state_dir.join("replaced"))
}

/// Moves what is there into it.
fn set_aside(state_dir: &Path, aside: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(aside)?;
    files::leave_to_owner(aside, &File::open(aside)?);
    for name in parts() {
        unless_missing(fs::rename(state_dir.join(&name), aside.join(&name)))?;
    }
    File::open(aside)?.sync_all()?;
    File::open(state_dir)?.sync_all()
}

/// Undoes all of a restore that has failed; `moved` tells whether it had moved all aside that was
/// there. The marker goes last, since no server may start from a half.
fn put_back(
    state_dir: &Path,
    aside: Option<&Path>,
    moved: bool,
    resumed: bool,
) -> Result<(), FileError> {
    let undone = (|| {
        for name in parts() {
            let place = state_dir.join(&name);
            match aside.map(|aside| aside.join(&name)) {
                Some(kept) if kept.exists() => fs::rename(kept, place)?,
                // It is of the backup.
                _ if moved => unless_missing(fs::remove_file(place))?,
                _ => {}
            }
        }
        if let Some(aside) = aside {
            unless_missing(fs::remove_dir(aside))?;
        }
        File::open(state_dir)?.sync_all()?;
        if !resumed {
            unless_missing(fs::remove_file(state_dir.join(RESTORING_FILE)))?;
        }
        File::open(state_dir)?.sync_all()
    })();
    undone.map_err(FileError::io("put back", state_dir))
}

fn unless_missing(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::records::NetworkRecord;
    use crate::store::StoredRecord;
    use crate::types::OverlayRange;

    const WALL: u64 = 1_800_000_000;

    /// A backup of a network without members, with a change made to its store.
    fn backup(spoil: impl Fn(&mut Snapshot)) -> String {
        let range =
            OverlayRange::new("10.77.0.0/20".parse().unwrap(), "fd00::/48".parse().unwrap());
        let id = NetworkId([7; 8]);
        let range = range.unwrap();
        let network =
            NetworkRecord { id, range, created: WALL, members_last_s: None, server_key: None };
        let body = Some(serde_json::to_string(&network).unwrap());
        let record = StoredRecord { kind: "network".into(), id: "0".into(), rev: 1, body };
        let (records, events) = (vec![record], Vec::new());
        let mut store = Snapshot { schema: SCHEMA, rev: 1, records, events };
        spoil(&mut store);
        write(id, WALL, &SecretKey::from_bytes([3; 32]), store).unwrap().expose().into()
    }

    /// All files in a directory but the lock, with their content, by name.
    fn content(directory: &Path) -> Vec<(String, Vec<u8>)> {
        let files = fs::read_dir(directory).unwrap().map(Result::unwrap);
        let named = files.map(|file| (file.file_name().into_string().unwrap(), file.path()));
        let mut found: Vec<_> = named
            .filter(|(name, _)| name != "lock")
            .map(|(name, path)| (name, fs::read(path).unwrap()))
            .collect();
        found.sort();
        found
    }

    #[tokio::test]
    async fn a_restore_that_fails_leaves_everything_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        restore(&backup(|_| {}), state, false, WALL).await.unwrap();
        fs::write(state.join("server.db-wal"), "not yet in the database").unwrap();
        let before = content(state);

        let newer = backup(|store| store.schema += 1);
        let refused = restore(&newer, state, true, WALL).await.unwrap_err();
        assert!(matches!(refused, BackupError::Newer { of: "store", .. }), "{refused}");
        assert_eq!(content(state), before);

        // The second copy of a record is one that the database does not take: it fails half-way.
        let twice = backup(|store| store.records.extend(store.records.clone()));
        let failed = restore(&twice, state, true, WALL).await.unwrap_err();
        assert!(matches!(failed, BackupError::Undone { .. }), "{failed}");
        assert!(failed.to_string().contains(&state.display().to_string()), "{failed}");
        assert_eq!(content(state), before);

        let empty = tempfile::tempdir().unwrap();
        let failed = restore(&twice, empty.path(), false, WALL).await.unwrap_err();
        assert!(matches!(failed, BackupError::Undone { .. }), "{failed}");
        assert!(content(empty.path()).is_empty());

        let done = restore(&backup(|_| {}), state, true, WALL).await.unwrap();
        let aside = done.replaced.unwrap();
        assert_eq!(content(&aside), before, "it is kept");
    }

    #[tokio::test]
    async fn the_log_goes_on_above_all_numbers_that_were_given_since_the_backup() {
        let dir = tempfile::tempdir().unwrap();
        let line = |kind: &str| crate::store::Event {
            at: WALL,
            kind: kind.into(),
            actor: "server".into(),
            body: "{}".into(),
        };
        let text = backup(|store| {
            store.events.push(StoredEvent { seq: 7, event: line("network-created") });
        });
        let mut seen = 7;
        for (restored_at, changes) in [(WALL, 3), (WALL + 60, 1)] {
            restore(&text, dir.path(), true, restored_at).await.unwrap();
            let store = Store::open(&dir.path().join(STORE_FILE)).await.unwrap();
            let after = store.events_from(seen, 10).await.unwrap();
            assert_eq!(after.len(), 1, "{after:?}");
            assert_eq!(after[0].event.kind, "network-restored");
            assert_eq!(
                after[0].event.body,
                r#"{"backup-last":"7","backup-made":"2027-01-15T08:00:00Z"}"#
            );
            for _ in 0..changes {
                store.commit(&[], &[line("node-joined")]).await.unwrap();
            }
            seen = store.events(0, 1).await.unwrap()[0].seq;
            assert_eq!(seen, after[0].seq + changes);
            store.close().await;
        }
    }

    #[test]
    fn what_was_not_moved_yet_is_left_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (state, aside) = (dir.path(), dir.path().join("replaced-1"));
        fs::create_dir(&aside).unwrap();
        fs::write(aside.join(KEY_FILE), "key").unwrap();
        for name in [STORE_FILE, RESTORING_FILE] {
            fs::write(state.join(name), name).unwrap();
        }
        put_back(state, Some(&aside), false, false).unwrap();
        let left: Vec<(String, Vec<u8>)> =
            vec![(STORE_FILE.into(), STORE_FILE.into()), (KEY_FILE.into(), "key".into())];
        assert_eq!(content(state), left);
    }
}
