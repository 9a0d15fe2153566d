//! What the agent counts and measures, for Prometheus.
//!
//! Names and units follow Prometheus' conventions; the README lists them. What the kernel and the
//! pods' tasks know is read when somebody asks ([`Metrics::update`]), the rest is counted as it
//! happens.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

use crate::output::PodStatus;

/// The content type of [`Metrics::encode`]. Source: OpenMetrics 1.0.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PodLabels {
    state: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabels {
    verdict: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DriftLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CniLabels {
    operation: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabels {
    resource: &'static str,
}

/// Every metric of the agent; clones share them.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    pods: Family<PodLabels, Gauge>,
    connections: Family<VerdictLabels, Counter>,
    seen: Arc<Mutex<Seen>>,
    enrolment: Histogram,
    drift: Family<DriftLabels, Counter>,
    failures: Counter,
    zds_connections: Gauge,
    kubelet_followed: Gauge,
    cni_requests: Family<CniLabels, Counter>,
    cni_duration: Family<CniLabels, Histogram>,
    watch_errors: Family<ResourceLabels, Counter>,
}

/// The kernel's counters as they were last read, by pod and name. A pod's go with the pod, and a
/// metric must not fall.
type Seen = BTreeMap<(String, String), u64>;

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("redirect");
        let pods = Family::default();
        let connections = Family::default();
        // 10 ms to 40 s: an enrolment takes some tenths of a second.
        let enrolment = Histogram::new(exponential_buckets(0.01, 2.0, 13));
        let drift = Family::default();
        let failures = Counter::default();
        let zds_connections = Gauge::default();
        let kubelet_followed = Gauge::default();
        let cni_requests = Family::default();
        // 10 ms to 40 s, too.
        let cni_duration = Family::<CniLabels, Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(0.01, 2.0, 13))
        });
        let watch_errors = Family::default();
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The agent's version", version);
        registry.register("pods", "Pods of this node, by where they are and why", pods.clone());
        registry.register(
            "connections",
            "Connections of pods in the mesh, by what the datapath did with them",
            connections.clone(),
        );
        registry.register_with_unit(
            "enrolment_duration",
            "Time from the decision that a pod is in the mesh until its connections are redirected",
            Unit::Seconds,
            enrolment.clone(),
        );
        registry.register(
            "drift",
            "Things of a pod that were found missing in the kernel and were repaired, by kind",
            drift.clone(),
        );
        registry.register(
            "reconcile_failures",
            "Steps of a pod that failed and are tried again",
            failures.clone(),
        );
        registry.register(
            "zds_connections",
            "Proxies connected to the ZDS socket",
            zds_connections.clone(),
        );
        registry.register(
            "kubelet_followed",
            "1 while kubelet's probes are told by its cgroup, else 0",
            kubelet_followed.clone(),
        );
        registry.register(
            "cni_requests",
            "Requests of the CNI plugin, by operation and result",
            cni_requests.clone(),
        );
        registry.register_with_unit(
            "cni_request_duration",
            "How long the CNI plugin waited for the answer, by operation and result",
            Unit::Seconds,
            cni_duration.clone(),
        );
        registry.register(
            "watch_errors",
            "Errors of the watches on the API server, by resource",
            watch_errors.clone(),
        );
        Self {
            registry: Arc::new(registry),
            pods,
            connections,
            seen: Arc::default(),
            enrolment,
            drift,
            failures,
            zds_connections,
            kubelet_followed,
            cni_requests,
            cni_duration,
            watch_errors,
        }
    }
}

impl Metrics {
    /// A pod's connections are redirected, so long after that was decided.
    pub fn enrolled(&self, took: Duration) {
        self.enrolment.observe(took.as_secs_f64());
    }

    /// Something of a pod was missing in the kernel: a `dataplane::Part`'s kind.
    pub fn drifted(&self, kind: &'static str) {
        self.drift.get_or_create(&DriftLabels { kind }).inc();
    }

    /// A step of a pod failed.
    pub fn failed(&self) {
        self.failures.inc();
    }

