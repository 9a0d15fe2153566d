//! What of a pod's traffic is redirected: its annotations, edited while it runs.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::hbone::Direction;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cluster::{Cluster, Manifest, Node, PORT, SOON, converse, echo, now};
use crate::load::Load;

both_families! {
    outbound_calls_are_selected_by_range_and_port,
    inbound_calls_are_selected_by_source_and_port,
    bypassed_inbound_needs_no_proxy,
    exclusion_is_edited_under_load_and_followed_within_a_second,
    selection_is_edited_under_load_and_followed_within_a_second,
    connections_keep_their_way_when_their_selection_changes,
    annotation_that_cannot_be_read_leaves_the_pod_as_it_was,
    nodes_defaults_and_sidecars_annotations_count,
}

/// How often an annotation goes on and off.
const ROUNDS: usize = 4;
/// How fast that is followed, in seconds.
const AT_ONCE: f64 = 1.0;

const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";

/// The manifest of a pod in the mesh with these annotations; names without a prefix are ours.
fn annotated(pod: &Pod, annotations: &[(&str, &str)]) -> Manifest {
    annotations.iter().fold(Manifest::of(pod).mode("ambient"), |manifest, (name, value)| {
        let name = match name.contains('/') {
            true => (*name).to_owned(),
            false => format!("traffic.redirect-agent/{name}"),
        };
        manifest.with("/metadata/annotations", &name, json!(value))
    })
}

/// Writes annotations, and waits until they are in force.
fn annotate(node: &Node, pod: &Pod, annotations: &[(&str, &str)]) -> Result<()> {
    let before = node.pod(pod)?.and_then(|p| p.traffic);
    node.write(&annotated(pod, annotations))?;
    node.wait_for_pod("to have other settings", pod, |p| {
        p.state == PodState::Enrolled
            && p.traffic != before
            && p.kernel.as_ref().is_some_and(|kernel| kernel.complete)
    })?;
    Ok(())
}

/// The whole of one address, and a range that it is in.
fn ranges(ip: IpAddr) -> [String; 2] {
    match ip {
        IpAddr::V4(_) => [ip.to_string(), format!("{ip}/24")],
        IpAddr::V6(_) => [ip.to_string(), format!("{ip}/64")],
    }
}

fn elsewhere(family: Family) -> &'static str {
    match family {
        Family::V4 => "198.51.100.0/24",
        Family::V6 => "2001:db8:1::/48",
    }
}

/// Settings of ranges and ports, and whether a call to or from `ip` at [`PORT`] is selected.
fn selections(
    family: Family,
    ip: IpAddr,
    ranges_are: &str,
    ports_are: &str,
) -> Vec<(Vec<(String, String)>, bool)> {
    let [ip, net] = ranges(ip);
    let other = elsewhere(family);
    let one = |how: &str, what: &str, value: &str| (format!("{how}{what}"), value.to_owned());
    let range = |how, value: &str| one(how, ranges_are, value);
    let port = |how, value: &str| one(how, ports_are, value);
    vec![
        (vec![range("exclude", &ip)], false),
        (vec![range("exclude", &format!("{other},{net}"))], false),
        (vec![range("exclude", other)], true),
        (vec![range("include", other)], false),
        (vec![range("include", &net)], true),
        (vec![range("include", &net), range("exclude", &ip)], false),
        (vec![range("include", &ip), range("exclude", &net)], false),
        (vec![range("include", "")], false),
        (vec![port("exclude", "8080")], false),
        (vec![port("exclude", "1-8079,8081-65535")], true),
        (vec![port("include", "8000-8100")], true),
        (vec![port("include", "8080-65535")], true),
        (vec![port("include", "80,9000-9100")], false),
        (vec![port("include", "8000-8100"), port("exclude", "8080")], false),
        (vec![port("include", "8080"), range("include", other)], false),
        (vec![port("include", "8080"), range("include", &net)], true),
    ]
}

fn borrowed(annotations: &[(String, String)]) -> Vec<(&str, &str)> {
    annotations.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

fn outbound_calls_are_selected_by_range_and_port(family: Family) -> Result<()> {
    let cluster = &Cluster::start()?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    node.enroll(server)?;
    let enrolled = footprint(&server.netns)?;
    for (annotations, selected) in
        selections(family, client.ip(family), "OutboundIPRanges", "OutboundPorts")
    {
        annotate(node, server, &borrowed(&annotations))?;
        match selected {
            true => node.assert_outbound(server, client, family),
            false => node.assert_direct(server, client, family),
        }
        .with_context(|| format!("with {annotations:?}"))?;
        node.assert_inbound(client, server, family)
            .with_context(|| format!("with {annotations:?}"))?;
    }
    annotate(node, server, &[])?;
    wait_for("the switch to settle", SOON, || {
        Ok((footprint(&server.netns)? == enrolled).then_some(()))
    })?;
    cluster.assert_redirected(family)?;

    annotate(node, server, &[("excludeOutboundPorts", "1-10"), ("includeOutboundIPRanges", "")])?;
    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &before)
}

