use std::{cell::RefCell, net::IpAddr};

use super::*;

#[path = "fuzz.rs"]
mod fuzz;

const OWN: PodId = 1;
const NEIGHBOUR: PodId = 2;

const CLIENT_PORT: u16 = 40_000;
const SERVER_PORT: u16 = 8080;

/// What `pods` says about the pod.
const UNKNOWN: Option<u32> = None;
/// Without `POD_ENROLLED`, the other flags do not count.
const BYPASSING: Option<u32> = Some(POD_CAPTURE | POD_DNS);
const PREPARING: Option<u32> = Some(POD_ENROLLED);
const CAPTURING: Option<u32> = Some(POD_ENROLLED | POD_CAPTURE);

fn capturing(flags: u32) -> Option<u32> {
    CAPTURING.map(|capturing| capturing | flags)
}

/// Who is who, in one family.
#[derive(Clone, Copy)]
struct Addresses {
    own: Addr,
    own_second: Addr,
    neighbour: Addr,
    stranger: Addr,
    /// On no interface: the address of a guest behind a virtual interface, or one that is local only by a
    /// route.
    guest: Addr,
    loopback: Addr,
    loopback_other: Addr,
}

pub(crate) fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

pub(crate) fn link_local() -> Addr {
    addr("fe80::1")
}

fn both_families() -> [Addresses; 2] {
    [
        Addresses {
            own: addr("10.0.0.2"),
            own_second: addr("10.0.0.3"),
            neighbour: addr("10.0.0.10"),
            stranger: addr("192.0.2.1"),
            guest: addr("10.44.0.2"),
            loopback: addr("127.0.0.1"),
            loopback_other: addr("127.8.8.8"),
        },
        Addresses {
            own: addr("fd00::2"),
            own_second: addr("fd00::3"),
            neighbour: addr("fd00::10"),
            stranger: addr("2001:db8::1"),
            guest: addr("fd44::2"),
            loopback: addr("::1"),
            loopback_other: addr("::1"),
        },
    ]
}

/// What a decision has asked, apart from maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Receiver,
    ProxySent,
    SenderListens,
    Proxy(u32),
}

/// The surroundings of the pod [`OWN`]. Questions about any other pod fail the test.
struct Node {
    pod: Option<u32>,
    own: [Addr; 2],
    /// The port that `inbound_ports` and `inbound_ranges` exclude.
    excluded_port: Option<u16>,
    excluded_peer: Option<Addr>,
    /// The address whose connections are in `kubelet_flows`.
    kubelet: Option<Addr>,
    probe_source: Option<Addr>,
    /// The address that `outbound_ports` and `outbound_ranges` exclude.
    excluded_outbound: Option<Addr>,
    receiver: Receiver,
    /// Whether a guest's connection waits in a SYN cookie.
    cookie: bool,
    proxy: Proxy,
    strays: bool,
    forwarded: bool,
    by_lo: bool,
    /// Who owns the socket that sent the packet.
    sender: Sender,
    /// Whether a socket of the proxy is the sender in this connection.
    proxy_sent: bool,
    /// Whether anybody listens at the segment's source.
    sender_listens: bool,
    half_open: bool,
    was_half_open: bool,
    marked_listener: bool,
    settled: Option<u32>,
    /// Whether the connection is noted as direct.
    noted_direct: bool,
    /// Whether a connection's own socket sent it.
    connections: bool,
    asked: RefCell<Vec<Asked>>,
}

impl Node {
    fn new(a: &Addresses, pod: Option<u32>) -> Self {
        Self {
            pod,
            own: [a.own, a.own_second],
            excluded_port: None,
            excluded_peer: None,
            kubelet: None,
            probe_source: None,
            excluded_outbound: None,
            receiver: Receiver::Listener,
            cookie: false,
            proxy: Proxy::Listens,
            strays: false,
            forwarded: false,
            by_lo: false,
            sender: Sender::Application,
            proxy_sent: false,
            sender_listens: true,
            half_open: false,
            was_half_open: false,
            marked_listener: false,
            settled: None,
            noted_direct: false,
            connections: true,
            asked: RefCell::default(),
        }
    }

    fn ask(&self, asked: Asked, answer: bool) -> bool {
        self.asked.borrow_mut().push(asked);
        answer
    }

    /// What was asked since the last call.
    #[track_caller]
    fn assert_asked(&self, asked: &[Asked]) {
        assert_eq!(self.asked.take(), asked);
    }
}

#[track_caller]
fn only_own(pod_id: PodId) {
    assert_eq!(pod_id, OWN, "the pod that the program runs in is the only one");
}

impl Pods for Node {
    fn pod(&self, pod_id: PodId) -> Option<u32> {
        only_own(pod_id);
        self.pod
    }

    fn pod_on(&self, device: u64) -> PodId {
        PodId::try_from(device).unwrap()
    }

    fn is_own(&self, pod_id: PodId, addr: &Addr) -> bool {
        only_own(pod_id);
        self.own.contains(addr)
    }

    fn excludes_inbound(&self, pod_id: PodId, flow: &Flow) -> bool {
        only_own(pod_id);
        self.excluded_port == Some(flow.local_port) || self.excluded_peer == Some(flow.remote)
    }

    fn is_kubelets(&self, flow: &Flow) -> bool {
        self.kubelet == Some(flow.remote)
    }

    fn is_probe_source(&self, peer: &Addr) -> bool {
        self.probe_source == Some(*peer)
    }

    fn excludes_outbound(&self, pod_id: PodId, flow: &Flow) -> bool {
        only_own(pod_id);
        self.excluded_outbound == Some(flow.remote)
    }
}

impl Env for Node {
    fn pod_id(&self) -> PodId {
        OWN
    }

    fn receiver(&self, segment: &Segment) -> Receiver {
        if segment.src_port != 0 {
            self.asked.borrow_mut().push(Asked::Receiver);
            return self.receiver;
        }
        let listens = self.ask(Asked::SenderListens, self.sender_listens);
        if listens { Receiver::Listener } else { Receiver::Nobody }
    }

    fn completes_cookie(&self, pod_id: PodId) -> bool {
        only_own(pod_id);
        self.cookie
    }

    fn proxy(&self, pod_id: PodId, kind: u32, _: &Segment) -> Proxy {
        only_own(pod_id);
        self.asked.borrow_mut().push(Asked::Proxy(kind));
        self.proxy
    }

    fn have_strays(&self) -> bool {
        self.strays
    }

    fn strays(&self, pod_id: PodId) -> bool {
        only_own(pod_id);
        self.strays
    }

    fn is_forwarded(&self) -> bool {
        self.forwarded
    }
    fn came_by_lo(&self) -> bool {
        self.by_lo
    }

    fn sender(&self) -> Sender {
        self.sender
    }

    fn has_proxy_sent(&self, _: &Segment) -> bool {
        self.ask(Asked::ProxySent, self.proxy_sent)
    }

    fn has_half_open(&self, pod_id: PodId) -> bool {
        only_own(pod_id);
        self.half_open
    }

    fn was_half_open(&self, pod_id: PodId, _: &Segment) -> bool {
        only_own(pod_id);
        self.was_half_open
    }

    fn settled(&self) -> Option<u32> {
        self.settled
    }

    fn has_marked_listener(&self) -> bool {
        self.marked_listener
    }

    fn is_noted_direct(&self, pod_id: PodId, _: &Segment) -> bool {
        only_own(pod_id);
        self.noted_direct
    }

    fn is_connections(&self) -> bool {
        self.connections && !self.forwarded
    }
}

const PROXY_STATES: [Proxy; 3] = [Proxy::Listens, Proxy::AwayWithinGrace, Proxy::Away];
const RECEIVERS: [Receiver; 5] = [
    Receiver::Nobody,
    Receiver::Listener,
    Receiver::HalfOpen,
    Receiver::TimeWait,
    Receiver::Connection,
];
const PROXYS_PORTS: [u16; 3] = [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE];

/// Every setting that lets a stranger in past the proxy, and its counter. The pod also has `flags`.
fn past_proxy_ways(a: &Addresses, flags: u32) -> [(Node, Counter); 5] {
    let new = |more| Node::new(a, Some(POD_ENROLLED | flags | more));
    let stranger = Some(a.stranger);
    let rules = || new(POD_INBOUND_RULES);
    [
        (new(POD_BYPASS_INBOUND), Counter::BypassedInbound),
        (Node { excluded_port: Some(SERVER_PORT), ..rules() }, Counter::BypassedInbound),
        (Node { excluded_peer: stranger, ..rules() }, Counter::BypassedInbound),
        (Node { kubelet: stranger, ..new(0) }, Counter::KubeletProbe),
        (Node { probe_source: stranger, ..new(0) }, Counter::ProbeSource),
    ]
}

/// The client opens a connection.
fn syn(src: Addr, dst: Addr) -> Segment {
    let (src_port, dst_port) = (CLIENT_PORT, SERVER_PORT);
    Segment { src, dst, src_port, dst_port, opens: true, accepts: false, resets: false }
}

/// A later packet of the client.
fn data(src: Addr, dst: Addr) -> Segment {
    Segment { opens: false, ..syn(src, dst) }
}

/// The server's packets.
fn reply(src: Addr, dst: Addr) -> Segment {
    let (src_port, dst_port) = (SERVER_PORT, CLIENT_PORT);
    Segment { src_port, dst_port, ..data(src, dst) }
}

fn syn_ack(src: Addr, dst: Addr) -> Segment {
    Segment { accepts: true, ..reply(src, dst) }
}

fn flow(local: Addr, remote: Addr) -> Flow {
    Flow { local, remote, local_port: SERVER_PORT, remote_port: CLIENT_PORT }
}

/// Verdicts on the pod itself.
/// [`super::on_lo`]; what needs no pod is said of this one.
fn on_lo(mark: u32, segment: Option<&Segment>, node: &Node) -> Verdict {
    let verdict = super::on_lo(mark, segment, node);
    let needs_none = verdict.pod_id == 0 && verdict.hint.is_some();
    if needs_none { Verdict { pod_id: OWN, ..verdict } } else { verdict }
}

