//! The stand-in proxy: real namespaces, real TLS, a real ZDS socket, and mostly no redirection.
//!
//! Without redirection nothing reaches 15001 and 15006 but direct calls. A call from a pod to an
//! address on its own `lo` and port 15001 is as good as a redirected call to that address, so that
//! is how these tests make outbound calls, always to a service: the proxy calls a pod then.

mod agent;
mod mesh;
mod stranger;

use std::collections::HashSet;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use redirect_tests::app::{Answer, App, Behaviour, Call, Outcome, read_greeting};
use redirect_tests::both_families;
use redirect_tests::hbone::zds::{DelWorkload, Payload};
use redirect_tests::hbone::{
    self, Direction, HBONE_PORT, HboneError, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, Over, Record,
};
use redirect_tests::netns::Family;
use redirect_tests::process::{Attached, wait_for};

use agent::{Agent, add, info};
use mesh::{APP_PORT, DEAD_PORT, Mesh, identity, vip};

const SOON: Duration = Duration::from_secs(5);
const PORTS: [u16; 3] = [HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT];

both_families!(
    listeners_are_bound_when_the_workload_is_acknowledged_and_gone_after_its_deletion,
    hbone_shows_the_client_to_the_app_and_its_identity_to_the_proxy,
    hbone_to_a_foreign_address_or_a_dead_app_or_the_proxy_itself_is_refused,
    a_client_without_a_certificate_of_the_mesh_is_denied,
    a_service_is_called_over_hbone_as_soon_as_its_pod_speaks_it,
    a_service_without_endpoints_closes_the_connection,
    direct_calls_to_the_proxys_ports_end_closed,
    the_same_workload_again_changes_nothing_and_a_new_netns_replaces_it,
    what_is_no_netns_is_refused_and_nothing_else_is_affected,
    a_request_that_cannot_be_read_is_refused_and_the_proxy_comes_back,
    an_agent_that_comes_back_keeps_what_it_names_and_drops_the_rest,
    deletion_closes_connections_at_once,
    sigterm_lets_connections_finish,
    a_thousand_connections_at_once_share_few_hbone_connections,
    bulk_transfer_is_byte_exact_both_ways,
    redirected_plaintext_is_let_in_unless_the_policy_is_strict,
    redirected_calls_go_over_hbone_or_in_plaintext_or_pass_through,
);

fn listeners_are_bound_when_the_workload_is_acknowledged_and_gone_after_its_deletion(
    family: Family,
) -> Result<()> {
    let mesh = Mesh::start()?;
    mesh.agent.snapshot_sent()?;
    refused_by_all_ports(&mesh, family)?;
    mesh.agent.add(&mesh.server)?;
    for port in PORTS {
        let call = Call::to(mesh.server.addr(family, port)).within(Duration::from_millis(200));
        let outcome = call.make(&mesh.client.netns)?;
        ensure!(!matches!(outcome, Outcome::Refused { .. }), "nobody listens on port {port}");
    }
    mesh.agent.del(&mesh.server)?;
    wait_for("closed listeners", SOON, || Ok(refused_by_all_ports(&mesh, family).ok()))
}

fn refused_by_all_ports(mesh: &Mesh, family: Family) -> Result<()> {
    for port in PORTS {
        let call = Call::to(mesh.server.addr(family, port)).within(Duration::from_millis(200));
        call.make(&mesh.client.netns)?.refusal()?;
    }
    Ok(())
}

fn hbone_shows_the_client_to_the_app_and_its_identity_to_the_proxy(family: Family) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    let target = mesh.server.addr(family, APP_PORT);
    let hbone = mesh.hbone_client()?;
    let (peer, line) = mesh.client.netns.block_on(|| async move {
        let mut stream = hbone.connect(target).await?;
        Ok((stream.peer.clone(), stream.ask("hello").await?))
    })?;
    ensure!(peer == identity(&mesh.server));
    let Answer { by, saw_peer, saw_local } = answer(&line)?;
    ensure!(by == "server" && saw_local == target);
    ensure!(saw_peer.ip() == mesh.client.ip(family), "the app saw {saw_peer}");

    let record = mesh.record(Direction::Inbound)?;
    ensure!(record.result == hbone::Outcome::Ok && record.over == Some(Over::Hbone));
    ensure!(record.pod == mesh.server.to_string() && record.dst == target);
    ensure!(record.src.ip() == mesh.client.ip(family));
    ensure!(record.peer_identity == Some(identity(&mesh.client).to_string()));
    Ok(())
}

fn answer(line: &str) -> Result<Answer> {
    read_greeting(&format!("{line}\n")).with_context(|| format!("no greeting: {line:?}"))
}

