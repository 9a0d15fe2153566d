//! The one owner of kernel state: programs, maps, pins, and what is set up inside pods.
//!
//! A pod goes through four steps. Each is idempotent and leaves traffic in a defined state, so the agent may
//! die between any two system calls:
//!
//! 1. [`Dataplane::prepare`]: everything is in place, nothing is redirected.
//! 2. [`Dataplane::capture`]: new connections are redirected; open ones stay as they are. Called again with
//!    other settings, it changes what is redirected in the same way.
//! 3. [`Dataplane::release`]: new connections go direct; redirected ones stay redirected.
//! 4. [`Dataplane::remove`]: the pod is as it was found.

mod clsact;
pub mod contents;
mod dns_flows;
mod hook;
pub mod istio_cni;
mod kernel;
mod links;
mod observe;
mod others;
mod owner;
mod parts;
pub mod pins;
mod pod_locks;
mod pod_netns;
mod prefixes;
pub mod probe;
mod programs;
mod proxies;
mod reroute;
mod routes;
mod rows;
pub mod snapshot;
mod sockets;
pub mod stub;
mod sys;
mod sysctl;
mod verdicts;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::IpAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use aya::{maps::MapError, programs::TcAttachType};
use ipnet::IpNet;
use nix::{
    mount::{MsFlags, mount},
    sys::{
        statfs::{BPF_FS_MAGIC, statfs},
        time::TimeValLike as _,
    },
    time::{ClockId, clock_gettime},
};
use redirect_ebpf::abi::{
    ABI_VERSION, LISTENER_HBONE, LISTENER_INBOUND, LISTENER_OUTBOUND, LOOPBACK_IFINDEX, PORT_HBONE,
    PORT_INBOUND, PORT_OUTBOUND, PodId,
};
use tracing::{debug, warn};

pub use self::{
    hook::Hooks,
    kernel::OBJECT,
    links::linked_pods,
    observe::Observation,
    others::redirected_pods,
    owner::{Owned, Owner},
    parts::{Inspection, Part, PartKind},
    pod_netns::PodNetns,
    programs::Program,
    sockets::{VMLINUX_BTF, offsets as sock_offsets},
    verdicts::Verdicts,
    watch::Watch,
};
use self::{
    hook::directions,
    kernel::{FIND_PROXY, Globals, INBOUND_RANGES, Kernel, TcProgram},
    links::{KubeletLink, PodLinks},
    observe::is_partly_captured,
    pod_locks::{PodLock, PodLocks},
    proxies::{Proxies, ProxyCgroups},
    routes::{Routing, Seen},
    rows::Row,
};
use crate::traffic::Traffic;

/// How long the proxy may be away before connections are refused.
pub const DEFAULT_PROXY_GRACE: Duration = Duration::from_secs(3);

/// The usual mount point of bpffs.
const BPFFS: &str = "/sys/fs/bpf";
/// Connections that were caught halfway are marked at these times after a switch. A connection that chose its
/// route before the switch, or was half open, has sent a packet before the last of them.
pub const SETTLE: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(30),
    Duration::from_millis(120),
    Duration::from_millis(250),
];

/// Where and how to run the datapath.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory on bpffs that holds all of this agent's pins.
    pub bpffs_dir: PathBuf,
    /// How long new connections wait for a proxy that has stopped listening.
    pub proxy_grace: Duration,
    /// Whether to ignore that the directory has an owner: another process, or this one by [`own`].
    pub force: bool,
    /// By what programs run on interfaces; by the best that the kernel has where it is not said.
    pub hooks: Option<Hooks>,
}

impl Options {
    /// The default directory. Its name has the version of the maps' layout, so that agents with different
    /// layouts do not share maps.
    pub fn default_bpffs_dir() -> PathBuf {
        PathBuf::from(format!("{BPFFS}/redirect/v{ABI_VERSION}"))
    }
}

