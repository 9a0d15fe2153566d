//! The steps of a pod, each idempotent.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::{
    blocking,
    plan::{Step, Wish},
    pod::PodTask,
};
use crate::{
    dataplane::{Dataplane, PodNetns, SETTLE},
    membership::Pod,
    output::NO_PROXY,
    source::{EventKind, Redirection, Source},
    zds::{AddOutcome, Workload},
};

/// How often to check whether a leaving pod has redirected connections left.
const DRAIN_POLL: Duration = Duration::from_millis(100);
/// How long the proxy keeps a leaving pod after its annotation was cleared. Until istiod has told the peers'
/// proxies, they call port 15008.
const PEER_UPDATE: Duration = Duration::from_secs(2);

impl<S: Source> PodTask<S> {
    /// Takes one step. `false`: it has to wait for somebody else.
    pub(super) async fn take(&mut self, step: Step) -> Result<bool> {
        match step {
            Step::Prepare => self.prepare().await?,
            Step::Serve => return self.serve().await,
            Step::Capture => self.capture().await?,
            Step::Publish => {
                self.shared.source.publish(&self.pod, Some(Redirection::Enabled)).await?;
            }
            Step::Retract => self.retract().await?,
            Step::Release => {
                let netns = self.open_netns().await?;
                self.on_netns(Arc::clone(&netns), |d, pod| d.release(pod)).await?;
                self.settle(netns).await?;
            }
            Step::Drain => self.drain().await?,
            Step::Withdraw => {
                self.shared.zds.delete(self.pod.kubelet_uid()).await;
            }
            Step::Remove => self.remove().await?,
            Step::Note => self.note().await?,
        }
        Ok(true)
    }

    async fn prepare(&mut self) -> Result<()> {
        let netns = self.open_netns().await?;
        let (reason, traffic) = (self.decision_code(), self.traffic());
        let prepare = move |d: &Dataplane, pod: &PodNetns| d.prepare(pod, reason, &traffic);
        // Otherwise the capture comes next, which does that.
        if self.on_netns(Arc::clone(&netns), prepare).await? && self.standing.shaped {
            self.settle(netns).await?;
        }
        self.noted = None;
        Ok(())
    }

    async fn serve(&mut self) -> Result<bool> {
        if !self.offer().await? {
            if !self.standing.captured && !self.standing.published {
                let pending = Some(Redirection::Pending);
                self.shared.source.publish(&self.pod, pending).await?;
            }
            self.problem = Some(NO_PROXY.to_owned());
            return Ok(false);
        }
        // The programs have to know the proxy's listeners before anything is redirected to them.
        let netns = self.open_netns().await?;
        self.on_netns(netns, |d, pod| d.proxy_listens(pod)).await?;
        Ok(true)
    }

    /// Tells the proxy about the pod. `false`: no proxy is connected.
    pub(super) async fn offer(&mut self) -> Result<bool> {
        let netns = self.open_netns().await?;
        let outcome = self.shared.zds.add(workload(&self.pod), netns.netns.fd()).await?;
        Ok(outcome == AddOutcome::Acked)
    }

    async fn capture(&mut self) -> Result<()> {
        let netns = self.open_netns().await?;
        let traffic = self.traffic();
        let unused = self.shared.settings.finder.records().is_held(self.pod.kubelet_uid());
        if unused {
            self.on_netns(netns, move |d, pod| d.capture_unused(pod, &traffic)).await?;
        } else {
            let capture = move |d: &Dataplane, pod: &PodNetns| d.capture(pod, &traffic);
            self.on_netns(Arc::clone(&netns), capture).await?;
            self.settle(netns).await?;
        }
        if !self.standing.captured {
            info!(pod = %self.key, "enrolled");
            self.record(EventKind::Enrolled, format!("in the mesh: {}", self.why()));
        }
        if let Some(since) = self.enrolling.take() {
            self.shared.metrics.enrolled(since.elapsed());
        }
        Ok(())
    }

    pub(super) async fn retract(&mut self) -> Result<()> {
        match self.shared.source.publish(&self.pod, None).await {
            // The annotation is about to be true again.
            Err(e) if self.wish() == Wish::Enrolled => {
                warn!(pod = %self.key, "{e:#}");
                Ok(())
            }
            retracted => {
                if self.standing.published {
                    self.heard_by = Some(Instant::now() + PEER_UPDATE);
                }
                retracted
            }
        }
    }

    /// Waits until connections that a switch caught halfway are marked.
    async fn settle(&self, netns: Arc<PodNetns>) -> Result<()> {
        for (n, delay) in (1..).zip(SETTLE) {
            sleep(delay).await;
            let last = n == SETTLE.len();
            self.on_netns(Arc::clone(&netns), move |d, pod| d.settle(pod, last)).await?;
        }
        Ok(())
    }

    /// Waits until no connection is redirected anymore and peers should know that the pod leaves, their time is
    /// up, or the desired state has changed.
    async fn drain(&mut self) -> Result<()> {
        let drain = self.shared.settings.drain;
        let by = *self.leaves_by.get_or_insert_with(|| Instant::now() + drain);
        loop {
            let netns = self.open_netns().await?;
            let left = self.on_netns(netns, |d, pod| d.redirected(pod)).await?;
            if left > 0 && by <= Instant::now() {
                info!(pod = %self.key, "{left} redirected connections outlast the drain and are closed");
            }
            let peers_know = self.heard_by.is_none_or(|heard_by| heard_by <= Instant::now());
            if (left == 0 && peers_know) || by <= Instant::now() || self.is_interrupted() {
                return Ok(());
            }
            sleep(DRAIN_POLL).await;
        }
    }

    async fn remove(&mut self) -> Result<()> {
        let netns = self.open_netns().await?;
        self.noted = Some(netns.netns.inode());
        self.on_netns(netns, |d, pod| d.remove(pod)).await?;
        // Otherwise the descriptor would keep the namespace alive.
        self.close_netns();
        (self.deaf, self.beside) = (None, false);
        info!(pod = %self.key, "unenrolled");
        self.record(EventKind::Unenrolled, format!("not in the mesh: {}", self.why()));
        Ok(())
    }

    /// Says in the map `pods` why the pod bypasses. Pods without a namespace of their own, or whose
    /// namespace is not known yet, have no row.
    async fn note(&mut self) -> Result<()> {
        let own = self.has_own_netns();
        let (finder, pod) = (Arc::clone(&self.shared.settings.finder), self.pod.clone());
        let reason = self.decision_code();
        let dataplane = Arc::clone(&self.shared.dataplane);
        let old = self.noted;
        self.noted = blocking(move || {
            let is_ours = |inode| dataplane.is_linked(inode);
            let pod_id = if own { finder.inode(&pod, is_ours)? } else { None };
            if let Some(old) = old.filter(|old| Some(*old) != pod_id) {
                dataplane.delete_bypass(old)?;
            }
            if let Some(pod_id) = pod_id {
                dataplane.put_bypass(pod_id, &pod.ips, reason)?;
            }
            Ok(pod_id)
        })
        .await?;
        Ok(())
    }
}

pub(super) fn workload(pod: &Pod) -> Workload {
    Workload {
        uid: pod.kubelet_uid().to_owned(),
        namespace: pod.key.namespace.clone(),
        name: pod.key.name.clone(),
        service_account: pod.service_account.clone(),
    }
}
