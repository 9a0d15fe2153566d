//! Another agent in a pod's network namespace: one whose pins are below another directory of bpffs. With both, each
//! connection would be redirected twice.

use std::{fs, os::fd::AsFd as _, path::Path};

use anyhow::{Context as _, Result};
use aya::programs::loaded_programs;
use redirect_ebpf::abi::PodId;

use super::{links::linked_pods, stub, sys};
use crate::netns::Netns;

/// Whether an `sk_lookup` program is attached to the namespace that calls the shared program of another agent than the
/// one with this map `programs`.
pub(super) fn is_redirected_by_another(netns: &Netns, programs_map: u32) -> Result<bool> {
    let attached = sys::lookups(netns.as_fd()).context("list the sk_lookup programs")?;
    if attached.is_empty() {
        return Ok(false);
    }
    for program in loaded_programs() {
        // It may have ended since it was listed.
        let Ok(program) = program else { continue };
        if attached.contains(&program.id()) && program.name() == stub::NAME {
            let maps = program.map_ids().context("inspect an sk_lookup program")?;
            if maps.is_some_and(|maps| !maps.contains(&programs_map)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// How many network namespaces of this kernel have the program of any agent.
pub fn redirected_pods() -> usize {
    loaded_programs().flatten().filter(|program| program.name() == stub::NAME).count()
}

/// What to do about it. `own` is the directory of bpffs that is ours.
pub(super) fn advice(pod_id: PodId, own: &Path) -> String {
    let found = own.parent().and_then(|parent| fs::read_dir(parent).ok()).and_then(|siblings| {
        siblings
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|dir| dir != own)
            .find(|dir| linked_pods(dir).is_ok_and(|pods| pods.contains(&pod_id)))
    });
    let dir = found.map_or("DIR".to_owned(), |dir| dir.display().to_string());
    format!(
        "another redirect-agent, with another --bpffs-dir, redirects this pod already: stop it and run `redirect-agent \
         cleanup --bpffs-dir {dir}`"
    )
}
