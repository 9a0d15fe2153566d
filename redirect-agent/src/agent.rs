//! The running agent: puts its parts together, and answers the control API.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use futures_util::{Stream, StreamExt as _};
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{Instant, interval, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    announce::Effect,
    cli::{Flags, SourceSpec},
    cni::{
        entry::Entry,
        install::{self, Installer},
        server::{self as cni, Door},
    },
    control::{self, Answer, Author, Remaining, StatusRequest},
    dataplane::{self, Dataplane},
    explain::{self, Explanation, gather::Answerer},
    health::{self, Condition},
    journal,
    latest::Latest,
    membership::{self, Decision, PodKey, decide},
    metrics::{Metrics, Now},
    output::{NodeOverride, PodStatus, Status},
    overrides::{Change, Mode, Moment, Overrides, Store, Target},
    page::{self, Audience},
    probes::{self, Probes},
    reconcile::{Admission, Observer, Reconciler, Settings},
    source::{Event, EventKind, Inventory, Problem, Source, dir, kube},
    verdicts,
    verify::{self, Verification},
    words::{self, Reading},
    zds,
};

/// How often the agent looks for the cgroups of the proxies. They do not change unless somebody moves a
/// proxy's process, whose connections are refused until then.
const PROXIES_INTERVAL: Duration = Duration::from_secs(10);
/// How old what the metrics say of the pods may be. Everybody can ask for them, and a look at every pod
/// takes a while.
const METRICS_AGE: Duration = Duration::from_secs(1);

/// How to run the agent.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where pods and namespaces come from.
    pub source: SourceSpec,
    /// Where the API server and the credentials for it are, for a cluster as the source.
    pub kubeconfig: Option<PathBuf>,
    /// This node's name.
    pub node: String,
    /// What to do with the pods.
    pub settings: Settings,
    /// Where and how to run the datapath.
    pub dataplane: dataplane::Options,
    /// What the agent has to remember is kept here.
    pub state_dir: PathBuf,
    /// Where the commands reach the agent.
    pub control_socket: PathBuf,
    /// Where proxies connect.
    pub zds_socket: PathBuf,
    /// Where the CNI plugin asks.
    pub cni_socket: PathBuf,
    /// How long it waits at most.
    pub cni_timeout: Duration,
    /// Where to install the CNI plugin, and with which entry, if at all.
    pub install_cni: Option<(install::Dirs, Entry)>,
    /// What is taken for kubelet's probes.
    pub probes: probes::Settings,
    /// Where health and metrics are served.
    pub health: health::Address,
    /// Who may see the status page there.
    pub page: Audience,
    /// The flags that this comes from.
    pub flags: Flags,
}

/// Runs the agent until `shutdown`. What it has set up in the kernel stays, and the next one takes
/// it over.
///
/// # Errors
///
/// When it cannot start, or one of its parts fails.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<()> {
    // First of all: the sockets are another agent's while that has the directory.
    let dataplane = Arc::new(Dataplane::open(&options.dataplane)?);
    let ended = run_on(Arc::clone(&dataplane), options, shutdown).await;
    if ended.is_err() {
        // An agent that could not start leaves nothing behind.
        if let Err(e) = dataplane.unpin_if_unused() {
            warn!("cannot remove the pinned maps: {e:#}");
        }
    }
    ended
}

