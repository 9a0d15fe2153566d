//! The kernel programs: each asks [`verdict`] what to do and does it.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "a binary: its items are documented where the reader needs it")]
#![expect(
    unsafe_code,
    reason = "kernel helpers are unsafe functions; each block says why it is sound"
)]

mod config;
mod iterators;
mod kubelet;
mod maps;
mod packet;
mod sockets;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_ANY, BPF_NOEXIST, TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::lpm_trie::Key,
    helpers::bpf_ktime_get_ns,
    macros::{classifier, sk_lookup},
    programs::{SkLookupContext, TcContext},
};
use aya_log_ebpf::info;
use redirect_ebpf::{
    abi::{
        Addr, Counter, CounterKey, DnsFlow, DnsKey, EVERY_POD, Flow, HINT_NONE, HINT_QUESTION,
        Hint, INBOUND_BYPASS, ListenerKey, MARK_PROXY, MARK_REDIRECTED, PORT_PROXY_DNS, PodEntry,
        PodId, PodPeer, PodPort, WAY_DIRECT, WAY_REDIRECTED,
    },
    dns::{self, Dns, DnsEnv, Message},
    verdict::{
        self, Env, Fate, Ingress, Lookup, Pods, Proxy, Segment, Steer, mesh_mark, with_mesh_mark,
    },
};

use crate::{
    maps::{COUNTERS, DNS_FLOWS, HINT, INBOUND_PORTS, INBOUND_RANGES, PODS_BY_ADDR, WAYS},
    packet::{Network, Parsed},
};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
const LOOPBACK_IFINDEX: u32 = 1;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

/// Ingress of `lo`.
#[classifier]
pub fn redirect_lo(ctx: TcContext) -> i32 {
    set_hint(None);
    let mut parsed = Parsed::zeroed();
    if !parse_on_lo(&ctx, &mut parsed) {
        return if drops_unread(&ctx) { TC_ACT_SHOT } else { on_lo(&ctx, None) };
    }
    if dns::concerns(&parsed.message) {
        let segment = *parsed.segment();
        let mut decided =
            Decided { kind: DNS_OTHER, new: segment, pod_id: 0, counter: NOT_COUNTED };
        decide_dns(&ctx, &parsed, &mut decided);
        if decided.kind != DNS_OTHER {
            return carry_out_dns(&ctx, &parsed, &decided);
        }
    }
    on_lo(&ctx, if parsed.message.tcp { Some(&parsed) } else { None })
}

#[inline(never)]
fn drops_unread(ctx: &TcContext) -> bool {
    let Some((src, dst)) = packet::addresses(ctx, packet::network(ctx)) else { return false };
    let Some(pod_id) = dns::drops_unread(mark(ctx), &src, &dst, &Tc { ctx }) else { return false };
    count_and_log(ctx, pod_id, Counter::DroppedDnsUnreadable as u32);
    true
}

/// What has a function of its own here has a stack of its own: all in one would be too large.
#[inline(never)]
fn parse_on_lo(ctx: &TcContext, parsed: &mut Parsed) -> bool {
    match packet::parse_any(ctx, packet::network(ctx), true) {
        Some(found) => {
            *parsed = found;
            true
        }
        None => false,
    }
}

#[inline(never)]
fn on_lo(ctx: &TcContext, parsed: Option<&Parsed>) -> i32 {
    let ingress = verdict::on_lo(mark(ctx), parsed.map(Parsed::segment), &Tc { ctx });
    match ingress.fate {
        Fate::Reset => match parsed {
            Some(parsed) if packet::reset(ctx, parsed).is_some() => apply(ctx, &ingress),
            // It cannot be rewritten; without the proxy it must not go on either.
            _ => TC_ACT_SHOT,
        },
        Fate::Next | Fate::Drop => apply(ctx, &ingress),
    }
}

/// What [`Dns`] says, as numbers: the compiler describes an enum with parts to the kernel in a way
/// that it does not accept for an argument.
struct Decided {
    /// One of `DNS_*`.
    kind: u32,
    /// The packet's addresses and ports from here on.
    new: Segment,
    /// The pod and what to count for it, or [`NOT_COUNTED`].
    pod_id: PodId,
    counter: u32,
}

const DNS_OTHER: u32 = 0;
const DNS_ASK: u32 = 1;
const DNS_ANSWER: u32 = 2;
const DNS_DROP: u32 = 3;
const DNS_REFUSE: u32 = 4;
const NOT_COUNTED: u32 = u32::MAX;

