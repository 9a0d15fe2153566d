use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
};

use super::*;
use crate::abi::{Flow, MARK_DIRECT, MARK_REDIRECTED, MARK_RESCUED, MARK_VIRTUAL, POD_CAPTURE};
use crate::verdict::tests::{addr, link_local};
use crate::verdict::{Receiver, Sender};

#[path = "fuzz.rs"]
mod fuzz;

const OWN: PodId = 7;
const NEIGHBOUR: PodId = 8;
const PORT: u16 = 40_000;
const START: u64 = 1_000_000_000_000;
/// All marks but the proxy's, including that of what the guard moves here.
const MARKS: [u32; 6] = [0, MARK_RESCUED, MARK_REDIRECTED, MARK_DIRECT, MARK_VIRTUAL, 0xabcd_e538];

const CAPTURED: Option<u32> = Some(POD_ENROLLED | POD_CAPTURE | POD_DNS);
const UNCAPTURED_DNS: Option<u32> = Some(POD_ENROLLED | POD_CAPTURE);
/// Without `POD_ENROLLED`, the other flags do not count.
const BYPASSING: Option<u32> = Some(POD_CAPTURE | POD_DNS);

#[derive(Clone, Copy)]
struct Addresses {
    own: Addr,
    own_second: Addr,
    /// Local only by a route.
    any_ip: Addr,
    resolvers: [Addr; 3],
    loopback: Addr,
}

fn both_families() -> [Addresses; 2] {
    [
        Addresses {
            own: addr("10.0.0.2"),
            own_second: addr("10.0.0.3"),
            any_ip: addr("10.9.9.9"),
            resolvers: ["10.96.0.10", "192.0.2.1", "169.254.20.10"].map(addr),
            loopback: addr("127.0.0.53"),
        },
        Addresses {
            own: addr("fd00::2"),
            own_second: addr("fd00::3"),
            any_ip: addr("fd09::9"),
            resolvers: ["fd00:96::a", "2001:db8::1", "2001:db8::2"].map(addr),
            loopback: addr("::1"),
        },
    ]
}

impl Addresses {
    /// Any number of resolvers.
    fn resolver(&self, number: u16) -> Addr {
        let mut octets = self.resolvers[1].octets;
        octets[13] ^= 0x80;
        octets[14..].copy_from_slice(&number.to_be_bytes());
        Addr { octets }
    }
}

/// The map `dns_flows`, which all pods share.
type Flows = Rc<RefCell<BTreeMap<DnsKey, DnsFlow>>>;

struct Node {
    pod_id: PodId,
    pod: Option<u32>,
    own: [Addr; 2],
    /// `None`: the proxy's DNS listens, too.
    without_dns: Option<Proxy>,
    now: Cell<u64>,
    flows: Flows,
    /// Whether the map is full.
    full: bool,
    /// How many of the places that are tried next are taken by other CPUs at the same moment.
    rivals: Cell<u16>,
}

impl Node {
    fn new(a: &Addresses, pod: Option<u32>) -> Self {
        let (own, now) = ([a.own, a.own_second], Cell::new(START));
        let flows = Flows::default();
        let (full, rivals) = (false, Cell::new(0));
        Self { pod_id: OWN, pod, own, without_dns: None, now, flows, full, rivals }
    }

    fn after(&self, ns: u64) {
        self.now.set(self.now.get() + ns);
    }

    /// What happens to what the pod sends.
    fn sends(&self, message: &Message) -> Dns {
        on_lo(0, message, self)
    }

    /// Sends a query, and returns the port that the proxy sees.
    #[track_caller]
    fn ask(&self, message: &Message) -> u16 {
        match self.sends(message) {
            Dns::Ask { pod_id, from_port, count } => {
                assert_eq!((pod_id, count), (self.pod_id, Some(Counter::RedirectedDns)));
                from_port
            }
            other => panic!("{message:?}: {other:?}"),
        }
    }

