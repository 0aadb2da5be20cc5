//! Cutting and merging, held against the kernel's own: what it cuts, and what it makes of our trains.
//!
//! Two TUN devices in a namespace of the test's own, one with offloads and one without, and the
//! kernel forwards from the first to the second: it has to cut every train in software. What comes out
//! of the second is what a receiver would see.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test stops at the first surprise and prints to people"
)]

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Completion, Trial};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Uid;
use overlay::dataplane::TunBatch;
use overlay::dataplane::offload::{
    FrameHeader, MergeKinds, Segmentation, SegmentationKind, Segments,
};
use overlay::io::tun::{Tun, TunOptions};
use overlay::io::udp::{RecvBuffers, UdpSocket, has_route};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Set in the process that is inside the namespace.
const INSIDE: &str = "OVERLAY_KERNEL_TEST_INSIDE";
/// `OVERLAY_TEST_FULL=1` makes so many times more cases.
const FULL: u32 = 40;
const CASES: u32 = 200;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list || env::var_os(INSIDE).is_some() {
        return run(&arguments, None);
    }
    let inside = || {
        let mut command = Command::new("unshare");
        if !Uid::effective().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.arg("--net");
        command
    };
    let trial = inside().args(["ip", "tuntap", "add", "dev", "t", "mode", "tun"]).output();
    match trial {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return run(&arguments, Some(reason));
        }
        Err(error) => return run(&arguments, Some(error.to_string())),
    }
    let program = env::current_exe().unwrap();
    let status =
        inside().arg(program).args(env::args_os().skip(1)).env(INSIDE, "1").status().unwrap();
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn run(arguments: &Arguments, missing: Option<String>) -> ExitCode {
    let test = |name: &str, run: fn()| {
        let missing = missing.clone();
        Trial::ignorable_test(name, move || match missing {
            Some(reason) => {
                eprintln!("no namespace with a TUN device can be made here: {reason}");
                Ok(Completion::ignored_with(reason))
            }
            None => {
                run();
                Ok(Completion::Completed)
            }
        })
    };
    let trials = vec![
        test("the_kernel_cuts_a_super_packet_as_we_do", cut_alike),
        test("the_kernel_makes_of_our_trains_what_came_in", merged_and_cut),
        test("what_the_link_does_not_take_leaves_in_fragments_or_not_at_all", fragments),
        test("a_destination_without_a_route_is_known", routes),
        test("a_socket_that_stays_full_is_waited_for_once_and_not_for_each", full_socket),
    ];
    // Each has the two devices for itself.
    let arguments = Arguments { test_threads: Some(1), ..arguments.clone() };
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "{words}: {output:?}");
}

/// The way through the kernel.
struct Kernel {
    entry: Tun,
    exit: Tun,
    /// Everything that the kernel itself says in between is for somebody else.
    buffer: Vec<u8>,
}

impl Kernel {
    fn open() -> Self {
        let entry = Tun::open(&TunOptions::named("entry").with_offloads(true)).unwrap();
        let exit = Tun::open(&TunOptions::named("exit")).unwrap();
        assert!(entry.trains().tcp && entry.trains().udp, "a kernel with all offloads");
        for words in [
            "addr add 10.1.0.1/24 dev entry",
            "-6 addr add fd01::1/64 dev entry nodad",
            "link set entry up",
            "link set exit mtu 9000 txqueuelen 1000 up",
            "route add 10.2.0.0/24 dev exit",
            "-6 route add fd02::/64 dev exit",
        ] {
            ip(words);
        }
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/entry/rp_filter", "0"),
        ] {
            fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
        }
        Self { entry, exit, buffer: vec![0; 70_000] }
    }

    /// What comes out until `count` packets have, or nothing more does.
    fn packets(&mut self, count: usize) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        while packets.len() < count {
            let Ok(len) = self.exit.read(&mut self.buffer) else {
                let mut fds = [PollFd::new(self.exit.as_fd(), PollFlags::POLLIN)];
                if poll(&mut fds, 500u16) == Ok(0) {
                    break;
                }
                continue;
            };
            let packet = &self.buffer[..len];
            if is_ours(packet) {
                packets.push(one_zero(packet.to_vec()));
            }
        }
        packets
    }
}

