//! The running agent with an API server as its source. How the source itself follows the server is
//! tested on its own (`tests/kube`).

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::explain::{self, Cause, Explanation, Place};
use redirect_agent::output::PodState;
use redirect_tests::apiserver::{ApiServer, Kind};
use redirect_tests::app::Call;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::hbone::Direction;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Manifest, PORT, SOON, echo, now};
use crate::health::{free_address, get};
use crate::load::Load;

both_families! {
    label_is_edited_in_the_cluster_under_load_and_followed_within_a_second,
    api_server_is_away_for_a_while_and_traffic_is_not_affected,
    pod_that_is_deleted_by_force_does_not_go_on_in_plaintext,
    refused_patch_is_told_and_traffic_is_not_affected,
    static_pod_stays_in_the_mesh_while_its_mirror_is_made_anew,
}

const REDIRECTION: &str = "ambient.istio.io/redirection";
const AT_ONCE: f64 = 1.0;

/// A cluster whose pods are known by an API server.
pub struct Managed {
    pub cluster: Cluster,
    pub api: ApiServer,
}

impl Managed {
    pub fn start() -> Result<Self> {
        let mut managed = Self::without_agent()?;
        managed.cluster.node.start_agent()?;
        managed.cluster.node.start_proxy()?;
        Ok(managed)
    }

    /// Neither an agent nor a proxy runs.
    pub fn without_agent() -> Result<Self> {
        let mut cluster = Cluster::without_agent(&[])?;
        let api = ApiServer::start()?;
        let kubeconfig = cluster.topology.dir().path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig)?;
        cluster.node.use_api_server(kubeconfig);
        let managed = Self { cluster, api };
        managed.api.put(Kind::Namespace, Manifest::of_namespace("shop").object());
        for pod in [&managed.cluster.server, &managed.cluster.client] {
            managed.put(&Manifest::of(pod));
        }
        Ok(managed)
    }

    /// Creates or edits a pod; what is published of it stays.
    pub fn put(&self, pod: &Manifest) {
        let mut object = pod.object();
        let (namespace, name) = (text(&object, "namespace"), text(&object, "name"));
        if let Some(published) = self.api.annotation(&namespace, &name, REDIRECTION) {
            // As an edit of the labels leaves it.
            object["metadata"]["annotations"][REDIRECTION] = published.into();
        }
        self.api.put(Kind::Pod, object);
    }

    /// What the pod's annotation says.
    pub fn redirection(&self, pod: &Pod) -> Option<String> {
        self.api.annotation(&pod.namespace, &pod.name, REDIRECTION)
    }

    /// Waits until it says this.
    pub fn wait_for_redirection(&self, pod: &Pod, value: Option<&str>) -> Result<()> {
        wait_for(&format!("{REDIRECTION}={value:?} on {pod}"), SOON, || {
            Ok((self.redirection(pod).as_deref() == value).then_some(()))
        })
        .with_context(|| format!("status: {:#?}", self.cluster.node.status()))
    }

    /// Waits for an Event, and gives what it says.
    pub fn wait_for_event(&self, pod: &Pod, reason: &str) -> Result<String> {
        wait_for(&format!("event {reason} of {pod}"), SOON, || {
            let events = self.api.all(Kind::Event);
            let event = events
                .iter()
                .find(|e| e["reason"] == reason && e["regarding"]["name"] == pod.name.as_str());
            Ok(event.map(|event| event["note"].as_str().unwrap_or_default().to_owned()))
        })
    }

    /// How often the agent has written to a pod's status.
    pub fn patches(&self) -> usize {
        self.api.requests_of("patch", "pods/status").len()
    }
}

fn text(object: &serde_json::Value, field: &str) -> String {
    object["metadata"][field].as_str().unwrap_or_default().to_owned()
}

