//! What lies in the server's state directory: the key, the records and the lock.
//!
//! Made at the first start, and never again: a missing half is an error, since a server that
//! quietly started afresh would lose every member.

use std::path::Path;

use data_encoding::BASE64;
use rand::rngs::{OsRng, StdRng};
use rand::{Rng, SeedableRng, TryRngCore};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::info;
use zeroize::Zeroizing;

use super::{Options, StartError, addresses};
use crate::io::files::{self, DirLock, SECRET_MODE};
use crate::policy::Policy;
use crate::server::choose_range;
use crate::server::events::Event;
use crate::server::records::{self, Key, NetworkRecord, PolicyRecord, Record, Records, Versioned};
use crate::store::{self, Change, Store, StoreError, StoredRecord};
use crate::types::{NetworkId, NodeId, OverlayRange, SecretKey};

pub(super) const KEY_FILE: &str = "server.key";
pub(super) const STORE_FILE: &str = "server.db";
/// It is there while a backup is being put in place.
pub(super) const RESTORING_FILE: &str = "restoring";
const NETWORK: &str = "network";
const MEMBER: &str = "member";
const INVITE: &str = "invite";
const POLICY: &str = "policy";
/// There is one network in a store, and one set of access rules.
const NETWORK_ID: &str = "0";

/// The state directory, opened.
#[derive(Debug)]
pub(super) struct State {
    pub(super) key: SecretKey,
    pub(super) store: Store,
    pub(super) records: Records,
    pub(super) lock: DirLock,
    /// For everything random from here on.
    pub(super) seed: [u8; 32],
}

pub(super) async fn open(options: &Options) -> Result<State, StartError> {
    let dir = &options.state_dir;
    files::private_dir(dir)?;
    let lock = DirLock::acquire(dir)?;
    let (key_path, store_path) = (dir.join(KEY_FILE), dir.join(STORE_FILE));
    if dir.join(RESTORING_FILE).exists() {
        return Err(StartError::HalfRestored { state_dir: dir.clone() });
    }
    let key_text = files::read_secret(&key_path)?;
    let lost = || StartError::StoreLost { key: key_path.clone(), store: store_path.clone() };
    let opened = match key_text {
        // The key is made last, so a store beside it was filled once.
        Some(_) if !store_path.exists() => return Err(lost()),
        Some(_) => Store::open_old(&store_path).await,
        None => Store::open(&store_path).await,
    };
    let store = match opened {
        Err(StoreError::Empty { .. }) => return Err(lost()),
        opened => opened?,
    };
    let rows = store.load().await?;
    if key_text.is_some() && rows.is_empty() {
        return Err(lost());
    }
    let mut rng = StdRng::from_seed(*random()?);
    let mut records = match parse(&rows)? {
        Some(records) => records,
        None => create_network(options, &store, &mut rng).await?,
    };
    if fix_range(options, &mut records, &mut rng)? {
        let range = records.network.record.range;
        let event = Event::new(crate::io::clock::unix_seconds(), "range-changed", "server")
            .with("ipv4", range.v4())
            .with("ipv6", range.v6());
        rewrite_network(&store, &mut records.network, &[event]).await?;
    }
    let lost = || StartError::KeyLost { key: key_path.clone() };
    let is_old = key_text.is_some();
    let key = match key_text {
        Some(text) => parse_key(&text).ok_or_else(lost)?,
        // The key is made last: without it nobody can have seen a join line yet.
        None if records.members.is_empty() && records.invites.is_empty() => create_key(&key_path)?,
        None => return Err(lost()),
    };
    match records.network.record.server_key {
        Some(known) if known == key.public() => {}
        Some(known) if is_old => {
            let found = key.public().short();
            return Err(StartError::OtherKey { key: key_path, found, known: known.short() });
        }
        _ => {
            records.network.record.server_key = Some(key.public());
            rewrite_network(&store, &mut records.network, &[]).await?;
        }
    }
    Ok(State { key, store, records, lock, seed: rng.random() })
}

/// Writes what has changed in the record of the network.
async fn rewrite_network(
    store: &Store,
    network: &mut Versioned<NetworkRecord>,
    events: &[Event],
) -> Result<(), StartError> {
    let change = records::Change {
        key: Key::Network,
        expected_rev: network.rev,
        record: Some(Record::Network(network.record.clone())),
    };
    network.rev = store.commit(&rows_of(&[change])?, &lines_of(events)?).await?.rev;
    Ok(())
}

pub(super) fn random() -> Result<Zeroizing<[u8; 32]>, StartError> {
    let mut bytes = Zeroizing::new([0; 32]);
    OsRng.try_fill_bytes(&mut *bytes).map_err(|error| StartError::System {
        action: "get random numbers",
        source: std::io::Error::other(error),
    })?;
    Ok(bytes)
}

pub(super) fn parse_key(text: &[u8]) -> Option<SecretKey> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

fn create_key(path: &Path) -> Result<SecretKey, StartError> {
    let bytes = random()?;
    let text = Zeroizing::new(format!("{}\n", *Zeroizing::new(BASE64.encode(&*bytes))));
    files::write_atomically(path, text.as_bytes(), SECRET_MODE)?;
    Ok(SecretKey::from_bytes(*bytes))
}

