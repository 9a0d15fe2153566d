//! What surrounds the programs: the pods, and who listens. It is set up in the kernel, and kept
//! here a second time, where the decisions in [`verdict`] ask it as the model.
//!
//! [`verdict`]: redirect_ebpf::verdict

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    sync::OnceLock,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use fastrand::Rng;
use nix::sys::socket::{setsockopt, sockopt::TcpRepair};
use procfs::process::Process;
use redirect_agent::cgroup::Cgroup;
use redirect_ebpf::{
    abi::{
        ANY_CGROUP, Addr, Counter, DECISION_BYPASS, DECISION_ENROLLED, DNS_PLACES, DnsFlow, DnsKey,
        Flow, HALF_OPEN_NS, HINT_QUESTION, Hint, LISTENER_HBONE, LISTENER_INBOUND,
        LISTENER_OUTBOUND, LISTENERS_V4, MARK_PROXY, MARK_REDIRECTED, NEW_LISTENERS, OwnAddress,
        POD_BYPASS_INBOUND, POD_CAPTURE, POD_DNS, POD_ENROLLED, POD_INBOUND_RULES, PORT_DNS,
        PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PORT_PROXY_DNS, PROTOCOL_TCP, PROTOCOL_UDP,
        PodEntry, PodId, VIRTUAL_CAPTURE, VIRTUAL_RULES,
    },
    dns::{self, DnsEnv, Entry, Message},
    verdict::{self, Env, Pods, Proxy, Receiver, Segment, Sender, Steer},
};
use socket2::{Domain, Socket, Type};

use crate::{packet::choose, sys};

const OWN: [&str; 4] = ["10.0.0.2", "10.0.0.3", "fd00::2", "fd00::3"];

/// The pod whose namespace the calling thread is in.
#[expect(clippy::expect_used, reason = "a test: its thread has a namespace")]
pub fn own_id() -> PodId {
    let netns = std::fs::metadata("/proc/thread-self/ns/net").expect("our network namespace");
    PodId::try_from(netns.ino()).expect("its inode number")
}

thread_local! {
    static DEVICE: Cell<u64> = const { Cell::new(0) };
}

/// The kernel's `struct net_device` of `lo` in that namespace, once it is known.
pub fn own_device() -> u64 {
    DEVICE.get()
}

/// Makes it known.
pub fn set_own_device(device: u64) {
    DEVICE.set(device);
}

/// The cgroup that the test's sockets are of.
fn own_cgroup() -> Result<u64> {
    static OWN: OnceLock<u64> = OnceLock::new();
    match OWN.get() {
        Some(own) => Ok(*own),
        None => {
            let own = Process::myself()?;
            let own = Cgroup::of(&own, &own)?.open()?.1;
            Ok(*OWN.get_or_init(|| own))
        }
    }
}

/// The pod's own, or another one's.
pub fn pod_id(rng: &mut Rng) -> PodId {
    if rng.bool() { own_id() } else { choose(rng, &others()) }
}

/// Those of the other pods, the last one of which nobody knows.
pub fn others() -> [PodId; 4] {
    let [a, b, c] = OTHERS.map(|(pod_id, ..)| pod_id);
    [a, b, c, 4_026_532_005]
}

/// The node's other pods: the decision, the flags, the addresses.
const OTHERS: [(PodId, u32, u32, [&str; 2]); 3] = [
    (4_026_532_002, DECISION_ENROLLED, POD_CAPTURE | POD_DNS, ["10.0.0.10", "fd00::10"]),
    (4_026_532_003, DECISION_BYPASS, 0, ["10.0.0.11", "fd00::11"]),
    (4_026_532_004, DECISION_ENROLLED, 0, ["10.0.0.12", "fd00::12"]),
];
const STRANGERS_V4: [&str; 6] =
    ["10.96.0.1", "192.0.2.1", "127.0.0.1", "127.255.255.255", "128.0.0.1", "169.254.7.127"];
const STRANGERS_V6: [&str; 7] =
    ["2001:db8::1", "fd00:10::1", "::1", "::2", "fe80::1", "febf::1", "fec0::1"];
