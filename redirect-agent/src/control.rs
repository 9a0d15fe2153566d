//! The control API: HTTP/1.1 with JSON on a Unix socket that only root can use.
//!
//! | request | answer |
//! |---|---|
//! | `GET /healthz` | `{"ok":true}` |
//! | `GET /status` | [`Status`] |
//! | `POST /status` with [`StatusRequest`] | [`Status`] of those pods |
//! | `POST /explain` with [`explain::Request`] | [`Explanation`] |
//! | `POST /observe` with [`verdicts::Request`] | [`verdicts::Line`]s, each on a line, as they come |
//! | `GET /remaining` | [`Remaining`] |
//! | `POST /overrides` with [`OverrideRequest`] | [`Answer`] |
//! | `POST /pause` with [`PauseRequest`] | [`Answer`] |
//! | `POST /resume` with [`ResumeRequest`] | [`Answer`] |
//!
//! What went wrong is `{"error":"…"}` with a status from 400 up.

use std::{
    collections::BTreeMap,
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use axum::{
    Json, Router,
    body::Body,
    extract::{ConnectInfo, Request, State, rejection::JsonRejection},
    http::{Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{FutureExt as _, Stream, StreamExt as _, TryStreamExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{io::AsyncBufReadExt as _, net::UnixStream};
use tokio_util::{io::StreamReader, sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    explain::{self, Explanation},
    membership::{Pod, PodKey},
    output::Status,
    overrides::{Change, Mode, Moment, Override, Pause, Target},
    root_socket::{self, Peer, RootSocket},
    selector::LabelSelector,
    verdicts,
};

/// Where the agent listens unless the operator says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/redirect-agent/control.sock";

/// The agent answers within this time, or something is wrong with it.
const DEADLINE: Duration = Duration::from_secs(10);

/// How long a reason may be, in characters: it is one line of the log.
const REASON: usize = 500;

/// What the control API needs of the agent.
pub trait Agent: Send + Sync + 'static {
    /// What there is to know now of these pods.
    fn status(&self, of: StatusRequest) -> impl Future<Output = anyhow::Result<Status>> + Send;

    /// Why a pod is in the mesh or not, and how a call goes.
    fn explain(
        &self,
        request: explain::Request,
    ) -> impl Future<Output = anyhow::Result<Explanation>> + Send;

    /// The datapath's verdicts from now on; the stream ends when the agent does.
    fn observe(
        self: Arc<Self>,
        request: verdicts::Request,
    ) -> anyhow::Result<impl Stream<Item = Vec<verdicts::Line>> + Send + 'static>;

    /// Which pods do not bypass, as far as their tasks know: that costs nothing.
    fn remaining(&self) -> anyhow::Result<Remaining>;

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
        .route("/observe", post(observe::<A>))
        .route("/remaining", get(remaining::<A>))
        .route("/overrides", post(overrides::<A>))
        .route("/pause", post(pause::<A>))
        .route("/resume", post(resume::<A>))
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

/// The commands' end of the control socket.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// Talks to the agent that listens at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Client {
        Client { path: path.into() }
    }

    /// What the agent knows.
    ///
    /// # Errors
    ///
    /// When the agent cannot be reached, or says no.
    pub async fn status(&self) -> anyhow::Result<Status> {
        self.call(Method::GET, "/status", None::<&()>).await
    }

    /// What the agent knows of some pods.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn status_of(&self, request: &StatusRequest) -> anyhow::Result<Status> {
        if request.is_all() {
            return self.status().await;
        }
        self.call(Method::POST, "/status", Some(request)).await
    }

    /// Why a pod is in the mesh or not, and how a call goes.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn explain(&self, request: &explain::Request) -> anyhow::Result<Explanation> {
        self.call(Method::POST, "/explain", Some(request)).await
    }

    /// The datapath's verdicts from now on.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn observe(&self, request: &verdicts::Request) -> anyhow::Result<Observing> {
        let stream = self.connect().await?;
        let sending = send(stream, Method::POST, "/observe", Some(request));
        let (response, connection) = self.in_time(sending).await?;
        let status = response.status();
        let body = response.into_body();
        if !status.is_success() {
            return Err(self.refusal(status, &body.collect().await?.to_bytes()));
        }
        Ok(Observing { body, path: self.path.clone(), _connection: connection })
    }

    /// Which pods do not bypass yet.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn remaining(&self) -> anyhow::Result<Remaining> {
        self.call(Method::GET, "/remaining", None::<&()>).await
    }

    /// Sets an override, or takes it back.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn set_override(&self, request: &OverrideRequest) -> anyhow::Result<Answer> {
        self.call(Method::POST, "/overrides", Some(request)).await
    }

    /// Lets the whole node bypass.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn pause(&self, request: &PauseRequest) -> anyhow::Result<Answer> {
        self.call(Method::POST, "/pause", Some(request)).await
    }

    /// Ends the pause.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn resume(&self, request: &ResumeRequest) -> anyhow::Result<Answer> {
        self.call(Method::POST, "/resume", Some(request)).await
    }

    /// Succeeds when the agent answers.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn healthz(&self) -> anyhow::Result<()> {
        self.call::<Health>(Method::GET, "/healthz", None::<&()>).await.map(drop)
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        uri: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<T> {
        let path = self.path.display();
        let stream = self.connect().await?;
        let (status, content) = self.in_time(exchange(stream, method, uri, body)).await?;
        if !status.is_success() {
            return Err(self.refusal(status, &content));
        }
        serde_json::from_slice(&content).with_context(|| {
            format!("read the answer of the agent at {path}: is it of another version?")
        })
    }

    /// What the agent answers before [`DEADLINE`].
    async fn in_time<T>(
        &self,
        answer: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        tokio::time::timeout(DEADLINE, answer)
            .await
            .map_err(|_| anyhow::anyhow!("it did not answer within {DEADLINE:?}"))
            .flatten()
            .with_context(|| format!("ask the agent at {}", self.path.display()))
    }

    async fn connect(&self) -> anyhow::Result<UnixStream> {
        let path = self.path.display();
        UnixStream::connect(&self.path).await.map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => anyhow::anyhow!(
                "cannot reach the agent at {path}: permission denied: run the command as root"
            ),
            _ => anyhow::anyhow!(
                "cannot reach the agent at {path}: {error}: is `redirect-agent run` running on \
                 this node? --control-socket names another socket"
            ),
        })
    }

    /// What the agent says in place of an answer.
    fn refusal(&self, status: StatusCode, content: &[u8]) -> anyhow::Error {
        let error = match serde_json::from_slice::<ErrorBody>(content) {
            Ok(body) => body.error,
            Err(_) => status.to_string(),
        };
        anyhow::anyhow!("the agent at {} says: {error}", self.path.display())
    }
}

