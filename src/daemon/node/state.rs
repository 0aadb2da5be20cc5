//! What a node keeps on disk, in a directory of mode 0700:
//!
//! - `node.key`: the secret keys of machine and node, and while the node key is renewed its old one
//! - `node.json`: which network and server, the UDP port; written when they change
//! - `netmap.json`: the network as it was last; when it cannot be read, the server has a new one
//! - `node.key.bak`, `node.json.bak`: the same again, for a file system that loses one of them
//! - `lock`: one daemon at a time

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::control_link::Destination;
use crate::io::clock;
use crate::io::files::{self, DirLock, FileError, SECRET_MODE};
use crate::node::{Netmap, NodeKeys};
use crate::types::{NetworkId, PublicKey, SecretKey};
use crate::wire::control::Welcome;
use crate::wire::join::{JoinLine, MAX_ADDRESSES, ServerAddr};

const KEY_FILE: &str = "node.key";
/// The file in a state directory that says which network the node is in.
pub const ENROLMENT_FILE: &str = "node.json";
const NETMAP_FILE: &str = "netmap.json";

/// What can be wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system says no.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is there and makes no sense; it is left as it is.
    #[error("{} cannot be read: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There is an enrolment, and the keys that it was made with are nowhere.
    #[error("{} and its copy are missing, and this machine is a member of network {network} by them",
        path.display())]
    KeysLost {
        /// Where the keys should be.
        path: PathBuf,
        /// In the enrolment.
        network: NetworkId,
    },
    /// There is an enrolment, and it was made with other keys.
    #[error("{} has other keys than those by which this machine is a member of network {network}",
        path.display())]
    OtherKeys {
        /// Where the keys are.
        path: PathBuf,
        /// In the enrolment.
        network: NetworkId,
    },
}

#[derive(Serialize, Deserialize, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
struct KeyFile {
    machine_key: String,
    node_key: String,
    /// The one before it, as long as some peer may know no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    old_node_key: Option<String>,
    /// When the node key was made, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    since: Option<u64>,
    /// The server has not stored the node key yet, as far as we know.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    untold: bool,
}

/// Which network this node belongs to, and how its server is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Enrolment {
    pub(super) schema: u32,
    pub(super) network: NetworkId,
    pub(super) server_keys: Vec<PublicKey>,
    pub(super) servers: Vec<ServerAddr>,
    #[serde(default)]
    pub(super) listen_port: u16,
    /// Whether the server has let us in; before that this is only what the join line said.
    #[serde(default)]
    pub(super) joined: bool,
    /// The machine key that it let in; none in a file of an older version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) machine: Option<PublicKey>,
}

impl Enrolment {
    /// Whether a join line says nothing that is not known here.
    fn covers(&self, join: &JoinLine) -> bool {
        self.joined
            && self.network == join.network
            && self.server_keys.contains(&join.server_key)
            && join.addresses.iter().all(|address| self.servers.contains(address))
    }

    /// The servers, to be connected to as the holder of `machine_key`.
    pub(super) fn destination(&self, machine_key: SecretKey) -> Destination {
        let (servers, server_keys) = (self.servers.clone(), self.server_keys.clone());
        Destination { servers, server_keys, machine_key }
    }
}

/// The state directory, locked.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    enrolment: Option<Enrolment>,
    /// The machine key that this node shows the server.
    machine: Option<PublicKey>,
    /// When the node key was made, in Unix seconds.
    key_since: u64,
    _lock: DirLock,
}

/// The secret keys of this machine.
pub(super) struct Keys {
    pub(super) machine: SecretKey,
    pub(super) node: NodeKeys,
    /// When the node key was made, in Unix seconds; none in a file of an older version.
    pub(super) since: Option<u64>,
}

impl Keys {
    fn to_file(&self) -> KeyFile {
        let text = |key: &SecretKey| key.expose_base64().to_string();
        KeyFile {
            machine_key: text(&self.machine),
            node_key: text(&self.node.current),
            old_node_key: self.node.previous.as_ref().map(text),
            since: self.since,
            untold: !self.node.told,
        }
    }
}

