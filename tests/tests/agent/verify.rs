//! `verify`: real calls of a pod and to it, and what the datapath does with them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::explain::Cause;
use redirect_agent::output::PodState;
use redirect_agent::verify::{Call, Connection, Direction, Outcome, Verification, Verifications};
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::{Family, Netns};
use redirect_tests::process::{Process, finish, wait_for};
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cluster::{Cluster, Manifest, Node, PORT, SOON, converse, echo, links};
use crate::drift::{detach, index};
use crate::observe::is_told;

both_families! {
    call_that_the_pod_marks_is_rescued_by_the_guard,
    call_while_somebody_keeps_deleting_the_rule_is_captured,
    call_that_gets_out_is_not_captured,
    call_to_an_address_of_choice_is_captured,
}

/// How the agent is kept from repairing what a test breaks.
const SELDOM: [&str; 2] = ["--verify-interval", "1h"];

/// Like [`Cluster::with_flags`], with the agent on the node's network, as it is in a cluster.
fn start(flags: &[&str]) -> Result<Cluster> {
    let mut cluster = Cluster::without_agent(flags)?;
    cluster.node.use_node_network(cluster.topology.node(0));
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    Ok(cluster)
}

/// What `verify` says as JSON, and whether it succeeds.
fn verify(node: &Node, args: &[&str]) -> Result<(bool, Verification)> {
    let output = node.command("verify")?.args(args).args(["-o", "json"]).output()?;
    let found = serde_json::from_slice(&output.stdout).with_context(|| {
        format!("verify {args:?} said: {}", String::from_utf8_lossy(&output.stderr))
    })?;
    Ok((output.status.success(), found))
}

/// What is printed for people, of one pod or of all, and whether it succeeds.
fn text(node: &Node, args: &[&str]) -> Result<(bool, String)> {
    finish(node.command("verify")?.args(args))
}

fn calls(found: &Verification, direction: Direction, family: Option<Family>) -> Vec<&Call> {
    let is_of = |call: &&Call| {
        call.direction == direction && family.is_none_or(|family| call.family == name(family))
    };
    found.calls.iter().filter(is_of).collect()
}

fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    }
}

fn only<'a>(calls: &[&'a Call]) -> Result<&'a Call> {
    let [call] = calls else { anyhow::bail!("{calls:?}") };
    Ok(call)
}

fn names(call: &Call) -> Vec<&str> {
    call.verdicts.iter().map(|verdict| verdict.verdict.as_str()).collect()
}

/// Makes netfilter mark what the pod sends, so that no capture rule matches.
fn mark(netns: &Netns, family: Family) -> Result<()> {
    let program = if family == Family::V4 { "iptables-nft" } else { "ip6tables-nft" };
    let rule = "-t mangle -A OUTPUT -p tcp --dport 9 -j MARK --set-mark 5";
    netns.output(program, &rule.split(' ').collect::<Vec<_>>()).map(drop)
}

/// The sockets in a namespace that have one of these ports.
fn sockets(netns: &Netns, ports: &BTreeSet<u16>) -> Result<Vec<String>> {
    let all = netns.output("ss", &["-Htan"])?;
    let is_of = |line: &&str| {
        let local = line.split_whitespace().nth(3).and_then(|local| local.rsplit(':').next());
        local.and_then(|port| port.parse().ok()).is_some_and(|port| ports.contains(&port))
    };
    Ok(all.lines().filter(is_of).map(str::to_owned).collect())
}

#[test]
fn pod_in_the_mesh_is_captured_both_ways_and_nothing_is_left_behind() -> Result<()> {
    let cluster = start(&[])?;
    let Cluster { node, server, client, topology } = &cluster;
    let _apps = (echo(server)?, echo(client)?);
    node.enroll(server)?;
    let before = footprint(&server.netns)?;
    let pins = links(&node.links(server)?)?;
    let pod = server.to_string();
    let (ok, found) = verify(node, &[&pod])?;
    ensure!(ok && found.ok && found.result == Outcome::Captured, "{found:#?}");
    ensure!(found.calls.len() == 4, "{found:#?}");
    for family in [Family::V4, Family::V6] {
        let outbound = only(&calls(&found, Direction::Outbound, Some(family)))?;
        ensure!(names(outbound) == ["redirected_outbound"], "{outbound:?}");
        let source = outbound.source.context("no source")?;
        ensure!(source.ip() == server.ip(family), "{outbound:?}");
        let inbound = only(&calls(&found, Direction::Inbound, Some(family)))?;
        ensure!(names(inbound) == ["redirected_inbound"], "{inbound:?}");
        ensure!(inbound.destination == Some(server.addr(family, PORT)), "{inbound:?}");
        for call in [outbound, inbound] {
            ensure!(call.connection == Some(Connection::Connected), "{call:?}");
        }
    }
    assert_stands_by_itself(&found, &pins, topology.node(0))?;
    assert_no_socket_is_left(&found, &[&server.netns, topology.node(0)])?;
    assert_unchanged(&server.netns, &before)?;
    ensure!(links(&node.links(server)?)? == pins);
    wait_for("the datapath to be silent", SOON, || Ok((!is_told(&cluster)?).then_some(())))?;
    // Nor is the application disturbed.
    converse(client, server, Family::V6)?;
    let log = node.agent_log()?;
    ensure!(log.contains("audit: verify"), "{log}");

    let (ok, said) = text(node, &[&pod])?;
    ensure!(ok && said.contains("redirected_outbound, connected"), "{said}");
    ensure!(said.contains("\nresult     captured: 4 of 4 connections\n"), "{said}");
    Ok(())
}

