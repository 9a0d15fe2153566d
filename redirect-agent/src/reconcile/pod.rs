//! The task of one pod.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Result, anyhow};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{
    Shared, Target, View, Wanted, blocking,
    plan::{Standing, Step, Wish, steps},
    steps::workload,
};
use crate::{
    cni::records::Sandbox,
    dataplane::{PodNetns, Watch},
    membership::{Pod, PodKey},
    source::{Event, EventKind, Source},
    traffic::Traffic,
};

/// How often, at least, the agent checks that the network namespace is still the pod's.
const LOOK: Duration = Duration::from_secs(5);
/// The first pause before a failed step is retried. It doubles each time, up to the longest.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// The number of failures in a row after which an Event is written: much of what is missing while a pod
/// starts appears a moment later.
const FAILURES_TO_TELL: u32 = 3;
/// The message for a pod in the mesh that istio-cni redirects, too.
const ISTIO_CNI_BESIDE: &str =
    "istio-cni's rules are in this pod, too: remove them with `redirect-agent takeover`";
/// The message for a static pod while it has no mirror.
const MIRROR_GONE: &str = "its mirror pod was deleted; it stays as it is while it runs";
/// One pod, from the moment it is known until it is gone: its desired state, and those facts that cannot be
/// read back.
pub(super) struct PodTask<S> {
    pub(super) shared: Arc<Shared<S>>,
    pub(super) key: PodKey,
    wanted: watch::Receiver<Wanted>,
    proxies: watch::Receiver<u64>,
    pub(super) pod: Pod,
    /// What CNI reported about its sandbox.
    sandbox: Option<Arc<Sandbox>>,
    /// What its annotations last asked for, as far as they could be parsed.
    traffic: Option<Traffic>,
    /// What is wrong with its annotations.
    misread: Vec<String>,
    /// The pod is gone, and leaves the mesh whatever was decided for it.
    gone: bool,
    /// The last observed state.
    pub(super) standing: Standing,
    pub(super) netns: Option<Arc<PodNetns>>,
    /// Whether its namespace is gone and no other has been found since.
    pub(super) lost: bool,
    /// Watches the namespace while the pod is in the mesh, or should be.
    pub(super) network: Option<Watch>,
    /// Whether the pod was in its desired state, which has not changed since. Whatever differs now was
    /// changed by others.
    pub(super) settled: bool,
    /// Whether it is left alone because istio-cni redirects it.
    pub(super) left_alone: bool,
    /// Whether the pod has istio-cni's rules as well as ours.
    pub(super) beside: bool,
    /// The pod id whose row in the map `pods` says why the pod bypasses.
    pub(super) noted: Option<u32>,
    /// The proxy's ports on which it does not listen in the pod, as text.
    pub(super) deaf: Option<String>,
    /// That, as it was last logged.
    pub(super) told_deaf: Option<String>,
    pub(super) problem: Option<String>,
    /// Whether the problem is a failure, rather than something that the agent waits for.
    failing: bool,
    /// How many steps have failed since the last one that succeeded.
    failures: u32,
    /// The problem that was last written as an Event.
    told: Option<String>,
    /// Since when the pod should have been in the mesh.
    pub(super) enrolling: Option<Instant>,
    /// Until when a leaving pod may have redirected connections.
    pub(super) leaves_by: Option<Instant>,
    /// When a leaving pod's peers should know that it leaves.
    pub(super) heard_by: Option<Instant>,
    /// Whether the agent has tried to bring the pod to its desired state.
    tried: bool,
}

/// What ends a pause.
enum Woken {
    /// The desired state changed.
    Wanted,
    /// The sender is gone: the agent is stopping, and leaves everything as it is.
    Stopped,
    /// A proxy opened listeners.
    Proxy,
    /// Something has changed in the pod's network namespace.
    Network,
    /// The time is up.
    Time,
}

impl<S: Source> PodTask<S> {
    pub(super) fn new(
        shared: Arc<Shared<S>>,
        wanted: watch::Receiver<Wanted>,
        proxies: watch::Receiver<u64>,
        Target { pod, sandbox, .. }: Target,
    ) -> Self {
        Self {
            shared,
            key: pod.key.clone(),
            wanted,
            proxies,
            pod,
            sandbox,
            traffic: None,
            misread: Vec::new(),
            gone: false,
            standing: Standing::default(),
            netns: None,
            lost: false,
            network: None,
            settled: false,
            left_alone: false,
            beside: false,
            noted: None,
            deaf: None,
            told_deaf: None,
            problem: None,
            failing: false,
            failures: 0,
            told: None,
            enrolling: None,
            leaves_by: None,
            heard_by: None,
            tried: false,
        }
    }

