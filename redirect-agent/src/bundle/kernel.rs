//! What the kernel has: the maps, and the pods' network namespaces.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Result;
use serde::Serialize;

use super::{Collector, Options};
use crate::{
    cni::records,
    dataplane::{
        contents::{Contents, contents},
        linked_pods,
        pins::{self, PinnedMap, pinned_maps},
        snapshot::{Snapshot, snapshot},
    },
    finder,
    netns::Netns,
    output::{Document, Status},
    takeover,
};

/// Collects. `status` says which namespaces are of which pods, where the agent answers.
pub(super) async fn collect<F: FnMut(&str)>(
    options: &Options,
    status: Option<&Status>,
    to: &mut Collector<F>,
) {
    maps(options, to).await;
    let mut wanted: BTreeSet<u32> =
        status.iter().flat_map(|status| &status.pods).filter_map(|pod| pod.netns).collect();
    match linked_pods(&options.bpffs_dir) {
        Ok(linked) => wanted.extend(linked),
        Err(error) => to.lacks("netns/*.json", format!("{error:#}")),
    }
    let found = {
        let (netns_dir, state_dir, wanted) =
            (options.netns_dir.clone(), options.state_dir.clone(), wanted.clone());
        to.clock.bounded(move || namespaces(&netns_dir, &state_dir, &wanted)).await
    };
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            to.lacks("netns/*.json", format!("{error:#}"));
            return to.lacks("takeover.json", format!("{error:#}"));
        }
    };
    for netns in &found {
        wanted.remove(&netns.inode());
    }
    let lost: Vec<String> = wanted.iter().map(ToString::to_string).collect();
    if !lost.is_empty() {
        let lost = lost.join(", ");
        let why = format!("no network namespace with inode number {lost} is found; has it ended?");
        to.lacks("netns/*.json", why);
    }
    let found: Vec<Arc<Netns>> = found.into_iter().map(Arc::new).collect();
    for netns in &found {
        namespace(options, status, Arc::clone(netns), to).await;
    }
    takeover(status, &found, to).await;
}

async fn maps<F: FnMut(&str)>(options: &Options, to: &mut Collector<F>) {
    let dir = options.bpffs_dir.clone();
    let maps = match to.clock.bounded(move || pinned_maps(&dir)).await {
        Ok(maps) => maps,
        Err(error) => {
            to.lacks("maps.json", format!("{error:#}"));
            return to.lacks("maps/*.json", format!("{error:#}"));
        }
    };
    to.json("maps.json", Ok(pins::document(&maps)));
    let dir = options.bpffs_dir.clone();
    let read = to.clock.bounded(move || Ok(read_all(&dir, &maps))).await;
    match read {
        Ok(all) => {
            for (name, contents) in all {
                to.json(&format!("maps/{name}.json"), contents);
            }
        }
        Err(error) => to.lacks("maps/*.json", format!("{error:#}")),
    }
}

fn read_all(dir: &Path, maps: &[PinnedMap]) -> Vec<(&'static str, Result<Contents>)> {
    maps.iter().map(|map| (map.name, contents(dir, map.name))).collect()
}

fn namespaces(netns_dir: &Path, state_dir: &Path, wanted: &BTreeSet<u32>) -> Result<Vec<Netns>> {
    let recorded: Vec<PathBuf> =
        records::look(state_dir)?.sandboxes.into_iter().map(|sandbox| sandbox.netns).collect();
    finder::among(netns_dir, recorded.iter().map(PathBuf::as_path), wanted)
}

async fn namespace<F: FnMut(&str)>(
    options: &Options,
    status: Option<&Status>,
    netns: Arc<Netns>,
    to: &mut Collector<F>,
) {
    let inode = netns.inode();
    let name = format!("netns/{inode}.json");
    let of = status.iter().flat_map(|status| &status.pods).find(|pod| pod.netns == Some(inode));
    let pod = of.map(|pod| format!("{}/{}", pod.namespace, pod.name));
    let dir = options.bpffs_dir.clone();
    let found = match to.clock.bounded(move || snapshot(&dir, &netns)).await {
        Ok(found) => found,
        Err(error) => return to.lacks(&name, format!("{error:#}")),
    };
    for failed in &found.failed {
        to.lacks(&name, failed.clone());
    }
    to.json(&name, Ok(Document::new("Netns", OfPod { found, pod })));
}

/// A network namespace, and whose it is.
#[derive(Serialize)]
struct OfPod {
    #[serde(flatten)]
    found: Snapshot,
    /// `None`: no pod's that the agent knows.
    pod: Option<String>,
}

async fn takeover<F: FnMut(&str)>(
    status: Option<&Status>,
    found: &[Arc<Netns>],
    to: &mut Collector<F>,
) {
    const NAME: &str = "takeover.json";
    let Some(status) = status else {
        return to.lacks(NAME, "only the agent knows which pods it redirects".to_owned());
    };
    let mut pods = Vec::new();
    for pod in &status.pods {
        let Some(netns) = found.iter().find(|netns| pod.netns == Some(netns.inode())) else {
            continue;
        };
        let (of, netns, inode) = (pod.clone(), Arc::clone(netns), netns.inode());
        let looked = to.clock.bounded(move || takeover::take_over(&of, &netns, true));
        match looked.await {
            Ok(None) => {}
            Ok(Some(answer)) => pods.push(takeover::Row::new(pod, answer)),
            Err(error) => to.lacks(NAME, format!("netns {inode}: {error:#}")),
        }
    }
    to.json(NAME, Ok(takeover::document(&pods)));
}