fn label_is_edited_in_the_cluster_under_load_and_followed_within_a_second(
    family: Family,
) -> Result<()> {
    let managed = &Managed::start()?;
    let Cluster { node, server, client, .. } = &managed.cluster;
    let _apps = (echo(server)?, echo(client)?);
    let mut edits = Vec::new();
    Load::between(client, server, &[family]).keeping_old().during(|| {
        for _ in 0..3 {
            let on = now()?;
            managed.put(&Manifest::of(server).mode("ambient"));
            managed.wait_for_redirection(server, Some("enabled"))?;
            node.assert_outbound(server, client, family)?;
            node.assert_inbound(client, server, family)?;
            let off = now()?;
            managed.put(&Manifest::of(server));
            node.wait_for_state(server, PodState::Bypassing)?;
            assert_eq!(managed.redirection(server), None);
            node.assert_direct(server, client, family)?;
            node.assert_direct(client, server, family)?;
            edits.push((on, off));
        }
        Ok(())
    })?;
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
    managed.wait_for_event(server, "Enrolled")?;
    managed.wait_for_event(server, "Unenrolled")?;
    Ok(())
}

fn api_server_is_away_for_a_while_and_traffic_is_not_affected(family: Family) -> Result<()> {
    let mut managed = Managed::start()?;
    let other = managed.cluster.topology.add_pod(0, "shop", "other")?;
    managed.put(&Manifest::of(&other));
    managed.put(&Manifest::of(&managed.cluster.server).mode("ambient"));
    managed.wait_for_redirection(&managed.cluster.server, Some("enabled"))?;
    let Managed { cluster, api } = &mut managed;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&other)?);
    node.wait_for_state(&other, PodState::Bypassing)?;

    Load::between(client, server, &[family]).keeping_old().during(|| {
        api.go_away()?;
        wait_for("the trouble in status", SOON, || {
            Ok((!node.status()?.problems.is_empty()).then_some(()))
        })?;
        node.assert_outbound(server, client, family)?;
        node.assert_inbound(client, server, family)?;
        node.assert_direct(client, &other, family)?;
        // An agent that starts meanwhile waits, and changes nothing; and it can be stopped.
        node.stop_agent()?;
        let mut waiting = node.spawn_agent()?;
        waiting.wait_for_log("waiting for the pods of this node", SOON)?;
        waiting.wait_for_log("connection refused; retrying", SOON)?;
        node.assert_outbound(server, client, family)?;
        node.assert_inbound(client, server, family)?;
        ensure!(waiting.terminate(SOON)?.success(), "an agent that waits cannot be stopped");
        // Labels change that nobody sees.
        api.put(Kind::Pod, Manifest::of(&other).mode("ambient").object());
        api.come_back()?;
        node.start_agent()?;
        node.wait_for_state(&other, PodState::Enrolled)?;
        Ok(())
    })?;
    managed.wait_for_redirection(&other, Some("enabled"))?;

    // Stripped, or made up by somebody: put right.
    let Cluster { node, server, .. } = &managed.cluster;
    managed.api.edit(Kind::Pod, "shop", "server", |pod| pod["metadata"]["annotations"] = ().into());
    managed.wait_for_redirection(server, Some("enabled"))?;
    managed.put(&Manifest::of(&other));
    node.wait_for_state(&other, PodState::Bypassing)?;
    managed.api.edit(Kind::Pod, "shop", "other", |pod| {
        pod["metadata"]["annotations"][REDIRECTION] = "enabled".into();
    });
    managed.wait_for_redirection(&other, None)?;

    // An agent that starts has nothing to say.
    managed.cluster.node.stop_agent()?;
    // Now its last one is recorded, too: that happens after its effect can be seen.
    let before = managed.patches();
    managed.cluster.node.start_agent()?;
    let Cluster { node, server, client, .. } = &managed.cluster;
    node.wait_for_state(server, PodState::Enrolled)?;
    node.wait_for_state(&other, PodState::Bypassing)?;
    node.assert_inbound(client, server, family)?;
    assert_eq!(managed.patches(), before);
    Ok(())
}

