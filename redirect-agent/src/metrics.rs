//! What the agent counts and measures, for Prometheus.
//!
//! Names and units follow Prometheus' conventions; docs/metrics.md lists them. What the kernel and the
//! pods' tasks know is read when somebody asks ([`Metrics::report`]), the rest is counted as it
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

use redirect_ebpf::abi;

use crate::{dataplane::PartKind, output::PodStatus};

/// The content type of [`Metrics::report`]. Source: OpenMetrics 1.0.
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
    reporting: Arc<Mutex<()>>,
    enrollment: Histogram,
    drift: Family<DriftLabels, Counter>,
    failures: Counter,
    zds_connections: Gauge,
    proxy_cgroup_known: Gauge,
    kubelet_followed: Gauge,
    istio_cni_pods: Gauge,
    cni_requests: Family<CniLabels, Counter>,
    cni_duration: Family<CniLabels, Histogram>,
    watch_errors: Family<ResourceLabels, Counter>,
}

/// What is true when the metrics are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Now<'a> {
    /// Every pod.
    pub pods: &'a [PodStatus],
    /// What was counted for all pods, those that are gone too: see [`Dataplane::totals`].
    ///
    /// [`Dataplane::totals`]: crate::dataplane::Dataplane::totals
    pub totals: &'a BTreeMap<&'static str, u64>,
    /// How many proxies are connected.
    pub proxies: usize,
    /// Whether the connected proxies are told by their cgroups, too, and not by their mark alone.
    pub proxys_cgroup: bool,
    /// Whether kubelet's probes are told by its cgroup.
    pub follows_kubelet: bool,
    /// How many pods are left alone because istio-cni redirects them.
    pub left_alone: usize,
}

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
        // 10 ms to 40 s: an enrollment takes some tenths of a second.
        let enrollment = Histogram::new(exponential_buckets(0.01, 2.0, 13));
        let drift = Family::default();
        let failures = Counter::default();
        let zds_connections = Gauge::default();
        let proxy_cgroup_known = Gauge::default();
        let kubelet_followed = Gauge::default();
        let istio_cni_pods = Gauge::default();
        let cni_requests = Family::default();
        // 10 ms to 40 s, too.
        let cni_duration = Family::<CniLabels, Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(0.01, 2.0, 13))
        });
        let watch_errors = Family::default();
        start_at_zero(&connections, &drift, &cni_requests, &watch_errors);
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The agent's version", version);
        registry.register("pods", "Pods of this node, by state and reason", pods.clone());
        registry.register(
            "connections",
            "Connections of pods in the mesh, by the datapath's verdict",
            connections.clone(),
        );
        registry.register_with_unit(
            "enrollment_duration",
            "Time from the decision to enroll a pod until its connections are redirected",
            Unit::Seconds,
            enrollment.clone(),
        );
        registry.register(
            "drift",
            "Parts of a pod's redirection that were missing in the kernel and were put back, by kind",
            drift.clone(),
        );
        registry.register(
            "reconcile_failures",
            "Steps for a pod that failed and were retried",
            failures.clone(),
        );
        registry.register(
            "zds_connections",
            "Proxies connected to the ZDS socket",
            zds_connections.clone(),
        );
        registry.register(
            "proxy_cgroup_known",
            "1 while the proxy's sockets are recognized by their mark and cgroup, 0 while by their mark alone",
            proxy_cgroup_known.clone(),
        );
        registry.register(
            "kubelet_followed",
            "1 while kubelet's probes are recognized by its cgroup, else 0",
            kubelet_followed.clone(),
        );
        registry.register(
            "istio_cni_pods",
            "Pods that are left alone because istio-cni redirects them",
            istio_cni_pods.clone(),
        );
        registry.register(
            "cni_requests",
            "Requests of the CNI plugin, by operation and result",
            cni_requests.clone(),
        );
        registry.register_with_unit(
            "cni_request_duration",
            "How long the CNI plugin waited for an answer, by operation and result",
            Unit::Seconds,
            cni_duration.clone(),
        );
        registry.register(
            "watch_errors",
            "Failures of the watches on the API server, by resource",
            watch_errors.clone(),
        );
        Self {
            registry: Arc::new(registry),
            pods,
            connections,
            reporting: Arc::default(),
            enrollment,
            drift,
            failures,
            zds_connections,
            proxy_cgroup_known,
            kubelet_followed,
            istio_cni_pods,
            cni_requests,
            cni_duration,
            watch_errors,
        }
    }
}

/// Every series whose labels are known beforehand, at 0. A counter whose first sample is 1 would not be an
/// increase to Prometheus, so an alert would miss the first event.
fn start_at_zero(
    connections: &Family<VerdictLabels, Counter>,
    drift: &Family<DriftLabels, Counter>,
    cni_requests: &Family<CniLabels, Counter>,
    watch_errors: &Family<ResourceLabels, Counter>,
) {
    for (_, verdict) in abi::Counter::ALL {
        drop(connections.get_or_create(&VerdictLabels { verdict: verdict.to_owned() }));
    }
    for kind in PartKind::ALL {
        drop(drift.get_or_create(&DriftLabels { kind: kind.as_str() }));
    }
    for result in ["success", "failure"] {
        drop(cni_requests.get_or_create(&CniLabels { operation: "add", result }));
    }
    for resource in ["pods", "namespaces"] {
        drop(watch_errors.get_or_create(&ResourceLabels { resource }));
    }
}

