//! Iterators over the TCP sockets of one network namespace, which set socket options.
//!
//! The agent reads an iterator's file to the end, from a thread in that namespace. The kernel holds each
//! socket's lock while the program runs for it. Source: Linux `net/ipv4/tcp_ipv4.c`, `bpf_iter_tcp_seq_show`.

use aya_ebpf::{
    bindings::{BPF_ANY, seq_file},
    cty::{c_long, c_void},
    helpers::{bpf_getsockopt, bpf_seq_write, bpf_setsockopt, bpf_skc_to_tcp_sock},
};
use redirect_ebpf::{
    abi::{
        Addr, Connection, DNS_PLACES, DnsKey, Flow, MARK_DIRECT, MARK_PROXY, MARK_REDIRECTED,
        PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PORT_PROXY_DNS, PROTOCOL_TCP, PodId, WAY_DIRECT,
        WAY_REDIRECTED,
    },
    verdict::{Sender, captures, is_excluded, mesh_mark, with_mesh_mark},
};

use crate::{
    config::offset,
    env::{Maps, dns_flow, is_own, note_strays, pod},
    half_open, packet, settled,
    sockets::{TCP_LISTEN, TCP_NEW_SYN_RECV, cgroup_id, owner},
    switch::{note, noted},
};

const SOL_SOCKET: i32 = 1;
const SO_REUSEADDR: i32 = 2;
const SO_MARK: i32 = 36;
const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_FIN_WAIT1: u32 = 4;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

/// `struct bpf_iter_meta`, its first field. Source: Linux `include/linux/bpf.h`.
#[repr(C)]
pub struct IterMeta {
    seq: *mut seq_file,
}

/// `struct bpf_iter__tcp`. Source: Linux `net/ipv4/tcp_ipv4.c`.
#[repr(C)]
pub struct IterTcp {
    meta: *mut IterMeta,
    sk_common: *mut c_void,
    uid: i32,
}

/// Notes every connection of the proxy, half-open ones included, as its peer in the pod sees it: redirected.
/// Also does what [`reuse_addr`] does.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn note_proxy(ctx: *mut IterTcp) -> i32 {
    let Some(sk) = Common::new(ctx) else { return 0 };
    let proxys = match Socket::new(ctx) {
        Some(full) if sk.state() == TCP_LISTEN => {
            share_ports(&full);
            false
        }
        Some(full) => full.get(SO_MARK).map(mesh_mark) == Some(MARK_PROXY),
        // A half-open socket's owner is unknown. It does not matter: no socket in the pod mirrors the
        // application's. A socket in TIME_WAIT has no peer left, and a new connection, which may be direct,
        // may reuse its ports.
        None => sk.state() == TCP_NEW_SYN_RECV,
    };
    if proxys {
        let flow = sk.flow();
        let mut mirror = Flow {
            local: flow.remote,
            remote: flow.local,
            local_port: flow.remote_port,
            remote_port: flow.local_port,
        };
        if flow.local_port == PORT_PROXY_DNS && flow.local.is_loopback() {
            let place = flow.remote_port % DNS_PLACES;
            let key = DnsKey { pod_id: sk.pod_id(), place, protocol: PROTOCOL_TCP };
            if let Some(dns) = dns_flow(&key)
                && dns.alias == flow.remote_port
            {
                mirror.remote = dns.resolver;
                mirror.remote_port = dns.resolver_port;
                mirror.local_port = dns.client_port;
            }
        }
        note(sk.pod_id(), mirror, WAY_REDIRECTED, BPF_ANY);
    }
    0
}

/// Before capture starts: every open or half-open connection stays on its path. What `note_proxy` has not noted
/// as redirected is direct, unless a former capture has marked it.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn mark_all(ctx: *mut IterTcp) -> i32 {
    mark_connection(ctx, |connection, noted| {
        let redirected = mesh_mark(connection.mark) == MARK_REDIRECTED;
        Some(noted.unwrap_or(if redirected { WAY_REDIRECTED } else { WAY_DIRECT }))
    })
}

/// Before the settings of a captured pod change, or its capture ends: every open connection stays on its path.
/// It is redirected unless the settings exclude it: `note_proxy` knows nothing of a connection that the proxy
/// has closed already. A half-open one may be redirected without the proxy's knowledge, too: it waits for
/// `mark_noted`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn mark_open(ctx: *mut IterTcp) -> i32 {
    mark_connection(ctx, |connection, noted| match noted {
        Some(WAY_REDIRECTED) => noted,
        _ if connection.state == TCP_SYN_SENT => None,
        _ if connection.is_excluded() => Some(WAY_DIRECT),
        _ => Some(WAY_REDIRECTED),
    })
}

