//! Health and metrics over HTTP, for the kubelet and for Prometheus.
//!
//! | request | answer |
//! |---|---|
//! | `GET /healthz` | 200 as long as the agent serves requests |
//! | `GET /readyz` | 200 when all conditions hold, else 503; each condition on a line |
//! | `GET /metrics` | [`crate::metrics`], in OpenMetrics' text format |
//! | `GET /` | the status page, [`crate::page`], for those who may see it |
//!
//! Everybody can connect, so every client is limited: each request has a connection of its own, its header
//! has to be short and arrive soon, and nobody has more than a few connections.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{metrics::CONTENT_TYPE, page::Audience};

/// How long a request may take to arrive, and its answer to be read.
const HEADER_WITHIN: Duration = Duration::from_secs(2);
const WITHIN: Duration = Duration::from_secs(10);
/// The maximum length of a header.
const HEADER_BYTES: usize = 16 * 1024;
/// How many connections one address may have at once, and all addresses together, except this node's own.
const OF_ONE: usize = 16;
const OF_ALL: usize = 256;
/// The pause after accepting a connection failed, for example for lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// What is nowhere else.
const NOT_FOUND: (StatusCode, &str) =
    (StatusCode::NOT_FOUND, "not found; there are /healthz, /readyz and /metrics\n");

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

/// A condition for the agent to be ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// In a word or two: `pods`, `cni plugin`.
    pub name: &'static str,
    /// `None`: it holds; else what is missing.
    pub missing: Option<String>,
}

/// What the server asks the agent.
pub trait Agent: Send + Sync + 'static {
    /// What has to hold before the agent is ready.
    fn conditions(&self) -> Vec<Condition>;

    /// The metrics, as text.
    fn metrics(&self) -> impl Future<Output = Result<String>> + Send;
}

/// The open port.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    page: Option<(Audience, Router)>,
}

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
        Ok(Self { listener, page: None })
    }

    /// With a page at `/`, for those who may see it.
    pub fn with_page(self, audience: Audience, page: Router) -> Self {
        Self { page: Some((audience, page)), ..self }
    }

    /// Serves `agent` until `shutdown`.
    pub async fn run<A: Agent>(self, agent: Arc<A>, shutdown: CancellationToken) {
        let router = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready::<A>))
            .route("/metrics", get(metrics::<A>))
            .with_state(agent);
        let elsewhere = |router: Router| router.fallback(|| async { NOT_FOUND });
        let with_page = self.page.map(|(audience, page)| {
            let router = elsewhere(router.clone().merge(page));
            (audience, router)
        });
        let router = elsewhere(router);
        let guests = Arc::new(Guests::default());
        loop {
            let accepted = shutdown.run_until_cancelled(self.listener.accept()).await;
            match accepted {
                None => return,
                Some(Ok((stream, peer))) => {
                    // Kubelet's probes come from an address of this node to the same.
                    let own = stream.local_addr().is_ok_and(|local| local.ip() == peer.ip());
                    if let Some(guest) = Guests::admit(&guests, counted(peer.ip()), own) {
                        let seen = with_page.as_ref().filter(|(who, _)| who.admits(peer.ip()));
                        let router = seen.map_or(&router, |(_, with_page)| with_page).clone();
                        tokio::spawn(answer(stream, router, guest));
                    }
                }
                Some(Err(e)) => {
                    debug!("accept a connection for health and metrics: {e}");
                    sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Answers the one request of a connection.
async fn answer(stream: TcpStream, router: Router, _guest: Guest) {
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_WITHIN)
        .max_buf_size(HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // Whatever went wrong is the client's problem.
    let _ended = timeout(WITHIN, serving).await;
}

/// Who is connected, and how often.
#[derive(Debug, Default)]
struct Guests(Mutex<HashMap<IpAddr, usize>>);

/// A client's connection.
struct Guest {
    guests: Arc<Guests>,
    ip: IpAddr,
}

/// The address for which a client is counted. All of `127.0.0.0/8` are one: a process of the node has them all.
fn counted(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(ip) if ip.is_loopback() => Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    }
}

impl Guests {
    /// `None` if there are too many. Connections from this node's `own` addresses are counted separately.
    fn admit(guests: &Arc<Self>, ip: IpAddr, own: bool) -> Option<Guest> {
        let mut counts = guests.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counts.values().sum();
        let count = counts.get(&ip).copied().unwrap_or_default();
        if count >= OF_ONE || (all >= OF_ALL && !own) {
            return None;
        }
        counts.insert(ip, count + 1);
        Some(Guest { guests: Arc::clone(guests), ip })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut counts = self.guests.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.ip);
            }
        }
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
    let failed = |e| (StatusCode::INTERNAL_SERVER_ERROR, format!("{e:#}\n")).into_response();
    report(&*agent).await.unwrap_or_else(failed)
}

/// The metrics, as the answer to a request.
///
/// # Errors
///
/// As for [`Agent::metrics`].
pub(crate) async fn report(agent: &impl Agent) -> Result<Response> {
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], agent.metrics().await?).into_response())
}
