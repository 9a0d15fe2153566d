//! What of a pod's sockets has no peer in the pod, although its connection was never direct: the proxy's end is
//! gone, or was another socket of the application. None of it leaves past the proxy.
//!
//! None of this needs a capability.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::libc::{self, c_int};
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use redirect_ebpf::abi::MARK_DIRECT;
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::PlainProxy;
use redirect_tests::process::{Attached, wait_for};
use redirect_tests::sniff::Sniffer;
use redirect_tests::topology::Pod;
use rustix::net::connect_unspec;
use socket2::{Domain, SockRef, Socket, Type};

use crate::{PORT, Pair};

both_families! {
    connection_whose_proxy_is_gone_stays_redirected_when_settings_change,
    connection_whose_proxy_is_gone_stays_redirected_when_the_pod_leaves_and_comes_back,
    connection_that_the_proxy_opened_to_a_marked_listener_does_not_outlive_it_past_the_proxy,
    query_to_loopback_does_not_leave_by_an_interface,
}

const PATIENCE: Duration = Duration::from_secs(5);
/// How long it is looked whether something does not happen: longer than a retransmission takes.
const A_WHILE: Duration = Duration::from_secs(1);
const SECRET: &[u8] = b"GET /two\r\nAuthorization: Bearer secret\r\n\r\n";

// Source: Linux `include/uapi/linux/in.h`, IP_MINTTL; `in6.h`, IPV6_MINHOPCOUNT.
const IP_MINTTL: c_int = 21;
const IPV6_MINHOPCOUNT: c_int = 73;
sockopt_impl!(MinTtl, SetOnly, libc::IPPROTO_IP, IP_MINTTL, c_int);
sockopt_impl!(MinHops, SetOnly, libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT, c_int);

/// From now on it takes no packet of this host.
fn hear_nothing(socket: &Socket, family: Family) -> Result<()> {
    match family {
        Family::V4 => setsockopt(&socket.as_fd(), MinTtl, &200)?,
        Family::V6 => setsockopt(&socket.as_fd(), MinHops, &200)?,
    }
    Ok(())
}

/// Runs `send`, and checks that no segment with data of the pod's comes to `to`.
fn assert_nothing_arrives(from: &Pod, to: &Pod, send: impl FnOnce() -> Result<()>) -> Result<()> {
    let wire = Sniffer::start(&to.netns, "eth0")?;
    send()?;
    thread::sleep(A_WHILE);
    let seen = wire.finish();
    let of_pod = |ip| ip == from.v4 || ip == from.v6;
    let leaked: Vec<_> = seen
        .iter()
        .filter(|seen| of_pod(seen.segment.src.ip()) && seen.segment.payload.ends_with(SECRET))
        .collect();
    ensure!(leaked.is_empty(), "past the proxy: {leaked:?}");
    Ok(())
}

/// A connection of the server's by its proxy, which has been replaced since: closed by the former.
fn stale(pair: &Pair, family: Family) -> Result<(TcpStream, PlainProxy, Attached<'_>)> {
    let Pair { client, server, topology } = pair;
    let listener = client.netns.run(|| Ok(TcpListener::bind(client.addr(family, PORT))?))?;
    let proxy = PlainProxy::start(&server.netns)?;
    let attached = Attached::new(topology, server)?;
    let mut socket = server.netns.run(|| Ok(TcpStream::connect(client.addr(family, PORT))?))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let (mut accepted, _) = listener.accept().context("accept")?;
    accepted.write_all(b"hello").context("say hello")?;
    socket.read_exact(&mut [0; 5]).context("hear hello")?;
    ensure!(proxy.relayed().len() == 1, "it is not by the proxy");
    drop(proxy);
    thread::sleep(Duration::from_millis(300));
    Ok((socket, PlainProxy::start(&server.netns)?, attached))
}

/// A socket of the server's that has the mark of a direct connection, and is no longer connected.
fn older_than_the_capture(
    pair: &Pair,
    family: Family,
) -> Result<(Socket, PlainProxy, Attached<'_>)> {
    let Pair { client, server, topology } = pair;
    let target = client.netns.run(|| Ok(TcpListener::bind(client.addr(family, PORT))?))?;
    let old: Socket =
        server.netns.run(|| Ok(TcpStream::connect(client.addr(family, PORT))?))?.into();
    let _accepted = target.accept().context("accept")?;
    let proxy = PlainProxy::start(&server.netns)?;
    let attached = Attached::new(topology, server)?;
    ensure!(old.mark()? == MARK_DIRECT, "it is as old as the capture");
    connect_unspec(&old).context("disconnect")?;
    Ok((old, proxy, attached))
}

