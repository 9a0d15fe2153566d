//! While a pod enters or leaves the mesh, or its settings change: notes which path each of its connections
//! takes, and holds back a packet that takes another path than its connection did before. TCP sends it again,
//! on the right path, once the socket is marked.
//!
//! The map `switches` has these pods. `switching` says whether there are any, so that packets of other pods
//! pay almost nothing.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::bpf_ktime_get_ns,
    programs::TcContext,
};
use redirect_ebpf::{
    abi::{
        Counter, Flow, LOOPBACK_IFINDEX, MARK_PROXY, POD_WAYS, PodFlow, PodId, WAY_DIRECT,
        WAY_REDIRECTED,
    },
    verdict::{Receiver, captures, mesh_mark},
};

use crate::{
    count::{self, Packet},
    env::{excludes_outbound, pod, receiver},
    maps::{NOTED, SWITCHES, SWITCHING, WAYS},
    mark,
    packet::{self, Parsed},
};

/// For packets that the pod sends: egress of its interfaces, and ingress of `lo`. Returns whether a segment
/// is held back.
#[inline(always)]
pub fn holds_sent(ctx: &TcContext, parsed: &Parsed) -> bool {
    is_on() && holds(ctx, parsed)
}

/// For packets that come from outside: a connection that was half open, and so had no socket, shows itself by
/// the packet that completes it.
#[inline(always)]
pub fn note_received(ctx: &TcContext, parsed: &Parsed) {
    if is_on()
        && let Some(pod_id) = switching_pod(ctx)
        && matches!(receiver(ctx, parsed.segment()), Receiver::Listener | Receiver::HalfOpen)
    {
        // A listener completes a SYN cookie.
        // What is known to be redirected stays redirected, whatever outsiders send.
        note(pod_id, parsed.segment().receiver_flow(), WAY_DIRECT, BPF_NOEXIST);
    }
}

#[inline(never)]
fn holds(ctx: &TcContext, parsed: &Parsed) -> bool {
    let mark = mesh_mark(mark(ctx));
    // SAFETY: the context is valid while the program runs.
    let on_lo = unsafe { (*ctx.skb.skb).ifindex } == LOOPBACK_IFINDEX;
    if mark != 0 && !(on_lo && mark == MARK_PROXY) {
        return false;
    }
    let Some(pod_id) = switching_pod(ctx) else { return false };
    if mark == MARK_PROXY {
        note(pod_id, parsed.segment().receiver_flow(), WAY_REDIRECTED, BPF_ANY);
        return false;
    }
    let flow = parsed.segment().sender_flow();
    let way = if on_lo { WAY_REDIRECTED } else { WAY_DIRECT };
    let noted = noted(pod_id, flow);
    if on_lo && (parsed.segment().opens || noted.is_none()) && excludes_outbound(pod_id, &flow) {
        // It is a stray: the settings say so already, and the routes do not yet.
        return false;
    }
    if parsed.segment().opens {
        // A new connection, possibly with the ports of an old one.
        note(pod_id, flow, way, BPF_ANY);
        return false;
    }
    match noted {
        Some(noted) if noted != way => {
            count::packet(pod_id, Counter::HeldInTransition as u32, Packet::Parsed);
            true
        }
        Some(_) => false,
        None => {
            // In a captured pod, the sockets of direct connections are known by now. Any other one is not to
            // become direct by what it sends.
            if on_lo || !pod(pod_id).is_some_and(captures) {
                note(pod_id, flow, way, BPF_NOEXIST);
            }
            false
        }
    }
}

/// Whether a connection is noted as direct, while its pod is in a switch. An agent that is killed leaves its notes
/// behind, and later connections may have the same addresses and ports.
#[inline(always)]
pub fn is_noted_direct(ctx: &TcContext, flow: Flow) -> bool {
    is_on() && switching_pod(ctx).is_some_and(|pod_id| noted(pod_id, flow) == Some(WAY_DIRECT))
}

/// Whether any pod of the node may be in a switch.
#[inline(always)]
fn is_on() -> bool {
    // SAFETY: the pointer is to a live map value; it is one word.
    SWITCHING.get_ptr(0).is_some_and(|pods| unsafe { *pods } != 0)
}

/// The packet's pod, if it is in a switch.
#[inline(always)]
fn switching_pod(ctx: &TcContext) -> Option<PodId> {
    let pod_id = packet::pod_id(ctx);
    let until_ns = SWITCHES.get_ptr(&pod_id)?;
    // SAFETY: the pointer is to a live map value, of one word; the helper has no arguments. If the agent dies
    // during a switch, packets must not be held back forever.
    let on = unsafe { bpf_ktime_get_ns() < *until_ns };
    on.then_some(pod_id)
}

/// Notes the path of a connection; `flags` are those of a map update. The number of notes per pod is limited.
/// Beyond that, only the guard keeps connections on their path.
#[inline(never)]
pub fn note(pod_id: PodId, flow: Flow, way: u32, flags: u32) {
    let key = PodFlow { pod_id, flow };
    let Some(count) = NOTED.get_ptr_mut(&pod_id) else { return };
    // SAFETY: the pointers are to live map values. CPUs that count at the same moment may lose a count, but
    // not the first: if there are notes, the count is not 0.
    unsafe {
        if WAYS.get_ptr(&key).is_none() {
            if *count >= POD_WAYS {
                return;
            }
            *count += 1;
        }
    }
    // Refused only if there is a note already that takes precedence.
    let _noted = WAYS.insert(&key, way, u64::from(flags));
}

/// The path of a connection, if it is noted.
#[inline(always)]
pub fn noted(pod_id: PodId, flow: Flow) -> Option<u32> {
    match noted_way(pod_id, flow) {
        0 => None,
        way => Some(way),
    }
}

/// The same as a plain number, and a function of its own: the compiler would compute with the value's address,
/// which the verifier forbids.
#[inline(never)]
fn noted_way(pod_id: PodId, flow: Flow) -> u32 {
    // SAFETY: the pointer is to a live map value; it is one word.
    WAYS.get_ptr(&PodFlow { pod_id, flow }).map_or(0, |way| unsafe { *way })
}
