//! What decisions ask, answered from the maps, the sockets and the packet.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    btf_maps::lpm_trie::Key,
    helpers::bpf_ktime_get_ns,
    programs::TcContext,
};
use redirect_ebpf::{
    abi::{
        Addr, Connection, DECISION_ENROLLED, DnsFlow, DnsKey, EVERY_POD, Flow, LOOPBACK_IFINDEX,
        ListenerKey, OwnAddress, POD_ENROLLED, PREFIX_BYPASS, PodId, PodPeer, PodPort,
    },
    dns::{self, DnsEnv, Entry, Message},
    verdict::{Env, Pods, Proxy, Receiver, Segment, Sender},
};

use crate::{
    half_open, hint, kubelet, listeners,
    maps::{
        ADDRESSES, ANY_STRAYS, DNS_FLOWS, INBOUND_PORTS, INBOUND_RANGES, OUTBOUND_PORTS,
        OUTBOUND_RANGES, Prefixes, STRAYS, pod_entry,
    },
    packet, settled, sockets, switch,
};

/// What an update of a map with `BPF_NOEXIST` returns where the key is there.
const EEXIST: i32 = -17;

/// What every decision asks for.
macro_rules! pods {
    ($env:ty) => {
        impl Pods for $env {
            #[inline(always)]
            fn pod(&self, pod_id: PodId) -> Option<u32> {
                pod(pod_id)
            }

            #[inline(always)]
            fn pod_on(&self, device: u64) -> PodId {
                packet::pod_on(device)
            }

            #[inline(always)]
            fn is_own(&self, pod_id: PodId, addr: &Addr) -> bool {
                is_own(pod_id, addr)
            }

            #[inline(always)]
            fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool {
                excludes_inbound(pod_id, flow)
            }

            #[inline(always)]
            fn is_kubelets(&self, flow: &Flow) -> bool {
                kubelet::has_opened(flow)
            }

            #[inline(always)]
            fn is_probe_source(&self, peer: &Addr) -> bool {
                is_probe_source(peer)
            }

            #[inline(always)]
            fn excludes_outbound(&self, pod_id: PodId, flow: &Flow) -> bool {
                excludes_outbound(pod_id, flow)
            }
        }
    };
}

/// For `sk_lookup` and the iterators, which have no packet to ask with.
pub struct Maps;

pods!(Maps);

pub struct Tc<'a> {
    pub ctx: &'a TcContext,
    /// Whether a socket of this namespace [`sockets::sends`] the packet. At ingress nobody asks.
    pub sends: bool,
    /// Of a SYN on `lo`: whether the proxy has sent it.
    pub proxys_syn: Option<bool>,
}

impl<'a> Tc<'a> {
    #[inline(always)]
    pub fn at_ingress(ctx: &'a TcContext) -> Self {
        Self { ctx, sends: false, proxys_syn: None }
    }

    #[inline(always)]
    pub fn at_egress(ctx: &'a TcContext, sends: bool) -> Self {
        Self { ctx, sends, proxys_syn: None }
    }
}

