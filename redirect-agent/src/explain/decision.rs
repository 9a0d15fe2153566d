//! What is known about a pod from its objects alone: the decision rule by rule, its settings, its waypoint.

use std::{collections::BTreeMap, time::SystemTime};

use super::{DecisionPart, PodPart, Rule, Waypoint};
use crate::{
    membership::{
        ANNOTATION_SIDECAR_STATUS, Config, Decision, LABEL_DATAPLANE_MODE, LABEL_USE_WAYPOINT,
        LABEL_USE_WAYPOINT_NAMESPACE, Line, Namespace, Pod, PodKey, Question, Reason, weigh,
    },
    overrides::{Mode, Overrides},
    source::ANNOTATION_REDIRECTION,
    traffic::{Settings, Traffic},
    words::Reading,
};

/// Opts out of a waypoint that the namespace names.
const NO_WAYPOINT: &str = "none";

/// What this node's decisions depend on.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    pub membership: &'a Config,
    pub traffic: &'a Settings,
    pub overrides: Option<&'a Overrides>,
}

impl Rules<'_> {
    /// What the objects say about a pod.
    pub fn describe(self, namespace: Option<&Namespace>, pod: &Pod, now: SystemTime) -> PodPart {
        let (traffic, settings) = self.traffic.trace(&pod.annotations, None);
        let reading = Reading::new(self.membership, self.traffic.sidecar_annotations);
        PodPart {
            name: pod.key.to_string(),
            node: pod.node_name.clone(),
            uid: Some(pod.uid.clone()),
            ips: pod.ips.clone(),
            decision: Some(self.decide(namespace, pod, now)),
            settings,
            traffic: Some(traffic).filter(|traffic| *traffic != Traffic::default()),
            redirection: pod.annotations.get(ANNOTATION_REDIRECTION).cloned(),
            waypoint: waypoint("pod", &pod.key, &pod.labels, namespace),
            unknown_words: reading.unknown(namespace, pod),
            ..PodPart::default()
        }
    }

    fn decide(self, namespace: Option<&Namespace>, pod: &Pod, now: SystemTime) -> DecisionPart {
        let mut rules = Vec::new();
        let mut decision =
            weigh(namespace, pod, self.membership, |line| rules.push(rule(pod, line)));
        if let Some(overrides) = self.overrides.filter(|_| !decision.reason.is_hard()) {
            let over = |object: String, asks: &str, found: String, decision: Decision| Rule {
                object,
                asks: asks.to_owned(),
                found: Some(found),
                decides: Some(side(decision)),
            };
            if let Some((target, found)) = overrides.find(&pod.key, now) {
                decision = match found.mode {
                    Mode::Enroll => Decision::enrolled(Reason::OverrideEnrolled),
                    Mode::Unenroll => Decision::bypass(Reason::OverrideBypass),
                };
                let until = found.until.map_or_else(String::new, |until| format!(" until {until}"));
                let asks = format!("redirect-agent {}", found.mode);
                let why = found.reason.map_or_else(String::new, |why| format!(" ({why})"));
                let said = format!("{target}{until}{why}");
                rules.push(over("override on this node".to_owned(), &asks, said, decision));
            }
            let applied = overrides.apply(decision, &pod.key, now);
            if applied != decision {
                decision = applied;
                let object = "override on this node".to_owned();
                let why = overrides.pause(now).and_then(|pause| pause.reason.as_ref());
                let why = why.map_or_else(String::new, |why| format!(" ({why})"));
                rules.push(over(object, "redirect-agent pause", format!("paused{why}"), decision));
            }
        }
        DecisionPart { enrolled: decision.enrolled, reason: decision.reason, rules }
    }
}

fn side(decision: Decision) -> String {
    if decision.enrolled { "in" } else { "out" }.to_owned()
}

fn rule(pod: &Pod, line: Line<'_>) -> Rule {
    let (of_pod, of_namespace) =
        (format!("pod {}", pod.key), format!("namespace {}", pod.key.namespace));
    let label = format!("label {LABEL_DATAPLANE_MODE}");
    let (object, asks) = match line.asked {
        Question::ExcludedNamespace => (of_namespace, "--excluded-namespaces".to_owned()),
        Question::HostNetwork => (of_pod, "spec.hostNetwork".to_owned()),
        Question::Phase => (of_pod, "status.phase".to_owned()),
        Question::Sidecar => (of_pod, format!("annotation {ANNOTATION_SIDECAR_STATUS}")),
        Question::Selectors => {
            (format!("{of_pod} and its namespace"), "--enablement-selectors".to_owned())
        }
        Question::PodLabel => (of_pod, label),
        Question::NamespaceLabel => (of_namespace, label),
        Question::Otherwise => (String::new(), "nothing asks for the mesh".to_owned()),
    };
    let found = line.found.map(str::to_owned);
    Rule { object, asks, found, decides: line.decides.map(side) }
}

/// The waypoint for calls to a pod, or to a Service: by its label, otherwise by its namespace's. Source: Istio
/// `pilot/pkg/serviceregistry/kube/controller/ambient/waypoints.go`, `getWaypointForTarget`.
pub(super) fn waypoint(
    kind: &str,
    key: &PodKey,
    labels: &BTreeMap<String, String>,
    namespace: Option<&Namespace>,
) -> Option<Waypoint> {
    let own = (format!("{kind} {key}"), labels);
    let of_namespace = namespace.map(|n| (format!("namespace {}", n.name), &n.labels));
    for (n, (object, labels)) in [Some(own), of_namespace].into_iter().flatten().enumerate() {
        let name = labels.get(LABEL_USE_WAYPOINT).filter(|name| !name.is_empty());
        match name.map(String::as_str) {
            Some(NO_WAYPOINT) if n == 0 => return Some(Waypoint { gateway: None, object }),
            Some(NO_WAYPOINT) | None => {}
            Some(name) => {
                let namespace = labels.get(LABEL_USE_WAYPOINT_NAMESPACE).unwrap_or(&key.namespace);
                return Some(Waypoint { gateway: Some(format!("{namespace}/{name}")), object });
            }
        }
    }
    None
}