    /// The CNI plugin asked for `operation` (`add`), and got it or did not, after so long.
    pub fn cni_request(&self, operation: &'static str, granted: bool, took: Duration) {
        let result = if granted { "success" } else { "failure" };
        let labels = CniLabels { operation, result };
        self.cni_requests.get_or_create(&labels).inc();
        self.cni_duration.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// The watch of a resource (`pods`, `namespaces`) failed and is started again.
    pub fn watch_error(&self, resource: &'static str) {
        self.watch_errors.get_or_create(&ResourceLabels { resource }).inc();
    }

    /// Takes over what is true now of the pods, the proxies and kubelet.
    pub fn update(&self, pods: &[PodStatus], proxies: usize, follows_kubelet: bool) {
        self.kubelet_followed.set(i64::from(follows_kubelet));
        self.zds_connections.set(i64::try_from(proxies).unwrap_or(i64::MAX));
        // One scrape at a time: the pods are counted anew.
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        self.pods.clear();
        let before = std::mem::take(&mut *seen);
        for pod in pods {
            let (state, reason) = (pod.state.as_str(), pod.reason.as_str());
            self.pods.get_or_create(&PodLabels { state, reason }).inc();
            for (verdict, &now) in &pod.counters {
                let key = (pod.uid.clone(), verdict.clone());
                let old = before.get(&key).copied().unwrap_or_default();
                // A pod that left the mesh and came back counts from 0.
                let new = now.checked_sub(old).unwrap_or(now);
                let labels = VerdictLabels { verdict: verdict.clone() };
                self.connections.get_or_create(&labels).inc_by(new);
                seen.insert(key, now);
            }
        }
    }

    /// All metrics, in OpenMetrics' text format.
    ///
    /// # Errors
    ///
    /// Never in practice: when text cannot express them.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{membership::Reason, output::PodState};

    fn pod(uid: &str, state: PodState, reason: Reason, redirected: u64) -> PodStatus {
        PodStatus {
            namespace: "shop".to_owned(),
            name: uid.to_owned(),
            uid: uid.to_owned(),
            ips: Vec::new(),
            state,
            reason,
            message: None,
            overridden: None,
            traffic: None,
            netns: None,
            kernel: None,
            counters: BTreeMap::from([("redirected_outbound".to_owned(), redirected)]),
        }
    }

    fn assert_has(metrics: &Metrics, line: &str) {
        let text = metrics.encode().unwrap();
        assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
    }

    #[test]
    fn counters_do_not_fall_when_a_pod_goes_or_starts_anew() {
        let metrics = Metrics::default();
        let enrolled = |uid, n| pod(uid, PodState::Enrolled, Reason::PodLabelAmbient, n);
        metrics.update(&[enrolled("u-1", 5), enrolled("u-2", 1)], 1, true);
        assert_has(&metrics, r#"redirect_connections_total{verdict="redirected_outbound"} 6"#);
        assert_has(&metrics, r#"redirect_pods{state="enrolled",reason="pod-label-ambient"} 2"#);
        metrics.update(&[enrolled("u-1", 7)], 1, true);
        assert_has(&metrics, r#"redirect_connections_total{verdict="redirected_outbound"} 8"#);
        metrics.update(&[enrolled("u-1", 2)], 0, true);
        assert_has(&metrics, r#"redirect_connections_total{verdict="redirected_outbound"} 10"#);
        assert_has(&metrics, "redirect_zds_connections 0");
        assert_has(&metrics, "redirect_kubelet_followed 1");
        metrics.update(&[pod("u-1", PodState::Bypassing, Reason::NotLabelled, 2)], 0, true);
        assert_has(&metrics, r#"redirect_pods{state="bypassing",reason="not-labelled"} 1"#);
        assert!(!metrics.encode().unwrap().contains(r#"state="enrolled""#));
    }

    #[test]
    fn what_happens_is_counted_under_its_kind() {
        let metrics = Metrics::default();
        metrics.drifted("rule");
        metrics.cni_request("add", true, Duration::from_millis(40));
        metrics.cni_request("add", false, Duration::from_secs(25));
        metrics.watch_error("pods");
        metrics.enrolled(Duration::from_millis(300));
        metrics.failed();
        assert_has(&metrics, r#"redirect_drift_total{kind="rule"} 1"#);
        assert_has(&metrics, r#"redirect_cni_requests_total{operation="add",result="success"} 1"#);
        assert_has(&metrics, r#"redirect_cni_requests_total{operation="add",result="failure"} 1"#);
        assert_has(
            &metrics,
            r#"redirect_cni_request_duration_seconds_count{operation="add",result="failure"} 1"#,
        );
        assert_has(&metrics, r#"redirect_watch_errors_total{resource="pods"} 1"#);
        assert_has(&metrics, "redirect_enrolment_duration_seconds_count 1");
        assert_has(&metrics, "redirect_reconcile_failures_total 1");
    }
}
