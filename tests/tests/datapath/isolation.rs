//! What a pod, or somebody outside, sends with the address of another pod.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use redirect_ebpf::abi::{PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::app::{App, Call};
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns};
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::{Attached, wait_for};
use redirect_tests::raw::{ACK, PSH, SYN, Segment, Wire, send_from, syn_cookie};
use redirect_tests::sniff::Sniffer;
use redirect_tests::sock_diag::{self, Verb};
use redirect_tests::topology::{Pod, Style, Topology};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{PORT, assert_relayed, echo};

both_families! {
    neighbour_does_not_speak_in_a_pods_name,
    neighbour_does_not_reach_a_pods_inbound_listener_past_its_interface,
    neighbour_does_not_use_up_a_pods_grace,
    neighbour_that_destroys_sockets_by_address_destroys_none_of_a_pod,
    forged_sources_reach_neither_the_application_nor_the_proxy,
}

/// More than any backlog of the proxy holds.
const FLOOD: usize = 600;
/// How long it is looked whether something does not happen.
const A_WHILE: Duration = Duration::from_millis(500);
const SOON: Duration = Duration::from_secs(10);
/// The grace of three seconds, and the SYN's next repetition after it.
const GRACE_IS_OVER: Duration = Duration::from_secs(15);
/// The port that raw segments come from.
const RAW_PORT: u16 = 1000;

/// Pods of one node, in the mesh, and one that is not.
struct Neighbours {
    a: Pod,
    b: Pod,
    outside: Pod,
    topology: Topology,
}

impl Neighbours {
    fn new() -> Result<Self> {
        let mut topology = Topology::new(&[Style::Routed, Style::Bridged])?;
        let a = topology.add_pod(0, "default", "a")?;
        let b = topology.add_pod(0, "default", "b")?;
        let outside = topology.add_pod(1, "default", "outside")?;
        // As under load, when a backlog overflows.
        b.netns.set_sysctl("net/ipv4/tcp_syncookies", "2")?;
        Ok(Self { a, b, outside, topology })
    }
}

/// A non-blocking connection from an address that is not the namespace's own. IPv6 asks for no
/// capability, IPv4 for NET_RAW, which containers have.
fn call_as(source: IpAddr, to: SocketAddr) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    match source {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    socket.bind(&SocketAddr::new(source, 0).into()).with_context(|| format!("bind {source}"))?;
    socket.set_nonblocking(true)?;
    // In progress, or refused at once.
    let _begun = socket.connect(&to.into());
    Ok(socket)
}

/// Opens connections, and says something on one whose SYN cookie was learnt elsewhere: where there
/// are cookies, a first segment opens it and carries data.
fn speak_as(topology: &Topology, from: &Netns, src: SocketAddr, dst: SocketAddr) -> Result<()> {
    let _flood =
        from.run(|| (0..FLOOD).map(|_| call_as(src.ip(), dst)).collect::<Result<Vec<_>>>())?;
    send_from(from, &first_words(topology, src, dst)?)
}

/// The segment that follows a SYN and its answer, which is a cookie.
fn first_words(topology: &Topology, src: SocketAddr, dst: SocketAddr) -> Result<Segment> {
    let syn = Segment { src, dst, seq: 0x1000_0000, ack: 0, flags: SYN, payload: Vec::new() };
    let ack = syn_cookie(topology, &syn)?.wrapping_add(1);
    let payload = b"stolen\n".to_vec();
    Ok(Segment { seq: syn.seq + 1, ack, flags: ACK | PSH, payload, ..syn })
}

/// Checks for a while that it does not become true.
fn assert_never(what: &str, mut is: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + A_WHILE;
    wait_for("a while to be over", SOON, || {
        ensure!(!is(), "{what}");
        Ok((Instant::now() > deadline).then_some(()))
    })
}

/// Makes calls from and to `b` by its proxy: every listener of it is known by then.
fn assert_served(family: Family, pods: &Neighbours, proxy: &PlainProxy) -> Result<()> {
    let Neighbours { b, outside, .. } = pods;
    for (from, to, via) in [(b, outside, Via::Outbound), (outside, b, Via::Inbound)] {
        let addr = to.addr(family, PORT);
        let conversation = Call::to(addr).open(&from.netns)?;
        let answer = conversation.answer();
        assert_eq!((&answer.by, answer.saw_peer.ip()), (&to.name, from.ip(family)));
        assert_relayed(proxy, via, &conversation, addr)?;
    }
    Ok(())
}

/// The neighbour says something from `src` to `dst`, and b's proxy must not hear of it. By its own
/// proxy, and in its own name, the neighbour may call whom it likes.
fn assert_not_heard(
    family: Family,
    pods: &Neighbours,
    (src, dst): (SocketAddr, SocketAddr),
) -> Result<()> {
    let Neighbours { a, b, outside, topology } = pods;
    let apps = [echo(b, family)?, echo(outside, family)?];
    let (_as, bs) = (PlainProxy::start(&a.netns)?, PlainProxy::start(&b.netns)?);
    let _attached = (Attached::new(topology, a)?, Attached::new(topology, b)?);
    assert_served(family, pods, &bs)?;
    let claims_to_be = |peer: SocketAddr| peer.ip() == src.ip();
    let heard = || bs.relayed().iter().filter(|relayed| claims_to_be(relayed.peer)).count();
    let reached = || {
        let accepted = apps.iter().flat_map(App::accepted);
        accepted.filter(|accepted| claims_to_be(accepted.peer)).count()
    };
    let before = (heard(), reached());

    speak_as(topology, &a.netns, src, dst)?;

    assert_never("b's proxy, or an application, heard it", || (heard(), reached()) != before)?;
    assert_served(family, pods, &bs)
}

