//! Health and metrics over HTTP, for the kubelet and for Prometheus.
//!
//! | request | answer |
//! |---|---|
//! | `GET /healthz` | 200 as long as the agent serves requests |
//! | `GET /readyz` | 200 when all conditions hold, else 503; each condition on a line |
//! | `GET /metrics` | [`crate::metrics`], in OpenMetrics' text format |

use std::{fmt, net::SocketAddr, str::FromStr, sync::Arc};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::metrics::CONTENT_TYPE;

/// Where to serve, or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// Not at all.
    Off,
    /// At this address.
    At(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(s: &str) -> Result<Address, String> {
        match s {
            "off" => Ok(Address::Off),
            _ => s.parse().map(Address::At).map_err(|_| {
                "give an address with a port, such as [::]:15014, 127.0.0.1:15014, or `off`"
                    .to_owned()
            }),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Off => f.write_str("off"),
            Address::At(address) => address.fmt(f),
        }
    }
}

/// Something that has to hold before the agent is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// In a word or two: `pods`, `cni plugin`.
    pub name: &'static str,
    /// `None`: it holds; else what is missing.
    pub missing: Option<String>,
}

/// What is asked of the agent.
pub trait Agent: Send + Sync + 'static {
    /// What has to hold before the agent is ready.
    fn conditions(&self) -> Vec<Condition>;

    /// The metrics, as text.
    fn metrics(&self) -> impl Future<Output = Result<String>> + Send;
}

/// The open port.
#[derive(Debug)]
pub struct Server(TcpListener);

impl Server {
    /// Listens at `address`.
    ///
    /// # Errors
    ///
    /// When somebody else listens there.
    pub async fn bind(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!(
                "listen on {address} for health and metrics; --health-address names another one"
            )
        })?;
        Ok(Self(listener))
    }

    /// Serves `agent` until `shutdown`.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub async fn run<A: Agent>(self, agent: Arc<A>, shutdown: CancellationToken) -> Result<()> {
        let router = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready::<A>))
            .route("/metrics", get(metrics::<A>))
            .with_state(agent);
        axum::serve(self.0, router)
            .with_graceful_shutdown(shutdown.cancelled_owned())
            .await
            .context("serve health and metrics")
    }
}

async fn ready<A: Agent>(State(agent): State<Arc<A>>) -> Response {
    let conditions = agent.conditions();
    let ready = conditions.iter().all(|condition| condition.missing.is_none());
    let lines: String = conditions
        .iter()
        .map(|c| match &c.missing {
            None => format!("[+] {}\n", c.name),
            Some(missing) => format!("[-] {}: {missing}\n", c.name),
        })
        .collect();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, lines).into_response()
}

async fn metrics<A: Agent>(State(agent): State<Arc<A>>) -> Response {
    match agent.metrics().await {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{e:#}\n")).into_response(),
    }
}
