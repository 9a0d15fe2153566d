//! What is known of the cluster, and what follows from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use super::{
    collect::AGENTS,
    object::{AgentSeen, EventSeen, NamespaceSeen, PodSeen},
    report::{ByVersion, Counts, NodeProblem, NodeRow, PodRow, Report, State, Why},
    settings::Settings,
};
use crate::{
    explain::API_VERSION,
    membership::{Decision, PodKey, Reason, decide},
    overrides::Moment,
    source::{EventKind, Redirection},
};

/// How long a pod may take to get into the mesh, or out of it.
const GRACE: Duration = Duration::from_secs(30);

/// What is known of the cluster. Objects go by `NAMESPACE/NAME`, or by their name.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The API server.
    pub server: String,
    /// The namespace that is asked for; `None`: all.
    pub namespace: Option<String>,
    /// By what the agents decide.
    pub settings: Settings,
    /// The pods, or why one cannot be used.
    pub pods: BTreeMap<String, Result<PodSeen, String>>,
    /// The namespaces.
    pub namespaces: BTreeMap<String, NamespaceSeen>,
    /// The nodes that need an agent; `None`: they cannot be listed.
    pub nodes: Option<BTreeMap<String, ()>>,
    /// The agents' pods; `None`: they cannot be listed.
    pub agents: Option<BTreeMap<String, AgentSeen>>,
    /// The last Event of each pod, by its namespace and uid.
    pub events: BTreeMap<(String, String), EventSeen>,
    /// What agents that are not ready say at `/readyz`, by the agent's name.
    pub answers: BTreeMap<PodKey, String>,
    /// What could not be read.
    pub notes: Vec<String>,
}

impl Snapshot {
    /// The agents' pods. `Err`: why they are not known, unless they cannot be listed, which is a note already.
    pub(super) fn agents(&self) -> Result<&BTreeMap<String, AgentSeen>, Option<String>> {
        match self.doubt() {
            None => self.agents.as_ref().ok_or(None),
            doubt => Err(doubt),
        }
    }

    /// Why the pods with the agents' label cannot be taken for agents. Everybody can give a pod of their own that
    /// label.
    fn doubt(&self) -> Option<String> {
        let agents = self.agents.iter().flat_map(BTreeMap::values);
        let namespaces: BTreeSet<&str> = agents.map(|agent| agent.key.namespace.as_str()).collect();
        (namespaces.len() > 1).then(|| {
            let namespaces = namespaces.into_iter().collect::<Vec<_>>().join(", ");
            format!(
                "pods with the label {AGENTS} are in the namespaces {namespaces}, and the agents are in one of \
                 them: give --agent-namespace"
            )
        })
    }

    /// What follows from it.
    pub fn report(&self, now: SystemTime) -> Report {
        let agents = self.agents();
        let doubt = agents.as_ref().err().cloned().flatten();
        let agents = agents.ok();
        let mut nodes = self.nodes(agents);
        let mut pods = Counts::default();
        let (mut unexpected, mut words, mut notes) =
            (Vec::new(), BTreeSet::new(), self.settings.notes.clone());
        notes.extend(self.notes.iter().cloned());
        notes.extend(doubt.clone());
        for (name, seen) in &self.pods {
            let seen = match seen {
                Ok(seen) => seen,
                Err(problem) => {
                    notes.push(format!("pod {name} is left out: {problem}"));
                    continue;
                }
            };
            words.extend(seen.words.iter().cloned());
            let (decision, state, since) = self.state(seen, now);
            pods[state] += 1;
            if let Some(node) = &seen.pod.node_name {
                let row = nodes
                    .entry(node.clone())
                    .or_insert_with(|| self.node(node, None, agents.is_some()));
                row.pods[state] += 1;
            }
            if state.is_unexpected() {
                unexpected.push((seen, decision.reason, state, since));
            }
        }
        let reading = self.settings.reading();
        for seen in self.namespaces.values() {
            words.extend(reading.of_namespace(&seen.namespace));
        }
        let rows = unexpected.into_iter().map(|(seen, reason, state, since)| {
            let node = seen.pod.node_name.as_ref().and_then(|node| nodes.get(node));
            self.row(seen, reason, (state, since), node, agents.is_some())
        });
        let unexpected: Vec<PodRow> = rows.collect();
        let counts = |node: &NodeRow| self.namespace.is_none() || node.pods.total() > 0;
        let nodes: Vec<NodeRow> = nodes.into_values().filter(counts).collect();
        Report {
            api_version: API_VERSION.to_owned(),
            kind: "ClusterReport".to_owned(),
            time: Moment::of(now),
            server: self.server.clone(),
            namespace: self.namespace.clone(),
            ok: doubt.is_none()
                && unexpected.is_empty()
                && !nodes.iter().any(NodeRow::is_unexpected),
            settings: self.settings.row(),
            pods,
            versions: versions(&nodes),
            nodes,
            unexpected,
            unknown_words: words.into_iter().collect(),
            notes,
        }
    }

