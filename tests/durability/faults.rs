//! Damaged files, full disks, directories that cannot be written.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use libtest_mimic::Completion;
use overlay::io::clock::now;
use overlay::server::admin::{Answer, NodeInfo, Request};
use rand::Rng;
use rand::rngs::StdRng;

use crate::random;
use crate::server::{Place, copy_dir, join, run};

const MUTATIONS: usize = 200;
/// A server that will not start says so within two seconds, on a machine that has nothing else to do.
const REFUSAL_LIMIT: Duration = Duration::from_secs(10);

/// A stopped server with twenty members, two of them removed again.
async fn filled() -> (Place, Vec<NodeInfo>) {
    let place = Place::new();
    let process = place.start().await;
    let line = place.invite(20).await.join.expose().parse().unwrap();
    for key in 1..=20 {
        join(place.address, &line, [key; 32]).await.unwrap().1.unwrap();
    }
    for node in ["node", "node-7"] {
        place.ask(Request::Remove { node: node.into() }).await.unwrap().unwrap();
    }
    process.stop().await;
    let process = place.start().await;
    let nodes = place.nodes().await;
    process.stop().await;
    (place, nodes)
}

fn content(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name() != "lock")
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        // SQLite makes these when it looks at a database, and they are empty or hold nothing.
        .filter(|(name, bytes)| !name.ends_with("-shm") && !bytes.is_empty())
        .collect()
}

/// The server refuses to start, in words, and leaves everything as it is.
fn refuses(place: &Place, about: &str) -> Duration {
    let before = content(&place.state());
    let start = now();
    let mut process = place.spawn(&[]);
    let status = process.ended(REFUSAL_LIMIT);
    let log = place.log();
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{about}\n{log}");
    for part in ["error: ", "cause: ", "help: "] {
        assert!(log.contains(part), "{about}: no {part}\n{log}");
    }
    let after = content(&place.state());
    assert!(before == after, "{about}: the files have changed");
    start.elapsed()
}

fn mutate(bytes: &mut Vec<u8>, random: &mut StdRng) -> String {
    let at = random.random_range(0..bytes.len());
    match random.random_range(0..4) {
        0 => {
            bytes.truncate(at);
            format!("cut at {at}")
        }
        1 => {
            let bit = random.random_range(0..8);
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of {at}")
        }
        2 => {
            let end = (at + 512).min(bytes.len());
            bytes[at..end].fill(0);
            format!("zeros at {at}")
        }
        _ => {
            let end = (at + 64).min(bytes.len());
            random.fill(&mut bytes[at..end]);
            format!("noise at {at}")
        }
    }
}

pub(crate) fn mutations() -> Completion {
    let mut random = random();
    run(async {
        let (original, nodes) = filled().await;
        let whole = fs::read(original.store()).unwrap();
        let (mut refused, mut harmless, mut slowest) = (0, 0, Duration::ZERO);
        for _ in 0..MUTATIONS {
            let place = Place::new();
            copy_dir(&original.state(), &place.state());
            let mut bytes = whole.clone();
            let what = mutate(&mut bytes, &mut random);
            fs::write(place.store(), &bytes).unwrap();
            let mut process = place.spawn(&[]);
            if place.ready_or_ended(&mut process, REFUSAL_LIMIT).await {
                // What was hit was not in use.
                let has = place.nodes().await;
                assert_eq!(has.len(), nodes.len(), "{what}");
                for (has, wanted) in has.iter().zip(&nodes) {
                    assert_eq!(has.public_key, wanted.public_key, "{what}");
                    let plain = |node: &NodeInfo| (node.id.clone(), node.name.clone(), node.ipv4);
                    assert_eq!(plain(has), plain(wanted), "{what}");
                }
                process.stop().await;
                harmless += 1;
            } else {
                fs::write(place.store(), &bytes).unwrap();
                slowest = slowest.max(refuses(&place, &what));
                refused += 1;
            }
        }
        eprintln!(
            "{MUTATIONS} damages: {refused} refused, {harmless} harmless, \
                   slowest refusal {} ms",
            slowest.as_millis()
        );
        assert!(refused > MUTATIONS / 4, "the damage was not where the data is");
    });
    Completion::Completed
}

pub(crate) fn empty() -> Completion {
    run(async {
        let (original, _) = filled().await;
        for name in ["server.db", "server.key"] {
            for cut in [0, 1, 20] {
                let place = Place::new();
                copy_dir(&original.state(), &place.state());
                let path = place.state().join(name);
                let whole = fs::read(&path).unwrap();
                fs::write(&path, &whole[..cut]).unwrap();
                refuses(&place, &format!("{name} cut to {cut}"));
            }
            let place = Place::new();
            copy_dir(&original.state(), &place.state());
            fs::remove_file(place.state().join(name)).unwrap();
            refuses(&place, &format!("{name} removed"));
        }
        let place = Place::new();
        copy_dir(&original.state(), &place.state());
        let other = overlay::types::SecretKey::from_bytes([7; 32]);
        fs::write(place.state().join("server.key"), &*other.expose_base64()).unwrap();
        refuses(&place, "server.key of another server");
    });
    Completion::Completed
}

