//! Applications that take the proxy's ports, and addresses of the link.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener};
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::libc::{sock_filter, sock_fprog};
use nix::sys::socket::{setsockopt, sockopt::AttachReusePortCbpf};
use redirect_ebpf::abi::{PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::app::{Call, Outcome};
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns};
use redirect_tests::plain_proxy::{HBONE_NAME, PlainProxy, Policy, Via};
use redirect_tests::process::{Attached, wait_for};
use redirect_tests::topology::{Pod, Style, Topology};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{PORT, Pair, echo};

both_families! {
    application_that_joins_the_proxys_group_of_sockets_gets_no_connection,
    application_that_joins_before_the_pod_is_enrolled_gets_no_connection,
    application_on_the_proxys_ports_gets_nothing_while_the_proxy_is_away,
}

/// How often each way is called.
const CALLS: usize = 16;
/// How long a call is waited for that may be lost.
const LITTLE_PATIENCE: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(10);
const PROXY_PORTS: [u16; 3] = [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE];

/// An application's listeners on the proxy's ports.
struct Squatter(Vec<TcpListener>);

impl Squatter {
    /// In the proxy's own groups, which have one process's program for all: it gives every connection
    /// to the second socket, the application's.
    fn joining(netns: &Netns) -> Result<Self> {
        const RET: u16 = 0x06;
        let mut second = [sock_filter { code: RET, jt: 0, jf: 0, k: 1 }];
        let squatter = Self::listen(netns, true)?;
        for listener in &squatter.0 {
            let program = sock_fprog { len: 1, filter: second.as_mut_ptr() };
            setsockopt(&listener.as_fd(), AttachReusePortCbpf, &program)
                .context("attach a program to a group of sockets")?;
        }
        Ok(squatter)
    }

    fn listen(netns: &Netns, joins: bool) -> Result<Self> {
        netns.run(|| {
            let listeners = PROXY_PORTS.iter().map(|&port| {
                let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
                socket.set_reuse_port(joins)?;
                socket.set_reuse_address(!joins)?;
                socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
                socket.listen(128)?;
                socket.set_nonblocking(true)?;
                anyhow::Ok(TcpListener::from(socket))
            });
            Ok(Self(listeners.collect::<Result<_>>().context("take the proxy's ports")?))
        })
    }

    /// Whose connections it has by now.
    fn taken(&self) -> Result<Vec<(u16, SocketAddr)>> {
        let mut taken = Vec::new();
        for (listener, port) in self.0.iter().zip(PROXY_PORTS) {
            loop {
                match listener.accept() {
                    Ok((_, peer)) => taken.push((port, peer)),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e).context("accept"),
                }
            }
        }
        Ok(taken)
    }
}

/// Calls from, to, and over HBONE to the pod that the squatter is in: what came of each.
fn call_all_ways(family: Family, Pair { client, server, .. }: &Pair) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for (from, to, port) in
        [(server, client, PORT), (client, server, PORT), (client, server, PORT_HBONE)]
    {
        let call = Call::to(to.addr(family, port)).within(LITTLE_PATIENCE);
        outcomes.extend(call.at_once(&from.netns, CALLS)?);
    }
    Ok(outcomes)
}

fn application_that_joins_the_proxys_group_of_sockets_gets_no_connection(
    family: Family,
) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let _apps = [echo(client, family)?, echo(server, family)?];
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    call_all_ways(family, &pair)?.into_iter().try_for_each(|o| o.answer().map(drop))?;

    let squatter = Squatter::joining(&server.netns)?;
    let outcomes = call_all_ways(family, &pair)?;

    assert_eq!(squatter.taken()?, []);
    let by = outcomes.into_iter().map(|o| Ok(o.answer()?.by)).collect::<Result<Vec<_>>>()?;
    for (calls, name) in by.chunks(CALLS).zip(["client", "server", HBONE_NAME]) {
        assert!(calls.iter().all(|by| by == name), "not all by {name}: {calls:?}");
    }
    for via in [Via::Outbound, Via::Inbound, Via::Hbone] {
        assert_eq!(proxy.relayed_via(via).len(), 2 * CALLS, "{via:?}");
    }
    Ok(())
}

/// The pod may so take its own connections from the proxy, but not for itself.
fn application_that_joins_before_the_pod_is_enrolled_gets_no_connection(
    family: Family,
) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let apps = [echo(client, family)?, echo(server, family)?];
    let policy = Policy { strict: true, ..Policy::default() };
    let _proxy = PlainProxy::with_policy(&server.netns, policy)?;
    let squatter = Squatter::joining(&server.netns)?;
    let _attached = Attached::new(topology, server)?;

    call_all_ways(family, &pair)?;

    assert_eq!(squatter.taken()?, []);
    assert_eq!(apps[1].accepted(), []);
    Ok(())
}

