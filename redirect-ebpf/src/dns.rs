//! What happens to a pod's DNS on `lo`, as pure functions, like those of [`crate::verdict`].
//!
//! The guard (`verdict::on_egress`) moves the pod's queries to `lo`. There, a query's destination becomes the
//! address and port of the proxy's DNS, and its answer's source becomes the resolver's: the application sees
//! the resolver that it asked. The proxy cannot answer from that address itself, because its DNS sockets are
//! not transparent.
//!
//! The client's address stays, because the proxy identifies the pod by it. The client's port is replaced
//! where necessary: one socket may ask several resolvers at once, with the same DNS id (musl does), so the
//! port identifies the resolver that an answer comes from. See [`next_alias`].
//!
//! A pod has a fixed number of places for its flows ([`DNS_PLACES`]). When a flood has filled them, its own
//! queries are refused; other pods' places are not affected.

use crate::{
    abi::{
        Addr, Counter, DNS_PLACES, DnsFlow, DnsKey, LISTENER_OUTBOUND, MARK_PROXY, MARK_REFUSED,
        POD_DNS, POD_ENROLLED, PORT_DNS, PORT_PROXY_DNS, PROTOCOL_TCP, PROTOCOL_UDP, PodId,
    },
    verdict::{Env, Pods, Proxy, Segment, mesh_mark},
};

/// In how many places a flow may have its entry, and so how many resolvers one port can ask at once.
const PLACES: u16 = 8;
/// After this time no answer is expected anymore, ns. ztunnel's own lookups end sooner.
const ANSWER_NS: u64 = 30_000_000_000;
/// A TCP connection that has been idle this long may lose its place to another one, ns.
const IDLE_NS: u64 = 600_000_000_000;
/// The same for a connection that one end has closed, ns: by then nothing is retransmitted anymore.
const END_NS: u64 = 5_000_000_000;
/// [`DnsFlow::needed_until_ns`]: a CPU has claimed the place, and is about to enter its flow there.
pub const CLAIMED: u64 = u64::MAX;

/// A UDP datagram or TCP segment that could be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Addresses and ports. A datagram always opens.
    pub segment: Segment,
    /// Whether it is TCP.
    pub tcp: bool,
    /// Whether it can be a DNS query: TCP always, a datagram by its header. A server's answer to a client
    /// with source port 53 is not.
    pub is_query: bool,
    /// TCP with FIN or RST.
    pub ends: bool,
}

impl Message {
    /// The place of the flow with this alias.
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
    /// It is not this module's business.
    Other,
    /// It goes to the proxy's DNS, which becomes its destination, with this source port.
    Ask {
        /// The pod.
        pod_id: PodId,
        /// The alias, host byte order.
        from_port: u16,
        /// What to count.
        count: Option<Counter>,
    },
    /// It goes to the client, with the resolver as its source and this destination port.
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

/// What the decisions here ask the kernel.
pub trait DnsEnv: Env {
    /// Whether the proxy's DNS of this pod listens, for this protocol and family.
    fn dns_listens(&self, pod_id: PodId, message: &Message) -> bool;
    /// The time, ns of CLOCK_MONOTONIC.
    fn now(&self) -> u64;
    /// An entry of `dns_flows`.
    fn flow(&self, key: &DnsKey) -> Option<DnsFlow>;
    /// Records a packet of the client, or of the proxy, in an entry of `dns_flows`: see [`touched`].
    fn touch(&self, key: &DnsKey, message: &Message, from_client: bool);
    /// Enters a flow: into its own place if `own`, otherwise into a place that is empty or whose flow is no
    /// longer needed. If several CPUs want a place at the same moment, one gets it.
    fn enter(&self, key: &DnsKey, flow: &DnsFlow, own: bool) -> Entry;
}

/// What becomes of a flow that is to be entered in a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Entry {
    /// It has the place.
    Entered,
    /// Another flow has it.
    Taken,
    /// The kernel has no memory.
    Failed,
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
    // Whatever mark netfilter in the pod has given it. At other addresses of loopback, anybody may have the port.
    if *src_port == PORT_PROXY_DNS && src.is_localhost() {
        return answer(pod_id, message, env);
    }
    if matches!(mesh_mark(mark), MARK_PROXY | MARK_REFUSED) {
        return Dns::Other;
    }
    if !is_for_dns(pod_id, message, env) {
        return Dns::Other;
    }
    let found = find(pod_id, message, env);
    let alias = found as u16;
    let key = message.key(pod_id, alias);
    if message.tcp && !opens {
        // Open connections stay on their path when the pod's DNS is no longer captured. A connection that is
        // older than the capture is like any other.
        if found == NO_ALIAS {
            return Dns::Other;
        }
        env.touch(&key, message, true);
        return Dns::Ask { pod_id, from_port: alias, count: None };
    }
    if !env.dns_listens(pod_id, message) {
        return match env.proxy(pod_id, LISTENER_OUTBOUND, &message.segment) {
            Proxy::Listens => Dns::Refuse(pod_id, Counter::RefusedDnsAbsent),
            Proxy::AwayWithinGrace => Dns::Drop(pod_id, Counter::DroppedProxyAway),
            Proxy::Away => Dns::Refuse(pod_id, Counter::RefusedProxyAway),
        };
    }
    let count = Some(Counter::RedirectedDns);
    if found != NO_ALIAS && !message.tcp {
        env.touch(&key, message, true);
        return Dns::Ask { pod_id, from_port: alias, count };
    }
    let mut flow = DnsFlow {
        needed_until_ns: env.now() + if message.tcp { IDLE_NS } else { ANSWER_NS },
        client: *src,
        resolver: *dst,
        asked: 1,
        answered: 0,
        alias,
        resolver_port: *dst_port,
        client_port: *src_port,
        ended: 0,
    };
    let entered = if found == NO_ALIAS {
        claim(pod_id, message, &mut flow, env)
    } else {
        env.enter(&key, &flow, true) == Entry::Entered
    };
    if entered {
        Dns::Ask { pod_id, from_port: flow.alias, count }
    } else {
        Dns::Refuse(pod_id, Counter::RefusedDnsBusy)
    }
}