/// The record has all that somebody needs who has nothing else. `links` is what bpftool shows.
fn assert_stands_by_itself(
    found: &Verification,
    links: &[(String, u64, u64)],
    node: &Netns,
) -> Result<()> {
    ensure!(
        (found.api_version.as_str(), found.kind.as_str()) == ("redirect-agent/v1", "Verification")
    );
    ensure!(found.node.name == "node0" && found.pod.name == "shop/server", "{found:#?}");
    ensure!(found.pod.uid.as_deref() == Some("uid-of-shop-server"), "{found:#?}");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(found.kernel_release == release.trim_end(), "{found:#?}");
    let kernel = found.pod.kernel.as_ref().context("nothing in the kernel")?;
    ensure!(kernel.missing.is_empty() && kernel.present.contains(&"rule ipv6".to_owned()));
    let mut ids: Vec<u64> = links.iter().map(|(_, _, program)| *program).collect();
    let mut said: Vec<u64> = found
        .programs
        .iter()
        .filter(|program| program.at != "shared")
        .map(|program| u64::from(program.id))
        .collect();
    ids.sort_unstable();
    said.sort_unstable();
    ensure!(ids == said, "{ids:?}, but {:#?}", found.programs);
    for program in &found.programs {
        let id = program.id.to_string();
        let shown = node.output("bpftool", &["prog", "show", "id", &id])?;
        ensure!(shown.contains(&format!("tag {}", program.tag)), "{program:?}: {shown}");
    }
    Ok(())
}

/// Neither end of a call has left a socket, whatever its state.
fn assert_no_socket_is_left(found: &Verification, netns: &[&Netns]) -> Result<()> {
    let ports: BTreeSet<u16> =
        found.calls.iter().filter_map(|call| call.source).map(|source| source.port()).collect();
    ensure!(ports.len() == 4, "{found:#?}");
    for netns in netns {
        let left = sockets(netns, &ports)?;
        ensure!(left.is_empty(), "{left:#?}");
    }
    Ok(())
}

/// The mark is netfilter's, as of a VPN in the pod: no rule of the agent's takes the call to `lo`.
fn call_that_the_pod_marks_is_rescued_by_the_guard(family: Family) -> Result<()> {
    let cluster = start(&[])?;
    let Cluster { node, server, .. } = &cluster;
    node.enroll(server)?;
    mark(&server.netns, family)?;
    let (ok, found) = verify(node, &[&server.to_string()])?;
    ensure!(ok && found.result == Outcome::Captured, "{found:#?}");
    let rescued = only(&calls(&found, Direction::Outbound, Some(family)))?;
    ensure!(names(rescued).contains(&"rescued_outbound"), "{rescued:?}");
    ensure!(rescued.why.as_ref().is_some_and(|why| why.contains("guard")), "{rescued:?}");
    // Nothing listens: that says nothing about the redirection.
    for inbound in calls(&found, Direction::Inbound, None) {
        ensure!(inbound.outcome == Outcome::Unknown && inbound.connection.is_none(), "{inbound:?}");
        ensure!(inbound.why.as_ref().is_some_and(|why| why.contains("nothing listens")));
    }
    Ok(())
}

/// The agent puts it back each time.
fn call_while_somebody_keeps_deleting_the_rule_is_captured(family: Family) -> Result<()> {
    let cluster = start(&[])?;
    let Cluster { node, server, .. } = &cluster;
    node.enroll(server)?;
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    let script = format!("while ip {flag} rule del table 15001; do :; done 2>/dev/null");
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", server.netns.path().display()));
    command.args(["timeout", "60", "sh", "-c", &format!("while :; do {script}; done")]);
    let log = cluster.topology.dir().path().join("deleting.log");
    let _deleting = Process::spawn("who deletes rules", &mut command, log)?;
    wait_for("a rescue", SOON, || {
        let (ok, found) = verify(node, &[&server.to_string()])?;
        ensure!(ok && found.result == Outcome::Captured, "{found:#?}");
        let call = only(&calls(&found, Direction::Outbound, Some(family)))?;
        let rescued = names(call) == ["rescued_outbound", "redirected_outbound"];
        ensure!(!rescued || found.message.contains("1 only by the guard"), "{found:#?}");
        Ok(rescued.then_some(()))
    })
}