async fn create_network(
    options: &Options,
    store: &Store,
    rng: &mut StdRng,
) -> Result<Records, StartError> {
    let local = addresses::local_prefixes();
    let range = choose_range(options.network, options.network_ipv6, &local, rng)?;
    let created = crate::io::clock::unix_seconds();
    let id = NetworkId(rng.random());
    let record = NetworkRecord { id, range, created, members_last_s: None, server_key: None };
    info!(network = %record.id, ipv4 = %range.v4(), ipv6 = %range.v6(), "network created");
    let change = records::Change {
        key: Key::Network,
        expected_rev: 0,
        record: Some(Record::Network(record.clone())),
    };
    let event = Event::network_created(created, &record);
    let rev = store.commit(&rows_of(&[change])?, &lines_of(&[event])?).await?.rev;
    let network = Versioned { rev, record };
    let (members, invites) = (Vec::new(), Vec::new());
    Ok(Records { network, members, invites, policy: None, highest_node: 0 })
}

/// Gives the network the wished range while it has no nodes; tells whether that was a change.
fn fix_range(
    options: &Options,
    records: &mut Records,
    rng: &mut StdRng,
) -> Result<bool, StartError> {
    let has = records.network.record.range;
    let v4 = options.network.unwrap_or(has.v4());
    let v6 = options.network_ipv6.unwrap_or(has.v6());
    let wished: OverlayRange = choose_range(Some(v4), Some(v6), &[], rng)?;
    if wished == has {
        return Ok(false);
    }
    if !records.members.is_empty() {
        let text = |range: OverlayRange| format!("{} and {}", range.v4(), range.v6());
        return Err(StartError::RangeFixed { has: text(has), wished: text(wished) });
    }
    records.network.record.range = wished;
    Ok(true)
}

/// The typed records, or none when the store is new.
pub(super) fn parse(rows: &[StoredRecord]) -> Result<Option<Records>, StartError> {
    let (mut network, mut members, mut invites) = (None, Vec::new(), Vec::new());
    let mut policy: Option<Versioned<PolicyRecord>> = None;
    let mut highest_node = 0;
    for row in rows {
        if row.kind == MEMBER {
            let number = row.id.parse().map(NodeId::number).unwrap_or_default();
            highest_node = highest_node.max(number);
        }
        let Some(body) = &row.body else {
            continue;
        };
        match row.kind.as_str() {
            NETWORK => network = Some(versioned(row, body)?),
            MEMBER => members.push(versioned(row, body)?),
            INVITE => invites.push(versioned(row, body)?),
            POLICY => {
                let record: Versioned<PolicyRecord> = versioned(row, body)?;
                // A server without its rules would open the network.
                let text = record.record.text.as_deref();
                text.map(Policy::parse).transpose().map_err(|error| unreadable(row, error))?;
                policy = Some(record);
            }
            _ => return Err(unreadable(row, "no such kind of record is known")),
        }
    }
    match network {
        Some(network) => Ok(Some(Records { network, members, invites, policy, highest_node })),
        None if rows.is_empty() => Ok(None),
        None => Err(StartError::Record {
            kind: NETWORK.into(),
            id: NETWORK_ID.into(),
            reason: "it is missing".into(),
        }),
    }
}

fn versioned<T: DeserializeOwned>(
    row: &StoredRecord,
    body: &str,
) -> Result<Versioned<T>, StartError> {
    let record = serde_json::from_str(body).map_err(|error| unreadable(row, error))?;
    Ok(Versioned { rev: row.rev, record })
}

fn unreadable(row: &StoredRecord, reason: impl ToString) -> StartError {
    StartError::Record { kind: row.kind.clone(), id: row.id.clone(), reason: reason.to_string() }
}

/// The changes as the store takes them.
pub(super) fn rows_of(changes: &[records::Change]) -> Result<Vec<Change>, StartError> {
    changes
        .iter()
        .map(|change| {
            let (kind, id) = match change.key {
                Key::Network => (NETWORK, NETWORK_ID.to_string()),
                Key::Member(id) => (MEMBER, id.to_string()),
                Key::Invite(id) => (INVITE, id.to_string()),
                Key::Policy => (POLICY, NETWORK_ID.to_string()),
            };
            let body = match &change.record {
                Some(Record::Network(record)) => Some(json(kind, &id, record)?),
                Some(Record::Member(record)) => Some(json(kind, &id, record)?),
                Some(Record::Invite(record)) => Some(json(kind, &id, record)?),
                Some(Record::Policy(record)) => Some(json(kind, &id, record)?),
                None => None,
            };
            Ok(Change { kind, id, expected_rev: change.expected_rev, body })
        })
        .collect()
}

/// The events as the store takes them.
pub(super) fn lines_of(events: &[Event]) -> Result<Vec<store::Event>, StartError> {
    events.iter().map(line_of).collect()
}

pub(super) fn line_of(event: &Event) -> Result<store::Event, StartError> {
    let body = json("event", &event.kind, &event.fields)?;
    let (kind, actor) = (event.kind.clone(), event.actor.clone());
    Ok(store::Event { at: event.at, kind, actor, body })
}

fn json<T: Serialize>(kind: &str, id: &str, record: &T) -> Result<String, StartError> {
    serde_json::to_string(record).map_err(|error| StartError::Record {
        kind: kind.into(),
        id: id.into(),
        reason: error.to_string(),
    })
}
