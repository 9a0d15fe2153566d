//! Looks up sockets, and tells whose they are.

use core::ptr;

use aya_ebpf::{
    bindings::{
        BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    cty::c_void,
    helpers::{
        bpf_get_listener_sock, bpf_sk_fullsock, bpf_sk_lookup_tcp, bpf_sk_release,
        bpf_skb_cgroup_id, bpf_skc_lookup_tcp,
    },
    programs::TcContext,
};
use redirect_ebpf::{
    abi::{ANY_CGROUP, Addr, MARK_DIRECT, MARK_PROXY},
    verdict::{Receiver, Segment, Sender, mesh_mark},
};

use crate::{config, maps::PROXY_CGROUPS, packet, settled};

/// Source: Linux `include/linux/net.h`.
pub const SOCK_STREAM: u32 = 1;
/// Source: Linux `include/net/tcp_states.h`.
const TCP_TIME_WAIT: u32 = 6;
pub const TCP_LISTEN: u32 = 10;
pub const TCP_NEW_SYN_RECV: u32 = 12;

/// The socket that the kernel finds for this segment. This also runs `sk_lookup`: the caller sets the hint
/// first, so that only the application's own listeners and connections are found.
#[inline(always)]
pub fn receiver(ctx: *mut c_void, segment: &Segment) -> Receiver {
    let Segment { src, dst, src_port, dst_port, .. } = segment;
    let (mut tuple, len) = tuple(src, *src_port, dst, *dst_port);
    // SAFETY: the tuple is initialized for `len` bytes; the reference is released.
    let state = unsafe {
        let sk = bpf_skc_lookup_tcp(ctx, &raw mut tuple, len, BPF_F_CURRENT_NETNS as u64, 0);
        if sk.is_null() {
            return Receiver::Nobody;
        }
        let state = (*sk).state;
        bpf_sk_release(sk.cast());
        state
    };
    match state {
        TCP_LISTEN => Receiver::Listener,
        TCP_NEW_SYN_RECV => Receiver::HalfOpen,
        TCP_TIME_WAIT => Receiver::TimeWait,
        _ => Receiver::Connection,
    }
}

/// Whether the packet came in on an interface.
#[inline(always)]
pub fn came_in(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.skb.skb).ingress_ifindex != 0 }
}

/// Whether a socket of this namespace sends the packet. A packet may still carry the socket of another
/// namespace, until a stack has received it; such a socket does not count.
#[inline(never)]
pub fn sends(ctx: &TcContext) -> bool {
    let sk = packets_socket(ctx);
    !sk.is_null() && netns(sk) == packet::netns(ctx)
}

/// The packet's socket, of whatever namespace.
#[inline(always)]
pub fn packets_socket(ctx: &TcContext) -> *mut bpf_sock {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk }
}

/// The address of the socket's network namespace.
#[inline(always)]
fn netns(sk: *mut bpf_sock) -> u64 {
    field(sk, config::offset!(net))
}

/// The id of the cgroup (v2) in which the process was when it created the socket, or the listener that
/// accepted it.
#[inline(always)]
fn cgroup(sk: *mut bpf_sock) -> u64 {
    cgroup_id(field(sk, config::offset!(socket_cgroup)))
}

/// The id of the cgroup at this address.
#[inline(always)]
pub fn cgroup_id(cgroup: u64) -> u64 {
    let node: u64 = packet::kernel(cgroup + u64::from(config::offset!(cgroup_node)));
    packet::kernel(node + u64::from(config::offset!(node_id)))
}

/// Eight bytes at `offset` of the kernel's `struct sock`.
#[inline(always)]
fn field(sk: *mut bpf_sock, offset: u32) -> u64 {
    packet::kernel::<u64>(address(sk) + u64::from(offset))
}

/// The verifier forbids arithmetic on a socket's address. Read back from memory, it is a plain number.
#[inline(always)]
pub fn address(sk: *mut bpf_sock) -> u64 {
    let slot = core::hint::black_box(sk);
    packet::kernel(ptr::from_ref(&slot) as u64)
}

/// Who owns the socket that [`sends`] the packet, or the listener for which it answers.
#[inline(always)]
pub fn sender(ctx: &TcContext) -> Sender {
    let sk = packets_socket(ctx);
    if sk.is_null() {
        return Sender::Nobody;
    }
    // SAFETY: the helpers check what they are given, and go from a half-open socket to its listener.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        let full = if full.is_null() { bpf_get_listener_sock(sk) } else { full };
        if full.is_null() {
            return Sender::Application;
        }
        owner((*full).mark, || bpf_skb_cgroup_id(ctx.skb.skb))
    }
}

/// Whether the socket that [`sends`] the packet is a connection's own. The kernel answers from a raw socket of
/// its own where there is none.
#[inline(always)]
pub fn is_connections(ctx: &TcContext) -> bool {
    let sk = packets_socket(ctx);
    if sk.is_null() {
        return false;
    }
    // SAFETY: the helper checks what it is given; what it returns is a live socket.
    unsafe {
        let full = bpf_sk_fullsock(sk);
        !full.is_null() && (*full).type_ == SOCK_STREAM
    }
}

