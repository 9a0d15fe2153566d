//! Everything both sides of the kernel boundary agree on: constants, and the layout of map memory.
//!
//! Map memory holds integers only, padding is written out, and sizes are asserted at compile time
//! for every target this file is compiled for. Ports are in host byte order, addresses in network
//! byte order.

use core::net::{IpAddr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

/// Version of this layout, part of the pins' path: a pinned map is only reused by an agent that was built
/// with the same layout. Additions (a map, a counter, a flag) leave it as it is, and so does renaming a map
/// whose content is not needed after the upgrade. With another version, the pods' programs would be attached
/// twice.
pub const ABI_VERSION: u32 = 2;

/// The bits of a mark that belong to the mesh. Source: Istio, `tools/istio-iptables`, `0xfff`.
pub const MARK_MASK: u32 = 0xfff;
/// The mark of every socket of the proxy. Source: ztunnel `src/config.rs`, `PACKET_MARK` 1337.
pub const MARK_PROXY: u32 = 0x539;
/// The mark of a connection that has to go through the proxy whatever happens to its pod: the proxy opened it
/// to the application, or it was redirected when its pod left the mesh. Source: Istio's in-pod mark.
pub const MARK_REDIRECTED: u32 = 0x111;
/// The mark of what came in on a pod's interface, and of connections that are older than the pod's
/// enrollment: it keeps them off the redirection route.
pub const MARK_DIRECT: u32 = 0x0d1;
/// The mark of packets that came in on a virtual interface of a pod and go to the pod's proxy.
pub const MARK_VIRTUAL: u32 = 0x0d2;
/// The mark of packets that the guard moves to `lo`, because they would leave past the proxy.
pub const MARK_RESCUED: u32 = 0x0d3;
/// The mark of a SYN from outside that the proxy has to accept. If anybody else accepts it, that socket has
/// this mark or its own, but not [`MARK_DIRECT`].
pub const MARK_INBOUND: u32 = 0x0d4;
/// The mark of a SYN that the guard moves to `lo` to be refused.
pub const MARK_REFUSED: u32 = 0x0d5;

/// How long after the capture of a pod began the application may still answer a SYN from before. The kernel
/// gives up sooner. Source: Linux `net.ipv4.tcp_synack_retries`, whose default of 5 makes 63 s.
pub const HALF_OPEN_NS: u64 = 64_000_000_000;

/// The proxy's listener for connections that the pod opens. Source: ztunnel `src/config.rs`.
pub const PORT_OUTBOUND: u16 = 15001;
/// The proxy's listener for plaintext connections to the pod. Source: ztunnel `src/config.rs`.
pub const PORT_INBOUND: u16 = 15006;
/// The proxy's listener for HBONE connections to the pod. Source: ztunnel `src/config.rs`.
pub const PORT_HBONE: u16 = 15008;
/// The proxy's DNS, UDP and TCP, on 127.0.0.1 and ::1. Source: ztunnel `src/config.rs`.
pub const PORT_PROXY_DNS: u16 = 15053;
/// The port of resolvers.
pub const PORT_DNS: u16 = 53;

/// An IP address: 16 bytes in network byte order, IPv4 as `::ffff:a.b.c.d`.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Addr {
    /// The bytes.
    pub octets: [u8; 16],
}

impl Addr {
    /// The IPv4 address with these octets.
    #[inline(always)]
    pub fn v4(octets: [u8; 4]) -> Self {
        Self::from_words([0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes(octets)])
    }

    /// The address of these words, as the kernel's structs have them: in network byte order.
    // Programs go by words: by octets, the compiler would take an address apart and put it together again.
    #[inline(always)]
    pub fn from_words(words: [u32; 4]) -> Self {
        Self { octets: bytemuck::cast(words) }
    }

    /// The address as four words in network byte order. The last one is an IPv4 address.
    #[inline(always)]
    pub fn words(&self) -> [u32; 4] {
        bytemuck::cast(self.octets)
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        let [w0, w1, w2, _] = self.words();
        w0 | w1 == 0 && u32::from_be(w2) == 0xffff
    }

