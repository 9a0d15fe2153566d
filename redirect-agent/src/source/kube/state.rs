//! What is known about the cluster, and the inventory that is built from it.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as k8s;
use kube::{
    Resource,
    api::{DynamicObject, PartialObjectMeta},
    runtime::watcher::Event,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::super::{ANNOTATION_REDIRECTION, Inventory, Problem, without_conflicts};
use crate::membership::{Config, Namespace, Pod, PodKey};

/// How a problem begins that affects everything alike: connecting failed.
pub(crate) const UNREACHABLE: &str = "cannot reach ";

/// kubectl's copy of the whole object. Nobody here reads it, and nothing else is as large.
const ANNOTATION_LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What the API server has said so far.
pub(super) struct State {
    node: String,
    membership: Config,
    pods: Kept<Known>,
    namespaces: Kept<Namespace>,
    /// Why something cannot be watched at the moment, by resource.
    troubles: BTreeMap<&'static str, String>,
    admitted: BTreeMap<PodKey, Pod>,
}

/// Objects by name, and those of a list that is not complete yet. What was known before stays until it is
/// complete.
pub(crate) struct Kept<T> {
    pub(crate) known: BTreeMap<String, T>,
    listing: Option<BTreeMap<String, T>>,
    pub(crate) complete: bool,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self { known: BTreeMap::new(), listing: None, complete: false }
    }
}

impl<T> Kept<T> {
    /// Applies an event. `read` makes of an object what is kept of it, given what was known by its name; of
    /// one that does not count, nothing.
    pub(crate) fn apply<K: Resource>(
        &mut self,
        event: Event<K>,
        read: impl FnOnce(K, Option<&T>) -> Option<T>,
    ) where
        T: Identity,
    {
        match event {
            Event::Init => self.listing = Some(BTreeMap::new()),
            Event::InitDone => {
                self.known = self.listing.take().unwrap_or_default();
                self.complete = true;
            }
            Event::InitApply(object) => {
                let (name, listing) = (name(object.meta()), self.listing.get_or_insert_default());
                put(listing, &name, read(object, self.known.get(&name)));
            }
            Event::Apply(object) => {
                let name = name(object.meta());
                let read = read(object, self.known.get(&name));
                put(&mut self.known, &name, read);
            }
            Event::Delete(object) => {
                let is = |known: &T, uid: &String| known.uid().is_none_or(|known| known == uid);
                if let Entry::Occupied(known) = self.known.entry(name(object.meta()))
                    && object.meta().uid.as_ref().is_none_or(|uid| is(known.get(), uid))
                {
                    known.remove();
                }
            }
        }
    }
}

fn put<T>(target: &mut BTreeMap<String, T>, name: &str, read: Option<T>) {
    match read {
        Some(read) => drop(target.insert(name.to_owned(), read)),
        None => drop(target.remove(name)),
    }
}

/// What tells objects of one name apart.
pub(crate) trait Identity {
    /// The object's uid; `None`: it is not kept, and the name has to do.
    fn uid(&self) -> Option<&str> {
        None
    }
}

impl Identity for Namespace {}

impl Identity for Known {
    fn uid(&self) -> Option<&str> {
        Some(&self.uid)
    }
}

/// A pod of this node.
struct Known {
    uid: String,
    /// Its last good version.
    pod: Option<Pod>,
    /// What is wrong with its present one.
    problem: Option<String>,
    /// The value of [`ANNOTATION_REDIRECTION`].
    redirection: Option<String>,
}

impl State {
    pub(super) fn new(node: String, membership: Config) -> Self {
        Self {
            node,
            membership,
            pods: Kept::default(),
            namespaces: Kept::default(),
            troubles: BTreeMap::new(),
            admitted: BTreeMap::new(),
        }
    }

    /// Whether everything has been listed once.
    pub(super) fn is_complete(&self) -> bool {
        self.pods.complete && self.namespaces.complete
    }

    /// Records why `what` cannot be watched, or that it can. Returns whether that is new.
    pub(super) fn trouble(&mut self, what: &'static str, why: Option<String>) -> bool {
        match why {
            Some(why) => self.troubles.insert(what, why.clone()).as_ref() != Some(&why),
            None => self.troubles.remove(what).is_some(),
        }
    }

    /// Applies an event of a pod. Returns whether the inventory may have changed.
    pub(super) fn pod(&mut self, event: Event<DynamicObject>) -> bool {
        let changes = !matches!(event, Event::Init | Event::InitApply(_));
        let node = &self.node;
        self.pods.apply(event, |object, last| {
            let known = Known::read(object, last);
            // The server was asked for this node's pods only, but a proxy in front of it may ignore that.
            let is_here = |pod: &Pod| pod.node_name.as_ref() == Some(node);
            known.pod.as_ref().is_none_or(is_here).then_some(known)
        });
        changes
    }

