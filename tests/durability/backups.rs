//! Backups: made while the server runs, restored elsewhere, also when that is interrupted.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use libtest_mimic::Completion;
use overlay::wire::join::JoinLine;

use crate::server::{PROGRAM, Place, has_strace, join, run};

fn overlay(words: &[&str]) -> Output {
    Command::new(PROGRAM).args(words).env_remove("OVERLAY_STATE_DIR").output().unwrap()
}

fn backup(place: &Place, file: &Path) {
    let socket = place.socket();
    let words = ["server", "backup", file.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
    let output = overlay(&words);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    assert!(told.contains("secret key"), "{told}");
    assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
}

fn restore(place: &Place, file: &Path, more: &[&str]) -> (Option<i32>, String) {
    let state = place.state();
    let words =
        ["server", "restore", file.to_str().unwrap(), "--state-dir", state.to_str().unwrap()];
    let output = overlay(&[&words[..], more].concat());
    let told = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&told).into_owned())
}

pub(crate) fn moved() -> Completion {
    run(async {
        let old = Place::new();
        let process = old.start().await;
        let line: JoinLine = old.invite(9).await.join.expose().parse().unwrap();
        let mut ids = Vec::new();
        for key in 1..=3 {
            ids.push(join(old.address, &line, [key; 32]).await.unwrap().1.unwrap().id);
        }
        let file = old.dir.path().join("backup");
        only_over_files(&old, &file);
        let events = old.events().await;

        let (code, told) = restore(&old, &file, &["--force"]);
        assert!(code == Some(1) && told.contains("systemctl stop"), "while it runs: {told}");
        // After the backup; the new server will know nothing of it.
        join(old.address, &line, [4; 32]).await.unwrap().1.unwrap();
        process.stop().await;

        let new = Place::new();
        let (code, told) = restore(&new, &file, &[]);
        assert_eq!(code, Some(0), "{told}");
        assert!(told.contains(&format!("overlay server --state-dir {}", new.state().display())));
        for undone in ["is a member again", "is open again", "network-restored"] {
            assert!(told.contains(undone), "{told}");
        }
        let process = new.start().await;
        assert_eq!(new.nodes().await.len(), 3);
        let mut moved = new.events().await;
        let last = moved.pop().unwrap();
        assert_eq!(moved, events, "the log moves, too");
        assert_eq!(last.kind, "network-restored");
        assert!(last.seq > moved.last().unwrap().seq + 1_000_000, "far above");
        for key in 1..=3 {
            // The old key of the server is the one that the node trusts.
            let (_, welcome) = join(new.address, &line, [key; 32]).await.unwrap();
            assert_eq!(welcome.unwrap().id, ids[usize::from(key) - 1]);
        }
        process.stop().await;

        let (code, told) = restore(&new, &file, &[]);
        assert!(code == Some(1) && told.contains("--force"), "{told}");
        let (code, told) = restore(&new, &file, &["--force"]);
        assert_eq!(code, Some(0), "{told}");
        let aside = fs::read_dir(new.state()).unwrap().map(|entry| entry.unwrap().path());
        let aside = aside.filter(|path| path.is_dir()).collect::<Vec<_>>();
        assert_eq!(aside.len(), 1);
        assert!(aside[0].join("server.key").exists() && aside[0].join("server.db").exists());
        damaged(&new, &file);
        // Without end, so it must not be read to its end.
        let (code, told) = restore(&new, Path::new("/dev/zero"), &["--force"]);
        assert!(code == Some(1) && told.contains("too large"), "{told}");
        new.start().await.stop().await;
    });
    Completion::Completed
}

/// A backup takes the place of a file and of nothing else: not of a device, pipe or link.
fn only_over_files(place: &Place, file: &Path) {
    let (socket, link) = (place.socket(), place.dir.path().join("link"));
    let socket = socket.to_str().unwrap();
    let output = overlay(&["server", "backup", socket, "--socket", socket]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("is there and is no file"), "{told}");

    fs::write(file, "older").unwrap();
    std::os::unix::fs::symlink(file, &link).unwrap();
    backup(place, &link);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_ne!(fs::read(file).unwrap(), b"older");
}

