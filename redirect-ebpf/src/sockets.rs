//! Looks up sockets: the application's, and the proxy's listeners.

use core::ptr;

use aya_ebpf::{
    bindings::{
        BPF_F_CURRENT_NETNS, BPF_NOEXIST, BPF_SK_LOOKUP_F_NO_REUSEPORT,
        BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    cty::{c_long, c_void},
    helpers::{
        bpf_get_listener_sock, bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_map_update_elem,
        bpf_sk_assign, bpf_sk_fullsock, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release,
        bpf_sk_storage_get, bpf_skb_cgroup_id, bpf_skc_lookup_tcp, bpf_tcp_check_syncookie,
        bpf_tcp_sock,
    },
    programs::TcContext,
};
use redirect_ebpf::{
    abi::{
        ANY_CGROUP, Addr, Connection, Flow, HINT_QUESTION, LISTENER_HBONE, LISTENER_INBOUND,
        LISTENER_OUTBOUND, ListenerKey, MARK_DIRECT, MARK_PROXY, PORT_HBONE, PORT_INBOUND,
        PORT_OUTBOUND, PORT_PROXY_DNS, PodId, Settled, WAY_DIRECT, WAY_MARKED, WAY_PROXYS,
        WAY_REDIRECTED,
    },
    dns::Message,
    verdict::{Proxy, Receiver, Segment, Sender, mesh_mark},
};

use crate::{
    AF_INET, config,
    maps::{LISTENERS, PROXY_CGROUPS, PROXY_MISSING, SETTLED},
    packet, set_hint,
};

/// Source: Linux `include/linux/net.h`.
const SOCK_STREAM: u32 = 1;
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

/// Whether a segment is the ACK that completes a SYN cookie of this listener of the proxy. Costs next to
/// nothing while the kernel sends no SYN cookies.
#[inline(never)]
pub fn completes_cookie(ctx: &TcContext, pod_id: PodId) -> bool {
    let Some((mut ip, ip_len, mut tcp)) = packet::headers(ctx) else { return false };
    let key = ListenerKey { pod_id, kind: LISTENER_OUTBOUND };
    // SAFETY: the headers are as long as is said; the reference is released.
    unsafe {
        let sk = bpf_map_lookup_elem(listeners(), ptr::from_ref(&key).cast());
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
        let sk = bpf_map_lookup_elem(listeners(), ptr::from_ref(key).cast());
        if !sk.is_null() {
            bpf_sk_release(sk);
            return Proxy::Listens;
        }
    }
    if find_listener(ctx, key, v4, ANY_CLIENT, true) != Found::Nothing {
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
pub fn find_listener(
    ctx: &TcContext,
    key: &ListenerKey,
    v4: bool,
    client_port: u16,
    enter: bool,
) -> Found {
    let port = match key.kind {
        LISTENER_INBOUND => PORT_INBOUND,
        LISTENER_HBONE => PORT_HBONE,
        _ => PORT_OUTBOUND,
    };
    let loopback = Addr::loopback(v4);
    // Otherwise `sk_lookup` would refuse: packets from other interfaces are never for loopback.
    let flow =
        Flow { local: loopback, remote: loopback, local_port: port, remote_port: client_port };
    set_hint(ctx, &flow, HINT_QUESTION);
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
        } else if bpf_map_update_elem(listeners(), ptr::from_ref(key).cast(), sk.cast(), 0) == 0 {
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
        let known = bpf_map_lookup_elem(listeners(), ptr::from_ref(key).cast());
        if known.is_null() {
            return false;
        }
        let same = ptr::eq(known.cast(), sk);
        bpf_sk_release(known);
        same
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
fn address(sk: *mut bpf_sock) -> u64 {
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
fn is_mark_enough() -> bool {
    PROXY_CGROUPS.get_ptr(&ANY_CGROUP).is_some()
}

/// Whether the socket that receives this segment is the proxy's. The caller sets the hint first.
#[inline(always)]
pub fn is_proxys_connection(ctx: *mut c_void, segment: &Segment) -> bool {
    // SAFETY: the socket is a live one.
    with_receiver(ctx, segment, |sk| unsafe { (*sk).state != TCP_LISTEN && is_proxys(sk) })
        .unwrap_or(false)
}

/// What was recorded as direct for the socket that receives this segment is redirected. The caller sets the hint
/// first.
#[inline(always)]
pub fn no_longer_direct(ctx: *mut c_void, segment: &Segment) {
    with_receiver(ctx, segment, |sk| {
        // SAFETY: the pointer is to a live map value.
        if let Some(settled) = storage(sk, ptr::null_mut(), 0)
            && unsafe { (*settled).way } == WAY_DIRECT
        {
            unsafe { (*settled).way = WAY_REDIRECTED }
        }
    });
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

/// Whether the packet belongs to a connection of the proxy that leaves the pod. The connection need not be
/// compared: each of the proxy's sockets has only one.
#[inline(always)]
pub fn is_settled_proxys(ctx: &TcContext) -> bool {
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
pub fn settled(ctx: &TcContext) -> Option<u32> {
    let sk = packets_socket(ctx);
    settled_by(sk, &connection(sk)?)
}

/// Records it. Fails without memory.
#[inline(always)]
pub fn settle(ctx: &TcContext, way: u32) -> bool {
    let sk = packets_socket(ctx);
    // A raw socket has no connection.
    connection(sk).is_none_or(|connection| settle_for(sk, &connection, way))
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
    let sk = address(sk);
    let isn: u32 = packet::kernel(sk + u64::from(config::offset!(snt_isn)));
    Some(Connection { flow: flow_at(sk), first_seq: isn.wrapping_add(1) })
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

/// The path that was recorded for this connection of a socket.
#[inline(always)]
pub fn settled_by(sk: *mut bpf_sock, connection: &Connection) -> Option<u32> {
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

/// Whether a socket of this namespace is the proxy's. An application that took the port is not, even if it
/// sets the mark.
///
/// # Safety
///
/// The socket is a live one.
#[inline(never)]
unsafe fn is_proxys(sk: *mut bpf_sock) -> bool {
    // SAFETY: the caller's promise.
    matches!(unsafe { kind(sk) }, Sender::Proxy | Sender::Marked)
}

/// Assigns the lookup to the proxy's listener, never to another socket of its reuseport group. Fails if there
/// is none.
#[inline(always)]
pub fn assign(ctx: *mut c_void, key: &ListenerKey) -> Result<(), c_long> {
    // SAFETY: the reference that the lookup takes is released.
    unsafe {
        let sk = bpf_map_lookup_elem(listeners(), ptr::from_ref(key).cast());
        if sk.is_null() {
            return Err(-2);
        }
        let ret = bpf_sk_assign(ctx, sk, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT));
        bpf_sk_release(sk);
        if ret == 0 { Ok(()) } else { Err(ret) }
    }
}

fn listeners() -> *mut c_void {
    ptr::from_ref(&LISTENERS).cast_mut().cast()
}

/// The kernel's form of a 4-tuple, and its length in bytes.
#[inline(always)]
fn tuple(src: &Addr, src_port: u16, dst: &Addr, dst_port: u16) -> (bpf_sock_tuple, u32) {
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