    /// What happens to the proxy's packet to this port of the sender of `message`.
    fn answer(&self, message: &Message, from_port: u16) -> Dns {
        let Segment { src: client, .. } = message.segment;
        let src = Addr::loopback(client.is_v4());
        let (src_port, dst_port) = (PORT_PROXY_DNS, from_port);
        let opens = !message.tcp;
        let segment = Segment { src, dst: client, src_port, dst_port, opens, ..message.segment };
        on_lo(MARK_PROXY, &Message { segment, ..*message }, self)
    }
}

impl Pods for Node {
    fn pod(&self, pod_id: PodId) -> Option<u32> {
        assert_eq!(pod_id, self.pod_id);
        self.pod
    }

    fn pod_on(&self, _: u64) -> PodId {
        panic!("DNS leaves no hint")
    }

    fn is_own(&self, pod_id: PodId, addr: &Addr) -> bool {
        assert_eq!(pod_id, self.pod_id);
        self.own.contains(addr)
    }

    fn excludes_inbound(&self, _: PodId, _: &Flow) -> bool {
        panic!("DNS is outbound")
    }

    fn is_kubelets(&self, _: &Flow) -> bool {
        panic!("DNS is outbound")
    }

    fn is_probe_source(&self, _: &Addr) -> bool {
        panic!("DNS is outbound")
    }

    fn excludes_outbound(&self, _: PodId, _: &Flow) -> bool {
        panic!("the pod's DNS goes to the proxy whatever else is excluded")
    }
}

impl Env for Node {
    fn pod_id(&self) -> PodId {
        self.pod_id
    }

    fn receiver(&self, _: &Segment) -> Receiver {
        panic!("DNS asks for no connection")
    }

    fn completes_cookie(&self, _: PodId) -> bool {
        panic!("DNS asks for no connection")
    }

    fn proxy(&self, pod_id: PodId, kind: u32, _: &Segment) -> Proxy {
        assert_eq!((pod_id, kind), (self.pod_id, LISTENER_OUTBOUND));
        self.without_dns.unwrap_or(Proxy::Listens)
    }

    fn have_strays(&self) -> bool {
        panic!("DNS does not stray")
    }

    fn strays(&self, _: PodId) -> bool {
        panic!("DNS does not stray")
    }

    fn is_forwarded(&self) -> bool {
        panic!("DNS is not forwarded")
    }
    fn came_by_lo(&self) -> bool {
        panic!("DNS is not forwarded")
    }

    fn sender(&self) -> Sender {
        panic!("DNS goes by marks and ports")
    }

    fn has_proxy_sent(&self, _: &Segment) -> bool {
        panic!("DNS goes by marks and ports")
    }

    fn has_half_open(&self, _: PodId) -> bool {
        panic!("DNS is not accepted by the application")
    }

    fn was_half_open(&self, _: PodId, _: &Segment) -> bool {
        panic!("DNS is not accepted by the application")
    }

    fn settled(&self) -> Option<u32> {
        panic!("DNS is not settled")
    }

    fn has_marked_listener(&self) -> bool {
        panic!("DNS is not accepted by the application")
    }

    fn is_noted_direct(&self, _: PodId, _: &Segment) -> bool {
        panic!("DNS is not settled")
    }

    fn is_connections(&self) -> bool {
        panic!("DNS goes by marks and ports")
    }
}

