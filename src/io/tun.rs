//! A kernel TUN device: whole IP packets in and out of one network interface.
//!
//! With offloads, every packet has a virtio header in front, and what is read may be a super-packet
//! or lack its checksum: [`crate::dataplane::offload`] makes packets of it.
//!
//! Sets no address, route or MTU and brings nothing up: that is netlink's business ([`super::os`]).
//! Reads and writes never block, so that a poll(2) thread and a tokio `AsyncFd` can both drive it.
//! The interface disappears with its last descriptor: when the value is dropped, unless somebody
//! else keeps a copy ([`super::service`]).

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::sys;
use crate::dataplane::Frame;
use crate::dataplane::offload::{MergeKinds, SegmentationKind, VIRTIO_HEADER_LEN};

/// Checksums, TCP in both families, and TCP with ECN.
const TSO: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// UDP in both families, since Linux 6.2.
const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
/// The flags that tell what is read and written.
const KIND_FLAGS: libc::c_int =
    libc::IFF_TUN | libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
/// Pieces of one write: more than a train has.
const MAX_PIECES: usize = 80;

/// What kind of device to open.
#[derive(Debug, Clone)]
pub struct TunOptions {
    name: String,
    offloads: bool,
}

impl TunOptions {
    /// A device called `name`, one plain IP packet per read and write.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), offloads: false }
    }

    /// Asks for all offloads that the kernel has.
    #[must_use]
    pub fn with_offloads(mut self, wanted: bool) -> Self {
        self.offloads = wanted;
        self
    }
}

/// An open TUN device.
pub struct Tun {
    device: OwnedFd,
    name: String,
    index: u32,
    has_headers: bool,
    /// Offloads were asked for, whether or not the kernel has them.
    wants_offloads: bool,
    /// Made by somebody else, and there without a descriptor.
    is_persistent: bool,
    tso: AtomicBool,
    uso: AtomicBool,
}

impl Tun {
    /// Creates the interface in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Tells apart what a person can do about it: a bad or taken name, a missing `/dev/net/tun`, a
    /// missing permission.
    pub fn open(options: &TunOptions) -> Result<Self, TunError> {
        let name = options.name.as_str();
        check_name(name)?;
        let (device, kinds) = if options.offloads {
            match open_with_offloads(name) {
                Some(opened) => opened,
                None => (open_device(name, false)?, None),
            }
        } else {
            (open_device(name, false)?, None)
        };
        let failed = |errno: Errno| TunError::Open { name: name.to_owned(), source: errno.into() };
        let (_, flags) = sys::tun_interface(&device).map_err(failed)?;
        let opened = Self::of(device, name.to_owned(), kinds, flags).map_err(failed)?;
        Ok(Self { wants_offloads: options.offloads, ..opened })
    }

    /// Takes over a device that an earlier process has opened.
    ///
    /// # Errors
    /// What is no device of this module's kind, or one whose interface is gone.
    pub fn from_descriptor(device: OwnedFd) -> io::Result<Self> {
        let (name, flags) = sys::tun_interface(&device)?;
        if flags & KIND_FLAGS & !libc::IFF_VNET_HDR != libc::IFF_TUN | libc::IFF_NO_PI {
            return Err(Errno::EMEDIUMTYPE.into());
        }
        let kinds = (flags & libc::IFF_VNET_HDR != 0).then(|| set_offloads(&device, &name));
        Ok(Self::of(device, name, kinds, flags)?)
    }

