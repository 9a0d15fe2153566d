//! What is kept of each object.

use k8s_openapi::{
    api::core::v1 as k8s,
    apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, Time},
};
use kube::api::{DynamicObject, ObjectMeta};
use serde_json::Value;

use super::settings::AgentArgs;
use crate::{
    membership::{ANNOTATION_SIDECAR_STATUS, LABEL_DATAPLANE_MODE, Namespace, Phase, Pod, PodKey},
    overrides::Moment,
    source::{ANNOTATION_REDIRECTION, EventKind, kube::read_pod},
    words::{Reading, UnknownWord},
};

/// A pod, without what does not count: there may be 100,000.
#[derive(Clone, Debug)]
pub struct PodSeen {
    /// What is decided by.
    pub pod: Pod,
    /// The value of the annotation.
    pub redirection: Option<String>,
    /// When it started on its node.
    pub started: Option<Moment>,
    /// When its label was set.
    pub labeled: Option<Moment>,
    /// Its misspelled labels and annotations.
    pub words: Vec<UnknownWord>,
}

impl PodSeen {
    /// Reads the object. The error is text.
    ///
    /// # Errors
    ///
    /// When it is no pod that an agent could use.
    pub fn read(object: DynamicObject, reading: Reading) -> Result<Self, String> {
        let started = object.data.pointer("/status/startTime").and_then(Value::as_str);
        let started = started.and_then(|time| Moment::try_from(time.to_owned()).ok());
        let labeled = labeled(&object.metadata);
        let created = object.metadata.creation_timestamp.as_ref().map(moment);
        let mut pod = read_pod(object)?;
        let words = reading.unknown(None, &pod);
        let redirection = pod.annotations.remove(ANNOTATION_REDIRECTION);
        pod.annotations.retain(|key, _| key == ANNOTATION_SIDECAR_STATUS);
        if reading.by_label {
            pod.labels.retain(|key, _| key == LABEL_DATAPLANE_MODE);
        }
        pod.ips = Vec::new();
        // Not every kubelet tells when.
        let started = started.or(created.filter(|_| pod.phase == Phase::Running));
        Ok(Self { pod, redirection, started, labeled, words })
    }
}

/// A namespace.
#[derive(Clone, Debug)]
pub struct NamespaceSeen {
    /// What is decided by.
    pub namespace: Namespace,
    /// When its label was set.
    pub labeled: Option<Moment>,
}

impl From<ObjectMeta> for NamespaceSeen {
    fn from(metadata: ObjectMeta) -> Self {
        let labeled = labeled(&metadata);
        let ObjectMeta { name, labels, .. } = metadata;
        let namespace =
            Namespace { name: name.unwrap_or_default(), labels: labels.unwrap_or_default() };
        Self { namespace, labeled }
    }
}

/// When the label `istio.io/dataplane-mode` was set, at the latest: whoever set it may have set another
/// field since.
fn labeled(metadata: &ObjectMeta) -> Option<Moment> {
    let path = format!("/f:metadata/f:labels/f:{}", LABEL_DATAPLANE_MODE.replace('/', "~1"));
    let sets = |entry: &&ManagedFieldsEntry| {
        entry.fields_v1.as_ref().is_some_and(|fields| fields.0.pointer(&path).is_some())
    };
    let entries = metadata.managed_fields.iter().flatten();
    entries.filter(sets).filter_map(|entry| entry.time.as_ref()).map(moment).max()
}

fn moment(time: &Time) -> Moment {
    Moment::of(time.0.into())
}

/// An agent's pod.
#[derive(Clone, Debug)]
pub struct AgentSeen {
    /// Its name.
    pub key: PodKey,
    /// The node that it is on.
    pub node: String,
    /// The tag of its image.
    pub version: String,
    /// When it was created.
    pub created: Option<Moment>,
    /// Whether it is ready.
    pub ready: bool,
    /// Since when it is, or is not.
    pub since: Option<Moment>,
    /// Why its container does not run, if it does not.
    pub message: Option<String>,
    /// Its flags.
    pub(super) args: AgentArgs,
}

impl AgentSeen {
    /// Reads an agent's pod; `None`: it is on no node, or has ended.
    pub fn read(pod: &k8s::Pod) -> Option<Self> {
        let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref());
        let phase = status.and_then(|status| status.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            return None;
        }
        let metadata = &pod.metadata;
        let key = PodKey::new(metadata.namespace.clone()?, metadata.name.clone()?).ok()?;
        let container = spec.containers.first()?;
        let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
        let ready = conditions.into_iter().find(|condition| condition.type_ == "Ready");
        let states =
            status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten();
        let waiting = states
            .filter_map(|status| status.state.as_ref()?.waiting.as_ref())
            .find_map(|waiting| waiting.reason.clone());
        Some(Self {
            key,
            node: spec.node_name.clone().filter(|node| !node.is_empty())?,
            version: version(container.image.as_deref().unwrap_or_default()),
            created: metadata.creation_timestamp.as_ref().map(moment),
            ready: ready.is_some_and(|ready| ready.status == "True")
                && metadata.deletion_timestamp.is_none(),
            since: ready.and_then(|ready| ready.last_transition_time.as_ref()).map(moment),
            message: match metadata.deletion_timestamp {
                Some(_) => Some("it is being deleted".to_owned()),
                None => waiting,
            },
            args: AgentArgs::of(container),
        })
    }
}

