//! The system calls that have no safe wrapper. The only file with `unsafe`.

#![expect(unsafe_code, reason = "a foreign descriptor is a bare number, and an ioctl has no type")]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The descriptor of a TUN device, bound to the life of the device.
pub(crate) fn tun_fd(device: &tun::Device) -> BorrowedFd<'_> {
    // SAFETY: the device owns the descriptor and closes it only when it is dropped, which the
    // lifetime of the returned borrow forbids for as long as the borrow is in use.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// Major and minor number of `/dev/net/tun`, the same on every Linux.
const TUN_DEVICE: (libc::c_uint, libc::c_uint) = (10, 200);

mod ioctl {
    // TUNSETOFFLOAD of linux/if_tun.h, whose argument is the mask itself and no pointer.
    nix::ioctl_write_int_bad!(tun_set_offload, nix::request_code_write!(b'T', 208, 4));
    // TUNGETIFF, which says that it writes an int, and writes an ifreq.
    nix::ioctl_read_bad!(tun_get_iff, nix::request_code_read!(b'T', 210, 4), libc::ifreq);
}

/// Tells the kernel which packets it may hand over unfinished or uncut.
pub(crate) fn tun_set_offload(device: &impl AsFd, mask: libc::c_uint) -> nix::Result<()> {
    let mask = libc::c_int::try_from(mask).map_err(|_| nix::errno::Errno::EINVAL)?;
    // SAFETY: the descriptor is open for as long as the borrow; the argument is a number, so the
    // kernel touches no memory of ours; a mask that it does not know is refused with an error.
    unsafe { ioctl::tun_set_offload(device.as_fd().as_raw_fd(), mask) }.map(drop)
}

/// Name and flags (`IFF_TUN`, ...) of the interface that this descriptor holds.
///
/// # Errors
/// What is no TUN device, or one whose interface is gone.
pub(crate) fn tun_interface(device: &impl AsFd) -> nix::Result<(String, libc::c_int)> {
    let file = nix::sys::stat::fstat(device)?;
    let is_device = file.st_mode & libc::S_IFMT == libc::S_IFCHR;
    if !is_device || file.st_rdev != libc::makedev(TUN_DEVICE.0, TUN_DEVICE.1) {
        return Err(nix::errno::Errno::ENOTTY);
    }
    // SAFETY: an ifreq is bytes, numbers and pointers, and all zeros are a value of each.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open for as long as the borrow; the kernel writes one ifreq, which
    // `request` is and which outlives the call. No other driver is asked, to which the number could
    // mean something else.
    unsafe { ioctl::tun_get_iff(device.as_fd().as_raw_fd(), &raw mut request) }?;
    // SAFETY: the kernel ends the name with a zero inside of the array, and it was zeroed before.
    let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
    // SAFETY: TUNGETIFF fills this member of the union; as a number any bytes are a value of it.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    // They are 16 bits, the highest of which is no sign.
    Ok((name.to_string_lossy().into_owned(), libc::c_int::from(flags.cast_unsigned())))
}

/// Has the calling thread run before all threads of ordinary programs, or with them as usual. What
/// it starts runs as usual.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE` and without a limit that allows it (`RLIMIT_RTPRIO`).
pub(crate) fn run_ahead(ahead: bool) -> nix::Result<()> {
    // The lowest of the real-time priorities. As system calls, for the musl library has none of them.
    let (policy, priority): (libc::c_int, libc::c_int) =
        if ahead { (libc::SCHED_RR, 1) } else { (libc::SCHED_OTHER, 0) };
    let policy = policy | libc::SCHED_RESET_ON_FORK;
    // SAFETY: thread 0 is the calling one; the kernel reads one `struct sched_param`, a C int, at the
    // address of `priority`, which lives to the end of the call.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const priority) };
    nix::errno::Errno::result(result).map(drop)
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
    let is_allowed = fragments == Fragments::Allowed;
    let discover = if is_allowed { libc::IP_PMTUDISC_DONT } else { libc::IP_PMTUDISC_PROBE };
    // An IPv6 socket may be one for both families.
    set_number(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, discover)?;
    if ipv6 {
        let discover =
            if is_allowed { libc::IPV6_PMTUDISC_DONT } else { libc::IPV6_PMTUDISC_PROBE };
        set_number(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, discover)?;
        // Two options where IPv4 has one: PROBE alone cuts what is longer than our own link, and with
        // this nothing is cut, whatever the other one says; RFC 3542 section 11.2.
        set_number(socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, (!is_allowed).into())?;
    }
    Ok(())
}

/// Sets an option of `socket` that is a C int.
fn set_number(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> nix::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open for as long as the borrow of the socket; the kernel reads
    // `length` bytes at the address of `value`, which is a C int and lives to the end of the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length)
    };
    nix::errno::Errno::result(result).map(drop)
}

/// How much of what came for `socket` the kernel has thrown away since it was opened, as its receive
/// buffer was full or the checksum wrong: SO_MEMINFO, socket(7). A train counts once; the number wraps.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 4.12.
pub(crate) fn receive_drops(socket: &impl AsFd) -> nix::Result<u32> {
    const DROPS: usize = libc::SK_MEMINFO_DROPS as usize;
    // Older kernels have fewer numbers, but all have this one.
    let mut numbers = [0u32; DROPS + 1];
    let mut length = size_of_val(&numbers) as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open for as long as the borrow; the kernel writes at most `length`
    // bytes to `numbers`, which is so long and for which any bytes are values, and one length.
    let result = unsafe {
        let to = numbers.as_mut_ptr().cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, to, &raw mut length)
    };
    nix::errno::Errno::result(result)?;
    Ok(numbers[DROPS])
}

/// The descriptors that a service manager has opened for this process, and its names for them; the
/// first caller gets them.
pub(crate) fn inherited_descriptors() -> std::io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let descriptors = sd_notify::listen_fds_with_names()?;
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    // SAFETY: the service manager opened these for this process alone (it checks LISTEN_PID), the
    // call above has found each of them open, and the flag sees to it that they get one owner.
    Ok(descriptors.map(|(number, name)| (name, unsafe { OwnedFd::from_raw_fd(number) })).collect())
}
