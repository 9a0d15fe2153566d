//! Labels and annotations that look like ours but are not: misspelled keys and values, which have no effect
//! and which nothing else reports.

mod told;

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use strsim::damerau_levenshtein;

pub use self::told::Told;
use crate::{
    membership::{
        Config, DATAPLANE_MODE_AMBIENT, DATAPLANE_MODE_NONE, LABEL_DATAPLANE_MODE, Namespace, Pod,
    },
    traffic::{
        ANNOTATION_BYPASS_INBOUND, ANNOTATION_DNS_CAPTURE, ANNOTATION_VIRTUAL_INTERFACES, PREFIX,
        SELECTIONS, SIDECAR_NAMES, SIDECAR_PREFIX,
    },
};

/// How many letters of a word may be wrong for it to count as misspelled.
const SLIPS: usize = 2;

/// A label or an annotation that does not mean what it seems to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnknownWord {
    /// What is wrong with it.
    pub what: Slip,
    /// Where it is: `pod shop/cart`, `namespace shop`.
    pub object: String,
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
    /// What was probably meant: another key, or another value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meant: Option<String>,
}

/// What is wrong with a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slip {
    /// The key of a label is almost `istio.io/dataplane-mode`.
    LabelKey,
    /// The value of `istio.io/dataplane-mode` does not exist.
    LabelValue,
    /// `istio.io/dataplane-mode` is an annotation, but has to be a label.
    NotALabel,
    /// The key of an annotation is not one of ours, but looks like one.
    AnnotationKey,
    /// An annotation of the sidecar that has no effect here.
    Sidecar,
}

impl fmt::Display for UnknownWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, object, key, value, meant } = self;
        match what {
            Slip::LabelKey => write!(f, "label {key} of {object} says nothing")?,
            Slip::LabelValue => write!(
                f,
                "label {key}={value:?} of {object} says nothing: it is neither {DATAPLANE_MODE_AMBIENT} nor \
                 {DATAPLANE_MODE_NONE}"
            )?,
            Slip::NotALabel => {
                write!(f, "annotation {key} of {object} says nothing: it has to be a label")?;
            }
            Slip::AnnotationKey => write!(f, "annotation {key} of {object} is not known")?,
            Slip::Sidecar => write!(
                f,
                "annotation {key} of {object} is the sidecar's and does not count here: use \
                 traffic.redirect-agent/"
            )?,
        }
        match meant {
            Some(meant) => write!(f, "; is {meant} meant?"),
            None => Ok(()),
        }
    }
}

impl UnknownWord {
    /// The value as one word of a shell: it is in commands that operators paste, and anybody may have written it.
    pub fn quoted_value(&self) -> String {
        format!("'{}'", self.value.replace('\'', r"'\''"))
    }
}

/// Which labels and annotations this node reads.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Whether the label `istio.io/dataplane-mode` decides, rather than enablement selectors.
    pub by_label: bool,
    /// Whether the sidecar's annotations count.
    pub sidecar_annotations: bool,
}

impl Reading {
    /// How they are read with these settings.
    pub fn new(membership: &Config, sidecar_annotations: bool) -> Self {
        Self { by_label: membership.selectors.is_none(), sidecar_annotations }
    }

    /// The labels and annotations of a pod and its namespace that have no effect.
    pub fn unknown(self, namespace: Option<&Namespace>, pod: &Pod) -> Vec<UnknownWord> {
        let on_pod = format!("pod {}", pod.key);
        let mut found = Vec::new();
        if self.by_label {
            found.extend(labels(&on_pod, &pod.labels));
        }
        found.extend(namespace.into_iter().flat_map(|namespace| self.of_namespace(namespace)));
        found.extend(pod.annotations.iter().filter_map(|(key, value)| {
            let (what, meant) = self.annotation(key)?;
            Some(UnknownWord {
                what,
                object: on_pod.clone(),
                key: key.clone(),
                value: value.clone(),
                meant,
            })
        }));
        found
    }

    /// The labels of a namespace that have no effect.
    pub fn of_namespace(self, namespace: &Namespace) -> Vec<UnknownWord> {
        match self.by_label {
            true => labels(&format!("namespace {}", namespace.name), &namespace.labels),
            false => Vec::new(),
        }
    }

