//! Finds the network namespace of a running pod.
//!
//! It is at the path that CNI reported, or where somebody has put it under the pod's name. Otherwise it is
//! found by the pod's processes, which kubelet keeps in a cgroup that is named after the pod, unless the
//! application may have made it. In any case, it is the pod's only if it has an address of the pod or is set up
//! by us already, and never if it is the node's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use procfs::{FromRead as _, process::Stat};
use tracing::debug;

use crate::{
    cni::records::Records,
    dataplane::PodNetns,
    membership::{Pod, PodKey},
    netns::{Netns, in_dir, is_gone},
};

/// One scan of all processes serves every request within this time.
const FRESH: Duration = Duration::from_millis(500);
/// Where processes are listed.
const PROC: &str = "/proc";

/// Finds the network namespaces of pods.
#[derive(Debug)]
pub struct Finder {
    records: Arc<Records>,
    netns_dir: PathBuf,
    seen: Mutex<Option<(Instant, Arc<Processes>)>>,
}

/// The processes of each pod, oldest first, by the uid in their cgroup's name.
#[derive(Debug, Default, PartialEq, Eq)]
struct Processes(BTreeMap<String, Vec<u32>>);

impl Finder {
    /// Checks `records`, and `netns_dir` for `<namespace>_<name>`, before it looks at processes.
    pub fn new(records: Arc<Records>, netns_dir: PathBuf) -> Self {
        Self { records, netns_dir, seen: Mutex::default() }
    }

    /// What CNI reported.
    pub fn records(&self) -> &Arc<Records> {
        &self.records
    }

    /// The directory where namespaces are as `<namespace>_<name>`.
    pub fn netns_dir(&self) -> &Path {
        &self.netns_dir
    }

