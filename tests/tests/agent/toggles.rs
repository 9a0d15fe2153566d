//! What an operator says counts before the labels, on this node, until it is taken back.

use std::process::Command;

use anyhow::{Context as _, Result};
use redirect_agent::membership::Reason;
use redirect_agent::output::PodState;
use redirect_agent::overrides::Mode;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::finish;
use serde_json::json;

use crate::cluster::{Cluster, Manifest, echo};
use crate::load::Load;

both_families! {
    enroll_unenroll_and_auto_go_over_the_labels_and_repeat_harmlessly,
    override_ends_by_itself,
    pause_and_resume_switch_the_whole_node_under_load,
}

fn enroll_unenroll_and_auto_go_over_the_labels_and_repeat_harmlessly(family: Family) -> Result<()> {
    let cluster = &Cluster::start()?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;

    // A pod without a label.
    assert_eq!(node.tell("enroll", &["shop/server"])?, "shop/server enters the mesh\n");
    node.wait_until_enrolled(server)?;
    cluster.assert_redirected(family)?;
    assert_eq!(node.tell("enroll", &["shop/server"])?, "shop/server has this override already\n");
    let status = node.pod(server)?.context("no status")?;
    assert_eq!(status.reason, Reason::OverrideEnrolled);
    let overridden = status.overridden.context("no override")?;
    assert_eq!((overridden.mode, overridden.until), (Mode::Enroll, None));
    assert_eq!(overridden.target.to_string(), "shop/server");
    assert!(node.tell("status", &[])?.contains("enroll"));
    cluster.assert_redirected(family)?;

    assert_eq!(
        node.tell("auto", &["shop/server"])?,
        "the labels decide again for shop/server; it leaves the mesh; open connections have 5s\n"
    );
    let status = node.wait_for_state(server, PodState::Bypassing)?;
    assert_eq!((status.reason, status.overridden), (Reason::NotLabeled, None));
    cluster.assert_direct(family)?;
    assert_eq!(node.tell("auto", &["shop/server"])?, "shop/server has no override\n");
    assert_unchanged(&server.netns, &before)?;

    // A pod with one.
    node.enroll(server)?;
    assert_eq!(
        node.tell("unenroll", &["shop"])?,
        "1 pod of shop leaves the mesh; open connections have 5s\n"
    );
    let status = node.wait_for_state(server, PodState::Bypassing)?;
    assert_eq!(status.reason, Reason::OverrideBypass);
    assert_eq!(status.overridden.context("no override")?.target.to_string(), "shop");
    assert_eq!(node.tell("unenroll", &["shop"])?, "shop has this override already\n");
    cluster.assert_direct(family)?;
    assert_unchanged(&server.netns, &before)?;

    // The pod's own goes over its namespace's.
    node.tell("enroll", &["shop/server"])?;
    node.wait_until_enrolled(server)?;
    cluster.assert_redirected(family)?;
    let said = node.tell("auto", &["shop"])?;
    assert!(said.contains("note: shop/server has an override by shop/server"), "{said}");
    node.tell("auto", &["shop/server"])?;
    node.wait_for_pod("to be enrolled by its label", server, |p| {
        p.reason == Reason::PodLabelAmbient && p.state == PodState::Enrolled
    })?;
    cluster.assert_redirected(family)
}

fn override_ends_by_itself(family: Family) -> Result<()> {
    let cluster = &Cluster::start()?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);

    node.tell("enroll", &["shop/server", "--for", "5s"])?;
    let status = node.wait_for_state(server, PodState::Enrolled)?;
    assert!(status.overridden.context("no override")?.until.is_some());
    let status = node.wait_for_state(server, PodState::Bypassing)?;
    assert_eq!((status.reason, status.overridden), (Reason::NotLabeled, None));
    cluster.assert_direct(family)?;

    node.enroll(server)?;
    node.tell("pause", &["--for", "5s"])?;
    let status = node.wait_for_state(server, PodState::Bypassing)?;
    assert_eq!(status.reason, Reason::Paused);
    node.wait_until_enrolled(server)?;
    assert_eq!(node.status()?.pause, None);
    cluster.assert_redirected(family)
}