    /// The nodes, without pods yet.
    fn nodes(&self, agents: Option<&BTreeMap<String, AgentSeen>>) -> BTreeMap<String, NodeRow> {
        // During an upgrade a node may have two: the one that stays is the newer one.
        let mut of_nodes: BTreeMap<&str, &AgentSeen> = BTreeMap::new();
        for agent in agents.into_iter().flat_map(BTreeMap::values) {
            match of_nodes.get(agent.node.as_str()) {
                Some(other) if other.created > agent.created => {}
                _ => drop(of_nodes.insert(&agent.node, agent)),
            }
        }
        let known = self.nodes.iter().flat_map(BTreeMap::keys).map(String::as_str);
        let names: BTreeSet<&str> = known.chain(of_nodes.keys().copied()).collect();
        let row = |name: &str| {
            let agent = of_nodes.get(name).copied();
            (name.to_owned(), self.node(name, agent, agents.is_some()))
        };
        names.into_iter().map(row).collect()
    }

    fn node(&self, name: &str, agent: Option<&AgentSeen>, agents_known: bool) -> NodeRow {
        let mut row = NodeRow { name: name.to_owned(), ..NodeRow::default() };
        match agent {
            // A node that is not needed, or one that nobody can tell about.
            None if !agents_known => {}
            None => row.problem = Some(NodeProblem::NoAgent),
            Some(agent) => {
                row.agent = Some(agent.key.clone());
                row.version = Some(agent.version.clone());
                if !agent.ready {
                    row.problem = Some(NodeProblem::AgentNotReady);
                    row.since = agent.since;
                    let said = [agent.message.as_ref(), self.answers.get(&agent.key)];
                    let said: Vec<&str> = said.into_iter().flatten().map(String::as_str).collect();
                    row.message = (!said.is_empty()).then(|| said.join("; "));
                }
            }
        }
        row
    }

    /// Where a pod should be, where it is, and since when at the earliest.
    fn state(&self, seen: &PodSeen, now: SystemTime) -> (Decision, State, Option<Moment>) {
        let PodSeen { pod, redirection, started, labeled, .. } = seen;
        let namespace = self.namespaces.get(&pod.key.namespace);
        let of_namespace = namespace.map(|namespace| &namespace.namespace);
        let decision = decide(of_namespace, pod, &self.settings.membership);
        let of_label = namespace.and_then(|namespace| namespace.labeled);
        let labeled = match decision.reason {
            Reason::PodLabelAmbient | Reason::PodLabelNone => *labeled,
            Reason::NamespaceLabelAmbient => of_label,
            // Labels that say something else. Of one that was removed, nobody knows when.
            Reason::NotLabeled => of_label.max(*labeled),
            _ => None,
        };
        // Nobody can bring a pod into the mesh that has not started on a node.
        let started = started.filter(|_| pod.node_name.is_some());
        let since = match decision.enrolled {
            true => started.map(|started| labeled.map_or(started, |time| time.max(started))),
            false => labeled,
        };
        let age = since.map(|since| since.until(now));
        let enabled = redirection.as_deref() == Some(Redirection::Enabled.as_str());
        let state = match (decision.enrolled, redirection) {
            _ if pod.deleting => State::Leaving,
            (true, Some(_)) if enabled => State::Enrolled,
            (true, _) if age.is_none_or(|age| age < GRACE) => State::Starting,
            (true, Some(_)) => State::Pending,
            (true, None) => State::Missing,
            // The agent takes the annotation away when connections have had the time to end.
            (false, Some(_)) if age.is_some_and(|age| age < GRACE) => State::Leaving,
            (false, Some(_)) => State::Stale,
            (false, None) => State::Bypassing,
        };
        (decision, state, since)
    }

