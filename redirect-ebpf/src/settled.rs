//! Connections by their sockets, and the path that is recorded for each.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    cty::c_void,
    helpers::{
        bpf_sk_fullsock, bpf_sk_release, bpf_sk_storage_get, bpf_skc_lookup_tcp, bpf_tcp_sock,
    },
    programs::TcContext,
};
use redirect_ebpf::{
    abi::{Addr, Connection, Flow, Settled, WAY_DIRECT, WAY_MARKED, WAY_PROXYS, WAY_REDIRECTED},
    verdict::Segment,
};

use crate::{
    AF_INET, config,
    maps::SETTLED,
    packet,
    sockets::{SOCK_STREAM, TCP_NEW_SYN_RECV, address, is_mark_enough, packets_socket, tuple},
};

/// Whether the packet belongs to a connection of the proxy that leaves the pod. The connection need not be
/// compared: each of the proxy's sockets has only one.
#[inline(always)]
pub fn is_proxys(ctx: &TcContext) -> bool {
    let Some(settled) = storage(packets_socket(ctx), ptr::null_mut(), 0) else { return false };
    // SAFETY: the pointer is to a live map value.
    match unsafe { (*settled).way } {
        WAY_PROXYS => true,
        WAY_MARKED => is_mark_enough(),
        _ => false,
    }
}

/// The path that was recorded for the connection of the socket that [`sends`] the packet.
#[inline(always)]
pub fn way(ctx: &TcContext) -> Option<u32> {
    let sk = packets_socket(ctx);
    way_of(sk, &connection(sk)?)
}

/// Records it. Fails without memory.
#[inline(always)]
pub fn settle(ctx: &TcContext, way: u32) -> bool {
    let sk = packets_socket(ctx);
    // A raw socket has no connection.
    connection(sk).is_none_or(|connection| settle_for(sk, &connection, way))
}

/// The path that was recorded for this connection of a socket.
#[inline(always)]
pub fn way_of(sk: *mut bpf_sock, connection: &Connection) -> Option<u32> {
    let settled = storage(sk, ptr::null_mut(), 0)?;
    // SAFETY: the pointer is to a live map value.
    unsafe { if (*settled).connection == *connection { Some((*settled).way) } else { None } }
}

/// Records it. Fails without memory.
#[inline(always)]
pub fn settle_for(sk: *mut bpf_sock, connection: &Connection, way: u32) -> bool {
    let mut new = Settled { connection: *connection, way };
    let Some(settled) = storage(sk, &raw mut new, u64::from(BPF_SK_STORAGE_GET_F_CREATE)) else {
        return false;
    };
    // SAFETY: the pointer is to a live map value; a socket's packets leave one at a time.
    unsafe { *settled = new }
    true
}

/// What was recorded as direct for this socket is redirected.
///
/// # Safety
///
/// The socket is a live one.
#[inline(always)]
pub unsafe fn no_longer_direct(sk: *mut bpf_sock) {
    // SAFETY: the pointer is to a live map value.
    if let Some(settled) = storage(sk, ptr::null_mut(), 0)
        && unsafe { (*settled).way } == WAY_DIRECT
    {
        unsafe { (*settled).way = WAY_REDIRECTED }
    }
}

#[inline(always)]
fn storage(sk: *mut bpf_sock, new: *mut Settled, flags: u64) -> Option<*mut Settled> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: the helper checks what it is given, and gives nothing for half-open sockets.
    unsafe {
        let map = ptr::from_ref(&SETTLED).cast_mut().cast();
        let settled: *mut Settled = bpf_sk_storage_get(map, sk.cast(), new.cast(), flags).cast();
        if settled.is_null() { None } else { Some(settled) }
    }
}

/// The half-open connection that [`sends`] the packet.
#[inline(always)]
pub fn half_open(ctx: &TcContext) -> Option<Connection> {
    let sk = packets_socket(ctx);
    // SAFETY: the packet's socket is a live one.
    if sk.is_null() { None } else { unsafe { half_open_at(sk) } }
}