/// The answer to [`Client::observe`].
#[derive(Debug)]
pub struct Observing {
    body: Incoming,
    path: PathBuf,
    _connection: AbortOnDropHandle<()>,
}

impl Observing {
    /// Calls `each` for every line, until that says to stop.
    ///
    /// # Errors
    ///
    /// When the agent ends, or `each` fails.
    pub async fn each(
        self,
        mut each: impl FnMut(verdicts::Line) -> anyhow::Result<ControlFlow<()>>,
    ) -> anyhow::Result<()> {
        let body = self.body.into_data_stream().map_err(io::Error::other);
        let mut lines = StreamReader::new(body).lines();
        let path = self.path.display();
        let read = || format!("read what the agent at {path} says");
        while let Some(line) = lines.next_line().await.with_context(read)? {
            if each(serde_json::from_str(&line).with_context(read)?)?.is_break() {
                return Ok(());
            }
        }
        bail!("the agent at {path} has ended")
    }
}

/// One request on a connection, and the answer to it.
pub(crate) async fn exchange(
    stream: UnixStream,
    method: Method,
    uri: &str,
    body: Option<&impl Serialize>,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let (response, _connection) = send(stream, method, uri, body).await?;
    let status = response.status();
    Ok((status, response.into_body().collect().await?.to_bytes()))
}

/// One request on a connection, and the head of the answer; the rest comes while the connection is held.
async fn send(
    stream: UnixStream,
    method: Method,
    uri: &str,
    body: Option<&impl Serialize>,
) -> anyhow::Result<(hyper::Response<Incoming>, AbortOnDropHandle<()>)> {
    let request = hyper::Request::builder().method(method).uri(uri).header(header::HOST, "agent");
    let request = match body {
        Some(body) => request
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::<Bytes>::from(serde_json::to_vec(body)?))?,
        None => request.body(Full::default())?,
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Its errors are those of the answer.
    let connection = AbortOnDropHandle::new(tokio::spawn(connection.map(drop)));
    Ok((sender.send_request(request).await?, connection))
}