/// The programs, the maps and the pins below one directory of bpffs.
pub struct Dataplane {
    dir: PathBuf,
    /// Held for single calls of bpf(2): never during netlink, a wait, or a whole step.
    kernel: Mutex<Kernel>,
    hooks: Hooks,
    tc: BTreeMap<&'static str, TcProgram>,
    /// One step at a time per pod.
    pods: PodLocks,
    proxies: Arc<Proxies>,
    _owner: Option<Owner>,
}

/// Takes ownership of the directory until the owner is dropped; creates it if it is missing.
///
/// # Errors
///
/// [`Owned`] when another process has it; otherwise when it cannot be created.
pub fn own(dir: &Path) -> Result<Owner> {
    loop {
        create_bpffs_dir(dir)?;
        let owner = Owner::take(dir)?;
        // The previous owner may have removed it when it exited, and somebody else may have created it again.
        if owner.is_at(dir) {
            return Ok(owner);
        }
    }
}

/// A port on which the proxy does not listen in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deaf {
    /// The port.
    pub port: u16,
    /// The pod's address of the family in which the proxy does not listen, if it listens in the other one.
    pub family: Option<IpAddr>,
}

impl fmt::Display for Deaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.family {
            None => write!(f, "{}", self.port),
            Some(IpAddr::V4(_)) => write!(f, "{} (IPv4)", self.port),
            Some(IpAddr::V6(_)) => write!(f, "{} (IPv6)", self.port),
        }
    }
}

impl Dataplane {
    /// Takes ownership of the directory, loads the programs, and opens or creates the pinned maps. Attaches
    /// nothing yet.
    ///
    /// # Errors
    ///
    /// [`Owned`] when another process has the directory; otherwise when the kernel or missing privileges
    /// prevent it.
    pub fn open(options: &Options) -> Result<Self> {
        create_bpffs_dir(&options.bpffs_dir)?;
        let owner = if options.force { None } else { Some(own(&options.bpffs_dir)?) };
        let proxy_grace_ns =
            u64::try_from(options.proxy_grace.as_nanos()).context("use a proxy grace that long")?;
        let globals = Globals { proxy_grace_ns, offsets: sockets::offsets()? };
        let mut kernel = Kernel::load(&options.bpffs_dir, &globals)?;
        ProxyCgroups::open(&mut kernel)?.begin()?;
        // The kernel's BTF is large, and is no longer needed.
        sys::release_freed_memory();
        Ok(Self {
            dir: options.bpffs_dir.clone(),
            hooks: options.hooks.map_or_else(Hooks::of_kernel, Ok)?,
            tc: kernel.tc_programs()?,
            kernel: Mutex::new(kernel),
            pods: PodLocks::default(),
            proxies: Arc::default(),
            _owner: owner,
        })
    }

    /// Step 1: everything is in place in the pod, but nothing is redirected yet. In a pod that is captured
    /// already, it only repairs what is missing and applies the inbound settings of `traffic`. `reason` is
    /// the number of the `membership::Reason`, for whoever dumps the map `pods`. Returns whether settings of a
    /// captured pod have changed: then connections that were caught halfway still have to
    /// [`Dataplane::settle`], unless [`Dataplane::capture`] follows at once.
    ///
    /// # Errors
    ///
    /// When the pod has too many interfaces, or a system call fails. What was set up so far stays, and
    /// calling again completes it.
    pub fn prepare(&self, pod: &PodNetns, reason: u32, traffic: &Traffic) -> Result<bool> {
        let _pod = self.pod(pod.id());
        let links = PodLinks::new(&self.dir, pod.id());
        let (seen, sysctls, look_set) = pod.netns.run(|| {
            anyhow::Ok((Routing::open()?.look()?, sysctl::read()?, sysctl::look_set()?))
        })??;
        let interfaces = seen.interfaces()?;
        if self.is_anothers_locked(&links, pod)? {
            bail!("{}", others::advice(pod.id(), &self.dir));
        }
        // The kernel reuses the number of a namespace that is gone. If somebody has only detached the links,
        // it looks the same, except that our sysctls are still set.
        if !look_set && links.are_left()? {
            self.forget_locked(&links, pod.id())?;
        }
        // Before anything that has to be undone: the directory is how a pod is found again.
        links.create_dir()?;
        let changes = self.kernel().changes_captured(pod, traffic)?;
        if changes {
            // By the settings that they have been under so far.
            self.switch_locked(pod, || self.mark("mark_open"))?;
        }
        self.kernel().enter(pod, reason, traffic, &interfaces)?;
        self.kernel().save_sysctls(pod.id(), sysctls)?;
        // The first program, and before accepted sockets take marks: it removes the proxy's mark from what
        // the proxy sends, and recognizes what the pod sends to itself.
        pod.netns.run(|| self.attach(pod, &links, LOOPBACK_IFINDEX, "lo"))??;
        links.ensure_lookup(&pod.netns, || self.kernel().load_stub(&pod.netns))?;
        pod.netns.run(|| {
            sysctl::set()?;
            let routing = Routing::open()?;
            // Before the guard, which relies on these rules.
            for source in pod.sources() {
                routing.add_keep(&seen, source, traffic)?;
            }
            // One interface keeps no other from being repaired.
            let mut attached = Ok(());
            for (index, name) in interfaces {
                attached = attached.and(self.attach(pod, &links, index, &name));
            }
            routing.precede_foreign_rules()?;
            attached
        })??;
        Ok(changes)
    }