#[inline(never)]
fn decide_dns(ctx: &TcContext, parsed: &Parsed, decided: &mut Decided) {
    let mut count = |pod_id, counter| {
        decided.pod_id = pod_id;
        decided.counter = counter as u32;
    };
    decided.kind = match dns::on_lo(mark(ctx), &parsed.message, &Tc { ctx }) {
        Dns::Other => DNS_OTHER,
        Dns::Ask { from_port, count: counted } => {
            if let Some((pod_id, counter)) = counted {
                count(pod_id, counter);
            }
            decided.new.dst = Addr::loopback(decided.new.dst.is_v4());
            decided.new.dst_port = PORT_PROXY_DNS;
            decided.new.src_port = from_port;
            DNS_ASK
        }
        Dns::Answer { from, from_port, to_port } => {
            decided.new.src = from;
            decided.new.src_port = from_port;
            decided.new.dst_port = to_port;
            DNS_ANSWER
        }
        Dns::Drop(pod_id, counter) => {
            count(pod_id, counter);
            DNS_DROP
        }
        Dns::Refuse(pod_id, counter) => {
            count(pod_id, counter);
            DNS_REFUSE
        }
    };
}

#[inline(never)]
fn carry_out_dns(ctx: &TcContext, parsed: &Parsed, decided: &Decided) -> i32 {
    let tcp = parsed.message.tcp;
    if decided.counter != NOT_COUNTED {
        count_and_log(ctx, decided.pod_id, decided.counter);
    }
    let written = match decided.kind {
        DNS_ASK => {
            // What the kernel itself answers to it has the mark, too, and finds its way back.
            set_mesh_mark(ctx, MARK_PROXY);
            packet::readdress(ctx, parsed, &decided.new)
        }
        DNS_ANSWER => {
            set_mesh_mark(ctx, MARK_REDIRECTED);
            if !tcp {
                // When the client is gone, the kernel would send part of the answer to the resolver,
                // which knows nothing of it.
                packet::without_icmp(ctx);
            }
            packet::readdress(ctx, parsed, &decided.new)
        }
        DNS_REFUSE if tcp => packet::reset(ctx, parsed),
        DNS_REFUSE => packet::refuse_query(ctx, parsed),
        _ => None,
    };
    // What cannot be rewritten must not go on.
    if written.is_some() { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

/// Ingress of every other interface.
#[classifier]
pub fn redirect_ext(ctx: TcContext) -> i32 {
    set_hint(None);
    let network = packet::network(&ctx);
    let parsed = packet::parse(&ctx, network);
    let segment = parsed.as_ref().map(Parsed::segment);
    let ingress = verdict::on_interface(network != Network::Other, segment, &Tc { ctx: &ctx });
    apply(&ctx, &ingress)
}

fn mark(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.skb.skb).mark }
}

#[inline(always)]
fn set_mesh_mark(ctx: &TcContext, new: u32) {
    write_mesh_mark(ctx.skb.skb, new);
}

/// A function of its own, or the compiler computes the field's address once for all its uses, and
/// the verifier lets nobody use such an address.
#[inline(never)]
fn write_mesh_mark(skb: *mut __sk_buff, new: u32) {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).mark = with_mesh_mark((*skb).mark, new) }
}

#[inline(always)]
fn count_and_log(ctx: &TcContext, pod_id: PodId, counter: u32) {
    count(pod_id, counter);
    if config::log() {
        info!(ctx, "tcx: pod {} counter {}", pod_id, counter);
    }
}

#[inline(always)]
fn apply(ctx: &TcContext, ingress: &Ingress) -> i32 {
    if let Some(new) = ingress.mark {
        set_mesh_mark(ctx, new);
    }
    if ingress.hint.is_some() {
        set_hint(ingress.hint);
    }
    if let Some((pod_id, counter)) = ingress.count {
        count_and_log(ctx, pod_id, counter as u32);
    }
    match ingress.fate {
        // Not OK: programs that others attached after us run too.
        Fate::Next | Fate::Reset => TC_ACT_UNSPEC,
        Fate::Drop => TC_ACT_SHOT,
    }
}