/// In an IPv6 packet: what our own form of IPv4 addresses could be confused by.
const MAPPED: [&str; 3] = ["::ffff:10.0.0.2", "::ffff:127.0.0.1", "::ffff:192.0.2.1"];

const APPLICATION_PORTS: [u16; 3] = [80, 8080, 9090];
const KINDS: [(u32, u16); 3] = [
    (LISTENER_OUTBOUND, PORT_OUTBOUND),
    (LISTENER_INBOUND, PORT_INBOUND),
    (LISTENER_HBONE, PORT_HBONE),
];

/// Source and destination of a packet, with the pod's own in most of them.
pub fn addresses(rng: &mut Rng, v4: bool) -> (Addr, Addr) {
    let own = own(rng, v4);
    match rng.u8(..8) {
        0..3 => (own, any(rng, v4)),
        3..6 => (any(rng, v4), own),
        _ => (any(rng, v4), any(rng, v4)),
    }
}

fn own(rng: &mut Rng, v4: bool) -> Addr {
    known(OWN[rng.usize(..2) + if v4 { 0 } else { 2 }])
}

fn any(rng: &mut Rng, v4: bool) -> Addr {
    match rng.u8(..8) {
        0..2 => own(rng, v4),
        2..5 => known(choose(rng, &OTHERS).3[usize::from(!v4)]),
        _ if v4 => known(choose(rng, &STRANGERS_V4)),
        _ if rng.u8(..8) == 0 => known(choose(rng, &MAPPED)),
        _ => known(choose(rng, &STRANGERS_V6)),
    }
}

pub fn port(rng: &mut Rng) -> u16 {
    match rng.u8(..8) {
        0..4 => choose(rng, &APPLICATION_PORTS),
        4..6 => choose(rng, &KINDS).1,
        6 => choose(rng, &[PORT_DNS, PORT_DNS, PORT_PROXY_DNS]),
        _ => rng.u16(32768..),
    }
}

/// An address of this file.
#[expect(clippy::expect_used, reason = "they are addresses")]
fn known(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("an address").into()
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    pub socket: Socket,
    pub bound: SocketAddr,
    pub cookie: u64,
    only_v6: bool,
    marked: bool,
}

impl Listener {
    pub fn open(bound: SocketAddr, only_v6: bool, mark: u32) -> Result<Self> {
        let open = || {
            let socket = Socket::new(Domain::for_address(bound), Type::STREAM, None)?;
            if bound.is_ipv4() {
                socket.set_freebind_v4(true)?;
            } else {
                socket.set_only_v6(only_v6)?;
                socket.set_freebind_v6(true)?;
            }
            socket.set_mark(mark)?;
            socket.bind(&bound.into())?;
            socket.listen(1)?;
            let bound = socket.local_addr()?.as_socket().unwrap_or(bound);
            let cookie = socket.cookie()?;
            // A socket that is bound to an IPv6 address is for IPv6 only, too.
            let only_v6 = bound.is_ipv6() && (only_v6 || !bound.ip().is_unspecified());
            let marked = mark & 0xfff == MARK_PROXY;
            std::io::Result::Ok(Self { socket, bound, cookie, only_v6, marked })
        };
        open().with_context(|| format!("listen on {bound}"))
    }

    pub fn open_udp(bound: SocketAddr, mark: u32) -> Result<Self> {
        let open = || {
            let socket = Socket::new(Domain::for_address(bound), Type::DGRAM, None)?;
            // The namespace's lo is down.
            match bound.is_ipv4() {
                true => socket.set_freebind_v4(true)?,
                false => socket.set_freebind_v6(true)?,
            }
            socket.set_mark(mark)?;
            socket.bind(&bound.into())?;
            let cookie = socket.cookie()?;
            let marked = mark & 0xfff == MARK_PROXY;
            std::io::Result::Ok(Self { socket, bound, cookie, only_v6: bound.is_ipv6(), marked })
        };
        open().with_context(|| format!("open UDP socket {bound}"))
    }