    /// Whether only another agent, with another directory of bpffs, redirects this pod.
    ///
    /// # Errors
    ///
    /// When the programs cannot be listed.
    pub fn is_anothers(&self, pod: &PodNetns) -> Result<bool> {
        let _pod = self.pod(pod.id());
        self.is_anothers_locked(&PodLinks::new(&self.dir, pod.id()), pod)
    }

    fn is_anothers_locked(&self, links: &PodLinks, pod: &PodNetns) -> Result<bool> {
        if links.has_lookup(pod.id())? {
            return Ok(false);
        }
        let programs_map = self.kernel().programs_map()?;
        others::is_redirected_by_another(&pod.netns, programs_map)
    }

    /// Attaches the programs of an interface. Runs inside the pod's namespace.
    fn attach(&self, pod: &PodNetns, links: &PodLinks, index: u32, name: &str) -> Result<()> {
        for &at in directions(index) {
            let program = &self.tc[self.program_for(pod.id(), index, at)?];
            self.hooks.at(links, (index, name), at).ensure(program)?;
        }
        Ok(())
    }

    /// Whether the programs of an interface are attached, as this process has loaded them. Runs inside the
    /// pod's namespace.
    fn is_attached(
        &self,
        pod: &PodNetns,
        links: &PodLinks,
        index: u32,
        name: &str,
    ) -> Result<bool> {
        for &at in directions(index) {
            let program = &self.tc[self.program_for(pod.id(), index, at)?];
            if !self.hooks.at(links, (index, name), at).runs(program.id)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Which program an interface of a pod has.
    fn program_for(&self, pod_id: PodId, index: u32, at: TcAttachType) -> Result<&'static str> {
        Ok(if at == TcAttachType::Egress {
            "redirect_out"
        } else if index == LOOPBACK_IFINDEX {
            "redirect_lo"
        } else if self.kernel().virtual_interfaces()?.contains(pod_id, index)? {
            "redirect_virt"
        } else {
            "redirect_ext"
        })
    }

    /// Step 2: new connections of the pod are redirected as `traffic` says, and open ones stay as they are.
    /// In a pod that is captured with other settings, it changes them. Connections that were caught halfway
    /// still have to [`Dataplane::settle`].
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn capture(&self, pod: &PodNetns, traffic: &Traffic) -> Result<()> {
        self.switch(pod, || {
            let routing = Routing::open()?;
            let seen = routing.look()?;
            self.mark(self.marks_by(pod, &seen)?)?;
            self.redirect(pod, traffic, monotonic_ns()?, &routing, &seen)
        })
    }

    /// Step 2 for a pod in which nothing runs yet: no connection can be open or half open, so nothing has to
    /// settle.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn capture_unused(&self, pod: &PodNetns, traffic: &Traffic) -> Result<()> {
        let _pod = self.pod(pod.id());
        pod.netns.run(|| {
            self.iterate("reuse_addr")?;
            let routing = Routing::open()?;
            self.redirect(pod, traffic, 0, &routing, &routing.look()?)
        })?
    }

