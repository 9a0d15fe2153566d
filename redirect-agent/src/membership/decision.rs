//! The decision, rule by rule, and its reasons.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::{
    ANNOTATION_SIDECAR_STATUS, DATAPLANE_MODE_AMBIENT, DATAPLANE_MODE_NONE,
    DEFAULT_EXCLUDED_NAMESPACE, LABEL_DATAPLANE_MODE, LABEL_USE_WAYPOINT,
    LABEL_USE_WAYPOINT_NAMESPACE, Namespace, Pod,
};
use crate::{enablement::Selectors, words::is_almost_the_label};

/// What is found of selectors that match.
const MATCHES: &str = "one of them";

/// The operator's part in the decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Namespaces whose pods are never in the mesh.
    pub excluded_namespaces: BTreeSet<String>,
    /// What asks for the mesh, in place of [`LABEL_DATAPLANE_MODE`].
    pub selectors: Option<Selectors>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            excluded_namespaces: BTreeSet::from([DEFAULT_EXCLUDED_NAMESPACE.to_owned()]),
            selectors: None,
        }
    }
}

impl Config {
    /// Whether anybody looks at the label `key` of a namespace: [`decide`], or whoever explains it.
    pub fn reads_namespace_label(&self, key: &str) -> bool {
        let explains = [LABEL_USE_WAYPOINT, LABEL_USE_WAYPOINT_NAMESPACE].contains(&key);
        let decides = match &self.selectors {
            None => key == LABEL_DATAPLANE_MODE || is_almost_the_label(key),
            Some(selectors) => selectors.namespace_keys().contains(key),
        };
        explains || decides
    }
}

/// Why a pod is in the mesh, or not.
///
/// The number is part of what operators and tools read from the kernel's `pods` map
/// ([`redirect_ebpf::abi::PodEntry::reason`]): it never changes, and a number is never used again.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The namespace is on the exclude list.
    NamespaceExcluded = 1,
    /// The pod has the node's network, which is not the pod's to redirect.
    HostNetwork = 2,
    /// The pod has run to its end.
    PodFinished = 3,
    /// The pod has a sidecar, and sidecar mode has precedence.
    Sidecar = 4,
    /// The pod's label opts out.
    PodLabelNone = 5,
    /// The pod's label asks for ambient mode.
    PodLabelAmbient = 6,
    /// The namespace's label asks for ambient mode.
    NamespaceLabelAmbient = 7,
    /// Neither the pod nor its namespace asks for the mesh.
    NotLabeled = 8,
    /// An operator enrolled the pod on this node (`redirect-agent enroll`).
    OverrideEnrolled = 9,
    /// An operator took the pod out on this node (`redirect-agent unenroll`).
    OverrideBypass = 10,
    /// An operator lets the whole node bypass (`redirect-agent pause`).
    Paused = 11,
    /// An enablement selector matches the pod and its namespace.
    Selected = 12,
    /// No enablement selector matches the pod and its namespace.
    NotSelected = 13,
}

impl Reason {
    /// Every reason, by code.
    pub const ALL: [Reason; 13] = [
        Reason::NamespaceExcluded,
        Reason::HostNetwork,
        Reason::PodFinished,
        Reason::Sidecar,
        Reason::PodLabelNone,
        Reason::PodLabelAmbient,
        Reason::NamespaceLabelAmbient,
        Reason::NotLabeled,
        Reason::OverrideEnrolled,
        Reason::OverrideBypass,
        Reason::Paused,
        Reason::Selected,
        Reason::NotSelected,
    ];

    /// The stable name, in kebab case.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::NamespaceExcluded => "namespace-excluded",
            Reason::HostNetwork => "host-network",
            Reason::PodFinished => "pod-finished",
            Reason::Sidecar => "sidecar",
            Reason::PodLabelNone => "pod-label-none",
            Reason::PodLabelAmbient => "pod-label-ambient",
            Reason::NamespaceLabelAmbient => "namespace-label-ambient",
            Reason::NotLabeled => "not-labeled",
            Reason::OverrideEnrolled => "override-enrolled",
            Reason::OverrideBypass => "override-bypass",
            Reason::Paused => "paused",
            Reason::Selected => "selected",
            Reason::NotSelected => "not-selected",
        }
    }

    /// Whether it puts a pod into the mesh.
    pub fn enrolls(self) -> bool {
        matches!(
            self,
            Reason::PodLabelAmbient
                | Reason::NamespaceLabelAmbient
                | Reason::OverrideEnrolled
                | Reason::Selected
        )
    }

    /// The stable number, never 0.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The reason with that number.
    pub fn from_code(code: u32) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| reason.code() == code)
    }

    /// Whether this keeps the pod out of the mesh whatever an operator says on this node.
    pub fn is_hard(self) -> bool {
        matches!(
            self,
            Reason::NamespaceExcluded | Reason::HostNetwork | Reason::PodFinished | Reason::Sidecar
        )
    }

    /// The reason in words, as an operator reads it.
    pub fn explain(self) -> &'static str {
        match self {
            Reason::NamespaceExcluded => "its namespace is excluded (--excluded-namespaces)",
            Reason::HostNetwork => "it uses the node's network (spec.hostNetwork)",
            Reason::PodFinished => "it has run to its end (status.phase)",
            Reason::Sidecar => "it has a sidecar (annotation sidecar.istio.io/status)",
            Reason::PodLabelNone => "its label istio.io/dataplane-mode=none opts out",
            Reason::PodLabelAmbient => "its label istio.io/dataplane-mode=ambient asks for it",
            Reason::NamespaceLabelAmbient => {
                "its namespace's label istio.io/dataplane-mode=ambient asks for it"
            }
            Reason::NotLabeled => {
                "neither it nor its namespace has the label istio.io/dataplane-mode=ambient"
            }
            Reason::OverrideEnrolled => "an operator enrolled it on this node",
            Reason::OverrideBypass => "an operator took it out of the mesh on this node",
            Reason::Paused => "an operator paused the whole node",
            Reason::Selected => "it and its namespace match one of --enablement-selectors",
            Reason::NotSelected => "it and its namespace match none of --enablement-selectors",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that is no [`Reason`]'s.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("read reason {0:?}: there is none of that name")]
pub struct UnknownReason(String);

impl FromStr for Reason {
    type Err = UnknownReason;

    fn from_str(s: &str) -> Result<Reason, UnknownReason> {
        Reason::ALL
            .into_iter()
            .find(|reason| reason.as_str() == s)
            .ok_or_else(|| UnknownReason(s.to_owned()))
    }
}

impl Serialize for Reason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Reason {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Reason, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}

/// Whether a pod is in the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// In the mesh, or bypassing it.
    pub enrolled: bool,
    /// Why.
    pub reason: Reason,
}

