//! Pods whose network namespaces have no name: they are found by their processes.

use std::path::Path;

use anyhow::Result;
use redirect_agent::output::PodState;
use redirect_tests::netns::Family;
use redirect_tests::process::{Process, wait_for};
use redirect_tests::topology::Pod;

use crate::cgroup::{Cgroup, any_hierarchy};
use crate::cluster::{Cluster, Manifest, SOON, echo};

const UID: &str = "6f0f3a52-98a8-4d5c-9b2e-7c1f0f7d2a11";

/// A process in a pod's network namespace, or in the node's, and in a cgroup as kubelet makes them.
struct Container {
    // Dropped first: a cgroup that has a process cannot be removed.
    _process: Process,
    _cgroup: Cgroup,
}

impl Container {
    fn start(pod: Option<&Pod>, uid: &str, log: &Path) -> Result<Self> {
        let cgroup = Cgroup::new(&any_hierarchy()?, &format!("kubepods/pod{uid}/container"))?;
        let netns = pod.map(|pod| &pod.netns);
        let mut command = cgroup.shell(netns, "echo inside && exec sleep infinity");
        let mut process = Process::spawn("a container", &mut command, log.to_owned())?;
        process.wait_for_log("inside", SOON)?;
        Ok(Self { _process: process, _cgroup: cgroup })
    }
}

#[test]
fn pod_is_found_by_its_processes_until_its_sandbox_is_gone() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let logs = cluster.topology.dir().subdir("containers")?;
    cluster.node.hide_netns()?;
    cluster.node.write(&Manifest::of(&cluster.server).uid(UID).mode("ambient"))?;
    // One that is not in the pod's namespace must mislead nobody, such as a probe that runs on the node.
    let _stray = Container::start(None, UID, &logs.join("stray.log"))?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    cluster.node.wait_for_pod("to be awaited", &cluster.server, |p| {
        p.state == PodState::Failed && p.message.as_ref().is_some_and(|m| m.contains(UID))
    })?;

    let sandbox = Container::start(Some(&cluster.server), UID, &logs.join("sandbox.log"))?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.assert_redirected(Family::V4)?;
    cluster.assert_redirected(Family::V6)?;

    // The next agent finds it again.
    cluster.node.kill_agent()?;
    cluster.node.start_agent()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    // It is the pod's as long as any of its processes is there.
    let second = Container::start(Some(&cluster.server), UID, &logs.join("second.log"))?;
    drop(sandbox);
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.assert_redirected(Family::V4)?;

    drop(second);
    cluster.node.wait_for_pod("to be missed", &cluster.server, |p| p.state == PodState::Failed)?;
    wait_for("peers to be told", SOON, || {
        Ok((!cluster.node.is_published(&cluster.server)).then_some(()))
    })
}