fn hbone_to_a_foreign_address_or_a_dead_app_or_the_proxy_itself_is_refused(
    family: Family,
) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    let proxy = mesh.server.addr(family, HBONE_PORT);
    let cases = [
        (mesh.other.addr(family, APP_PORT), 400, hbone::Outcome::Denied),
        (mesh.server.addr(family, DEAD_PORT), 503, hbone::Outcome::Refused),
        (mesh.server.addr(family, OUTBOUND_PORT), 503, hbone::Outcome::Loop),
        (mesh.server.addr(family, INBOUND_PLAINTEXT_PORT), 503, hbone::Outcome::Loop),
        (proxy, 503, hbone::Outcome::Loop),
    ];
    for (target, status, result) in cases {
        let hbone = mesh.hbone_client()?;
        let refusal = mesh
            .client
            .netns
            .block_on(|| async move { Ok(hbone.connect_via(proxy, target).await.err()) })?;
        ensure!(
            matches!(refusal, Some(HboneError::Refused(_, seen)) if seen == status),
            "{target}: {refusal:?}"
        );
        let record = mesh.records(Direction::Inbound)?.pop().context("no record")?;
        ensure!(record.result == result && record.dst == target, "{record:?}");
    }
    Ok(())
}

fn a_client_without_a_certificate_of_the_mesh_is_denied(family: Family) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    let proxy = mesh.server.addr(family, HBONE_PORT);
    let foreign_ca = tempfile::tempdir()?;
    for ca_dir in [None, Some(foreign_ca.path())] {
        let got = mesh.client.netns.block_on(|| stranger::talk(proxy, ca_dir))?;
        ensure!(got.is_empty(), "a stranger got {got:?}");
    }
    let records = wait_for("two denials", SOON, || {
        let records = mesh.records(Direction::Inbound)?;
        Ok((records.len() == 2).then_some(records))
    })?;
    let denied =
        |record: &Record| record.result == hbone::Outcome::Denied && record.peer_identity.is_none();
    ensure!(records.iter().all(denied), "{records:?}");
    Ok(())
}

fn a_service_is_called_over_hbone_as_soon_as_its_pod_speaks_it(family: Family) -> Result<()> {
    let mesh = Mesh::start()?;
    let _app = mesh.app(family)?;
    mesh.agent.snapshot_sent()?;
    mesh.enroll(&mesh.client)?;
    let target = mesh.server.addr(family, APP_PORT);
    let mut expected = Vec::new();
    for hbone in [false, true, false] {
        if hbone {
            mesh.enroll(&mesh.server)?;
        } else if !expected.is_empty() {
            mesh.unenroll(&mesh.server)?;
        }
        let answer = mesh.service_call(family).make(&mesh.client.netns)?.answer()?;
        ensure!(answer.saw_local == target);
        ensure!(answer.saw_peer.ip() == mesh.client.ip(family), "{answer:?}");
        let (over, via, peer) = match hbone {
            true => {
                let peer = identity(&mesh.server).to_string();
                (Over::Hbone, mesh.server.addr(family, HBONE_PORT), Some(peer))
            }
            false => (Over::Plaintext, target, None),
        };
        expected.push((vip(family), Some(over), Some(via), peer, hbone::Outcome::Ok));
    }
    let seen: Vec<_> = mesh
        .records(Direction::Outbound)?
        .into_iter()
        .map(|r| (r.dst, r.over, r.via, r.peer_identity, r.result))
        .collect();
    ensure!(seen == expected, "{seen:#?}");
    let inbound = mesh.record(Direction::Inbound)?;
    ensure!(inbound.peer_identity == Some(identity(&mesh.client).to_string()));
    Ok(())
}

fn a_service_without_endpoints_closes_the_connection(family: Family) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    fs::remove_file(mesh.manifests().join("server.json"))?;
    // The manifests are followed; until the change is seen, the dead app is called.
    wait_for("a service without endpoints", SOON, || {
        let outcome = mesh.service_call(family).make(&mesh.client.netns)?;
        ensure!(outcome == Outcome::Closed { bytes: 0 }, "{outcome}");
        let record = mesh.records(Direction::Outbound)?.pop().context("no record")?;
        let detail = record.detail.unwrap_or_default();
        Ok(detail.contains("no endpoint of service shop/server").then_some(()))
    })
}

fn direct_calls_to_the_proxys_ports_end_closed(family: Family) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    for caller in [&mesh.client, &mesh.other, &mesh.server] {
        for port in [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT] {
            let outcome = Call::to(mesh.server.addr(family, port)).make(&caller.netns)?;
            ensure!(outcome == Outcome::Closed { bytes: 0 }, "{caller} to {port}: {outcome}");
        }
    }
    let own = SocketAddr::new(family.localhost(), OUTBOUND_PORT);
    let outcome = Call::to(own).make(&mesh.server.netns)?;
    ensure!(outcome == Outcome::Closed { bytes: 0 }, "localhost: {outcome}");
    Ok(())
}

