//! What the cluster view shows.

use std::{
    collections::BTreeMap,
    ops::{Index, IndexMut},
};

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
    /// Whether every pod is in the state that is expected, every agent is ready, and every node with pods of
    /// the mesh has an agent: what the exit status tells.
    pub ok: bool,
    /// By what settings the agents decide.
    pub settings: SettingsRow,
    /// The pods by state; finished ones are left out.
    pub pods: Counts,
    /// The same by the version of their node's agent.
    pub versions: Vec<ByVersion>,
    /// Every node; if a namespace was asked for, those with pods of it.
    pub nodes: Vec<NodeRow>,
    /// The pods that are not in the state that is expected.
    pub unexpected: Vec<PodRow>,
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
pub enum State {
    /// Should be in the mesh, and is.
    Enrolled,
    /// Should be in the mesh, and is redirected, but the proxy does not serve it yet.
    Pending,
    /// Should be in the mesh, and has no annotation.
    Missing,
    /// Has the annotation and should not.
    Stale,
    /// Should be in the mesh, and has not had the time yet: it has not started on a node, or was started or
    /// labeled just now.
    Starting,
    /// Is being deleted, or has just been labeled to leave the mesh.
    Leaving,
    /// Not in the mesh, as it should be.
    Bypassing,
}

impl State {
    /// Each, in the order of the columns.
    pub const ALL: [State; 7] = [
        State::Enrolled,
        State::Pending,
        State::Missing,
        State::Stale,
        State::Starting,
        State::Leaving,
        State::Bypassing,
    ];

    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Enrolled => "enrolled",
            State::Pending => "pending",
            State::Missing => "missing",
            State::Stale => "stale",
            State::Starting => "starting",
            State::Leaving => "leaving",
            State::Bypassing => "bypassing",
        }
    }

    /// Whether somebody has to act.
    pub fn is_unexpected(self) -> bool {
        matches!(self, State::Pending | State::Missing | State::Stale)
    }
}

/// How many pods are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<State, usize>", into = "BTreeMap<State, usize>")]
pub struct Counts([usize; State::ALL.len()]);

impl Counts {
    /// Each state and how many pods are in it, in the order of the columns.
    pub fn each(&self) -> impl Iterator<Item = (State, usize)> {
        State::ALL.into_iter().zip(self.0)
    }

    /// How many pods there are.
    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }

    /// How many of them are not in the state that is expected.
    pub fn unexpected(&self) -> usize {
        self.each().filter(|(state, _)| state.is_unexpected()).map(|(_, count)| count).sum()
    }

    /// How many of them should be in the mesh and are known to have a node.
    pub(super) fn of_the_mesh(&self) -> usize {
        [State::Enrolled, State::Pending, State::Missing, State::Starting]
            .into_iter()
            .map(|state| self[state])
            .sum()
    }

    pub(super) fn merge(&mut self, other: &Counts) {
        for (state, count) in other.each() {
            self[state] += count;
        }
    }
}

impl Index<State> for Counts {
    type Output = usize;

    fn index(&self, state: State) -> &usize {
        &self.0[state as usize]
    }
}

impl IndexMut<State> for Counts {
    fn index_mut(&mut self, state: State) -> &mut usize {
        &mut self.0[state as usize]
    }
}

impl From<BTreeMap<State, usize>> for Counts {
    fn from(counts: BTreeMap<State, usize>) -> Self {
        Self(State::ALL.map(|state| counts.get(&state).copied().unwrap_or_default()))
    }
}

impl From<Counts> for BTreeMap<State, usize> {
    fn from(counts: Counts) -> Self {
        counts.each().collect()
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
    /// Whether somebody has to act. An agent that is there has to be ready. A node without a pod that should
    /// be in the mesh needs none: the DaemonSet may leave it out.
    pub fn is_unexpected(&self) -> bool {
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

/// A pod that is not in the state that is expected.
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
    pub state: State,
    /// Why it should be in the mesh, or not.
    pub reason: Reason,
    /// The value of the annotation.
    pub redirection: Option<String>,
    /// Since when at the earliest: the start of the pod, or when the label was set, whichever is later; if it
    /// should not be in the mesh, when the label was set.
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