fn inbound_calls_are_selected_by_source_and_port(family: Family) -> Result<()> {
    let cluster = &Cluster::start()?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    node.enroll(server)?;
    for (annotations, selected) in
        selections(family, client.ip(family), "InboundSourceIPRanges", "InboundPorts")
    {
        annotate(node, server, &borrowed(&annotations))?;
        let bypassed = bypassed_inbound(node, server)?;
        match selected {
            true => node.assert_inbound(client, server, family),
            false => node.assert_direct(client, server, family),
        }
        .with_context(|| format!("with {annotations:?}"))?;
        // A SYN that is sent again counts again.
        assert_eq!(bypassed_inbound(node, server)? > bypassed, !selected, "with {annotations:?}");
        node.assert_outbound(server, client, family)
            .with_context(|| format!("with {annotations:?}"))?;
    }
    annotate(node, server, &[])?;
    cluster.assert_redirected(family)
}

/// `::/0` has the addresses of IPv4 only in the form in which the maps have them.
#[test]
fn range_of_all_ipv6_addresses_has_none_of_ipv4() -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::enrolled(&[])?;
    let _apps = (echo(server)?, echo(client)?);
    let all = |how: &str, value: &str| {
        let names = ["OutboundIPRanges", "InboundSourceIPRanges"];
        names.map(|name| (format!("{how}{name}"), value.to_owned())).to_vec()
    };
    let assert_selected = |family, selected| -> Result<()> {
        if selected {
            node.assert_outbound(server, client, family)?;
            node.assert_inbound(client, server, family)
        } else {
            node.assert_direct(server, client, family)?;
            node.assert_direct(client, server, family)
        }
    };
    let v4 = format!("{}/24", client.v4);
    for (annotations, v4, v6) in [
        (all("exclude", "::/0"), true, false),
        (all("include", "::/0"), false, true),
        ([all("include", &v4), all("exclude", "::/0")].concat(), true, false),
        (all("exclude", "0.0.0.0/0"), false, true),
        (all("exclude", "0.0.0.0/0,::/0"), false, false),
    ] {
        annotate(node, server, &borrowed(&annotations))?;
        for (family, selected) in [(Family::V4, v4), (Family::V6, v6)] {
            assert_selected(family, selected)
                .with_context(|| format!("{family:?} with {annotations:?}"))?;
        }
    }
    Ok(())
}

fn bypassed_inbound(node: &Node, pod: &Pod) -> Result<u64> {
    let status = node.pod(pod)?.context("no status")?;
    Ok(status.counters.get("bypassed_inbound").copied().unwrap_or_default())
}

fn bypassed_inbound_needs_no_proxy(family: Family) -> Result<()> {
    let cluster = &mut Cluster::start()?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let Cluster { node, server, client, .. } = cluster;
    node.enroll(server)?;
    annotate(node, server, &[(BYPASS_INBOUND, "true")])?;
    node.assert_direct(client, server, family)?;
    node.assert_outbound(server, client, family)?;

    node.kill_proxy()?;
    // Within the grace, and after it.
    for _ in 0..2 {
        node.assert_direct(client, server, family)?;
        wait_for("the grace to be over", SOON, || {
            let status = node.pod(server)?.context("no status")?;
            let refused = status.counters.get("refused_proxy_away").is_some_and(|n| *n > 0);
            let refusal = redirect_tests::app::Call::to(client.addr(family, PORT))
                .within(SOON)
                .make(&server.netns)?
                .refusal();
            Ok((refused && refusal.is_ok()).then_some(()))
        })?;
    }
    node.assert_direct(client, server, family)
}

fn exclusion_is_edited_under_load_and_followed_within_a_second(family: Family) -> Result<()> {
    edited_under_load(family, &[("excludeOutboundPorts", "8080"), ("excludeInboundPorts", "8080")])
}

fn selection_is_edited_under_load_and_followed_within_a_second(family: Family) -> Result<()> {
    let elsewhere = elsewhere(family);
    edited_under_load(family, &[("includeOutboundIPRanges", elsewhere), (BYPASS_INBOUND, "1")])
}

