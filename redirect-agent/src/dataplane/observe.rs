//! What the kernel has for a pod.

use std::net::IpAddr;

use anyhow::Result;
use redirect_ebpf::abi::PodId;

use super::{
    Dataplane, Deaf, Inspection, PartKind, PodNetns,
    links::PodLinks,
    prefixes,
    routes::{Routing, Seen},
    rows::{Row, is_captured},
    sysctl,
};
use crate::traffic::Traffic;

/// What the kernel had for a pod at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Which parts of a captured pod are present, and which are missing.
    pub inspection: Inspection,
    /// Whether everything that [`Dataplane::prepare`] makes is present.
    pub prepared: bool,
    /// Whether some of its new connections may be redirected.
    pub partly_captured: bool,
    /// Whether new connections are redirected as the settings say, in both directions and all families.
    pub captured: bool,
    /// Ports on which the proxy does not listen.
    pub deaf: Vec<Deaf>,
    /// Whether `lo` is up. The runtime takes it down before it removes the namespace; nothing can be repaired
    /// then.
    pub lo_is_up: bool,
    /// Whether istio-cni redirects the pod, too.
    pub istio_cni: bool,
}

impl Dataplane {
    /// Observes a pod that should be captured with these settings. `reason` is the number of the
    /// `membership::Reason`. Changes nothing, except that the programs learn about the proxy's listeners.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn observe(&self, pod: &PodNetns, reason: u32, traffic: &Traffic) -> Result<Observation> {
        let seen = pod.netns.run(|| Routing::open()?.look())??;
        let row = self.kernel().pods()?.row(pod.id())?;
        let inspection = self.inspect_seen(pod, traffic, &seen, row)?;
        let lacks = |by_capture: bool| {
            inspection.missing.iter().any(|part| part.kind.is_made_by_capture() == by_capture)
        };
        Ok(Observation {
            prepared: row.is_some_and(|row| row == prepared(row, pod, reason, traffic))
                && !lacks(false),
            partly_captured: is_partly_captured(pod, row, &seen),
            captured: !lacks(true),
            deaf: self.proxy_listens(pod)?,
            lo_is_up: seen.has_lo(),
            istio_cni: seen.has_istio_cni(),
            inspection,
        })
    }

    /// Whether istio-cni redirects the pod.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn has_istio_cni(&self, pod: &PodNetns) -> Result<bool> {
        Ok(pod.netns.run(|| Routing::open()?.look())??.has_istio_cni())
    }

    /// Whether the row of a bypassing pod says so, with this reason.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn has_bypass(&self, pod_id: PodId, addresses: &[IpAddr], reason: u32) -> Result<bool> {
        let row = self.kernel().pods()?.row(pod_id)?;
        Ok(row == Some(Row::bypass(addresses, reason)))
    }

    /// What the kernel has for a captured pod with these settings, and what it lacks.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn inspect(&self, pod: &PodNetns, traffic: &Traffic) -> Result<Inspection> {
        let seen = pod.netns.run(|| Routing::open()?.look())??;
        let row = self.kernel().pods()?.row(pod.id())?;
        self.inspect_seen(pod, traffic, &seen, row)
    }

    fn inspect_seen(
        &self,
        pod: &PodNetns,
        traffic: &Traffic,
        seen: &Seen,
        row: Option<Row>,
    ) -> Result<Inspection> {
        let mut found = Inspection::default();
        found.add(row.is_some_and(|row| is_captured(&row, traffic)), PartKind::Row, None);
        self.kernel().inspect(pod, traffic, &mut found)?;
        let links = PodLinks::new(&self.dir, pod.id());
        found.add(links.has_lookup(pod.id())?, PartKind::Lookup, None);
        let interfaces = seen.interfaces()?;
        let attached = pod.netns.run(|| {
            interfaces
                .iter()
                .map(|(&index, name)| self.is_attached(pod, &links, index, name))
                .collect()
        })?;
        for ((index, name), attached) in interfaces.into_iter().zip::<Vec<_>>(attached) {
            if traffic.reroutes(&name) {
                let capture = row.is_some_and(|row| row.capture);
                let set =
                    self.kernel().virtual_interfaces()?.is_set(pod.id(), index, traffic, capture);
                found.add(set?, PartKind::Reroute, name.clone());
            }
            found.add(attached?, self.hooks.part(), name);
        }
        for source in pod.sources() {
            let family = || if source.is_ipv4() { "ipv4" } else { "ipv6" }.to_owned();
            let outbound = seen.outbound(source, traffic);
            found.add(outbound.routes, PartKind::Route, family());
            found.add(outbound.rules, PartKind::Rule, family());
            let (rule, route) = seen.has_keep(source, traffic);
            found.add(route, PartKind::DrainRoute, family());
            found.add(rule, PartKind::DrainRule, family());
        }
        found.add(!seen.has_foreign_rules(), PartKind::RuleOrder, None);
        for (name, right) in pod.netns.run(sysctl::check)?? {
            found.add(right, PartKind::Sysctl, name.to_owned());
        }
        Ok(found)
    }
}

/// Whether some of the pod's new connections may be redirected.
pub(super) fn is_partly_captured(pod: &PodNetns, row: Option<Row>, seen: &Seen) -> bool {
    row.is_some_and(|row| row.capture) || pod.sources().any(|source| seen.has_capture_of(source))
}

/// The row of a prepared pod. What capture sets in it is left as it is.
fn prepared(row: Row, pod: &PodNetns, reason: u32, traffic: &Traffic) -> Row {
    let Row { capture, captured_at_ns, dns, .. } = row;
    let rules = prefixes::flags(traffic);
    Row { enrolled: true, capture, captured_at_ns, rules, dns, reason, ..pod.row() }
}
