//! Attacks on what identifies a connection: its addresses, ports and first sequence number.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::libc::{self, c_int};
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::{Attached, succeed, wait_for};
use redirect_tests::raw::{ACK, Segment, Wire};
use redirect_tests::sniff::Sniffer;
use redirect_tests::sockets::{PATIENCE, bound, listen};
use redirect_tests::topology::Pod;
use rustix::net::connect_unspec;
use serde_json::Value;
use socket2::Socket;

use crate::{PORT, Pair};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const OWN_PORT: u16 = 30_000;
const SECRET: &[u8] = b"Authorization: Bearer secret";

// Source: Linux `include/uapi/linux/tcp.h`.
const TCP_RECV_QUEUE: c_int = 1;
const TCP_SEND_QUEUE: c_int = 2;
const NO_WINDOW_PROBE: c_int = -1;
sockopt_impl!(Repair, SetOnly, libc::IPPROTO_TCP, libc::TCP_REPAIR, c_int);
sockopt_impl!(RepairQueue, SetOnly, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, c_int);
sockopt_impl!(QueueSeq, SetOnly, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, c_int);
// `struct tcp_repair_window`.
sockopt_impl!(RepairWindow, SetOnly, libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, [u32; 5]);

/// Its next connection starts with this number. This stands for what needs no capability: a disconnected socket
/// goes on where it was, and after 4 GiB it is there again.
fn start_with(socket: &Socket, sequence: u32) -> Result<()> {
    repair(socket, sequence)?;
    setsockopt(&socket.as_fd(), Repair, &0).context("unset TCP_REPAIR")
}

/// Puts the socket under repair, with this number to start with.
fn repair(socket: &Socket, sequence: u32) -> Result<()> {
    let fd = socket.as_fd();
    setsockopt(&fd, Repair, &1).context("set TCP_REPAIR")?;
    for (queue, sequence) in [(TCP_RECV_QUEUE, 0), (TCP_SEND_QUEUE, sequence.cast_signed())] {
        setsockopt(&fd, RepairQueue, &queue).context("set TCP_REPAIR_QUEUE")?;
        setsockopt(&fd, QueueSeq, &sequence).context("set TCP_QUEUE_SEQ")?;
    }
    Ok(())
}

/// A socket of the server's that has had an excluded connection, which has ended, as has the setting; what its SYN
/// began with.
fn formerly_direct(
    family: Family,
    pair: &Pair,
    target: &TcpListener,
    proxy: &PlainProxy,
    attached: &Attached<'_>,
) -> Result<(Socket, u32)> {
    let Pair { client, server, .. } = pair;
    attached.set(&["--exclude-outbound-ports", &PORT.to_string()])?;
    let wire = Sniffer::start(&client.netns, "eth0")?;
    let own = server.addr(family, OWN_PORT);
    let socket = bound(server, own)?;
    let to = client.addr(family, PORT);
    socket.connect_timeout(&to.into(), PATIENCE).context("connect directly")?;
    let (_, peer) = target.accept()?;
    ensure!(peer == own && proxy.relayed().is_empty(), "it is not direct");
    connect_unspec(&socket).context("disconnect")?;
    attached.again()?;
    let seen = wire.finish();
    let syn = seen.iter().find(|seen| seen.is_syn()).context("no SYN")?;
    Ok((socket, syn.segment.seq))
}

/// Sends something, and checks that it does not come to the client from this very address and port.
fn assert_stays(socket: Socket, own: SocketAddr, client: &Pod) -> Result<()> {
    let wire = Sniffer::start(&client.netns, "eth0")?;
    let _reset = (&TcpStream::from(socket)).write_all(SECRET);
    thread::sleep(Duration::from_secs(1));
    let seen = wire.finish();
    let is_leaked = |segment: &Segment| segment.src == own && !segment.payload.is_empty();
    let leaked: Vec<_> = seen.iter().filter(|seen| is_leaked(&seen.segment)).collect();
    ensure!(leaked.is_empty(), "past the proxy: {leaked:?}");
    Ok(())
}

