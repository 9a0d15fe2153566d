//! The control API: HTTP/1.1 with JSON on a Unix socket that only root can use.
//!
//! | request | answer |
//! |---|---|
//! | `GET /healthz` | `{"ok":true}` |
//! | `GET /status` | [`Status`] |
//! | `POST /status` with [`StatusRequest`] | [`Status`] of those pods |
//! | `POST /explain` with [`explain::Request`] | [`Explanation`] |
//! | `POST /verify` with [`verify::Request`] | [`Verification`] |
//! | `POST /observe` with [`verdicts::Request`] | [`verdicts::Line`]s, each on a line, as they come |
//! | `GET /remaining` | [`Remaining`] |
//! | `POST /overrides` with [`OverrideRequest`] | [`Answer`] |
//! | `POST /pause` with [`PauseRequest`] | [`Answer`] |
//! | `POST /resume` with [`ResumeRequest`] | [`Answer`] |
//! | `GET /log`, `POST /log` with [`LogRequest`] | [`Level`] |
//! | `GET /settings` | the [`Flags`] of `run` that are in force |
//! | `GET /journal` | the [`journal::Note`]s, oldest first |
//! | `GET /metrics` | the same text as on the port of [`crate::health`] |
//!
//! What went wrong is `{"error":"…"}` with a status from 400 up.

mod client;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{ConnectInfo, Request, State, rejection::JsonRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{Stream, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::info;

pub(crate) use self::client::exchange;
pub use self::client::{Client, Observing};
use crate::{
    cli::Flags,
    explain::{self, Explanation},
    health, journal,
    log::{self, Level},
    membership::{Pod, PodKey},
    output::Status,
    overrides::{Change, Mode, Moment, Override, Pause, Target},
    root_socket::{self, Peer, RootSocket},
    selector::LabelSelector,
    verdicts,
    verify::{self, Verification},
};

/// Where the agent listens unless the operator says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/redirect-agent/control.sock";

/// How long a reason may be, in characters: it is one line of the log.
const REASON: usize = 500;

/// What the control API needs of the agent, in addition to what is served over HTTP.
pub trait Agent: health::Agent {
    /// What there is to know now of these pods.
    fn status(&self, of: StatusRequest) -> impl Future<Output = anyhow::Result<Status>> + Send;

    /// Why a pod is in the mesh or not, and how a call goes.
    fn explain(
        &self,
        request: explain::Request,
    ) -> impl Future<Output = anyhow::Result<Explanation>> + Send;

    /// Makes calls from and to a pod, and says what the datapath did with them.
    fn verify(
        &self,
        request: verify::Request,
        by: Author,
    ) -> impl Future<Output = anyhow::Result<Verification>> + Send;

    /// The datapath's verdicts from now on; the stream ends when the agent does.
    fn observe(
        self: Arc<Self>,
        request: verdicts::Request,
    ) -> anyhow::Result<impl Stream<Item = Vec<verdicts::Line>> + Send + 'static>;

    /// Which pods do not bypass, as far as their tasks know: that costs nothing.
    fn remaining(&self) -> anyhow::Result<Remaining>;

    /// The flags of `run` that are in force.
    fn settings(&self) -> Flags;

    /// What happened lately to the pods, oldest first.
    fn journal(&self) -> anyhow::Result<Vec<journal::Note>>;

    /// Makes `change` and keeps it; pods follow it after the answer.
    fn change(
        &self,
        change: Change,
        by: Author,
    ) -> impl Future<Output = anyhow::Result<Answer>> + Send;
}

/// Who asks for a change, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Author {
    /// Who, as the kernel says.
    pub peer: Peer,
    /// Why, as they say.
    pub reason: Option<String>,
}

/// What became of a change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it changed anything; doing it twice is harmless.
    pub changed: bool,
    /// What is true now, in a line.
    #[serde(default)]
    pub message: String,
    /// The pods that it is about, and whether each is to be in the mesh now.
    #[serde(default)]
    pub wanted: BTreeMap<PodKey, bool>,
    /// What the operator should know: a pod that stays out for a hard reason, say.
    pub notes: Vec<String>,
}

/// Pods that are in the mesh, or on their way into it or out of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remaining {
    /// How many there are.
    pub pods: usize,
    /// How many of them failed.
    pub failed: usize,
    /// What keeps one of them.
    pub why: Option<String>,
}