async fn run_on(
    dataplane: Arc<Dataplane>,
    options: Options,
    shutdown: CancellationToken,
) -> Result<()> {
    let control = control::Server::bind(&options.control_socket)?;
    let cni = cni::Server::bind(&options.cni_socket)?;
    let zds = zds::Server::bind(&options.zds_socket)?;
    let zds = zds.with_admission({
        let dataplane = Arc::clone(&dataplane);
        move |process| Ok(Box::new(dataplane.admit_proxy(process)?))
    });
    let mut ground = Ground {
        control,
        overrides: Arc::new(Store::open(&options.state_dir)?),
        probes: Probes::open(Arc::clone(&dataplane), options.probes.clone()).await?,
        dataplane,
        zds,
        metrics: Metrics::default(),
        door: Arc::new(Door::new(options.settings.membership.excluded_namespaces.clone())),
        parts: JoinSet::new(),
    };
    // From now on, so that the plugin is told to try again and does not find nobody.
    let (door, metrics) = (Arc::clone(&ground.door), ground.metrics.clone());
    let dataplane = Arc::clone(&ground.dataplane);
    ground.parts.spawn(follow_proxies(dataplane, shutdown.clone()));
    ground.parts.spawn(cni.run(door, metrics, shutdown.clone()));
    let (node, stop) = (options.node.clone(), shutdown.clone());
    match options.source.clone() {
        SourceSpec::Dir(path) => {
            let waiting = Waiting::for_source(format!("dir:{}", path.display()));
            let opening = async move {
                let (source, watcher) = dir::open(path, node).await?;
                Ok((source, watcher.run(stop)))
            };
            serve(options, ground, waiting, opening, shutdown).await
        }
        SourceSpec::Kube => {
            let config = kube::config(options.kubeconfig.as_deref()).await?;
            let waiting = Waiting::for_source(format!("kube:{}", config.cluster_url));
            let (membership, metrics) =
                (options.settings.membership.clone(), ground.metrics.clone());
            let told = Arc::clone(&waiting);
            let opening = async move {
                let tell = |problems: &[Problem]| told.tell(problems);
                let (source, watcher) =
                    kube::open(config, &node, &membership, &metrics, tell).await?;
                Ok((source, watcher.run(stop)))
            };
            serve(options, ground, waiting, opening, shutdown).await
        }
    }
}

/// Looks now and then whether the connected proxies have moved to other cgroups.
async fn follow_proxies(dataplane: Arc<Dataplane>, shutdown: CancellationToken) -> Result<()> {
    let mut tick = interval(PROXIES_INTERVAL);
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        let dataplane = Arc::clone(&dataplane);
        let look = move || dataplane.follow_proxies();
        if let Err(e) = spawn_blocking(look).await.context("look at the proxies")? {
            warn!("look at the proxies: {e:#}");
        }
    }
    Ok(())
}

/// What the agent waits for until it knows the pods.
struct Waiting {
    source: String,
    problems: Mutex<Vec<Problem>>,
}

impl Waiting {
    fn for_source(source: String) -> Arc<Self> {
        Arc::new(Self { source, problems: Mutex::default() })
    }

    /// Takes over what stands in the way.
    fn tell(&self, problems: &[Problem]) {
        *self.problems.lock().unwrap_or_else(PoisonError::into_inner) = problems.to_vec();
    }

    /// That, in a line.
    fn explain(&self) -> String {
        let mut line = format!("waiting for {}", self.source);
        for problem in &*self.problems.lock().unwrap_or_else(PoisonError::into_inner) {
            let _infallible = write!(line, "; {problem}");
        }
        line
    }
}

/// What the agent has before it knows of any pod.
struct Ground {
    control: control::Server,
    overrides: Arc<Store>,
    dataplane: Arc<Dataplane>,
    probes: Probes,
    zds: zds::Server,
    metrics: Metrics,
    door: Arc<Door<Admission>>,
    parts: JoinSet<Result<()>>,
}

