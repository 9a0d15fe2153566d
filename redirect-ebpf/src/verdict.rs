//! Every decision of the datapath, as pure functions.
//!
//! They are compiled into the kernel programs *and* are the model against which the programs are tested.
//! Decisions ask the kernel through [`Env`]. A decision is about the pod in whose network namespace the
//! program runs, never about one that an address in a packet suggests.

use core::num::NonZeroU32;

use crate::abi::{
    Addr, Counter, Flow, HINT_FROM_POD, HINT_FROM_PROXY, HINT_FROM_VIRTUAL, HINT_NONE,
    HINT_QUESTION, Hint, LISTENER_HBONE, LISTENER_INBOUND, LISTENER_OUTBOUND, MARK_DIRECT,
    MARK_INBOUND, MARK_MASK, MARK_PROXY, MARK_REDIRECTED, MARK_REFUSED, MARK_RESCUED, MARK_VIRTUAL,
    POD_BYPASS_INBOUND, POD_CAPTURE, POD_DNS, POD_ENROLLED, POD_INBOUND_RULES, POD_OUTBOUND_RULES,
    PORT_DNS, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PodId, VIRTUAL_CAPTURE, VIRTUAL_RULES,
    WAY_DIRECT, WAY_MARKED, WAY_PROXYS, WAY_REDIRECTED,
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
    /// RST: it carries no data.
    pub resets: bool,
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
    /// It stopped listening a moment ago, and may be restarting.
    AwayWithinGrace,
    /// It does not, and the grace is over.
    Away,
}

/// What every decision asks the kernel.
pub trait Pods {
    /// The flags of the pod's entry in `pods`, bits of `POD_*`. Without `POD_ENROLLED` it bypasses.
    fn pod(&self, pod_id: PodId) -> Option<u32>;
    /// The pod that has this `struct net_device`; 0 if there is none.
    fn pod_on(&self, device: u64) -> PodId;
    /// Whether the pod has this address.
    fn is_own(&self, pod_id: PodId, addr: &Addr) -> bool;
    /// Whether `inbound_ports` or `inbound_ranges` exclude this connection to the pod.
    fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool;
    /// Whether `kubelet_flows` has this connection to a pod.
    fn is_kubelets(&self, flow: &Flow) -> bool;
    /// Whether probes are configured to come from this address.
    fn is_probe_source(&self, peer: &Addr) -> bool;
    /// Whether `outbound_ports` or `outbound_ranges` exclude this call of the pod's.
    fn excludes_outbound(&self, pod_id: PodId, flow: &Flow) -> bool;
}

/// What decisions at tcx also ask the kernel.
pub trait Env: Pods {
    /// The pod whose network namespace the packet is in.
    fn pod_id(&self) -> PodId;
    /// The socket in the namespace that the kernel by itself finds for this segment, that is, an application's
    /// or a connection's of the proxy. On the proxy's own ports it finds the proxy's listener, which counts:
    /// nobody else may take these ports.
    fn receiver(&self, segment: &Segment) -> Receiver;
    /// Whether this segment completes a SYN cookie of the proxy's outbound listener.
    fn completes_cookie(&self, pod_id: PodId) -> bool;
    /// Whether the proxy listens in this pod; `kind` is one of `LISTENER_*`.
    fn proxy(&self, pod_id: PodId, kind: u32, segment: &Segment) -> Proxy;
    /// Whether packets of any pod have strayed onto `lo`: see [`Fate::Leave`].
    fn have_strays(&self) -> bool;
    /// Whether packets of this pod have.
    fn strays(&self, pod_id: PodId) -> bool;
    /// At egress: whether the packet came in on an interface, and was not sent by a socket of this namespace.
    fn is_forwarded(&self) -> bool;
    /// At egress: whether that interface is `lo`, on which only the pod's own packets are.
    fn came_by_lo(&self) -> bool;
    /// At egress: who owns the socket that sent the packet, or the listener that answers.
    fn sender(&self) -> Sender;
    /// Whether the socket of this namespace that sent this segment is the proxy's.
    fn has_proxy_sent(&self, segment: &Segment) -> bool;
    /// Whether the capture of the pod began so recently that SYNs from before may still be answered.
    fn has_half_open(&self, pod_id: PodId) -> bool;
    /// Whether the listener for which a SYN-ACK answers has the mark of a direct connection. Its connections
    /// take that instead of the SYN's.
    fn has_marked_listener(&self) -> bool;
    /// The path that was recorded for the connection of the socket that sent the segment, one of `WAY_*`.
    fn settled(&self) -> Option<u32>;
    /// Whether the connection of the socket of this namespace that sent this segment was half open when the capture
    /// began, and direct.
    fn was_half_open(&self, pod_id: PodId, segment: &Segment) -> bool;
    /// Whether the connection is known to be direct although its socket has no record yet: it was half open
    /// when the capture began, or when the pod's settings changed.
    fn is_noted_direct(&self, pod_id: PodId, segment: &Segment) -> bool;
    /// At egress: whether a connection's own socket sent the packet. Requests, TIME_WAITs and listeners have
    /// no data to send.
    fn is_connections(&self) -> bool;
}

