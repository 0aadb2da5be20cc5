//! Power cuts. The server runs under strace, which writes down all that it asks the kernel to
//! write, to sync and to say. Then for many moments the disk is built as a power cut at that moment
//! could have left it: what was synced, and of the rest anything.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use libtest_mimic::Completion;
use overlay::server::admin::Request;
use overlay::store::{Store, StoredRecord};
use overlay::wire::join::JoinLine;
use rand::Rng;
use rand::rngs::StdRng;

use crate::server::{Place, has_strace, join, kill_traced, run};
use crate::{random, size};

/// Enough for the log of the database to be written back a few times.
const REQUESTS: usize = 400;

/// What was acknowledged with one answer: the record must be there, or must be deleted.
type Promise = (String, Option<&'static str>);

pub(crate) fn cuts() -> Completion {
    if !has_strace() {
        return Completion::ignored_with("no strace");
    }
    let place = Place::new();
    let trace = place.dir.path().join("trace");
    let mut promises = run(record(&place, &trace));
    let steps = parse(&fs::read_to_string(&trace).unwrap(), &place.state());
    let syncs = steps.iter().filter(|step| matches!(step, Step::Sync(_))).count();
    let answers = steps.iter().filter(|step| matches!(step, Step::Answer)).count();
    // Each answer on the socket is one promise; those to whom asked whether it is ready are empty.
    let ready = answers.checked_sub(promises.len()).expect("every answer is in the trace");
    assert!(ready > 0, "the first answer is that it is ready");
    promises.splice(0..0, vec![("0".into(), None); ready]);
    assert!(syncs >= promises.len(), "{syncs} syncs for {answers} answers");

    let mut random = random();
    let scratch = tempfile::tempdir().unwrap();
    let count = size(150, 10_000);
    let mut moments: Vec<usize> =
        (0..count).map(|_| random.random_range(0..=steps.len())).collect();
    moments.sort_unstable();
    let mut disk = Disk::default();
    let (mut done, mut answered, mut torn) = (0, 0, 0);
    run(async {
        for moment in moments {
            for step in &steps[done..moment] {
                answered += usize::from(matches!(step, Step::Answer));
                disk.apply(step);
            }
            done = moment;
            torn += usize::from(disk.write_out(scratch.path(), &mut random));
            let store = scratch.path().join("server.db");
            if !store.exists() && answered == 0 {
                continue;
            }
            let store = Store::open(&store).await;
            let store = store.unwrap_or_else(|error| panic!("cut at {moment}: {error}"));
            let records = store.load().await.unwrap();
            store.close().await;
            for promise in &promises[..answered] {
                assert!(is_kept(promise, &records), "cut at {moment}: {promise:?} is lost");
            }
        }
    });
    eprintln!("{count} power cuts, {torn} of them with writes half done; {answers} answers kept");
    Completion::Completed
}

/// Threads interrupt one another more the busier the machine is, and a sync that is overlooked then
/// makes a loss of what the next sync would have saved.
pub(crate) fn interrupted() -> Completion {
    let file = r"3<\x2f\x73\x2f\x64\x62>";
    let trace = format!(
        "71    fdatasync({file} <unfinished ...>\n\
         72    sendto(9<UNIX-STREAM:[1->2]>, \"{ANSWER}\", 5, MSG_NOSIGNAL, NULL, 0) = 5\n\
         71    <... fdatasync resumed>)          = 0\n\
         71    fdatasync({file})   = 0\n\
         71    ftruncate({file}, 7 <unfinished ...>\n\
         72    fdatasync({file})   = -1 EIO (Input/output error)\n\
         71    <... ftruncate resumed>)          = 0\n\
         72    fdatasync({file} <unfinished ...>) = ?\n\
         72    +++ killed by SIGKILL +++\n"
    );
    let steps = format!("{:?}", parse(&trace, Path::new("/s")));
    let wanted = r#"[Answer, Sync("db"), Sync("db"), Cut { file: "db", length: 7 }]"#;
    assert_eq!(steps, wanted);
    Completion::Completed
}

fn is_kept((id, field): &Promise, records: &[StoredRecord]) -> bool {
    let found = records.iter().find(|record| record.id == *id);
    match (found.map(|record| &record.body), field) {
        (Some(None), Some("deleted")) => true,
        (Some(Some(body)), Some(field)) => body.contains(field),
        (Some(_), None) => true,
        _ => false,
    }
}

/// Runs a server that does many things, and returns what each of its answers promised.
async fn record(place: &Place, trace: &Path) -> Vec<Promise> {
    let calls = "--trace=openat,write,writev,pwrite64,sendto,sendmsg,lseek,ftruncate,fsync,\
                 fdatasync,unlink,unlinkat,rename,renameat,renameat2";
    let trace = trace.to_str().unwrap();
    let mut process =
        place.spawn(&["strace", "-f", "-yy", "-xx", "-s", "100000", "-o", trace, calls]);
    let mut promises: Vec<Promise> = Vec::new();
    place.ready(&mut process).await;
    for number in 0..REQUESTS {
        let invited = place.invite(1).await;
        promises.push((invited.id.to_string(), None));
        if number % 8 == 3 {
            let request = Request::InviteRevoke { id: invited.id };
            place.ask(request).await.unwrap().unwrap();
            promises.push((invited.id.to_string(), Some("\"revoked\":true")));
        }
        if number % 8 == 5 {
            let line: JoinLine = invited.join.expose().parse().unwrap();
            let mut key = [9; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            let (_, welcome) = join(place.address, &line, key).await.unwrap();
            let id = format!("{:08x}", welcome.unwrap().id);
            // The welcome is sealed; what is asked after it is answered after it.
            place.nodes().await;
            promises.push((id.clone(), Some("machine_key")));
            if number % 16 == 5 {
                place.ask(Request::Remove { node: id.clone() }).await.unwrap().unwrap();
                // What was promised before is not wanted any more.
                promises.last_mut().unwrap().1 = None;
                promises.push((id, Some("deleted")));
            }
        }
    }
    kill_traced(process);
    promises
}

/// What a line of the trace says.
#[derive(Debug)]
enum Step {
    Write {
        file: String,
        offset: u64,
        bytes: Vec<u8>,
    },
    Cut {
        file: String,
        length: u64,
    },
    Sync(String),
    Remove(String),
    Rename(String, String),
    /// The answer to a question on the local socket.
    Answer,
}

/// A system call that was seen to start: the thread has not seen its end yet.
fn parse(trace: &str, state: &Path) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut open: BTreeMap<&str, String> = BTreeMap::new();
    let mut positions: BTreeMap<String, u64> = BTreeMap::new();
    for line in trace.lines() {
        let (thread, line) = line.split_once(' ').unwrap_or_default();
        let line = line.trim_start();
        let (call, begins, ends) = if let Some(start) = line.strip_suffix(" <unfinished ...>") {
            open.insert(thread, start.to_string());
            (start.to_string(), true, false)
        } else if let Some(rest) = line.strip_prefix("<... ") {
            let rest = rest.split_once(" resumed>").map_or("", |(_, rest)| rest);
            (open.remove(thread).unwrap_or_default() + rest, false, true)
        } else {
            (line.to_string(), true, true)
        };
        let Some((name, arguments)) = call.split_once('(') else { continue };
        let (file, about) = described(arguments);
        // An answer counts from its beginning on, and a sync not before its end.
        if begins && about.starts_with("UNIX") && arguments.contains(ANSWER) {
            steps.push(Step::Answer);
        }
        if !ends {
            continue;
        }
        let returned = ended(&call).map(|(_, result)| result);
        // A line that is not understood could be the sync that a promise rests on.
        assert!(returned.is_some(), "the trace is not understood: {line}");
        let number = returned.and_then(|result| result.split([' ', '<']).next()?.parse().ok());
        let Some(result): Option<u64> = number else { continue };
        let inside = |path: &str| {
            let rest = Path::new(path).strip_prefix(state).ok()?;
            // The directory itself is of no interest: names are taken to be lost until a sync.
            rest.to_str().filter(|rest| !rest.is_empty()).map(ToString::to_string)
        };
        let paths: Vec<String> = strings(arguments)
            .filter_map(|bytes| inside(&String::from_utf8(bytes).ok()?))
            .collect();
        match (name, inside(&file), paths.as_slice()) {
            ("unlink" | "unlinkat", _, [path, ..]) => steps.push(Step::Remove(path.clone())),
            ("rename" | "renameat" | "renameat2", _, [from, to]) => {
                steps.push(Step::Rename(from.clone(), to.clone()));
            }
            ("lseek", Some(file), _) => drop(positions.insert(file, result)),
            ("openat", ..) => drop(inside(&opened(&call)).map(|file| positions.insert(file, 0))),
            ("fsync" | "fdatasync", Some(file), _) => steps.push(Step::Sync(file)),
            ("ftruncate", Some(file), _) => {
                let length = last_number(arguments);
                steps.push(Step::Cut { file, length });
            }
            ("write" | "pwrite64", Some(file), _) => {
                let bytes = strings(arguments).next().unwrap();
                assert_eq!(bytes.len() as u64, result, "the trace holds all of a write");
                let offset = if name == "write" {
                    let at = positions.entry(file.clone()).or_default();
                    *at += result;
                    *at - result
                } else {
                    last_number(arguments)
                };
                steps.push(Step::Write { file, offset, bytes });
            }
            ("writev", Some(file), _) => panic!("{file} is written in a way that is not looked at"),
            _ => {}
        }
    }
    steps
}

/// `{"ok"`, as strace writes it.
const ANSWER: &str = r#"\x7b\x22\x6f\x6b\x22"#;

/// File and kind of the descriptor `12</path>` or `12<UNIX:[1->2]>`.
fn described(arguments: &str) -> (String, &str) {
    let inner = arguments.split_once('<').map_or("", |(_, rest)| rest);
    let before_comma = inner.split(',').next().unwrap_or_default();
    let about = before_comma.trim_end_matches(')').trim_end_matches('>');
    (unescaped(about.split('>').next().unwrap_or_default()), inner)
}

/// The call up to the end of its arguments, and what it returned. Between the two there are as many
/// blanks as fill the line up to a column: more than one where the line is short, as that of the end
/// of a call is that another thread has interrupted.
fn ended(call: &str) -> Option<(&str, &str)> {
    let (before, result) = call.rsplit_once("= ")?;
    Some((before.trim_end().strip_suffix(')')?, result))
}

/// The path behind the result of an openat: `= 12</path>`.
fn opened(call: &str) -> String {
    let path = ended(call).and_then(|(_, result)| result.split_once('<'));
    path.map_or_else(String::new, |(_, path)| unescaped(path.trim_end_matches('>')))
}

fn unescaped(text: &str) -> String {
    if text.contains("\\x") {
        String::from_utf8(bytes_of(text)).unwrap_or_default()
    } else {
        text.into()
    }
}

fn bytes_of(text: &str) -> Vec<u8> {
    text.split("\\x").skip(1).map(|hex| u8::from_str_radix(&hex[..2], 16).unwrap()).collect()
}

/// The strings among the arguments.
fn strings(arguments: &str) -> impl Iterator<Item = Vec<u8>> {
    arguments.split('"').skip(1).step_by(2).map(bytes_of)
}

fn last_number(arguments: &str) -> u64 {
    let inside = ended(arguments).map_or(arguments, |(inside, _)| inside);
    inside.rsplit(", ").next().unwrap().parse().unwrap()
}

/// A disk, and what it has been told and need not have done.
#[derive(Default)]
struct Disk {
    files: BTreeMap<String, File>,
}

#[derive(Default, Clone)]
struct File {
    synced: Vec<u8>,
    /// Its name is on disk.
    named: bool,
    waiting: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Cut(u64),
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>, length: usize) {
        match self {
            Self::Cut(at) => content.resize(usize::try_from(*at).unwrap(), 0),
            Self::Write(offset, bytes) => {
                let offset = usize::try_from(*offset).unwrap();
                let end = offset + length;
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[offset..end].copy_from_slice(&bytes[..length]);
            }
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Write(_, bytes) => bytes.len(),
            Self::Cut(_) => 0,
        }
    }
}

