//! Plays the committed corpora of the parsers' fuzz targets, whole, cut short and with one bit off,
//! and holds the list of targets in the documentation against what there is. The programs of the fuzz
//! targets are not compiled here, their C++ would take too long: all that is in them and not in what
//! is shared with these tests is read as text.

#[path = "fuzz/src/parsers/mod.rs"]
mod parsers;

use std::collections::{BTreeMap, BTreeSet};
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
                while let Some((name, _, parser)) =
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
    let parsers = parsers::ALL.iter().map(|(name, ..)| *name);
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

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text_of(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn toml_of(path: &str) -> toml::Table {
    text_of(path).parse().unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Whether this word stands in the text, followed by `::`.
fn names(text: &str, word: &str) -> bool {
    let path = format!("{word}::");
    text.match_indices(&path).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        before.is_none_or(|it| !it.is_alphanumeric() && it != '_' && it != ':')
    })
}

/// Modules of the simulator that the program `scenario` is made of.
fn modules_of(program: &str) -> BTreeSet<&str> {
    program.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';')).collect()
}

#[test]
fn every_program_plays_the_parser_of_its_name() {
    for (name, function, _) in parsers::ALL {
        let program = text_of(&format!("tests/fuzz/src/bin/{name}.rs"));
        let wanted = format!(
            "#![no_main]\n\n#[path = \"../parsers/mod.rs\"]\nmod parsers;\n\n\
             libfuzzer_sys::fuzz_target!(|bytes: &[u8]| parsers::{function}(bytes));\n"
        );
        assert_eq!(program, wanted, "tests/fuzz/src/bin/{name}.rs");
    }
}

#[test]
fn the_program_of_scenarios_has_all_modules_that_its_modules_use() {
    let program = text_of("tests/fuzz/src/bin/scenario.rs");
    let (modules, simulator) = (modules_of(&program), text_of("tests/sim/main.rs"));
    let all = modules_of(&simulator);
    assert!(!modules.is_empty() && modules.is_subset(&all), "{modules:?} of {all:?}");
    for module in &modules {
        let path = format!("#[path = \"../../../sim/{module}.rs\"]\nmod {module};\n");
        assert!(program.contains(&path), "{module} comes from its file");
        let text = text_of(&format!("tests/sim/{module}.rs"));
        // The tests in it are not compiled.
        let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        for (at, from) in text.match_indices("crate::") {
            let used = text[at + from.len()..].split(|it: char| !it.is_alphanumeric() && it != '_');
            let used = used.into_iter().next().unwrap_or_default();
            let known =
                modules.contains(used) || (used == "epoch" && program.contains("fn epoch("));
            assert!(known, "tests/sim/{module}.rs wants `crate::{used}`, the program has it not");
        }
    }
}

#[test]
fn the_fuzz_targets_have_the_dependencies_that_they_use() {
    let (ours, theirs) = (toml_of("Cargo.toml"), toml_of("tests/fuzz/Cargo.toml"));
    let declared = theirs["dependencies"].as_table().expect("a table");
    let program = text_of("tests/fuzz/src/bin/scenario.rs");
    let mut sources: Vec<String> = files_in(&root().join("tests/fuzz/src/parsers"))
        .iter()
        .map(|file| fs::read_to_string(file).expect("it can be read"))
        .collect();
    sources.extend(modules_of(&program).iter().map(|it| text_of(&format!("tests/sim/{it}.rs"))));
    for section in ["dependencies", "dev-dependencies"] {
        for name in ours[section].as_table().expect("a table").keys() {
            let used = sources.iter().any(|text| names(text, &name.replace('-', "_")));
            assert!(!used || declared.contains_key(name), "tests/fuzz/Cargo.toml lacks {name}");
        }
    }
    for name in ["overlay", "libfuzzer-sys"] {
        assert!(declared.contains_key(name), "tests/fuzz/Cargo.toml lacks {name}");
    }
}

/// Versions of each package in a lock file.
fn versions(lock: &toml::Table) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut versions = BTreeMap::<&str, BTreeSet<&str>>::new();
    for package in lock["package"].as_array().expect("a list") {
        let [name, version] = ["name", "version"].map(|key| package[key].as_str());
        versions.entry(name.expect("a name")).or_default().extend(version);
    }
    versions
}

#[test]
fn the_fuzz_targets_play_what_is_built_here() {
    let (ours, theirs) = (toml_of("Cargo.lock"), toml_of("tests/fuzz/Cargo.lock"));
    let (here, there) = (versions(&ours), versions(&theirs));
    for (name, versions) in here {
        assert!(
            there.get(name).is_none_or(|others| others.is_subset(&versions)),
            "tests/fuzz/Cargo.lock has another {name}: copy Cargo.lock over it, and let `cargo \
             metadata` in tests/fuzz take it up"
        );
    }
    let manifest = toml_of("Cargo.toml");
    let wanted: BTreeSet<&str> =
        manifest["dependencies"].as_table().expect("a table").keys().map(String::as_str).collect();
    let packages = theirs["package"].as_array().expect("a list");
    let overlay = packages.iter().find(|it| it["name"].as_str() == Some("overlay"));
    let locked = overlay.and_then(|it| it["dependencies"].as_array()).expect("overlay is locked");
    let locked: BTreeSet<&str> =
        locked.iter().filter_map(|it| it.as_str()?.split(' ').next()).collect();
    assert_eq!(locked, wanted, "tests/fuzz/Cargo.lock (left) and Cargo.toml");
}
