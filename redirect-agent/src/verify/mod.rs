//! Proof that a pod's traffic is captured, or is not: a real connection from inside the pod and one to it, and
//! what the datapath did with them.
//!
//! The agent makes the calls ([`run`]), with ordinary sockets: one that is opened in the pod's network namespace,
//! one in its own. It follows the datapath's verdicts meanwhile, picks out those of its own connections, and
//! judges them ([`judge`]). Nothing is sent, and what is established is closed at once with RST.

mod judge;
mod plan;
mod print;
pub mod run;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

pub use self::print::{table, text};
use crate::{
    dataplane::Program,
    explain::{Finding, NodePart, PodPart},
    membership::PodKey,
    overrides::Moment,
    verdicts::Verdict,
};

/// Body of `POST /verify`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The pod.
    pub pod: PodKey,
    /// What it calls; by default, an address of each family that is reserved for documentation.
    #[serde(default)]
    pub to: Option<SocketAddr>,
}

/// What was found: a record that stands by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verification {
    /// [`crate::explain::API_VERSION`].
    pub api_version: String,
    /// `Verification`.
    pub kind: String,
    /// When the calls were made.
    pub time: Moment,
    /// The node, and its proxies.
    pub node: NodePart,
    /// The release of the node's kernel.
    pub kernel_release: String,
    /// The agent's version.
    pub agent_version: String,
    /// The pod as it was just before: why it is in the mesh or not, and what the kernel had for it.
    pub pod: PodPart,
    /// The programs that were attached in it.
    pub programs: Vec<Program>,
    /// The calls.
    pub calls: Vec<Call>,
    /// What all of them say.
    pub result: Outcome,
    /// Whether that is as it should be.
    pub ok: bool,
    /// That, in a sentence.
    pub message: String,
    /// What `explain` finds wrong with the pod, where it is not as it should be.
    pub finding: Option<Finding>,
}

/// More than one of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verifications {
    /// [`crate::explain::API_VERSION`].
    pub api_version: String,
    /// `VerificationList`.
    pub kind: String,
    /// By namespace and name.
    pub items: Vec<Verification>,
    /// The pods that could not be looked at, and why.
    pub failed: Vec<String>,
}

/// Which way a call goes, as the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the pod.
    Outbound,
    /// To the pod, from the agent's network namespace: the node's.
    Inbound,
}

impl Direction {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
        }
    }
}

/// A call, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Call {
    /// Which way.
    pub direction: Direction,
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// The caller's end; `None`: it sent nothing.
    pub source: Option<SocketAddr>,
    /// The other end; `None`: there was nothing to call.
    pub destination: Option<SocketAddr>,
    /// What the caller's socket saw; `None`: it did not call.
    pub connection: Option<Connection>,
    /// The datapath's verdicts about this connection, in their order.
    pub verdicts: Vec<Verdict>,
    /// What they say.
    pub outcome: Outcome,
    /// Why, where the verdict does not say it.
    pub why: Option<String>,
}

/// What a socket that calls sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connection {
    /// Somebody accepted it.
    Connected,
    /// It was answered with RST.
    Refused,
    /// Nobody answered.
    TimedOut,
    /// It failed in another way.
    Failed(String),
}

/// What became of a call, or of all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was handed to the proxy.
    Captured,
    /// It was left alone, because settings say so.
    Excluded,
    /// No redirect-agent program saw it, and the pod is not to be in the mesh.
    Bypassing,
    /// It was refused or dropped, and did not get past the proxy.
    Refused,
    /// It should have been captured, and was not.
    NotCaptured,
    /// Of all of them: some were captured or excluded, and what became of others cannot be told.
    Partial,
    /// That cannot be told.
    Unknown,
}

impl Outcome {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Captured => "captured",
            Outcome::Excluded => "excluded",
            Outcome::Bypassing => "bypassing",
            Outcome::Refused => "refused",
            Outcome::NotCaptured => "not-captured",
            Outcome::Partial => "partial",
            Outcome::Unknown => "unknown",
        }
    }
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "ipv4" } else { "ipv6" }
}