impl DnsEnv for Node {
    fn dns_listens(&self, pod_id: PodId, _: &Message) -> bool {
        assert_eq!(pod_id, self.pod_id);
        self.without_dns.is_none()
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn flow(&self, key: &DnsKey) -> Option<DnsFlow> {
        assert_eq!(key.pod_id, self.pod_id);
        self.flows.borrow().get(key).copied()
    }

    fn touch(&self, key: &DnsKey, message: &Message, from_client: bool) {
        if let Some(flow) = self.flows.borrow_mut().get_mut(key) {
            touched(flow, message, from_client, self.now());
        }
    }

    fn enter(&self, key: &DnsKey, flow: &DnsFlow, own: bool) -> Entry {
        assert_eq!(key.place, flow.alias % DNS_PLACES);
        let free = match self.flow(key) {
            Some(known) if own => {
                assert_eq!((known.alias, known.client), (flow.alias, flow.client));
                true
            }
            known => {
                assert!(!own, "it has a place");
                known.is_none_or(|known| is_free(&known, self.now()))
            }
        };
        let lost = free && !own && self.rivals.get() > 0;
        if lost {
            self.rivals.set(self.rivals.get() - 1);
        }
        if !free || lost {
            return Entry::Taken;
        }
        if self.full {
            return Entry::Failed;
        }
        self.flows.borrow_mut().insert(*key, *flow);
        Entry::Entered
    }
}

fn query(src: Addr, dst: Addr) -> Message {
    let (src_port, dst_port) = (PORT, PORT_DNS);
    let segment =
        Segment { src, dst, src_port, dst_port, opens: true, accepts: false, resets: false };
    Message { segment, tcp: false, is_query: true, ends: false }
}

fn syn(src: Addr, dst: Addr) -> Message {
    Message { tcp: true, ..query(src, dst) }
}

fn data(of: Message) -> Message {
    Message { segment: Segment { opens: false, ..of.segment }, ..of }
}

fn end(of: Message) -> Message {
    Message { ends: true, ..data(of) }
}

fn from_port(of: Message, src_port: u16) -> Message {
    Message { segment: Segment { src_port, ..of.segment }, ..of }
}

fn to_port(of: Message, dst_port: u16) -> Message {
    Message { segment: Segment { dst_port, ..of.segment }, ..of }
}

/// An answer to [`PORT`].
fn from(resolver: Addr) -> Dns {
    Dns::Answer { from: resolver, from_port: PORT_DNS, to_port: PORT }
}

/// A packet of a known connection.
fn goes_on(from_port: u16) -> Dns {
    Dns::Ask { pod_id: OWN, from_port, count: None }
}

const BUSY: Dns = Dns::Refuse(OWN, Counter::RefusedDnsBusy);

#[test]
fn one_socket_asks_several_resolvers_at_once() {
    for a in both_families() {
        for client in [a.own, a.own_second, a.any_ip] {
            for open in [query, syn] {
                let node = Node::new(&a, CAPTURED);
                let asked = a.resolvers.map(|resolver| open(client, resolver));
                let ports = asked.map(|message| node.ask(&message));
                assert_eq!(ports[0], PORT, "the first keeps the port");
                // They are the same when asked again, and in a connection.
                for (message, port) in asked.iter().zip(ports) {
                    assert_eq!(node.ask(message), port);
                    if message.tcp {
                        for mark in [0, MARK_REDIRECTED, MARK_RESCUED, 0xabcd_e000] {
                            let found = on_lo(mark, &data(*message), &node);
                            assert_eq!(found, goes_on(port));
                        }
                    }
                }
                for i in [1, 2, 0, 2, 0, 1] {
                    assert_eq!(node.answer(&asked[i], ports[i]), from(a.resolvers[i]));
                }
            }
        }
    }
}

#[test]
fn musl_asks_for_both_kinds_of_addresses_at_two_resolvers() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURED);
        let asked = [query(a.own, a.resolvers[0]), query(a.own, a.resolvers[1])];
        // A and AAAA, each from one port.
        let ports = asked.map(|message| [node.ask(&message), node.ask(&message)][0]);
        assert_eq!(node.flows.borrow().len(), asked.len());
        assert_eq!(node.answer(&asked[0], ports[0]), from(a.resolvers[0]));
        // The other answer is still to come, so nobody gets the place. The rival has the same port modulo
        // the places.
        let rival = from_port(query(a.own, a.resolvers[2]), PORT + DNS_PLACES);
        assert_ne!(node.ask(&rival) % DNS_PLACES, ports[0] % DNS_PLACES);
        assert_eq!(node.answer(&asked[0], ports[0]), from(a.resolvers[0]));
        for _ in 0..2 {
            assert_eq!(node.answer(&asked[1], ports[1]), from(a.resolvers[1]));
        }
    }
}

