//! The ZDS server: one task per proxy, and the handle through which the agent changes what is known.

use std::{
    any::Any,
    fmt, io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{broadcast, watch},
    task::{JoinSet, spawn_blocking},
    time::sleep,
};
use tracing::{error, info, warn};

use super::{
    AddError, AddOutcome, Answer, Away, BindError, Deleted, Event, Fault, ProxyId, ProxyStatus,
    Workload, WorkloadStatus, ZdsStatus, messages,
    socket::{Connection, Listener, within},
    state::{Netns, Standing, State},
};
use crate::process_ref::ProcessRef;

/// How long a proxy has for its hello, for reading a request and for answering it.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// How many events a subscriber may lag behind.
const EVENTS: usize = 1024;

/// How long to wait after accept() failed: it fails when the agent is out of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// What the handles and the connections share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Marked after every change of the state; whoever waits for one looks at the state again.
    changed: watch::Sender<()>,
    events: broadcast::Sender<Event>,
    socket: PathBuf,
    started: SystemTime,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and notifies everybody.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> (T, Option<Event>)) -> T {
        let mut state = self.state();
        let (result, event) = change(&mut state);
        if let Some(event) = event {
            // Under the lock, so that events come in the order of the changes. Nobody may listen.
            let _ = self.events.send(event);
        }
        drop(state);
        self.changed.send_replace(());
        result
    }
}

/// The server's socket, not yet served.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
    deadline: Duration,
    admit: Admit,
}

/// What stands for an admitted proxy, until it is disconnected.
pub type Admitted = Box<dyn Any + Send>;

/// What is done about a proxy before it is told anything; it is disconnected where that fails.
#[derive(Clone)]
struct Admit(Arc<dyn Fn(Option<ProcessRef>) -> anyhow::Result<Admitted> + Send + Sync>);

impl fmt::Debug for Admit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Admit")
    }
}

impl Server {
    /// Listens at `path` with mode 0600; makes its directory. A socket that nobody answers on is
    /// replaced, one that somebody answers on is not. Needs a Tokio runtime.
    ///
    /// Proxies that connect before [`Server::run`] wait.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let listener = Listener::bind(path)?;
        let shared = Shared {
            state: Mutex::default(),
            changed: watch::Sender::default(),
            events: broadcast::Sender::new(EVENTS),
            socket: listener.path().to_owned(),
            started: SystemTime::now(),
        };
        let admit = Admit(Arc::new(|_| Ok(Box::new(()))));
        Ok(Self { listener, shared: Arc::new(shared), deadline: DEADLINE, admit })
    }

    /// Another deadline than [`DEADLINE`].
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// With something to be done about each proxy before it is told anything, given its process, where the
    /// agent's pid namespace has it. It may block. What it returns is dropped when the proxy is disconnected.
    /// A proxy for which it fails is disconnected at once, and comes again.
    pub fn with_admission(
        self,
        admit: impl Fn(Option<ProcessRef>) -> anyhow::Result<Admitted> + Send + Sync + 'static,
    ) -> Self {
        Self { admit: Admit(Arc::new(admit)), ..self }
    }

    /// A handle, before and while the server runs.
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared) }
    }

    /// Serves proxies until `shutdown`, then disconnects them (they go on serving what they have)
    /// and removes the socket.
    ///
    /// Start it only when every enrolled workload of the node is known, by [`Handle::add`] or
    /// [`Handle::keep`]: at the end of the snapshot a proxy *stops* all workloads that are not in it.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { listener, shared, deadline, admit } = self;
        let mut shutdown = pin!(shutdown);
        let mut connections = JoinSet::new();
        info!(socket = %shared.socket.display(), "serving ZDS");
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                accepted = accept(&listener) => if let Some(connection) = accepted {
                    connections.spawn(serve(connection, Arc::clone(&shared), deadline, admit.clone()));
                },
                Some(ended) = connections.join_next() => if let Err(e) = ended {
                    error!("serve a proxy: {e}");
                },
            }
        }
        drop(listener);
        connections.shutdown().await;
    }
}

async fn accept(listener: &Listener) -> Option<Connection> {
    match listener.accept().await {
        Ok(connection) => Some(connection),
        Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => None,
        Err(e) => {
            error!("accept a proxy on {}: {e}", listener.path().display());
            sleep(ACCEPT_RETRY).await;
            None
        }
    }
}

