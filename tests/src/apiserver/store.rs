//! What the server keeps: objects, their history, and who may do what.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::Status;

/// The kinds of objects that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `v1`, of the cluster.
    Namespace,
    /// `v1`.
    Pod,
    /// `v1`, of the cluster.
    Node,
    /// `v1`.
    ConfigMap,
    /// `events.k8s.io/v1`.
    Event,
    /// `apps/v1`.
    DaemonSet,
    /// `v1`.
    Service,
    /// `discovery.k8s.io/v1`.
    EndpointSlice,
}

impl Kind {
    /// The name in URLs and rules.
    pub fn plural(self) -> &'static str {
        match self {
            Kind::Namespace => "namespaces",
            Kind::Pod => "pods",
            Kind::Node => "nodes",
            Kind::ConfigMap => "configmaps",
            Kind::Event => "events",
            Kind::DaemonSet => "daemonsets",
            Kind::Service => "services",
            Kind::EndpointSlice => "endpointslices",
        }
    }

    /// The API group, empty for the core.
    pub fn group(self) -> &'static str {
        match self {
            Kind::Namespace | Kind::Pod | Kind::Node | Kind::ConfigMap | Kind::Service => "",
            Kind::Event => "events.k8s.io",
            Kind::DaemonSet => "apps",
            Kind::EndpointSlice => "discovery.k8s.io",
        }
    }

    pub(super) fn api_version(self) -> &'static str {
        match self {
            Kind::Namespace | Kind::Pod | Kind::Node | Kind::ConfigMap | Kind::Service => "v1",
            Kind::Event => "events.k8s.io/v1",
            Kind::DaemonSet => "apps/v1",
            Kind::EndpointSlice => "discovery.k8s.io/v1",
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Namespace => "Namespace",
            Kind::Pod => "Pod",
            Kind::Node => "Node",
            Kind::ConfigMap => "ConfigMap",
            Kind::Event => "Event",
            Kind::DaemonSet => "DaemonSet",
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
        }
    }

    /// The fields that a selector may name.
    /// Source: Kubernetes `pkg/apis/core/v1/conversion.go`, `addConversionFuncs`.
    fn selectable(self) -> &'static [&'static str] {
        match self {
            Kind::Namespace => &["metadata.name", "status.phase", "name"],
            Kind::Pod => &[
                "metadata.name",
                "metadata.namespace",
                "spec.nodeName",
                "spec.restartPolicy",
                "spec.schedulerName",
                "spec.serviceAccountName",
                "spec.hostNetwork",
                "status.phase",
                "status.podIP",
                "status.nominatedNodeName",
            ],
            Kind::Node => &["metadata.name", "spec.unschedulable"],
            // As `v1`, the only version that they are listed in.
            Kind::Event => {
                &["metadata.name", "metadata.namespace", "reason", "type", "reportingComponent"]
            }
            Kind::Service => {
                &["metadata.name", "metadata.namespace", "spec.clusterIP", "spec.type"]
            }
            Kind::ConfigMap | Kind::DaemonSet | Kind::EndpointSlice => {
                &["metadata.name", "metadata.namespace"]
            }
        }
    }
}

/// Fields, `spec.nodeName=a,status.phase!=Failed`, and labels, `app=a`.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    fields: Vec<(String, bool, String)>,
    labels: Vec<(String, String)>,
}

impl Selector {
    pub(super) fn parse(kind: Kind, text: &str, labels: &str) -> Result<Self, Status> {
        let equal = |term: &str| match term.split_once('=') {
            Some((key, value)) if !key.ends_with('!') && !value.starts_with('=') => {
                Ok((key.to_owned(), value.to_owned()))
            }
            _ => {
                let message = format!("the stand-in does not know label selector {term:?}");
                Err(Status::bad_request(message))
            }
        };
        let labels = labels.split(',').filter(|term| !term.is_empty()).map(equal);
        let labels = labels.collect::<Result<_, _>>()?;
        let mut terms = Vec::new();
        for term in text.split(',').filter(|term| !term.is_empty()) {
            let (field, equal, value) = if let Some((field, value)) = term.split_once("!=") {
                (field, false, value)
            } else if let Some((field, value)) = term.split_once("==").or(term.split_once('=')) {
                (field, true, value)
            } else {
                return Err(Status::bad_request(format!("invalid field selector: {term:?}")));
            };
            if !kind.selectable().contains(&field) {
                return Err(Status::bad_request(format!("field label not supported: {field}")));
            }
            terms.push((field.to_owned(), equal, value.to_owned()));
        }
        Ok(Self { fields: terms, labels })
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let has = |(key, value): &(String, String)| object["metadata"]["labels"][key] == **value;
        self.labels.iter().all(has)
            && self.fields.iter().all(|(field, equal, value)| {
                let found = object.pointer(&format!("/{}", field.replace('.', "/")));
                let found = match found {
                    Some(Value::String(text)) => text.clone(),
                    Some(other) => other.to_string(),
                    None => String::new(),
                };
                (found == *value) == *equal
            })
    }
}

/// A change, as a watch sees it.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) kind: Kind,
    /// Before and after; one of them is missing when it came or went.
    pub(super) before: Option<Value>,
    pub(super) after: Option<Value>,
}

/// A verb on a resource, as in a rule: `patch` and `pods/status`.
pub(super) type Rule = (String, String);

