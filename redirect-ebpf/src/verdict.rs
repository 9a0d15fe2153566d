//! Every decision of the datapath, as pure functions.
//!
//! They are compiled into the kernel programs *and* are the model that the programs are tested
//! against. What a decision needs to ask of its surroundings goes through [`Env`].

use crate::abi::{
    Addr, Counter, DECISION_ENROLLED, Flow, HINT_FROM_PROXY, HINT_NO_LISTENER, HINT_NONE, Hint,
    LISTENER_HBONE, LISTENER_INBOUND, LISTENER_OUTBOUND, MARK_DIRECT, MARK_MASK, MARK_PROXY,
    MARK_REDIRECTED, POD_CAPTURE, PORT_HBONE, PodEntry, PodId,
};

/// A TCP segment that could be parsed: not a fragment, no IPv6 extension header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
    /// SYN without ACK: the sender opens a connection.
    pub opens: bool,
}

impl Segment {
    /// The connection as the socket that receives this segment sees it.
    #[inline(always)]
    pub fn receiver_flow(&self) -> Flow {
        Flow {
            local: self.dst,
            remote: self.src,
            local_port: self.dst_port,
            remote_port: self.src_port,
        }
    }

    /// The connection as the socket that sent this segment sees it.
    #[inline(always)]
    pub fn sender_flow(&self) -> Flow {
        Flow {
            local: self.src,
            remote: self.dst,
            local_port: self.src_port,
            remote_port: self.dst_port,
        }
    }
}

/// Whether the proxy listens in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// It does, and `listeners` holds its socket.
    Listens,
    /// It does not, since a moment ago: it may be restarting.
    AwayWithinGrace,
    /// It does not, and the grace is over.
    Away,
}

/// What every decision asks of the kernel.
pub trait Pods {
    /// The entry of `pods` for an address.
    fn pod(&self, addr: &Addr) -> Option<PodEntry>;
}

/// What the decisions at tcx ask of the kernel besides.
pub trait Env: Pods {
    /// Whether an application listens for this segment; the proxy's listeners do not count.
    fn application_listens(&self, segment: &Segment) -> bool;
    /// Whether the proxy listens in this pod, on one of `LISTENER_*`.
    fn proxy(&self, pod_id: PodId, kind: u32, segment: &Segment) -> Proxy;
}

/// What happens to a packet at tcx ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes up the stack.
    Next,
    /// It is dropped; a SYN is sent again.
    Drop,
    /// It is turned into the RST that answers it.
    Reset,
}

/// The outcome of a decision at tcx ingress. The mark is replaced under [`MARK_MASK`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ingress {
    /// What happens to the packet.
    pub fate: Fate,
    /// The packet's new mark, or `None` to leave it.
    pub mark: Option<u32>,
    /// The hint for `sk_lookup`; `None` clears the former one.
    pub hint: Option<Hint>,
    /// What to count, and for which pod.
    pub count: Option<(PodId, Counter)>,
}

impl Ingress {
    const NEXT: Ingress = Ingress { fate: Fate::Next, mark: None, hint: None, count: None };
}

/// The bits of `mark` that belong to the mesh.
#[inline(always)]
pub fn mesh_mark(mark: u32) -> u32 {
    mark & MARK_MASK
}

/// `mark` with its mesh bits replaced.
#[inline(always)]
pub fn with_mesh_mark(mark: u32, mesh: u32) -> u32 {
    (mark & !MARK_MASK) | mesh
}

/// tcx ingress on `lo`: packets of the proxy to the application, and packets of the application
/// that the redirection route brought here.
#[inline(always)]
pub fn on_lo(mark: u32, segment: Option<&Segment>, env: &impl Env) -> Ingress {
    if mesh_mark(mark) == MARK_PROXY {
        // Every packet, not only the SYN: under SYN cookies the ACK looks for the listener.
        // The accepted socket takes the mark, and so its replies come back here, also while the pod
        // leaves the mesh.
        let hint = segment.map(|s| Hint { flow: s.receiver_flow(), kind: HINT_FROM_PROXY });
        return Ingress { mark: Some(MARK_REDIRECTED), hint, ..Ingress::NEXT };
    }
    let Some(segment) = segment else { return Ingress::NEXT };
    if !segment.opens || segment.dst.is_loopback() {
        return Ingress::NEXT;
    }
    let Some(pod) = enrolled(env.pod(&segment.src)) else { return Ingress::NEXT };
    if same_pod(env.pod(&segment.dst), pod.pod_id) {
        return Ingress::NEXT;
    }
    match env.proxy(pod.pod_id, LISTENER_OUTBOUND, segment) {
        Proxy::Listens => Ingress::NEXT,
        Proxy::AwayWithinGrace => Ingress {
            fate: Fate::Drop,
            count: Some((pod.pod_id, Counter::DroppedProxyAway)),
            ..Ingress::NEXT
        },
        // The kernel cannot refuse it: the address that would have to answer is not local.
        Proxy::Away => Ingress {
            fate: Fate::Reset,
            count: Some((pod.pod_id, Counter::RefusedProxyAway)),
            ..Ingress::NEXT
        },
    }
}

