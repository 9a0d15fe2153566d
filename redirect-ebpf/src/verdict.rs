//! Every decision of the datapath, as pure functions.
//!
//! They are compiled into the kernel programs *and* are the model that the programs are tested
//! against. What a decision needs to ask of its surroundings goes through [`Env`]. The pod that a
//! decision is about is the one whose network namespace the program runs in: no address in a packet
//! has a say in that.

use crate::abi::{
    Addr, Counter, Flow, HINT_FROM_POD, HINT_FROM_PROXY,
    HINT_FROM_VIRTUAL, HINT_NONE, HINT_PAST_PROXY, HINT_QUESTION, Hint, LISTENER_HBONE,
    LISTENER_INBOUND, LISTENER_OUTBOUND, MARK_DIRECT, MARK_MASK, MARK_PROXY, MARK_REDIRECTED,
    MARK_RESCUED, MARK_VIRTUAL, POD_BYPASS_INBOUND, POD_CAPTURE, POD_DNS, POD_ENROLLED, POD_INBOUND_RULES, POD_OUTBOUND_RULES,
    PORT_DNS, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PodId, VIRTUAL_CAPTURE,
    VIRTUAL_RULES, WAY_DIRECT, WAY_REDIRECTED,
};
use crate::dns::Message;

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
    /// SYN with ACK: the sender accepts one.
    pub accepts: bool,
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
    /// The flags of the pod's entry of `pods`, bits of `POD_*`; without `POD_ENROLLED` it bypasses.
    fn pod(&self, pod_id: PodId) -> Option<u32>;
    /// Whether the pod has this address.
    fn is_own(&self, pod_id: PodId, addr: &Addr) -> bool;
    /// Whether `inbound_ports` or `inbound_ranges` keep this connection to the pod off the proxy.
    fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool;
    /// Whether `kubelet_flows` has this connection to a pod.
    fn is_kubelets(&self, flow: &Flow) -> bool;
    /// Whether probes are configured to come from this address.
    fn is_probe_source(&self, peer: &Addr) -> bool;
}

/// What the decisions at tcx ask of the kernel besides.
pub trait Env: Pods {
    /// The pod whose network namespace the packet is in.
    fn pod_id(&self) -> PodId;
    /// Whether the kernel, by itself, finds a socket for this segment: an application's. On the
    /// proxy's own ports it is the proxy's, and counts: nobody else is to take them.
    fn application_listens(&self, segment: &Segment) -> bool;
    /// Whether a connection is open here that has this segment's very addresses and ports.
    fn is_open(&self, segment: &Segment) -> bool;
    /// Whether a socket in the namespace has the connection of this segment: open, half open or
    /// closing. A listener has none.
    fn has_connection(&self, segment: &Segment) -> bool;
    /// Whether this segment completes a connection to the proxy's outbound listener that so far is
    /// nothing but a SYN cookie.
    fn completes_cookie(&self, pod_id: PodId) -> bool;
    /// Whether `outbound_ports` or `outbound_ranges` keep this call off the proxy.
    fn excludes_outbound(&self, pod_id: PodId, flow: &Flow) -> bool;
    /// Whether the proxy listens in this pod, on one of `LISTENER_*`.
    fn proxy(&self, pod_id: PodId, kind: u32, segment: &Segment) -> Proxy;
    /// Whether answers of the pod to somebody past the proxy have met `lo`: see [`Verdict::strays`].
    fn strays(&self, pod_id: PodId) -> bool;
    /// At egress: whether the packet is only forwarded, and no socket here has sent it.
    fn is_forwarded(&self) -> bool;
    /// At egress: whether the socket that has sent it, or the listener that answers, is the proxy's,
    /// whatever mark netfilter has given to the packet.
    fn is_proxys(&self) -> bool;
    /// Whether the socket here that has sent this segment is the proxy's.
    fn has_proxy_sent(&self, segment: &Segment) -> bool;
    /// The way that was found for this connection of the socket that has sent it, one of `WAY_*`.
    fn settled(&self, segment: &Segment) -> Option<u32>;
}

