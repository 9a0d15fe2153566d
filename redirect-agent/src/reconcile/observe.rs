//! Observes a pod: only the kernel, the ZDS server and the source are read, never memory.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    blocking,
    plan::{Standing, Wish},
    pod::PodTask,
};
use crate::{
    dataplane::{Dataplane, Deaf, Observation, Part, PodNetns, Watch},
    source::{ANNOTATION_REDIRECTION, Event, EventKind, Redirection, Source},
};

/// Why a pod that istio-cni redirects is left alone.
const ISTIO_CNIS: &str = "istio-cni redirects this pod, so it is left alone; to take it over, run the \
agent with --beside-istio-cni and then `redirect-agent takeover`";
const ISTIO_CNIS_OUTSIDE: &str = "istio-cni's rules are still in this pod, which is not in the mesh: \
remove them with `redirect-agent takeover`";

impl<S: Source> PodTask<S> {
    /// Observes the pod. `false`: nothing can be done for it at the moment.
    pub(super) async fn observe(&mut self) -> Result<bool> {
        if self.netns.is_some() && !self.netns_stands().await {
            self.lose_netns().await;
        }
        let (source, uid) = (&self.shared.source, self.pod.kubelet_uid().to_owned());
        let mut standing = Standing {
            offered: self.shared.zds.knows(&uid),
            published: source.is_published(&self.pod, Some(Redirection::Enabled)),
            mentioned: !source.is_published(&self.pod, None),
            ..Standing::default()
        };
        // The annotation is about to be true for a pod whose start waits for us.
        let starts = self.shared.settings.finder.records().is_held(&uid);
        self.left_alone = false;
        let bypass = self.wish() == Wish::Bypass;
        let mut ours = false;
        if bypass {
            (standing.noted, ours) = self.look_for_row().await?;
            // If the pod has the annotation, istio-cni may have left its rules.
            let marked = self.pod.annotations.contains_key(ANNOTATION_REDIRECTION);
            if !ours && !standing.published && !marked {
                // The agent must not keep the namespace of a bypassing pod alive.
                self.close_netns();
                self.standing = standing;
                return Ok(true);
            }
        }
        let netns = match self.current_netns().await {
            Ok(netns) => netns,
            Err(e) => {
                self.standing = standing;
                if bypass && !ours {
                    return Ok(true);
                }
                if self.lost && self.standing.published && !starts {
                    self.retract().await?;
                }
                if !bypass && self.pod.ips.is_empty() {
                    // It is starting. The source reports when it has one.
                    self.problem = Some(format!("pod {} has no address yet", self.key));
                    return Ok(false);
                }
                return Err(e);
            }
        };
        self.lost = false;
        if !bypass {
            // Before the first look, so that no change in between is missed.
            self.watch_network(&netns);
        }
        let (present, observed) = self.observe_netns(&netns).await?;
        standing.present = present;
        standing.prepared = observed.prepared;
        standing.captured = observed.partly_captured;
        standing.shaped = observed.captured;
        standing.served = present && (observed.deaf.is_empty() || self.shared.zds.acked(&uid));
        standing.redirected =
            observed.partly_captured || present && self.has_redirected(&netns).await?;
        standing.stale = standing.published && !standing.captured && !starts && !observed.istio_cni;
        self.standing = standing;
        self.beside = present && observed.istio_cni;
        self.tell_deaf(&observed.deaf);
        if observed.istio_cni && !present {
            return self.meet_istio_cni(&netns).await;
        }
        let missing = &observed.inspection.missing;
        if !bypass && present && !missing.is_empty() {
            if !observed.lo_is_up {
                debug!(pod = %self.key, "lo is down: nothing can be put back");
                self.problem = Some("interface lo is down in the pod".to_owned());
                return Ok(false);
            }
            if self.settled {
                self.tell_drift(missing);
            }
        }
        Ok(true)
    }

