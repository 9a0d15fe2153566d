//! Pods that come and go, also while the agent is down.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use redirect_agent::output::PodState;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::{succeed, wait_for};
use redirect_tests::topology::{Pod, Topology};

use crate::cluster::{Cluster, Manifest, Node, SOON, echo};

both_families! {
    pod_is_made_anew_under_its_name,
    pods_come_and_go_while_the_agent_is_down,
}

/// What one pod has in the kernel: the pins of its links, and its entries in the maps.
struct Traces {
    pins: PathBuf,
    netns: u64,
}

impl Traces {
    fn of(node: &Node, pod: &Pod) -> Result<Self> {
        Ok(Self { pins: node.links(pod)?, netns: pod.netns.inode()? })
    }

    /// What is there of it.
    fn left(&self, node: &Node) -> Result<Vec<String>> {
        let mut left = Vec::new();
        if self.pins.exists() {
            left.push(format!("{}", self.pins.display()));
        }
        for map in ["pods", "saved_sysctls", "counters", "listeners", "proxy_missing"] {
            let dump = dump(node, map)?;
            let inode = format!("\"pod_id\":{}", self.netns);
            let key = format!("\"key\":{},", self.netns);
            if dump.contains(&inode) || dump.contains(&key) {
                left.push(format!("namespace {} in {map}", self.netns));
            }
        }
        Ok(left)
    }

    fn wait_until_gone(&self, node: &Node) -> Result<()> {
        let gone = wait_for("a dead pod's traces to be gone", SOON, || {
            Ok(self.left(node)?.is_empty().then_some(()))
        });
        gone.with_context(|| format!("left: {:?}", self.left(node)))
    }
}

/// A map in words.
fn dump(node: &Node, map: &str) -> Result<String> {
    let mut command = Command::new("bpftool");
    command.args(["-j", "map", "dump", "pinned"]).arg(node.bpffs().join(map));
    let output = succeed(&mut command)?;
    String::from_utf8(output.stdout).context("read bpftool's output")
}

/// What the agent of a cluster that verifies often needs.
const OFTEN: &[&str] = &["--verify-interval", "300ms"];

#[test]
fn namespace_is_deleted_while_the_pod_is_enrolled() -> Result<()> {
    let mut cluster = Cluster::enrolled(OFTEN)?;
    let doomed = cluster.topology.add_pod(0, "shop", "doomed")?;
    let Cluster { node, server, .. } = &cluster;
    node.enroll(&doomed)?;
    let traces = Traces::of(node, &doomed)?;
    assert!(!traces.left(node)?.is_empty());
    let name = doomed.to_string();

    // The manifest stays: the kubelet has not reported it yet.
    drop(doomed);
    traces.wait_until_gone(node)?;

    let status = node.status()?;
    let status = status.pods.iter().find(|p| format!("{}/{}", p.namespace, p.name) == name);
    let status = status.context("the pod is not in status")?;
    assert_ne!(status.state, PodState::Enrolled);
    assert_eq!((status.netns, status.kernel.as_ref()), (None, None));
    let message = status.message.as_deref().unwrap_or_default();
    assert!(message.contains("shop_doomed"), "{message:?}");
    // Nobody else is affected.
    let _apps = (echo(server)?, echo(&cluster.client)?);
    for family in [Family::V4, Family::V6] {
        cluster.assert_redirected(family)?;
    }
    Ok(())
}

/// As a StatefulSet's pod: the same name and the same addresses, another uid and namespace.
fn pod_is_made_anew_under_its_name(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(OFTEN)?;
    let _app = echo(&cluster.client)?;
    let mut pod = cluster.topology.add_pod(0, "shop", "again")?;
    let mut app = echo(&pod)?;
    cluster.node.enroll(&pod)?;
    for (round, manifest_first) in [true, false, true].into_iter().enumerate() {
        let manifest = Manifest::of(&pod).mode("ambient").uid(&format!("uid-{round}"));
        let old = Traces::of(&cluster.node, &pod)?;
        if manifest_first {
            cluster.node.write(&manifest)?;
        }
        drop(app);
        pod = replace(&mut cluster.topology, pod)?;
        app = echo(&pod)?;
        if !manifest_first {
            cluster.node.write(&manifest)?;
        }

        let Cluster { node, client, .. } = &cluster;
        wait_until_new(node, &pod, &format!("uid-{round}"))?;
        node.assert_outbound(&pod, client, family)?;
        node.assert_inbound(client, &pod, family)?;
        old.wait_until_gone(node)?;
        // What was swept was the old one's alone.
        node.assert_outbound(&pod, client, family)?;
        node.assert_inbound(client, &pod, family)?;
    }
    Ok(())
}