fn the_same_workload_again_changes_nothing_and_a_new_netns_replaces_it(
    family: Family,
) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    let mut conversation = mesh.converse(family)?;
    mesh.agent.add(&mesh.server)?;
    conversation.exchange(b"still there?")?;
    mesh.agent.add_as(&mesh.server.to_string(), &mesh.other)?;
    ensure!(conversation.closed_within(SOON)?, "the old netns is still served");
    wait_for("closed listeners", SOON, || Ok(refused_by_all_ports(&mesh, family).ok()))?;
    let other = Call::to(mesh.other.addr(family, OUTBOUND_PORT)).make(&mesh.client.netns)?;
    ensure!(other == Outcome::Closed { bytes: 0 }, "the new netns is not served: {other}");
    Ok(())
}

fn what_is_no_netns_is_refused_and_nothing_else_is_affected(family: Family) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    let mut conversation = mesh.converse(family)?;
    for file in ["/dev/null", "/proc/self/ns/uts"] {
        let payload = add("no-netns", Some(info(&mesh.other)));
        let error = mesh.agent.ask(payload, Some(&File::open(file)?))?;
        ensure!(error.contains("shop/other") && error.contains("netns"), "{file}: {error}");
    }
    mesh.agent.add(&mesh.other)?;
    conversation.exchange(b"still there?")
}

fn a_request_that_cannot_be_read_is_refused_and_the_proxy_comes_back(family: Family) -> Result<()> {
    let mut mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    let mut conversation = mesh.converse(family)?;
    let error = mesh.agent.ask(add("no-fd", Some(info(&mesh.other))), None)?;
    ensure!(error.contains("no fd"), "{error}");
    mesh.agent.accept()?;
    let netns = File::open(mesh.other.netns_path())?;
    let del = Payload::Del(DelWorkload { uid: "with-fd".into() });
    let error = mesh.agent.ask(del, Some(&netns))?;
    ensure!(error.contains("unexpected fd"), "{error}");
    mesh.agent.accept()?;
    conversation.exchange(b"still there?")
}

fn an_agent_that_comes_back_keeps_what_it_names_and_drops_the_rest(family: Family) -> Result<()> {
    let mut mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    mesh.agent.add(&mesh.other)?;
    let mut conversation = mesh.converse(family)?;
    let socket = mesh.zds_socket();
    mesh.agent = Agent::listen(&socket)?;
    mesh.converse(family).context("call while there is no agent")?;
    mesh.agent.accept()?;
    mesh.agent.add(&mesh.client)?;
    mesh.agent.keep(&mesh.server)?;
    let other = Call::to(mesh.other.addr(family, OUTBOUND_PORT));
    let before = other.make(&mesh.client.netns)?;
    ensure!(before == Outcome::Closed { bytes: 0 }, "dropped before the snapshot: {before}");
    mesh.agent.snapshot_sent()?;
    wait_for("the end of what is not in the snapshot", SOON, || {
        Ok(other.make(&mesh.client.netns)?.refusal().ok())
    })?;
    conversation.exchange(b"still there?")
}

fn deletion_closes_connections_at_once(family: Family) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    for pod in [&mesh.server, &mesh.client] {
        let mut conversation = mesh.converse(family)?;
        mesh.agent.del(pod)?;
        ensure!(conversation.closed_within(Duration::from_secs(1))?, "{pod} is still served");
        mesh.agent.add(pod)?;
    }
    mesh.converse(family).context("call after the proxies are back")?;
    Ok(())
}