/// One proxy, from its hello to its end.
async fn serve(connection: Connection, shared: Arc<Shared>, deadline: Duration, admit: Admit) {
    let process = match connection.process() {
        Ok(process) => process,
        Err(e) => {
            info!("disconnecting what connected to ZDS: its process is gone: {e}");
            return;
        }
    };
    let pid = process.as_ref().map(ProcessRef::pid);
    if let Err(fault) = greet(&connection, deadline).await {
        warn!(pid, "disconnecting what connected to ZDS: it {fault}");
        return;
    }
    let admitted = spawn_blocking(move || (admit.0)(process)).await;
    let _admitted = match admitted.map_err(anyhow::Error::from).flatten() {
        Ok(admitted) => admitted,
        Err(e) => {
            warn!(pid, "disconnecting ztunnel, which will come again: {e:#}");
            return;
        }
    };
    let mut session = Session::begin(&shared, pid);
    let id = session.id;
    info!(proxy = %id, pid, "ztunnel connected");
    let fault = converse(&connection, &shared, id, deadline).await;
    if fault == Fault::Closed {
        info!(proxy = %id, pid, "ztunnel {fault}");
    } else {
        warn!(proxy = %id, pid, "disconnecting ztunnel: it {fault}");
    }
    session.fault = fault;
}

async fn greet(connection: &Connection, deadline: Duration) -> Result<(), Fault> {
    let hello = within(deadline, connection.recv(), || Fault::NoHello(deadline)).await?;
    Ok(messages::decode_hello(&hello)?)
}

/// A proxy's place among the connected ones; it is given up on drop, also when the task is aborted.
struct Session<'a> {
    shared: &'a Shared,
    id: ProxyId,
    fault: Fault,
}

impl<'a> Session<'a> {
    fn begin(shared: &'a Shared, pid: Option<i32>) -> Self {
        let id = shared.change(|state| {
            let (id, event) = state.connect(pid);
            (id, Some(event))
        });
        Self { shared, id, fault: Fault::Shutdown }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        let alone = self.shared.change(|state| {
            let event = state.disconnect(self.id, self.fault.clone());
            (state.proxies().is_empty(), Some(event))
        });
        if alone && !matches!(self.fault, Fault::Shutdown) {
            warn!(
                "no proxy from now on; new connections of pods in the mesh are refused; is ztunnel running on \
                 this node?"
            );
        }
    }
}

/// Sends the proxy what it lacks, one request at a time, until sending fails.
async fn converse(
    connection: &Connection,
    shared: &Shared,
    id: ProxyId,
    deadline: Duration,
) -> Fault {
    let mut changed = shared.changed.subscribe();
    loop {
        changed.mark_unchanged();
        let step = shared.state().next(id);
        let Some(step) = step else {
            tokio::select! {
                fault = connection.unasked() => return fault,
                _ = changed.changed() => continue,
            }
        };
        let answered = async {
            connection.nothing_unasked()?;
            let packet = step.request().to_packet();
            let not_read = || Fault::NotRead { request: step.to_string(), deadline };
            let sending = connection.send(&packet, step.fd().map(|fd| fd.as_fd()));
            within(deadline, sending, not_read).await?;
            let not_answered = || Fault::NotAnswered { request: step.to_string(), deadline };
            let response = within(deadline, connection.recv(), not_answered).await?;
            Ok(messages::decode_response(&response)?)
        };
        let recorded = match answered.await {
            Ok(answer) => {
                if let Err(error) = &answer {
                    warn!(proxy = %id, "ztunnel refused {step}: {error:?}");
                }
                shared.change(|state| match state.record(id, step, answer) {
                    Ok(event) => (Ok(()), event),
                    Err(fault) => (Err(fault), None),
                })
            }
            Err(fault) => Err(fault),
        };
        if let Err(fault) = recorded {
            return fault;
        }
    }
}