fn pause_and_resume_switch_the_whole_node_under_load(family: Family) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&second)?);
    let before = (footprint(&server.netns)?, footprint(&second.netns)?);
    for pod in [server, &second] {
        node.enroll(pod)?;
    }

    Load::between(client, server, &[family]).during(|| {
        assert_eq!(
            node.tell("pause", &[])?,
            "2 pods are leaving the mesh; open connections have 5s\n"
        );
        for pod in [server, &second] {
            let status = node.wait_for_state(pod, PodState::Bypassing)?;
            assert_eq!((status.reason, status.kernel), (Reason::Paused, None));
            node.assert_direct(client, pod, family)?;
            node.assert_direct(pod, client, family)?;
        }
        assert!(node.status()?.pause.is_some());
        assert_eq!(node.tell("pause", &[])?, "the node is paused already\n");
        assert_unchanged(&server.netns, &before.0)?;
        assert_unchanged(&second.netns, &before.1)?;
        let said = node.tell("enroll", &["shop/server"])?;
        assert!(said.contains("note: the node is paused"), "{said}");

        assert_eq!(node.tell("resume", &[])?, "2 pods are entering the mesh\n");
        for pod in [server, &second] {
            node.wait_until_enrolled(pod)?;
            node.assert_inbound(client, pod, family)?;
            node.assert_outbound(pod, client, family)?;
        }
        assert_eq!(node.tell("resume", &[])?, "the node was not paused\n");
        Ok(())
    })?;
    Ok(())
}

/// An auditor finds who did it, why and until when; whoever did it hears when it is so.
#[test]
fn changes_are_written_down_and_can_be_waited_for() -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, .. } = &cluster;
    let why = ["--reason", "INC-4711", "--for", "1h", "--wait"];
    let said = node.tell("unenroll", &[&["shop/server"], &why[..]].concat())?;
    assert!(said.contains("done after "), "{said}");
    let status = node.pod(server)?.context("no status")?;
    assert_eq!((status.state, status.reason), (PodState::Bypassing, Reason::OverrideBypass));
    let log = node.agent_log()?;
    let line =
        log.lines().find(|line| line.contains("audit: ")).context("nothing is written down")?;
    for part in [
        "command=\"unenroll\"",
        "target=\"shop/server\"",
        "uid=0",
        "process=\"redirect-agent\"",
        "reason=\"INC-4711\"",
        "until=\"20",
        "shop/server leaves the mesh until ",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    let explained = node.tell("explain", &["shop/server"])?;
    assert!(
        explained.contains("Overridden: unenroll by uid 0 (redirect-agent, process "),
        "{explained}"
    );

    // One that cannot be so is waited for no longer than asked.
    cluster.node.tell("auto", &["shop/server", "--wait"])?;
    let mut cluster = cluster;
    cluster.node.kill_proxy()?;
    cluster.node.tell("unenroll", &["shop/server", "--wait"])?;
    let mut enroll = cluster.node.command("enroll")?;
    let (ok, said) = finish(enroll.args(["shop/server", "--wait=1s"]))?;
    assert!(
        !ok && said.contains("1 of 1 pods are not in the expected state after 1s; shop/server is "),
        "{said}"
    );
    Ok(())
}