/// No capability. The record of an excluded connection outlives it. The socket makes another one that starts with
/// the same number, whose SYN never passes the guard: when the next setting changes, it counts as direct.
#[test]
fn record_of_a_former_connection_with_the_same_start_opens_no_way_past_the_proxy() -> Result<()> {
    for family in FAMILIES {
        let pair = &Pair::new()?;
        let Pair { client, server, topology } = pair;
        let (own, to) = (server.addr(family, OWN_PORT), client.addr(family, PORT));
        let target = listen(client, to)?;
        let proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        let (socket, start) = formerly_direct(family, pair, &target, &proxy, &attached)?;

        start_with(&socket, start)?;
        socket.connect_timeout(&to.into(), PATIENCE).context("connect by the proxy")?;
        let (_accepted, peer) = target.accept()?;
        ensure!(peer != own && proxy.relayed_via(Via::Outbound).len() == 1, "it is direct");
        ensure!(socket.mark()? == 0);
        attached.set(&["--exclude-outbound-ports", "9999"])?;
        assert_stays(socket, own, client)?;
    }
    Ok(())
}

/// NET_ADMIN, and a server that cooperates. The next connection has no SYN.
#[test]
#[ignore = "a hole: a repaired connection takes the record of an excluded one before it"]
fn record_of_a_former_connection_is_not_that_of_a_repaired_one() -> Result<()> {
    for family in FAMILIES {
        let pair = &Pair::new()?;
        let Pair { client, server, topology } = pair;
        let (own, to) = (server.addr(family, OWN_PORT), client.addr(family, PORT));
        let target = listen(client, to)?;
        let proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        let (socket, start) = formerly_direct(family, pair, &target, &proxy, &attached)?;

        repair(&socket, start)?;
        socket.connect(&to.into()).context("connect without a SYN")?;
        socket.set_mark(1)?;
        let windows = [0, 65_535, 65_535, 65_535, 0];
        setsockopt(&socket.as_fd(), RepairWindow, &windows).context("set TCP_REPAIR_WINDOW")?;
        setsockopt(&socket.as_fd(), Repair, &NO_WINDOW_PROBE).context("unset TCP_REPAIR")?;
        assert_stays(socket, own, client)?;
    }
    Ok(())
}

/// The agent is killed in a switch, during which an accomplice has sent a segment to a listener of the pod: it is noted
/// as direct. Needs NET_RAW, to change the mark.
#[test]
fn note_that_a_killed_agent_has_left_opens_no_way_past_the_proxy() -> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        let (own, to) = (server.addr(family, 9000), client.addr(family, 8443));
        let listener = listen(server, own)?;
        let wire = Wire::open(topology, server)?;
        let mut command = attached.command("attach")?;
        let addresses = [server.v4.to_string(), server.v6.to_string()];
        command.args(["--address", &addresses[0], "--address", &addresses[1]]);
        let mut agent = command.args(["--exclude-outbound-ports", "9999"]).spawn()?;
        wait_for("a switch", PATIENCE, || {
            let ack =
                Segment { src: to, dst: own, seq: 1, ack: 1, flags: ACK, payload: Vec::new() };
            wire.send_segment(&ack)?;
            Ok(has_notes(&attached)?.then_some(()))
        })?;
        agent.kill()?;
        agent.wait()?;
        drop(listener);
        // The programs end the switch by themselves.
        thread::sleep(Duration::from_millis(2_200));
        ensure!(has_notes(&attached)?, "the switch has ended in order");

        let target = listen(client, to)?;
        let socket = bound(server, own)?;
        socket.connect_timeout(&to.into(), PATIENCE).context("connect")?;
        let (accepted, peer) = target.accept()?;
        ensure!(peer != own && proxy.relayed_via(Via::Outbound).len() == 1, "it is direct");
        drop((accepted, proxy));
        thread::sleep(Duration::from_millis(300));
        let _proxy = PlainProxy::start(&server.netns)?;
        socket.set_mark(1)?;
        assert_stays(socket, own, client)?;
    }
    Ok(())
}

/// Whether the map `ways` has any entry.
fn has_notes(attached: &Attached<'_>) -> Result<bool> {
    let ways = attached.bpffs().join("ways");
    let dumped = succeed(Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(ways))?;
    Ok(!serde_json::from_slice::<Vec<Value>>(&dumped.stdout)?.is_empty())
}
