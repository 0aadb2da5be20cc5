//! The system calls that have no safe wrapper. The only file with `unsafe`.

#![expect(unsafe_code, reason = "a foreign descriptor is a bare number, and an ioctl has no type")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Whether a datagram that is longer than a link of its path takes may be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragments {
    /// By the kernel and by the routers on the way.
    Allowed,
    /// By nobody, whatever the kernel believes to know of the path.
    Forbidden,
}

/// Sets what may be done with the datagrams that `socket` sends from here on.
pub(crate) fn set_fragments(
    socket: &impl AsRawFd,
    ipv6: bool,
    fragments: Fragments,
) -> nix::Result<()> {
    let (level, name, value) = match (ipv6, fragments) {
        (true, Fragments::Allowed) => {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
        }
        (true, Fragments::Forbidden) => {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
        }
        (false, Fragments::Allowed) => {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
        }
        (false, Fragments::Forbidden) => {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
        }
    };
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open for as long as the borrow of the socket; the kernel reads
    // `length` bytes at the address of `value`, which is a C int and lives to the end of the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length)
    };
    nix::errno::Errno::result(result).map(drop)
}

/// The descriptors that a service manager has opened for this process; the first caller gets them.
pub(crate) fn inherited_descriptors() -> std::io::Result<Vec<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let descriptors = sd_notify::listen_fds()?;
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    // SAFETY: the service manager opened these for this process alone (it checks LISTEN_PID), the
    // call above has found each of them open, and the flag sees to it that they get one owner.
    Ok(descriptors.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}
