//! The proxy's mark on a socket of the application, which may set marks (CAP_NET_RAW): what is the proxy's,
//! its cgroup says, too.

use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_ebpf::abi::{MARK_PROXY, PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::app::{App, Behaviour, Call, Conversation};
use redirect_tests::both_families;
use redirect_tests::hbone::Direction;
use redirect_tests::netns::Family;
use redirect_tests::topology::Pod;
use rustix::net::connect_unspec;
use serde_json::json;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::cgroup::{Cgroup, unified};
use crate::cluster::{Cluster, Manifest, Node, PORT, echo, now};

both_families! {
    application_with_the_proxys_mark_is_captured,
    socket_that_takes_the_proxys_mark_later_is_captured,
    listener_with_the_proxys_mark_is_not_the_proxys,
    proxy_that_takes_over_from_another_cgroup_costs_no_connection,
    agent_that_starts_anew_knows_the_proxys_cgroup,
}

const PATIENCE: Duration = Duration::from_secs(5);
/// A port that settings exclude, outbound.
const EXCLUDED: u16 = 8082;

/// A cluster whose proxy is in a cgroup of its own, as every container is. The cgroup is to be dropped last.
fn start() -> Result<(Cgroup, Cluster)> {
    let cgroup = Cgroup::new(&unified()?, "ztunnel")?;
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy_in(&cgroup)?;
    Ok((cgroup, cluster))
}

/// Checks that the proxy has seen this connection of the pod, and no other way out was taken.
fn assert_proxied(node: &Node, pod: &Pod, conversation: &Conversation, since: f64) -> Result<()> {
    let records = node.records_of(conversation, since)?;
    let proxied =
        |direction| records.iter().any(|r| r.direction == direction && r.pod == pod.to_string());
    ensure!(proxied(Direction::Outbound), "it left past the proxy: {records:?}");
    Ok(())
}

fn application_with_the_proxys_mark_is_captured(family: Family) -> Result<()> {
    let (_cgroup, cluster) = start()?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?);
    node.enrol(server)?;
    for mark in [MARK_PROXY, 0xabcd_e000 | MARK_PROXY] {
        let since = now()?;
        let to = client.addr(family, PORT);
        let mut conversation =
            Call::to(to).within(PATIENCE).mark(mark).open(&server.netns).context("call")?;
        assert_proxied(node, server, &conversation, since)?;
        conversation.bulk(1 << 20)?;
    }
    let counters = node.pod(server)?.context("no status")?.counters;
    ensure!(counters.get("rescued_outbound").is_some_and(|n| *n >= 2), "{counters:?}");
    // The proxy itself is not in its own way.
    cluster.assert_redirected(family)
}

fn socket_that_takes_the_proxys_mark_later_is_captured(family: Family) -> Result<()> {
    let (_cgroup, cluster) = start()?;
    let Cluster { node, server, client, .. } = &cluster;
    let _app = echo(client)?;
    let to_excluded = client.addr(family, EXCLUDED);
    let _excluded = App::start(&client.netns, "client", to_excluded, Behaviour::Echo)?;
    let manifest = Manifest::of(server).mode("ambient").with(
        "/metadata/annotations",
        "traffic.redirect-agent/excludeOutboundPorts",
        json!(EXCLUDED.to_string()),
    );
    node.write(&manifest)?;
    node.wait_until_enrolled(server)?;

    let socket = server.netns.run(|| {
        let socket = Socket::new(Domain::for_address(to_excluded), Type::STREAM, None)?;
        socket.connect_timeout(&to_excluded.into(), PATIENCE).context("call the excluded port")?;
        Ok(socket)
    })?;
    // The guard has found the way of a connection of this very socket.
    let first = Conversation::new(socket.try_clone()?.into(), PATIENCE)?;
    ensure!(first.answer().by == "client", "{:?}", first.answer());
    socket.set_mark(MARK_PROXY)?;
    let since = now()?;
    connect_unspec(&socket).context("disconnect")?;
    let to = client.addr(family, PORT);
    socket.connect_timeout(&to.into(), PATIENCE).context("call with the proxy's mark")?;
    let conversation = Conversation::new(socket.into(), PATIENCE)?;
    assert_proxied(node, server, &conversation, since)
}

fn listener_with_the_proxys_mark_is_not_the_proxys(family: Family) -> Result<()> {
    let (_cgroup, mut cluster) = start()?;
    let _app = echo(&cluster.client)?;
    cluster.node.enrol(&cluster.server)?;
    cluster.node.kill_proxy()?;
    let Cluster { server, client, .. } = &cluster;
    let marked = |port| -> Result<TcpListener> {
        server.netns.run(|| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_mark(MARK_PROXY)?;
            socket.set_reuse_port(true)?;
            socket.set_only_v6(false)?;
            socket.set_ip_transparent_v6(true)?;
            socket.bind(&SockAddr::from(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))))?;
            socket.listen(16)?;
            socket.set_nonblocking(true)?;
            Ok(socket.into())
        })
    };
    let listeners = [marked(PORT_OUTBOUND)?, marked(PORT_INBOUND)?, marked(PORT)?];
    let call =
        |from: &Pod, to: &Pod| Call::to(to.addr(family, PORT)).within(PATIENCE).make(&from.netns);
    for outcome in [call(server, client)?, call(client, server)?] {
        ensure!(outcome.answer().is_err(), "somebody answered");
    }
    for listener in listeners {
        ensure!(listener.accept().is_err(), "{listener:?} has got a connection");
    }
    Ok(())
}

fn proxy_that_takes_over_from_another_cgroup_costs_no_connection(family: Family) -> Result<()> {
    let second = Cgroup::new(&unified()?, "ztunnel-2")?;
    let (_first, mut cluster) = start()?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.node.enrol(&cluster.server)?;
    let to = cluster.client.addr(family, PORT);
    let mut before = Call::to(to).open(&cluster.server.netns)?;
    cluster.node.start_proxy_in(&second)?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    before.bulk(1 << 20).context("by the former proxy")?;
    cluster.assert_redirected(family)?;
    cluster.node.kill_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.assert_redirected(family).context("without the former proxy")
}

fn agent_that_starts_anew_knows_the_proxys_cgroup(family: Family) -> Result<()> {
    let (_cgroup, mut cluster) = start()?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.node.enrol(&cluster.server)?;
    let to = cluster.client.addr(family, PORT);
    let mut before = Call::to(to).open(&cluster.server.netns)?;
    cluster.node.kill_agent()?;
    cluster.assert_redirected(family).context("without an agent")?;
    // It may take the proxy a while to connect to the next one.
    cluster.node.start_agent()?;
    before.bulk(1 << 20)?;
    cluster.assert_redirected(family).context("with the next agent")?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.assert_redirected(family)
}