impl StateDir {
    /// Opens or makes the directory.
    pub(super) fn open(path: &Path) -> Result<Self, StateError> {
        files::private_dir(path)?;
        let lock = DirLock::acquire(path)?;
        let mut dir = Self {
            path: path.to_path_buf(),
            enrolment: None,
            machine: None,
            key_since: 0,
            _lock: lock,
        };
        dir.enrolment = dir.read_json(ENROLMENT_FILE)?;
        dir.machine = dir.read_keys().ok().flatten().map(|keys| keys.machine.public());
        dir.key_since = dir.key_made();
        Ok(dir)
    }

    fn read_keys(&self) -> Result<Option<Keys>, StateError> {
        self.read_first(KEY_FILE, parse_keys)
    }

    /// The keys, made at the first start. A member without them, or with others, is an error: with
    /// new ones in their place the server would take it for one that it has removed.
    pub(super) fn keys(&mut self) -> Result<Keys, StateError> {
        let path = self.path.join(KEY_FILE);
        let joined = self.enrolment.as_ref().filter(|enrolment| enrolment.joined);
        if let Some(keys) = self.read_keys()? {
            let machine = keys.machine.public();
            if let Some(enrolment) = joined.filter(|it| it.machine.is_some_and(|it| it != machine))
            {
                return Err(StateError::OtherKeys { path, network: enrolment.network });
            }
            self.machine = Some(machine);
            return Ok(keys);
        }
        if let Some(enrolment) = joined {
            return Err(StateError::KeysLost { path, network: enrolment.network });
        }
        let machine = SecretKey::from_bytes(rand::random());
        let node = NodeKeys::from(SecretKey::from_bytes(rand::random()));
        let keys = Keys { machine, node, since: Some(clock::unix_seconds()) };
        self.write_keys(&keys)?;
        self.machine = Some(keys.machine.public());
        Ok(keys)
    }

