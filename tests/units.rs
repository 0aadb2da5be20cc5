//! The unit files: systemd reads them, the program knows what they start, and they stay tight.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test stops at the first surprise and prints to people"
)]

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Output};

use libtest_mimic::{Arguments, Completion, Trial};

/// Where the unit files say that the program is.
const PROGRAM: &str = "/usr/local/bin/overlay";

/// Unit, and its exposure in tenths that may not be exceeded.
const UNITS: [(&str, u32); 2] = [("overlay.service", 18), ("overlay-server.service", 12)];

fn text(unit: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(unit)).unwrap()
}

fn settings<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

fn main() -> ExitCode {
    let test = |name: &str, run: fn() -> Completion| Trial::ignorable_test(name, move || Ok(run()));
    let trials = [
        test("the_program_knows_every_command_and_flag_that_a_unit_starts_it_with", flags_exist),
        test("both_units_are_ready_late_share_a_directory_and_keep_keys", settings_are_right),
        test("systemd_has_nothing_to_say_against_the_units", units_parse),
        test("no_unit_is_more_exposed_than_promised", exposure),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}

/// Runs `systemd-analyze`; without one the test is counted as skipped.
fn systemd_analyze(arguments: &[&str]) -> Result<Output, Completion> {
    Command::new("systemd-analyze").args(arguments).output().map_err(|error| {
        eprintln!("skipped: systemd-analyze cannot be run ({error})");
        Completion::ignored_with("no systemd-analyze")
    })
}

fn flags_exist() -> Completion {
    for (unit, _) in UNITS {
        let text = text(unit);
        assert_eq!(settings(&text, "ExecReload"), ["/bin/kill -HUP $MAINPID"], "{unit}");
        let starts: Vec<&str> =
            ["ExecStart", "ExecStop"].iter().flat_map(|k| settings(&text, k)).collect();
        assert!(!starts.is_empty(), "{unit} starts nothing");
        for start in starts {
            let mut words = start.split(' ');
            assert_eq!(words.next(), Some(PROGRAM), "{unit}: the installer replaces this path");
            let (flags, commands): (Vec<&str>, Vec<&str>) = words.partition(|w| w.starts_with('-'));
            let help = Command::new(env!("CARGO_BIN_EXE_overlay"))
                .args(&commands)
                .arg("--help")
                .output()
                .unwrap();
            assert!(help.status.success(), "{unit}: overlay {commands:?} is no command");
            let help = String::from_utf8(help.stdout).unwrap();
            for flag in flags {
                let flag = flag.split('=').next().unwrap();
                assert!(help.contains(flag), "{unit}: {flag} is unknown to {commands:?}");
            }
        }
    }
    Completion::Completed
}

fn settings_are_right() -> Completion {
    for (unit, _) in UNITS {
        let text = text(unit);
        let one = |key| {
            let values = settings(&text, key);
            assert_eq!(values.len(), 1, "{unit}: {key}");
            values[0]
        };
        assert_eq!(one("Type"), "notify");
        assert_eq!(one("NotifyAccess"), "main");
        assert_eq!(one("Restart"), "on-failure");
        assert_eq!((one("User"), one("Group")), ("overlay", "overlay"));
        assert!(one("StateDirectory").starts_with("overlay/"));
        assert_eq!(one("StateDirectoryMode"), "0700");
        assert_eq!(one("RuntimeDirectory"), "overlay");
        assert_eq!(one("RuntimeDirectoryPreserve"), "yes", "the other service may use it");
        assert_eq!(one("LimitCORE"), "0");
        assert_eq!(one("CapabilityBoundingSet"), one("AmbientCapabilities"));
    }
    assert_eq!(settings(&text("overlay-server.service"), "StandardOutput"), ["null"], "join line");
    Completion::Completed
}

fn units_parse() -> Completion {
    let directory = tempfile::tempdir().unwrap();
    for (unit, _) in UNITS {
        let path = directory.path().join(unit);
        let text = text(unit).replace(PROGRAM, env!("CARGO_BIN_EXE_overlay"));
        fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap();
        let arguments = ["verify", "--man=no", "--recursive-errors=no", path];
        let output = match systemd_analyze(&arguments) {
            Ok(output) => output,
            Err(skipped) => return skipped,
        };
        let said = String::from_utf8_lossy(&output.stderr);
        // Units of the machine that it reads on the way may be at fault, too.
        let ours: Vec<&str> = said.lines().filter(|line| line.contains(unit)).collect();
        assert!(ours.is_empty(), "{ours:#?}");
    }
    Completion::Completed
}

fn exposure() -> Completion {
    for (unit, limit) in UNITS {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(unit);
        fs::write(&path, text(unit)).unwrap();
        // Offline, so that no systemd has to run; the threshold counts in tenths.
        let threshold = format!("--threshold={limit}");
        let path = path.to_str().unwrap();
        let arguments = ["security", "--no-pager", "--offline=yes", threshold.as_str(), path];
        let output = match systemd_analyze(&arguments) {
            Ok(output) => output,
            Err(skipped) => return skipped,
        };
        let said = String::from_utf8_lossy(&output.stdout);
        let level = said.lines().find(|line| line.contains("Overall exposure level"));
        let Some(level) = level else {
            // The offline mode came with systemd 250.
            eprintln!("skipped: {}", String::from_utf8_lossy(&output.stderr).trim());
            return Completion::ignored_with("no offline mode");
        };
        assert!(output.status.success(), "{limit} tenths are allowed, but: {level}");
    }
    Completion::Completed
}
