//! PeerAuthentication: does a workload take plaintext?

use std::collections::BTreeMap;

use serde::Deserialize;

/// Where mesh-wide policies live.
pub(super) const ROOT_NAMESPACE: &str = "istio-system";

/// A policy's mode; what is no mode is refused with the manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Mode {
    /// As the level above says.
    #[default]
    Unset,
    /// Ambient mesh knows no DISABLE: it is taken for PERMISSIVE, as istiod does.
    Disable,
    /// Plaintext and HBONE.
    Permissive,
    /// HBONE only.
    Strict,
}

/// A PeerAuthentication, as far as it matters here.
#[derive(Clone, Debug, Default)]
pub(super) struct PeerAuthentication {
    /// Its namespace.
    pub(super) namespace: String,
    /// Its name.
    pub(super) name: String,
    /// RFC 3339, or empty; the oldest policy of a level wins.
    pub(super) created: String,
    /// What it says.
    pub(super) spec: PeerAuthenticationSpec,
}

/// The `spec` of a PeerAuthentication.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct PeerAuthenticationSpec {
    /// Which workloads of the namespace; all if there is none.
    pub(super) selector: Option<Selector>,
    /// The mode of every port.
    pub(super) mtls: Option<Mtls>,
    /// The mode of single ports; only together with a selector.
    pub(super) port_level_mtls: BTreeMap<String, Mtls>,
}

/// A workload selector.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Selector {
    /// Labels that all have to be there.
    pub(super) match_labels: BTreeMap<String, String>,
}

/// The mode, as it is written in a manifest.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Mtls {
    /// The mode.
    pub(super) mode: Mode,
}

/// Whether `port` of a workload in `namespace` with `labels` refuses plaintext.
///
/// The workload's own policy goes first, then its namespace's, then the mesh's; UNSET asks the next.
pub(super) fn is_strict(
    policies: &[PeerAuthentication],
    namespace: &str,
    labels: &BTreeMap<String, String>,
    port: u16,
) -> bool {
    let workload = oldest(policies, |policy| {
        policy.namespace == namespace && selects(policy, labels).unwrap_or(false)
    });
    let wide =
        |level: &str| oldest(policies, |p| p.namespace == level && selects(p, labels).is_none());
    let port = port.to_string();
    let mode = [
        workload.and_then(|policy| policy.spec.port_level_mtls.get(&port)),
        workload.and_then(|policy| policy.spec.mtls.as_ref()),
        wide(namespace).and_then(|policy| policy.spec.mtls.as_ref()),
        wide(ROOT_NAMESPACE).and_then(|policy| policy.spec.mtls.as_ref()),
    ]
    .into_iter()
    .flatten()
    .map(|mtls| mtls.mode)
    .find(|mode| *mode != Mode::Unset);
    mode == Some(Mode::Strict)
}

/// `None` if the policy has no selector; an empty one counts as none.
fn selects(policy: &PeerAuthentication, labels: &BTreeMap<String, String>) -> Option<bool> {
    let wanted = &policy.spec.selector.as_ref()?.match_labels;
    (!wanted.is_empty()).then(|| matches(wanted, labels))
}

/// Whether every wanted label is there.
pub(super) fn matches(
    wanted: &BTreeMap<String, String>,
    labels: &BTreeMap<String, String>,
) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn oldest(
    policies: &[PeerAuthentication],
    applies: impl Fn(&PeerAuthentication) -> bool,
) -> Option<&PeerAuthentication> {
    policies
        .iter()
        .filter(|policy| applies(policy))
        .min_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(namespace: &str, name: &str, spec: &str) -> PeerAuthentication {
        PeerAuthentication {
            namespace: namespace.into(),
            name: name.into(),
            created: String::new(),
            spec: serde_saphyr::from_str(spec).unwrap(),
        }
    }

    fn strict(policies: &[PeerAuthentication], port: u16) -> bool {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        is_strict(policies, "shop", &labels, port)
    }

    const STRICT: &str = "mtls: {mode: STRICT}";
    const PERMISSIVE: &str = "mtls: {mode: PERMISSIVE}";
    const WEB: &str = "selector: {matchLabels: {app: web}}";

    #[test]
    fn nothing_said_is_permissive() {
        assert!(!strict(&[], 80));
        assert!(!strict(&[policy("shop", "a", "{}")], 80));
        assert!(!strict(&[policy("shop", "a", "mtls: {mode: DISABLE}")], 80));
    }

    #[test]
    fn the_narrowest_policy_that_says_something_wins() {
        let mesh = policy(ROOT_NAMESPACE, "default", STRICT);
        let namespace = policy("shop", "default", PERMISSIVE);
        let workload = policy("shop", "web", &format!("{{{WEB}, {STRICT}}}"));
        let unset = policy("shop", "web", &format!("{{{WEB}, mtls: {{mode: UNSET}}}}"));
        assert!(strict(std::slice::from_ref(&mesh), 80));
        assert!(!strict(&[mesh.clone(), namespace.clone()], 80));
        assert!(strict(&[mesh.clone(), namespace.clone(), workload], 80));
        assert!(!strict(&[mesh.clone(), namespace, unset.clone()], 80));
        assert!(strict(&[mesh, unset], 80));
    }

    #[test]
    fn other_namespaces_and_other_workloads_are_not_concerned() {
        assert!(!strict(&[policy("bank", "default", STRICT)], 80));
        let other = "{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}}";
        assert!(!strict(&[policy("shop", "db", other)], 80));
        let in_root = format!("{{{WEB}, {STRICT}}}");
        assert!(!strict(&[policy(ROOT_NAMESPACE, "web", &in_root)], 80));
    }

    #[test]
    fn a_port_can_differ_from_its_workload() {
        let spec = format!("{{{WEB}, {STRICT}, portLevelMtls: {{8080: {{mode: PERMISSIVE}}}}}}");
        let policies = [policy("shop", "web", &spec)];
        assert!(strict(&policies, 80));
        assert!(!strict(&policies, 8080));
    }

    #[test]
    fn the_oldest_of_two_policies_of_one_level_wins() {
        let mut newer = policy("shop", "a", STRICT);
        newer.created = "2026-02-01T00:00:00Z".into();
        let mut older = policy("shop", "b", PERMISSIVE);
        older.created = "2026-01-01T00:00:00Z".into();
        assert!(!strict(&[newer, older], 80));
    }
}
