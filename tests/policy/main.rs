//! The filter against an oracle that puts packets together before it looks at them.
//!
//! A case is a random set of rules, flows of the receiver's own, and packets of a peer that does
//! what it can to get around them: tiny, overlapping, doubled, reordered and lonely fragments,
//! extension headers in any order, headers inside of payloads. Whatever a host could make of what
//! the filter let through, the oracle must allow; and a packet that was cut as a host cuts packets
//! passes exactly when the oracle allows it.
//!
//! `OVERLAY_POLICY_CASES=10000000` runs that many cases, `OVERLAY_POLICY_SEED` others.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod oracle;

use std::time::{Duration, Instant};

use overlay::policy::{Filter, Flows, Member, Policy, Verdict};
use overlay::types::{NodeId, NodeName, Tag};
use overlay::wire::control::encode;
use overlay::wire::filter::{KIND_ANY, KIND_ICMP, KIND_TCP, KIND_UDP, WireFilter, WireRule};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use oracle::{Overlap, OwnFlow, Piece, allows, reassemble};

const PEER: u32 = 2;
const PORTS: [u16; 5] = [22, 80, 443, 8000, 53];
const CASES: u64 = 50_000;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

fn rules(rng: &mut StdRng) -> Vec<WireRule> {
    let count = rng.random_range(0..4);
    (0..count)
        .map(|_| {
            let kinds = [KIND_TCP, KIND_TCP, KIND_UDP, KIND_UDP, KIND_ICMP, KIND_ANY, 99];
            let kind = *kinds.choose(rng).unwrap();
            let sources = match rng.random_range(0..4) {
                0 => Some(vec![(3, 9)]),
                1 => Some(vec![(1, 1), (PEER, PEER + 3)]),
                _ => None,
            };
            let ports = matches!(kind, KIND_TCP | KIND_UDP).then(|| {
                let first = *PORTS.choose(rng).unwrap();
                vec![(first, first.saturating_add(rng.random_range(0..3)))]
            });
            // Everything at once would leave nothing to be found.
            let sources =
                if kind == KIND_ANY && rng.random_bool(0.7) { Some(vec![]) } else { sources };
            WireRule { kind, sources, ports }
        })
        .collect()
}

/// The transport header and payload of a packet: protocol and bytes.
fn transport(rng: &mut StdRng, v6: bool, peer_to_own: bool) -> (u8, Vec<u8>) {
    let icmp = if v6 { 58 } else { 1 };
    let port = |rng: &mut StdRng| *PORTS.choose(rng).unwrap();
    let protocol = *[6, 6, 17, 17, icmp, icmp, 47, 51, 59, 132].choose(rng).unwrap();
    let mut bytes = Vec::new();
    bytes.extend(port(rng).to_be_bytes());
    bytes.extend(port(rng).to_be_bytes());
    match protocol {
        6 => {
            bytes.extend([0; 8]);
            let options = rng.random_range(0..4u8);
            bytes.push((5 + options) << 4);
            bytes.push(*[0x02, 0x10, 0x12, 0x18, 0x04, 0x11, 0xc2].choose(rng).unwrap());
            bytes.extend([0; 6]);
            bytes.extend(vec![1; usize::from(options) * 4]);
        }
        17 => bytes.extend([0, 8, 0, 0]),
        1 | 58 => {
            let kinds: &[u8] = if v6 { &[128, 129, 1, 2, 3, 135] } else { &[8, 0, 3, 5, 11, 13] };
            bytes[0] = *kinds.choose(rng).unwrap();
            bytes[1] = 0;
            bytes.extend(port(rng).to_be_bytes());
            bytes.extend([0; 2]);
            let error = if v6 { bytes[0] < 128 } else { matches!(bytes[0], 3..=5 | 11) };
            if error && rng.random_bool(0.8) {
                // About a packet from the receiver to the sender, or something that looks like one.
                let (inner, body) = transport(rng, v6, !peer_to_own);
                bytes.extend(packet(v6, !peer_to_own, inner, &body[..body.len().min(28)]));
            }
        }
        _ => bytes.extend([0; 8]),
    }
    let more = *[0, 8, 40, 200].choose(rng).unwrap();
    // A payload that looks like headers: what a fragment could make of it is the whole point.
    bytes.extend((0..more).map(|at| [0, 22, 0, 80][at % 4]));
    (protocol, bytes)
}

