//! Pods with several interfaces and addresses, and sockets that are bound to one.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::app::{Call, Conversation};
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::hbone::Direction;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;

use crate::cluster::{Cluster, Manifest, Node, PORT, SOON, echo, links, now};
use crate::drift::index;
use crate::load::Load;

both_families! {
    sockets_bound_to_an_interface_are_captured,
    connection_of_a_bound_socket_survives_entering_and_leaving,
    interface_that_comes_later_is_captured_until_it_goes,
    interface_with_the_number_of_one_that_was_moved_away_is_captured,
    interfaces_come_and_go_in_an_enrolled_pod,
    address_that_comes_later_is_captured_until_it_goes,
}

const OFTEN: &[&str] = &["--verify-interval", "300ms"];

/// Checks that a call from a bound socket goes by way of the proxy, and gives it.
fn assert_captured(
    node: &Node,
    from: &Pod,
    interface: &'static str,
    to: SocketAddr,
) -> Result<Conversation> {
    let since = now()?;
    let mut conversation = Call::to(to).bound_to(interface).open(&from.netns)?;
    let records = node.records_of(&conversation, since)?;
    let outbound = records.iter().filter(|r| r.direction == Direction::Outbound).count();
    ensure!(
        outbound == 1 && records.iter().any(|r| r.pod == from.to_string()),
        "bound to {interface}, {to}: {records:?}"
    );
    conversation.exchange(b"more than a greeting")?;
    Ok(conversation)
}

/// A second network, as Multus adds it: the other end of the interface is in the pod's node.
pub fn add_network(cluster: &Cluster) -> Result<()> {
    let (server, host) = (&cluster.server, cluster.topology.node(0));
    server.netns.ip(&format!(
        "link add net1 type veth peer name second netns {}\n\
         addr add 10.9.0.2/24 dev net1\n\
         addr add fd09::2/64 dev net1 nodad\n\
         link set net1 up",
        host.path().display()
    ))?;
    host.ip("addr add 10.9.0.1/24 dev second\n\
         addr add fd09::1/64 dev second nodad\n\
         link set second up")
}

pub fn second_address(family: Family) -> Result<IpAddr> {
    Ok(match family {
        Family::V4 => "10.9.0.2".parse()?,
        Family::V6 => "fd09::2".parse()?,
    })
}

fn sockets_bound_to_an_interface_are_captured(family: Family) -> Result<()> {
    let cluster = Cluster::without_agent(&[])?;
    add_network(&cluster)?;
    let Cluster { mut node, server, client, mut topology } = cluster;
    let neighbour = topology.add_pod(0, "shop", "neighbour")?;
    node.start_agent()?;
    node.start_proxy()?;
    node.write(&Manifest::of(&neighbour).mode("ambient"))?;
    node.enroll(&server)?;
    node.wait_until_enrolled(&neighbour)?;
    let _apps = (echo(&server)?, echo(&client)?, echo(&neighbour)?);
    for to in [&client, &neighbour] {
        let eth0 = assert_captured(&node, &server, "eth0", to.addr(family, PORT))?;
        ensure!(eth0.answer().by == to.name && eth0.answer().saw_peer.ip() == server.ip(family));
        let mut net1 = assert_captured(&node, &server, "net1", to.addr(family, PORT))?;
        ensure!(net1.answer().by == to.name);
        ensure!(net1.local_addr()?.ip() == second_address(family)?, "{:?}", net1.local_addr());
        net1.bulk(4 << 20)?;
    }
    // To itself, and to loopback, as without a mesh.
    let own = Call::to(server.addr(family, PORT)).bound_to("eth0").make(&server.netns)?.answer()?;
    ensure!(own.by == server.name && own.saw_peer.ip() == server.ip(family));
    // Nobody else gets in by that: what comes from outside is inbound.
    node.assert_inbound(&client, &server, family)
}

fn connection_of_a_bound_socket_survives_entering_and_leaving(family: Family) -> Result<()> {
    let cluster = &Cluster::start()?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    let call = Call::to(client.addr(family, PORT)).bound_to("eth0");
    let mut direct = call.open(&server.netns)?;
    node.enroll(server)?;
    direct.exchange(b"still direct")?;
    let mut redirected = assert_captured(node, server, "eth0", client.addr(family, PORT))?;
    direct.exchange(b"and still")?;

    node.write(&Manifest::of(server))?;
    wait_for("new connections to go direct", SOON, || {
        let since = now()?;
        let fresh = call.open(&server.netns)?;
        Ok(node.records_of(&fresh, since)?.is_empty().then_some(()))
    })?;
    redirected.exchange(b"until the drain ends")?;
    direct.exchange(b"direct to the end")?;
    drop(redirected);
    node.wait_for_state(server, PodState::Bypassing)?;
    ensure!(call.open(&server.netns)?.answer().saw_peer.ip() == server.ip(family));
    assert_unchanged(&server.netns, &before)
}