    /// Whether the map `pods` says why the pod bypasses, and whether anything of ours is in its namespace.
    async fn look_for_row(&self) -> Result<(bool, bool)> {
        let (own, noted, reason) = (self.has_own_netns(), self.noted, self.decision_code());
        let (finder, pod) = (Arc::clone(&self.shared.settings.finder), self.pod.clone());
        let dataplane = Arc::clone(&self.shared.dataplane);
        blocking(move || {
            let is_ours = |inode| dataplane.is_linked(inode);
            let pod_id = if own { finder.inode(&pod, is_ours)? } else { None };
            let Some(pod_id) = pod_id else {
                // A namespace of the pod's own may be found later.
                return Ok((!own && noted.is_none(), false));
            };
            let says = noted == Some(pod_id) && dataplane.has_bypass(pod_id, &pod.ips, reason)?;
            Ok((says, is_ours(pod_id)))
        })
        .await
    }

    /// Whether anything of ours is in the namespace, and what.
    async fn observe_netns(&self, netns: &Arc<PodNetns>) -> Result<(bool, Observation)> {
        let (reason, traffic) = (self.decision_code(), self.traffic());
        self.on_netns(Arc::clone(netns), move |d, pod| {
            if d.is_linked(pod.netns.inode()) {
                return Ok((true, d.observe(pod, reason, &traffic)?));
            }
            let istio_cni = d.has_istio_cni(pod)?;
            Ok((false, Observation { istio_cni, ..Observation::default() }))
        })
        .await
    }

    /// Whether a leaving pod still has redirected connections that have time left.
    async fn has_redirected(&self, netns: &Arc<PodNetns>) -> Result<bool> {
        if self.wish() != Wish::Bypass || self.leaves_by.is_some_and(|by| by <= Instant::now()) {
            return Ok(false);
        }
        Ok(self.on_netns(Arc::clone(netns), |d, pod| d.redirected(pod)).await? > 0)
    }

    /// Leaves a pod alone that istio-cni redirects and that has nothing of ours, unless both are wanted: the
    /// proxy continues to serve it, and its annotation is true.
    async fn meet_istio_cni(&mut self, netns: &Arc<PodNetns>) -> Result<bool> {
        let why = match self.wish() {
            Wish::Enrolled if self.shared.settings.beside_istio_cni => return Ok(true),
            Wish::Enrolled => ISTIO_CNIS,
            Wish::Bypass => ISTIO_CNIS_OUTSIDE,
        };
        self.left_alone = true;
        // Reports at once when istio-cni's rules disappear.
        self.watch_network(netns);
        self.offer().await?;
        Err(anyhow!(why))
    }

    fn tell_deaf(&mut self, deaf: &[Deaf]) {
        let ports: Vec<String> = deaf.iter().map(Deaf::to_string).collect();
        let deaf = (!ports.is_empty() && self.standing.captured)
            .then(|| format!("the proxy does not listen in this pod on port {}", ports.join(", ")));
        self.deaf.clone_from(&deaf);
        // While no proxy is connected, that is true of every pod, and is logged once for all.
        if self.told_deaf != deaf && self.shared.zds.away().is_none() {
            match &deaf {
                Some(deaf) => warn!(pod = %self.key, "{deaf}"),
                None => info!(pod = %self.key, "the proxy listens in this pod again"),
            }
            self.told_deaf = deaf;
        }
    }

    /// Reports that something was changed behind the agent's back.
    fn tell_drift(&mut self, missing: &[Part]) {
        self.settled = false;
        for part in missing {
            self.shared.metrics.drifted(part.kind.as_str());
        }
        let repaired = missing.iter().map(|part| part.kind).collect();
        let missing: Vec<String> = missing.iter().map(Part::to_string).collect();
        warn!(pod = %self.key, ?missing, "repairing what was changed behind the agent's back");
        let missing = missing.join(", ");
        let message = format!("missing in the pod, and put back: {missing}");
        let event = Event { repaired, ..Event::new(EventKind::Repaired, message) };
        self.shared.record(&self.pod, event);
    }

