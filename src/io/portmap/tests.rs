//! The keeper's decisions, and routers that lie.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

use super::*;
use crate::testing::epoch;

const LEASE: Duration = Duration::from_secs(7200);
const HOME: Gateway =
    Gateway { router: Ipv4Addr::new(192, 168, 1, 1), local: Ipv4Addr::new(192, 168, 1, 2) };

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn mapping(external: &str, lease: Option<Duration>) -> Mapping {
    let external: SocketAddrV4 = external.parse().unwrap();
    Mapping { protocol: Protocol::Upnp, external, lease }
}

fn job(order: Option<Order>) -> Job {
    match order {
        Some(Order::Start(job)) => job,
        other => panic!("a job was expected, not {other:?}"),
    }
}

/// A keeper that has just got `mapping`.
fn mapped(mapping: Mapping, now: Instant) -> Keeper {
    let mut keeper = Keeper::new(4000, LEASE);
    keeper.handle_network(Some(HOME), now);
    let id = job(keeper.poll(now)).id;
    keeper.handle_outcome(Outcome { id, answered: Some(vec![]), result: Ok(mapping) }, now);
    keeper
}

/// Lets a check of the mapping fail; returns when.
fn miss(keeper: &mut Keeper, from: Instant, server_heard: bool) -> Instant {
    let mut now = from;
    for _ in 0..3 {
        assert!(matches!(keeper.poll(now), Some(Order::Knock(_))), "at {:?}", now - from);
        if server_heard {
            keeper.handle_knock(KnockAnswer::ServerHeard, now);
        }
        now = keeper.poll_timeout().unwrap();
    }
    now
}

fn failed(keeper: &mut Keeper, id: u64, now: Instant) {
    keeper.handle_outcome(Outcome { id, answered: None, result: Err("no".into()) }, now);
}

#[test]
fn nothing_is_asked_without_a_gateway() {
    let mut keeper = Keeper::new(4000, LEASE);
    assert_eq!(keeper.poll(epoch()), None);
    assert_eq!(keeper.poll_timeout(), None);
    keeper.handle_network(None, epoch());
    assert_eq!((keeper.poll(epoch()), keeper.standing()), (None, Standing::NoGateway));
}

#[test]
fn the_router_of_the_way_out_is_asked_if_there_is_one() {
    let way = |dst: &str, gateway: Option<&str>| Route {
        gateway: gateway.map(|gateway| gateway.parse().unwrap()),
        ..Route::direct(dst.parse().unwrap(), 1)
    };
    let v6 = way("::/0", Some("fe80::1"));
    assert_eq!(gateway_of(&[]), None);
    assert_eq!(gateway_of(&[way("0.0.0.0/0", None), v6.clone()]), None, "a line to a provider");
    let home = loopback(7);
    let ways = [v6, way("0.0.0.0/1", Some("127.9.0.7"))];
    assert_eq!(gateway_of(&ways), Some(home), "also where halves hide the default route");
}

#[test]
fn searches_get_longer_and_rarer_until_there_is_another_gateway() {
    let mut now = epoch();
    let mut keeper = Keeper::new(4000, LEASE);
    keeper.handle_network(Some(HOME), now);
    let mut waits = Vec::new();
    for expected in [250, 1_500, 4_000, 4_000, 4_000, 4_000] {
        let job = job(keeper.poll(now));
        assert_eq!(job.budget, Duration::from_millis(expected));
        assert_eq!(keeper.poll_timeout(), None, "one job at a time");
        keeper.handle_outcome(
            Outcome { id: job.id, answered: Some(vec![]), result: Err("no".into()) },
            now,
        );
        let next = keeper.poll_timeout().unwrap();
        waits.push((next - now).as_secs());
        now = next;
    }
    assert_eq!(waits, [1, 3, 30, 300, 1200, 1200]);
    assert_eq!(keeper.standing(), Standing::Unmapped);
    for minute in 1..20 {
        keeper.handle_network(Some(HOME), now - secs(1200) + secs(60 * minute));
    }
    assert_eq!(keeper.poll_timeout(), Some(now), "other changes say nothing of the router");
    let changed = now - secs(600);
    keeper.handle_sleep(changed);
    let first = job(keeper.poll(changed));
    assert_eq!(first.budget, Duration::from_millis(250), "it may be another one");
    failed(&mut keeper, first.id, changed);
    assert_eq!(job(keeper.poll(changed + secs(1))).budget, Duration::from_millis(1_500));
    let other = Gateway { local: Ipv4Addr::new(192, 168, 1, 3), ..HOME };
    keeper.handle_network(Some(other), changed + secs(2));
    let first = job(keeper.poll(changed + secs(2)));
    assert_eq!((first.gateway, first.budget), (other, Duration::from_millis(250)));
}

