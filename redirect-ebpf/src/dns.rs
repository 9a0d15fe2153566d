//! What happens to a pod's DNS on `lo`, as pure functions, like those of [`crate::verdict`].
//!
//! The guard (`verdict::on_egress`) brings the pod's queries to `lo`. There a query gets the address and port of the
//! proxy's DNS as its destination, and its answer the resolver's as its source: the application
//! sees the resolver that it has asked. The proxy's sockets are not transparent, so they could not
//! answer from there themselves.
//!
//! The client's address stays, because the proxy knows its pod by it. Its port is replaced where it
//! has to be: one socket may ask several resolvers at once, with the same DNS id (musl does), so the
//! port tells which resolver an answer comes from. See [`next_alias`].
//!
//! A pod has a fixed number of places for its flows ([`DNS_PLACES`]): a flood of its own queries is
//! refused when none is free, and takes no other pod's.

use crate::{
    abi::{
        Addr, Counter, DNS_PLACES, DnsFlow, DnsKey, LISTENER_OUTBOUND, MARK_PROXY,
        POD_DNS, POD_ENROLLED, PORT_DNS, PORT_PROXY_DNS, PROTOCOL_TCP, PROTOCOL_UDP, PodId,
    },
    verdict::{Env, Pods, Proxy, Segment, mesh_mark},
};


/// In how many places a flow may have its entry: so many resolvers can one port ask at once.
const PLACES: u16 = 8;
/// After this time an answer does not come any more, ns. ztunnel's own lookups end before.
const ANSWER_NS: u64 = 30_000_000_000;
/// A TCP connection that has been idle for so long may lose its place to another, ns.
const IDLE_NS: u64 = 600_000_000_000;
/// And one that an end of has closed, after this time: nothing is sent again by then, ns.
const END_NS: u64 = 5_000_000_000;

/// A UDP datagram or TCP segment that could be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Addresses and ports. A datagram always opens.
    pub segment: Segment,
    /// Whether it is TCP.
    pub tcp: bool,
    /// Whether it can be a DNS query: TCP always, a datagram by its header. A server that is asked from
    /// port 53 answers there, too.
    pub is_query: bool,
    /// TCP with FIN or RST.
    pub ends: bool,
}

