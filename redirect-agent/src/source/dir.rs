//! A directory of ordinary Kubernetes manifests as the source.
//!
//! Every `*.yaml`, `*.yml` and `*.json` directly in the directory is read. Namespaces and Pods count, also
//! inside a `List`; everything else is ignored. An object that cannot be used keeps its last good version and
//! becomes a [`Problem`], so that a typing error never takes a pod out of the mesh.

mod manifests;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use notify::Watcher as _;
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::manifests::Manifests;
use self::manifests::{Found, Object, interpret, parse};
use super::{
    ANNOTATION_REDIRECTION, Event, Inventory, Problem, Redirection, Service, Source, Whom, report,
    without_conflicts,
};
use crate::membership::{Namespace, Pod, PodKey};

/// The directory is read this often even without a notification: a file system may not support them, and a
/// directory that was replaced has lost its watch.
const RESCAN: Duration = Duration::from_millis(500);
/// A file that was written to within this time may be half-written.
const SETTLE: Duration = Duration::from_millis(50);
/// A file that is written to all the time is read anyway after this time.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
/// An editor that renames removes a file for a moment. A file that is missing for longer is gone.
const MISSING: Duration = Duration::from_millis(200);

/// The subdirectory to which the agent writes what it would write to the API server.
const STATUS_DIR: &str = ".status";

/// A directory of manifests. Its [`DirWatcher`] keeps it current.
#[derive(Debug)]
pub struct DirSource {
    dir: PathBuf,
    inventory: watch::Receiver<Arc<Inventory>>,
}

/// Keeps a [`DirSource`] current.
#[derive(Debug)]
pub struct DirWatcher {
    scanner: Scanner,
    inventory: watch::Sender<Arc<Inventory>>,
}

/// Reads `dir` for the pods of the node `node`: those whose `spec.nodeName` is that, or empty.
///
/// # Errors
///
/// When the directory cannot be read. What is wrong with a file is an inventory's problem.
pub async fn open(
    dir: impl Into<PathBuf>,
    node: impl Into<String>,
) -> anyhow::Result<(DirSource, DirWatcher)> {
    let dir = dir.into();
    fs::read_dir(&dir).with_context(|| {
        format!(
            "read the manifests in {}: --source dir:PATH names a directory that this user can read",
            dir.display()
        )
    })?;
    let scanner = Scanner {
        dir: dir.clone(),
        node: node.into(),
        files: BTreeMap::new(),
        inventory: Arc::default(),
    };
    let (mut scanner, mut settled) = scan(scanner).await?;
    while !settled {
        tokio::time::sleep(SETTLE).await;
        (scanner, settled) = scan(scanner).await?;
    }
    report(&[], &scanner.inventory.problems);
    let (sender, receiver) = watch::channel(Arc::clone(&scanner.inventory));
    Ok((DirSource { dir, inventory: receiver }, DirWatcher { scanner, inventory: sender }))
}

async fn scan(mut scanner: Scanner) -> anyhow::Result<(Scanner, bool)> {
    tokio::task::spawn_blocking(move || {
        let settled = scanner.scan();
        (scanner, settled)
    })
    .await
    .context("read the manifests: the reading task failed")
}

impl DirWatcher {
    /// Follows the directory until `shutdown`.
    ///
    /// # Errors
    ///
    /// Only when the reading task itself fails, which is a defect.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let DirWatcher { mut scanner, inventory } = self;
        let changed = Arc::new(Notify::new());
        let _watch = watch_directory(&scanner.dir, Arc::clone(&changed));
        let mut settled = true;
        loop {
            let pause = if settled { RESCAN } else { SETTLE };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = changed.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
            (scanner, settled) = scan(scanner).await?;
            inventory.send_if_modified(|current| {
                let modified = **current != *scanner.inventory;
                if modified {
                    report(&current.problems, &scanner.inventory.problems);
                    *current = Arc::clone(&scanner.inventory);
                }
                modified
            });
        }
    }
}