fn call_that_gets_out_is_not_captured(family: Family) -> Result<()> {
    let cluster = start(&SELDOM)?;
    let Cluster { node, server, .. } = &cluster;
    node.enroll(server)?;
    mark(&server.netns, family)?;
    let pod = server.to_string();
    let found = without_guard(node, server, || {
        let (ok, found) = verify(node, &[&pod])?;
        ensure!(ok == found.ok, "{found:#?}");
        Ok((found.result == Outcome::NotCaptured).then_some(found))
    })?;
    ensure!(!found.ok, "{found:#?}");
    for call in calls(&found, Direction::Outbound, None) {
        let expected = match call.family == name(family) {
            true => (Outcome::NotCaptured, 0),
            false => (Outcome::Captured, 1),
        };
        ensure!((call.outcome, call.verdicts.len()) == expected, "{call:?}");
    }
    let kernel = found.pod.kernel.as_ref().context("nothing in the kernel")?;
    ensure!(kernel.missing == ["tcx eth0"], "{kernel:?}");
    let finding = found.finding.context("no finding")?;
    ensure!(finding.cause == Cause::LinkDetached, "{finding:?}");
    let said = without_guard(node, server, || {
        let (ok, said) = text(node, &[&pod])?;
        Ok((!ok).then_some(said))
    })?;
    ensure!(said.contains("explain  redirector: link-detached"), "{said}");
    ensure!(said.contains("verification of shop/server failed: not-captured"), "{said}");
    Ok(())
}

fn call_to_an_address_of_choice_is_captured(family: Family) -> Result<()> {
    let cluster = start(&[])?;
    let Cluster { node, server, client, .. } = &cluster;
    let app = echo(client)?;
    node.enroll(server)?;
    let to = client.addr(family, PORT);
    let (ok, found) = verify(node, &[&server.to_string(), "--to", &to.to_string()])?;
    let call = only(&calls(&found, Direction::Outbound, None))?;
    ensure!(ok && call.outcome == Outcome::Captured, "{found:#?}");
    ensure!(call.destination == Some(to), "{call:?}");
    // The proxy may have called, and has sent nothing.
    ensure!(app.accepted().len() <= 1, "{:?}", app.accepted());

    // Its own addresses are no way out of the pod.
    for own in [server.ip(family), family.localhost()] {
        let own = SocketAddr::new(own, 9).to_string();
        let (ok, found) = verify(node, &[&server.to_string(), "--to", &own])?;
        let call = only(&calls(&found, Direction::Outbound, None))?;
        ensure!(ok && call.outcome == Outcome::Excluded, "{found:#?}");
        ensure!(call.why.as_deref() == Some("it stays in the pod"), "{call:?}");
    }
    Ok(())
}

#[test]
fn call_without_a_proxy_is_refused_and_does_not_get_out() -> Result<()> {
    let mut cluster = start(&[])?;
    let _app = echo(&cluster.server)?;
    cluster.node.enroll(&cluster.server)?;
    cluster.node.kill_proxy()?;
    let Cluster { node, server, .. } = &cluster;
    // At first its SYNs are only dropped: a proxy that restarts is back soon.
    let found = wait_for("the calls to be refused", SOON, || {
        let (ok, found) = verify(node, &[&server.to_string()])?;
        ensure!(!ok && !found.ok && found.result == Outcome::Refused, "{found:#?}");
        let refused = |call: &Call| names(call).last() == Some(&"refused_proxy_away");
        Ok(found.calls.iter().all(refused).then_some(found))
    })?;
    for call in &found.calls {
        ensure!(call.connection == Some(Connection::Refused), "{call:?}");
    }
    let finding = found.finding.context("no finding")?;
    ensure!(finding.cause == Cause::ProxyAway, "{finding:?}");
    Ok(())
}

#[test]
fn what_settings_exclude_is_excluded_and_no_failure() -> Result<()> {
    let cluster = start(&[])?;
    let Cluster { node, server, .. } = &cluster;
    let _app = echo(server)?;
    let excluded = |manifest: Manifest, name: &str, ports: &str| {
        let name = format!("traffic.redirect-agent/{name}");
        manifest.with("/metadata/annotations", &name, json!(ports))
    };
    let manifest = Manifest::of(server).mode("ambient");
    let manifest = excluded(manifest, "excludeOutboundPorts", "1-65535");
    node.write(&excluded(manifest, "excludeInboundPorts", &PORT.to_string()))?;
    node.wait_until_enrolled(server)?;
    let (ok, found) = verify(node, &[&server.to_string()])?;
    ensure!(ok && found.ok && found.result == Outcome::Excluded, "{found:#?}");
    ensure!(found.calls.iter().all(|call| call.outcome == Outcome::Excluded), "{found:#?}");
    for inbound in calls(&found, Direction::Inbound, None) {
        ensure!(names(inbound) == ["bypassed_inbound"], "{inbound:?}");
    }
    let (_, said) = text(node, &[&server.to_string()])?;
    ensure!(said.contains("no verdict, connection timed out, settings exclude it"), "{said}");
    Ok(())
}

