//! Follows the API server, and says what becomes wrong and what no longer is.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    mem::swap,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1 as k8s;
use kube::{
    Api, Resource,
    api::{DynamicObject, PartialObjectMeta},
    runtime::watcher::{self, Event},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    collect::{AGENTS, Asked, Server, UNFINISHED, look_into, needs_agent},
    object::{AgentSeen, NamespaceSeen, PodSeen},
    report::Report,
    seen::Seen,
};
use crate::{
    output::printable,
    source::kube::{Kept, SERVER, UNREACHABLE, follow, name},
    words::Reading,
};

/// How often the report is made anew at most: at 1,000 nodes, something always changes.
const PAUSE: Duration = Duration::from_secs(1);
/// How often it is made anew at least: a pod that has had the time to start becomes missing.
const AT_LEAST: Duration = Duration::from_secs(10);
/// After how long the same trouble is told again.
const AGAIN: Duration = Duration::from_secs(60);
/// How many updates may wait.
const QUEUE: usize = 256;
/// The API server ends a watch in order after this time, in seconds.
const WATCH_TIMEOUT: u32 = 60;

enum Update {
    Pod(Event<DynamicObject>),
    Namespace(Event<PartialObjectMeta<k8s::Namespace>>),
    Node(Event<PartialObjectMeta<k8s::Node>>),
    Agent(Box<Event<k8s::Pod>>),
    /// Why something cannot be followed at the moment.
    Trouble(String),
}

/// What is followed.
#[derive(Default)]
struct Followed {
    pods: Kept<Result<PodSeen, String>>,
    namespaces: Kept<NamespaceSeen>,
    nodes: Kept<()>,
    agents: Kept<AgentSeen>,
    /// What went wrong, and when that was told last.
    told: BTreeMap<String, Instant>,
}

/// Follows what `seen` knows, and gives each new report to `each`, until that says that it is enough.
/// Settings are those that were read first.
///
/// # Errors
///
/// What `each` returns.
pub async fn watch(
    server: &Server,
    asked: &Asked,
    mut seen: Seen,
    mut each: impl FnMut(Report) -> Result<()>,
) -> Result<()> {
    let (sender, mut updates) = mpsc::channel(QUEUE);
    let _followers = start(server, asked, &seen, &sender);
    let reading = seen.settings.reading();
    let mut followed = Followed::default();
    let mut last = Instant::now();
    // Each look lists all Events of the agents.
    let mut looked = None;
    loop {
        let mut due = last + AT_LEAST;
        loop {
            tokio::select! {
                update = updates.recv() => {
                    let update = update.context("follow the API server")?;
                    if followed.take(update, reading) {
                        due = due.min(last + PAUSE);
                    }
                }
                () = sleep_until(due) => break,
            }
        }
        last = Instant::now();
        followed.exchange(&mut seen);
        if looked.is_none_or(|looked| last - looked >= AT_LEAST) {
            look_into(server, asked, &mut seen).await;
            looked = Some(last);
        }
        each(seen.report(SystemTime::now()))?;
        followed.exchange(&mut seen);
    }
}

/// What starts the tasks that follow.
struct Start<'a> {
    url: &'a str,
    sender: &'a mpsc::Sender<Update>,
    followers: JoinSet<()>,
}

impl Start<'_> {
    fn follow<K>(
        &mut self,
        what: &'static str,
        api: Api<K>,
        config: watcher::Config,
        update: fn(Event<K>) -> Update,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
        K::DynamicType: Clone,
    {
        let url = self.url.to_owned();
        let update = move |event: Result<_, String>| match event {
            Ok(event) => update(event),
            // True of all that is followed, and so told once.
            Err(why) if why.starts_with(UNREACHABLE) => {
                Update::Trouble(why.replacen(SERVER, &url, 1))
            }
            Err(why) => Update::Trouble(format!("watch {what}: {}", why.replacen(SERVER, &url, 1))),
        };
        self.followers.spawn(follow(api, config, self.sender.clone(), update));
    }
}

fn start(
    server: &Server,
    asked: &Asked,
    seen: &Seen,
    sender: &mpsc::Sender<Update>,
) -> JoinSet<()> {
    let all = watcher::Config::default().timeout(WATCH_TIMEOUT).page_size(asked.chunk);
    let mut start = Start { url: &server.url, sender, followers: JoinSet::new() };
    let pods = server.pods(asked.namespace.as_deref());
    start.follow("pods", pods, all.clone().fields(UNFINISHED), Update::Pod);
    let of_one = |namespace: &String| format!("metadata.name={namespace}");
    let of_one = asked.namespace.as_ref().map_or_else(String::new, of_one);
    let namespaces = Api::all(server.client.clone());
    start.follow("namespaces", namespaces, all.clone().fields(&of_one), Update::Namespace);
    if seen.nodes.is_some() {
        start.follow("nodes", Api::all(server.client.clone()), all.clone(), Update::Node);
    }
    if seen.agents.is_some() {
        start.follow("agents", server.agents(asked), all.labels(AGENTS), |event| {
            Update::Agent(Box::new(event))
        });
    }
    start.followers
}

/// Applies an event; of an object that does not count any more, `read` makes nothing.
fn apply<K: Resource, T>(kept: &mut Kept<T>, event: Event<K>, read: impl FnOnce(K) -> Option<T>) {
    let listed = matches!(event, Event::InitApply(_));
    match event {
        Event::Init => kept.init(),
        Event::InitDone => kept.init_done(),
        Event::InitApply(object) | Event::Apply(object) => {
            let name = name(object.meta());
            let target = kept.target(listed);
            match read(object) {
                Some(read) => drop(target.insert(name, read)),
                None => drop(target.remove(&name)),
            }
        }
        Event::Delete(object) => drop(kept.known.remove(&name(object.meta()))),
    }
}

impl Followed {
    /// Applies an update. Returns whether something may have changed.
    fn take(&mut self, update: Update, reading: Reading) -> bool {
        match update {
            Update::Pod(event) => {
                apply(&mut self.pods, event, |pod| Some(PodSeen::read(pod, reading)));
            }
            Update::Namespace(event) => apply(&mut self.namespaces, event, |namespace| {
                Some(NamespaceSeen::from(namespace.metadata))
            }),
            Update::Node(event) => {
                apply(&mut self.nodes, event, |node| needs_agent(&node.metadata).map(drop));
            }
            Update::Agent(event) => {
                apply(&mut self.agents, *event, |pod| AgentSeen::read(&pod));
            }
            Update::Trouble(why) => {
                let now = Instant::now();
                let told = self.told.get(&why).is_some_and(|told| now - *told < AGAIN);
                if !told {
                    eprintln!("{}; retrying", printable(&why));
                    self.told.insert(why, now);
                }
                return false;
            }
        }
        true
    }

    /// Exchanges what has been listed once for what was known before. There may be 100,000 pods.
    fn exchange(&mut self, seen: &mut Seen) {
        if self.pods.complete {
            swap(&mut seen.pods, &mut self.pods.known);
        }
        if self.namespaces.complete {
            swap(&mut seen.namespaces, &mut self.namespaces.known);
        }
        if self.nodes.complete {
            swap(seen.nodes.get_or_insert_default(), &mut self.nodes.known);
        }
        if self.agents.complete {
            swap(seen.agents.get_or_insert_default(), &mut self.agents.known);
        }
    }
}
