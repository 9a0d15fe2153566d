//! Whose sockets are the proxy's: those with its mark, of the cgroups of the proxies that have connected to
//! the agent. The mark alone any application could have that may set marks (`CAP_NET_RAW`, which most
//! runtimes give to every container).

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};
use procfs::process::Process;
use redirect_ebpf::abi::ANY_CGROUP;
use tracing::{debug, warn};

use super::{Dataplane, absent, kernel::Kernel, monotonic_ns};
use crate::cgroup;

/// How many cgroups are kept besides those of connected proxies: one that was replaced goes on serving its
/// connections.
const KEPT: usize = 16;

/// The proxies, by their processes, whose cgroups could not be found out: as long as one is connected, the
/// mark has to be enough.
#[derive(Debug, Default)]
pub(super) struct UnknownProxies(Mutex<BTreeSet<Option<i32>>>);

impl UnknownProxies {
    /// Those of them that may still be connected.
    fn among(&self, connected: &[i32]) -> MutexGuard<'_, BTreeSet<Option<i32>>> {
        let mut unknown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        unknown.retain(|pid| pid.is_none_or(|pid| connected.contains(&pid)));
        unknown
    }
}

impl Dataplane {
    /// From now on sockets of this process's cgroups are the proxy's. `pid` is that of a proxy that has
    /// connected, if it can be seen, and `connected` are those of all that are. When its cgroup cannot be
    /// found out, the mark is enough as long as it is connected.
    ///
    /// # Errors
    ///
    /// When the process is gone, or the map cannot be written.
    pub fn admit_proxy(&self, pid: Option<i32>, connected: &[i32]) -> Result<()> {
        let found = pid
            .context("the agent does not see its process (in a container, it needs hostPID)")
            .and_then(cgroup::of_proxy);
        match found {
            Ok(ids) => self.enter_proxies(&ids, &in_use(connected), connected),
            Err(e) if pid.is_some_and(is_gone) => Err(e),
            Err(e) => {
                warn!(
                    "cannot tell the proxy's sockets by their cgroup, so whatever has its mark passes for the \
                     proxy, an application with CAP_NET_RAW too: {e:#}"
                );
                self.unknown_proxies.among(connected).insert(pid);
                let mut kernel = self.kernel();
                ProxyCgroups::open(&mut kernel)?.enter(ANY_CGROUP, &in_use(connected))
            }
        }
    }

    /// Looks whether connected proxies have moved to other cgroups.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn follow_proxies(&self, connected: &[i32]) -> Result<()> {
        let in_use = in_use(connected);
        if in_use.is_empty() { Ok(()) } else { self.enter_proxies(&in_use, &in_use, connected) }
    }

    fn enter_proxies(
        &self,
        ids: &BTreeSet<u64>,
        in_use: &BTreeSet<u64>,
        connected: &[i32],
    ) -> Result<()> {
        let unknown = self.unknown_proxies.among(connected);
        let mut kernel = self.kernel();
        let mut cgroups = ProxyCgroups::open(&mut kernel)?;
        ids.iter().try_for_each(|id| cgroups.enter(*id, in_use))?;
        if unknown.is_empty() { cgroups.remove(ANY_CGROUP) } else { Ok(()) }
    }
}

fn is_gone(pid: i32) -> bool {
    let stat = Process::new(pid).and_then(|process| process.stat());
    stat.map_or(true, |stat| stat.state == 'Z')
}

/// The cgroups of the connected proxies, as far as they can be found out.
fn in_use(connected: &[i32]) -> BTreeSet<u64> {
    let mut ids = BTreeSet::new();
    for pid in connected {
        match cgroup::of_proxy(*pid) {
            Ok(found) => ids.extend(found),
            // It is unknown already, or has just ended.
            Err(e) => debug!("look for the cgroup of proxy {pid}: {e:#}"),
        }
    }
    ids
}

/// The map `proxy_cgroups`.
pub(super) struct ProxyCgroups<'a>(HashMap<&'a mut MapData, u64, u64>);

impl<'a> ProxyCgroups<'a> {
    pub(super) fn open(kernel: &'a mut Kernel) -> Result<Self> {
        kernel.map("proxy_cgroups").map(Self)
    }

    /// As long as no proxy is known, its mark is enough.
    pub(super) fn begin(&mut self) -> Result<()> {
        match self.0.keys().next() {
            None => self.enter(ANY_CGROUP, &BTreeSet::new()),
            Some(_) => Ok(()),
        }
    }

    /// Enters a cgroup in the place of the oldest one that is not `in_use`.
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
