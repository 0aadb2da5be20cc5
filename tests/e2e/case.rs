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
