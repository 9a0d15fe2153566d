//! A pod that has `NET_ADMIN` decides what is in the answers of rtnetlink.

use std::collections::BTreeMap;

use rtnetlink::{
    packet_core::{NetlinkBuffer, NetlinkDeserializable as _, NetlinkHeader, NetlinkMessage},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::AddressMessage,
        link::{LinkAttribute, LinkMessage},
        route::RouteMessage,
        rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
    },
};

use super::{
    Family, PRIORITY_LANDING, Seen, TABLE_ISTIO_CNI, TABLE_KEEP,
    route::{Delivery, Route, To},
    rule::{Interface, Rule, is_istio_cnis, is_stale},
    seen::{foreign_rules, interface},
    text,
};
use crate::{dataplane::routes::TABLE, fuzz::fuzz, traffic::Traffic};
use redirect_ebpf::abi::MARK_MASK;

/// A rule of ours as the kernel shows it.
fn message(rule: Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet;
    let (action, table) = match rule {
        Rule::Exclude(_) => (RuleAction::Goto, 0),
        Rule::Capture(_) => (RuleAction::ToTable, TABLE),
        Rule::Rescue | Rule::Keep | Rule::Virtual(_) => (RuleAction::ToTable, TABLE_KEEP),
        Rule::Hold(_) => (RuleAction::Blackhole, 0),
        Rule::Landing => (RuleAction::Nop, 0),
    };
    message.header.action = action;
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority()));
    attributes.push(RuleAttribute::Iifname(rule.input()));
    attributes.push(RuleAttribute::FwMark(rule.mark()));
    attributes.push(RuleAttribute::FwMask(MARK_MASK));
    attributes.push(RuleAttribute::Table(table));
    attributes.extend(rule.protocol().map(RuleAttribute::IpProtocol));
    if let Rule::Exclude(_) = rule {
        attributes.push(RuleAttribute::Goto(PRIORITY_LANDING));
    }
    if let Some(ports) = rule.ports() {
        let range = RulePortRange { start: ports.first, end: ports.last };
        attributes.push(RuleAttribute::DestinationPortRange(range));
    }
    message
}

fn packet(messages: Vec<RouteNetlinkMessage>) -> Vec<u8> {
    let mut packet = Vec::new();
    for message in messages {
        let mut message = NetlinkMessage::from(message);
        message.finalize();
        let start = packet.len();
        packet.resize(start + message.buffer_len(), 0);
        message.serialize(&mut packet[start..]);
    }
    packet
}

fn dumps() -> Vec<Vec<u8>> {
    let ports = "8000-8010".parse().unwrap();
    let tap = Interface::new("tap0").unwrap();
    let rules = [
        Rule::Rescue,
        Rule::Keep,
        Rule::Virtual(tap),
        Rule::Exclude(ports),
        Rule::Capture(None),
        Rule::Capture(Some(ports)),
        Rule::Hold(tap),
        Rule::Landing,
    ];
    let rules = rules.map(|rule| RouteNetlinkMessage::NewRule(message(rule))).to_vec();
    let mut istio = message(Rule::Keep);
    istio.attributes = vec![
        RuleAttribute::Table(TABLE_ISTIO_CNI),
        RuleAttribute::FwMark(0x111),
        RuleAttribute::FwMask(MARK_MASK),
    ];
    let route = |destination: &str, to| {
        let route = Route { table: TABLE, destination: destination.parse().unwrap(), to };
        RouteNetlinkMessage::NewRoute(route.message())
    };
    let lo = |source: &str| To::Lo(Delivery { interface: 1, source: source.parse().unwrap() });
    let bound = To::Lo(Delivery { interface: 7, source: "10.0.0.2".parse().unwrap() });
    let routes = vec![
        route("0.0.0.0/0", lo("10.0.0.2")),
        route("10.0.0.0/8", To::Throw),
        route("::/0", lo("fd00::2")),
        route("fe80::/10", To::Out(7)),
        route("192.0.2.0/24", bound),
    ];
    let mut link = LinkMessage::default();
    link.header.index = 7;
    link.attributes.push(LinkAttribute::IfName("eth0".to_owned()));
    let mut address = AddressMessage::default();
    address.header.family = AddressFamily::Inet;
    address.header.index = 7;
    let ip = "10.0.0.2".parse().unwrap();
    address.attributes.push(rtnetlink::packet_route::address::AddressAttribute::Local(ip));
    let mixed = vec![
        RouteNetlinkMessage::NewLink(link),
        RouteNetlinkMessage::NewAddress(address),
        RouteNetlinkMessage::NewRule(istio),
        RouteNetlinkMessage::NewRule(message(Rule::Keep)),
    ];
    vec![packet(rules), packet(routes), packet(mixed)]
}

