//! A pod's virtual interfaces: those of a VM or a nested container, whose TCP counts as the pod's own.
//!
//! What comes in there is forwarded, and has no socket in the pod unless it is redirected. Therefore nothing
//! has to be marked when redirection begins or ends: the settings decide for packets that open a connection,
//! and the existence of a socket decides for all others.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};
use redirect_ebpf::abi::{PodId, VIRTUAL_CAPTURE, VIRTUAL_RULES, VirtualInterface};

use super::{absent, prefixes};
use crate::traffic::Traffic;

/// The map `virtual_ifs`.
pub(super) struct VirtualInterfaces<'a>(pub(super) HashMap<&'a mut MapData, VirtualInterface, u32>);

impl VirtualInterfaces<'_> {
    /// Replaces the pod's entries by those of the settings. An interface that is no longer named keeps its
    /// entry, so that its redirected connections stay on their path. An interface that is gone loses it.
    pub(super) fn set(
        &mut self,
        pod_id: PodId,
        interfaces: &BTreeMap<u32, String>,
        traffic: &Traffic,
        capture: bool,
    ) -> Result<()> {
        for key in self.of(pod_id)? {
            if !interfaces.contains_key(&key.index) {
                self.delete(&key)?;
            }
        }
        for (&index, name) in interfaces {
            let key = VirtualInterface { pod_id, index };
            let flags = if traffic.reroutes(name) {
                flags(traffic, capture)
            } else if self.get(&key)?.is_some() {
                0
            } else {
                continue;
            };
            self.0.insert(key, flags, 0).context("write map virtual_ifs")?;
        }
        Ok(())
    }

    /// Whether an interface has an entry, and so needs the program that looks it up.
    pub(super) fn contains(&self, pod_id: PodId, index: u32) -> Result<bool> {
        Ok(self.get(&VirtualInterface { pod_id, index })?.is_some())
    }

    /// Whether the entry of a named interface matches the settings.
    pub(super) fn is_set(
        &self,
        pod_id: PodId,
        index: u32,
        traffic: &Traffic,
        capture: bool,
    ) -> Result<bool> {
        Ok(self.get(&VirtualInterface { pod_id, index })? == Some(flags(traffic, capture)))
    }

    /// Stops redirection on these interfaces: new connections are forwarded.
    pub(super) fn release(&mut self, pod_id: PodId) -> Result<()> {
        self.of(pod_id)?
            .into_iter()
            .try_for_each(|key| self.0.insert(key, 0, 0).context("write map virtual_ifs"))
    }

    /// Deletes the pod's entries.
    pub(super) fn clear(&mut self, pod_id: PodId) -> Result<()> {
        self.of(pod_id)?.iter().try_for_each(|key| self.delete(key))
    }

    fn get(&self, key: &VirtualInterface) -> Result<Option<u32>> {
        absent(self.0.get(key, 0)).context("read map virtual_ifs")
    }

    fn delete(&mut self, key: &VirtualInterface) -> Result<()> {
        absent(self.0.remove(key)).context("write map virtual_ifs").map(drop)
    }

    fn of(&self, pod_id: PodId) -> Result<Vec<VirtualInterface>> {
        let keys = self.0.keys().collect::<Result<Vec<_>, _>>().context("read map virtual_ifs")?;
        Ok(keys.into_iter().filter(|key| key.pod_id == pod_id).collect())
    }
}

fn flags(traffic: &Traffic, capture: bool) -> u32 {
    let rules = prefixes::has_outbound_rules(traffic);
    (if capture { VIRTUAL_CAPTURE } else { 0 }) | (if rules { VIRTUAL_RULES } else { 0 })
}
