//! Connections that are half open when the capture begins, or when a setting ends: they are direct, and stay so.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;
use redirect_tests::app::Conversation;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::PlainProxy;
use redirect_tests::process::{Attached, wait_for};
use redirect_tests::sockets::{PATIENCE, bound, converse, defer_accept, listen};
use redirect_tests::topology::Pod;
use socket2::Socket;

use crate::attack::translate;
use crate::{PORT, Pair, echo, iptables};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Three clients of a server that waits for their data. Their ports are 256 apart, so they have the same place among
/// the half-open connections of the pod.
#[test]
fn half_open_connections_whose_ports_are_256_apart_survive_the_end_of_a_setting() -> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let _proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        attached.set(&["--exclude-inbound-ports", &PORT.to_string()])?;
        let to = server.addr(family, PORT);
        let listener = listen(server, to)?;
        defer_accept(&listener)?;
        let mut opened = Vec::new();
        for port in [40_000, 40_256, 40_512] {
            let socket = bound(client, client.addr(family, port))?;
            socket.connect_timeout(&to.into(), PATIENCE)?;
            opened.push(TcpStream::from(socket));
        }
        thread::sleep(Duration::from_millis(50));
        attached.again()?;
        for opened in &mut opened {
            assert_heard(opened, &listener)
                .with_context(|| format!("{:?}", opened.local_addr()))?;
        }
    }
    Ok(())
}

/// The client speaks first, and then both converse.
fn assert_heard(mut opened: &TcpStream, listener: &TcpListener) -> Result<()> {
    opened.write_all(b"ping").context("write")?;
    let (mut accepted, peer) = accept_within(listener)?;
    ensure!(peer == opened.local_addr()?, "accepted {peer}");
    accepted.set_read_timeout(Some(PATIENCE))?;
    accepted.read_exact(&mut [0; 4]).context("hear")?;
    converse(&accepted, opened)
}

fn accept_within(listener: &TcpListener) -> Result<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true)?;
    let accepted = wait_for("a connection", PATIENCE, || match listener.accept() {
        Ok(accepted) => Ok(Some(accepted)),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e.into()),
    })?;
    accepted.0.set_nonblocking(false)?;
    Ok(accepted)
}

/// Half open in the kernel, which knows it by the port that the pod's netfilter gave it; on the wire it has another.
#[test]
fn half_open_connection_with_a_translated_port_survives_the_end_of_a_setting() -> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let _proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        attached.set(&["--exclude-inbound-ports", "80,8080"])?;
        translate(server, family, "PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080")?;
        let listener = listen(server, server.addr(family, PORT))?;
        defer_accept(&listener)?;
        let to = server.addr(family, 80);
        let opened = client.netns.run(|| Ok(TcpStream::connect(to)?))?;
        thread::sleep(Duration::from_millis(50));
        attached.again()?;
        assert_heard(&opened, &listener)?;
    }
    Ok(())
}

/// It became half open before the agent knew the pod, so it has no mark.
#[test]
fn half_open_connection_from_before_the_agent_survives_enrollment() -> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let to = server.addr(family, PORT);
        let listener = listen(server, to)?;
        defer_accept(&listener)?;
        let opened = client.netns.run(|| Ok(TcpStream::connect(to)?))?;
        let _proxy = PlainProxy::start(&server.netns)?;
        let _attached = Attached::new(topology, server)?;
        assert_heard(&opened, &listener)?;
    }
    Ok(())
}

/// The client never got the SYN-ACK, and gets the next one after the capture has begun.
#[test]
fn connections_whose_syn_ack_got_lost_before_enrollment_are_not_reset() -> Result<()> {
    const CLIENTS: u16 = 200;
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let _app = echo(server, family)?;
        let proxy = PlainProxy::start(&server.netns)?;
        let to = server.addr(family, PORT);
        let lost = "INPUT -p tcp --sport 8080 --tcp-flags SYN,ACK SYN,ACK -j DROP";
        iptables(client, family, &format!("-A {lost}"))?;
        let opening: Vec<_> = (40_000..40_000 + CLIENTS)
            .map(|port| start_to_open(client, client.addr(family, port), to))
            .collect::<Result<_>>()?;
        let _attached = Attached::new(topology, server)?;
        iptables(client, family, &format!("-D {lost}"))?;
        for socket in opening {
            let mut opened = wait_until_open(socket)?;
            ensure!(opened.answer().saw_peer == opened.local_addr()?, "{:?}", opened.answer());
            opened.exchange(b"ping")?;
        }
        let relayed = proxy.relayed();
        ensure!(relayed.is_empty(), "by way of the proxy: {relayed:?}");
    }
    Ok(())
}

/// Sends the SYN.
fn start_to_open(pod: &Pod, own: SocketAddr, to: SocketAddr) -> Result<Socket> {
    let socket = bound(pod, own)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
        other => bail!("connect from {own}: {other:?}"),
    }
}

fn wait_until_open(socket: Socket) -> Result<Conversation> {
    wait_for("a connection", PATIENCE, || {
        if let Some(error) = socket.take_error()? {
            return Err(error).context("open a connection");
        }
        Ok(socket.peer_addr().ok())
    })?;
    socket.set_nonblocking(false)?;
    Conversation::new(socket.into(), PATIENCE)
}