    /// Whether this is in 127.0.0.0/8 or is ::1.
    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        let [w0, w1, w2, w3] = self.words();
        match u32::from_be(w2) {
            0xffff => w0 | w1 == 0 && u32::from_be(w3) >> 24 == 127,
            0 => w0 | w1 == 0 && u32::from_be(w3) == 1,
            _ => false,
        }
    }

    /// Whether this is 127.0.0.1 or ::1.
    #[inline(always)]
    pub fn is_localhost(&self) -> bool {
        let [w0, w1, w2, w3] = self.words();
        match u32::from_be(w2) {
            0xffff => w0 | w1 == 0 && u32::from_be(w3) == 0x7f00_0001,
            0 => w0 | w1 == 0 && u32::from_be(w3) == 1,
            _ => false,
        }
    }

    /// Whether this is in fe80::/10.
    #[inline(always)]
    pub fn is_link_local(&self) -> bool {
        u32::from_be(self.words()[0]) >> 22 == 0xfe80 >> 6
    }

    /// The address as a standard library type.
    pub fn to_ip(self) -> IpAddr {
        Ipv6Addr::from(self.octets).to_canonical()
    }

    /// 127.0.0.1 or ::1.
    #[inline(always)]
    pub fn loopback(v4: bool) -> Self {
        if v4 { Self::v4([127, 0, 0, 1]) } else { Self::from_words([0, 0, 0, 1_u32.to_be()]) }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::v4(ip.octets()),
            IpAddr::V6(ip) => Self { octets: ip.octets() },
        }
    }
}

/// Key of the per-pod maps: the inode number of the pod's network namespace, which is unique among living
/// namespaces.
pub type PodId = u32;

/// [`PodEntry::decision`]: the pod is not in the mesh.
pub const DECISION_BYPASS: u32 = 0;
/// [`PodEntry::decision`]: the pod is in the mesh.
pub const DECISION_ENROLLED: u32 = 1;

/// [`PodEntry::flags`]: new connections are redirected. Without it an enrolled pod is being
/// prepared, or is on its way out.
pub const POD_CAPTURE: u32 = 1;
/// [`PodEntry::flags`]: inbound connections are not redirected, except HBONE.
pub const POD_BYPASS_INBOUND: u32 = 1 << 1;
/// [`PodEntry::flags`]: `inbound_ports` and `inbound_ranges` say which inbound connections are redirected.
pub const POD_INBOUND_RULES: u32 = 1 << 2;
/// [`PodEntry::flags`]: the pod's DNS goes to the proxy's DNS.
pub const POD_DNS: u32 = 1 << 3;
/// [`PodEntry::flags`]: `outbound_ports` and `outbound_ranges` say which of its calls are redirected.
pub const POD_OUTBOUND_RULES: u32 = 1 << 4;

/// Not in map memory: the programs add it to the flags of a pod with [`DECISION_ENROLLED`].
pub const POD_ENROLLED: u32 = 1 << 31;

/// Value of the map `pods`, whose key is a [`PodId`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PodEntry {
    /// One of `DECISION_*`.
    pub decision: u32,
    /// Why: the agent's `membership::Reason` as a number. The kernel does not read it.
    pub reason: u32,
    /// Bits of `POD_*`.
    pub flags: u32,
    /// The index of the interface that leads out of the pod; 0 when there is none.
    pub uplink: u32,
    /// When the capture began, ns of CLOCK_MONOTONIC; 0 while nothing is captured, or if nothing ran before
    /// the capture.
    pub captured_at_ns: u64,
    /// The pod's first IPv4 address, or zeros. Like `v6`, it is only for whoever dumps the map.
    pub v4: Addr,
    /// The pod's first IPv6 address, or zeros.
    pub v6: Addr,
}

/// Key of the map `addresses`: an address that a pod's network namespace has, on any interface. Several pods
/// may have the same one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct OwnAddress {
    /// The pod.
    pub pod_id: PodId,
    /// The address.
    pub addr: Addr,
}