const GOES_ON: Verdict = Verdict { pod_id: OWN, ..Verdict::NEXT };
const MARKED: Verdict = Verdict { mark: code(MARK_DIRECT), ..GOES_ON };
/// The proxy is to accept it.
const FOR_INBOUND: Verdict = Verdict { mark: code(MARK_INBOUND), ..GOES_ON };

fn refused(verdict: Verdict, fate: Fate, counter: Counter) -> Verdict {
    Verdict { fate, count: Some(counter), ..verdict }
}

#[test]
fn only_the_bits_of_the_mesh_are_read_and_written() {
    assert_eq!(mesh_mark(0xabcd_e539), MARK_PROXY);
    assert_eq!(with_mesh_mark(0xabcd_e539, MARK_DIRECT), 0xabcd_e0d1);
    assert_eq!(with_mesh_mark(0xffff_ffff, 0), 0xffff_f000);
}

#[test]
fn the_proxy_delivers_to_the_application() {
    let hint = code(HINT_FROM_PROXY);
    let delivered = Verdict { mark: code(MARK_REDIRECTED), hint, ..GOES_ON };
    for a in both_families() {
        // From any client's address, to any address of the namespace, and for every packet, not only the
        // SYN.
        for (client, server) in [(a.stranger, a.own), (a.own, a.own_second), (a.stranger, a.guest)]
        {
            for pod in [UNKNOWN, BYPASSING, PREPARING, CAPTURING] {
                for mark in [MARK_PROXY, 0xabcd_e000 | MARK_PROXY] {
                    let node = Node::new(&a, pod);
                    let open = syn(client, server);
                    assert_eq!(on_lo(mark, Some(&open), &node), delivered);
                    node.assert_asked(&[Asked::Receiver]);
                    for later in [data(client, server), syn_ack(client, server)] {
                        assert_eq!(on_lo(mark, Some(&later), &node), delivered);
                        node.assert_asked(&[]);
                    }
                }
            }
        }
    }
}

#[test]
fn the_proxy_delivers_although_its_mark_is_lost() {
    let hint = code(HINT_FROM_PROXY);
    let delivered = Verdict { mark: code(MARK_REDIRECTED), hint, ..GOES_ON };
    for a in both_families() {
        for pod in [UNKNOWN, BYPASSING, PREPARING, CAPTURING] {
            for mark in [0, MARK_REDIRECTED, MARK_RESCUED, 0xabcd_e000] {
                for server in [a.own, a.own_second] {
                    let node = Node { proxy_sent: true, ..Node::new(&a, pod) };
                    let open = syn(a.stranger, server);
                    assert_eq!(on_lo(mark, Some(&open), &node), delivered);
                    node.assert_asked(&[Asked::ProxySent, Asked::Receiver]);
                    let node = Node { receiver: Receiver::Connection, ..node };
                    let taken = refused(GOES_ON, Fate::Reset, Counter::RefusedPortTaken);
                    assert_eq!(on_lo(mark, Some(&open), &node), taken);
                    // The application's accepted socket has the mark from the SYN.
                    for later in [data(a.stranger, server), syn_ack(a.stranger, server)] {
                        assert_eq!(on_lo(mark, Some(&later), &node), FROM_POD);
                    }
                }
            }
        }
    }
}

#[test]
fn the_proxy_calls_by_a_port_that_another_connection_has() {
    for a in both_families() {
        for pod in [UNKNOWN, PREPARING, CAPTURING] {
            let node = Node { receiver: Receiver::Connection, ..Node::new(&a, pod) };
            let found = on_lo(MARK_PROXY, Some(&syn(a.stranger, a.own)), &node);
            assert_eq!(found, refused(GOES_ON, Fate::Reset, Counter::RefusedPortTaken));
            let open = on_lo(MARK_PROXY, Some(&data(a.stranger, a.own)), &node);
            assert_eq!(open.fate, Fate::Next, "it is that connection's");
        }
    }
}

#[test]
fn on_lo_what_cannot_be_parsed_has_no_hint() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURING);
        let proxys = Verdict { mark: code(MARK_REDIRECTED), ..Verdict::NEXT };
        assert_eq!(on_lo(MARK_PROXY, None, &node), proxys);
        for mark in [0, MARK_DIRECT, MARK_VIRTUAL, MARK_RESCUED] {
            assert_eq!(on_lo(mark, None, &node), Verdict::NEXT);
        }
        node.assert_asked(&[]);
    }
}

const FROM_POD: Verdict = Verdict { hint: code(HINT_FROM_POD), ..GOES_ON };