#[test]
fn a_slow_router_is_found_however_often_containers_come_and_go() {
    let mut now = epoch();
    let mut keeper = Keeper::new(4000, LEASE);
    let found = (0..20).any(|_| {
        keeper.handle_network(Some(HOME), now);
        if let Some(Order::Start(search)) = keeper.poll(now) {
            if search.budget >= Duration::from_millis(1_500) {
                return true;
            }
            failed(&mut keeper, search.id, now);
        }
        now += secs(5);
        false
    });
    assert!(found);
}

#[test]
fn a_mapping_is_renewed_at_half_of_its_lease_and_lost_at_its_end() {
    let start = epoch();
    let mut keeper = mapped(mapping("11.0.0.1:4000", Some(secs(100))), start);
    keeper.handle_knock(KnockAnswer::Arrived("11.0.0.1:4000".parse().unwrap()), start);
    assert!(keeper.verified());
    let now = start + secs(50);
    let renewal = job(keeper.poll(now));
    assert!(matches!(renewal.goal, Goal::Renew(_)));
    failed(&mut keeper, renewal.id, now);
    assert!(keeper.mapping().is_some(), "it is good until it ends");
    let again = now + secs(25);
    let second = job(keeper.poll(again));
    assert!(matches!(second.goal, Goal::Renew(_)));
    failed(&mut keeper, second.id, start + secs(100));
    assert_eq!(keeper.endpoints(), [], "retracted");
    assert_eq!(keeper.standing(), Standing::Unmapped);
}

#[test]
fn a_mapping_that_stops_to_work_is_repaired_and_retracted_when_that_fails() {
    let start = epoch();
    let it = mapping("11.0.0.1:4000", Some(LEASE));
    let mut keeper = mapped(it, start);
    assert_eq!(keeper.endpoints(), [(it.external.into(), false)], "offered, and marked");
    assert_eq!(keeper.poll(start), Some(Order::Knock(4000)));
    keeper.handle_knock(KnockAnswer::Arrived(it.external.into()), start);
    assert_eq!(keeper.endpoints(), [(it.external.into(), true)]);

    let unheard = miss(&mut keeper, start + secs(30), false);
    assert_eq!(keeper.poll(unheard), None);
    assert!(keeper.verified(), "the server is away: that says nothing of the router");

    let missed = miss(&mut keeper, unheard + secs(30), true);
    let repair = job(keeper.poll(missed));
    assert_eq!(repair.goal, Goal::Repair(it));
    assert!(!keeper.verified());
    let given = Outcome { id: repair.id, answered: None, result: Ok(it) };
    keeper.handle_outcome(given, missed);
    keeper.handle_knock(KnockAnswer::Arrived(it.external.into()), missed);

    let lost = miss(&mut keeper, missed + secs(30), true);
    let repair = job(keeper.poll(lost));
    assert_eq!(repair.goal, Goal::Repair(it), "what worked since is repaired at once again");
    failed(&mut keeper, repair.id, lost);
    assert_eq!(keeper.endpoints(), [], "the router does not give it back");
    assert!(matches!(job(keeper.poll(lost + secs(1))).goal, Goal::Find));
}

#[test]
fn a_mapping_that_never_worked_is_repaired_ever_more_rarely() {
    let mut now = epoch();
    let it = mapping("11.0.0.1:4000", Some(secs(86_400)));
    let mut keeper = mapped(it, now);
    let mut repairs = Vec::new();
    while now < epoch() + secs(900) {
        match keeper.poll(now) {
            Some(Order::Knock(_)) => keeper.handle_knock(KnockAnswer::ServerHeard, now),
            Some(Order::Start(job)) => {
                repairs.push((now - epoch()).as_secs());
                keeper.handle_outcome(Outcome { id: job.id, answered: None, result: Ok(it) }, now);
            }
            Some(order) => panic!("{order:?}"),
            None => now = keeper.poll_timeout().unwrap(),
        }
    }
    assert!(repairs[0] < 3 && repairs.len() <= 5, "{repairs:?}");
    assert_eq!(keeper.endpoints().len(), 1, "still offered");
}

#[test]
fn behind_a_second_nat_nothing_is_repaired_and_a_forward_there_is_found() {
    let start = epoch();
    let it = mapping("100.64.3.4:4000", None);
    assert!(!it.is_public());
    let mut keeper = mapped(it, start);
    let missed = miss(&mut keeper, start, true);
    assert_eq!(keeper.poll(missed), None);
    assert_eq!(keeper.endpoints(), [(it.external.into(), false)], "for others in there");
    let outer = "203.0.113.9:4000".parse().unwrap();
    keeper.handle_knock(KnockAnswer::Arrived(outer), missed);
    assert_eq!(keeper.endpoints(), [(outer, true), (it.external.into(), false)]);
    keeper.handle_knock(KnockAnswer::Arrived("203.0.113.9:4001".parse().unwrap()), missed);
    assert_eq!(keeper.endpoints().len(), 2, "another port proves nothing");
}

