//! What is in the manifests of a file.

use std::{collections::BTreeMap, ffi::OsStr, fmt, fs, path::Path};

use anyhow::{Context as _, Result, anyhow};
use k8s_openapi::api::core::v1 as k8s;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{is_manifest, list};
use crate::{
    membership::{DATAPLANE_MODE_AMBIENT, LABEL_DATAPLANE_MODE, Namespace, Pod, PodKey},
    source::{Service, Whom},
};

/// The namespaces and pods of some files.
#[derive(Debug, Default)]
pub struct Manifests {
    /// By name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// By name.
    pub pods: BTreeMap<PodKey, Pod>,
    services: Vec<k8s::Service>,
}

impl Manifests {
    /// Reads a file, or the manifests in a directory. Of objects with the same name, the first counts. Pods
    /// that were never in a cluster, and so have no uid, are read, too.
    ///
    /// # Errors
    ///
    /// When a file cannot be read, or an object in it.
    pub fn read(path: &Path) -> Result<Self> {
        let mut manifests = Self::default();
        if path.is_dir() {
            let mut names = list(path).with_context(|| format!("read {}", path.display()))?;
            names.retain(|name| is_manifest(name));
            names.sort();
            for name in names {
                manifests.add(&path.join(name))?;
            }
        } else {
            manifests.add(path)?;
        }
        Ok(manifests)
    }

    pub(super) fn add(&mut self, path: &Path) -> Result<()> {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let is_json = path.extension() == Some(OsStr::new("json"));
        self.take(&content, is_json).map_err(|error| anyhow!("{}: {error}", path.display()))
    }

    /// Takes the objects of a file's content.
    pub(crate) fn take(&mut self, content: &[u8], is_json: bool) -> Result<(), String> {
        let mut found = Vec::new();
        let documents = parse(content, is_json).map_err(|error| format!("parse it: {error}"))?;
        for (index, document) in documents.into_iter().enumerate() {
            let object = prepared(document);
            self.services.extend(services(&object));
            interpret(format!("document {}", index + 1), &object, None, &mut found);
        }
        for Found { place, object, .. } in found {
            match object.map_err(|error| format!("{place}: {error}"))? {
                Object::Namespace(n) => drop(self.namespaces.entry(n.name.clone()).or_insert(n)),
                Object::Pod(pod) => drop(self.pods.entry(pod.key.clone()).or_insert(pod)),
            }
        }
        Ok(())
    }

    /// The Service of that name, or with that cluster IP.
    pub(super) fn service(&self, whom: &Whom) -> Option<Service> {
        let object = self.services.iter().find(|object| Service::is(object, whom))?;
        Service::selecting(object, self.pods.values())
    }

    /// The namespaces whose label asks for the mesh.
    pub fn mesh_namespaces(&self) -> Vec<String> {
        let is_in = |namespace: &&Namespace| {
            let mode = namespace.labels.get(LABEL_DATAPLANE_MODE);
            mode.is_some_and(|mode| mode == DATAPLANE_MODE_AMBIENT)
        };
        self.namespaces.values().filter(is_in).map(|namespace| namespace.name.clone()).collect()
    }
}

/// The Services of a document.
fn services(document: &Value) -> Vec<k8s::Service> {
    if let Some(items) = document.get("items").and_then(Value::as_array) {
        return items.iter().flat_map(services).collect();
    }
    let is_one = document.get("kind").is_some_and(|kind| kind == "Service");
    is_one.then(|| decode(document).ok()).flatten().into_iter().collect()
}

/// The object, and those in it, as [`interpret`] takes them.
fn prepared(mut object: Value) -> Value {
    if let Some(items) = object.get_mut("items").and_then(Value::as_array_mut) {
        for item in items {
            *item = prepared(item.take());
        }
        return object;
    }
    let mut object = pod_of_workload(object);
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.entry("uid").or_insert_with(|| json!("none"));
    }
    object
}

/// The object. One that creates pods (a Deployment, a DaemonSet, a Job) becomes a pod of its name.
fn pod_of_workload(object: Value) -> Value {
    let Some(template) = object.pointer("/spec/template").filter(|t| t.is_object()) else {
        return object;
    };
    let mut pod = template.clone();
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    // Anything else is refused when the pod is read.
    if pod.get("metadata").is_some_and(|metadata| !metadata.is_object() && !metadata.is_null()) {
        return pod;
    }
    for field in ["name", "namespace"] {
        if let Some(value) = object["metadata"].get(field) {
            pod["metadata"][field] = value.clone();
        }
    }
    pod
}

