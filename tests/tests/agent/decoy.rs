//! An application without capabilities makes a network namespace of its own (in a user namespace of its own),
//! with the pod's addresses. Where no process of the runtime's keeps the sandbox, and CNI has reported nothing
//! (the pod is older than the agent), the pod is found by the application's processes.

use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::netns::Family;
use redirect_tests::process::Process;
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cgroup::{Cgroup, any_hierarchy};
use crate::cluster::{Cluster, Manifest, SOON, converse, echo};

/// The cgroup of a pod's container. The logs of its processes are in a directory.
struct Container {
    uid: String,
    cgroup: Cgroup,
    logs: PathBuf,
}

impl Container {
    fn new(cluster: &Cluster) -> Result<Self> {
        let logs = cluster.topology.dir().subdir("containers")?;
        // The agents of other tests see its processes, too, and their pods have the same addresses.
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let uid = format!("{:08x}-98a8-4d5c-9b2e-{number:012x}", process::id());
        let cgroup = Cgroup::new(&any_hierarchy()?, &format!("kubepods/pod{uid}/container"))?;
        Ok(Self { uid, cgroup, logs })
    }

    /// A process in the pod's network namespace.
    fn application(&self, pod: &Pod) -> Result<Process> {
        self.start(pod, "application", "sh -c 'echo inside; exec sleep infinity'")
    }

    /// A process in a network namespace with the pod's addresses, which it makes after so many user namespaces.
    fn decoy(&self, pod: &Pod, depth: usize) -> Result<Process> {
        let users = "unshare --user --map-root-user ".repeat(depth);
        let script = format!(
            "{users} unshare --net sh -c 'ip link set lo up && \
             ip link add eth0 type veth peer name eth1 && ip addr add {}/32 dev eth0 && \
             ip addr add {}/128 dev eth0 nodad && ip link set eth0 up && ip link set eth1 up && \
             echo inside && exec sleep infinity'",
            pod.v4, pod.v6
        );
        self.start(pod, "decoy", &script)
    }

    fn start(&self, pod: &Pod, name: &str, script: &str) -> Result<Process> {
        let as_nobody = "exec setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set=-all \
                         --inh-caps=-all";
        let mut command = self.cgroup.shell(Some(&pod.netns), &format!("{as_nobody} {script}"));
        let mut process = Process::spawn(name, &mut command, self.logs.join(name))?;
        process.wait_for_log("inside", SOON)?;
        Ok(process)
    }
}

/// Waits until a pod has failed because of who owns the network namespace of its processes.
fn wait_until_refused(cluster: &Cluster) -> Result<()> {
    let why = |message: &String| message.contains("user namespace");
    cluster.node.wait_for_pod("to be refused", &cluster.server, |pod| {
        pod.state == PodState::Failed && pod.message.as_ref().is_some_and(why)
    })?;
    ensure!(!cluster.node.is_published(&cluster.server), "peers are told that it is enrolled");
    Ok(())
}

#[test]
fn applications_own_namespace_is_not_taken_for_the_pods() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.hide_netns()?;
    let container = Container::new(&cluster)?;
    // The container's first process, and one that it has started.
    let _first = container.decoy(&cluster.server, 1)?;
    let _second = container.application(&cluster.server)?;
    cluster.node.write(&Manifest::of(&cluster.server).uid(&container.uid).mode("ambient"))?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.assert_redirected(Family::V4)?;
    cluster.assert_redirected(Family::V6)
}

#[test]
fn pod_is_not_enrolled_while_all_its_processes_are_in_namespaces_of_their_own() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.hide_netns()?;
    let container = Container::new(&cluster)?;
    let _decoys = [container.decoy(&cluster.server, 1)?, container.decoy(&cluster.server, 2)?];
    cluster.node.write(&Manifest::of(&cluster.server).uid(&container.uid).mode("ambient"))?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    wait_until_refused(&cluster)?;
    let log = cluster.node.agent_log()?;
    ensure!(!log.contains("enrolled"), "it was enrolled for a moment:\n{log}");

    let application = container.application(&cluster.server)?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.assert_redirected(Family::V4)?;
    cluster.assert_redirected(Family::V6)?;

    // Sockets can stay in a namespace that all processes have left.
    drop(application);
    wait_until_refused(&cluster)?;
    for family in [Family::V4, Family::V6] {
        let outbound = converse(&cluster.server, &cluster.client, family);
        ensure!(outbound.is_err(), "past the proxy over {family:?}: {outbound:?}");
        let inbound = converse(&cluster.client, &cluster.server, family);
        ensure!(inbound.is_err(), "past the proxy over {family:?}: {inbound:?}");
    }
    Ok(())
}

#[test]
fn pod_with_a_user_namespace_of_its_own_is_found_by_its_processes() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.hide_netns()?;
    cluster.server = cluster.topology.add_pod_with_users(0, "shop", "users")?;
    let container = Container::new(&cluster)?;
    let manifest = Manifest::of(&cluster.server).uid(&container.uid).mode("ambient");
    // One level deeper than the pod's.
    let _first = container.decoy(&cluster.server, 2)?;
    let application = container.application(&cluster.server)?;
    cluster.node.write(&manifest)?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    // No runtime would make it so for this pod.
    wait_until_refused(&cluster)?;

    cluster.node.write(&manifest.with("/spec", "hostUsers", json!(false)))?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.assert_redirected(Family::V4)?;
    cluster.assert_redirected(Family::V6)?;

    drop(application);
    wait_until_refused(&cluster)
}