/// tcx ingress on every interface of the pod but `lo`: what comes from outside. `ip` says whether
/// the packet is IPv4 or IPv6 at all.
#[inline(always)]
pub fn on_interface(ip: bool, segment: Option<&Segment>, env: &impl Env) -> Ingress {
    if !ip {
        return Ingress::NEXT;
    }
    let next = Ingress { mark: Some(MARK_DIRECT), ..Ingress::NEXT };
    let Some(segment) = segment else { return next };
    if !segment.opens {
        return next;
    }
    let Some(pod) = enrolled(env.pod(&segment.dst)) else { return next };
    if !captures(&pod) {
        return next;
    }
    let hbone = segment.dst_port == PORT_HBONE;
    if !hbone && !env.application_listens(segment) {
        // The proxy would accept first and find out later; the kernel refuses at once.
        let hint = Some(Hint { flow: segment.receiver_flow(), kind: HINT_NO_LISTENER });
        return Ingress { hint, count: Some((pod.pod_id, Counter::NoListener)), ..next };
    }
    let kind = if hbone { LISTENER_HBONE } else { LISTENER_INBOUND };
    match env.proxy(pod.pod_id, kind, segment) {
        Proxy::AwayWithinGrace => Ingress {
            fate: Fate::Drop,
            count: Some((pod.pod_id, Counter::DroppedProxyAway)),
            ..next
        },
        // When it is away for good the kernel refuses: nobody listens on the HBONE port, and
        // `sk_lookup` drops the rest.
        Proxy::Listens | Proxy::Away => next,
    }
}

/// What `sk_lookup` knows when the kernel looks for the listener of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Whether it is TCP.
    pub tcp: bool,
    /// The connection as the listener would see it.
    pub flow: Flow,
    /// Whether the packet came in on `lo`.
    pub on_lo: bool,
    /// The hint of this CPU.
    pub hint: Hint,
}

/// The outcome of a decision in `sk_lookup`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// The kernel's own lookup decides.
    Pass(Option<(PodId, Counter)>),
    /// The proxy's listener takes it. Without one it is refused: it never falls through.
    Redirect {
        /// The pod.
        pod_id: PodId,
        /// One of `LISTENER_*`.
        kind: u32,
    },
    /// It is refused.
    Refuse(PodId, Counter),
}

/// `sk_lookup` in an enrolled pod's network namespace.
///
/// No packet is parsed here: whatever is not known to be something else goes to the proxy.
#[inline(always)]
pub fn steer(lookup: &Lookup, env: &impl Pods) -> Steer {
    let Lookup { tcp, flow, on_lo, hint } = lookup;
    if !tcp || flow.local.is_loopback() || flow.local.is_link_local() {
        return Steer::Pass(None);
    }
    let local = env.pod(&flow.local);
    let remote = env.pod(&flow.remote);
    let hint = if hint.flow == *flow { hint.kind } else { HINT_NONE };
    // Another pod of this node, called by ours, looks like ours, called by that one. But what ours
    // sends comes in on `lo`, and only the proxy's packets there have a hint.
    if *on_lo
        && hint == HINT_NONE
        && let Some(pod) = remote
        && !same_pod(local, pod.pod_id)
    {
        return Steer::Redirect { pod_id: pod.pod_id, kind: LISTENER_OUTBOUND };
    }
    let Some(pod) = local else { return Steer::Refuse(0, Counter::RefusedUnknownAddress) };
    if enrolled(local).is_none() || !captures(&pod) {
        return Steer::Pass(None);
    }
    if hint == HINT_NO_LISTENER {
        // Never counted here: tcx has counted it, or it is tcx's own question that runs this.
        return Steer::Pass(None);
    }
    if same_pod(remote, pod.pod_id) {
        return Steer::Pass(Some((pod.pod_id, Counter::Local)));
    }
    if flow.local_port == PORT_HBONE {
        return Steer::Pass(Some((pod.pod_id, Counter::Hbone)));
    }
    if hint == HINT_FROM_PROXY {
        return Steer::Pass(Some((pod.pod_id, Counter::FromProxy)));
    }
    Steer::Redirect { pod_id: pod.pod_id, kind: LISTENER_INBOUND }
}

/// What is counted for a redirection to one of `LISTENER_*`.
#[inline(always)]
pub fn redirected(kind: u32) -> Counter {
    if kind == LISTENER_OUTBOUND { Counter::RedirectedOutbound } else { Counter::RedirectedInbound }
}

#[inline(always)]
fn enrolled(pod: Option<PodEntry>) -> Option<PodEntry> {
    match pod {
        Some(pod) if pod.decision == DECISION_ENROLLED => Some(pod),
        _ => None,
    }
}

#[inline(always)]
fn captures(pod: &PodEntry) -> bool {
    pod.flags & POD_CAPTURE != 0
}

#[inline(always)]
fn same_pod(pod: Option<PodEntry>, pod_id: PodId) -> bool {
    matches!(pod, Some(pod) if pod.pod_id == pod_id)
}
