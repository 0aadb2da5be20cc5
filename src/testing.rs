//! What the unit tests of several rooms share.

use std::sync::OnceLock;
use std::time::Instant;

/// The moment at which every test's virtual time starts; tests only add to it.
#[expect(clippy::disallowed_methods, reason = "the one place where unit tests read a clock")]
pub(crate) fn epoch() -> Instant {
    static EPOCH: OnceLock<Instant> = OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

/// Runs `test` in a fresh network namespace; says so and passes where none can be made.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if let Err(errno) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            println!("skipped: no network namespace: {errno}");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    thread.join().unwrap();
}