/// The socket that the kernel finds for a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Receiver {
    /// None.
    Nobody,
    /// A listener.
    Listener,
    /// A request for a connection. It may come from this very segment, sent again.
    HalfOpen,
    /// What is left of a connection. Another one may have its ports by now.
    TimeWait,
    /// An open or closing connection.
    Connection,
}

impl Receiver {
    /// Whether it is the other end of the sender's connection.
    #[inline(always)]
    fn is_peer(self) -> bool {
        matches!(self, Self::HalfOpen | Self::Connection)
    }
}

/// Who owns a socket in the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Sender {
    /// There is no socket in this namespace.
    Nobody,
    /// The application's.
    Application,
    /// The application's, with the proxy's mark; or that of a proxy that the agent does not know.
    Impostor,
    /// The proxy's by its mark alone, while that is enough.
    Marked,
    /// The proxy's, by its mark and its cgroup.
    Proxy,
}

/// What happens to a packet at tcx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It continues.
    Next,
    /// It is dropped. The sender repeats a SYN.
    Drop,
    /// It becomes the RST that answers it. On `lo` it continues; on an interface it is sent back.
    Reset,
    /// A SYN-ACK becomes a RST to the same peer.
    Abort,
    /// It is moved to `lo`, as if it had been sent there.
    ToLo,
    /// It leaves `lo` through the pod's uplink. From now on, every packet of the pod on `lo` is checked for its
    /// socket.
    Leave,
}

/// The outcome of a decision at tcx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What happens to the packet.
    pub fate: Fate,
    /// The packet's new mark under [`MARK_MASK`]; `None` leaves it as it is.
    pub mark: Option<NonZeroU32>,
    /// The kind of the hint for `sk_lookup`, if any. Its flow is the receiver's.
    pub hint: Option<NonZeroU32>,
    /// The pod, if it had to be looked up.
    pub pod_id: PodId,
    /// What to count for the pod.
    pub count: Option<Counter>,
    /// What to record with the socket that sent the packet: one of `WAY_*`.
    pub settle: Option<NonZeroU32>,
}

impl Verdict {
    /// The packet continues unchanged.
    pub const NEXT: Verdict =
        Verdict { fate: Fate::Next, mark: None, hint: None, pod_id: 0, count: None, settle: None };

    const fn of(pod_id: PodId) -> Self {
        Self { pod_id, ..Self::NEXT }
    }

    const fn count(self, counter: Counter) -> Self {
        Self { count: Some(counter), ..self }
    }
}

