//! Explains a pod from manifests alone, without an agent: what will be decided.

use std::{path::Path, time::SystemTime};

use anyhow::Result;

use super::{
    Explanation, NodePart, Place, PodPart, decision::Rules, gather::conclude, verdict::judge,
};
use crate::{
    membership::{Config, PodKey},
    source::dir::Manifests,
    traffic::Settings,
};

/// Explains the decision about a pod from the manifests at `path`, a file or a directory. A workload, such as
/// a Deployment, stands for its pods, under its own name.
///
/// # Errors
///
/// When a manifest cannot be read.
pub fn explain(path: &Path, pod: &PodKey, membership: &Config) -> Result<Explanation> {
    let manifests = Manifests::read(path)?;
    let rules = Rules { membership, traffic: &Settings::default(), overrides: None };
    let now = SystemTime::now();
    let node = NodePart { source: format!("file:{}", path.display()), ..NodePart::default() };
    let node = NodePart {
        mesh_namespaces: manifests.mesh_namespaces(),
        lacks_namespace: !manifests.namespaces.contains_key(&pod.namespace),
        ..node
    };
    let pod = match manifests.pods.get(pod) {
        Some(found) => {
            let namespace = manifests.namespaces.get(&pod.namespace);
            PodPart { place: Place::Manifest, ..rules.describe(namespace, found, now) }
        }
        None => {
            let named = manifests.pods.keys().filter(|other| other.name == pod.name);
            let elsewhere = named.map(PodKey::to_string).collect();
            PodPart { name: pod.to_string(), elsewhere, ..PodPart::default() }
        }
    };
    let judgment = judge(&node, &pod, None, None, now);
    Ok(conclude(node, pod, None, judgment, now))
}