fn pod_that_is_deleted_by_force_does_not_go_on_in_plaintext(family: Family) -> Result<()> {
    let mut managed = Managed::start()?;
    let other = managed.cluster.topology.add_pod(0, "shop", "other")?;
    managed.put(&Manifest::of(&other));
    managed.put(&Manifest::of(&managed.cluster.server).mode("ambient"));
    managed.wait_for_redirection(&managed.cluster.server, Some("enabled"))?;
    let Managed { cluster, api } = &mut managed;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&other)?);
    let before = footprint(&server.netns)?;
    api.delete(Kind::Pod, "shop", "server");
    wait_for("the pod to be gone from status", SOON, || {
        Ok(node.pod(server)?.is_none().then_some(()))
    })?;
    for restarted in [false, true] {
        if restarted {
            node.stop_agent()?;
            node.start_agent()?;
        }
        wait_for("the pod to be refused", SOON, || {
            let refused = |from: &Pod, to: &Pod| {
                Ok::<_, anyhow::Error>(Call::to(to.addr(family, PORT)).open(&from.netns).is_err())
            };
            Ok((refused(server, client)? && refused(client, server)?).then_some(()))
        })?;
        assert_unchanged(&server.netns, &before)?;
        node.assert_direct(client, &other, family)?;
    }
    assert_eq!(api.get(Kind::Pod, "shop", "server"), None);
    Ok(())
}

fn refused_patch_is_told_and_traffic_is_not_affected(family: Family) -> Result<()> {
    let managed = &Managed::start()?;
    let Cluster { node, server, client, .. } = &managed.cluster;
    let _apps = (echo(server)?, echo(client)?);
    managed.api.forbid("patch", "pods/status");
    Load::between(client, server, &[family]).keeping_old().during(|| {
        managed.put(&Manifest::of(server).mode("ambient"));
        let status = node.wait_for_pod("to be told of", server, |p| {
            p.state == PodState::Degraded && p.message.is_some()
        })?;
        let message = status.message.unwrap_or_default();
        assert!(message.contains("patch on pods/status"), "{message}");
        let note = managed.wait_for_event(server, "EnrollmentFailed")?;
        assert!(note.contains("patch on pods/status"), "{note}");
        node.assert_outbound(server, client, family)?;
        node.assert_inbound(client, server, family)?;
        managed.api.allow_all();
        managed.wait_for_redirection(server, Some("enabled"))
    })?;
    Ok(())
}

/// Kubelet's copy of a static pod for the API server. Whoever deletes it does not end the pod.
fn mirror(pod: &Pod, uid: &str) -> Manifest {
    let annotation = |mirror: Manifest, name| {
        mirror.with("/metadata/annotations", name, json!("0123456789abcdef0123456789abcdef"))
    };
    let mirror = Manifest::of(pod).mode("ambient").uid(uid);
    annotation(annotation(mirror, "kubernetes.io/config.mirror"), "kubernetes.io/config.hash")
}

fn static_pod_stays_in_the_mesh_while_its_mirror_is_made_anew(family: Family) -> Result<()> {
    let managed = &mut Managed::start()?;
    let pod = managed.cluster.topology.add_pod(0, "shop", "static")?;
    let Managed { cluster: Cluster { node, client, .. }, api } = &managed;
    let apps = (echo(&pod)?, echo(client)?);
    // The proxy's view of it.
    node.write(&Manifest::of(&pod))?;
    managed.put(&mirror(&pod, "mirror-1"));
    managed.wait_for_redirection(&pod, Some("enabled"))?;

    Load::between(client, &pod, &[family]).keeping_old().during(|| {
        for uid in ["mirror-2", "mirror-3"] {
            api.delete(Kind::Pod, "shop", "static");
            let without = node.wait_for_pod("to have no mirror", &pod, |p| p.message.is_some())?;
            assert_eq!(without.state, PodState::Enrolled);
            node.assert_outbound(&pod, client, family)?;
            node.assert_inbound(client, &pod, family)?;

            // Kubelet tells its addresses only afterwards.
            let fresh = mirror(&pod, uid).with("", "status", json!({"phase": "Pending"}));
            api.put(Kind::Pod, fresh.object());
            managed.wait_for_redirection(&pod, Some("enabled"))?;
            node.assert_outbound(&pod, client, family)?;
            managed.put(&mirror(&pod, uid));
            let with = node.wait_for_pod("to be told of", &pod, |p| p.uid == uid)?;
            assert_eq!((with.state, with.message), (PodState::Enrolled, None));
            node.assert_outbound(&pod, client, family)?;
            node.assert_inbound(client, &pod, family)?;
        }
        Ok(())
    })?;

    // The pod itself is gone, and its mirror with it.
    api.delete(Kind::Pod, "shop", "static");
    drop((apps, pod));
    wait_for("the pod to be gone", SOON, || {
        let pods = node.status()?.pods;
        Ok((!pods.iter().any(|p| p.name == "static")).then_some(()))
    })
}

