//! The proxy's listeners.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, BPF_NOEXIST, BPF_SK_LOOKUP_F_NO_REUSEPORT, bpf_sock},
    cty::{c_long, c_void},
    helpers::{
        bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_map_update_elem, bpf_sk_assign,
        bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release, bpf_tcp_check_syncookie,
    },
    programs::TcContext,
};
use redirect_ebpf::{
    abi::{
        Addr, Flow, HINT_QUESTION, LISTENER_HBONE, LISTENER_INBOUND, LISTENER_OUTBOUND,
        ListenerKey, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PORT_PROXY_DNS, PodId,
    },
    dns::Message,
    verdict::Proxy,
};

use crate::{
    config, hint,
    maps::{LISTENERS, PROXY_MISSING},
    packet,
    sockets::{TCP_LISTEN, is_proxys, tuple},
};

/// The result of a search for a listener of the proxy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// None.
    Nothing,
    /// The one that `listeners` has already.
    Known,
    /// Another one.
    New,
}

/// A client port that no listener's client has.
const ANY_CLIENT: u16 = 1;

/// Whether the proxy listens in the pod, on the port of `key.kind`; enters its socket into
/// `listeners` if it is not there.
#[inline(never)]
pub fn proxy(ctx: &TcContext, key: &ListenerKey, v4: bool) -> Proxy {
    // SAFETY: the reference that the lookup takes is released.
    unsafe {
        let sk = bpf_map_lookup_elem(map(), ptr::from_ref(key).cast());
        if !sk.is_null() {
            bpf_sk_release(sk);
            return Proxy::Listens;
        }
    }
    if find(ctx, key, v4, ANY_CLIENT, true) != Found::Nothing {
        let _gone = PROXY_MISSING.remove(key);
        return Proxy::Listens;
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let since = match PROXY_MISSING.get_ptr(key) {
        // SAFETY: the pointer is to a live map value.
        Some(since) => unsafe { *since },
        None => {
            // If the map is full, the grace is over at once: connections are refused, not leaked.
            match PROXY_MISSING.insert(key, now, BPF_NOEXIST as u64) {
                Ok(()) => now,
                Err(_) => 0,
            }
        }
    };
    if now.wrapping_sub(since) < config::proxy_grace_ns() {
        Proxy::AwayWithinGrace
    } else {
        Proxy::Away
    }
}

/// Looks for the proxy's listener of this kind. If `enter` is set, it replaces the entry in `listeners`.
/// Returns what was found. Others may have joined the reuseport group of that port; the kernel chooses one of
/// the group by `client_port`.
#[inline(never)]
pub fn find(ctx: &TcContext, key: &ListenerKey, v4: bool, client_port: u16, enter: bool) -> Found {
    let port = match key.kind {
        LISTENER_INBOUND => PORT_INBOUND,
        LISTENER_HBONE => PORT_HBONE,
        _ => PORT_OUTBOUND,
    };
    let loopback = Addr::loopback(v4);
    // Otherwise `sk_lookup` would refuse: packets from other interfaces are never for loopback.
    let flow =
        Flow { local: loopback, remote: loopback, local_port: port, remote_port: client_port };
    hint::set(ctx, &flow, HINT_QUESTION);
    let (mut tuple, len) = tuple(&loopback, client_port, &loopback, port);
    // SAFETY: the tuple is initialized for `len` bytes; the reference is released.
    unsafe {
        let sk: *mut bpf_sock = bpf_sk_lookup_tcp(
            ctx.skb.skb.cast(),
            &raw mut tuple,
            len,
            BPF_F_CURRENT_NETNS as u64,
            0,
        );
        if sk.is_null() {
            return Found::Nothing;
        }
        let is_it = (*sk).state == TCP_LISTEN && is_proxys(sk);
        let found = if !is_it {
            Found::Nothing
        } else if !enter || is_known(key, sk) {
            Found::Known
        } else if bpf_map_update_elem(map(), ptr::from_ref(key).cast(), sk.cast(), 0) == 0 {
            Found::New
        } else {
            Found::Nothing
        };
        bpf_sk_release(sk.cast());
        found
    }
}

/// Whether `listeners` has this very socket.
///
/// # Safety
///
/// The socket is a live one.
#[inline(always)]
unsafe fn is_known(key: &ListenerKey, sk: *mut bpf_sock) -> bool {
    // SAFETY: the reference that the lookup takes is released.
    unsafe {
        let known = bpf_map_lookup_elem(map(), ptr::from_ref(key).cast());
        if known.is_null() {
            return false;
        }
        let same = ptr::eq(known.cast(), sk);
        bpf_sk_release(known);
        same
    }
}

/// Assigns the lookup to the proxy's listener, never to another socket of its reuseport group. Fails if there
/// is none.
#[inline(always)]
pub fn assign(ctx: *mut c_void, key: &ListenerKey) -> Result<(), c_long> {
    // SAFETY: the reference that the lookup takes is released.
    unsafe {
        let sk = bpf_map_lookup_elem(map(), ptr::from_ref(key).cast());
        if sk.is_null() {
            return Err(-2);
        }
        let ret = bpf_sk_assign(ctx, sk, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT));
        bpf_sk_release(sk);
        if ret == 0 { Ok(()) } else { Err(ret) }
    }
}

/// Whether a segment is the ACK that completes a SYN cookie of this listener of the proxy. Costs next to
/// nothing while the kernel sends no SYN cookies.
#[inline(never)]
pub fn completes_cookie(ctx: &TcContext, pod_id: PodId) -> bool {
    let Some((mut ip, ip_len, mut tcp)) = packet::headers(ctx) else { return false };
    let key = ListenerKey { pod_id, kind: LISTENER_OUTBOUND };
    // SAFETY: the headers are as long as is said; the reference is released.
    unsafe {
        let sk = bpf_map_lookup_elem(map(), ptr::from_ref(&key).cast());
        if sk.is_null() {
            return false;
        }
        let ret = bpf_tcp_check_syncookie(
            sk,
            (&raw mut ip).cast(),
            ip_len,
            (&raw mut tcp).cast(),
            size_of_val(&tcp) as u32,
        );
        bpf_sk_release(sk);
        ret == 0
    }
}

/// Whether the DNS of the pod's proxy listens.
#[inline(always)]
pub fn dns_listens(ctx: &TcContext, message: &Message) -> bool {
    let loopback = Addr::loopback(message.segment.dst.is_v4());
    let (mut tuple, len) = tuple(&loopback, 0, &loopback, PORT_PROXY_DNS);
    let (skb, netns) = (ctx.skb.skb.cast(), BPF_F_CURRENT_NETNS as u64);
    // SAFETY: the tuple is initialized for `len` bytes; the reference is released.
    unsafe {
        let sk: *mut bpf_sock = if message.tcp {
            bpf_sk_lookup_tcp(skb, &raw mut tuple, len, netns, 0)
        } else {
            bpf_sk_lookup_udp(skb, &raw mut tuple, len, netns, 0)
        };
        if sk.is_null() {
            return false;
        }
        let found = (!message.tcp || (*sk).state == TCP_LISTEN) && is_proxys(sk);
        bpf_sk_release(sk.cast());
        found
    }
}

fn map() -> *mut c_void {
    ptr::from_ref(&LISTENERS).cast_mut().cast()
}