/// What happens to a packet at tcx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Next,
    /// It is dropped; a SYN is sent again.
    Drop,
    /// It becomes the RST that answers it: on `lo` it goes on as that, on an interface it is sent back.
    Reset,
    /// A SYN with ACK becomes a RST to the same peer.
    Abort,
    /// It is brought to `lo`, as if it had been sent there.
    ToLo,
    /// It leaves `lo` by the interface that leads out of the pod.
    Leave,
}

/// The outcome of a decision at tcx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What happens to the packet.
    pub fate: Fate,
    /// The packet's new mark under [`MARK_MASK`], or `None` to leave it.
    pub mark: Option<u32>,
    /// The hint for `sk_lookup`, its kind; `None` for none. Its flow is the receiver's.
    pub hint: Option<u32>,
    /// The pod, where it had to be found out.
    pub pod_id: PodId,
    /// What to count for it.
    pub count: Option<Counter>,
    /// What to note at the socket that has sent the packet: one of `WAY_*`.
    pub settle: Option<u32>,
    /// From now on every packet of the pod on `lo` is asked for its socket.
    pub strays: bool,
}

impl Verdict {
    /// The packet goes on as it is.
    pub const NEXT: Verdict = Verdict {
        fate: Fate::Next,
        mark: None,
        hint: None,
        pod_id: 0,
        count: None,
        settle: None,
        strays: false,
    };

    const fn of(pod_id: PodId) -> Self {
        Self { pod_id, ..Self::NEXT }
    }

