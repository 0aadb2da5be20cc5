//! Holds the layers of `src/` to the law in `lib.rs`: who may import whom, what a pure layer may
//! not mention, and the habits that can be read off a file.
//!
//! It reads text, not syntax: comments and the unit tests at the bottom of a file are left out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What each layer may import, beside itself. A name with `::` is a part of a layer that has its
/// own law.
const LAW: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("wire", &["types"]),
    ("path", &["types", "wire"]),
    ("policy", &["types", "wire"]),
    ("dataplane", &["types", "wire", "path", "policy"]),
    ("node", &["types", "wire", "path", "policy", "dataplane"]),
    ("server", &["types", "wire", "policy"]),
    ("io", &["types", "wire", "dataplane"]),
    ("config", &["types", "wire", "io"]),
    // Its contents are the server's records.
    ("store", &["types", "wire", "server", "io"]),
    ("lab::nat", &[]),
    ("lab::packet", &["lab::nat"]),
    ("lab::internet", &["lab::nat", "lab::packet"]),
    (
        "daemon",
        &[
            "types",
            "wire",
            "path",
            "policy",
            "dataplane",
            "node",
            "server",
            "io",
            "store",
            "config",
        ],
    ),
    (
        "lab",
        &[
            "types",
            "wire",
            "path",
            "policy",
            "dataplane",
            "node",
            "server",
            "io",
            "store",
            "config",
            "daemon",
            "lab::nat",
            "lab::packet",
            "lab::internet",
        ],
    ),
];

/// Layers that decide and do nothing: they know no clock, socket, file, task or thread.
const PURE: &[&str] = &[
    "types",
    "wire",
    "path",
    "policy",
    "dataplane",
    "node",
    "server",
    "lab::nat",
    "lab::packet",
    "lab::internet",
];

/// What a pure layer may not mention.
const IMPURE: &[&str] = &[
    "tokio",
    "socket2",
    "quinn_udp",
    "rtnetlink",
    "nix::",
    "libc::",
    "std::fs",
    "std::io",
    "std::thread",
    "std::env",
    "std::process",
    "std::os",
    "std::sync::mpsc",
    "Instant::now",
    "SystemTime",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "async fn",
    ".await",
    "rand::rng(",
    "thread_rng",
];

/// Locks live around each peer's state in the data plane only.
const LOCKS: &[&str] = &["Mutex", "RwLock", "Condvar", "parking_lot"];

/// No file is longer than this before its tests.
const MAX_LINES: usize = 500;

/// One source file.
struct Source {
    /// Relative to `src`.
    path: String,
    layer: String,
    whole: String,
    /// Without comments, and without the tests at its bottom.
    code: Vec<(usize, String)>,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths.sort();
    assert!(!paths.is_empty(), "there are sources");
    paths.iter().map(|path| Source::read(&root, path)).collect()
}