#[test]
fn a_place_that_is_needed_is_never_given_away() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURED);
        let waiting = query(a.own, a.resolvers[0]);
        let port = node.ask(&waiting);
        // The ports that have a place there.
        let mut ports = vec![port];
        ports.extend((1..PLACES).map(|number| node.ask(&query(a.own, a.resolver(number)))));
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), usize::from(PLACES), "each has another");
        let late = query(a.own, a.resolvers[2]);
        assert_eq!(node.sends(&late), BUSY);
        // An answer frees the place.
        assert_eq!(node.answer(&waiting, port), from(a.resolvers[0]));
        assert_eq!(node.ask(&late), port);
        assert_eq!(node.answer(&late, port), from(a.resolvers[2]));
        // So does time.
        node.ask(&query(a.own, a.resolver(PLACES)));
        let last = query(a.own, a.resolver(PLACES + 1));
        node.after(ANSWER_NS - 1);
        assert_eq!(node.sends(&last), BUSY);
        node.after(1);
        node.ask(&last);
    }
}

#[test]
fn place_that_another_cpu_gets_first_is_not_taken_from_it() {
    for a in both_families() {
        for open in [query, syn] {
            // The place is empty, or its flow is no longer needed.
            for stale in [false, true] {
                for rivals in 0..=PLACES {
                    let node = Node::new(&a, CAPTURED);
                    if stale {
                        node.ask(&open(a.own, a.resolvers[1]));
                        node.after(IDLE_NS);
                    }
                    node.rivals.set(rivals);
                    let asked = open(a.own, a.resolvers[0]);
                    let expected = (0..rivals).fold(PORT, |alias, _| next_alias(alias));
                    if rivals == PLACES {
                        assert_eq!(node.sends(&asked), BUSY);
                    } else {
                        assert_eq!(node.ask(&asked), expected);
                        assert_eq!(node.answer(&asked, expected), from(a.resolvers[0]));
                    }
                }
            }
        }
    }
}

#[test]
fn place_that_another_cpu_is_about_to_fill_is_nobodys() {
    for a in both_families() {
        for open in [query, syn] {
            let node = Node::new(&a, CAPTURED);
            let asked = open(a.own, a.resolvers[0]);
            assert_eq!(node.ask(&asked), PORT);
            node.flows.borrow_mut().values_mut().for_each(|flow| flow.needed_until_ns = CLAIMED);
            // Neither a late answer nor its client brings it back.
            assert_eq!(node.answer(&asked, PORT), from(a.resolvers[0]));
            if asked.tcp {
                assert_eq!(node.sends(&data(asked)), Dns::Other);
            }
            assert_eq!(node.ask(&asked), next_alias(PORT));
            let claimed = |flow: &&DnsFlow| flow.needed_until_ns == CLAIMED;
            assert_eq!(node.flows.borrow().values().filter(claimed).count(), 1);
        }
    }
}

#[test]
fn a_query_that_is_sent_again_waits_anew() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURED);
        let again = query(a.own, a.resolvers[0]);
        let rival = from_port(again, PORT + DNS_PLACES);
        for _ in 0..3 {
            assert_eq!(node.ask(&again), PORT);
            node.after(ANSWER_NS - 1);
            assert_ne!(node.ask(&rival), rival.segment.src_port, "the place is needed");
        }
        node.after(ANSWER_NS);
        let other = from_port(query(a.own, a.resolvers[1]), PORT + DNS_PLACES);
        assert_eq!(node.ask(&other), other.segment.src_port);
    }
}

