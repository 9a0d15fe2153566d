//! ZDS, the protocol by which the agent tells ztunnel which workloads of the node to serve, and
//! hands it their network namespaces. The agent is the server; proxies connect.
//!
//! The [`Server`] owns the set of known workloads and is level-triggered: a proxy that connects gets all of
//! them as its snapshot, one request at a time, and then every change. Several proxies may be connected at
//! once while ztunnel is upgraded: an Add goes to the newest (the one that said hello last), a Del to all,
//! and when the newest goes away the one before it is told what it lacks.
//!
//! A stock ztunnel *exits* on an Add without workload info, on a second SnapshotSent and on a Keep
//! after SnapshotSent (`src/inpod/statemanager.rs`, `ProtocolError`), and every pod of the node loses
//! its traffic. None of the three can be expressed here: see `state.rs`.

pub mod messages;
mod server;
mod socket;
mod state;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::SystemTime};

use serde::{Deserialize, Serialize};

pub use self::{
    server::{Admitted, DEADLINE, Handle, Server},
    socket::{BindError, Fault},
};

/// A pod, as ztunnel has to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// UID of the Kubernetes pod.
    pub uid: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Service account of the pod; with the namespace it is the identity.
    pub service_account: String,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} (uid {})", self.namespace, self.name, self.uid)
    }
}

/// One connection of a proxy, counted from 1 since the agent started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProxyId(pub u64);

impl fmt::Display for ProxyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How an Add that did not fail ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddOutcome {
    /// The newest proxy serves the workload: its listeners are bound in the pod's netns.
    Acked,
    /// No proxy is connected; the workload is part of the next one's snapshot.
    NoProxy,
}

/// Why a workload was not added.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AddError {
    /// Nothing to tell it from others by. It is not known.
    #[error("add workload {workload}: the pod has no uid")]
    NoUid {
        /// The workload: namespace/name (uid).
        workload: String,
    },
    /// ztunnel would not read its message. It is not known.
    #[error(
        "add workload {workload}: its ZDS message takes {bytes} bytes and ztunnel reads at most {max}; \
         give the pod, its namespace or its service account a shorter name",
        max = messages::MAX_REQUEST_BYTES
    )]
    TooLong {
        /// The workload: namespace/name (uid).
        workload: String,
        /// The size of its Add.
        bytes: usize,
    },
    /// The fd is something else. It is not known.
    #[error("add workload {workload}: its file descriptor is no network namespace")]
    NotNetns {
        /// The workload: namespace/name (uid).
        workload: String,
    },
    /// The fd cannot be looked at. It is not known.
    #[error("add workload {workload}: look at its netns: {errno}")]
    Netns {
        /// The workload: namespace/name (uid).
        workload: String,
        /// What the kernel said.
        errno: nix::errno::Errno,
    },
    /// ztunnel would start a second proxy in that netns. It is not known.
    #[error(
        "add workload {workload}: its netns (inode {inode}) belongs to workload {holder}; \
         delete that one first"
    )]
    NetnsTaken {
        /// The workload: namespace/name (uid).
        workload: String,
        /// The workload that is known with that netns.
        holder: Box<Workload>,
        /// Inode number of the netns.
        inode: u64,
    },
    /// The newest proxy refused it, and was told to delete it. It stays known.
    #[error("add workload {workload}: ztunnel (connection {proxy}) refused it: {error:?}")]
    Refused {
        /// The workload: namespace/name (uid).
        workload: String,
        /// The proxy.
        proxy: ProxyId,
        /// The proxy's reason.
        error: String,
    },
    /// The last proxy went away, or was disconnected, before it answered. It stays known.
    #[error(
        "add workload {workload}: ztunnel (connection {proxy}) {reason}, and no other is connected"
    )]
    ProxyGone {
        /// The workload: namespace/name (uid).
        workload: String,
        /// The proxy that went last.
        proxy: ProxyId,
        /// What it did.
        reason: String,
    },
    /// It was deleted, or added with another netns, while this Add waited.
    #[error("add workload {workload}: it was deleted or got another netns meanwhile")]
    Superseded {
        /// The workload: namespace/name (uid).
        workload: String,
    },
}

/// Who acknowledged a deletion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Proxies that have stopped serving the workload.
    pub acked: Vec<ProxyId>,
    /// Proxies that went away, or were disconnected, instead. One that comes back stops serving the
    /// workload at the end of its snapshot.
    pub gone: Vec<ProxyId>,
}

/// What a proxy said to a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It serves it: its listeners are bound in the pod's netns.
    Added,
    /// It goes on serving it if it did before; it has no netns to start in.
    Kept,
    /// It cannot serve it, for this reason.
    Refused(String),
}

/// What happens to proxies, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A proxy said hello, and is the newest. Its snapshot begins.
    ProxyConnected {
        /// The proxy.
        id: ProxyId,
        /// Its process, where the agent's pid namespace sees it.
        pid: Option<i32>,
    },
    /// A proxy acknowledged the end of its snapshot; it has stopped whatever was not in it.
    SnapshotDone {
        /// The proxy.
        id: ProxyId,
        /// The workloads of the snapshot by uid.
        results: Arc<BTreeMap<String, Answer>>,
    },
    /// After its snapshot, a proxy began to serve a workload.
    WorkloadAdded {
        /// The proxy.
        id: ProxyId,
        /// The workload.
        uid: String,
    },
    /// After its snapshot, a proxy refused a workload.
    WorkloadRefused {
        /// The proxy.
        id: ProxyId,
        /// The workload.
        uid: String,
        /// The proxy's reason.
        error: String,
    },
    /// A proxy went away or was disconnected.
    ProxyGone {
        /// The proxy.
        id: ProxyId,
        /// What it did.
        reason: String,
    },
}

/// No proxy is connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away {
    /// Since then: when the last one went, or when the server began to listen.
    pub since: SystemTime,
    /// What the last one did; `None`: none has been connected since the server began to listen.
    pub reason: Option<String>,
}

/// The server as an operator wants to see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZdsStatus {
    /// Where proxies connect.
    pub socket: PathBuf,
    /// The connected proxies, newest first.
    pub proxies: Vec<ProxyStatus>,
    /// The known workloads in the order of their uids.
    pub workloads: Vec<WorkloadStatus>,
}

/// One connected proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyStatus {
    /// The connection.
    pub id: ProxyId,
    /// Its process, where the agent's pid namespace sees it.
    pub pid: Option<i32>,
    /// Whole seconds since its hello.
    pub connected_seconds: u64,
    /// Whether it has acknowledged its snapshot.
    pub snapshot_done: bool,
    /// How many of the known workloads it serves.
    pub added: usize,
    /// How many of the known workloads it refused.
    pub refused: usize,
}

/// One known workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// Who it is.
    #[serde(flatten)]
    pub workload: Workload,
    /// Inode number of its netns; None where we hold no fd of it.
    pub netns_inode: Option<u64>,
    /// What the newest proxy says to it; None while there is no proxy or no answer.
    pub answer: Option<Answer>,
}