fn collect(dir: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("src can be read") {
        let path = entry.expect("src can be read").path();
        if path.is_dir() {
            collect(&path, paths);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

impl Source {
    fn read(root: &Path, path: &Path) -> Self {
        let whole = fs::read_to_string(path).expect("sources are UTF-8");
        let path = path.strip_prefix(root).expect("it is under src").display().to_string();
        let module = path.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
        let is_tests = module.split("::").any(|part| part == "tests" || part == "properties");
        let code = whole
            .lines()
            .enumerate()
            .take_while(|(_, line)| !(is_tests || line.starts_with("#[cfg(test)]")))
            .map(|(number, line)| (number + 1, without_comment(line)))
            .collect();
        Self { layer: layer_of(&module), path, whole, code }
    }

    fn is_pure(&self) -> bool {
        PURE.contains(&self.layer.as_str())
    }

    /// Every line that mentions one of `words`, told as a finding.
    fn mentions(&self, words: &[&str], findings: &mut Vec<String>) {
        for (number, line) in &self.code {
            for word in words.iter().filter(|word| line.contains(**word)) {
                findings.push(format!("src/{}:{number}: {word}", self.path));
            }
        }
    }

    /// The layers that this file imports, with the line.
    fn imports(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for (number, line) in &self.code {
            for (at, _) in line.match_indices("crate::") {
                let rest = &line[at + "crate::".len()..];
                let module: String = rest
                    .chars()
                    .take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | ':'))
                    .collect();
                found.push((*number, layer_of(module.trim_end_matches(':'))));
            }
            // `super` leads out of a part of a layer that has a law of its own.
            let leads_out = self.layer.contains("::")
                && self.path.matches('/').count() == 1
                && line.trim_start().starts_with("use super::");
            if leads_out {
                let rest = line.trim_start().trim_start_matches("use super::");
                let module: String =
                    rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                let (outer, _) = self.layer.split_once("::").expect("it has an outer layer");
                found.push((*number, layer_of(&format!("{outer}::{module}"))));
            }
        }
        found
    }
}

/// The longest name in the law that a module lies under, else its first part.
fn layer_of(module: &str) -> String {
    let inner = LAW
        .iter()
        .map(|(layer, _)| *layer)
        .filter(|layer| layer.contains("::"))
        .find(|layer| module == *layer || module.starts_with(&format!("{layer}::")));
    inner.or_else(|| module.split("::").next()).unwrap_or(module).to_string()
}

fn without_comment(line: &str) -> String {
    // A `//` inside a string only makes the test look at less.
    line.split("//").next().unwrap_or("").to_string()
}

fn nothing_found(what: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{what}:\n  {}", findings.join("\n  "));
}

#[test]
fn no_layer_imports_a_higher_one() {
    let law: BTreeMap<&str, &[&str]> = LAW.iter().copied().collect();
    let mut findings = Vec::new();
    for source in sources() {
        let Some(allowed) = law.get(source.layer.as_str()) else { continue };
        for (number, imported) in source.imports() {
            let fine = imported == source.layer || allowed.contains(&imported.as_str());
            if !fine && imported != "testing" {
                let Source { path, layer, .. } = &source;
                findings.push(format!("src/{path}:{number}: {layer} imports {imported}"));
            }
        }
    }
    nothing_found("imports that point upward", &findings);
}

#[test]
fn every_layer_has_a_law() {
    let top = ["cli", "main", "lib", "testing", "telemetry"];
    for source in sources() {
        let known = LAW.iter().any(|(layer, _)| *layer == source.layer);
        assert!(known || top.contains(&source.layer.as_str()), "src/{}: no law", source.path);
    }
}

#[test]
fn pure_layers_know_no_clock_socket_file_or_task() {
    let mut findings = Vec::new();
    for source in sources().iter().filter(|source| source.is_pure()) {
        source.mentions(IMPURE, &mut findings);
    }
    nothing_found("the world inside a pure layer", &findings);
}

#[test]
fn in_pure_layers_only_the_data_plane_has_locks() {
    let mut findings = Vec::new();
    for source in sources().iter().filter(|source| source.is_pure()) {
        if source.path != "dataplane/peer.rs" {
            source.mentions(LOCKS, &mut findings);
        }
    }
    nothing_found("locks", &findings);
}

#[test]
fn every_file_says_what_it_is_for_in_ascii_and_is_not_too_long() {
    let mut findings = Vec::new();
    for Source { path, whole, code, .. } in sources() {
        if !whole.starts_with("//! ") {
            findings.push(format!("src/{path}: does not say what it is for"));
        }
        if let Some(number) = whole.lines().position(|line| !line.is_ascii()) {
            findings.push(format!("src/{path}:{}: not ASCII", number + 1));
        }
        if code.len() > MAX_LINES {
            findings.push(format!("src/{path}: {} lines before its tests", code.len()));
        }
    }
    nothing_found("habits", &findings);
}

#[test]
fn unsafe_code_is_in_one_file() {
    let mut findings = Vec::new();
    for source in sources().iter().filter(|source| source.path != "io/sys.rs") {
        source.mentions(&["unsafe ", "unsafe_code"], &mut findings);
    }
    nothing_found("unsafe outside of io/sys.rs", &findings);
}

#[test]
fn the_engine_is_named_in_one_file() {
    // The keys are those of the engine's own curve library, so that a key is converted nowhere;
    // telemetry turns down the engine's log by its name.
    let allowed = ["dataplane/session.rs", "types/key.rs", "telemetry.rs"];
    let mut findings = Vec::new();
    for source in sources().iter().filter(|source| !allowed.contains(&source.path.as_str())) {
        source.mentions(&["boringtun"], &mut findings);
    }
    for source in sources().iter().filter(|source| allowed[1..].contains(&source.path.as_str())) {
        source.mentions(&["boringtun::noise", "Tunn"], &mut findings);
    }
    nothing_found("the engine outside of dataplane/session.rs", &findings);
}

/// The table of promises in `docs/security.md` names tests: an end-to-end test by its whole name, any
/// other by its function.
#[test]
fn the_tests_that_the_promises_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/security.md")).expect("the page exists");
    let (_, table) = page.split_once("## Promises and their tests").expect("it has the table");
    let table = table.split("\n## ").next().unwrap_or_default();
    let mut paths = Vec::new();
    collect(&root.join("src"), &mut paths);
    collect(&root.join("tests"), &mut paths);
    let sources: String =
        paths.iter().map(|path| fs::read_to_string(path).expect("it can be read")).collect();
    let mut promises = 0;
    let mut missing = Vec::new();
    for row in table.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let tests = row.trim_end_matches(" |").rsplit(" | ").next().unwrap_or_default();
        let names: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        if names.is_empty() {
            missing.push(format!("no test: {row}"));
        }
        promises += 1;
        for name in names {
            let wanted =
                if name.contains("::") { format!("\"{name}\"") } else { format!("fn {name}(") };
            if !sources.contains(&wanted) {
                missing.push(name.to_owned());
            }
        }
    }
    assert!(promises > 20, "the table is read: {promises} rows");
    nothing_found("tests that docs/security.md names and nobody wrote", &missing);
}
