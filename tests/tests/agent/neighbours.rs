//! Pods of one node, and nodes of one kernel.

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::hbone::{Direction, Over, Record};
use redirect_tests::netns::Family;
use redirect_tests::topology::Pod;

use crate::cluster::{Cluster, Manifest, Node, PORT, converse, echo, now};
use crate::load::Load;

both_families! {
    pod_calls_its_neighbour_by_way_of_its_own_proxy,
    two_agents_on_one_kernel_leave_one_another_alone,
}

/// Once such a call was handed to the neighbour's listener: both pods are known to the node.
fn pod_calls_its_neighbour_by_way_of_its_own_proxy(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let neighbour = cluster.topology.add_pod(0, "shop", "neighbour")?;
    let Cluster { node, server, .. } = &cluster;
    let _apps = (echo(server)?, echo(&neighbour)?);
    node.write(&Manifest::of(&neighbour))?;
    node.wait_for_state(&neighbour, PodState::Bypassing)?;

    // Known to the node, and not in the mesh.
    node.assert_outbound(server, &neighbour, family)?;
    node.assert_inbound(&neighbour, server, family)?;

    node.enroll(&neighbour)?;
    for (from, to) in [(server, &neighbour), (&neighbour, server)] {
        for _ in 0..3 {
            assert_hbone(&[node], from, to, family)?;
        }
    }
    // To themselves, they need no proxy.
    for pod in [server, &neighbour] {
        node.assert_direct(pod, pod, family)?;
    }
    Ok(())
}

/// Two nodes, each with an agent, a bpffs directory and a proxy of its own.
fn two_agents_on_one_kernel_leave_one_another_alone(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let mut other = Node::new(&cluster.topology, 1, &[])?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let untouched = footprint(&client.netns)?;
    other.start_agent()?;
    other.start_proxy()?;
    other.enroll(client)?;
    let enrolled = footprint(&server.netns)?;
    assert_ne!(node.bpffs(), other.bpffs());
    for (from, to) in [(&*server, &*client), (&*client, &*server)] {
        assert_hbone(&[node, &other], from, to, family)?;
    }
    let names = |node: &Node| -> Result<Vec<String>> {
        Ok(node.status()?.pods.into_iter().map(|pod| pod.name).collect())
    };
    assert_eq!((names(node)?, names(&other)?), (vec!["server".into()], vec!["client".into()]));

    let load = Load::between(client, server, &[family]);
    load.during(|| {
        other.kill_agent()?;
        node.kill_agent()?;
        node.start_agent()?;
        other.start_agent()?;
        node.wait_until_enrolled(server)?;
        other.wait_until_enrolled(client)?;
        for (from, to) in [(&*server, &*client), (&*client, &*server)] {
            assert_hbone(&[node, &other], from, to, family)?;
        }
        other.tell("pause", &[])?;
        other.wait_for_state(client, PodState::Bypassing)?;
        node.assert_inbound(client, server, family)?;
        node.assert_outbound(server, client, family)
    })?;
    other.stop_agent()?;
    let (done, said) = other.cleanup()?;
    ensure!(done, "{said}");
    assert!(!other.bpffs().exists());
    assert_unchanged(&client.netns, &untouched)?;

    assert_unchanged(&server.netns, &enrolled)?;
    node.wait_until_enrolled(server)?;
    node.assert_inbound(client, server, family)?;
    node.assert_outbound(server, client, family)
}

/// Checks that a call between two enrolled pods goes over HBONE, and that either proxy knows both.
fn assert_hbone(nodes: &[&Node], from: &Pod, to: &Pod, family: Family) -> Result<()> {
    let since = now()?;
    let conversation = converse(from, to, family)?;
    let dst = to.addr(family, PORT);
    let identity =
        |pod: &Pod| format!("spiffe://cluster.local/ns/{}/sa/{}", pod.namespace, pod.name);

    let mut outbound = Vec::new();
    let mut inbound = Vec::new();
    for node in nodes {
        outbound.extend(node.records_of(&conversation, since)?);
        let records = node.records()?.into_iter();
        inbound.extend(
            records.filter(|r| r.direction == Direction::Inbound && r.pod == to.to_string()),
        );
    }
    let [outbound]: [Record; 1] = outbound
        .try_into()
        .map_err(|seen| anyhow::anyhow!("not one connection was seen, but {seen:?}"))?;
    ensure!(outbound.direction == Direction::Outbound, "{outbound:?}");
    ensure!((&outbound.pod, outbound.dst) == (&from.to_string(), dst), "{outbound:?}");
    ensure!(outbound.over == Some(Over::Hbone), "{outbound:?}");
    ensure!(outbound.peer_identity == Some(identity(to)), "{outbound:?}");
    let inbound = inbound
        .iter()
        .max_by(|a, b| a.ts.total_cmp(&b.ts))
        .context("nothing came in over HBONE")?;
    ensure!((&inbound.pod, inbound.dst) == (&to.to_string(), dst), "{inbound:?}");
    ensure!(inbound.src.ip() == from.ip(family), "{inbound:?}");
    ensure!(inbound.peer_identity == Some(identity(from)), "{inbound:?}");
    Ok(())
}