fn edited_under_load(family: Family, annotations: &[(&str, &str)]) -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::enrolled(&[])?;
    let _apps = (echo(server)?, echo(client)?);
    let load = Load::between(client, server, &[family]).keeping_old();
    let (edits, calls) = load.during(|| {
        let mut edits = Vec::new();
        for _ in 0..ROUNDS {
            let excluded = now()?;
            annotate(node, server, annotations)?;
            node.assert_direct(server, client, family)?;
            node.assert_direct(client, server, family)?;
            let included = now()?;
            annotate(node, server, &[])?;
            node.assert_outbound(server, client, family)?;
            node.assert_inbound(client, server, family)?;
            edits.push((excluded, included));
        }
        Ok(edits)
    })?;

    assert!(calls > 20 * ROUNDS, "{calls} calls are no load");
    let records = node.records()?;
    for (round, (excluded, included)) in edits.iter().enumerate() {
        let next = edits.get(round + 1).map_or(f64::MAX, |(next, _)| *next);
        for direction in [Direction::Outbound, Direction::InboundPlaintext] {
            let seen = |from: f64, to: f64| {
                let times = records.iter().filter(|r| r.direction == direction).map(|r| r.ts);
                times.filter(move |ts| (from..to).contains(ts))
            };
            let last = seen(*excluded, *included).reduce(f64::max).unwrap_or(*excluded) - excluded;
            let first = seen(*included, next).reduce(f64::min).context("nothing redirected")?;
            assert!(last < AT_ONCE, "{direction:?} was redirected for {last} s more");
            assert!(first - included < AT_ONCE, "{direction:?} was late by {}", first - included);
        }
    }
    Ok(())
}

fn connections_keep_their_way_when_their_selection_changes(family: Family) -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::enrolled(&[])?;
    let _apps = (echo(server)?, echo(client)?);
    let excluded = [("excludeOutboundPorts", "8080"), ("excludeInboundPorts", "8080")];
    let mut old = Vec::new();
    for annotations in [&excluded[..], &[], &excluded, &[]] {
        for (from, to) in [(server, client), (client, server)] {
            let since = now()?;
            let conversation = converse(from, to, family)?;
            let redirected = !node.records_of(&conversation, since)?.is_empty();
            ensure!(redirected == (old.len() % 4 < 2), "{} of {from}", old.len());
            old.push(conversation);
        }
        annotate(node, server, annotations)?;
        for pod in [server, client] {
            pod.netns.ip("neigh flush all")?;
        }
        for (number, conversation) in old.iter_mut().enumerate() {
            conversation
                .exchange(b"still there?")
                .with_context(|| format!("talk on connection {number} with {annotations:?}"))?;
            conversation.bulk(1 << 20)?;
        }
    }
    Ok(())
}

fn annotation_that_cannot_be_read_leaves_the_pod_as_it_was(family: Family) -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::enrolled(&[])?;
    let _apps = (echo(server)?, echo(client)?);
    annotate(node, server, &[("excludeOutboundPorts", "8080")])?;
    node.assert_direct(server, client, family)?;

    node.write(&annotated(server, &[("excludeOutboundPorts", "http"), (BYPASS_INBOUND, "yes")]))?;
    let status = node.wait_for_pod("to complain", server, |p| p.message.is_some())?;
    let message = status.message.context("no message")?;
    for problem in ["excludeOutboundPorts: \"http\"", "bypass-inbound-capture: \"yes\""] {
        assert!(message.contains(problem), "{message}");
    }
    assert_eq!(status.state, PodState::Enrolled);
    node.assert_direct(server, client, family)?;
    node.assert_inbound(client, server, family)?;

    node.write(&annotated(server, &[]))?;
    node.wait_for_pod("to complain no more", server, |p| {
        p.message.is_none() && p.kernel.as_ref().is_some_and(|k| k.complete)
    })?;
    node.assert_outbound(server, client, family)
}

fn nodes_defaults_and_sidecars_annotations_count(family: Family) -> Result<()> {
    let flags = ["--exclude-outbound-ports=8080", "--sidecar-annotations"];
    let Cluster { node, server, client, .. } = &Cluster::enrolled(&flags)?;
    let _apps = (echo(server)?, echo(client)?);
    node.assert_direct(server, client, family)?;
    node.assert_inbound(client, server, family)?;
    annotate(
        node,
        server,
        &[
            ("traffic.sidecar.istio.io/excludeOutboundPorts", "3306"),
            ("traffic.sidecar.istio.io/excludeInboundPorts", "8080"),
        ],
    )?;
    node.assert_outbound(server, client, family)?;
    node.assert_direct(client, server, family)
}
