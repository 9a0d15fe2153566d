//! The view of a whole cluster: from its objects to what is printed.
#![expect(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod support;

use std::{collections::BTreeMap, time::SystemTime};

use k8s_openapi::api::core::v1 as k8s;
use redirect_agent::{
    cluster::{
        AgentSeen, EventSeen, NamespaceSeen, PodSeen, Report, Snapshot, State, changes, text,
    },
    membership::PodKey,
    output::Format,
};
use serde_json::{Value, json};

use crate::support::golden;

fn now() -> SystemTime {
    humantime::parse_rfc3339("2026-08-01T12:00:00Z").unwrap()
}

/// A pod that started a while ago.
fn pod(name: &str, node: &str, redirection: Option<&str>) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-of-{name}"), "annotations": {}},
        "spec": {"nodeName": node, "containers": []},
        "status": {"phase": "Running", "startTime": "2026-08-01T10:00:00Z",
                   "podIPs": [{"ip": "10.0.0.2"}, {"ip": "fd00::2"}]},
    });
    if let Some(redirection) = redirection {
        pod["metadata"]["annotations"]["ambient.istio.io/redirection"] = redirection.into();
    }
    pod
}

fn agent(name: &str, node: &str, image: &str, ready: &str) -> Value {
    json!({
        "metadata": {"namespace": "istio-system", "name": name, "creationTimestamp": "2026-08-01T09:00:00Z"},
        "spec": {"nodeName": node, "containers": [{"name": "redirect-agent", "image": image}]},
        "status": {"phase": "Running", "conditions": [
            {"type": "Ready", "status": ready, "lastTransitionTime": "2026-08-01T11:30:00Z"},
        ]},
    })
}

fn add(snapshot: &mut Snapshot, pod: Value) {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap();
    let name = format!("{namespace}/{}", pod["metadata"]["name"].as_str().unwrap());
    let read = PodSeen::read(serde_json::from_value(pod).unwrap(), snapshot.settings.reading());
    snapshot.pods.insert(name, read);
}

fn add_agent(snapshot: &mut Snapshot, pod: Value) {
    let agent = AgentSeen::read(&serde_json::from_value::<k8s::Pod>(pod).unwrap()).unwrap();
    snapshot.agents.get_or_insert_default().insert(agent.key.to_string(), agent);
}

fn add_namespace(snapshot: &mut Snapshot, name: &str, labels: &Value) {
    let labeled = json!([{"time": "2026-08-01T11:00:00Z", "fieldsType": "FieldsV1", "fieldsV1":
        {"f:metadata": {"f:labels": {"f:istio.io/dataplane-mode": {}}}}}]);
    let metadata = json!({"name": name, "labels": labels, "managedFields": labeled});
    let metadata: kube::core::ObjectMeta = serde_json::from_value(metadata).unwrap();
    snapshot.namespaces.insert(name.to_owned(), NamespaceSeen::from(metadata));
}

