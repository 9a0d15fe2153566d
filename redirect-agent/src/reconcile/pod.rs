//! The task of one pod.

use std::{sync::Arc, time::Duration};

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

/// How often a pod's network namespace is looked for where it should be, at least.
const LOOK: Duration = Duration::from_secs(5);
/// The first pause before a step that failed is tried again; it doubles each time, up to the
/// longest.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// After how many failures in a row an Event says so: much of what is missing while a pod starts is
/// there a moment later.
const FAILURES_TO_TELL: u32 = 3;
/// What is said of a pod in the mesh that istio-cni redirects, too.
const ISTIO_CNI_BESIDE: &str =
    "istio-cni's rules are in this pod, too: remove them with `redirect-agent takeover`";
/// What is said of a static pod while it has no mirror.
const MIRROR_GONE: &str = "its mirror pod was deleted; it stays as it is while it runs";
/// One pod, from the moment it is known until it is gone: what is wanted for it, and what cannot be read
/// back of what was done.
pub(super) struct PodTask<S> {
    pub(super) shared: Arc<Shared<S>>,
    pub(super) key: PodKey,
    wanted: watch::Receiver<Wanted>,
    proxies: watch::Receiver<u64>,
    pub(super) pod: Pod,
    /// What CNI has told of its sandbox.
    sandbox: Option<Arc<Sandbox>>,
    /// What its annotations last asked for, as far as they could be read.
    traffic: Option<Traffic>,
    /// What is wrong with its annotations.
    misread: Vec<String>,
    /// It is gone, and is to leave the mesh whatever was decided for it.
    gone: bool,
    /// How it stands, as last observed.
    pub(super) standing: Standing,
    pub(super) netns: Option<Arc<PodNetns>>,
    /// Whether the namespace that it had is gone, and no other one found since.
    pub(super) lost: bool,
    /// Hears of changes in the namespace while the pod is in the mesh, or should be.
    pub(super) network: Option<Watch>,
    /// Whether all was as wished, and the wish is the same since: what differs was changed by others.
    pub(super) settled: bool,
    /// Whether istio-cni redirects it, and so nothing is done to it.
    pub(super) left_alone: bool,
    /// Whether istio-cni's rules are in the pod beside ours.
    pub(super) beside: bool,
    /// The pod id whose row of the map `pods` says why the pod bypasses.
    pub(super) noted: Option<u32>,
    /// Which of its ports the proxy does not listen on, in words.
    pub(super) deaf: Option<String>,
    pub(super) problem: Option<String>,
    /// Whether that is a failure, and not just something that is awaited.
    failing: bool,
    /// How often steps have failed since one last succeeded.
    failures: u32,
    /// The problem that an Event was last recorded of.
    told: Option<String>,
    /// Since when the pod should be in the mesh and is not.
    pub(super) enrolling: Option<Instant>,
    /// Until when connections of a pod that leaves the mesh may be redirected.
    pub(super) leaves_by: Option<Instant>,
    /// Whether it was tried to bring the pod to where it should be.
    tried: bool,
}

