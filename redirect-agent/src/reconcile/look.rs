//! A close look at one pod, for `explain`.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use anyhow::{Context as _, Result};
use tokio::sync::watch;

use super::{Observer, View, blocking};
use crate::{
    dataplane::{Dataplane, Observation, PodNetns, Program},
    explain::listeners,
    finder::Finder,
    journal::Journal,
    membership::{Decision, Pod, PodKey},
    output::PodState,
    overrides::{Override, Overrides, Target},
    source::{Event, Inventory, Redirection, Service, Source, Whom},
    traffic::Traffic,
    verdicts::Names,
    zds::{Answer, Away},
};

/// The network namespace of a pod, and what is in it.
#[derive(Debug)]
pub struct Inside {
    /// The pod's uid.
    pub uid: String,
    /// Its network namespace.
    pub netns: Arc<PodNetns>,
    /// The programs that are attached there.
    pub programs: Vec<Program>,
}

/// What is known of a pod, and what was found in it.
#[derive(Debug)]
pub struct Look {
    /// The pod; its addresses are those of the sandbox, where that is known.
    pub pod: Pod,
    /// What is decided for it.
    pub decision: Decision,
    /// The override that counts for it.
    pub overridden: Option<(Target, Override)>,
    /// Where it is.
    pub state: PodState,
    /// Why it is not where it should be.
    pub problem: Option<String>,
    /// What of its traffic is redirected.
    pub traffic: Traffic,
    /// What its peers are told.
    pub published: Option<Redirection>,
    /// What the newest proxy says to it.
    pub answer: Option<Answer>,
    /// What was found in its network namespace, or why nothing was.
    pub found: Result<Found, String>,
    /// Its counters that are not 0.
    pub counters: BTreeMap<&'static str, u64>,
}

/// What was found in a pod's network namespace.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The inode number.
    pub netns: u32,
    /// What the kernel has for it, where it has anything.
    pub kernel: Option<Observation>,
    /// Whether the proxy has its DNS; asked for where the kernel has anything.
    pub proxy_dns: bool,
    /// Addresses of the pod that no interface has.
    pub missing_addresses: Vec<IpAddr>,
    /// The TCP sockets that listen.
    pub listeners: Vec<SocketAddr>,
}

impl<S: Source> Observer<S> {
    /// Looks at a pod of this node; `None`: it is not known.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read. What cannot be found in the pod is in the look.
    pub async fn look(&self, key: &PodKey, overrides: &Overrides) -> Result<Option<Look>> {
        let Some(view) = self.shared.views().get(key).cloned() else { return Ok(None) };
        let published = self.shared.source.published(&view.pod);
        let uid = view.pod.kubelet_uid();
        let told = self.shared.zds.status().workloads.into_iter();
        let answer = told.filter(|told| told.workload.uid == uid).find_map(|told| told.answer);
        let (dataplane, finder) =
            (Arc::clone(&self.shared.dataplane), Arc::clone(&self.shared.settings.finder));
        let overridden = overrides.find(key, SystemTime::now());
        blocking(move || {
            let netns = netns_of(&view, &finder, &dataplane);
            let found = netns.and_then(|netns| look_inside(&dataplane, &view, &netns));
            let inode = found.as_ref().map(|found| found.netns).ok().or(view.noted);
            let mut counters = dataplane.counters()?;
            let counters = inode.and_then(|inode| counters.remove(&inode)).unwrap_or_default();
            Ok(Some(Look {
                state: view.state(),
                decision: view.decision,
                overridden,
                problem: view.problem,
                traffic: view.traffic,
                published,
                answer,
                found: found.map_err(|error| format!("{error:#}")),
                counters: counters.into_iter().filter(|(_, value)| *value > 0).collect(),
                pod: view.pod,
            }))
        })
        .await
    }