/// Four nodes, and a pod in each state.
fn everything() -> Snapshot {
    let mut snapshot = Snapshot {
        server: "https://10.0.0.1:6443/".to_owned(),
        nodes: Some(["n1", "n2", "n3", "n4"].map(|node| (node.to_owned(), ())).into()),
        ..Snapshot::default()
    };
    snapshot.settings.from = "pod istio-system/redirect-agent-1".to_owned();
    add_namespace(&mut snapshot, "shop", &json!({"istio.io/dataplane-mode": "ambient"}));
    add_namespace(&mut snapshot, "bank", &json!({"istio.io/dataplane-mod": "ambient"}));
    add_agent(&mut snapshot, agent("redirect-agent-1", "n1", "hub/redirect-agent:0.1.0", "True"));
    add_agent(&mut snapshot, agent("redirect-agent-2", "n2", "hub/redirect-agent:0.0.9", "False"));
    let key = PodKey::new("istio-system", "redirect-agent-2").unwrap();
    snapshot.answers.insert(key, "/readyz says 503: [-] pods: waiting for kube".to_owned());

    add(&mut snapshot, pod("cart", "n1", Some("enabled")));
    add(&mut snapshot, pod("waits", "n1", Some("pending")));
    add(&mut snapshot, pod("silent", "n1", None));
    add(&mut snapshot, pod("refused", "n1", None));
    add(&mut snapshot, pod("orphan", "n3", None));
    add(&mut snapshot, pod("behind", "n2", None));
    let edit = |mut pod: Value, path: &str, value: Value| {
        *pod.pointer_mut(path).unwrap() = value;
        pod
    };
    let started = json!("2026-08-01T11:59:45Z");
    add(&mut snapshot, edit(pod("young", "n1", None), "/status/startTime", started));
    add(&mut snapshot, edit(pod("unbound", "n1", None), "/spec/nodeName", Value::Null));
    let mut leaving = pod("leaving", "n1", None);
    leaving["metadata"]["deletionTimestamp"] = "2026-08-01T11:59:59Z".into();
    add(&mut snapshot, leaving);
    let mut out = pod("out", "n1", Some("enabled"));
    out["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "none"});
    add(&mut snapshot, out);
    let mut plain = pod("plain", "n1", None);
    plain["metadata"]["namespace"] = "bank".into();
    add(&mut snapshot, plain);
    snapshot.pods.insert("shop/broken".to_owned(), Err("read status.podIPs: no".to_owned()));

    let last = "2026-08-01T11:58:00Z".to_owned().try_into().ok();
    let event = |note: &str, last| EventSeen {
        reason: "EnrollmentFailed".to_owned(),
        note: note.to_owned(),
        last,
        count: 3,
    };
    let of = |namespace: &str| (namespace.to_owned(), "uid-of-refused".to_owned());
    let newest = "2026-08-01T11:59:00Z".to_owned().try_into().ok();
    snapshot.take_events([
        (of("shop"), event("an older one", None)),
        (of("shop"), event("no\nnetns", last)),
        (of("bank"), event("another namespace's", newest)),
    ]);
    snapshot
}

#[test]
fn the_report_is_a_table_a_wide_table_and_json() {
    let report = everything().report(now());
    golden("cluster.txt", &text(&report, Format::Table).unwrap());
    golden("cluster-wide.txt", &text(&report, Format::Wide).unwrap());
    let json = text(&report, Format::Json).unwrap();
    golden("cluster.json", &json);
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
}

#[test]
fn pods_with_the_agents_label_in_two_namespaces_are_nobodys_agents() {
    let mut snapshot = everything();
    let mut stranger = agent("redirect-agent-x", "n3", "hub/x:1", "True");
    stranger["metadata"]["namespace"] = "shop".into();
    add_agent(&mut snapshot, stranger);
    let report = snapshot.report(now());
    let notes = report.notes.iter().filter(|note| note.contains("give --agent-namespace"));
    assert_eq!(notes.count(), 1, "{:?}", report.notes);
    assert!(!report.ok);
    for node in &report.nodes {
        assert_eq!((&node.agent, node.problem), (&None, None), "{}", node.name);
    }
    let orphan = report.unexpected.iter().find(|pod| pod.name == "orphan").unwrap();
    assert_eq!(orphan.message, "the agents are not known");
    // Without them, that is said once, by whoever could not list them.
    let unlisted = Snapshot { agents: None, ..everything() }.report(now());
    assert!(!unlisted.notes.iter().any(|note| note.contains("--agent-namespace")));
    assert!(unlisted.nodes.iter().all(|node| node.problem.is_none()));
}

#[test]
fn each_pod_is_in_its_state() {
    let snapshot = everything();
    let report = snapshot.report(now());
    let state =
        |name: &str| report.unexpected.iter().find(|pod| pod.name == name).map(|pod| pod.state);
    for name in ["silent", "refused", "orphan", "behind"] {
        assert_eq!(state(name), Some(State::Missing), "{name}");
    }
    assert_eq!(state("waits"), Some(State::Pending));
    assert_eq!(state("out"), Some(State::Stale));
    assert_eq!(report.unexpected.len(), 6);
    let pods = report.pods;
    let right = [State::Enrolled, State::Starting, State::Leaving, State::Bypassing];
    assert_eq!(right.map(|state| pods[state]), [1, 2, 1, 1]);
    let by_node: usize = report.nodes.iter().map(|node| node.pods.total()).sum();
    // One pod is on no node.
    assert_eq!((pods.total(), by_node), (11, 10));
    let of_versions: BTreeMap<_, _> = report
        .versions
        .iter()
        .map(|row| (row.version.as_deref(), (row.nodes, row.ready)))
        .collect();
    let expected = [(None, (2, 0)), (Some("0.0.9"), (1, 0)), (Some("0.1.0"), (1, 1))];
    assert_eq!(of_versions, BTreeMap::from(expected));
}

#[test]
fn everything_is_in_when_nothing_is_wrong_that_needs_an_agent() {
    let mut snapshot = everything();
    snapshot.pods.retain(|name, _| ["shop/cart", "bank/plain"].contains(&name.as_str()));
    let report = snapshot.report(now());
    assert!(report.unexpected.is_empty() && !report.ok, "an agent is not ready");
    snapshot.agents.as_mut().unwrap().remove("istio-system/redirect-agent-2");
    let report = snapshot.report(now());
    assert!(report.ok, "no node without an agent has a pod of the mesh");
    // The annotation outlives the agent, and the next pod would not start.
    snapshot.agents.as_mut().unwrap().clear();
    assert!(!snapshot.report(now()).ok);
    // What cannot be told is not wrong.
    snapshot.agents = None;
    let report = snapshot.report(now());
    assert!(report.ok && report.nodes.iter().all(|node| node.problem.is_none()));
}

#[test]
fn of_a_namespace_only_the_nodes_of_its_pods_count() {
    let mut snapshot = everything();
    snapshot.pods.retain(|name, _| ["shop/cart", "bank/plain"].contains(&name.as_str()));
    assert!(!snapshot.report(now()).ok, "the agent of n2 is not ready");
    snapshot.namespace = Some("shop".to_owned());
    let report = snapshot.report(now());
    let names: Vec<&str> = report.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!((report.ok, names), (true, vec!["n1"]));
}

#[test]
fn the_newer_agent_of_a_node_counts() {
    let mut snapshot = everything();
    let mut newer = agent("redirect-agent-9", "n2", "hub/redirect-agent:0.1.0", "True");
    newer["metadata"]["creationTimestamp"] = "2026-08-01T11:00:00Z".into();
    add_agent(&mut snapshot, newer);
    let report = snapshot.report(now());
    let node = report.nodes.iter().find(|node| node.name == "n2").unwrap();
    assert_eq!((node.version.as_deref(), node.problem), (Some("0.1.0"), None));
}

#[test]
fn a_label_that_was_set_just_now_is_given_time() {
    let mut snapshot = everything();
    let just_now = "2026-08-01T11:59:50Z".to_owned().try_into().ok();
    snapshot.namespaces.get_mut("shop").unwrap().labeled = just_now;
    let report = snapshot.report(now());
    let unexpected = [State::Missing, State::Pending, State::Stale];
    assert_eq!(unexpected.map(|state| report.pods[state]), [0, 0, 1]);
}

#[test]
fn a_pod_that_was_unlabeled_just_now_is_given_time() {
    let mut snapshot = everything();
    snapshot.pods.retain(|name, _| name == "shop/out");
    snapshot.agents.as_mut().unwrap().remove("istio-system/redirect-agent-2");
    let report = |snapshot: &mut Snapshot, labeled: Option<&str>| {
        let pod = snapshot.pods.get_mut("shop/out").unwrap().as_mut().unwrap();
        pod.labeled = labeled.and_then(|time| time.to_owned().try_into().ok());
        snapshot.report(now())
    };
    let just_now = report(&mut snapshot, Some("2026-08-01T11:59:31Z"));
    assert_eq!((just_now.ok, just_now.pods[State::Leaving]), (true, 1));
    let before = report(&mut snapshot, Some("2026-08-01T11:59:30Z"));
    assert_eq!((before.ok, before.pods[State::Stale]), (false, 1));
    assert_eq!(before.unexpected[0].message, "no Event; an operator may have enrolled it");
    let since = before.unexpected[0].since.map(|since| since.to_string());
    assert_eq!(since.as_deref(), Some("2026-08-01T11:59:30Z"));
    // Now it is the namespace that was labeled just now.
    let namespace = snapshot.namespaces.get_mut("shop").unwrap();
    namespace.namespace.labels.insert("istio.io/dataplane-mode".to_owned(), "none".to_owned());
    namespace.labeled = "2026-08-01T11:59:31Z".to_owned().try_into().ok();
    let pod = snapshot.pods.get_mut("shop/out").unwrap().as_mut().unwrap();
    let labels = std::mem::take(&mut pod.pod.labels);
    assert_eq!(report(&mut snapshot, None).pods[State::Leaving], 1);
    snapshot.pods.get_mut("shop/out").unwrap().as_mut().unwrap().pod.labels = labels;
    // The start of the pod says nothing about when it was unlabeled.
    let unknown = report(&mut snapshot, None);
    assert_eq!(
        (unknown.ok, unknown.pods[State::Stale], unknown.unexpected[0].since),
        (false, 1, None)
    );
}

#[test]
fn a_pod_without_a_node_is_the_schedulers() {
    let mut snapshot = everything();
    snapshot.pods.retain(|name, _| name == "shop/unbound");
    snapshot.agents.as_mut().unwrap().remove("istio-system/redirect-agent-2");
    let report = snapshot.report(now());
    assert_eq!((report.ok, report.pods[State::Starting]), (true, 1));
}

#[test]
fn watching_prints_what_becomes_wrong_and_what_no_longer_is() {
    let before = everything();
    let mut after = everything();
    after.pods.remove("shop/silent");
    add(&mut after, pod("new", "n1", None));
    after.answers.clear();
    let lines = changes(&before.report(now()), &after.report(now()), Format::Table);
    assert_eq!(
        lines,
        "2026-08-01T12:00:00Z   node n2   its agent is not ready\n\
         2026-08-01T12:00:00Z   pod shop/new   missing   no Event; the agent of its node is ready\n\
         2026-08-01T12:00:00Z   pod shop/silent   resolved\n"
    );
    let lines = changes(&before.report(now()), &after.report(now()), Format::Json);
    let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!((&last["object"], &last["unexpected"]), (&json!("pod shop/silent"), &json!(false)));
    assert_eq!(changes(&after.report(now()), &after.report(now()), Format::Table), "");
}

#[test]
fn a_table_of_thousands_is_cut_and_says_so() {
    let mut snapshot = everything();
    for number in 0..1000 {
        add(&mut snapshot, pod(&format!("web-{number:04}"), "n1", None));
    }
    let report = snapshot.report(now());
    let cut = text(&report, Format::Table).unwrap();
    assert!(cut.contains("and 956 more: -o wide shows all\n"), "{cut}");
    assert!(text(&report, Format::Wide).unwrap().contains("web-0999"));
}