    const fn count(self, counter: Counter) -> Self {
        Self { count: Some(counter), ..self }
    }
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
/// that the redirection route, or [`on_egress`], brought here.
#[inline(always)]
pub fn on_lo(mark: u32, segment: Option<&Segment>, env: &impl Env) -> Verdict {
    let proxys = mesh_mark(mark) == MARK_PROXY;
    let Some(segment) = segment else {
        return Verdict { mark: if proxys { Some(MARK_REDIRECTED) } else { None }, ..Verdict::NEXT };
    };
    let pod_id = env.pod_id();
    let next = Verdict::of(pod_id);
    let own = segment.opens && env.is_own(pod_id, &segment.dst);
    // Netfilter in the pod may have taken its mark.
    let proxys = proxys || (own && env.has_proxy_sent(segment));
    if proxys {
        // It calls from the client's address, by a port that it has chosen without knowing the
        // client's own. The socket that has it would answer the client, and the proxy wait in vain.
        if segment.opens && env.is_open(segment) {
            return Verdict { fate: Fate::Reset, ..next.count(Counter::RefusedPortTaken) };
        }
        // Every packet, not only the SYN: under SYN cookies the ACK looks for the listener.
        // The accepted socket takes the mark, and so its replies come back here, also while the pod
        // leaves the mesh.
        return Verdict { mark: Some(MARK_REDIRECTED), hint: Some(HINT_FROM_PROXY), ..next };
    }
    // Every packet, for the same reason.
    let next = Verdict { hint: Some(HINT_FROM_POD), ..next };
    if segment.dst.is_loopback() {
        return next;
    }
    // What the guard has brought is at home here.
    if mesh_mark(mark) != MARK_RESCUED
        && (segment.opens || segment.accepts || env.strays(pod_id))
        && strays(pod_id, segment, env)
    {
        let first = segment.opens || segment.accepts;
        let count = if first { Some(Counter::RescuedDirect) } else { None };
        // The guard lets pass what has this mark.
        let mark = Some(MARK_PROXY);
        return Verdict { fate: Fate::Leave, mark, hint: None, strays: true, count, ..next };
    }
    if !segment.opens
        || own
        || segment.dst.is_link_local()
        || env.pod(pod_id).is_some_and(|pod| !is_enrolled(pod))
    {
        return next;
    }
    match env.proxy(pod_id, LISTENER_OUTBOUND, segment) {
        Proxy::Listens => next,
        Proxy::AwayWithinGrace => {
            Verdict { fate: Fate::Drop, ..next.count(Counter::DroppedProxyAway) }
        }
        // The kernel cannot refuse it: the address that would have to answer is not local.
        Proxy::Away => Verdict { fate: Fate::Reset, ..next.count(Counter::RefusedProxyAway) },
    }
}

/// Whether a packet on `lo` is of a connection that goes past the proxy, or of the proxy itself, and
/// that a mark or rule of the pod has brought here: its other end is elsewhere.
#[inline(always)]
fn strays(pod_id: PodId, segment: &Segment, env: &impl Env) -> bool {
    let Some(pod) = env.pod(pod_id) else { return false };
    if env.is_own(pod_id, &segment.dst) {
        return false;
    }
    if segment.opens {
        return excludes_outbound(pod_id, pod, segment, env) || env.has_proxy_sent(segment);
    }
    !env.has_connection(segment)
        && (past_proxy(pod_id, pod, &segment.sender_flow(), env).is_some()
            || excludes_outbound(pod_id, pod, segment, env)
            || env.has_proxy_sent(segment))
}

#[inline(always)]
fn excludes_outbound(pod_id: PodId, pod: u32, segment: &Segment, env: &impl Env) -> bool {
    pod & POD_OUTBOUND_RULES != 0 && env.excludes_outbound(pod_id, &segment.sender_flow())
}

/// tcx ingress on every interface of the pod but `lo`: what comes from outside. `ip` says whether
/// the packet is IPv4 or IPv6 at all.
#[inline(always)]
pub fn on_interface(ip: bool, segment: Option<&Segment>, env: &impl Env) -> Verdict {
    if !ip {
        return Verdict::NEXT;
    }
    let next = Verdict { mark: Some(MARK_DIRECT), ..Verdict::NEXT };
    let Some(segment) = segment else { return next };
    if !segment.opens {
        return next;
    }
    let pod_id = env.pod_id();
    let next = Verdict { pod_id, ..next };
    // `sk_lookup` refuses where nothing is known of the pod.
    let Some(pod) = env.pod(pod_id).filter(|pod| is_enrolled(*pod)) else { return next };
    if is_forged(pod_id, &segment.receiver_flow(), env) {
        return Verdict { fate: Fate::Drop, ..next.count(Counter::RefusedForgedAddress) };
    }
    if past_proxy(pod_id, pod, &segment.receiver_flow(), env).is_some() {
        return Verdict { hint: Some(HINT_PAST_PROXY), ..next };
    }
    let captured = captures(pod);
    let hbone = segment.dst_port == PORT_HBONE;
    // What is for somebody else is forwarded, or for an address that only a route makes the pod's.
    if captured && !hbone && env.is_own(pod_id, &segment.dst) && !env.application_listens(segment) {
        // The proxy would accept first and find out later. Nor is it left to the kernel: whoever begins
        // to listen by then, or what the pod's netfilter gives it to, would be reached past the proxy.
        return Verdict { fate: Fate::Reset, ..next.count(Counter::NoListener) };
    }
    let kind = if hbone { LISTENER_HBONE } else { LISTENER_INBOUND };
    // Also asked while nothing is captured: that may begin before `sk_lookup` runs for this very
    // segment, and then it needs the listener.
    match env.proxy(pod_id, kind, segment) {
        Proxy::AwayWithinGrace if captured => {
            Verdict { fate: Fate::Drop, ..next.count(Counter::DroppedProxyAway) }
        }
        // When it is away for good `sk_lookup` refuses.
        _ => next,
    }
}

/// Whether a packet that came from outside pretends to come from the pod itself, or is for loopback.
#[inline(always)]
fn is_forged(pod_id: PodId, flow: &Flow, env: &impl Pods) -> bool {
    flow.local.is_loopback() || flow.remote.is_loopback() || env.is_own(pod_id, &flow.remote)
}

/// A virtual interface of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Virtual {
    /// The pod.
    pub pod_id: PodId,
    /// Bits of `VIRTUAL_*`.
    pub flags: u32,
}