/// After the switch: marks every connection whose path was noted in the meantime.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn mark_noted(ctx: *mut IterTcp) -> i32 {
    mark_connection(ctx, |_, noted| noted)
}

/// Writes one byte for each open or half-closed connection that stays on the redirection route, and for each
/// one behind a virtual interface. A pod that leaves the mesh waits for these to end.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn count_redir(ctx: *mut IterTcp) -> i32 {
    let Some(sk) = Socket::new(ctx) else { return 0 };
    let counts = match sk.get(SO_MARK).map(mesh_mark) {
        Some(MARK_REDIRECTED) => true,
        Some(MARK_PROXY) => sk.common().is_guests(),
        _ => false,
    };
    // Half of a connection may still have data to send.
    let open = matches!(
        sk.common().state(),
        TCP_ESTABLISHED
            | TCP_FIN_WAIT1
            | TCP_FIN_WAIT2
            | TCP_CLOSE_WAIT
            | TCP_LAST_ACK
            | TCP_CLOSING
    );
    if counts && open {
        let byte = b'.';
        // SAFETY: the context and its sequence file are valid while the program runs.
        unsafe { bpf_seq_write((*(*ctx).meta).seq, (&raw const byte).cast_mut().cast(), 1) };
    }
    0
}

/// Lets the application bind its port while the proxy's accepted sockets hold it: they inherit
/// SO_REUSEADDR from the proxy's listeners. Source: istio#52260.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn reuse_addr(ctx: *mut IterTcp) -> i32 {
    if let Some(sk) = Socket::new(ctx) {
        share_ports(&sk);
    }
    0
}

#[inline(always)]
fn share_ports(sk: &Socket) {
    let common = sk.common();
    if common.state() != TCP_LISTEN || sk.get(SO_MARK).map(mesh_mark) != Some(MARK_PROXY) {
        return;
    }
    if matches!(common.read::<u16>(offset!(local_port)), PORT_OUTBOUND | PORT_INBOUND | PORT_HBONE)
    {
        sk.set(SO_REUSEADDR, 1);
    }
}

/// Records the path of a connection with its socket, unless it is recorded already, and marks the socket
/// accordingly, unless it has a mark. `choose` derives the path from the connection and from what is noted about
/// it. Listeners are never marked: an accepted socket would take the listener's mark instead of the SYN's.
#[inline(always)]
fn mark_connection(
    ctx: *mut IterTcp,
    choose: impl FnOnce(&Open, Option<u32>) -> Option<u32>,
) -> i32 {
    let Some(sk) = Socket::new(ctx) else { return note_half_open(ctx, choose) };
    let Some(mark) = sk.get(SO_MARK) else { return 0 };
    let common = sk.common();
    let connection =
        Open { pod_id: common.pod_id(), flow: common.flow(), state: common.state(), mark };
    if connection.state == TCP_LISTEN || connection.is_internal() {
        return 0;
    }
    if matches!(owner(mark, || common.cgroup()), Sender::Proxy | Sender::Marked) {
        return 0;
    }
    let Open { pod_id, flow, .. } = connection;
    let this = Connection { flow, first_seq: common.first_seq() };
    let way = match settled::way_of(sk.0.cast(), &this) {
        Some(way) => way,
        None => {
            let noted = noted(pod_id, flow).or_else(|| noted(pod_id, translated(flow)));
            let way = if half_open::was(pod_id, &this) && noted != Some(WAY_REDIRECTED) {
                WAY_DIRECT
            } else {
                let Some(way) = choose(&connection, noted) else { return 0 };
                way
            };
            // Without memory, a direct connection ends: it could not be told from others later.
            settled::settle_for(sk.0.cast(), &this, way);
            way
        }
    };
    if mesh_mark(mark) == 0 {
        let way = if way == WAY_REDIRECTED { MARK_REDIRECTED } else { MARK_DIRECT };
        sk.set(SO_MARK, with_mesh_mark(mark, way));
    }
    0
}

/// A half-open connection has no socket that could keep a record.
#[inline(always)]
fn note_half_open(
    ctx: *mut IterTcp,
    choose: impl FnOnce(&Open, Option<u32>) -> Option<u32>,
) -> i32 {
    let Some(common) = Common::new(ctx) else { return 0 };
    let (pod_id, flow, state) = (common.pod_id(), common.flow(), common.state());
    let connection = Open { pod_id, flow, state, mark: 0 };
    if state == TCP_NEW_SYN_RECV
        && !connection.is_internal()
        && choose(&connection, noted(pod_id, flow)) == Some(WAY_DIRECT)
    {
        half_open::enter(pod_id, &settled::request_at(common.0 as u64));
        if mesh_mark(common.read(offset!(ir_mark))) == 0 {
            // The SYN came before our programs did: its socket will have no mark, and so send by `lo`.
            note_strays(pod_id);
        }
    }
    0
}