#[test]
fn another_gateway_retracts_and_late_news_of_the_old_one_is_ignored() {
    let now = epoch();
    let it = mapping("11.0.0.1:4000", Some(LEASE));
    let mut keeper = mapped(it, now);
    let other = Gateway { router: Ipv4Addr::new(10, 0, 0, 1), ..HOME };
    keeper.handle_network(Some(other), now);
    assert_eq!(keeper.endpoints(), []);
    assert_eq!(keeper.poll(now), Some(Order::Remove(HOME, it)));
    let search = job(keeper.poll(now));
    assert_eq!(search.gateway, other);
    keeper.handle_outcome(Outcome { id: 1, answered: None, result: Ok(it) }, now);
    assert_eq!(keeper.endpoints(), [], "the old router's mapping");
    keeper.handle_network(None, now);
    keeper.handle_outcome(Outcome { id: search.id, answered: None, result: Ok(it) }, now);
    assert_eq!((keeper.endpoints(), keeper.poll(now)), (vec![], None));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let check = |ip: [u8; 4], port, lease: Option<u64>| {
        Mapping::checked(Protocol::Pcp, ip.into(), port, lease.map(secs))
    };
    assert!(check([11, 0, 0, 1], 0, None).is_err(), "port 0");
    assert!(check([0, 0, 0, 0], 1, None).is_err());
    assert!(check([127, 0, 0, 1], 1, None).is_err());
    assert!(check([239, 1, 1, 1], 1, None).is_err());
    assert!(check([11, 0, 0, 1], 1, Some(0)).is_err(), "ends at once");
    let long = check([11, 0, 0, 1], 1, Some(u64::from(u32::MAX))).unwrap();
    assert_eq!(long.lease, Some(secs(86_400)));
    let private = ["10.1.1.1", "172.16.0.1", "192.168.3.3", "100.64.0.1", "100.127.9.9"];
    for ip in private {
        assert!(!mapping(&format!("{ip}:1"), None).is_public(), "{ip}");
    }
    for ip in ["100.63.0.1", "100.128.0.1", "11.0.0.1"] {
        assert!(mapping(&format!("{ip}:1"), None).is_public(), "{ip}");
    }
}

/// A "router" on the loopback interface, each test with its own address.
fn loopback(last: u8) -> Gateway {
    Gateway { router: Ipv4Addr::new(127, 9, 0, last), local: Ipv4Addr::LOCALHOST }
}

/// Answers every search with this location, from `from`.
async fn ssdp(gateway: Gateway, location: String) {
    let socket = UdpSocket::bind((gateway.router, 1900)).await.unwrap();
    tokio::spawn(async move {
        let mut question = [0; 1500];
        while let Ok((_, from)) = socket.recv_from(&mut question).await {
            let answer = format!(
                "HTTP/1.1 200 OK\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\
                 LOCATION: {location}\r\n\r\n"
            );
            let _ = socket.send_to(answer.as_bytes(), from).await;
        }
    });
}

/// A web server that sends `head` and then `body` again and again; counts who comes.
async fn web(
    ip: Ipv4Addr,
    head: &'static str,
    body: Vec<u8>,
    times: usize,
) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let visits = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&visits);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::Relaxed);
            let body = body.clone();
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(head.as_bytes()).await;
                for _ in 0..times {
                    if stream.write_all(&body).await.is_err() {
                        return;
                    }
                }
                // Never closed: the end of the answer does not come.
                tokio::time::sleep(secs(30)).await;
            });
        }
    });
    (port, visits)
}

const LIMIT: Duration = Duration::from_millis(400);

/// Asks, and asserts that it did not take longer than it may.
async fn find_in_time(gateway: Gateway) -> Result<upnp::Router, Failure> {
    let start = crate::io::clock::now();
    let found = upnp::find(upnp::Known::default(), gateway, LIMIT).await;
    let took = crate::io::clock::now() - start;
    assert!(took < LIMIT + Duration::from_millis(400), "{took:?}");
    found
}