/// Whether what arrives on a virtual interface is for the pod itself: then it is inbound, as on every
/// other interface.
#[inline(always)]
pub fn is_inbound(segment: Option<&Segment>, pod_id: PodId, env: &impl Pods) -> bool {
    segment.is_some_and(|segment| env.is_own(pod_id, &segment.dst))
}

/// tcx ingress on a virtual interface of the pod: what a VM or a nested container sends, unless it
/// [`is_inbound`]. `ip` as in [`on_interface`]; `hides_tcp` says of a packet without a segment that it
/// is TCP, or may be.
///
/// What is redirected gets a mark that a rule delivers here for. A connection that has no socket here
/// is somebody else's, and forwarded as it always was.
#[inline(always)]
pub fn on_virtual(
    ip: bool,
    segment: Option<&Segment>,
    hides_tcp: bool,
    interface: &Virtual,
    env: &impl Env,
) -> Verdict {
    if !ip {
        return Verdict::NEXT;
    }
    let Virtual { pod_id, flags } = *interface;
    let forwarded = Verdict { mark: Some(MARK_DIRECT), ..Verdict::of(pod_id) };
    let redirected = Verdict { mark: Some(MARK_VIRTUAL), ..Verdict::of(pod_id) };
    let captures = flags & VIRTUAL_CAPTURE != 0;
    let Some(segment) = segment else {
        if hides_tcp && captures {
            // It could open a connection past the proxy, and nobody needs it.
            return Verdict { fate: Fate::Drop, ..forwarded.count(Counter::DroppedUnreadable) };
        }
        return forwarded;
    };
    if segment.dst.is_loopback() || segment.dst.is_link_local() {
        return forwarded;
    }
    let for_proxy = Verdict { hint: Some(HINT_FROM_VIRTUAL), ..redirected };
    if !segment.opens {
        if env.has_connection(segment) {
            return redirected;
        }
        if captures && env.completes_cookie(pod_id) {
            return for_proxy;
        }
        return forwarded;
    }
    if !captures
        || (flags & VIRTUAL_RULES != 0 && env.excludes_outbound(pod_id, &segment.sender_flow()))
    {
        return forwarded;
    }
    match env.proxy(pod_id, LISTENER_OUTBOUND, segment) {
        Proxy::Listens => for_proxy,
        Proxy::AwayWithinGrace => {
            Verdict { fate: Fate::Drop, ..forwarded.count(Counter::DroppedProxyAway) }
        }
        Proxy::Away => Verdict { fate: Fate::Reset, ..forwarded.count(Counter::RefusedProxyAway) },
    }
}

/// What a packet is that could not be parsed: a fragment, or one with IPv6 extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hidden {
    /// Nothing that could be for the proxy.
    Nothing,
    /// TCP, or it may be.
    Tcp,
    /// A datagram to the port of resolvers.
    Dns,
}

