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
mod maps;
mod packet;
mod sockets;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, BPF_NOEXIST, TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::lpm_trie::Key,
    macros::{classifier, sk_lookup},
    programs::{SkLookupContext, TcContext},
};
use aya_log_ebpf::info;
use redirect_ebpf::{
    abi::{
        Addr, Counter, CounterKey, Flow, HINT_NO_LISTENER, HINT_NONE, Hint, INBOUND_BYPASS,
        ListenerKey, MARK_PROXY, PodEntry, PodId, PodPeer, PodPort, WAY_DIRECT, WAY_REDIRECTED,
    },
    verdict::{
        self, Env, Fate, Ingress, Lookup, Pods, Proxy, Segment, Steer, mesh_mark, with_mesh_mark,
    },
};

use crate::{
    maps::{COUNTERS, HINT, INBOUND_PORTS, INBOUND_RANGES, PODS_BY_ADDR, WAYS},
    packet::Network,
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
    let parsed = packet::parse(&ctx, packet::network(&ctx));
    let segment = parsed.as_ref().map(|p| &p.segment);
    let ingress = verdict::on_lo(mark(&ctx), segment, &Tc { ctx: &ctx });
    match ingress.fate {
        Fate::Reset => match &parsed {
            Some(parsed) if packet::reset(&ctx, parsed).is_some() => apply(&ctx, &ingress),
            // It cannot be rewritten; without the proxy it must not go on either.
            _ => TC_ACT_SHOT,
        },
        Fate::Next | Fate::Drop => apply(&ctx, &ingress),
    }
}

/// Ingress of every other interface.
#[classifier]
pub fn redirect_ext(ctx: TcContext) -> i32 {
    set_hint(None);
    let network = packet::network(&ctx);
    let parsed = packet::parse(&ctx, network);
    let segment = parsed.as_ref().map(|p| &p.segment);
    let ingress = verdict::on_interface(network != Network::Other, segment, &Tc { ctx: &ctx });
    apply(&ctx, &ingress)
}

fn mark(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.skb.skb).mark }
}

#[inline(always)]
fn apply(ctx: &TcContext, ingress: &Ingress) -> i32 {
    if let Some(new) = ingress.mark {
        ctx.set_mark(with_mesh_mark(mark(ctx), new));
    }
    if ingress.hint.is_some() {
        set_hint(ingress.hint);
    }
    if let Some((pod_id, counter)) = ingress.count {
        count(pod_id, counter);
        if config::log() {
            info!(ctx, "tcx: pod {} counter {}", pod_id, counter as u32);
        }
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
    count(pod_id, counter);
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
        note(&parsed.segment.receiver_flow(), WAY_REDIRECTED, BPF_ANY);
        return TC_ACT_UNSPEC;
    }
    let flow = parsed.segment.sender_flow();
    let way = if on_lo { WAY_REDIRECTED } else { WAY_DIRECT };
    if parsed.segment.opens {
        // A new connection, maybe with the ports of an old one.
        note(&flow, way, BPF_ANY);
        return TC_ACT_UNSPEC;
    }
    match noted(&flow) {
        Some(noted) if noted != way => {
            if let Some(pod) = pod(&flow.local) {
                count(pod.pod_id, Counter::HeldInTransition);
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
        note(&parsed.segment.receiver_flow(), WAY_DIRECT, BPF_NOEXIST);
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
fn count(pod_id: PodId, counter: Counter) {
    let key = CounterKey { pod_id, counter: counter as u32 };
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
fn excludes_inbound(pod_id: PodId, flow: &Flow) -> bool {
    let port = Key::new(PodPort::BITS, PodPort::new(pod_id, flow.local_port));
    let peer = Key::new(PodPeer::BITS, PodPeer { pod_id, peer: flow.remote });
    matches!(INBOUND_PORTS.get(&port), Some(&INBOUND_BYPASS))
        || matches!(INBOUND_RANGES.get(&peer), Some(&INBOUND_BYPASS))
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
}

impl Env for Tc<'_> {
    #[inline(always)]
    fn application_listens(&self, segment: &Segment) -> bool {
        set_hint(Some(Hint { flow: segment.receiver_flow(), kind: HINT_NO_LISTENER }));
        let found = sockets::any(self.ctx.as_ptr(), segment);
        set_hint(None);
        found
    }

    #[inline(always)]
    fn proxy(&self, pod_id: PodId, kind: u32, segment: &Segment) -> Proxy {
        sockets::proxy(self.ctx, &ListenerKey { pod_id, kind }, segment.dst.is_v4())
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