#[test]
fn the_pod_opens_a_connection() {
    for a in both_families() {
        for (proxy, expected) in [
            (Proxy::Listens, FROM_POD),
            (Proxy::AwayWithinGrace, refused(FROM_POD, Fate::Drop, Counter::DroppedProxyAway)),
            (Proxy::Away, refused(FROM_POD, Fate::Reset, Counter::RefusedProxyAway)),
        ] {
            // A pod that leaves the mesh still needs its proxy on `lo`. Nothing of an unknown pod gets
            // past it.
            for pod in [UNKNOWN, PREPARING, CAPTURING, capturing(u32::MAX)] {
                // From any address: one that is local by a route, a VIP on `lo`, a forged one. To
                // neighbors, too: the caller's proxy is the one that counts.
                for client in [a.own, a.own_second, a.guest, a.neighbour, a.loopback] {
                    for server in [a.stranger, a.neighbour, a.guest] {
                        // Of all marks, only the proxy's makes a difference.
                        for mark in [0, MARK_REDIRECTED, MARK_DIRECT, MARK_VIRTUAL, 0xabcd_e000] {
                            let node = Node { proxy, ..Node::new(&a, pod) };
                            let found = on_lo(mark, Some(&syn(client, server)), &node);
                            let mark =
                                if mark == MARK_DIRECT { code(MARK_REDIRECTED) } else { None };
                            assert_eq!(found, Verdict { mark, ..expected });
                            let asked = node.asked.take();
                            assert_eq!(asked.last(), Some(&Asked::Proxy(LISTENER_OUTBOUND)));
                            let strays = pod.map_or(&[][..], |_| &[Asked::ProxySent]);
                            assert_eq!(asked[..asked.len() - 1], *strays);
                        }
                        // What the guard moved here belongs here, whoever sent it.
                        let excluded_outbound = Some(server);
                        let node = Node { excluded_outbound, ..Node::new(&a, pod) };
                        let node = Node { proxy, proxy_sent: true, strays: true, ..node };
                        for mark in [MARK_RESCUED, 0xabcd_e000 | MARK_RESCUED] {
                            let found = on_lo(mark, Some(&syn(client, server)), &node);
                            assert_eq!(found, expected);
                            node.assert_asked(&[Asked::Proxy(LISTENER_OUTBOUND)]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn on_lo_everything_else_goes_on_as_the_pods() {
    for a in both_families() {
        for (scenario, pod, segment) in [
            ("an open connection", CAPTURING, data(a.own, a.stranger)),
            ("an open connection, answered", CAPTURING, reply(a.own, a.stranger)),
            ("loopback calls loopback", CAPTURING, syn(a.loopback, a.loopback)),
            ("loopback answers loopback", CAPTURING, syn_ack(a.loopback, a.loopback)),
            ("the pod calls loopback", CAPTURING, syn(a.own, a.loopback_other)),
            ("the pod calls a link-local address", CAPTURING, syn(a.own, link_local())),
            ("the pod calls itself", CAPTURING, syn(a.own, a.own)),
            ("the pod calls its other address", CAPTURING, syn(a.own, a.own_second)),
            ("the pod answers itself", CAPTURING, syn_ack(a.own, a.own_second)),
            ("a pod that bypasses calls", BYPASSING, syn(a.own, a.stranger)),
        ] {
            let node = Node { proxy: Proxy::Away, ..Node::new(&a, pod) };
            assert_eq!(on_lo(0, Some(&segment), &node), FROM_POD, "{scenario}");
            // Who is called does not become a direct connection by its caller's mark.
            let mark = if segment.opens { code(MARK_REDIRECTED) } else { None };
            let found = on_lo(MARK_DIRECT, Some(&segment), &node);
            assert_eq!(found, Verdict { mark, ..FROM_POD }, "{scenario}");
            assert!(!node.asked.take().contains(&Asked::Proxy(LISTENER_OUTBOUND)));
        }
    }
}

/// The guard lets it pass.
const LEAVES: Verdict = Verdict { fate: Fate::Leave, mark: code(MARK_DIRECT), ..GOES_ON };
const LEAVES_FIRST: Verdict = Verdict { count: Some(Counter::RescuedDirect), ..LEAVES };

#[test]
fn an_answer_past_the_proxy_has_lost_its_mark_and_leaves_all_the_same() {
    for a in both_families() {
        let accepts = syn_ack(a.own, a.stranger);
        let later = reply(a.own, a.stranger);
        for flags in [0, POD_CAPTURE] {
            for (node, _) in past_proxy_ways(&a, flags) {
                assert_eq!(on_lo(0, Some(&accepts), &node), LEAVES_FIRST);
                node.assert_asked(&[Asked::Receiver, Asked::SenderListens]);
                // Connections are counted, not packets. Before one has strayed, nothing is asked.
                assert_eq!(on_lo(0, Some(&later), &node), FROM_POD);
                node.assert_asked(&[]);
                let node = Node { strays: true, ..node };
                assert_eq!(on_lo(0, Some(&later), &node), LEAVES);
                node.assert_asked(&[Asked::Receiver, Asked::SenderListens]);
                for segment in [accepts, later] {
                    let home = on_lo(MARK_RESCUED, Some(&segment), &node);
                    assert_eq!(home, FROM_POD, "the guard has brought it");
                    node.assert_asked(&[]);
                }

                let peers = [node.kubelet, node.probe_source, node.excluded_peer];
                let others = peers.iter().flatten().map(|_| a.neighbour);
                for to in [a.own_second, a.loopback].into_iter().chain(others) {
                    for segment in [syn_ack(a.own, to), reply(a.own, to)] {
                        assert_eq!(on_lo(0, Some(&segment), &node), FROM_POD, "{to:?}");
                    }
                }
                for port in PROXYS_PORTS {
                    let proxys = Segment { src_port: port, ..accepts };
                    assert_eq!(on_lo(0, Some(&proxys), &node), FROM_POD, "port {port}");
                }
                let calls = Node { sender_listens: false, ..node };
                for segment in [accepts, later] {
                    let found = on_lo(0, Some(&segment), &calls);
                    assert_eq!(found, FROM_POD, "it is the pod that has called");
                }
                let here = Node { receiver: Receiver::Connection, sender_listens: true, ..calls };
                for segment in [accepts, later] {
                    assert_eq!(on_lo(0, Some(&segment), &here), FROM_POD, "its peer is here");
                }
                let unknown = Node { receiver: Receiver::Listener, pod: UNKNOWN, ..here };
                assert_eq!(on_lo(0, Some(&accepts), &unknown), FROM_POD);
            }
        }
    }
}

/// Its SYN came before there was anything that could mark it.
#[test]
fn an_answer_that_was_half_open_when_the_capture_began_has_no_mark_and_leaves_all_the_same() {
    for a in both_families() {
        let (accepts, later) = (syn_ack(a.own, a.stranger), reply(a.own, a.stranger));
        let node = Node { was_half_open: true, ..Node::new(&a, CAPTURING) };
        assert_eq!(on_lo(0, Some(&accepts), &node), LEAVES_FIRST);
        assert_eq!(on_lo(0, Some(&later), &node), FROM_POD, "nothing has strayed");
        let node = Node { strays: true, ..node };
        assert_eq!(on_lo(0, Some(&later), &node), LEAVES);
        let open = syn(a.own, a.stranger);
        assert_eq!(on_lo(0, Some(&open), &node), FROM_POD, "it is another connection");
        for receiver in [Receiver::HalfOpen, Receiver::Connection] {
            let node = Node { receiver, was_half_open: true, ..Node::new(&a, CAPTURING) };
            assert_eq!(on_lo(0, Some(&accepts), &node), FROM_POD, "its peer is here");
        }
    }
}

#[test]
fn a_call_that_settings_exclude_is_brought_to_lo_and_leaves_all_the_same() {
    for a in both_families() {
        let open = syn(a.own, a.stranger);
        let later = [data(a.own, a.stranger), reply(a.own, a.stranger)];
        let excluding = |pod| Node { excluded_outbound: Some(a.stranger), ..Node::new(&a, pod) };
        for pod in [capturing(POD_OUTBOUND_RULES), PREPARING.map(|p| p | POD_OUTBOUND_RULES)] {
            for proxy in PROXY_STATES {
                // It does not matter that nobody listens there, or who has a socket here.
                for receiver in RECEIVERS {
                    let node = Node { proxy, receiver, ..excluding(pod) };
                    let node = Node { sender_listens: false, ..node };
                    for mark in [0, MARK_REDIRECTED, MARK_DIRECT, MARK_VIRTUAL, 0xabcd_e000] {
                        assert_eq!(on_lo(mark, Some(&open), &node), LEAVES_FIRST);
                        node.assert_asked(&[]);
                    }
                }
            }
            let node = Node { sender_listens: false, ..excluding(pod) };
            for segment in later {
                assert_eq!(on_lo(0, Some(&segment), &node), FROM_POD, "nothing has strayed");
                node.assert_asked(&[]);
            }
            let accepts = syn_ack(a.own, a.stranger);
            assert_eq!(on_lo(0, Some(&accepts), &node), LEAVES_FIRST);
            let node = Node { strays: true, ..node };
            for segment in later {
                assert_eq!(on_lo(0, Some(&segment), &node), LEAVES);
            }
            node.asked.take();
            for to in [a.own_second, a.loopback] {
                let node = Node { excluded_outbound: Some(to), ..excluding(pod) };
                let node = Node { strays: true, ..node };
                for segment in [syn(a.own, to), syn_ack(a.own, to), data(a.own, to)] {
                    assert_eq!(on_lo(0, Some(&segment), &node), FROM_POD, "it is here");
                }
            }
            let here = Node { receiver: Receiver::Connection, ..node };
            for segment in later.into_iter().chain([accepts]) {
                assert_eq!(on_lo(0, Some(&segment), &here), FROM_POD, "its peer is here");
                here.assert_asked(&[Asked::Receiver]);
            }
        }
        // Without the flag, the rules are not read.
        for pod in [CAPTURING, PREPARING, UNKNOWN] {
            let node = Node { strays: true, ..excluding(pod) };
            for segment in later.into_iter().chain([open]) {
                assert_eq!(on_lo(0, Some(&segment), &node), FROM_POD);
            }
        }
    }
}

#[test]
fn the_proxys_own_call_has_lost_its_mark_and_leaves_all_the_same() {
    for a in both_families() {
        for pod in [BYPASSING, PREPARING, CAPTURING, capturing(POD_OUTBOUND_RULES)] {
            for server in [a.stranger, a.neighbour, a.guest, link_local()] {
                let open = syn(a.own, server);
                let node = Node { proxy_sent: true, ..Node::new(&a, pod) };
                assert_eq!(on_lo(0, Some(&open), &node), LEAVES_FIRST);
                node.assert_asked(&[Asked::ProxySent]);
                let later = data(a.own, server);
                assert_eq!(on_lo(0, Some(&later), &node), FROM_POD, "nothing has strayed");
                node.assert_asked(&[]);
                let node = Node { strays: true, ..node };
                assert_eq!(on_lo(0, Some(&later), &node), LEAVES);
                node.assert_asked(&[Asked::Receiver, Asked::SenderListens, Asked::ProxySent]);
                let here = Node { receiver: Receiver::Connection, ..node };
                assert_eq!(on_lo(0, Some(&later), &here), FROM_POD, "its peer is here");
                let others = Node { receiver: Receiver::Listener, proxy_sent: false, ..here };
                assert_eq!(on_lo(0, Some(&later), &others), FROM_POD, "somebody else's");
                let unknown = Node { pod: UNKNOWN, proxy_sent: true, ..others };
                for segment in [open, later] {
                    assert_eq!(on_lo(0, Some(&segment), &unknown), FROM_POD);
                }
            }
        }
    }
}

#[test]
fn what_is_not_ip_is_left_alone() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURING);
        assert_eq!(on_interface(false, None, &node), Verdict::NEXT);
        let interface = Virtual { pod_id: OWN, flags: VIRTUAL_CAPTURE };
        assert_eq!(on_virtual(false, None, false, &interface, &node), Verdict::NEXT);
        node.assert_asked(&[]);
    }
}

#[test]
fn what_comes_from_outside_is_marked_and_goes_on() {
    for a in both_families() {
        for (scenario, pod, segment) in [
            ("not TCP, or not to be parsed", CAPTURING, None),
            ("an open connection", CAPTURING, Some(data(a.stranger, a.own))),
            ("an answer", CAPTURING, Some(syn_ack(a.stranger, a.own))),
            ("an open connection, forged", CAPTURING, Some(data(a.own, a.own))),
            ("to a pod that bypasses", BYPASSING, Some(syn(a.stranger, a.own))),
            ("to a pod that nothing is known of", UNKNOWN, Some(syn(a.stranger, a.own))),
        ] {
            let absent = Node { proxy: Proxy::Away, ..Node::new(&a, pod) };
            let node = Node { receiver: Receiver::Nobody, ..absent };
            let pod_id = if segment.is_some_and(|s| s.opens) { OWN } else { 0 };
            let found = on_interface(true, segment.as_ref(), &node);
            assert_eq!(found, Verdict { pod_id, ..MARKED }, "{scenario}");
            node.assert_asked(&[]);
        }
    }
}

#[test]
fn who_pretends_to_be_the_pod_itself_or_its_loopback_is_dropped() {
    for a in both_families() {
        for (src, dst) in [
            (a.own, a.own),
            (a.own_second, a.own),
            (a.own, a.guest),
            (a.loopback, a.own),
            (a.loopback_other, a.own),
            (a.stranger, a.loopback),
            (a.loopback, a.loopback_other),
        ] {
            for flags in [0, POD_CAPTURE] {
                // No setting lets them in.
                for (node, _) in past_proxy_ways(&a, flags) {
                    for dst_port in [SERVER_PORT, PORT_HBONE] {
                        let segment = Segment { dst_port, ..syn(src, dst) };
                        let found = on_interface(true, Some(&segment), &node);
                        let counter = Counter::RefusedForgedAddress;
                        assert_eq!(found, refused(MARKED, Fate::Drop, counter));
                        node.assert_asked(&[]);
                    }
                }
            }
        }
    }
}

#[test]
fn nobody_listens_in_the_pod() {
    for a in both_families() {
        for own in [a.own, a.own_second] {
            // Whether the proxy listens is not asked.
            for proxy in PROXY_STATES {
                let deaf = Node { receiver: Receiver::Nobody, ..Node::new(&a, CAPTURING) };
                let node = Node { proxy, ..deaf };
                let found = on_interface(true, Some(&syn(a.stranger, own)), &node);
                assert_eq!(found, refused(FOR_INBOUND, Fate::Reset, Counter::NoListener));
                node.assert_asked(&[Asked::Receiver]);
            }
        }
    }
}

/// The verdict on a call from outside, depending on the proxy, while all calls are captured.
fn called(proxy: Proxy) -> Verdict {
    match proxy {
        Proxy::AwayWithinGrace => refused(FOR_INBOUND, Fate::Drop, Counter::DroppedProxyAway),
        // `sk_lookup` refuses.
        Proxy::Listens | Proxy::Away => FOR_INBOUND,
    }
}

#[test]
fn an_application_listens_in_the_pod() {
    for a in both_families() {
        for proxy in PROXY_STATES {
            for client in [a.stranger, a.neighbour, link_local()] {
                // On the proxy's own ports, too.
                for dst_port in [SERVER_PORT, PORT_OUTBOUND, PORT_INBOUND] {
                    let node = Node { proxy, ..Node::new(&a, CAPTURING) };
                    let segment = Segment { dst_port, ..syn(client, a.own) };
                    assert_eq!(on_interface(true, Some(&segment), &node), called(proxy));
                    node.assert_asked(&[Asked::Receiver, Asked::Proxy(LISTENER_INBOUND)]);
                }
            }
        }
    }
}

#[test]
fn who_comes_for_another_address_is_nobodys_here() {
    for a in both_families() {
        for (pod, expected) in [
            (PREPARING, MARKED),
            (CAPTURING, FOR_INBOUND),
            (capturing(POD_INBOUND_RULES), FOR_INBOUND),
        ] {
            // It is forwarded, or its destination is the pod's only by a route.
            for dst in [a.guest, a.neighbour, a.stranger, link_local()] {
                for dst_port in [SERVER_PORT, PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE] {
                    let away = Node { proxy: Proxy::Away, ..Node::new(&a, pod) };
                    let node = Node { receiver: Receiver::Nobody, ..away };
                    let segment = Segment { dst_port, ..syn(a.neighbour, dst) };
                    assert_eq!(on_interface(true, Some(&segment), &node), expected);
                    node.assert_asked(&[]);
                }
            }
        }
        for (node, _) in past_proxy_ways(&a, POD_CAPTURE) {
            let found = on_interface(true, Some(&syn(a.stranger, a.guest)), &node);
            assert_eq!(found, MARKED);
            node.assert_asked(&[]);
        }
    }
}

#[test]
fn the_listener_is_at_hand_when_capture_begins() {
    for a in both_families() {
        for (dst_port, kind) in [(SERVER_PORT, LISTENER_INBOUND), (PORT_HBONE, LISTENER_HBONE)] {
            for proxy in PROXY_STATES {
                let deaf = Node { receiver: Receiver::Nobody, ..Node::new(&a, PREPARING) };
                let node = Node { proxy, ..deaf };
                let segment = Segment { dst_port, ..syn(a.stranger, a.own) };
                let found = on_interface(true, Some(&segment), &node);
                assert_eq!(found, MARKED, "nothing is captured yet");
                node.assert_asked(&[Asked::Proxy(kind)]);
            }
        }
    }
}

#[test]
fn hbone_comes_to_the_pod() {
    for a in both_families() {
        for flags in [0, POD_BYPASS_INBOUND, POD_INBOUND_RULES] {
            for proxy in PROXY_STATES {
                for dst in [a.own, a.own_second] {
                    // No application may have that port, so nobody is asked about it.
                    let deaf = Node::new(&a, capturing(flags));
                    let excluded_port = Some(PORT_HBONE);
                    let deaf = Node { receiver: Receiver::Nobody, excluded_port, ..deaf };
                    let node = Node { proxy, ..deaf };
                    let segment = Segment { dst_port: PORT_HBONE, ..syn(a.stranger, dst) };
                    assert_eq!(on_interface(true, Some(&segment), &node), called(proxy));
                    node.assert_asked(&[Asked::Proxy(LISTENER_HBONE)]);
                }
            }
        }
    }
}

#[test]
fn what_settings_keep_off_the_proxy_needs_none() {
    for a in both_families() {
        for flags in [0, POD_CAPTURE] {
            for (node, _) in past_proxy_ways(&a, flags) {
                let deaf = Node { receiver: Receiver::Nobody, ..node };
                let node = Node { proxy: Proxy::Away, ..deaf };
                let found = on_interface(true, Some(&syn(a.stranger, a.own)), &node);
                assert_eq!(found, MARKED);
                node.assert_asked(&[]);
                for dst_port in PROXYS_PORTS {
                    let node = Node { excluded_port: Some(dst_port), ..Node::new(&a, node.pod) };
                    let segment = Segment { dst_port, ..syn(a.stranger, a.own) };
                    on_interface(true, Some(&segment), &node);
                    assert!(!node.asked.take().is_empty(), "not for outsiders");
                }
            }
        }
        let without = Node { excluded_port: Some(SERVER_PORT), ..Node::new(&a, CAPTURING) };
        let found = on_interface(true, Some(&syn(a.stranger, a.own)), &without);
        assert_eq!(found, called(Proxy::Listens), "without the flag nobody looks at the rules");
    }
}

const VIRTUAL: Virtual = Virtual { pod_id: OWN, flags: VIRTUAL_CAPTURE };
const REROUTED: Verdict = Verdict { mark: code(MARK_VIRTUAL), ..GOES_ON };
const FOR_PROXY: Verdict = Verdict { hint: code(HINT_FROM_VIRTUAL), ..REROUTED };

#[test]
fn guests_open_connections_by_the_proxy() {
    for a in both_families() {
        for (proxy, expected) in [
            (Proxy::Listens, FOR_PROXY),
            (Proxy::AwayWithinGrace, refused(MARKED, Fate::Drop, Counter::DroppedProxyAway)),
            (Proxy::Away, refused(MARKED, Fate::Reset, Counter::RefusedProxyAway)),
        ] {
            // Whatever address a guest claims to have.
            for (src, dst) in [(a.guest, a.stranger), (a.guest, a.neighbour), (a.own, a.stranger)] {
                let node = Node { proxy, ..Node::new(&a, CAPTURING) };
                let found = on_virtual(true, Some(&syn(src, dst)), false, &VIRTUAL, &node);
                assert_eq!(found, expected);
                node.assert_asked(&[Asked::Proxy(LISTENER_OUTBOUND)]);
            }
        }
    }
}

#[test]
fn what_settings_exclude_of_guests_is_forwarded_and_needs_no_proxy() {
    for a in both_families() {
        let segment = syn(a.guest, a.stranger);
        let rules = Virtual { flags: VIRTUAL_CAPTURE | VIRTUAL_RULES, ..VIRTUAL };
        let away = || Node { proxy: Proxy::Away, ..Node::new(&a, CAPTURING) };
        let excluded = || Node { excluded_outbound: Some(a.stranger), ..away() };
        for (interface, node, fate) in [
            (Virtual { flags: 0, ..VIRTUAL }, away(), Fate::Next),
            (Virtual { flags: VIRTUAL_RULES, ..VIRTUAL }, away(), Fate::Next),
            (rules, excluded(), Fate::Next),
            (rules, away(), Fate::Reset),
            (VIRTUAL, excluded(), Fate::Reset),
        ] {
            let found = on_virtual(true, Some(&segment), false, &interface, &node);
            match fate {
                Fate::Next => {
                    assert_eq!(found, MARKED);
                    node.assert_asked(&[]);
                }
                refused => assert_eq!(found.fate, refused),
            }
        }
    }
}

#[test]
fn guests_connections_keep_their_way_whatever_is_captured() {
    for a in both_families() {
        for flags in [0, VIRTUAL_CAPTURE, VIRTUAL_CAPTURE | VIRTUAL_RULES] {
            let interface = Virtual { flags, ..VIRTUAL };
            let new = || Node { proxy: Proxy::Away, ..Node::new(&a, CAPTURING) };
            let completes = if flags == 0 { MARKED } else { FOR_PROXY };
            for segment in [data(a.guest, a.stranger), syn_ack(a.guest, a.stranger)] {
                for (node, expected) in [
                    (new(), MARKED),
                    (Node { receiver: Receiver::Connection, ..new() }, REROUTED),
                    (Node { cookie: true, ..new() }, completes),
                ] {
                    let found = on_virtual(true, Some(&segment), false, &interface, &node);
                    assert_eq!(found, expected);
                }
            }
        }
    }
}

#[test]
fn what_guests_send_to_the_pod_itself_is_inbound() {
    for a in both_families() {
        let node = Node::new(&a, CAPTURING);
        for (dst, inbound) in [
            (a.own, true),
            (a.own_second, true),
            (a.neighbour, false),
            (a.stranger, false),
            (a.loopback, false),
        ] {
            assert_eq!(is_inbound(Some(&syn(a.guest, dst)), OWN, &node), inbound);
            assert_eq!(is_inbound(Some(&data(a.guest, dst)), OWN, &node), inbound);
        }
        assert!(!is_inbound(None, OWN, &node));
    }
}

#[test]
fn of_guests_only_tcp_is_concerned_and_none_of_it_hides() {
    for a in both_families() {
        let node = Node { proxy: Proxy::Away, ..Node::new(&a, CAPTURING) };
        let dropped = refused(MARKED, Fate::Drop, Counter::DroppedUnreadable);
        let idle = Virtual { flags: 0, ..VIRTUAL };
        assert_eq!(on_virtual(true, None, false, &VIRTUAL, &node), MARKED);
        assert_eq!(on_virtual(true, None, true, &VIRTUAL, &node), dropped);
        assert_eq!(on_virtual(true, None, true, &idle, &node), MARKED);
        for dst in [link_local(), a.loopback] {
            let found = on_virtual(true, Some(&syn(a.guest, dst)), false, &VIRTUAL, &node);
            assert_eq!(found, MARKED);
        }
        node.assert_asked(&[]);
    }
}

const RESCUED: Verdict =
    Verdict { fate: Fate::ToLo, mark: code(MARK_RESCUED), settle: code(WAY_REDIRECTED), ..GOES_ON };

fn tcp(segment: Segment) -> Message {
    Message { segment, tcp: true, is_query: true, ends: false }
}

fn udp(segment: Segment) -> Message {
    Message { tcp: false, ..tcp(segment) }
}

fn guarded(message: Message, node: &Node) -> Verdict {
    on_egress(0, Ok(&message), node)
}

const DIRECT: Verdict = Verdict { settle: code(WAY_DIRECT), ..GOES_ON };

#[test]
fn the_guard_brings_back_what_the_pod_opens() {
    let rescued = Verdict { count: Some(Counter::RescuedOutbound), ..RESCUED };
    for a in both_families() {
        for (scenario, pod, expected) in [
            ("capturing", CAPTURING, rescued),
            ("with settings for inbound", capturing(POD_BYPASS_INBOUND), rescued),
            ("with rules for outbound", capturing(POD_OUTBOUND_RULES), rescued),
            ("preparing", PREPARING, GOES_ON),
            ("bypassing", BYPASSING, GOES_ON),
            ("unknown", UNKNOWN, refused(GOES_ON, Fate::Drop, Counter::RefusedUnknownPod)),
        ] {
            // From any address, and to itself: some route led it out here.
            for (src, dst) in [
                (a.own, a.stranger),
                (a.guest, a.neighbour),
                (a.loopback, a.stranger),
                (a.own, a.own_second),
            ] {
                // The mesh's ports are like any others. An open connection with the same ports does not
                // count, nor does the socket's earlier connection.
                for dst_port in [SERVER_PORT, PORT_HBONE, PORT_DNS] {
                    for settled in [None, Some(WAY_DIRECT), Some(WAY_REDIRECTED)] {
                        let node =
                            Node { settled, receiver: Receiver::Connection, ..Node::new(&a, pod) };
                        let node = Node { proxy: Proxy::Away, ..node };
                        let message = tcp(Segment { dst_port, ..syn(src, dst) });
                        assert_eq!(guarded(message, &node), expected, "{scenario}");
                        // The proxy is looked up on `lo`.
                        node.assert_asked(&[]);
                    }
                }
            }
        }
    }
}

#[test]
fn the_guard_lets_out_what_settings_exclude() {
    for a in both_families() {
        let rules = capturing(POD_OUTBOUND_RULES);
        for (pod, excluded, expected) in [
            (rules, a.stranger, DIRECT),
            (rules, a.neighbour, Verdict { count: Some(Counter::RescuedOutbound), ..RESCUED }),
            // Without the flag nobody looks at the rules.
            (CAPTURING, a.stranger, Verdict { count: Some(Counter::RescuedOutbound), ..RESCUED }),
        ] {
            let node = Node { excluded_outbound: Some(excluded), ..Node::new(&a, pod) };
            assert_eq!(guarded(tcp(syn(a.own, a.stranger)), &node), expected);
        }
    }
}

#[test]
fn the_guard_leaves_link_local_and_what_is_no_tcp_alone() {
    let query = |segment| Segment { dst_port: PORT_DNS, ..segment };
    for a in both_families() {
        for (scenario, message) in [
            ("to a link-local address", tcp(syn(a.own, link_local()))),
            ("a query to a link-local resolver", udp(query(syn(a.own, link_local())))),
            ("a datagram", udp(syn(a.own, a.stranger))),
            (
                "an answer to who asked from port 53",
                Message { is_query: false, ..udp(query(syn(a.own, a.stranger))) },
            ),
        ] {
            for pod in [UNKNOWN, BYPASSING, PREPARING, capturing(POD_DNS)] {
                let node = Node { receiver: Receiver::Connection, ..Node::new(&a, pod) };
                assert_eq!(guarded(message, &node), Verdict::NEXT, "{scenario}");
                node.assert_asked(&[]);
            }
        }
    }
}

#[test]
fn no_query_to_loopback_leaves_by_an_interface() {
    for a in both_families() {
        let query = udp(Segment { dst_port: PORT_DNS, ..syn(a.own, a.loopback) });
        let drop = refused(GOES_ON, Fate::Drop, Counter::RefusedPastProxy);
        for (pod, expected) in [(capturing(POD_DNS), drop), (CAPTURING, drop)] {
            assert_eq!(guarded(query, &Node::new(&a, pod)), expected);
        }
        for pod in [PREPARING, BYPASSING] {
            assert_eq!(guarded(query, &Node::new(&a, pod)), GOES_ON);
        }
    }
}

#[test]
fn the_guard_brings_queries_to_the_proxys_dns() {
    let unknown = refused(GOES_ON, Fate::Drop, Counter::RefusedUnknownPod);
    for a in both_families() {
        let query = Segment { dst_port: PORT_DNS, ..syn(a.own, a.stranger) };
        for (pod, expected) in [
            // Whether or not anything else is captured, or excluded.
            // `lo` counts them.
            (capturing(POD_DNS), RESCUED),
            (capturing(POD_DNS | POD_OUTBOUND_RULES), RESCUED),
            (PREPARING.map(|pod| pod | POD_DNS), RESCUED),
            (PREPARING, GOES_ON),
            (BYPASSING, GOES_ON),
            (UNKNOWN, unknown),
        ] {
            let node = Node { excluded_outbound: Some(a.stranger), ..Node::new(&a, pod) };
            assert_eq!(guarded(tcp(query), &node), expected);
            // A socket may ask many resolvers, so nothing is recorded with it.
            assert_eq!(guarded(udp(query), &node), Verdict { settle: None, ..expected });
        }
        let node = Node::new(&a, CAPTURING);
        assert_eq!(guarded(udp(query), &node), GOES_ON, "DNS is not captured");
        let expected = Verdict { count: Some(Counter::RescuedOutbound), ..RESCUED };
        assert_eq!(guarded(tcp(query), &node), expected, "it is a connection like any other");
    }
}

#[test]
fn the_guard_judges_of_link_local_traffic_what_is_open() {
    let aborted = refused(GOES_ON, Fate::Abort, Counter::RefusedPastProxy);
    for a in both_families() {
        let accepts = syn_ack(a.own, link_local());
        let later = reply(a.own, link_local());
        for (node, segment, expected) in [
            (Node::new(&a, CAPTURING), accepts, aborted),
            (Node::new(&a, CAPTURING), later, DIRECT),
            (Node::new(&a, PREPARING), accepts, GOES_ON),
            (Node { receiver: Receiver::Connection, ..Node::new(&a, CAPTURING) }, later, RESCUED),
        ] {
            assert_eq!(guarded(tcp(segment), &node), expected);
        }
    }
}

#[test]
fn the_guard_lets_out_what_is_only_forwarded() {
    let counted = Verdict { count: Some(Counter::Forwarded), ..GOES_ON };
    for a in both_families() {
        let query = Segment { dst_port: PORT_DNS, ..syn(a.guest, a.stranger) };
        for (scenario, message, expected) in [
            ("a guest opens a connection", tcp(syn(a.guest, a.stranger)), counted),
            ("by the pod's address", tcp(syn(a.own, a.stranger)), counted),
            ("to a resolver", tcp(query), counted),
            ("a guest's query", udp(query), GOES_ON),
            ("a guest's datagram", udp(syn(a.guest, a.stranger)), Verdict::NEXT),
        ] {
            for pod in [UNKNOWN, BYPASSING, PREPARING, capturing(POD_DNS)] {
                for mark in [0, MARK_DIRECT, MARK_VIRTUAL, MARK_REDIRECTED, 0xabcd_e000] {
                    let node = Node {
                        forwarded: true,
                        receiver: Receiver::Connection,
                        ..Node::new(&a, pod)
                    };
                    assert_eq!(on_egress(mark, Ok(&message), &node), expected, "{scenario}");
                    node.assert_asked(&[]);
                }
            }
        }
        for (pod, expected, asked) in [
            (UNKNOWN, refused(GOES_ON, Fate::Drop, Counter::RefusedUnknownPod), &[][..]),
            (BYPASSING, GOES_ON, &[]),
            (PREPARING, GOES_ON, &[Asked::Receiver]),
            (CAPTURING, GOES_ON, &[Asked::Receiver]),
        ] {
            let node = Node { forwarded: true, ..Node::new(&a, pod) };
            for segment in [data(a.guest, a.stranger), syn_ack(a.guest, a.stranger)] {
                assert_eq!(guarded(tcp(segment), &node), expected, "a guest's, later on");
                node.assert_asked(asked);
            }
        }
    }
}

#[test]
fn what_comes_from_lo_or_is_for_the_loopback_address_does_not_leave() {
    let dropped = refused(GOES_ON, Fate::Drop, Counter::RefusedPastProxy);
    for a in both_families() {
        for (pod, expected) in [(BYPASSING, GOES_ON), (PREPARING, GOES_ON), (CAPTURING, dropped)] {
            for mark in [0, 1, MARK_DIRECT, MARK_REDIRECTED] {
                let node = Node { forwarded: true, by_lo: true, ..Node::new(&a, pod) };
                let opens = tcp(syn(a.own, a.stranger));
                assert_eq!(on_egress(mark, Ok(&opens), &node), expected, "from lo");
                let node = Node::new(&a, pod);
                for segment in [syn(a.own, a.loopback), data(a.own, a.loopback)] {
                    let found = on_egress(mark, Ok(&tcp(segment)), &node);
                    assert_eq!(found, expected, "to the loopback address");
                }
            }
        }
    }
}

#[test]
fn what_the_guard_has_brought_to_lo_is_not_forwarded() {
    let dropped = refused(GOES_ON, Fate::Drop, Counter::RefusedPastProxy);
    for a in both_families() {
        let query = Segment { dst_port: PORT_DNS, ..syn(a.own, a.stranger) };
        for pod in [UNKNOWN, BYPASSING, PREPARING, capturing(POD_DNS)] {
            for mark in [MARK_RESCUED, 0xabcd_e000 | MARK_RESCUED] {
                for receiver in RECEIVERS {
                    let node = Node { forwarded: true, receiver, ..Node::new(&a, pod) };
                    for message in [
                        tcp(syn(a.own, a.stranger)),
                        tcp(syn_ack(a.own, a.stranger)),
                        tcp(data(a.own, a.stranger)),
                        tcp(data(a.own, link_local())),
                        tcp(data(a.own, a.loopback)),
                        tcp(query),
                        udp(query),
                    ] {
                        assert_eq!(on_egress(mark, Ok(&message), &node), dropped);
                    }
                    // The guard never moves such a packet to `lo`.
                    let datagram = udp(syn(a.own, a.stranger));
                    assert_eq!(on_egress(mark, Ok(&datagram), &node), Verdict::NEXT);
                    node.assert_asked(&[]);
                }
            }
        }
        // An application that sets this mark itself gains nothing.
        let node = Node::new(&a, CAPTURING);
        for segment in [syn(a.own, a.stranger), syn_ack(a.own, a.stranger), data(a.own, a.stranger)]
        {
            let message = tcp(segment);
            let found = on_egress(MARK_RESCUED, Ok(&message), &node);
            assert_eq!(found, guarded(message, &node));
        }
    }
}

#[test]
fn the_guard_lets_out_what_is_the_proxys() {
    let back = Verdict { fate: Fate::ToLo, mark: code(MARK_RESCUED), ..Verdict::NEXT };
    for a in both_families() {
        let query = Segment { dst_port: PORT_DNS, ..syn(a.own, a.stranger) };
        let accepts = syn_ack(a.own, a.stranger);
        let later = [data(a.own, a.stranger), reply(a.own, a.stranger)];
        // Recognized by its socket, even if netfilter has removed or changed its mark.
        for (mark, sender) in [
            (MARK_PROXY, Sender::Proxy),
            (0xabcd_e000 | MARK_PROXY, Sender::Marked),
            (0, Sender::Proxy),
            (MARK_RESCUED, Sender::Marked),
            (MARK_DIRECT, Sender::Proxy),
        ] {
            let way = if sender == Sender::Proxy { WAY_PROXYS } else { WAY_MARKED };
            let direct = Verdict { settle: code(way), ..Verdict::NEXT };
            for pod in [UNKNOWN, BYPASSING, PREPARING, capturing(POD_DNS)] {
                let new = || Node { sender, ..Node::new(&a, pod) };
                let judged = |message: Message, node: &Node| on_egress(mark, Ok(&message), node);
                // Another connection with the same ports does not count, nor does another connection of
                // the socket.
                for settled in [None, Some(WAY_DIRECT), Some(WAY_REDIRECTED)] {
                    let node = Node { receiver: Receiver::Connection, settled, ..new() };
                    for open in [syn(a.own, a.stranger), query] {
                        assert_eq!(judged(tcp(open), &node), direct);
                    }
                    for datagram in [syn(a.own, a.stranger), query] {
                        assert_eq!(judged(udp(datagram), &node), Verdict::NEXT);
                    }
                    for hidden in [Hidden::Nothing, Hidden::Tcp, Hidden::Dns] {
                        let found = on_egress(mark, Err(hidden), &node);
                        assert_eq!(found, Verdict::NEXT);
                    }
                    node.assert_asked(&[]);
                }
                for segment in later.into_iter().chain([accepts]) {
                    for (settled, expected) in
                        [(way, Verdict::NEXT), (WAY_DIRECT, direct), (WAY_REDIRECTED, back)]
                    {
                        let node = Node {
                            settled: Some(settled),
                            receiver: Receiver::Connection,
                            ..new()
                        };
                        assert_eq!(judged(tcp(segment), &node), expected);
                        node.assert_asked(&[]);
                    }
                    let node = new();
                    assert_eq!(judged(tcp(segment), &node), direct);
                    node.assert_asked(&[Asked::Receiver]);
                    // It is the application's, and its peer is the proxy, which is here.
                    let count = segment.accepts.then_some(Counter::RescuedInbound);
                    let node = Node { receiver: Receiver::Connection, ..new() };
                    assert_eq!(judged(tcp(segment), &node), Verdict { count, ..RESCUED });
                    node.assert_asked(&[Asked::Receiver]);
                }
            }
        }
    }
}

#[test]
fn the_guard_knows_what_of_the_proxys_has_no_socket() {
    let direct = Verdict { settle: code(WAY_PROXYS), ..Verdict::NEXT };
    for a in both_families() {
        let new = || Node { sender: Sender::Nobody, ..Node::new(&a, CAPTURING) };
        // It was on `lo`, and its connection belongs to the proxy.
        for segment in [syn(a.own, a.stranger), data(a.own, a.stranger)] {
            let node = Node { proxy_sent: true, forwarded: true, by_lo: true, ..new() };
            assert_eq!(on_egress(MARK_DIRECT, Ok(&tcp(segment)), &node), direct);
        }
        // A SYN cookie of the proxy; and, on `lo`, one that has only a mark from netfilter.
        let accepts = tcp(syn_ack(a.own, a.stranger));
        assert_eq!(on_egress(MARK_PROXY, Ok(&accepts), &new()), direct);
        let copy = Node { forwarded: true, by_lo: true, ..new() };
        assert_ne!(on_egress(MARK_PROXY, Ok(&accepts), &copy), direct);
        // A packet that cannot be parsed and was on `lo` is not a guest's.
        for by_lo in [false, true] {
            let node = Node { forwarded: true, by_lo, ..new() };
            let fate = if by_lo { Fate::Drop } else { Fate::Next };
            assert_eq!(on_egress(MARK_PROXY, Err(Hidden::Tcp), &node).fate, fate);
        }
        // Copies of the application's packets, with the proxy's mark.
        let query = Segment { dst_port: PORT_DNS, ..syn(a.own, a.stranger) };
        for forwarded in [false, true] {
            let node = Node { forwarded, by_lo: forwarded, ..new() };
            for message in [tcp(syn(a.own, a.stranger)), tcp(query), udp(query)] {
                let found = on_egress(MARK_PROXY, Ok(&message), &node);
                assert_eq!(found, guarded(message, &node));
                assert_ne!(found.settle, direct.settle);
            }
        }
    }
}

#[test]
fn the_guard_refuses_the_proxys_mark_on_sockets_of_others() {
    for a in both_families() {
        let query = Segment { dst_port: PORT_DNS, ..syn(a.own, a.stranger) };
        for pod in [PREPARING, CAPTURING, capturing(POD_DNS | POD_OUTBOUND_RULES)] {
            let node = Node { sender: Sender::Impostor, ..Node::new(&a, pod) };
            let refused = Verdict {
                fate: Fate::ToLo,
                mark: code(MARK_REFUSED),
                count: Some(Counter::RefusedProxysMark),
                ..GOES_ON
            };
            for segment in [syn(a.own, a.stranger), query] {
                assert_eq!(on_egress(MARK_PROXY, Ok(&tcp(segment)), &node), refused);
            }
            let dropped = Verdict { fate: Fate::Drop, ..refused };
            assert_eq!(on_egress(MARK_PROXY, Ok(&udp(query)), &node), dropped);
            // Open connections continue.
            let later = data(a.own, a.stranger);
            assert_eq!(on_egress(MARK_PROXY, Ok(&tcp(later)), &node), guarded(tcp(later), &node));
            // On `lo`, the call is answered with a RST.
            let reset = Verdict { fate: Fate::Reset, mark: code(MARK_RESCUED), ..GOES_ON };
            for segment in [syn(a.own, a.stranger), query] {
                assert_eq!(on_lo(MARK_REFUSED, Some(&segment), &node), reset);
            }
        }
        for pod in [BYPASSING, UNKNOWN] {
            let node = Node { sender: Sender::Impostor, ..Node::new(&a, pod) };
            let open = tcp(syn(a.own, a.stranger));
            assert_eq!(on_egress(MARK_PROXY, Ok(&open), &node), guarded(open, &node));
        }
    }
}

#[test]
fn the_proxys_call_to_its_own_ports_does_not_come_back_to_it() {
    for a in both_families() {
        for port in [PORT_OUTBOUND, PORT_INBOUND] {
            let segment = Segment { dst_port: port, ..syn(a.stranger, a.own) };
            let count = Some(Counter::RefusedProxysMark);
            let refused = Verdict { fate: Fate::Reset, count, ..GOES_ON };
            let node = Node::new(&a, CAPTURING);
            assert_eq!(on_lo(MARK_PROXY, Some(&segment), &node), refused);
        }
    }
}

#[test]
fn the_guard_takes_no_socket_of_the_application_for_the_proxys() {
    for a in both_families() {
        let query = Segment { dst_port: PORT_DNS, ..syn(a.own, a.stranger) };
        for pod in [UNKNOWN, BYPASSING, PREPARING, CAPTURING, capturing(POD_DNS)] {
            for receiver in RECEIVERS {
                let node = Node { receiver, ..Node::new(&a, pod) };
                for message in [
                    tcp(syn(a.own, a.stranger)),
                    tcp(syn_ack(a.own, a.stranger)),
                    tcp(data(a.own, a.stranger)),
                    tcp(query),
                    udp(query),
                ] {
                    let found = on_egress(MARK_PROXY, Ok(&message), &node);
                    assert_eq!(found, guarded(message, &node));
                }
                for hidden in [Hidden::Nothing, Hidden::Tcp, Hidden::Dns] {
                    let found = on_egress(MARK_PROXY, Err(hidden), &node);
                    assert_eq!(found, on_egress(0, Err(hidden), &node));
                }
            }
        }
    }
}

#[test]
fn the_guard_keeps_connections_on_the_way_that_was_found() {
    let to_lo = Verdict { fate: Fate::ToLo, mark: code(MARK_RESCUED), ..Verdict::NEXT };
    for a in both_families() {
        for (way, expected) in
            [(WAY_REDIRECTED, to_lo), (WAY_DIRECT, Verdict::NEXT), (WAY_PROXYS, Verdict::NEXT)]
        {
            for pod in [UNKNOWN, BYPASSING, PREPARING, CAPTURING] {
                for segment in
                    [data(a.own, a.stranger), reply(a.own, a.stranger), syn_ack(a.own, a.stranger)]
                {
                    let node = Node { settled: Some(way), ..Node::new(&a, pod) };
                    assert_eq!(guarded(tcp(segment), &node), expected);
                    // It costs no lookup.
                    node.assert_asked(&[]);
                }
            }
        }
    }
}

#[test]
fn the_guard_brings_packets_back_whose_peer_is_here() {
    for a in both_families() {
        // The proxy's socket has the client's address.
        let accepts = syn_ack(a.own, a.stranger);
        let count = Some(Counter::RescuedInbound);
        for pod in [PREPARING, CAPTURING, capturing(POD_BYPASS_INBOUND)] {
            // An answer of a listener has no socket that the guard could see.
            for forwarded in [false, true] {
                let node = Node { receiver: Receiver::Connection, forwarded, ..Node::new(&a, pod) };
                assert_eq!(guarded(tcp(accepts), &node), Verdict { count, ..RESCUED });
                node.assert_asked(&[Asked::Receiver]);
            }
            for later in [reply(a.own, a.stranger), data(a.own, a.stranger)] {
                let node = Node { receiver: Receiver::Connection, ..Node::new(&a, pod) };
                // Connections are counted, not packets.
                assert_eq!(guarded(tcp(later), &node), RESCUED);
            }
        }
        for (pod, expected) in [
            (BYPASSING, GOES_ON),
            (UNKNOWN, refused(GOES_ON, Fate::Drop, Counter::RefusedUnknownPod)),
        ] {
            for segment in [accepts, reply(a.own, a.stranger)] {
                let node = Node { receiver: Receiver::Connection, ..Node::new(&a, pod) };
                assert_eq!(guarded(tcp(segment), &node), expected);
            }
        }
    }
}

#[test]
fn the_guard_lets_out_answers_to_who_came_before_the_capture() {
    let aborted = refused(GOES_ON, Fate::Abort, Counter::RefusedPastProxy);
    for a in both_families() {
        // By its mark, the request socket is from before the capture. A listener with a mark of its own
        // is not.
        for (half_open, mark, expected) in [
            (true, MARK_DIRECT, DIRECT),
            (true, 0xabcd_e000 | MARK_DIRECT, DIRECT),
            (true, MARK_INBOUND, aborted),
            (true, 0, aborted),
            (false, MARK_DIRECT, aborted),
        ] {
            let node = Node { half_open, connections: false, ..Node::new(&a, CAPTURING) };
            let message = tcp(syn_ack(a.own, a.stranger));
            assert_eq!(on_egress(mark, Ok(&message), &node), expected, "{mark:x}");
            let node = Node { marked_listener: true, ..node };
            assert_eq!(on_egress(mark, Ok(&message), &node), aborted, "its listener's mark");
            let node = Node { connections: true, marked_listener: false, ..node };
            assert_eq!(on_egress(mark, Ok(&message), &node), aborted, "it calls, too");
        }
    }
}

#[test]
fn a_connection_without_a_peer_leaves_only_if_it_is_known_to_be_direct() {
    let refused =
        Verdict { settle: None, ..refused(RESCUED, Fate::ToLo, Counter::RefusedPastProxy) };
    for a in both_families() {
        let captured = || Node::new(&a, CAPTURING);
        for segment in
            [reply(a.own, a.stranger), data(a.own, a.stranger), data(a.guest, a.stranger)]
        {
            let resets = Segment { resets: true, ..segment };
            for mark in [0, MARK_DIRECT, MARK_REDIRECTED, MARK_INBOUND, 0xabcd_e001] {
                let found = |segment, node: &Node| on_egress(mark, Ok(&tcp(segment)), node);
                assert_eq!(found(segment, &captured()), refused);
                assert_eq!(found(resets, &captured()), GOES_ON, "it has no data");
                for (scenario, node, expected) in [
                    ("what the kernel sends", Node { connections: false, ..captured() }, GOES_ON),
                    ("half open before", Node { noted_direct: true, ..captured() }, DIRECT),
                    ("nothing is captured", Node::new(&a, PREPARING), DIRECT),
                    (
                        "its peer is here",
                        Node { receiver: Receiver::Connection, ..captured() },
                        RESCUED,
                    ),
                    (
                        "an unknown proxy's",
                        Node { sender: Sender::Impostor, ..captured() },
                        refused,
                    ),
                    ("recent", Node { half_open: true, ..captured() }, refused),
                ] {
                    assert_eq!(found(segment, &node), expected, "{scenario}");
                }
            }
        }
        for (node, _) in past_proxy_ways(&a, POD_CAPTURE) {
            assert_eq!(guarded(tcp(reply(a.own, a.stranger)), &node), DIRECT, "settings");
        }
        let excluded_outbound = Some(a.stranger);
        let node = Node { excluded_outbound, ..Node::new(&a, capturing(POD_OUTBOUND_RULES)) };
        assert_eq!(guarded(tcp(data(a.own, a.stranger)), &node), DIRECT, "settings");
    }
}

#[test]
fn the_guard_refuses_who_was_accepted_past_the_proxy() {
    let aborted = refused(GOES_ON, Fate::Abort, Counter::RefusedPastProxy);
    for a in both_families() {
        let accepts = syn_ack(a.own, a.stranger);
        for (scenario, node, segment, expected) in [
            ("TPROXY in the pod", Node::new(&a, CAPTURING), accepts, aborted),
            ("nothing is captured yet", Node::new(&a, PREPARING), accepts, GOES_ON),
            (
                "under SYN cookies, where it has no socket",
                Node { forwarded: true, ..Node::new(&a, CAPTURING) },
                accepts,
                aborted,
            ),
            (
                "under SYN cookies, and nothing is captured yet",
                Node { forwarded: true, ..Node::new(&a, PREPARING) },
                accepts,
                GOES_ON,
            ),
            (
                "a guest accepts",
                Node { forwarded: true, ..Node::new(&a, CAPTURING) },
                syn_ack(a.guest, a.stranger),
                GOES_ON,
            ),
            (
                "by an address that only a route makes the pod's",
                Node::new(&a, CAPTURING),
                syn_ack(a.guest, a.stranger),
                aborted,
            ),
        ] {
            assert_eq!(guarded(tcp(segment), &node), expected, "{scenario}");
            node.assert_asked(&[Asked::Receiver]);
        }
        for (node, _) in past_proxy_ways(&a, POD_CAPTURE) {
            let cookies = Node { forwarded: true, ..node };
            assert_eq!(guarded(tcp(accepts), &cookies), GOES_ON, "settings let them in");
            let node = Node { forwarded: false, ..cookies };
            assert_eq!(guarded(tcp(accepts), &node), GOES_ON, "settings let them in");
            for src_port in PROXYS_PORTS {
                let proxys = Segment { src_port, ..accepts };
                assert_eq!(guarded(tcp(proxys), &node), aborted, "not for outsiders");
            }
        }
    }
}

#[test]
fn the_guard_drops_what_it_cannot_read_and_would_have_brought_to_lo() {
    let tcp = refused(GOES_ON, Fate::Drop, Counter::DroppedUnreadable);
    let dns = refused(GOES_ON, Fate::Drop, Counter::DroppedDnsUnreadable);
    for a in both_families() {
        for (pod, hides_tcp, hides_dns) in [
            (UNKNOWN, tcp, dns),
            (BYPASSING, GOES_ON, GOES_ON),
            (PREPARING, GOES_ON, GOES_ON),
            (PREPARING.map(|pod| pod | POD_DNS), GOES_ON, dns),
            (CAPTURING, tcp, GOES_ON),
            (capturing(POD_DNS), tcp, dns),
        ] {
            for (hidden, expected) in [
                (Hidden::Nothing, Verdict::NEXT),
                (Hidden::Tcp, hides_tcp),
                (Hidden::Dns, hides_dns),
            ] {
                for mark in [0, MARK_DIRECT, MARK_VIRTUAL, MARK_RESCUED, 0xabcd_e000] {
                    let node = Node::new(&a, pod);
                    assert_eq!(on_egress(mark, Err(hidden), &node), expected);
                    let node = Node { forwarded: true, ..node };
                    let found = on_egress(mark, Err(hidden), &node);
                    assert_eq!(found, Verdict::NEXT, "it is not the pod's");
                    node.assert_asked(&[]);
                }
            }
        }
    }
}

const LO: bool = true;
const OUTSIDE: bool = false;
const OUTBOUND: Steer = Steer::Redirect(LISTENER_OUTBOUND);
const INBOUND: Steer = Steer::Redirect(LISTENER_INBOUND);
const HBONE: Steer = Steer::Redirect(LISTENER_HBONE);
const UNTOUCHED: Steer = Steer::Pass(None);
const FORGED: Steer = Steer::Refuse(Counter::RefusedForgedAddress);

/// Every kind of hint, and one that does not exist.
const KINDS: [u32; 6] =
    [HINT_NONE, HINT_FROM_PROXY, HINT_QUESTION, HINT_FROM_POD, HINT_FROM_VIRTUAL, 99];

fn lookup(local: Addr, remote: Addr, on_lo: bool, kind: u32) -> Lookup {
    let flow = flow(local, remote);
    Lookup {
        pod_id: OWN,
        tcp: true,
        flow,
        on_lo,
        hint: Hint { flow, device: u64::from(OWN), kind },
    }
}

fn to_port(lookup: Lookup, port: u16) -> Lookup {
    let flow = Flow { local_port: port, ..lookup.flow };
    Lookup { flow, hint: Hint { flow, ..lookup.hint }, ..lookup }
}

fn counted(counter: Counter) -> Steer {
    Steer::Pass(Some(counter))
}

/// The result of each lookup while the pod captures, and while it is being prepared.
#[track_caller]
fn assert_steered(a: &Addresses, rows: &[(&str, Lookup, Steer, Steer)]) {
    for (scenario, lookup, capturing, preparing) in rows {
        for (pod, expected) in [(CAPTURING, capturing), (PREPARING, preparing)] {
            let found = steer(lookup, &Node::new(a, pod));
            assert_eq!(found, *expected, "{scenario}: {pod:x?}, {lookup:?}");
        }
    }
}

#[test]
fn the_pod_calls() {
    let local = counted(Counter::Local);
    for a in both_families() {
        let on_lo = |to| lookup(to, a.own, LO, HINT_NONE);
        let rows = [
            // Connections that are open when the pod leaves the mesh still need the proxy.
            ("a stranger", on_lo(a.stranger), OUTBOUND, OUTBOUND),
            ("a pod of this node", on_lo(a.neighbour), OUTBOUND, OUTBOUND),
            ("HBONE's port", to_port(on_lo(a.neighbour), PORT_HBONE), OUTBOUND, OUTBOUND),
            (
                "by an address that only the namespace knows",
                lookup(a.stranger, a.guest, LO, HINT_NONE),
                OUTBOUND,
                OUTBOUND,
            ),
            (
                "by a neighbour's address",
                lookup(a.stranger, a.neighbour, LO, HINT_NONE),
                OUTBOUND,
                OUTBOUND,
            ),
            ("from loopback", lookup(a.stranger, a.loopback, LO, HINT_NONE), OUTBOUND, OUTBOUND),
            (
                "by a socket that is bound to an interface",
                lookup(a.stranger, a.own, OUTSIDE, HINT_FROM_POD),
                OUTBOUND,
                OUTBOUND,
            ),
            ("itself", on_lo(a.own), local, UNTOUCHED),
            ("its other address", on_lo(a.own_second), local, UNTOUCHED),
            // The kernel gives the interface that has the address.
            (
                "itself, as if from outside",
                lookup(a.own, a.own, OUTSIDE, HINT_FROM_POD),
                local,
                UNTOUCHED,
            ),
            ("the proxy's port at itself", to_port(on_lo(a.own), PORT_INBOUND), local, UNTOUCHED),
            ("loopback", on_lo(a.loopback), UNTOUCHED, UNTOUCHED),
            (
                "loopback from loopback",
                lookup(a.loopback, a.loopback, LO, HINT_NONE),
                UNTOUCHED,
                UNTOUCHED,
            ),
            ("a link-local address", on_lo(link_local()), UNTOUCHED, UNTOUCHED),
        ];
        assert_steered(&a, &rows);
    }
}

#[test]
fn the_pod_is_called() {
    for a in both_families() {
        let by = |remote| lookup(a.own, remote, OUTSIDE, HINT_NONE);
        let at = |local| lookup(local, a.stranger, OUTSIDE, HINT_NONE);
        let rows = [
            ("by a stranger", by(a.stranger), INBOUND, UNTOUCHED),
            ("by a pod of this node", by(a.neighbour), INBOUND, UNTOUCHED),
            ("by a link-local address", by(link_local()), INBOUND, UNTOUCHED),
            ("its other address", at(a.own_second), INBOUND, UNTOUCHED),
            ("an address that only a route makes its own", at(a.guest), INBOUND, UNTOUCHED),
            ("its link-local address", at(link_local()), INBOUND, UNTOUCHED),
            ("the proxy's inbound port", to_port(by(a.stranger), PORT_INBOUND), INBOUND, UNTOUCHED),
            (
                "the proxy's outbound port",
                to_port(by(a.stranger), PORT_OUTBOUND),
                INBOUND,
                UNTOUCHED,
            ),
            ("with HBONE", to_port(by(a.stranger), PORT_HBONE), HBONE, UNTOUCHED),
            ("with HBONE by a neighbour", to_port(by(a.neighbour), PORT_HBONE), HBONE, UNTOUCHED),
        ];
        assert_steered(&a, &rows);
    }
}

#[test]
fn who_pretends_to_be_the_pod_itself_or_its_loopback_is_refused() {
    for a in both_families() {
        for (local, remote) in [
            (a.own, a.own),
            (a.own, a.own_second),
            (a.guest, a.own),
            (a.stranger, a.own),
            (a.own, a.loopback),
            (a.own, a.loopback_other),
            (a.loopback, a.stranger),
        ] {
            for kind in [HINT_NONE, 99] {
                let found = lookup(local, remote, OUTSIDE, kind);
                let hbone = to_port(found, PORT_HBONE);
                assert_steered(
                    &a,
                    &[("TCP", found, FORGED, FORGED), ("HBONE", hbone, FORGED, FORGED)],
                );
                for (node, _) in past_proxy_ways(&a, POD_CAPTURE) {
                    assert_eq!(steer(&found, &node), FORGED, "no setting lets it in");
                }
            }
        }
    }
}

#[test]
fn settings_keep_calls_to_the_pod_off_the_proxy() {
    for a in both_families() {
        for kind in [99, HINT_NONE] {
            let by = |remote| lookup(a.own, remote, OUTSIDE, kind);
            for (node, counter) in past_proxy_ways(&a, POD_CAPTURE) {
                assert_eq!(steer(&by(a.stranger), &node), counted(counter));
                for port in [PORT_OUTBOUND, PORT_INBOUND] {
                    assert_eq!(steer(&to_port(by(a.stranger), port), &node), INBOUND);
                }
                assert_eq!(steer(&to_port(by(a.stranger), PORT_HBONE), &node), HBONE);
                let calls = lookup(a.stranger, a.own, LO, HINT_NONE);
                assert_eq!(steer(&calls, &node), OUTBOUND, "outbound is captured all the same");
                let from_proxy = lookup(a.own, a.stranger, LO, HINT_FROM_PROXY);
                assert_eq!(steer(&from_proxy, &node), counted(Counter::FromProxy));
            }
            for (node, _) in past_proxy_ways(&a, 0) {
                assert_eq!(steer(&by(a.stranger), &node), UNTOUCHED);
            }
            let rules = || Node::new(&a, capturing(POD_INBOUND_RULES));
            let port = Node { excluded_port: Some(SERVER_PORT), ..rules() };
            assert_eq!(steer(&to_port(by(a.stranger), 9090), &port), INBOUND);
            for node in [
                Node { excluded_peer: Some(a.stranger), ..rules() },
                Node { kubelet: Some(a.stranger), ..rules() },
                Node { probe_source: Some(a.stranger), ..rules() },
                Node { excluded_port: Some(SERVER_PORT), ..Node::new(&a, CAPTURING) },
            ] {
                assert_eq!(steer(&by(a.neighbour), &node), INBOUND);
            }
        }
    }
}

#[test]
fn the_proxy_calls_the_application() {
    let from_proxy = counted(Counter::FromProxy);
    for a in both_families() {
        for (local, remote) in [
            (a.own, a.stranger),
            (a.own, a.neighbour),
            (a.own, a.own),
            (a.own, a.loopback),
            // Local only by a route.
            (a.guest, a.stranger),
            (a.guest, a.guest),
        ] {
            // The kernel gives the interface that has the address.
            for on_lo in [LO, OUTSIDE] {
                let found = lookup(local, remote, on_lo, HINT_FROM_PROXY);
                assert_steered(&a, &[("the proxy", found, from_proxy, UNTOUCHED)]);
            }
        }
    }
}

#[test]
fn guests_are_the_pods_whose_interface_they_are_behind() {
    for a in both_families() {
        for (local, remote) in [
            (a.stranger, a.guest),
            (a.neighbour, a.guest),
            // Whatever address it claims to have.
            (a.stranger, a.own),
            (a.stranger, a.loopback),
        ] {
            for on_lo in [LO, OUTSIDE] {
                let found = lookup(local, remote, on_lo, HINT_FROM_VIRTUAL);
                assert_steered(&a, &[("a guest", found, OUTBOUND, OUTBOUND)]);
            }
        }
    }
}

#[test]
fn a_hint_is_for_one_flow_of_one_pod() {
    for a in both_families() {
        for kind in [HINT_FROM_PROXY, HINT_QUESTION, HINT_FROM_POD, HINT_FROM_VIRTUAL] {
            let good = lookup(a.own, a.stranger, OUTSIDE, kind);
            assert_ne!(steer(&good, &Node::new(&a, CAPTURING)), INBOUND);
            let Lookup { flow, hint, .. } = good;
            let rows = [
                ("local", Hint { flow: Flow { local: a.own_second, ..flow }, ..hint }),
                ("remote", Hint { flow: Flow { remote: a.neighbour, ..flow }, ..hint }),
                ("local port", Hint { flow: Flow { local_port: 9090, ..flow }, ..hint }),
                ("remote port", Hint { flow: Flow { remote_port: 9090, ..flow }, ..hint }),
                ("pod", Hint { device: u64::from(NEIGHBOUR), ..hint }),
            ]
            .map(|(other, hint)| (other, Lookup { hint, ..good }, INBOUND, UNTOUCHED));
            assert_steered(&a, &rows);
        }
        // The hint that a packet of the proxy leaves behind on `lo`.
        let (flow, kind) = (flow(a.own, a.stranger), HINT_FROM_PROXY);
        let hint = Hint { flow, device: u64::from(OWN), kind };
        let found = Lookup { hint, ..lookup(a.stranger, a.own, LO, HINT_NONE) };
        assert_steered(&a, &[("the pod's call", found, OUTBOUND, OUTBOUND)]);
    }
}

#[test]
fn what_tcx_asks_the_kernel_answers_and_nobody_counts() {
    for a in both_families() {
        for (local, remote) in
            [(a.own, a.stranger), (a.stranger, a.own), (a.own, a.own), (a.loopback, a.loopback)]
        {
            for port in [SERVER_PORT, PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE] {
                for on_lo in [LO, OUTSIDE] {
                    let asked = to_port(lookup(local, remote, on_lo, HINT_QUESTION), port);
                    for pod in [UNKNOWN, BYPASSING, PREPARING, CAPTURING] {
                        assert_eq!(steer(&asked, &Node::new(&a, pod)), UNTOUCHED);
                    }
                }
            }
        }
    }
}

#[test]
fn in_a_pod_that_nothing_is_known_of_nobody_is_reached_and_one_that_bypasses_is_left_alone() {
    let unknown = Steer::Refuse(Counter::RefusedUnknownPod);
    for a in both_families() {
        for (local, remote, on_lo) in [
            (a.own, a.stranger, OUTSIDE),
            (a.own, a.own, OUTSIDE),
            (a.stranger, a.own, LO),
            (a.own, a.own, LO),
            (a.loopback, a.loopback, LO),
        ] {
            for kind in KINDS.into_iter().filter(|kind| *kind != HINT_QUESTION) {
                let tcp = lookup(local, remote, on_lo, kind);
                let udp = Lookup { tcp: false, ..tcp };
                assert_eq!(steer(&tcp, &Node::new(&a, UNKNOWN)), unknown);
                assert_eq!(steer(&udp, &Node::new(&a, UNKNOWN)), UNTOUCHED);
                for lookup in [tcp, udp] {
                    assert_eq!(steer(&lookup, &Node::new(&a, BYPASSING)), UNTOUCHED);
                }
            }
        }
    }
}

#[test]
fn datagrams_are_left_alone() {
    for a in both_families() {
        for (local, remote, on_lo) in
            [(a.own, a.stranger, OUTSIDE), (a.stranger, a.own, LO), (a.own, a.own, OUTSIDE)]
        {
            for kind in KINDS {
                let found = Lookup { tcp: false, ..lookup(local, remote, on_lo, kind) };
                assert_steered(&a, &[("UDP", found, UNTOUCHED, UNTOUCHED)]);
            }
        }
    }
}

#[test]
fn redirections_are_counted_by_their_direction() {
    assert_eq!(redirected(LISTENER_OUTBOUND), Counter::RedirectedOutbound);
    assert_eq!(redirected(LISTENER_INBOUND), Counter::RedirectedInbound);
    assert_eq!(redirected(LISTENER_HBONE), Counter::Hbone);
}