impl Message {
    /// Where the flow with this alias has its place.
    fn key(&self, pod_id: PodId, alias: u16) -> DnsKey {
        DnsKey { pod_id, place: alias % DNS_PLACES, protocol: self.protocol() }
    }

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
        /// The pod.
        pod_id: PodId,
        /// The alias, host byte order.
        from_port: u16,
        /// What to count.
        count: Option<Counter>,
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
    /// Notes a packet of the client, or of the proxy, in an entry of `dns_flows`: see [`touched`].
    fn touch(&self, key: &DnsKey, message: &Message, from_client: bool);
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
    let Segment { src, dst, src_port, dst_port, opens, .. } = &message.segment;
    let pod_id = env.pod_id();
    // Whatever mark netfilter in the pod has made of it.
    if *src_port == PORT_PROXY_DNS && src.is_loopback() {
        return answer(pod_id, message, env);
    }
    if mesh_mark(mark) == MARK_PROXY {
        return Dns::Other;
    }
    let asker = who_asks(pod_id, message, env);
    if asker == NOBODY {
        return Dns::Other;
    }
    let place = find(pod_id, message, env);
    let key = message.key(pod_id, place.alias);
    if message.tcp && !opens {
        // Connections that are open keep their way when the pod's DNS is captured no longer; and one
        // that is older than the capture is a connection like any other.
        return match place.kind {
            PLACE_OWN => {
                env.touch(&key, message, true);
                Dns::Ask { pod_id, from_port: place.alias, count: None }
            }
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
    let count = Some(Counter::RedirectedDns);
    if place.kind == PLACE_OWN && !message.tcp {
        env.touch(&key, message, true);
        return Dns::Ask { pod_id, from_port: place.alias, count };
    }
    let flow = DnsFlow {
        needed_until_ns: env.now() + if message.tcp { IDLE_NS } else { ANSWER_NS },
        client: *src,
        resolver: *dst,
        asked: 1,
        answered: 0,
        alias: place.alias,
        resolver_port: *dst_port,
        client_port: *src_port,
        ended: 0,
    };
    if place.kind != PLACE_NONE && env.enter(&key, &flow, env.flow(&key).is_none()) {
        Dns::Ask { pod_id, from_port: place.alias, count }
    } else {
        Dns::Refuse(pod_id, Counter::RefusedDnsBusy)
    }
}

/// Nobody's DNS, as [`who_asks`] says it: no inode of a namespace has this number.
const NOBODY: PodId = PodId::MAX;
/// Nor this: a pod whose DNS is not captured, or who is not in the mesh.
const UNCAPTURED: PodId = 0;

/// The pod, if the message is for its DNS; [`UNCAPTURED`] for one of a connection that may be older
/// than the capture; [`NOBODY`] for everything else.
// A function of its own, as `find`: behind its one return there are few cases left.
#[inline(never)]
fn who_asks(pod_id: PodId, message: &Message, env: &impl DnsEnv) -> PodId {
    let Segment { dst, dst_port, opens, .. } = &message.segment;
    // Whoever asks the proxy's DNS itself from the pod's address must not meet an alias.
    let asks = *dst_port == PORT_DNS && !dst.is_loopback() && !dst.is_link_local()
        || *dst_port == PORT_PROXY_DNS && dst.is_loopback();
    if !asks || !message.is_query || message.segment.src.is_loopback() {
        return NOBODY;
    }
    if captured(pod_id, env) {
        return if env.is_own(pod_id, dst) { NOBODY } else { pod_id };
    }
    if message.tcp && !opens { UNCAPTURED } else { NOBODY }
}

#[inline(always)]
fn answer(pod_id: PodId, message: &Message, env: &impl DnsEnv) -> Dns {
    let Segment { dst: client, dst_port: alias, .. } = &message.segment;
    if client.is_loopback() {
        return Dns::Other;
    }
    let key = message.key(pod_id, *alias);
    if let Some(flow) = env.flow(&key)
        && flow.alias == *alias
        && flow.client == *client
    {
        env.touch(&key, message, false);
        return Dns::Answer {
            from: flow.resolver,
            from_port: flow.resolver_port,
            to_port: flow.client_port,
        };
    }
    // Without its query's entry it would come from the wrong address, and maybe to a socket that has
    // not asked.
    if captured(pod_id, env) {
        Dns::Drop(pod_id, Counter::DroppedDnsAnswer)
    } else {
        Dns::Other
    }
}

/// Ingress of `lo`, for an IP packet that could not be parsed: whether it is dropped, and counted for
/// which pod. A fragment of an answer would come from the wrong address.
#[inline(always)]
pub fn drops_unread(mark: u32, src: &Addr, dst: &Addr, env: &impl Env) -> Option<PodId> {
    if mesh_mark(mark) != MARK_PROXY || !src.is_loopback() || dst.is_loopback() {
        return None;
    }
    let pod_id = env.pod_id();
    if captured(pod_id, env) { Some(pod_id) } else { None }
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
/// It may have this one, which nobody needs.
const PLACE_FREE: u32 = 1;
/// It has this one.
const PLACE_OWN: u32 = 2;

// A function of its own, for the verifier's sake: it has a stack of its own, one return, and few ways
// through it.
#[inline(never)]
fn find(pod_id: PodId, message: &Message, env: &impl DnsEnv) -> Place {
    let now = env.now();
    let mut alias = message.segment.src_port;
    let mut place = Place { alias: 0, kind: PLACE_NONE };
    for _ in 0..PLACES {
        let free = match env.flow(&message.key(pod_id, alias)) {
            None => true,
            Some(flow) if flow.alias == alias && is_of(&flow, message) => {
                return Place { alias, kind: PLACE_OWN };
            }
            Some(flow) => flow.needed_until_ns <= now,
        };
        if free && place.kind == PLACE_NONE {
            place = Place { alias, kind: PLACE_FREE };
        }
        alias = next_alias(alias);
    }
    place
}

/// Whether a flow is that of the message's client and resolver.
#[inline(always)]
fn is_of(flow: &DnsFlow, message: &Message) -> bool {
    let Segment { src, dst, src_port, dst_port, .. } = &message.segment;
    let differ = |a: &Addr, b: &Addr| {
        let ([a, b], [c, d]): ([u64; 2], [u64; 2]) = (a.words(), b.words());
        (a ^ c) | (b ^ d)
    };
    let ports = (flow.client_port ^ *src_port) | (flow.resolver_port ^ *dst_port);
    differ(&flow.client, src) | differ(&flow.resolver, dst) | u64::from(ports) == 0
}

/// What a packet of the client, or of the proxy, makes of its flow.
#[inline(always)]
pub fn touched(flow: &mut DnsFlow, message: &Message, from_client: bool, now: u64) {
    let number = if from_client { &mut flow.asked } else { &mut flow.answered };
    *number = number.wrapping_add(1);
    if message.ends {
        flow.ended = 1;
    }
    let needed = match message.tcp {
        true if flow.ended != 0 => END_NS,
        true => IDLE_NS,
        false if from_client => ANSWER_NS,
        // Another answer may be on its way.
        false if flow.asked > flow.answered => return,
        false => 0,
    };
    flow.needed_until_ns = now + needed;
}

/// The ports that stand for a client's port and one of its resolvers each: the first is the port
/// itself, so who asks one resolver only keeps it and never competes with another port; the others
/// follow from it.
#[inline(always)]
const fn next_alias(alias: u16) -> u16 {
    const STEP: u32 = 7919;
    // Nobody could answer to 0. No branch for it: the verifier follows each through the loop.
    ((alias as u32 + STEP - 1) % u16::MAX as u32 + 1) as u16
}

#[inline(always)]
fn captured(pod_id: PodId, env: &impl Pods) -> bool {
    const CAPTURED: u32 = POD_ENROLLED | POD_DNS;
    env.pod(pod_id).is_some_and(|pod| pod & CAPTURED == CAPTURED)
}