pods!(Tc<'_>);

impl Env for Tc<'_> {
    #[inline(always)]
    fn pod_id(&self) -> PodId {
        packet::pod_id(self.ctx)
    }

    #[inline(always)]
    fn receiver(&self, segment: &Segment) -> Receiver {
        receiver(self.ctx, segment)
    }

    #[inline(always)]
    fn completes_cookie(&self, pod_id: PodId) -> bool {
        listeners::completes_cookie(self.ctx, pod_id)
    }

    #[inline(always)]
    fn proxy(&self, pod_id: PodId, kind: u32, segment: &Segment) -> Proxy {
        listeners::proxy(self.ctx, &ListenerKey { pod_id, kind }, segment.dst.is_v4())
    }

    #[inline(always)]
    fn have_strays(&self) -> bool {
        // SAFETY: the pointer is to a live map value; it is one word.
        ANY_STRAYS.get_ptr(0).is_some_and(|any| unsafe { *any } != 0)
    }

    #[inline(always)]
    fn strays(&self, pod_id: PodId) -> bool {
        self.have_strays() && STRAYS.get_ptr(&pod_id).is_some()
    }

    #[inline(always)]
    fn is_forwarded(&self) -> bool {
        sockets::came_in(self.ctx) && !self.sends
    }

    #[inline(always)]
    fn came_by_lo(&self) -> bool {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.ctx.skb.skb).ingress_ifindex == LOOPBACK_IFINDEX }
    }

    #[inline(always)]
    fn sender(&self) -> Sender {
        if self.sends { sockets::sender(self.ctx) } else { Sender::Nobody }
    }

    #[inline(always)]
    fn has_proxy_sent(&self, segment: &Segment) -> bool {
        self.proxys_syn.unwrap_or_else(|| has_proxy_sent(self.ctx, segment))
    }

    #[inline(always)]
    fn has_half_open(&self, pod_id: PodId) -> bool {
        half_open::may_have(pod_id)
    }

    #[inline(always)]
    fn was_half_open(&self, pod_id: PodId, segment: &Segment) -> bool {
        sender_was_half_open(self.ctx, pod_id, segment)
    }

    #[inline(always)]
    fn settled(&self) -> Option<u32> {
        if self.sends { settled::way(self.ctx) } else { None }
    }

    #[inline(always)]
    fn has_marked_listener(&self) -> bool {
        self.sends && sockets::has_marked_listener(self.ctx)
    }

    #[inline(always)]
    fn is_noted_direct(&self, pod_id: PodId, segment: &Segment) -> bool {
        is_noted_direct(self.ctx, pod_id, segment)
    }

    #[inline(always)]
    fn is_connections(&self) -> bool {
        self.sends && sockets::is_connections(self.ctx)
    }
}

impl DnsEnv for Tc<'_> {
    #[inline(always)]
    fn dns_listens(&self, _: PodId, message: &Message) -> bool {
        listeners::dns_listens(self.ctx, message)
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn flow(&self, key: &DnsKey) -> Option<DnsFlow> {
        dns_flow(key)
    }

    #[inline(always)]
    fn touch(&self, key: &DnsKey, message: &Message, from_client: bool) {
        if let Some(flow) = DNS_FLOWS.get_ptr_mut(key) {
            // SAFETY: the pointer is to a live map value. Other CPUs may write these numbers, too:
            // any of the times will do, and what a lost count does is said where it is declared.
            unsafe { dns::touched(&mut *flow, message, from_client, self.now()) }
        }
    }

    #[inline(always)]
    fn enter(&self, key: &DnsKey, flow: &DnsFlow, own: bool) -> Entry {
        let known = if own { None } else { DNS_FLOWS.get_ptr_mut(key) };
        let Some(known) = known else {
            let flags = if own { BPF_ANY } else { BPF_NOEXIST };
            return match DNS_FLOWS.insert(key, flow, u64::from(flags)) {
                Ok(()) => Entry::Entered,
                Err(EEXIST) => Entry::Taken,
                Err(_) => Entry::Failed,
            };
        };
        // SAFETY: the pointer is to a map value that is live, or has been until a moment ago.
        unsafe {
            let needed_until = &raw mut (*known).needed_until_ns;
            let seen = needed_until.read_volatile();
            if seen > self.now() || !compare_exchange(needed_until, seen, dns::CLAIMED) {
                return Entry::Taken;
            }
            if DNS_FLOWS.get_ptr_mut(key) != Some(known) {
                // Another flow has had the memory since, in a place of its own.
                compare_exchange(needed_until, dns::CLAIMED, seen);
                return Entry::Taken;
            }
            // As a whole, for who reads it meanwhile.
            if DNS_FLOWS.insert(key, flow, u64::from(BPF_ANY)).is_err() {
                // The place is not to be lost for good.
                compare_exchange(needed_until, dns::CLAIMED, seen);
                return Entry::Failed;
            }
            Entry::Entered
        }
    }
}

/// Replaces a number if it is `old`, at one instant for all CPUs. Whether it was. The compiler has no
/// `AtomicU64::compare_exchange` for this target.
///
/// # Safety
///
/// The pointer is to a map value, of eight bytes there.
#[inline(always)]
unsafe fn compare_exchange(number: *mut u64, old: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!(
            "r0 = cmpxchg_64({number} + 0, r0, {new})",
            number = in(reg) number,
            new = in(reg) new,
            inout("r0") old => found,
        );
    }
    found == old
}