fn application_on_the_proxys_ports_gets_nothing_while_the_proxy_is_away(
    family: Family,
) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let apps = [echo(client, family)?, echo(server, family)?];
    let _attached = Attached::new(topology, server)?;
    let squatter = Squatter::listen(&server.netns, false)?;

    for outcome in call_all_ways(family, &pair)? {
        let held = matches!(outcome, Outcome::Refused { .. } | Outcome::TimedOut);
        assert!(held, "without a proxy: {outcome}");
    }
    for port in PROXY_PORTS {
        let call = Call::to(server.addr(family, port)).within(LITTLE_PATIENCE);
        call.make(&client.netns)?;
    }
    assert_eq!(squatter.taken()?, []);
    assert_eq!((apps[0].accepted(), apps[1].accepted()), (vec![], vec![]));

    drop(squatter);
    let proxy = PlainProxy::start(&server.netns)?;
    wait_for("the proxy to be found", SOON, || {
        let outcomes = call_all_ways(family, &pair)?;
        Ok(outcomes.iter().all(|o| matches!(o, Outcome::Answered(_))).then_some(()))
    })?;
    for via in [Via::Outbound, Via::Inbound, Via::Hbone] {
        assert!(proxy.relayed_via(via).len() >= CALLS, "{via:?}");
    }
    Ok(())
}

/// The address that a pod has on its link, as another pod on that link calls it.
fn on_link(pod: &Pod, from: &Pod, port: u16) -> Result<SocketAddr> {
    let shown =
        pod.netns.output("ip", &["-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"])?;
    let address = shown.split(" inet6 ").nth(1).and_then(|rest| rest.split('/').next());
    let address: Ipv6Addr = address.context("no address of the link")?.parse()?;
    let scope = from.netns.run(|| Ok(nix::net::if_::if_nametoindex("eth0")?))?;
    Ok(SocketAddrV6::new(address, port, 0, scope).into())
}

struct Link {
    enrolled: Pod,
    other: Pod,
    topology: Topology,
}

impl Link {
    fn new() -> Result<Self> {
        let mut topology = Topology::new(&[Style::Bridged])?;
        let enrolled = topology.add_pod(0, "default", "enrolled")?;
        let other = topology.add_pod(0, "default", "other")?;
        Ok(Self { enrolled, other, topology })
    }
}

#[test]
fn calls_to_addresses_of_the_link_leave_as_they_are() -> Result<()> {
    let Link { enrolled, other, topology } = &Link::new()?;
    let apps = [echo(enrolled, Family::V6)?, echo(other, Family::V6)?];
    let proxy = PlainProxy::start(&enrolled.netns)?;
    let _attached = Attached::new(topology, enrolled)?;

    let conversation = Call::to(on_link(other, enrolled, PORT)?).open(&enrolled.netns)?;

    assert_eq!(conversation.answer().by, "other");
    let port = conversation.local_addr()?.port();
    let saw = conversation.answer().saw_peer;
    assert_eq!((saw.ip(), saw.port()), (on_link(enrolled, other, 0)?.ip(), port));
    assert_eq!((apps[0].accepted().len(), apps[1].accepted().len()), (0, 1));
    assert_eq!(proxy.relayed(), []);
    Ok(())
}

#[test]
fn plaintext_to_an_address_of_the_link_does_not_get_past_a_strict_proxy() -> Result<()> {
    let Link { enrolled, other, topology } = &Link::new()?;
    let app = echo(enrolled, Family::V6)?;
    let policy = Policy { strict: true, ..Policy::default() };
    let proxy = PlainProxy::with_policy(&enrolled.netns, policy)?;
    let _attached = Attached::new(topology, enrolled)?;
    let to = on_link(enrolled, other, PORT)?;

    let outcomes = Call::to(to).in_turn(&other.netns, CALLS)?;

    assert_eq!(app.accepted(), []);
    assert_eq!(outcomes, vec![Outcome::Closed { bytes: 0 }; CALLS]);
    let expected: IpAddr = on_link(other, enrolled, 0)?.ip();
    let seen = proxy.relayed_via(Via::Inbound);
    ensure!(
        seen.len() == CALLS
            && seen.iter().all(|r| (r.peer.ip(), r.destination.ip()) == (expected, to.ip())),
        "the proxy saw {seen:?}"
    );
    Ok(())
}

mod mark_of_the_proxy {
    use nix::libc::{self, IPPROTO_IP, IPPROTO_IPV6, c_int};
    use nix::{setsockopt_impl, sockopt_impl};
    use redirect_ebpf::abi::{MARK_MASK, MARK_PROXY};
    use redirect_tests::app::Conversation;
    use rustix::net::connect_unspec;
    use socket2::SockRef;

    use super::*;

    both_families! {
        application_in_the_proxys_group_gets_no_socket_of_the_proxys_when_that_ends,
        application_in_the_proxys_group_does_not_become_the_proxy_when_that_ends,
    }