#[test]
fn what_was_said_outlives_the_agent() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let Cluster { node, server, .. } = &mut cluster;
    node.write(&Manifest::of(&second).mode("ambient"))?;
    node.tell("enroll", &["shop/server", "--for", "1h"])?;
    node.tell("unenroll", &["shop/second"])?;
    node.wait_until_enrolled(server)?;
    let said = |p: &redirect_agent::output::PodStatus| p.overridden.clone();
    let before =
        (node.pod(server)?.and_then(|p| said(&p)), node.pod(&second)?.and_then(|p| said(&p)));
    assert!(before.0.is_some() && before.1.is_some());

    for crash in [true, false] {
        if crash {
            node.kill_agent()?
        } else {
            node.stop_agent()?;
        }
        node.start_agent()?;
        let status = node.wait_for_state(server, PodState::Enrolled)?;
        assert_eq!((status.reason, said(&status)), (Reason::OverrideEnrolled, before.0.clone()));
        let status = node.wait_for_state(&second, PodState::Bypassing)?;
        assert_eq!((status.reason, said(&status)), (Reason::OverrideBypass, before.1.clone()));
    }

    node.tell("pause", &["--reason", "INC-42"])?;
    node.kill_agent()?;
    node.start_agent()?;
    let text = node.tell("status", &[])?;
    let paused = "PAUSED until `redirect-agent resume` (INC-42): every pod bypasses";
    for line in [paused, "override: unenroll shop/second: 1 pod"] {
        assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
    }
    let status = node.wait_for_state(server, PodState::Bypassing)?;
    assert_eq!(status.reason, Reason::Paused);
    node.tell("resume", &[])?;
    node.wait_until_enrolled(server)
}

#[test]
fn pods_that_no_override_can_bring_in_are_named() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let sidecar = cluster.topology.add_pod(0, "shop", "sidecar")?;
    let host = cluster.topology.add_pod(0, "shop", "host")?;
    let excluded = cluster.topology.add_pod(0, "excluded", "agent")?;
    let node = &cluster.node;
    node.write(&Manifest::of(&sidecar).with(
        "/metadata/annotations",
        "sidecar.istio.io/status",
        json!("{}"),
    ))?;
    node.write(&Manifest::of(&host).with("/spec", "hostNetwork", json!(true)))?;
    node.write(&Manifest::of(&excluded))?;

    for (pod, reason, why) in [
        (&sidecar, Reason::Sidecar, "it has a sidecar"),
        (&host, Reason::HostNetwork, "it uses the node's network"),
        (&excluded, Reason::NamespaceExcluded, "its namespace is excluded"),
    ] {
        let before = footprint(&pod.netns)?;
        node.wait_for_state(pod, PodState::Bypassing)?;
        for target in [pod.to_string(), pod.namespace.clone()] {
            if reason == Reason::NamespaceExcluded {
                let (ok, said) = finish(node.command("enroll")?.arg(&target))?;
                let refused = "refused: excluded is excluded (--excluded-namespaces)";
                assert!(!ok && said.contains(refused), "{target}: {said}");
                continue;
            }
            let said = node.tell("enroll", &[&target])?;
            let note = format!("note: {pod} stays out of the mesh: {why}");
            assert!(said.contains(&note), "{target}: {said}");
        }
        let status = node.pod(pod)?.context("no status")?;
        assert_eq!((status.state, status.reason), (PodState::Bypassing, reason));
        assert_unchanged(&pod.netns, &before)?;
    }
    let said = node.tell("enroll", &["shop/nobody"])?;
    assert!(said.contains("note: there is no pod shop/nobody on this node"), "{said}");
    let said = node.tell("status", &[])?;
    let listed = "override: enroll shop/nobody: no such pod on this node";
    assert!(said.lines().any(|line| line == listed), "{said}");

    // The namespace's override has brought in its other pod.
    node.wait_until_enrolled(&cluster.server)?;
    let mut shop = node.command("enroll")?;
    let said = refusal(shop.arg("shop/"))?;
    assert!(said.contains("shop/"), "{said}");
    Ok(())
}

/// What a command line that makes no sense is answered with.
fn refusal(command: &mut Command) -> Result<String> {
    let output = command.output().context("run redirect-agent")?;
    assert_eq!(output.status.code(), Some(2));
    String::from_utf8(output.stderr).context("read the error")
}