fn connection_whose_proxy_is_gone_stays_redirected_when_settings_change(
    family: Family,
) -> Result<()> {
    let pair = Pair::new()?;
    let (mut socket, _proxy, attached) = stale(&pair, family)?;
    let Pair { client, server, .. } = &pair;
    attached.set(&["--exclude-outbound-ports", "9999"])?;
    assert_nothing_arrives(server, client, || {
        let _reset = socket.write_all(SECRET);
        Ok(())
    })
}

fn connection_whose_proxy_is_gone_stays_redirected_when_the_pod_leaves_and_comes_back(
    family: Family,
) -> Result<()> {
    let pair = Pair::new()?;
    let (mut socket, _proxy, attached) = stale(&pair, family)?;
    attached.detach()?;
    let Pair { client, server, topology } = &pair;
    let _attached = Attached::new(topology, server)?;
    assert_nothing_arrives(server, client, || {
        let _reset = socket.write_all(SECRET);
        Ok(())
    })
}

/// The accomplice opens it by the proxy and resets it; the application's end hears nothing of that.
fn connection_that_the_proxy_opened_to_a_marked_listener_does_not_outlive_it_past_the_proxy(
    family: Family,
) -> Result<()> {
    let pair = Pair::new()?;
    let (old, _proxy, _attached) = older_than_the_capture(&pair, family)?;
    let Pair { client, server, .. } = &pair;
    // The kernel would send the FIN of the proxy's end for minutes.
    server.netns.set_sysctl("net/ipv4/tcp_orphan_retries", "1")?;
    old.bind(&SocketAddr::new(family.any(), 9000).into())?;
    old.listen(1)?;
    let caller = client.netns.run(|| Ok(TcpStream::connect(server.addr(family, 9000))?))?;
    let (socket, peer) = old.accept().context("accept the proxy's call")?;
    let peer = peer.as_socket().context("no address")?;
    hear_nothing(&socket, family)?;
    SockRef::from(&caller).set_linger(Some(Duration::ZERO))?;
    drop(caller);
    wait_for("the proxy's end to be gone", Duration::from_secs(30), || {
        let left = server.netns.output("ss", &["-Htan", "src", &format!("{peer}")])?;
        Ok(left.trim().is_empty().then_some(()))
    })?;
    let mut stream = TcpStream::from(socket);
    assert_nothing_arrives(server, client, || Ok(stream.write_all(SECRET)?))
}

fn query_to_loopback_does_not_leave_by_an_interface(family: Family) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { server, topology, .. } = &pair;
    let _proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    let query = redirect_tests::dns::query(1, "secret.example.com.", family.localhost())?;
    // Behind the guard, on the node's end.
    let node = topology.node(server.node);
    node.output("nft", &["add table netdev seen"])?;
    node.output(
        "nft",
        &[&format!(
            "add chain netdev seen in {{ type filter hook ingress device {} priority 0 ; }}",
            server.host_interface
        )],
    )?;
    node.output("nft", &["add rule netdev seen in udp dport 53 counter"])?;
    server.netns.run(|| {
        let socket = Socket::new(
            Domain::for_address(SocketAddr::new(family.localhost(), 53)),
            Type::DGRAM,
            None,
        )?;
        socket.bind_device(Some(b"eth0"))?;
        let _refused =
            UdpSocket::from(socket).send_to(&query, SocketAddr::new(family.localhost(), 53));
        Ok(())
    })?;
    thread::sleep(A_WHILE / 2);
    let seen = node.output("nft", &["list table netdev seen"])?;
    ensure!(seen.contains("packets 0 "), "a query has left the pod: {seen}");
    Ok(())
}

/// It calls itself from an address that is not its own, which in IPv6 needs no capability.
#[test]
fn connection_to_itself_from_a_foreign_address_does_not_leave_past_the_proxy() -> Result<()> {
    let family = Family::V6;
    let pair = Pair::new()?;
    let (old, _proxy, _attached) = older_than_the_capture(&pair, family)?;
    let Pair { client, server, .. } = &pair;
    old.set_freebind_v6(true)?;
    old.bind(&client.addr(family, 8443).into())?;
    let listener = server.netns.run(|| Ok(TcpListener::bind(server.addr(family, 9000))?))?;
    old.connect_timeout(&server.addr(family, 9000).into(), PATIENCE).context("call itself")?;
    let (mut stream, _) = listener.accept().context("accept")?;
    let own = Socket::from(stream.try_clone()?);
    hear_nothing(&own, family)?;
    old.set_linger(Some(Duration::ZERO))?;
    drop(old);
    assert_nothing_arrives(server, client, || Ok(stream.write_all(SECRET)?))
}
