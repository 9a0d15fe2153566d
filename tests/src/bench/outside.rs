//! A node with an agent, for a pod that is not in the mesh.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::PodState;

use crate::attached::attached;
use crate::demo::Node;
use crate::process::wait_for;
use crate::topology::{Pod, Topology};

const NODE: &str = "node-a";
const SOON: Duration = Duration::from_secs(20);

/// The agent and the proxy of the node, and another pod there, which is in the mesh.
pub(super) struct Neighbourhood {
    // Dropped in this order: the programs before the pod.
    _node: Node,
    member: Pod,
}

impl Neighbourhood {
    /// Starts them on node 0, and waits until the agent has done what it has to do for all pods. Nothing
    /// may be attached in `outside` then.
    pub(super) fn start(topology: &mut Topology, outside: &Pod) -> Result<Self> {
        let member = topology.add_pod(0, "bench", "member")?;
        let manifests = topology.dir().subdir("manifests")?;
        for (pod, labels) in [(outside, "{}"), (&member, "{istio.io/dataplane-mode: ambient}")] {
            let path = manifests.join(format!("{}.yaml", pod.name));
            fs::write(&path, manifest(pod, labels))
                .with_context(|| format!("write {}", path.display()))?;
        }
        let ca_dir = topology.dir().path().join("ca");
        let mut node = Node::start(topology, 0, NODE, &manifests, &ca_dir)?;
        wait_for("the agent to have enrolled one of two pods", SOON, || {
            let Some(status) = node.status_when_up()? else { return Ok(None) };
            let is = |pod: &Pod, state: PodState| {
                status.pods.iter().any(|p| p.name == pod.name && p.state == state)
            };
            let done = is(&member, PodState::Enrolled) && is(outside, PodState::Bypassing);
            Ok(done.then_some(()))
        })?;
        let programs = attached(&outside.netns)?;
        ensure!(programs.is_empty(), "{programs:?} are attached in a pod outside the mesh");
        Ok(Self { _node: node, member })
    }

    /// The pod that is in the mesh.
    pub(super) fn member(&self) -> &Pod {
        &self.member
    }
}

fn manifest(pod: &Pod, labels: &str) -> String {
    let Pod { namespace, name, v4, v6, .. } = pod;
    format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: {name}, namespace: {namespace}, uid: uid-of-{name}, labels: {labels}}}\n\
         spec: {{nodeName: {NODE}, serviceAccountName: {name}}}\n\
         status: {{phase: Running, podIPs: [{{ip: '{v4}'}}, {{ip: '{v6}'}}]}}\n"
    )
}