/// Whatever is done to the file, it is not half restored.
fn damaged(place: &Place, file: &Path) {
    let whole = fs::read(file).unwrap();
    let bad = place.dir.path().join("bad");
    let files =
        || ["server.key", "server.db"].map(|name| fs::read(place.state().join(name)).unwrap());
    let before = files();
    for step in 0..20 {
        let mut bytes = whole.clone();
        let at = bytes.len() * step / 20;
        if step % 2 == 0 {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1;
        }
        fs::write(&bad, &bytes).unwrap();
        let (code, told) = restore(place, &bad, &["--force"]);
        if code == Some(0) {
            panic!("a damage at {at} of {} was not seen: {told}", whole.len());
        }
        assert!(told.contains("error: ") && told.contains("help: "), "{told}");
        assert!(files() == before, "nothing was changed");
    }
}

/// The file of before is there, what lies beside it is for nobody else, and the next backup takes it away.
fn killed_while_it_is_written(place: &Place, file: &Path) {
    let new = file.with_extension("new");
    for call in ["fsync", "linkat", "rename"] {
        let before = fs::read(file).unwrap();
        let output = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", &format!("--trace={call}")])
            .arg(format!("--inject={call}:signal=KILL:when=1"))
            .args([PROGRAM, "server", "backup", file.to_str().unwrap(), "--socket"])
            .arg(place.socket())
            .output()
            .unwrap();
        // Where the file system has no files without a name, none is linked.
        assert!(!output.status.success() || call == "linkat", "{call}: {output:?}");
        if !output.status.success() {
            assert_eq!(fs::read(file).unwrap(), before, "{call}");
        }
        let left = fs::metadata(&new).map_or(0, |left| left.permissions().mode());
        assert_eq!(left & 0o077, 0, "{call}: what is left is private");
    }
    backup(place, file);
    assert!(!new.exists(), "nothing is left");
}

pub(crate) fn killed() -> Completion {
    if !has_strace() {
        return Completion::ignored_with("no strace");
    }
    run(async {
        let old = Place::new();
        let process = old.start().await;
        let line: JoinLine = old.invite(9).await.join.expose().parse().unwrap();
        let id = join(old.address, &line, [1; 32]).await.unwrap().1.unwrap().id;
        let file = old.dir.path().join("backup");
        backup(&old, &file);
        killed_while_it_is_written(&old, &file);
        process.stop().await;
        let mut kills = 0;
        for call in ["rename", "fsync", "fdatasync", "pwrite64", "unlink"] {
            for number in 1..=30 {
                let place = Place::new();
                // Over another network, which must not be lost either.
                place.start().await.stop().await;
                let state = place.state();
                let inject = format!("--inject={call}:signal=KILL:when={number}");
                let output = Command::new("strace")
                    .args(["-f", "-qq", "-o", "/dev/null", &format!("--trace={call}"), &inject])
                    .args([PROGRAM, "server", "restore", "--force", "--state-dir"])
                    .args([&state, &file])
                    .output()
                    .unwrap();
                if output.status.success() {
                    break;
                }
                kills += 1;
                // What is there starts as the old network, or says what to do, and is no new one.
                let (code, told) = restore(&place, &file, &["--force"]);
                assert_eq!(code, Some(0), "{call} {number}: {told}");
                let process = place.start().await;
                let (_, again) = join(place.address, &line, [1; 32]).await.unwrap();
                assert_eq!(again.unwrap().id, id, "{call} {number}");
                process.stop().await;
            }
        }
        eprintln!("killed {kills} times");
        assert!(kills > 10, "only {kills} steps were seen");
    });
    Completion::Completed
}