    /// Whether the kernel finds it for a packet to this address.
    pub fn hears(&self, to: &Addr, port: u16) -> bool {
        self.bound.port() == port
            && match self.bound.ip() {
                ip if !ip.is_unspecified() => Addr::from(ip) == *to,
                ip if ip.is_ipv4() => to.is_v4(),
                _ => !(self.only_v6 && to.is_v4()),
            }
    }

    /// Whether `sk_lookup` may choose it for a packet of this family.
    pub fn takes(&self, v4: bool) -> bool {
        if v4 { !self.only_v6 } else { self.bound.is_ipv6() }
    }
}

/// An open connection.
#[derive(Debug)]
pub struct Connection {
    pub flow: Flow,
    /// Whether it is the proxy's.
    pub marked: bool,
    _socket: Socket,
}

impl Connection {
    /// Opens one without a packet, and without anybody at the other end; `None` where the kernel lets
    /// nobody connect so.
    pub fn open(flow: Flow, mark: u32) -> Option<Self> {
        let local = SocketAddr::new(flow.local.to_ip(), flow.local_port);
        let remote = SocketAddr::new(flow.remote.to_ip(), flow.remote_port);
        let open = || {
            let socket = Socket::new(Domain::for_address(local), Type::STREAM, None)?;
            match local.is_ipv4() {
                true => socket.set_freebind_v4(true)?,
                false => socket.set_freebind_v6(true)?,
            }
            socket.set_mark(mark)?;
            setsockopt(&socket, TcpRepair, &1)?;
            socket.bind(&local.into())?;
            socket.connect(&remote.into())?;
            let bound = socket.local_addr()?.as_socket();
            std::io::Result::Ok((socket, bound))
        };
        // From a broadcast address the kernel connects by another one.
        let (socket, bound) = open().ok()?;
        let marked = mark & 0xfff == MARK_PROXY;
        (bound == Some(local)).then_some(Self { flow, marked, _socket: socket })
    }
}

/// Since when a proxy does not listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// The grace is running.
    Now,
    /// The grace is over.
    LongAgo,
}

/// Key of `listeners` and `proxy_missing`: the pod and the kind.
pub type Key = (PodId, u32);

/// What the programs themselves change.
#[derive(Debug, Default)]
pub struct State {
    /// The map `listeners`: the cookies of the sockets.
    pub listeners: BTreeMap<Key, u64>,
    /// The map `proxy_missing`.
    pub missing: BTreeMap<Key, Since>,
    /// The map `dns_flows`, but for the times, which are those of [`World::now`].
    pub flows: BTreeMap<DnsKey, DnsFlow>,
    /// The maps `strays` and `any_strays`.
    pub strays: (BTreeSet<PodId>, bool),
    /// The map `hints`, if there is one: questions are part of it.
    pub hint: Option<Hint>,
    /// Whether nobody listened where an answer came from.
    pub deaf: bool,
}

/// The surroundings.
#[derive(Debug)]
pub struct World {
    pub pods: BTreeMap<PodId, PodEntry>,
    pub addresses: BTreeSet<OwnAddress>,
    /// What keeps calls to the pod itself off the proxy: a port, a peer.
    pub excluded: (Option<u16>, Option<Addr>),
    /// Bits of `VIRTUAL_*` of the virtual interface, if there is one.
    pub virtual_flags: Option<u32>,
    /// What keeps calls of the pod and of its guests off the proxy: a port, an address.
    pub excluded_outbound: (Option<u16>, Option<Addr>),
    /// Where probes come from.
    pub probe_source: Option<Addr>,
    /// The connection of kubelet's that is noted, if it is recent.
    pub kubelets: Option<Flow>,
    /// The connection that is open in the namespace.
    pub open: Option<Connection>,
    /// The cgroups whose sockets are the proxy's if they are marked.
    pub proxy_cgroups: [u64; 2],
    /// Every socket that listens in the namespace.
    pub sockets: Vec<Listener>,
    /// Every UDP socket in it.
    pub udp: Vec<Listener>,
    pub state: RefCell<State>,
}

