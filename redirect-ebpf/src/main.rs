//! The kernel programs: each asks [`verdict`] what to do and does it.
#![no_std]
#![no_main]
// For `compare_exchange`. The toolchain is a nightly one anyway.
#![feature(asm_experimental_arch)]
#![allow(missing_docs, reason = "a binary: its items are documented where the reader needs it")]
#![expect(
    unsafe_code,
    reason = "kernel helpers are unsafe functions; each block says why it is sound"
)]

mod config;
mod count;
mod env;
mod half_open;
mod hint;
mod iterators;
mod kubelet;
mod listeners;
mod maps;
mod packet;
mod settled;
mod sockets;
mod switch;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::{classifier, sk_lookup},
    programs::{SkLookupContext, TcContext},
};
use redirect_ebpf::{
    abi::{
        Addr, Connection, Counter, FOUND_KNOWN, FOUND_NEW, FOUND_NOTHING, Flow, LOOPBACK_IFINDEX,
        ListenerKey, MARK_PROXY, MARK_REDIRECTED, PORT_PROXY_DNS, PodId, QUESTION_AT,
        QUESTION_CLIENT, QUESTION_ENTER, QUESTION_KIND, QUESTION_V4, VirtualInterface, WAY_DIRECT,
    },
    dns::{self, Dns},
    verdict::{
        self, Fate, Hidden, Lookup, Segment, Sender, Steer, Verdict, Virtual, mesh_mark,
        with_mesh_mark,
    },
};

use crate::{
    count::Packet,
    env::{Maps, Tc},
    listeners::Found,
    maps::{PARSED, PROXY_MISSING, THIS_POD, VIRTUAL_INTERFACES, pod_entry},
    packet::{Network, Parsed},
};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

/// Ingress of `lo`.
#[classifier]
pub fn redirect_lo(ctx: TcContext) -> i32 {
    hint::clear();
    let Some(parsed) = parsed() else { return TC_ACT_SHOT };
    if !parse(&ctx, true, parsed) {
        return if drops_unread(&ctx) { TC_ACT_SHOT } else { on_lo(&ctx, None, None) };
    }
    if parsed.message.tcp && switch::holds_sent(&ctx, parsed) {
        return TC_ACT_SHOT;
    }
    let opens = parsed.message.tcp && parsed.segment().opens;
    let proxys_syn = opens.then(|| env::has_proxy_opened(&ctx, parsed.segment()));
    if dns::concerns(&parsed.message) {
        let segment = *parsed.segment();
        let mut decided =
            Decided { kind: DNS_OTHER, new: segment, pod_id: 0, counter: NOT_COUNTED };
        decide_dns(&ctx, parsed, &mut decided);
        if decided.kind != DNS_OTHER {
            return carry_out_dns(&ctx, parsed, &decided);
        }
    }
    on_lo(&ctx, if parsed.message.tcp { Some(parsed) } else { None }, proxys_syn)
}

/// Where the packet that is looked at is put in its parts. What is there the verifier knows nothing of,
/// so it has one case to check, and not as many as there are ways to parse.
#[inline(always)]
fn parsed() -> Option<&'static mut Parsed> {
    // SAFETY: the pointer is to this CPU's own value, and tcx programs do not interrupt each other.
    PARSED.get_ptr_mut(0).map(|parsed| unsafe { &mut *parsed })
}

#[inline(never)]
fn drops_unread(ctx: &TcContext) -> bool {
    let Some((src, dst)) = packet::addresses(ctx, packet::network(ctx)) else { return false };
    let Some(pod_id) = dns::drops_unread(mark(ctx), &src, &dst, &Tc::at_ingress(ctx)) else {
        return false;
    };
    count::packet(pod_id, Counter::DroppedDnsUnreadable as u32, Packet::Unread);
    true
}

/// What has a function of its own here has a stack of its own: all in one would be too large.
#[inline(never)]
fn parse(ctx: &TcContext, udp: bool, parsed: &mut Parsed) -> bool {
    packet::parse(ctx, packet::network(ctx), udp, parsed).is_some()
}