#[derive(Clone, Debug)]
pub(super) enum Object {
    Namespace(Namespace),
    Pod(Pod),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ObjectId {
    Namespace(String),
    Pod(PodKey),
}

impl Object {
    pub(super) fn id(&self) -> ObjectId {
        match self {
            Object::Namespace(namespace) => ObjectId::Namespace(namespace.name.clone()),
            Object::Pod(pod) => ObjectId::Pod(pod.key.clone()),
        }
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectId::Namespace(name) => write!(f, "namespace {name}"),
            ObjectId::Pod(key) => write!(f, "pod {key}"),
        }
    }
}

/// The documents of a file, without empty ones.
pub(super) fn parse(content: &[u8], is_json: bool) -> Result<Vec<Value>, String> {
    let documents = if is_json {
        serde_json::Deserializer::from_slice(content)
            .into_iter::<Value>()
            .collect::<Result<Vec<Value>, _>>()
            .map_err(|error| error.to_string())?
    } else {
        let options = serde_saphyr::options! { with_snippet: false };
        serde_saphyr::from_slice_multiple_with_options(content, options)
            .map_err(|error| error.to_string())?
    };
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// A Namespace or a Pod, or why one cannot be read.
pub(super) struct Found {
    /// Where in the file, for the operator.
    pub(super) place: String,
    /// Its name, if it is known.
    pub(super) id: Option<ObjectId>,
    pub(super) object: Result<Object, String>,
}

/// Finds the Namespaces and Pods of a document.
///
/// The items of a `PodList` need not say what they are; `kind` says it for them.
pub(super) fn interpret(
    place: String,
    document: &Value,
    kind: Option<&str>,
    found: &mut Vec<Found>,
) {
    let text = |field: &str| document.get(field).and_then(Value::as_str);
    let mut wrong = |place: &str, id, error: String| {
        found.push(Found { place: place.to_owned(), id, object: Err(error) });
    };
    let (api, kind) = match (text("apiVersion"), text("kind"), kind) {
        (Some(api), Some(kind), _) => (api, kind),
        (_, _, Some(kind)) => ("v1", kind),
        _ => {
            wrong(
                &place,
                None,
                "it is no Kubernetes object: it lacks apiVersion or kind".to_owned(),
            );
            return;
        }
    };
    match (api, kind) {
        ("v1", "List" | "PodList" | "NamespaceList") => {
            let Some(items) = document.get("items").and_then(Value::as_array) else {
                wrong(&place, None, format!("read items of the {kind}: there are none"));
                return;
            };
            let item_kind = kind.strip_suffix("List").filter(|kind| !kind.is_empty());
            for (index, item) in items.iter().enumerate() {
                interpret(format!("{place}, item {}", index + 1), item, item_kind, found);
            }
        }
        ("v1", "Namespace") => {
            let name = document.pointer("/metadata/name").and_then(Value::as_str);
            let object = decode::<k8s::Namespace>(document)
                .and_then(|n| Namespace::try_from(&n).map_err(|error| error.to_string()))
                .map(Object::Namespace);
            let id = name.map(|name| ObjectId::Namespace(name.to_owned()));
            found.push(Found { place: with_name(place, &id), id, object });
        }
        ("v1", "Pod") => {
            let text = |field: &str| {
                document.get("metadata").and_then(|m| m.get(field)).and_then(Value::as_str)
            };
            let key = text("name")
                .and_then(|name| PodKey::new(text("namespace").unwrap_or("default"), name).ok());
            let object = decode::<k8s::Pod>(document)
                .and_then(|pod| Pod::try_from(&pod).map_err(|error| error.to_string()))
                .map(Object::Pod);
            let id = key.map(ObjectId::Pod);
            found.push(Found { place: with_name(place, &id), id, object });
        }
        _ => {}
    }
}

fn with_name(place: String, id: &Option<ObjectId>) -> String {
    match id {
        Some(id) => format!("{place} ({id})"),
        None => place,
    }
}

fn decode<T: DeserializeOwned>(document: &Value) -> Result<T, String> {
    T::deserialize(document).map_err(|error| format!("read it: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_whose_metadata_is_no_object_is_refused() {
        for metadata in ["x", "[]", "1", "true"] {
            let manifest = format!(
                "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: web}}, \
                 spec: {{template: {{metadata: {metadata}}}}}}}"
            );
            let error = Manifests::default().take(manifest.as_bytes(), false).unwrap_err();
            assert!(error.starts_with("document 1: read it: "), "{error}");
        }
    }
}
