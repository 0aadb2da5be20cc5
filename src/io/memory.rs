//! The memory of a process that holds keys.

use nix::sys::prctl::set_dumpable;
use nix::sys::resource::{Resource, setrlimit};

/// From here on the kernel writes no core file of this process, and no other process of the same
/// user can look into it (`PR_SET_DUMPABLE`, prctl(2)). Called before the first key is read.
pub fn keep_memory_private() {
    let off = setrlimit(Resource::RLIMIT_CORE, 0, 0).and(set_dumpable(false));
    if let Err(error) = off {
        tracing::warn!(%error, "a core file of this process would hold its keys");
    }
}
