//! What happens to a pod's DNS on `lo`, as pure functions, like those of [`crate::verdict`].
//!
//! A routing rule brings the pod's queries to `lo`. There a query gets the address and port of the
//! proxy's DNS as its destination, and its answer the resolver's as its source: the application
//! sees the resolver that it has asked. The proxy's sockets are not transparent, so they could not
//! answer from there themselves.
//!
//! The client's address stays, because the proxy knows its pod by it. Its port is replaced where it
//! has to be: one socket may ask several resolvers at once, with the same DNS id (musl does), so the
//! port tells which resolver an answer comes from. See [`next_alias`].

use crate::{
    abi::{
        Addr, Counter, DECISION_ENROLLED, DnsFlow, DnsKey, LISTENER_OUTBOUND, MARK_PROXY, POD_DNS,
        PORT_DNS, PORT_PROXY_DNS, PROTOCOL_TCP, PROTOCOL_UDP, PodEntry, PodId,
    },
    verdict::{Env, Lookup, Pods, Proxy, Segment, Steer, mesh_mark},
};

/// In how many places a flow may have its entry: so many resolvers can one port ask at once.
const PLACES: u16 = 8;
/// After this time an answer does not come any more, ns. ztunnel's own lookups end before.
const ANSWER_NS: u64 = 30_000_000_000;
/// A TCP connection that has been idle for so long may lose its place to another, ns.
const IDLE_NS: u64 = 600_000_000_000;

/// A UDP datagram or TCP segment that could be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Addresses and ports. A datagram always opens.
    pub segment: Segment,
    /// Whether it is TCP.
    pub tcp: bool,
}