fn pods_come_and_go_while_the_agent_is_down(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(OFTEN)?;
    let [doomed, leaver, again] =
        ["doomed", "leaver", "again"].map(|name| cluster.topology.add_pod(0, "shop", name));
    let (doomed, leaver, again) = (doomed?, leaver?, again?);
    let untouched = footprint(&leaver.netns)?;
    for pod in [&doomed, &leaver, &again] {
        cluster.node.enroll(pod)?;
    }
    let traces = [Traces::of(&cluster.node, &doomed)?, Traces::of(&cluster.node, &leaver)?];
    let old = Traces::of(&cluster.node, &again)?;
    assert_ne!(footprint(&leaver.netns)?, untouched);

    cluster.node.kill_agent()?;
    cluster.node.remove(&Manifest::of(&doomed))?;
    drop(doomed);
    cluster.node.remove(&Manifest::of(&leaver))?;
    let again = replace(&mut cluster.topology, again)?;
    cluster.node.write(&Manifest::of(&again).mode("ambient").uid("uid-of-another"))?;
    let newcomer = cluster.topology.add_pod(0, "shop", "newcomer")?;
    cluster.node.write(&Manifest::of(&newcomer).mode("ambient"))?;
    cluster.node.start_agent()?;

    let Cluster { node, server, client, .. } = &cluster;
    let _apps = [server, client, &leaver, &again, &newcomer].map(echo);
    wait_until_new(node, &again, "uid-of-another")?;
    for pod in [server, &again, &newcomer] {
        node.wait_until_enrolled(pod)?;
        node.assert_outbound(pod, client, family)?;
        node.assert_inbound(client, pod, family)?;
    }
    for traces in traces.iter().chain([&old]) {
        traces.wait_until_gone(node)?;
    }
    assert_unchanged(&leaver.netns, &untouched)?;
    node.assert_direct(&leaver, client, family)?;
    node.assert_direct(client, &leaver, family)?;
    for name in ["doomed", "leaver"] {
        let status = node.manifests().join(format!(".status/shop_{name}.json"));
        assert!(!status.exists(), "{} is left", status.display());
    }
    Ok(())
}

/// Removes a pod and makes another one of its name and with its addresses.
fn replace(topology: &mut Topology, old: Pod) -> Result<Pod> {
    let (node, namespace, name, v4, v6) =
        (old.node, old.namespace.clone(), old.name.clone(), old.v4, old.v6);
    drop(old);
    let mut new = topology.add_pod(node, &namespace, &name)?;
    new.netns.ip(&format!(
        "addr add {v4}/32 dev eth0\n\
         addr add {v6}/128 dev eth0 nodad\n\
         addr del {}/32 dev eth0\n\
         addr del {}/128 dev eth0\n",
        new.v4, new.v6
    ))?;
    topology.node(node).ip(&format!(
        "route replace {v4}/32 dev {interface}\n\
         route replace {v6}/128 dev {interface}\n",
        interface = new.host_interface
    ))?;
    (new.v4, new.v6) = (v4, v6);
    Ok(new)
}

fn wait_until_new(node: &Node, pod: &Pod, uid: &str) -> Result<()> {
    let inode = u32::try_from(pod.netns.inode()?).context("convert an inode number")?;
    node.wait_for_pod("to be the new one", pod, |p| {
        p.uid == uid && p.netns == Some(inode) && p.state == PodState::Enrolled
    })?;
    node.wait_until_enrolled(pod)
}