impl World {
    /// Opens the sockets in the namespace of the calling thread.
    pub fn random(rng: &mut Rng) -> Result<Self> {
        let mut sockets = Vec::new();
        for (_, port) in KINDS {
            sockets.extend(proxy(rng, port)?);
        }
        for port in APPLICATION_PORTS {
            application(rng, port, &mut sockets)?;
        }
        let mut udp = Vec::new();
        for ip in ["127.0.0.1", "::1"] {
            let bound = SocketAddr::new(ip.parse()?, PORT_PROXY_DNS);
            let mark = |rng: &mut Rng| choose(rng, &[MARK_PROXY, MARK_PROXY, MARK_PROXY, 0]);
            if rng.u8(..4) > 0 {
                sockets.push(Listener::open(bound, false, mark(rng))?);
            }
            if rng.u8(..4) > 0 {
                udp.push(Listener::open_udp(bound, mark(rng))?);
            }
        }
        let port = rng.bool().then(|| port(rng));
        let v4 = rng.bool();
        let peer = rng.bool().then(|| any(rng, v4));
        let probe_source = rng.bool().then(|| any(rng, v4));
        let virtual_flags = (rng.u8(..8) > 0)
            .then(|| choose(rng, &[0, VIRTUAL_CAPTURE, VIRTUAL_CAPTURE | VIRTUAL_RULES]));
        let excluded_port = rng.bool().then(|| self::port(rng));
        let excluded_peer = rng.bool().then(|| any(rng, v4));
        let own = own_cgroup()?;
        let trusted =
            [[ANY_CGROUP, own + 1], [own, own + 1], [own, ANY_CGROUP], [own + 1, own + 2]];
        Ok(Self {
            proxy_cgroups: choose(rng, &trusted),
            pods: pods(rng),
            addresses: own_addresses(rng),
            excluded: (port, peer),
            virtual_flags,
            excluded_outbound: (excluded_port, excluded_peer),
            probe_source,
            kubelets: None,
            open: None,
            sockets,
            udp,
            state: RefCell::default(),
        })
    }

    /// Whether a socket of the test's is the proxy's, if it is `marked`.
    pub fn trusts(&self, marked: bool) -> bool {
        let trusted = |id: &u64| *id == ANY_CGROUP || own_cgroup().is_ok_and(|own| own == *id);
        marked && self.proxy_cgroups.iter().any(trusted)
    }

    /// The listener that the kernel finds by itself.
    pub fn listener(&self, to: &Addr, port: u16) -> Option<&Listener> {
        self.sockets.iter().find(|socket| socket.hears(to, port))
    }

    /// The UDP socket that the kernel finds by itself.
    pub fn udp_socket(&self, to: &Addr, port: u16) -> Option<&Listener> {
        self.udp.iter().find(|socket| socket.hears(to, port))
    }

    /// A pod and a kind, of those that occur.
    pub fn random_key(&self, rng: &mut Rng) -> Key {
        (pod_id(rng), choose(rng, &KINDS).0)
    }

    /// What the programs find for a kind at a loopback address.
    fn proxys_listener(&self, kind: u32, loopback: &Addr) -> Option<&Listener> {
        self.listener(loopback, port_of(kind)).filter(|socket| self.trusts(socket.marked))
    }

    /// Enters the proxy's listeners, as `find_proxy` does; gives a bit for each, and one for each that was
    /// not known.
    pub fn find_proxy(&self) -> u32 {
        let mut state = self.state.borrow_mut();
        state.hint = None;
        let mut found = 0;
        for (kind, _) in KINDS {
            let of = |v4| self.proxys_listener(kind, &Addr::loopback(v4));
            if let Some(socket) = of(false).or_else(|| of(true)) {
                let known = state.listeners.insert((own_id(), kind), socket.cookie);
                state.missing.remove(&(own_id(), kind));
                found |= u32::from(of(false).is_some()) << kind;
                found |= u32::from(of(true).is_some()) << (kind + LISTENERS_V4);
                if known != Some(socket.cookie) {
                    found |= 1 << (kind + NEW_LISTENERS);
                }
            }
        }
        found
    }

