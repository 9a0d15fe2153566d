//! Every decision of the datapath, as pure functions.
//!
//! They are compiled into the kernel programs *and* are the model that the programs are tested
//! against. What a decision needs to ask of its surroundings goes through [`Env`].

use crate::abi::{
    Addr, Counter, DECISION_ENROLLED, Flow, HINT_FROM_POD, HINT_FROM_PROXY, HINT_NO_LISTENER,
    HINT_NONE, HINT_QUESTION, Hint, LISTENER_HBONE, LISTENER_INBOUND, LISTENER_OUTBOUND,
    MARK_DIRECT, MARK_MASK, MARK_PROXY, MARK_REDIRECTED, POD_BYPASS_INBOUND, POD_CAPTURE,
    POD_INBOUND_RULES, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PodEntry, PodId,
};
use crate::dns;

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
    /// Whether `inbound_ports` or `inbound_ranges` keep this connection to the pod off the proxy.
    fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool;
    /// Whether `kubelet_flows` has this connection to a pod.
    fn is_kubelets(&self, flow: &Flow) -> bool;
    /// Whether probes are configured to come from this address.
    fn is_probe_source(&self, peer: &Addr) -> bool;
}

/// What the decisions at tcx ask of the kernel besides.
pub trait Env: Pods {
    /// Whether the kernel, by itself, finds a socket for this segment: an application's. On the
    /// proxy's own ports it is the proxy's, and counts: a hint would let outsiders reach its
    /// outbound listener.
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
        Proxy::Listens => {
            let hint = Some(Hint { flow: segment.receiver_flow(), kind: HINT_FROM_POD });
            Ingress { hint, ..Ingress::NEXT }
        }
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
    if past_proxy(&pod, &segment.receiver_flow(), env).is_some() {
        return next;
    }
    let captured = captures(&pod);
    let hbone = segment.dst_port == PORT_HBONE;
    if captured && !hbone && !env.application_listens(segment) {
        // The proxy would accept first and find out later; `sk_lookup` refuses at once. It does not
        // leave that to the kernel: somebody may listen by then, and would be reached past the proxy.
        let hint = Some(Hint { flow: segment.receiver_flow(), kind: HINT_NO_LISTENER });
        return Ingress { hint, ..next };
    }
    let kind = if hbone { LISTENER_HBONE } else { LISTENER_INBOUND };
    // Also asked while nothing is captured: that may begin before `sk_lookup` runs for this very
    // segment, and then it needs the listener.
    match env.proxy(pod.pod_id, kind, segment) {
        Proxy::AwayWithinGrace if captured => Ingress {
            fate: Fate::Drop,
            count: Some((pod.pod_id, Counter::DroppedProxyAway)),
            ..next
        },
        // When it is away for good the kernel refuses: nobody listens on the HBONE port, and
        // `sk_lookup` drops the rest.
        _ => next,
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

/// No pod's id.
const NOBODY: PodId = PodId::MAX;

/// `sk_lookup` in an enrolled pod's network namespace.
///
/// No packet is parsed here: whatever is not known to be something else goes to the proxy.
#[inline(always)]
pub fn steer(lookup: &Lookup, env: &impl Pods) -> Steer {
    let Lookup { tcp, flow, on_lo, hint } = lookup;
    if flow.local.is_loopback() || flow.local.is_link_local() {
        return Steer::Pass(None);
    }
    if !tcp {
        return dns::steer(lookup, env);
    }
    let hint = if hint.flow == *flow { hint.kind } else { HINT_NONE };
    let local = env.pod(&flow.local);
    // Not an Option: the compiler would carry along what a `None` does not have, and the verifier
    // objects to that.
    let caller = env.pod(&flow.remote).map_or(NOBODY, |pod| pod.pod_id);
    let calls_itself = same_pod(local, caller);
    // Another pod of this node, called by ours, looks like ours, called by that one. But what ours
    // sends comes in on `lo`, and where it is bound to an interface and seems to come in on that, tcx
    // has said so. Of the proxy's packets on `lo`, too.
    if (hint == HINT_FROM_POD || (*on_lo && hint == HINT_NONE)) && caller != NOBODY && !calls_itself
    {
        return Steer::Redirect { pod_id: caller, kind: LISTENER_OUTBOUND };
    }
    let Some(pod) = local else { return Steer::Refuse(0, Counter::RefusedUnknownAddress) };
    if enrolled(local).is_none() || !captures(&pod) {
        return Steer::Pass(None);
    }
    if hint == HINT_QUESTION {
        return Steer::Pass(None);
    }
    if hint == HINT_NO_LISTENER {
        return Steer::Refuse(pod.pod_id, Counter::NoListener);
    }
    if calls_itself {
        return Steer::Pass(Some((pod.pod_id, Counter::Local)));
    }
    if flow.local_port == PORT_HBONE {
        return Steer::Pass(Some((pod.pod_id, Counter::Hbone)));
    }
    if hint == HINT_FROM_PROXY {
        return Steer::Pass(Some((pod.pod_id, Counter::FromProxy)));
    }
    if let Some(counter) = past_proxy(&pod, flow, env) {
        return Steer::Pass(Some((pod.pod_id, counter)));
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

/// Whether a connection to the pod goes to the application directly, and what it then counts as. The
/// proxy's own ports are not for outsiders, whatever the settings: its outbound listener would take
/// them for the pod.
#[inline(always)]
fn past_proxy(pod: &PodEntry, flow: &Flow, env: &impl Pods) -> Option<Counter> {
    if matches!(flow.local_port, PORT_OUTBOUND | PORT_INBOUND | PORT_HBONE) {
        return None;
    }
    if pod.flags & POD_BYPASS_INBOUND != 0
        || (pod.flags & POD_INBOUND_RULES != 0 && env.excludes_inbound(pod.pod_id, flow))
    {
        return Some(Counter::BypassedInbound);
    }
    if env.is_kubelets(flow) {
        return Some(Counter::KubeletProbe);
    }
    env.is_probe_source(&flow.remote).then_some(Counter::ProbeSource)
}

#[inline(always)]
fn same_pod(pod: Option<PodEntry>, pod_id: PodId) -> bool {
    matches!(pod, Some(pod) if pod.pod_id == pod_id)
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::BTreeMap, net::IpAddr};

    use super::*;
    use crate::abi::DECISION_BYPASS;

    const OWN: PodId = 1;
    const NEIGHBOUR: PodId = 2;
    const BYPASSING: PodId = 3;
    const PREPARING: PodId = 4;

    const CLIENT_PORT: u16 = 40_000;
    const SERVER_PORT: u16 = 8080;

    /// Who is who, in one family.
    #[derive(Clone, Copy)]
    struct Addresses {
        own: Addr,
        own_second: Addr,
        neighbour: Addr,
        bypassing: Addr,
        preparing: Addr,
        stranger: Addr,
        loopback: Addr,
    }

    fn both_families() -> [Addresses; 2] {
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        [
            Addresses {
                own: addr("10.0.0.2"),
                own_second: addr("10.0.0.3"),
                neighbour: addr("10.0.0.10"),
                bypassing: addr("10.0.0.11"),
                preparing: addr("10.0.0.12"),
                stranger: addr("192.0.2.1"),
                loopback: addr("127.0.0.1"),
            },
            Addresses {
                own: addr("fd00::2"),
                own_second: addr("fd00::3"),
                neighbour: addr("fd00::10"),
                bypassing: addr("fd00::11"),
                preparing: addr("fd00::12"),
                stranger: addr("2001:db8::1"),
                loopback: addr("::1"),
            },
        ]
    }

    /// What a decision has asked for besides pods.
    #[derive(Debug, PartialEq, Eq)]
    enum Asked {
        Application,
        Proxy(PodId, u32),
    }

    struct Node {
        pods: BTreeMap<Addr, PodEntry>,
        /// What `inbound_ports` and `inbound_ranges` keep off the proxy.
        excluded_port: Option<u16>,
        excluded_peer: Option<Addr>,
        /// Whose connections are in `kubelet_flows`.
        kubelet: Option<Addr>,
        probe_source: Option<Addr>,
        application_listens: bool,
        proxy: Proxy,
        asked: RefCell<Vec<Asked>>,
    }

    impl Node {
        fn new(a: &Addresses, application_listens: bool, proxy: Proxy) -> Self {
            let entry = |pod_id, decision, flags| PodEntry { pod_id, decision, reason: 0, flags };
            let pods = BTreeMap::from([
                (a.own, entry(OWN, DECISION_ENROLLED, POD_CAPTURE)),
                (a.own_second, entry(OWN, DECISION_ENROLLED, POD_CAPTURE)),
                (a.neighbour, entry(NEIGHBOUR, DECISION_ENROLLED, POD_CAPTURE)),
                // The decision counts, whatever the flags.
                (a.bypassing, entry(BYPASSING, DECISION_BYPASS, POD_CAPTURE)),
                (a.preparing, entry(PREPARING, DECISION_ENROLLED, 0)),
            ]);
            Self {
                pods,
                excluded_port: None,
                excluded_peer: None,
                kubelet: None,
                probe_source: None,
                application_listens,
                proxy,
                asked: RefCell::default(),
            }
        }

        /// With these flags for the pod itself, besides that it captures.
        fn with_flags(mut self, a: &Addresses, flags: u32) -> Self {
            for own in [a.own, a.own_second] {
                self.pods.entry(own).and_modify(|entry| entry.flags = POD_CAPTURE | flags);
            }
            self
        }

        #[track_caller]
        fn assert_asked(&self, asked: &[Asked]) {
            assert_eq!(*self.asked.borrow(), asked);
        }
    }

    impl Pods for Node {
        fn pod(&self, addr: &Addr) -> Option<PodEntry> {
            self.pods.get(addr).copied()
        }

        fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool {
            pod_id == OWN
                && (self.excluded_port == Some(flow.local_port)
                    || self.excluded_peer == Some(flow.remote))
        }

        fn is_kubelets(&self, flow: &Flow) -> bool {
            self.kubelet == Some(flow.remote)
        }

        fn is_probe_source(&self, peer: &Addr) -> bool {
            self.probe_source == Some(*peer)
        }
    }

    impl Env for Node {
        fn application_listens(&self, _: &Segment) -> bool {
            self.asked.borrow_mut().push(Asked::Application);
            self.application_listens
        }

        fn proxy(&self, pod_id: PodId, kind: u32, _: &Segment) -> Proxy {
            self.asked.borrow_mut().push(Asked::Proxy(pod_id, kind));
            self.proxy
        }
    }

    const PROXY_STATES: [Proxy; 3] = [Proxy::Listens, Proxy::AwayWithinGrace, Proxy::Away];

    fn syn(src: Addr, dst: Addr) -> Segment {
        Segment { src, dst, src_port: CLIENT_PORT, dst_port: SERVER_PORT, opens: true }
    }

    fn data(src: Addr, dst: Addr) -> Segment {
        Segment { opens: false, ..syn(src, dst) }
    }

    fn flow(local: Addr, remote: Addr) -> Flow {
        Flow { local, remote, local_port: SERVER_PORT, remote_port: CLIENT_PORT }
    }

    #[test]
    fn only_the_bits_of_the_mesh_are_read_and_written() {
        assert_eq!(mesh_mark(0xabcd_e539), MARK_PROXY);
        assert_eq!(with_mesh_mark(0xabcd_e539, MARK_DIRECT), 0xabcd_e0d1);
        assert_eq!(with_mesh_mark(0xffff_ffff, 0), 0xffff_f000);
    }

    #[test]
    fn the_proxy_delivers_to_the_application() {
        for a in both_families() {
            // From a client's address, wherever that client is; every packet, not only the SYN.
            for client in [a.stranger, a.neighbour, a.own] {
                for segment in [syn(client, a.own), data(client, a.own)] {
                    for mark in [MARK_PROXY, 0xabcd_e000 | MARK_PROXY] {
                        let node = Node::new(&a, true, Proxy::Away);
                        let hint = Hint { flow: flow(a.own, client), kind: HINT_FROM_PROXY };
                        let expected = Ingress {
                            fate: Fate::Next,
                            mark: Some(MARK_REDIRECTED),
                            hint: Some(hint),
                            count: None,
                        };
                        assert_eq!(on_lo(mark, Some(&segment), &node), expected);
                        node.assert_asked(&[]);
                    }
                }
            }
        }
    }

    #[test]
    fn what_the_proxy_sends_and_cannot_be_parsed_has_no_hint() {
        for a in both_families() {
            let node = Node::new(&a, true, Proxy::Listens);
            let expected = Ingress { mark: Some(MARK_REDIRECTED), ..Ingress::NEXT };
            assert_eq!(on_lo(MARK_PROXY, None, &node), expected);
        }
    }

    #[test]
    fn the_pod_opens_a_connection() {
        for a in both_families() {
            for (proxy, fate, counter) in [
                (Proxy::Listens, Fate::Next, None),
                (Proxy::AwayWithinGrace, Fate::Drop, Some(Counter::DroppedProxyAway)),
                (Proxy::Away, Fate::Reset, Some(Counter::RefusedProxyAway)),
            ] {
                // To its neighbours, too: it is the caller's proxy that counts.
                for server in [a.stranger, a.neighbour, a.bypassing, a.preparing] {
                    // Of these only the proxy's mark makes a difference.
                    for mark in [0, MARK_REDIRECTED, MARK_DIRECT, 0xabcd_e000] {
                        let node = Node::new(&a, true, proxy);
                        let count = counter.map(|counter| (OWN, counter));
                        let hint = (proxy == Proxy::Listens)
                            .then(|| Hint { flow: flow(server, a.own), kind: HINT_FROM_POD });
                        let expected = Ingress { fate, count, hint, ..Ingress::NEXT };
                        assert_eq!(on_lo(mark, Some(&syn(a.own, server)), &node), expected);
                        node.assert_asked(&[Asked::Proxy(OWN, LISTENER_OUTBOUND)]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_pod_that_leaves_the_mesh_still_needs_its_proxy_on_lo() {
        for a in both_families() {
            let node = Node::new(&a, true, Proxy::Away);
            let ingress = on_lo(0, Some(&syn(a.preparing, a.stranger)), &node);
            assert_eq!(ingress.fate, Fate::Reset);
            node.assert_asked(&[Asked::Proxy(PREPARING, LISTENER_OUTBOUND)]);
        }
    }

    #[test]
    fn on_lo_everything_else_goes_on() {
        for a in both_families() {
            for (scenario, segment) in [
                ("an open connection", Some(data(a.own, a.stranger))),
                ("loopback calls loopback", Some(syn(a.loopback, a.loopback))),
                ("the pod calls loopback", Some(syn(a.own, a.loopback))),
                ("the pod calls itself", Some(syn(a.own, a.own))),
                ("the pod calls its other address", Some(syn(a.own, a.own_second))),
                ("a pod that bypasses", Some(syn(a.bypassing, a.stranger))),
                ("nobody known", Some(syn(a.stranger, a.stranger))),
                ("not TCP, or not to be parsed", None),
            ] {
                let node = Node::new(&a, false, Proxy::Away);
                assert_eq!(on_lo(0, segment.as_ref(), &node), Ingress::NEXT, "{scenario}");
                node.assert_asked(&[]);
            }
        }
    }

    #[test]
    fn what_is_not_ip_is_left_alone() {
        for a in both_families() {
            let node = Node::new(&a, true, Proxy::Listens);
            assert_eq!(on_interface(false, None, &node), Ingress::NEXT);
        }
    }

    #[test]
    fn what_comes_from_outside_is_marked_and_goes_on() {
        for a in both_families() {
            for (scenario, segment) in [
                ("not TCP, or not to be parsed", None),
                ("an open connection", Some(data(a.stranger, a.own))),
                ("to a pod that bypasses", Some(syn(a.stranger, a.bypassing))),
                ("to nobody known", Some(syn(a.own, a.stranger))),
            ] {
                let node = Node::new(&a, false, Proxy::Away);
                let expected = Ingress { mark: Some(MARK_DIRECT), ..Ingress::NEXT };
                assert_eq!(on_interface(true, segment.as_ref(), &node), expected, "{scenario}");
                node.assert_asked(&[]);
            }
        }
    }

    #[test]
    fn nobody_listens_in_the_pod() {
        for a in both_families() {
            // Whether the proxy listens does not matter: it is not asked.
            for proxy in PROXY_STATES {
                let node = Node::new(&a, false, proxy);
                let hint = Hint { flow: flow(a.own, a.stranger), kind: HINT_NO_LISTENER };
                let expected = Ingress {
                    fate: Fate::Next,
                    mark: Some(MARK_DIRECT),
                    hint: Some(hint),
                    count: None,
                };
                assert_eq!(on_interface(true, Some(&syn(a.stranger, a.own)), &node), expected);
                node.assert_asked(&[Asked::Application]);
            }
        }
    }

    #[test]
    fn an_application_listens_in_the_pod() {
        for a in both_families() {
            for (proxy, fate, counter) in [
                (Proxy::Listens, Fate::Next, None),
                (Proxy::AwayWithinGrace, Fate::Drop, Some(Counter::DroppedProxyAway)),
                (Proxy::Away, Fate::Next, None),
            ] {
                for client in [a.stranger, a.neighbour, a.bypassing] {
                    let node = Node::new(&a, true, proxy);
                    let count = counter.map(|counter| (OWN, counter));
                    let expected = Ingress { fate, mark: Some(MARK_DIRECT), hint: None, count };
                    assert_eq!(on_interface(true, Some(&syn(client, a.own)), &node), expected);
                    node.assert_asked(&[Asked::Application, Asked::Proxy(OWN, LISTENER_INBOUND)]);
                }
            }
        }
    }

    #[test]
    fn the_listener_is_at_hand_when_capture_begins() {
        for a in both_families() {
            for proxy in [Proxy::Listens, Proxy::AwayWithinGrace, Proxy::Away] {
                let node = Node::new(&a, false, proxy);
                let expected = Ingress { mark: Some(MARK_DIRECT), ..Ingress::NEXT };
                let segment = syn(a.stranger, a.preparing);
                assert_eq!(on_interface(true, Some(&segment), &node), expected);
                node.assert_asked(&[Asked::Proxy(PREPARING, LISTENER_INBOUND)]);
            }
        }
    }

    #[test]
    fn what_settings_keep_off_the_proxy_needs_none() {
        for a in both_families() {
            let nothing = Node::new(&a, false, Proxy::Away);
            let inbound = nothing.with_flags(&a, POD_BYPASS_INBOUND);
            let rules = || Node::new(&a, false, Proxy::Away).with_flags(&a, POD_INBOUND_RULES);
            let port = Node { excluded_port: Some(SERVER_PORT), ..rules() };
            let peer = Node { excluded_peer: Some(a.stranger), ..rules() };
            let nothing = || Node::new(&a, false, Proxy::Away);
            let probe = Node { kubelet: Some(a.stranger), ..nothing() };
            let source = Node { probe_source: Some(a.stranger), ..nothing() };
            for node in [inbound, port, peer, probe, source] {
                let expected = Ingress { mark: Some(MARK_DIRECT), ..Ingress::NEXT };
                assert_eq!(on_interface(true, Some(&syn(a.stranger, a.own)), &node), expected);
                node.assert_asked(&[]);
                for proxys in [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE] {
                    let node = Node { excluded_port: Some(proxys), ..rules() };
                    let segment = Segment { dst_port: proxys, ..syn(a.stranger, a.own) };
                    on_interface(true, Some(&segment), &node);
                    assert_ne!(*node.asked.borrow(), [], "{proxys} is not for outsiders");
                }
            }
        }
    }

    #[test]
    fn hbone_comes_to_the_pod() {
        for a in both_families() {
            for (proxy, fate, counter) in [
                (Proxy::Listens, Fate::Next, None),
                (Proxy::AwayWithinGrace, Fate::Drop, Some(Counter::DroppedProxyAway)),
                (Proxy::Away, Fate::Next, None),
            ] {
                // No application has that port: it is not asked for.
                let node = Node::new(&a, false, proxy);
                let segment = Segment { dst_port: PORT_HBONE, ..syn(a.stranger, a.own) };
                let count = counter.map(|counter| (OWN, counter));
                let expected = Ingress { fate, mark: Some(MARK_DIRECT), hint: None, count };
                assert_eq!(on_interface(true, Some(&segment), &node), expected);
                node.assert_asked(&[Asked::Proxy(OWN, LISTENER_HBONE)]);
            }
        }
    }

    fn lookup(local: Addr, remote: Addr, on_lo: bool, kind: u32) -> Lookup {
        let flow = flow(local, remote);
        Lookup { tcp: true, flow, on_lo, hint: Hint { flow, kind } }
    }

    fn to_port(lookup: Lookup, port: u16) -> Lookup {
        let flow = Flow { local_port: port, ..lookup.flow };
        Lookup { flow, hint: Hint { flow, ..lookup.hint }, ..lookup }
    }

    const LO: bool = true;
    const OUTSIDE: bool = false;
    const OUTBOUND: Steer = Steer::Redirect { pod_id: OWN, kind: LISTENER_OUTBOUND };
    const INBOUND: Steer = Steer::Redirect { pod_id: OWN, kind: LISTENER_INBOUND };
    const UNTOUCHED: Steer = Steer::Pass(None);
    const UNKNOWN: Steer = Steer::Refuse(0, Counter::RefusedUnknownAddress);

    fn counted(counter: Counter) -> Steer {
        Steer::Pass(Some((OWN, counter)))
    }

    #[track_caller]
    fn assert_steered(a: &Addresses, rows: &[(&str, Lookup, Steer)]) {
        let node = Node::new(a, true, Proxy::Listens);
        for (scenario, lookup, expected) in rows {
            assert_eq!(steer(lookup, &node), *expected, "{scenario}: {lookup:?}");
        }
    }

    #[test]
    fn the_pod_calls() {
        for a in both_families() {
            let none = HINT_NONE;
            let hbone = to_port(lookup(a.neighbour, a.own, LO, none), PORT_HBONE);
            let rows = [
                ("a stranger", lookup(a.stranger, a.own, LO, none), OUTBOUND),
                (
                    "a stranger, by its other address",
                    lookup(a.stranger, a.own_second, LO, none),
                    OUTBOUND,
                ),
                ("a pod of this node", lookup(a.neighbour, a.own, LO, none), OUTBOUND),
                ("the HBONE port of a pod of this node", hbone, OUTBOUND),
                ("a pod that bypasses", lookup(a.bypassing, a.own, LO, none), OUTBOUND),
                ("a pod that is being prepared", lookup(a.preparing, a.own, LO, none), OUTBOUND),
                ("itself", lookup(a.own, a.own, LO, none), counted(Counter::Local)),
                // The kernel gives the interface that has the address.
                (
                    "itself, as if from outside",
                    lookup(a.own, a.own, OUTSIDE, none),
                    counted(Counter::Local),
                ),
                (
                    "its other address",
                    lookup(a.own_second, a.own, LO, none),
                    counted(Counter::Local),
                ),
                ("loopback", lookup(a.loopback, a.own, LO, none), UNTOUCHED),
                ("loopback from loopback", lookup(a.loopback, a.loopback, LO, none), UNTOUCHED),
                // A stale hint is for another flow.
                (
                    "a stranger, after a packet of the proxy",
                    Lookup {
                        hint: Hint { flow: flow(a.own, a.stranger), kind: HINT_FROM_PROXY },
                        ..lookup(a.stranger, a.own, LO, none)
                    },
                    OUTBOUND,
                ),
            ];
            assert_steered(&a, &rows);
        }
    }

    #[test]
    fn the_pod_is_called() {
        for a in both_families() {
            let none = HINT_NONE;
            let hbone = |remote| to_port(lookup(a.own, remote, OUTSIDE, none), PORT_HBONE);
            let rows = [
                ("by a stranger", lookup(a.own, a.stranger, OUTSIDE, none), INBOUND),
                (
                    "by a stranger, its other address",
                    lookup(a.own_second, a.stranger, OUTSIDE, none),
                    INBOUND,
                ),
                ("by a pod of this node", lookup(a.own, a.neighbour, OUTSIDE, none), INBOUND),
                ("by a pod that bypasses", lookup(a.own, a.bypassing, OUTSIDE, none), INBOUND),
                ("by loopback on the wire", lookup(a.own, a.loopback, OUTSIDE, none), INBOUND),
                ("with HBONE", hbone(a.stranger), counted(Counter::Hbone)),
                ("with HBONE by a pod of this node", hbone(a.neighbour), counted(Counter::Hbone)),
                (
                    "on the proxy's own port",
                    to_port(lookup(a.own, a.stranger, OUTSIDE, none), PORT_INBOUND),
                    INBOUND,
                ),
                (
                    "on the proxy's other own port",
                    to_port(lookup(a.own, a.stranger, OUTSIDE, none), PORT_OUTBOUND),
                    INBOUND,
                ),
                ("with a hint of no kind", lookup(a.own, a.stranger, OUTSIDE, 99), INBOUND),
                (
                    "on lo by nobody known, and no hint",
                    lookup(a.own, a.stranger, LO, none),
                    INBOUND,
                ),
            ];
            assert_steered(&a, &rows);
        }
    }

    #[test]
    fn a_socket_of_the_pod_that_is_bound_to_an_interface_calls() {
        for a in both_families() {
            let by_own = |local, hint| lookup(local, a.own, OUTSIDE, hint);
            assert_steered(
                &a,
                &[
                    ("a stranger", by_own(a.stranger, HINT_FROM_POD), OUTBOUND),
                    ("a neighbour", by_own(a.neighbour, HINT_FROM_POD), OUTBOUND),
                    ("a pod that bypasses", by_own(a.bypassing, HINT_FROM_POD), OUTBOUND),
                    (
                        "a stranger, and tcx has not said so",
                        by_own(a.stranger, HINT_NONE),
                        Steer::Refuse(0, Counter::RefusedUnknownAddress),
                    ),
                ],
            );
        }
    }

    #[test]
    fn settings_keep_calls_to_the_pod_off_the_proxy() {
        const BYPASSED: Steer = Steer::Pass(Some((OWN, Counter::BypassedInbound)));
        for a in both_families() {
            let by = |remote| lookup(a.own, remote, OUTSIDE, HINT_NONE);
            let node = |flags| Node::new(&a, true, Proxy::Listens).with_flags(&a, flags);
            let inbound = node(POD_BYPASS_INBOUND);
            let port = Node { excluded_port: Some(SERVER_PORT), ..node(POD_INBOUND_RULES) };
            let peer = Node { excluded_peer: Some(a.stranger), ..node(POD_INBOUND_RULES) };
            let unflagged = Node { excluded_port: Some(SERVER_PORT), ..node(0) };

            assert_eq!(steer(&by(a.stranger), &inbound), BYPASSED);
            assert_eq!(steer(&by(a.stranger), &port), BYPASSED);
            assert_eq!(steer(&by(a.stranger), &peer), BYPASSED);
            assert_eq!(steer(&to_port(by(a.stranger), 9090), &port), INBOUND);
            assert_eq!(steer(&by(a.neighbour), &peer), INBOUND);
            assert_eq!(steer(&by(a.stranger), &unflagged), INBOUND);
            for proxys in [PORT_OUTBOUND, PORT_INBOUND] {
                assert_eq!(steer(&to_port(by(a.stranger), proxys), &inbound), INBOUND);
            }
            let hbone = to_port(by(a.stranger), PORT_HBONE);
            assert_eq!(steer(&hbone, &inbound), counted(Counter::Hbone));
            let calls = lookup(a.stranger, a.own, LO, HINT_NONE);
            assert_eq!(steer(&calls, &inbound), OUTBOUND, "outbound is captured all the same");
            let from_proxy = lookup(a.own, a.stranger, LO, HINT_FROM_PROXY);
            assert_eq!(steer(&from_proxy, &inbound), counted(Counter::FromProxy));
        }
    }

    #[test]
    fn kubelet_reaches_the_application_and_not_the_proxy_itself() {
        for a in both_families() {
            let by = |remote| lookup(a.own, remote, OUTSIDE, HINT_NONE);
            let node = || Node::new(&a, true, Proxy::Listens);
            for (node, counter) in [
                (Node { kubelet: Some(a.stranger), ..node() }, Counter::KubeletProbe),
                (Node { probe_source: Some(a.stranger), ..node() }, Counter::ProbeSource),
            ] {
                assert_eq!(steer(&by(a.stranger), &node), counted(counter));
                assert_eq!(steer(&by(a.neighbour), &node), INBOUND);
                for proxys in [PORT_OUTBOUND, PORT_INBOUND] {
                    assert_eq!(steer(&to_port(by(a.stranger), proxys), &node), INBOUND);
                }
                let calls = lookup(a.stranger, a.own, LO, HINT_NONE);
                assert_eq!(steer(&calls, &node), OUTBOUND);
            }
        }
    }

    #[test]
    fn the_proxy_calls_the_application() {
        for a in both_families() {
            let rows = [
                ("for a stranger", lookup(a.own, a.stranger, LO, HINT_FROM_PROXY)),
                ("for a pod of this node", lookup(a.own, a.neighbour, LO, HINT_FROM_PROXY)),
                ("for a pod that bypasses", lookup(a.own, a.bypassing, LO, HINT_FROM_PROXY)),
                // The kernel gives the interface that has the address.
                ("as if from outside", lookup(a.own, a.stranger, OUTSIDE, HINT_FROM_PROXY)),
            ]
            .map(|(scenario, lookup)| (scenario, lookup, counted(Counter::FromProxy)));
            assert_steered(&a, &rows);
        }
    }

    #[test]
    fn a_hint_is_for_one_flow_only() {
        for a in both_families() {
            for kind in [HINT_FROM_PROXY, HINT_QUESTION, HINT_NO_LISTENER] {
                let good = lookup(a.own, a.stranger, OUTSIDE, kind);
                assert_ne!(steer(&good, &Node::new(&a, true, Proxy::Listens)), INBOUND);
                let f = good.flow;
                let rows = [
                    ("local", Flow { local: a.own_second, ..f }),
                    ("remote", Flow { remote: a.bypassing, ..f }),
                    ("local port", Flow { local_port: f.local_port + 1, ..f }),
                    ("remote port", Flow { remote_port: f.remote_port + 1, ..f }),
                ]
                .map(|(other, flow)| {
                    (other, Lookup { hint: Hint { flow, kind }, ..good }, INBOUND)
                });
                assert_steered(&a, &rows);
            }
        }
    }

    #[test]
    fn where_nobody_listened_nobody_who_listens_by_now_is_reached() {
        for a in both_families() {
            let called = |remote| lookup(a.own, remote, OUTSIDE, HINT_NO_LISTENER);
            let rows = [
                ("by a stranger", called(a.stranger)),
                ("by a pod of this node", called(a.neighbour)),
                ("by who pretends to be the pod", called(a.own)),
                ("with HBONE", to_port(called(a.stranger), PORT_HBONE)),
            ]
            .map(|(scenario, lookup)| (scenario, lookup, Steer::Refuse(OWN, Counter::NoListener)));
            assert_steered(&a, &rows);
        }
    }

    #[test]
    fn what_tcx_asks_the_kernel_answers_and_nobody_counts() {
        for a in both_families() {
            for interface in [LO, OUTSIDE] {
                let asked = |local, remote| lookup(local, remote, interface, HINT_QUESTION);
                let rows = [
                    ("about a stranger's call", asked(a.own, a.stranger)),
                    ("about a neighbour's", asked(a.own, a.neighbour)),
                    ("about HBONE", to_port(asked(a.own, a.stranger), PORT_HBONE)),
                ]
                .map(|(scenario, lookup)| (scenario, lookup, UNTOUCHED));
                assert_steered(&a, &rows);
            }
        }
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let link_local = Addr::from("fe80::1".parse::<IpAddr>().unwrap());
        for a in both_families() {
            let udp = |lookup| Lookup { tcp: false, ..lookup };
            let none = HINT_NONE;
            let rows = [
                ("UDP to a stranger", udp(lookup(a.stranger, a.own, LO, none))),
                ("UDP to the pod", udp(lookup(a.own, a.stranger, OUTSIDE, none))),
                ("link-local", lookup(link_local, a.own, LO, none)),
                ("link-local from outside", lookup(link_local, a.stranger, OUTSIDE, none)),
                ("to a pod that bypasses", lookup(a.bypassing, a.stranger, OUTSIDE, none)),
                ("to a pod that is being prepared", lookup(a.preparing, a.stranger, OUTSIDE, none)),
                (
                    "a pod that is being prepared calls itself",
                    lookup(a.preparing, a.preparing, LO, none),
                ),
            ]
            .map(|(scenario, lookup)| (scenario, lookup, UNTOUCHED));
            assert_steered(&a, &rows);
        }
    }

    #[test]
    fn addresses_that_nobody_knows_are_refused() {
        for a in both_families() {
            let rows = [
                ("on lo", lookup(a.stranger, a.stranger, LO, HINT_NONE)),
                ("from outside", lookup(a.stranger, a.stranger, OUTSIDE, HINT_NONE)),
                (
                    "the pod's as a source from outside",
                    lookup(a.stranger, a.own, OUTSIDE, HINT_NONE),
                ),
                ("the proxy's to a stranger", lookup(a.stranger, a.stranger, LO, HINT_FROM_PROXY)),
            ]
            .map(|(scenario, lookup)| (scenario, lookup, UNKNOWN));
            assert_steered(&a, &rows);
        }
    }

    #[test]
    fn redirections_are_counted_by_their_direction() {
        assert_eq!(redirected(LISTENER_OUTBOUND), Counter::RedirectedOutbound);
        assert_eq!(redirected(LISTENER_INBOUND), Counter::RedirectedInbound);
    }
}