/// Body of `POST /status`: which pods; all of them by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StatusRequest {
    /// Only these, where any are given.
    pub targets: Vec<Target>,
    /// Only those whose labels match.
    pub selector: Option<LabelSelector>,
}

impl StatusRequest {
    /// Whether it asks for every pod.
    pub fn is_all(&self) -> bool {
        self.targets.is_empty() && self.selector.is_none()
    }

    /// Whether it asks for this one.
    pub fn selects(&self, pod: &Pod) -> bool {
        let named = self.targets.is_empty() || self.targets.iter().any(|t| t.is_of(&pod.key));
        named && self.selector.as_ref().is_none_or(|selector| selector.matches(&pod.labels))
    }
}

/// Body of `POST /overrides`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OverrideRequest {
    /// For whom: `NAMESPACE/POD` or `NAMESPACE`.
    pub target: Target,
    /// Which way; `None` gives the decision back to the labels.
    pub mode: Option<Mode>,
    /// For how long, in seconds.
    #[serde(default)]
    pub for_seconds: Option<u64>,
    /// Why, for `status` and the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Body of `POST /pause`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
    /// For how long, in seconds.
    #[serde(default)]
    pub for_seconds: Option<u64>,
    /// Why, for `status` and the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Body of `POST /resume`, which may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeRequest {
    /// Why, for the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Body of `POST /log`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogRequest {
    /// See [`Level::filter`]; `None`: what RUST_LOG says.
    pub filter: Option<String>,
    /// For how long, in seconds.
    #[serde(default)]
    pub for_seconds: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Health {
    ok: bool,
}

#[derive(Serialize, Deserialize)]
struct ErrorBody {
    error: String,
}

/// The control socket, open.
#[derive(Debug)]
pub struct Server(RootSocket);

impl Server {
    /// Listens at `path`, for root alone.
    ///
    /// # Errors
    ///
    /// As for [`RootSocket::bind`].
    pub fn bind(path: &Path) -> anyhow::Result<Server> {
        let name = root_socket::Name { what: "control socket", flag: "--control-socket" };
        RootSocket::bind(path, name).map(Server)
    }

    /// Serves `agent` until `shutdown`; requests that are under way are answered.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub async fn run<A: Agent>(
        self,
        agent: Arc<A>,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        self.0.serve(router(agent), only_root, shutdown).await
    }
}

fn router<A: Agent>(agent: Arc<A>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { Json(Health { ok: true }) }))
        .route("/status", get(status::<A>).post(status_of::<A>))
        .route("/explain", post(explain_of::<A>))
        .route("/verify", post(verify_pod::<A>))
        .route("/observe", post(observe::<A>))
        .route("/remaining", get(remaining::<A>))
        .route("/overrides", post(overrides::<A>))
        .route("/pause", post(pause::<A>))
        .route("/resume", post(resume::<A>))
        .route("/log", get(|| async { answer(log::level()) }).post(set_log))
        .route("/settings", get(settings::<A>))
        .route("/journal", get(journal_of::<A>))
        .route("/metrics", get(metrics::<A>))
        .fallback(|request: Request| async move {
            failure(
                StatusCode::NOT_FOUND,
                format!("{} {}: there is no such request", request.method(), request.uri().path()),
            )
        })
        .method_not_allowed_fallback(|request: Request| async move {
            failure(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{}: not with {}", request.uri().path(), request.method()),
            )
        })
        .with_state(agent)
}

fn only_root() -> Response {
    failure(
        StatusCode::FORBIDDEN,
        "only root may control the agent: run the command as root".to_owned(),
    )
}

fn failure(code: StatusCode, error: String) -> Response {
    (code, Json(ErrorBody { error })).into_response()
}

fn answer<T: Serialize>(result: anyhow::Result<T>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")),
    }
}

async fn status<A: Agent>(State(agent): State<Arc<A>>) -> Response {
    answer(agent.status(StatusRequest::default()).await)
}

async fn status_of<A: Agent>(
    State(agent): State<Arc<A>>,
    request: Result<Json<StatusRequest>, JsonRejection>,
) -> Response {
    match request {
        Ok(Json(request)) => answer(agent.status(request).await),
        Err(error) => failure(StatusCode::BAD_REQUEST, error.body_text()),
    }
}

async fn explain_of<A: Agent>(
    State(agent): State<Arc<A>>,
    request: Result<Json<explain::Request>, JsonRejection>,
) -> Response {
    match request {
        Ok(Json(request)) => answer(agent.explain(request).await),
        Err(error) => failure(StatusCode::BAD_REQUEST, error.body_text()),
    }
}