    fn row(
        &self,
        seen: &PodSeen,
        reason: Reason,
        (state, since): (State, Option<Moment>),
        node: Option<&NodeRow>,
        agents_known: bool,
    ) -> PodRow {
        let PodKey { namespace, name } = seen.pod.key.clone();
        let event = self.events.get(&(namespace.clone(), seen.pod.uid.clone()));
        let (why, message) = why((state, since), node, event, agents_known);
        let agent = node.and_then(|node| node.agent.as_ref());
        let next = match (why, agent) {
            (Why::NoAgent, _) => node.map(|node| format!("kubectl describe node {}", node.name)),
            (_, None) => None,
            (Why::AgentNotReady, Some(agent)) => {
                Some(format!("kubectl --namespace {} logs {}", agent.namespace, agent.name))
            }
            (Why::Event | Why::Unknown, Some(agent)) => Some(format!(
                "kubectl --namespace {} exec {} -- redirect-agent explain {namespace}/{name}",
                agent.namespace, agent.name
            )),
        };
        PodRow {
            namespace,
            name,
            uid: seen.pod.uid.clone(),
            node: seen.pod.node_name.clone(),
            state,
            reason,
            redirection: seen.redirection.clone(),
            since,
            why,
            message,
            next,
        }
    }

    /// Takes what the agents have said, the last of each pod.
    pub fn take_events(&mut self, events: impl IntoIterator<Item = ((String, String), EventSeen)>) {
        self.events.clear();
        // Of one second, the one that says who did it.
        let rank = |event: &EventSeen| (event.last, event.reason != EventKind::Unenrolled.as_str());
        for (pod, event) in events {
            match self.events.get(&pod) {
                Some(other) if rank(other) >= rank(&event) => {}
                _ => drop(self.events.insert(pod, event)),
            }
        }
    }
}

/// What keeps a pod from where it should be.
fn why(
    (state, since): (State, Option<Moment>),
    node: Option<&NodeRow>,
    event: Option<&EventSeen>,
    agents_known: bool,
) -> (Why, String) {
    let said = event.map(said);
    let problem = node.and_then(|node| node.problem);
    match (problem, said) {
        (Some(NodeProblem::NoAgent), _) => (Why::NoAgent, NodeProblem::NoAgent.as_str().to_owned()),
        (Some(NodeProblem::AgentNotReady), said) => {
            let said = said.map_or_else(String::new, |said| format!("; {said}"));
            (Why::AgentNotReady, format!("the agent of its node is not ready{said}"))
        }
        (None, Some(said)) => (Why::Event, said),
        (None, None) if !agents_known => (Why::Unknown, "the agents are not known".to_owned()),
        (None, None) => {
            let text = match state {
                State::Stale if since.is_none() => {
                    "no Event; its label may just have been removed, or an operator enrolled it"
                }
                State::Stale => "no Event; an operator may have enrolled it",
                State::Pending => "no Event; the proxy of its node does not serve it yet",
                _ => "no Event; the agent of its node is ready",
            };
            (Why::Unknown, text.to_owned())
        }
    }
}

/// The Event in a line.
fn said(event: &EventSeen) -> String {
    let EventSeen { reason, note, last, count } = event;
    let at = last.map_or_else(String::new, |last| format!(" at {last}"));
    let times = if *count > 1 { format!(" ({count} times)") } else { String::new() };
    format!("{reason}{at}{times}: {note}")
}

/// The nodes by the version of their agents; those without one come last.
fn versions(nodes: &[NodeRow]) -> Vec<ByVersion> {
    let mut versions: BTreeMap<(bool, Option<&String>), ByVersion> = BTreeMap::new();
    for node in nodes {
        let version = node.version.as_ref();
        let row = versions.entry((version.is_none(), version)).or_insert_with(|| ByVersion {
            version: version.cloned(),
            nodes: 0,
            ready: 0,
            pods: Counts::default(),
        });
        row.nodes += 1;
        row.ready += usize::from(version.is_some() && node.problem.is_none());
        row.pods.merge(&node.pods);
    }
    versions.into_values().collect()
}
