//! Brings every pod of the node to its desired state, and keeps it there.
//!
//! Each pod has a task of its own, so a pod that fails or is slow delays no other. In each round the task
//! observes the pod ([`PodTask::observe`]), takes the steps that lead from there to the desired state
//! ([`plan::steps`]), and observes again. It does not remember what it did before, so an agent that starts is
//! not a special case.

mod admission;
mod look;
mod observe;
mod plan;
mod pod;
mod steps;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use futures_util::future::join_all;
use tokio::{
    sync::{broadcast::error::RecvError, watch},
    task::{JoinHandle, spawn_blocking},
    time::{MissedTickBehavior, interval},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

pub use self::{
    admission::Admission,
    look::{Found, Inside, Look},
};
use self::{plan::Standing, pod::PodTask};
use crate::{
    cni::records::{Sandbox, Sandboxes},
    control::Remaining,
    dataplane::{Dataplane, Part, PodNetns},
    finder::Finder,
    journal::Journal,
    membership::{self, Decision, Pod, PodKey, decide},
    metrics::Metrics,
    netns::{self, Netns},
    output::{KernelStatus, OverrideStatus, PodState, PodStatus},
    overrides::{Moment, Overrides, Store},
    source::{Event, Inventory, Source},
    traffic::{self, Traffic},
    zds,
};

/// How often the desired state of each pod is computed again even if nothing has changed: overrides expire.
const TICK: Duration = Duration::from_secs(1);
/// How often, at least, what is left of dead namespaces is swept.
const SWEEP: Duration = Duration::from_secs(10);
/// A query's flow is over 30 s later.
const SWEEP_DNS: Duration = Duration::from_secs(60);

/// What `status` says about a pod whose DNS is refused because its proxy has no DNS.
const NO_DNS: &str = "the proxy has no DNS (port 15053), so the pod's queries are refused: switch on \
the proxy's, or DNS capture off (--dns-capture, annotation ambient.istio.io/dns-capture)";

/// What `status` says about a pod with guests (a VM, nested containers) whose calls bypass the proxy.
const FORWARDS: &str = "connections of guests were forwarded past the proxy (counter forwarded): name \
the interface they are behind in the annotation istio.io/reroute-virtual-interfaces";

/// How to run on this node.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Decides which pods are in the mesh.
    pub membership: membership::Config,
    /// Decides which of their traffic is redirected.
    pub traffic: traffic::Settings,
    /// Finds the pods' network namespaces.
    pub finder: Arc<Finder>,
    /// How long a pod that leaves the mesh may finish its redirected connections.
    pub drain: Duration,
    /// How often the kernel's state is compared with the desired state.
    pub verify_interval: Duration,
    /// Whether pods that istio-cni redirects are captured, too, instead of being left alone.
    pub beside_istio_cni: bool,
}

/// A pod, and the decision about it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    /// The pod. Its addresses are those of its sandbox, if that is known.
    pod: Pod,
    /// What CNI reported about its sandbox.
    sandbox: Option<Arc<Sandbox>>,
    decision: Decision,
    /// The pod is static and its mirror was deleted. It may still run, or be gone, too.
    mirror_is_gone: bool,
}

/// `None` when the pod is gone.
type Wanted = Option<Target>;

/// Everything that decisions depend on.
#[derive(Clone)]
struct Judge {
    membership: membership::Config,
    overrides: Arc<Store>,
}

impl Judge {
    fn decide(&self, inventory: &Inventory, pod: &Pod) -> Decision {
        let namespace = inventory.namespaces.get(&pod.key.namespace);
        let decision = decide(namespace, pod, &self.membership);
        self.overrides.current().apply(decision, &pod.key, SystemTime::now())
    }
}

/// What the pods' tasks share.
struct Shared<S> {
    settings: Settings,
    source: S,
    dataplane: Arc<Dataplane>,
    zds: zds::Handle,
    metrics: Metrics,
    views: Arc<Views>,
    journal: Journal,
    /// Tells the tasks to stop where they are.
    stop: CancellationToken,
}

impl<S: Source> Shared<S> {
    fn record(&self, pod: &Pod, event: Event) {
        self.journal.note(&pod.key, &event);
        self.source.record(pod, event);
    }
}

