//! The agent's end of CNI: HTTP on a Unix socket that only root can use.
//!
//! | request | answer |
//! |---|---|
//! | `POST /cmdadd` with [`AddRequest`] | 200 when the pod is in its desired state |
//!
//! Failures have a status from 400 up, and a text for kubelet's Event. 503 tells the plugin to try again: the
//! agent is starting or stopping.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, OnceLock},
    time::Instant,
};

use anyhow::Result;
use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::request::{ADD_PATH, AddRequest};
use crate::{
    membership::PodKey,
    metrics::Metrics,
    root_socket::{self, RootSocket},
};

/// What the agent does for a request.
pub trait Agent: Send + Sync + 'static {
    /// Returns when the pod `key`, whose sandbox is that of `request`, is in its desired state.
    fn add(
        &self,
        key: PodKey,
        request: AddRequest,
    ) -> impl Future<Output = Result<(), Refusal>> + Send;
}

/// Why a pod must not start.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The source does not know it.
    #[error("start pod {pod}: {why}")]
    Unknown {
        /// The pod.
        pod: PodKey,
        /// What is known instead.
        why: String,
    },
    /// It is gone, or on its way out.
    #[error("start pod {0}: it is deleted")]
    Deleted(PodKey),
    /// Another sandbox has been reported for it since.
    #[error("start pod {0}: its sandbox is gone, or another one has taken its place")]
    Superseded(PodKey),
    /// The request's network namespace cannot be the pod's.
    #[error("start pod {pod}: {why}")]
    Unusable {
        /// The pod.
        pod: PodKey,
        /// What is wrong with it.
        why: String,
    },
    /// It is not in its desired state, and the time is up.
    #[error("start pod {pod}: {why}")]
    Late {
        /// The pod.
        pod: PodKey,
        /// What is missing.
        why: String,
    },
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Refusal::Unknown { .. } => StatusCode::NOT_FOUND,
            Refusal::Deleted(_) | Refusal::Superseded(_) => StatusCode::CONFLICT,
            Refusal::Unusable { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Refusal::Late { .. } => StatusCode::GATEWAY_TIMEOUT,
        }
    }
}

/// Who answers: nobody, as long as the agent does not know its pods.
#[derive(Debug)]
pub struct Door<A> {
    /// Pods of these namespaces are never in the mesh, so they need not wait. Among them may be pods that the
    /// agent itself needs to start.
    excluded_namespaces: BTreeSet<String>,
    agent: OnceLock<A>,
}

impl<A: Agent> Door<A> {
    /// Closed, except for pods of these namespaces.
    pub fn new(excluded_namespaces: BTreeSet<String>) -> Self {
        Self { excluded_namespaces, agent: OnceLock::new() }
    }

    /// From now on `agent` answers; a second one is not needed.
    pub fn open(&self, agent: A) {
        let _first = self.agent.set(agent);
    }
}

/// The socket, open.
#[derive(Debug)]
pub struct Server(RootSocket);

impl Server {
    /// Listens at `path`, for root alone.
    ///
    /// # Errors
    ///
    /// As for [`RootSocket::bind`].
    pub fn bind(path: &Path) -> Result<Self> {
        let name = root_socket::Name { what: "CNI socket", flag: "--cni-socket" };
        RootSocket::bind(path, name).map(Self)
    }

    /// Serves until `shutdown`. Requests that are still waiting are told to try again.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub async fn run<A: Agent>(
        self,
        door: Arc<Door<A>>,
        metrics: Metrics,
        shutdown: CancellationToken,
    ) -> Result<()> {
        let asked = Asked { door, metrics, shutdown: shutdown.clone() };
        let router = Router::new()
            .route(ADD_PATH, post(add::<A>))
            .fallback(|request: Request| async move {
                let (method, path) = (request.method(), request.uri().path());
                (StatusCode::NOT_FOUND, format!("{method} {path}: there is no such request\n"))
            })
            .with_state(asked);
        self.0.serve(router, only_root, shutdown).await
    }
}

struct Asked<A> {
    door: Arc<Door<A>>,
    metrics: Metrics,
    shutdown: CancellationToken,
}

impl<A> Clone for Asked<A> {
    fn clone(&self) -> Self {
        let Self { door, metrics, shutdown } = self;
        Self { door: Arc::clone(door), metrics: metrics.clone(), shutdown: shutdown.clone() }
    }
}

fn only_root() -> Response {
    (StatusCode::FORBIDDEN, "only root may ask\n").into_response()
}

async fn add<A: Agent>(State(asked): State<Asked<A>>, body: Bytes) -> Response {
    let mut counted = Counted { metrics: &asked.metrics, since: Instant::now(), granted: false };
    match answer(&asked, &body).await {
        Ok(()) => {
            counted.granted = true;
            StatusCode::OK.into_response()
        }
        Err((status, why)) => (status, why).into_response(),
    }
}

/// Counts a request, even if its sender has gone away.
struct Counted<'a> {
    metrics: &'a Metrics,
    since: Instant,
    granted: bool,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.metrics.cni_request("add", self.granted, self.since.elapsed());
    }
}

async fn answer<A: Agent>(asked: &Asked<A>, body: &[u8]) -> Result<(), (StatusCode, String)> {
    let refuse = |status, why: String| {
        warn!("a pod's start is refused: {why}");
        Err((status, why))
    };
    let request: AddRequest = match serde_json::from_slice(body) {
        Ok(request) => request,
        Err(e) => return refuse(StatusCode::BAD_REQUEST, format!("read the request: {e}")),
    };
    let key = match PodKey::new(&request.pod_namespace, &request.pod_name) {
        Ok(key) => key,
        Err(e) => return refuse(StatusCode::BAD_REQUEST, e.to_string()),
    };
    if asked.door.excluded_namespaces.contains(&key.namespace) {
        return Ok(());
    }
    let Some(agent) = asked.door.agent.get() else {
        let why =
            format!("start pod {key}: redirect-agent is starting, and waits for the API server");
        return refuse(StatusCode::SERVICE_UNAVAILABLE, why);
    };
    let started = Instant::now();
    match asked.shutdown.run_until_cancelled(agent.add(key.clone(), request)).await {
        Some(Ok(())) => {
            info!(pod = %key, took = ?started.elapsed(), "may start");
            Ok(())
        }
        Some(Err(refusal)) => refuse(refusal.status(), refusal.to_string()),
        None => {
            let why = format!("start pod {key}: redirect-agent is stopping");
            refuse(StatusCode::SERVICE_UNAVAILABLE, why)
        }
    }
}