    fn of(
        device: OwnedFd,
        name: String,
        kinds: Option<MergeKinds>,
        interface_flags: libc::c_int,
    ) -> nix::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&device, FcntlArg::F_GETFL)?);
        fcntl(&device, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let index = nix::net::if_::if_nametoindex(name.as_str())?;
        let MergeKinds { tcp, udp } = kinds.unwrap_or_default();
        Ok(Self {
            device,
            name,
            index,
            has_headers: kinds.is_some(),
            wants_offloads: kinds.is_some(),
            is_persistent: interface_flags & libc::IFF_PERSIST != 0,
            tso: AtomicBool::new(tcp),
            uso: AtomicBool::new(udp),
        })
    }

    /// Whether [`Self::open`] would make the same.
    pub fn is(&self, options: &TunOptions) -> bool {
        self.name == options.name && self.wants_offloads == options.offloads
    }

    /// Whether somebody has made the interface before and for longer (`ip tuntap add`).
    pub fn is_persistent(&self) -> bool {
        self.is_persistent
    }

    /// The interface name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface index, valid in the namespace where the device was opened.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whether every packet read and written has a virtio header in front.
    pub fn has_headers(&self) -> bool {
        self.has_headers
    }

    /// What may be written as trains.
    pub fn trains(&self) -> MergeKinds {
        MergeKinds { tcp: self.tso.load(Ordering::Relaxed), udp: self.uso.load(Ordering::Relaxed) }
    }

    /// Reads one packet; a packet longer than `buffer` is cut.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(self, buffer)?)
    }

    /// Writes one whole packet.
    ///
    /// # Errors
    /// `EINVAL` for bytes that are no IP packet, `EIO` while the interface is down.
    pub fn write(&self, packet: &[u8]) -> io::Result<usize> {
        Ok(nix::unistd::write(self, packet)?)
    }

    /// Writes a packet or a train, with a header where the device wants one. A kernel that refuses
    /// a train gets its packets singly, and no trains of that kind from there on. Returns how many
    /// packets were lost.
    pub fn write_frame(&self, frame: &Frame<'_>) -> usize {
        self.write_frame_by(frame, |pieces| nix::sys::uio::writev(self, pieces))
    }

    /// Writes one whole packet, with a header where the device wants one.
    ///
    /// # Errors
    /// Those of [`Self::write`].
    pub fn write_packet(&self, packet: &[u8]) -> io::Result<()> {
        Ok(self.write_packet_by(packet, |pieces| nix::sys::uio::writev(self, pieces))?)
    }

    /// A device whose packets a test reads at the other end.
    #[cfg(test)]
    pub(crate) fn over(device: OwnedFd) -> Self {
        Self::of(device, "lo".into(), None, 0).unwrap()
    }

    fn write_frame_by(
        &self,
        frame: &Frame<'_>,
        write: impl Fn(&[IoSlice<'_>]) -> nix::Result<usize>,
    ) -> usize {
        let is_lost = |packet: &&[u8]| self.write_packet_by(packet, &write).is_err();
        if !self.has_headers || !frame.is_train() {
            return frame.packets().filter(is_lost).count();
        }
        let mut slices = [IoSlice::new(&[]); MAX_PIECES];
        let pieces = std::iter::once(frame.head()).chain(frame.pieces());
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(piece);
            count += 1;
        }
        let packets = frame.packets().count();
        match write(&slices[..count]) {
            Ok(_) => 0,
            Err(Errno::EINVAL) => {
                let lost = frame.packets().filter(is_lost).count();
                if lost == packets {
                    return lost;
                }
                let udp = frame.kind() == Some(SegmentationKind::Udp);
                let switch = if udp { &self.uso } else { &self.tso };
                switch.store(false, Ordering::Relaxed);
                tracing::warn!(
                    interface = self.name,
                    udp,
                    "the kernel takes no trains, going on \
                    without"
                );
                lost
            }
            Err(_) => packets,
        }
    }

    fn write_packet_by(
        &self,
        packet: &[u8],
        write: impl Fn(&[IoSlice<'_>]) -> nix::Result<usize>,
    ) -> nix::Result<()> {
        let pieces = [IoSlice::new(&[0; VIRTIO_HEADER_LEN]), IoSlice::new(packet)];
        write(&pieces[usize::from(!self.has_headers)..]).map(drop)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl AsRawFd for Tun {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl std::fmt::Debug for Tun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tun").field("name", &self.name).field("index", &self.index).finish()
    }
}

/// Why there is no TUN device.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// Linux would not take this as an interface name.
    #[error("{name:?} is not an interface name: 1 to 15 bytes without '/', ':', '%' or spaces")]
    InvalidName {
        /// The name that was asked for.
        name: String,
    },
    /// Another interface, or another program's TUN, has the name.
    #[error("interface name {name} is taken")]
    NameTaken {
        /// The name that was asked for.
        name: String,
    },
    /// The kernel has no TUN driver here, or the container did not get the device.
    #[error("/dev/net/tun is missing or has no driver")]
    NoDevice,
    /// The process may not open the device or create interfaces.
    #[error("no permission to create interface {name}: needs CAP_NET_ADMIN and /dev/net/tun")]
    NoPermission {
        /// The name that was asked for.
        name: String,
    },
    /// Anything else the kernel said.
    #[error("cannot create interface {name}")]
    Open {
        /// The name that was asked for.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl TunError {
    /// What a person can do about it.
    pub fn help(&self) -> &'static str {
        match self {
            Self::InvalidName { .. } | Self::NameTaken { .. } => "choose another --interface",
            Self::NoDevice => {
                "load the driver (sudo modprobe tun); in a container pass the device \
                 (docker run --device /dev/net/tun)"
            }
            Self::NoPermission { .. } => "run it with sudo; in a container add --cap-add NET_ADMIN",
            Self::Open { .. } => "see what the kernel says about it: sudo dmesg | tail",
        }
    }
}

fn open_device(name: &str, headers: bool) -> Result<OwnedFd, TunError> {
    let mut config = tun::Configuration::default();
    config.tun_name(name).platform_config(|platform| {
        // Not about privileges: it keeps the crate from setting addresses, MTU and flags.
        platform.ensure_root_privileges(false).vnet_hdr(headers);
    });
    let device = tun::Device::new(&config).map_err(|source| open_error(name, source.into()))?;
    // Of all that the crate has to offer, the descriptor is what is needed.
    sys::tun_fd(&device).try_clone_to_owned().map_err(|source| open_error(name, source))
}

/// None when the kernel has none of it; what else is wrong, opening without will tell.
fn open_with_offloads(name: &str) -> Option<(OwnedFd, Option<MergeKinds>)> {
    let device = open_device(name, true).ok()?;
    let kinds = set_offloads(&device, name);
    Some((device, Some(kinds)))
}

fn set_offloads(device: &OwnedFd, name: &str) -> MergeKinds {
    if sys::tun_set_offload(device, TSO | USO).is_ok() {
        MergeKinds { tcp: true, udp: true }
    } else if sys::tun_set_offload(device, TSO).is_ok() {
        MergeKinds { tcp: true, udp: false }
    } else {
        tracing::info!(interface = name, "the kernel has no segmentation offload");
        MergeKinds::default()
    }
}

/// Whether Linux takes this as the name of an interface.
///
/// # Errors
/// [`TunError::InvalidName`].
pub fn check_name(name: &str) -> Result<(), TunError> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len());
    let plain = name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if fits && plain && name != "." && name != ".." {
        return Ok(());
    }
    Err(TunError::InvalidName { name: name.to_owned() })
}

