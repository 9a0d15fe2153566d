//! Which programs run in a pod, for whoever wants it in writing.

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{Dataplane, PodNetns, links::PodLinks, routes::Routing};

/// A program that is attached in a pod, as `bpftool prog` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Where: `sk_lookup`, `tcx ingress eth0`, or `shared` for the one that every pod's `sk_lookup` calls.
    pub at: String,
    /// Its id.
    pub id: u32,
    /// The hash of its instructions: the same code has the same tag on every node. A pod's own `sk_lookup` has the
    /// pod id in it, so its tag differs from pod to pod; `shared` has the code behind it.
    pub tag: String,
}

impl Dataplane {
    /// The programs that are attached in a pod. Filters of clsact have no link and are not among them.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn programs(&self, pod: &PodNetns) -> Result<Vec<Program>> {
        let interfaces = pod.netns.run(|| Routing::open()?.look())??.interfaces()?;
        let at = |pin: &str| -> Option<String> {
            let (direction, index) = pin.split_once('_')?;
            let name = interfaces.get(&index.parse().ok()?).map_or(index, String::as_str);
            let hook = if direction == "out" { "egress" } else { "ingress" };
            Some(format!("tcx {hook} {name}"))
        };
        let links = PodLinks::new(&self.dir, pod.id()).attached()?.into_iter();
        let mut programs: Vec<Program> = links
            .map(|(pin, link)| Program {
                at: at(&pin).unwrap_or_else(|| "sk_lookup".to_owned()),
                id: link.program_id,
                tag: link.program_tag,
            })
            .collect();
        if !programs.is_empty() {
            let shared = self.kernel().lookup()?.info().context("inspect redirect_lookup")?;
            let tag = format!("{:016x}", shared.tag());
            programs.push(Program { at: "shared".to_owned(), id: shared.id(), tag });
        }
        Ok(programs)
    }
}
