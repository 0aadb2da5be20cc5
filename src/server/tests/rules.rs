//! Access rules that are too long for a message.

use super::*;
use crate::server::records::{ExpiryNoted, MemberRecord, PolicyRecord};
use crate::types::InviteId;
use crate::wire::frame::MAX_MESSAGE;

const MEMBERS: u32 = 300;

/// One of many, every other one of which has the tag `web`: no two of these are neighbours.
fn member(number: u32) -> Versioned<MemberRecord> {
    let key = |first: u8| {
        let mut bytes = [first; 32];
        bytes[1..5].copy_from_slice(&number.to_be_bytes());
        PublicKey(bytes)
    };
    let is_first = number == 1;
    let record = MemberRecord {
        id: NodeId::new(70_000 + number).unwrap(),
        machine_key: if is_first { PublicKey([1; 32]) } else { key(2) },
        node_key: if is_first { PublicKey([101; 32]) } else { key(3) },
        name: format!("n{number}").parse().unwrap(),
        wish: None,
        host: number,
        joined: WALL,
        last_seen: WALL,
        invite: InviteId([0; 4]),
        tags: Vec::from_iter(number.is_multiple_of(2).then(|| "web".parse().unwrap())),
        key_since: WALL,
        expires: None,
        expiry_noted: ExpiryNoted::Nothing,
        named: false,
    };
    Versioned { rev: 2, record }
}

#[test]
fn rules_that_outgrow_a_message_let_in_less_and_cut_nobody_off() {
    let rule = "[[rules]]\nfrom='w'\nto='any'\nprotocol='tcp'\nports=[443]\n";
    let text = format!("[groups]\nw='tag:web'\n{}", rule.repeat(1_600));
    let mut world = World::new("10.77.0.0/20");
    let policy = PolicyRecord { text: Some(text.clone()), set: WALL };
    let records = Records {
        network: world.server.network.clone(),
        members: (1..=MEMBERS).map(member).collect(),
        invites: Vec::new(),
        policy: Some(Versioned { rev: 3, record: policy }),
        highest_node: 70_000 + MEMBERS,
    };
    world.server = Server::new(world.server.settings.clone(), records, [4; 32], world.now, WALL);
    assert!(world.server.decide_cut().is_none());

    // They were set when there were fewer nodes.
    let connection = world.connect(1);
    let hello = Some(Hello { name: None, ..hello(1, None) });
    let message = ClientMessage { hello, ..Default::default() };
    let decision = world.server.handle_message(connection, message, WALL).unwrap();
    let _ = world.server.apply(decision, 4, WALL);
    let sent = std::iter::from_fn(|| world.server.poll_output());
    let messages = sent.filter_map(|output| match output {
        Output::Send { message, .. } => Some(message),
        _ => None,
    });
    let messages: Vec<Vec<u8>> = messages.collect();
    assert!(messages.iter().all(|message| message.len() < MAX_MESSAGE));
    let netmap = messages.iter().find_map(|it| decode::<ServerMessage>(it).unwrap().netmap);
    let told = netmap.unwrap().filter.unwrap().rules.unwrap().len();
    assert!((500..1_600).contains(&told), "{told} rules: as many as there is room for");

    let decision = world.server.decide_cut().unwrap();
    let events = world.server.events(&decision, "server", WALL);
    assert_eq!(events.len(), 1);
    assert_eq!((&events[0].kind[..], &events[0].fields["name"][..]), ("policy-cut", "n1"));
    assert_eq!(events[0].fields["left-out"], (1_600 - told).to_string());
    world.commit(decision);
    assert!(world.server.decide_cut().is_none(), "once");

    // And today they are not set.
    let refused = world.server.decide(Request::PolicySet { text }, WALL);
    let Err(RequestError::BadPolicy { reason }) = refused else { panic!("{refused:?}") };
    assert!(reason.contains("bytes for one node"), "{reason}");
    let text = format!("[groups]\nw='tag:web'\n{}", rule.repeat(200));
    world.ask(Request::PolicySet { text }).unwrap();
}

#[test]
fn who_sets_rules_hears_which_names_and_tags_nobody_has() {
    let mut world = World::new("10.77.0.0/20");
    let invite = world.invite(1);
    world.enter(1, hello(1, Some(&invite)));
    let mut set = |group: &str| {
        let text = format!(
            "[groups]\ng = [{group}]\nunused = 'nobody'\n[[rules]]\nfrom = 'g'\nto = 'any'\n\
             protocol = 'any'\n"
        );
        match world.ask(Request::PolicySet { text }) {
            Ok(Some(Answer::Policy(policy))) => Ok(policy.warnings),
            other => Err(format!("{other:?}")),
        }
    };
    assert_eq!(set("'node'").unwrap(), [""; 0]);
    let said = set("'node', 'nodee-1', 'tag:wbe'").unwrap();
    assert_eq!(said.len(), 1);
    assert!(said[0].starts_with("no member has this name or tag: nodee-1, tag:wbe;"), "{said:?}");
    assert!(set("").unwrap()[0].starts_with("line 5: the rule matches nobody"));
    assert!(set("'any'").unwrap_err().contains("is every member"));
}
