//! Attacks on the rule that a connection without a peer leaves past the proxy only if it is known to be direct,
//! and connections that this rule must not cut. They take an agent that prepares a pod and waits for its proxy.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::libc::{self, c_int};
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use redirect_ebpf::abi::MARK_DIRECT;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::sniff::Sniffer;
use redirect_tests::sockets::{bound, converse, defer_accept, is_half_open, listen};
use rustix::net::connect_unspec;
use socket2::{SockRef, Socket};

use crate::cluster::{Cluster, PORT, SOON};

const CLIENT_PORT: u16 = 40_000;
const SECRET: &[u8] = b"Authorization: Bearer secret";

// Source: Linux `include/uapi/linux/in.h`, IP_MINTTL.
const IP_MINTTL: c_int = 21;
sockopt_impl!(MinTtl, SetOnly, libc::IPPROTO_IP, IP_MINTTL, c_int);

/// Apache httpd sets `TCP_DEFER_ACCEPT`: a connection stays half open in the kernel until its client speaks. That
/// is longer than a switch, and the SYN-ACK is not sent again.
#[test]
fn connection_that_waits_for_its_clients_data_survives_enrollment() -> Result<()> {
    let family = Family::V4;
    let mut cluster = Cluster::prepared()?;
    let listener = listen(&cluster.server, cluster.server.addr(family, PORT))?;
    defer_accept(&listener)?;
    let opened: TcpStream =
        cluster.client.netns.run(|| Ok(TcpStream::connect(cluster.server.addr(family, PORT))?))?;
    cluster.node.start_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    thread::sleep(Duration::from_millis(500));
    (&opened).write_all(b"ping")?;
    let (mut accepted, peer) = listener.accept()?;
    assert_eq!(peer, opened.local_addr()?);
    accepted.read_exact(&mut [0; 4]).context("hear")?;
    converse(&accepted, &opened)
}

/// A connection that was half open when the capture began, and on which nobody has spoken, when settings change.
#[test]
fn half_open_connection_from_before_the_capture_survives_a_change_of_settings() -> Result<()> {
    let family = Family::V4;
    let mut cluster = Cluster::prepared()?;
    let listener = listen(&cluster.server, cluster.server.addr(family, PORT))?;
    let opened = half_open(&mut cluster, family)?;
    opened.set_nonblocking(false)?;
    let opened = TcpStream::from(opened);
    let (accepted, peer) = listener.accept()?;
    assert_eq!(peer, opened.local_addr()?);
    let Cluster { node, server, .. } = &cluster;
    node.change_a_setting(server)?;
    converse(&opened, &accepted)
}

/// A connection to the server, from `CLIENT_PORT`: its SYN-ACK was lost before the capture, and is sent again
/// after it.
fn half_open(cluster: &mut Cluster, family: Family) -> Result<Socket> {
    let to = cluster.server.addr(family, PORT);
    let lost = format!("route add blackhole {}", cluster.client.ip(family));
    cluster.topology.node(0).ip(&lost)?;
    let opened = bound(&cluster.client, cluster.client.addr(family, CLIENT_PORT))?;
    opened.set_nonblocking(true)?;
    let _in_progress = opened.connect(&to.into());
    wait_for("half a connection", SOON, || Ok(is_half_open(&cluster.server.netns)?.then_some(())))?;
    cluster.node.start_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.topology.node(0).ip(&lost.replace("add", "del"))?;
    wait_for("the other half", Duration::from_secs(20), || {
        Ok((!is_half_open(&cluster.server.netns)?).then_some(()))
    })?;
    Ok(opened)
}

/// No capability. The accomplice opens a connection while the pod is prepared, and ends it after the capture. Much
/// later, the application makes a listener from a socket with the mark of a direct connection (a probe's would
/// do), and the proxy happens to call it from the port that the accomplice has used.
#[test]
fn half_open_connection_that_has_ended_does_not_open_a_way_past_the_proxy() -> Result<()> {
    let family = Family::V4;
    let mut cluster = Cluster::prepared()?;
    let target = listen(&cluster.client, cluster.client.addr(family, 9001))?;
    let listener = listen(&cluster.server, cluster.server.addr(family, PORT))?;
    let old: Socket = cluster
        .server
        .netns
        .run(|| Ok(TcpStream::connect(cluster.client.addr(family, 9001))?))?
        .into();
    let _accepted = target.accept()?;
    let opened = half_open(&mut cluster, family)?;
    opened.set_linger(Some(Duration::ZERO))?;
    drop((opened, listener.accept()?, listener));
    ensure!(old.mark()? == MARK_DIRECT, "{:#x}", old.mark()?);
    connect_unspec(&old).context("disconnect")?;

    let (server, client) = (&cluster.server, &cluster.client);
    // In place of some thousand attempts, and of minutes.
    server.netns.set_sysctl("net/ipv4/ip_local_port_range", "40000 40000")?;
    server.netns.set_sysctl("net/ipv4/tcp_orphan_retries", "1")?;
    old.set_reuse_address(true)?;
    old.bind(&server.addr(family, PORT).into())?;
    old.listen(1)?;
    let caller = client.netns.run(|| Ok(TcpStream::connect(server.addr(family, PORT))?))?;
    let (socket, peer) = old.accept().context("accept the proxy's call")?;
    let peer = peer.as_socket().context("no address")?;
    ensure!(peer == client.addr(family, CLIENT_PORT), "{peer}");
    ensure!(caller.local_addr()? != peer, "it is not by the proxy");
    setsockopt(&socket.as_fd(), MinTtl, &200)?;
    SockRef::from(&caller).set_linger(Some(Duration::ZERO))?;
    drop(caller);
    // The stand-in waits for the application to close, which ztunnel does not after a reset.
    cluster.node.kill_proxy()?;
    let Cluster { server, client, .. } = &cluster;
    wait_for("the proxy's end to be gone", Duration::from_secs(30), || {
        let left = server.netns.output("ss", &["-Htan", "src", &format!("{peer}")])?;
        Ok(left.trim().is_empty().then_some(()))
    })?;
    let wire = Sniffer::start(&client.netns, "eth0")?;
    TcpStream::from(socket).write_all(SECRET)?;
    thread::sleep(Duration::from_secs(1));
    let leaked: Vec<_> =
        wire.finish().into_iter().filter(|seen| seen.segment.payload == SECRET).collect();
    ensure!(leaked.is_empty(), "past the proxy: {leaked:?}");
    Ok(())
}