    pub(super) fn key(&self) -> &PodKey {
        &self.key
    }

    pub(super) fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Introduces the pod to the ZDS server, which must know every pod that is in the mesh, or on its way
    /// out, before it serves the first proxy: the proxy would close the connections of any other pod.
    pub(super) async fn introduce(&mut self) {
        if let Err(e) = self.try_introduce().await {
            self.failing = true;
            warn!(pod = %self.key, "{e:#}");
            self.problem = Some(format!("{e:#}"));
        }
        self.show();
    }

    async fn try_introduce(&mut self) -> Result<()> {
        self.settle_wish();
        let observed = self.observe().await;
        if self.wish() == Wish::Enrolled || self.standing.present {
            if self.netns.is_some() {
                self.offer().await?;
            } else {
                // The proxy may still serve it, and must not stop because of us.
                self.shared.zds.keep(workload(&self.pod))?;
            }
        }
        observed.map(drop)
    }

    /// Runs until the pod is gone and everything is cleaned up, or until the agent stops.
    pub(super) async fn run(mut self) {
        let mut retry = RETRY_FIRST;
        let verify_interval = self.shared.settings.verify_interval;
        loop {
            self.wanted.mark_unchanged();
            let told = self.settle_wish();
            if told && (self.netns.is_none() || !self.netns_stands().await) {
                // CNI has reported another sandbox.
                self.lose_netns().await;
            }
            if self.wanted.borrow().is_none() || self.is_gone_with_its_mirror().await {
                self.bury().await;
                return;
            }
            let round = self.round().await;
            if self.wanted.borrow().is_none() {
                continue;
            }
            let calm = matches!(round, Ok(true));
            let pause = match round {
                Ok(true) => {
                    retry = RETRY_FIRST;
                    (self.problem, self.failing) = (None, false);
                    (self.failures, self.told) = (0, None);
                    self.settled = true;
                    LOOK.min(verify_interval)
                }
                Ok(false) => {
                    self.failing = false;
                    LOOK.min(verify_interval)
                }
                Err(e) => {
                    self.fail(&e);
                    let pause = retry;
                    retry = RETRY_LONGEST.min(retry * 2);
                    pause
                }
            };
            self.tried = true;
            self.show();
            let verify = Instant::now() + verify_interval;
            loop {
                match self.wait(Instant::now() + pause).await {
                    Woken::Wanted => {
                        // More may be possible now, and whoever waits for it should not wait long.
                        retry = RETRY_FIRST;
                        self.settled = false;
                        break;
                    }
                    Woken::Stopped => return,
                    Woken::Proxy | Woken::Network => break,
                    Woken::Time
                        if calm && Instant::now() < verify && self.is_where_it_was().await => {}
                    Woken::Time => break,
                }
            }
        }
    }

    /// Observes the pod, takes the steps that lead to the desired state, and observes again, until the pod is
    /// there (`true`), or until it has to wait for somebody else (`false`).
    async fn round(&mut self) -> Result<bool> {
        let mut before = Vec::new();
        loop {
            if !self.observe().await? {
                return Ok(false);
            }
            if !self.gone && self.wanted.borrow().is_none() {
                // How a pod that is gone leaves is not decided here.
                return Ok(false);
            }
            if self.wish() == Wish::Enrolled {
                (self.leaves_by, self.heard_by) = (None, None);
            }
            let mut steps = steps(self.wish(), &self.standing);
            if self.gone {
                // A pod that is gone needs no row.
                steps.retain(|step| *step != Step::Note);
            }
            // Steps whose result cannot be observed at once: the pod has no namespace yet, or its object is
            // gone.
            let unseen = |step: &Step| matches!(step, Step::Note | Step::Publish | Step::Retract);
            if steps.is_empty() || before == steps && steps.iter().all(unseen) {
                return Ok(true);
            }
            if before == steps {
                return Err(anyhow!("what was put right is wrong again; next would be {steps:?}"));
            }
            self.show();
            before.clone_from(&steps);
            for step in &steps {
                let taken = self.take(*step).await;
                let half_captured = self.standing.captured && steps.contains(&Step::Capture);
                if *step == Step::Prepare && taken.is_err() && half_captured {
                    // What cannot be repaired keeps nothing else from being repaired.
                    self.take(Step::Capture).await?;
                }
                if !taken? {
                    return Ok(false);
                }
                if self.is_interrupted() {
                    if self.shared.stop.is_cancelled() {
                        return Ok(false);
                    }
                    self.wanted.mark_unchanged();
                    self.settle_wish();
                    before.clear();
                    break;
                }
            }
        }
    }

