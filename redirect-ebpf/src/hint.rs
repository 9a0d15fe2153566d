//! The hint from tcx to `sk_lookup`.

use aya_ebpf::{EbpfContext as _, programs::TcContext};
use redirect_ebpf::{
    abi::{Flow, HINT_NONE, HINT_QUESTION, Hint},
    verdict::Segment,
};

use crate::{maps::HINT, packet};

/// Before a program decides: what the packet before left behind is for that one.
#[inline(always)]
pub fn clear() {
    if let Some(slot) = HINT.get_ptr_mut(0) {
        // SAFETY: see `put`.
        unsafe { (*slot).kind = HINT_NONE }
    }
}

/// For the packet that the program runs for.
#[inline(never)]
pub fn set(ctx: &TcContext, flow: &Flow, kind: u32) {
    put(&Hint { device: packet::device(ctx), flow: *flow, kind });
}

#[inline(always)]
pub fn put(hint: &Hint) {
    if let Some(slot) = HINT.get_ptr_mut(0) {
        // SAFETY: the pointer is to this CPU's own value, and nothing interrupts the program
        // that would write it too: tcx runs in softirq.
        unsafe { *slot = *hint }
    }
}

#[inline(always)]
pub fn get() -> Hint {
    match HINT.get_ptr(0) {
        // SAFETY: see `put`.
        Some(slot) => unsafe { *slot },
        None => bytemuck::Zeroable::zeroed(),
    }
}

/// Asks for the socket of a segment. The question runs `sk_lookup`, too, when there is no connection.
#[inline(always)]
pub fn ask<T>(
    ctx: &TcContext,
    segment: &Segment,
    question: impl FnOnce(*mut core::ffi::c_void, &Segment) -> T,
) -> T {
    // At egress it may be a copy of a packet that is on its way up (TEE in PREROUTING), whose hint must not
    // get lost: the proxy would be handed its own call.
    let kept = get();
    set(ctx, &segment.receiver_flow(), HINT_QUESTION);
    let answer = question(ctx.as_ptr(), segment);
    put(&kept);
    answer
}