    /// What the shared program makes of a decision: the socket that it chooses, or `None` to pass; and
    /// what it counts. An error is a refusal.
    pub fn steered(
        &self,
        pod_id: PodId,
        v4: bool,
        steer: Steer,
        others: Option<&Listener>,
    ) -> (Result<Option<u64>, ()>, Option<Counter>) {
        let kind = match steer {
            Steer::Pass(counter) => return (Ok(None), counter),
            Steer::Refuse(counter) => return (Err(()), Some(counter)),
            Steer::Redirect(kind) => kind,
        };
        let cookie = self.state.borrow().listeners.get(&(pod_id, kind)).copied();
        let mut sockets = self.sockets.iter().chain(others);
        match sockets.find(|socket| Some(socket.cookie) == cookie && socket.takes(v4)) {
            Some(socket) => (Ok(Some(socket.cookie)), Some(verdict::redirected(kind))),
            None => (Err(()), Some(Counter::RefusedProxyAway)),
        }
    }

    /// The proxy's socket for a kind.
    pub fn proxy_socket(&self, kind: u32) -> Option<&Listener> {
        self.sockets.iter().find(|socket| socket.marked && socket.bound.port() == port_of(kind))
    }
}

impl Pods for World {
    fn pod(&self, pod_id: PodId) -> Option<u32> {
        let PodEntry { decision, flags, .. } = self.pods.get(&pod_id)?;
        Some(if *decision == DECISION_ENROLLED { flags | POD_ENROLLED } else { *flags })
    }

    fn pod_on(&self, device: u64) -> PodId {
        if device == own_device() { own_id() } else { 0 }
    }

    fn is_own(&self, pod_id: PodId, addr: &Addr) -> bool {
        self.addresses.contains(&OwnAddress { pod_id, addr: *addr })
    }

    fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool {
        let (port, peer) = self.excluded;
        pod_id == own_id() && (port == Some(flow.local_port) || peer == Some(flow.remote))
    }

    fn is_kubelets(&self, flow: &Flow) -> bool {
        self.kubelets == Some(*flow)
    }

    fn is_probe_source(&self, peer: &Addr) -> bool {
        self.probe_source == Some(*peer)
    }

    fn excludes_outbound(&self, pod_id: PodId, flow: &Flow) -> bool {
        let (port, peer) = self.excluded_outbound;
        pod_id == own_id() && (port == Some(flow.remote_port) || peer == Some(flow.remote))
    }
}

impl Env for World {
    fn pod_id(&self) -> PodId {
        own_id()
    }

    fn receiver(&self, segment: &Segment) -> Receiver {
        if self.open.as_ref().is_some_and(|open| open.flow == segment.receiver_flow()) {
            return Receiver::Connection;
        }
        let listens = self.listener(&segment.dst, segment.dst_port).is_some();
        if segment.src_port == 0 {
            // A stray's sender.
            self.state.borrow_mut().deaf = !listens;
        }
        if listens { Receiver::Listener } else { Receiver::Nobody }
    }

    fn completes_cookie(&self, _: PodId) -> bool {
        false
    }

    fn proxy(&self, pod_id: PodId, kind: u32, segment: &Segment) -> Proxy {
        let key = (pod_id, kind);
        let mut state = self.state.borrow_mut();
        if state.listeners.contains_key(&key) {
            return Proxy::Listens;
        }
        let loopback = Addr::loopback(segment.dst.is_v4());
        let (local, remote, local_port) = (loopback, loopback, port_of(kind));
        let flow = Flow { local, remote, local_port, remote_port: 1 };
        state.hint = Some(Hint { flow, device: own_device(), kind: HINT_QUESTION });
        match self.proxys_listener(kind, &loopback) {
            Some(socket) => {
                state.missing.remove(&key);
                state.listeners.insert(key, socket.cookie);
                Proxy::Listens
            }
            None => match state.missing.entry(key).or_insert(Since::Now) {
                Since::Now => Proxy::AwayWithinGrace,
                Since::LongAgo => Proxy::Away,
            },
        }
    }

    fn have_strays(&self) -> bool {
        self.state.borrow().strays.1
    }

