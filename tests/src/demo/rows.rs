//! Who calls whom, and how that should go.

use std::net::SocketAddr;

use anyhow::Result;
use serde::Serialize;

use super::Stop;
use super::cluster::{APP_PORT, CLOSED_PORT, Cluster, OUTSIDE, service_addr};
use super::evidence::{Evidence, Manner, NOBODY_LISTENS, Over, STRICT, Seen, observe};
use crate::netns::Family;

/// Both, and what they are called.
pub(super) const FAMILIES: [(Family, &str); 2] = [(Family::V4, "IPv4"), (Family::V6, "IPv6")];

/// A line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Who calls.
    pub from: String,
    /// Whom.
    pub to: String,
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    /// The address that is called.
    pub target: SocketAddr,
    /// How it should go.
    pub expected: Seen,
    /// How it went.
    pub observed: Seen,
    /// Whether that is the same.
    pub ok: bool,
    /// What `observed` was told from.
    pub evidence: Evidence,
}

/// Who is called.
#[derive(Clone, Copy)]
pub(super) enum To {
    /// A pod, at its address.
    Pod(&'static str),
    /// The service, whose one pod this is.
    Service(&'static str),
    /// A pod, at a port that nobody listens on.
    ClosedPort(&'static str),
    /// A host that is no pod.
    Outside,
}

/// A call, and what should carry it.
#[derive(Clone, Copy)]
pub(super) struct Flow {
    pub(super) from: &'static str,
    pub(super) to: To,
    manner: Manner,
    over: Over,
    refused_by: Option<&'static str>,
}

impl Flow {
    pub(super) const fn new(from: &'static str, to: To, over: Over) -> Self {
        Self { from, to, manner: Manner::Plain, over, refused_by: None }
    }

    /// The client speaks HBONE by itself.
    const fn by_itself(self) -> Self {
        Self { manner: Manner::Hbone, ..self }
    }

    const fn refused(from: &'static str, to: To, by: &'static str) -> Self {
        Self { refused_by: Some(by), ..Self::new(from, to, Over::Refused) }
    }

    /// Makes the call.
    pub(super) fn row(&self, cluster: &Cluster, family: Family) -> Result<Row> {
        let from = cluster.pod(self.from)?;
        let (to, target, name) = match self.to {
            To::Pod(pod) => {
                let name = if pod == self.from { "itself".to_owned() } else { pod.to_owned() };
                let pod = cluster.pod(pod)?;
                (Some(pod), pod.addr(family, APP_PORT), name)
            }
            To::Service(pod) => {
                (Some(cluster.pod(pod)?), service_addr(family), format!("service {pod}"))
            }
            To::ClosedPort(pod) => {
                let found = cluster.pod(pod)?;
                (Some(found), found.addr(family, CLOSED_PORT), format!("{pod}:{CLOSED_PORT}"))
            }
            To::Outside => {
                let target = SocketAddr::new(cluster.outside(family), APP_PORT);
                (None, target, "a host outside".to_owned())
            }
        };
        let answered = self.refused_by.is_none();
        let by = to.map_or(OUTSIDE.to_owned(), ToString::to_string);
        let at = to.map_or(target, |pod| pod.addr(family, APP_PORT));
        let identity =
            (self.over == Over::Hbone).then(|| cluster.identity(self.from)).transpose()?;
        let expected = Seen {
            over: self.over,
            identity: identity.map(|identity| identity.to_string()),
            app_saw: answered.then(|| from.ip(family)),
            answered_by: answered.then(|| format!("{by} at {at}")),
            refused_by: self.refused_by.map(str::to_owned),
        };
        let (observed, evidence) = observe(cluster, from, to, target, self.manner)?;
        let ok = observed == expected;
        let family = if target.is_ipv4() { "IPv4" } else { "IPv6" };
        Ok(Row {
            from: self.from.to_owned(),
            to: name,
            family,
            target,
            expected,
            observed,
            ok,
            evidence,
        })
    }
}

const FLOWS: [Flow; 22] = [
    // In the mesh: mTLS between the proxies, with the client's identity.
    Flow::new("shop/cart", To::Pod("shop/web"), Over::Hbone),
    Flow::new("shop/cart", To::Pod("shop/catalog"), Over::Hbone),
    Flow::new("shop/catalog", To::Pod("shop/cart"), Over::Hbone),
    Flow::new("shop/cart", To::Service("shop/catalog"), Over::Hbone),
    Flow::new("shop/cart", To::Pod("bank/vault"), Over::Hbone),
    Flow::new("bank/vault", To::Pod("shop/web"), Over::Hbone),
    Flow::new("shop/cart", To::Pod("shop/cart"), Over::Direct),
    // HBONE from outside the mesh, by clients with an identity of their own.
    Flow::new("shop/sidecar", To::Pod("shop/web"), Over::Hbone).by_itself(),
    Flow::new("shop/sidecar", To::Pod("bank/vault"), Over::Hbone).by_itself(),
    Flow::new("edge/gateway", To::Pod("shop/web"), Over::Hbone).by_itself(),
    Flow::new("edge/gateway", To::Pod("bank/vault"), Over::Hbone).by_itself(),
    // Into the mesh without HBONE: no identity, so STRICT refuses it.
    Flow::new("legacy/plain", To::Pod("shop/web"), Over::Proxy),
    Flow::new("shop/optout", To::Pod("shop/catalog"), Over::Proxy),
    Flow::refused("legacy/plain", To::Pod("bank/vault"), STRICT),
    Flow::refused("shop/optout", To::Pod("bank/vault"), STRICT),
    Flow::refused("legacy/plain", To::ClosedPort("shop/web"), NOBODY_LISTENS),
    // Out of the mesh.
    Flow::new("shop/cart", To::Pod("shop/optout"), Over::Proxy),
    Flow::new("shop/cart", To::Pod("legacy/db"), Over::Proxy),
    Flow::new("shop/cart", To::Outside, Over::Proxy),
    // Not the mesh's business.
    Flow::new("legacy/plain", To::Pod("legacy/db"), Over::Direct),
    Flow::new("shop/optout", To::Pod("legacy/plain"), Over::Direct),
    Flow::new("shop/sidecar", To::Pod("legacy/db"), Over::Direct),
];

/// Makes every call, in both families.
pub(super) fn all(cluster: &Cluster, stop: &Stop) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for flow in &FLOWS {
        for (family, _) in FAMILIES {
            stop.check()?;
            rows.push(flow.row(cluster, family)?);
        }
    }
    Ok(rows)
}
