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
use crate::server::records::Records;
use crate::store::{Snapshot, Store, StoreError};
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
    #[error("a newer version of this program made it (format {format})")]
    Newer {
        /// The format found.
        format: u32,
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
        return Err(BackupError::Newer { format: header.overlay_server_backup });
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
    let (header, content) = read(text)?;
    let (key, records) = checked(&content)?;
    files::private_dir(state_dir)?;
    let _lock = DirLock::acquire(state_dir)?;
    let marker = state_dir.join(RESTORING_FILE);
    let occupied = [KEY_FILE, STORE_FILE].iter().any(|name| state_dir.join(name).exists());
    // With the marker there, what is in place is the first half of an interrupted attempt.
    if occupied && !replace && !marker.exists() {
        return Err(BackupError::Occupied { state_dir: state_dir.to_path_buf() });
    }
    files::write_atomically(&marker, b"overlay server restore\n", SECRET_MODE)?;
    let replaced = if occupied { Some(set_aside(state_dir, wall)?) } else { None };
    let store = Store::create_from(&state_dir.join(STORE_FILE), &content.store).await?;
    store.close().await;
    let line = Zeroizing::new(format!("{}\n", *key.expose_base64()));
    files::write_atomically(&state_dir.join(KEY_FILE), line.as_bytes(), SECRET_MODE)?;
    fs::remove_file(&marker)
        .and_then(|()| File::open(state_dir)?.sync_all())
        .map_err(FileError::io("remove", &marker))?;
    let nodes = records.members.len();
    Ok(Restored { network: header.network, made: header.made, nodes, replaced })
}

/// Moves what is there into a directory of its own.
fn set_aside(state_dir: &Path, wall: u64) -> Result<PathBuf, FileError> {
    let aside = (0..1000)
        .map(|number| state_dir.join(format!("replaced-{}", wall.saturating_add(number))))
        .find(|path| !path.exists())
        .unwrap_or_else(|| state_dir.join("replaced"));
    let moved = (|| {
        DirBuilder::new().mode(0o700).create(&aside)?;
        files::leave_to_owner(&aside, &File::open(&aside)?);
        for name in [KEY_FILE.to_string(), STORE_FILE.to_string()]
            .into_iter()
            .chain(["-wal", "-shm", "-journal"].map(|end| format!("{STORE_FILE}{end}")))
        {
            match fs::rename(state_dir.join(&name), aside.join(&name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        File::open(&aside)?.sync_all()?;
        File::open(state_dir)?.sync_all()
    })();
    moved.map_err(FileError::io("move aside to", &aside))?;
    Ok(aside)
}
