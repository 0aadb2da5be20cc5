//! Plays the committed corpora of the parsers' fuzz targets, whole, cut short and with one bit off,
//! and holds the list of targets in the documentation against what there is.

#[path = "fuzz/src/parsers/mod.rs"]
mod parsers;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Of each input so many are played that end sooner, and so many with one bit off.
const VARIANTS: usize = 32;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus")
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("it is there");
    let mut files: Vec<PathBuf> =
        entries.map(|entry| entry.expect("it can be read").path()).collect();
    files.sort();
    files
}

#[test]
fn no_committed_input_makes_a_parser_panic() {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((name, parser)) =
                    parsers::ALL.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let files = files_in(&corpus().join(name));
                    assert!(!files.is_empty(), "{name}: every parser has a corpus");
                    for file in files {
                        let input = fs::read(&file).expect("it can be read");
                        if std::panic::catch_unwind(|| play(*parser, &input)).is_err() {
                            panic!("{} fails", file.display());
                        }
                    }
                }
            });
        }
    });
}

fn play(parser: parsers::Parser, input: &[u8]) {
    parser(input);
    let step = input.len().div_ceil(VARIANTS).max(1);
    for at in (0..input.len()).step_by(step) {
        parser(&input[..at]);
        // What lies beside a good input.
        let mut beside = input.to_vec();
        beside[at] ^= 1 << (at % 8);
        parser(&beside);
    }
}

/// The rows of the table in `docs/security.md`: target, and how many files its corpus has.
fn documented() -> BTreeMap<String, usize> {
    let text = include_str!("../docs/security.md");
    let rows = text.lines().skip_while(|line| *line != "## How it is fuzzed");
    rows.filter_map(|row| {
        let cells: Vec<&str> = row.strip_prefix("| ")?.split('|').map(str::trim).collect();
        let name = cells.get(2)?.strip_prefix('`')?.strip_suffix('`')?;
        Some((name.to_string(), cells.get(4)?.parse().ok()?))
    })
    .collect()
}

#[test]
fn every_target_has_a_corpus_and_a_row_in_the_documentation() {
    let with_files: BTreeMap<String, usize> = files_in(&corpus())
        .iter()
        .map(|directory| {
            let name = directory.file_name().expect("it has a name").to_string_lossy();
            (name.into_owned(), files_in(directory).len())
        })
        .collect();
    assert_eq!(documented(), with_files, "docs/security.md (left) and tests/fuzz/corpus");
    let parsers = parsers::ALL.iter().map(|(name, _)| *name);
    let mut targets: Vec<&str> = parsers.chain(["scenario"]).collect();
    targets.sort_unstable();
    assert!(with_files.keys().eq(targets.iter()), "{targets:?} and tests/fuzz/corpus");
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/src/bin");
    let programs: Vec<String> = files_in(&programs)
        .iter()
        .filter_map(|file| Some(file.file_stem()?.to_string_lossy().into_owned()))
        .collect();
    assert_eq!(programs, targets, "tests/fuzz/src/bin and the parsers");
}