/// The data would leave by way of b's proxy, as b's.
fn neighbour_does_not_speak_in_a_pods_name(family: Family) -> Result<()> {
    let pods = Neighbours::new()?;
    let (src, dst) = (pods.b.addr(family, RAW_PORT), pods.outside.addr(family, PORT));
    assert_not_heard(family, &pods, (src, dst))
}

/// There no policy of the network sees it.
fn neighbour_does_not_reach_a_pods_inbound_listener_past_its_interface(
    family: Family,
) -> Result<()> {
    let pods = Neighbours::new()?;
    let (src, dst) = (pods.outside.addr(family, RAW_PORT), pods.b.addr(family, PORT));
    assert_not_heard(family, &pods, (src, dst))
}

/// Since when a proxy is away counts from the first call that missed it, and that is the pod's own.
fn neighbour_does_not_use_up_a_pods_grace(family: Family) -> Result<()> {
    let pods = Neighbours::new()?;
    let Neighbours { a, b, outside, topology } = &pods;
    let _app = echo(outside, family)?;
    let _attached = (Attached::new(topology, a)?, Attached::new(topology, b)?);
    let to = outside.addr(family, PORT);

    let _spoofed = a.netns.run(|| call_as(b.ip(family), to))?;
    // When the grace of the neighbour's own call is over, that of the call before it is, too.
    let call = Call::to(to).within(GRACE_IS_OVER);
    wait_for("the grace to be over", GRACE_IS_OVER, || Ok(call.make(&a.netns)?.refusal().ok()))?;

    let sniffer = Sniffer::start(&b.netns, "lo")?;
    let (outcome, proxy) = thread::scope(|scope| {
        let calling = scope.spawn(|| call.make(&b.netns));
        wait_for("the call", SOON, || Ok(sniffer.seen().iter().find(|s| s.is_syn()).map(drop)))?;
        let proxy = PlainProxy::start(&b.netns)?;
        let outcome = calling.join().map_err(|_| anyhow!("the calling thread panicked"))?;
        anyhow::Ok((outcome?, proxy))
    })?;
    let answer = outcome.answer()?;
    assert_eq!((answer.by.as_str(), answer.saw_peer.ip()), ("outside", b.ip(family)));
    assert_eq!(proxy.relayed_via(Via::Outbound).len(), 1);
    Ok(())
}

fn neighbour_that_destroys_sockets_by_address_destroys_none_of_a_pod(family: Family) -> Result<()> {
    let pods = Neighbours::new()?;
    let Neighbours { a, b, outside, topology } = &pods;
    let _apps = [echo(b, family)?, echo(outside, family)?];
    let (_as, bs) = (PlainProxy::start(&a.netns)?, PlainProxy::start(&b.netns)?);
    let _attached = (Attached::new(topology, a)?, Attached::new(topology, b)?);
    assert_served(family, &pods, &bs)?;

    for port in [PORT, PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE] {
        for (local, remote) in [(b, outside), (outside, b), (b, a), (b, b)] {
            // As if it had come in on no interface, on `lo`, and on eth0.
            for interface in 0..3 {
                let (local, remote) = (local.addr(family, port), remote.addr(family, RAW_PORT));
                sock_diag::ask(&a.netns, Verb::Destroy, local, remote, interface)?;
            }
        }
    }

    assert_served(family, &pods, &bs)
}

/// What the pod calls itself is left alone; what only says so comes from elsewhere. Its SYN may be
/// lost: the segment after it counts, where the application answers by cookies.
fn forged_sources_reach_neither_the_application_nor_the_proxy(family: Family) -> Result<()> {
    let pods = Neighbours::new()?;
    let Neighbours { b, outside, topology, .. } = &pods;
    let apps = [echo(b, family)?, echo(outside, family)?];
    let proxy = PlainProxy::start(&b.netns)?;
    let _attached = Attached::new(topology, b)?;
    for allowed in ["accept_local", "route_localnet"] {
        b.netns.set_sysctl(&format!("net/ipv4/conf/all/{allowed}"), "1")?;
    }
    assert_served(family, &pods, &proxy)?;
    let before = (proxy.relayed(), apps[0].accepted());

    let (own, stranger, loopback) = (b.ip(family), outside.ip(family), family.localhost());
    let wire = Wire::open(topology, b)?;
    for (number, (src, dst)) in
        [(own, own), (loopback, own), (own, loopback), (stranger, loopback), (loopback, loopback)]
            .into_iter()
            .enumerate()
    {
        let src = SocketAddr::new(src, RAW_PORT + u16::try_from(number)?);
        let words = first_words(topology, src, SocketAddr::new(dst, PORT))?;
        let seq = words.seq - 1;
        wire.send_segment(&Segment {
            seq,
            ack: 0,
            flags: SYN,
            payload: Vec::new(),
            ..words.clone()
        })?;
        wire.send_segment(&words)?;
    }

    assert_never("they reached somebody", || (proxy.relayed(), apps[0].accepted()) != before)
        .with_context(|| format!("{:?}, {:?}", proxy.relayed(), apps[0].accepted()))?;
    assert_served(family, &pods, &proxy)
}