/// What ends a pause.
enum Woken {
    /// The wish changed.
    Wanted,
    /// Whoever sends the wishes is gone: the agent stops, and leaves everything as it is.
    Stopped,
    /// A proxy opened listeners.
    Proxy,
    /// Something has changed in the pod's network namespace.
    Network,
    /// The time is over.
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
            problem: None,
            failing: false,
            failures: 0,
            told: None,
            enrolling: None,
            leaves_by: None,
            tried: false,
        }
    }

    pub(super) fn key(&self) -> &PodKey {
        &self.key
    }

    pub(super) fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Makes the pod known to the ZDS server, which must know every pod that is in the mesh, or on its way
    /// out, before it serves the first proxy: that would cut the connections of one it does not know.
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
                // The proxy may serve it all the same; it must not stop because of us.
                self.shared.zds.keep(workload(&self.pod))?;
            }
        }
        observed.map(drop)
    }

    /// Runs until the pod is gone and nothing of it is left, or the agent stops.
    pub(super) async fn run(mut self) {
        let mut retry = RETRY_FIRST;
        let verify_interval = self.shared.settings.verify_interval;
        loop {
            self.wanted.mark_unchanged();
            let told = self.settle_wish();
            if told && (self.netns.is_none() || !self.netns_stands().await) {
                // What CNI has told is of another sandbox.
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
                        // Much may be possible now, and whoever waits for it does not wait for long.
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

    /// Observes how the pod stands, takes the steps that lead to what is wished, and observes again, until
    /// all is as wished (`true`), or what is missing is not ours to do (`false`).
    async fn round(&mut self) -> Result<bool> {
        let mut before = Vec::new();
        loop {
            if !self.observe().await? {
                return Ok(false);
            }
            if !self.gone && self.wanted.borrow().is_none() {
                // How it leaves is not decided here.
                return Ok(false);
            }
            if self.wish() == Wish::Enrolled {
                self.leaves_by = None;
            }
            let mut steps = steps(self.wish(), &self.standing);
            if self.gone {
                // There is nothing to say of it any more.
                steps.retain(|step| *step != Step::Note);
            }
            // What is not to be seen at once: a pod that has no namespace yet, or no object any more.
            let unseen = |step: &Step| matches!(step, Step::Note | Step::Publish | Step::Retract);
            if steps.is_empty() || before == steps && steps.iter().all(unseen) {
                return Ok(true);
            }
            if before == steps {
                return Err(anyhow!("what was put right is wrong again; next would be {steps:?}"));
            }
            self.show();
            before.clone_from(&steps);
            for step in steps {
                if !self.take(step).await? {
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

    /// Whether there is another wish, or the agent stops.
    pub(super) fn is_interrupted(&self) -> bool {
        // Nothing more is told of a pod that is gone.
        let told = !self.gone && self.wanted.has_changed().unwrap_or(true);
        told || self.shared.stop.is_cancelled()
    }

    fn fail(&mut self, error: &anyhow::Error) {
        let problem = format!("{error:#}");
        self.shared.metrics.failed();
        // What is missing of a pod on its way out is missing for good.
        if self.problem.as_ref() != Some(&problem) && !self.pod.deleting {
            warn!(pod = %self.key, "{problem}");
        }
        self.failures = self.failures.saturating_add(1);
        let lasts = self.failures >= FAILURES_TO_TELL && !self.pod.deleting;
        if lasts && self.told.as_ref() != Some(&problem) {
            self.record(EventKind::EnrolmentFailed, problem.clone());
            self.told = Some(problem.clone());
        }
        (self.problem, self.failing) = (Some(problem), true);
    }

    /// A look that costs little, and that every pod has often.
    async fn is_where_it_was(&self) -> bool {
        if self.netns.is_some() {
            self.netns_stands().await
        } else {
            // Its namespace may be found by now.
            self.standing.noted && (self.noted.is_some() || !self.has_own_netns())
        }
    }

    /// The pod is gone from the source. If its namespace is still there, and it was not deleted, it
    /// leaves the mesh in order; then nothing of it is kept.
    async fn bury(&mut self) {
        self.gone = true;
        let stands = self.netns_stands().await;
        let captured = self.observe().await.is_err() || self.standing.captured;
        if stands && self.shared.source.gone_is_deleted() && captured {
            // Its containers have ended, unless it was deleted by force: then what still runs must
            // not go on in plaintext.
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
            // Of a pod that is gone, nothing is told any more.
            Ok(()) = self.wanted.changed() => Woken::Wanted,
            Ok(()) = self.proxies.changed() => Woken::Proxy,
            () = changed(self.network.as_mut()) => Woken::Network,
            () = sleep_until(until) => Woken::Time,
        }
    }

    fn mirror_is_gone(&self) -> bool {
        self.wanted.borrow().as_ref().is_some_and(|target| target.mirror_is_gone)
    }

    /// A static pod in the mesh whose mirror was deleted stays as long as it runs: kubelet makes a new
    /// mirror of it.
    async fn is_gone_with_its_mirror(&self) -> bool {
        self.mirror_is_gone() && !(self.standing.captured && self.netns_stands().await)
    }

    pub(super) fn wish(&self) -> Wish {
        let enrolled = self.wanted.borrow().as_ref().is_some_and(|target| target.decision.enrolled);
        if enrolled && !self.gone { Wish::Enrolled } else { Wish::Bypass }
    }

    /// Why the pod is where it should be, in words.
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

    /// Takes over what the source now says of the pod. Whether CNI has told of a sandbox since.
    fn settle_wish(&mut self) -> bool {
        let wanted = self.wanted.borrow().clone();
        let Some(Target { mut pod, sandbox, decision, .. }) = wanted else { return false };
        let told = sandbox.is_some() && sandbox != self.sandbox;
        self.sandbox = sandbox;
        if pod.is_mirror() && pod.ips.is_empty() {
            // Kubelet has yet to say so of a new mirror; the sandbox is the same.
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

    /// Takes over what the pod's annotations now ask for.
    fn read_traffic(&mut self) {
        let settings = &self.shared.settings.traffic;
        let (traffic, misread) = settings.read(&self.pod.annotations, self.traffic.as_ref());
        if self.traffic.as_ref() != Some(&traffic) {
            if self.traffic().virtual_interfaces != traffic.virtual_interfaces {
                // Their addresses are not the pod's.
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
        };
        self.shared.views.show(view, || self.wanted.borrow().is_none());
    }
}

/// Waits for a change in a network namespace, if that is watched.
async fn changed(network: Option<&mut Watch>) {
    match network {
        Some(network) => network.changed().await,
        None => std::future::pending().await,
    }
}