/// tcx egress of every interface of the pod but `lo`: the guard. A packet goes where its socket is,
/// whatever marks, rules, routes and netfilter of the pod say; and DNS queries go to `lo`.
/// `message` is `Err` for what could not be parsed.
#[inline(always)]
pub fn on_egress(mark: u32, message: Result<&Message, Hidden>, env: &impl Env) -> Verdict {
    if mesh_mark(mark) == MARK_PROXY || env.is_proxys() {
        return match message {
            Ok(message) if message.tcp => on_proxys_egress(&message.segment, env),
            _ => Verdict::NEXT,
        };
    }
    let message = match message {
        Ok(message) => message,
        Err(hidden) => return on_hidden_egress(hidden, env),
    };
    let segment = &message.segment;
    if segment.dst.is_loopback() || segment.dst.is_link_local() {
        return Verdict::NEXT;
    }
    let asks = segment.opens && segment.dst_port == PORT_DNS && message.is_query;
    if !message.tcp && !asks {
        return Verdict::NEXT;
    }
    let forwarded = env.is_forwarded();
    if forwarded && segment.opens {
        // A guest's, which virtual interfaces are for.
        let verdict = Verdict::of(env.pod_id());
        return if message.tcp { verdict.count(Counter::Forwarded) } else { verdict };
    }
    if !segment.opens {
        match env.settled(segment) {
            Some(WAY_REDIRECTED) => return to_lo(Verdict::NEXT),
            Some(_) => return Verdict::NEXT,
            None => {}
        }
    }
    let pod_id = env.pod_id();
    let next = Verdict::of(pod_id);
    let Some(pod) = env.pod(pod_id) else {
        // It was never prepared, or somebody has emptied the map: nobody could decide.
        return Verdict { fate: Fate::Drop, ..next.count(Counter::RefusedUnknownPod) };
    };
    if !is_enrolled(pod) {
        return next;
    }
    if segment.opens {
        if asks && pod & POD_DNS != 0 {
            return Verdict { settle: message.tcp.then_some(WAY_REDIRECTED), ..to_lo(next) };
        }
        if !message.tcp || !captures(pod) || excludes_outbound(pod_id, pod, segment, env) {
            return next;
        }
        let to_lo = to_lo(next.count(Counter::RescuedOutbound));
        return Verdict { settle: Some(WAY_REDIRECTED), ..to_lo };
    }
    if env.has_connection(segment) {
        return back_to_proxy(segment, next);
    }
    if segment.accepts
        && !forwarded
        && captures(pod)
        && past_proxy(pod_id, pod, &segment.sender_flow(), env).is_none()
    {
        return Verdict { fate: Fate::Abort, ..next.count(Counter::RefusedPastProxy) };
    }
    Verdict { settle: Some(WAY_DIRECT), ..next }
}

/// The same for the proxy's packets, or for those of a socket of the application that has got its mark:
/// such a one has the proxy at its other end.
#[inline(always)]
fn on_proxys_egress(segment: &Segment, env: &impl Env) -> Verdict {
    if !segment.opens {
        match env.settled(segment) {
            Some(WAY_REDIRECTED) => return to_lo(Verdict::NEXT),
            Some(_) => return Verdict::NEXT,
            None if env.has_connection(segment) => {
                return back_to_proxy(segment, Verdict::of(env.pod_id()));
            }
            None => {}
        }
    }
    Verdict { settle: Some(WAY_DIRECT), ..Verdict::NEXT }
}

#[inline(always)]
fn on_hidden_egress(hidden: Hidden, env: &impl Env) -> Verdict {
    if hidden == Hidden::Nothing || env.is_forwarded() {
        return Verdict::NEXT;
    }
    let pod_id = env.pod_id();
    let next = Verdict::of(pod_id);
    let pod = env.pod(pod_id).unwrap_or(POD_ENROLLED | POD_CAPTURE | POD_DNS);
    let counter = match hidden {
        // It could open a connection past the proxy.
        Hidden::Tcp if captures(pod) => Counter::DroppedUnreadable,
        Hidden::Dns if is_enrolled(pod) && pod & POD_DNS != 0 => Counter::DroppedDnsUnreadable,
        _ => return next,
    };
    Verdict { fate: Fate::Drop, ..next.count(counter) }
}

#[inline(always)]
fn back_to_proxy(segment: &Segment, verdict: Verdict) -> Verdict {
    let count = if segment.accepts { Some(Counter::RescuedInbound) } else { None };
    Verdict { settle: Some(WAY_REDIRECTED), count, ..to_lo(verdict) }
}

#[inline(always)]
fn to_lo(verdict: Verdict) -> Verdict {
    Verdict { fate: Fate::ToLo, mark: Some(MARK_RESCUED), ..verdict }
}

/// What `sk_lookup` knows when the kernel looks for the listener of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The pod that it runs for.
    pub pod_id: PodId,
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
    Pass(Option<Counter>),
    /// The proxy's listener takes it, one of `LISTENER_*`. Without one it is refused: it never falls
    /// through.
    Redirect(u32),
    /// It is refused.
    Refuse(Counter),
}

