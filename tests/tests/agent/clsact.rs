//! Kernels without tcx: what somebody does to our clsact filters behind the agent's back is put right.

use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;

use crate::cluster::{Cluster, Manifest, SOON, echo};

both_families! {
    clsact_filters_are_put_back_when_they_are_deleted,
    interface_that_cannot_be_repaired_keeps_nothing_else_from_being_repaired,
}

/// The timer does not come round in this test: the agent hears of it.
fn clsact_filters_are_put_back_when_they_are_deleted(family: Family) -> Result<()> {
    let cluster = &Cluster::with_flags(&["--test-clsact", "--verify-interval", "1h"])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    node.enroll(server)?;
    let kernel = node.pod(server)?.and_then(|pod| pod.kernel).context("no status")?;
    assert!(kernel.present.contains(&"clsact eth0".to_owned()), "{kernel:?}");
    let enrolled = footprint(&server.netns)?;
    cluster.assert_redirected(family)?;
    for (n, removal) in
        ["qdisc del dev eth0 clsact", "filter del dev eth0 egress", "qdisc del dev lo clsact"]
            .into_iter()
            .enumerate()
    {
        server.netns.output("tc", &removal.split(' ').collect::<Vec<_>>())?;
        wait_for(removal, Duration::from_secs(10), || {
            let repaired = footprint(&server.netns)? == enrolled;
            let told = node.agent_log()?.lines().filter(|line| line.contains("clsact")).count();
            Ok((repaired && told > n).then_some(()))
        })
        .with_context(|| format!("now: {:#?}", node.pod(server)))?;
        cluster.assert_redirected(family).with_context(|| format!("after {removal}"))?;
    }
    node.write(&Manifest::of(server).mode("none"))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &before)
}

/// `eth0` gets a qdisc that has no filters for egress, in the place of ours.
fn interface_that_cannot_be_repaired_keeps_nothing_else_from_being_repaired(
    family: Family,
) -> Result<()> {
    let cluster = &Cluster::with_flags(&["--test-clsact", "--verify-interval", "300ms"])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    node.enroll(server)?;
    cluster.assert_redirected(family)?;
    wait_for("a qdisc in the place of ours", SOON, || {
        // The agent may be faster.
        server.netns.output("tc", &["qdisc", "del", "dev", "eth0", "clsact"])?;
        Ok(server.netns.output("tc", &["qdisc", "add", "dev", "eth0", "ingress"]).ok())
    })?;
    wait_for("what `status` says", SOON, || {
        let problem = node.pod(server)?.and_then(|pod| pod.message).unwrap_or_default();
        Ok(problem
            .contains("interface eth0: it has a qdisc of kind ingress; make it clsact")
            .then_some(()))
    })
    .with_context(|| format!("now: {:#?}", node.pod(server)))?;

    let flag = if family == Family::V4 { "-4" } else { "-6" };
    for rule in [["table", "15001"], ["table", "15002"]] {
        let before = footprint(&server.netns)?;
        server.netns.output("ip", &[&[flag, "rule", "del"], &rule[..]].concat())?;
        wait_for("the rule", SOON, || Ok((footprint(&server.netns)? == before).then_some(())))?;
    }
    node.assert_outbound(server, client, family)?;

    server.netns.output("tc", &["qdisc", "del", "dev", "eth0", "ingress"])?;
    node.wait_until_enrolled(server)?;
    cluster.assert_redirected(family)
}