/// Words that run a program with this directory mounted in a way of its own.
fn mounted(directory: &Path, mount: &str) -> Vec<String> {
    let mut words = vec!["unshare".to_string(), "--mount".into()];
    if !nix::unistd::geteuid().is_root() {
        words.push("--map-root-user".into());
    }
    let script = format!("d=$0; {mount} && exec \"$@\"");
    words.extend(["sh".into(), "-c".into(), script, directory.to_str().unwrap().into()]);
    words
}

pub(crate) fn full() -> Completion {
    run(async {
        let place = Place::new();
        fs::create_dir(place.state()).unwrap();
        let words = mounted(&place.state(), "mount -t tmpfs -o size=1m,mode=700 none \"$d\"");
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut process = place.spawn(&words);
        place.ready(&mut process).await;
        // The same directory as the server sees it.
        let inside = format!("/proc/{}/root{}", process.0.id(), place.state().display());
        let filler = Path::new(&inside).join("filler");
        let line = place.invite(99).await.join.expose().parse().unwrap();
        let (mut alice, welcome) = join(place.address, &line, [1; 32]).await.unwrap();
        let alice_id = welcome.unwrap().id;

        let mut file = fs::File::create(&filler).unwrap();
        let mut fill = || while file.write_all(&[0; 512]).is_ok() {};
        let (mut refused, mut promised) = (0, Vec::new());
        for _ in 0..20 {
            fill();
            let request = Request::Invite { uses: 1, ttl_s: 60, name: None, tags: Vec::new() };
            match place.ask(request).await.expect("it lives") {
                Ok(Answer::Invited(invited)) => promised.push(invited.id),
                Ok(other) => panic!("{other:?}"),
                Err(refusal) => {
                    let full = ["full", "I/O", "unable to open"];
                    assert!(full.iter().any(|word| refusal.cause.contains(word)), "{refusal:?}");
                    refused += 1;
                }
            }
        }
        eprintln!("{refused} of 20 invites were refused");
        assert!(refused > 0, "the disk was not full");
        // A small change may still find room in what the database has.
        let (mut members, mut turned_away) = (1, None);
        for key in 2..=60 {
            fill();
            let (_, answer) = join(place.address, &line, [key; 32]).await.expect("it lives");
            match answer {
                Ok(_) => members += 1,
                Err(_) => turned_away = Some(key),
            }
            if turned_away.is_some() {
                break;
            }
        }
        let turned_away = turned_away.expect("a join that cannot be stored is not acknowledged");
        assert_eq!(place.nodes().await.len(), members, "and one that was acknowledged is there");
        // Who is in stays in, and can come back.
        let ping = overlay::wire::control::ClientMessage { ping: Some(7), ..Default::default() };
        alice.sender.try_send_control(overlay::wire::control::encode(&ping)).unwrap();
        loop {
            let heard = tokio::time::timeout(Duration::from_secs(10), alice.receiver.next()).await;
            let overlay::io::link::Inbound::Control(bytes) = heard.unwrap().unwrap() else {
                continue;
            };
            let message: overlay::wire::control::ServerMessage =
                overlay::wire::control::decode(&bytes).unwrap();
            if message.pong == Some(7) {
                break;
            }
        }
        let (_, again) = join(place.address, &line, [1; 32]).await.expect("it lives");
        assert_eq!(again.unwrap().id, alice_id);

        drop(file);
        fs::remove_file(&filler).unwrap();
        let (_, answer) = join(place.address, &line, [turned_away; 32]).await.expect("it lives");
        answer.expect("there is room again, without a restart");
        place.invite(1).await;
        assert_eq!(place.nodes().await.len(), members + 1);
        // What was acknowledged on the full disk is on the disk.
        let saved = place.dir.path().join("saved");
        copy_dir(Path::new(&inside), &saved);
        process.kill();
        let after = Place::new();
        copy_dir(&saved, &after.state());
        let process = after.start().await;
        assert_eq!(after.nodes().await.len(), members + 1, "acknowledged and lost");
        let Answer::Invites(list) = after.ask(Request::InviteList).await.unwrap().unwrap() else {
            panic!("a list is answered with a list");
        };
        for id in promised {
            assert!(list.invites.iter().any(|invite| invite.id == id), "{id} is lost");
        }
        process.stop().await;
    });
    Completion::Completed
}

pub(crate) fn read_only() -> Completion {
    run(async {
        let (place, _) = filled().await;
        let before = content(&place.state());
        let mount = "mount --bind \"$d\" \"$d\" && mount -o remount,bind,ro \"$d\"";
        let words = mounted(&place.state(), mount);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut process = place.spawn(&words);
        let status = process.ended(REFUSAL_LIMIT);
        let log = place.log();
        assert_eq!(status.and_then(|status| status.code()), Some(1), "{log}");
        assert!(log.contains("Read-only") && log.contains("help: "), "{log}");
        assert!(log.contains("choose another place with --state-dir"), "{log}");
        assert!(before == content(&place.state()), "nothing was changed");
        place.start().await.stop().await;
    });
    Completion::Completed
}