    /// Whether the desired state has changed, or the agent is stopping.
    pub(super) fn is_interrupted(&self) -> bool {
        // A pod that is gone gets no more updates.
        let told = !self.gone && self.wanted.has_changed().unwrap_or(true);
        told || self.shared.stop.is_cancelled()
    }

    fn fail(&mut self, error: &anyhow::Error) {
        let problem = format!("{error:#}");
        self.shared.metrics.failed();
        // What a terminating pod lacks will not come back.
        if self.problem.as_ref() != Some(&problem) && !self.pod.deleting {
            warn!(pod = %self.key, "{problem}");
        }
        self.failures = self.failures.saturating_add(1);
        let lasts = self.failures >= FAILURES_TO_TELL && !self.pod.deleting;
        if lasts && self.told.as_ref() != Some(&problem) {
            self.record(EventKind::EnrollmentFailed, problem.clone());
            self.told = Some(problem.clone());
        }
        (self.problem, self.failing) = (Some(problem), true);
    }

    /// A cheap check, made often for every pod.
    async fn is_where_it_was(&self) -> bool {
        if self.netns.is_some() {
            self.netns_stands().await
        } else {
            // Its namespace may have appeared.
            self.standing.noted && (self.noted.is_some() || !self.has_own_netns())
        }
    }

    /// The pod is gone from the source. If its namespace still exists and the pod was not deleted, it leaves
    /// the mesh in order. After that, nothing about it is kept.
    async fn bury(&mut self) {
        self.gone = true;
        let stands = self.netns_stands().await;
        let captured = self.observe().await.is_err() || self.standing.captured;
        if stands && self.shared.source.gone_is_deleted() && captured {
            // Its containers have ended, unless it was deleted by force. What still runs then must not
            // continue in plaintext.
            info!(pod = %self.key, "deleted; what still runs of it is refused");
            self.let_go().await;
        } else {
            let mut retry = RETRY_FIRST;
            while let Err(e) = self.round().await {
                warn!(pod = %self.key, "{e:#}");
                if let Woken::Stopped = self.wait(Instant::now() + retry).await {
                    return;
                }
                retry = RETRY_LONGEST.min(retry * 2);
            }
        }
        let noted = self.noted.take();
        let dataplane = Arc::clone(&self.shared.dataplane);
        let deleted =
            blocking(move || noted.map_or(Ok(()), |pod_id| dataplane.delete_bypass(pod_id)));
        if let Err(e) = deleted.await {
            warn!(pod = %self.key, "{e:#}");
        }
    }

    async fn wait(&mut self, until: Instant) -> Woken {
        tokio::select! {
            () = self.shared.stop.cancelled() => Woken::Stopped,
            // A pod that is gone gets no more updates.
            Ok(()) = self.wanted.changed() => Woken::Wanted,
            Ok(()) = self.proxies.changed() => Woken::Proxy,
            () = changed(self.network.as_mut()) => Woken::Network,
            () = sleep_until(until) => Woken::Time,
        }
    }

    fn mirror_is_gone(&self) -> bool {
        self.wanted.borrow().as_ref().is_some_and(|target| target.mirror_is_gone)
    }

    /// A static pod in the mesh whose mirror was deleted stays as long as it runs: kubelet creates a new
    /// mirror.
    async fn is_gone_with_its_mirror(&self) -> bool {
        self.mirror_is_gone() && !(self.standing.captured && self.netns_stands().await)
    }

    pub(super) fn wish(&self) -> Wish {
        let enrolled = self.wanted.borrow().as_ref().is_some_and(|target| target.decision.enrolled);
        if enrolled && !self.gone { Wish::Enrolled } else { Wish::Bypass }
    }