#[inline(always)]
pub fn pod(pod_id: PodId) -> Option<u32> {
    let entry = pod_entry(pod_id)?;
    // SAFETY: the pointer is to a live map value; entries are replaced as a whole.
    let (decision, flags) = unsafe { ((*entry).decision, (*entry).flags) };
    Some(if decision == DECISION_ENROLLED { flags | POD_ENROLLED } else { flags })
}

#[inline(never)]
pub fn is_own(pod_id: PodId, addr: &Addr) -> bool {
    ADDRESSES.get_ptr(&OwnAddress { pod_id, addr: *addr }).is_some()
}

#[inline(never)]
fn excludes_inbound(pod_id: PodId, flow: &Flow) -> bool {
    excludes(&INBOUND_PORTS, &INBOUND_RANGES, pod_id, flow.local_port, flow.remote)
}

#[inline(never)]
pub fn excludes_outbound(pod_id: PodId, flow: &Flow) -> bool {
    excludes(&OUTBOUND_PORTS, &OUTBOUND_RANGES, pod_id, flow.remote_port, flow.remote)
}

#[inline(always)]
fn excludes(
    ports: &Prefixes<PodPort>,
    ranges: &Prefixes<PodPeer>,
    pod_id: PodId,
    port: u16,
    peer: Addr,
) -> bool {
    let port = Key::new(PodPort::BITS, PodPort::new(pod_id, port));
    matches!(ports.get(&port), Some(&PREFIX_BYPASS)) || has_range(ranges, pod_id, peer)
}

#[inline(never)]
fn is_probe_source(peer: &Addr) -> bool {
    has_range(&INBOUND_RANGES, EVERY_POD, *peer)
}

#[inline(always)]
fn has_range(ranges: &Prefixes<PodPeer>, pod_id: PodId, peer: Addr) -> bool {
    let peer = Key::new(PodPeer::BITS, PodPeer { pod_id, peer });
    matches!(ranges.get(&peer), Some(&PREFIX_BYPASS))
}

#[inline(never)]
fn is_noted_direct(ctx: &TcContext, pod_id: PodId, segment: &Segment) -> bool {
    let socket = sockets::packets_socket(ctx);
    let Some(connection) = settled::connection(socket) else { return false };
    let flow = segment.sender_flow();
    // Under SYN cookies, only the packet is known, whose port netfilter in the pod may have translated.
    half_open::was(pod_id, &connection)
        || half_open::was(pod_id, &Connection { flow, ..connection })
        || switch::is_noted_direct(ctx, flow)
}

#[inline(never)]
pub fn receiver(ctx: &TcContext, segment: &Segment) -> Receiver {
    hint::ask(ctx, segment, sockets::receiver)
}

#[inline(never)]
fn has_proxy_sent(ctx: &TcContext, segment: &Segment) -> bool {
    hint::ask(ctx, &answer_to(segment), sockets::is_proxys_connection)
}

#[inline(never)]
fn sender_was_half_open(ctx: &TcContext, pod_id: PodId, segment: &Segment) -> bool {
    let connection = hint::ask(ctx, &answer_to(segment), settled::receivers_connection);
    connection.is_some_and(|connection| half_open::was(pod_id, &connection))
}

/// Whether the proxy opens a connection with this SYN on `lo`.
#[inline(never)]
pub fn has_proxy_opened(ctx: &TcContext, segment: &Segment) -> bool {
    hint::ask(ctx, &answer_to(segment), sockets::opens_by_lo)
}

/// A segment of whom this one is sent to.
#[inline(always)]
fn answer_to(segment: &Segment) -> Segment {
    let Segment { src, dst, src_port, dst_port, .. } = *segment;
    Segment { src: dst, dst: src, src_port: dst_port, dst_port: src_port, ..*segment }
}

#[inline(always)]
pub fn note_strays(pod_id: PodId) {
    // When it is full they are lost, and sent again.
    let _full = STRAYS.insert(&pod_id, 1, u64::from(BPF_ANY));
    if let Some(any) = ANY_STRAYS.get_ptr_mut(0) {
        // SAFETY: the pointer is to a live map value; it is one word.
        unsafe { *any = 1 }
    }
}

#[inline(always)]
pub fn dns_flow(key: &DnsKey) -> Option<DnsFlow> {
    // SAFETY: the pointer is to a live map value; what identifies the flow never changes in it.
    DNS_FLOWS.get_ptr(key).map(|flow| unsafe { *flow })
}