#[test]
fn pod_outside_the_mesh_bypasses_and_that_is_as_it_should_be() -> Result<()> {
    let cluster = start(&[])?;
    let Cluster { node, server, client, .. } = &cluster;
    let _app = echo(server)?;
    let (ok, found) = verify(node, &[&server.to_string()])?;
    ensure!(ok && found.ok && found.result == Outcome::Bypassing, "{found:#?}");
    ensure!(found.calls.len() == 4, "{found:#?}");
    ensure!(found.calls.iter().all(|call| call.verdicts.is_empty()), "{found:#?}");
    ensure!(found.programs.is_empty() && found.pod.kernel.is_none(), "{found:#?}");
    ensure!(found.message.contains("not to be in the mesh: neither it nor"), "{found:#?}");

    let there_is_none = "there is no pod shop/nobody on this node";
    let on_another = "pod shop/client is on another node, node1";
    for (pod, expected) in [("shop/nobody", there_is_none), (&client.to_string(), on_another)] {
        let (ok, said) = text(node, &[pod])?;
        ensure!(!ok && said.contains(expected), "{said}");
    }
    Ok(())
}

/// Everybody can listen at any number of addresses of loopback.
#[test]
fn pod_that_listens_at_thousands_of_addresses_is_verified_as_fast_as_others() -> Result<()> {
    const ADDRESSES: u16 = 15_000;
    let cluster = start(&[])?;
    let Cluster { node, server, .. } = &cluster;
    node.enroll(server)?;
    let listeners = server.netns.run(|| {
        let listen = |n: u16| {
            let [high, low] = n.to_be_bytes();
            TcpListener::bind((Ipv4Addr::new(127, 1, high, low), 20_000 + n % 10_000))
        };
        (0..ADDRESSES).map(listen).collect::<Result<Vec<_>, _>>().context("listen")
    })?;
    let since = Instant::now();
    let (ok, found) = verify(node, &[&server.to_string()])?;
    let took = since.elapsed();
    ensure!(ok && found.result == Outcome::Captured, "{:?}: {}", found.result, found.message);
    ensure!(took < SOON / 2, "it took {took:?}");
    drop(listeners);
    Ok(())
}

#[test]
fn all_are_those_that_are_to_be_in_the_mesh() -> Result<()> {
    let mut cluster = start(&SELDOM)?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let outside = cluster.topology.add_pod(0, "bank", "outside")?;
    let Cluster { node, server, .. } = &cluster;
    let _apps = (echo(server)?, echo(&second)?, echo(&outside)?);
    node.write(&Manifest::of(&outside))?;
    for pod in [server, &second] {
        node.enroll(pod)?;
    }
    node.wait_for_state(&outside, PodState::Bypassing)?;
    let (ok, found) = all(node)?;
    let pods: Vec<&str> = found.items.iter().map(|found| found.pod.name.as_str()).collect();
    ensure!(pods == ["shop/second", "shop/server"], "{pods:?}");
    ensure!(ok && found.items.iter().all(|found| found.result == Outcome::Captured), "{found:#?}");
    ensure!(found.kind == "VerificationList" && found.failed.is_empty(), "{found:#?}");

    mark(&second.netns, Family::V6)?;
    let said = without_guard(node, &second, || {
        let (ok, said) = text(node, &["--all"])?;
        Ok((!ok).then_some(said))
    })?;
    ensure!(said.contains("verification failed for 1 of 2 pods"), "{said}");
    let line = said.lines().find(|line| line.contains("second")).context("no line")?;
    ensure!(line.contains("ipv4 captured, ipv6 not-captured"), "{said}");
    Ok(())
}

fn all(node: &Node) -> Result<(bool, Verifications)> {
    let output = node.command("verify")?.args(["--all", "-o", "json"]).output()?;
    Ok((output.status.success(), serde_json::from_slice(&output.stdout)?))
}

/// What is seen while the guard is detached, which the agent may put back at any time.
fn without_guard<T>(node: &Node, pod: &Pod, look: impl Fn() -> Result<Option<T>>) -> Result<T> {
    let pin = node.links(pod)?.join(format!("out_{}", index(pod, "eth0")?));
    wait_for("the guard to be away", SOON, || {
        // It is, if it is away still.
        let _detached = detach(&pin);
        look()
    })
}