fn is_ours(packet: &[u8]) -> bool {
    match packet[0] >> 4 {
        4 => packet[16..20] == [10, 2, 0, 2],
        _ => packet[24..26] == [0xfd, 2],
    }
}

/// Zero has two forms in the sum of RFC 1071. The kernel writes the one and we the other, which UDP
/// needs (RFC 768) and TCP takes as well.
fn one_zero(mut packet: Vec<u8>) -> Vec<u8> {
    let v4 = packet[0] >> 4 == 4;
    let (protocol, start) = if v4 { (packet[9], 20) } else { (packet[6], 40) };
    if protocol == 6 && packet[start + 16..start + 18] == [0xff, 0xff] {
        packet[start + 16..start + 18].fill(0);
    }
    packet
}

/// What a router makes of a packet.
fn forwarded(packet: Vec<u8>) -> Vec<u8> {
    let mut packet = one_zero(packet);
    if packet[0] >> 4 == 6 {
        packet[7] -= 1;
        return packet;
    }
    packet[8] -= 1;
    packet[10..12].fill(0);
    let header = usize::from(packet[0] & 15) * 4;
    let sum = !folded(&packet[..header]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The sum of RFC 1071, not inverted.
fn folded(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or_default()]))
    });
    let sum = words.fold(0, |sum: u32, word| {
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    });
    u16::try_from(sum).unwrap()
}

#[derive(Debug, Clone)]
struct Spec {
    v6: bool,
    tcp: bool,
    port: u16,
    seq: u32,
    id: u16,
    flags: u8,
    tos: u8,
    stamps: bool,
    payload: usize,
    fill: u8,
}

impl Spec {
    fn headers(&self) -> usize {
        let transport = if self.tcp { 20 + if self.stamps { 12 } else { 0 } } else { 8 };
        transport + if self.v6 { 40 } else { 20 }
    }

    fn checksum_at(&self) -> (usize, usize) {
        (if self.v6 { 40 } else { 20 }, if self.tcp { 16 } else { 6 })
    }

