//! Who is called, who calls, and what stays away from the proxy.

use std::collections::HashMap;
use std::io::Read as _;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Result;
use redirect_ebpf::abi::{MARK_PROXY, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::app::{Call, Outcome};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{HBONE_NAME, PlainProxy, Policy, Via};
use redirect_tests::process::Attached;
use redirect_tests::topology::{Pod, Style, Topology};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{PORT, Pair, assert_direct, assert_relayed, echo, service};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

both_families! {
    outbound_call_keeps_its_addresses,
    inbound_call_keeps_its_addresses,
    call_between_enrolled_pods_passes_both_proxies,
    pods_of_one_node_pass_both_proxies,
    service_that_exists_nowhere_reaches_the_proxy,
    hbone_reaches_the_proxy_as_it_is,
    pod_that_calls_itself_stays_local,
    proxys_own_connections_are_not_captured,
    loops_end_with_a_closed_connection,
    pods_that_are_not_enrolled_talk_directly,
    addresses_are_found_when_none_is_given,
    udp_goes_past_the_proxies,
    ping_goes_past_the_proxies,
}

fn outbound_call_keeps_its_addresses(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&client.netns)?;
    let _attached = Attached::new(topology, client)?;

    let to = server.addr(family, PORT);
    let mut conversation = Call::to(to).open(&client.netns)?;
    conversation.exchange(b"hello")?;

    assert_eq!(conversation.answer().by, "server");
    assert_eq!(conversation.answer().saw_peer.ip(), client.ip(family));
    assert_eq!(conversation.answer().saw_local, to);
    assert_eq!(conversation.peer_addr()?, to);
    assert_relayed(&proxy, Via::Outbound, &conversation, to)
}

fn inbound_call_keeps_its_addresses(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;

    let to = server.addr(family, PORT);
    let mut conversation = Call::to(to).open(&client.netns)?;
    conversation.exchange(b"hello")?;

    assert_eq!(conversation.answer().by, "server");
    assert_eq!(conversation.answer().saw_peer.ip(), client.ip(family));
    assert_eq!(conversation.answer().saw_local, to);
    assert_eq!(conversation.peer_addr()?, to);
    assert_relayed(&proxy, Via::Inbound, &conversation, to)?;
    assert_eq!(proxy.relayed().len(), 1);
    Ok(())
}

fn call_between_enrolled_pods_passes_both_proxies(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    passes_both_proxies(family, topology, client, server)
}

fn pods_of_one_node_pass_both_proxies(family: Family) -> Result<()> {
    for style in [Style::Routed, Style::Bridged] {
        let mut topology = Topology::new(&[style])?;
        let client = topology.add_pod(0, "default", "client")?;
        let server = topology.add_pod(0, "default", "server")?;
        passes_both_proxies(family, &topology, &client, &server)?;
    }
    Ok(())
}

fn passes_both_proxies(
    family: Family,
    topology: &Topology,
    client: &Pod,
    server: &Pod,
) -> Result<()> {
    let _app = echo(server, family)?;
    let clients = PlainProxy::start(&client.netns)?;
    let servers = PlainProxy::start(&server.netns)?;
    let _client = Attached::new(topology, client)?;
    let _server = Attached::new(topology, server)?;

    let to = server.addr(family, PORT);
    let mut conversation = Call::to(to).open(&client.netns)?;
    conversation.exchange(b"hello")?;

    assert_eq!(conversation.answer().by, "server");
    assert_eq!(conversation.answer().saw_peer.ip(), client.ip(family));
    assert_relayed(&clients, Via::Outbound, &conversation, to)?;
    let inbound = servers.relayed();
    assert_eq!(inbound.len(), 1);
    assert_eq!(inbound[0].via, Via::Inbound);
    assert_eq!(inbound[0].peer.ip(), client.ip(family));
    assert_eq!(inbound[0].destination, to);
    Ok(())
}

fn service_that_exists_nowhere_reaches_the_proxy(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let (service, backend) = (service(family), server.addr(family, PORT));
    let services = HashMap::from([(service, backend)]);
    let policy = Policy { services, ..Policy::default() };
    let proxy = PlainProxy::with_policy(&client.netns, policy)?;
    let _attached = Attached::new(topology, client)?;

    let mut conversation = Call::to(service).open(&client.netns)?;
    conversation.exchange(b"hello")?;

    assert_eq!(conversation.answer().by, "server");
    assert_eq!(conversation.answer().saw_local, backend);
    assert_eq!(conversation.peer_addr()?, service);
    assert_relayed(&proxy, Via::Outbound, &conversation, service)
}

fn hbone_reaches_the_proxy_as_it_is(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;

    let to = server.addr(family, PORT_HBONE);
    let conversation = Call::to(to).open(&client.netns)?;

    assert_eq!(conversation.answer().by, HBONE_NAME);
    assert_eq!(conversation.answer().saw_peer, conversation.local_addr()?);
    assert_relayed(&proxy, Via::Hbone, &conversation, to)
}

fn pod_that_calls_itself_stays_local(family: Family) -> Result<()> {
    let Pair { client: pod, topology, .. } = &Pair::new()?;
    let _app = echo(pod, family)?;
    let proxy = PlainProxy::start(&pod.netns)?;
    let _attached = Attached::new(topology, pod)?;

    assert_direct(pod, pod.addr(family, PORT), "client")?;
    assert_direct(pod, SocketAddr::new(family.localhost(), PORT), "client")?;

    assert_eq!(proxy.relayed(), []);
    Ok(())
}

