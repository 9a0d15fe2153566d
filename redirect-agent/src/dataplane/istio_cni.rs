//! How to recognize that istio-cni redirects a pod: by its routing rule. Every function runs inside the pod's
//! network namespace.

use anyhow::Result;

use super::{routes::Routing, sockets};

/// Which rules a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// istio-cni's routing rule, which it sets in every mode.
    pub sign: bool,
    /// Our capture rules.
    pub ours: bool,
}

/// Looks which rules the pod has.
///
/// # Errors
///
/// When a system call fails.
pub fn look() -> Result<Found> {
    let seen = Routing::open()?.look()?;
    Ok(Found { sign: seen.has_istio_cni(), ours: seen.has_capture() })
}

/// Removes istio-cni's routing rule, and the route that it leads to.
///
/// # Errors
///
/// When a system call fails.
pub fn remove() -> Result<()> {
    Routing::open()?.delete_istio_cni()
}

/// How many TCP connections have one of these local ports.
///
/// # Errors
///
/// When the sockets cannot be read.
pub fn connections_at(ports: &[u16]) -> Result<usize> {
    sockets::accepted_at(ports)
}