/// Chooses the socket for a packet that no established connection claims.
#[sk_lookup]
pub fn redirect_lookup(ctx: SkLookupContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let lookup = unsafe {
        let l = &*ctx.lookup;
        let (local, remote) = if l.family == AF_INET {
            (Addr::v4(l.local_ip4.to_ne_bytes()), Addr::v4(l.remote_ip4.to_ne_bytes()))
        } else {
            (sockets::from_words(l.local_ip6), sockets::from_words(l.remote_ip6))
        };
        Lookup {
            tcp: l.protocol == IPPROTO_TCP,
            flow: Flow {
                local,
                remote,
                local_port: l.local_port as u16,
                remote_port: u16::from_be(l.remote_port),
            },
            on_lo: l.ingress_ifindex == LOOPBACK_IFINDEX,
            hint: hint(),
        }
    };
    let (pass, pod_id, counter) = match verdict::steer(&lookup, &LookupEnv) {
        Steer::Pass(None) => return SK_PASS,
        Steer::Pass(Some((pod_id, counter))) => (SK_PASS, pod_id, counter),
        Steer::Refuse(pod_id, counter) => (SK_DROP, pod_id, counter),
        Steer::Redirect { pod_id, kind } => {
            let key = ListenerKey { pod_id, kind };
            match sockets::assign(ctx.as_ptr(), &key) {
                Ok(()) => (SK_PASS, pod_id, verdict::redirected(kind)),
                // Fail closed: never fall through to the application.
                Err(_) => (SK_DROP, pod_id, Counter::RefusedProxyAway),
            }
        }
    };
    count(pod_id, counter as u32);
    if config::log() {
        info!(
            &ctx,
            "sk_lookup: pod {} {:i}:{} -> {:i}:{} counter {}",
            pod_id,
            lookup.flow.remote.octets,
            lookup.flow.remote_port,
            lookup.flow.local.octets,
            lookup.flow.local_port,
            counter as u32
        );
    }
    pass
}

/// Attached for a moment while a pod enters or leaves the mesh or its settings change, where its
/// packets leave (egress of its interfaces, ingress of `lo`): notes which way each flow goes, and
/// holds back a packet that goes another way than its flow did before. It is sent again, on the right
/// way, once the flow's socket is marked.
#[classifier]
pub fn watch_sent(ctx: TcContext) -> i32 {
    let mark = mesh_mark(mark(&ctx));
    // SAFETY: the context is valid while the program runs.
    let on_lo = unsafe { (*ctx.skb.skb).ifindex } == LOOPBACK_IFINDEX;
    if mark != 0 && !(on_lo && mark == MARK_PROXY) {
        return TC_ACT_UNSPEC;
    }
    let Some(parsed) = packet::parse(&ctx, packet::network(&ctx)) else { return TC_ACT_UNSPEC };
    if mark == MARK_PROXY {
        note(&parsed.segment().receiver_flow(), WAY_REDIRECTED, BPF_ANY);
        return TC_ACT_UNSPEC;
    }
    let flow = parsed.segment().sender_flow();
    let way = if on_lo { WAY_REDIRECTED } else { WAY_DIRECT };
    if parsed.segment().opens {
        // A new connection, maybe with the ports of an old one.
        note(&flow, way, BPF_ANY);
        return TC_ACT_UNSPEC;
    }
    match noted(&flow) {
        Some(noted) if noted != way => {
            if let Some(pod) = pod(&flow.local) {
                count(pod.pod_id, Counter::HeldInTransition as u32);
            }
            TC_ACT_SHOT
        }
        Some(_) => TC_ACT_UNSPEC,
        None => {
            note(&flow, way, BPF_NOEXIST);
            TC_ACT_UNSPEC
        }
    }
}

/// Attached with [`watch_sent`] where packets come to the pod from outside: a connection that was
/// half open, and so without a socket, shows itself by the packet that opens it in full.
#[classifier]
pub fn watch_received(ctx: TcContext) -> i32 {
    if let Some(parsed) = packet::parse(&ctx, packet::network(&ctx)) {
        // What is known to be redirected stays so, whatever outsiders send.
        note(&parsed.segment().receiver_flow(), WAY_DIRECT, BPF_NOEXIST);
    }
    TC_ACT_UNSPEC
}

#[inline(always)]
fn note(flow: &Flow, way: u32, flags: u32) {
    // Refused only where a note is there already that counts for more.
    let _noted = WAYS.insert(flow, way, u64::from(flags));
}

#[inline(always)]
fn noted(flow: &Flow) -> Option<u32> {
    // SAFETY: the pointer is to a live map value; it is one word.
    WAYS.get_ptr(flow).map(|way| unsafe { *way })
}

#[inline(always)]
fn set_hint(hint: Option<Hint>) {
    if let Some(slot) = HINT.get_ptr_mut(0) {
        // SAFETY: the pointer is to this CPU's own value, and nothing interrupts the program
        // that would write it too: both tcx and sk_lookup run in softirq.
        unsafe {
            match hint {
                Some(hint) => *slot = hint,
                None => (*slot).kind = HINT_NONE,
            }
        }
    }
}

#[inline(always)]
fn hint() -> Hint {
    match HINT.get_ptr(0) {
        // SAFETY: see `set_hint`.
        Some(slot) => unsafe { *slot },
        None => bytemuck::Zeroable::zeroed(),
    }
}

