//! The commands' end of the control socket.

use std::{io, ops::ControlFlow, path::PathBuf, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use axum::http::{Method, StatusCode, header};
use futures_util::{FutureExt as _, TryStreamExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{io::AsyncBufReadExt as _, net::UnixStream};
use tokio_util::{io::StreamReader, task::AbortOnDropHandle};

use super::{
    Answer, ErrorBody, Health, LogRequest, OverrideRequest, PauseRequest, Remaining, ResumeRequest,
    StatusRequest,
};
use crate::{
    cli::Flags,
    explain::{self, Explanation},
    journal,
    log::Level,
    output::Status,
    verdicts,
    verify::{self, Verification},
};

/// The agent answers within this time, or something is wrong with it.
const DEADLINE: Duration = Duration::from_secs(10);
/// The same for what it asks its source before it answers.
const EXPLAINS_WITHIN: Duration = explain::WITHIN.saturating_add(Duration::from_secs(5));
/// The same for what it has to explain to itself first.
const VERIFIES_WITHIN: Duration = explain::WITHIN.saturating_add(DEADLINE);

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
        self.call_within(EXPLAINS_WITHIN, Method::POST, "/explain", Some(request)).await
    }

    /// What the datapath does with calls from and to a pod.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn verify(&self, request: &verify::Request) -> anyhow::Result<Verification> {
        self.call_within(VERIFIES_WITHIN, Method::POST, "/verify", Some(request)).await
    }

    /// The datapath's verdicts from now on.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn observe(&self, request: &verdicts::Request) -> anyhow::Result<Observing> {
        let stream = self.connect().await?;
        let sending = send(stream, Method::POST, "/observe", Some(request));
        let (response, connection) =
            in_time(DEADLINE, sending).await.with_context(|| self.asking())?;
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
        self.change("/overrides", request).await
    }

    /// Lets the whole node bypass.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn pause(&self, request: &PauseRequest) -> anyhow::Result<Answer> {
        self.change("/pause", request).await
    }

    /// Ends the pause.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn resume(&self, request: &ResumeRequest) -> anyhow::Result<Answer> {
        self.change("/resume", request).await
    }

    /// What the agent logs.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn log(&self) -> anyhow::Result<Level> {
        self.call(Method::GET, "/log", None::<&()>).await
    }

    /// Changes what the agent logs.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn set_log(&self, request: &LogRequest) -> anyhow::Result<Level> {
        self.change("/log", request).await
    }

    /// The flags of `run` that are in force.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn settings(&self) -> anyhow::Result<Flags> {
        self.call(Method::GET, "/settings", None::<&()>).await
    }

    /// What happened lately to the pods, oldest first.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn journal(&self) -> anyhow::Result<Vec<journal::Note>> {
        self.call(Method::GET, "/journal", None::<&()>).await
    }

    /// The metrics, as text.
    ///
    /// # Errors
    ///
    /// As for [`Client::status`].
    pub async fn metrics(&self) -> anyhow::Result<String> {
        let content = self.ask(DEADLINE, Method::GET, "/metrics", None::<&()>).await?;
        String::from_utf8(content.into()).context("read the metrics")
    }

    /// The process that listens on the socket, whether or not it answers. `None`: the kernel cannot say, for
    /// example because it is in another PID namespace.
    ///
    /// # Errors
    ///
    /// When nobody listens.
    pub async fn process(&self) -> anyhow::Result<Option<u32>> {
        let stream = self.connect().await?;
        let pid = stream.peer_cred().context("ask who listens")?.pid();
        Ok(pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0))
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
        self.call_within(DEADLINE, method, uri, body).await
    }

    /// Asks for a change. The request stays in the agent's socket when nobody waits for the answer any more.
    async fn change<T: DeserializeOwned>(
        &self,
        uri: &str,
        request: &impl Serialize,
    ) -> anyhow::Result<T> {
        let answer = self.call(Method::POST, uri, Some(request)).await;
        answer.map_err(|error| match error.downcast_ref::<Late>() {
            Some(_) => {
                anyhow!("{error:#}; it may still do it later: look with `redirect-agent status`")
            }
            None => error,
        })
    }

    async fn call_within<T: DeserializeOwned>(
        &self,
        within: Duration,
        method: Method,
        uri: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<T> {
        let content = self.ask(within, method, uri, body).await?;
        let path = self.path.display();
        serde_json::from_slice(&content).with_context(|| {
            format!("read the answer of the agent at {path}: is it of another version?")
        })
    }

    async fn ask(
        &self,
        within: Duration,
        method: Method,
        uri: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<Bytes> {
        let stream = self.connect().await?;
        let (status, content) = in_time(within, exchange(stream, method, uri, body))
            .await
            .with_context(|| self.asking())?;
        if !status.is_success() {
            return Err(self.refusal(status, &content));
        }
        Ok(content)
    }

    fn asking(&self) -> String {
        format!("ask the agent at {}", self.path.display())
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

async fn in_time<T>(
    within: Duration,
    answer: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(within, answer).await;
    answer.unwrap_or_else(|_| Err(Late(within).into()))
}

/// The agent has not answered in this time.
#[derive(Debug, thiserror::Error)]
#[error("it did not answer within {0:?}")]
struct Late(Duration);

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
