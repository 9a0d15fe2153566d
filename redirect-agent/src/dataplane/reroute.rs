//! A pod's virtual interfaces: those whose TCP counts as the pod's own, a VM's or a nested
//! container's.
//!
//! What comes in there is forwarded, and has no socket in the pod until it is redirected. So nothing
//! has to be marked when that begins or ends: only packets that open a connection are judged by the
//! settings, and all others by whether there is a socket.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};
use redirect_ebpf::abi::{PodId, VIRTUAL_CAPTURE, VIRTUAL_RULES, VirtualInterface};

use super::{absent, inbound};
use crate::traffic::Traffic;

/// The map `virtual_ifs`.
pub(super) struct VirtualInterfaces<'a>(pub(super) HashMap<&'a mut MapData, VirtualInterface, u32>);

impl VirtualInterfaces<'_> {
    /// Makes the pod's entries those of the settings. An interface that is named no longer keeps its
    /// entry, so that its redirected connections keep their way; one that is gone does not.
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

    /// Whether an interface has an entry: then it needs the program that looks for it.
    pub(super) fn contains(&self, pod_id: PodId, index: u32) -> Result<bool> {
        Ok(self.get(&VirtualInterface { pod_id, index })?.is_some())
    }

    /// Whether the entry of an interface that is named is that of the settings.
    pub(super) fn is_set(
        &self,
        pod_id: PodId,
        index: u32,
        traffic: &Traffic,
        capture: bool,
    ) -> Result<bool> {
        Ok(self.get(&VirtualInterface { pod_id, index })? == Some(flags(traffic, capture)))
    }

    /// From now on the pod's new connections by these interfaces are forwarded.
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
    let rules = inbound::has_outbound_rules(traffic);
    (if capture { VIRTUAL_CAPTURE } else { 0 }) | (if rules { VIRTUAL_RULES } else { 0 })
}
