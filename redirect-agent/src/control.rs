//! The control API: HTTP/1.1 with JSON on a Unix socket that only root can use.
//!
//! | request | answer |
//! |---|---|
//! | `GET /healthz` | `{"ok":true}` |
//! | `GET /status` | [`Status`] |
//! | `POST /overrides` with [`OverrideRequest`] | [`Answer`] |
//! | `POST /pause` with [`PauseRequest`] | [`Answer`] |
//! | `POST /resume` | [`Answer`] |
//!
//! What went wrong is `{"error":"…"}` with a status from 400 up.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use axum::{
    Json, Router,
    extract::{ConnectInfo, Request, State, connect_info::Connected, rejection::JsonRejection},
    http::{Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::IncomingStream,
};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    output::Status,
    overrides::{Change, Mode, Moment, Override, Pause, Target},
};

/// Where the agent listens unless the operator says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/redirect-agent/control.sock";

/// The agent answers within this time, or something is wrong with it.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the control API needs of the agent.
pub trait Agent: Send + Sync + 'static {
    /// What there is to know now.
    fn status(&self) -> impl Future<Output = anyhow::Result<Status>> + Send;

    /// Makes `change` and keeps it; pods follow it after the answer.
    fn change(&self, change: Change) -> impl Future<Output = anyhow::Result<Answer>> + Send;
}

/// What became of a change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it changed anything; doing it twice is harmless.
    pub changed: bool,
    /// What the operator should know: a pod that stays out for a hard reason, say.
    pub notes: Vec<String>,
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
}

/// Body of `POST /pause`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {
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
pub struct Server {
    listener: UnixListener,
    path: SocketFile,
}

/// The socket's file; it goes when this does.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            warn!("remove the control socket {}: {error}", self.0.display());
        }
    }
}

impl Server {
    /// Listens at `path`. A directory that is not there is made, for root alone; a socket that a
    /// former agent left behind is taken over.
    ///
    /// # Errors
    ///
    /// When another agent listens there, when others could put their own socket in its place, or
    /// when the path cannot be used.
    pub fn bind(path: &Path) -> anyhow::Result<Server> {
        let name = || format!("listen on the control socket {}", path.display());
        make_directory(path).with_context(name)?;
        remove_stale(path).with_context(name)?;
        let listener = UnixListener::bind(path).with_context(name)?;
        let file = SocketFile(path.to_owned());
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(name)?;
        Ok(Server { listener, path: file })
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
        let Server { listener, path } = self;
        axum::serve(listener, router(agent).into_make_service_with_connect_info::<Peer>())
            .with_graceful_shutdown(shutdown.cancelled_owned())
            .await
            .with_context(|| format!("serve the control socket {}", path.0.display()))
    }
}

fn make_directory(socket: &Path) -> anyhow::Result<()> {
    let dir = match socket.parent() {
        None => bail!("it is not the path of a file"),
        Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
        Some(dir) => dir,
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mode = fs::metadata(dir)?.permissions().mode();
    if mode & 0o022 != 0 {
        bail!(
            "others may write to the directory {} (mode {:o}) and could put their own socket \
             there: `chmod 0700` it, or name another one with --control-socket",
            dir.display(),
            mode & 0o7777
        );
    }
    Ok(())
}

fn remove_stale(path: &Path) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("there is something else of that name: remove it, or use --control-socket");
        }
        Ok(_) => {}
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!("another agent listens there: stop it first, or use --control-socket");
    }
    fs::remove_file(path)?;
    Ok(())
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
struct Peer {
    /// `None`: the kernel did not say.
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Peer {
        Peer { uid: stream.io().peer_cred().ok().map(|cred| cred.uid()) }
    }
}

fn router<A: Agent>(agent: Arc<A>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { Json(Health { ok: true }) }))
        .route("/status", get(status::<A>))
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
        .layer(middleware::from_fn(root_only))
}