    fn write_keys(&self, keys: &Keys) -> Result<(), StateError> {
        let path = self.path.join(KEY_FILE);
        let text = serde_json::to_vec_pretty(&keys.to_file());
        let damaged = |error: serde_json::Error| StateError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        };
        files::write_twice(&path, &Zeroizing::new(text.map_err(damaged)?), SECRET_MODE)?;
        Ok(())
    }

    /// When the node key was made, as its file says, or at least the age of the file.
    fn key_made(&self) -> u64 {
        let written = self.read_keys().ok().flatten();
        let modified = std::fs::metadata(self.path.join(KEY_FILE)).and_then(|it| it.modified());
        let modified = modified.ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let since = written.and_then(|keys| keys.since);
        since.or(modified.map(|at| at.as_secs())).unwrap_or_else(clock::unix_seconds)
    }

    /// When the node key was made, in Unix seconds.
    pub(super) fn key_since(&self) -> u64 {
        self.key_since
    }

    /// Stores a new node key, and keeps the present one beside it.
    pub(super) fn store_new_key(&mut self, key: &SecretKey) -> Result<(), StateError> {
        let keys = self.keys()?;
        let since = clock::unix_seconds();
        let node = NodeKeys {
            current: key.clone(),
            previous: Some(keys.node.current.clone()),
            told: false,
        };
        self.write_keys(&Keys { machine: keys.machine, node, since: Some(since) })?;
        self.key_since = since;
        Ok(())
    }

    /// The server has stored the node key.
    pub(super) fn note_key_told(&mut self) -> Result<(), StateError> {
        let mut keys = self.keys()?;
        keys.node.told = true;
        self.write_keys(&keys)
    }

    /// Nobody needs the old node key any more.
    pub(super) fn forget_old_key(&mut self) -> Result<(), StateError> {
        let mut keys = self.keys()?;
        keys.node.previous = None;
        self.write_keys(&keys)
    }

    pub(super) fn enrolment(&self) -> Option<&Enrolment> {
        self.enrolment.as_ref()
    }

    /// Takes what a join line says, for the connection that is about to be made.
    pub(super) fn prepare(&mut self, join: &JoinLine) {
        let listen_port = self.enrolment.as_ref().map_or(0, |enrolment| enrolment.listen_port);
        // Keys that were put here since are another machine's: it joins as a new one.
        // Where the keys are gone it is still a member: that there are none is an error of its own.
        let of_keys =
            |it: &Option<PublicKey>| it.is_none() || self.machine.is_none() || it == &self.machine;
        let fits =
            |it: &&Enrolment| it.network == join.network && it.joined && of_keys(&it.machine);
        let before = self.enrolment.as_ref().filter(fits);
        let (same, machine) = (before.is_some(), before.and_then(|it| it.machine));
        self.enrolment = Some(Enrolment {
            schema: 1,
            network: join.network,
            server_keys: std::iter::once(join.server_key).chain(join.next_server_key).collect(),
            servers: join.addresses.clone(),
            listen_port,
            joined: same,
            machine,
        });
    }

    /// Remembers the UDP port for the next start, so that the NAT's mapping is found again.
    pub(super) fn set_listen_port(&mut self, port: u16) {
        if let Some(enrolment) = &mut self.enrolment
            && enrolment.listen_port != port
        {
            enrolment.listen_port = port;
            self.write_enrolment();
        }
    }

    /// The server let us in: from here on no join line is needed. Returns where it is found.
    pub(super) fn note_welcome(
        &mut self,
        welcome: &Welcome,
        used: Option<SocketAddr>,
    ) -> &[ServerAddr] {
        self.note_addresses(&welcome.server_addresses, used);
        self.enrolment.as_ref().map_or(&[], |enrolment| &enrolment.servers)
    }

    /// Where the server is found from now on: where it was found, where it says that it is, and
    /// where it was before, as long as there is place.
    fn note_addresses(&mut self, told: &[String], used: Option<SocketAddr>) {
        let Some(enrolment) = &mut self.enrolment else { return };
        let before = enrolment.clone();
        enrolment.joined = true;
        enrolment.machine = self.machine;
        let told = told.iter().filter_map(|text| text.parse().ok());
        let mut servers: Vec<ServerAddr> = used.map(ServerAddr::from).into_iter().collect();
        for server in told.chain(enrolment.servers.clone()) {
            if !servers.contains(&server) && servers.len() < MAX_ADDRESSES {
                servers.push(server);
            }
        }
        enrolment.servers = servers;
        if *enrolment != before {
            self.write_enrolment();
        }
    }

    /// The membership ended: only the keys stay.
    pub(super) fn forget_enrolment(&mut self) {
        self.enrolment = None;
        let files = [ENROLMENT_FILE, NETMAP_FILE].map(|name| self.path.join(name));
        let others = files.iter().flat_map(|path| files::other_places(path));
        // The copies first: what is left of a removal on which the power fails is whole.
        for path in others.chain(files.iter().cloned()) {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "cannot be removed");
            }
        }
    }

    fn write_enrolment(&self) {
        let Some(enrolment) = self.enrolment.as_ref().filter(|enrolment| enrolment.joined) else {
            return;
        };
        if let Err(error) = self.write_json(ENROLMENT_FILE, enrolment) {
            tracing::warn!(%error, "the enrolment could not be saved");
        }
    }

    /// The netmap of the last run, if it fits this network. One that cannot be read is ignored.
    pub(super) fn netmap(&self) -> Netmap {
        let netmap: Option<Netmap> = self.read_json(NETMAP_FILE).unwrap_or_else(|error| {
            tracing::warn!(%error, "the saved netmap is not used");
            None
        });
        let network = self.enrolment.as_ref().map(|enrolment| enrolment.network);
        netmap
            .filter(|map| map.identity.as_ref().map(|identity| identity.network) == network)
            .unwrap_or_default()
    }

    pub(super) fn save_netmap(&self, netmap: &Netmap) -> Result<(), StateError> {
        if netmap.identity.is_none() {
            return Ok(());
        }
        self.write_json(NETMAP_FILE, netmap)
    }

    fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        self.read_first(name, |text| {
            serde_json::from_slice(text).map_err(|error| error.to_string())
        })
    }

    /// The content of a file, or of the first of its other places that is of use if the file cannot
    /// be read or is missing: a file system that loses power may leave one empty, or lose it.
    fn read_first<T>(
        &self,
        name: &str,
        parse: impl Fn(&[u8]) -> Result<T, String>,
    ) -> Result<Option<T>, StateError> {
        let path = self.path.join(name);
        let read = |path: &Path| match name {
            KEY_FILE => files::read_secret(path),
            _ => Ok(files::read(path)?.map(Zeroizing::new)),
        };
        let reason = match read(&path)?.map(|text| parse(&text)) {
            Some(Ok(value)) => return Ok(Some(value)),
            Some(Err(reason)) => Some(reason),
            None => None,
        };
        // A copy alone that is of no use was one of something, unlike a first file half written.
        let mut alone = None;
        for other in files::other_places(&path) {
            let text = match read(&other) {
                Ok(Some(text)) => text,
                Err(error) if reason.is_none() && files::is_copy(&other) => {
                    return Err(error.into());
                }
                Ok(None) | Err(_) => continue,
            };
            match parse(&text) {
                Ok(value) => {
                    let reason = reason.as_deref().unwrap_or("it is missing");
                    tracing::warn!(path = %path.display(), reason, used = %other.display(),
                        "a state file cannot be read, its copy is used");
                    files::write_twice(&path, &text, SECRET_MODE)?;
                    return Ok(Some(value));
                }
                Err(reason) => alone = Some(StateError::Damaged { path: other, reason }),
            }
        }
        match (reason, alone) {
            (Some(reason), _) => Err(StateError::Damaged { path, reason }),
            (None, Some(StateError::Damaged { path, reason })) if files::is_copy(&path) => {
                Err(StateError::Damaged { path, reason })
            }
            (None, _) => Ok(None),
        }
    }

    fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        let text = serde_json::to_vec_pretty(value).map_err(|error| StateError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        match name {
            // The server has a new one.
            NETMAP_FILE => files::write_atomically(&path, &text, SECRET_MODE)?,
            _ => files::write_twice(&path, &text, SECRET_MODE)?,
        }
        Ok(())
    }
}