#[derive(Debug)]
pub(super) struct Store {
    /// Of the last change.
    pub(super) version: u64,
    pub(super) objects: BTreeMap<(Kind, String, String), Value>,
    history: Vec<Change>,
    /// Changes up to this one are forgotten.
    pub(super) compacted: u64,
    pub(super) forbidden: BTreeSet<Rule>,
    /// How many objects were given a uid or a name.
    made: u64,
}

impl Store {
    pub(super) fn new() -> Self {
        Self {
            // As if it had been running for a while: nobody may think of versions as small.
            version: 1_000_000,
            objects: BTreeMap::new(),
            history: Vec::new(),
            compacted: 0,
            forbidden: BTreeSet::new(),
            made: 0,
        }
    }

    fn key(kind: Kind, object: &Value) -> (Kind, String, String) {
        let text = |field: &str| {
            let text = object.pointer(&format!("/metadata/{field}")).and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        (kind, text("namespace"), text("name"))
    }

    /// Puts an object in, or in place of the one of that name and uid, and fills in what a server
    /// fills in. One that has another uid than before is deleted first.
    pub(super) fn put(&mut self, kind: Kind, mut object: Value) -> Value {
        self.made += 1;
        let made = self.made;
        object["apiVersion"] = kind.api_version().into();
        object["kind"] = kind.name().into();
        let metadata = &mut object["metadata"];
        if metadata["name"].as_str().unwrap_or_default().is_empty() {
            let prefix = metadata["generateName"].as_str().unwrap_or_default();
            metadata["name"] = format!("{prefix}{made:05x}").into();
        }
        if kind == Kind::Namespace {
            metadata["labels"]["kubernetes.io/metadata.name"] = metadata["name"].clone();
        }
        let key = Self::key(kind, &object);
        let before = self.objects.get(&key).cloned();
        let metadata = &mut object["metadata"];
        if metadata["uid"].as_str().unwrap_or_default().is_empty() {
            metadata["uid"] = match &before {
                Some(before) => before["metadata"]["uid"].clone(),
                None => format!("00000000-0000-4000-8000-{made:012x}").into(),
            };
        }
        if metadata["creationTimestamp"].is_null() {
            metadata["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        metadata["managedFields"] = json!([{
            "manager": "kubelet", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
            "subresource": "status", "time": "2026-01-01T00:00:00Z",
            "fieldsV1": {"f:metadata": {"f:labels": {".": {}}}},
        }]);
        if let Some(before) = &before
            && before["metadata"]["uid"] != object["metadata"]["uid"]
        {
            self.delete(kind, &key.1, &key.2);
        }
        self.replace(kind, object)
    }

    /// Puts an object in as it is, with a new version unless nothing changes.
    pub(super) fn replace(&mut self, kind: Kind, mut object: Value) -> Value {
        let key = Self::key(kind, &object);
        let before = self.objects.get(&key).cloned();
        if let Some(before) = &before {
            object["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
            if *before == object {
                return object;
            }
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.objects.insert(key, object.clone());
        let version = self.version;
        self.history.push(Change { version, kind, before, after: Some(object.clone()) });
        object
    }

    pub(super) fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        let key = (kind, namespace.to_owned(), name.to_owned());
        let mut before = self.objects.remove(&key)?;
        self.version += 1;
        let version = self.version;
        before["metadata"]["resourceVersion"] = version.to_string().into();
        self.history.push(Change { version, kind, before: Some(before.clone()), after: None });
        Some(before)
    }

    pub(super) fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(&(kind, namespace.to_owned(), name.to_owned()))
    }

    /// Forgets all history: whoever wants to go on from an older version has to list anew.
    pub(super) fn compact(&mut self) {
        self.compacted = self.version;
        self.history.clear();
    }

    pub(super) fn since(&self, version: u64) -> impl Iterator<Item = &Change> {
        self.history.iter().filter(move |change| change.version > version)
    }

    pub(super) fn check(&self, verb: &str, kind: Kind, subresource: &str) -> Result<(), Status> {
        let resource = match subresource {
            "" => kind.plural().to_owned(),
            subresource => format!("{}/{subresource}", kind.plural()),
        };
        if self.forbidden.contains(&(verb.to_owned(), resource.clone())) {
            return Err(Status::forbidden(verb, &resource, kind.group()));
        }
        Ok(())
    }
}

/// An object as it is asked for.
pub(super) fn shown(object: &Value, metadata: bool) -> Value {
    if metadata {
        json!({
            "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
            "metadata": object["metadata"],
        })
    } else {
        object.clone()
    }
}

/// An Event as the core's version has it. Source: Kubernetes `pkg/apis/events/v1/conversion.go`.
pub(super) fn in_core(event: &Value) -> Value {
    let mut event = event.clone();
    for (name, in_core) in [
        ("regarding", "involvedObject"),
        ("note", "message"),
        ("reportingController", "reportingComponent"),
    ] {
        event[in_core] = event[name].take();
        if let Some(event) = event.as_object_mut() {
            event.remove(name);
        }
    }
    event
}

/// JSON merge patch. Source: RFC 7386.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    for (key, value) in patch {
        if value.is_null() {
            target.as_object_mut().and_then(|target| target.remove(key));
        } else {
            merge(&mut target[key.as_str()], value);
        }
    }
}