/// # Safety
///
/// The socket is a live one.
#[inline(always)]
unsafe fn half_open_at(sk: *mut bpf_sock) -> Option<Connection> {
    // SAFETY: the caller's promise.
    if unsafe { (*sk).state } != TCP_NEW_SYN_RECV {
        return None;
    }
    Some(request_at(address(sk)))
}

/// The connection of the `struct request_sock` at this address.
#[inline(always)]
pub fn request_at(address: u64) -> Connection {
    let isn: u32 = packet::kernel(address + u64::from(config::offset!(snt_isn)));
    Connection { flow: flow_at(address), first_seq: isn.wrapping_add(1) }
}

/// The connection of the socket that receives this segment, half open or not. The caller sets the hint first.
#[inline(always)]
pub fn receivers_connection(ctx: *mut c_void, segment: &Segment) -> Option<Connection> {
    let Segment { src, dst, src_port, dst_port, .. } = segment;
    let (mut tuple, len) = tuple(src, *src_port, dst, *dst_port);
    // SAFETY: the tuple is initialized for `len` bytes; the reference is released.
    unsafe {
        let sk = bpf_skc_lookup_tcp(ctx, &raw mut tuple, len, BPF_F_CURRENT_NETNS as u64, 0);
        if sk.is_null() {
            return None;
        }
        let connection = half_open_at(sk).or_else(|| connection(sk));
        bpf_sk_release(sk.cast());
        connection
    }
}

/// The connection of a TCP socket, as the iterators read it with [`flow_at`]. `None` if it is half open, or in
/// TIME_WAIT. Netfilter in the pod may have given its packets other addresses and ports.
#[inline(always)]
pub fn connection(sk: *mut bpf_sock) -> Option<Connection> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: the helpers check what they are given; what they return is a live socket. All fields are read before
    // any is chosen: the verifier does not let the compiler choose between their addresses.
    unsafe {
        let sk = bpf_sk_fullsock(sk);
        // The kernel answers for all namespaces from one raw socket for each CPU, which has the protocol of TCP.
        if sk.is_null() || (*sk).type_ != SOCK_STREAM {
            return None;
        }
        let tcp = bpf_tcp_sock(sk);
        if tcp.is_null() {
            return None;
        }
        macro_rules! read {
            ($sk:ident.$field:ident) => {
                (&raw const (*$sk).$field).read_volatile()
            };
        }
        macro_rules! words {
            ($field:ident) => {
                [0, 1, 2, 3].map(|i| (&raw const (*sk).$field[i]).read_volatile())
            };
        }
        let first_seq = Connection::first_seq(read!(tcp.snd_una), read!(tcp.bytes_acked));
        let v4 = [read!(sk.src_ip4), read!(sk.dst_ip4)];
        let (local, remote) = (words!(src_ip6), words!(dst_ip6));
        let [local, remote] = if read!(sk.family) == AF_INET {
            v4.map(|ip| Addr::v4(ip.to_ne_bytes()))
        } else {
            [Addr::from_words(local), Addr::from_words(remote)]
        };
        let flow = Flow {
            local,
            remote,
            local_port: read!(sk.src_port) as u16,
            remote_port: u16::from_be(read!(sk.dst_port)),
        };
        Some(Connection { flow, first_seq })
    }
}

/// The addresses and ports of the `struct sock_common` at this address.
#[inline(always)]
pub fn flow_at(common: u64) -> Flow {
    let at = |offset: u32| common + u64::from(offset);
    let family: u16 = packet::kernel(at(config::offset!(family)));
    let (local, remote): (Addr, Addr) = if u32::from(family) == AF_INET {
        (
            Addr::v4(packet::kernel(at(config::offset!(local_v4)))),
            Addr::v4(packet::kernel(at(config::offset!(remote_v4)))),
        )
    } else {
        (
            Addr::from_words(packet::kernel(at(config::offset!(local_v6)))),
            Addr::from_words(packet::kernel(at(config::offset!(remote_v6)))),
        )
    };
    Flow {
        local,
        remote,
        local_port: packet::kernel(at(config::offset!(local_port))),
        remote_port: u16::from_be(packet::kernel(at(config::offset!(remote_port)))),
    }
}
