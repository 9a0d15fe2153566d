//! Labels decide, and an edited one is followed at once.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use redirect_agent::membership::Reason;
use redirect_agent::output::PodState;
use redirect_tests::app::Call;
use redirect_tests::both_families;
use redirect_tests::footprint::{Footprint, assert_unchanged, footprint};
use redirect_tests::hbone::{Direction, HboneClient, Identity};
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cluster::{Cluster, Manifest, PORT, SOON, echo, now};
use crate::load::Load;

both_families! {
    label_is_edited_under_load_and_followed_within_a_second,
    namespace_label_brings_its_pods_in_but_those_that_opt_out,
    pods_that_cannot_be_in_the_mesh_are_left_alone,
    connection_with_a_port_that_the_proxy_has_just_used_goes_on,
    half_closed_connection_is_waited_for,
    peers_that_hear_late_that_a_pod_leaves_still_reach_it,
}

/// How often the label goes on and off.
const ROUNDS: usize = 4;
/// How fast that is followed, in seconds.
const AT_ONCE: f64 = 1.0;

fn label_is_edited_under_load_and_followed_within_a_second(family: Family) -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::start()?;
    let _apps = (echo(server)?, echo(client)?);
    node.assert_direct(client, server, family)?;

    let load = Load::between(client, server, &[family]).keeping_old();
    let (edits, calls) = load.during(|| {
        let mut edits = Vec::new();
        for _ in 0..ROUNDS {
            let on = now()?;
            node.write(&Manifest::of(server).mode("ambient"))?;
            node.wait_until_enrolled(server)?;
            node.assert_outbound(server, client, family)?;
            node.assert_inbound(client, server, family)?;
            let off = now()?;
            node.write(&Manifest::of(server))?;
            node.wait_for_state(server, PodState::Bypassing)?;
            node.assert_direct(server, client, family)?;
            node.assert_direct(client, server, family)?;
            assert!(!node.is_published(server));
            edits.push((on, off));
        }
        Ok(edits)
    })?;

    assert!(calls > 20 * ROUNDS, "{calls} calls are no load");
    let records = node.records()?;
    for (round, (on, off)) in edits.iter().enumerate() {
        let next = edits.get(round + 1).map_or(f64::MAX, |(next, _)| *next);
        for direction in [Direction::Outbound, Direction::InboundPlaintext] {
            let seen = || {
                let times = records.iter().filter(|r| r.direction == direction).map(|r| r.ts);
                times.filter(|ts| (*on..next).contains(ts))
            };
            let first = seen().reduce(f64::min).context("nothing was redirected")? - on;
            let last = seen().reduce(f64::max).context("nothing was redirected")? - off;
            assert!(first < AT_ONCE, "{direction:?} was redirected only after {first} s");
            assert!(last < AT_ONCE, "{direction:?} was redirected for {last} s more");
        }
    }
    Ok(())
}

fn namespace_label_brings_its_pods_in_but_those_that_opt_out(family: Family) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let optout = cluster.topology.add_pod(0, "shop", "optout")?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&optout)?);
    node.write(&Manifest::of(&optout).mode("none"))?;
    node.wait_for_state(&optout, PodState::Bypassing)?;
    let before = (footprint(&server.netns)?, footprint(&optout.netns)?);

    let shop = Manifest::of_namespace("shop");
    node.write(&shop.clone().mode("ambient"))?;
    node.wait_until_enrolled(server)?;

    assert_eq!(node.pod(server)?.map(|p| p.reason), Some(Reason::NamespaceLabelAmbient));
    node.assert_outbound(server, client, family)?;
    node.assert_inbound(client, server, family)?;
    // Inbound calls come from the pod itself, through its own neighbour's proxy or not.
    node.assert_inbound(&optout, server, family)?;
    node.assert_outbound(server, &optout, family)?;
    assert_untouched(&cluster, &optout, Reason::PodLabelNone, &before.1, family)?;

    let Cluster { node, server, client, .. } = &cluster;
    node.write(&shop)?;
    node.wait_for_state(server, PodState::Bypassing)?;
    node.assert_direct(server, client, family)?;
    node.assert_direct(client, server, family)?;
    assert_unchanged(&server.netns, &before.0)?;

    node.write(&shop.mode("ambient"))?;
    node.wait_until_enrolled(server)?;
    node.remove(&Manifest::of_namespace("shop"))?;
    let gone = node.wait_for_state(server, PodState::Bypassing)?;
    assert_eq!(gone.reason, Reason::NotLabeled);
    assert_unchanged(&server.netns, &before.0)?;
    Ok(())
}

