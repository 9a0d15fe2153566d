//! The proxy's mark on a socket of the application, which may set marks (CAP_NET_RAW): what is the proxy's,
//! its cgroup says, too.

use std::fs;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_ebpf::abi::{MARK_PROXY, PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::app::{App, Behaviour, Call, Conversation};
use redirect_tests::both_families;
use redirect_tests::dns;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use rustix::net::connect_unspec;
use serde_json::json;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::cgroup::{Cgroup, unified};
use crate::cluster::{Cluster, Manifest, Node, PORT, echo};
use crate::dns::SERVICE;
use crate::health::{free_address, get};

both_families! {
    application_with_the_proxys_mark_is_refused,
    socket_that_takes_the_proxys_mark_later_is_refused,
    listener_with_the_proxys_mark_is_not_the_proxys,
    proxy_that_is_moved_to_another_cgroup_does_not_call_itself,
    proxy_that_takes_over_from_another_cgroup_costs_no_connection,
    agent_that_starts_anew_knows_the_proxys_cgroup,
}

const PATIENCE: Duration = Duration::from_secs(5);
/// A refusal that comes at once.
const AT_ONCE: Duration = Duration::from_secs(1);
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

/// How many connections of the pod were refused for their mark.
fn refused(node: &Node, pod: &Pod) -> Result<u64> {
    let counters = node.pod(pod)?.context("no status")?.counters;
    Ok(counters.get("refused_proxys_mark").copied().unwrap_or_default())
}

fn application_with_the_proxys_mark_is_refused(family: Family) -> Result<()> {
    let (_cgroup, cluster) = start()?;
    let Cluster { node, server, client, .. } = &cluster;
    let (_own, app) = (echo(server)?, echo(client)?);
    node.enroll(server)?;
    let resolver = SocketAddr::new(client.ip(family), 53);
    let queries = client.netns.run(|| UdpSocket::bind(resolver).context("listen"))?;
    queries.set_nonblocking(true)?;
    let before = refused(node, server)?;
    for mark in [MARK_PROXY, 0xabcd_e000 | MARK_PROXY] {
        for port in [PORT, 53] {
            let call = Call::to(client.addr(family, port)).within(PATIENCE).mark(mark);
            let after = call.make(&server.netns)?.refusal()?;
            ensure!(after < AT_ONCE, "port {port}: refused after {after:?}");
        }
        // A query, too.
        server.netns.run(|| {
            let socket = Socket::new(Domain::for_address(resolver), Type::DGRAM, None)?;
            socket.set_mark(mark)?;
            let query = dns::query(1, SERVICE, client.ip(family))?;
            // It is dropped where it would leave, and the kernel may say so.
            let _sent = socket.send_to(&query, &resolver.into());
            Ok(())
        })?;
    }
    ensure!(refused(node, server)? == before + 6, "{} before, {}", before, refused(node, server)?);
    ensure!(app.accepted().is_empty(), "{:?}", app.accepted());
    ensure!(queries.recv(&mut [0; 512]).is_err(), "a query has left past the proxy");
    // The proxy itself is not in its own way.
    cluster.assert_redirected(family)
}

fn socket_that_takes_the_proxys_mark_later_is_refused(family: Family) -> Result<()> {
    let (_cgroup, cluster) = start()?;
    let Cluster { node, server, client, .. } = &cluster;
    let (_own, app) = (echo(server)?, echo(client)?);
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
    connect_unspec(&socket).context("disconnect")?;
    let again = socket.connect_timeout(&client.addr(family, PORT).into(), PATIENCE);
    let error = again.err().context("it has left past the proxy")?;
    ensure!(error.kind() == io::ErrorKind::ConnectionRefused, "{error}");
    ensure!(app.accepted().is_empty(), "{:?}", app.accepted());
    cluster.assert_redirected(family)
}

fn listener_with_the_proxys_mark_is_not_the_proxys(family: Family) -> Result<()> {
    let (_cgroup, mut cluster) = start()?;
    let _app = echo(&cluster.client)?;
    cluster.node.enroll(&cluster.server)?;
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

/// What it opens then is none of a proxy that the agent knows, until it looks again.
fn proxy_that_is_moved_to_another_cgroup_does_not_call_itself(family: Family) -> Result<()> {
    let other = Cgroup::new(&unified()?, "elsewhere")?;
    let (_cgroup, mut cluster) = start()?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.node.enroll(&cluster.server)?;
    let proxy = cluster.node.take_proxy()?;
    fs::write(other.dir().join("cgroup.procs"), proxy.pid().to_string())
        .context("move the proxy")?;
    let descriptors = || anyhow::Ok(fs::read_dir(format!("/proc/{}/fd", proxy.pid()))?.count());
    let before = descriptors()?;
    wait_for("the proxy to be known again", Duration::from_secs(30), || {
        let call = Call::to(cluster.client.addr(family, PORT)).within(PATIENCE);
        let outcome = call.make(&cluster.server.netns)?;
        let now = descriptors().context("count descriptors")?;
        ensure!(now < before + 100, "the proxy calls itself: {before} descriptors before, {now}");
        Ok(outcome.answer().is_ok().then_some(()))
    })?;
    cluster.assert_redirected(family)?;
    drop(proxy);
    Ok(())
}

fn proxy_that_takes_over_from_another_cgroup_costs_no_connection(family: Family) -> Result<()> {
    let second = Cgroup::new(&unified()?, "ztunnel-2")?;
    let (_first, mut cluster) = start()?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.node.enroll(&cluster.server)?;
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
    cluster.node.enroll(&cluster.server)?;
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

/// As on nodes where containers have no cgroups of their own.
#[test]
fn proxy_without_a_cgroup_of_its_own_is_warned_of() -> Result<()> {
    let cgroup = Cgroup::new(&unified()?, "ztunnel")?;
    let health = free_address()?;
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.serve_health(health);
    cluster.node.start_agent()?;
    let known = |node: &Node| -> Result<(bool, bool)> {
        let (_, metrics) = get(health, "/metrics")?;
        let gauge =
            metrics.lines().find_map(|line| line.strip_prefix("redirect_proxy_cgroup_known "));
        Ok((node.status()?.mark_alone.is_none(), gauge == Some("1")))
    };
    let before = cluster.node.status()?.mark_alone;
    let before = before.context("no warning before a proxy has connected")?;
    ensure!(before.contains("CAP_NET_RAW") && before.contains("no proxy"), "{before}");
    cluster.node.start_proxy()?;
    wait_for("the warning", PATIENCE, || {
        let why = cluster.node.status()?.mark_alone;
        Ok(why.filter(|why| why.contains("cgroup v1")).map(drop))
    })?;
    ensure!(known(&cluster.node)? == (false, false));
    cluster.node.start_proxy_in(&cgroup)?;
    cluster.node.kill_proxy()?;
    // It looks every 10 s.
    wait_for("the end of the warning", 3 * PATIENCE, || {
        Ok((known(&cluster.node)? == (true, true)).then_some(()))
    })
}