impl Metrics {
    /// A pod's connections are redirected, so long after that was decided.
    pub fn enrolled(&self, took: Duration) {
        self.enrollment.observe(took.as_secs_f64());
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

    /// All metrics, in OpenMetrics' text format, with what is true now of the pods, the proxies and kubelet.
    ///
    /// # Errors
    ///
    /// Never in practice: when text cannot express them.
    pub fn report(&self, now: &Now<'_>) -> Result<String, fmt::Error> {
        self.proxy_cgroup_known.set(i64::from(now.proxys_cgroup));
        self.kubelet_followed.set(i64::from(now.follows_kubelet));
        self.zds_connections.set(i64::try_from(now.proxies).unwrap_or(i64::MAX));
        self.istio_cni_pods.set(i64::try_from(now.left_alone).unwrap_or(i64::MAX));
        // One report at a time, to its end: the pods are counted anew.
        let _reporting = self.reporting.lock().unwrap_or_else(PoisonError::into_inner);
        self.pods.clear();
        for pod in now.pods {
            let (state, reason) = (pod.state.as_str(), pod.reason.as_str());
            self.pods.get_or_create(&PodLabels { state, reason }).inc();
        }
        for (verdict, total) in now.totals {
            let labels = VerdictLabels { verdict: (*verdict).to_owned() };
            let counter = self.connections.get_or_create(&labels);
            // A metric must not fall.
            counter.inc_by(total.saturating_sub(counter.get()));
        }
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{membership::Reason, output::PodState};

    fn pod(uid: &str, state: PodState, reason: Reason) -> PodStatus {
        PodStatus {
            namespace: "shop".to_owned(),
            name: uid.to_owned(),
            uid: uid.to_owned(),
            ips: Vec::new(),
            state,
            since: None,
            reason,
            message: None,
            overridden: None,
            traffic: None,
            netns: uid.strip_prefix("u-").and_then(|number| number.parse().ok()),
            kernel: None,
            counters: BTreeMap::new(),
        }
    }

    fn report(metrics: &Metrics, pods: &[PodStatus], redirected: u64) -> String {
        let now = Now {
            pods,
            totals: &BTreeMap::from([("redirected_outbound", redirected)]),
            proxies: pods.len(),
            proxys_cgroup: true,
            follows_kubelet: true,
            left_alone: 0,
        };
        metrics.report(&now).unwrap()
    }

    #[track_caller]
    fn assert_has(text: &str, line: &str) {
        assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
    }

    fn total(n: u64) -> String {
        format!(r#"redirect_connections_total{{verdict="redirected_outbound"}} {n}"#)
    }

    #[test]
    fn pods_are_counted_anew_and_connections_never_fall() {
        let metrics = Metrics::default();
        let enrolled = |uid| pod(uid, PodState::Enrolled, Reason::PodLabelAmbient);
        let text = report(&metrics, &[enrolled("u-1"), enrolled("u-2")], 6);
        assert_has(&text, &total(6));
        assert_has(&text, r#"redirect_pods{state="enrolled",reason="pod-label-ambient"} 2"#);
        assert_has(&text, "redirect_zds_connections 2");
        assert_has(&text, "redirect_kubelet_followed 1");
        assert_has(&report(&metrics, &[enrolled("u-1")], 8), &total(8));
        let bypasses = pod("u-1", PodState::Bypassing, Reason::NotLabeled);
        let text = report(&metrics, &[bypasses], 7);
        assert_has(&text, &total(8));
        assert_has(&text, r#"redirect_pods{state="bypassing",reason="not-labeled"} 1"#);
        assert!(!text.contains(r#"state="enrolled""#));
    }

    #[test]
    fn what_may_happen_is_there_at_zero_before_it_does() {
        let text = report(&Metrics::default(), &[], 0);
        for (_, verdict) in abi::Counter::ALL {
            assert_has(&text, &format!(r#"redirect_connections_total{{verdict="{verdict}"}} 0"#));
        }
        assert_has(&text, r#"redirect_drift_total{kind="tcx"} 0"#);
        assert_has(&text, r#"redirect_cni_requests_total{operation="add",result="failure"} 0"#);
        assert_has(&text, r#"redirect_watch_errors_total{resource="namespaces"} 0"#);
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
        let text = report(&metrics, &[], 0);
        assert_has(&text, r#"redirect_drift_total{kind="rule"} 1"#);
        assert_has(&text, r#"redirect_cni_requests_total{operation="add",result="success"} 1"#);
        assert_has(&text, r#"redirect_cni_requests_total{operation="add",result="failure"} 1"#);
        assert_has(
            &text,
            r#"redirect_cni_request_duration_seconds_count{operation="add",result="failure"} 1"#,
        );
        assert_has(&text, r#"redirect_watch_errors_total{resource="pods"} 1"#);
        assert_has(&text, "redirect_enrollment_duration_seconds_count 1");
        assert_has(&text, "redirect_reconcile_failures_total 1");
    }
}