/// The tag of an image, else the beginning of its digest.
fn version(image: &str) -> String {
    let name = image.rsplit('/').next().unwrap_or(image);
    let (name, digest) = name.split_once('@').map_or((name, None), |(n, d)| (n, Some(d)));
    match (name.split_once(':'), digest) {
        (Some((_, tag)), _) => tag.to_owned(),
        (None, Some(digest)) => digest.chars().take(19).collect(),
        (None, None) => "latest".to_owned(),
    }
}

/// The last thing that an agent said about a pod's way into or out of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventSeen {
    /// What happened.
    pub reason: String,
    /// What the agent said.
    pub note: String,
    /// When it last did.
    pub last: Option<Moment>,
    /// How often it did.
    pub count: i32,
}

impl EventSeen {
    /// Reads an agent's Event: the pod's namespace and uid, and what was said. `None`: it says nothing about why a
    /// pod is where it is. An Event can name any uid, but only whoever may write to a namespace can make one in it.
    pub fn read(event: k8s::Event) -> Option<((String, String), Self)> {
        let telling = [EventKind::EnrollmentFailed, EventKind::Overridden, EventKind::Unenrolled];
        let reason = event.reason?;
        if !telling.iter().any(|kind| kind.as_str() == reason) {
            return None;
        }
        let series = event.series.as_ref();
        let last = series
            .and_then(|series| series.last_observed_time.as_ref())
            .or(event.event_time.as_ref())
            .map(|time| Moment::of(time.0.into()));
        let last = last.or_else(|| event.last_timestamp.as_ref().map(moment));
        let count = series.and_then(|series| series.count).or(event.count).unwrap_or(1);
        let seen = Self { reason, note: event.message.unwrap_or_default(), last, count };
        let namespace = event.metadata.namespace.unwrap_or_default();
        Some(((namespace, event.involved_object.uid.unwrap_or_default()), seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_version_is_the_tag_or_the_digest() {
        for (image, expected) in [
            ("registry:5000/istio/redirect-agent:0.1.0", "0.1.0"),
            ("registry:5000/redirect-agent", "latest"),
            ("a/redirect-agent:0.1.0@sha256:0123456789abcdef0123", "0.1.0"),
            ("a/redirect-agent@sha256:0123456789abcdef0123", "sha256:0123456789ab"),
        ] {
            assert_eq!(version(image), expected, "{image}");
        }
    }

    #[test]
    fn a_label_was_set_by_whoever_owns_its_field() {
        let metadata: ObjectMeta = serde_json::from_value(json!({
            "name": "shop",
            "managedFields": [
                {"manager": "kubectl-label", "time": "2026-08-01T12:00:00Z", "fieldsType": "FieldsV1",
                 "fieldsV1": {"f:metadata": {"f:labels": {"f:istio.io/dataplane-mode": {}}}}},
                {"manager": "other", "time": "2026-08-02T12:00:00Z", "fieldsType": "FieldsV1",
                 "fieldsV1": {"f:metadata": {"f:labels": {"f:team": {}}}}},
            ],
        }))
        .unwrap();
        let labeled = NamespaceSeen::from(metadata).labeled.map(|time| time.to_string());
        assert_eq!(labeled.as_deref(), Some("2026-08-01T12:00:00Z"));
    }

    #[test]
    fn an_event_tells_the_last_time_of_its_series() {
        let event = |reason: &str| {
            serde_json::from_value::<k8s::Event>(json!({
                "metadata": {"namespace": "shop"}, "involvedObject": {"uid": "u-1"}, "reason": reason,
                "message": "no netns", "eventTime": "2026-08-01T12:00:00.000000Z",
                "series": {"count": 3, "lastObservedTime": "2026-08-01T12:05:00.000000Z"},
            }))
            .unwrap()
        };
        let (pod, seen) = EventSeen::read(event("EnrollmentFailed")).unwrap();
        assert_eq!(pod, ("shop".to_owned(), "u-1".to_owned()));
        assert_eq!((seen.note.as_str(), seen.count), ("no netns", 3));
        assert_eq!(seen.last.unwrap().to_string(), "2026-08-01T12:05:00Z");
        assert_eq!(EventSeen::read(event("Repaired")), None);
    }
}