/// Notifies `changed` when something in `dir` may have changed. Without notifications, the regular check
/// finds changes.
fn watch_directory(dir: &Path, changed: Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let wake = move |event: notify::Result<notify::Event>| match event {
        Ok(event) if may_change_manifests(&event) => changed.notify_one(),
        Ok(_) => {}
        Err(error) => warn!("watch the manifests: {error}; the rescan goes on"),
    };
    let watch = notify::recommended_watcher(wake).and_then(|mut watcher| {
        watcher.watch(dir, notify::RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    watch
        .inspect_err(|error| {
            warn!("watch {}: {error}; it is read every {RESCAN:?} instead", dir.display());
        })
        .ok()
}

/// Our own reading is an event, too, and must not wake us again.
fn may_change_manifests(event: &notify::Event) -> bool {
    use notify::event::{AccessKind, AccessMode, EventKind};
    let writes = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    };
    writes && event.paths.iter().any(|path| path.file_name() != Some(OsStr::new(STATUS_DIR)))
}

impl Source for DirSource {
    fn describe(&self) -> String {
        format!("dir:{}", self.dir.display())
    }

    fn inventory(&self) -> watch::Receiver<Arc<Inventory>> {
        self.inventory.clone()
    }

    /// Writes `.status/<namespace>_<name>.json` with the merge patch that a cluster's API server
    /// would get for the pod, or removes it.
    async fn publish(&self, pod: &Pod, state: Option<Redirection>) -> anyhow::Result<()> {
        let dir = self.dir.join(STATUS_DIR);
        let file = dir.join(status_file(&pod.key));
        let Some(state) = state else {
            return already_gone(tokio::fs::remove_file(&file).await)
                .with_context(|| format!("remove {}", file.display()));
        };
        let new = dir.join(format!(".{}.new", status_file(&pod.key)));
        tokio::fs::create_dir_all(&dir)
            .await
            .with_context(|| format!("create {}", dir.display()))?;
        tokio::fs::write(&new, patch(state))
            .await
            .with_context(|| format!("write {}", new.display()))?;
        tokio::fs::rename(&new, &file).await.with_context(|| format!("write {}", file.display()))
    }

    fn is_published(&self, pod: &Pod, state: Option<Redirection>) -> bool {
        let file = self.dir.join(STATUS_DIR).join(status_file(&pod.key));
        match (fs::read_to_string(file), state) {
            (Ok(text), Some(state)) => text == patch(state),
            (Err(e), None) => e.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }

    async fn find(&self, whom: &Whom) -> anyhow::Result<Option<Pod>> {
        let whom = whom.clone();
        self.look(move |all, dir| {
            let pod = all.pods.into_values().find(|pod| whom.is(pod));
            pod.map(|pod| with_status(pod, dir))
        })
        .await
    }

    /// Reads the directory once for all of them.
    async fn find_all(&self, keys: &[PodKey]) -> Vec<anyhow::Result<Option<Pod>>> {
        let asked = keys.to_vec();
        let found = self.look(move |all, dir| {
            let of = |key| all.pods.get(key).cloned().map(|pod| with_status(pod, dir));
            asked.iter().map(of).collect::<Vec<_>>()
        });
        match found.await {
            Ok(found) => found.into_iter().map(Ok).collect(),
            Err(error) => keys.iter().map(|_| Err(anyhow!("{error:#}"))).collect(),
        }
    }

    async fn find_service(&self, whom: &Whom) -> anyhow::Result<Option<Service>> {
        let whom = whom.clone();
        self.look(move |all, _| all.service(&whom)).await
    }

    fn record(&self, pod: &Pod, event: Event) {
        debug!(pod = %pod.key, event = event.kind.as_str(), "{}", event.message);
    }
}

impl DirSource {
    /// Reads the directory, and asks `what` of everything in it.
    async fn look<T: Send + 'static>(
        &self,
        what: impl FnOnce(Manifests, &Path) -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let dir = self.dir.clone();
        tokio::task::spawn_blocking(move || Ok(what(everything(&dir)?, &dir)))
            .await
            .context("read the manifests")?
    }
}

/// The pod with the annotation that the agents have written for it.
fn with_status(mut pod: Pod, dir: &Path) -> Pod {
    let said = fs::read_to_string(dir.join(STATUS_DIR).join(status_file(&pod.key)));
    let states = [Redirection::Enabled, Redirection::Pending];
    let state = states.into_iter().find(|state| said.as_ref().is_ok_and(|s| *s == patch(*state)));
    let annotation = state.map(|state| state.as_str().to_owned());
    pod.annotations.extend(annotation.map(|value| (ANNOTATION_REDIRECTION.to_owned(), value)));
    pod
}

/// Reads the directory: what is kept of it is this node's pods. What is wrong with a file is an inventory's
/// problem.
fn everything(dir: &Path) -> anyhow::Result<Manifests> {
    let mut names = list(dir).with_context(|| format!("list {}", dir.display()))?;
    names.retain(|name| is_manifest(name));
    names.sort();
    let mut all = Manifests::default();
    for name in names {
        let _problem = all.add(&dir.join(name));
    }
    Ok(all)
}

/// What is written for a pod with this annotation.
fn patch(state: Redirection) -> String {
    let annotations = serde_json::json!({ANNOTATION_REDIRECTION: state.as_str()});
    serde_json::json!({"metadata": {"annotations": annotations}}).to_string()
}

fn already_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Neither name can hold a `_`, so no two pods share a file.
fn status_file(pod: &PodKey) -> String {
    format!("{}_{}.json", pod.namespace, pod.name)
}

/// The pod whose status `file` is, or was about to become.
fn pod_of_status_file(file: &str) -> Option<PodKey> {
    let file = file.strip_prefix('.').and_then(|f| f.strip_suffix(".new")).unwrap_or(file);
    let (namespace, name) = file.strip_suffix(".json")?.split_once('_')?;
    PodKey::new(namespace, name).ok()
}

/// What is known about the directory.
#[derive(Debug)]
struct Scanner {
    dir: PathBuf,
    node: String,
    /// By file name.
    files: BTreeMap<String, File>,
    inventory: Arc<Inventory>,
}

/// What is known about one file.
#[derive(Debug, Default)]
struct File {
    /// What was read last, good or not.
    content: Option<Vec<u8>>,
    /// The usable objects, each with its place in the file.
    objects: Vec<(String, Object)>,
    /// What is wrong with the file and its documents, by place; empty for the whole file.
    problems: Vec<(String, String)>,
    /// Since when the file has had content that was not read because it may be half-written.
    unsettled: Option<Instant>,
    /// Since when the file is missing.
    missing: Option<Instant>,
}

impl Scanner {
    /// Updates the inventory. `false`: a file should be checked again soon.
    fn scan(&mut self) -> bool {
        // Listed before the manifests are read, so that a status without a pod is a leftover, and never that
        // of a pod that another node's agent has just discovered.
        let statuses = list(&self.dir.join(STATUS_DIR)).unwrap_or_default();
        let mut problems = Vec::new();
        let mut settled = true;
        match list(&self.dir) {
            Ok(names) => {
                let names: BTreeSet<String> =
                    names.into_iter().filter(|name| is_manifest(name)).collect();
                for name in &names {
                    let path = self.dir.join(name);
                    settled &= self.files.entry(name.clone()).or_default().refresh(&path);
                }
                self.files.retain(|name, file| names.contains(name) || file.is_still_expected());
                settled &= self.files.values().all(|file| file.missing.is_none());
            }
            Err(error) => problems.push(Problem {
                object: self.dir.display().to_string(),
                message: format!("read the directory: {error}; what was in it stays in force"),
                ..Problem::default()
            }),
        }
        // Only then is a pod that is in no manifest known to be gone.
        let complete =
            settled && problems.is_empty() && self.files.values().all(|f| f.problems.is_empty());
        let (namespaces, pods) = self.merge(&mut problems);
        for name in statuses {
            let is_leftover = pod_of_status_file(&name).is_some_and(|pod| {
                !pods.contains_key(&pod) && (complete || self.inventory.pods.contains_key(&pod))
            });
            if is_leftover {
                remove_leftover(&self.dir.join(STATUS_DIR).join(name));
            }
        }
        let ours = pods
            .into_iter()
            .filter(|(_, pod)| pod.node_name.as_ref().is_none_or(|node| *node == self.node))
            .collect();
        let pods = without_conflicts(&self.inventory.pods, ours, &mut problems);
        self.inventory = Arc::new(Inventory { namespaces, pods, problems });
        settled
    }

    /// Combines the files. Of several objects with the same name, the first one by file name counts.
    fn merge(
        &self,
        problems: &mut Vec<Problem>,
    ) -> (BTreeMap<String, Namespace>, BTreeMap<PodKey, Pod>) {
        let mut places = BTreeMap::new();
        let mut namespaces = BTreeMap::new();
        let mut pods = BTreeMap::new();
        for (name, file) in &self.files {
            problems.extend(file.problems.iter().map(|(place, message)| Problem {
                object: place_in(name, place),
                message: message.clone(),
                ..Problem::default()
            }));
            for (place, object) in &file.objects {
                match places.entry(object.id()) {
                    Entry::Vacant(entry) => {
                        entry.insert(place_in(name, place));
                        match object.clone() {
                            Object::Namespace(n) => drop(namespaces.insert(n.name.clone(), n)),
                            Object::Pod(pod) => drop(pods.insert(pod.key.clone(), pod)),
                        }
                    }
                    Entry::Occupied(first) => problems.push(Problem {
                        object: place_in(name, place),
                        message: format!(
                            "{} is in {}, too; the one here is ignored",
                            first.key(),
                            first.get()
                        ),
                        ..Problem::default()
                    }),
                }
            }
        }
        (namespaces, pods)
    }
}

fn place_in(file: &str, place: &str) -> String {
    if place.is_empty() { file.to_owned() } else { format!("{file}, {place}") }
}

fn list(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

fn is_manifest(name: &str) -> bool {
    !name.starts_with('.')
        && Path::new(name)
            .extension()
            .is_some_and(|e| ["yaml", "yml", "json"].iter().any(|known| e == *known))
}

fn remove_leftover(status: &Path) {
    match already_gone(fs::remove_file(status)) {
        Ok(()) => info!("removed {}: its pod is gone", status.display()),
        Err(error) => warn!("remove {}, whose pod is gone: {error}", status.display()),
    }
}

impl File {
    /// Reads the file if it changed; `false` when it may be half-written and was left for later.
    fn refresh(&mut self, path: &Path) -> bool {
        let read = fs::metadata(path).and_then(|metadata| {
            // A pipe would block us forever.
            if metadata.is_file() {
                Ok((metadata.modified()?, fs::read(path)?))
            } else {
                Err(io::Error::other("it is not a file"))
            }
        });
        let (modified, content) = match read {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return !self.is_still_expected();
            }
            Err(error) => {
                self.content = None;
                self.problems =
                    vec![(String::new(), format!("read it: {error}{}", self.what_stays()))];
                return true;
            }
        };
        self.missing = None;
        if self.content.as_ref() == Some(&content) {
            self.unsettled = None;
            return true;
        }
        let fresh = modified.elapsed().is_ok_and(|age| age < SETTLE);
        if fresh && self.unsettled.get_or_insert_with(Instant::now).elapsed() < SETTLE_AT_MOST {
            return false;
        }
        self.unsettled = None;
        let is_json = path.extension() == Some(OsStr::new("json"));
        self.take(parse(&content, is_json));
        self.content = Some(content);
        true
    }

    /// Whether the file, which is missing now, may come back, because it has been missing only briefly.
    fn is_still_expected(&mut self) -> bool {
        self.missing.get_or_insert_with(Instant::now).elapsed() < MISSING
    }

    fn what_stays(&self) -> &'static str {
        if self.objects.is_empty() { "" } else { "; its last good content stays in force" }
    }

    /// Applies what was parsed. Invalid objects keep their last good version.
    fn take(&mut self, parsed: Result<Vec<Value>, String>) {
        let documents = match parsed {
            Ok(documents) if documents.is_empty() => {
                // Many programs truncate a file before they write it.
                self.problems = vec![(
                    String::new(),
                    format!("it is empty{}; remove it if that is meant", self.what_stays()),
                )];
                return;
            }
            Ok(documents) => documents,
            Err(error) => {
                self.problems =
                    vec![(String::new(), format!("parse it: {error}{}", self.what_stays()))];
                return;
            }
        };
        let mut found = Vec::new();
        for (index, document) in documents.iter().enumerate() {
            interpret(format!("document {}", index + 1), document, None, &mut found);
        }
        let last_good = std::mem::take(&mut self.objects);
        self.problems.clear();
        for Found { place, id, object } in found {
            match object {
                Ok(object) => self.objects.push((place, object)),
                Err(error) => {
                    let old = last_good.iter().find(|(_, old)| Some(old.id()) == id);
                    let stays =
                        if old.is_some() { "; its last good version stays in force" } else { "" };
                    self.problems.push((place.clone(), format!("{error}{stays}")));
                    self.objects.extend(old.map(|(_, old)| (place, old.clone())));
                }
            }
        }
    }
}