    /// The pod's network namespace. `is_ours` says whether an inode number is that of a namespace that is set
    /// up already: it is the pod's, whatever addresses it has.
    ///
    /// # Errors
    ///
    /// When none is found, or none of those found has an address of the pod.
    pub fn find(&self, pod: &Pod, is_ours: impl Fn(u32) -> bool) -> Result<PodNetns> {
        let mut refused = None;
        match self.records.of(pod.kubelet_uid()).map(|sandbox| sandbox.open(&is_ours)) {
            Some(Ok(found)) => return Ok(found),
            Some(Err(e)) => refused = Some(e),
            None => {}
        }
        let accept = |netns: Netns| {
            let is_ours = is_ours(netns.inode());
            if pod.ips.is_empty() && !is_ours {
                bail!("pod {} has no address yet", pod.key);
            }
            PodNetns::of_pod(netns, &pod.ips, is_ours)
        };
        let named = self.named(&pod.key);
        if is_there(&named)? {
            return accept(Netns::open(&named)?);
        }
        let mut doubtful = None;
        for netns in self.of_processes(pod)? {
            match netns.map(accept) {
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(e)) => refused = Some(e),
                Err(e) => doubtful = Some(e),
            }
        }
        match refused.or(doubtful) {
            Some(e) => Err(e),
            None => bail!(
                "find the network namespace of pod {}: there is no {}, and no process has a cgroup of uid {} (in \
                 a container, the agent needs hostPID)",
                pod.key,
                named.display(),
                pod.kubelet_uid()
            ),
        }
    }

    /// The namespaces of the pod's processes, except the node's; an error for each that the application may
    /// have made. The oldest process comes first: it is not one for which an application with `SYS_ADMIN` has
    /// created a namespace.
    fn of_processes(&self, pod: &Pod) -> Result<impl Iterator<Item = Result<Netns>>> {
        let hosts = hosts()?;
        let mut seen = BTreeSet::new();
        // A process may have exited, or may be exiting.
        let opened =
            self.namespaces_of(pod)?.into_iter().filter_map(|path| Netns::open(&path).ok());
        let of_pod =
            move |netns: &Netns| !hosts.contains(&netns.inode()) && seen.insert(netns.inode());
        // One after the other: an application can make any number of them.
        Ok(opened.filter(of_pod).map(|netns| {
            if can_be_runtimes(pod, netns.owner_depth()?) {
                return Ok(netns);
            }
            let right = if pod.host_users { "the node's" } else { "the node's and the pod's" };
            bail!(
                "{} belongs to a user namespace other than {right}: the application may have made it; recreate \
                 the pod while the agent runs, and CNI reports its network namespace, or mount that at {}",
                netns.path().display(),
                self.named(&pod.key).display()
            )
        }))
    }

    /// The inode number of the pod's network namespace, whatever addresses that has; `None` when
    /// none is found.
    ///
    /// # Errors
    ///
    /// When it is unknown whether there is one.
    pub fn inode(&self, pod: &Pod, is_ours: impl Fn(u32) -> bool) -> Result<Option<u32>> {
        let told = self.records.of(pod.kubelet_uid()).map(|told| told.netns.clone());
        for path in told.into_iter().chain([self.named(&pod.key)]) {
            if let Some(netns) = unless_gone(Netns::open(&path))? {
                return Ok(Some(netns.inode()));
            }
        }
        Ok(unless_gone(self.find(pod, is_ours))?.map(|found| found.netns.inode()))
    }

    /// Whether `netns` still is the pod's network namespace.
    ///
    /// # Errors
    ///
    /// When that is unknown.
    pub fn stands(&self, pod: &Pod, netns: &Netns) -> Result<bool> {
        let told = self.records.of(pod.kubelet_uid()).map(|told| told.netns.clone());
        for path in told.into_iter().chain([self.named(&pod.key)]) {
            if is_there(&path)? {
                return netns.is_at(&path);
            }
        }
        if !can_be_runtimes(pod, netns.owner_depth()?) {
            return Ok(false);
        }
        // By the process by which it was found, or else by another process of the pod.
        if netns.path().starts_with(PROC) && netns.is_at(netns.path())? {
            return Ok(true);
        }
        for path in self.namespaces_of(pod)? {
            if netns.is_at(&path)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn named(&self, pod: &PodKey) -> PathBuf {
        self.netns_dir.join(format!("{}_{}", pod.namespace, pod.name))
    }

    /// The `/proc/PID/ns/net` of the pod's processes, that of the oldest first.
    fn namespaces_of(&self, pod: &Pod) -> Result<Vec<PathBuf>> {
        let processes = self.processes()?;
        let pids = processes.0.get(pod.kubelet_uid()).into_iter().flatten();
        Ok(pids.map(|pid| PathBuf::from(format!("{PROC}/{pid}/ns/net"))).collect())
    }

    fn processes(&self) -> Result<Arc<Processes>> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, processes)) = &*seen
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(processes));
        }
        let processes = Arc::new(Processes::read(Path::new(PROC))?);
        *seen = Some((Instant::now(), Arc::clone(&processes)));
        Ok(processes)
    }
}

impl Processes {
    fn read(proc: &Path) -> Result<Self> {
        let mut found: BTreeMap<String, Vec<(u64, u32)>> = BTreeMap::new();
        for pid in pids(proc)? {
            let path = proc.join(pid.to_string()).join("cgroup");
            match fs::read_to_string(&path) {
                Ok(cgroups) => {
                    if let Some(uid) = pod_of(&cgroups) {
                        let started = started(&proc.join(pid.to_string()));
                        found.entry(uid).or_default().push((started, pid));
                    }
                }
                Err(e) => debug!("read {}: {e}", path.display()),
            }
        }
        let by_age = |mut pids: Vec<(u64, u32)>| {
            pids.sort_unstable();
            pids.into_iter().map(|(_, pid)| pid).collect()
        };
        Ok(Self(found.into_iter().map(|(uid, pids)| (uid, by_age(pids))).collect()))
    }
}