/// Whether the listener for which the packet answers has the mark of a direct connection.
#[inline(always)]
pub fn has_marked_listener(ctx: &TcContext) -> bool {
    let sk = packets_socket(ctx);
    if sk.is_null() {
        return false;
    }
    // SAFETY: as above.
    unsafe {
        let listener = bpf_get_listener_sock(sk);
        !listener.is_null() && mesh_mark((*listener).mark) == MARK_DIRECT
    }
}

/// Who owns a socket of this namespace.
///
/// # Safety
///
/// The socket is a live one.
#[inline(always)]
unsafe fn kind(sk: *mut bpf_sock) -> Sender {
    // SAFETY: the caller's promise.
    owner(unsafe { (*sk).mark }, || cgroup(sk))
}

/// Who owns a socket with this mark.
#[inline(always)]
pub fn owner(mark: u32, cgroup: impl FnOnce() -> u64) -> Sender {
    if mesh_mark(mark) != MARK_PROXY {
        return Sender::Application;
    }
    let cgroup = cgroup();
    if cgroup != ANY_CGROUP && PROXY_CGROUPS.get_ptr(&cgroup).is_some() {
        Sender::Proxy
    } else if is_mark_enough() {
        Sender::Marked
    } else {
        Sender::Impostor
    }
}

/// Whether the proxy's mark alone makes a socket the proxy's, whatever its cgroup.
#[inline(always)]
pub fn is_mark_enough() -> bool {
    PROXY_CGROUPS.get_ptr(&ANY_CGROUP).is_some()
}

/// The socket that receives this segment has opened a connection by `lo`: whether it is the proxy's. It may have had
/// a direct connection before, with the same addresses and ports: after 4 GiB, it also starts with the same number.
/// The caller sets the hint first.
#[inline(always)]
pub fn opens_by_lo(ctx: *mut c_void, segment: &Segment) -> bool {
    // SAFETY: the socket is a live one.
    let is_proxys = with_receiver(ctx, segment, |sk| unsafe {
        settled::no_longer_direct(sk);
        (*sk).state != TCP_LISTEN && is_proxys(sk)
    });
    is_proxys.unwrap_or(false)
}

/// Whether the socket that receives this segment is the proxy's. The caller sets the hint first.
#[inline(always)]
pub fn is_proxys_connection(ctx: *mut c_void, segment: &Segment) -> bool {
    // SAFETY: the socket is a live one.
    with_receiver(ctx, segment, |sk| unsafe { (*sk).state != TCP_LISTEN && is_proxys(sk) })
        .unwrap_or(false)
}

#[inline(always)]
fn with_receiver<T>(
    ctx: *mut c_void,
    Segment { src, dst, src_port, dst_port, .. }: &Segment,
    f: impl FnOnce(*mut bpf_sock) -> T,
) -> Option<T> {
    let (mut tuple, len) = tuple(src, *src_port, dst, *dst_port);
    // SAFETY: the tuple is initialized for `len` bytes; the reference is released.
    unsafe {
        let sk = bpf_sk_lookup_tcp(ctx, &raw mut tuple, len, BPF_F_CURRENT_NETNS as u64, 0);
        if sk.is_null() {
            return None;
        }
        let outcome = f(sk);
        bpf_sk_release(sk.cast());
        Some(outcome)
    }
}

/// Whether a socket of this namespace is the proxy's. An application that took the port is not, even if it
/// sets the mark.
///
/// # Safety
///
/// The socket is a live one.
#[inline(never)]
pub unsafe fn is_proxys(sk: *mut bpf_sock) -> bool {
    // SAFETY: the caller's promise.
    matches!(unsafe { kind(sk) }, Sender::Proxy | Sender::Marked)
}

/// The kernel's form of a 4-tuple, and its length in bytes.
#[inline(always)]
pub fn tuple(src: &Addr, src_port: u16, dst: &Addr, dst_port: u16) -> (bpf_sock_tuple, u32) {
    let (sport, dport) = (src_port.to_be(), dst_port.to_be());
    if dst.is_v4() {
        let ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
            saddr: src.words()[3],
            daddr: dst.words()[3],
            sport,
            dport,
        };
        let len = size_of_val(&ipv4) as u32;
        // Zeroed as a whole. Otherwise the compiler leaves pointers in the unused part, and the verifier
        // objects. SAFETY: integers only.
        let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
        tuple.__bindgen_anon_1.ipv4 = ipv4;
        (tuple, len)
    } else {
        let ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
            saddr: src.words(),
            daddr: dst.words(),
            sport,
            dport,
        };
        let len = size_of_val(&ipv6) as u32;
        (bpf_sock_tuple { __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv6 } }, len)
    }
}