/// [`ListenerKey::kind`]: [`PORT_OUTBOUND`].
pub const LISTENER_OUTBOUND: u32 = 0;
/// [`ListenerKey::kind`]: [`PORT_INBOUND`].
pub const LISTENER_INBOUND: u32 = 1;
/// [`ListenerKey::kind`]: [`PORT_HBONE`].
pub const LISTENER_HBONE: u32 = 2;

/// Where in its packet the program `find_proxy` finds its question, in host byte order: behind the link
/// header.
pub const QUESTION_AT: usize = 14;
/// The bits of a question that say which kind is looked for, one of `LISTENER_*`.
pub const QUESTION_KIND: u32 = 0xf;
/// The bit of a question about IPv4 connections.
pub const QUESTION_V4: u32 = 1 << 4;
/// The bit of a question whose listener is to be entered into `listeners`.
pub const QUESTION_ENTER: u32 = 1 << 5;
/// By how many bits a question shifts the port of the client that is looked for a listener.
pub const QUESTION_CLIENT: u32 = 16;
/// What `find_proxy` returns where the proxy does not listen.
pub const FOUND_NOTHING: i32 = 0;
/// The same of a listener that `listeners` had, or that was not to be entered.
pub const FOUND_KNOWN: i32 = 1;
/// The same of another one.
pub const FOUND_NEW: i32 = 2;

/// By how much [`find_proxy`] shifts the bits of listeners that IPv4 connections find.
pub const LISTENERS_V4: u32 = 4;
/// By how many bits what [`find_proxy`] returns of new listeners is shifted.
pub const NEW_LISTENERS: u32 = 8;

/// Asks the program `find_proxy` for the proxy's listeners, one by one, by `ask`, which runs it. Returns a bit
/// for each of `LISTENER_*` that IPv6 connections find, the same, shifted by [`LISTENERS_V4`], for IPv4,
/// and, shifted by [`NEW_LISTENERS`], for each that was not known.
///
/// # Errors
///
/// Those of `ask`.
pub fn find_proxy<E>(mut ask: impl FnMut(u32) -> Result<i32, E>) -> Result<u32, E> {
    // Others may share the proxy's port, and get some of the clients. In the program, a loop would be too many
    // cases for the verifier of Linux 6.1.
    const CLIENTS: u32 = 8;
    let mut ask = |question| {
        for client in 1..=CLIENTS {
            let found = ask(question | client << QUESTION_CLIENT)?;
            if found != FOUND_NOTHING {
                return Ok(found);
            }
        }
        Ok(FOUND_NOTHING)
    };
    let mut all = 0;
    for kind in [LISTENER_OUTBOUND, LISTENER_INBOUND, LISTENER_HBONE] {
        let v6 = ask(kind | QUESTION_ENTER)?;
        // One socket serves both families.
        let enter = if v6 == FOUND_NOTHING { QUESTION_ENTER } else { 0 };
        let v4 = ask(kind | QUESTION_V4 | enter)?;
        all |= u32::from(v6 != FOUND_NOTHING) << kind
            | u32::from(v4 != FOUND_NOTHING) << (kind + LISTENERS_V4)
            | u32::from(v6 == FOUND_NEW || v4 == FOUND_NEW) << (kind + NEW_LISTENERS);
    }
    Ok(all)
}

/// Key of `listeners` (the proxy's listening sockets) and of `proxy_missing`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ListenerKey {
    /// The pod.
    pub pod_id: PodId,
    /// One of `LISTENER_*`.
    pub kind: u32,
}

/// A TCP connection as the pod's socket sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Flow {
    /// The address of the socket in the pod.
    pub local: Addr,
    /// The address of its peer.
    pub remote: Addr,
    /// Port of `local`, host byte order.
    pub local_port: u16,
    /// Port of `remote`, host byte order.
    pub remote_port: u16,
}

/// Key of `inbound_ports`, matched by longest prefix: the pod, then the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PodPort {
    /// The pod, always matched in full.
    pub pod_id: PodId,
    /// A port of the pod, network byte order.
    pub port: [u8; 2],
    /// Zero; never matched.
    pub padding: [u8; 2],
}