#[test]
fn agent_that_waits_for_the_api_server_says_so() -> Result<()> {
    let mut managed = Managed::without_agent()?;
    let address = free_address()?;
    managed.cluster.node.serve_health(address);
    managed.api.go_away()?;
    let url = managed.api.url();
    let node = &mut managed.cluster.node;
    let mut agent = node.spawn_agent()?;

    let waiting = wait_for("the reason in status", SOON, || {
        ensure!(agent.is_running()?, "the agent has ended:\n{}", agent.log()?);
        let waiting = node.status().ok().and_then(|status| status.waiting);
        Ok(waiting.filter(|waiting| waiting.contains("API server: cannot reach ")))
    })?;
    assert!(waiting.starts_with(&format!("waiting for kube:{url}")), "{waiting}");
    assert_eq!(get(address, "/healthz")?, (200, "ok\n".to_owned()));
    let (code, text) = get(address, "/readyz")?;
    assert!(code == 503 && text.contains(&url), "{code} {text}");
    assert_eq!(get(address, "/metrics")?.0, 200);
    let refused = node.tell("pause", &[]).err().context("it was paused")?;
    assert!(format!("{refused:#}").contains(&waiting), "{refused:#}");

    managed.api.come_back()?;
    let node = &managed.cluster.node;
    let status = wait_for("the pods in status", SOON, || {
        Ok(node.status().ok().filter(|status| status.waiting.is_none()))
    })?;
    assert_eq!(status.pods.len(), 1);
    wait_for("the agent to be ready", SOON, || {
        Ok((get(address, "/readyz")? == (200, "[+] pods\n".to_owned())).then_some(()))
    })?;
    node.tell("pause", &[])?;
    Ok(())
}

/// Labels of a namespace that decide nothing are not kept, but for those that look as if they did.
#[test]
fn misspelled_labels_are_events_and_a_pod_of_another_node_is_asked_for() -> Result<()> {
    let managed = Managed::start()?;
    let Cluster { node, server, client, .. } = &managed.cluster;
    let mut shop = Manifest::of_namespace("shop").object();
    shop["metadata"]["labels"] = json!({"istio.io/dataplane-mod": "ambient", "team": "a"});
    managed.api.put(Kind::Namespace, shop);
    managed.put(&Manifest::of(server));
    let note = managed.wait_for_event(server, "UnknownWord")?;
    let expected = "label istio.io/dataplane-mod of namespace shop says nothing; is \
                    istio.io/dataplane-mode meant?";
    assert_eq!(note, expected);

    managed.put(&Manifest::of(client).with("/status", "podIP", json!(client.v4)));
    managed.api.edit(Kind::Pod, "shop", "client", |pod| {
        pod["metadata"]["annotations"][REDIRECTION] = "enabled".into();
    });
    let at = client.addr(Family::V4, 8080).to_string();
    for called in [client.to_string(), at] {
        let json = node.tell("explain", &[&server.to_string(), &called, "-o", "json"])?;
        let explained: Explanation = serde_json::from_str(&json).context("read explain")?;
        assert_eq!(explained.verdict.cause, Cause::MisspelledLabelKey);
        let pod = explained.to.and_then(|to| to.pod).context("no pod")?;
        assert_eq!((pod.place, pod.name), (Place::OtherNode, client.to_string()));
        assert_eq!(
            (pod.node.as_deref(), pod.redirection.as_deref()),
            (Some("node1"), Some("enabled"))
        );
    }
    Ok(())
}