/// Runs on what is known of the pods: `opening` gives the source once that is so, and what keeps it
/// current. Meanwhile it answers already.
async fn serve<S: Source>(
    options: Options,
    Ground { control, overrides, dataplane, probes, zds, metrics, door, mut parts }: Ground,
    waiting: Arc<Waiting>,
    opening: impl Future<Output = Result<(S, impl Future<Output = Result<()>> + Send + 'static)>>,
    shutdown: CancellationToken,
) -> Result<()> {
    let verdicts = Arc::new(verdicts::Hub::new(Arc::clone(&dataplane), shutdown.clone()));
    parts.spawn(Arc::clone(&verdicts).run());
    parts.spawn(probes.clone().run(shutdown.clone()));
    // Whoever is asked by the plugin is there already.
    let cni_plugin = options.install_cni.clone().map(|(dirs, entry)| {
        let installer = Installer::new(dirs, entry);
        let missing = installer.missing();
        parts.spawn(installer.run(shutdown.clone()));
        missing
    });
    let (observer, looked) = (OnceLock::new(), Latest::default());
    let agent = Arc::new(Agent {
        options,
        started: Moment::of(SystemTime::now()),
        overrides,
        observer,
        looked,
        words: Arc::default(),
        looking: tokio::sync::Mutex::default(),
        waiting,
        probes,
        verdicts,
        metrics,
        cni_plugin,
    });
    if let health::Address::At(address) = agent.options.health {
        let mut server = health::Server::bind(address).await?;
        if agent.options.page != Audience::Off {
            let page = page::router(Arc::clone(&agent), &agent.options.node);
            server = server.with_page(agent.options.page, page);
        }
        let (agent, shutdown) = (Arc::clone(&agent), shutdown.clone());
        parts.spawn(async move {
            server.run(agent, shutdown).await;
            Ok(())
        });
    }
    parts.spawn(control.run(Arc::clone(&agent), shutdown.clone()));
    match shutdown.run_until_cancelled(opening).await {
        Some(Ok((source, following))) => {
            let mut reconciler = Reconciler::new(
                agent.options.settings.clone(),
                source,
                Arc::clone(&agent.overrides),
                dataplane,
                zds.handle(),
                agent.metrics.clone(),
            );
            // A proxy stops whatever its snapshot does not name: every pod must be known first.
            reconciler.introduce().await;
            door.open(reconciler.admission(agent.options.cni_timeout));
            let observer = agent.observer.get_or_init(|| Arc::new(reconciler.observer()));
            info!(
                version = env!("CARGO_PKG_VERSION"),
                node = agent.options.node,
                source = observer.source(),
                "running"
            );
            let (words, observer) = (Arc::clone(&agent.words), Arc::clone(observer));
            let settings = &agent.options.settings;
            let reading = Reading::new(&settings.membership, settings.traffic.sidecar_annotations);
            let stop = shutdown.clone();
            parts.spawn(async move {
                words.follow(reading, observer, stop).await;
                Ok(())
            });
            run_parts(&mut parts, following, zds, reconciler, &shutdown);
        }
        Some(Err(e)) => {
            shutdown.cancel();
            return Err(e);
        }
        None => info!("stopped before the pods were known"),
    }

    let mut result = Ok(());
    while let Some(ended) = parts.join_next().await {
        // One part that fails takes the others along: whoever supervises the agent starts it anew.
        shutdown.cancel();
        if let Err(e) = ended.context("run a part of the agent").flatten() {
            error!("{e:#}");
            result = Err(e);
        }
    }
    info!("stopped; pods stay as they are");
    result
}

/// Starts what needs to know the pods.
fn run_parts<S: Source>(
    parts: &mut JoinSet<Result<()>>,
    following: impl Future<Output = Result<()>> + Send + 'static,
    zds: zds::Server,
    reconciler: Reconciler<S>,
    shutdown: &CancellationToken,
) {
    parts.spawn(following);
    let stop = shutdown.clone();
    parts.spawn(async move {
        zds.run(stop.cancelled_owned()).await;
        Ok(())
    });
    let stop = shutdown.clone();
    parts.spawn(async move {
        reconciler.run(stop).await;
        Ok(())
    });
}

struct Agent<S> {
    options: Options,
    started: Moment,
    overrides: Arc<Store>,
    /// Set once the pods are known.
    observer: OnceLock<Arc<Observer<S>>>,
    /// What was found in the pods.
    looked: Latest<Vec<PodStatus>>,
    /// What is misspelled on the pods.
    words: Arc<words::Told>,
    /// Held by who looks at some pods only.
    looking: tokio::sync::Mutex<()>,
    waiting: Arc<Waiting>,
    probes: Probes,
    verdicts: Arc<verdicts::Hub>,
    metrics: Metrics,
    /// What is missing of it, if it is to be installed.
    cni_plugin: Option<install::Missing>,
}

impl<S: Source> Agent<S> {
    /// Who looks at the pods.
    ///
    /// # Errors
    ///
    /// As long as they are not known.
    fn observer(&self) -> Result<&Arc<Observer<S>>> {
        self.observer
            .get()
            .with_context(|| format!("it does not know the pods yet: {}", self.waiting.explain()))
    }

    /// Every pod, as it was found at most `max_age` ago. Whoever asks, and however often, there is one look
    /// at a time: the threads for blocking calls are those that the pods' steps need.
    async fn pods(
        &self,
        observer: &Arc<Observer<S>>,
        max_age: Duration,
    ) -> Result<Arc<Vec<PodStatus>>> {
        let look = || {
            let (observer, overrides) = (Arc::clone(observer), self.overrides.current());
            async move { observer.pods(&overrides, |_| true).await }
        };
        self.looked.get(max_age, look).await
    }

    /// Some pods, as they are now.
    async fn some_pods(
        &self,
        observer: &Observer<S>,
        of: &StatusRequest,
    ) -> Result<Vec<PodStatus>> {
        let _one_at_a_time = self.looking.lock().await;
        observer.pods(&self.overrides.current(), |pod| of.selects(pod)).await
    }
}

impl<S: Source> health::Agent for Agent<S> {
    fn conditions(&self) -> Vec<Condition> {
        let missing = match self.observer.get() {
            Some(observer) => observer.unreconciled(),
            None => Some(self.waiting.explain()),
        };
        let pods = Condition { name: "pods", missing };
        let plugin = self.cni_plugin.iter();
        let plugin = plugin.map(|plugin| Condition { name: "cni plugin", missing: plugin.get() });
        [pods].into_iter().chain(plugin).collect()
    }

    async fn metrics(&self) -> Result<String> {
        let (pods, proxies) = match self.observer.get() {
            Some(observer) => {
                (self.pods(observer, METRICS_AGE).await?, observer.zds().proxies.len())
            }
            None => (Arc::default(), 0),
        };
        let follows_kubelet = self.probes.in_force().kubelet.is_some();
        let left_alone = self.observer.get().map_or(0, |observer| observer.left_alone());
        let mark_alone = self.observer.get().map(|observer| observer.mark_alone()).transpose()?;
        let proxys_cgroup = mark_alone.flatten().is_none();
        let totals = match self.observer.get() {
            Some(observer) => observer.totals().await?,
            None => BTreeMap::new(),
        };
        let (pods, totals) = (&pods, &totals);
        let now = Now { pods, totals, proxies, proxys_cgroup, follows_kubelet, left_alone };
        self.metrics.report(&now).context("write the metrics")
    }
}

impl<S: Source> control::Agent for Agent<S> {
    async fn status(&self, of: StatusRequest) -> Result<Status> {
        let (overrides, now) = (self.overrides.current(), SystemTime::now());
        let unknown = Status {
            node: self.options.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: Some(self.started),
            source: self.waiting.source.clone(),
            waiting: None,
            proxies: 0,
            proxy_since: None,
            no_proxy_since: None,
            mark_alone: None,
            pause: overrides.pause(now).cloned(),
            overrides: Vec::new(),
            probes: self.probes.in_force(),
            problems: Vec::new(),
            pods: Vec::new(),
        };
        let Some(observer) = self.observer.get() else {
            return Ok(Status { waiting: Some(self.waiting.explain()), ..unknown });
        };
        let proxies = observer.zds().proxies;
        let connected = proxies.first().map(|newest| Duration::from_secs(newest.connected_seconds));
        // As of now: whoever has changed something looks whether it is done.
        let mut pods = if of.is_all() {
            self.pods(observer, Duration::ZERO).await?.to_vec()
        } else {
            self.some_pods(observer, &of).await?
        };
        self.words.note(&mut pods);
        Ok(Status {
            source: observer.source(),
            proxies: u32::try_from(proxies.len()).unwrap_or(u32::MAX),
            proxy_since: connected.and_then(|age| now.checked_sub(age)).map(Moment::of),
            no_proxy_since: observer.proxies_away().map(|away| Moment::of(away.since)),
            mark_alone: observer.mark_alone()?,
            overrides: if of.is_all() {
                in_force(&overrides, &observer.inventory(), now)
            } else {
                Vec::new()
            },
            problems: observer.inventory().problems.clone(),
            pods,
            ..unknown
        })
    }

    async fn explain(&self, request: explain::Request) -> Result<Explanation> {
        let observer = self.observer()?;
        let until = Instant::now() + explain::WITHIN;
        let turn = timeout_at(until, self.looking.lock()).await;
        let _one_at_a_time = turn.context("other requests were not answered in time")?;
        let overrides = self.overrides.current();
        let answerer = Answerer {
            node: &self.options.node,
            observer,
            membership: &self.options.settings.membership,
            traffic: &self.options.settings.traffic,
            overrides: &overrides,
            until,
        };
        answerer.explain(request).await
    }

    async fn verify(&self, request: verify::Request, by: Author) -> Result<Verification> {
        let verify::Request { pod, to } = request;
        let asked = explain::Request { pod: pod.clone(), to: None };
        let explanation = control::Agent::explain(self, asked).await?;
        let peer = &by.peer;
        info!(
            target: crate::log::AUDITED,
            %pod,
            uid = peer.uid,
            pid = peer.pid,
            process = peer.process,
            "verify"
        );
        verify::run::verify(self.observer()?, &self.verdicts, &pod, explanation, to).await
    }

    fn observe(
        self: Arc<Self>,
        request: verdicts::Request,
    ) -> Result<impl Stream<Item = Vec<verdicts::Line>> + Send + 'static> {
        let (hub, node) = (Arc::clone(&self.verdicts), self.options.node.clone());
        let names = move || self.observer.get().map(|o| o.names()).unwrap_or_default();
        Ok(hub.observe(request, node, names)?.map(|told| told.lines))
    }

    fn journal(&self) -> Result<Vec<journal::Note>> {
        Ok(self.observer()?.journal().all())
    }

    fn settings(&self) -> Flags {
        self.options.flags.clone()
    }

    fn remaining(&self) -> Result<Remaining> {
        let observer = self.observer()?;
        Ok(observer.remaining())
    }

    async fn change(&self, change: Change, by: Author) -> Result<Answer> {
        let observer = self.observer()?;
        let membership = &self.options.settings.membership;
        refuse_excluded(&change, membership)?;
        let now = SystemTime::now();
        let before = self.overrides.current();
        let changed = self.overrides.change(change.clone(), now)?;
        let after = self.overrides.current();
        let inventory = observer.inventory();
        let decided: Vec<(PodKey, Decision)> = inventory
            .pods
            .values()
            .map(|pod| {
                let namespace = inventory.namespaces.get(&pod.key.namespace);
                (pod.key.clone(), decide(namespace, pod, membership))
            })
            .collect();
        let notes = after.notes(&change, decided.iter().map(|(key, d)| (key, *d)), now);
        let drain = self.options.settings.drain;
        let effect =
            Effect { change: &change, before: &before, after: &after, decided, drain, now };
        let message = effect.message();
        tell(&by, &change, changed, &message);
        if changed && !matches!(change, Change::Pause(_) | Change::Resume) {
            let (leaving, entering) = effect.moving();
            for pod in leaving.iter().chain(&entering).filter_map(|key| inventory.pods.get(key)) {
                let why = by.reason.as_ref().map_or_else(String::new, |why| format!(": {why}"));
                let message = format!("{} by {}{why}", change.verb(), by.peer);
                observer.record(pod, Event::new(EventKind::Overridden, message));
            }
        }
        Ok(Answer { changed, message, wanted: effect.wanted(), notes })
    }
}