impl PodPort {
    /// Bits before the port.
    pub const PREFIX: u32 = 32;
    /// Bits of a whole key.
    pub const BITS: u32 = Self::PREFIX + 16;

    /// The key of `port`, host byte order.
    #[inline(always)]
    pub const fn new(pod_id: PodId, port: u16) -> Self {
        Self { pod_id, port: port.to_be_bytes(), padding: [0; 2] }
    }
}

/// Key of `inbound_ranges`, matched by longest prefix: the pod, then the peer's address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PodPeer {
    /// The pod, always matched whole.
    pub pod_id: PodId,
    /// The address of whoever calls the pod.
    pub peer: Addr,
}

impl PodPeer {
    /// Bits before the address.
    pub const PREFIX: u32 = 32;
    /// Bits of a whole key.
    pub const BITS: u32 = Self::PREFIX + 128;
}

/// [`PodPeer::pod_id`] of entries that apply to every pod: sources of probes.
pub const EVERY_POD: PodId = 0;

/// Value of the four maps of prefixes: redirected, like everything that no key matches.
pub const PREFIX_REDIRECT: u32 = 0;
/// Value of the four maps of prefixes: not redirected.
pub const PREFIX_BYPASS: u32 = 1;

/// How many DNS flows of each protocol a pod can have at once. Each pod has numbered places of its own, so no
/// pod can take another's.
pub const DNS_PLACES: u16 = 1024;

/// Key of the map `dns_flows`: one of a pod's places.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct DnsKey {
    /// The pod.
    pub pod_id: PodId,
    /// The number of the place: [`DnsFlow::alias`] modulo [`DNS_PLACES`].
    pub place: u16,
    /// [`PROTOCOL_TCP`] or [`PROTOCOL_UDP`].
    pub protocol: u16,
}

/// [`DnsKey::protocol`]
pub const PROTOCOL_TCP: u16 = 6;
/// [`DnsKey::protocol`]
pub const PROTOCOL_UDP: u16 = 17;

/// Value of the map `dns_flows`: who asked which resolver, so that the answer appears to come from that
/// resolver.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct DnsFlow {
    /// When the place becomes free for another flow, ns of CLOCK_MONOTONIC. `u64::MAX`: another flow is
    /// being entered in its place at this moment.
    pub needed_until_ns: u64,
    /// The client's address in the pod.
    pub client: Addr,
    /// The address to which the client sent its query.
    pub resolver: Addr,
    /// How many packets the client has sent. CPUs that count at the same moment may lose a count. Queries and
    /// answers are counted on different CPUs, so each has its own field.
    pub asked: u32,
    /// How many the proxy has sent.
    pub answered: u32,
    /// The client's port as the proxy sees it, host byte order.
    pub alias: u16,
    /// Port of `resolver`, host byte order.
    pub resolver_port: u16,
    /// The client's own port, host byte order.
    pub client_port: u16,
    /// 1 when an end of the TCP connection has closed it.
    pub ended: u16,
}

/// Key of the map `ways`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct PodFlow {
    /// The pod.
    pub pod_id: PodId,
    /// The connection as the pod's socket sees it.
    pub flow: Flow,
}

/// One connection of a socket. A later one may have the same addresses and ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Connection {
    /// Its addresses and ports, as its socket has them.
    pub flow: Flow,
    /// The socket's first sequence number: the ISN if it connects, ISN + 1 if it accepts.
    pub first_seq: u32,
}

impl Connection {
    /// A socket's first sequence number, from `snd_una` and `bytes_acked` of its `struct tcp_sock`.
    #[inline(always)]
    pub const fn first_seq(snd_una: u32, bytes_acked: u64) -> u32 {
        snd_una.wrapping_sub(bytes_acked as u32)
    }
}

/// How many half-open connections of one pod the map `half_open` can have at once. Like DNS flows, they have
/// numbered places of their own.
pub const HALF_OPEN_PLACES: u16 = 256;

