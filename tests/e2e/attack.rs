//! Hostile packets: real ones are recorded and played back whole, cut, changed and blown up.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use crate::clock::{now, wait_for};
use crate::lab::Host;
use crate::probe::open_socket;

/// Records UDP payloads that arrive in a namespace for one port.
pub(crate) struct Recorder {
    socket: Socket,
    port: u16,
}

impl Recorder {
    pub(crate) fn open(host: &Host, port: u16) -> Self {
        let protocol = Protocol::from(i32::from(ETHERTYPE_IPV4.to_be()));
        let socket = host.ns.enter(|| Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)));
        let socket = socket.unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        Self { socket, port }
    }

    /// Collects the payloads since `open` and of `span` from now, one of each kind and size.
    pub(crate) fn record(&self, span: Duration) -> Vec<Vec<u8>> {
        let start = now();
        let mut payloads = Vec::new();
        let mut packet = [0; 2048];
        while start.elapsed() < span {
            let Ok(length) = (&self.socket).read(&mut packet) else { continue };
            if let Some(payload) = udp_payload(&packet[..length], self.port)
                && !payloads.iter().any(|known: &Vec<u8>| is_like(known, payload))
            {
                payloads.push(payload.to_vec());
            }
        }
        payloads
    }
}

/// The first byte tells protocols apart, the fifth kinds within one.
fn is_like(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.first() == b.first() && a.get(4) == b.get(4)
}

/// The payload of an IPv4 packet, if it is UDP for this port.
fn udp_payload(packet: &[u8], port: u16) -> Option<&[u8]> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let udp = packet.get(header..)?;
    let to = u16::from_be_bytes(udp.get(2..4)?.try_into().ok()?);
    (packet.get(9) == Some(&17) && to == port).then(|| udp.get(8..)).flatten()
}

/// Variations of recorded payloads that no honest sender makes, and some that are pure noise.
pub(crate) fn hostile_datagrams(recorded: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let mut all: Vec<Vec<u8>> = vec![Vec::new(), vec![0], vec![0xff; 65_507], vec![0; 65_507]];
    for length in [1, 4, 8, 31, 32, 64, 148, 1472, 9000] {
        all.extend((0..8).map(|_| noise.bytes(length)));
    }
    // Every first byte: whatever it is that tells the protocols of one port apart.
    for first in 0..=u8::MAX {
        let mut bytes = noise.bytes(96);
        bytes[0] = first;
        all.push(bytes);
    }
    for payload in recorded {
        all.push(payload.clone());
        all.extend(
            [1, 2, 3, 4, 7, 8, 9, 16, 33].map(|cut| payload[..payload.len().min(cut)].to_vec()),
        );
        all.push(payload[..payload.len().saturating_sub(1)].to_vec());
        // Each byte of the front: versions, kinds, lengths, and whom it is for.
        for at in 0..payload.len().min(64) {
            let mut changed = payload.clone();
            changed[at] ^= 1 << noise.below(8);
            all.push(changed);
        }
        let mut long = payload.clone();
        long.resize(65_507, 0x5a);
        all.push(long);
    }
    all
}

/// Sends one datagram from a port that no socket can be bound to.
pub(crate) fn send_from_port(host: &Host, port: u16, to: SocketAddr, payload: &[u8]) {
    let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP));
    let socket = host.ns.enter(raw).unwrap();
    let length = u16::try_from(8 + payload.len()).unwrap();
    let header = [port, to.port(), length, 0].map(u16::to_be_bytes).concat();
    socket.send_to(&[&header, payload].concat(), &to.into()).unwrap();
}