/// The overrides in force, each with how many pods it is for.
fn in_force(overrides: &Overrides, inventory: &Inventory, now: SystemTime) -> Vec<NodeOverride> {
    let count = |target: &Target| inventory.pods.keys().filter(|pod| target.is_of(pod)).count();
    let all = overrides.all(now).map(|(target, found)| NodeOverride {
        target: target.clone(),
        pods: count(target),
        found: found.clone(),
    });
    all.collect()
}

/// No override brings in what is excluded: rather than keep one that does nothing, say so.
fn refuse_excluded(change: &Change, membership: &membership::Config) -> Result<()> {
    let Change::Set { target, value } = change else { return Ok(()) };
    let namespace = target.namespace();
    if value.mode == Mode::Enroll && membership.excluded_namespaces.contains(namespace) {
        bail!("refused: {namespace} is excluded (--excluded-namespaces)");
    }
    Ok(())
}

/// Writes down who changed what, and why: for an auditor, whether or not it changed anything.
fn tell(by: &Author, change: &Change, changed: bool, message: &str) {
    let until = match change {
        Change::Set { value, .. } => value.until,
        Change::Pause(pause) => pause.until,
        Change::Clear { .. } | Change::Resume => None,
    };
    let target = match change {
        Change::Set { target, .. } | Change::Clear { target } => target.to_string(),
        Change::Pause(_) | Change::Resume => "node".to_owned(),
    };
    info!(
        target: crate::log::AUDITED,
        command = change.verb(),
        target,
        changed,
        uid = by.peer.uid,
        pid = by.peer.pid,
        process = by.peer.process,
        reason = by.reason,
        until = until.map(|until| until.to_string()),
        "{message}"
    );
}