/// How many of these places a connection can have.
pub const HALF_OPEN_CHOICES: u16 = 4;

/// Key of the map `half_open`: one of a pod's places.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct HalfOpenKey {
    /// The pod.
    pub pod_id: PodId,
    /// The number of the place.
    pub place: u32,
}

impl HalfOpenKey {
    /// One of a connection's places; which one is `choice` modulo [`HALF_OPEN_CHOICES`].
    #[inline(always)]
    pub fn new(pod_id: PodId, flow: &Flow, choice: u32) -> Self {
        const GROUPS: u16 = HALF_OPEN_PLACES / HALF_OPEN_CHOICES;
        let choices = u32::from(HALF_OPEN_CHOICES);
        let place = u32::from(flow.remote_port % GROUPS) * choices + choice % choices;
        Self { pod_id, place }
    }
}

/// `lo`'s index, in every namespace. Source: Linux `include/net/flow.h`, `LOOPBACK_IFINDEX`.
pub const LOOPBACK_IFINDEX: u32 = 1;

/// How many prefixes one pod may have in each of the maps `inbound_ports`, `inbound_ranges`, `outbound_ports`
/// and `outbound_ranges`, which have room for that many of every pod. The agent enforces the limit.
pub const POD_PREFIXES: usize = 512;

/// How many virtual interfaces one pod may have in the map `virtual_ifs`. The agent enforces this limit, too.
pub const POD_VIRTUAL_INTERFACES: usize = 64;

/// How many connections of one pod the map `ways` may hold.
pub const POD_WAYS: u32 = 8192;

/// Value of the map `settled`, stored with a socket: the path that was determined for its connection. Another
/// connection of the same socket is decided again, unless it is the proxy's: each of its sockets has only one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Settled {
    /// The connection.
    pub connection: Connection,
    /// One of `WAY_*`.
    pub way: u32,
}

/// Value of the map `this_pod`: what a pod's own program passes to the shared program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ThisPod {
    /// The address of the context with which the pod's program runs. If an interrupt came in between, the
    /// shared program finds another one here.
    pub context: u64,
    /// The pod.
    pub pod_id: PodId,
    /// Zero.
    pub padding: u32,
}

/// Value of the map `ways`: the connection's packets go direct.
pub const WAY_DIRECT: u32 = 1;
/// Value of the map `ways`: the connection's packets go through the proxy.
pub const WAY_REDIRECTED: u32 = 2;
/// [`Settled::way`]: the proxy's own connection, which leaves the pod.
pub const WAY_PROXYS: u32 = 3;
/// [`Settled::way`]: the same, determined while [`ANY_CGROUP`] was set.
pub const WAY_MARKED: u32 = 4;

/// Key of the map `proxy_cgroups`: with the mark, sockets of any cgroup pass for the proxy's. Set until the
/// first proxy has connected to the agent, and while a proxy is connected whose cgroup is unknown.
pub const ANY_CGROUP: u64 = 0;

/// Key of the map `virtual_ifs`: an interface of a VM or a nested container, whose TCP counts as the pod's
/// own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct VirtualInterface {
    /// The pod.
    pub pod_id: PodId,
    /// The interface's index in the pod's network namespace.
    pub index: u32,
}

/// Value of the map `virtual_ifs`: new connections are redirected. Without it, open connections stay on their
/// path, and new ones are forwarded.
pub const VIRTUAL_CAPTURE: u32 = 1;
/// Value of the map `virtual_ifs`: `outbound_ports` and `outbound_ranges` say which new connections are
/// redirected.
pub const VIRTUAL_RULES: u32 = 1 << 1;

/// The only entry, per CPU, of the map `hints`: the connection whose packet is on its way up the stack on
/// this CPU, and what tcx knows about it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Hint {
    /// The address of the kernel's `struct net_device` that the packet is on: it tells the pod.
    pub device: u64,
    /// The flow.
    pub flow: Flow,
    /// One of `HINT_*`.
    pub kind: u32,
}

