//! One test with its needs, and the run of all of them.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Completion, Trial};

use crate::sandbox::Limits;

/// A test: a name of the form `subject::sentence`, what it needs, and what it does.
pub(crate) struct Case {
    name: String,
    needs: Needs,
    run: Box<dyn FnOnce() + Send>,
}

/// How often a test of milliseconds may be tried.
const TRIES: u32 = 3;

/// What a test needs of the machine beyond namespaces and the usual tools.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Namespaces,
    /// The real root of the machine, and `systemd-nspawn`.
    Systemd,
}

impl Case {
    pub(crate) fn new(name: impl Into<String>, run: impl FnOnce() + Send + 'static) -> Self {
        Self { name: name.into(), needs: Needs::Namespaces, run: Box::new(run) }
    }

    /// A test that holds the product to milliseconds. A machine that does much else can miss them
    /// whatever the product does, so the bound has to hold in one of [`TRIES`] tries, each in a lab
    /// of its own.
    pub(crate) fn timed(name: impl Into<String>, run: impl Fn() + Send + 'static) -> Self {
        let name = name.into();
        let title = name.clone();
        Self::new(name, move || {
            for attempt in 1..TRIES {
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(&run)).is_ok() {
                    return;
                }
                eprintln!("{title}: try {attempt} of {TRIES} has failed");
            }
            run();
        })
    }

    pub(crate) fn needs(mut self, needs: Needs) -> Self {
        self.needs = needs;
        self
    }
}

/// Runs the cases that `arguments` select, and says at the end how many were left out and why.
pub(crate) fn run(arguments: &Arguments, cases: Vec<Case>, limits: &Limits) -> ExitCode {
    let left_out: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
    let mut trials = Vec::new();
    for case in cases {
        let reason = limits.reason_against(case.needs);
        let strict = limits.strict;
        let left_out = Arc::clone(&left_out);
        trials.push(Trial::ignorable_test(case.name, move || {
            let Some(reason) = reason else {
                (case.run)();
                return Ok(Completion::Completed);
            };
            if strict {
                return Err(format!("cannot run: {reason}").into());
            }
            *left_out.lock().unwrap().entry(reason.clone()).or_default() += 1;
            Ok(Completion::ignored_with(reason))
        }));
    }

    let conclusion = libtest_mimic::run(arguments, trials);
    for (reason, count) in left_out.lock().unwrap().iter() {
        eprintln!("e2e: {count} tests were left out: {reason}");
    }
    conclusion.exit_code()
}
