//! How the kernel schedules the calling thread.

use std::io;

use super::sys;

/// Has the calling thread run before all threads of ordinary programs, or with them as usual.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_NICE` and without a limit that allows it (`RLIMIT_RTPRIO`).
pub fn run_ahead(ahead: bool) -> io::Result<()> {
    Ok(sys::run_ahead(ahead)?)
}