/// [`Hint::kind`]: there is no hint.
pub const HINT_NONE: u32 = 0;
/// [`Hint::kind`]: the proxy delivers to the application.
pub const HINT_FROM_PROXY: u32 = 1;
/// [`Hint::kind`]: tcx itself is asking the kernel for a socket; no packet is delivered to what it finds.
pub const HINT_QUESTION: u32 = 2;
/// [`Hint::kind`]: the packet came in on `lo`, so the pod sent it. To `sk_lookup`, what goes to an address of
/// the pod seems to have come in on the interface that has the address.
pub const HINT_FROM_POD: u32 = 3;
/// [`Hint::kind`]: a guest behind a virtual interface of the pod opens a connection to somebody else.
pub const HINT_FROM_VIRTUAL: u32 = 4;

/// Key of the map `counters`; the value is a `u64`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct CounterKey {
    /// The pod.
    pub pod_id: PodId,
    /// One of [`Counter`].
    pub counter: u32,
}

/// What is counted, per pod. Connections are counted once, when the kernel looks for their
/// listener; packets are counted where they are dropped.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connections of the pod that were handed to the proxy.
    RedirectedOutbound = 0,
    /// Plaintext connections to the pod that were handed to the proxy.
    RedirectedInbound = 1,
    /// HBONE connections to the pod's proxy.
    Hbone = 2,
    /// Connections that the proxy opened to the application.
    FromProxy = 3,
    /// Connections of the pod to itself.
    Local = 4,
    /// Connections to ports that nobody listens on; answered with RST.
    NoListener = 5,
    /// SYNs dropped because no proxy listens, within the grace. The client sends them again.
    DroppedProxyAway = 6,
    /// Connections refused with RST because no proxy listens.
    RefusedProxyAway = 7,
    /// Connections refused because nothing is known about their pod.
    RefusedUnknownPod = 8,
    /// Packets held back briefly while a pod enters or leaves the mesh, or its settings change.
    HeldInTransition = 9,
    /// Connections to the pod that its settings exclude from redirection.
    BypassedInbound = 10,
    /// DNS queries over UDP, and DNS connections over TCP, that were handed to the proxy's DNS.
    RedirectedDns = 11,
    /// DNS queries and connections refused because the proxy listens but has no DNS.
    RefusedDnsAbsent = 12,
    /// DNS queries and connections refused because too many others are still open.
    RefusedDnsBusy = 13,
    /// Queries and answers that were dropped because they are fragments or have IPv6 extension headers.
    DroppedDnsUnreadable = 14,
    /// Answers of the proxy's DNS that were dropped because no query is known for them.
    DroppedDnsAnswer = 15,
    /// Connections of kubelet to the pod.
    KubeletProbe = 16,
    /// Connections to the pod from configured sources of probes.
    ProbeSource = 17,
    /// TCP from the pod or from a guest that was dropped because it is a fragment or has IPv6 extension
    /// headers: it could open a connection.
    DroppedUnreadable = 18,
    /// Connections that the proxy opened to the application from the client's address, refused because
    /// another connection uses that port.
    RefusedPortTaken = 19,
    /// Connections of the pod that its own marks, rules or routes would have taken past the proxy; handed to
    /// the proxy anyway.
    RescuedOutbound = 20,
    /// Connections of the proxy to the application whose answers would have left by an interface;
    /// brought back to the proxy.
    RescuedInbound = 21,
    /// Connections that settings exclude, and that the pod's marks or rules would have brought to the proxy;
    /// they leave by the interface.
    RescuedDirect = 22,
    /// Connections to the application that came past the proxy (by TPROXY, say) although no setting
    /// lets them in; answered with RST.
    RefusedPastProxy = 23,
    /// Connections from outside whose source is an address of the pod itself, or loopback; dropped.
    RefusedForgedAddress = 24,
    /// Connections that the pod only forwards, for guests behind an interface that no annotation names.
    Forwarded = 25,
    /// Connections of sockets that have the proxy's mark but do not belong to a proxy that the agent knows,
    /// and connections of the proxy to its own ports in the pod; refused with RST.
    RefusedProxysMark = 26,
    /// SYNs of the pod that its own marks, rules or routes would have taken past the proxy, dropped because
    /// the kernel had no memory to record the connection's path. The client sends them again.
    DroppedNoMemory = 27,
}

