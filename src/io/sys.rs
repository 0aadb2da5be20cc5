//! The system calls that have no safe wrapper. The only file with `unsafe`.

#![expect(unsafe_code, reason = "a foreign type gives its descriptor as a bare number only")]

use std::os::fd::{AsRawFd, BorrowedFd};

/// The descriptor of a TUN device, bound to the life of the device.
pub(crate) fn tun_fd(device: &tun::Device) -> BorrowedFd<'_> {
    // SAFETY: the device owns the descriptor and closes it only when it is dropped, which the
    // lifetime of the returned borrow forbids for as long as the borrow is in use.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}
