//! Pods that claim to be the mirror of a static pod. Whoever may create pods can make one, with the uid of any
//! pod: kubelet deletes it, but a finalizer keeps it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::apiserver::Kind;
use redirect_tests::app::{App, Call};
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::api_server::Managed;
use crate::cluster::{Cluster, Manifest, PORT, SOON, echo};
use crate::cmdadd::{
    assert_granted, assert_redirected, new_pod, request, running, uid, write_status,
};

/// How long it is looked whether something does not happen.
const A_WHILE: Duration = Duration::from_secs(3);

/// Its name precedes those of all others.
fn impostor(of: &Pod) -> Manifest {
    Manifest::starting("aaa", "impostor", 0)
        .with("/metadata", "deletionTimestamp", json!("2026-08-01T12:00:00Z"))
        .with("/metadata", "finalizers", json!(["example.com/stay"]))
        .with("/metadata/annotations", "kubernetes.io/config.mirror", json!("mirror"))
        .with("/metadata/annotations", "kubernetes.io/config.hash", json!(uid(of)))
}

/// A pod in the mesh, and what runs in it and in the client.
fn enrolled(managed: &mut Managed) -> Result<(Pod, [App; 2])> {
    let cart = new_pod(managed, "cart", "ambient")?;
    let Managed { cluster, api } = managed;
    let apps = [echo(&cart)?, echo(&cluster.client)?];
    assert_granted(&cluster.node, &request(&cart))?;
    write_status(api, &cart);
    cluster.node.wait_for_state(&cart, PodState::Enrolled)?;
    Ok((cart, apps))
}

fn wait_for_impostor(cluster: &Cluster) -> Result<()> {
    wait_for("the impostor to be known", SOON, || {
        let pods = cluster.node.status()?.pods;
        Ok(pods.iter().any(|pod| pod.namespace == "aaa").then_some(()))
    })
}

/// Makes the impostor, and waits until the agent has seen it.
fn put_impostor(Managed { cluster, api }: &Managed, of: &Pod) -> Result<()> {
    api.put(Kind::Pod, impostor(of).mode("ambient").object());
    wait_for_impostor(cluster)
}

/// The impostor has no network namespace, and so no part in anything.
fn assert_has_nothing(cluster: &Cluster) -> Result<()> {
    let pods = cluster.node.status()?.pods;
    let known = pods.iter().find(|found| found.namespace == "aaa").context("no impostor")?;
    ensure!(known.netns.is_none() && known.kernel.is_none(), "{known:#?}");
    Ok(())
}

fn assert_in_its_place(cluster: &Cluster, pod: &Pod) -> Result<()> {
    cluster.node.wait_until_complete(pod)?;
    for family in [Family::V4, Family::V6] {
        assert_redirected(cluster, pod, family)?;
    }
    assert_has_nothing(cluster)
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
        let known = managed.cluster.node.pod(&cart)?;
        Ok(known.is_some_and(|pod| !pod.ips.is_empty()).then_some(()))
    })?;
    assert_in_its_place(&managed.cluster, &cart)
}

#[test]
fn impostor_does_not_take_the_place_of_a_pod_when_the_agent_restarts() -> Result<()> {
    let mut managed = running(&[])?;
    let (cart, _apps) = enrolled(&mut managed)?;
    put_impostor(&managed, &cart)?;
    managed.cluster.node.kill_agent()?;
    managed.cluster.node.start_agent()?;
    assert_in_its_place(&managed.cluster, &cart)
}

/// Its network namespace lives on, and what still runs there is refused. A pod that is not in the mesh would set it
/// free, one that is would lend it an identity.
#[test]
fn impostor_does_not_inherit_what_still_runs_of_a_pod_that_was_deleted_by_force() -> Result<()> {
    for mode in ["ambient", "none"] {
        let mut managed = running(&[])?;
        let (cart, _apps) = enrolled(&mut managed)?;
        assert_redirected(&managed.cluster, &cart, Family::V4)?;
        managed.api.put(Kind::Pod, impostor(&cart).mode(mode).object());
        managed.api.delete(Kind::Pod, "shop", "cart");
        wait_for_impostor(&managed.cluster)?;
        ensure!(managed.cluster.node.pod(&cart)?.is_none(), "the pod is still known");
        for restarted in [false, true] {
            if restarted {
                managed.cluster.node.kill_agent()?;
                managed.cluster.node.start_agent()?;
            }
            assert_refused(&managed.cluster, &cart)?;
        }
    }
    Ok(())
}

/// Once the proxy has let the pod go, neither its calls nor those to it arrive, for as long as taking its place takes.
fn assert_refused(cluster: &Cluster, pod: &Pod) -> Result<()> {
    let Cluster { node, client, .. } = cluster;
    let reaches = || {
        let pairs = [(pod, client), (client, pod)];
        let calls = pairs.iter().flat_map(|pair| [Family::V4, Family::V6].map(|f| (pair, f)));
        let opened = |((from, to), family): (&(&Pod, &Pod), Family)| {
            Call::to(to.addr(family, PORT)).open(&from.netns).is_ok()
        };
        calls.filter(|call| opened(*call)).count()
    };
    wait_for("the pod to be refused", SOON, || Ok((reaches() == 0).then_some(())))?;
    let deadline = Instant::now() + A_WHILE;
    wait_for("a while to be over", SOON, || {
        ensure!(reaches() == 0, "it is set free; status: {:#?}", node.status()?.pods);
        Ok((Instant::now() > deadline).then_some(()))
    })?;
    assert_has_nothing(cluster)
}