impl Message {
    fn protocol(&self) -> u16 {
        if self.tcp { PROTOCOL_TCP } else { PROTOCOL_UDP }
    }
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dns {
    /// It is not for this module.
    Other,
    /// It goes to the proxy's DNS: it gets that as its destination, and this source port.
    Ask {
        /// The alias, host byte order.
        from_port: u16,
        /// What to count.
        count: Option<(PodId, Counter)>,
    },
    /// It goes to the client, from the resolver: it gets this source and this destination port.
    Answer {
        /// The resolver.
        from: Addr,
        /// Its port, host byte order.
        from_port: u16,
        /// The client's own port, host byte order.
        to_port: u16,
    },
    /// It is dropped; the client asks again.
    Drop(PodId, Counter),
    /// It is refused at once: a query by the answer SERVFAIL, a connection by RST.
    Refuse(PodId, Counter),
}

/// What the decisions here ask of the kernel.
pub trait DnsEnv: Env {
    /// Whether the proxy's DNS of this pod listens, for this protocol and family.
    fn dns_listens(&self, pod_id: PodId, message: &Message) -> bool;
    /// The time, ns of CLOCK_MONOTONIC.
    fn now(&self) -> u64;
    /// An entry of `dns_flows`.
    fn flow(&self, key: &DnsKey) -> Option<DnsFlow>;
    /// Notes a packet of the client, or of the proxy, in an entry of `dns_flows`.
    fn touch(&self, key: &DnsKey, now: u64, from_client: bool);
    /// Enters a flow; `fresh`: only where there is none. Whether it was.
    fn enter(&self, key: &DnsKey, flow: &DnsFlow, fresh: bool) -> bool;
}

/// Whether a packet can be DNS at all, by its ports.
#[inline(always)]
pub fn concerns(message: &Message) -> bool {
    let Segment { src_port, dst_port, .. } = &message.segment;
    *dst_port == PORT_DNS || *dst_port == PORT_PROXY_DNS || *src_port == PORT_PROXY_DNS
}

/// Ingress of `lo`, before `verdict::on_lo`; for what [`concerns`] it.
#[inline(always)]
pub fn on_lo(mark: u32, message: &Message, env: &impl DnsEnv) -> Dns {
    let Segment { src, dst, src_port, dst_port, opens } = &message.segment;
    if mesh_mark(mark) == MARK_PROXY {
        if *src_port == PORT_PROXY_DNS && src.is_loopback() {
            return answer(message, env);
        }
        return Dns::Other;
    }
    let pod_id = who_asks(message, env);
    if pod_id == NOBODY {
        return Dns::Other;
    }
    let now = env.now();
    let place = find(message, now, env);
    let key = DnsKey { client: *src, alias: place.alias, protocol: message.protocol() };
    if message.tcp && !opens {
        // Connections that are open keep their way when the pod's DNS is captured no longer; and one
        // that is older than the capture is a connection like any other.
        return match place.kind {
            PLACE_OWN => ask(&key, now, None, env),
            _ => Dns::Other,
        };
    }
    if !env.dns_listens(pod_id, message) {
        return match env.proxy(pod_id, LISTENER_OUTBOUND, &message.segment) {
            Proxy::Listens => Dns::Refuse(pod_id, Counter::RefusedDnsAbsent),
            Proxy::AwayWithinGrace => Dns::Drop(pod_id, Counter::DroppedProxyAway),
            Proxy::Away => Dns::Refuse(pod_id, Counter::RefusedProxyAway),
        };
    }
    let count = Some((pod_id, Counter::RedirectedDns));
    if place.kind == PLACE_OWN {
        return ask(&key, now, count, env);
    }
    let flow = DnsFlow {
        used_ns: now,
        resolver: *dst,
        pod_id,
        asked: 1,
        answered: 0,
        resolver_port: *dst_port,
        client_port: *src_port,
    };
    if place.kind != PLACE_NONE && env.enter(&key, &flow, place.kind == PLACE_FRESH) {
        Dns::Ask { from_port: key.alias, count }
    } else {
        Dns::Refuse(pod_id, Counter::RefusedDnsBusy)
    }
}

/// No pod's id: no inode of a namespace has this number.
const NOBODY: PodId = PodId::MAX;
/// Nor this: a pod whose DNS is not captured, or who is not in the mesh.
const UNCAPTURED: PodId = 0;

/// The pod that a message to the proxy's DNS would come from; [`UNCAPTURED`] for one of a connection
/// that may be older than that; [`NOBODY`] for everything else.
// A function of its own, as `find`: behind its one return there are few cases left.
#[inline(never)]
fn who_asks(message: &Message, env: &impl DnsEnv) -> PodId {
    let Segment { src, dst, dst_port, opens, .. } = &message.segment;
    // Whoever asks the proxy's DNS itself from the pod's address must not meet an alias.
    let asks = *dst_port == PORT_DNS && !dst.is_loopback() && !dst.is_link_local()
        || *dst_port == PORT_PROXY_DNS && dst.is_loopback();
    if !asks {
        return NOBODY;
    }
    match captured(env.pod(src)) {
        Some(pod) => match env.pod(dst) {
            Some(other) if other.pod_id == pod.pod_id => NOBODY,
            _ => pod.pod_id,
        },
        None if message.tcp && !opens => UNCAPTURED,
        None => NOBODY,
    }
}

#[inline(always)]
fn ask(key: &DnsKey, now: u64, count: Option<(PodId, Counter)>, env: &impl DnsEnv) -> Dns {
    env.touch(key, now, true);
    Dns::Ask { from_port: key.alias, count }
}

#[inline(always)]
fn answer(message: &Message, env: &impl DnsEnv) -> Dns {
    let Segment { dst: client, dst_port: alias, .. } = &message.segment;
    let key = DnsKey { client: *client, alias: *alias, protocol: message.protocol() };
    if let Some(flow) = env.flow(&key) {
        env.touch(&key, env.now(), false);
        return Dns::Answer {
            from: flow.resolver,
            from_port: flow.resolver_port,
            to_port: flow.client_port,
        };
    }
    // Without its query's entry it would come from the wrong address, and maybe to a socket that has
    // not asked.
    let Some(pod) = env.pod(client) else { return Dns::Other };
    if captured(Some(pod)).is_none() {
        return Dns::Other;
    }
    Dns::Drop(pod.pod_id, Counter::DroppedDnsAnswer)
}

/// Ingress of `lo`, for an IP packet that could not be parsed: whether it is dropped, and counted for
/// which pod. A fragment of an answer would come from the wrong address.
#[inline(always)]
pub fn drops_unread(mark: u32, src: &Addr, dst: &Addr, env: &impl Pods) -> Option<PodId> {
    if mesh_mark(mark) != MARK_PROXY || !src.is_loopback() || dst.is_loopback() {
        return None;
    }
    let pod = env.pod(dst)?;
    if captured(Some(pod)).is_some() { Some(pod.pod_id) } else { None }
}

/// `sk_lookup` for a datagram that is not for loopback.
///
/// What is on `lo` to somebody else's port 53 was brought by the rule, and could not be parsed at
/// tcx: a fragment, an extension header. It is the pod's query, and nobody's here.
#[inline(always)]
pub fn steer(lookup: &Lookup, env: &impl Pods) -> Steer {
    let Lookup { flow, on_lo, .. } = lookup;
    if !on_lo || flow.local_port != PORT_DNS {
        return Steer::Pass(None);
    }
    let Some(pod) = captured(env.pod(&flow.remote)) else { return Steer::Pass(None) };
    if matches!(env.pod(&flow.local), Some(other) if other.pod_id == pod.pod_id) {
        return Steer::Pass(None);
    }
    Steer::Refuse(pod.pod_id, Counter::DroppedDnsUnreadable)
}

/// Where a client's flow has its entry in `dns_flows`, or may have it.
#[derive(Clone, Copy)]
struct Place {
    alias: u16,
    /// One of `PLACE_*`: numbers, which the verifier copes with better than with an enum's parts.
    kind: u32,
}

/// All of its places are taken.
const PLACE_NONE: u32 = 0;
/// It may have this one of another flow, which needs it no longer.
const PLACE_GIVEN: u32 = 1;
/// It may have this one, where there is none.
const PLACE_FRESH: u32 = 2;
/// It has this one.
const PLACE_OWN: u32 = 3;

// A function of its own, for the verifier's sake: it has a stack of its own, and one return.
#[inline(never)]
fn find(message: &Message, now: u64, env: &impl DnsEnv) -> Place {
    let Segment { src, dst, src_port, dst_port, .. } = &message.segment;
    let mut key = DnsKey { client: *src, alias: *src_port, protocol: message.protocol() };
    let mut place = Place { alias: 0, kind: PLACE_NONE };
    for _ in 0..PLACES {
        let kind = match env.flow(&key) {
            None => PLACE_FRESH,
            Some(flow)
                if flow.client_port == *src_port
                    && flow.resolver_port == *dst_port
                    && flow.resolver == *dst =>
            {
                return Place { alias: key.alias, kind: PLACE_OWN };
            }
            Some(flow) if needs(&flow, message.tcp, now) => PLACE_NONE,
            Some(_) => PLACE_GIVEN,
        };
        if kind > place.kind {
            place = Place { alias: key.alias, kind };
        }
        key.alias = next_alias(key.alias);
    }
    place
}

/// The ports that stand for a client's port and one of its resolvers each: the first is the port
/// itself, so who asks one resolver only keeps it and never competes with another port; the others
/// follow from it.
#[inline(always)]
const fn next_alias(alias: u16) -> u16 {
    const STEP: u16 = 7919;
    match alias.wrapping_add(STEP) {
        // Nobody could answer to it.
        0 => STEP,
        next => next,
    }
}

#[inline(always)]
fn needs(flow: &DnsFlow, tcp: bool, now: u64) -> bool {
    let idle = now.wrapping_sub(flow.used_ns);
    if tcp { idle < IDLE_NS } else { flow.asked > flow.answered && idle < ANSWER_NS }
}

#[inline(always)]
fn captured(pod: Option<PodEntry>) -> Option<PodEntry> {
    match pod {
        Some(pod) if pod.decision == DECISION_ENROLLED && pod.flags & POD_DNS != 0 => Some(pod),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        collections::BTreeMap,
        net::IpAddr,
    };

    use super::*;
    use crate::{
        abi::{DECISION_BYPASS, Flow, HINT_NONE, Hint, MARK_REDIRECTED, POD_CAPTURE},
        verdict,
    };

    const OWN: PodId = 1;
    const NEIGHBOUR: PodId = 2;
    const PORT: u16 = 40_000;
    const LISTENS: Option<Proxy> = None;

    #[derive(Clone, Copy)]
    struct Addresses {
        own: Addr,
        own_second: Addr,
        neighbour: Addr,
        uncaptured: Addr,
        bypassing: Addr,
        resolvers: [Addr; 3],
        loopback: Addr,
        link_local: Addr,
    }

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn both_families() -> [Addresses; 2] {
        [
            Addresses {
                own: addr("10.0.0.2"),
                own_second: addr("10.0.0.3"),
                neighbour: addr("10.0.0.10"),
                uncaptured: addr("10.0.0.11"),
                bypassing: addr("10.0.0.12"),
                resolvers: ["10.96.0.10", "192.0.2.1", "169.254.20.10"].map(addr),
                loopback: addr("127.0.0.53"),
                link_local: addr("fe80::1"),
            },
            Addresses {
                own: addr("fd00::2"),
                own_second: addr("fd00::3"),
                neighbour: addr("fd00::10"),
                uncaptured: addr("fd00::11"),
                bypassing: addr("fd00::12"),
                resolvers: ["fd00:96::a", "2001:db8::1", "2001:db8::2"].map(addr),
                loopback: addr("::1"),
                link_local: addr("fe80::1"),
            },
        ]
    }

    struct Node {
        pods: BTreeMap<Addr, PodEntry>,
        /// `None`: the proxy's DNS listens, too.
        without_dns: Option<Proxy>,
        now: Cell<u64>,
        flows: RefCell<BTreeMap<DnsKey, DnsFlow>>,
    }

    impl Node {
        fn new(a: &Addresses, without_dns: Option<Proxy>) -> Self {
            let entry = |pod_id, decision, flags| PodEntry { pod_id, decision, reason: 0, flags };
            let own = entry(OWN, DECISION_ENROLLED, POD_CAPTURE | POD_DNS);
            let pods = BTreeMap::from([
                (a.own, own),
                (a.own_second, own),
                (a.neighbour, PodEntry { pod_id: NEIGHBOUR, ..own }),
                (a.uncaptured, entry(3, DECISION_ENROLLED, POD_CAPTURE)),
                // The decision counts, whatever the flags.
                (a.bypassing, entry(4, DECISION_BYPASS, POD_CAPTURE | POD_DNS)),
            ]);
            let now = Cell::new(1_000_000_000_000);
            Self { pods, without_dns, now, flows: RefCell::default() }
        }

        fn after(&self, ns: u64) {
            self.now.set(self.now.get() + ns);
        }

        /// Asks, and gives the port that the proxy sees.
        #[track_caller]
        fn ask(&self, message: &Message) -> u16 {
            match on_lo(0, message, self) {
                Dns::Ask { from_port, count } => {
                    assert_eq!(count, Some((OWN, Counter::RedirectedDns)));
                    from_port
                }
                other => panic!("{message:?}: {other:?}"),
            }
        }

        /// What becomes of the proxy's answer to this port.
        fn answer(&self, message: &Message, from_port: u16) -> Dns {
            let Segment { src: client, .. } = message.segment;
            let src = Addr::loopback(client.is_v4());
            let (src_port, dst_port) = (PORT_PROXY_DNS, from_port);
            let segment = Segment { src, dst: client, src_port, dst_port, opens: !message.tcp };
            on_lo(MARK_PROXY, &Message { segment, ..*message }, self)
        }
    }

    impl Pods for Node {
        fn pod(&self, addr: &Addr) -> Option<PodEntry> {
            self.pods.get(addr).copied()
        }

        fn excludes_inbound(&self, _: PodId, _: &Flow) -> bool {
            false
        }

        fn is_kubelets(&self, _: &Flow) -> bool {
            false
        }

        fn is_probe_source(&self, _: &Addr) -> bool {
            false
        }
    }

    impl Env for Node {
        fn application_listens(&self, _: &Segment) -> bool {
            panic!("DNS asks for no application")
        }

        fn is_open(&self, _: &Segment) -> bool {
            false
        }

        fn proxy(&self, _: PodId, kind: u32, _: &Segment) -> Proxy {
            assert_eq!(kind, LISTENER_OUTBOUND);
            self.without_dns.unwrap_or(Proxy::Listens)
        }
    }

    impl DnsEnv for Node {
        fn dns_listens(&self, pod_id: PodId, _: &Message) -> bool {
            pod_id == OWN && self.without_dns.is_none()
        }

        fn now(&self) -> u64 {
            self.now.get()
        }

        fn flow(&self, key: &DnsKey) -> Option<DnsFlow> {
            self.flows.borrow().get(key).copied()
        }

        fn touch(&self, key: &DnsKey, now: u64, from_client: bool) {
            if let Some(flow) = self.flows.borrow_mut().get_mut(key) {
                flow.used_ns = now;
                *(if from_client { &mut flow.asked } else { &mut flow.answered }) += 1;
            }
        }

        fn enter(&self, key: &DnsKey, flow: &DnsFlow, fresh: bool) -> bool {
            assert_eq!(fresh, !self.flows.borrow().contains_key(key));
            self.flows.borrow_mut().insert(*key, *flow);
            true
        }
    }

    fn query(src: Addr, dst: Addr) -> Message {
        let (src_port, dst_port) = (PORT, PORT_DNS);
        Message { segment: Segment { src, dst, src_port, dst_port, opens: true }, tcp: false }
    }

    fn syn(src: Addr, dst: Addr) -> Message {
        Message { tcp: true, ..query(src, dst) }
    }

    fn data(of: Message) -> Message {
        Message { segment: Segment { opens: false, ..of.segment }, ..of }
    }

    fn from_port(of: Message, src_port: u16) -> Message {
        Message { segment: Segment { src_port, ..of.segment }, ..of }
    }

    fn to_port(of: Message, dst_port: u16) -> Message {
        Message { segment: Segment { dst_port, ..of.segment }, ..of }
    }

    fn from(resolver: Addr) -> Dns {
        Dns::Answer { from: resolver, from_port: PORT_DNS, to_port: PORT }
    }

    #[test]
    fn one_socket_asks_several_resolvers_at_once() {
        for a in both_families() {
            for open in [query, syn] {
                let node = Node::new(&a, LISTENS);
                let asked = a.resolvers.map(|resolver| open(a.own, resolver));
                let ports = asked.map(|message| node.ask(&message));
                assert_eq!(ports[0], PORT, "the first keeps the port");
                // Asked again, they are the same; so they are in a connection.
                for (message, port) in asked.iter().zip(ports) {
                    assert_eq!(node.ask(message), port);
                    if message.tcp {
                        let expected = Dns::Ask { from_port: port, count: None };
                        assert_eq!(on_lo(0, &data(*message), &node), expected);
                        // One that was redirected when it ceased to be captured, too.
                        assert_eq!(on_lo(MARK_REDIRECTED, &data(*message), &node), expected);
                    }
                }
                for i in [1, 2, 0, 2, 0, 1] {
                    assert_eq!(node.answer(&asked[i], ports[i]), from(a.resolvers[i]));
                }
            }
        }
    }

    #[test]
    fn a_place_that_is_needed_is_never_given_away() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
            let waiting = query(a.own, a.resolvers[0]);
            let port = node.ask(&waiting);
            // Whose own port that is, and everybody else that has a place there.
            let mut ports = vec![port];
            for number in 1..PLACES {
                let other = Addr { octets: [number as u8; 16] };
                ports.push(node.ask(&query(a.own, other)));
            }
            ports.sort_unstable();
            ports.dedup();
            assert_eq!(ports.len(), usize::from(PLACES), "each has another");
            let late = query(a.own, a.resolvers[1]);
            let busy = Dns::Refuse(OWN, Counter::RefusedDnsBusy);
            assert_eq!(on_lo(0, &late, &node), busy);
            // An answer makes room.
            assert_eq!(node.answer(&waiting, port), from(a.resolvers[0]));
            assert_eq!(node.ask(&late), port);
            assert_eq!(node.answer(&late, port), from(a.resolvers[1]));
            // So does time.
            let other = Addr { octets: [1; 16] };
            node.ask(&query(a.own, other));
            node.ask(&query(a.own, a.resolvers[2]));
            assert_eq!(on_lo(0, &query(a.own, a.unasked()), &node), busy);
            node.after(ANSWER_NS);
            node.ask(&query(a.own, a.unasked()));
        }
    }

    impl Addresses {
        /// A resolver that nobody has asked yet.
        fn unasked(&self) -> Addr {
            let mut octets = self.resolvers[0].octets;
            octets[15] ^= 0x80;
            Addr { octets }
        }
    }

    #[test]
    fn connections_keep_their_places_while_they_are_used() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
            let first = syn(a.own, a.resolvers[0]);
            let port = node.ask(&first);
            for _ in 0..3 {
                node.after(IDLE_NS - 1);
                let expected = Dns::Ask { from_port: port, count: None };
                assert_eq!(on_lo(0, &data(first), &node), expected);
                assert_ne!(node.ask(&syn(a.own, a.resolvers[1])), port);
            }
        }
    }

    #[test]
    fn protocols_clients_and_ports_do_not_meet() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
            let asked = [
                query(a.own, a.resolvers[0]),
                syn(a.own, a.resolvers[1]),
                query(a.own_second, a.resolvers[2]),
                from_port(query(a.own, a.resolvers[1]), PORT + 1),
            ];
            for message in &asked {
                assert_eq!(node.ask(message), message.segment.src_port);
            }
            for message in &asked {
                let Segment { dst, src_port, .. } = message.segment;
                let expected = Dns::Answer { from: dst, from_port: PORT_DNS, to_port: src_port };
                assert_eq!(node.answer(message, src_port), expected);
            }
        }
    }

    #[test]
    fn port_of_one_client_is_already_the_alias_of_another() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
            node.ask(&query(a.own, a.resolvers[0]));
            let alias = node.ask(&query(a.own, a.resolvers[1]));
            let owner = from_port(query(a.own, a.resolvers[2]), alias);
            let port = node.ask(&owner);
            assert_ne!(port, alias);
            let expected =
                Dns::Answer { from: a.resolvers[2], from_port: PORT_DNS, to_port: alias };
            assert_eq!(node.answer(&owner, port), expected);
            assert_eq!(node.answer(&owner, alias), from(a.resolvers[1]));
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
                let node = Node::new(&a, Some(proxy));
                for message in [query(a.own, a.resolvers[0]), syn(a.own, a.resolvers[0])] {
                    assert_eq!(on_lo(0, &message, &node), expected);
                }
                assert!(node.flows.borrow().is_empty());
            }
        }
    }

    #[test]
    fn answer_without_its_query_is_dropped() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
            for message in [query(a.own, a.resolvers[0]), data(syn(a.own, a.resolvers[0]))] {
                let expected = Dns::Drop(OWN, Counter::DroppedDnsAnswer);
                assert_eq!(node.answer(&message, PORT), expected);
                let asked = Message {
                    segment: Segment { src: a.uncaptured, ..message.segment },
                    ..message
                };
                assert_eq!(node.answer(&asked, PORT), Dns::Other, "who asks by itself");
            }
        }
    }

    #[test]
    fn capture_ends_and_what_is_under_way_goes_on() {
        for a in both_families() {
            let mut node = Node::new(&a, LISTENS);
            let (asked, connection) = (query(a.own, a.resolvers[0]), syn(a.own, a.resolvers[0]));
            node.ask(&asked);
            node.ask(&connection);
            for own in [a.own, a.own_second] {
                node.pods.entry(own).and_modify(|entry| entry.flags = POD_CAPTURE);
            }
            assert_eq!(node.answer(&asked, PORT), from(a.resolvers[0]));
            assert_eq!(node.answer(&data(connection), PORT), from(a.resolvers[0]));
            let expected = Dns::Ask { from_port: PORT, count: None };
            assert_eq!(on_lo(0, &data(connection), &node), expected);
            assert_eq!(on_lo(0, &asked, &node), Dns::Other);
            assert_eq!(on_lo(0, &connection, &node), Dns::Other, "a new one is not DNS");
        }
    }

    #[test]
    fn everything_else_is_left_to_others() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
            let resolver = a.resolvers[0];
            for (scenario, mark, message) in [
                ("another port", 0, to_port(query(a.own, resolver), 5353)),
                (
                    "the port of the proxy's DNS elsewhere",
                    0,
                    to_port(query(a.own, resolver), 15053),
                ),
                ("a resolver on loopback", 0, query(a.own, a.loopback)),
                ("a resolver at a link-local address", 0, query(a.own, a.link_local)),
                ("the pod's own resolver", 0, query(a.own, a.own)),
                ("the pod's own, by another address", 0, query(a.own, a.own_second)),
                ("loopback asks loopback", 0, query(a.loopback, a.loopback)),
                ("loopback asks the proxy's DNS", 0, to_port(query(a.loopback, a.loopback), 15053)),
                ("the proxy asks", MARK_PROXY, query(a.own, resolver)),
                ("the proxy asks with other bits", 0xabcd_e000 | MARK_PROXY, syn(a.own, resolver)),
                ("a pod that keeps its DNS", 0, query(a.uncaptured, resolver)),
                ("a pod that bypasses", 0, query(a.bypassing, resolver)),
                ("nobody known", 0, query(resolver, resolver)),
                ("a connection that is older", 0, data(syn(a.own, resolver))),
                ("the proxy's other ports", MARK_PROXY, from_port(query(a.loopback, a.own), 15001)),
            ] {
                assert_eq!(on_lo(mark, &message, &node), Dns::Other, "{scenario}");
            }
            assert!(node.flows.borrow().is_empty());
        }
    }

    #[test]
    fn who_asks_the_proxys_dns_from_the_pods_address_gets_its_answer() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
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
    fn query_that_cannot_be_parsed_is_for_nobody_in_the_pod() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
            let steered = |local, local_port, remote, on_lo| {
                let flow = Flow { local, remote, local_port, remote_port: PORT };
                let hint = Hint::new(flow, HINT_NONE);
                verdict::steer(&Lookup { tcp: false, flow, on_lo, hint }, &node)
            };
            let refused = Steer::Refuse(OWN, Counter::DroppedDnsUnreadable);
            let pass = Steer::Pass(None);
            for (scenario, found, expected) in [
                ("a query", steered(a.resolvers[0], 53, a.own, true), refused),
                ("to a neighbour", steered(a.neighbour, 53, a.own, true), refused),
                ("another port", steered(a.resolvers[0], 5353, a.own, true), pass),
                ("to the pod itself", steered(a.own_second, 53, a.own, true), pass),
                ("from outside", steered(a.own, 53, a.resolvers[0], false), pass),
                ("by a neighbour", steered(a.own, 53, a.neighbour, false), pass),
                ("on loopback", steered(a.loopback, 53, a.own, true), pass),
                ("DNS is not captured", steered(a.resolvers[0], 53, a.uncaptured, true), pass),
                ("nobody known", steered(a.resolvers[0], 53, a.resolvers[1], true), pass),
            ] {
                assert_eq!(found, expected, "{scenario}");
            }
        }
    }

    #[test]
    fn answer_that_cannot_be_parsed_is_dropped() {
        for a in both_families() {
            let node = Node::new(&a, LISTENS);
            let loopback = Addr::loopback(a.own.is_v4());
            for (scenario, mark, src, dst, expected) in [
                ("the proxy's", MARK_PROXY, loopback, a.own, Some(OWN)),
                ("the pod's", 0, loopback, a.own, None),
                ("the proxy's to loopback", MARK_PROXY, loopback, loopback, None),
                ("the proxy's for a client", MARK_PROXY, a.resolvers[0], a.own, None),
                ("DNS is not captured", MARK_PROXY, loopback, a.uncaptured, None),
            ] {
                assert_eq!(drops_unread(mark, &src, &dst, &node), expected, "{scenario}");
            }
        }
    }

    #[test]
    fn aliases_are_ports_and_do_not_repeat() {
        for port in 1..=u16::MAX {
            let mut aliases = vec![port];
            for _ in 1..PLACES {
                aliases.push(next_alias(aliases[aliases.len() - 1]));
            }
            assert!(!aliases.contains(&0));
            aliases.sort_unstable();
            aliases.dedup();
            assert_eq!(aliases.len(), usize::from(PLACES), "{port}");
        }
    }
}