    fn strays(&self, pod_id: PodId) -> bool {
        self.have_strays() && self.state.borrow().strays.0.contains(&pod_id)
    }

    fn is_forwarded(&self) -> bool {
        // In a test run the packet has a socket,
        false
    }

    fn came_by_lo(&self) -> bool {
        // comes from nowhere,
        false
    }

    fn sender(&self) -> Sender {
        // without a mark, whatever mark the packet has,
        Sender::Application
    }

    fn was_half_open(&self, _: PodId, _: &Segment) -> bool {
        false
    }

    fn settled(&self) -> Option<u32> {
        // and each run another one.
        None
    }

    fn has_marked_listener(&self) -> bool {
        false
    }

    fn is_noted_direct(&self, _: PodId, _: &Segment) -> bool {
        false
    }

    fn is_connections(&self) -> bool {
        // It is of no type.
        false
    }

    fn has_proxy_sent(&self, segment: &Segment) -> bool {
        let flow = segment.sender_flow();
        self.open.as_ref().is_some_and(|open| open.flow == flow && self.trusts(open.marked))
    }

    fn has_half_open(&self, pod_id: PodId) -> bool {
        self.pods.get(&pod_id).is_some_and(|pod| pod.captured_at_ns > LONG_AGO)
    }
}

impl DnsEnv for World {
    fn dns_listens(&self, pod_id: PodId, message: &Message) -> bool {
        let sockets = if message.tcp { &self.sockets } else { &self.udp };
        let loopback = Addr::loopback(message.segment.dst.is_v4());
        let found = sockets.iter().find(|socket| socket.hears(&loopback, PORT_PROXY_DNS));
        pod_id == own_id() && found.is_some_and(|socket| self.trusts(socket.marked))
    }

    fn now(&self) -> u64 {
        NOW
    }

    fn flow(&self, key: &DnsKey) -> Option<DnsFlow> {
        self.state.borrow().flows.get(key).copied()
    }

    fn touch(&self, key: &DnsKey, message: &Message, from_client: bool) {
        if let Some(flow) = self.state.borrow_mut().flows.get_mut(key) {
            dns::touched(flow, message, from_client, NOW);
        }
    }

    fn enter(&self, key: &DnsKey, flow: &DnsFlow, own: bool) -> Entry {
        if !own && self.flow(key).is_some_and(|known| !dns::is_free(&known, NOW)) {
            return Entry::Taken;
        }
        self.state.borrow_mut().flows.insert(*key, *flow);
        Entry::Entered
    }
}

/// The model's time. The kernel's is translated into it.
pub const NOW: u64 = 1 << 60;
/// For how long a flow of DNS may be needed from now on, ns: it has not been for a while; no longer;
/// for as long as a connection that ends, a query, a connection is.
pub const LEASES: [i64; 5] = [-10_000_000_000, 0, 5_000_000_000, 30_000_000_000, 600_000_000_000];

/// An entry of `dns_flows`, in the model's time.
pub fn dns_flow(rng: &mut Rng) -> (DnsKey, DnsFlow) {
    let v4 = rng.bool();
    let protocol = choose(rng, &[PROTOCOL_TCP, PROTOCOL_UDP]);
    // Sometimes that of another port with the same place.
    let alias = port(rng).wrapping_add(DNS_PLACES * choose(rng, &[0, 0, 0, 1]));
    let key = DnsKey { pod_id: own_id(), place: alias % DNS_PLACES, protocol };
    let flow = DnsFlow {
        needed_until_ns: NOW.wrapping_add_signed(choose(rng, &LEASES)),
        client: own(rng, v4),
        resolver: any(rng, v4),
        asked: rng.u32(..3),
        answered: rng.u32(..3),
        alias,
        resolver_port: PORT_DNS,
        client_port: if rng.bool() { alias } else { port(rng) },
        ended: rng.u16(..2),
    };
    (key, flow)
}

/// The instant, ns of CLOCK_MONOTONIC, at which a capture began whose half-open connections are gone.
const LONG_AGO: u64 = 1;