/// The messages that can be read.
fn read(mut bytes: &[u8]) -> Vec<RouteNetlinkMessage> {
    let mut found = Vec::new();
    while let Ok(buffer) = NetlinkBuffer::new_checked(bytes) {
        let length = buffer.length() as usize;
        let mut header = NetlinkHeader::default();
        header.message_type = buffer.message_type();
        found.extend(RouteNetlinkMessage::deserialize(&header, buffer.payload()));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn check_rule(found: &RuleMessage) {
    let line = text::rule(found);
    assert!(!line.contains(|c: char| c.is_control()), "{line:?}");
    let ours = Rule::read(found);
    assert_eq!(line.contains("# redirect-agent: "), ours.is_some(), "{line}");
    match ours {
        Some(rule) => {
            assert!(!is_stale(found));
            assert_eq!(Rule::read(&message(rule)), Some(rule));
        }
        None => assert_eq!(line.ends_with("  # istio-cni"), is_istio_cnis(found), "{line}"),
    }
}

fn check_route(found: &RouteMessage) {
    let interfaces = BTreeMap::from([(7, "eth0".to_owned())]);
    let line = text::route(found, &interfaces);
    assert!(!line.contains(|c: char| c.is_control()), "{line:?}");
    let Some(route) = Route::read(found) else { return };
    assert!(line.ends_with("  # redirect-agent"), "{line}");
    // The kernel shows no address of another family.
    let of = route.destination.addr().is_ipv4();
    let fits = route.source().is_none_or(|source| source.is_ipv4() == of);
    if fits && (found.header.address_family == AddressFamily::Inet) == of {
        assert_eq!(Route::read(&route.message()), Some(route), "{route}");
    }
}

#[test]
fn what_a_pod_shows_of_its_routing_is_read_as_it_would_be_written() {
    fuzz!(&dumps(), |bytes| {
        let (mut interfaces, mut addresses) = (BTreeMap::new(), Vec::new());
        let (mut rules, mut routes) = (Vec::new(), Vec::new());
        for message in read(bytes) {
            match message {
                RouteNetlinkMessage::NewLink(link) => interfaces.extend([interface(link)]),
                RouteNetlinkMessage::NewAddress(address) => addresses.push(address),
                RouteNetlinkMessage::NewRule(rule) => rules.push(rule),
                RouteNetlinkMessage::NewRoute(route) => routes.push(route),
                _ => {}
            }
        }
        rules.iter().for_each(check_rule);
        routes.iter().for_each(check_route);
        let foreign = foreign_rules(&rules);
        assert!(foreign.iter().all(|rule| Rule::read(rule).is_none() && rules.contains(rule)));
        let family = || Family { rules: rules.clone(), routes: routes.clone() };
        let seen = Seen { interfaces, addresses, v4: family(), v6: family() };
        assert_eq!(seen.has_foreign_rules(), !foreign.is_empty());
        assert!(seen.addresses().iter().all(|address| !address.ip.is_loopback()));
        for source in ["10.0.0.2", "fd00::2"].map(|ip| ip.parse().unwrap()) {
            let traffic = Traffic::default();
            let state = seen.outbound(source, &traffic);
            assert!(!state.rules || seen.has_capture_of(source));
            let (has_rules, _) = seen.has_keep(source, &traffic);
            assert!(!has_rules || seen.family(source).our_rules().contains(&Rule::Keep));
            let deliveries = seen.deliveries(source);
            assert!(deliveries.iter().all(|to| to.source.is_ipv4() == source.is_ipv4()));
        }
    });
}