/// Sends every datagram from a new port of `host`, at a pace that a receiver's queue can hold:
/// what the kernel drops for want of room says nothing about the program.
pub(crate) fn flood(host: &Host, to: SocketAddr, datagrams: &[Vec<u8>]) {
    let socket = open_socket(host, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
    let mut queued_bytes = 0;
    for datagram in datagrams {
        // A refusal by ICMP shows at the next send, and is no reason to stop.
        let _ = socket.send_to(datagram, to);
        queued_bytes += datagram.len() + 500;
        if queued_bytes > 4000 {
            thread::sleep(Duration::from_micros(queued_bytes as u64 / 4));
            queued_bytes = 0;
        }
    }
}

/// Bytes and number of the datagrams that come back for this one, to a port that is new each time.
pub(crate) fn answers(host: &Host, to: SocketAddr, datagram: &[u8]) -> (usize, usize) {
    let socket = open_socket(host, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
    socket.set_read_timeout(Some(Duration::from_millis(60))).unwrap();
    let _ = socket.send_to(datagram, to);
    let (mut bytes, mut count) = (0, 0);
    while let Ok((length, _)) = socket.recv_from(&mut [0; 2048]) {
        bytes += length;
        count += 1;
    }
    (bytes, count)
}

/// Bytes that come back for all of these from one port, with what comes within six seconds: a round
/// of probes takes five.
pub(crate) fn answers_to_all(host: &Host, to: SocketAddr, datagrams: &[Vec<u8>]) -> usize {
    let socket = open_socket(host, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
    for datagram in datagrams {
        let _ = socket.send_to(datagram, to);
    }
    let start = now();
    let mut bytes = 0;
    while start.elapsed() < Duration::from_secs(6) {
        bytes += socket.recv_from(&mut [0; 2048]).map_or(0, |(length, _)| length);
    }
    bytes
}

/// Connections that were opened and say nothing; they end when this is dropped.
pub(crate) fn open_and_say_nothing(host: &Host, to: SocketAddr, count: usize) -> Vec<TcpStream> {
    host.ns.enter(|| (0..count).filter_map(|_| connect(to)).collect())
}

/// Says each of `openings` on a connection of its own, goes on with noise, and listens a moment.
pub(crate) fn babble(host: &Host, to: SocketAddr, openings: &[Vec<u8>]) {
    let mut noise = Noise(0x2545_f491_4f6c_dd1d);
    host.ns.enter(|| {
        for opening in openings {
            for size in [0, 1, 300, 70_000] {
                let Some(mut stream) = connect(to) else { continue };
                let _ = stream.write_all(opening);
                // A server that answers an upgrade gets frames that are none.
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(&noise.bytes(size));
                let _ = stream.shutdown(Shutdown::Write);
                let _ = stream.read(&mut [0; 1024]);
            }
        }
    });
}

/// What a client of another protocol, or of ill will, says first.
pub(crate) fn hostile_openings(real: &[u8]) -> Vec<Vec<u8>> {
    let mut noise = Noise(0x1234_5678_9abc_def1);
    let mut endless = b"GET / HTTP/1.1\r\nX: ".to_vec();
    endless.resize(1_000_000, b'a');
    vec![
        Vec::new(),
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"SSH-2.0-test\r\n".to_vec(),
        endless,
        noise.bytes(4096),
        vec![0xff; 70_000],
        real.to_vec(),
        real[..real.len() / 2].to_vec(),
        [real, &[0xff; 70_000]].concat(),
        [real, &[0; 64]].concat(),
    ]
}

/// Waits for one client at `listener`, answers it with an upgrade and then noise, and returns
/// what the client said first.
pub(crate) fn answer_with_noise(listener: &TcpListener) -> Vec<u8> {
    let mut stream = accept(listener);
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut request = Vec::new();
    let mut part = [0; 4096];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut part) {
            Ok(length) if length > 0 => request.extend(&part[..length]),
            _ => break,
        }
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    let protocol = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("upgrade"))
        .map_or("none", |(_, value)| value.trim());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: {protocol}\r\n\r\n"
    );
    let _ = stream.write_all(answer.as_bytes());
    let _ = stream.write_all(&Noise(0x0dd_ba11).bytes(70_000));
    request
}

fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let client = || listener.accept().ok();
    let ((stream, _), _) = wait_for("a client comes", Duration::from_secs(30), client);
    stream.set_nonblocking(false).unwrap();
    stream
}

/// A web server that knows no page; gone on drop.
pub(crate) struct WebServer {
    over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl WebServer {
    pub(crate) fn start(host: &Host, port: u16) -> Self {
        let listener = host.ns.enter(|| TcpListener::bind((host.address, port)).unwrap());
        listener.set_nonblocking(true).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&over);
        let thread = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => say_not_found(stream),
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn say_not_found(mut stream: TcpStream) {
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
    let _ = stream.read(&mut [0; 4096]);
    let page = "HTTP/1.1 404 Not Found\r\nServer: test\r\nContent-Length: 0\r\n\r\n";
    let _ = stream.write_all(page.as_bytes());
}

fn connect(to: SocketAddr) -> Option<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(100))).ok()?;
    stream.set_write_timeout(Some(Duration::from_millis(500))).ok()?;
    Some(stream)
}

/// Noise that is the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

const ETHERTYPE_IPV4: u16 = 0x0800;