/// On a machine that has just booted, that was not long ago.
pub fn wait_for_long_ago() {
    thread::sleep(Duration::from_nanos((LONG_AGO + HALF_OPEN_NS).saturating_sub(sys::now())));
}

fn port_of(kind: u32) -> u16 {
    match kind {
        LISTENER_INBOUND => PORT_INBOUND,
        LISTENER_HBONE => PORT_HBONE,
        _ => PORT_OUTBOUND,
    }
}

fn pods(rng: &mut Rng) -> BTreeMap<PodId, PodEntry> {
    let entry = |decision, flags, uplink| PodEntry { uplink, ..crate::entry(decision, flags) };
    let others = OTHERS.map(|(pod_id, decision, flags, _)| (pod_id, entry(decision, flags, 1)));
    let mut pods = BTreeMap::from(others);
    let (decision, flags) = match rng.u8(..8) {
        0 => (DECISION_BYPASS, 0),
        // The decision counts, whatever the flags.
        1 => (DECISION_BYPASS, POD_CAPTURE),
        2 => (DECISION_ENROLLED, 0),
        3 => (DECISION_ENROLLED, POD_CAPTURE | (rng.u32(..) & !POD_ENROLLED)),
        4 => (DECISION_ENROLLED, POD_CAPTURE | POD_INBOUND_RULES),
        _ => {
            let others = POD_CAPTURE | POD_BYPASS_INBOUND | POD_INBOUND_RULES | POD_ENROLLED;
            (DECISION_ENROLLED, POD_CAPTURE | (rng.u32(..) & !others))
        }
    };
    let flags = if rng.u8(..4) > 0 { flags | POD_DNS } else { flags };
    if rng.u8(..12) > 0 {
        let captured_at_ns = choose(rng, &[0, LONG_AGO, sys::now()]);
        let own = entry(decision, flags, choose(rng, &[0, 1, 1]));
        pods.insert(own_id(), PodEntry { captured_at_ns, ..own });
    }
    pods
}

/// Those of all pods; of the pod itself one may be missing.
fn own_addresses(rng: &mut Rng) -> BTreeSet<OwnAddress> {
    let of = |pod_id| move |text: &str| OwnAddress { pod_id, addr: known(text) };
    let mut addresses: BTreeSet<_> = OWN.into_iter().map(of(own_id())).collect();
    if rng.u8(..4) == 0 {
        addresses.remove(&of(own_id())(choose(rng, &OWN)));
    }
    for (pod_id, _, _, others) in OTHERS {
        addresses.extend(others.into_iter().map(of(pod_id)));
    }
    addresses
}

/// The proxy's listener, or who has its port instead.
fn proxy(rng: &mut Rng, port: u16) -> Result<Option<Listener>> {
    let dual = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    Ok(Some(match rng.u8(..10) {
        0..3 => Listener::open(dual, false, MARK_PROXY)?,
        3 => Listener::open(dual, false, 0x0abc_0000 | MARK_PROXY)?,
        4 => Listener::open(v4, false, MARK_PROXY)?,
        5 => Listener::open(dual, true, MARK_PROXY)?,
        6 => Listener::open(dual, false, choose(rng, &[0, MARK_REDIRECTED, 0x0abc_0000]))?,
        7 => Listener::open(SocketAddr::new(OWN[rng.usize(..4)].parse()?, port), false, 0)?,
        _ => return Ok(None),
    }))
}

fn application(rng: &mut Rng, port: u16, sockets: &mut Vec<Listener>) -> Result<()> {
    let mut open = |address: &str, only_v6| {
        let bound = SocketAddr::new(address.parse()?, port);
        sockets.push(Listener::open(bound, only_v6, 0)?);
        anyhow::Ok(())
    };
    match rng.u8(..6) {
        0 => open("::", false),
        1 => open("0.0.0.0", false),
        2 => open("::", true),
        3 => ["127.0.0.1", "::1"].into_iter().try_for_each(|address| open(address, false)),
        4 => Ok(()),
        _ => OWN.into_iter().filter(|_| rng.bool()).try_for_each(|address| open(address, false)),
    }
}