async fn verify_pod<A: Agent>(
    State(agent): State<Arc<A>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<verify::Request>, JsonRejection>,
) -> Response {
    match request {
        Ok(Json(request)) => answer(agent.verify(request, Author { peer, reason: None }).await),
        Err(error) => failure(StatusCode::BAD_REQUEST, error.body_text()),
    }
}

async fn observe<A: Agent>(
    State(agent): State<Arc<A>>,
    request: Result<Json<verdicts::Request>, JsonRejection>,
) -> Response {
    match request {
        Ok(Json(request)) => match agent.observe(request) {
            Ok(lines) => {
                let lines = lines.map(|lines| verdicts::to_json(&lines));
                ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines))
                    .into_response()
            }
            Err(error) => failure(StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}")),
        },
        Err(error) => failure(StatusCode::BAD_REQUEST, error.body_text()),
    }
}

async fn remaining<A: Agent>(State(agent): State<Arc<A>>) -> Response {
    answer(agent.remaining())
}

async fn settings<A: Agent>(State(agent): State<Arc<A>>) -> Response {
    Json(agent.settings()).into_response()
}

async fn journal_of<A: Agent>(State(agent): State<Arc<A>>) -> Response {
    answer(agent.journal())
}

async fn metrics<A: Agent>(State(agent): State<Arc<A>>) -> Response {
    let failed = |error| failure(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"));
    health::report(&*agent).await.unwrap_or_else(failed)
}

async fn overrides<A: Agent>(
    State(agent): State<Arc<A>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<OverrideRequest>, JsonRejection>,
) -> Response {
    let change = request.map_err(|error| error.body_text()).and_then(|Json(request)| {
        let OverrideRequest { target, mode, for_seconds, reason } = request;
        let change = match mode {
            Some(mode) => {
                let (until, reason) = (until(for_seconds)?, reason.clone());
                Change::Set { target, value: Override { mode, until, reason } }
            }
            None => Change::Clear { target },
        };
        Ok((change, reason))
    });
    apply(agent, peer, change).await
}

async fn pause<A: Agent>(
    State(agent): State<Arc<A>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<PauseRequest>, JsonRejection>,
) -> Response {
    let change = request.map_err(|error| error.body_text()).and_then(|Json(request)| {
        let (until, reason) = (until(request.for_seconds)?, request.reason);
        Ok((Change::Pause(Pause { until, reason: reason.clone() }), reason))
    });
    apply(agent, peer, change).await
}

async fn resume<A: Agent>(
    State(agent): State<Arc<A>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Option<Json<ResumeRequest>>, JsonRejection>,
) -> Response {
    let reason = request.map_err(|error| error.body_text());
    let reason = reason.map(|request| request.and_then(|Json(request)| request.reason));
    apply(agent, peer, reason.map(|reason| (Change::Resume, reason))).await
}

async fn set_log(
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Result<Json<LogRequest>, JsonRejection>,
) -> Response {
    let request = request.map_err(|error| error.body_text());
    let changed = request.and_then(|Json(LogRequest { filter, for_seconds })| {
        log::set(filter, until(for_seconds)?).map_err(|error| format!("{error:#}"))
    });
    match changed {
        Ok(level) => {
            let Level { filter, .. } = &level;
            info!(
                target: log::AUDITED,
                filter,
                uid = peer.uid,
                pid = peer.pid,
                process = peer.process,
                "log-level"
            );
            Json(level).into_response()
        }
        Err(error) => failure(StatusCode::BAD_REQUEST, error),
    }
}

async fn apply<A: Agent>(
    agent: Arc<A>,
    peer: Peer,
    asked: Result<(Change, Option<String>), String>,
) -> Response {
    let asked = asked.and_then(|(change, reason)| match &reason {
        Some(reason) if reason.chars().count() > REASON => {
            Err(format!("the reason is longer than {REASON} characters"))
        }
        _ => Ok((change, reason)),
    });
    match asked {
        Ok((change, reason)) => answer(agent.change(change, Author { peer, reason }).await),
        Err(error) => failure(StatusCode::BAD_REQUEST, error),
    }
}

fn until(for_seconds: Option<u64>) -> Result<Option<Moment>, String> {
    for_seconds
        .map(|seconds| Moment::after(SystemTime::now(), Duration::from_secs(seconds)))
        .transpose()
        .map_err(|error| format!("{error:#}"))
}