    /// Applies an event of a namespace. Only labels that matter for the decision are kept, and nothing of a
    /// namespace without any. Returns whether the inventory may have changed.
    pub(super) fn namespace(&mut self, event: Event<PartialObjectMeta<k8s::Namespace>>) -> bool {
        let complete = matches!(event, Event::InitDone);
        let changed = match &event {
            Event::Apply(object) | Event::Delete(object) => Some(name(&object.metadata)),
            Event::Init | Event::InitApply(_) | Event::InitDone => None,
        };
        let before = changed.as_ref().and_then(|name| self.namespaces.known.get(name)).cloned();
        let membership = &self.membership;
        self.namespaces.apply(event, |object, _| {
            let name = name(&object.metadata);
            let mut labels = object.metadata.labels.unwrap_or_default();
            labels.retain(|key, _| membership.reads_namespace_label(key));
            (!labels.is_empty()).then_some(Namespace { name, labels })
        });
        let after = changed.as_ref().and_then(|name| self.namespaces.known.get(name));
        complete || before.as_ref() != after
    }

    /// What the annotation of every existing pod says, by uid.
    pub(super) fn redirections(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let known = self.pods.known.values();
        known.map(|known| (known.uid.as_str(), known.redirection.as_deref()))
    }

    /// The current problems. That the API server is unreachable is reported once, whatever is watched.
    fn problems(&self) -> Vec<Problem> {
        let stays = if self.is_complete() { "what is known stays in force" } else { "retrying" };
        let unreachable = |why: &&String| why.starts_with(UNREACHABLE);
        let mut problems: Vec<Problem> = Vec::new();
        if let Some(why) = self.troubles.values().find(unreachable) {
            problems.push(Problem {
                object: "API server".to_owned(),
                message: format!("{why}; {stays}"),
                ..Problem::default()
            });
        }
        let others = self.troubles.iter().filter(|(_, why)| !unreachable(why));
        problems.extend(others.map(|(what, why)| Problem {
            object: format!("{what} of the API server"),
            message: format!("{why}; {stays}"),
            ..Problem::default()
        }));
        problems
    }

    /// The inventory for readers.
    pub(super) fn inventory(&mut self) -> Inventory {
        let mut problems = self.problems();
        let mut pods = BTreeMap::new();
        for (name, known) in &self.pods.known {
            problems.extend(known.problem.iter().map(|problem| Problem {
                object: format!("pod {name}"),
                message: problem.clone(),
                ..Problem::default()
            }));
            pods.extend(known.pod.iter().map(|pod| (pod.key.clone(), pod.clone())));
        }
        give_up_reused_addresses(&mut pods);
        self.admitted = without_conflicts(&self.admitted, pods, &mut problems);
        Inventory {
            namespaces: self.namespaces.known.clone(),
            pods: self.admitted.clone(),
            problems,
        }
    }
}

/// The status of a terminating pod still names its address after the network has given it to another pod. The
/// address then belongs to the other pod.
fn give_up_reused_addresses(pods: &mut BTreeMap<PodKey, Pod>) {
    let has_network = |pod: &&Pod| !pod.host_network && !pod.phase.is_finished();
    let staying: BTreeSet<IpAddr> = pods
        .values()
        .filter(|pod| !pod.deleting)
        .filter(has_network)
        .flat_map(|pod| pod.ips.iter().copied())
        .collect();
    for pod in pods.values_mut().filter(|pod| pod.deleting && has_network(&&**pod)) {
        pod.ips.retain(|ip| !staying.contains(ip));
    }
}

/// `NAMESPACE/NAME`, or the name of an object without a namespace.
pub(crate) fn name(metadata: &kube::api::ObjectMeta) -> String {
    let name = metadata.name.as_deref().unwrap_or_default();
    match &metadata.namespace {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name.to_owned(),
    }
}

impl Known {
    /// Reads a pod. If that fails, its last good version stays, unless that is of an earlier pod of the same
    /// name.
    fn read(object: DynamicObject, last: Option<&Known>) -> Known {
        let uid = object.metadata.uid.clone().unwrap_or_default();
        let annotations = object.metadata.annotations.as_ref();
        let redirection = annotations.and_then(|a| a.get(ANNOTATION_REDIRECTION)).cloned();
        match read_pod(object) {
            Ok(pod) => Known { uid, pod: Some(pod), problem: None, redirection },
            Err(problem) => {
                let pod = last.filter(|last| last.uid == uid).and_then(|last| last.pod.clone());
                let stays = match pod {
                    Some(_) => "its last good version stays in force",
                    None => "the pod is left alone",
                };
                Known { uid, pod, problem: Some(format!("{problem}; {stays}")), redirection }
            }
        }
    }
}