#[test]
fn connections_keep_their_places_while_they_are_used_and_give_them_up_when_they_end() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURED);
        let first = syn(a.own, a.resolvers[0]);
        // They compete for the same place.
        let rival = |number| from_port(syn(a.own, a.resolver(number)), PORT + DNS_PLACES);
        let has_it = |alias: u16| alias % DNS_PLACES == PORT % DNS_PLACES;
        assert_eq!(node.ask(&first), PORT);
        for number in 0..3 {
            node.after(IDLE_NS - 1);
            assert!(!has_it(node.ask(&rival(number))));
            assert_eq!(node.sends(&data(first)), goes_on(PORT));
            node.after(IDLE_NS - 1);
            assert!(!has_it(node.ask(&rival(number))));
            assert_eq!(node.answer(&data(first), PORT), from(a.resolvers[0]));
        }
        // Whoever ends it, the remaining packets still arrive.
        for (number, by_client) in [(10, true), (20, false)] {
            let closes = end(first);
            match by_client {
                true => assert_eq!(node.sends(&closes), goes_on(PORT)),
                false => assert_eq!(node.answer(&closes, PORT), from(a.resolvers[0])),
            }
            node.after(END_NS - 1);
            assert!(!has_it(node.ask(&rival(number))));
            assert_eq!(node.answer(&data(first), PORT), from(a.resolvers[0]));
            assert_eq!(node.sends(&data(first)), goes_on(PORT));
            node.after(END_NS);
            let next = rival(number + 1);
            assert_eq!(node.ask(&next), next.segment.src_port);
            assert_eq!(node.sends(&data(first)), Dns::Other, "its place is another's");
            // A new connection with the same ports has the full time again, even immediately.
            node.after(IDLE_NS);
            assert_eq!(node.ask(&first), PORT);
            assert_eq!(node.sends(&end(first)), goes_on(PORT));
            assert_eq!(node.ask(&first), PORT);
            assert_eq!(node.answer(&data(first), PORT), from(a.resolvers[0]));
            node.after(IDLE_NS - 1);
            assert!(!has_it(node.ask(&rival(number + 2))));
        }
    }
}

#[test]
fn protocols_clients_and_ports_do_not_meet() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURED);
        let asked = [
            query(a.own, a.resolvers[0]),
            syn(a.own, a.resolvers[1]),
            from_port(query(a.own_second, a.resolvers[2]), PORT + 1),
            from_port(query(a.own, a.resolvers[1]), PORT + 2),
        ];
        for message in &asked {
            assert_eq!(node.ask(message), message.segment.src_port);
        }
        // The same port at another address: the place is what matters.
        let meets = query(a.own_second, a.resolvers[0]);
        let port = node.ask(&meets);
        assert_ne!(port, PORT);
        assert_eq!(node.answer(&meets, port), from(a.resolvers[0]));
        for message in &asked {
            let Segment { dst, src_port, .. } = message.segment;
            let expected = Dns::Answer { from: dst, from_port: PORT_DNS, to_port: src_port };
            assert_eq!(node.answer(message, src_port), expected);
        }
    }
}

#[test]
fn ports_that_share_a_place_are_not_confused() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURED);
        let first = query(a.own, a.resolvers[0]);
        assert_eq!(node.ask(&first), PORT);
        let second = from_port(query(a.own, a.resolvers[1]), PORT - DNS_PLACES);
        let Segment { src_port, .. } = second.segment;
        let alias = node.ask(&second);
        assert_ne!(alias, src_port);
        assert_ne!(alias % DNS_PLACES, PORT % DNS_PLACES);
        let dropped = Dns::Drop(OWN, Counter::DroppedDnsAnswer);
        assert_eq!(node.answer(&second, src_port), dropped, "it has not asked by that port");
        let expected = Dns::Answer { from: a.resolvers[1], from_port: PORT_DNS, to_port: src_port };
        assert_eq!(node.answer(&second, alias), expected);
        assert_eq!(node.answer(&first, PORT), from(a.resolvers[0]));
    }
}

#[test]
fn port_of_one_client_is_already_the_alias_of_another() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURED);
        node.ask(&query(a.own, a.resolvers[0]));
        let alias = node.ask(&query(a.own, a.resolvers[1]));
        // The client asks another resolver, or the same.
        for resolver in [a.resolvers[2], a.resolvers[1]] {
            let owner = from_port(query(a.own, resolver), alias);
            let port = node.ask(&owner);
            assert_ne!(port, alias);
            let expected = Dns::Answer { from: resolver, from_port: PORT_DNS, to_port: alias };
            assert_eq!(node.answer(&owner, port), expected);
            assert_eq!(node.answer(&owner, alias), from(a.resolvers[1]));
            node.ask(&query(a.own, a.resolvers[1]));
        }
    }
}