/// Whether the pod's runtime can have made a network namespace that is owned by a user namespace so many levels
/// below the agent's, and an application cannot.
///
/// A runtime makes it in the node's user namespace, which is the agent's, or for a pod with `hostUsers: false`
/// in the pod's, a child of that. Making one takes `SYS_ADMIN` in the user namespace that then owns it. An
/// application without that capability gets it only in user namespaces that it makes, below its own.
///
/// Of an owner outside of the agent's user namespace (`None`), the kernel says nothing. An application may have
/// made that one, too, and the agent cannot enter what it owns in any case.
fn can_be_runtimes(pod: &Pod, owner_depth: Option<u32>) -> bool {
    let deepest = if pod.host_users { 0 } else { 1 };
    owner_depth.is_some_and(|depth| depth <= deepest)
}

fn is_there(path: &Path) -> Result<bool> {
    path.try_exists().with_context(|| format!("look for {}", path.display()))
}

/// `None` for an error that means that nothing was found, rather than that it is unknown.
fn unless_gone<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.downcast_ref::<io::Error>().is_none_or(is_gone) => Ok(None),
        Err(e) => Err(e),
    }
}

/// When a process started, in ticks since boot; a process that has exited counts as the youngest. Process ids
/// say nothing about age, because they are reused.
fn started(process: &Path) -> u64 {
    let stat = fs::read(process.join("stat")).ok().and_then(|stat| Stat::from_read(&*stat).ok());
    stat.map_or(u64::MAX, |stat| stat.starttime)
}

/// Those network namespaces of `inodes` that are in `netns_dir` or in `records`, or in which a process runs.
///
/// # Errors
///
/// When the directories cannot be read.
pub fn alive(netns_dir: &Path, records: &Records, inodes: &BTreeSet<u32>) -> Result<Vec<Netns>> {
    let recorded = records.current();
    among(netns_dir, recorded.values().map(|sandbox| &*sandbox.netns), inodes)
}

/// The same, of those at the paths that are `recorded`.
///
/// # Errors
///
/// When the directories cannot be read.
pub fn among<'a>(
    netns_dir: &Path,
    recorded: impl Iterator<Item = &'a Path>,
    inodes: &BTreeSet<u32>,
) -> Result<Vec<Netns>> {
    let mut found = in_dir(netns_dir)?;
    found.extend(recorded.filter_map(|path| Netns::open(path).ok()));
    let mut seen = BTreeSet::new();
    found.retain(|netns| inodes.contains(&netns.inode()) && seen.insert(netns.inode()));
    for pid in pids(Path::new(PROC))? {
        let path = PathBuf::from(format!("{PROC}/{pid}/ns/net"));
        // Reading the link is cheaper than opening it.
        let Some(inode) = fs::read_link(&path).ok().and_then(|link| inode_of(&link)) else {
            continue;
        };
        if inodes.contains(&inode) && seen.insert(inode) {
            found.extend(Netns::open(&path).ok().filter(|netns| netns.inode() == inode));
        }
    }
    Ok(found)
}

/// In ascending order: by age, unless process ids have wrapped around.
fn pids(proc: &Path) -> Result<BTreeSet<u32>> {
    let entries = fs::read_dir(proc).with_context(|| format!("list {}", proc.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_str().and_then(|n| n.parse().ok())));
    let pids: io::Result<BTreeSet<Option<u32>>> = names.collect();
    Ok(pids.with_context(|| format!("list {}", proc.display()))?.into_iter().flatten().collect())
}