/// Whether a message of the pod is for the proxy's DNS, or may belong to a connection to it from before the
/// capture ended.
// A function of its own, like `find`: after its single return, few cases are left.
#[inline(never)]
fn is_for_dns(pod_id: PodId, message: &Message, env: &impl DnsEnv) -> bool {
    let Segment { dst, dst_port, opens, .. } = &message.segment;
    // A client that itself asks the proxy's DNS from the pod's address must not collide with an alias.
    let asks = *dst_port == PORT_DNS && !dst.is_loopback() && !dst.is_link_local()
        || *dst_port == PORT_PROXY_DNS && dst.is_loopback();
    if !asks || !message.is_query || message.segment.src.is_loopback() {
        return false;
    }
    if captured(pod_id, env) { !env.is_own(pod_id, dst) } else { message.tcp && !opens }
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
    // Without its query's entry, the answer would come from the wrong address, and possibly to a socket that
    // has not asked.
    if captured(pod_id, env) { Dns::Drop(pod_id, Counter::DroppedDnsAnswer) } else { Dns::Other }
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

/// What [`find`] returns for a flow without a place: not a port. A plain number is easier for the verifier
/// than an enum.
const NO_ALIAS: u32 = u32::MAX;

/// The alias of the message's flow, if it has a place. There may be empty ones before it, because the agent deletes
/// what is no longer needed. A place that is no longer needed may be given to another flow by another CPU at any moment:
/// only an open connection still uses it, and whoever opens a connection claims a place again.
// A function of its own, for the verifier: it has its own stack, one return, and few paths.
#[inline(never)]
fn find(pod_id: PodId, message: &Message, env: &impl DnsEnv) -> u32 {
    let now = env.now();
    let mut alias = message.segment.src_port;
    for _ in 0..PLACES {
        if let Some(flow) = env.flow(&message.key(pod_id, alias))
            && flow.alias == alias
            && is_of(&flow, message)
            && flow.needed_until_ns != CLAIMED
            && !(message.segment.opens && is_free(&flow, now))
        {
            return u32::from(alias);
        }
        alias = next_alias(alias);
    }
    NO_ALIAS
}

/// Enters a flow in the first of its places that is available, with the alias that belongs to it. Returns
/// whether there was one.
// For the verifier, like `find`.
#[inline(never)]
fn claim(pod_id: PodId, message: &Message, flow: &mut DnsFlow, env: &impl DnsEnv) -> bool {
    let mut alias = message.segment.src_port;
    for _ in 0..PLACES {
        flow.alias = alias;
        match env.enter(&message.key(pod_id, alias), flow, false) {
            Entry::Entered => return true,
            Entry::Taken => {}
            // The map is full, or there is no memory.
            Entry::Failed => return false,
        }
        alias = next_alias(alias);
    }
    false
}

/// Whether another flow may take the place of this one.
#[inline(always)]
pub fn is_free(flow: &DnsFlow, now: u64) -> bool {
    flow.needed_until_ns <= now
}

/// Whether a flow belongs to the message's client and resolver.
#[inline(always)]
fn is_of(flow: &DnsFlow, message: &Message) -> bool {
    let Segment { src, dst, src_port, dst_port, .. } = &message.segment;
    let differ = |a: &Addr, b: &Addr| {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.words(), b.words());
        (a0 ^ b0) | (a1 ^ b1) | (a2 ^ b2) | (a3 ^ b3)
    };
    let ports = (flow.client_port ^ *src_port) | (flow.resolver_port ^ *dst_port);
    differ(&flow.client, src) | differ(&flow.resolver, dst) | u32::from(ports) == 0
}

/// Updates a flow for a packet of the client, or of the proxy.
#[inline(always)]
pub fn touched(flow: &mut DnsFlow, message: &Message, from_client: bool, now: u64) {
    if flow.needed_until_ns == CLAIMED {
        return;
    }
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

/// The ports that each stand for a client's port and one of its resolvers. The first is the port itself, so a
/// client with a single resolver keeps its port. The others are derived from it.
#[inline(always)]
const fn next_alias(alias: u16) -> u16 {
    const STEP: u32 = 7919;
    // Port 0 is not usable. There is no branch for it, because the verifier would follow each branch through
    // the loop.
    ((alias as u32 + STEP - 1) % u16::MAX as u32 + 1) as u16
}

#[inline(always)]
fn captured(pod_id: PodId, env: &impl Pods) -> bool {
    const CAPTURED: u32 = POD_ENROLLED | POD_DNS;
    env.pod(pod_id).is_some_and(|pod| pod & CAPTURED == CAPTURED)
}

#[cfg(test)]
mod tests;