#[test]
fn a_flood_of_queries_takes_the_pods_own_places_and_no_more() {
    for a in both_families() {
        for open in [query, syn] {
            let node = Node::new(&a, CAPTURED);
            let mut taken = 0_u16;
            for port in 1..=u16::MAX {
                match node.sends(&from_port(open(a.own, a.resolver(port)), port)) {
                    Dns::Ask { .. } => taken += 1,
                    refused => assert_eq!(refused, BUSY),
                }
            }
            assert_eq!(taken, DNS_PLACES, "each place is had once");
            assert_eq!(node.flows.borrow().len(), usize::from(DNS_PLACES));
            // The other protocol has places of its own, and so has every other pod with the same
            // addresses.
            let other = if open(a.own, a.own).tcp { query } else { syn };
            node.ask(&other(a.own, a.resolvers[0]));
            let flows = Rc::clone(&node.flows);
            let neighbour = Node { pod_id: NEIGHBOUR, flows, ..Node::new(&a, CAPTURED) };
            for open in [query, syn] {
                let asked = open(a.own, a.resolvers[0]);
                assert_eq!(neighbour.ask(&asked), PORT);
                assert_eq!(neighbour.answer(&asked, PORT), from(a.resolvers[0]));
            }
            node.after(IDLE_NS);
            node.ask(&open(a.own, a.resolvers[0]));
        }
    }
}

#[test]
fn what_the_map_does_not_take_is_refused() {
    for a in both_families() {
        let node = Node { full: true, ..Node::new(&a, CAPTURED) };
        for open in [query, syn] {
            assert_eq!(node.sends(&open(a.own, a.resolvers[0])), BUSY);
        }
    }
}

#[test]
fn proxy_has_no_dns_or_is_away() {
    for a in both_families() {
        for (proxy, expected) in [
            (Proxy::Listens, Dns::Refuse(OWN, Counter::RefusedDnsAbsent)),
            (Proxy::AwayWithinGrace, Dns::Drop(OWN, Counter::DroppedProxyAway)),
            (Proxy::Away, Dns::Refuse(OWN, Counter::RefusedProxyAway)),
        ] {
            let node = Node { without_dns: Some(proxy), ..Node::new(&a, CAPTURED) };
            for open in [query, syn] {
                assert_eq!(node.sends(&open(a.own, a.resolvers[0])), expected);
            }
            assert!(node.flows.borrow().is_empty());
        }
    }
}