/// `net:[4026531840]`
pub fn inode_of(link: &Path) -> Option<u32> {
    link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

/// The network namespaces of the agent and of the node's first process. If the agent may not read the latter,
/// its addresses distinguish it from a pod's, as usual.
pub fn hosts() -> Result<BTreeSet<u32>> {
    let own = Netns::open(Path::new("/proc/self/ns/net"))?.inode();
    let first = Netns::open(Path::new("/proc/1/ns/net")).map(|netns| netns.inode());
    Ok([own].into_iter().chain(first.ok()).collect())
}

/// The uid of the pod that a process belongs to, from its `/proc/PID/cgroup`: one line for each hierarchy of
/// cgroup v1, and `0::` for v2. The outermost name counts: a container may be allowed to create cgroups below
/// its own.
pub fn pod_of(cgroups: &str) -> Option<String> {
    let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.flat_map(|path| path.split('/')).find_map(uid_of)
}

/// The uid in the name of a pod's cgroup. kubelet's drivers name it `pod<uid>` (cgroupfs) and
/// `kubepods-burstable-pod<uid, _ for ->.slice` (systemd). Source: Kubernetes
/// `pkg/kubelet/cm/pod_container_manager_linux.go`, `GetPodContainerName`, and
/// `cgroup_manager_linux.go`, `ToSystemd`.
fn uid_of(name: &str) -> Option<String> {
    // If containerd is configured with another driver than kubelet, it appends `:cri-containerd:ID`.
    let name = name.split(':').next().unwrap_or_default();
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => {
            let (parents, uid) = slice.rsplit_once("-pod")?;
            parents.contains("kubepods").then(|| uid.replace('_', "-"))?
        }
        None => name.strip_prefix("pod")?.to_owned(),
    };
    let is_uid = matches!(uid.len(), 32 | 36)
        && uid.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    is_uid.then_some(uid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use k8s_openapi::api::core::v1 as k8s;
    use serde_json::json;

    use super::*;
    use crate::netns::tests::below_us;

    const UID: &str = "0d3a8f6e-5b1c-4c53-9c5f-0a1b2c3d4e5f";
    const HASH: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn every_layout_of_cgroups_tells_the_pod() {
        let systemd = UID.replace('-', "_");
        let container = "1f2e3d4c5b6a1f2e3d4c5b6a1f2e3d4c5b6a1f2e3d4c5b6a1f2e3d4c5b6a1f2e";
        for (layout, cgroups) in [
            ("v2, cgroupfs", format!("0::/kubepods/besteffort/pod{UID}/{container}\n")),
            ("v2, cgroupfs, guaranteed", format!("0::/kubepods/pod{UID}/{container}\n")),
            (
                "v2, systemd, containerd",
                format!(
                    "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-containerd-{container}.scope\n"
                ),
            ),
            (
                "v2, systemd, CRI-O",
                format!(
                    "0::/kubepods.slice/kubepods-pod{systemd}.slice/crio-{container}.scope/container\n"
                ),
            ),
            ("v2, seen from a container", format!("0::/../../besteffort/pod{UID}/{container}\n")),
            (
                "kind",
                format!(
                    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{systemd}.slice/cri-containerd-{container}.scope\n"
                ),
            ),
            (
                "v1, with a controller that is not used",
                format!("11:rdma:/\n10:pids:/kubepods/burstable/pod{UID}/{container}\n0::/\n"),
            ),
            (
                "v1, containerd told another driver than kubelet",
                format!(
                    "4:memory:/system.slice/containerd.service/kubepods-besteffort-pod{systemd}.slice:cri-containerd:{container}\n"
                ),
            ),
        ] {
            assert_eq!(pod_of(&cgroups).as_deref(), Some(UID), "{layout}");
        }
        assert_eq!(pod_of(&format!("0::/kubepods/pod{HASH}/{container}")).as_deref(), Some(HASH));
    }

    fn finder(dir: &Path) -> Finder {
        let records = Arc::new(Records::open(&dir.join("state")).unwrap());
        Finder::new(records, dir.to_owned())
    }

    fn pod(host_users: bool) -> Pod {
        let pod: k8s::Pod = serde_json::from_value(json!({
            "metadata": {"name": "cart", "namespace": "shop", "uid": UID},
            "spec": {"hostUsers": host_users, "containers": []},
        }))
        .unwrap();
        Pod::try_from(&pod).unwrap()
    }

    #[test]
    fn owner_of_a_namespace_tells_who_can_have_made_it() {
        for (depth, host_users, is_runtimes) in [
            (Some(0), true, true),
            (Some(0), false, true),
            (Some(1), true, false),
            (Some(1), false, true),
            (Some(2), true, false),
            (Some(2), false, false),
            (None, true, false),
            (None, false, false),
        ] {
            let told = can_be_runtimes(&pod(host_users), depth);
            assert_eq!(told, is_runtimes, "{depth:?}, hostUsers: {host_users}");
        }
    }

    #[test]
    fn namespace_that_an_application_can_have_made_does_not_stand() {
        let dir = tempfile::tempdir().unwrap();
        let finder = finder(dir.path());
        for (depth, host_users, stands) in [(1, true, false), (1, false, true), (2, false, false)] {
            let (mut child, netns) = below_us(depth);
            let told = finder.stands(&pod(host_users), &netns).unwrap();
            assert_eq!(told, stands, "{depth}, hostUsers: {host_users}");
            // Somebody has put it there.
            symlink(netns.path(), dir.path().join("shop_cart")).unwrap();
            assert!(finder.stands(&pod(host_users), &netns).unwrap());
            fs::remove_file(dir.path().join("shop_cart")).unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn what_cannot_be_looked_at_is_not_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (finder, pod) = (finder(dir.path()), pod(false));
        let (mut child, netns) = below_us(1);
        let nobodys = |_| false;
        assert!(finder.stands(&pod, &netns).unwrap());
        assert_eq!(finder.inode(&pod, nobodys).unwrap(), None);

        // A link to itself, as one that may not be followed.
        symlink("shop_cart", dir.path().join("shop_cart")).unwrap();
        assert!(finder.stands(&pod, &netns).is_err());
        assert!(finder.inode(&pod, nobodys).is_err());
        assert!(finder.find(&pod, nobodys).is_err());
        child.wait().unwrap();
    }

    #[test]
    fn other_cgroups_tell_no_pod() {
        for cgroups in [
            "",
            "0::/\n",
            "0::/system.slice/kubelet.service\n",
            "0::/machine.slice/libpod-1f2e3d4c.scope\n",
            "0::/podcast/podium/pod\n",
            "0::/user.slice/my-pod0123456789abcdef0123456789abcdef.slice\n",
            "not a cgroup file",
        ] {
            assert_eq!(pod_of(cgroups), None, "{cgroups:?}");
        }
    }

    #[test]
    fn container_cannot_pass_for_another_pod_by_cgroups_of_its_own() {
        let cgroups = format!("0::/kubepods/pod{UID}/container/kubepods/pod{HASH}\n");
        assert_eq!(pod_of(&cgroups).as_deref(), Some(UID));
    }

    #[test]
    fn processes_are_found_by_pod_the_youngest_last() {
        let proc = tempfile::tempdir().unwrap();
        let write = |pid: &str, cgroup: &str| {
            fs::create_dir(proc.path().join(pid)).unwrap();
            fs::write(proc.path().join(pid).join("cgroup"), cgroup).unwrap();
        };
        write("1", "0::/init.scope\n");
        write("40", &format!("0::/kubepods/pod{UID}/a\n"));
        write("9", &format!("0::/kubepods/pod{UID}/b\n"));
        write("100", &format!("0::/kubepods/pod{HASH}/c\n"));
        // Kernel threads and processes that have just ended.
        fs::create_dir(proc.path().join("7")).unwrap();
        fs::create_dir(proc.path().join("sys")).unwrap();
        let processes = Processes::read(proc.path()).unwrap();
        let expected = [(UID.to_owned(), vec![9, 40]), (HASH.to_owned(), vec![100])];
        assert_eq!(processes, Processes(BTreeMap::from(expected)));
    }
}