/// A packet between the two addresses; extension headers are part of `body`.
fn packet(v6: bool, peer_to_own: bool, protocol: u8, body: &[u8]) -> Vec<u8> {
    let (src, dst) = if peer_to_own { (2, 1) } else { (1, 2) };
    let mut bytes = if v6 {
        let len = u16::try_from(body.len()).unwrap().to_be_bytes();
        let mut bytes = vec![0x60, 0, 0, 0, len[0], len[1], protocol, 64];
        for last in [src, dst] {
            bytes.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        bytes
    } else {
        let len = u16::try_from(20 + body.len()).unwrap().to_be_bytes();
        let mut bytes = vec![0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, protocol, 0, 0];
        bytes.extend([10, 77, 0, src, 10, 77, 0, dst]);
        bytes
    };
    bytes.extend_from_slice(body);
    bytes
}

/// Puts extension headers in front of `body`; the result has the protocol of the first of them.
fn extended(rng: &mut StdRng, protocol: u8, body: Vec<u8>, most: usize) -> (u8, Vec<u8>) {
    let (mut protocol, mut body) = (protocol, body);
    for _ in 0..rng.random_range(0..=most) {
        let kind = *[60, 60, 43, 0, 44].choose(rng).unwrap();
        let units = if kind == 44 { 0 } else { rng.random_range(0..2u8) };
        let left = u8::from(kind == 43 && rng.random_bool(0.3));
        let mut header = vec![protocol, units, 0, left, 0, 0, 0, 0];
        header.resize(8 + usize::from(units) * 8, 0);
        header.append(&mut body);
        (protocol, body) = (kind, header);
    }
    (protocol, body)
}

/// One fragment, or the whole packet when `offset` is 0 and there is no more.
fn fragment(v6: bool, id: u8, protocol: u8, offset: usize, more: bool, data: &[u8]) -> Vec<u8> {
    let place = u16::try_from(offset).unwrap();
    if v6 {
        let [high, low] = (place | u16::from(more)).to_be_bytes();
        let mut body = vec![protocol, 0, high, low, 0, 0, 0, id];
        body.extend_from_slice(data);
        packet(true, true, 44, &body)
    } else {
        let mut bytes = packet(false, true, protocol, data);
        bytes[5] = id;
        bytes[6..8].copy_from_slice(&((place / 8) | (u16::from(more) << 13)).to_be_bytes());
        bytes
    }
}

/// Cuts a packet at these places, multiples of eight.
fn cut(v6: bool, id: u8, protocol: u8, body: &[u8], at: &[usize]) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for end in at.iter().copied().filter(|end| *end < body.len()).chain([body.len()]) {
        if end > start {
            let more = end < body.len();
            pieces.push(fragment(v6, id, protocol, start, more, &body[start..end]));
            start = end;
        }
    }
    pieces
}

struct Case {
    rules: Vec<WireRule>,
    own: Vec<OwnFlow>,
    filter: Filter,
    flows: Flows,
    now: Instant,
}

#[derive(Debug, Default)]
struct Tally {
    whole: [u64; 2],
    clean: [u64; 2],
    evil: [u64; 2],
}

impl Case {
    fn new(rng: &mut StdRng, now: Instant) -> Self {
        let rules = rules(rng);
        let filter = Filter::new(&WireFilter { rules: Some(rules.clone()) }).unwrap();
        let mut case = Self { rules, own: Vec::new(), filter, flows: Flows::default(), now };
        for _ in 0..rng.random_range(0..3) {
            case.start_flow(rng);
        }
        case
    }

    fn peer() -> NodeId {
        NodeId::new(PEER).unwrap()
    }

