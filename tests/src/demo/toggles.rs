//! What an operator can do to a node, whatever the labels say.

use std::time::{Duration, Instant};

use anyhow::Result;
use redirect_agent::output::PodState;
use serde::Serialize;

use super::Stop;
use super::cluster::{Cluster, state};
use super::evidence::Over;
use super::rows::{FAMILIES, Flow, Row, To};

/// How long a toggle may take to have its effect: that includes the drain.
const PATIENCE: Duration = Duration::from_secs(20);

/// A command, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Toggle {
    /// On which node.
    pub node: &'static str,
    /// The command, without the option that names the agent's socket.
    pub command: String,
    /// What it printed.
    pub printed: String,
    /// The same command again printed this: doing it twice is harmless.
    pub printed_again: String,
    /// How long it took until the pods were where it puts them.
    pub effect_after_ms: u64,
    /// Calls after it.
    pub rows: Vec<Row>,
    /// Whether all of them are as expected.
    pub ok: bool,
}

/// A command for the first node, which of its pods it moves, and what it does to calls.
struct Act {
    args: &'static [&'static str],
    moves: &'static [(&'static str, bool)],
    flows: &'static [Flow],
}

const CART: To = To::Pod("shop/cart");
const WEB: To = To::Pod("shop/web");
const CATALOG: To = To::Pod("shop/catalog");

const ACTS: [Act; 7] = [
    Act {
        args: &["unenroll", "shop/cart"],
        moves: &[("shop/cart", false)],
        flows: &[
            Flow::new("shop/cart", To::Pod("legacy/db"), Over::Direct),
            Flow::new("shop/catalog", CART, Over::Proxy),
        ],
    },
    Act {
        args: &["auto", "shop/cart"],
        moves: &[("shop/cart", true)],
        flows: &[
            Flow::new("shop/cart", CATALOG, Over::Hbone),
            Flow::new("shop/catalog", CART, Over::Hbone),
        ],
    },
    Act {
        args: &["enroll", "legacy/plain"],
        moves: &[("legacy/plain", true)],
        flows: &[Flow::new("legacy/plain", To::Pod("bank/vault"), Over::Hbone)],
    },
    // A sidecar has precedence: the command says so, and the pod stays out.
    Act {
        args: &["enroll", "shop/sidecar"],
        moves: &[("shop/sidecar", false)],
        flows: &[Flow::new("shop/sidecar", To::Pod("legacy/db"), Over::Direct)],
    },
    Act {
        args: &["pause"],
        moves: &[("shop/cart", false), ("shop/web", false), ("legacy/plain", false)],
        flows: &[
            Flow::new("shop/cart", WEB, Over::Direct),
            Flow::new("shop/cart", CATALOG, Over::Proxy),
        ],
    },
    Act {
        args: &["resume"],
        moves: &[("shop/cart", true), ("shop/web", true), ("legacy/plain", true)],
        flows: &[
            Flow::new("shop/cart", WEB, Over::Hbone),
            Flow::new("shop/cart", CATALOG, Over::Hbone),
        ],
    },
    Act {
        args: &["auto", "legacy/plain"],
        moves: &[("legacy/plain", false)],
        flows: &[Flow::new("legacy/plain", CATALOG, Over::Proxy)],
    },
];

/// Does all of it, one after the other.
pub(super) fn all(cluster: &Cluster, stop: &Stop) -> Result<Vec<Toggle>> {
    ACTS.iter().map(|act| perform(act, cluster, stop)).collect()
}

fn perform(act: &Act, cluster: &Cluster, stop: &Stop) -> Result<Toggle> {
    let node = &cluster.nodes[0];
    let command = format!("redirect-agent {}", act.args.join(" "));
    let started = Instant::now();
    let printed = node.command(act.args)?;
    let printed_again = node.command(act.args)?;
    stop.wait_for(&format!("the effect of `{command}`"), PATIENCE, || {
        let status = node.status()?;
        let is = |pod: &str, state: PodState| {
            let mut pods = status.pods.iter();
            pods.any(|p| format!("{}/{}", p.namespace, p.name) == pod && p.state == state)
        };
        let moved = act.moves.iter().all(|(pod, enrolled)| is(pod, state(*enrolled)));
        Ok(moved.then_some(()))
    })?;
    let effect_after = started.elapsed();
    let mut rows = Vec::new();
    for flow in act.flows {
        for (family, _) in FAMILIES {
            rows.push(flow.row(cluster, family)?);
        }
    }
    Ok(Toggle {
        node: node.name,
        command,
        printed: printed.trim_end().to_owned(),
        printed_again: printed_again.trim_end().to_owned(),
        effect_after_ms: u64::try_from(effect_after.as_millis())?,
        ok: rows.iter().all(|row| row.ok),
        rows,
    })
}