/// Reads a pod, without what only kubectl needs. The error is text.
pub(crate) fn read_pod(mut object: DynamicObject) -> Result<Pod, String> {
    if let Some(annotations) = &mut object.metadata.annotations {
        annotations.remove(ANNOTATION_LAST_APPLIED);
    }
    let pod = k8s::Pod {
        spec: part(&mut object.data, "spec")?,
        status: part(&mut object.data, "status")?,
        metadata: object.metadata,
    };
    Pod::try_from(&pod).map_err(|error| error.to_string())
}

fn part<T: DeserializeOwned>(data: &mut Value, name: &str) -> Result<Option<T>, String> {
    let part = data.get_mut(name).map(Value::take).unwrap_or_default();
    serde_json::from_value(part).map_err(|error| format!("read {name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_server_that_cannot_be_reached_is_one_problem_and_keeps_nothing_in_force_at_first() {
        let mut state = State::new("n1".to_owned(), Config::default());
        let refused = format!("{UNREACHABLE}https://10.0.0.1:6443/: connection refused");
        for what in ["pods", "namespaces"] {
            assert!(state.trouble(what, Some(refused.clone())));
        }
        let said = |state: &State| -> Vec<String> {
            state.problems().iter().map(ToString::to_string).collect()
        };
        let once = "API server: cannot reach https://10.0.0.1:6443/: connection refused; retrying";
        assert_eq!(said(&state), [once]);

        state.pods.complete = true;
        state.namespaces.complete = true;
        assert!(said(&state)[0].ends_with("what is known stays in force"));
        assert!(state.trouble("pods", Some("watch them: 403".to_owned())));
        let [unreachable, forbidden] = &said(&state)[..] else { panic!("{:?}", said(&state)) };
        assert!(unreachable.starts_with("API server: cannot reach "), "{unreachable}");
        assert!(forbidden.starts_with("pods of the API server: watch them: 403"), "{forbidden}");
        for what in ["pods", "namespaces"] {
            assert!(state.trouble(what, None));
        }
        assert!(state.problems().is_empty());
    }
    /// A pod as the API server shows it, with this uid, of this node.
    fn pod(uid: &str, node: &str) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": "web", "uid": uid},
            "spec": {"nodeName": node, "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.2"}]},
        }))
        .unwrap()
    }

    #[test]
    fn a_deletion_is_of_the_pod_with_that_uid_only() {
        let mut state = State::new("n1".to_owned(), Config::default());
        let known = |state: &State| -> Vec<String> {
            state.redirections().map(|(uid, _)| uid.to_owned()).collect()
        };
        state.pod(Event::Init);
        state.pod(Event::InitApply(pod("a", "n1")));
        assert_eq!(known(&state), [""; 0], "the list is not complete");
        assert!(state.pod(Event::InitDone));
        state.pod(Event::Apply(pod("b", "n1")));
        state.pod(Event::Delete(pod("a", "n1")));
        assert_eq!(known(&state), ["b"]);
        state.pod(Event::Delete(pod("b", "n1")));
        assert_eq!(known(&state), [""; 0]);
        state.pod(Event::Apply(pod("c", "n2")));
        assert_eq!(known(&state), [""; 0], "it is another node's");
    }

    #[test]
    fn only_what_matters_of_a_namespace_is_a_change() {
        let mut state = State::new("n1".to_owned(), Config::default());
        let namespace = |labels: Value| -> PartialObjectMeta<k8s::Namespace> {
            let metadata = json!({"name": "shop", "labels": labels});
            serde_json::from_value(json!({"metadata": metadata})).unwrap()
        };
        let ambient = || namespace(json!({"istio.io/dataplane-mode": "ambient"}));
        assert!(!state.namespace(Event::Init));
        assert!(!state.namespace(Event::InitApply(ambient())));
        assert!(state.namespace(Event::InitDone));
        let and_team = json!({"istio.io/dataplane-mode": "ambient", "team": "a"});
        assert!(!state.namespace(Event::Apply(namespace(and_team))));
        assert!(state.namespace(Event::Apply(namespace(json!({"team": "a"})))));
        assert!(!state.namespace(Event::Delete(namespace(json!({"team": "a"})))));
        assert!(state.namespace(Event::Apply(ambient())));
        assert!(state.namespace(Event::Delete(ambient())));
    }
}