/// A connection of a pod, as its socket has it.
struct Open {
    pod_id: PodId,
    flow: Flow,
    state: u32,
    mark: u32,
}

impl Open {
    /// Whether it is one of the pod's to itself, which never leaves it.
    #[inline(always)]
    fn is_internal(&self) -> bool {
        let Self { pod_id, flow, .. } = self;
        flow.local.is_loopback() || (is_own(*pod_id, &flow.local) && is_own(*pod_id, &flow.remote))
    }

    /// Whether it is direct by the settings of its pod, or because nothing inbound is captured yet: then an
    /// accepted connection has the mark of its SYN.
    #[inline(always)]
    fn is_excluded(&self) -> bool {
        let pod = pod(self.pod_id).unwrap_or(0);
        (!captures(pod) && mesh_mark(self.mark) == MARK_DIRECT)
            || is_excluded(self.pod_id, pod, &self.flow, &Maps)
    }
}

/// The connection as the proxy sees it when istio-cni's rules have redirected it: they translate the
/// destination to the proxy's port on loopback.
#[inline(always)]
fn translated(flow: Flow) -> Flow {
    Flow { remote: Addr::loopback(flow.local.is_v4()), remote_port: PORT_OUTBOUND, ..flow }
}

/// The beginning of every TCP socket, including half-open ones and those in TIME_WAIT.
struct Common(*mut c_void);

impl Common {
    #[inline(always)]
    fn new(ctx: *mut IterTcp) -> Option<Self> {
        // SAFETY: the context is valid while the program runs.
        let common = unsafe { (*ctx).sk_common };
        if common.is_null() { None } else { Some(Self(common)) }
    }

    #[inline(always)]
    fn state(&self) -> u32 {
        self.read::<u8>(offset!(state)).into()
    }

    /// [`Connection::first_seq`] of a full socket.
    #[inline(always)]
    fn first_seq(&self) -> u32 {
        Connection::first_seq(self.read(offset!(snd_una)), self.read(offset!(bytes_acked)))
    }

    /// The id of the cgroup (v2) that it belongs to.
    #[inline(always)]
    fn cgroup(&self) -> u64 {
        cgroup_id(self.read(offset!(socket_cgroup)))
    }

    /// The inode number of its network namespace; 0 if it cannot be read.
    #[inline(always)]
    fn pod_id(&self) -> PodId {
        packet::kernel(self.read::<u64>(offset!(net)) + u64::from(offset!(net_inode)))
    }

    /// Whether it is the proxy's end of a connection from a virtual interface: all other connections of the
    /// proxy have an address of the pod, or loopback.
    #[inline(always)]
    fn is_guests(&self) -> bool {
        let (pod_id, flow) = (self.pod_id(), self.flow());
        !flow.local.is_loopback() && !is_own(pod_id, &flow.local) && !is_own(pod_id, &flow.remote)
    }

    /// The field at `offset` of `struct sock_common`.
    #[inline(always)]
    fn read<T: bytemuck::Pod>(&self, offset: u32) -> T {
        let field = self.0.cast::<u8>().wrapping_add(offset as usize);
        packet::kernel(field as u64)
    }

    #[inline(always)]
    fn flow(&self) -> Flow {
        settled::flow_at(self.0 as u64)
    }
}

/// A full TCP socket.
struct Socket(*mut c_void);

impl Socket {
    #[inline(always)]
    fn new(ctx: *mut IterTcp) -> Option<Self> {
        // SAFETY: the context is valid while the program runs; the helper checks that the socket
        // is a full one (no request socket, no TIME_WAIT).
        unsafe {
            let common = (*ctx).sk_common;
            if common.is_null() {
                return None;
            }
            let tcp = bpf_skc_to_tcp_sock(common);
            if tcp.is_null() { None } else { Some(Self(tcp.cast())) }
        }
    }

    #[inline(always)]
    fn get(&self, option: i32) -> Option<u32> {
        let mut value = 0u32;
        // SAFETY: `value` is as long as the option.
        let ret: c_long =
            unsafe { bpf_getsockopt(self.0, SOL_SOCKET, option, (&raw mut value).cast(), 4) };
        (ret == 0).then_some(value)
    }

    #[inline(always)]
    fn set(&self, option: i32, mut value: u32) {
        // SAFETY: `value` is as long as the option. The kernel accepts both options on any full socket, and
        // nothing can be done about one that refuses.
        let _refused =
            unsafe { bpf_setsockopt(self.0, SOL_SOCKET, option, (&raw mut value).cast(), 4) };
    }

    #[inline(always)]
    fn common(&self) -> Common {
        Common(self.0)
    }
}