#[test]
fn no_query_of_a_captured_pod_goes_on_to_its_resolver() {
    let proxies = [None, Some(Proxy::Listens), Some(Proxy::AwayWithinGrace), Some(Proxy::Away)];
    for a in both_families() {
        // Also without `POD_CAPTURE`.
        for pod in [CAPTURED, Some(POD_ENROLLED | POD_DNS), Some(u32::MAX)] {
            for without_dns in proxies {
                for full in [false, true] {
                    let node = Node { without_dns, full, ..Node::new(&a, pod) };
                    for client in [a.own, a.any_ip, a.resolvers[0], link_local()] {
                        for resolver in a.resolvers {
                            for mark in MARKS {
                                for open in [query, syn] {
                                    let found = on_lo(mark, &open(client, resolver), &node);
                                    let stays = matches!(
                                        found,
                                        Dns::Ask { .. } | Dns::Drop(..) | Dns::Refuse(..)
                                    );
                                    assert!(stays, "{found:?}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_server_answers_who_has_asked_from_port_53() {
    for a in both_families() {
        for pod in [None, BYPASSING, UNCAPTURED_DNS, CAPTURED] {
            let node = Node { without_dns: Some(Proxy::Away), ..Node::new(&a, pod) };
            for to in [a.resolvers[0], a.own_second, a.loopback, link_local()] {
                let answers = Message { is_query: false, ..query(a.own, to) };
                for mark in MARKS {
                    assert_eq!(on_lo(mark, &answers, &node), Dns::Other, "it is no query");
                }
            }
            assert!(node.flows.borrow().is_empty());
        }
    }
}

#[test]
fn answer_without_its_query_is_dropped() {
    for a in both_families() {
        for message in [query(a.own, a.resolvers[0]), data(syn(a.own, a.resolvers[0]))] {
            let node = Node::new(&a, CAPTURED);
            let dropped = Dns::Drop(OWN, Counter::DroppedDnsAnswer);
            assert_eq!(node.answer(&message, PORT), dropped);
            for pod in [None, BYPASSING, UNCAPTURED_DNS] {
                let node = Node::new(&a, pod);
                assert_eq!(node.answer(&message, PORT), Dns::Other, "who asks by itself");
            }
        }
        let node = Node::new(&a, CAPTURED);
        node.ask(&query(a.own, a.resolvers[0]));
        let dropped = Dns::Drop(OWN, Counter::DroppedDnsAnswer);
        for (scenario, to, port) in [
            ("another address", query(a.own_second, a.resolvers[0]), PORT),
            ("another port", query(a.own, a.resolvers[0]), PORT + 1),
            ("another port of the place", query(a.own, a.resolvers[0]), PORT + DNS_PLACES),
            ("another protocol", data(syn(a.own, a.resolvers[0])), PORT),
        ] {
            assert_eq!(node.answer(&to, port), dropped, "{scenario}");
        }
    }
}

#[test]
fn capture_ends_and_what_is_under_way_goes_on() {
    for a in both_families() {
        for pod in [UNCAPTURED_DNS, BYPASSING, None] {
            let mut node = Node::new(&a, CAPTURED);
            let (asked, open) = (query(a.own, a.resolvers[0]), syn(a.own, a.resolvers[0]));
            node.ask(&asked);
            node.ask(&open);
            node.pod = pod;
            assert_eq!(node.answer(&asked, PORT), from(a.resolvers[0]));
            assert_eq!(node.answer(&data(open), PORT), from(a.resolvers[0]));
            let expected = Dns::Ask { pod_id: OWN, from_port: PORT, count: None };
            assert_eq!(node.sends(&data(open)), expected);
            assert_eq!(node.sends(&asked), Dns::Other);
            assert_eq!(node.sends(&open), Dns::Other, "a new one is not DNS");
        }
    }
}

#[test]
fn everything_else_is_left_to_others() {
    for a in both_families() {
        let resolver = a.resolvers[0];
        let proxys = Addr::loopback(a.own.is_v4());
        let to_proxys = to_port(query(a.own, proxys), PORT_PROXY_DNS);
        for (scenario, pod, mark, message) in [
            ("another port", CAPTURED, 0, to_port(query(a.own, resolver), 5353)),
            (
                "the port of the proxy's DNS elsewhere",
                CAPTURED,
                0,
                to_port(query(a.own, resolver), PORT_PROXY_DNS),
            ),
            (
                "what is no query to the proxy's DNS",
                CAPTURED,
                0,
                Message { is_query: false, ..to_proxys },
            ),
            ("a resolver on loopback", CAPTURED, 0, query(a.own, a.loopback)),
            ("a resolver at a link-local address", CAPTURED, 0, query(a.own, link_local())),
            ("the pod's own resolver", CAPTURED, 0, query(a.own, a.own)),
            ("the pod's own, by another address", CAPTURED, 0, syn(a.own, a.own_second)),
            ("loopback asks loopback", CAPTURED, 0, query(a.loopback, a.loopback)),
            (
                "loopback asks the proxy's DNS",
                CAPTURED,
                0,
                to_port(query(a.loopback, proxys), PORT_PROXY_DNS),
            ),
            ("the proxy asks", CAPTURED, MARK_PROXY, query(a.own, resolver)),
            ("the proxy asks by TCP", CAPTURED, 0xabcd_e000 | MARK_PROXY, syn(a.own, resolver)),
            (
                "the proxy's other ports",
                CAPTURED,
                MARK_PROXY,
                from_port(query(proxys, a.own), 15001),
            ),
            (
                "the proxy's DNS answers loopback",
                CAPTURED,
                MARK_PROXY,
                from_port(to_port(query(proxys, a.loopback), PORT), PORT_PROXY_DNS),
            ),
            (
                "a client's port is that of the proxy's DNS",
                CAPTURED,
                MARK_PROXY,
                from_port(query(a.own, resolver), PORT_PROXY_DNS),
            ),
            ("a connection that is older", CAPTURED, 0, data(syn(a.own, resolver))),
            ("a pod that keeps its DNS", UNCAPTURED_DNS, 0, query(a.own, resolver)),
            ("a connection of one", UNCAPTURED_DNS, 0, syn(a.own, resolver)),
            ("an open connection of one", UNCAPTURED_DNS, 0, data(syn(a.own, resolver))),
            ("a pod that bypasses", BYPASSING, 0, query(a.own, resolver)),
            ("a pod that nothing is known of", None, 0, query(a.own, resolver)),
        ] {
            let node = Node::new(&a, pod);
            assert_eq!(on_lo(mark, &message, &node), Dns::Other, "{scenario}");
            assert!(node.flows.borrow().is_empty());
        }
    }
}

#[test]
fn only_ports_of_dns_concern_it() {
    for a in both_families() {
        for (src_port, dst_port, expected) in [
            (PORT, PORT_DNS, true),
            (PORT, PORT_PROXY_DNS, true),
            (PORT_PROXY_DNS, PORT, true),
            (PORT_DNS, PORT, false),
            (PORT, 5353, false),
        ] {
            let message = from_port(to_port(query(a.own, a.resolvers[0]), dst_port), src_port);
            assert_eq!(concerns(&message), expected, "{src_port} to {dst_port}");
        }
    }
}

#[test]
fn who_asks_the_proxys_dns_from_the_pods_address_gets_its_answer() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURED);
        node.ask(&query(a.own, a.resolvers[0]));
        let direct = to_port(query(a.own, Addr::loopback(a.own.is_v4())), PORT_PROXY_DNS);
        let port = node.ask(&direct);
        assert_ne!(port, PORT);
        let Segment { dst, .. } = direct.segment;
        let expected = Dns::Answer { from: dst, from_port: PORT_PROXY_DNS, to_port: PORT };
        assert_eq!(node.answer(&direct, port), expected);
    }
}

#[test]
fn only_the_proxys_own_address_answers() {
    let [a, _] = both_families();
    let node = Node::new(&a, CAPTURED);
    let asked = query(a.own, a.resolvers[0]);
    let port = node.ask(&asked);
    let from = |src| to_port(from_port(query(src, a.own), PORT_PROXY_DNS), port);
    assert_eq!(on_lo(0, &from(a.loopback), &node), Dns::Other);
    assert_ne!(on_lo(0, &from(Addr::loopback(true)), &node), Dns::Other);
}

#[test]
fn answer_that_cannot_be_parsed_is_dropped() {
    for a in both_families() {
        let loopback = Addr::loopback(a.own.is_v4());
        for (scenario, pod, mark, src, dst, expected) in [
            ("the proxy's", CAPTURED, MARK_PROXY, loopback, a.own, Some(OWN)),
            ("with other bits", CAPTURED, 0xabc5_3000 | MARK_PROXY, loopback, a.own, Some(OWN)),
            ("the pod's", CAPTURED, 0, loopback, a.own, None),
            ("the proxy's to loopback", CAPTURED, MARK_PROXY, loopback, a.loopback, None),
            ("the proxy's for a client", CAPTURED, MARK_PROXY, a.resolvers[0], a.own, None),
            ("DNS is not captured", UNCAPTURED_DNS, MARK_PROXY, loopback, a.own, None),
            ("a pod that bypasses", BYPASSING, MARK_PROXY, loopback, a.own, None),
            ("a pod that nothing is known of", None, MARK_PROXY, loopback, a.own, None),
        ] {
            let node = Node::new(&a, pod);
            assert_eq!(drops_unread(mark, &src, &dst, &node), expected, "{scenario}");
        }
    }
}

#[test]
fn aliases_are_ports_and_have_places_of_their_own() {
    for port in 1..=u16::MAX {
        let mut aliases = vec![port];
        for _ in 1..PLACES {
            aliases.push(next_alias(aliases[aliases.len() - 1]));
        }
        assert!(!aliases.contains(&0));
        let mut places: Vec<_> = aliases.iter().map(|alias| alias % DNS_PLACES).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), usize::from(PLACES), "{port}");
    }
}
