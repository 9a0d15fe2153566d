//! A stand-in for the Kubernetes API server: real HTTP on loopback, for the few resources that the
//! agent uses, and as strict as the real one. It can be taken away, cut off, slowed down and made
//! to forget.

mod http;
mod proxy;
mod status;
mod store;

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio::{runtime::Runtime, sync::watch};

pub use self::store::Kind;
use self::{status::Status, store::Store};
use crate::process::wait_for;

/// What the server says that a client presents.
pub const TOKEN: &str = "the-agents-token";

/// Annotation of a pod: the port that stands for each of its ports when the server passes a request on.
pub const PORT: &str = "test/port";

/// How long the server may take to go away.
const PATIENCE: Duration = Duration::from_secs(10);

/// The server. It goes away when dropped.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    runtime: Option<Runtime>,
}

#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    /// Counts up with every change, for the watches.
    changed: watch::Sender<u64>,
    cut: watch::Sender<(u64, Cut)>,
    bookmarks: watch::Sender<u64>,
    requests: Mutex<Vec<Request>>,
    gone_as_status: AtomicBool,
    /// Watches are answered, and end at once.
    ends_at_once: AtomicBool,
    /// Answers to patches are lost, after they were carried out.
    loses_answers: AtomicBool,
    /// A uid that does not match is a conflict; else it is invalid.
    uid_conflicts: AtomicBool,
    /// No token is valid any more.
    knows_nobody: AtomicBool,
    delay_ms: AtomicU64,
    /// How many more requests are refused with 429.
    busy: AtomicU64,
}

/// How a watch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// As after its time is over.
    Cleanly,
    /// In the middle of it.
    Abruptly,
}

/// A request that was made.
#[derive(Clone, Debug)]
pub struct Request {
    /// `get`, `list`, `watch`, `create` or `patch`.
    pub verb: &'static str,
    /// `pods`, `pods/status`, ….
    pub resource: String,
    /// The name of the object, where it has one.
    pub name: String,
    /// The query.
    pub query: String,
    /// The body.
    pub body: Value,
    /// The status of the answer.
    pub code: u16,
}