impl<S> Shared<S> {
    fn views(&self) -> MutexGuard<'_, BTreeMap<PodKey, View>> {
        self.views.lock()
    }
}

/// What the pods' tasks show.
#[derive(Default)]
struct Views {
    views: Mutex<BTreeMap<PodKey, View>>,
    /// Increases with every change.
    changed: watch::Sender<u64>,
}

impl Views {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PodKey, View>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a view, unless its pod `is_gone` by now. What has not changed its state has been in it for
    /// longer.
    fn show(&self, mut view: View, is_gone: impl FnOnce() -> bool) {
        let mut views = self.lock();
        if is_gone() {
            return;
        }
        if let Some(former) = views.get(&view.pod.key)
            && former.pod.uid == view.pod.uid
            && former.state() == view.state()
        {
            view.since = former.since;
        }
        views.insert(view.pod.key.clone(), view);
        drop(views);
        self.changed.send_modify(|n| *n += 1);
    }
}

/// What `status` shows about a pod, as its task last saw it.
#[derive(Clone, Debug)]
struct View {
    pod: Pod,
    decision: Decision,
    standing: Standing,
    /// Whether it is left alone because istio-cni redirects it.
    left_alone: bool,
    netns: Option<Arc<PodNetns>>,
    /// The pod id whose row in the map `pods` says why it bypasses.
    noted: Option<u32>,
    traffic: Traffic,
    problem: Option<String>,
    /// Whether the problem is a failure.
    failing: bool,
    /// Whether the problem affects the pod's traffic or its annotation, and is not just information.
    degraded: bool,
    /// Whether the agent has tried to bring the pod to its desired state since it started.
    tried: bool,
    /// Since when the pod is in its state.
    since: SystemTime,
}

impl View {
    fn state(&self) -> PodState {
        let s = &self.standing;
        match (self.decision.enrolled, self.failing) {
            (true, _) if s.captured && self.degraded => PodState::Degraded,
            (true, false) if s.captured && s.shaped => PodState::Enrolled,
            (true, true) => PodState::Failed,
            (true, false) => PodState::Enrolling,
            (false, _) if !s.present && !self.left_alone => PodState::Bypassing,
            (false, true) => PodState::Failed,
            (false, false) => PodState::Leaving,
        }
    }
}

/// Runs the pods' tasks.
pub struct Reconciler<S> {
    shared: Arc<Shared<S>>,
    judge: Judge,
    inventory: watch::Receiver<Arc<Inventory>>,
    /// Increases whenever a proxy has opened listeners, which have to be adopted.
    proxies: watch::Sender<u64>,
    tasks: BTreeMap<PodKey, Running>,
    /// The tasks of pods that are gone. Another pod of the same name has to wait for them.
    leaving: BTreeMap<PodKey, JoinHandle<()>>,
    /// Rows of the map `pods` without a known pod at the last sweep.
    unknown: BTreeSet<u32>,
    tracker: TaskTracker,
}

/// A pod's task.
struct Running {
    /// The uid by which kubelet knows the pod.
    uid: String,
    /// Whether the pod is static.
    mirror: bool,
    wanted: watch::Sender<Wanted>,
    handle: JoinHandle<()>,
}

/// Answers what `status` asks.
pub struct Observer<S> {
    shared: Arc<Shared<S>>,
}

impl<S: Source> Reconciler<S> {
    /// Prepares to run. Nothing happens yet.
    pub fn new(
        settings: Settings,
        source: S,
        overrides: Arc<Store>,
        dataplane: Arc<Dataplane>,
        zds: zds::Handle,
        metrics: Metrics,
    ) -> Self {
        let inventory = source.inventory();
        let judge = Judge { membership: settings.membership.clone(), overrides };
        let (views, stop) = (Arc::default(), CancellationToken::new());
        let journal = Journal::default();
        let shared = Shared { settings, source, dataplane, zds, metrics, views, journal, stop };
        Self {
            shared: Arc::new(shared),
            judge,
            inventory,
            proxies: watch::Sender::new(0),
            tasks: BTreeMap::new(),
            leaving: BTreeMap::new(),
            unknown: BTreeSet::new(),
            tracker: TaskTracker::new(),
        }
    }

    /// For `status`.
    pub fn observer(&self) -> Observer<S> {
        Observer { shared: Arc::clone(&self.shared) }
    }

