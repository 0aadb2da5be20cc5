//! SIGKILL, at any point of anything.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use libtest_mimic::Completion;
use overlay::server::admin::{Answer, Invited, Request};
use overlay::wire::join::JoinLine;
use rand::Rng;
use rand::rngs::StdRng;

use crate::server::{Place, join, run};
use crate::{random, size};

/// Most of what happens after a burst of requests happens within this time.
const BURST: Duration = Duration::from_millis(45);
const JOINS_AT_ONCE: usize = 3;

/// A node that was let in, as the server told it.
#[derive(Debug, Clone)]
struct Known {
    id: String,
    ipv4: String,
    /// None while it is not known whether a change of it was made.
    name: Option<String>,
}

/// What has been acknowledged, and what is open.
#[derive(Default)]
struct Ledger {
    known: BTreeMap<[u8; 32], Known>,
    /// Ids of nodes whose removal was acknowledged, or may have been made.
    removed: BTreeSet<String>,
    perhaps_removed: BTreeSet<String>,
    acknowledged: usize,
    open: usize,
}

pub(crate) fn running() -> Completion {
    run(async {
        let place = Place::new();
        let mut random = random();
        let mut ledger = Ledger::default();
        let mut process = place.start().await;
        for round in 0..size(40, 1000) {
            let mut invites = Vec::new();
            for _ in 0..JOINS_AT_ONCE {
                invites.push(place.invite(1).await);
            }
            let pending = burst(&place, &mut ledger, &invites, process, &mut random).await;
            process = place.start().await;
            verify(&place, &mut ledger, &pending, round).await;
        }
        process.stop().await;
        let Ledger { acknowledged, open, .. } = ledger;
        eprintln!("{acknowledged} requests acknowledged, {open} cut off");
        assert!(acknowledged > 0 && open > 0, "the kills came too early or too late");
    });
    Completion::Completed
}

/// A join that was asked for: with which key and line.
type Attempt = ([u8; 32], JoinLine);

/// Asks for many things at once, and kills the server among them. Returns the joins without answer.
async fn burst(
    place: &Place,
    ledger: &mut Ledger,
    invites: &[Invited],
    process: crate::server::Process,
    random: &mut StdRng,
) -> Vec<(Attempt, bool)> {
    let attempts: Vec<Attempt> = invites
        .iter()
        .map(|invited| (random.random(), invited.join.expose().parse().unwrap()))
        .collect();
    let pick = |random: &mut StdRng, ledger: &Ledger| {
        let count = ledger.known.len();
        (count > 4).then(|| *ledger.known.keys().nth(random.random_range(0..count)).unwrap())
    };
    let removal = pick(random, ledger);
    let renaming = pick(random, ledger).filter(|key| Some(*key) != removal);
    let new_name = format!("name-{}", random.random::<u32>());
    let id_of = |key: Option<[u8; 32]>| key.map(|key| ledger.known[&key].id.clone());
    let (removed_id, renamed_id) = (id_of(removal), id_of(renaming));
    let remove = async {
        match &removed_id {
            Some(node) => place.ask(Request::Remove { node: node.clone() }).await,
            None => None,
        }
    };
    let rename = async {
        let name = new_name.parse().unwrap();
        match &renamed_id {
            Some(node) => place.ask(Request::Rename { node: node.clone(), name }).await,
            None => None,
        }
    };
    let joins = futures_util::future::join_all(
        attempts.iter().map(|(key, line)| join(place.address, line, *key)),
    );
    let delay = BURST.mul_f64(random.random::<f64>());
    let killing = async {
        tokio::time::sleep(delay).await;
        process.kill();
    };
    let (joined, removed, renamed, ()) = tokio::join!(joins, remove, rename, killing);

    let mut pending = Vec::new();
    for (attempt, answer) in attempts.into_iter().zip(joined) {
        match answer {
            Some((_, Ok(welcome))) => {
                let id = format!("{:08x}", welcome.id);
                let known = Known { id, ipv4: welcome.ipv4.to_string(), name: Some(welcome.name) };
                ledger.known.insert(attempt.0, known);
                ledger.acknowledged += 1;
                pending.push((attempt, true));
            }
            Some((_, Err(refused))) => panic!("refused: {refused}"),
            None => {
                ledger.open += 1;
                pending.push((attempt, false));
            }
        }
    }
    if let Some((key, id)) = removal.zip(removed_id) {
        ledger.known.remove(&key);
        match removed {
            Some(answer) => {
                answer.unwrap();
                ledger.removed.insert(id);
                ledger.acknowledged += 1;
            }
            None => {
                ledger.perhaps_removed.insert(id);
                ledger.open += 1;
            }
        }
    }
    if let Some(known) = renaming.and_then(|key| ledger.known.get_mut(&key)) {
        known.name = renamed.map(|answer| {
            answer.unwrap();
            new_name
        });
    }
    pending
}