    /// The pod's namespace, with its current addresses.
    async fn current_netns(&mut self) -> Result<Arc<PodNetns>> {
        if let Some(netns) = self.netns.clone() {
            let known = self.pod.ips.clone();
            if self.on_netns(netns, move |_, pod| pod.has_changed(&known)).await? {
                info!(pod = %self.key, "its addresses have changed");
                self.close_netns();
            }
        }
        self.open_netns().await
    }

    pub(super) async fn open_netns(&mut self) -> Result<Arc<PodNetns>> {
        if let Some(netns) = &self.netns {
            return Ok(Arc::clone(netns));
        }
        let netns = Arc::new(self.find_netns().await?);
        self.netns = Some(Arc::clone(&netns));
        Ok(netns)
    }

    pub(super) fn close_netns(&mut self) {
        (self.netns, self.network) = (None, None);
    }

    async fn find_netns(&self) -> Result<PodNetns> {
        let (finder, pod) = (Arc::clone(&self.shared.settings.finder), self.pod.clone());
        let virtual_interfaces = self.traffic().virtual_interfaces;
        let dataplane = Arc::clone(&self.shared.dataplane);
        let find = move || {
            let found = finder.find(&pod, |inode| dataplane.is_linked(inode))?;
            Ok(found.without(&virtual_interfaces, &pod.ips))
        };
        blocking(find).await.with_context(|| format!("enter pod {}", self.key))
    }

    /// Whether the namespace that was found is still the pod's.
    pub(super) async fn netns_stands(&self) -> bool {
        let (finder, pod) = (Arc::clone(&self.shared.settings.finder), self.pod.clone());
        let dataplane = Arc::clone(&self.shared.dataplane);
        let netns = self.netns.clone();
        let stands = blocking(move || {
            Ok(match netns {
                Some(netns) => finder.stands(&pod, &netns.netns)?,
                None => finder.inode(&pod, |inode| dataplane.is_linked(inode))?.is_some(),
            })
        });
        stands.await.unwrap_or_else(|e| {
            // Otherwise the proxy would stop a pod that may be alive.
            warn!(pod = %self.key, "cannot tell whether its network namespace is gone: {e:#}");
            true
        })
    }

    /// The namespace is gone or replaced, so the proxy must drop it. What the kernel still has for the old
    /// one keeps refusing, in case anything still runs in it, and is swept when it is dead.
    pub(super) async fn lose_netns(&mut self) {
        if self.standing.offered || self.standing.present {
            if self.pod.deleting || self.wish() == Wish::Bypass {
                debug!(pod = %self.key, "its network namespace is gone");
            } else {
                warn!(pod = %self.key, "its network namespace is gone");
            }
        }
        self.let_go().await;
    }

    /// The proxy drops the pod. What the kernel has for it stays.
    pub(super) async fn let_go(&mut self) {
        self.close_netns();
        self.shared.zds.delete(self.pod.kubelet_uid()).await;
        (self.beside, self.settled, self.lost) = (false, false, true);
    }

    /// Starts to watch the namespace. Without the watch, changes are found by the timer.
    pub(super) fn watch_network(&mut self, netns: &PodNetns) {
        if self.network.is_some() {
            return;
        }
        match Watch::start(&netns.netns) {
            Ok(network) => self.network = Some(network),
            Err(e) => warn!(pod = %self.key, "{e:#}"),
        }
    }

    pub(super) fn has_own_netns(&self) -> bool {
        !self.pod.host_network && !self.pod.phase.is_finished()
    }

    pub(super) async fn on_netns<T: Send + 'static>(
        &self,
        pod: Arc<PodNetns>,
        f: impl FnOnce(&Dataplane, &PodNetns) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let dataplane = Arc::clone(&self.shared.dataplane);
        let key = self.key.clone();
        blocking(move || f(&dataplane, &pod)).await.with_context(|| format!("set up pod {key}"))
    }
}