fn proxys_own_connections_are_not_captured(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&client.netns)?;
    let _attached = Attached::new(topology, client)?;

    let conversation = Call::to(server.addr(family, PORT)).mark(MARK_PROXY).open(&client.netns)?;

    assert_eq!(conversation.answer().by, "server");
    assert_eq!(conversation.answer().saw_peer, conversation.local_addr()?);
    assert_eq!(proxy.relayed(), []);
    Ok(())
}

fn loops_end_with_a_closed_connection(family: Family) -> Result<()> {
    let mut topology = Topology::new(&[Style::Routed])?;
    let one = topology.add_pod(0, "default", "one")?;
    let other = topology.add_pod(0, "default", "other")?;
    let plain = topology.add_pod(0, "default", "plain")?;
    let ones = PlainProxy::start(&one.netns)?;
    let others = PlainProxy::start(&other.netns)?;
    let _one = Attached::new(&topology, &one)?;
    let _other = Attached::new(&topology, &other)?;

    for port in [PORT_OUTBOUND, PORT_INBOUND] {
        for (from, to) in [
            (&one, one.ip(family)),
            (&one, family.localhost()),
            (&one, other.ip(family)),
            (&one, plain.ip(family)),
            (&plain, one.ip(family)),
        ] {
            let outcome = Call::to(SocketAddr::new(to, port))
                .within(Duration::from_secs(2))
                .make(&from.netns)?;
            assert_eq!(outcome, Outcome::Closed { bytes: 0 }, "{from} to {to}, port {port}");
        }
    }

    assert!(ones.relayed().len() <= 10, "{:?}", ones.relayed());
    assert_eq!(others.relayed(), []);
    Ok(())
}

fn pods_that_are_not_enrolled_talk_directly(family: Family) -> Result<()> {
    let mut topology = Topology::new(&[Style::Routed, Style::Bridged])?;
    let enrolled = topology.add_pod(0, "default", "enrolled")?;
    let pods = [
        topology.add_pod(0, "default", "routed")?,
        topology.add_pod(0, "default", "neighbour")?,
        topology.add_pod(1, "default", "bridged")?,
    ];
    let _apps = pods.iter().map(|pod| echo(pod, family)).collect::<Result<Vec<_>>>()?;
    let proxy = PlainProxy::start(&enrolled.netns)?;
    let _attached = Attached::new(&topology, &enrolled)?;

    for from in &pods {
        for to in &pods {
            assert_direct(from, to.addr(family, PORT), &to.name)?;
        }
    }

    assert_eq!(proxy.relayed(), []);
    Ok(())
}

fn addresses_are_found_when_none_is_given(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::without_addresses(topology, server)?;

    let to = server.addr(family, PORT);
    let conversation = Call::to(to).open(&client.netns)?;

    assert_eq!(conversation.answer().by, "server");
    assert_relayed(&proxy, Via::Inbound, &conversation, to)
}

/// Both pods enrolled, and no proxy at all: what needs none passes.
fn without_proxies(scenario: impl FnOnce(&Pair) -> Result<()>) -> Result<()> {
    let pair = Pair::new()?;
    let _client = Attached::new(&pair.topology, &pair.client)?;
    let _server = Attached::new(&pair.topology, &pair.server)?;
    scenario(&pair)
}

fn udp_goes_past_the_proxies(family: Family) -> Result<()> {
    without_proxies(|Pair { client, server, .. }| {
        let open = |pod: &Pod, port| {
            let socket =
                pod.netns.run(|| Ok(UdpSocket::bind(SocketAddr::new(family.any(), port))?))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            anyhow::Ok(socket)
        };
        let (asks, answers) = (open(client, 0)?, open(server, PORT)?);
        let mut buffer = [0; 16];
        asks.send_to(b"hello", server.addr(family, PORT))?;
        let (length, peer) = answers.recv_from(&mut buffer)?;
        assert_eq!(&buffer[..length], b"hello");
        assert_eq!(peer, client.addr(family, asks.local_addr()?.port()));
        answers.send_to(b"answer", peer)?;
        let (length, peer) = asks.recv_from(&mut buffer)?;
        assert_eq!((&buffer[..length], peer), (&b"answer"[..], server.addr(family, PORT)));
        Ok(())
    })
}

fn ping_goes_past_the_proxies(family: Family) -> Result<()> {
    // Echo request and reply, and where they begin in what a raw socket gives.
    let (protocol, request, reply, begins) = match family {
        Family::V4 => (Protocol::ICMPV4, 8, 0, 20),
        Family::V6 => (Protocol::ICMPV6, 128, 129, 0),
    };
    without_proxies(|Pair { client, server, .. }| {
        let to = server.addr(family, 0);
        let socket = client
            .netns
            .run(|| Ok(Socket::new(Domain::for_address(to), Type::RAW, Some(protocol))?))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        // The kernel computes ICMPv6's checksum; this is ICMP's.
        let checksum: u16 = !(u16::from(request) << 8);
        let [hi, lo] = checksum.to_be_bytes();
        socket.connect(&to.into())?;
        socket.send(&[request, 0, hi, lo, 0, 0, 0, 0])?;
        let mut buffer = [0; 128];
        loop {
            let length = (&socket).read(&mut buffer)?;
            if buffer[..length].get(begins) == Some(&reply) {
                return Ok(());
            }
        }
    })
}