/// The socket's mode lets only root connect; this holds even where somebody changed it.
async fn root_only(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if !may_control(peer.uid, geteuid().as_raw()) {
        return failure(
            StatusCode::FORBIDDEN,
            "only root may control the agent: run the command as root".to_owned(),
        );
    }
    next.run(request).await
}

/// Root, and the user that the agent itself runs as.
fn may_control(peer: Option<u32>, own: u32) -> bool {
    peer.is_some_and(|uid| uid == 0 || uid == own)
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
    answer(agent.status().await)
}

async fn overrides<A: Agent>(
    State(agent): State<Arc<A>>,
    request: Result<Json<OverrideRequest>, JsonRejection>,
) -> Response {
    let change = request.map_err(|error| error.body_text()).and_then(|Json(request)| {
        let OverrideRequest { target, mode, for_seconds } = request;
        Ok(match mode {
            Some(mode) => {
                Change::Set { target, value: Override { mode, until: until(for_seconds)? } }
            }
            None => Change::Clear { target },
        })
    });
    apply(agent, change).await
}

async fn pause<A: Agent>(
    State(agent): State<Arc<A>>,
    request: Result<Json<PauseRequest>, JsonRejection>,
) -> Response {
    let change = request
        .map_err(|error| error.body_text())
        .and_then(|Json(request)| Ok(Change::Pause(Pause { until: until(request.for_seconds)? })));
    apply(agent, change).await
}

async fn resume<A: Agent>(State(agent): State<Arc<A>>) -> Response {
    apply(agent, Ok(Change::Resume)).await
}

async fn apply<A: Agent>(agent: Arc<A>, change: Result<Change, String>) -> Response {
    match change {
        Ok(change) => answer(agent.change(change).await),
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
    pub async fn resume(&self) -> anyhow::Result<Answer> {
        self.call(Method::POST, "/resume", None::<&()>).await
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
        let stream = UnixStream::connect(&self.path).await.map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => anyhow::anyhow!(
                "cannot reach the agent at {path}: permission denied: run the command as root"
            ),
            _ => anyhow::anyhow!(
                "cannot reach the agent at {path}: {error}: is `redirect-agent run` running on \
                 this node? --control-socket names another socket"
            ),
        })?;
        let exchange = exchange(stream, method, uri, body);
        let (status, content) = tokio::time::timeout(DEADLINE, exchange)
            .await
            .map_err(|_| anyhow::anyhow!("it did not answer within {DEADLINE:?}"))
            .flatten()
            .with_context(|| format!("ask the agent at {path}"))?;
        if !status.is_success() {
            let error = match serde_json::from_slice::<ErrorBody>(&content) {
                Ok(body) => body.error,
                Err(_) => status.to_string(),
            };
            bail!("the agent at {path} says: {error}");
        }
        serde_json::from_slice(&content).with_context(|| {
            format!("read the answer of the agent at {path}: is it of another version?")
        })
    }
}

/// One request on a connection, and the answer to it.
pub(crate) async fn exchange(
    stream: UnixStream,
    method: Method,
    uri: &str,
    body: Option<&impl Serialize>,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = hyper::Request::builder().method(method).uri(uri).header(header::HOST, "agent");
    let request = match body {
        Some(body) => request
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::<Bytes>::from(serde_json::to_vec(body)?))?,
        None => request.body(Full::default())?,
    };
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        anyhow::Ok((status, response.into_body().collect().await?.to_bytes()))
    };
    tokio::pin!(answer);
    // The connection ends before the answer has been read only when it fails.
    tokio::select! {
        answer = &mut answer => answer,
        connection = connection => {
            connection?;
            answer.await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::may_control;

    #[test]
    fn only_root_and_the_agents_own_user_may_control_it() {
        assert!(may_control(Some(0), 0));
        assert!(may_control(Some(0), 1000));
        assert!(may_control(Some(1000), 1000));
        assert!(!may_control(Some(1000), 0));
        assert!(!may_control(None, 0));
    }
}