/// Says which workloads the node's proxies have to serve, and learns how they answer.
#[derive(Clone, Debug)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// Makes a workload known with its netns, or with another one, and waits until the newest proxy has
    /// answered. A proxy's snapshot comes first. If that is done already, it succeeds and sends nothing.
    ///
    /// The workload stays known when the proxy refuses it or goes away, and when this future is dropped: a
    /// proxy that connects later gets it. A refused workload is not tried again until it is added again (or
    /// the proxy reconnects): call this again.
    ///
    /// # Errors
    /// [`AddError`] says of each error whether the workload is known.
    pub async fn add(
        &self,
        workload: Workload,
        netns: Arc<OwnedFd>,
    ) -> Result<AddOutcome, AddError> {
        let (uid, who) = (workload.uid.clone(), workload.to_string());
        let netns = match Netns::new(netns) {
            Ok(Some(netns)) => netns,
            Ok(None) => return Err(AddError::NotNetns { workload: who }),
            Err(errno) => {
                return Err(AddError::Netns { workload: who, errno });
            }
        };
        let mut changed = self.shared.changed.subscribe();
        let seq = self.shared.change(|state| (state.put(workload, Some(netns.clone())), None))?;
        let mut had_proxy = false;
        loop {
            changed.mark_unchanged();
            {
                let state = self.shared.state();
                match state.standing(&uid, &netns, seq) {
                    Standing::Open => had_proxy = true,
                    Standing::Acked => return Ok(AddOutcome::Acked),
                    Standing::NoProxy => {
                        return match state.last_gone().filter(|_| had_proxy).cloned() {
                            None => Ok(AddOutcome::NoProxy),
                            Some((proxy, reason)) => {
                                Err(AddError::ProxyGone { workload: who, proxy, reason })
                            }
                        };
                    }
                    Standing::Refused { proxy, error } => {
                        return Err(AddError::Refused { workload: who, proxy, error });
                    }
                    Standing::Superseded => return Err(AddError::Superseded { workload: who }),
                }
            }
            // Cannot fail: the sender lives as long as this handle.
            let _ = changed.changed().await;
        }
    }

    /// Makes a workload known without a netns fd: a proxy that connects and already serves it will continue.
    /// A workload that is known with its netns keeps it.
    ///
    /// # Errors
    /// [`AddError::NoUid`] and [`AddError::TooLong`].
    pub fn keep(&self, workload: Workload) -> Result<(), AddError> {
        self.shared.change(|state| (state.put(workload, None), None)).map(|_| ())
    }

    /// Forgets a workload, and waits until every connected proxy has stopped serving it (or was
    /// disconnected because it did not answer in time). Already done is success.
    ///
    /// The workload is forgotten also when this future is dropped.
    pub async fn delete(&self, uid: &str) -> Deleted {
        let mut changed = self.shared.changed.subscribe();
        let asked = self.shared.change(|state| (state.delete(uid), None));
        loop {
            changed.mark_unchanged();
            {
                let state = self.shared.state();
                if !state.deleting(uid).any(|id| asked.contains(&id)) {
                    let connected = |id: &ProxyId| state.proxies().iter().any(|p| p.id == *id);
                    let (acked, gone) = asked.into_iter().partition(connected);
                    return Deleted { acked, gone };
                }
            }
            // Cannot fail: the sender lives as long as this handle.
            let _ = changed.changed().await;
        }
    }

    /// What happens to proxies from now on. A receiver that lags by more than 1024 events is told
    /// so, and finds what it missed in [`Handle::status`].
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Whether the newest proxy serves the workload, as it is now known.
    pub fn acked(&self, uid: &str) -> bool {
        self.shared.state().acked(uid)
    }

    /// Whether a proxy may serve the workload, or will.
    pub fn knows(&self, uid: &str) -> bool {
        self.shared.state().known().any(|known| known.workload.uid == uid)
    }

    /// Since when no proxy is connected; `None` while one is.
    pub fn away(&self) -> Option<Away> {
        let state = self.shared.state();
        if !state.proxies().is_empty() {
            return None;
        }
        Some(match state.away() {
            Some((since, reason)) => Away { since, reason: Some(reason.to_owned()) },
            None => Away { since: self.shared.started, reason: None },
        })
    }

    /// The proxies and workloads of this moment.
    pub fn status(&self) -> ZdsStatus {
        let state = self.shared.state();
        let proxies = state.proxies().iter().rev().map(|proxy| {
            let count = |wanted: fn(&Answer) -> bool| {
                state.known().filter(|known| proxy.answer(known).is_some_and(wanted)).count()
            };
            ProxyStatus {
                id: proxy.id,
                pid: proxy.pid,
                connected_seconds: proxy.since.elapsed().as_secs(),
                snapshot_done: proxy.snapshot_done(),
                added: count(|answer| *answer == Answer::Added),
                refused: count(|answer| matches!(answer, Answer::Refused(_))),
            }
        });
        let workloads = state.known().map(|known| WorkloadStatus {
            workload: known.workload.clone(),
            netns_inode: known.netns.as_ref().map(|netns| netns.id.1),
            answer: state.newest().and_then(|newest| newest.answer(known)).cloned(),
        });
        ZdsStatus {
            socket: self.shared.socket.clone(),
            proxies: proxies.collect(),
            workloads: workloads.collect(),
        }
    }
}