    /// What is wrong with the key of an annotation, and what was probably meant.
    fn annotation(self, key: &str) -> Option<(Slip, Option<String>)> {
        if self.by_label && (key == LABEL_DATAPLANE_MODE || is_almost_the_label(key)) {
            return Some((
                Slip::NotALabel,
                (key != LABEL_DATAPLANE_MODE).then(|| LABEL_DATAPLANE_MODE.to_owned()),
            ));
        }
        let known = known_annotations();
        if known.iter().any(|known| known == key) {
            return None;
        }
        if let Some(name) = key.strip_prefix(SIDECAR_PREFIX) {
            let counts = self.sidecar_annotations && SIDECAR_NAMES.contains(&name);
            let ours = format!("{PREFIX}{name}");
            return (!counts && known.contains(&ours)).then_some((Slip::Sidecar, Some(ours)));
        }
        let (prefix, name) = key.split_once('/').unwrap_or(("", key));
        let ours =
            prefix.split('.').any(|part| damerau_levenshtein(part, "redirect-agent") <= SLIPS);
        let near = nearest(key, known.iter().map(String::as_str));
        let meant = near.or_else(|| {
            let names = SELECTIONS.into_iter();
            ours.then(|| nearest(name, names)).flatten().map(|name| format!("{PREFIX}{name}"))
        });
        (ours || meant.is_some()).then_some((Slip::AnnotationKey, meant))
    }
}

/// Every annotation that is read.
fn known_annotations() -> Vec<String> {
    let istios = [ANNOTATION_BYPASS_INBOUND, ANNOTATION_DNS_CAPTURE, ANNOTATION_VIRTUAL_INTERFACES];
    let own = SELECTIONS.iter().map(|name| format!("{PREFIX}{name}"));
    istios.into_iter().map(str::to_owned).chain(own).collect()
}

fn labels(object: &str, labels: &BTreeMap<String, String>) -> Vec<UnknownWord> {
    let word = |what, key: &str, value: &str, meant: Option<&str>| UnknownWord {
        what,
        object: object.to_owned(),
        key: key.to_owned(),
        value: value.to_owned(),
        meant: meant.map(str::to_owned),
    };
    let check = |(key, value): (&String, &String)| {
        if key != LABEL_DATAPLANE_MODE {
            let meant = Some(LABEL_DATAPLANE_MODE);
            return is_almost_the_label(key).then(|| word(Slip::LabelKey, key, value, meant));
        }
        let modes = [DATAPLANE_MODE_AMBIENT, DATAPLANE_MODE_NONE];
        if modes.contains(&value.as_str()) {
            return None;
        }
        let meant = nearest(value, modes.into_iter());
        Some(word(Slip::LabelValue, key, value, meant.as_deref()))
    };
    labels.iter().filter_map(check).collect()
}

/// Whether a key is a misspelled `istio.io/dataplane-mode`: one or two letters are wrong, in the name or in
/// the whole key.
pub fn is_almost_the_label(key: &str) -> bool {
    const NAME: &str = "dataplane-mode";
    if key == LABEL_DATAPLANE_MODE {
        return false;
    }
    let name = key.rsplit('/').next().unwrap_or(key);
    // Much longer or shorter words cannot be similar, so most labels are not even compared.
    let near = |a: &str, b: &str| {
        a.len().abs_diff(b.len()) <= SLIPS
            && damerau_levenshtein(&a.to_ascii_lowercase(), b) <= SLIPS
    };
    near(name, NAME) || near(key, LABEL_DATAPLANE_MODE)
}