impl Decision {
    /// In the mesh because of `reason`.
    pub fn enrolled(reason: Reason) -> Decision {
        Decision { enrolled: true, reason }
    }

    /// Not in the mesh because of `reason`.
    pub fn bypass(reason: Reason) -> Decision {
        Decision { enrolled: false, reason }
    }
}

/// Decides whether `pod` is in the mesh; the first reason that applies wins.
///
/// A `namespace` that is not known counts as one without labels. Label values are case-sensitive,
/// and a pod's label that is empty or unknown is as good as none: only `none` opts out.
/// `istio-injection`, `istio.io/rev` and container names are not consulted. With enablement
/// selectors, they alone stand in for the two labels: `none` then opts out only where a selector
/// says so.
///
/// Source: Istio `cni/pkg/util/podutil.go`, `PodRedirectionEnabled`.
pub fn decide(namespace: Option<&Namespace>, pod: &Pod, config: &Config) -> Decision {
    weigh(namespace, pod, config, |_| {})
}

/// One line of the decision, as [`weigh`] comes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// What is asked.
    pub asked: Question,
    /// What was found of it: a label's value, an annotation's, a phase; `None`: nothing.
    pub found: Option<&'a str>,
    /// What that decides; `None`: nothing, the next line is asked.
    pub decides: Option<Decision>,
}

/// What a [`Line`] asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Is the namespace on the exclude list?
    ExcludedNamespace,
    /// Has the pod the node's network?
    HostNetwork,
    /// Has it finished?
    Phase,
    /// Has it the annotation of a sidecar?
    Sidecar,
    /// Does an enablement selector match?
    Selectors,
    /// What does the pod's label say?
    PodLabel,
    /// What does its namespace's label say?
    NamespaceLabel,
    /// Nobody has asked for the mesh.
    Otherwise,
}

/// Decides as [`decide`] does, and tells each line that is asked, the last of which decides.
pub fn weigh<'a>(
    namespace: Option<&'a Namespace>,
    pod: &'a Pod,
    config: &Config,
    mut told: impl FnMut(Line<'a>),
) -> Decision {
    let mut ask = |asked, found, decides| {
        told(Line { asked, found, decides });
        decides
    };
    let bypass = |holds: bool, reason| holds.then(|| Decision::bypass(reason));
    let name = pod.key.namespace.as_str();
    let excluded = config.excluded_namespaces.contains(name);
    let sidecar = pod.annotations.get(ANNOTATION_SIDECAR_STATUS).map(String::as_str);
    let hard = [
        (
            Question::ExcludedNamespace,
            excluded.then_some(name),
            excluded,
            Reason::NamespaceExcluded,
        ),
        (
            Question::HostNetwork,
            pod.host_network.then_some("true"),
            pod.host_network,
            Reason::HostNetwork,
        ),
        (Question::Phase, Some(pod.phase.as_str()), pod.phase.is_finished(), Reason::PodFinished),
        (Question::Sidecar, sidecar, sidecar.is_some(), Reason::Sidecar),
    ];
    for (asked, found, holds, reason) in hard {
        if let Some(decision) = ask(asked, found, bypass(holds, reason)) {
            return decision;
        }
    }
    if let Some(selectors) = &config.selectors {
        let none = BTreeMap::new();
        let labels = namespace.map_or(&none, |namespace| &namespace.labels);
        let decision = if selectors.matches(&pod.labels, name, labels) {
            Decision::enrolled(Reason::Selected)
        } else {
            Decision::bypass(Reason::NotSelected)
        };
        ask(Question::Selectors, decision.enrolled.then_some(MATCHES), Some(decision));
        return decision;
    }
    let by_pod = mode(&pod.labels);
    let decides = match by_pod {
        Some(DATAPLANE_MODE_NONE) => Some(Decision::bypass(Reason::PodLabelNone)),
        Some(DATAPLANE_MODE_AMBIENT) => Some(Decision::enrolled(Reason::PodLabelAmbient)),
        _ => None,
    };
    if let Some(decision) = ask(Question::PodLabel, by_pod, decides) {
        return decision;
    }
    let by_namespace = namespace.and_then(|n| mode(&n.labels));
    let decides = (by_namespace == Some(DATAPLANE_MODE_AMBIENT))
        .then(|| Decision::enrolled(Reason::NamespaceLabelAmbient));
    if let Some(decision) = ask(Question::NamespaceLabel, by_namespace, decides) {
        return decision;
    }
    let decision = Decision::bypass(Reason::NotLabeled);
    ask(Question::Otherwise, None, Some(decision));
    decision
}

fn mode(labels: &BTreeMap<String, String>) -> Option<&str> {
    labels.get(LABEL_DATAPLANE_MODE).map(String::as_str)
}