    /// The packet; without `finished` its checksum covers the pseudo-header only, as the kernel
    /// leaves it to a device.
    fn build(&self, finished: bool) -> Vec<u8> {
        let mut transport = [self.port.to_be_bytes(), 443u16.to_be_bytes()].concat();
        if self.tcp {
            transport.extend(self.seq.to_be_bytes());
            transport.extend(77u32.to_be_bytes());
            let words = if self.stamps { 8 } else { 5 };
            transport.extend([words << 4, self.flags, 1, 2, 0, 0, 0, 0]);
            if self.stamps {
                transport.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
            }
        } else {
            transport.extend(u16::try_from(8 + self.payload).unwrap().to_be_bytes());
            transport.extend([0, 0]);
        }
        let content = |at: usize| (at * 7 + usize::from(self.fill)) % 251;
        transport.extend((0..self.payload).map(|at| u8::try_from(content(at)).unwrap()));
        let (length, protocol) = (transport.len(), if self.tcp { 6 } else { 17 });
        let mut packet = Vec::new();
        if self.v6 {
            packet.extend([0x60 | (self.tos >> 4), self.tos << 4, 1, 2]);
            packet.extend(u16::try_from(length).unwrap().to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend([0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
            packet.extend([0xfd, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        } else {
            packet.extend([0x45, self.tos]);
            packet.extend(u16::try_from(20 + length).unwrap().to_be_bytes());
            packet.extend(self.id.to_be_bytes());
            packet.extend([0x40, 0, 64, protocol, 0, 0, 10, 1, 0, 2, 10, 2, 0, 2]);
            let sum = !folded(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        let mut pseudo = packet[if self.v6 { 8..40 } else { 12..20 }].to_vec();
        pseudo.extend([0, protocol]);
        pseudo.extend(u16::try_from(length).unwrap().to_be_bytes());
        let sum = if finished {
            pseudo.extend(&transport);
            match !folded(&pseudo) {
                0 => u16::MAX,
                sum => sum,
            }
        } else {
            folded(&pseudo)
        };
        let (start, field) = self.checksum_at();
        packet.extend(transport);
        packet[start + field..start + field + 2].copy_from_slice(&sum.to_be_bytes());
        packet
    }
}

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;
const ECE: u8 = 0x40;

fn cases() -> TestRunner {
    let full = env::var_os("OVERLAY_TEST_FULL").is_some_and(|value| value == "1");
    let cases = CASES * if full { FULL } else { 1 };
    let mut config = Config::with_cases(cases);
    // A failing case is printed; there is no file beside this one.
    config.failure_persistence = None;
    TestRunner::new(config)
}

fn any_super_packet() -> impl Strategy<Value = (Spec, u16)> {
    let flags = proptest::sample::subsequence(vec![PSH, FIN, CWR, ECE], 0..4)
        .prop_map(|flags| flags.iter().fold(ACK, |all, flag| all | flag));
    // Two segments at the least: one that claims to be a train is none, and the kernel may drop it.
    let shape = (any::<bool>(), any::<bool>(), any::<bool>(), 1u16..=1_448, 2usize..=60);
    let numbers = (any::<u32>(), any::<u16>(), flags, any::<u8>(), any::<u8>(), 0.0..1.0f64);
    (shape, numbers).prop_map(
        |((v6, tcp, stamps, size, count), (seq, id, flags, tos, fill, cut))| {
            // The last segment has one byte at the least, and the whole fits into an IP packet.
            let most = 65_535 - 80;
            let last = 1 + (f64::from(size - 1) * cut) as usize;
            let payload = ((count - 1) * usize::from(size) + last).min(most);
            (Spec { v6, tcp, port: 5, seq, id, flags, tos, stamps, payload, fill }, size)
        },
    )
}

fn cut_alike() {
    let mut kernel = Kernel::open();
    let kernel = std::cell::RefCell::new(&mut kernel);
    let result = cases().run(&any_super_packet(), |(spec, size)| {
        let kind = match (spec.tcp, spec.v6) {
            (false, _) => SegmentationKind::Udp,
            (true, false) => SegmentationKind::TcpV4,
            (true, true) => SegmentationKind::TcpV6,
        };
        let (start, field) = spec.checksum_at();
        let header = FrameHeader {
            checksum: Some((u16::try_from(start).unwrap(), u16::try_from(field).unwrap())),
            segmentation: Some(Segmentation { kind, size }),
            header_len: u16::try_from(spec.headers()).unwrap(),
        };
        let mut frame = [header.encode().as_slice(), &spec.build(false)].concat();
        kernel.borrow().entry.write(&frame).unwrap();
        let (header, packet) = FrameHeader::parse(&mut frame).unwrap();
        let mut segments = Segments::new(&header, packet).unwrap();
        let mut ours = Vec::new();
        while let Some(segment) = segments.next_segment() {
            ours.push(forwarded(segment.to_vec()));
        }
        let theirs = kernel.borrow_mut().packets(ours.len());
        prop_assert_eq!(theirs.len(), ours.len(), "packets of {:?} by {}", spec, size);
        for (number, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
            let headers = spec.headers();
            let what = format!("packet {number} of {spec:?} by {size}");
            prop_assert_eq!(&theirs[..headers], &ours[..headers], "{}", what);
            prop_assert!(theirs == ours, "the payload of {}", what);
        }
        Ok(())
    });
    result.unwrap();
}

fn any_row() -> impl Strategy<Value = Vec<Spec>> {
    let sizes = prop_oneof![4 => Just(100usize), 1 => 0usize..200, 1 => Just(1_400usize)];
    let flags = prop_oneof![12 => Just(ACK), 2 => Just(ACK | PSH), 1 => Just(ACK | FIN),
        1 => Just(ACK | CWR), 1 => Just(ACK | ECE)];
    let tos = prop_oneof![9 => Just(0u8), 1 => any::<u8>()];
    let one = (any::<bool>(), any::<bool>(), 0u16..2, sizes, flags, tos, 0u8..40);
    let families = (any::<bool>(), any::<bool>());
    (families, proptest::collection::vec(one, 1..80)).prop_map(
        |((one_family, v6_only), packets)| {
            let mut next: BTreeMap<(bool, bool, u16), (u32, u16)> = BTreeMap::new();
            let mut specs = Vec::new();
            for (v6, tcp, port, payload, flags, tos, fill) in packets {
                let v6 = if one_family { v6_only } else { v6 };
                let start = (u32::MAX - 3_000, u16::MAX - 20);
                let (seq, id) = next.entry((v6, tcp, port)).or_insert(start);
                // Now and then a hole in the numbers.
                *seq = seq.wrapping_add(u32::from(fill == 0));
                let stamps = true;
                specs.push(Spec {
                    v6,
                    tcp,
                    port,
                    seq: *seq,
                    id: *id,
                    flags,
                    tos,
                    stamps,
                    payload,
                    fill,
                });
                *seq = seq.wrapping_add(u32::try_from(payload).unwrap());
                *id = id.wrapping_add(u16::from(fill != 1));
            }
            specs
        },
    )
}

fn by_flow(packets: impl IntoIterator<Item = Vec<u8>>) -> BTreeMap<Vec<u8>, Vec<Vec<u8>>> {
    let mut flows: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for packet in packets {
        let v4 = packet[0] >> 4 == 4;
        let (protocol, ports) = if v4 { (packet[9], 20..24) } else { (packet[6], 40..44) };
        let flow = [&[packet[0] >> 4, protocol], &packet[ports]].concat();
        flows.entry(flow).or_default().push(packet);
    }
    flows
}

fn merged_and_cut() {
    let mut kernel = Kernel::open();
    let kernel = std::cell::RefCell::new(&mut kernel);
    let trains = std::cell::Cell::new(0u32);
    let result = cases().run(&any_row(), |specs| {
        let mut batch = TunBatch::default();
        batch.clear(MergeKinds { tcp: true, udp: true });
        let packets: Vec<Vec<u8>> = specs
            .iter()
            .map(|spec| {
                let mut packet = spec.build(true);
                // A damaged payload is the receiver's to find, and goes through as it is.
                if spec.fill == 2 && spec.payload > 0 {
                    *packet.last_mut().unwrap() ^= 0x40;
                }
                packet
            })
            .collect();
        for packet in &packets {
            let pushed: Result<(), ()> = batch.push(packet.len(), |room| {
                room.copy_from_slice(packet);
                Ok(packet.len())
            });
            pushed.unwrap();
        }
        batch.finish();
        for frame in batch.frames() {
            trains.set(trains.get() + u32::from(frame.is_train()));
            assert_eq!(kernel.borrow().entry.write_frame(&frame), 0);
        }
        let came = kernel.borrow_mut().packets(packets.len());
        let went: Vec<Vec<u8>> = packets.into_iter().map(forwarded).collect();
        prop_assert_eq!(came.len(), went.len());
        prop_assert!(by_flow(came) == by_flow(went), "every flow as it was: {:?}", specs);
        Ok(())
    });
    result.unwrap();
    assert!(kernel.borrow().entry.trains() == MergeKinds { tcp: true, udp: true }, "none refused");
    assert!(trains.get() > CASES, "{} trains", trains.get());
}

/// A full packet of the overlay, sealed, on a link that takes less.
fn fragments() {
    ip("link set lo mtu 1280 up");
    for any in ["127.0.0.1:0", "[::1]:0"] {
        let [sender, receiver] = [(); 2].map(|()| UdpSocket::bind(any.parse().unwrap()).unwrap());
        let to = receiver.local_addr().unwrap();
        let too_long = sender.send_whole(to, &[1; 1_312]).unwrap_err();
        assert_eq!(too_long.raw_os_error(), Some(libc::EMSGSIZE), "{any}");
        for (mark, len) in [(2, 1_312), (3, 3_000)] {
            let sent = sender.send(to, None, &vec![mark; len], 1_312);
            assert_eq!((sent.done, sent.lost), (len, 0), "{:?}", sent.error);
        }
        assert!(sender.sends_trains(), "one was too long for this path");
        sender.send_whole(to, &[4; 1_200]).unwrap();
        assert_eq!(
            arrived(&receiver, 5),
            [(2, 1_312), (3, 1_312), (3, 1_312), (3, 376), (4, 1_200)]
        );
    }
    // One for both families, as `quinn-udp` leaves it.
    let socket = std::net::UdpSocket::bind("[::]:0").unwrap();
    quinn_udp::UdpSocketState::new((&socket).into()).unwrap();
    let ends = ["127.0.0.1:0", "[::1]:0"].map(|any| UdpSocket::bind(any.parse().unwrap()).unwrap());
    let to = ends.each_ref().map(|end| match end.local_addr().unwrap() {
        SocketAddr::V4(end) => (end.ip().to_ipv6_mapped(), end.port()).into(),
        end @ SocketAddr::V6(_) => end,
    });
    assert!(to.iter().all(|to| socket.send_to(&[5; 1_312], to).is_err()), "forbidden");
    overlay::io::udp::allow_fragments(&socket).unwrap();
    for (end, to) in ends.iter().zip(to) {
        assert_eq!(socket.send_to(&[6; 1_312], to).unwrap(), 1_312);
        assert_eq!(arrived(end, 1), [(6, 1_312)]);
    }
}

/// In this namespace there is no default route.
fn routes() {
    ip("link set lo up");
    let [ipv4, ipv6] = ["198.51.100.9:9", "[2001:db8:9::9]:9"].map(|at| at.parse().unwrap());
    assert!(!has_route(ipv4) && !has_route(ipv6));
    ip("route add 198.51.100.0/24 dev lo");
    ip("route add 2001:db8:9::/64 dev lo");
    assert!(has_route(ipv4) && has_route(ipv6));
    for kind in ["unreachable", "prohibit", "blackhole"] {
        ip(&format!("route add {kind} 198.51.100.9/32"));
        assert!(!has_route(ipv4), "{kind}");
        ip(&format!("route del {kind} 198.51.100.9/32"));
    }
}

/// Datagrams to a neighbour that does not answer wait in the kernel, and fill their socket.
fn full_socket() {
    for words in ["link add full0 type veth peer name full1", "addr add 10.3.0.1/24 dev full0"] {
        ip(words);
    }
    ip("link set full1 up");
    ip("link set full0 up");
    let socket = UdpSocket::bind("10.3.0.1:0".parse().unwrap()).unwrap();
    setsockopt(&socket, sockopt::SndBuf, &8_192).unwrap();
    let silent: SocketAddr = "10.3.0.2:9".parse().unwrap();
    let mut left = 0;
    while socket.send(silent, None, &[1; 1_312], 1_312).done > 0 {
        left += 1;
        assert!(left < 100, "it never fills");
    }
    let begun = overlay::io::clock::now();
    let lost: usize =
        (0..400).map(|_| socket.send_or_wait(silent, None, &[2; 5_000], 1_312).lost).sum();
    let took = begun.elapsed();
    // A wait for each would be two seconds; room for one may come when the kernel gives up a datagram.
    assert!(took.as_millis() < 1_000, "{took:?}");
    assert!(left > 0 && lost > 1_500, "{left} {lost}");
}

/// The first byte and the length of each datagram, once there are `count`.
fn arrived(receiver: &UdpSocket, count: usize) -> Vec<(u8, usize)> {
    let mut buffers = RecvBuffers::default();
    let mut got = Vec::new();
    while got.len() < count {
        let mut fds = [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 5_000u16), Ok(1), "nothing after {got:?}");
        receiver.receive(&mut buffers).unwrap();
        for train in buffers.trains() {
            got.extend(train.bytes.chunks(train.stride).map(|it| (it[0], it.len())));
        }
    }
    got
}