    /// The receiver starts something itself.
    fn start_flow(&mut self, rng: &mut StdRng) {
        let v6 = rng.random_bool(0.5);
        let port = |rng: &mut StdRng| *PORTS.choose(rng).unwrap();
        let (own, other) = (port(rng), port(rng));
        let [a, b] = own.to_be_bytes();
        let [c, d] = other.to_be_bytes();
        let (number, protocol, body) = match rng.random_range(0..3) {
            0 => (6, 6, vec![a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]),
            1 => (17, 17, vec![a, b, c, d, 0, 8, 0, 0]),
            _ if v6 => (1, 58, vec![128, 0, 0, 0, a, b, 0, 0]),
            _ => (1, 1, vec![8, 0, 0, 0, a, b, 0, 0]),
        };
        let bytes = packet(v6, false, protocol, &body);
        self.filter.outbound(Self::peer(), &bytes, &mut self.flows, self.now);
        self.own.push((v6, number, own, if number == 1 { 0 } else { other }));
    }

    fn passes(&mut self, bytes: &[u8]) -> bool {
        self.filter.inbound(Self::peer(), bytes, &mut self.flows, self.now) == Verdict::Allow
    }

    fn may(&self, v6: bool, meaning: Option<oracle::Meaning>) -> bool {
        allows(&self.rules, PEER, v6, &self.own, meaning)
    }

    /// A whole packet: the filter says what the oracle says.
    fn whole(&mut self, rng: &mut StdRng, tally: &mut Tally) {
        let v6 = rng.random_bool(0.5);
        let (protocol, body) = transport(rng, v6, true);
        let (protocol, mut body) =
            if v6 { extended(rng, protocol, body, 10) } else { (protocol, body) };
        if rng.random_bool(0.1) {
            body.truncate(rng.random_range(0..=body.len()));
        }
        let bytes = packet(v6, true, protocol, &body);
        let meaning = reassemble(&[Piece::read(&bytes)], Overlap::Drops);
        // A fragment that came alone is no packet.
        let expected = meaning.first().is_some_and(|meaning| self.may(v6, *meaning));
        let passed = self.passes(&bytes);
        assert_eq!(passed, expected, "{bytes:02x?} {meaning:?} {:?} {:?}", self.rules, self.own);
        tally.whole[usize::from(passed)] += 1;
    }

    /// A packet in fragments as a host makes them: all of them pass, or none.
    fn clean(&mut self, rng: &mut StdRng, tally: &mut Tally) {
        let v6 = rng.random_bool(0.5);
        let (protocol, mut body) = transport(rng, v6, true);
        body.extend([0; 80]);
        let meaning =
            reassemble(&[Piece::read(&packet(v6, true, protocol, &body))], Overlap::Drops);
        // The first fragment of a host holds all headers.
        let first = 40 + 8 * rng.random_range(0..4);
        let pieces = cut(v6, 1, protocol, &body, &[first, first + 48, first + 104]);
        let is_error = matches!(meaning.first(), Some(Some(oracle::Meaning::Error(_))));
        if pieces.len() < 2 || is_error {
            return;
        }
        let expected = self.may(v6, meaning[0]);
        for piece in &pieces {
            let passed = self.passes(piece);
            assert_eq!(
                passed, expected,
                "{pieces:02x?} {meaning:?} {:?} {:?}",
                self.rules, self.own
            );
        }
        tally.clean[usize::from(expected)] += 1;
    }

    /// Fragments of several packets with one id, cut and mixed at will: nothing comes together
    /// that the oracle refuses.
    fn evil(&mut self, rng: &mut StdRng, tally: &mut Tally) {
        let v6 = rng.random_bool(0.5);
        let same = rng.random_bool(0.7).then(|| transport(rng, v6, true));
        let mut pieces = Vec::new();
        for _ in 0..rng.random_range(2..4) {
            let (mut protocol, mut body) = transport(rng, v6, true);
            if let Some((same, _)) = &same {
                protocol = *same;
            }
            if v6 && rng.random_bool(0.5) {
                (protocol, body) = extended(rng, protocol, body, 3);
            }
            let mut at: Vec<usize> =
                (0..rng.random_range(1..4)).map(|_| 8 * rng.random_range(1..8)).collect();
            at.sort_unstable();
            pieces.extend(cut(v6, rng.random_range(1..3), protocol, &body, &at));
        }
        for _ in 0..rng.random_range(0..3) {
            let twice = pieces.choose(rng).unwrap().clone();
            pieces.push(twice);
        }
        if rng.random_bool(0.6) {
            pieces.shuffle(rng);
        }
        let mut through = Vec::new();
        for piece in &mut pieces {
            if rng.random_bool(0.1) {
                let at = rng.random_range(if v6 { 6..7 } else { 6..8 });
                piece[at] ^= 1 << rng.random_range(0..8);
            }
            if self.passes(piece) {
                through.push(Piece::read(piece));
            }
        }
        for overlap in [Overlap::FirstWins, Overlap::LastWins, Overlap::Drops] {
            for meaning in reassemble(&through, overlap) {
                let fine = self.may(v6, meaning);
                assert!(
                    fine,
                    "{overlap:?} makes {meaning:?} of {pieces:02x?}\n{:?} {:?}",
                    self.rules, self.own
                );
                tally.evil[1] += 1;
            }
        }
        tally.evil[0] += (pieces.len() - through.len()) as u64;
    }
}

