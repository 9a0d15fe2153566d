//! Our entry in the node's CNI configuration. The installer writes it, and the plugin reads it.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use super::request::DEFAULT_SOCKET;
use crate::membership::{DEFAULT_EXCLUDED_NAMESPACE, check_namespace_name, is_dns_subdomain};

/// The plugin's name: the entry's `type`, and that of its program.
pub const PLUGIN: &str = "redirect-cni";

/// The versions of the CNI specification that the plugin supports, oldest first: all that have chains.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// How long the plugin tries to reach the agent, unless the entry says otherwise, in seconds.
const DEFAULT_TIMEOUT: u32 = 30;
/// The longest that an entry may let a pod wait: runtimes give up after some minutes.
pub const LONGEST_TIMEOUT: u32 = 240;
/// How much longer than the agent the plugin waits, so that it gets the agent's answer.
const MARGIN: Duration = Duration::from_secs(5);

/// The entry. Missing fields have their defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Entry {
    /// [`PLUGIN`].
    #[serde(rename = "type")]
    pub plugin: String,
    /// Where the agent listens.
    pub socket: PathBuf,
    /// Pods of these namespaces start without asking the agent.
    pub exclude_namespaces: Vec<String>,
    /// The agent's own pods, which start without asking it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub daemon_set: Option<DaemonSet>,
    /// How many seconds the agent may be away or busy.
    pub timeout_seconds: u32,
    /// The file with a single network that this list replaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replaces: Option<String>,
}

impl Default for Entry {
    fn default() -> Self {
        Entry {
            plugin: PLUGIN.to_owned(),
            socket: DEFAULT_SOCKET.into(),
            exclude_namespaces: vec![DEFAULT_EXCLUDED_NAMESPACE.to_owned()],
            daemon_set: None,
            timeout_seconds: DEFAULT_TIMEOUT,
            replaces: None,
        }
    }
}

impl Entry {
    /// An entry for an agent that lets a pod wait at most this long.
    pub fn for_an_agent_that_waits(timeout: Duration) -> Self {
        let seconds = u32::try_from(timeout.saturating_add(MARGIN).as_secs());
        let timeout_seconds = seconds.unwrap_or(LONGEST_TIMEOUT).min(LONGEST_TIMEOUT);
        Entry { timeout_seconds, ..Entry::default() }
    }

    /// Whether a pod starts without asking the agent.
    pub fn passes(&self, namespace: &str, pod: &str) -> bool {
        self.exclude_namespaces.iter().any(|excluded| excluded == namespace)
            || self.daemon_set.as_ref().is_some_and(|agent| agent.owns(namespace, pod))
    }
}

/// The DaemonSet that runs the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DaemonSet {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl DaemonSet {
    /// Whether a pod is named like this DaemonSet's pods: its name, `-`, and five letters and digits. Source:
    /// Kubernetes `staging/src/k8s.io/apiserver/pkg/storage/names/generate.go`.
    fn owns(&self, namespace: &str, pod: &str) -> bool {
        let suffix = pod.strip_prefix(&self.name).and_then(|rest| rest.strip_prefix('-'));
        namespace == self.namespace
            && suffix.is_some_and(|suffix| {
                suffix.len() == 5
                    && suffix.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
            })
    }
}

impl fmt::Display for DaemonSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for DaemonSet {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('/') {
            Some((namespace, name))
                if check_namespace_name(namespace).is_ok() && is_dns_subdomain(name) =>
            {
                Ok(DaemonSet { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("give the DaemonSet as NAMESPACE/NAME, and not as {s:?}")),
        }
    }
}

crate::text::by_text!(DaemonSet);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_is_read_back_as_it_was_written_and_has_defaults() {
        let entry = Entry {
            exclude_namespaces: vec!["kube-system".into(), "other".into()],
            daemon_set: Some("istio-system/redirect-agent".parse().unwrap()),
            timeout_seconds: 5,
            replaces: Some("10-net.conf".into()),
            ..Entry::default()
        };
        let text = serde_json::to_string(&entry).unwrap();
        assert_eq!(
            text,
            r#"{"type":"redirect-cni","socket":"/var/run/istio-cni/pluginevent.sock","excludeNamespaces":["kube-system","other"],"daemonSet":"istio-system/redirect-agent","timeoutSeconds":5,"replaces":"10-net.conf"}"#
        );
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry);
        assert_eq!(serde_json::from_str::<Entry>("{}").unwrap(), Entry::default());
        for wrong in ["", "redirect-agent", "a/", "/b", "a/b/c", "A/b", "a/-b"] {
            assert!(wrong.parse::<DaemonSet>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_agents_own_pods_and_those_of_excluded_namespaces_pass() {
        let entry = Entry {
            daemon_set: Some("istio-system/redirect-agent".parse().unwrap()),
            ..Entry::default()
        };
        for (namespace, pod, passes) in [
            ("kube-system", "coredns-1", true),
            ("istio-system", "redirect-agent-x2v9k", true),
            ("istio-system", "redirect-agent", false),
            ("istio-system", "redirect-agent-x2v9k-1", false),
            ("istio-system", "redirect-agentx2v9k", false),
            ("istio-system", "redirect-agent-X2V9K", false),
            ("istio-system", "ztunnel-x2v9k", false),
            ("shop", "redirect-agent-x2v9k", false),
        ] {
            assert_eq!(entry.passes(namespace, pod), passes, "{namespace}/{pod}");
        }
        assert!(!Entry::default().passes("istio-system", "redirect-agent-x2v9k"));
    }
}