impl ApiServer {
    /// Starts an empty one.
    pub fn start() -> Result<Self> {
        let shared = Arc::new(Shared {
            store: Mutex::new(Store::new()),
            changed: watch::Sender::new(0),
            cut: watch::Sender::new((0, Cut::Cleanly)),
            bookmarks: watch::Sender::new(0),
            requests: Mutex::default(),
            gone_as_status: AtomicBool::new(false),
            ends_at_once: AtomicBool::new(false),
            loses_answers: AtomicBool::new(false),
            uid_conflicts: AtomicBool::new(true),
            knows_nobody: AtomicBool::new(false),
            delay_ms: AtomicU64::new(0),
            busy: AtomicU64::new(0),
        });
        let mut server =
            Self { shared, address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), runtime: None };
        server.come_back()?;
        Ok(server)
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Writes a kubeconfig that leads here.
    pub fn write_kubeconfig(&self, path: &Path) -> Result<()> {
        let url = self.url();
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: '{url}'}}}}]\n\
             users: [{{name: agent, user: {{token: {TOKEN}}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: agent}}}}]\n"
        );
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Goes away: all connections break, and no new one is accepted. What it keeps stays.
    pub fn go_away(&mut self) -> Result<()> {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        wait_for("the API server to be away", PATIENCE, || {
            Ok(TcpStream::connect(self.address).is_err().then_some(()))
        })
    }

    /// Comes back where it was.
    pub fn come_back(&mut self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start a runtime")?;
        let listener = TcpListener::bind(self.address)
            .with_context(|| format!("listen on {}", self.address))?;
        listener.set_nonblocking(true).context("prepare the listener")?;
        self.address = listener.local_addr().context("read the address")?;
        let entered = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener).context("prepare to listen")?;
        drop(entered);
        runtime.spawn(http::serve(listener, Arc::clone(&self.shared)));
        self.runtime = Some(runtime);
        Ok(())
    }

    /// Creates an object, or changes it; one with another uid than before takes its place.
    pub fn put(&self, kind: Kind, object: Value) -> Value {
        let object = self.shared.store().put(kind, object);
        self.shared.announce();
        object
    }

    /// Changes an object in place, if it exists.
    pub fn edit(&self, kind: Kind, namespace: &str, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut store = self.shared.store();
        if let Some(mut object) = store.get(kind, namespace, name).cloned() {
            edit(&mut object);
            store.replace(kind, object);
        }
        drop(store);
        self.shared.announce();
    }

    /// Deletes an object.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        self.shared.store().delete(kind, namespace, name);
        self.shared.announce();
    }

    /// An object as it is now.
    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        self.shared.store().get(kind, namespace, name).cloned()
    }

    /// All objects of a kind.
    pub fn all(&self, kind: Kind) -> Vec<Value> {
        let store = self.shared.store();
        let of_kind = store.objects.iter().filter(|((of, _, _), _)| *of == kind);
        of_kind.map(|(_, object)| object.clone()).collect()
    }

    /// The value of a pod's annotation.
    pub fn annotation(&self, namespace: &str, name: &str, annotation: &str) -> Option<String> {
        let pod = self.get(Kind::Pod, namespace, name)?;
        pod["metadata"]["annotations"][annotation].as_str().map(str::to_owned)
    }

    /// Refuses a verb on a resource: `patch` and `pods/status`.
    pub fn forbid(&self, verb: &str, resource: &str) {
        self.shared.store().forbidden.insert((verb.to_owned(), resource.to_owned()));
    }

    /// Refuses nothing any more.
    pub fn allow_all(&self) {
        self.shared.store().forbidden = BTreeSet::new();
    }

    /// Forgets the history, so that no watch can go on from where it was.
    pub fn forget(&self, gone_as_status: bool) {
        self.shared.gone_as_status.store(gone_as_status, Ordering::Relaxed);
        self.shared.store().compact();
    }

    /// Ends every watch.
    pub fn cut_watches(&self, cut: Cut) {
        self.shared.cut.send_modify(|(count, how)| {
            *count += 1;
            *how = cut;
        });
    }

    /// Tells every watch, by bookmark, how far it has come.
    pub fn bookmark(&self) {
        self.shared.bookmarks.send_modify(|count| *count += 1);
    }

    /// Lets changes that nobody here watches happen.
    pub fn elsewhere(&self) {
        self.shared.store().version += 1;
    }

    /// Ends watches as soon as they are answered, or not.
    pub fn end_watches_at_once(&self, on: bool) {
        self.shared.ends_at_once.store(on, Ordering::Relaxed);
        self.cut_watches(Cut::Cleanly);
    }

    /// Carries out patches, and breaks the connection in place of an answer, or not.
    pub fn lose_answers(&self, on: bool) {
        self.shared.loses_answers.store(on, Ordering::Relaxed);
    }

    /// Whether a uid that does not match is a conflict (409), or invalid (422).
    pub fn uid_conflicts(&self, on: bool) {
        self.shared.uid_conflicts.store(on, Ordering::Relaxed);
    }

    /// Knows no token any more: the service account is gone.
    pub fn forget_tokens(&self) {
        self.shared.knows_nobody.store(true, Ordering::Relaxed);
    }

    /// Takes this time for each answer.
    pub fn slow_down(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.shared.delay_ms.store(delay, Ordering::Relaxed);
    }

    /// Is too busy for the next requests.
    pub fn be_busy(&self, requests: u64) {
        self.shared.busy.store(requests, Ordering::Relaxed);
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests().clone()
    }

    /// The requests with this verb on this resource so far.
    pub fn requests_of(&self, verb: &str, resource: &str) -> Vec<Request> {
        let mut requests = self.requests();
        requests.retain(|request| request.verb == verb && request.resource == resource);
        requests
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn requests(&self) -> MutexGuard<'_, Vec<Request>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}
