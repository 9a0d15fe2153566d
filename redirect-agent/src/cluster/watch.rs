//! Follows the API server, and says what becomes unexpected and what no longer is.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    mem::take,
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
    collect::{AGENTS, Query, Server, UNFINISHED, look_into, needs_agent},
    object::{AgentSeen, NamespaceSeen, PodSeen},
    report::Report,
    snapshot::Snapshot,
};
use crate::{
    output::printable,
    source::kube::{Identity, Kept, SERVER, UNREACHABLE, follow},
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

/// Follows what `snapshot` knows, and gives each new report to `each`, until that says that it is enough.
/// Settings are those that were read first.
///
/// # Errors
///
/// What `each` returns.
pub async fn watch(
    server: &Server,
    query: &Query,
    mut snapshot: Snapshot,
    mut each: impl FnMut(Report) -> Result<()>,
) -> Result<()> {
    let (sender, mut updates) = mpsc::channel(QUEUE);
    let _followers = start(server, query, &snapshot, &sender);
    let reading = snapshot.settings.reading();
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
        followed.lend(&mut snapshot);
        if looked.is_none_or(|looked| last - looked >= AT_LEAST) {
            look_into(server, query, &mut snapshot).await;
            looked = Some(last);
        }
        each(snapshot.report(SystemTime::now()))?;
        followed.take_back(&mut snapshot);
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
    query: &Query,
    snapshot: &Snapshot,
    sender: &mpsc::Sender<Update>,
) -> JoinSet<()> {
    let all = watcher::Config::default().timeout(WATCH_TIMEOUT).page_size(query.chunk);
    let mut start = Start { url: &server.url, sender, followers: JoinSet::new() };
    let pods = server.pods(query.namespace.as_deref());
    start.follow("pods", pods, all.clone().fields(UNFINISHED), Update::Pod);
    let of_one = |namespace: &String| format!("metadata.name={namespace}");
    let of_one = query.namespace.as_ref().map_or_else(String::new, of_one);
    let namespaces = Api::all(server.client.clone());
    start.follow("namespaces", namespaces, all.clone().fields(&of_one), Update::Namespace);
    if snapshot.nodes.is_some() {
        start.follow("nodes", Api::all(server.client.clone()), all.clone(), Update::Node);
    }
    if snapshot.agents.is_some() {
        start.follow("agents", server.agents(query), all.labels(AGENTS), |event| {
            Update::Agent(Box::new(event))
        });
    }
    start.followers
}

impl Identity for Result<PodSeen, String> {
    fn uid(&self) -> Option<&str> {
        self.as_ref().ok().map(|pod| pod.pod.uid.as_str())
    }
}

impl Identity for NamespaceSeen {}

impl Identity for () {}

impl Identity for AgentSeen {}

impl Followed {
    /// Applies an update. Returns whether something may have changed.
    fn take(&mut self, update: Update, reading: Reading) -> bool {
        match update {
            Update::Pod(event) => {
                self.pods.apply(event, |pod, _| Some(PodSeen::read(pod, reading)));
            }
            Update::Namespace(event) => self
                .namespaces
                .apply(event, |namespace, _| Some(NamespaceSeen::from(namespace.metadata))),
            Update::Node(event) => {
                self.nodes.apply(event, |node, _| needs_agent(&node.metadata).map(drop));
            }
            Update::Agent(event) => self.agents.apply(*event, |pod, _| AgentSeen::read(&pod)),
            Update::Trouble(why) => {
                if self.is_news(&why, Instant::now()) {
                    eprintln!("{}; retrying", printable(&why));
                }
                return false;
            }
        }
        true
    }

    /// Whether the trouble has not been told for a while; then it counts as told.
    fn is_news(&mut self, why: &str, now: Instant) -> bool {
        self.told.retain(|_, told| now - *told < AGAIN);
        let is_news = !self.told.contains_key(why);
        if is_news {
            self.told.insert(why.to_owned(), now);
        }
        is_news
    }

    /// Moves what has been listed once into the snapshot, in place of what was known before. There may be
    /// 100,000 pods: they are neither copied nor kept twice.
    fn lend(&mut self, snapshot: &mut Snapshot) {
        move_if(self.pods.complete, &mut self.pods.known, &mut snapshot.pods);
        move_if(self.namespaces.complete, &mut self.namespaces.known, &mut snapshot.namespaces);
        if let Some(nodes) = &mut snapshot.nodes {
            move_if(self.nodes.complete, &mut self.nodes.known, nodes);
        }
        if let Some(agents) = &mut snapshot.agents {
            move_if(self.agents.complete, &mut self.agents.known, agents);
        }
    }

    /// Moves it back.
    fn take_back(&mut self, snapshot: &mut Snapshot) {
        move_if(self.pods.complete, &mut snapshot.pods, &mut self.pods.known);
        move_if(self.namespaces.complete, &mut snapshot.namespaces, &mut self.namespaces.known);
        if let Some(nodes) = &mut snapshot.nodes {
            move_if(self.nodes.complete, nodes, &mut self.nodes.known);
        }
        if let Some(agents) = &mut snapshot.agents {
            move_if(self.agents.complete, agents, &mut self.agents.known);
        }
    }
}

fn move_if<T: Default>(moves: bool, from: &mut T, to: &mut T) {
    if moves {
        *to = take(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": name, "uid": name},
            "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Running"},
        }))
        .unwrap()
    }

    #[test]
    fn what_was_known_before_stays_until_the_list_is_complete_and_then_goes() {
        let mut snapshot = Snapshot::default();
        let reading = snapshot.settings.reading();
        snapshot.pods.insert("shop/before".to_owned(), PodSeen::read(pod("before"), reading));
        let mut followed = Followed::default();
        let names = |snapshot: &Snapshot| snapshot.pods.keys().cloned().collect::<Vec<_>>();
        let take = |followed: &mut Followed, event| followed.take(Update::Pod(event), reading);
        take(&mut followed, Event::Init);
        take(&mut followed, Event::InitApply(pod("now")));
        followed.lend(&mut snapshot);
        assert_eq!(names(&snapshot), ["shop/before"]);
        followed.take_back(&mut snapshot);
        assert_eq!(names(&snapshot), ["shop/before"]);
        take(&mut followed, Event::InitDone);
        followed.lend(&mut snapshot);
        assert_eq!(names(&snapshot), ["shop/now"]);
        assert!(followed.pods.known.is_empty(), "nothing is kept twice");
        followed.take_back(&mut snapshot);
        assert!(snapshot.pods.is_empty(), "nothing is kept twice");
        take(&mut followed, Event::Apply(pod("more")));
        followed.lend(&mut snapshot);
        assert_eq!(names(&snapshot), ["shop/more", "shop/now"]);
        assert!(snapshot.nodes.is_none(), "they cannot be listed");
    }

    #[test]
    fn trouble_is_told_again_after_a_while_and_is_not_kept_for_ever() {
        let mut followed = Followed::default();
        let start = Instant::now();
        assert!(followed.is_news("pods: 403", start));
        assert!(!followed.is_news("pods: 403", start + AGAIN / 2));
        assert!(followed.is_news("nodes: 403", start + AGAIN / 2));
        assert!(followed.is_news("pods: 403", start + AGAIN));
        assert!(followed.is_news("agents: 403", start + 3 * AGAIN));
        assert_eq!(followed.told.len(), 1);
    }
}
