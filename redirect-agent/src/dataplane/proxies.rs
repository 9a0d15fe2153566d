//! Which sockets are the proxy's: those with its mark that were created in the cgroup of a proxy that has
//! connected to the agent. The mark alone is not enough, because any application may set it that has
//! `CAP_NET_RAW`, which most runtimes give to every container.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, MapData};
use redirect_ebpf::abi::ANY_CGROUP;
use tracing::{debug, info, warn};

use super::{Dataplane, absent, kernel::Kernel, monotonic_ns};
use crate::{cgroup, process_ref::ProcessRef};

/// How many cgroups are kept besides those of connected proxies: a proxy that was replaced still serves its
/// connections.
const KEPT: usize = 16;

/// What an unknown cgroup of a proxy means.
const MARK_ALONE: &str = "the proxy's sockets cannot be told by their cgroup, so whatever has its mark passes for \
                          the proxy, an application with CAP_NET_RAW too";

/// The proxies that are connected to the agent, by number.
#[derive(Debug, Default)]
pub(super) struct Proxies(Mutex<BTreeMap<u64, Proxy>>);

#[derive(Debug)]
struct Proxy {
    /// Its process, if the agent sees it.
    process: Option<ProcessRef>,
    /// Its cgroups. While they are unknown, the mark has to be enough.
    cgroups: Result<BTreeSet<u64>>,
}

impl Proxy {
    fn find(process: Option<ProcessRef>) -> Self {
        let cgroups = process
            .as_ref()
            .context("the agent does not see its process (in a container, it needs hostPID)")
            .and_then(cgroup::of_proxy);
        Self { process, cgroups }
    }

    /// Looks again. What is known about it stays if it has exited or cannot be read.
    fn follow(&mut self) {
        match self.process.as_ref().map(cgroup::of_proxy) {
            Some(Ok(found)) => self.cgroups = Ok(found),
            Some(Err(e)) => debug!("look at a proxy: {e:#}"),
            None => {}
        }
    }

    fn has_ended(&self) -> Result<bool> {
        Ok(self.process.as_ref().map(ProcessRef::is_alive).transpose()? == Some(false))
    }
}

impl Proxies {
    fn connected(&self) -> MutexGuard<'_, BTreeMap<u64, Proxy>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An admitted proxy. It counts as connected until this is dropped.
#[derive(Debug)]
pub struct AdmittedProxy {
    proxies: Arc<Proxies>,
    number: u64,
}

impl Drop for AdmittedProxy {
    fn drop(&mut self) {
        self.proxies.connected().remove(&self.number);
    }
}

impl Dataplane {
    /// From now on, sockets of this process's cgroups are the proxy's. If the cgroups cannot be determined,
    /// the mark is enough as long as the process is connected.
    ///
    /// # Errors
    ///
    /// When the process has exited, or the map cannot be written.
    pub fn admit_proxy(&self, process: Option<ProcessRef>) -> Result<AdmittedProxy> {
        let proxy = Proxy::find(process);
        if let Err(e) = &proxy.cgroups {
            ensure!(!proxy.has_ended()?, "its process has ended");
            warn!("{MARK_ALONE}: {e:#}");
        }
        let mut connected = self.proxies.connected();
        let number = connected.last_key_value().map_or(0, |(last, _)| last + 1);
        connected.insert(number, proxy);
        let written = self.write_proxies(&connected);
        drop(connected);
        // Dropped if the update fails.
        let admitted = AdmittedProxy { proxies: Arc::clone(&self.proxies), number };
        written.map(|()| admitted)
    }

    /// Checks whether connected proxies have moved to other cgroups.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn follow_proxies(&self) -> Result<()> {
        let mut connected = self.proxies.connected();
        connected.values_mut().for_each(Proxy::follow);
        self.write_proxies(&connected)
    }

    /// Why the mark alone identifies the proxy's sockets, if that is so.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn mark_alone(&self) -> Result<Option<String>> {
        let connected = self.proxies.connected();
        let mut kernel = self.kernel();
        if !ProxyCgroups::open(&mut kernel)?.has(ANY_CGROUP)? {
            return Ok(None);
        }
        let unknown = connected.values().find_map(|proxy| proxy.cgroups.as_ref().err());
        let why = match unknown {
            Some(why) => format!("{why:#}"),
            None => "no proxy whose cgroup is known has connected yet".to_owned(),
        };
        Ok(Some(format!("{MARK_ALONE}: {why}")))
    }

    fn write_proxies(&self, connected: &BTreeMap<u64, Proxy>) -> Result<()> {
        let known = connected.values().filter_map(|proxy| proxy.cgroups.as_ref().ok());
        let in_use: BTreeSet<u64> = known.flatten().copied().collect();
        let mut kernel = self.kernel();
        let mut cgroups = ProxyCgroups::open(&mut kernel)?;
        in_use.iter().try_for_each(|id| cgroups.enter(*id, &in_use))?;
        if connected.values().any(|proxy| proxy.cgroups.is_err()) {
            cgroups.enter(ANY_CGROUP, &in_use)
        } else if in_use.is_empty() {
            // No proxy is connected. Those that were still serve their connections.
            Ok(())
        } else {
            if cgroups.has(ANY_CGROUP)? {
                info!("the proxy's sockets are told by their mark and cgroup");
            }
            cgroups.remove(ANY_CGROUP)
        }
    }
}

/// The map `proxy_cgroups`.
pub(super) struct ProxyCgroups<'a>(HashMap<&'a mut MapData, u64, u64>);

impl<'a> ProxyCgroups<'a> {
    pub(super) fn open(kernel: &'a mut Kernel) -> Result<Self> {
        kernel.map("proxy_cgroups").map(Self)
    }

    fn has(&self, id: u64) -> Result<bool> {
        Ok(absent(self.0.get(&id, 0)).context("read map proxy_cgroups")?.is_some())
    }

    /// As long as no proxy is known, the mark is enough.
    pub(super) fn begin(&mut self) -> Result<()> {
        match self.0.keys().next() {
            None => self.enter(ANY_CGROUP, &BTreeSet::new()),
            Some(_) => Ok(()),
        }
    }

    /// Enters a cgroup. Of those that are not `in_use`, only the newest [`KEPT`] stay.
    fn enter(&mut self, id: u64, in_use: &BTreeSet<u64>) -> Result<()> {
        let mut others: Vec<(u64, u64)> = Vec::new();
        for entry in self.0.iter() {
            let (known, since) = entry.context("read map proxy_cgroups")?;
            if known != id && known != ANY_CGROUP && !in_use.contains(&known) {
                others.push((since, known));
            }
        }
        others.sort_unstable();
        let surplus = others.len().saturating_sub(KEPT);
        for (_, old) in others.into_iter().take(surplus) {
            self.remove(old)?;
        }
        self.0.insert(id, monotonic_ns()?, 0).context("write map proxy_cgroups")
    }

    fn remove(&mut self, id: u64) -> Result<()> {
        absent(self.0.remove(&id)).map(drop).context("write map proxy_cgroups")
    }
}
