//! The system calls that have no safe wrapper. The only file with `unsafe`.

#![expect(unsafe_code, reason = "a foreign descriptor is a bare number, and an ioctl has no type")]

use std::os::fd::{AsRawFd, BorrowedFd};

/// The descriptor of a TUN device, bound to the life of the device.
pub(crate) fn tun_fd(device: &tun::Device) -> BorrowedFd<'_> {
    // SAFETY: the device owns the descriptor and closes it only when it is dropped, which the
    // lifetime of the returned borrow forbids for as long as the borrow is in use.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

mod ioctl {
    // TUNSETOFFLOAD of linux/if_tun.h, whose argument is the mask itself and no pointer.
    nix::ioctl_write_int_bad!(tun_set_offload, nix::request_code_write!(b'T', 208, 4));
}

/// Tells the kernel which packets it may hand over unfinished or uncut.
pub(crate) fn tun_set_offload(device: &tun::Device, mask: libc::c_uint) -> nix::Result<()> {
    let mask = libc::c_int::try_from(mask).map_err(|_| nix::errno::Errno::EINVAL)?;
    // SAFETY: the descriptor is open, since the device is; the argument is a number, so the kernel
    // touches no memory of ours; a mask that it does not know is refused with an error.
    unsafe { ioctl::tun_set_offload(device.as_raw_fd(), mask) }.map(drop)
}
