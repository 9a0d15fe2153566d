//! What is neither TCP nor DNS has nothing to do with the mesh.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, SockRef, Socket, Type};

use crate::cluster::{Cluster, SOON};

both_families! {
    udp_is_left_alone,
    sctp_is_left_alone,
    icmp_is_left_alone,
    multicast_is_left_alone,
}

const SCTP: i32 = 132;
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;
/// How long a socket waits at a time.
const TICK: Duration = Duration::from_millis(100);

/// Runs `talk` with a pod in the mesh and a pod outside, and checks that neither the programs nor the
/// proxy have seen anything of it.
fn unseen(talk: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let seen = || -> Result<_> {
        let counters = cluster.node.pod(&cluster.server)?.context("no such pod")?.counters;
        Ok((counters, cluster.node.records()?.len()))
    };
    let before = seen()?;
    talk(&cluster)?;
    ensure!(seen()? == before, "seen: {:?} and then {:?}", before, seen()?);
    Ok(())
}

fn udp(netns: &Netns, at: SocketAddr) -> Result<UdpSocket> {
    let socket = netns.run(|| UdpSocket::bind(at).with_context(|| format!("bind {at}")))?;
    socket.set_read_timeout(Some(SOON)).context("set a deadline")?;
    Ok(socket)
}

fn udp_is_left_alone(family: Family) -> Result<()> {
    unseen(|Cluster { server, client, .. }| {
        // The proxy's own ports, and QUIC's, too.
        for port in [443, 8080, 15001, 15006, 15008] {
            for (from, to) in [(server, client), (client, server)] {
                let listener = udp(&to.netns, to.addr(family, port))?;
                let caller = udp(&from.netns, from.addr(family, 0))?;
                caller.send_to(b"call", to.addr(family, port)).context("call")?;
                let mut buffer = [0; 16];
                let (length, peer) = listener.recv_from(&mut buffer).context("be called")?;
                ensure!(&buffer[..length] == b"call" && peer == caller.local_addr()?, "{peer}");
                listener.send_to(b"answer", peer).context("answer")?;
                let (length, peer) = caller.recv_from(&mut buffer).context("be answered")?;
                ensure!(&buffer[..length] == b"answer" && peer == to.addr(family, port), "{peer}");
            }
        }
        Ok(())
    })
}

/// A socket for all packets of a protocol.
fn raw(netns: &Netns, family: Family, protocol: i32) -> Result<UdpSocket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let socket = netns.run(|| {
        Socket::new(domain, Type::RAW, Some(Protocol::from(protocol))).context("open a raw socket")
    })?;
    socket.set_read_timeout(Some(TICK)).context("set a deadline")?;
    // For its calls alone: they are those of any socket without connections.
    Ok(socket.into())
}

/// Waits for a packet with such a payload; where it comes from.
fn receive(socket: &UdpSocket, family: Family, is: impl Fn(&[u8]) -> bool) -> Result<IpAddr> {
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        let mut buffer = [0; 256];
        let (length, from) = match socket.recv_from(&mut buffer) {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            received => received.context("receive")?,
        };
        // A raw socket of IPv4 shows the header, one of IPv6 does not.
        let header = if family == Family::V4 { 20 } else { 0 };
        if buffer[..length].get(header..).is_some_and(&is) {
            return Ok(from.ip());
        }
    }
    bail!("waited in vain")
}

fn sctp_is_left_alone(family: Family) -> Result<()> {
    unseen(|Cluster { server, client, .. }| {
        // From port 5000 to 8080, tag 0, a checksum that nobody looks at, and a chunk INIT.
        let mut init = vec![0x13, 0x88, 0x1f, 0x90, 0, 0, 0, 0, 1, 2, 3, 4, 1, 0, 0, 20];
        init.extend([0xab; 16]);
        for (from, to) in [(server, client), (client, server)] {
            let (sender, receiver) =
                (raw(&from.netns, family, SCTP)?, raw(&to.netns, family, SCTP)?);
            sender.send_to(&init, to.addr(family, 0)).with_context(|| format!("send to {to}"))?;
            let peer = receive(&receiver, family, |packet| packet == init)?;
            ensure!(peer == from.ip(family), "{to} saw {peer} and not {from}");
        }
        Ok(())
    })
}

/// An echo request, or the reply to it. In IPv6 the kernel fills the checksum in.
fn echo(kind: u8, family: Family) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1];
    message.extend(b"untouched.");
    if family == Family::V4 {
        let words = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let sum = words.sum::<u32>();
        let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&folded.to_be_bytes());
    }
    message
}

fn icmp_is_left_alone(family: Family) -> Result<()> {
    let (protocol, request, reply) = match family {
        Family::V4 => (1, ECHO_REQUEST_V4, ECHO_REPLY_V4),
        Family::V6 => (58, ECHO_REQUEST_V6, ECHO_REPLY_V6),
    };
    unseen(|Cluster { server, client, .. }| {
        for (from, to) in [(server, client), (client, server)] {
            let (caller, watcher) =
                (raw(&from.netns, family, protocol)?, raw(&to.netns, family, protocol)?);
            let message = echo(request, family);
            // But for the checksum, which the kernel fills in.
            let is = |kind, packet: &[u8]| {
                packet.first() == Some(&kind) && packet.get(4..) == message.get(4..)
            };
            caller.send_to(&message, to.addr(family, 0)).with_context(|| format!("ping {to}"))?;
            let asked = receive(&watcher, family, |packet| is(request, packet))?;
            ensure!(asked == from.ip(family), "{to} saw {asked} and not {from}");
            let answered = receive(&caller, family, |packet| is(reply, packet))?;
            ensure!(answered == to.ip(family), "{from} saw {answered} and not {to}");
        }
        Ok(())
    })
}

fn multicast_is_left_alone(family: Family) -> Result<()> {
    const PORT: u16 = 5353;
    let group: IpAddr = match family {
        Family::V4 => Ipv4Addr::new(239, 1, 2, 3).into(),
        Family::V6 => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x1234).into(),
    };
    unseen(|Cluster { server, topology, .. }| {
        let join = |netns: &Netns, interface: &str| -> Result<UdpSocket> {
            let line = netns.output("ip", &["-oneline", "link", "show", "dev", interface])?;
            let index = line.split(':').next().context("no index")?.parse().context("index")?;
            let socket = udp(netns, SocketAddr::new(family.any(), PORT))?;
            let bound = SockRef::from(&socket);
            bound.bind_device(Some(interface.as_bytes())).context("bind to an interface")?;
            match group {
                IpAddr::V4(group) => {
                    let by = InterfaceIndexOrAddress::Index(index);
                    bound.join_multicast_v4_n(&group, &by).context("join a group")?;
                    socket.set_multicast_loop_v4(false).context("hear only others")?;
                }
                IpAddr::V6(group) => {
                    socket.join_multicast_v6(&group, index).context("join a group")?;
                    socket.set_multicast_loop_v6(false).context("hear only others")?;
                }
            }
            Ok(socket)
        };
        let in_pod = join(&server.netns, "eth0")?;
        let on_node = join(topology.node(0), &server.host_interface)?;
        for (from, to) in [(&in_pod, &on_node), (&on_node, &in_pod)] {
            from.send_to(b"to all", SocketAddr::new(group, PORT)).context("send to the group")?;
            let mut buffer = [0; 16];
            let (length, peer) = to.recv_from(&mut buffer).context("be sent to")?;
            ensure!(&buffer[..length] == b"to all", "from {peer}");
        }
        Ok(())
    })
}