fn pods_that_cannot_be_in_the_mesh_are_left_alone(family: Family) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let sidecar = cluster.topology.add_pod(0, "shop", "sidecar")?;
    let host = cluster.topology.add_pod(0, "shop", "host")?;
    let finished = cluster.topology.add_pod(0, "shop", "finished")?;
    let excluded = cluster.topology.add_pod(0, "excluded", "agent")?;
    let node = &cluster.node;
    for name in ["shop", "excluded"] {
        node.write(&Manifest::of_namespace(name).mode("ambient"))?;
    }
    let ambient = |pod| Manifest::of(pod).mode("ambient");
    let pods = [
        (
            &sidecar,
            Reason::Sidecar,
            ambient(&sidecar).with("/metadata/annotations", "sidecar.istio.io/status", json!("{}")),
        ),
        (&host, Reason::HostNetwork, ambient(&host).with("/spec", "hostNetwork", json!(true))),
        (
            &finished,
            Reason::PodFinished,
            ambient(&finished).with("/status", "phase", json!("Succeeded")),
        ),
        (&excluded, Reason::NamespaceExcluded, ambient(&excluded)),
    ];
    let mut apps = vec![echo(&cluster.server)?, echo(&cluster.client)?];
    let mut before = Vec::new();
    for (pod, _, manifest) in &pods {
        apps.push(echo(pod)?);
        before.push(footprint(&pod.netns)?);
        node.write(manifest)?;
    }
    node.wait_until_enrolled(&cluster.server)?;

    for ((pod, reason, _), before) in pods.iter().zip(&before) {
        node.wait_for_state(pod, PodState::Bypassing)?;
        assert_untouched(&cluster, pod, *reason, before, family)?;
    }
    // Beside a pod that is.
    cluster.assert_redirected(family)
}

/// A pod that bypasses: its calls and those to it never meet the proxy, and it carries nothing.
fn assert_untouched(
    Cluster { node, client, .. }: &Cluster,
    pod: &Pod,
    reason: Reason,
    before: &Footprint,
    family: Family,
) -> Result<()> {
    let status = node.pod(pod)?.context("the pod is not in status")?;
    assert_eq!((status.state, status.reason), (PodState::Bypassing, reason));
    assert_eq!((status.kernel, status.message), (None, None));
    node.assert_direct(pod, client, family)?;
    node.assert_direct(client, pod, family)?;
    assert_unchanged(&pod.netns, before)?;
    assert!(!node.links(pod)?.exists());
    assert!(!node.is_published(pod));
    Ok(())
}

/// The proxy's connection to the application, in TIME_WAIT, has the ports of one that comes direct.
fn connection_with_a_port_that_the_proxy_has_just_used_goes_on(family: Family) -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::start()?;
    let _app = echo(server)?;
    let addr = server.addr(family, PORT);
    node.enroll(server)?;
    let proxys = Call::to(addr).make(&client.netns)?.answer()?.saw_peer;
    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;

    let mut direct = Call::to(addr).from(proxys).open(&client.netns)?;
    assert_eq!(direct.answer().saw_peer, proxys);
    node.enroll(server)?;
    direct.exchange(b"still there?")
}

/// The pod has sent all it has to say, and the answer takes its time.
fn half_closed_connection_is_waited_for(family: Family) -> Result<()> {
    let Cluster { node, server, client, .. } = &Cluster::enrolled(&["--drain", "20s"])?;
    let at = client.addr(family, PORT);
    let listener = client.netns.run(|| TcpListener::bind(at).context("listen"))?;
    let mut asking = server.netns.run(|| TcpStream::connect(at).context("connect"))?;
    asking.set_read_timeout(Some(SOON))?;
    let (mut answering, _) = listener.accept().context("accept")?;
    asking.write_all(b"?")?;
    asking.shutdown(Shutdown::Write)?;
    let mut question = Vec::new();
    answering.read_to_end(&mut question).context("read the question")?;

    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Leaving)?;
    for _ in 0..10 {
        answering.write_all(&[b'!'; 10_000]).context("answer")?;
        thread::sleep(Duration::from_millis(200));
    }
    drop(answering);
    let mut answer = Vec::new();
    asking.read_to_end(&mut answer).context("read the answer")?;
    ensure!(answer.len() == 100_000, "{} bytes of the answer", answer.len());
    node.wait_for_state(server, PodState::Bypassing).map(drop)
}

/// istiod tells them, and until it has, they speak HBONE to the pod.
fn peers_that_hear_late_that_a_pod_leaves_still_reach_it(family: Family) -> Result<()> {
    let Cluster { node, server, client, topology } = &Cluster::enrolled(&[])?;
    let _app = echo(server)?;
    let identity = Identity::new(&client.namespace, &client.name);
    let peer = HboneClient::new(&topology.dir().path().join("ca"), &identity)?;
    let target = server.addr(family, PORT);

    node.write(&Manifest::of(server))?;
    wait_for("the peers to be told", SOON, || Ok((!node.is_published(server)).then_some(())))?;
    let told = Instant::now();
    while told.elapsed() < Duration::from_secs(1) {
        client
            .netns
            .block_on(|| async { peer.connect(target).await.map(drop).context("call by HBONE") })?;
    }
    node.wait_for_state(server, PodState::Bypassing)?;
    node.assert_direct(client, server, family)
}
