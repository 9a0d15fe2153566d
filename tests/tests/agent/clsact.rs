//! Kernels without tcx: what somebody does to our clsact filters behind the agent's back is put right.

use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;

use crate::cluster::{Cluster, Manifest, echo};

both_families! {
    clsact_filters_are_put_back_when_they_are_deleted,
}

/// The timer does not come round in this test: the agent hears of it.
fn clsact_filters_are_put_back_when_they_are_deleted(family: Family) -> Result<()> {
    let cluster = &Cluster::with_flags(&["--test-clsact", "--verify-interval", "1h"])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    node.enrol(server)?;
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