#[inline(never)]
fn on_lo(ctx: &TcContext, parsed: Option<&Parsed>, proxys_syn: Option<bool>) -> i32 {
    let env = Tc { proxys_syn, ..Tc::at_ingress(ctx) };
    let verdict = verdict::on_lo(mark(ctx), parsed.map(Parsed::segment), &env);
    let next = apply(ctx, &verdict, parsed, packet_of(parsed.is_some()));
    match verdict.fate {
        Fate::Reset => match parsed {
            Some(parsed) if packet::reset(ctx, parsed).is_some() => TC_ACT_UNSPEC,
            // It cannot be rewritten; without the proxy it must not go on either.
            _ => TC_ACT_SHOT,
        },
        Fate::Leave => {
            env::note_strays(verdict.pod_id);
            leave(verdict.pod_id)
        }
        _ => next,
    }
}

/// Out of the pod.
#[inline(always)]
fn leave(pod_id: PodId) -> i32 {
    let Some(entry) = pod_entry(pod_id) else { return TC_ACT_SHOT };
    // SAFETY: the pointer is to a live map value; it is one word.
    match unsafe { (*entry).uplink } {
        0 => TC_ACT_SHOT,
        uplink => packet::leave(uplink),
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
    decided.kind = match dns::on_lo(mark(ctx), &parsed.message, &Tc::at_ingress(ctx)) {
        Dns::Other => DNS_OTHER,
        Dns::Ask { pod_id, from_port, count: counted } => {
            if let Some(counter) = counted {
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
        count::packet(decided.pod_id, decided.counter, Packet::Parsed);
    }
    let written = match decided.kind {
        DNS_ASK => {
            // Not the proxy's mark: who accepts it, be it the application, would have that.
            set_mesh_mark(ctx, MARK_REDIRECTED);
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
    hint::clear();
    let Some(parsed) = parsed() else { return TC_ACT_SHOT };
    let is_tcp = parse(&ctx, false, parsed);
    on_interface(&ctx, is_tcp, parsed)
}

#[inline(never)]
fn on_interface(ctx: &TcContext, is_tcp: bool, parsed: &Parsed) -> i32 {
    if is_tcp {
        switch::note_received(ctx, parsed);
    }
    let ip = packet::network(ctx) != Network::Other;
    let parsed = if is_tcp { Some(parsed) } else { None };
    let verdict = verdict::on_interface(ip, parsed.map(Parsed::segment), &Tc::at_ingress(ctx));
    carry_out(ctx, &verdict, parsed)
}

/// What is decided about a packet that came in on an interface other than `lo`.
#[inline(always)]
fn carry_out(ctx: &TcContext, verdict: &Verdict, parsed: Option<&Parsed>) -> i32 {
    let next = apply(ctx, verdict, parsed, packet_of(parsed.is_some()));
    match (verdict.fate, parsed) {
        (Fate::Reset, Some(parsed)) => packet::reset_back(ctx, parsed),
        (Fate::Reset, None) => TC_ACT_SHOT,
        _ => next,
    }
}

/// Ingress of virtual interfaces, in the place of [`redirect_ext`].
#[classifier]
pub fn redirect_virt(ctx: TcContext) -> i32 {
    hint::clear();
    let Some(parsed) = parsed() else { return TC_ACT_SHOT };
    let is_tcp = parse(&ctx, false, parsed);
    let segment = if is_tcp { Some(parsed.segment()) } else { None };
    match virtual_interface(&ctx) {
        Some(interface)
            if !verdict::is_inbound(segment, interface.pod_id, &Tc::at_ingress(&ctx)) =>
        {
            on_virtual(&ctx, is_tcp, parsed, &interface)
        }
        // It is for the pod itself; or the interface is being set up, or removed.
        _ => on_interface(&ctx, is_tcp, parsed),
    }
}

#[inline(always)]
fn virtual_interface(ctx: &TcContext) -> Option<Virtual> {
    let pod_id = packet::pod_id(ctx);
    // SAFETY: the context is valid while the program runs.
    let index = unsafe { (*ctx.skb.skb).ifindex };
    let flags = VIRTUAL_INTERFACES.get_ptr(&VirtualInterface { pod_id, index })?;
    // SAFETY: the pointer is to a live map value; it is one word.
    Some(Virtual { pod_id, flags: unsafe { *flags } })
}

#[inline(never)]
fn on_virtual(ctx: &TcContext, is_tcp: bool, parsed: &Parsed, interface: &Virtual) -> i32 {
    let network = packet::network(ctx);
    let hides_tcp = !is_tcp && packet::hidden(ctx, network) == Hidden::Tcp;
    let parsed = if is_tcp { Some(parsed) } else { None };
    let ip = network != Network::Other;
    let segment = parsed.map(Parsed::segment);
    let verdict = verdict::on_virtual(ip, segment, hides_tcp, interface, &Tc::at_ingress(ctx));
    carry_out(ctx, &verdict, parsed)
}

/// Egress of every interface but `lo`: what is not the proxy's does not leave past it.
#[classifier]
pub fn redirect_out(ctx: TcContext) -> i32 {
    if packet::network(&ctx) == Network::Other {
        return TC_ACT_UNSPEC;
    }
    // Nearly everything is the proxy's.
    if mesh_mark(mark(&ctx)) == MARK_PROXY && settled::is_proxys(&ctx) {
        return TC_ACT_UNSPEC;
    }
    let Some(parsed) = parsed() else { return TC_ACT_SHOT };
    let readable = parse(&ctx, true, parsed);
    if readable && parsed.message.tcp && switch::holds_sent(&ctx, parsed) {
        return TC_ACT_SHOT;
    }
    let sends = sockets::sends(&ctx);
    let sender = sender(&ctx, readable, parsed, sends);
    on_egress(&ctx, readable, parsed, sender, sends)
}

/// Apart from what follows, because both need much of the stack.
#[inline(never)]
fn sender(ctx: &TcContext, readable: bool, parsed: &Parsed, sends: bool) -> Sender {
    let message = if readable { Ok(&parsed.message) } else { Err(Hidden::Nothing) };
    verdict::sender(mark(ctx), message, &Tc::at_egress(ctx, sends))
}

#[inline(never)]
fn on_egress(ctx: &TcContext, readable: bool, parsed: &Parsed, sender: Sender, sends: bool) -> i32 {
    let message =
        if readable { Ok(&parsed.message) } else { Err(packet::hidden(ctx, packet::network(ctx))) };
    let verdict = verdict::on_egress_of(sender, mark(ctx), message, &Tc::at_egress(ctx, sends));
    let recorded = match verdict.settle {
        Some(way) if parsed.segment().accepts && way.get() == WAY_DIRECT => {
            let known = if sends { settled::half_open(ctx) } else { None };
            let connection = known.unwrap_or_else(|| Connection {
                flow: parsed.segment().sender_flow(),
                first_seq: parsed.sequence().wrapping_add(1),
            });
            half_open::enter(verdict.pod_id, &connection);
            true
        }
        Some(way) if sends => settled::settle(ctx, way.get()),
        _ => true,
    };
    if !recorded && parsed.segment().opens && matches!(verdict.fate, Fate::ToLo) {
        // Later packets could be taken for those of a connection that is older than the capture. All others
        // are decided anew each time.
        count::packet(verdict.pod_id, Counter::DroppedNoMemory as u32, Packet::Parsed);
        return TC_ACT_SHOT;
    }
    let next = apply(ctx, &verdict, None, packet_of(readable));
    match verdict.fate {
        Fate::ToLo => packet::to_lo(ctx),
        Fate::Abort if packet::abort(ctx, parsed).is_none() => TC_ACT_SHOT,
        _ => next,
    }
}

/// Run by the agent in a pod's namespace, on a packet that is a question ([`abi::find_proxy`]): enters the
/// proxy's listener of one kind. Returns one of `FOUND_*`.
#[classifier]
pub fn find_proxy(ctx: TcContext) -> i32 {
    let Ok(question) = ctx.load::<u32>(QUESTION_AT) else { return FOUND_NOTHING };
    let found = find_listener(&ctx, question);
    hint::clear();
    found
}

#[inline(never)]
fn find_listener(ctx: &TcContext, question: u32) -> i32 {
    let device = packet::device(ctx);
    let key = ListenerKey { pod_id: packet::pod_on(device), kind: question & QUESTION_KIND };
    let (v4, enter) = (question & QUESTION_V4 != 0, question & QUESTION_ENTER != 0);
    let client_port = (question >> QUESTION_CLIENT) as u16;
    let found = match listeners::find(ctx, &key, v4, client_port, enter) {
        Found::Nothing => return FOUND_NOTHING,
        Found::Known => FOUND_KNOWN,
        Found::New => FOUND_NEW,
    };
    let _absent = PROXY_MISSING.remove(&key);
    found
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

fn packet_of(readable: bool) -> Packet {
    if readable { Packet::Parsed } else { Packet::Unread }
}

/// Writes the mark and the hint, counts, and gives what the program returns where nothing else is to
/// be done.
#[inline(always)]
fn apply(ctx: &TcContext, verdict: &Verdict, parsed: Option<&Parsed>, packet: Packet) -> i32 {
    if let Some(new) = verdict.mark {
        set_mesh_mark(ctx, new.get());
    }
    if let (Some(kind), Some(parsed)) = (verdict.hint, parsed) {
        hint::set(ctx, &parsed.segment().receiver_flow(), kind.get());
    }
    if let Some(counter) = verdict.count {
        count::packet(verdict.pod_id, counter as u32, packet);
    }
    match verdict.fate {
        Fate::Drop => TC_ACT_SHOT,
        // Not OK: programs that others attached after us run too.
        _ => TC_ACT_UNSPEC,
    }
}

/// Chooses the socket for a packet that no established connection claims. Each pod has a program of
/// its own attached, which says in `this_pod` which pod it is and calls this one; see the agent's
/// `dataplane/stub.rs`.
#[sk_lookup]
pub fn redirect_lookup(ctx: SkLookupContext) -> u32 {
    let Some(pod_id) = this_pod(&ctx) else { return SK_DROP };
    // SAFETY: the context is valid while the program runs.
    let lookup = unsafe {
        let l = &*ctx.lookup;
        let (local, remote) = if l.family == AF_INET {
            (Addr::v4(l.local_ip4.to_ne_bytes()), Addr::v4(l.remote_ip4.to_ne_bytes()))
        } else {
            (
                Addr::from_words(kubelet::read_words(&raw const l.local_ip6)),
                Addr::from_words(kubelet::read_words(&raw const l.remote_ip6)),
            )
        };
        Lookup {
            pod_id,
            tcp: l.protocol == IPPROTO_TCP,
            flow: Flow {
                local,
                remote,
                local_port: l.local_port as u16,
                remote_port: u16::from_be(l.remote_port),
            },
            on_lo: l.ingress_ifindex == LOOPBACK_IFINDEX,
            hint: hint::get(),
        }
    };
    let (pass, counter) = match verdict::steer(&lookup, &Maps) {
        Steer::Pass(None) => return SK_PASS,
        Steer::Pass(Some(counter)) => (SK_PASS, counter),
        Steer::Refuse(counter) => (SK_DROP, counter),
        Steer::Redirect(kind) => {
            match listeners::assign(ctx.as_ptr(), &ListenerKey { pod_id, kind }) {
                Ok(()) => (SK_PASS, verdict::redirected(kind)),
                // Fail closed: never fall through to the application.
                Err(_) => (SK_DROP, Counter::RefusedProxyAway),
            }
        }
    };
    count::lookup(pod_id, counter, &lookup.flow, lookup.tcp);
    pass
}

/// The pod whose program has called. `None` when another pod's has done so in between: where a process
/// asks for a socket (`sock_diag`), a packet may interrupt it.
#[inline(always)]
fn this_pod(ctx: &SkLookupContext) -> Option<PodId> {
    let slot = THIS_POD.get_ptr(0)?;
    // The context last: whoever comes in between changes both.
    // SAFETY: the pointer is to this CPU's own value.
    let (pod_id, context) = unsafe {
        let pod_id = core::ptr::read_volatile(&raw const (*slot).pod_id);
        (pod_id, core::ptr::read_volatile(&raw const (*slot).context))
    };
    if context == ctx.as_ptr() as u64 { Some(pod_id) } else { None }
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