fn interface_that_comes_later_is_captured_until_it_goes(family: Family) -> Result<()> {
    let cluster = &Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    add_network(cluster)?;
    let second = second_address(family)?;
    let capture = format!("address {second}");
    node.wait_for_pod("to have the new network captured", server, |p| {
        p.kernel.as_ref().is_some_and(|k| k.complete && k.present.contains(&capture))
    })?;
    assert_captured(node, server, "net1", client.addr(family, PORT))?;
    assert_captured(node, server, "eth0", client.addr(family, PORT))?;
    // Inbound by that network, too.
    let since = now()?;
    let inbound = Call::to(SocketAddr::new(second, PORT)).open(cluster.topology.node(0))?;
    ensure!(node.records_of(&inbound, since)?.len() == 1 && inbound.answer().by == server.name);

    server.netns.ip("link del net1")?;
    node.wait_for_pod("to be without it", server, |p| {
        p.kernel.as_ref().is_some_and(|k| k.complete && !k.present.contains(&capture))
    })?;
    assert_captured(node, server, "eth0", client.addr(family, PORT))?;
    wait_for("everything as before", SOON, || {
        Ok((footprint(&server.netns)? == before).then_some(()))
    })
}

/// The one that has left keeps its number, and its programs.
fn interface_with_the_number_of_one_that_was_moved_away_is_captured(family: Family) -> Result<()> {
    let cluster = &Cluster::enrolled(OFTEN)?;
    let Cluster { node, server, client, topology } = cluster;
    let _app = echo(client)?;
    add_network(cluster)?;
    let wait_until_captured = |address: &str| {
        let capture = format!("address {address}");
        node.wait_for_pod("to have the new network captured", server, |p| {
            p.kernel.as_ref().is_some_and(|k| k.complete && k.present.contains(&capture))
        })
    };
    wait_until_captured(&second_address(family)?.to_string())?;
    let number = index(server, "net1")?;
    server.netns.ip(&format!("link set net1 netns {}", client.netns.path().display()))?;
    let host = topology.node(0).path().display();
    server.netns.ip(&format!(
        "link add net1 index {number} type veth peer name third netns {host}\n\
         addr add 10.9.1.2/24 dev net1\n\
         addr add fd09:1::2/64 dev net1 nodad\n\
         link set net1 up"
    ))?;
    topology.node(0).ip("link set third up")?;
    wait_until_captured(if family == Family::V4 { "10.9.1.2" } else { "fd09:1::2" })?;
    assert_captured(node, server, "net1", client.addr(family, PORT))?;
    assert_captured(node, server, "eth0", client.addr(family, PORT)).map(drop)
}

/// As Multus does it. The links of what stays are left alone.
fn interfaces_come_and_go_in_an_enrolled_pod(family: Family) -> Result<()> {
    let cluster = &Cluster::enrolled(OFTEN)?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let dir = node.links(server)?;
    let before = (footprint(&server.netns)?, links(&dir)?);

    let load = Load::between(client, server, &[family]).keeping_old();
    load.during(|| {
        for _ in 0..2 {
            server.netns.ip("link add net1 type veth peer name net2\nlink set net1 up")?;
            let pin = dir.join(format!("in_{}", index(server, "net1")?));
            wait_for("a program on the new interface", SOON, || Ok(pin.exists().then_some(())))?;
            cluster.assert_redirected(family)?;

            server.netns.ip("link del net1")?;
            // The sweep sees that its link is dead, and takes that alone.
            wait_for("the dead link to be gone", SOON, || Ok((!pin.exists()).then_some(())))?;
            cluster.assert_redirected(family)?;
        }
        Ok(())
    })?;
    node.wait_until_enrolled(server)?;
    wait_for("all dead links to be gone", SOON, || Ok((links(&dir)? == before.1).then_some(())))?;
    assert_unchanged(&server.netns, &before.0)
}

fn address_that_comes_later_is_captured_until_it_goes(family: Family) -> Result<()> {
    let cluster = &Cluster::enrolled(OFTEN)?;
    let Cluster { node, server, client, topology } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    let (second, prefix): (IpAddr, _) = match family {
        Family::V4 => ("10.64.0.200".parse()?, "32"),
        Family::V6 => ("fd64::200".parse()?, "128"),
    };
    let host = topology.node(server.node);
    host.ip(&format!("route add {second}/{prefix} dev {}", server.host_interface))?;
    let nodad = if family == Family::V6 { "nodad" } else { "" };
    server.netns.ip(&format!("addr add {second}/{prefix} dev eth0 {nodad}"))?;
    let capture = format!("address {second}");
    let captured = |is: bool| {
        node.wait_for_pod("to have its addresses captured", server, |p| {
            let kernel = p.kernel.as_ref();
            kernel.is_some_and(|k| k.complete && k.present.contains(&capture) == is)
        })
    };
    captured(true)?;

    for (from, call) in [
        (client, Call::to(SocketAddr::new(second, PORT))),
        (server, Call::to(client.addr(family, PORT)).from(SocketAddr::new(second, 0))),
    ] {
        let since = now()?;
        let conversation = call.open(&from.netns)?;
        // The proxy chooses the source of its own connection to a pod that is not in the mesh.
        let server_answers = from.name == client.name;
        assert_eq!(conversation.answer().by, if server_answers { "server" } else { "client" });
        let records = node.records_of(&conversation, since)?;
        assert_eq!(records.len(), 1, "a call of {from}");
    }

    server.netns.ip(&format!("addr del {second}/{prefix} dev eth0"))?;
    captured(false)?;
    cluster.assert_redirected(family)?;
    wait_for("everything as before", SOON, || {
        Ok((footprint(&server.netns)? == before).then_some(()))
    })
}