fn parse_keys(text: &[u8]) -> Result<Keys, String> {
    let file: KeyFile = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let key = |text: &str| text.parse().map_err(|_| "not a key".to_string());
    let node = NodeKeys {
        current: key(&file.node_key)?,
        previous: file.old_node_key.as_deref().map(key).transpose()?,
        told: !file.untold,
    };
    Ok(Keys { machine: key(&file.machine_key)?, node, since: file.since })
}

/// Whether the node that runs with this state directory has nothing to learn from a join line. The
/// directory is only looked at: that node has the lock.
pub(super) fn is_known(path: &Path, join: &JoinLine) -> bool {
    let text = files::read(&path.join(ENROLMENT_FILE)).ok().flatten();
    let enrolment = text.and_then(|text| serde_json::from_slice::<Enrolment>(&text).ok());
    enrolment.is_some_and(|enrolment| enrolment.covers(join))
}

/// What the state file `name` would hold if it was written again after it was read as `text`.
///
/// # Errors
/// When a node would not start with it, and why.
pub fn rewritten(name: &str, text: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
    fn of_json<T: DeserializeOwned + Serialize>(text: &[u8]) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec_pretty(&serde_json::from_slice::<T>(text)?)
    }
    let again = match name {
        KEY_FILE => serde_json::to_vec_pretty(&parse_keys(text)?.to_file()),
        ENROLMENT_FILE => of_json::<Enrolment>(text),
        _ => of_json::<Netmap>(text),
    };
    again.map(Zeroizing::new).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> JoinLine {
        include_str!("../../../tests/golden/join-line.txt").trim().parse().unwrap()
    }

    fn enrolled(dir: &Path) -> (Keys, Enrolment) {
        let mut state = StateDir::open(dir).unwrap();
        let keys = state.keys().unwrap();
        state.prepare(&line());
        state.set_listen_port(4711);
        state.note_addresses(&[], None);
        (keys, state.enrolment.clone().unwrap())
    }

    #[test]
    fn a_file_that_is_cut_anywhere_costs_neither_identity_nor_network() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, enrolment) = enrolled(dir.path());
        for name in [KEY_FILE, ENROLMENT_FILE] {
            let path = dir.path().join(name);
            let whole = std::fs::read(&path).unwrap();
            // Every write waits for the disk; `OVERLAY_TEST_FULL=1` cuts at every byte.
            let full = std::env::var_os("OVERLAY_TEST_FULL").is_some_and(|value| value == "1");
            for cut in (0..whole.len()).step_by(if full { 1 } else { 13 }) {
                // With the copy, and with one that was written and not yet put in place.
                for place in files::other_places(&path) {
                    for other in files::other_places(&path) {
                        let _ = std::fs::remove_file(other);
                    }
                    files::write_atomically(&place, &whole, SECRET_MODE).unwrap();
                    std::fs::write(&path, &whole[..cut]).unwrap();
                    let mut state = StateDir::open(dir.path()).unwrap();
                    let same = state.keys().unwrap();
                    assert_eq!(same.machine.public(), keys.machine.public(), "{name} cut at {cut}");
                    assert_eq!(same.node.current.public(), keys.node.current.public());
                    assert_eq!(state.enrolment(), Some(&enrolment), "{name} cut at {cut}");
                    assert_eq!(std::fs::read(&path).unwrap(), whole, "and it is whole again");
                }
            }
        }
    }

    #[test]
    fn without_any_whole_copy_there_is_an_error_and_no_new_identity() {
        let dir = tempfile::tempdir().unwrap();
        enrolled(dir.path());
        for (name, end) in [(ENROLMENT_FILE, ".bak"), (KEY_FILE, ".bak")] {
            for file in [name.to_string(), format!("{name}{end}")] {
                let path = dir.path().join(file);
                let whole = std::fs::read(&path).unwrap();
                std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
            }
            let state = StateDir::open(dir.path());
            let error = match state {
                Ok(mut state) => state.keys().map(drop).unwrap_err(),
                Err(error) => error,
            };
            assert!(matches!(error, StateError::Damaged { .. }), "{name}: {error}");
            // The next file is looked at without this one.
            for end in ["", end] {
                let _ = std::fs::remove_file(dir.path().join(format!("{name}{end}")));
            }
        }
    }

    /// What lies in the directory, without the lock.
    fn content(dir: &Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        let mut files: Vec<_> = entries
            .filter(|entry| entry.file_name() != "lock")
            .map(|entry| (entry.file_name(), std::fs::read(entry.path()).unwrap()))
            .collect();
        files.sort();
        files
    }

    #[test]
    fn a_file_that_is_missing_is_made_again_from_its_copy() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, enrolment) = enrolled(dir.path());
        let before = content(dir.path());
        for names in [&[KEY_FILE][..], &[ENROLMENT_FILE], &[KEY_FILE, ENROLMENT_FILE]] {
            for name in names {
                std::fs::remove_file(dir.path().join(name)).unwrap();
            }
            let mut state = StateDir::open(dir.path()).unwrap();
            assert_eq!(state.enrolment(), Some(&enrolment));
            assert_eq!(state.keys().unwrap().machine.public(), keys.machine.public());
            assert_eq!(content(dir.path()), before, "{names:?}: all is as it was");
        }
    }

    #[test]
    fn a_member_without_its_keys_or_with_others_is_an_error_and_loses_nothing() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        enrolled(dir.path());
        enrolled(other.path());
        for file in [KEY_FILE, "node.key.bak"] {
            std::fs::remove_file(dir.path().join(file)).unwrap();
        }
        let before = content(dir.path());
        let mut state = StateDir::open(dir.path()).unwrap();
        // A join line of the network that it is in changes nothing about that.
        for line in [None, Some(line())] {
            line.iter().for_each(|line| state.prepare(line));
            let error = state.keys().map(drop).unwrap_err();
            assert!(matches!(error, StateError::KeysLost { .. }), "{error}");
            assert_eq!(content(dir.path()), before);
        }
        drop(state);
        std::fs::copy(other.path().join(KEY_FILE), dir.path().join(KEY_FILE)).unwrap();
        let before = content(dir.path());
        let mut state = StateDir::open(dir.path()).unwrap();
        let error = state.keys().map(drop).unwrap_err();
        assert!(matches!(error, StateError::OtherKeys { .. }), "{error}");
        assert_eq!(content(dir.path()), before);
        // With a join line it is a machine that was never in the network.
        state.prepare(&line());
        assert!(!state.enrolment().unwrap().joined);
        state.keys().unwrap();
    }

    #[test]
    fn a_first_start_that_was_cut_short_is_a_first_start() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("node.key.new"), "{\"machine").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(SECRET_MODE);
        std::fs::set_permissions(dir.path().join("node.key.new"), mode).unwrap();
        StateDir::open(dir.path()).unwrap().keys().unwrap();
    }

    #[test]
    fn a_join_line_is_known_when_it_names_no_other_network_key_or_address() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_known(dir.path(), &line()), "nothing is known yet");
        enrolled(dir.path());
        assert!(is_known(dir.path(), &line()));
        let moved = JoinLine { addresses: vec!["192.0.2.77:41820".parse().unwrap()], ..line() };
        assert!(!is_known(dir.path(), &moved));
        let rekeyed = JoinLine { server_key: SecretKey::from_bytes([9; 32]).public(), ..line() };
        assert!(!is_known(dir.path(), &rekeyed));
        assert!(!is_known(dir.path(), &JoinLine { network: NetworkId([9; 8]), ..line() }));
    }

    #[test]
    fn a_new_key_is_there_with_the_old_one_until_that_is_needed_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let (before, _) = enrolled(dir.path());
        let new = SecretKey::from_bytes([7; 32]);
        StateDir::open(dir.path()).unwrap().store_new_key(&new).unwrap();
        let read = || StateDir::open(dir.path()).unwrap().keys().unwrap();
        let keys = read();
        assert_eq!(keys.machine.public(), before.machine.public());
        assert_eq!(keys.node.current.public(), new.public());
        let old = keys.node.previous.as_ref().map(SecretKey::public);
        assert_eq!(old, Some(before.node.current.public()));
        assert!(!keys.node.told);
        StateDir::open(dir.path()).unwrap().note_key_told().unwrap();
        assert!(read().node.told && read().node.previous.is_some());
        StateDir::open(dir.path()).unwrap().forget_old_key().unwrap();
        assert!(read().node.previous.is_none() && read().node.told);
        assert_eq!(read().node.current.public(), new.public());
    }

    #[test]
    fn a_key_file_of_an_older_version_is_as_old_as_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, _) = enrolled(dir.path());
        let mut file = keys.to_file();
        file.since = None;
        let path = dir.path().join(KEY_FILE);
        std::fs::write(&path, serde_json::to_vec(&file).unwrap()).unwrap();
        let made = UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(made).unwrap();
        let mut state = StateDir::open(dir.path()).unwrap();
        assert_eq!(state.key_since(), 1_700_000_000);
        assert!(state.keys().unwrap().node.told, "it was told in its hello");
    }

    #[test]
    fn a_netmap_that_cannot_be_read_is_fetched_again() {
        let dir = tempfile::tempdir().unwrap();
        enrolled(dir.path());
        for content in ["", "{\"ident"] {
            std::fs::write(dir.path().join(NETMAP_FILE), content).unwrap();
            let state = StateDir::open(dir.path()).unwrap();
            assert!(state.netmap().identity.is_none());
        }
    }

    #[test]
    fn a_node_that_left_its_network_does_not_find_it_in_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, _) = enrolled(dir.path());
        StateDir::open(dir.path()).unwrap().forget_enrolment();
        let mut state = StateDir::open(dir.path()).unwrap();
        assert!(state.enrolment().is_none());
        assert_eq!(state.keys().unwrap().machine.public(), keys.machine.public());
    }

    #[test]
    fn what_the_server_says_now_is_kept_when_there_is_no_place_for_all() {
        let dir = tempfile::tempdir().unwrap();
        enrolled(dir.path());
        let mut state = StateDir::open(dir.path()).unwrap();
        let old = |number| format!("192.0.2.{number}:41820").parse().unwrap();
        let told: Vec<String> = vec!["203.0.113.9:41820".into()];
        if let Some(enrolment) = &mut state.enrolment {
            enrolment.servers = (1..=MAX_ADDRESSES).map(old).collect();
        }
        let used = "192.0.2.1:41820".parse().unwrap();
        state.note_addresses(&told, Some(used));
        let servers = &state.enrolment().unwrap().servers;
        assert_eq!(servers.len(), MAX_ADDRESSES);
        assert_eq!(servers[0], used.into());
        assert_eq!(servers[1].to_string(), told[0], "an old one had to go");
    }
}
