//! While a pod enters or leaves the mesh, or its settings change: notes which way each of its flows goes,
//! and holds back a packet that goes another way than its flow did before. It is sent again, on the
//! right way, once the flow's socket is marked.
//!
//! Which pods that is, the map `switches` says; `switching` says whether there is any, so that nobody
//! else pays for it.

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
    verdict::mesh_mark,
};

use crate::{
    count::{self, Packet},
    maps::{NOTED, SWITCHES, SWITCHING, WAYS},
    mark,
    packet::{self, Parsed},
};

/// Where the pod's packets leave: egress of its interfaces, and ingress of `lo`. Whether a segment is held
/// back.
#[inline(always)]
pub fn holds_sent(ctx: &TcContext, parsed: &Parsed) -> bool {
    is_on() && holds(ctx, parsed)
}

/// Where packets come to the pod from outside: a connection that was half open, and so without a
/// socket, shows itself by the packet that opens it in full.
#[inline(always)]
pub fn note_received(ctx: &TcContext, parsed: &Parsed) {
    if is_on()
        && let Some(pod_id) = switching_pod(ctx)
    {
        // What is known to be redirected stays so, whatever outsiders send.
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
    if parsed.segment().opens {
        // A new connection, maybe with the ports of an old one.
        note(pod_id, flow, way, BPF_ANY);
        return false;
    }
    match noted(pod_id, flow) {
        Some(noted) if noted != way => {
            count::packet(pod_id, Counter::HeldInTransition as u32, Packet::Parsed);
            true
        }
        Some(_) => false,
        None => {
            note(pod_id, flow, way, BPF_NOEXIST);
            false
        }
    }
}

/// Whether any pod of the node may be in a switch.
#[inline(always)]
fn is_on() -> bool {
    // SAFETY: the pointer is to a live map value; it is one word.
    SWITCHING.get_ptr(0).is_some_and(|pods| unsafe { *pods } != 0)
}

/// The packet's pod, if it is in one.
#[inline(always)]
fn switching_pod(ctx: &TcContext) -> Option<PodId> {
    let pod_id = packet::netns_inode(ctx)?;
    let until_ns = SWITCHES.get_ptr(&pod_id)?;
    // SAFETY: the pointer is to a live map value, of one word; the helper has no arguments.
    // An agent that dies in it must not leave flows held back.
    let on = unsafe { bpf_ktime_get_ns() < *until_ns };
    on.then_some(pod_id)
}

/// Notes the way of a flow; `flags` as of an update of a map. Of each pod only so many flows are noted:
/// then the guard alone keeps them on their way.
#[inline(never)]
pub fn note(pod_id: PodId, flow: Flow, way: u32, flags: u32) {
    let key = PodFlow { pod_id, flow };
    let Some(count) = NOTED.get_ptr_mut(&pod_id) else { return };
    // SAFETY: the pointers are to live map values. CPUs that count at the same instant may lose one, but
    // not the first: where there are notes the count is not 0.
    unsafe {
        if WAYS.get_ptr(&key).is_none() {
            if *count >= POD_WAYS {
                return;
            }
            *count += 1;
        }
    }
    // Refused only where a note is there already that counts for more.
    let _noted = WAYS.insert(&key, way, u64::from(flags));
}

/// The way of a flow, if it is noted.
#[inline(always)]
pub fn noted(pod_id: PodId, flow: Flow) -> Option<u32> {
    // SAFETY: the pointer is to a live map value; it is one word.
    WAYS.get_ptr(&PodFlow { pod_id, flow }).map(|way| unsafe { *way })
}
