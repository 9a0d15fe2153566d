//! The task of one pod.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::{
    Shared, Target, View, Wanted,
    plan::{Standing, Step, Wish, next},
};
use crate::{
    cni::records::Sandbox,
    dataplane::{Dataplane, Displaced, IstioCni, Part, PodNetns, SETTLE, Watch},
    membership::{Pod, PodKey, Reason},
    source::{ANNOTATION_REDIRECTION, Event, EventKind, Redirection, Source},
    traffic::Traffic,
    zds::{AddOutcome, Workload},
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
/// Why a pod that istio-cni redirects is left alone.
const ISTIO_CNIS: &str = "istio-cni redirects this pod, so it is left alone: never both on one pod; \
take it over (--take-over), or let istio-cni let go of it";
const ISTIO_CNIS_SHARED: &str = "istio-cni redirects this pod by tables of iptables-legacy in which \
others have rules, too, which are not taken over, so it is left alone: start the pod anew";
const ISTIO_CNI_BESIDE: &str = "istio-cni redirects this pod, too: never both on one pod; uninstall \
istio-cni and have its rules removed (--take-over)";
/// What is said of a pod whose proxy has lost listeners: what they are for is refused.
const PROXY_DEAF: &str = "the proxy does not listen in this pod on port";
/// What is said of a static pod while it has no mirror.
const MIRROR_GONE: &str = "its mirror pod was deleted; it stays as it is while it runs";
/// How often a pod that leaves the mesh is asked whether redirected connections are left.
const DRAIN_POLL: Duration = Duration::from_millis(100);

/// One pod, from the moment it is known until it is gone.
pub(super) struct PodTask<S> {
    shared: Arc<Shared<S>>,
    key: PodKey,
    wanted: watch::Receiver<Wanted>,
    proxies: watch::Receiver<u64>,
    pod: Pod,
    /// What CNI has told of its sandbox.
    sandbox: Option<Arc<Sandbox>>,
    /// The reason that its rows of the map `pods` were last entered with.
    reason: Option<Reason>,
    standing: Standing,
    /// What its annotations last asked for, as far as they could be read.
    traffic: Option<Traffic>,
    /// What is wrong with its annotations.
    misread: Vec<String>,
    netns: Option<Arc<PodNetns>>,
    /// Hears of changes in the namespace while the pod is in the mesh, or should be.
    network: Option<Watch>,
    /// Whether istio-cni's rules are in the pod beside ours, and stay.
    beside: bool,
    /// From when on to look whether connections are left that istio-cni's rules had redirected.
    displacing: Option<Instant>,
    /// The pod id whose row of the map `pods` says why the pod bypasses.
    noted: Option<u32>,
    /// Which of its ports the proxy does not listen on, in words.
    deaf: Option<String>,
    problem: Option<String>,
    /// Whether that is a failure, and not just something that is awaited.
    failing: bool,
    /// How often steps have failed since one last succeeded.
    failures: u32,
    /// The problem that an Event was last recorded of.
    told: Option<String>,
    /// Since when the pod should be in the mesh and is not.
    enrolling: Option<Instant>,
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
        // What a former agent published is not known; taking it back is harmless.
        let stale = pod.annotations.contains_key(ANNOTATION_REDIRECTION);
        let standing = Standing { mentioned: true, stale, ..Standing::default() };
        let key = pod.key.clone();
        Self {
            shared,
            key,
            wanted,
            proxies,
            pod,
            sandbox,
            reason: None,
            standing,
            traffic: None,
            misread: Vec::new(),
            netns: None,
            network: None,
            beside: false,
            displacing: None,
            noted: None,
            deaf: None,
            problem: None,
            failing: false,
            failures: 0,
            told: None,
            enrolling: None,
            tried: false,
        }
    }

    pub(super) fn key(&self) -> &PodKey {
        &self.key
    }

    pub(super) fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Takes over what a former agent has set up, and makes the pod known to the ZDS server, which
    /// must know every enrolled pod before it serves the first proxy.
    pub(super) async fn adopt(&mut self) {
        if let Err(e) = self.try_adopt().await {
            // Its annotation may well be right.
            self.standing.stale = false;
            self.failing = !self.pod.ips.is_empty();
            if self.failing {
                warn!(pod = %self.key, "{e:#}");
            }
            self.problem = Some(format!("{e:#}"));
        }
        self.show();
    }

    async fn try_adopt(&mut self) -> Result<()> {
        let workload = workload(&self.pod);
        let enrolled = self.wish() == Some(Wish::Enrolled);
        match self.open_netns().await {
            Ok(netns) => {
                let (prepared, captured) = self
                    .on_netns(Arc::clone(&netns), |d, pod| {
                        let captured = d.captured(pod, &Traffic::default())?.partly;
                        Ok((d.is_linked(pod.netns.inode()), captured))
                    })
                    .await?;
                // Only a pod in the mesh, or one that once was, can have them.
                if !prepared && (enrolled || self.standing.stale) {
                    self.meet_istio_cni(&netns).await?;
                }
                // A captured pod may have redirected connections, and the proxy may know it.
                self.standing.captured = captured;
                self.standing.redirected = prepared;
                self.standing.offered = prepared;
                if !enrolled {
                    self.standing.prepared = prepared;
                }
                if enrolled || prepared || self.standing.foreign {
                    // Also one on its way out: a proxy whose snapshot lacks it would cut what it drains.
                    self.offer().await?;
                } else {
                    // Nothing of ours keeps the namespace of a pod that bypasses alive.
                    self.close_netns();
                }
                Ok(())
            }
            Err(e) if enrolled => {
                // The proxy may serve it all the same; it must not stop because of us.
                self.shared.zds.keep(workload)?;
                self.standing.offered = true;
                Err(e)
            }
            // A pod that bypasses needs no namespace.
            Err(_) => Ok(()),
        }
    }

    /// Runs until the pod is gone and nothing of it is left, or the agent stops.
    pub(super) async fn run(mut self) {
        let mut retry = RETRY_FIRST;
        let verify_interval = self.shared.settings.verify_interval;
        let look = LOOK.min(verify_interval);
        let mut verify = Instant::now() + verify_interval;
        loop {
            self.wanted.mark_unchanged();
            if self.settle_wish().await.is_none() || self.is_gone_with_its_mirror().await {
                self.bury().await;
                return;
            }
            let pause = match self.advance().await {
                Ok(true) => {
                    retry = RETRY_FIRST;
                    (self.problem, self.failing) = (None, false);
                    (self.failures, self.told) = (0, None);
                    look
                }
                Ok(false) => {
                    self.failing = false;
                    look
                }
                Err(e) => {
                    let problem = format!("{e:#}");
                    self.shared.metrics.failed();
                    // What is missing of a pod on its way out is missing for good.
                    let news = self.problem.as_ref() != Some(&problem);
                    if news && !self.pod.deleting {
                        warn!(pod = %self.key, "{problem}");
                    }
                    self.failures = self.failures.saturating_add(1);
                    let lasts = self.failures >= FAILURES_TO_TELL && !self.pod.deleting;
                    if lasts && self.told.as_ref() != Some(&problem) {
                        self.record(EventKind::EnrolmentFailed, problem.clone());
                        self.told = Some(problem.clone());
                    }
                    (self.problem, self.failing) = (Some(problem), true);
                    if self.standing.prepared && !self.netns_stands().await {
                        self.lose_netns().await;
                    }
                    let pause = retry;
                    retry = RETRY_LONGEST.min(retry * 2);
                    pause
                }
            };
            self.tried = true;
            self.show();
            match self.wait(Instant::now() + pause).await {
                // Much may be possible now, and whoever waits for it does not wait for long.
                Woken::Wanted => retry = RETRY_FIRST,
                Woken::Stopped => return,
                Woken::Proxy => self.standing.served = false,
                woken @ (Woken::Network | Woken::Time) => {
                    let due = matches!(woken, Woken::Network) || Instant::now() >= verify;
                    if due {
                        verify = Instant::now() + verify_interval;
                    }
                    if let Err(e) = self.verify(due).await {
                        warn!(pod = %self.key, "{e:#}");
                        // What it was to find is found by the next look.
                        verify = Instant::now();
                    }
                }
            }
        }
    }

    /// Takes steps until all is as wished (`true`), or what is missing is not ours to do (`false`).
    async fn advance(&mut self) -> Result<bool> {
        while let Some(wish) = self.wish() {
            let Some(step) = next(wish, &self.standing) else { return Ok(true) };
            self.show();
            if !self.take(step).await? {
                return Ok(false);
            }
            if self.wanted.has_changed().unwrap_or(false) {
                self.wanted.mark_unchanged();
                self.settle_wish().await;
            }
        }
        Ok(true)
    }

    /// Takes one step; `false`: it has to wait for someone else.
    async fn take(&mut self, step: Step) -> Result<bool> {
        match step {
            Step::Prepare => {
                let opened = self.open_netns().await;
                if opened.is_err() && self.pod.ips.is_empty() {
                    // It is starting; the source tells when it has one.
                    self.problem = Some(no_address(&self.key));
                    return Ok(false);
                }
                let netns = opened?;
                if self.network.is_none() {
                    self.watch_network(&netns);
                }
                if let Some(why) = self.meet_istio_cni(&netns).await? {
                    return Err(anyhow!(why));
                }
                if self.wish() != Some(Wish::Enrolled) && !self.standing.foreign {
                    // istio-cni has let go of a pod that is to bypass.
                    self.close_netns();
                    return Ok(true);
                }
                let (reason, traffic) = (self.decision_code(), self.traffic());
                let captured = self.on_netns(Arc::clone(&netns), move |d, pod| {
                    d.prepare(pod, reason, &traffic)?;
                    d.captured(pod, &traffic)
                });
                let captured = captured.await?;
                self.standing.captured = captured.partly;
                self.standing.shaped = captured.wholly;
                self.standing.prepared = true;
                self.standing.noted = false;
                self.noted = None;
            }
            Step::Serve => {
                if !self.offer().await? {
                    // One that istio-cni redirects is served: what is published of it is true.
                    if !self.standing.captured && !self.standing.foreign {
                        let pending = Some(Redirection::Pending);
                        self.standing.mentioned = true;
                        self.shared.source.publish(&self.pod, pending).await?;
                    }
                    self.problem = Some("no proxy is connected to the ZDS socket yet".to_owned());
                    return Ok(false);
                }
                let netns = self.open_netns().await?;
                self.look_for_proxy(&netns).await?;
                self.standing.served = true;
            }
            Step::Capture => {
                let netns = self.open_netns().await?;
                let traffic = self.traffic();
                let unused = self.shared.settings.finder.records().is_held(self.pod.kubelet_uid());
                if unused {
                    self.on_netns(netns, move |d, pod| d.capture_unused(pod, &traffic)).await?;
                } else {
                    let capture = move |d: &Dataplane, pod: &PodNetns| d.capture(pod, &traffic);
                    self.on_netns(Arc::clone(&netns), capture).await?;
                    self.settle(netns).await?;
                }
                if !self.standing.captured {
                    info!(pod = %self.key, "enrolled");
                    self.record(EventKind::Enrolled, format!("in the mesh: {}", self.why()));
                }
                self.standing.captured = true;
                self.standing.shaped = true;
                self.standing.redirected = true;
                if let Some(since) = self.enrolling.take() {
                    self.shared.metrics.enrolled(since.elapsed());
                }
            }
            Step::Displace => {
                let netns = self.open_netns().await?;
                let displaced = self.on_netns(netns, |d, pod| d.displace_istio_cni(pod)).await?;
                if displaced == Displaced::Now {
                    info!(pod = %self.key, "taken over from istio-cni");
                    let message = "istio-cni's rules are removed, ours are in their place";
                    self.record(EventKind::TakenOver, message.to_owned());
                }
                self.await_displaced(displaced);
                self.standing.foreign = false;
                self.standing.redirected = true;
            }
            Step::Publish => {
                self.standing.mentioned = true;
                self.shared.source.publish(&self.pod, Some(Redirection::Enabled)).await?;
                self.standing.published = true;
            }
            Step::Retract => {
                if self.standing.stale
                    && let Ok(netns) = self.open_netns().await
                    && !self.standing.prepared
                {
                    self.meet_istio_cni(&netns).await?;
                    if self.standing.foreign {
                        // What is published is true.
                        return Ok(true);
                    }
                    if self.wish() != Some(Wish::Enrolled) {
                        self.close_netns();
                    }
                }
                let retracted = self.shared.source.publish(&self.pod, None).await;
                match retracted {
                    // It is about to be true again.
                    Err(e) if self.wish() == Some(Wish::Enrolled) => {
                        warn!(pod = %self.key, "{e:#}");
                    }
                    retracted => {
                        retracted?;
                        self.standing.published = false;
                        self.standing.mentioned = false;
                    }
                }
                self.standing.stale = false;
            }
            Step::Release => {
                let netns = self.open_netns().await?;
                self.on_netns(Arc::clone(&netns), |d, pod| d.release(pod)).await?;
                self.settle(netns).await?;
                self.standing.captured = false;
                self.standing.shaped = false;
            }
            Step::Drain => return self.drain().await,
            Step::Withdraw => {
                self.shared.zds.delete(self.pod.kubelet_uid()).await;
                self.standing.offered = false;
                self.standing.served = false;
            }
            Step::Remove => {
                let netns = self.open_netns().await?;
                self.noted = Some(netns.netns.inode());
                self.deaf = None;
                self.on_netns(netns, |d, pod| d.remove(pod)).await?;
                self.standing.prepared = false;
                (self.beside, self.displacing) = (false, None);
                // Whatever else holds the namespace's descriptor keeps it alive.
                self.close_netns();
                info!(pod = %self.key, "un-enrolled");
                self.record(EventKind::Unenrolled, format!("not in the mesh: {}", self.why()));
            }
            Step::Note => self.note().await?,
        }
        Ok(true)
    }

    /// Waits until what was half-way there in a switch is marked.
    async fn settle(&self, netns: Arc<PodNetns>) -> Result<()> {
        for (n, delay) in (1..).zip(SETTLE) {
            sleep(delay).await;
            let last = n == SETTLE.len();
            self.on_netns(Arc::clone(&netns), move |d, pod| d.settle(pod, last)).await?;
        }
        Ok(())
    }

    /// Looks whether istio-cni redirects the pod, which is not ours yet or to be repaired; if so, and
    /// it is to be left alone, says why.
    async fn meet_istio_cni(&mut self, netns: &Arc<PodNetns>) -> Result<Option<&'static str>> {
        let found = self.on_netns(Arc::clone(netns), |d, pod| {
            Ok((d.istio_cni(pod)?, d.is_linked(pod.netns.inode())))
        });
        let (found, ours) = found.await?;
        let why = match found {
            IstioCni::Absent | IstioCni::Displaced => None,
            IstioCni::Shared => Some(ISTIO_CNIS_SHARED),
            IstioCni::Present if self.shared.settings.take_over => None,
            IstioCni::Present => Some(ISTIO_CNIS),
        };
        let beside = ours && why.is_some();
        if beside && !self.beside {
            warn!(pod = %self.key, "{ISTIO_CNI_BESIDE}");
        }
        self.beside = beside;
        if beside {
            // They came later, and ours precede them.
            self.standing.foreign = false;
            return Ok(None);
        }
        self.standing.foreign = found != IstioCni::Absent;
        Ok(why)
    }

    fn await_displaced(&mut self, displaced: Displaced) {
        let wholly = displaced == Displaced::Wholly;
        self.displacing = (!wholly).then(|| Instant::now() + LOOK);
    }

    /// Makes the pod known to the proxy; `false`: none is connected.
    async fn offer(&mut self) -> Result<bool> {
        let netns = self.open_netns().await?;
        self.standing.offered = true;
        let outcome = self.shared.zds.add(workload(&self.pod), netns.netns.fd()).await?;
        Ok(outcome == AddOutcome::Acked)
    }

    async fn drain(&mut self) -> Result<bool> {
        let deadline = Instant::now() + self.shared.settings.drain;
        loop {
            let netns = self.open_netns().await?;
            let left = self.on_netns(netns, |d, pod| d.redirected(pod)).await?;
            if left == 0 || Instant::now() >= deadline {
                if left > 0 {
                    info!(pod = %self.key, "{left} redirected connections outlast the drain and are closed");
                }
                self.standing.redirected = false;
                return Ok(true);
            }
            // A pod that is to come back in need not wait.
            let changed = self.wanted.changed();
            if let Ok(Ok(())) = timeout(DRAIN_POLL, changed).await {
                self.settle_wish().await;
                return Ok(true);
            }
        }
    }

    /// Says in the map `pods` why the pod bypasses. Pods without a namespace of their own, or whose
    /// namespace is not known yet, have no row.
    async fn note(&mut self) -> Result<()> {
        let own = self.has_own_netns();
        let addresses = if own { self.pod.ips.clone() } else { Vec::new() };
        let (finder, pod) = (Arc::clone(&self.shared.settings.finder), self.pod.clone());
        let reason = self.decision_code();
        let dataplane = Arc::clone(&self.shared.dataplane);
        let old = self.noted;
        let ours;
        (self.noted, ours) = blocking(move || {
            let is_ours = |inode| dataplane.is_linked(inode);
            let pod_id = if own { finder.inode(&pod, is_ours)? } else { None };
            if pod_id.is_some_and(is_ours) {
                // Nobody could find it so far.
                return Ok((None, true));
            }
            if let Some(old) = old.filter(|old| Some(*old) != pod_id) {
                dataplane.delete_bypass(old)?;
            }
            if let Some(pod_id) = pod_id {
                dataplane.put_bypass(pod_id, &addresses, reason)?;
            }
            Ok((pod_id, false))
        })
        .await?;
        if ours {
            self.standing = Standing::of_ours();
        } else {
            self.standing.noted = true;
        }
        Ok(())
    }

    fn has_own_netns(&self) -> bool {
        !self.pod.host_network && !self.pod.phase.is_finished()
    }

    /// Looks whether the namespace is still the one that was set up, and with `kernel` whether
    /// everything is still there.
    async fn verify(&mut self, kernel: bool) -> Result<()> {
        let Some(netns) = self.netns.clone() else {
            // Its namespace may be found by now.
            self.standing.noted &= self.noted.is_some() || !self.has_own_netns();
            return Ok(());
        };
        if self.displacing.is_some_and(|from| from <= Instant::now()) {
            let displaced = self.on_netns(Arc::clone(&netns), |d, pod| d.displace_istio_cni(pod));
            self.await_displaced(displaced.await?);
        }
        if !self.netns_stands().await {
            self.lose_netns().await;
            return self.find_netns().await.map(drop);
        }
        if !kernel || !self.standing.captured {
            return Ok(());
        }
        let known = self.pod.ips.clone();
        if self.on_netns(Arc::clone(&netns), move |_, pod| pod.has_changed(&known)).await? {
            info!(pod = %self.key, "its addresses have changed");
            self.close_netns();
            self.standing.prepared = false;
            return Ok(());
        }
        if self.displacing.is_none() {
            self.meet_istio_cni(&netns).await?;
        }
        self.look_for_proxy(&netns).await?;
        let traffic = self.traffic();
        let inspect = move |d: &Dataplane, pod: &PodNetns| {
            let inspection = d.inspect(pod, &traffic)?;
            // The runtime takes `lo` down before it takes the namespace away.
            let apart = !inspection.missing.is_empty() && d.lo_is_down(pod)?;
            Ok((inspection, apart))
        };
        let (inspection, apart) = self.on_netns(netns, inspect).await?;
        if apart {
            debug!(pod = %self.key, "lo is down: nothing can be put back");
        } else if !inspection.missing.is_empty() {
            for part in &inspection.missing {
                self.shared.metrics.drifted(part.kind.as_str());
            }
            let missing: Vec<String> = inspection.missing.iter().map(Part::to_string).collect();
            warn!(pod = %self.key, ?missing, "repairing what was changed behind the agent's back");
            let missing = missing.join(", ");
            self.record(
                EventKind::Repaired,
                format!("missing in the pod, and put back: {missing}"),
            );
            self.standing.prepared = false;
        }
        Ok(())
    }

    /// Looks for the proxy's listeners, which the programs then know.
    async fn look_for_proxy(&mut self, netns: &Arc<PodNetns>) -> Result<()> {
        let missing = self.on_netns(Arc::clone(netns), |d, pod| d.proxy_listens(pod)).await?;
        let ports: Vec<String> = missing.iter().map(u16::to_string).collect();
        let deaf = (!ports.is_empty()).then(|| format!("{PROXY_DEAF} {}", ports.join(", ")));
        if let Some(deaf) = deaf.as_ref().filter(|_| self.deaf != deaf) {
            warn!(pod = %self.key, "{deaf}");
        }
        self.deaf = deaf;
        Ok(())
    }

    /// Hears of changes in the namespace from now on; without it they are found by the timer.
    fn watch_network(&mut self, netns: &PodNetns) {
        match Watch::start(&netns.netns) {
            Ok(network) => self.network = Some(network),
            Err(e) => warn!(pod = %self.key, "{e:#}"),
        }
    }

    /// Whether the namespace that was set up is still where it should be.
    async fn netns_stands(&self) -> bool {
        let (finder, pod) = (Arc::clone(&self.shared.settings.finder), self.pod.clone());
        let dataplane = Arc::clone(&self.shared.dataplane);
        let netns = self.netns.clone();
        let stands = blocking(move || {
            Ok(match netns {
                Some(netns) => finder.stands(&pod, &netns.netns)?,
                None => finder.inode(&pod, |inode| dataplane.is_linked(inode))?.is_some(),
            })
        });
        stands.await.unwrap_or_else(|e| {
            // The proxy would stop what may be alive.
            warn!(pod = %self.key, "cannot tell whether its network namespace is gone: {e:#}");
            true
        })
    }

    /// The namespace is gone or another: the proxy must let go of it. What the kernel still has
    /// for the old one keeps refusing, should anything run in it, and is swept when it is dead.
    async fn lose_netns(&mut self) {
        if self.standing.offered || self.standing.prepared {
            if self.pod.deleting || self.wish().is_none() {
                debug!(pod = %self.key, "its network namespace is gone");
            } else {
                warn!(pod = %self.key, "its network namespace is gone");
            }
        }
        self.let_go().await;
    }

    /// The proxy lets go of it, and what the kernel has for it stays.
    async fn let_go(&mut self) {
        self.close_netns();
        self.shared.zds.delete(self.pod.kubelet_uid()).await;
        // Where its start waits for us, it is about to be true again.
        let starts = self.shared.settings.finder.records().is_held(self.pod.kubelet_uid());
        let stale = (self.standing.published || self.standing.stale) && !starts;
        self.standing = Standing { mentioned: true, stale, ..Standing::default() };
        (self.beside, self.displacing) = (false, None);
    }

    /// The pod is gone from the source. If its namespace is still there, and it was not deleted, it
    /// leaves the mesh in order; then nothing of it is kept.
    async fn bury(&mut self) {
        if !self.netns_stands().await {
            self.lose_netns().await;
        } else if self.shared.source.gone_is_deleted() && self.standing.captured {
            // Its containers have ended, unless it was deleted by force: then what still runs must
            // not go on in plaintext.
            info!(pod = %self.key, "deleted; what still runs of it is refused");
            self.let_go().await;
        }
        let mut retry = RETRY_FIRST;
        while let Some(step) = next(Wish::Bypass, &self.standing).filter(|step| *step != Step::Note)
        {
            match self.take(step).await {
                Ok(_) => retry = RETRY_FIRST,
                Err(e) => {
                    if !self.netns_stands().await {
                        self.lose_netns().await;
                        continue;
                    }
                    warn!(pod = %self.key, "{e:#}");
                    if let Woken::Stopped = self.wait(Instant::now() + retry).await {
                        return;
                    }
                    retry = RETRY_LONGEST.min(retry * 2);
                }
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
            changed = self.wanted.changed() => match changed {
                Ok(()) => Woken::Wanted,
                Err(_) => Woken::Stopped,
            },
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

    fn wish(&self) -> Option<Wish> {
        let wanted = self.wanted.borrow();
        let decision = wanted.as_ref()?.decision;
        Some(if decision.enrolled { Wish::Enrolled } else { Wish::Bypass })
    }

    /// Why the pod is where it should be, in words.
    fn why(&self) -> &'static str {
        self.wanted
            .borrow()
            .as_ref()
            .map_or("it is gone", |target| target.decision.reason.explain())
    }

    fn record(&self, kind: EventKind, message: String) {
        self.shared.source.record(&self.pod, Event::new(kind, message));
    }

    fn decision_code(&self) -> u32 {
        self.wanted.borrow().as_ref().map_or(0, |target| target.decision.reason.code())
    }

    /// Takes over what the source now says of the pod.
    async fn settle_wish(&mut self) -> Option<Wish> {
        let wanted = self.wanted.borrow().clone();
        let Target { mut pod, sandbox, decision, .. } = wanted?;
        let told = sandbox.is_some() && sandbox != self.sandbox;
        self.sandbox = sandbox;
        if told && (self.netns.is_none() || !self.netns_stands().await) {
            // What is known to be true was so of a former one.
            self.lose_netns().await;
        }
        if pod.is_mirror() && pod.ips.is_empty() {
            // Kubelet has yet to say so of a new mirror; the sandbox is the same.
            pod.ips.clone_from(&self.pod.ips);
        }
        if self.reason != Some(decision.reason) || pod.ips != self.pod.ips {
            // Its rows change.
            self.standing.prepared &= !decision.enrolled;
            self.standing.noted = false;
        }
        if pod.ips != self.pod.ips {
            self.close_netns();
        }
        if !decision.enrolled || self.standing.captured {
            self.enrolling = None;
        } else if self.enrolling.is_none() {
            self.enrolling = Some(Instant::now());
        }
        let published = |pod: &Pod| pod.annotations.get(ANNOTATION_REDIRECTION).cloned();
        if published(&pod) != published(&self.pod) || pod.uid != self.pod.uid {
            // It was us, or somebody else: saying it again costs nothing where it is right.
            self.standing.published = false;
            self.standing.mentioned = true;
        }
        self.reason = Some(decision.reason);
        self.pod = pod;
        self.read_traffic();
        self.wish()
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
            // Only a pod in the mesh has what follows from it.
            self.standing.prepared &= self.wish() != Some(Wish::Enrolled);
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

    fn traffic(&self) -> Traffic {
        self.traffic.clone().unwrap_or_default()
    }

    async fn open_netns(&mut self) -> Result<Arc<PodNetns>> {
        if let Some(netns) = &self.netns {
            return Ok(Arc::clone(netns));
        }
        let netns = Arc::new(self.find_netns().await?);
        self.netns = Some(Arc::clone(&netns));
        Ok(netns)
    }

    fn close_netns(&mut self) {
        (self.netns, self.network) = (None, None);
    }

    async fn find_netns(&self) -> Result<PodNetns> {
        let (finder, pod) = (Arc::clone(&self.shared.settings.finder), self.pod.clone());
        let virtual_interfaces = self.traffic().virtual_interfaces;
        let dataplane = Arc::clone(&self.shared.dataplane);
        let find = move || {
            let found = finder.find(&pod, |inode| dataplane.is_linked(inode))?;
            Ok(found.without(&virtual_interfaces, &pod.ips))
        };
        blocking(find).await.with_context(|| format!("enter pod {}", self.key))
    }

    async fn on_netns<T: Send + 'static>(
        &self,
        pod: Arc<PodNetns>,
        f: impl FnOnce(&Dataplane, &PodNetns) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let dataplane = Arc::clone(&self.shared.dataplane);
        let key = self.key.clone();
        blocking(move || f(&dataplane, &pod)).await.with_context(|| format!("set up pod {key}"))
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
        self.shared.views.show(view);
    }
}

/// Waits for a change in a network namespace, if that is watched.
async fn changed(network: Option<&mut Watch>) {
    match network {
        Some(network) => network.changed().await,
        None => std::future::pending().await,
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    spawn_blocking(f).await.context("run a blocking task")?
}

fn no_address(pod: &PodKey) -> String {
    format!("pod {pod} has no address yet")
}

fn workload(pod: &Pod) -> Workload {
    Workload {
        uid: pod.kubelet_uid().to_owned(),
        namespace: pod.key.namespace.clone(),
        name: pod.key.name.clone(),
        service_account: pod.service_account.clone(),
    }
}