    /// The reason for the pod's desired state, as text.
    pub(super) fn why(&self) -> &'static str {
        self.wanted
            .borrow()
            .as_ref()
            .map_or("it is gone", |target| target.decision.reason.explain())
    }

    pub(super) fn record(&self, kind: EventKind, message: String) {
        self.shared.record(&self.pod, Event::new(kind, message));
    }

    pub(super) fn decision_code(&self) -> u32 {
        self.wanted.borrow().as_ref().map_or(0, |target| target.decision.reason.code())
    }

    /// Applies what the source now says about the pod. Returns whether CNI has reported a new sandbox since.
    fn settle_wish(&mut self) -> bool {
        let wanted = self.wanted.borrow().clone();
        let Some(Target { mut pod, sandbox, decision, .. }) = wanted else { return false };
        let told = sandbox.is_some() && sandbox != self.sandbox;
        self.sandbox = sandbox;
        if pod.is_mirror() && pod.ips.is_empty() {
            // kubelet has not reported the addresses of a new mirror yet. The sandbox is the same.
            pod.ips.clone_from(&self.pod.ips);
        }
        if pod.ips != self.pod.ips {
            self.close_netns();
        }
        if !decision.enrolled || self.standing.captured {
            self.enrolling = None;
        } else if self.enrolling.is_none() {
            self.enrolling = Some(Instant::now());
        }
        self.pod = pod;
        self.read_traffic();
        told
    }

    /// Applies what the pod's annotations now ask for.
    fn read_traffic(&mut self) {
        let settings = &self.shared.settings.traffic;
        let (traffic, misread) = settings.read(&self.pod.annotations, self.traffic.as_ref());
        if self.traffic.as_ref() != Some(&traffic) {
            if self.traffic().virtual_interfaces != traffic.virtual_interfaces {
                // The addresses of virtual interfaces are not the pod's.
                self.close_netns();
            }
            self.traffic = Some(traffic);
        }
        if self.misread != misread {
            for problem in misread.iter().filter(|problem| !self.misread.contains(problem)) {
                warn!(pod = %self.key, "{problem}; what it said before holds");
                self.record(EventKind::InvalidAnnotation, problem.clone());
            }
            self.misread = misread;
        }
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.traffic.clone().unwrap_or_default()
    }

    fn told_of_pod(&self) -> Option<String> {
        let mirror = self.mirror_is_gone().then(|| MIRROR_GONE.to_owned());
        let beside = self.beside.then(|| ISTIO_CNI_BESIDE.to_owned());
        let missing = self.missing_addresses();
        let told: Vec<String> = mirror
            .into_iter()
            .chain(missing)
            .chain(self.misread.iter().cloned())
            .chain(beside)
            .chain(self.deaf.clone())
            .collect();
        (!told.is_empty()).then(|| told.join("; "))
    }

    fn missing_addresses(&self) -> Option<String> {
        let missing: Vec<String> =
            self.netns.as_ref()?.missing(&self.pod.ips).map(|ip| ip.to_string()).collect();
        (!missing.is_empty()).then(|| {
            let missing = missing.join(", ");
            format!("no interface of the pod has its address {missing}: what is sent there does not arrive")
        })
    }

    /// Updates what `status` shows.
    fn show(&self) {
        let wanted = self.wanted.borrow().clone();
        let Some(Target { decision, .. }) = wanted else { return };
        let view = View {
            pod: self.pod.clone(),
            decision,
            standing: self.standing,
            traffic: self.traffic(),
            left_alone: self.left_alone,
            netns: self.netns.clone(),
            noted: self.noted,
            problem: self.problem.clone().or_else(|| self.told_of_pod()),
            failing: self.failing,
            degraded: self.problem.is_some()
                || self.beside
                || self.deaf.is_some()
                || self.missing_addresses().is_some(),
            tried: self.tried,
            since: SystemTime::now(),
        };
        self.shared.views.show(view, || self.wanted.borrow().is_none());
    }
}

/// Waits for a change in a network namespace, if it is watched.
async fn changed(network: Option<&mut Watch>) {
    match network {
        Some(network) => network.changed().await,
        None => std::future::pending().await,
    }
}
