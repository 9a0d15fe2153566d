//! What the proxy has seen: one JSON line per connection.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

/// From which listener a connection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// The workload called somebody (15001).
    Outbound,
    /// Somebody called the workload over HBONE (15008).
    Inbound,
    /// Somebody called the workload in plaintext (15006).
    InboundPlaintext,
}

/// What carries a connection on the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Over {
    /// mTLS and HTTP/2 CONNECT.
    #[serde(rename = "HBONE")]
    Hbone,
    /// Plain TCP to or from a workload.
    Plaintext,
    /// Plain TCP to an address that is no workload's.
    Passthrough,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Both sides are connected.
    Ok,
    /// Policy, a missing identity or a wrong address forbids it.
    Denied,
    /// The destination refused it.
    Refused,
    /// The proxy would have called itself.
    Loop,
    /// Anything else.
    Error,
}

/// One line of the log; written before the client gets its first byte or its connection's end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Seconds since 1970.
    pub ts: f64,
    /// The proxy's node.
    pub node: String,
    /// The listener.
    pub direction: Direction,
    /// The workload, `<namespace>/<name>`.
    pub pod: String,
    /// The client, as the proxy sees it.
    pub src: SocketAddr,
    /// The original destination.
    pub dst: SocketAddr,
    /// What the proxy connects to, if that was decided: the app, the destination, the peer's 15008.
    pub via: Option<SocketAddr>,
    /// What carries it, if that was decided.
    pub over: Option<Over>,
    /// Inbound: the SPIFFE identity in the client's certificate. Outbound: the one that the server
    /// has shown.
    pub peer_identity: Option<String>,
    /// What became of it.
    pub result: Outcome,
    /// Why, if not `ok`.
    pub detail: Option<String>,
}

/// Reads all complete lines of a log; a file that is not there yet is an empty log.
pub fn read_log(path: &Path) -> anyhow::Result<Vec<Record>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("read access log {}", path.display())),
    };
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(|line| {
            serde_json::from_str(line)
                .with_context(|| format!("read line of access log {}: {line}", path.display()))
        })
        .collect()
}

/// The log of one proxy.
#[derive(Clone, Debug)]
pub(super) struct AccessLog {
    node: String,
    file: Option<Arc<Mutex<File>>>,
}

impl AccessLog {
    pub(super) fn open(node: &str, path: Option<&Path>) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.with_context(|| format!("open access log {}", path.display()))
        };
        let file = path.map(open).transpose()?.map(|file| Arc::new(Mutex::new(file)));
        Ok(Self { node: node.to_owned(), file })
    }

    /// Starts the record of a connection, `ok` if nothing else is said.
    pub(super) fn record(
        &self,
        direction: Direction,
        pod: &str,
        src: SocketAddr,
        dst: SocketAddr,
    ) -> Record {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Record {
            ts: now.as_secs_f64(),
            node: self.node.clone(),
            direction,
            pod: pod.to_owned(),
            src,
            dst,
            via: None,
            over: None,
            peer_identity: None,
            result: Outcome::Ok,
            detail: None,
        }
    }

    pub(super) fn write(&self, record: &Record) {
        info!(
            direction = ?record.direction, pod = record.pod, src = %record.src, dst = %record.dst,
            over = ?record.over, peer = record.peer_identity, result = ?record.result,
            detail = record.detail, "connection"
        );
        let Some(file) = &self.file else { return };
        let written =
            serde_json::to_vec(record).map_err(std::io::Error::from).and_then(|mut line| {
                line.push(b'\n');
                file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
            });
        if let Err(error) = written {
            warn!(%error, "write to the access log failed");
        }
    }
}

impl Record {
    /// The connection came to another end than `ok`.
    pub(super) fn fail(&mut self, result: Outcome, detail: impl ToString) -> &Self {
        self.result = result;
        self.detail = Some(detail.to_string());
        self
    }

    /// The connection could not be connected on.
    pub(super) fn fail_to_connect(&mut self, error: &std::io::Error) -> &Self {
        let refused = error.kind() == std::io::ErrorKind::ConnectionRefused;
        self.fail(if refused { Outcome::Refused } else { Outcome::Error }, error)
    }
}