impl Counter {
    /// Every counter, with its name in `status` and the metrics.
    pub const ALL: [(Counter, &'static str); 28] = [
        (Counter::RedirectedOutbound, "redirected_outbound"),
        (Counter::RedirectedInbound, "redirected_inbound"),
        (Counter::Hbone, "hbone"),
        (Counter::FromProxy, "from_proxy"),
        (Counter::Local, "local"),
        (Counter::NoListener, "no_listener"),
        (Counter::DroppedProxyAway, "dropped_proxy_away"),
        (Counter::RefusedProxyAway, "refused_proxy_away"),
        (Counter::RefusedUnknownPod, "refused_unknown_pod"),
        (Counter::HeldInTransition, "held_in_transition"),
        (Counter::BypassedInbound, "bypassed_inbound"),
        (Counter::RedirectedDns, "redirected_dns"),
        (Counter::RefusedDnsAbsent, "refused_dns_absent"),
        (Counter::RefusedDnsBusy, "refused_dns_busy"),
        (Counter::DroppedDnsUnreadable, "dropped_dns_unreadable"),
        (Counter::DroppedDnsAnswer, "dropped_dns_answer"),
        (Counter::KubeletProbe, "kubelet_probe"),
        (Counter::ProbeSource, "probe_source"),
        (Counter::DroppedUnreadable, "dropped_unreadable"),
        (Counter::RefusedPortTaken, "refused_port_taken"),
        (Counter::RescuedOutbound, "rescued_outbound"),
        (Counter::RescuedInbound, "rescued_inbound"),
        (Counter::RescuedDirect, "rescued_direct"),
        (Counter::RefusedPastProxy, "refused_past_proxy"),
        (Counter::RefusedForgedAddress, "refused_forged_address"),
        (Counter::Forwarded, "forwarded"),
        (Counter::RefusedProxysMark, "refused_proxys_mark"),
        (Counter::DroppedNoMemory, "dropped_no_memory"),
    ];
}

/// Entry of the ring buffer `verdicts`: a verdict that was counted while somebody observed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct VerdictEvent {
    /// When, ns of CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// The pod in which it was decided.
    pub pod_id: PodId,
    /// What was counted for it: a [`Counter`].
    pub counter: u32,
    /// The packet's source.
    pub src: Addr,
    /// The packet's destination.
    pub dst: Addr,
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
    /// IPPROTO_TCP or IPPROTO_UDP; 0: the packet could not be read, and addresses and ports are 0.
    pub protocol: u32,
}

/// Value of the map `saved_sysctls`: the pod's sysctls before enrollment, in the order of the agent's
/// `dataplane::sysctl::SYSCTLS`; [`SYSCTL_ABSENT`] if the kernel has no such sysctl.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SavedSysctls {
    /// The values. The last one has a bit for each of the proxy's ports that was already reserved.
    pub values: [i32; 7],
}

/// [`SavedSysctls::values`]: the kernel had no such sysctl (IPv6 is off, say).
pub const SYSCTL_ABSENT: i32 = i32::MIN;