/// `sk_lookup` in an enrolled pod's network namespace.
///
/// No packet is parsed here: whatever is not known to be something else goes to the proxy.
#[inline(always)]
pub fn steer(lookup: &Lookup, env: &impl Pods) -> Steer {
    let Lookup { pod_id, tcp, flow, on_lo, hint } = lookup;
    let pod_id = *pod_id;
    let hint_kind = if hint.pod_id != pod_id { HINT_NONE } else { hint.kind };
    let hinted = if hint.flow == *flow { hint_kind } else { HINT_NONE };
    if hinted == HINT_QUESTION {
        return Steer::Pass(None);
    }
    if !tcp {
        return Steer::Pass(None);
    }
    let Some(pod) = env.pod(pod_id) else { return Steer::Refuse(Counter::RefusedUnknownPod) };
    if !is_enrolled(pod) {
        return Steer::Pass(None);
    }
    let captured = captures(pod);
    let pass = |counter| Steer::Pass(if captured { Some(counter) } else { None });
    if hinted == HINT_FROM_VIRTUAL {
        return Steer::Redirect(LISTENER_OUTBOUND);
    }
    if hinted == HINT_FROM_PROXY {
        return pass(Counter::FromProxy);
    }
    if *on_lo || hinted == HINT_FROM_POD {
        if flow.local.is_loopback() || flow.local.is_link_local() {
            return Steer::Pass(None);
        }
        if env.is_own(pod_id, &flow.local) {
            return pass(Counter::Local);
        }
        // Nothing but the redirection brings somebody else's address to `lo`.
        return Steer::Redirect(LISTENER_OUTBOUND);
    }
    if is_forged(pod_id, flow, env) {
        return Steer::Refuse(Counter::RefusedForgedAddress);
    }
    if !captured {
        return Steer::Pass(None);
    }
    if hint_kind == HINT_PAST_PROXY && is_translated(flow, &hint.flow) {
        return Steer::Pass(Some(Counter::BypassedInbound));
    }
    if flow.local_port == PORT_HBONE {
        return Steer::Redirect(LISTENER_HBONE);
    }
    if let Some(counter) = past_proxy(pod_id, pod, flow, env) {
        return Steer::Pass(Some(counter));
    }
    Steer::Redirect(LISTENER_INBOUND)
}

/// Whether the pod's netfilter has given the packet that tcx saw another destination.
#[inline(always)]
fn is_translated(flow: &Flow, seen: &Flow) -> bool {
    flow.remote == seen.remote
        && flow.remote_port == seen.remote_port
        && (flow.local != seen.local || flow.local_port != seen.local_port)
}

/// What is counted for a redirection to one of `LISTENER_*`.
#[inline(always)]
pub fn redirected(kind: u32) -> Counter {
    match kind {
        LISTENER_INBOUND => Counter::RedirectedInbound,
        LISTENER_HBONE => Counter::Hbone,
        _ => Counter::RedirectedOutbound,
    }
}

#[inline(always)]
fn is_enrolled(pod: u32) -> bool {
    pod & POD_ENROLLED != 0
}

#[inline(always)]
fn captures(pod: u32) -> bool {
    pod & (POD_ENROLLED | POD_CAPTURE) == POD_ENROLLED | POD_CAPTURE
}

/// Whether a connection to the pod goes to the application directly, and what it then counts as. The
/// proxy's own ports are not for outsiders, whatever the settings: its outbound listener would take
/// them for the pod.
#[inline(always)]
fn past_proxy(pod_id: PodId, pod: u32, flow: &Flow, env: &impl Pods) -> Option<Counter> {
    if matches!(flow.local_port, PORT_OUTBOUND | PORT_INBOUND | PORT_HBONE) {
        return None;
    }
    if pod & POD_BYPASS_INBOUND != 0
        || (pod & POD_INBOUND_RULES != 0 && env.excludes_inbound(pod_id, flow))
    {
        return Some(Counter::BypassedInbound);
    }
    if env.is_kubelets(flow) {
        return Some(Counter::KubeletProbe);
    }
    env.is_probe_source(&flow.remote).then_some(Counter::ProbeSource)
}