    /// For the CNI plugin, which waits at most `timeout`.
    pub fn admission(&self, timeout: Duration) -> Admission {
        Admission::new(
            self.judge.clone(),
            self.inventory.clone(),
            Arc::clone(self.shared.settings.finder.records()),
            Arc::clone(&self.shared.views),
            timeout,
        )
    }

    /// Introduces every pod that is in the mesh, or on its way out, to the ZDS server. The server must not
    /// serve proxies before that: a proxy stops whatever its snapshot does not name.
    pub async fn introduce(&mut self) {
        self.remove_orphans().await;
        let introduced = self.update().into_iter().map(async |(mut task, wanted)| {
            task.introduce().await;
            (task, wanted)
        });
        for (task, wanted) in join_all(introduced).await {
            self.start(task, wanted);
        }
    }

    /// Reconciles until `shutdown`. After that, everything in the kernel stays as it is.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut overrides = self.judge.overrides.subscribe();
        let mut sandboxes = self.shared.settings.finder.records().subscribe();
        let mut events = self.shared.zds.subscribe();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sweep = interval(SWEEP.min(self.shared.settings.verify_interval));
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut dns = interval(SWEEP_DNS.min(self.shared.settings.verify_interval));
        dns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                Ok(()) = self.inventory.changed() => {}
                Ok(()) = overrides.changed() => {}
                Ok(()) = sandboxes.changed() => {}
                _ = tick.tick() => {}
                _ = sweep.tick() => self.sweep().await,
                _ = dns.tick() => self.sweep_dns_flows(),
                event = events.recv() => match event {
                    Ok(zds::Event::SnapshotDone { .. } | zds::Event::ProxyGone { .. }) | Err(RecvError::Lagged(_)) => {
                        self.proxies.send_modify(|n| *n += 1);
                    }
                    Ok(_) | Err(RecvError::Closed) => {}
                },
            }
            for (task, wanted) in self.update() {
                self.start(task, wanted);
            }
        }
        self.shared.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Tells every task its pod's desired state, and returns the tasks of new pods.
    fn update(&mut self) -> Vec<(PodTask<S>, watch::Sender<Wanted>)> {
        let inventory = Arc::clone(&self.inventory.borrow_and_update());
        let sandboxes = self.shared.settings.finder.records().current();
        let stays = |key: &PodKey, task: &mut Running| match inventory.pods.get(key) {
            Some(pod) => pod.kubelet_uid() == task.uid && !task.handle.is_finished(),
            None => {
                task.mirror && self.shared.source.gone_is_deleted() && !task.handle.is_finished()
            }
        };
        for (key, task) in self.tasks.extract_if(.., |key, task| !stays(key, task)) {
            task.wanted.send_replace(None);
            self.shared.views().remove(&key);
            self.leaving.insert(key, task.handle);
        }
        self.leaving.retain(|_, handle| !handle.is_finished());
        let target = |pod: Pod, sandbox, mirror_is_gone| {
            let decision = self.judge.decide(&inventory, &pod);
            Target { pod, sandbox, decision, mirror_is_gone }
        };
        let tell = |task: &Running, wanted: Wanted| {
            task.wanted.send_if_modified(|old| {
                let modified = *old != wanted;
                *old = wanted;
                modified
            });
        };
        for (_, task) in self.tasks.iter().filter(|(key, _)| !inventory.pods.contains_key(key)) {
            let last = task.wanted.borrow().clone();
            tell(task, last.map(|last| target(last.pod, last.sandbox, true)));
        }
        let mut new = Vec::new();
        for (pod, sandbox) in in_sandboxes(inventory.pods.values(), &sandboxes) {
            let key = pod.key.clone();
            let target = target(pod, sandbox, false);
            let wanted = Some(target.clone());
            if let Some(task) = self.tasks.get(&key) {
                tell(task, wanted);
            } else {
                let (sender, receiver) = watch::channel(wanted);
                let shared = Arc::clone(&self.shared);
                let task = PodTask::new(shared, receiver, self.proxies.subscribe(), target);
                new.push((task, sender));
            }
        }
        new
    }

    fn start(&mut self, task: PodTask<S>, wanted: watch::Sender<Wanted>) {
        let (key, uid) = (task.key().clone(), task.pod().kubelet_uid().to_owned());
        let mirror = task.pod().is_mirror();
        let former = self.leaving.remove(&key);
        let handle = self.tracker.spawn(async move {
            if let Some(former) = former {
                // It does not matter how it ended.
                let _ended = former.await;
            }
            task.run().await;
        });
        self.tasks.insert(key, Running { uid, mirror, wanted, handle });
    }

    /// Sweeps what is left of dead namespaces, and rows of unknown pods.
    async fn sweep(&mut self) {
        let recorded = self.shared.settings.finder.records().current();
        let dataplane = Arc::clone(&self.shared.dataplane);
        let finder = Arc::clone(&self.shared.settings.finder);
        let held: Vec<Arc<PodNetns>> =
            self.shared.views().values().filter_map(|view| view.netns.clone()).collect();
        let noted: Vec<u32> = self.shared.views().values().filter_map(|view| view.noted).collect();
        // Taken after the records, so that no record is ahead of its pod.
        let uids = self.uids();
        let unknown = std::mem::take(&mut self.unknown);
        let swept = spawn_blocking(move || {
            finder.records().sweep(&recorded, uids.as_ref());
            let found = netns::in_dir(finder.netns_dir())?;
            let held = held.iter().map(|pod| pod.netns.inode());
            let known: BTreeSet<u32> = held.chain(noted).collect();
            let alive = found.iter().map(Netns::inode).chain(known.iter().copied()).collect();
            dataplane.sweep(&known, &alive, &unknown)
        })
        .await;
        match swept.map_err(Into::into).flatten() {
            Ok(unknown) => self.unknown = unknown,
            Err(e) => warn!("cannot sweep what is left of dead network namespaces: {e:#}"),
        }
    }

    /// Drops the DNS flows that are over. Nothing waits for it: a busy node has many.
    fn sweep_dns_flows(&self) {
        let dataplane = Arc::clone(&self.shared.dataplane);
        self.tracker.spawn_blocking(move || {
            if let Err(e) = dataplane.sweep_dns_flows() {
                warn!("cannot drop the DNS flows that are over: {e:#}");
            }
        });
    }

    /// The uids by which kubelet knows the pods; `None` while a pod that the source no longer has is on its
    /// way out.
    fn uids(&self) -> Option<BTreeSet<String>> {
        let uids = || {
            let inventory = self.inventory.borrow();
            let known = inventory.pods.values().map(|pod| pod.kubelet_uid().to_owned());
            known.chain(self.tasks.values().map(|task| task.uid.clone())).collect()
        };
        self.leaving.is_empty().then(uids)
    }

    /// Restores pods that an earlier agent set up and that are no longer known, if their namespace can be
    /// found.
    async fn remove_orphans(&self) {
        if self.shared.source.gone_is_deleted() {
            // Whatever still runs in them must be refused.
            return;
        }
        let inventory = Arc::clone(&self.inventory.borrow());
        let dataplane = Arc::clone(&self.shared.dataplane);
        let finder = Arc::clone(&self.shared.settings.finder);
        let removed = spawn_blocking(move || {
            let linked = dataplane.linked_pods()?;
            let known: BTreeSet<u32> = inventory
                .pods
                .values()
                .filter_map(|pod| finder.inode(pod, |inode| linked.contains(&inode)).transpose())
                .collect::<Result<_>>()?;
            for netns in netns::in_dir(finder.netns_dir())? {
                if !linked.contains(&netns.inode()) || known.contains(&netns.inode()) {
                    continue;
                }
                let path = netns.path().to_owned();
                warn!("restoring {}: no pod that is known has it", path.display());
                // One that fails does not keep others from being restored.
                if let Err(e) = restore(&dataplane, netns) {
                    warn!("cannot restore {}: {e:#}", path.display());
                }
            }
            anyhow::Ok(())
        });
        if let Err(e) = removed.await.map_err(Into::into).flatten() {
            warn!("cannot restore what a former agent has left: {e:#}");
        }
    }
}