/// Holds what the server says after a restart against what it has acknowledged.
async fn verify(place: &Place, ledger: &mut Ledger, pending: &[(Attempt, bool)], round: usize) {
    let nodes = place.nodes().await;
    let by_id: BTreeMap<&str, _> = nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let addresses: BTreeSet<_> = nodes.iter().map(|node| node.ipv4).collect();
    let names: BTreeSet<_> = nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(by_id.len(), nodes.len(), "round {round}: an id was given twice");
    assert_eq!(addresses.len(), nodes.len(), "round {round}: an address was given twice");
    assert_eq!(names.len(), nodes.len(), "round {round}: a name was given twice");
    for known in ledger.known.values_mut() {
        let node = by_id.get(known.id.as_str());
        let node = node.unwrap_or_else(|| panic!("round {round}: {known:?} is lost"));
        assert_eq!(node.ipv4.to_string(), known.ipv4, "round {round}");
        assert_eq!(known.name.get_or_insert_with(|| node.name.clone()), &node.name, "{round}");
    }
    for id in &ledger.removed {
        assert!(!by_id.contains_key(id.as_str()), "round {round}: {id} is back");
    }
    // One that is there now is there for good.
    let perhaps = std::mem::take(&mut ledger.perhaps_removed);
    ledger.removed.extend(perhaps.into_iter().filter(|id| !by_id.contains_key(id.as_str())));

    for ((key, line), was_answered) in pending {
        let before = place.nodes().await;
        let answer = join(place.address, line, *key).await.expect("the server runs");
        let welcome = answer.1.unwrap_or_else(|error| panic!("round {round}: {error}"));
        let after = place.nodes().await;
        let id = format!("{:08x}", welcome.id);
        if let Some(known) = ledger.known.get(key) {
            assert_eq!((&known.id, &known.ipv4), (&id, &welcome.ipv4.to_string()), "{round}");
        }
        let was_there = before.iter().any(|node| node.id == id);
        assert!(was_there || !was_answered, "round {round}: the join was lost");
        assert_eq!(after.len(), before.len() + usize::from(!was_there), "round {round}");
        let known = Known { id, ipv4: welcome.ipv4.to_string(), name: Some(welcome.name) };
        ledger.known.insert(*key, known);
        let mut other = *key;
        // Not one of the bits that X25519 does not look at.
        other[9] ^= 1;
        let (_, second) = join(place.address, line, other).await.expect("the server runs");
        assert!(second.is_err(), "round {round}: a one-time invite was used twice");
    }
    verify_log(place, pending, round).await;
}

/// Every use of an invite is in the list of invites and in the log, once.
async fn verify_log(place: &Place, pending: &[(Attempt, bool)], round: usize) {
    let Answer::Invites(list) = place.ask(Request::InviteList).await.unwrap().unwrap() else {
        panic!("a list is answered with a list");
    };
    let events = place.events().await;
    for (at, event) in events.iter().enumerate().skip(1) {
        assert_eq!(event.seq, events[at - 1].seq + 1, "round {round}: a gap in the log");
    }
    for ((_, line), _) in pending {
        let invite = list.invites.iter().find(|invite| invite.id == line.invite).unwrap();
        assert_eq!(invite.used, 1, "round {round}");
        let id = line.invite.to_string();
        let joins = events
            .iter()
            .filter(|event| event.kind == "node-joined" && event.fields.get("invite") == Some(&id));
        assert_eq!(joins.count(), 1, "round {round}: invite {id} in the log");
    }
}

/// Killed at the first start, then started again: it has one network and prints a join line.
pub(crate) fn starting() -> Completion {
    let mut random = random();
    run(async {
        let (mut with_store, mut with_key) = (0, 0);
        for _ in 0..size(40, 400) {
            let place = Place::new();
            let mut process = place.spawn(&[]);
            let delay = Duration::from_micros(random.random_range(0..120_000));
            assert!(process.ended(delay).is_none(), "{}", place.log());
            process.kill();
            let has_key = place.state().join("server.key").exists();
            with_store += usize::from(place.store().exists());
            with_key += usize::from(has_key);
            let network = |place: &Place| {
                let line =
                    place.log().lines().rfind(|line| line.contains("network open"))?.to_string();
                Some(line.split_once("network=")?.1.to_string())
            };
            let process = place.start().await;
            let first = network(&place).unwrap();
            let line: JoinLine = place.invite(1).await.join.expose().parse().unwrap();
            let (_, welcome) = join(place.address, &line, [7; 32]).await.unwrap();
            let welcome = welcome.unwrap();
            process.kill();
            let process = place.start().await;
            assert_eq!(network(&place).unwrap(), first);
            let (_, again) = join(place.address, &line, [7; 32]).await.unwrap();
            assert_eq!(again.unwrap().id, welcome.id);
            process.stop().await;
        }
        eprintln!("killed with a store {with_store} times, with a key {with_key} times");
    });
    Completion::Completed
}
