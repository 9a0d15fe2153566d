//! The workloads of this node, as the agent has told them over ZDS.
//!
//! ztunnel: `src/inpod/statemanager.rs` and `src/inpod/workloadmanager.rs`.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use super::access_log::AccessLog;
use super::ca::Ca;
use super::mesh::Mesh;
use super::proxy::Proxy;
use super::zds::{Connection, Request, WorkloadInfo};
use super::{Config, Dns};

/// As ztunnel (`inpod/workloadmanager.rs`, `RETRY_DURATION`).
const RETRY: Duration = Duration::from_secs(5);

/// Why a ZDS connection ended.
pub(super) enum Error {
    /// The connection broke, or carried what cannot be read: connect again.
    Connection(anyhow::Error),
    /// The agent broke the protocol: ztunnel exits.
    Protocol(anyhow::Error),
}

/// Why a request was answered with an error.
enum Refusal {
    /// A proxy did not start; it is tried again later.
    Proxy(anyhow::Error),
    /// The request must not be at this point.
    Protocol(anyhow::Error),
}

/// A netns's device and inode.
type NetnsId = (u64, u64);

/// All workloads of the node, and their proxies.
pub(super) struct Workloads {
    ca: Ca,
    mesh: Arc<Mesh>,
    log: AccessLog,
    dns: Option<Dns>,
    running: HashMap<String, (NetnsId, Proxy)>,
    /// Those whose proxy did not start.
    pending: HashMap<String, (WorkloadInfo, OwnedFd)>,
    retry: Option<Instant>,
    /// What the agent has named on this connection so far; `None` once its snapshot is complete.
    snapshot: Option<HashSet<String>>,
    stopping: JoinSet<()>,
}

impl Workloads {
    pub(super) fn new(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            ca: Ca::open(&config.ca_dir)?,
            mesh: Mesh::follow(config.manifests.clone())?,
            log: AccessLog::open(&config.node, config.log_json.as_deref())?,
            dns: config.dns,
            running: HashMap::new(),
            pending: HashMap::new(),
            retry: None,
            snapshot: None,
            stopping: JoinSet::new(),
        })
    }

    /// Serves one connection from its beginning to its end; the workloads outlive it.
    pub(super) async fn serve(&mut self, connection: &Connection) -> Result<(), Error> {
        self.snapshot = Some(HashSet::new());
        self.pending.clear();
        self.retry = None;
        let broken = |error| Error::Connection(anyhow::Error::from(error));
        connection.send_hello().await.map_err(broken)?;
        loop {
            let request = tokio::select! {
                request = connection.recv() => request,
                () = sleep_until(self.retry) => {
                    self.retry_pending().await;
                    continue;
                }
            };
            let request = match request {
                Ok(Some(request)) => request,
                Ok(None) => return Ok(()),
                Err(error) => {
                    let nack = format!("failure to read message : {error:#}");
                    connection.send_ack(&nack).await.map_err(broken)?;
                    return Err(Error::Connection(error));
                }
            };
            match self.process(request).await {
                Ok(()) => connection.send_ack("").await.map_err(broken)?,
                Err(Refusal::Proxy(error)) => {
                    warn!("{error:#}");
                    let nack = format!("failure to start proxy : {error:#}");
                    connection.send_ack(&nack).await.map_err(broken)?;
                }
                Err(Refusal::Protocol(error)) => {
                    let nack = format!("failure to process message : {error:#}");
                    connection.send_ack(&nack).await.map_err(broken)?;
                    return Err(Error::Protocol(error));
                }
            }
        }
    }

    async fn process(&mut self, request: Request) -> Result<(), Refusal> {
        while self.stopping.try_join_next().is_some() {}
        match request {
            Request::Add { uid, info: None, .. } => {
                let error = anyhow!("workload_info of {uid} is required but not present");
                return Err(Refusal::Protocol(error));
            }
            Request::Add { uid, info: Some(info), netns } => {
                if let Some(snapshot) = &mut self.snapshot {
                    snapshot.insert(uid.clone());
                }
                self.add(uid, info, netns).await.map_err(Refusal::Proxy)?;
            }
            Request::Keep(uid) => match &mut self.snapshot {
                Some(snapshot) => {
                    info!(uid, "kept");
                    snapshot.insert(uid);
                }
                None => {
                    return Err(Refusal::Protocol(anyhow!("keep of {uid} after the snapshot")));
                }
            },
            Request::Del(uid) => {
                info!(uid, "deleted");
                self.pending.remove(&uid);
                match &mut self.snapshot {
                    // The end of the snapshot stops it.
                    Some(snapshot) => {
                        snapshot.remove(&uid);
                    }
                    None => self.stop(&uid),
                }
            }
            Request::SnapshotSent => {
                let Some(snapshot) = self.snapshot.take() else {
                    return Err(Refusal::Protocol(anyhow!("a second snapshot")));
                };
                info!(workloads = snapshot.len(), "snapshot complete");
                let gone: Vec<_> =
                    self.running.keys().filter(|uid| !snapshot.contains(*uid)).cloned().collect();
                for uid in gone {
                    self.stop(&uid);
                }
            }
        }
        Ok(())
    }

    async fn add(&mut self, uid: String, info: WorkloadInfo, netns: OwnedFd) -> anyhow::Result<()> {
        let started = self.start(&uid, &info, &netns).await.with_context(|| {
            format!("start proxy of {}/{} (uid {uid})", info.namespace, info.name)
        });
        match &started {
            Ok(()) => {
                self.pending.remove(&uid);
            }
            Err(_) => {
                self.pending.insert(uid, (info, netns));
                self.retry.get_or_insert_with(|| Instant::now() + RETRY);
            }
        }
        started
    }

    async fn start(
        &mut self,
        uid: &str,
        info: &WorkloadInfo,
        netns: &OwnedFd,
    ) -> anyhow::Result<()> {
        let stat = rustix::fs::fstat(netns).context("stat the netns")?;
        let id = (stat.st_dev, stat.st_ino);
        match self.running.get(uid) {
            Some((running, _)) if *running == id => return Ok(()),
            // The sandbox was made anew.
            Some(_) => self.stop(uid),
            None => {}
        }
        let netns = netns.try_clone().context("keep the netns")?;
        let proxy =
            Proxy::start(&self.ca, &self.mesh, &self.log, self.dns, info.clone(), netns).await?;
        self.running.insert(uid.to_owned(), (id, proxy));
        Ok(())
    }

    async fn retry_pending(&mut self) {
        self.retry = None;
        for (uid, (info, netns)) in mem::take(&mut self.pending) {
            if let Err(error) = self.add(uid, info, netns).await {
                warn!("{error:#}");
            }
        }
    }

    fn stop(&mut self, uid: &str) {
        if let Some((_, proxy)) = self.running.remove(uid) {
            self.stopping.spawn(proxy.kill());
        }
    }

    /// Ends all proxies, gracefully.
    pub(super) async fn drain(mut self, deadline: Duration) {
        for (_, (_, proxy)) in self.running.drain() {
            self.stopping.spawn(proxy.drain(deadline));
        }
        while self.stopping.join_next().await.is_some() {}
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