#[test]
fn nothing_gets_around_the_rules() {
    let cases = from_env("OVERLAY_POLICY_CASES", CASES);
    let seed = from_env("OVERLAY_POLICY_SEED", 1);
    let now = overlay::io::clock::now();
    let mut tally = Tally::default();
    for case in 0..cases {
        // A failure names the case; it comes back with the same seed.
        let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ case);
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut world = Case::new(&mut rng, now);
            match case % 4 {
                0 => world.whole(&mut rng, &mut tally),
                1 => world.clean(&mut rng, &mut tally),
                _ => world.evil(&mut rng, &mut tally),
            }
        }));
        if let Err(panic) = told {
            eprintln!("case {case} of seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
    println!("{cases} cases: {tally:?}");
    let enough = |count: u64| count > cases / 100;
    let Tally { whole, clean, evil } = tally;
    let all = [whole, clean, evil].concat();
    assert!(all.iter().all(|count| enough(*count)), "{all:?}: too few of one kind");
}

#[test]
fn a_later_fragment_needs_its_first_one_within_two_seconds() {
    let mut rng = StdRng::seed_from_u64(5);
    let mut case = Case::new(&mut rng, overlay::io::clock::now());
    let any_port = vec![(0, u16::MAX)];
    let rule = WireRule { kind: KIND_UDP, sources: None, ports: Some(any_port) };
    case.filter = Filter::new(&WireFilter { rules: Some(vec![rule]) }).unwrap();
    let pieces = cut(false, 7, 17, &[0; 200], &[48, 96]);
    assert!(!case.passes(&pieces[1]), "nothing came before");
    assert!(case.passes(&pieces[0]) && case.passes(&pieces[1]));
    case.now += Duration::from_millis(2001);
    assert!(!case.passes(&pieces[2]), "too late");
}

#[test]
fn a_flood_of_first_fragments_keeps_the_table_bounded_and_the_newest_in_it() {
    let mut rng = StdRng::seed_from_u64(5);
    let mut case = Case::new(&mut rng, overlay::io::clock::now());
    let rule = WireRule { kind: KIND_UDP, sources: None, ports: None };
    case.filter = Filter::new(&WireFilter { rules: Some(vec![rule]) }).unwrap();
    let piece = |id: u32, number: usize| {
        let mut piece = cut(true, 0, 17, &[0; 200], &[48, 96])[number].clone();
        piece[44..48].copy_from_slice(&id.to_be_bytes());
        piece
    };
    for id in 0..10_000 {
        assert!(case.passes(&piece(id, 0)));
    }
    assert!(!case.passes(&piece(10_000 - 4_097, 1)), "the 4,096 newest are kept");
    assert!(case.passes(&piece(10_000 - 4_096, 1)) && case.passes(&piece(9_999, 1)));
}

/// What a verdict costs: `cargo test --release --test policy -- cost --nocapture`, with nothing else
/// running. Unoptimised it shows only that the verdicts are right.
#[test]
fn the_cost_of_a_verdict_with_a_hundred_rules() {
    const ROUNDS: u32 = if cfg!(debug_assertions) { 10_000 } else { 5_000_000 };
    let rules: Vec<WireRule> = (0..100u16)
        .map(|number| WireRule {
            kind: if number % 2 == 0 { KIND_TCP } else { KIND_UDP },
            sources: Some(vec![(u32::from(number), u32::from(number) + 50)]),
            ports: Some(vec![(number * 100, number * 100 + 50)]),
        })
        .collect();
    let filter = Filter::new(&WireFilter { rules: Some(rules) }).unwrap();
    let peer = NodeId::new(60).unwrap();
    let ports = |src: u16, dst: u16| [src.to_be_bytes(), dst.to_be_bytes()].concat();
    let tcp = |src, dst, flags| {
        let mut body = ports(src, dst);
        body.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        body.extend([0; 1200]);
        body
    };
    let udp = [ports(5000, 3110).as_slice(), &[0; 1200]].concat();
    let mut flows = Flows::default();
    let start = overlay::io::clock::now();
    let own = packet(false, false, 6, &tcp(40_000, 9, 2));
    filter.outbound(peer, &own, &mut flows, start);
    for (name, bytes, expected) in [
        ("tcp, by a rule", packet(false, true, 6, &tcp(5000, 2010, 0x10)), Verdict::Allow),
        (
            "tcp, answer of an own flow",
            packet(false, true, 6, &tcp(9, 40_000, 0x10)),
            Verdict::Allow,
        ),
        ("udp, by a rule", packet(false, true, 17, &udp), Verdict::Allow),
        ("tcp, refused", packet(false, true, 6, &tcp(5000, 22, 0x10)), Verdict::Refuse),
    ] {
        let start = overlay::io::clock::now();
        for _ in 0..ROUNDS {
            let bytes = std::hint::black_box(bytes.as_slice());
            assert_eq!(filter.inbound(peer, bytes, &mut flows, start), expected);
        }
        let took = start.elapsed();
        println!("{name}: {:.1} ns", took.as_nanos() as f64 / f64::from(ROUNDS));
    }
}

/// What a node that joins costs the rules, and what it would cost to compile them anew for everybody:
/// `cargo test --release --test policy -- cost --nocapture`.
#[test]
fn the_cost_of_a_join() {
    let sizes: &[u32] = if cfg!(debug_assertions) { &[500] } else { &[1_000, 10_000] };
    let mut text = String::from("[groups]\n");
    for group in 0..20 {
        text += &format!("g{group} = 'tag:t{group}'\n");
    }
    for rule in 0..40 {
        let (from, to, port) = (rule % 20, (rule * 7 + 1) % 20, rule + 1);
        text += &format!(
            "[[rules]]\nfrom = 'g{from}'\nto = 'g{to}'\nprotocol = 'tcp'\nports = [{port}]\n"
        );
    }
    let policy = Policy::parse(&text).unwrap();
    for &size in sizes {
        let names: Vec<NodeName> =
            (0..=size + 1).map(|n| format!("n{n}").parse().unwrap()).collect();
        let tags: Vec<Vec<Tag>> = (0..20).map(|n| vec![format!("t{n}").parse().unwrap()]).collect();
        let id = |number: u32| NodeId::new(number).unwrap();
        // A tenth of the nodes have tags.
        let member = |number: u32| Member {
            id: id(number),
            name: &names[number as usize],
            tags: if number.is_multiple_of(10) { &tags[(number / 10 % 20) as usize] } else { &[] },
        };
        let start = overlay::io::clock::now();
        let mut compiled = policy.compile((1..=size).map(member));
        let anew: usize = (1..=size).map(|node| encode(&compiled.filter_of(id(node))).len()).sum();
        println!("{size} nodes, anew: {:?}, {anew} bytes", start.elapsed());
        for (name, tags) in [("a plain node", &[][..]), ("a node with a tag", &tags[3][..])] {
            let start = overlay::io::clock::now();
            let affected = compiled.put(Member { tags, ..member(size + 1) });
            let told = affected.nodes().expect("no rule is about everybody");
            let bytes: usize =
                told.iter().map(|node| encode(&compiled.filter_of(*node)).len()).sum();
            println!("{size} nodes, {name}: {:?}, {} are told", start.elapsed(), told.len());
            assert_eq!(told.is_empty(), tags.is_empty());
            assert!(bytes < anew / 4, "{bytes} of {anew} bytes");
            compiled.remove(id(size + 1));
        }
    }
}
