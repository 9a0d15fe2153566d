//! `status` on a node with more pods than one wants to see.

use std::process::Stdio;

use anyhow::{Context as _, Result};
use redirect_agent::output::{PodState, Status};
use redirect_tests::process::{Process, finish};

use crate::cluster::{Cluster, Manifest, SOON};

#[test]
fn some_pods_are_shown_by_name_by_label_and_when_they_are_not_ready() -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let third = cluster.topology.add_pod(0, "bank", "third")?;
    let Cluster { node, server, .. } = &cluster;
    for pod in [&second, &third] {
        node.write(&Manifest::of(pod))?;
        node.wait_for_state(pod, PodState::Bypassing)?;
    }
    let shown = |args: &[&str]| -> Result<Vec<String>> {
        let json = node.tell("status", &[args, &["-o", "json"]].concat())?;
        let status: Status = serde_json::from_str(&json).context("read status")?;
        Ok(status.pods.iter().map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect())
    };
    assert_eq!(shown(&[])?, ["bank/third", "shop/second", "shop/server"]);
    assert_eq!(shown(&["shop"])?, ["shop/second", "shop/server"]);
    assert_eq!(shown(&["bank", "shop/server"])?, ["bank/third", "shop/server"]);
    assert_eq!(shown(&["-l", "app in (second, third)"])?, ["bank/third", "shop/second"]);
    assert_eq!(shown(&["shop", "-l", "app!=server"])?, ["shop/second"]);
    assert_eq!(shown(&["--not-ready"])?, [""; 0]);
    let text = node.tell("status", &["shop", "-o", "wide"])?;
    assert_eq!(text.lines().last(), Some("2 pods: 1 bypassing, 1 enrolled; all ready"), "{text}");
    let kernel = node.pod(server)?.and_then(|pod| pod.kernel).context("no kernel")?;
    let all = kernel.present.len();
    assert!(text.contains(&format!("   {all}/{all}   ")), "{text}");
    node.tell("status", &["--exit-code"])?;
    let (ok, said) = finish(node.command("status")?.args(["nosuchns", "shop/nobody"]))?;
    assert!(!ok && said.contains("namespace nosuchns has no pod on this node"), "{said}");
    assert!(said.contains("there is no pod shop/nobody on this node"), "{said}");

    let mut cluster = cluster;
    cluster.node.kill_proxy()?;
    let Cluster { node, server, .. } = &cluster;
    node.wait_for_state(server, PodState::Degraded)?;
    let (ok, said) = finish(node.command("status")?.args(["--not-ready", "--exit-code"]))?;
    assert!(!ok && said.contains("error: 3 pods: 2 bypassing, 1 degraded; 1 not ready"), "{said}");
    assert!(said.contains("server") && !said.contains("third"), "{said}");
    assert!(said.contains("no proxy since 20"), "{said}");
    node.tell("status", &["bank", "--exit-code"]).map(drop)
}

#[test]
fn watching_prints_each_change_until_it_is_interrupted() -> Result<()> {
    let cluster = Cluster::start()?;
    let Cluster { node, server, .. } = &cluster;
    let mut command = node.command("status")?;
    command.args(["--watch", "shop"]).stdin(Stdio::null());
    let log = cluster.topology.dir().path().join("watch.log");
    let mut watching = Process::spawn("status --watch", &mut command, log)?;
    watching.wait_for_log("1 pod: 1 bypassing; all ready", SOON)?;
    node.enroll(server)?;
    watching.wait_for_log("shop/server   enrolled (pod-label-ambient)", SOON)?;
    node.remove(&Manifest::of(server))?;
    watching.wait_for_log("shop/server   gone", SOON)
}