#[tokio::test]
async fn no_location_but_the_gateways_own_is_fetched() {
    let gateway = loopback(1);
    let elsewhere = Ipv4Addr::new(127, 9, 1, 1);
    let (port, visits) = web(elsewhere, "HTTP/1.1 200 OK\r\n\r\n", vec![], 0).await;
    ssdp(gateway, format!("http://{elsewhere}:{port}/root.xml")).await;
    assert!(find_in_time(gateway).await.is_err());
    assert_eq!(visits.load(Ordering::Relaxed), 0, "nobody else was asked");
}

#[tokio::test]
async fn a_redirect_and_a_control_address_elsewhere_are_not_followed() {
    let elsewhere = Ipv4Addr::new(127, 9, 1, 2);
    let (port, visits) = web(elsewhere, "HTTP/1.1 200 OK\r\n\r\n", vec![], 0).await;
    let url = format!("http://{elsewhere}:{port}");
    let redirect = format!("HTTP/1.1 302 Found\r\nLocation: {url}/\r\nContent-Length: 0\r\n\r\n");
    let service = "urn:schemas-upnp-org:service:WANIPConnection:1";
    let description = format!(
        "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<root><device><serviceList><service>\
         <serviceType>{service}</serviceType><SCPDURL>{url}/a</SCPDURL>\
         <controlURL>{url}/b</controlURL></service></serviceList></device></root>"
    );
    for (last, answer) in [(2, redirect), (3, description)] {
        let gateway = loopback(last);
        let (own, own_visits) = web(gateway.router, "", answer.into_bytes(), 1).await;
        ssdp(gateway, format!("http://{}:{own}/root.xml", gateway.router)).await;
        assert!(find_in_time(gateway).await.is_err());
        assert!(own_visits.load(Ordering::Relaxed) > 0, "the gateway itself was asked");
    }
    assert_eq!(visits.load(Ordering::Relaxed), 0, "nobody else was asked");
}

#[tokio::test]
async fn endless_huge_and_deep_answers_end_at_the_limit() {
    let deep = b"<a>".repeat(100_000);
    let head = "HTTP/1.1 200 OK\r\n\r\n";
    for (last, body, times) in
        [(4, vec![b'x'; 65_536], usize::MAX), (5, deep, 1), (6, vec![], 0), (7, b"<!".to_vec(), 1)]
    {
        let gateway = loopback(last);
        let (port, _) = web(gateway.router, head, body, times).await;
        ssdp(gateway, format!("http://{}:{port}/root.xml", gateway.router)).await;
        assert!(find_in_time(gateway).await.is_err());
    }
}

#[tokio::test]
async fn bad_answers_by_pcp_and_nat_pmp_are_errors() {
    let gateway = loopback(8);
    let job = Job {
        id: 1,
        gateway,
        port: 4000,
        lease: LEASE,
        goal: Goal::Find,
        budget: Duration::from_millis(200),
    };
    let socket = UdpSocket::bind((gateway.router, crab_nat::GATEWAY_PORT)).await.unwrap();
    tokio::spawn(async move {
        let mut question = [0; 1500];
        for round in 0u8.. {
            let Ok((len, from)) = socket.recv_from(&mut question).await else { return };
            let mut answer = question;
            answer[1] |= 0x80;
            // An echo with external port 0, a long one, and noise.
            let answer = match round % 3 {
                0 if question[0] == 2 => {
                    answer[3] = 0;
                    answer[42..44].fill(0);
                    &answer[..60]
                }
                1 => &answer[..1400],
                _ => &answer[..len.min(7)],
            };
            let _ = socket.send_to(answer, from).await;
        }
    });
    for _ in 0..6 {
        let outcome = run(job, Asker::new([1, 2, 3])).await;
        assert!(outcome.result.is_err(), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_router_that_says_nothing_takes_its_budget_and_no_more() {
    let job = Job {
        id: 7,
        gateway: loopback(9),
        port: 4000,
        lease: LEASE,
        goal: Goal::Find,
        budget: Duration::from_millis(250),
    };
    // Held open and never answered.
    let _silent = UdpSocket::bind((job.gateway.router, crab_nat::GATEWAY_PORT)).await.unwrap();
    let start = crate::io::clock::now();
    let outcome = run(job, Asker::new([1, 2, 3])).await;
    assert_eq!(outcome.answered, Some(vec![]));
    assert!(outcome.result.is_err());
    assert!(crate::io::clock::now() - start < Duration::from_millis(600));
}

#[tokio::test]
async fn a_panic_while_reading_an_answer_ends_the_attempt_only() {
    // A backtrace takes a busy machine seconds.
    let panicking = upnp::on_thread(LIMIT * 20, || async {
        let nothing: Option<u8> = None;
        nothing.map_or_else(|| panic!("a parser's mistake"), Ok)
    });
    assert!(matches!(panicking.await, Err(Failure::Nonsense(_))));
}