fn sigterm_lets_connections_finish(family: Family) -> Result<()> {
    let mut mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    let mut conversation = mesh.converse(family)?;
    mesh.proxy.signal(Signal::SIGTERM)?;
    wait_for("closed listeners", SOON, || Ok(refused_by_all_ports(&mesh, family).ok()))?;
    conversation.exchange(b"still there?")?;
    ensure!(mesh.proxy.is_running()?);
    drop(conversation);
    wait_for("the end of the proxy", SOON, || Ok((!mesh.proxy.is_running()?).then_some(())))?;
    let status = mesh.proxy.terminate(SOON)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[test]
fn a_broken_protocol_ends_the_proxy() -> Result<()> {
    let mut mesh = Mesh::enrolled()?;
    let netns = File::open(mesh.other.netns_path())?;
    let error = mesh.agent.ask(add("no-info", None), Some(&netns))?;
    ensure!(error.contains("workload_info"), "{error}");
    wait_for("the end of the proxy", SOON, || Ok((!mesh.proxy.is_running()?).then_some(())))?;
    let status = mesh.proxy.terminate(SOON)?;
    ensure!(!status.success(), "{status}");
    Ok(())
}

fn a_thousand_connections_at_once_share_few_hbone_connections(family: Family) -> Result<()> {
    const CONNECTIONS: usize = 1000;
    let mesh = Mesh::enrolled()?;
    // The listener's backlog is ztunnel's 128. When it is full, a client that a SYN cookie has made
    // believe it is connected waits for ever for an app that speaks first.
    mesh.client.netns.set_sysctl("net/ipv4/tcp_syncookies", "0")?;
    let _app = mesh.app(family)?;
    let call = mesh.service_call(family).within(Duration::from_secs(30));
    for outcome in call.at_once(&mesh.client.netns, CONNECTIONS)? {
        let answer = outcome.answer()?;
        ensure!(answer.saw_peer.ip() == mesh.client.ip(family), "{answer:?}");
    }
    let records = mesh.records(Direction::Inbound)?;
    ensure!(records.len() == CONNECTIONS, "{} records", records.len());
    let tunnels: HashSet<_> = records.iter().map(|record| record.src).collect();
    ensure!(tunnels.len() <= CONNECTIONS / 20, "{} HBONE connections", tunnels.len());
    Ok(())
}

fn bulk_transfer_is_byte_exact_both_ways(family: Family) -> Result<()> {
    let mesh = Mesh::enrolled()?;
    let _app = mesh.app(family)?;
    mesh.converse(family)?.bulk(32 << 20)
}

fn redirected_plaintext_is_let_in_unless_the_policy_is_strict(family: Family) -> Result<()> {
    let mesh = Mesh::start()?;
    mesh.agent.add(&mesh.server)?;
    mesh.agent.snapshot_sent()?;
    let _attached = Attached::new(mesh.topology(), &mesh.server)?;
    let _app = mesh.app(family)?;
    let target = mesh.server.addr(family, APP_PORT);
    let call = || Call::to(target).make(&mesh.client.netns);

    let answer = call()?.answer()?;
    ensure!(answer.saw_local == target && answer.saw_peer.ip() == mesh.client.ip(family));
    let record = mesh.record(Direction::InboundPlaintext)?;
    ensure!(record.result == hbone::Outcome::Ok && record.dst == target, "{record:?}");
    ensure!(record.over == Some(Over::Plaintext) && record.peer_identity.is_none());

    let strict = "apiVersion: security.istio.io/v1\n\
                  kind: PeerAuthentication\n\
                  metadata: {name: default, namespace: shop}\n\
                  spec: {mtls: {mode: STRICT}}\n";
    fs::write(mesh.manifests().join("policy.yaml"), strict)?;
    wait_for("the policy", SOON, || Ok((call()? == Outcome::Closed { bytes: 0 }).then_some(())))?;
    let record = mesh.records(Direction::InboundPlaintext)?.pop().context("no record")?;
    ensure!(record.result == hbone::Outcome::Denied, "{record:?}");

    let hbone = mesh.hbone_client()?;
    let line = mesh
        .client
        .netns
        .block_on(|| async move { Ok(hbone.connect(target).await?.ask("hello").await?) })?;
    ensure!(self::answer(&line)?.saw_peer.ip() == mesh.client.ip(family), "{line}");
    Ok(())
}

fn redirected_calls_go_over_hbone_or_in_plaintext_or_pass_through(family: Family) -> Result<()> {
    let mesh = Mesh::start()?;
    for pod in [&mesh.client, &mesh.server] {
        mesh.agent.add(pod)?;
        mesh.publish(pod)?;
    }
    mesh.agent.snapshot_sent()?;
    let topology = mesh.topology();
    let _client = Attached::new(topology, &mesh.client)?;
    let _server = Attached::new(topology, &mesh.server)?;
    let node = SocketAddr::new(topology.node_ip(1, family), APP_PORT);
    let server = mesh.server.addr(family, APP_PORT);
    let other = mesh.other.addr(family, APP_PORT);
    let _apps = [
        mesh.app(family)?,
        App::start(&mesh.other.netns, "other", other, Behaviour::Echo)?,
        App::start(topology.node(1), "node", node, Behaviour::Echo)?,
    ];
    for (dst, over, name) in [
        (server, Over::Hbone, "server"),
        (other, Over::Plaintext, "other"),
        (node, Over::Passthrough, "node"),
    ] {
        let answer = Call::to(dst).make(&mesh.client.netns)?.answer()?;
        ensure!(answer.by == name && answer.saw_local == dst, "{answer:?}");
        ensure!(answer.saw_peer.ip() == mesh.client.ip(family), "{answer:?}");
        let record = mesh.records(Direction::Outbound)?.pop().context("no record")?;
        ensure!(record.dst == dst && record.over == Some(over), "{record:?}");
        ensure!(record.src.ip() == mesh.client.ip(family), "{record:?}");
    }
    let record = mesh.record(Direction::Inbound)?;
    ensure!(record.peer_identity == Some(identity(&mesh.client).to_string()), "{record:?}");
    Ok(())
}
