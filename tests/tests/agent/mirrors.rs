//! Pods that claim to be the mirror of a static pod. Whoever may create pods can make one, with the uid of any
//! pod: kubelet deletes it, but a finalizer keeps it.

use anyhow::{Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::apiserver::Kind;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::api_server::Managed;
use crate::cluster::{Cluster, Manifest, SOON, echo};
use crate::cmdadd::{
    assert_granted, assert_redirected, new_pod, request, running, uid, write_status,
};

/// Its name precedes those of all others.
fn impostor(of: &Pod) -> Manifest {
    Manifest::starting("aaa", "impostor", 0)
        .mode("ambient")
        .with("/metadata", "deletionTimestamp", json!("2026-08-01T12:00:00Z"))
        .with("/metadata", "finalizers", json!(["example.com/stay"]))
        .with("/metadata/annotations", "kubernetes.io/config.mirror", json!("mirror"))
        .with("/metadata/annotations", "kubernetes.io/config.hash", json!(uid(of)))
}

/// Makes the impostor, and waits until the agent has seen it.
fn put_impostor(Managed { cluster, api }: &Managed, of: &Pod) -> Result<()> {
    api.put(Kind::Pod, impostor(of).object());
    wait_for("the conflict to be told", SOON, || {
        let problems = cluster.node.status()?.problems;
        let told = problems.iter().any(|problem| problem.message.contains("its uid"));
        Ok(told.then_some(()))
    })
}

fn assert_in_its_place(cluster: &Cluster, pod: &Pod) -> Result<()> {
    cluster.node.wait_until_complete(pod)?;
    for family in [Family::V4, Family::V6] {
        assert_redirected(cluster, pod, family)?;
    }
    let pods = cluster.node.status()?.pods;
    ensure!(pods.iter().all(|found| found.namespace != "aaa"), "{pods:#?}");
    Ok(())
}

#[test]
fn impostor_does_not_take_the_place_of_a_pod_that_gets_its_address() -> Result<()> {
    let mut managed = running(&[])?;
    let cart = new_pod(&mut managed, "cart", "ambient")?;
    let _apps = (echo(&cart)?, echo(&managed.cluster.client)?);
    assert_granted(&managed.cluster.node, &request(&cart))?;
    assert_redirected(&managed.cluster, &cart, Family::V4)?;
    put_impostor(&managed, &cart)?;
    write_status(&managed.api, &cart);
    wait_for("the address to be known", SOON, || {
        let pods = managed.cluster.node.status()?.pods;
        Ok(pods.iter().any(|pod| pod.namespace == "aaa" || !pod.ips.is_empty()).then_some(()))
    })?;
    assert_in_its_place(&managed.cluster, &cart)
}

#[test]
fn impostor_does_not_take_the_place_of_a_pod_when_the_agent_restarts() -> Result<()> {
    let mut managed = running(&[])?;
    let cart = new_pod(&mut managed, "cart", "ambient")?;
    let _apps = (echo(&cart)?, echo(&managed.cluster.client)?);
    assert_granted(&managed.cluster.node, &request(&cart))?;
    write_status(&managed.api, &cart);
    managed.cluster.node.wait_for_state(&cart, PodState::Enrolled)?;
    put_impostor(&managed, &cart)?;
    managed.cluster.node.kill_agent()?;
    managed.cluster.node.start_agent()?;
    assert_in_its_place(&managed.cluster, &cart)
}
