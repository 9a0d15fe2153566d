//! `GET /` of the health address: this node's status as one HTML page, for people (`run --page`).
//!
//! Whoever reaches the port can ask for it, a pod's author chooses some of its text, and a browser shows it:
//!
//! - askama escapes all text, and [`CONTENT_SECURITY_POLICY`] allows nothing but the page's own stylesheet: no
//!   script, no other request, no form, no frame.
//! - It has names, states, reasons, settings and refusals of pods, but neither their uids nor a list of their
//!   addresses. A message may name an address.
//! - It is read-only: GET and HEAD, no cookies, nothing that a request could change.
//! - However many ask, it is made at most once in [`MAX_AGE`], and it has a maximum size ([`view`]).
//! - A web site whose name was made to lead here (DNS rebinding) is refused by the header `Host`.

mod refusals;
mod view;

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::ValueEnum;
use sha2::{Digest as _, Sha256};

use self::{refusals::Refusals, view::CSS};
use crate::{
    control::{self, StatusRequest},
    latest::Latest,
};

/// How old the page may be. As for the metrics, anybody can ask for it.
const MAX_AGE: Duration = Duration::from_secs(1);

/// Allows the page's own stylesheet, by its hash, and nothing else.
static CONTENT_SECURITY_POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = BASE64_STANDARD.encode(Sha256::digest(CSS));
    format!(
        "default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'"
    )
});

/// Who may see the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Audience {
    /// Nobody.
    Off,
    /// Whoever connects over the loopback interface: `kubectl port-forward`, and processes on the node's
    /// network.
    Local,
    /// Everybody who reaches the port.
    All,
}

impl Audience {
    /// Whether a client with this address may see it.
    pub fn admits(self, peer: IpAddr) -> bool {
        match self {
            Audience::Off => false,
            Audience::Local => peer.to_canonical().is_loopback(),
            Audience::All => true,
        }
    }
}

/// Serves the page at `/`. `node` is the node's name, under which a browser may ask for it.
pub fn router<A: control::Agent>(agent: Arc<A>, node: &str) -> Router {
    let page = Page {
        agent,
        node: node.to_owned(),
        refusals: Arc::default(),
        made: Arc::new(Latest::default()),
    };
    Router::new().route("/", get(answer::<A>)).with_state(Arc::new(page))
}

struct Page<A> {
    agent: Arc<A>,
    node: String,
    refusals: Arc<Mutex<Refusals>>,
    made: Arc<Latest<Bytes>>,
}

impl<A: control::Agent> Page<A> {
    async fn get(&self) -> Result<Bytes> {
        let make = || {
            let (agent, refusals) = (Arc::clone(&self.agent), Arc::clone(&self.refusals));
            async move {
                let status = agent.status(StatusRequest::default()).await?;
                let now = SystemTime::now();
                let refused = {
                    let mut refusals = refusals.lock().unwrap_or_else(PoisonError::into_inner);
                    refusals.look(&status.pods, now)
                };
                let page = view::render(&status, &agent.conditions(), &refused, now)?;
                Ok(Bytes::from(page))
            }
        };
        Ok(Bytes::clone(&*self.made.get(MAX_AGE, make).await.context("make the page")?))
    }
}

async fn answer<A: control::Agent>(State(page): State<Arc<Page<A>>>, asked: HeaderMap) -> Response {
    if !asked.get(header::HOST).is_none_or(|host| is_ours(host, &page.node)) {
        let why = "ask for this page by an address of the node, localhost or the node's name\n";
        return (StatusCode::MISDIRECTED_REQUEST, why).into_response();
    }
    let mut response = match page.get().await {
        Ok(body) => {
            let html = HeaderValue::from_static("text/html; charset=utf-8");
            ([(header::CONTENT_TYPE, html)], body).into_response()
        }
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{e:#}\n")).into_response(),
    };
    if let Ok(policy) = HeaderValue::from_str(&CONTENT_SECURITY_POLICY) {
        response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Whether a browser was led here by an address, or by a name that is nobody else's.
fn is_ours(host: &HeaderValue, node: &str) -> bool {
    let Ok(host) = host.to_str() else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    address.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || name.eq_ignore_ascii_case(node)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        membership::Reason,
        output::{PodState, PodStatus},
    };

    /// A pod of the namespace shop.
    pub(super) fn pod(name: &str, state: PodState) -> PodStatus {
        PodStatus {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            uid: format!("uid-of-{name}"),
            ips: vec!["10.0.0.2".parse().unwrap()],
            state,
            since: None,
            reason: Reason::PodLabelAmbient,
            message: None,
            overridden: None,
            traffic: None,
            netns: None,
            kernel: None,
            counters: BTreeMap::new(),
        }
    }

    #[test]
    fn host_is_an_address_or_a_name_of_the_node() {
        let ours = |host: &str| is_ours(&HeaderValue::from_str(host).unwrap(), "n1.example");
        for host in ["127.0.0.1:15014", "[::1]:15014", "[fd00::1]", "10.0.0.1", "localhost:8080"] {
            assert!(ours(host), "{host}");
        }
        assert!(ours("N1.example:15014"));
        for host in ["evil.example:15014", "127.0.0.1.evil.example", "localhost.evil.example", ""] {
            assert!(!ours(host), "{host}");
        }
    }

    #[test]
    fn local_is_loopback_in_both_families() {
        let admits = |who: Audience, peer: &str| who.admits(peer.parse().unwrap());
        for peer in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(admits(Audience::Local, peer), "{peer}");
            assert!(!admits(Audience::Off, peer), "{peer}");
        }
        for peer in ["10.0.0.1", "fd00::1", "fe80::1", "::ffff:10.0.0.1"] {
            assert!(!admits(Audience::Local, peer), "{peer}");
            assert!(admits(Audience::All, peer), "{peer}");
        }
    }
}