#[inline(always)]
fn count(pod_id: PodId, counter: u32) {
    let key = CounterKey { pod_id, counter };
    match COUNTERS.get_ptr_mut(&key) {
        // SAFETY: the pointer is to this CPU's own value.
        Some(value) => unsafe { *value += 1 },
        None => {
            // When the map is full the agent sees it by the missing key; traffic is unaffected.
            let _full = COUNTERS.insert(&key, 1, BPF_NOEXIST as u64);
        }
    }
}

#[inline(always)]
fn pod(addr: &Addr) -> Option<PodEntry> {
    // SAFETY: the pointer is to a live map value; entries are replaced as a whole.
    PODS_BY_ADDR.get_ptr(addr).map(|entry| unsafe { *entry })
}

#[inline(always)]
fn dns_flow(key: &DnsKey) -> Option<DnsFlow> {
    // SAFETY: the pointer is to a live map value; what identifies the flow never changes in it.
    DNS_FLOWS.get_ptr(key).map(|flow| unsafe { *flow })
}

#[inline(always)]
fn excludes_inbound(pod_id: PodId, flow: &Flow) -> bool {
    let port = Key::new(PodPort::BITS, PodPort::new(pod_id, flow.local_port));
    let peer = Key::new(PodPeer::BITS, PodPeer { pod_id, peer: flow.remote });
    matches!(INBOUND_PORTS.get(&port), Some(&INBOUND_BYPASS))
        || matches!(INBOUND_RANGES.get(&peer), Some(&INBOUND_BYPASS))
}

#[inline(always)]
fn is_probe_source(peer: &Addr) -> bool {
    let key = Key::new(PodPeer::BITS, PodPeer { pod_id: EVERY_POD, peer: *peer });
    matches!(INBOUND_RANGES.get(&key), Some(&INBOUND_BYPASS))
}

struct Tc<'a> {
    ctx: &'a TcContext,
}

impl Pods for Tc<'_> {
    #[inline(always)]
    fn pod(&self, addr: &Addr) -> Option<PodEntry> {
        pod(addr)
    }

    #[inline(always)]
    fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool {
        excludes_inbound(pod_id, flow)
    }

    #[inline(always)]
    fn is_kubelets(&self, flow: &Flow) -> bool {
        kubelet::has_opened(flow)
    }

    #[inline(always)]
    fn is_probe_source(&self, peer: &Addr) -> bool {
        is_probe_source(peer)
    }
}

impl Env for Tc<'_> {
    #[inline(always)]
    fn application_listens(&self, segment: &Segment) -> bool {
        set_hint(Some(Hint { flow: segment.receiver_flow(), kind: HINT_QUESTION }));
        let found = sockets::any(self.ctx.as_ptr(), segment);
        set_hint(None);
        found
    }

    #[inline(always)]
    fn proxy(&self, pod_id: PodId, kind: u32, segment: &Segment) -> Proxy {
        sockets::proxy(self.ctx, &ListenerKey { pod_id, kind }, segment.dst.is_v4())
    }
}

impl DnsEnv for Tc<'_> {
    #[inline(always)]
    fn dns_listens(&self, pod_id: PodId, message: &Message) -> bool {
        sockets::dns_listens(self.ctx, pod_id, message)
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn flow(&self, key: &DnsKey) -> Option<DnsFlow> {
        dns_flow(key)
    }

    #[inline(always)]
    fn touch(&self, key: &DnsKey, now: u64, from_client: bool) {
        if let Some(flow) = DNS_FLOWS.get_ptr_mut(key) {
            // SAFETY: the pointer is to a live map value. Other CPUs may write these numbers, too:
            // any of the times will do, and what a lost count does is said where it is declared.
            unsafe {
                (*flow).used_ns = now;
                let number = if from_client { &mut (*flow).asked } else { &mut (*flow).answered };
                *number = number.wrapping_add(1);
            }
        }
    }

    #[inline(always)]
    fn enter(&self, key: &DnsKey, flow: &DnsFlow, fresh: bool) -> bool {
        let flags = if fresh { BPF_NOEXIST } else { BPF_ANY };
        DNS_FLOWS.insert(key, flow, u64::from(flags)).is_ok()
    }
}

/// `sk_lookup` asks for pods only: it has no packet to look for sockets with.
struct LookupEnv;

impl Pods for LookupEnv {
    #[inline(always)]
    fn pod(&self, addr: &Addr) -> Option<PodEntry> {
        pod(addr)
    }

    #[inline(always)]
    fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool {
        excludes_inbound(pod_id, flow)
    }

    #[inline(always)]
    fn is_kubelets(&self, flow: &Flow) -> bool {
        kubelet::has_opened(flow)
    }

    #[inline(always)]
    fn is_probe_source(&self, peer: &Addr) -> bool {
        is_probe_source(peer)
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    #[expect(clippy::empty_loop, reason = "the verifier has proved it unreachable")]
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";
