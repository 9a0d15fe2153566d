//! A pod that has not the addresses that its status says is not abandoned.

use anyhow::{Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use serde_json::json;

use crate::cluster::{Cluster, Manifest, echo};

both_families! {
    family_whose_address_is_gone_costs_the_other_nothing,
    pod_whose_status_has_no_address_is_put_back_all_the_same,
}

fn family_whose_address_is_gone_costs_the_other_nothing(stays: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let (goes, flag) = match stays {
        Family::V4 => (Family::V6, "-6"),
        Family::V6 => (Family::V4, "-4"),
    };
    cluster.assert_redirected(stays)?;

    cluster.server.netns.output("ip", &[flag, "addr", "flush", "dev", "eth0"])?;
    cluster.node.stop_agent()?;
    cluster.node.start_agent()?;
    cluster.node.kill_proxy()?;
    cluster.node.start_proxy()?;
    let gone = format!("has its address {}", cluster.server.ip(goes));
    cluster.node.wait_for_pod("to be degraded", &cluster.server, |pod| {
        pod.state == PodState::Degraded
            && pod.message.as_ref().is_some_and(|message| message.contains(&gone))
    })?;
    cluster.assert_redirected(stays)?;
    // What is broken in the family that stays is repaired.
    let stays_flag = if flag == "-6" { "-4" } else { "-6" };
    cluster.server.netns.output("ip", &[stays_flag, "rule", "del", "table", "15001"])?;
    cluster.node.wait_for_pod("to be repaired", &cluster.server, |pod| {
        pod.kernel.as_ref().is_some_and(|kernel| kernel.complete)
    })?;
    cluster.assert_redirected(stays)?;

    cluster.node.write(&Manifest::of(&cluster.server).mode("none"))?;
    cluster.node.wait_for_state(&cluster.server, PodState::Bypassing)?;
    ensure!(!cluster.node.links(&cluster.server)?.exists());
    cluster.assert_direct(stays)
}

/// Kubelet has yet to say which addresses it has; or its name has changed to another address.
fn pod_whose_status_has_no_address_is_put_back_all_the_same(family: Family) -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let before = footprint(&cluster.server.netns)?;
    for addresses in [json!([]), json!([{"ip": "192.0.2.77"}])] {
        cluster.node.start_agent()?;
        cluster.node.start_proxy()?;
        cluster.node.enroll(&cluster.server)?;
        cluster.assert_redirected(family)?;
        cluster.node.stop_agent()?;
        let manifest = Manifest::of(&cluster.server).mode("none");
        cluster.node.write(&manifest.with("/status", "podIPs", addresses))?;
        cluster.node.start_agent()?;
        cluster.node.wait_for_state(&cluster.server, PodState::Bypassing)?;
        cluster.assert_direct(family)?;
        assert_unchanged(&cluster.server.netns, &before)?;
        cluster.node.stop_agent()?;
        cluster.node.kill_proxy()?;
    }
    Ok(())
}