impl<S: Source> Observer<S> {
    /// The source of pods, as text.
    pub fn source(&self) -> String {
        self.shared.source.describe()
    }

    /// The source's latest inventory, with its problems.
    pub fn inventory(&self) -> Arc<Inventory> {
        Arc::clone(&self.shared.source.inventory().borrow())
    }

    /// `None` once the agent, since it started, has tried to bring every pod to its desired state. Otherwise,
    /// what it is waiting for.
    pub fn unreconciled(&self) -> Option<String> {
        let views = self.shared.views();
        let waiting: Vec<&PodKey> =
            views.iter().filter(|(_, view)| !view.tried).map(|(key, _)| key).collect();
        let first = waiting.first()?;
        Some(format!(
            "{} of {} pods are not reconciled yet, {first} among them",
            waiting.len(),
            views.len()
        ))
    }

    /// How many pods are left alone because istio-cni redirects them.
    pub fn left_alone(&self) -> usize {
        self.shared.views().values().filter(|view| view.left_alone).count()
    }

    /// The pods that do not bypass, as far as their tasks know.
    pub fn remaining(&self) -> Remaining {
        let mut remaining = Remaining::default();
        for view in self.shared.views().values() {
            let state = view.state();
            if state != PodState::Bypassing {
                remaining.pods += 1;
                remaining.failed += usize::from(state == PodState::Failed);
                remaining.why = remaining.why.or_else(|| view.problem.clone());
            }
        }
        remaining
    }