/// A number in a [`Verdict`]. It is never 0, so `None` is represented as 0 and nothing is undefined, which
/// the verifier would reject.
#[inline(always)]
pub const fn code(number: u32) -> Option<NonZeroU32> {
    NonZeroU32::new(number)
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

/// tcx ingress on `lo`: packets of the proxy to the application, and packets of the application that the
/// redirection route, or [`on_egress`], moved here.
#[inline(always)]
pub fn on_lo(mark: u32, segment: Option<&Segment>, env: &impl Env) -> Verdict {
    let proxys = mesh_mark(mark) == MARK_PROXY;
    let Some(segment) = segment else {
        return Verdict {
            mark: if proxys { code(MARK_REDIRECTED) } else { None },
            ..Verdict::NEXT
        };
    };
    // The hint is for every packet, not only for the SYN: under SYN cookies the ACK looks for the listener.
    if !segment.opens && proxys {
        let hint = code(HINT_FROM_PROXY);
        return Verdict { mark: code(MARK_REDIRECTED), hint, ..Verdict::NEXT };
    }
    if !segment.opens && !segment.accepts && !env.have_strays() {
        return Verdict { hint: code(HINT_FROM_POD), ..Verdict::NEXT };
    }
    let pod_id = env.pod_id();
    let next = Verdict::of(pod_id);
    if segment.opens && mesh_mark(mark) == MARK_REFUSED {
        // The RST takes the guard's rule.
        return Verdict { fate: Fate::Reset, mark: code(MARK_RESCUED), ..next };
    }
    let own = segment.opens && env.is_own(pod_id, &segment.dst);
    // Netfilter in the pod may have removed the proxy's mark.
    let proxys = proxys || (own && env.has_proxy_sent(segment));
    if proxys {
        // Netfilter in the pod sends the proxy's call back to the proxy, which would loop forever.
        if matches!(segment.dst_port, PORT_OUTBOUND | PORT_INBOUND) {
            return Verdict { fate: Fate::Reset, ..next.count(Counter::RefusedProxysMark) };
        }
        // The proxy calls from the client's address, from a port that it chose without knowing the client's
        // own ports. If a connection already uses that port, its socket would answer the client, and the
        // proxy would wait in vain.
        if env.receiver(segment) == Receiver::Connection {
            return Verdict { fate: Fate::Reset, ..next.count(Counter::RefusedPortTaken) };
        }
        // The accepted socket takes the mark, so its replies come back here, even while the pod leaves the
        // mesh.
        return Verdict { mark: code(MARK_REDIRECTED), hint: code(HINT_FROM_PROXY), ..next };
    }
    // A socket that is called on `lo` has no direct connection, whatever mark its caller has.
    let direct = segment.opens && mesh_mark(mark) == MARK_DIRECT;
    let not_direct = if direct { code(MARK_REDIRECTED) } else { None };
    let next = Verdict { hint: code(HINT_FROM_POD), mark: not_direct, ..next };
    if segment.dst.is_loopback() {
        return next;
    }
    let pod = env.pod(pod_id);
    // What the guard moved here belongs here.
    if mesh_mark(mark) != MARK_RESCUED
        && (segment.opens || segment.accepts || env.strays(pod_id))
        && !(own || (!segment.opens && env.is_own(pod_id, &segment.dst)))
        && pod.is_some_and(|pod| strays(pod_id, pod, segment, env))
    {
        let first = segment.opens || segment.accepts;
        let count = if first { Some(Counter::RescuedDirect) } else { None };
        let mark = code(MARK_DIRECT);
        return Verdict { fate: Fate::Leave, mark, hint: None, count, ..next };
    }
    if !segment.opens
        || own
        || segment.dst.is_link_local()
        || pod.is_some_and(|pod| !is_enrolled(pod))
    {
        return next;
    }
    match env.proxy(pod_id, LISTENER_OUTBOUND, segment) {
        Proxy::Listens => next,
        Proxy::AwayWithinGrace => {
            Verdict { fate: Fate::Drop, ..next.count(Counter::DroppedProxyAway) }
        }
        // The kernel cannot refuse this SYN, because its destination is not a local address.
        Proxy::Away => Verdict { fate: Fate::Reset, ..next.count(Counter::RefusedProxyAway) },
    }
}

/// Whether a packet on `lo`, for an address that the pod does not have, is a stray: the pod's own marks or rules
/// brought it here, or its socket has none, but its other end is elsewhere. It belongs to an excluded connection,
/// to one that is older than the capture, or to the proxy itself.
#[inline(always)]
fn strays(pod_id: PodId, pod: u32, segment: &Segment, env: &impl Env) -> bool {
    if segment.opens {
        let excluded = excludes_outbound(pod_id, pod, &segment.sender_flow(), env);
        return excluded || env.has_proxy_sent(segment);
    }
    if env.receiver(segment).is_peer() {
        return false;
    }
    // Whoever accepted the connection listens; whoever opened it does not. What a proxy leaves behind when it
    // exits is neither, and must not leave in plaintext.
    let flow = segment.sender_flow();
    // From another port: it would reach a listener, and never the connection itself.
    let Segment { src, dst, src_port, .. } = *segment;
    let caller = Segment { src: dst, dst: src, src_port: 0, dst_port: src_port, ..*segment };
    let settings = if env.receiver(&caller) == Receiver::Listener {
        past_proxy(pod_id, pod, &flow, env).is_some()
    } else {
        excludes_outbound(pod_id, pod, &flow, env)
    };
    settings || env.has_proxy_sent(segment) || env.was_half_open(pod_id, segment)
}

#[inline(always)]
fn excludes_outbound(pod_id: PodId, pod: u32, flow: &Flow, env: &impl Pods) -> bool {
    pod & POD_OUTBOUND_RULES != 0 && env.excludes_outbound(pod_id, flow)
}

/// Whether the settings of a captured pod let a connection of one of its sockets pass directly, in whichever
/// direction it was opened.
#[inline(always)]
pub fn is_excluded(pod_id: PodId, pod: u32, flow: &Flow, env: &impl Pods) -> bool {
    flow.remote.is_link_local()
        || excludes_outbound(pod_id, pod, flow, env)
        || past_proxy(pod_id, pod, flow, env).is_some()
}

/// tcx ingress on every interface of the pod except `lo`: what comes from outside. `ip` says whether the
/// packet is IPv4 or IPv6.
#[inline(always)]
pub fn on_interface(ip: bool, segment: Option<&Segment>, env: &impl Env) -> Verdict {
    if !ip {
        return Verdict::NEXT;
    }
    let next = Verdict { mark: code(MARK_DIRECT), ..Verdict::NEXT };
    let Some(segment) = segment else { return next };
    if !segment.opens {
        return next;
    }
    let pod_id = env.pod_id();
    let next = Verdict { pod_id, ..next };
    // If nothing is known about the pod, `sk_lookup` refuses.
    let Some(pod) = env.pod(pod_id).filter(|pod| is_enrolled(*pod)) else { return next };
    if is_forged(pod_id, &segment.receiver_flow(), env) {
        return Verdict { fate: Fate::Drop, ..next.count(Counter::RefusedForgedAddress) };
    }
    if past_proxy(pod_id, pod, &segment.receiver_flow(), env).is_some() {
        return next;
    }
    let captured = captures(pod);
    let next = if captured { Verdict { mark: code(MARK_INBOUND), ..next } } else { next };
    if !env.is_own(pod_id, &segment.dst) {
        // It is forwarded, or its destination is the pod's only by a route.
        return next;
    }
    let hbone = segment.dst_port == PORT_HBONE;
    if captured && !hbone && env.receiver(segment) == Receiver::Nobody {
        // The proxy would accept first and find out later. The kernel must not decide either: an application
        // that starts to listen in between, or a target of the pod's netfilter, would be reached past the
        // proxy.
        return Verdict { fate: Fate::Reset, ..next.count(Counter::NoListener) };
    }
    let kind = if hbone { LISTENER_HBONE } else { LISTENER_INBOUND };
    // Also looked up while nothing is captured: the capture may begin before `sk_lookup` runs for this very
    // segment, and then needs the listener.
    match env.proxy(pod_id, kind, segment) {
        Proxy::AwayWithinGrace if captured => {
            Verdict { fate: Fate::Drop, ..next.count(Counter::DroppedProxyAway) }
        }
        // If the proxy is away for longer, `sk_lookup` refuses.
        _ => next,
    }
}

/// Whether a packet from outside pretends to come from the pod itself, or is addressed to loopback.
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

/// Whether what arrives on a virtual interface is for the pod itself, and so inbound as on any other
/// interface.
#[inline(always)]
pub fn is_inbound(segment: Option<&Segment>, pod_id: PodId, env: &impl Pods) -> bool {
    segment.is_some_and(|segment| env.is_own(pod_id, &segment.dst))
}

/// tcx ingress on a virtual interface of the pod: what a VM or a nested container sends, unless it
/// [`is_inbound`]. `ip` is as in [`on_interface`]; `hides_tcp` says that a packet without a segment is TCP,
/// or may be.
///
/// What is redirected gets a mark whose rule delivers it to this namespace. A connection without a socket
/// here is forwarded as usual.
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
    let forwarded = Verdict { mark: code(MARK_DIRECT), ..Verdict::of(pod_id) };
    let redirected = Verdict { mark: code(MARK_VIRTUAL), ..Verdict::of(pod_id) };
    let captures = flags & VIRTUAL_CAPTURE != 0;
    let Some(segment) = segment else {
        if hides_tcp && captures {
            // It could open a connection past the proxy, and nobody needs such packets.
            return Verdict { fate: Fate::Drop, ..forwarded.count(Counter::DroppedUnreadable) };
        }
        return forwarded;
    };
    if segment.dst.is_loopback() || segment.dst.is_link_local() {
        return forwarded;
    }
    let for_proxy = Verdict { hint: code(HINT_FROM_VIRTUAL), ..redirected };
    if !segment.opens {
        if !matches!(env.receiver(segment), Receiver::Nobody | Receiver::Listener) {
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

/// What kind of packet it is that could not be parsed: a fragment, or one with IPv6 extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hidden {
    /// Nothing that could be for the proxy.
    Nothing,
    /// TCP, or possibly TCP.
    Tcp,
    /// A datagram to port 53.
    Dns,
}

/// tcx egress of every interface of the pod except `lo`: the guard. A packet goes where its socket is,
/// whatever the pod's marks, rules, routes and netfilter say, and DNS queries go to `lo`. `message` is `Err`
/// for packets that could not be parsed.
#[inline(always)]
pub fn on_egress(mark: u32, message: Result<&Message, Hidden>, env: &impl Env) -> Verdict {
    on_egress_of(sender(mark, message, env), mark, message, env)
}

/// Who sent an outgoing packet. The proxy's packets have no socket if they came back from `lo` or answer with
/// a SYN cookie (a forged one opens no connection). Any other packet without a socket may be a copy, with
/// whatever mark netfilter gave it.
#[inline(always)]
pub fn sender(mark: u32, message: Result<&Message, Hidden>, env: &impl Env) -> Sender {
    let sender = env.sender();
    let (Sender::Nobody, Ok(Message { segment, tcp: true, .. })) = (sender, message) else {
        return sender;
    };
    let answers = segment.accepts && mesh_mark(mark) == MARK_PROXY && !env.is_forwarded();
    // A guest's packet has no sender here, so none is looked for.
    let guests = env.is_forwarded() && !env.came_by_lo();
    if answers || (!guests && env.has_proxy_sent(segment)) { Sender::Proxy } else { sender }
}

/// [`on_egress`] for a packet whose sender is known.
#[inline(always)]
pub fn on_egress_of(
    sender: Sender,
    mark: u32,
    message: Result<&Message, Hidden>,
    env: &impl Env,
) -> Verdict {
    let way = if sender == Sender::Marked { WAY_MARKED } else { WAY_PROXYS };
    if matches!(sender, Sender::Proxy | Sender::Marked) {
        return match message {
            Ok(message) if message.tcp => on_proxys_egress(way, &message.segment, env),
            _ => Verdict::NEXT,
        };
    }
    let message = match message {
        Ok(message) => message,
        Err(hidden) => return on_hidden_egress(hidden, env),
    };
    let segment = &message.segment;
    if segment.opens && segment.dst.is_link_local() {
        return Verdict::NEXT;
    }
    let asks = segment.opens && segment.dst_port == PORT_DNS && message.is_query;
    if !message.tcp && !asks {
        return Verdict::NEXT;
    }
    let forwarded = env.is_forwarded();
    if forwarded && mesh_mark(mark) == MARK_RESCUED {
        // It was on `lo`, and the rule that should have kept it there is gone.
        let drop = Verdict { fate: Fate::Drop, ..Verdict::of(env.pod_id()) };
        return drop.count(Counter::RefusedPastProxy);
    }
    if forwarded && segment.opens && !env.came_by_lo() {
        // A guest's packet: virtual interfaces are responsible for these.
        let verdict = Verdict::of(env.pod_id());
        return if message.tcp { verdict.count(Counter::Forwarded) } else { verdict };
    }
    if !segment.opens {
        match env.settled() {
            Some(WAY_REDIRECTED) => return to_lo(Verdict::NEXT),
            Some(_) => return Verdict::NEXT,
            None => {}
        }
    }
    let pod_id = env.pod_id();
    let next = Verdict::of(pod_id);
    let Some(pod) = env.pod(pod_id) else {
        // The pod was never prepared, or somebody has emptied the map: nothing can be decided.
        return Verdict { fate: Fate::Drop, ..next.count(Counter::RefusedUnknownPod) };
    };
    if !is_enrolled(pod) {
        return next;
    }
    if sender == Sender::Impostor && segment.opens {
        // If it were captured, a proxy that the agent does not know would get its own call back, and call
        // again.
        let count = Counter::RefusedProxysMark;
        let fate = if message.tcp { Fate::ToLo } else { Fate::Drop };
        return Verdict { fate, mark: code(MARK_REFUSED), ..next.count(count) };
    }
    // Loopback addresses are valid only on `lo`, and a packet that was on `lo` no longer shows who sent it.
    let flow = segment.sender_flow();
    let excluded = segment.opens && message.tcp && excludes_outbound(pod_id, pod, &flow, env);
    let strange = segment.dst.is_loopback() || (forwarded && segment.opens && !excluded);
    if strange && captures(pod) {
        return Verdict { fate: Fate::Drop, ..next.count(Counter::RefusedPastProxy) };
    }
    if strange {
        return next;
    }
    if segment.opens {
        if asks && pod & POD_DNS != 0 {
            return Verdict {
                settle: if message.tcp { code(WAY_REDIRECTED) } else { None },
                ..to_lo(next)
            };
        }
        if excluded {
            return Verdict { settle: code(WAY_DIRECT), ..next };
        }
        if !message.tcp || !captures(pod) {
            return next;
        }
        let to_lo = to_lo(next.count(Counter::RescuedOutbound));
        return Verdict { settle: code(WAY_REDIRECTED), ..to_lo };
    }
    if env.receiver(segment).is_peer() {
        return back_to_proxy(segment, next);
    }
    if segment.accepts {
        // Under SYN cookies, no socket sent it.
        let answers = !forwarded || env.is_own(pod_id, &segment.src);
        if !answers || !captures(pod) || past_proxy(pod_id, pod, &flow, env).is_some() {
            return next;
        }
        // The SYN came before the capture began.
        let is_older = mesh_mark(mark) == MARK_DIRECT
            && env.has_half_open(pod_id)
            && !env.has_marked_listener()
            // A socket that opens a connection with its caller has sent its own SYN since.
            && !env.is_connections();
        if is_older {
            return Verdict { settle: code(WAY_DIRECT), ..next };
        }
        return Verdict { fate: Fate::Abort, ..next.count(Counter::RefusedPastProxy) };
    }
    if segment.resets || !env.is_connections() {
        return next;
    }
    if captures(pod)
        && !is_excluded(pod_id, pod, &flow, env)
        && !env.is_noted_direct(pod_id, segment)
    {
        // Its peer was the proxy, which has closed it, or the application itself. The kernel resets it.
        return to_lo(next.count(Counter::RefusedPastProxy));
    }
    Verdict { settle: code(WAY_DIRECT), ..next }
}

/// The same for the proxy's packets. Some of them go to the application.
#[inline(always)]
fn on_proxys_egress(way: u32, segment: &Segment, env: &impl Env) -> Verdict {
    if !segment.opens {
        match env.settled() {
            Some(WAY_REDIRECTED) => return to_lo(Verdict::NEXT),
            Some(settled) if settled == way => return Verdict::NEXT,
            // It was settled when less was known about the proxy.
            Some(_) => {}
            None if env.receiver(segment).is_peer() => {
                return back_to_proxy(segment, Verdict::of(env.pod_id()));
            }
            None => {}
        }
    }
    Verdict { settle: code(way), ..Verdict::NEXT }
}

#[inline(always)]
fn on_hidden_egress(hidden: Hidden, env: &impl Env) -> Verdict {
    if hidden == Hidden::Nothing || (env.is_forwarded() && !env.came_by_lo()) {
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
    Verdict { settle: code(WAY_REDIRECTED), count, ..to_lo(verdict) }
}

#[inline(always)]
fn to_lo(verdict: Verdict) -> Verdict {
    Verdict { fate: Fate::ToLo, mark: code(MARK_RESCUED), ..verdict }
}

/// What `sk_lookup` knows when the kernel looks for a packet's listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The pod for which it runs.
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
    /// The proxy's listener takes it, one of `LISTENER_*`. If there is none, it is refused: it never falls
    /// through.
    Redirect(u32),
    /// It is refused.
    Refuse(Counter),
}

/// `sk_lookup` in an enrolled pod's network namespace.
///
/// No packet is parsed here: everything goes to the proxy unless it is known to be an exception.
#[inline(always)]
pub fn steer(lookup: &Lookup, env: &impl Pods) -> Steer {
    let Lookup { pod_id, tcp, flow, on_lo, hint } = lookup;
    let pod_id = *pod_id;
    if !tcp {
        return Steer::Pass(None);
    }
    let is_its = hint.kind != HINT_NONE && hint.flow == *flow && env.pod_on(hint.device) == pod_id;
    let hinted = if is_its { hint.kind } else { HINT_NONE };
    if hinted == HINT_QUESTION {
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
        // Only the redirection brings a foreign destination address to `lo`.
        return Steer::Redirect(LISTENER_OUTBOUND);
    }
    if is_forged(pod_id, flow, env) {
        return Steer::Refuse(Counter::RefusedForgedAddress);
    }
    if !captured {
        return Steer::Pass(None);
    }
    if flow.local_port == PORT_HBONE {
        return Steer::Redirect(LISTENER_HBONE);
    }
    if let Some(counter) = past_proxy(pod_id, pod, flow, env) {
        return Steer::Pass(Some(counter));
    }
    Steer::Redirect(LISTENER_INBOUND)
}

/// The counter for a redirection to one of `LISTENER_*`.
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

/// Whether flags of `pods` say that the pod is captured.
#[inline(always)]
pub fn captures(pod: u32) -> bool {
    pod & (POD_ENROLLED | POD_CAPTURE) == POD_ENROLLED | POD_CAPTURE
}

#[inline(always)]
fn is_proxys_port(flow: &Flow) -> bool {
    matches!(flow.local_port, PORT_OUTBOUND | PORT_INBOUND | PORT_HBONE)
}

/// Whether a connection to the pod goes directly to the application, and which counter it then increments.
/// Settings never open the proxy's own ports to outsiders: its outbound listener would take them for the pod.
#[inline(always)]
fn past_proxy(pod_id: PodId, pod: u32, flow: &Flow, env: &impl Pods) -> Option<Counter> {
    if is_proxys_port(flow) {
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

#[cfg(test)]
pub(crate) mod tests;