    /// Redirects the pod's new connections. `since` is when the capture began; 0 if no connection is older.
    /// Runs inside the pod's namespace.
    fn redirect(
        &self,
        pod: &PodNetns,
        traffic: &Traffic,
        since: u64,
        routing: &Routing,
        seen: &Seen,
    ) -> Result<()> {
        let (dns, interfaces) = (traffic.captures_dns(), seen.interfaces()?);
        // Before the rule that brings connections to resolvers onto `lo`.
        self.change_row(pod.id(), |row| Row { dns: dns || row.dns, ..row })?;
        for source in pod.sources() {
            routing.set_outbound(seen, source, traffic)?;
        }
        routing.precede_foreign_rules()?;
        self.change_row(pod.id(), |row| {
            let captured_at_ns = if row.capture { row.captured_at_ns } else { since };
            Row { enrolled: true, capture: true, captured_at_ns, dns, ..row }
        })?;
        self.kernel().virtual_interfaces()?.set(pod.id(), &interfaces, traffic, true)
    }

    /// Tells the programs about the proxy's listeners. In a captured pod, it also lets the application bind
    /// ports that the proxy's accepted connections hold; in other pods, [`Dataplane::capture`] does that.
    /// Call it whenever the proxy may have opened listeners in the pod. Returns the ports on which it does
    /// not listen.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn proxy_listens(&self, pod: &PodNetns) -> Result<Vec<Deaf>> {
        pod.netns.run(|| {
            let found = sockets::find_proxy(self.kernel().classifier(FIND_PROXY)?)?;
            let captured = self.kernel().pods()?.row(pod.id())?.is_some_and(|row| row.capture);
            if found.are_new() && captured {
                self.iterate("reuse_addr")?;
            }
            let ports = [
                (LISTENER_OUTBOUND, PORT_OUTBOUND),
                (LISTENER_INBOUND, PORT_INBOUND),
                (LISTENER_HBONE, PORT_HBONE),
            ];
            let sources: Vec<IpAddr> = pod.sources().collect();
            let deaf = |(kind, port): (u32, u16)| {
                let (heard, missed): (Vec<IpAddr>, Vec<IpAddr>) =
                    sources.iter().partition(|source| found.has(kind, **source));
                let family = if heard.is_empty() { None } else { missed.first().copied() };
                (!missed.is_empty()).then_some(Deaf { port, family })
            };
            Ok(ports.into_iter().filter_map(deaf).collect())
        })?
    }

    /// Runs an iterator over the sockets of the thread's namespace.
    fn iterate(&self, name: &str) -> Result<usize> {
        let iterator = sockets::open(self.kernel().iterator(name)?)?;
        sockets::run(iterator)
    }

    /// Step 3: new connections of the pod are direct; redirected ones stay redirected. Connections that were
    /// caught halfway still have to [`Dataplane::settle`].
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn release(&self, pod: &PodNetns) -> Result<()> {
        self.switch(pod, || {
            let routing = Routing::open()?;
            self.mark(self.marks_by(pod, &routing.look()?)?)?;
            let released = |row| Row { capture: false, captured_at_ns: 0, ..row };
            self.change_row(pod.id(), released)?;
            self.kernel().virtual_interfaces()?.release(pod.id())?;
            routing.delete_capture()?;
            // Last: as long as the capture rule brings connections to resolvers onto `lo`, they are the
            // DNS's.
            self.change_row(pod.id(), |row| Row { dns: false, ..row })
        })
    }

    /// How many connections of a released pod are still redirected.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn redirected(&self, pod: &PodNetns) -> Result<usize> {
        pod.netns.run(|| self.iterate("count_redir"))?
    }

    /// Step 4: the pod is as it was before step 1. Its row in `pods` stays and says that it bypasses;
    /// [`Dataplane::forget`] deletes it.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn remove(&self, pod: &PodNetns) -> Result<()> {
        self.let_pass(pod)?;
        let _pod = self.pod(pod.id());
        let links = PodLinks::new(&self.dir, pod.id());
        links.detach()?;
        self.kernel().delete_state(pod.id())?;
        // Last, so that a pod that was left halfway is found again.
        links.remove_dir()
    }

    /// The first and quick half of step 4: the pod's traffic is no longer touched, and its rules, routes and
    /// sysctls are restored. Only programs that let everything pass are left.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn let_pass(&self, pod: &PodNetns) -> Result<()> {
        let _pod = self.pod(pod.id());
        // First, so that the programs let everything pass as long as they still run.
        self.change_row(pod.id(), |row| Row {
            enrolled: false,
            capture: false,
            captured_at_ns: 0,
            dns: false,
            ..row
        })?;
        let saved = absent(self.kernel().saved_sysctls()?.get(&pod.id(), 0))
            .context("read map saved_sysctls")?;
        let links = PodLinks::new(&self.dir, pod.id());
        pod.netns.run(|| {
            Routing::open()?.delete_all()?;
            if let Some(saved) = saved {
                sysctl::restore(&saved)?;
            }
            self.hooks.clear(&links)
        })?
    }

    /// Drops what the maps and bpffs hold for a pod whose namespace is gone.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn forget(&self, pod_id: PodId) -> Result<()> {
        let _pod = self.pod(pod_id);
        self.forget_locked(&PodLinks::new(&self.dir, pod_id), pod_id)
    }

    fn forget_locked(&self, links: &PodLinks, pod_id: PodId) -> Result<()> {
        links.detach()?;
        self.kernel().pods()?.delete(pod_id)?;
        self.kernel().delete_state(pod_id)?;
        links.remove_dir()
    }

    /// Whether somebody listens where the proxy's DNS should, in either family.
    ///
    /// # Errors
    ///
    /// When the pod's sockets cannot be read.
    pub fn dns_listens(&self, pod: &PodNetns) -> Result<bool> {
        pod.netns.run(sockets::dns_listens)?
    }

    /// Drops what the maps and bpffs hold for dead namespaces, the pins of interfaces that are gone, and the
    /// rows of pods that are not `known`, have no links, and were already `unknown` to the previous sweep
    /// (because a row is entered before its pod counts as known). A link that somebody has detached looks as
    /// if its namespace were dead, so namespaces that are known to be `alive` have to be named. Returns the
    /// pods that are unknown now.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn sweep(
        &self,
        known: &BTreeSet<PodId>,
        alive: &BTreeSet<PodId>,
        unknown: &BTreeSet<PodId>,
    ) -> Result<BTreeSet<PodId>> {
        for pod_id in self.linked_pods()? {
            // So that no new namespace with that number is set up in between.
            let _pod = self.pod(pod_id);
            let links = PodLinks::new(&self.dir, pod_id);
            if alive.contains(&pod_id) {
                links.prune_tcx()?;
            } else if links.are_dead()? {
                debug!("network namespace {pod_id} is dead");
                self.forget_locked(&links, pod_id)?;
            }
        }
        let rows = self.kernel().pods()?.ids()?;
        let strange = |pod_id: &PodId| !known.contains(pod_id) && !self.is_linked(*pod_id);
        let (stale, fresh): (BTreeSet<PodId>, BTreeSet<PodId>) =
            rows.into_iter().filter(strange).partition(|pod_id| unknown.contains(pod_id));
        for pod_id in stale {
            let _pod = self.pod(pod_id);
            if !self.is_linked(pod_id) {
                self.kernel().pods()?.delete(pod_id)?;
            }
        }
        Ok(fresh)
    }

    /// Drops the DNS flows that nobody needs any more.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn sweep_dns_flows(&self) -> Result<()> {
        dns_flows::sweep(&self.dir, monotonic_ns()?)
    }

    /// From now on, connections to pods that are opened in this cgroup (v2, with this id) reach the
    /// application past the proxy. Those of any other cgroup no longer do.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn follow_kubelet(&self, cgroup: &fs::File, id: u64) -> Result<()> {
        KubeletLink::new(&self.dir).ensure(self.kernel().kubelet()?, cgroup, id)
    }

    /// From now on, no cgroup's connections do.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn unfollow_kubelet(&self) -> Result<()> {
        KubeletLink::new(&self.dir).remove()
    }

    /// From now on, connections to pods from these ranges, and only from these, count as probes and reach the
    /// application past the proxy.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn set_probe_sources(&self, ranges: &[IpNet]) -> Result<()> {
        prefixes::set_for_every_pod(&mut self.kernel().map(INBOUND_RANGES)?, ranges)
    }

    /// Enters or replaces the row of a pod that bypasses.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn put_bypass(&self, pod_id: PodId, addresses: &[IpAddr], reason: u32) -> Result<()> {
        let _pod = self.pod(pod_id);
        self.kernel().pods()?.put(pod_id, Row::bypass(addresses, reason))
    }

    /// Removes the row of a pod that bypasses.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn delete_bypass(&self, pod_id: PodId) -> Result<()> {
        let _pod = self.pod(pod_id);
        let mut kernel = self.kernel();
        let mut pods = kernel.pods()?;
        match pods.row(pod_id)? {
            Some(row) if !row.enrolled => pods.delete(pod_id),
            _ => Ok(()),
        }
    }

    /// Whether a pod has links, or once had.
    pub fn is_linked(&self, pod_id: PodId) -> bool {
        self.dir.join("links").join(pod_id.to_string()).exists()
    }

    /// The pods that have links.
    ///
    /// # Errors
    ///
    /// When bpffs cannot be read.
    pub fn linked_pods(&self) -> Result<BTreeSet<PodId>> {
        linked_pods(&self.dir)
    }

    /// The counters of every pod, summed over the CPUs: pod → name → value.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn counters(&self) -> Result<BTreeMap<PodId, BTreeMap<&'static str, u64>>> {
        let mut kernel = self.kernel();
        let mut all: BTreeMap<PodId, BTreeMap<&'static str, u64>> = BTreeMap::new();
        for (pod_id, counter, count) in kernel.counts()? {
            all.entry(pod_id).or_default().insert(counter, count);
        }
        Ok(all)
    }

    /// What has been counted for all pods together, by name: those that are there, and those that this process
    /// has seen leave.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn totals(&self) -> Result<BTreeMap<&'static str, u64>> {
        let mut kernel = self.kernel();
        let mut totals = kernel.departed.clone();
        for (_, counter, count) in kernel.counts()? {
            *totals.entry(counter).or_default() += count;
        }
        Ok(totals)
    }

    /// Removes the pinned maps and the directory, if no pod is left in them.
    ///
    /// # Errors
    ///
    /// When bpffs cannot be written.
    pub fn unpin_if_unused(&self) -> Result<()> {
        if !self.linked_pods()?.is_empty() || !self.kernel().pods()?.ids()?.is_empty() {
            return Ok(());
        }
        // This includes maps that only an older agent had.
        let pins = fs::read_dir(&self.dir)
            .with_context(|| format!("list {}", self.dir.display()))?
            .collect::<io::Result<Vec<_>>>()
            .with_context(|| format!("list {}", self.dir.display()))?;
        for pin in pins.iter().filter(|pin| pin.file_type().is_ok_and(|t| t.is_file())) {
            remove_if_there(&pin.path())?;
        }
        for dir in [self.dir.join("links"), self.dir.clone()] {
            match fs::remove_dir(&dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("remove {}", dir.display()));
                }
                _ => {}
            }
        }
        if let Some(parent) = self.dir.parent().filter(|parent| *parent != Path::new(BPFFS)) {
            // It may contain other versions of the layout, or the operator's own files.
            let _in_use = fs::remove_dir(parent);
        }
        Ok(())
    }

    /// Changes what is redirected in the pod, by `change`, which runs inside its namespace. Every open
    /// connection stays on its path, and none is lost in the switch.
    ///
    /// `change` first has the iterators [`Dataplane::mark`] the open connections by their path. Connections
    /// that come into being after that, but before the change, show their path by their packets: the programs
    /// note it, and hold back packets on the other path, until [`Dataplane::settle`] has marked these
    /// sockets, too.
    fn switch(&self, pod: &PodNetns, change: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        let _pod = self.pod(pod.id());
        self.switch_locked(pod, change)
    }

    fn switch_locked(
        &self,
        pod: &PodNetns,
        change: impl FnOnce() -> Result<()> + Send,
    ) -> Result<()> {
        self.kernel().begin_switch(pod.id())?;
        let switched = pod.netns.run(change).flatten();
        if switched.is_err() {
            self.kernel().end_switch(pod.id())?;
        }
        switched
    }

    /// The iterator that marks the open connections of a pod.
    fn marks_by(&self, pod: &PodNetns, seen: &Seen) -> Result<&'static str> {
        let row = self.kernel().pods()?.row(pod.id())?;
        Ok(if is_partly_captured(pod, row, seen) { "mark_open" } else { "mark_all" })
    }

    /// Notes the proxy's connections, and then marks the open connections of the thread's namespace by the
    /// iterator `mark`.
    fn mark(&self, mark: &str) -> Result<()> {
        self.iterate("note_proxy")?;
        self.iterate(mark).map(drop)
    }

    /// Marks the sockets whose path was noted since the switch. Call it at each of the times in [`SETTLE`];
    /// `last` ends the switch. If the agent is killed before, nothing is left behind: the programs end the
    /// switch after two seconds.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn settle(&self, pod: &PodNetns, last: bool) -> Result<()> {
        if self.kernel().has_noted(pod.id())? {
            pod.netns.run(|| self.iterate("mark_noted"))??;
        }
        if last {
            self.kernel().end_switch(pod.id())
        } else {
            self.kernel().continue_switch(pod.id())
        }
    }

    /// Calls [`Dataplane::settle`] at each of its times, for callers that have nothing else to do in between.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn settle_wholly(&self, pod: &PodNetns) -> Result<()> {
        for (n, delay) in (1..).zip(SETTLE) {
            thread::sleep(delay);
            self.settle(pod, n == SETTLE.len())?;
        }
        Ok(())
    }

    fn change_row(&self, pod_id: PodId, change: impl FnOnce(Row) -> Row) -> Result<()> {
        self.kernel().pods()?.change(pod_id, change)
    }

    /// Locks the maps, for one call of bpf(2) or a few.
    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks a pod, for one step.
    fn pod(&self, pod_id: PodId) -> PodLock<'_> {
        self.pods.lock(pod_id)
    }
}

/// The clock of the programs' `bpf_ktime_get_ns`.
pub(crate) fn monotonic_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the clock")?;
    u64::try_from(now.num_nanoseconds()).context("read the clock")
}

/// Turns the error for a missing entry into `None`.
fn absent<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Creates the agent's directory, for root only. Mounts a bpffs first if its usual mount point has none.
fn create_bpffs_dir(dir: &Path) -> Result<()> {
    if dir.starts_with(BPFFS) && !is_bpffs(Path::new(BPFFS))? {
        warn!(
            "{BPFFS} is no bpffs: mounting one; what is pinned there lasts as long as this mount"
        );
        mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .with_context(|| format!("mount bpffs at {BPFFS}"))?;
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("create {}", dir.display()))?;
    if !is_bpffs(dir)? {
        bail!("{} is not on a bpffs; mount one: mount -t bpf bpf {BPFFS}", dir.display());
    }
    Ok(())
}

fn is_bpffs(path: &Path) -> Result<bool> {
    let fs = statfs(path).with_context(|| format!("stat {}", path.display()))?;
    Ok(fs.filesystem_type() == BPF_FS_MAGIC)
}