/// Its EndpointSlices say where a call to a Service arrives.
#[test]
fn service_is_asked_for_and_its_endpoints_are_explained() -> Result<()> {
    let managed = Managed::start()?;
    let Cluster { node, server, client, .. } = &managed.cluster;
    managed.put(&Manifest::of(server).mode("ambient"));
    managed.wait_for_redirection(server, Some("enabled"))?;
    let metadata = json!({"name": "cart", "namespace": "shop"});
    managed.api.put(
        Kind::Service,
        json!({
            "metadata": metadata,
            "spec": {"clusterIPs": ["10.96.0.7"], "ports": [{"name": "http", "port": 80}]},
        }),
    );
    let endpoint_at = |pod: &Pod, ip: Ipv4Addr, ready: bool| {
        json!({
            "addresses": [ip], "conditions": {"ready": ready},
            "targetRef": {"kind": "Pod", "namespace": pod.namespace, "name": pod.name},
        })
    };
    let endpoint = |pod: &Pod, ready| endpoint_at(pod, pod.v4, ready);
    let labels = json!({"kubernetes.io/service-name": "cart"});
    let slice_of = |endpoints: &[Value]| {
        managed.api.put(
            Kind::EndpointSlice,
            json!({
                "metadata": {"name": "cart-abc", "namespace": "shop", "labels": labels},
                "endpoints": endpoints,
                "ports": [{"name": "http", "port": PORT}],
            }),
        )
    };
    let slice = |ready| slice_of(&[endpoint(client, ready), endpoint(server, false)]);
    let ask = |to: &str| -> Result<Explanation> {
        let json = node.tell("explain", &[&server.to_string(), to, "-o", "json"])?;
        serde_json::from_str(&json).context("read explain")
    };
    slice(true);
    for to in ["shop/cart:80", "10.96.0.7:80"] {
        let to = ask(to)?.to.context("nothing is called")?;
        let pod = to.pod.context("no pod")?;
        assert_eq!((pod.place, pod.name), (Place::OtherNode, client.to_string()));
        let endpoints = to.service.context("no Service")?.endpoints;
        let client = endpoints.iter().find(|endpoint| endpoint.ready).context("none is ready")?;
        assert_eq!(client.port, Some(PORT));
    }
    // It asks for a pod, the Service and its slices, one after another, and then has no time for the endpoints.
    managed.api.slow_down(explain::WITHIN / 4);
    let slow = ask("shop/cart:80")?.to.and_then(|to| to.service).context("no Service")?;
    managed.api.slow_down(Duration::ZERO);
    let verdict = |ready: bool| slow.endpoints.iter().find(|e| e.ready == ready)?.verdict;
    ensure!(slow.endpoints.len() == 2 && verdict(true).is_none(), "{slow:?}");
    ensure!(verdict(false).is_some(), "of this node's no source is asked: {slow:?}");
    slice(false);
    assert_eq!(ask("shop/cart:80")?.verdict.cause, Cause::NoReadyEndpoint);
    // A slice that names a pod for an address that the pod does not have is not about that pod.
    slice_of(&[endpoint_at(client, Ipv4Addr::new(198, 51, 100, 9), true)]);
    let to = ask("shop/cart:80")?.to.context("nothing is called")?;
    ensure!(to.pod.is_none(), "{to:?}");

    // A role of before says what it lacks.
    managed.api.forbid("list", "services");
    let path = ask("198.51.100.1:80")?.path.context("no path")?;
    ensure!(path.why.iter().any(|why| why.contains("list the Services")), "{path:?}");
    Ok(())
}