    /// The proxies and the workloads they serve.
    pub fn zds(&self) -> zds::ZdsStatus {
        self.shared.zds.status()
    }

    /// The requested pods, each with what the kernel has for it at this moment.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read.
    pub async fn pods(
        &self,
        overrides: &Overrides,
        asked: impl Fn(&Pod) -> bool,
    ) -> Result<Vec<PodStatus>> {
        let views: Vec<View> =
            self.shared.views().values().filter(|view| asked(&view.pod)).cloned().collect();
        let dataplane = Arc::clone(&self.shared.dataplane);
        let now = SystemTime::now();
        let overridden: Vec<Option<OverrideStatus>> = views
            .iter()
            .map(|view| {
                let (target, found) = overrides.find(&view.pod.key, now)?;
                Some(OverrideStatus { mode: found.mode, target, until: found.until })
            })
            .collect();
        spawn_blocking(move || {
            let mut counters = dataplane.counters()?;
            Ok(views
                .into_iter()
                .zip(overridden)
                .map(|(view, overridden)| {
                    let mut state = view.state();
                    let (seen, since) = (state, Moment::of(view.since));
                    let leaving = state == PodState::Leaving;
                    let mut message = view.problem;
                    let mut degrade = |message: &mut Option<String>, why: String| {
                        if state == PodState::Enrolled {
                            state = PodState::Degraded;
                        }
                        message.get_or_insert(why);
                    };
                    let mut kernel = None;
                    if let Some(netns) = view.netns.as_ref().filter(|_| view.standing.present) {
                        match dataplane.inspect(netns, &view.traffic) {
                            Ok(found) => {
                                let missing = names(&found.missing);
                                // A pod that leaves loses them one by one.
                                if !missing.is_empty() && !leaving {
                                    let missing = missing.join(", ");
                                    degrade(&mut message, format!("missing in the pod: {missing}"));
                                }
                                kernel = Some(KernelStatus {
                                    complete: found.missing.is_empty(),
                                    present: names(&found.present),
                                    missing: names(&found.missing),
                                });
                            }
                            Err(e) => degrade(&mut message, format!("{e:#}")),
                        }
                        let captures_dns = view.standing.captured && view.traffic.captures_dns();
                        if captures_dns {
                            match dataplane.dns_listens(netns) {
                                Ok(true) => {}
                                Ok(false) => degrade(&mut message, NO_DNS.to_owned()),
                                Err(e) => degrade(&mut message, format!("{e:#}")),
                            }
                        }
                    }
                    let mut traffic = view.traffic;
                    traffic.dns_capture &= view.standing.present;
                    let netns = view.netns.as_ref().map(|netns| netns.netns.inode()).or(view.noted);
                    let counters = netns.and_then(|inode| counters.remove(&inode));
                    let forwards = counters.as_ref().is_some_and(|c| c.contains_key("forwarded"));
                    if forwards {
                        message.get_or_insert_with(|| FORWARDS.to_owned());
                    }
                    PodStatus {
                        namespace: view.pod.key.namespace,
                        name: view.pod.key.name,
                        uid: view.pod.uid,
                        ips: view.pod.ips,
                        state,
                        // What was found just now may have been so for a while.
                        since: (state == seen).then_some(since),
                        reason: view.decision.reason,
                        message,
                        overridden,
                        traffic: Some(traffic).filter(|t| *t != Traffic::default()),
                        netns,
                        kernel,
                        counters: counters
                            .unwrap_or_default()
                            .into_iter()
                            .map(|(name, value)| (name.to_owned(), value))
                            .collect(),
                    }
                })
                .collect())
        })
        .await
        .context("read the kernel's state")?
    }
}

