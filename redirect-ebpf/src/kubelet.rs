//! kubelet's connections, including those to pods: recorded where kubelet opens them, before the first packet
//! leaves.

use core::ptr;

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_TCP_CLOSE,
    },
    helpers::bpf_ktime_get_ns,
    macros::sock_ops,
    programs::SockOpsContext,
};
use redirect_ebpf::abi::{Addr, Flow};

use crate::{AF_INET, maps::KUBELET_FLOWS};

/// By then, a connection is established or has failed. This limits how long an entry counts whose end was
/// missed because the program was detached.
const LIFETIME_NS: u64 = 60_000_000_000;

/// Runs for the sockets of kubelet's cgroup.
#[sock_ops]
pub fn note_kubelet(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => opens(&ctx),
        // From now on, the ports may belong to another connection.
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => {
            let _absent = KUBELET_FLOWS.remove(&flow(&ctx));
        }
        _ => {}
    }
    1
}

#[inline(always)]
fn opens(ctx: &SockOpsContext) {
    let flow = flow(ctx);
    // Without this flag, the end would be missed.
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    if ctx.set_cb_flags(flags as i32).is_ok() {
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_ns() };
        // A connection that could not be recorded goes to the proxy.
        let _full = KUBELET_FLOWS.insert(&flow, now, u64::from(BPF_ANY));
    }
}

/// The connection as the pod sees it.
#[inline(always)]
fn flow(ctx: &SockOpsContext) -> Flow {
    let (local, remote) = if ctx.family() == AF_INET {
        (Addr::v4(ctx.remote_ip4().to_ne_bytes()), Addr::v4(ctx.local_ip4().to_ne_bytes()))
    } else {
        // SAFETY: the context is valid while the program runs.
        unsafe {
            (
                Addr::from_words(read_words(&raw const (*ctx.ops).remote_ip6)),
                Addr::from_words(read_words(&raw const (*ctx.ops).local_ip6)),
            )
        }
    };
    Flow {
        local,
        remote,
        local_port: u32::from_be(ctx.remote_port()) as u16,
        remote_port: ctx.local_port() as u16,
    }
}

/// Reads these words of a context, and nothing else: the verifier allows no smaller reads, which the compiler
/// would generate for a copy, and no address that depends on the family.
///
/// # Safety
///
/// As of a read.
#[inline(always)]
pub unsafe fn read_words(words: *const [u32; 4]) -> [u32; 4] {
    let words = words.cast::<u32>();
    // SAFETY: the caller's promise.
    unsafe {
        [
            ptr::read_volatile(words),
            ptr::read_volatile(words.add(1)),
            ptr::read_volatile(words.add(2)),
            ptr::read_volatile(words.add(3)),
        ]
    }
}

/// Whether kubelet has opened this connection to a pod.
#[inline(always)]
pub fn has_opened(flow: &Flow) -> bool {
    let Some(since) = KUBELET_FLOWS.get_ptr(flow) else { return false };
    // SAFETY: the pointer is to a live map value; the helper has no arguments.
    let age = unsafe { bpf_ktime_get_ns().wrapping_sub(*since) };
    age < LIFETIME_NS
}