impl Disk {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::Write { file, offset, bytes } => {
                let change = Change::Write(*offset, bytes.clone());
                self.files.entry(file.clone()).or_default().waiting.push(change);
            }
            Step::Cut { file, length } => {
                self.files.entry(file.clone()).or_default().waiting.push(Change::Cut(*length));
            }
            Step::Sync(file) => {
                let file = self.files.entry(file.clone()).or_default();
                for change in std::mem::take(&mut file.waiting) {
                    change.apply(&mut file.synced, change.len());
                }
                file.named = true;
            }
            Step::Remove(file) => drop(self.files.remove(file)),
            Step::Rename(from, to) => {
                if let Some(file) = self.files.remove(from) {
                    self.files.insert(to.clone(), file);
                }
            }
            Step::Answer => {}
        }
    }

    /// Puts into `directory` what may be left; tells whether something was lost or torn.
    fn write_out(&self, directory: &Path, random: &mut StdRng) -> bool {
        let _ = fs::remove_dir_all(directory);
        fs::create_dir_all(directory).unwrap();
        let mut is_torn = false;
        for (name, file) in &self.files {
            if name == "lock" || (!file.named && random.random()) {
                continue;
            }
            // SQLite knows that the memory that it shares is nothing that it can rely on.
            if name.ends_with("-shm") {
                continue;
            }
            let mut content = file.synced.clone();
            // All, none, in order up to some point, or any of them.
            let mode = random.random_range(0..4);
            let upto = random.random_range(0..=file.waiting.len());
            for (number, change) in file.waiting.iter().enumerate() {
                let whole = match mode {
                    0 => true,
                    1 => false,
                    2 => number < upto,
                    _ => random.random(),
                };
                is_torn |= !whole;
                if whole {
                    change.apply(&mut content, change.len());
                } else if mode > 1 && (number == upto || random.random_ratio(1, 8)) {
                    change.apply(&mut content, random.random_range(0..=change.len()));
                }
            }
            fs::write(directory.join(name), content).unwrap();
        }
        is_torn
    }
}