    /// A pod of this node, from inside.
    ///
    /// # Errors
    ///
    /// When it is not known, cannot be found, or cannot be entered.
    pub async fn inside(&self, key: &PodKey) -> Result<Inside> {
        let view = self.shared.views().get(key).cloned();
        let view = view.with_context(|| format!("there is no pod {key} on this node"))?;
        let (dataplane, finder) =
            (Arc::clone(&self.shared.dataplane), Arc::clone(&self.shared.settings.finder));
        blocking(move || {
            let netns = netns_of(&view, &finder, &dataplane)?;
            let programs = dataplane.programs(&netns)?;
            Ok(Inside { uid: view.pod.uid, netns, programs })
        })
        .await
    }

    /// A pod of any node, as the source knows it.
    ///
    /// # Errors
    ///
    /// As for [`Source::find`].
    pub async fn find(&self, whom: &Whom) -> Result<Option<Pod>> {
        self.shared.source.find(whom).await
    }

    /// Pods of any node, as the source knows them.
    pub async fn find_all(&self, keys: &[PodKey]) -> Vec<Result<Option<Pod>>> {
        self.shared.source.find_all(keys).await
    }

    /// A Service, as the source knows it.
    ///
    /// # Errors
    ///
    /// As for [`Source::find_service`].
    pub async fn find_service(&self, whom: &Whom) -> Result<Option<Service>> {
        self.shared.source.find_service(whom).await
    }

    /// What happened to the pods lately.
    pub fn journal(&self) -> &Journal {
        &self.shared.journal
    }

    /// Since when no proxy is connected, while none is.
    pub fn proxies_away(&self) -> Option<Away> {
        self.shared.zds.away()
    }

    /// The pods of this node, as verdicts name them.
    pub fn names(&self) -> Names {
        let mut names = Names::default();
        for (key, view) in self.shared.views().iter() {
            let inode = view.netns.as_ref().map(|netns| netns.netns.inode()).or(view.noted);
            names.pods.extend(inode.map(|inode| (inode, key.clone())));
            // Others may have the same addresses.
            if !view.pod.host_network && !view.pod.phase.is_finished() {
                names.addresses.extend(view.pod.ips.iter().map(|ip| (*ip, key.clone())));
            }
        }
        names
    }

    /// Why the proxy's sockets are told by their mark alone, if they are: see [`Dataplane::mark_alone`].
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn mark_alone(&self) -> Result<Option<String>> {
        self.shared.dataplane.mark_alone()
    }

    /// What was counted for all pods: see [`Dataplane::totals`].
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub async fn totals(&self) -> Result<BTreeMap<&'static str, u64>> {
        let dataplane = Arc::clone(&self.shared.dataplane);
        blocking(move || dataplane.totals()).await
    }

    /// Follows what the source knows.
    pub fn inventories(&self) -> watch::Receiver<Arc<Inventory>> {
        self.shared.source.inventory()
    }

    /// Tells whoever looks at a pod, and the journal, what happened to it.
    pub fn record(&self, pod: &Pod, event: Event) {
        self.shared.record(pod, event);
    }
}

fn netns_of(view: &View, finder: &Finder, dataplane: &Dataplane) -> Result<Arc<PodNetns>> {
    let has_own = !view.pod.host_network && !view.pod.phase.is_finished();
    match view.netns.clone() {
        Some(netns) => Ok(netns),
        None if !has_own => Err(anyhow::anyhow!("it has no network namespace of its own")),
        None => finder.find(&view.pod, |inode| dataplane.is_linked(inode)).map(Arc::new),
    }
}

fn look_inside(dataplane: &Dataplane, view: &View, pod: &PodNetns) -> Result<Found> {
    let netns = pod.netns.inode();
    let (kernel, proxy_dns) = if dataplane.is_linked(netns) {
        let observed = dataplane.observe(pod, view.decision.reason.code(), &view.traffic)?;
        (Some(observed), dataplane.dns_listens(pod)?)
    } else {
        (None, false)
    };
    Ok(Found {
        netns,
        kernel,
        proxy_dns,
        missing_addresses: pod.missing(&view.pod.ips).collect(),
        listeners: pod
            .netns
            .run(|| listeners::read(|path| fs::File::open(path).map(io::BufReader::new)))??,
    })
}
