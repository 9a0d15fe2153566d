//! What else an application or a client may try with sockets of the kernel's own.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt::TcpFastOpenConnect};
use nix::{libc, setsockopt_impl, sockopt_impl};
use redirect_tests::app::{Answer, Call, Outcome, read_greeting};
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns};
use redirect_tests::plain_proxy::{PlainProxy, Policy, Relayed, Via};
use redirect_tests::process::{Attached, wait_for};
use redirect_tests::sniff::{Sighting, Sniffer};
use redirect_tests::topology::Pod;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{PORT, Pair, echo};

both_families! {
    unusual_sockets_are_captured_outbound,
    unusual_sockets_do_not_get_past_a_strict_proxy,
    client_with_the_ports_of_the_proxys_connection_is_not_answered_past_it,
}

const PATIENCE: Duration = Duration::from_secs(10);
/// Of both ends, on every listener, without cookies.
const FAST_OPEN: &str = "1543";
const SPOKEN: &[u8] = b"hello\n";

sockopt_impl!(
    /// The interface that packets leave by which are not bound to one.
    UnicastInterface,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_UNICAST_IF,
    u32
);
sockopt_impl!(
    /// The same for IPv6.
    UnicastInterfaceV6,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_UNICAST_IF,
    u32
);

/// How a client's socket is unlike others.
#[derive(Clone, Copy, Debug)]
enum Unusual {
    /// Its SYN carries data.
    FastOpen,
    /// It speaks multipath TCP.
    Multipath,
    /// Its packets leave by an interface that it names.
    NamesInterface,
}

impl Unusual {
    const ALL: [Self; 3] = [Self::FastOpen, Self::Multipath, Self::NamesInterface];

    /// Connects and speaks first; the line that comes back, and the client's own address.
    fn call(self, netns: &Netns, to: SocketAddr) -> Result<(String, SocketAddr)> {
        netns.run(|| {
            let protocol = match self {
                Self::Multipath => Protocol::MPTCP,
                _ => Protocol::TCP,
            };
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            match self {
                Self::FastOpen => setsockopt(&socket.as_fd(), TcpFastOpenConnect, &true)?,
                Self::Multipath => {}
                Self::NamesInterface => {
                    let index = nix::net::if_::if_nametoindex("eth0")?.to_be();
                    match to {
                        SocketAddr::V4(_) => setsockopt(&socket.as_fd(), UnicastInterface, &index)?,
                        SocketAddr::V6(_) => {
                            setsockopt(&socket.as_fd(), UnicastInterfaceV6, &index)?;
                        }
                    }
                }
            }
            socket.connect(&to.into()).context("connect")?;
            let mut stream = TcpStream::from(socket);
            // Where a server closes at once, these are the errors.
            let _sent = stream.write_all(SPOKEN);
            let mut line = String::new();
            let _end = BufReader::new(&stream).read_line(&mut line);
            Ok((line, stream.local_addr().context("read the own address")?))
        })
    }
}

fn takes_fast_open(pods: [&Pod; 2]) -> Result<()> {
    pods.iter().try_for_each(|pod| pod.netns.set_sysctl("net/ipv4/tcp_fastopen", FAST_OPEN))
}

fn unusual_sockets_are_captured_outbound(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    takes_fast_open([client, server])?;
    let app = echo(server, family)?;
    let proxy = PlainProxy::start(&client.netns)?;
    let _attached = Attached::new(topology, client)?;

    let to = server.addr(family, PORT);
    for unusual in Unusual::ALL {
        let (line, from) = unusual.call(&client.netns, to)?;
        let answer = read_greeting(&line).with_context(|| format!("{unusual:?}: {line:?}"))?;
        assert_eq!(answer.by, "server", "{unusual:?}");
        // By way of the proxy, from a port of its own.
        assert_eq!(answer.saw_peer.ip(), from.ip(), "{unusual:?}");
        assert_ne!(answer.saw_peer, from, "{unusual:?}");
        let expected = Relayed { via: Via::Outbound, peer: from, destination: to };
        assert_eq!(proxy.relayed().last(), Some(&expected), "{unusual:?}");
    }
    assert_eq!(proxy.relayed().len(), Unusual::ALL.len());
    assert_eq!(app.accepted().len(), Unusual::ALL.len());
    Ok(())
}

/// An application that takes whatever there is: its listener speaks multipath TCP, too.
fn multipath_app(pod: &Pod, family: Family) -> Result<TcpListener> {
    let any = SocketAddr::new(family.any(), PORT + 1);
    pod.netns.run(|| {
        let socket = Socket::new(Domain::for_address(any), Type::STREAM, Some(Protocol::MPTCP))?;
        socket.bind(&any.into())?;
        socket.listen(128)?;
        socket.set_nonblocking(true)?;
        Ok(TcpListener::from(socket))
    })
}

fn unusual_sockets_do_not_get_past_a_strict_proxy(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    takes_fast_open([client, server])?;
    let (app, multipath) = (echo(server, family)?, multipath_app(server, family)?);
    let policy = Policy { strict: true, ..Policy::default() };
    let proxy = PlainProxy::with_policy(&server.netns, policy)?;
    let _attached = Attached::new(topology, server)?;

    let sniffer = Sniffer::start(topology.node(client.node), &client.host_interface)?;
    for port in [PORT, PORT + 1] {
        let to = server.addr(family, port);
        for unusual in Unusual::ALL {
            let (line, from) = unusual.call(&client.netns, to)?;
            assert_eq!(line, "", "{unusual:?} to {to}");
            let expected = Relayed { via: Via::Inbound, peer: from, destination: to };
            assert_eq!(proxy.relayed().last(), Some(&expected), "{unusual:?} to {to}");
        }
    }

    let data_comes_first =
        |seen: &Sighting| seen.is_syn() && seen.segment.payload.ends_with(SPOKEN);
    assert!(sniffer.finish().iter().any(data_comes_first), "no SYN had data");
    assert_eq!(app.accepted(), []);
    assert_eq!(
        multipath.accept().map_err(|e| e.kind()).err(),
        Some(std::io::ErrorKind::WouldBlock)
    );
    Ok(())
}

/// The proxy calls the application from the client's address: a SYN of the client from that very port
/// meets a connection, which must neither answer it nor suffer.
fn client_with_the_ports_of_the_proxys_connection_is_not_answered_past_it(
    family: Family,
) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let app = echo(server, family)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    let to = server.addr(family, PORT);
    let mut open = Call::to(to).open(&client.netns)?;
    let Answer { saw_peer: proxys, .. } = open.answer().clone();
    assert_ne!(proxys, open.local_addr()?);

    let outcome = Call::to(to).from(proxys).within(Duration::from_secs(1)).make(&client.netns)?;

    assert!(!matches!(outcome, Outcome::Answered(_)), "{outcome}");
    open.exchange(b"still there?")?;
    assert_eq!((app.accepted().len(), proxy.relayed().len()), (1, 1));
    drop(open);
    let answer = wait_for("the port to be free", PATIENCE, || {
        let outcome = Call::to(to).from(proxys).within(PATIENCE).make(&client.netns)?;
        Ok(outcome.answer().ok())
    })?;
    assert_eq!((answer.by.as_str(), answer.saw_peer.ip()), ("server", client.ip(family)));
    assert_eq!(proxy.relayed_via(Via::Inbound).last().map(|relayed| relayed.peer), Some(proxys));
    Ok(())
}
