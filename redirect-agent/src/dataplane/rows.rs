//! The map `pods`, in user space's types.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};
use redirect_ebpf::abi::{
    Addr, DECISION_BYPASS, DECISION_ENROLLED, POD_BYPASS_INBOUND, POD_CAPTURE, POD_DNS,
    POD_INBOUND_RULES, POD_OUTBOUND_RULES, PodEntry, PodId,
};

use super::{absent, pod_netns::first_of_each, prefixes};
use crate::traffic::Traffic;

/// One row of the map `pods`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Whether the pod is enrolled.
    pub enrolled: bool,
    /// Whether its new connections are redirected.
    pub capture: bool,
    /// Exceptions to that, as the bits `POD_BYPASS_INBOUND`, `POD_INBOUND_RULES` and `POD_OUTBOUND_RULES`.
    pub rules: u32,
    /// Whether its DNS goes to the proxy's.
    pub dns: bool,
    /// The `membership::Reason`, as a number.
    pub reason: u32,
    /// The index of the interface that leads out of it.
    pub uplink: u32,
    /// When the capture began, in ns of CLOCK_MONOTONIC; 0 if no connection can be older.
    pub captured_at_ns: u64,
    /// Its first IPv4 address.
    pub v4: Option<IpAddr>,
    /// Its first IPv6 address.
    pub v6: Option<IpAddr>,
}

impl Row {
    /// The row of a pod that bypasses.
    pub(super) fn bypass(addresses: &[IpAddr], reason: u32) -> Self {
        let [v4, v6] = first_of_each(addresses);
        Self { reason, v4, v6, ..Self::default() }
    }
}

/// The map `pods`, in user space's types.
pub(super) struct Pods<'a>(pub(super) HashMap<&'a mut MapData, PodId, PodEntry>);

impl Pods<'_> {
    pub(super) fn row(&self, pod_id: PodId) -> Result<Option<Row>> {
        let entry = absent(self.0.get(&pod_id, 0)).context("read map pods")?;
        Ok(entry.map(Row::from))
    }

    pub(super) fn ids(&self) -> Result<Vec<PodId>> {
        self.0.keys().map(|id| id.context("read map pods")).collect()
    }

    pub(super) fn put(&mut self, pod_id: PodId, row: Row) -> Result<()> {
        self.0
            .insert(pod_id, PodEntry::from(row), 0)
            .with_context(|| format!("write pod {pod_id} to map pods"))
    }

    /// Changes the row of a pod. Fields that `change` does not set stay as they are.
    pub(super) fn change(&mut self, pod_id: PodId, change: impl FnOnce(Row) -> Row) -> Result<()> {
        let old = self.row(pod_id)?.unwrap_or_default();
        self.put(pod_id, change(old))
    }

    pub(super) fn delete(&mut self, pod_id: PodId) -> Result<()> {
        absent(self.0.remove(&pod_id)).context("write map pods").map(drop)
    }
}

impl From<PodEntry> for Row {
    fn from(entry: PodEntry) -> Self {
        let address = |addr: Addr| (addr.octets != [0; 16]).then(|| addr.to_ip());
        Self {
            enrolled: entry.decision == DECISION_ENROLLED,
            capture: entry.flags & POD_CAPTURE != 0,
            rules: entry.flags & (POD_BYPASS_INBOUND | POD_INBOUND_RULES | POD_OUTBOUND_RULES),
            dns: entry.flags & POD_DNS != 0,
            reason: entry.reason,
            uplink: entry.uplink,
            captured_at_ns: entry.captured_at_ns,
            v4: address(entry.v4),
            v6: address(entry.v6),
        }
    }
}

impl From<Row> for PodEntry {
    fn from(row: Row) -> Self {
        let address = |ip: Option<IpAddr>| ip.map_or(Addr { octets: [0; 16] }, Addr::from);
        Self {
            decision: if row.enrolled { DECISION_ENROLLED } else { DECISION_BYPASS },
            reason: row.reason,
            flags: row.rules
                | if row.capture { POD_CAPTURE } else { 0 }
                | if row.dns { POD_DNS } else { 0 },
            uplink: row.uplink,
            captured_at_ns: row.captured_at_ns,
            v4: address(row.v4),
            v6: address(row.v6),
        }
    }
}

/// Whether a row says that the pod is captured, with these settings.
pub(super) fn is_captured(row: &Row, traffic: &Traffic) -> bool {
    row.enrolled
        && row.capture
        && row.rules == prefixes::flags(traffic)
        && row.dns == traffic.captures_dns()
}
