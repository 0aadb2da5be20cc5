//! What a node keeps on disk, in a directory of mode 0700:
//!
//! - `node.key`: the two secret keys; written once
//! - `node.json`: which network and server, the UDP port; written when they change
//! - `netmap.json`: the network as it was last; when it cannot be read, the server has a new one
//! - `lock`: one daemon at a time

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::io::files::{self, DirLock, FileError, SECRET_MODE};
use crate::node::Netmap;
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
}

#[derive(Serialize, Deserialize, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
struct KeyFile {
    machine_key: String,
    node_key: String,
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
}

/// The state directory, locked.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    enrolment: Option<Enrolment>,
    _lock: DirLock,
}

/// The secret keys of this machine.
pub(super) struct Keys {
    pub(super) machine: SecretKey,
    pub(super) node: SecretKey,
}

impl StateDir {
    /// Opens or makes the directory.
    pub(super) fn open(path: &Path) -> Result<Self, StateError> {
        files::private_dir(path)?;
        let lock = DirLock::acquire(path)?;
        let mut dir = Self { path: path.to_path_buf(), enrolment: None, _lock: lock };
        dir.enrolment = dir.read_json(ENROLMENT_FILE)?;
        Ok(dir)
    }

    /// The keys, made at the first start.
    pub(super) fn keys(&self) -> Result<Keys, StateError> {
        let path = self.path.join(KEY_FILE);
        let damaged = |reason: String| StateError::Damaged { path: path.clone(), reason };
        if let Some(text) = files::read_secret(&path)? {
            let file: KeyFile =
                serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
            let key = |text: &str| text.parse().map_err(|_| damaged("not a key".into()));
            return Ok(Keys { machine: key(&file.machine_key)?, node: key(&file.node_key)? });
        }
        let machine = SecretKey::from_bytes(rand::random());
        let node = SecretKey::from_bytes(rand::random());
        let file = KeyFile {
            machine_key: machine.expose_base64().to_string(),
            node_key: node.expose_base64().to_string(),
        };
        let text = Zeroizing::new(
            serde_json::to_vec_pretty(&file).map_err(|error| damaged(error.to_string()))?,
        );
        files::write_atomically(&path, &text, SECRET_MODE)?;
        Ok(Keys { machine, node })
    }

    pub(super) fn enrolment(&self) -> Option<&Enrolment> {
        self.enrolment.as_ref()
    }

    /// Takes what a join line says, for the connection that is about to be made.
    pub(super) fn prepare(&mut self, join: &JoinLine) {
        let listen_port = self.enrolment.as_ref().map_or(0, |enrolment| enrolment.listen_port);
        let same = self.enrolment.as_ref().is_some_and(|e| e.network == join.network && e.joined);
        self.enrolment = Some(Enrolment {
            schema: 1,
            network: join.network,
            server_keys: std::iter::once(join.server_key).chain(join.next_server_key).collect(),
            servers: join.addresses.clone(),
            listen_port,
            joined: same,
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

    /// The server let us in: from here on no join line is needed.
    pub(super) fn note_welcome(&mut self, welcome: &Welcome, used: Option<SocketAddr>) {
        let Some(enrolment) = &mut self.enrolment else { return };
        let before = enrolment.clone();
        enrolment.joined = true;
        let told = welcome.server_addresses.iter().filter_map(|text| text.parse().ok());
        let mut servers: Vec<ServerAddr> = used.map(ServerAddr::from).into_iter().collect();
        for server in enrolment.servers.clone().into_iter().chain(told) {
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
        for name in [ENROLMENT_FILE, NETMAP_FILE] {
            let path = self.path.join(name);
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

    fn read_json<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>, StateError> {
        let path = self.path.join(name);
        let Some(text) = files::read(&path)? else { return Ok(None) };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| StateError::Damaged { path, reason: error.to_string() })
    }

    fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let path = self.path.join(name);
        let text = serde_json::to_vec_pretty(value).map_err(|error| StateError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        Ok(files::write_atomically(&path, &text, SECRET_MODE)?)
    }
}