/// The pods, each with what CNI reported about its sandbox. That is ahead of the pod's status, which has no
/// address yet, or still those of an earlier sandbox. An address that CNI has given to one pod no longer
/// belongs to any other.
fn in_sandboxes<'a>(
    pods: impl Iterator<Item = &'a Pod>,
    sandboxes: &Sandboxes,
) -> impl Iterator<Item = (Pod, Option<Arc<Sandbox>>)> {
    let given: BTreeSet<IpAddr> =
        sandboxes.values().flat_map(|sandbox| sandbox.addresses.iter().copied()).collect();
    pods.map(move |pod| {
        let (mut pod, sandbox) = (pod.clone(), sandboxes.get(pod.kubelet_uid()).cloned());
        match &sandbox {
            Some(sandbox) => pod.ips.clone_from(&sandbox.addresses),
            None if pod.host_network => {}
            None => pod.ips.retain(|ip| !given.contains(ip)),
        }
        (pod, sandbox)
    })
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    spawn_blocking(f).await.context("run a blocking task")?
}

fn names(parts: &[Part]) -> Vec<String> {
    parts.iter().map(Part::to_string).collect()
}

/// Restores a namespace to what it was before its pod was set up.
fn restore(dataplane: &Dataplane, netns: Netns) -> Result<()> {
    let pod = PodNetns::existing(netns)?;
    dataplane.release(&pod)?;
    dataplane.settle_wholly(&pod)?;
    dataplane.remove(&pod)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1 as k8s;
    use serde_json::json;

    use super::*;

    fn pod(name: &str, host_network: bool, ips: &[&str]) -> Pod {
        let ips: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        let pod: k8s::Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "shop", "uid": name},
            "spec": {"hostNetwork": host_network},
            "status": {"podIPs": ips},
        }))
        .unwrap();
        Pod::try_from(&pod).unwrap()
    }

    #[test]
    fn what_cni_told_is_ahead_of_the_status_and_an_address_is_one_pods() {
        let sandbox = |uid: &str, ips: [&str; 2]| {
            let addresses = ips.map(|ip| ip.parse().unwrap()).to_vec();
            let netns = format!("/run/netns/{uid}").into();
            (uid.to_owned(), Arc::new(Sandbox { uid: uid.to_owned(), netns, addresses }))
        };
        let sandboxes = Arc::new(BTreeMap::from([
            sandbox("starting", ["10.0.0.1", "fd00::1"]),
            sandbox("anew", ["10.0.0.2", "fd00::2"]),
        ]));
        let pods = [
            pod("starting", false, &[]),
            pod("anew", false, &["10.0.0.9", "fd00::9"]),
            pod("former", false, &["10.0.0.1", "fd00::8"]),
            pod("found", false, &["10.0.0.7", "fd00::7"]),
            pod("node", true, &["10.0.0.2", "fd00::6"]),
        ];
        let known: Vec<(String, bool, String)> = in_sandboxes(pods.iter(), &sandboxes)
            .map(|(pod, sandbox)| {
                let ips: Vec<String> = pod.ips.iter().map(ToString::to_string).collect();
                (pod.uid, sandbox.is_some(), ips.join(" "))
            })
            .collect();
        let expected = [
            ("starting", true, "10.0.0.1 fd00::1"),
            ("anew", true, "10.0.0.2 fd00::2"),
            ("former", false, "fd00::8"),
            ("found", false, "10.0.0.7 fd00::7"),
            ("node", false, "10.0.0.2 fd00::6"),
        ];
        assert_eq!(known, expected.map(|(uid, told, ips)| (uid.to_owned(), told, ips.to_owned())));
    }
}
