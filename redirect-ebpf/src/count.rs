//! Counts verdicts, and tells them one by one while somebody observes.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_ktime_get_ns};
use redirect_ebpf::{
    abi::{Addr, Counter, CounterKey, Flow, PodId, VerdictEvent},
    verdict::Segment,
};

use crate::{
    maps::{self, COUNTERS, PARSED, VERDICTS, VERDICTS_LOST, VERDICTS_WANTED},
    packet::{IPPROTO_TCP, IPPROTO_UDP},
};

/// What is known of the packet that something is counted for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Packet {
    /// It is in [`PARSED`].
    Parsed,
    /// It could not be read.
    Unread,
}

/// Counts a verdict at tcx.
#[inline(always)]
pub fn packet(pod_id: PodId, counter: u32, packet: Packet) {
    add(pod_id, counter);
    if is_on() {
        tell_packet(pod_id, counter, u32::from(packet == Packet::Parsed));
    }
}

/// Counts a verdict of `sk_lookup`; the flow is the listener's.
#[inline(always)]
pub fn lookup(pod_id: PodId, counter: Counter, flow: &Flow, tcp: bool) {
    add(pod_id, counter as u32);
    if is_on() {
        tell_lookup(pod_id, counter as u32, flow, u32::from(tcp));
    }
}

#[inline(always)]
fn add(pod_id: PodId, counter: u32) {
    let key = CounterKey { pod_id, counter };
    match COUNTERS.get_ptr_mut(maps::counter(&key)) {
        // SAFETY: the pointer is to this CPU's own value.
        Some(value) => unsafe { *value += 1 },
        None => {
            // When the map is full the agent sees it by the missing key; traffic is unaffected.
            let _full = COUNTERS.insert(maps::counter(&key), 1, BPF_NOEXIST as u64);
        }
    }
}

#[inline(always)]
fn is_on() -> bool {
    let Some(until) = VERDICTS_WANTED.get_ptr(0) else { return false };
    // SAFETY: the pointer is to a live map value; it is one word.
    let until = unsafe { core::ptr::read_volatile(until) };
    // SAFETY: a helper without arguments.
    until != 0 && unsafe { bpf_ktime_get_ns() } < until
}

#[inline(never)]
fn tell_packet(pod_id: PodId, counter: u32, parsed: u32) {
    let none = Addr { octets: [0; 16] };
    let (mut src, mut dst, mut src_port, mut dst_port, mut protocol) = (none, none, 0, 0, 0);
    if let (1, Some(parsed)) = (parsed, PARSED.get_ptr(0)) {
        // SAFETY: the pointer is to this CPU's own value, which the caller has filled.
        let message = unsafe { &(*parsed).message };
        Segment { src, dst, src_port, dst_port, .. } = message.segment;
        protocol = protocol_number(message.tcp);
    }
    tell(&VerdictEvent { at_ns: 0, pod_id, counter, src, dst, src_port, dst_port, protocol });
}

#[inline(never)]
fn tell_lookup(pod_id: PodId, counter: u32, flow: &Flow, tcp: u32) {
    tell(&VerdictEvent {
        at_ns: 0,
        pod_id,
        counter,
        src: flow.remote,
        dst: flow.local,
        src_port: flow.remote_port,
        dst_port: flow.local_port,
        protocol: protocol_number(tcp == 1),
    });
}

#[inline(always)]
fn protocol_number(tcp: bool) -> u32 {
    u32::from(if tcp { IPPROTO_TCP } else { IPPROTO_UDP })
}

#[inline(always)]
fn tell(event: &VerdictEvent) {
    match VERDICTS.reserve(0) {
        Some(mut entry) => {
            // SAFETY: a helper without arguments.
            let at_ns = unsafe { bpf_ktime_get_ns() };
            entry.write(VerdictEvent { at_ns, ..*event });
            entry.submit(0);
        }
        None => {
            if let Some(lost) = VERDICTS_LOST.get_ptr_mut(0) {
                // SAFETY: the pointer is to this CPU's own value.
                unsafe { *lost += 1 }
            }
        }
    }
}