/// Offsets in the kernel's `struct sock_common`, `struct net`, `struct sk_buff`, `struct net_device`,
/// `struct sock`, `struct cgroup`, `struct kernfs_node`, `struct tcp_sock` and `struct tcp_request_sock`, bytes.
/// Source: the running kernel's BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct KernelOffsets {
    /// `skc_family`, u16, host byte order.
    pub family: u32,
    /// `skc_state`, u8.
    pub state: u32,
    /// `skc_num`, u16, host byte order.
    pub local_port: u32,
    /// `skc_dport`, u16, network byte order.
    pub remote_port: u32,
    /// `skc_rcv_saddr`, 4 bytes, network byte order.
    pub local_v4: u32,
    /// `skc_daddr`, 4 bytes, network byte order.
    pub remote_v4: u32,
    /// `skc_v6_rcv_saddr`, 16 bytes, network byte order.
    pub local_v6: u32,
    /// `skc_v6_daddr`, 16 bytes, network byte order.
    pub remote_v6: u32,
    /// `skc_net`, the address of the socket's `struct net`.
    pub net: u32,
    /// `ns.inum` of `struct net`, u32: the namespace's inode number.
    pub net_inode: u32,
    /// `dev` of `struct sk_buff`, the address of a packet's `struct net_device`.
    pub packet_device: u32,
    /// `nd_net` of `struct net_device`, the address of its `struct net`.
    pub device_net: u32,
    /// `sk_cgrp_data.cgroup` of `struct sock`, the address of the `struct cgroup` (v2) in which the process
    /// was when it created the socket.
    pub socket_cgroup: u32,
    /// `kn` of `struct cgroup`, the address of its `struct kernfs_node`.
    pub cgroup_node: u32,
    /// `id` of `struct kernfs_node`, u64: the inode number of the cgroup's directory.
    pub node_id: u32,
    /// `snd_una` of `struct tcp_sock`, u32: the first sequence number that is not acknowledged.
    pub snd_una: u32,
    /// `bytes_acked` of `struct tcp_sock`, u64: how many sequence numbers have been acknowledged.
    pub bytes_acked: u32,
    /// `snt_isn` of `struct tcp_request_sock`, u32: the sequence number of the SYN-ACK.
    pub snt_isn: u32,
    /// `ir_mark` of `struct inet_request_sock`, u32: the mark that the accepted socket gets.
    pub ir_mark: u32,
}

const _: () = {
    assert!(size_of::<KernelOffsets>() == 76);
    assert!(size_of::<VerdictEvent>() == 56);
    assert!(size_of::<Addr>() == 16);
    assert!(size_of::<PodEntry>() == 56);
    assert!(size_of::<OwnAddress>() == 20);
    assert!(size_of::<ListenerKey>() == 8);
    assert!(size_of::<Flow>() == 36);
    assert!(size_of::<PodPort>() == 8);
    assert!(size_of::<PodPeer>() == 20);
    assert!(size_of::<DnsKey>() == 8);
    assert!(size_of::<DnsFlow>() == 56);
    assert!(size_of::<PodFlow>() == 40);
    assert!(size_of::<Connection>() == 40);
    assert!(size_of::<HalfOpenKey>() == 8);
    assert!(size_of::<Settled>() == 44);
    assert!(size_of::<ThisPod>() == 16);
    assert!(size_of::<Hint>() == 48);
    assert!(size_of::<VirtualInterface>() == 8);
    assert!(size_of::<CounterKey>() == 8);
    assert!(size_of::<SavedSysctls>() == 28);
};

#[cfg(feature = "user")]
mod user {
    use super::{
        Addr, Connection, CounterKey, DnsFlow, DnsKey, Flow, HalfOpenKey, Hint, KernelOffsets,
        ListenerKey, OwnAddress, PodEntry, PodFlow, PodPeer, PodPort, SavedSysctls, Settled,
        ThisPod, VerdictEvent, VirtualInterface,
    };

    macro_rules! pod {
        ($($t:ty),+) => {$(
            // SAFETY: `bytemuck::Pod` has been derived: any bit pattern is valid, no padding.
            #[expect(unsafe_code, reason = "the trait is unsafe; bytemuck has checked its terms")]
            unsafe impl aya::Pod for $t {}
        )+};
    }
    pod!(
        Addr,
        Connection,
        CounterKey,
        DnsFlow,
        DnsKey,
        Flow,
        HalfOpenKey,
        Hint,
        ListenerKey,
        OwnAddress,
        PodEntry,
        PodFlow,
        PodPeer,
        PodPort,
        SavedSysctls,
        Settled,
        KernelOffsets,
        ThisPod,
        VerdictEvent,
        VirtualInterface
    );
}

#[cfg(test)]
mod tests;