    // Source: Linux `include/uapi/linux/in.h`, IP_MINTTL; `in6.h`, IPV6_MINHOPCOUNT.
    const IP_MINTTL: c_int = 21;
    const IPV6_MINHOPCOUNT: c_int = 73;
    sockopt_impl!(MinTtl, SetOnly, IPPROTO_IP, IP_MINTTL, c_int);
    sockopt_impl!(MinHops, SetOnly, IPPROTO_IPV6, IPV6_MINHOPCOUNT, c_int);

    const HALF_OPEN: usize = 16;

    fn take_answers_from(socket: &Socket, ttl: c_int) -> Result<()> {
        match socket.domain()? == Domain::IPV4 {
            true => setsockopt(&socket.as_fd(), MinTtl, &ttl)?,
            false => setsockopt(&socket.as_fd(), MinHops, &ttl)?,
        }
        Ok(())
    }

    /// An application joins the group of one of the proxy's ports, calls that port by loopback without ever
    /// taking the SYN-ACK (IP_MINTTL), and lets it come when the proxy's listener has closed. Needs the
    /// proxy's uid, and no capability. What it accepts that has the proxy's mark.
    fn steal(
        family: Family,
        netns: &Netns,
        port: u16,
        proxy: PlainProxy,
    ) -> Result<Option<Socket>> {
        let (listener, callers) = netns.run(|| {
            let listener = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
            listener.set_reuse_port(true)?;
            listener.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
            listener.listen(128)?;
            listener.set_nonblocking(true)?;
            let to = SocketAddr::new(family.localhost(), port);
            let callers = (0..HALF_OPEN).map(|_| {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
                socket.set_nonblocking(true)?;
                take_answers_from(&socket, 255)?;
                let _in_progress = socket.connect(&to.into());
                anyhow::Ok(socket)
            });
            let callers = callers.collect::<Result<Vec<_>>>()?;
            Ok((listener, callers))
        })?;
        drop(proxy);
        callers.iter().try_for_each(|socket| take_answers_from(socket, 0))?;
        let stolen = wait_for("a socket of the proxy's", SOON, || {
            while let Ok((socket, _)) = listener.accept() {
                if SockRef::from(&socket).mark()? & MARK_MASK == MARK_PROXY {
                    return Ok(Some(socket));
                }
            }
            Ok(None)
        });
        Ok(stolen.ok())
    }

    fn application_in_the_proxys_group_gets_no_socket_of_the_proxys_when_that_ends(
        family: Family,
    ) -> Result<()> {
        let pair = Pair::new()?;
        let Pair { client, server, topology } = &pair;
        let apps = [echo(client, family)?, echo(server, family)?];
        let proxy = PlainProxy::start(&server.netns)?;
        let _attached = Attached::new(topology, server)?;

        let stolen = steal(family, &server.netns, PORT_OUTBOUND, proxy)?;

        let proxy = PlainProxy::start(&server.netns)?;
        let Some(stolen) = stolen else { return Ok(()) };
        connect_unspec(&stolen).context("disconnect")?;
        stolen.set_nonblocking(false)?;
        let to = match client.addr(family, PORT) {
            SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
            to => to,
        };
        stolen.connect_timeout(&to.into(), SOON).context("connect")?;
        let conversation = Conversation::new(stolen.into(), SOON)?;
        ensure!(
            !proxy.relayed_via(Via::Outbound).is_empty(),
            "past the proxy: {:?}, {:?}",
            conversation.answer(),
            apps[0].accepted()
        );
        Ok(())
    }

    fn application_in_the_proxys_group_does_not_become_the_proxy_when_that_ends(
        family: Family,
    ) -> Result<()> {
        let pair = Pair::new()?;
        let Pair { client, server, topology } = &pair;
        let _app = echo(server, family)?;
        let strict = || Policy { strict: true, ..Policy::default() };
        let proxy = PlainProxy::with_policy(&server.netns, strict())?;
        let _attached = Attached::new(topology, server)?;

        let stolen = steal(family, &server.netns, PORT_INBOUND, proxy)?;

        let Some(stolen) = stolen else { return Ok(()) };
        connect_unspec(&stolen).context("disconnect")?;
        stolen.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT_INBOUND)).into())?;
        stolen.listen(128)?;
        stolen.set_nonblocking(true)?;
        let call = Call::to(server.addr(family, PORT)).within(LITTLE_PATIENCE);
        call.in_turn(&client.netns, 3)?;
        let _proxy = PlainProxy::with_policy(&server.netns, strict())?;
        call.in_turn(&client.netns, 3)?;

        let mut taken = Vec::new();
        while let Ok((socket, peer)) = stolen.accept() {
            taken.push((peer.as_socket(), socket.local_addr()?.as_socket()));
        }
        assert_eq!(taken, [], "plaintext to a STRICT pod came to its application");
        Ok(())
    }
}