fn open_error(name: &str, source: io::Error) -> TunError {
    let name = name.to_owned();
    let Some(code) = source.raw_os_error() else {
        return TunError::Open { name, source };
    };
    match Errno::from_raw(code) {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => TunError::NoDevice,
        Errno::EPERM | Errno::EACCES => TunError::NoPermission { name },
        Errno::EBUSY => TunError::NameTaken { name },
        // An interface that is no TUN at all has the name.
        Errno::EINVAL if nix::net::if_::if_nametoindex(name.as_str()).is_ok() => {
            TunError::NameTaken { name }
        }
        _ => TunError::Open { name, source },
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::dataplane::TunBatch;
    use crate::dataplane::offload::{FrameHeader, Segmentation, Segments};

    #[test]
    fn names_that_linux_refuses_are_refused_before_the_kernel_is_asked() {
        for name in ["", ".", "..", "a/b", "a b", "eth0:1", "tun%d", "sixteen-bytes-xx"] {
            let error = Tun::open(&TunOptions::named(name)).unwrap_err();
            assert!(matches!(error, TunError::InvalidName { .. }), "{name:?} gave {error}");
        }
        assert!(check_name("fifteen-bytes-x").is_ok(), "15 bytes are the longest name");
    }

    #[test]
    fn what_is_no_tun_device_is_not_taken_for_one() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let file = tempfile::tempfile().unwrap();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for descriptor in [OwnedFd::from(null), file.into(), socket.into()] {
            let error = Tun::from_descriptor(descriptor).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        }
        // Opened, and of no interface; where the machine lets us.
        if let Ok(tun) = std::fs::File::options().read(true).write(true).open("/dev/net/tun") {
            let error = Tun::from_descriptor(tun.into()).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
        }
    }

    #[test]
    fn one_that_a_kernel_without_offloads_has_made_is_what_was_wanted() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let made = Tun::of(null.into(), "lo".into(), None, 0).unwrap();
        let made = Tun { wants_offloads: true, ..made };
        let wanted = TunOptions::named("lo");
        assert!(!made.has_headers() && made.is(&wanted.clone().with_offloads(true)));
        assert!(!made.is(&wanted), "with and without are two kinds where the kernel has both");
    }

    /// A device that nothing is written to, since the tests say what the kernel answers.
    fn unwritten(kinds: Option<MergeKinds>) -> Tun {
        let null = std::fs::File::open("/dev/null").unwrap();
        Tun::of(null.into(), "lo".into(), kinds, 0).unwrap()
    }

    /// Five datagrams of one flow, as one train if `kinds` has it.
    fn five_datagrams(kinds: MergeKinds) -> TunBatch {
        let segmentation = Some(Segmentation { kind: SegmentationKind::Udp, size: 100 });
        let header = FrameHeader { checksum: Some((20, 6)), segmentation, header_len: 28 };
        let mut packet = vec![0x45, 0, 0x02, 0x10, 0, 0, 0, 0, 64, 17, 0, 0, 10, 77, 0, 1, 10, 77];
        packet.extend([0, 2, 0, 80, 1, 187, 0x01, 0xfc, 0, 0]);
        packet.extend([7; 500]);
        let mut segments = Segments::new(&header, &mut packet).unwrap();
        let mut batch = TunBatch::default();
        batch.clear(kinds);
        while let Some(segment) = segments.next_segment() {
            let pushed: Result<(), ()> = batch.push(segment.len(), |room| {
                room.copy_from_slice(segment);
                Ok(segment.len())
            });
            pushed.unwrap();
        }
        batch.finish();
        batch
    }

    #[test]
    fn of_a_train_that_is_refused_every_packet_is_tried_and_the_lost_ones_are_counted() {
        let both = MergeKinds { tcp: true, udp: true };
        let batch = five_datagrams(both);
        let frames: Vec<_> = batch.frames().collect();
        assert_eq!((frames.len(), frames[0].kind()), (1, Some(SegmentationKind::Udp)));
        for (bad, lost, udp) in [
            (vec![], 0, false),
            (vec![0], 1, false),
            (vec![1, 3], 2, false),
            (vec![0, 1, 2, 3, 4], 5, true),
        ] {
            let (tun, singly) = (unwritten(Some(both)), Cell::new(0));
            let write = |pieces: &[IoSlice<'_>]| {
                if pieces.len() != 2 {
                    return Err(Errno::EINVAL);
                }
                assert_eq!((pieces[0].len(), pieces[1].len()), (VIRTIO_HEADER_LEN, 128));
                let number = singly.replace(singly.get() + 1);
                if bad.contains(&number) { Err(Errno::ENOBUFS) } else { Ok(138) }
            };
            assert_eq!(tun.write_frame_by(&frames[0], write), lost, "{bad:?}");
            assert_eq!(singly.get(), 5, "{bad:?}");
            assert_eq!(tun.trains(), MergeKinds { tcp: true, udp }, "{bad:?}");
        }
        let tun = unwritten(Some(both));
        assert_eq!(tun.write_frame_by(&frames[0], |_| Err(Errno::EIO)), 5, "it is down");
        assert_eq!(tun.trains(), both);
    }

    #[test]
    fn a_device_without_headers_loses_what_it_refuses_and_no_more() {
        let batch = five_datagrams(MergeKinds { tcp: true, udp: true });
        let frame = batch.frames().next().unwrap();
        let (tun, number) = (unwritten(None), Cell::new(0));
        let write = |pieces: &[IoSlice<'_>]| {
            assert_eq!((pieces.len(), pieces[0].len()), (1, 128));
            let is_first = number.replace(number.get() + 1) == 0;
            if is_first { Err(Errno::EINVAL) } else { Ok(128) }
        };
        assert_eq!((tun.write_frame_by(&frame, write), number.get()), (1, 5));
    }

    #[test]
    fn kernel_answers_become_facts_that_a_person_can_act_on() {
        let error = |errno: Errno| open_error("overlay-none", errno.into());
        assert!(matches!(error(Errno::ENOENT), TunError::NoDevice), "the file is missing");
        assert!(matches!(error(Errno::ENODEV), TunError::NoDevice), "the driver is missing");
        assert!(matches!(error(Errno::EPERM), TunError::NoPermission { .. }), "no capability");
        assert!(matches!(error(Errno::EBUSY), TunError::NameTaken { .. }), "a TUN in use");
        assert!(matches!(error(Errno::EINVAL), TunError::Open { .. }), "no such interface exists");
        let loopback = open_error("lo", Errno::EINVAL.into());
        assert!(matches!(loopback, TunError::NameTaken { .. }), "lo is no TUN");
    }
}
