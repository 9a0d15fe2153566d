//! What the cluster view shows.

use serde::{Deserialize, Serialize};

use crate::{
    membership::{PodKey, Reason},
    overrides::Moment,
    words::UnknownWord,
};

/// The cluster at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// [`crate::explain::API_VERSION`].
    pub api_version: String,
    /// `ClusterReport`.
    pub kind: String,
    /// When this was so.
    pub time: Moment,
    /// The API server.
    pub server: String,
    /// The namespace that was asked for; `None`: all.
    pub namespace: Option<String>,
    /// Whether every pod is where it should be, and every node that needs an agent has one that is ready.
    pub ok: bool,
    /// By what settings the agents decide.
    pub settings: SettingsRow,
    /// The pods by state; finished ones are left out.
    pub pods: Counts,
    /// The same by the version of their node's agent.
    pub versions: Vec<ByVersion>,
    /// Every node; if a namespace was asked for, those with pods of it.
    pub nodes: Vec<NodeRow>,
    /// The pods that are not where they should be.
    pub wrong: Vec<PodRow>,
    /// Misspelled labels and annotations.
    pub unknown_words: Vec<UnknownWord>,
    /// What could not be read, and what follows from that.
    pub notes: Vec<String>,
}

/// By what settings the agents decide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SettingsRow {
    /// Where they were found: an agent's pod, the command line, or nowhere.
    pub from: String,
    /// Namespaces whose pods are never in the mesh.
    pub excluded_namespaces: Vec<String>,
    /// Whether enablement selectors take the place of the label.
    pub enablement_selectors: bool,
}

/// Where a pod is, as far as the API server shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// Should be in the mesh, and is.
    Enrolled,
    /// Should be in the mesh, and is redirected, but the proxy does not serve it yet.
    Pending,
    /// Should be in the mesh, and has no annotation.
    Missing,
    /// Has the annotation and should not.
    Leftover,
    /// Should be in the mesh, and has not had the time yet.
    Starting,
    /// Is being deleted.
    Leaving,
    /// Not in the mesh, as it should be.
    Bypassing,
}

impl Standing {
    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Standing::Enrolled => "enrolled",
            Standing::Pending => "pending",
            Standing::Missing => "missing",
            Standing::Leftover => "leftover",
            Standing::Starting => "starting",
            Standing::Leaving => "leaving",
            Standing::Bypassing => "bypassing",
        }
    }

    /// Whether somebody has to act.
    pub fn is_wrong(self) -> bool {
        matches!(self, Standing::Pending | Standing::Missing | Standing::Leftover)
    }
}

/// How many pods are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "they are the states")]
pub struct Counts {
    pub enrolled: usize,
    pub pending: usize,
    pub missing: usize,
    pub leftover: usize,
    pub starting: usize,
    pub leaving: usize,
    pub bypassing: usize,
}

impl Counts {
    /// Counts a pod.
    pub fn add(&mut self, standing: Standing) {
        *match standing {
            Standing::Enrolled => &mut self.enrolled,
            Standing::Pending => &mut self.pending,
            Standing::Missing => &mut self.missing,
            Standing::Leftover => &mut self.leftover,
            Standing::Starting => &mut self.starting,
            Standing::Leaving => &mut self.leaving,
            Standing::Bypassing => &mut self.bypassing,
        } += 1;
    }

    /// Each state and how many pods are in it, in the order of the columns.
    pub fn each(&self) -> [(Standing, usize); 7] {
        [
            (Standing::Enrolled, self.enrolled),
            (Standing::Pending, self.pending),
            (Standing::Missing, self.missing),
            (Standing::Leftover, self.leftover),
            (Standing::Starting, self.starting),
            (Standing::Leaving, self.leaving),
            (Standing::Bypassing, self.bypassing),
        ]
    }

    /// How many pods there are.
    pub fn total(&self) -> usize {
        self.each().into_iter().map(|(_, count)| count).sum()
    }

    /// How many of them are not where they should be.
    pub fn wrong(&self) -> usize {
        self.each().into_iter().filter(|(state, _)| state.is_wrong()).map(|(_, count)| count).sum()
    }

    /// How many of them should be in the mesh and are known to have a node.
    pub(super) fn of_the_mesh(&self) -> usize {
        self.enrolled + self.pending + self.missing + self.starting
    }

    pub(super) fn merge(&mut self, other: &Counts) {
        self.enrolled += other.enrolled;
        self.pending += other.pending;
        self.missing += other.missing;
        self.leftover += other.leftover;
        self.starting += other.starting;
        self.leaving += other.leaving;
        self.bypassing += other.bypassing;
    }
}

/// The nodes whose agent has one version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ByVersion {
    /// The tag of the agent's image; `None`: the nodes without an agent.
    pub version: Option<String>,
    /// How many nodes.
    pub nodes: usize,
    /// On how many of them the agent is ready.
    pub ready: usize,
    /// Their pods.
    pub pods: Counts,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRow {
    /// Its name.
    pub name: String,
    /// The agent's pod.
    pub agent: Option<PodKey>,
    /// The tag of the agent's image.
    pub version: Option<String>,
    /// What is wrong.
    pub problem: Option<NodeProblem>,
    /// Since when it is, where that is known.
    pub since: Option<Moment>,
    /// What is known about it: why the container waits, what `/readyz` says.
    pub message: Option<String>,
    /// Its pods.
    pub pods: Counts,
}

impl NodeRow {
    /// Whether somebody has to act. A node without a pod that should be in the mesh needs no agent: the
    /// DaemonSet may leave it out.
    pub fn is_wrong(&self) -> bool {
        match self.problem {
            None => false,
            Some(NodeProblem::AgentNotReady) => true,
            Some(NodeProblem::NoAgent) => self.pods.of_the_mesh() > 0,
        }
    }
}

/// What is wrong with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeProblem {
    /// No agent's pod is there.
    NoAgent,
    /// There is one, and it is not ready.
    AgentNotReady,
}

impl NodeProblem {
    /// The problem in words.
    pub fn as_str(self) -> &'static str {
        match self {
            NodeProblem::NoAgent => "no agent on the node",
            NodeProblem::AgentNotReady => "its agent is not ready",
        }
    }
}

/// A pod that is not where it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRow {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The node that it is on.
    pub node: Option<String>,
    /// Where it is.
    pub state: Standing,
    /// Why it should be in the mesh, or not.
    pub reason: Reason,
    /// The value of the annotation.
    pub redirection: Option<String>,
    /// Since when at the earliest: the start of the pod, or when the label was set, whichever is later.
    pub since: Option<Moment>,
    /// What stands in the way.
    pub why: Why,
    /// What was found about that.
    pub message: String,
    /// What to run next.
    pub next: Option<String>,
}

/// What keeps a pod from where it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Its node has no agent.
    NoAgent,
    /// The agent of its node is not ready.
    AgentNotReady,
    /// The agent said why, in an Event.
    Event,
    /// The agent is ready, and has said nothing.
    Unknown,
}
