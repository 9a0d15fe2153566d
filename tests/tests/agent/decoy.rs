//! An application without capabilities gives its oldest process a network namespace of its own (in a user
//! namespace of its own), with the pod's addresses. Where no process of the runtime's keeps the sandbox, and CNI
//! has reported nothing (the pod is older than the agent), that is what is enrolled.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use redirect_tests::netns::Family;
use redirect_tests::process::Process;
use redirect_tests::topology::Pod;

use crate::cgroup::{Cgroup, any_hierarchy};
use crate::cluster::{Cluster, Manifest, SOON, converse, echo};

const UID: &str = "6f0f3a52-98a8-4d5c-9b2e-7c1f0f7d2a11";

fn in_pod(pod: &Pod, cgroup: &Cgroup, script: &str) -> Command {
    let as_nobody = "exec setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set=-all \
                     --inh-caps=-all";
    cgroup.shell(Some(&pod.netns), &format!("{as_nobody} {script}"))
}

#[test]
#[ignore = "a known hole: SECURITY.md"]
fn applications_own_namespace_is_not_taken_for_the_pods() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let logs = cluster.topology.dir().subdir("containers")?;
    cluster.node.hide_netns()?;
    let cgroup = Cgroup::new(&any_hierarchy()?, &format!("kubepods/pod{UID}/container"))?;
    let server = &cluster.server;
    // The container's first process, and one that it has started.
    let decoy = format!(
        "unshare --user --map-root-user --net sh -c 'ip link set lo up && \
         ip link add eth0 type veth peer name eth1 && ip addr add {}/32 dev eth0 && \
         ip addr add {}/128 dev eth0 nodad && ip link set eth0 up && ip link set eth1 up; \
         echo inside; exec sleep infinity'",
        server.v4, server.v6
    );
    let mut first =
        Process::spawn("decoy", &mut in_pod(server, &cgroup, &decoy), logs.join("decoy.log"))?;
    first.wait_for_log("inside", SOON)?;
    thread::sleep(Duration::from_millis(50));
    let mut second = Process::spawn(
        "application",
        &mut in_pod(server, &cgroup, "sh -c 'echo inside; exec sleep infinity'"),
        logs.join("app.log"),
    )?;
    second.wait_for_log("inside", SOON)?;

    cluster.node.write(&Manifest::of(&cluster.server).uid(UID).mode("ambient"))?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let enrolled = cluster.node.wait_until_enrolled(&cluster.server);
    let _app = echo(&cluster.client)?;
    for family in [Family::V4, Family::V6] {
        let Ok(conversation) = converse(&cluster.server, &cluster.client, family) else { continue };
        let saw = conversation.answer().saw_peer;
        let past = saw == conversation.local_addr()?;
        ensure!(!(past && enrolled.is_ok()), "enrolled, and past the proxy over {family:?}");
    }
    Ok(())
}