/// The most similar word in `known`, if any is similar enough.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let lower = word.to_ascii_lowercase();
    known
        .filter(|known| known.len().abs_diff(word.len()) <= SLIPS)
        .map(|known| (damerau_levenshtein(&lower, &known.to_ascii_lowercase()), known))
        .filter(|(distance, _)| *distance <= SLIPS)
        .min()
        .map(|(_, known)| known.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::Phase;

    const BY_LABEL: Reading = Reading { by_label: true, sidecar_annotations: false };

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn unknown(
        reading: Reading,
        namespace: &[(&str, &str)],
        labels: &[(&str, &str)],
        annotations: &[(&str, &str)],
    ) -> Vec<String> {
        let namespace = Namespace { name: "shop".to_owned(), labels: map(namespace) };
        let pod = Pod {
            key: "shop/cart".parse().unwrap(),
            uid: "u".to_owned(),
            service_account: "default".to_owned(),
            node_name: None,
            labels: map(labels),
            annotations: map(annotations),
            host_network: false,
            host_users: true,
            phase: Phase::Running,
            ips: Vec::new(),
            deleting: false,
        };
        reading.unknown(Some(&namespace), &pod).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn words_that_are_known_or_somebody_elses_are_left_alone() {
        let labels = [
            ("istio.io/dataplane-mode", "ambient"),
            ("istio.io/use-waypoint", "none"),
            ("istio.io/rev", "stable"),
            ("app", "ambeint"),
            ("pod-template-hash", "5c9"),
        ];
        let annotations = [
            ("ambient.istio.io/redirection", "enabled"),
            ("ambient.istio.io/dns-capture", "true"),
            ("ambient.istio.io/bypass-inbound-capture", "true"),
            ("istio.io/reroute-virtual-interfaces", "a"),
            ("traffic.redirect-agent/excludeOutboundPorts", "1"),
            ("prometheus.io/scrape", "true"),
            ("proxy.istio.io/config", "{}"),
            ("traffic.sidecar.istio.io/kubevirtInterfaces", "a"),
        ];
        let none = [("istio.io/dataplane-mode", "none")];
        assert_eq!(unknown(BY_LABEL, &none, &labels, &annotations), [""; 0]);
    }

    #[test]
    fn misspelled_labels_are_named_with_what_is_meant() {
        for (key, value, expected) in [
            ("istio.io/dataplane-mod", "ambient", "istio.io/dataplane-mode meant?"),
            ("istio.io/dataplane_mode", "ambient", "istio.io/dataplane-mode meant?"),
            ("istio.io/Dataplane-Mode", "ambient", "istio.io/dataplane-mode meant?"),
            ("istoi.io/dataplane-mode", "ambient", "istio.io/dataplane-mode meant?"),
            ("ambient.istio.io/dataplane-mode", "ambient", "istio.io/dataplane-mode meant?"),
            ("dataplane-mode", "ambient", "istio.io/dataplane-mode meant?"),
            ("istio.io/dataplane-mode", "ambeint", "; is ambient meant?"),
            ("istio.io/dataplane-mode", "Ambient", "; is ambient meant?"),
            ("istio.io/dataplane-mode", "enabled", "neither ambient nor none"),
            ("istio.io/dataplane-mode", "", "neither ambient nor none"),
        ] {
            for (namespace, object) in [(false, "pod shop/cart"), (true, "namespace shop")] {
                let label = [(key, value)];
                let (of_namespace, of_pod) =
                    if namespace { (&label[..], &[][..]) } else { (&[][..], &label[..]) };
                let [word] = &unknown(BY_LABEL, of_namespace, of_pod, &[])[..] else {
                    panic!("{key}={value}");
                };
                assert!(word.ends_with(expected) && word.contains(object), "{word}");
                let by_selector = Reading { by_label: false, ..BY_LABEL };
                assert_eq!(unknown(by_selector, of_namespace, of_pod, &[]), [""; 0]);
            }
        }
    }

    #[test]
    fn annotations_that_look_like_ours_are_named_with_what_is_meant() {
        let meant = |name: &str| format!("; is {name} meant?");
        for (key, expected) in [
            (
                "traffic.redirect-agent/excludeOutboundPort",
                meant("traffic.redirect-agent/excludeOutboundPorts"),
            ),
            (
                "traffic.redirect-agent/excludeoutboundports",
                meant("traffic.redirect-agent/excludeOutboundPorts"),
            ),
            (
                "traffic.redirect-agnet/includeInboundPorts",
                meant("traffic.redirect-agent/includeInboundPorts"),
            ),
            (
                "redirect-agent/includeInboundPorts",
                meant("traffic.redirect-agent/includeInboundPorts"),
            ),
            ("traffic.redirect-agent/exclude", "is not known".to_owned()),
            ("ambient.istio.io/dns-captrue", meant("ambient.istio.io/dns-capture")),
            (
                "ambient.istio.io/bypass-inbound-captures",
                meant("ambient.istio.io/bypass-inbound-capture"),
            ),
            ("istio.io/reroute-virtual-interface", meant("istio.io/reroute-virtual-interfaces")),
            ("istio.io/dataplane-mode", "it has to be a label".to_owned()),
            (
                "traffic.sidecar.istio.io/excludeInboundPorts",
                meant("traffic.redirect-agent/excludeInboundPorts"),
            ),
        ] {
            let [word] = &unknown(BY_LABEL, &[], &[], &[(key, "x")])[..] else { panic!("{key}") };
            assert!(word.ends_with(&expected), "{word}");
        }
    }

    #[test]
    fn sidecars_annotations_that_count_are_not_named() {
        let reading = Reading { sidecar_annotations: true, ..BY_LABEL };
        let read = |name: &str| {
            unknown(reading, &[], &[], &[(&format!("traffic.sidecar.istio.io/{name}"), "80")]).len()
        };
        assert_eq!((read("excludeInboundPorts"), read("includeOutboundPorts")), (0, 1));
    }
}
