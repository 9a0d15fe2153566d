//! The one owner of kernel state: programs, maps, pins, and what is set up inside pods.
//!
//! A pod goes through four steps, each idempotent and each leaving traffic in a defined state, so
//! the agent may die between any two system calls:
//!
//! 1. [`Dataplane::prepare`]: everything is in place, nothing is redirected.
//! 2. [`Dataplane::capture`]: new connections are redirected; those that are open stay as they are.
//!    Again with other settings, it changes what is redirected in the same way.
//! 3. [`Dataplane::release`]: new connections go direct; redirected ones stay redirected.
//! 4. [`Dataplane::remove`]: the pod is as it was found.

mod inbound;
mod iptables_legacy;
mod istio_cni;
mod links;
mod nftables;
pub mod probe;
mod reroute;
mod routes;
mod sockets;
mod sys;
mod sysctl;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::IpAddr,
    ops::{Deref, DerefMut},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, PerCpuHashMap},
    programs::{
        Iter, Program, SchedClassifier, SkLookup, SockOps, TcAttachType, tc::SchedClassifierLink,
    },
};
use aya_log::EbpfLogger;
use ipnet::IpNet;
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::statfs,
};
use redirect_ebpf::abi::{
    ABI_VERSION, Addr, Counter, CounterKey, DECISION_BYPASS, DECISION_ENROLLED, DnsFlow, DnsKey,
    Flow, LISTENER_HBONE, LISTENER_INBOUND, LISTENER_OUTBOUND, ListenerKey, POD_BYPASS_INBOUND,
    POD_CAPTURE, POD_DNS, POD_INBOUND_RULES, PodEntry, PodId, PodPeer, PodPort, SavedSysctls,
};
use tracing::debug;

use self::{
    inbound::Entry as _,
    links::{KubeletLink, PodLinks, attach_tcx},
    reroute::VirtualInterfaces,
    routes::{LOOPBACK_IFINDEX, OutboundState, Routing},
};
pub use self::{
    istio_cni::{Displaced, IstioCni},
    sockets::offsets as sock_offsets,
    watch::Watch,
};
use crate::{netns::Netns, traffic::Traffic};

/// The kernel programs, compiled by the build script.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect"));

/// How long a restart of the proxy may take before connections are refused.
pub const DEFAULT_PROXY_GRACE: Duration = Duration::from_secs(3);

/// Where bpffs is mounted unless the operator has it elsewhere.
const BPFFS: &str = "/sys/fs/bpf";
/// Source: Linux `include/uapi/linux/magic.h`, `BPF_FS_MAGIC`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// The maps that outlive the agent.
const PINNED_MAPS: [&str; 14] = [
    "pods",
    "counters",
    "listeners",
    "proxy_missing",
    "hints",
    WAYS,
    "saved_sysctls",
    DNS_FLOWS,
    "kubelet_flows",
    INBOUND_PORTS,
    INBOUND_RANGES,
    OUTBOUND_PORTS,
    OUTBOUND_RANGES,
    VIRTUAL_INTERFACES,
];
const WAYS: &str = "ways";
const DNS_FLOWS: &str = "dns_flows";
const INBOUND_PORTS: &str = "inbound_ports";
const INBOUND_RANGES: &str = "inbound_ranges";
const OUTBOUND_PORTS: &str = "outbound_ports";
const OUTBOUND_RANGES: &str = "outbound_ranges";
const VIRTUAL_INTERFACES: &str = "virtual_ifs";
const TCX_PROGRAMS: [&str; 5] =
    ["redirect_lo", "redirect_ext", "redirect_virt", "watch_sent", "watch_received"];
const LOOKUP_PROGRAM: &str = "redirect_lookup";
const KUBELET_PROGRAM: &str = "note_kubelet";
const ITERATORS: [&str; 6] =
    ["note_proxy", "mark_all", "mark_open", "mark_noted", "count_redir", "reuse_addr"];
/// After the switch, the flows that were caught half-way are marked at these instants: a connection
/// that chose its route before the switch, or was half open, has shown itself before the last of
/// them.
const SETTLE: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(30),
    Duration::from_millis(120),
    Duration::from_millis(250),
];

/// Where and how to run the datapath.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory on bpffs that holds everything of this agent.
    pub bpffs_dir: PathBuf,
    /// For how long new connections wait for a proxy that has stopped listening.
    pub proxy_grace: Duration,
    /// Whether the programs log their decisions.
    pub log: bool,
}

impl Options {
    /// The directory that is used unless the operator names another: it carries the version of the
    /// maps' layout, because a pinned map is reused without a check that it fits.
    pub fn default_bpffs_dir() -> PathBuf {
        PathBuf::from(format!("{BPFFS}/redirect/v{ABI_VERSION}"))
    }
}

/// A pod as the datapath knows it.
#[derive(Debug)]
pub struct PodNetns {
    /// Its network namespace.
    pub netns: Netns,
    /// Its addresses: first those that the cluster knows it by, then any others in the namespace.
    pub addresses: Vec<IpAddr>,
    /// The interfaces whose addresses are not among them: they may be the same in many pods.
    virtual_interfaces: Vec<String>,
}

impl PodNetns {
    /// Looks up the addresses inside the namespace.
    ///
    /// # Errors
    ///
    /// When the namespace carries no address, or lacks one of `known`: then it is not that pod's.
    pub fn new(netns: Netns, known: &[IpAddr]) -> Result<Self> {
        let found = netns.run(|| Routing::open()?.addresses(&[]))??;
        let mut addresses: Vec<IpAddr> = Vec::new();
        for ip in known {
            if !found.contains(ip) {
                bail!(
                    "{} does not carry address {ip}; it has {}",
                    netns.path().display(),
                    list(&found)
                );
            }
            if !addresses.contains(ip) {
                addresses.push(*ip);
            }
        }
        for ip in found {
            if !addresses.contains(&ip) {
                addresses.push(ip);
            }
        }
        if addresses.is_empty() {
            bail!("{} has no address besides loopback", netns.path().display());
        }
        Ok(Self { netns, addresses, virtual_interfaces: Vec::new() })
    }

    /// The same pod without the addresses of its virtual interfaces, but for `known` ones.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn without(self, virtual_interfaces: &[String], known: &[IpAddr]) -> Result<Self> {
        let own = self.netns.run(|| Routing::open()?.addresses(virtual_interfaces))??;
        let mut addresses = self.addresses;
        addresses.retain(|ip| own.contains(ip) || known.contains(ip));
        Ok(Self { addresses, virtual_interfaces: virtual_interfaces.to_vec(), ..self })
    }

    /// For a namespace that is to be put back, whatever addresses it has by now.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn existing(netns: Netns) -> Result<Self> {
        let addresses = netns.run(|| Routing::open()?.addresses(&[]))??;
        Ok(Self { netns, addresses, virtual_interfaces: Vec::new() })
    }

    /// Whether the namespace has other addresses now, and still all of `known`.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn has_changed(&self, known: &[IpAddr]) -> Result<bool> {
        let (all, own) = self.netns.run(|| {
            let routing = Routing::open()?;
            anyhow::Ok((routing.addresses(&[])?, routing.addresses(&self.virtual_interfaces)?))
        })??;
        let has_all = known.iter().all(|ip| all.contains(ip));
        let found: BTreeSet<IpAddr> = own.into_iter().chain(known.iter().copied()).collect();
        Ok(has_all && found != self.addresses.iter().copied().collect())
    }

    fn id(&self) -> PodId {
        self.netns.inode()
    }

    /// The first address of each family.
    fn sources(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = self.addresses.iter().find(|ip| ip.is_ipv4());
        let v6 = self.addresses.iter().find(|ip| ip.is_ipv6());
        v4.into_iter().chain(v6).copied()
    }
}

/// A kind of thing that the kernel has for an enrolled pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    /// The row of an address in the map `pods`.
    Row,
    /// The inbound settings of ports in the map `inbound_ports`.
    InboundPorts,
    /// The inbound settings of ranges in the map `inbound_ranges`.
    InboundRanges,
    /// The `sk_lookup` link.
    Lookup,
    /// A tcx link.
    Tcx,
    /// The capture on a virtual interface.
    Reroute,
    /// The redirection routes of a family.
    Route,
    /// The capture rules of a family.
    Rule,
    /// The drain route of a family.
    DrainRoute,
    /// The drain rule of a family.
    DrainRule,
    /// A sysctl.
    Sysctl,
}

impl PartKind {
    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            PartKind::Row => "row",
            PartKind::InboundPorts => "inbound_ports",
            PartKind::InboundRanges => "inbound_ranges",
            PartKind::Lookup => "sk_lookup",
            PartKind::Tcx => "tcx",
            PartKind::Reroute => "reroute",
            PartKind::Route => "route",
            PartKind::Rule => "rule",
            PartKind::DrainRoute => "drain_route",
            PartKind::DrainRule => "drain_rule",
            PartKind::Sysctl => "sysctl",
        }
    }
}

/// One thing that the kernel has, or should have, for an enrolled pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it is.
    pub kind: PartKind,
    /// Which one, where there are several: an address, an interface, a family, a sysctl.
    pub of: Option<String>,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            PartKind::Row => "capture of",
            PartKind::InboundPorts => "inbound ports",
            PartKind::InboundRanges => "inbound ranges",
            PartKind::DrainRoute => "drain route",
            PartKind::DrainRule => "drain rule",
            kind => kind.as_str(),
        };
        match &self.of {
            Some(of) => write!(f, "{kind} {of}"),
            None => f.write_str(kind),
        }
    }
}

/// What the kernel has for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// What is there.
    pub present: Vec<Part>,
    /// What is missing.
    pub missing: Vec<Part>,
}

impl Inspection {
    fn add(&mut self, present: bool, kind: PartKind, of: impl Into<Option<String>>) {
        let part = Part { kind, of: of.into() };
        if present { &mut self.present } else { &mut self.missing }.push(part);
    }
}

/// How much of the capture of a pod is there.
struct CaptureState {
    /// Every address's row is as the settings want it.
    all_rows: bool,
    /// Some address's row says that the pod is captured.
    any_row: bool,
    /// The rules and routes of each family.
    outbound: Vec<OutboundState>,
}

/// One row of the map `pods`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The pod's address.
    pub address: IpAddr,
    /// The inode number of its network namespace, 0 when not known.
    pub pod_id: PodId,
    /// Whether it is enrolled.
    pub enrolled: bool,
    /// Whether its new connections are redirected.
    pub capture: bool,
    /// What of its inbound connections is not, as bits of `POD_BYPASS_INBOUND`, `POD_INBOUND_RULES`.
    pub inbound: u32,
    /// Whether its DNS goes to the proxy's.
    pub dns: bool,
    /// The `membership::Reason`, as a number.
    pub reason: u32,
}

/// The programs, the maps and the pins below one directory of bpffs.
pub struct Dataplane {
    dir: PathBuf,
    kernel: Mutex<Kernel>,
}

impl Dataplane {
    /// Loads the programs and opens or creates the pinned maps; nothing is attached yet.
    ///
    /// # Errors
    ///
    /// When the kernel or the privileges do not allow it.
    pub fn open(options: &Options) -> Result<Self> {
        create_bpffs_dir(&options.bpffs_dir)?;
        let offsets = sockets::offsets()?;
        let grace =
            u64::try_from(options.proxy_grace.as_nanos()).context("use a proxy grace that long")?;
        let log = u8::from(options.log);
        let mut loader = EbpfLoader::new();
        loader
            .override_global("LOG", &log, true)
            .override_global("PROXY_GRACE_NS", &grace, true)
            .override_global("SOCK_OFFSETS", &offsets, true);
        for map in PINNED_MAPS {
            loader.map_pin_path(map, options.bpffs_dir.join(map));
        }
        let mut kernel = Kernel(loader.load(OBJECT).context("load the eBPF object")?);

        let btf = Btf::from_sys_fs().context("read the kernel's BTF")?;
        for name in TCX_PROGRAMS {
            kernel.classifier(name)?.load().with_context(|| format!("load program {name}"))?;
        }
        kernel.lookup()?.load().context("load program redirect_lookup")?;
        kernel.kubelet()?.load().context("load program note_kubelet")?;
        for name in ITERATORS {
            kernel
                .iterator(name)?
                .load("tcp", &btf)
                .with_context(|| format!("load program {name}"))?;
        }
        Ok(Self { dir: options.bpffs_dir.clone(), kernel: Mutex::new(kernel) })
    }

    /// The programs' log, when [`Options::log`] switched it on; whoever holds it reads and prints.
    ///
    /// # Errors
    ///
    /// When the log's ring buffer cannot be opened.
    pub fn logger(&self) -> Result<EbpfLogger<&'static dyn log::Log>> {
        EbpfLogger::init(&mut self.lock()?.0).context("open the log of the eBPF programs")
    }

    /// Step 1: everything is in place in the pod, nothing is redirected yet. On a pod that is
    /// captured already it only repairs what is missing, and makes the inbound settings those of
    /// `traffic`. `reason` is the `membership::Reason`, as a number, for whoever dumps the map `pods`.
    ///
    /// # Errors
    ///
    /// When a system call fails; what was set up so far stays, and calling again completes it.
    pub fn prepare(&self, pod: &PodNetns, reason: u32, traffic: &Traffic) -> Result<()> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        let links = PodLinks::new(&self.dir, pod.id());
        // The kernel gives a new namespace the number of one that is gone. Links that somebody has
        // detached look the same; then our sysctls are still there.
        if links.are_left()? && !pod.netns.run(sysctl::look_set)?? {
            kernel.forget(&links, pod.id())?;
        }
        // Before anything that has to be undone: by its directory a pod is found again.
        links.create_dir()?;
        // Before the rows that tell the programs to look into them.
        let inbound = inbound::flags(traffic);
        if inbound & POD_INBOUND_RULES != 0 {
            kernel.set_inbound(pod.id(), traffic)?;
        }
        // Before the links, so that the programs know the pod when they are attached.
        let mut pods = kernel.pods()?;
        let (pod_id, mut old) = (pod.id(), pods.rows()?);
        old.retain(|row| row.pod_id == pod_id);
        for &address in &pod.addresses {
            let was =
                |is: fn(&Row) -> bool| old.iter().any(|row| row.address == address && is(row));
            let capture = was(|row| row.capture);
            // Before the rule that brings the queries, and until that is gone: see `capture`.
            let dns = traffic.captures_dns() || was(|row| row.dns);
            pods.put(Row { address, pod_id, enrolled: true, capture, inbound, dns, reason })?;
        }
        for row in old.iter().filter(|row| !pod.addresses.contains(&row.address)) {
            pods.delete(row.address)?;
        }
        if inbound & POD_INBOUND_RULES == 0 {
            kernel.set_inbound(pod.id(), traffic)?;
        }
        // Nobody's connections but new ones are concerned: they need no switch.
        let captured = old.iter().any(|row| row.capture);
        let interfaces = pod.netns.run(|| Routing::open()?.interfaces())??;
        kernel.set_outbound(pod.id(), traffic)?;
        kernel.virtual_interfaces()?.set(pod.id(), &interfaces, traffic, captured)?;
        let saved = pod.netns.run(sysctl::read)??;
        kernel.save_sysctls(pod.id(), saved)?;

        links.ensure_lookup(kernel.lookup()?, &pod.netns)?;
        pod.netns.run(|| {
            sysctl::set()?;
            let routing = Routing::open()?;
            for (index, name) in interfaces {
                let program = if index == LOOPBACK_IFINDEX {
                    "redirect_lo"
                } else if kernel.virtual_interfaces()?.contains(pod_id, index)? {
                    "redirect_virt"
                } else {
                    "redirect_ext"
                };
                links.ensure_tcx(kernel.classifier(program)?, index, &name)?;
            }
            for source in pod.sources() {
                routing.add_keep(source, traffic)?;
            }
            Ok(())
        })?
    }

    /// Step 2: the pod's new connections are redirected as `traffic` says, and those that are open go
    /// on as they are. On a pod that is captured otherwise, it changes that. Returns when the switch
    /// has settled, less than half a second later.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn capture(&self, pod: &PodNetns, traffic: &Traffic) -> Result<()> {
        let mark = if self.partly_captured(pod)? { "mark_open" } else { "mark_all" };
        self.switch(pod, mark, |kernel| kernel.redirect(pod, traffic))
    }

    /// Step 2 for a pod that nothing runs in yet: no connection can be open, or half-way there, and
    /// nothing has to settle.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn capture_unused(&self, pod: &PodNetns, traffic: &Traffic) -> Result<()> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        pod.netns.run(|| kernel.redirect(pod, traffic))?
    }

    /// Lets the application bind ports that the proxy's accepted connections hold. To be called
    /// whenever the proxy has opened its listeners in the pod.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn proxy_listens(&self, pod: &PodNetns) -> Result<()> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        kernel.clear_proxy_missing(pod.id())?;
        pod.netns.run(|| sockets::iterate(kernel.iterator("reuse_addr")?))??;
        Ok(())
    }

    /// Step 3: the pod's new connections go direct; those that are redirected stay redirected.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn release(&self, pod: &PodNetns) -> Result<()> {
        self.switch(pod, "mark_all", |kernel| {
            kernel.put_all(pod, true, false)?;
            kernel.virtual_interfaces()?.release(pod.id())?;
            Routing::open()?.delete_capture()
        })
    }

    /// How many connections of a released pod are still redirected.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn redirected(&self, pod: &PodNetns) -> Result<usize> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        pod.netns.run(|| sockets::iterate(kernel.iterator("count_redir")?))?
    }

    /// Step 4: the pod is as it was before step 1. Its rows of `pods` stay, and say that it
    /// bypasses; [`Dataplane::forget`] deletes them.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn remove(&self, pod: &PodNetns) -> Result<()> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        // First, so that `sk_lookup` lets everything pass for as long as it still runs.
        kernel.put_all(pod, false, false)?;
        let saved = kernel.saved_sysctls()?.get(&pod.id(), 0);
        let saved = absent(saved).context("read map saved_sysctls")?;
        let links = PodLinks::new(&self.dir, pod.id());
        pod.netns.run(|| {
            let routing = Routing::open()?;
            routing.delete_all()?;
            Self::forget_istio_cni()?;
            links.detach()?;
            match saved {
                Some(saved) => sysctl::restore(&saved),
                None => Ok(()),
            }
        })??;
        kernel.delete_state(pod.id())?;
        // Last, so that a pod that was left half-way is found again.
        links.remove_dir()
    }

    /// Drops what the maps and bpffs hold for a pod whose namespace is gone.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn forget(&self, pod_id: PodId) -> Result<()> {
        self.lock()?.forget(&PodLinks::new(&self.dir, pod_id), pod_id)
    }

    /// What the kernel has for an enrolled pod with these settings, and what it lacks.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn inspect(&self, pod: &PodNetns, traffic: &Traffic) -> Result<Inspection> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        let mut found = Inspection::default();
        for &ip in &pod.addresses {
            let row = kernel.pods()?.row(ip)?;
            let capture = row.is_some_and(|r| r.enrolled && is_captured(&r, pod, traffic));
            found.add(capture, PartKind::Row, ip.to_string());
        }
        let rerouted = kernel.has_outbound(pod.id(), traffic)?;
        let (ports, ranges) = kernel.has_inbound(pod.id(), traffic)?;
        found.add(ports, PartKind::InboundPorts, None);
        found.add(ranges, PartKind::InboundRanges, None);
        let links = PodLinks::new(&self.dir, pod.id());
        pod.netns.run(|| {
            found.add(links.has_lookup(pod.id())?, PartKind::Lookup, None);
            let routing = Routing::open()?;
            for (index, name) in routing.interfaces()? {
                if traffic.reroutes(&name) {
                    let captured =
                        kernel.virtual_interfaces()?.is_captured(pod.id(), index, traffic)?;
                    found.add(captured && rerouted, PartKind::Reroute, name.clone());
                }
                found.add(links.has_tcx(index)?, PartKind::Tcx, name);
            }
            for source in pod.sources() {
                let family = || if source.is_ipv4() { "ipv4" } else { "ipv6" }.to_owned();
                let outbound = routing.outbound(source, traffic)?;
                found.add(outbound.routes, PartKind::Route, family());
                found.add(outbound.rules, PartKind::Rule, family());
                let (rule, route) = routing.has_keep(source, traffic)?;
                found.add(route, PartKind::DrainRoute, family());
                found.add(rule, PartKind::DrainRule, family());
            }
            for (name, right) in sysctl::check()? {
                found.add(right, PartKind::Sysctl, name.to_owned());
            }
            Ok(found)
        })?
    }

    /// Whether `lo` of the namespace is down, as when the runtime takes it apart: there is no route by
    /// it then, nor can one be added.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn lo_is_down(&self, pod: &PodNetns) -> Result<bool> {
        Ok(!pod.netns.run(|| Routing::open()?.has_lo())??)
    }

    /// Whether somebody listens where the proxy's DNS should, in either family.
    ///
    /// # Errors
    ///
    /// When the pod's sockets cannot be read.
    pub fn dns_listens(&self, pod: &PodNetns) -> Result<bool> {
        pod.netns.run(sockets::dns_listens)?
    }

    /// Whether the pod's new connections are redirected as `traffic` says, in both directions and all
    /// families.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn captured(&self, pod: &PodNetns, traffic: &Traffic) -> Result<bool> {
        let found = self.capture_state(pod, traffic)?;
        Ok(found.all_rows
            && found.outbound.iter().all(|outbound| outbound.rules && outbound.routes))
    }

    /// Whether some of the pod's new connections may be redirected.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn partly_captured(&self, pod: &PodNetns) -> Result<bool> {
        let found = self.capture_state(pod, &Traffic::default())?;
        Ok(found.any_row || found.outbound.iter().any(|outbound| outbound.any))
    }

    /// Drops what the maps and bpffs hold for namespaces that are dead, the pins of interfaces that
    /// are gone, and the rows of addresses that are neither `known` nor of a pod with links. A link
    /// that somebody has detached looks as if its namespace were dead: those that are known to be
    /// `alive` have to be named.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn sweep(&self, known: &BTreeSet<IpAddr>, alive: &BTreeSet<PodId>) -> Result<()> {
        for pod_id in self.linked_pods()? {
            // One lock, lest a new namespace of that number is set up in between.
            let mut locked = self.lock()?;
            let links = PodLinks::new(&self.dir, pod_id);
            if alive.contains(&pod_id) {
                links.prune_tcx()?;
            } else if links.are_dead()? {
                debug!("network namespace {pod_id} is dead");
                locked.forget(&links, pod_id)?;
            }
        }
        let linked = self.linked_pods()?;
        for row in self.rows()? {
            if !known.contains(&row.address) && !linked.contains(&row.pod_id) {
                self.delete_row(row.address)?;
            }
        }
        Ok(())
    }

    /// From now on, connections to pods that are opened in this cgroup of version 2, with this id,
    /// reach the application past the proxy; no other cgroup's do any more.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn follow_kubelet(&self, cgroup: &fs::File, id: u64) -> Result<()> {
        let mut locked = self.lock()?;
        KubeletLink::new(&self.dir).ensure(locked.kubelet()?, cgroup, id)
    }

    /// No cgroup's connections do any more.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn unfollow_kubelet(&self) -> Result<()> {
        let _locked = self.lock()?;
        KubeletLink::new(&self.dir).remove()
    }

    /// From now on, connections to pods that come from these ranges, and from no others, are taken
    /// for probes, and reach the application past the proxy.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn set_probe_sources(&self, ranges: &[IpNet]) -> Result<()> {
        let mut locked = self.lock()?;
        inbound::set_for_every_pod(&mut locked.map(INBOUND_RANGES)?, ranges)
    }

    /// The rows of the map `pods`.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn rows(&self) -> Result<Vec<Row>> {
        self.lock()?.pods()?.rows()
    }

    /// Enters or replaces the row of a pod that bypasses.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn put_bypass(&self, address: IpAddr, pod_id: PodId, reason: u32) -> Result<()> {
        let row = Row {
            address,
            pod_id,
            enrolled: false,
            capture: false,
            inbound: 0,
            dns: false,
            reason,
        };
        self.lock()?.pods()?.put(row)
    }

    /// Removes the row of a pod that bypasses, unless the address is another pod's by now.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn delete_bypass(&self, address: IpAddr, pod_id: PodId) -> Result<()> {
        let mut locked = self.lock()?;
        let mut pods = locked.pods()?;
        match pods.row(address)? {
            Some(row) if row.pod_id == pod_id && !row.enrolled => pods.delete(address),
            _ => Ok(()),
        }
    }

    /// Removes a row; one that is not there is no error.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn delete_row(&self, address: IpAddr) -> Result<()> {
        self.lock()?.pods()?.delete(address)
    }

    /// The pods that have links.
    ///
    /// # Errors
    ///
    /// When bpffs cannot be read.
    pub fn linked_pods(&self) -> Result<BTreeSet<PodId>> {
        let dir = self.dir.join("links");
        let entries = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries.with_context(|| format!("list {}", dir.display()))?,
        };
        let mut pods = BTreeSet::new();
        for entry in entries {
            pods.extend(entry?.file_name().to_str().and_then(|name| name.parse::<PodId>().ok()));
        }
        Ok(pods)
    }

    /// The counters of every pod, summed over the CPUs: pod → name → value.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn counters(&self) -> Result<BTreeMap<PodId, BTreeMap<&'static str, u64>>> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        let mut all: BTreeMap<PodId, BTreeMap<&'static str, u64>> = BTreeMap::new();
        for entry in kernel.counters()?.iter() {
            let (key, values) = entry.context("read map counters")?;
            if let Some((_, name)) = Counter::ALL.iter().find(|(c, _)| *c as u32 == key.counter) {
                all.entry(key.pod_id).or_default().insert(name, values.iter().sum());
            }
        }
        Ok(all)
    }

    /// Removes the pinned maps and the directory, if no pod is left in them.
    ///
    /// # Errors
    ///
    /// When bpffs cannot be written.
    pub fn unpin_if_unused(&self) -> Result<()> {
        let mut locked = self.lock()?;
        if !self.linked_pods()?.is_empty() || !locked.pods()?.rows()?.is_empty() {
            return Ok(());
        }
        // Also maps that only an older agent had.
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
            // Other versions of the layout, or the operator's own things, may be in it.
            let _in_use = fs::remove_dir(parent);
        }
        Ok(())
    }

    fn capture_state(&self, pod: &PodNetns, traffic: &Traffic) -> Result<CaptureState> {
        let rows: Vec<Option<Row>> = {
            let mut locked = self.lock()?;
            let pods = locked.pods()?;
            pod.addresses.iter().map(|ip| pods.row(*ip)).collect::<Result<_>>()?
        };
        let outbound = pod.netns.run(|| {
            let routing = Routing::open()?;
            pod.sources()
                .map(|source| routing.outbound(source, traffic))
                .collect::<Result<Vec<OutboundState>>>()
        })??;
        let captured = |row: &Row| row.pod_id == pod.id() && row.capture;
        Ok(CaptureState {
            all_rows: rows.iter().all(|row| row.is_some_and(|row| is_captured(&row, pod, traffic))),
            any_row: rows.iter().flatten().any(captured),
            outbound,
        })
    }

    /// Changes what of the pod is redirected, by `change`, which runs inside its namespace: every
    /// connection that is open keeps its way, and none is lost in the switch.
    ///
    /// Before the change the iterators mark the open connections by their way. Those that come into
    /// being between the two show their way by their packets, which `watch_sent` and
    /// `watch_received` note, and hold back on the other way, until their sockets are marked, too.
    fn switch(
        &self,
        pod: &PodNetns,
        mark: &'static str,
        change: impl FnOnce(&mut Kernel) -> Result<()> + Send,
    ) -> Result<()> {
        self.forget_transition(pod)?;
        let watch = self.watch(pod)?;
        {
            let mut locked = self.lock()?;
            let kernel = &mut *locked;
            pod.netns.run(|| {
                sockets::iterate(kernel.iterator("note_proxy")?)?;
                sockets::iterate(kernel.iterator(mark)?)?;
                change(kernel)
            })??;
        }
        for delay in SETTLE {
            thread::sleep(delay);
            let mut locked = self.lock()?;
            let kernel = &mut *locked;
            pod.netns.run(|| sockets::iterate(kernel.iterator("mark_noted")?))??;
        }
        drop(watch);
        self.forget_transition(pod)
    }

    /// Notes the flows of the pod's packets, and holds back those that change their way, until dropped.
    fn watch(&self, pod: &PodNetns) -> Result<Vec<SchedClassifierLink>> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        pod.netns.run(|| {
            let mut links = Vec::new();
            let mut attach = |program, interface: &str, at| -> Result<()> {
                links.push(attach_tcx(kernel.classifier(program)?, interface, at)?);
                Ok(())
            };
            for (index, name) in Routing::open()?.interfaces()? {
                if index == LOOPBACK_IFINDEX {
                    attach("watch_sent", &name, TcAttachType::Ingress)?;
                } else {
                    attach("watch_sent", &name, TcAttachType::Egress)?;
                    attach("watch_received", &name, TcAttachType::Ingress)?;
                }
            }
            Ok(links)
        })?
    }

    fn forget_transition(&self, pod: &PodNetns) -> Result<()> {
        let ours: Vec<Addr> = pod.addresses.iter().map(|ip| Addr::from(*ip)).collect();
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        let mut flows: HashMap<_, Flow, u32> = kernel.map(WAYS)?;
        let noted: Vec<Flow> = flows.keys().filter_map(Result::ok).collect();
        for flow in noted {
            if ours.contains(&flow.local) {
                absent(flows.remove(&flow)).context("write map ways")?;
            }
        }
        Ok(())
    }

    /// Takes the lock on the programs and maps, against other threads and other processes.
    fn lock(&self) -> Result<Locked<'_>> {
        let kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        let dir =
            fs::File::open(&self.dir).with_context(|| format!("open {}", self.dir.display()))?;
        let file = Flock::lock(dir, FlockArg::LockExclusive)
            .map_err(|(_, e)| anyhow!(e))
            .with_context(|| format!("lock {}", self.dir.display()))?;
        Ok(Locked { kernel, _file: file })
    }
}

/// The loaded programs and the open maps.
struct Kernel(Ebpf);

struct Locked<'a> {
    kernel: MutexGuard<'a, Kernel>,
    _file: Flock<fs::File>,
}

impl Deref for Locked<'_> {
    type Target = Kernel;

    fn deref(&self) -> &Kernel {
        &self.kernel
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Kernel {
        &mut self.kernel
    }
}

impl Kernel {
    fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        Ok(self.program(name)?.try_into()?)
    }

    fn lookup(&mut self) -> Result<&mut SkLookup> {
        Ok(self.program(LOOKUP_PROGRAM)?.try_into()?)
    }

    fn kubelet(&mut self) -> Result<&mut SockOps> {
        Ok(self.program(KUBELET_PROGRAM)?.try_into()?)
    }

    fn iterator(&mut self, name: &str) -> Result<&mut Iter> {
        Ok(self.program(name)?.try_into()?)
    }

    fn program(&mut self, name: &str) -> Result<&mut Program> {
        self.0.program_mut(name).with_context(|| format!("find program {name} in the eBPF object"))
    }

    fn map<'a, M>(&'a mut self, name: &str) -> Result<M>
    where
        M: TryFrom<&'a mut Map, Error = MapError>,
    {
        self.0
            .map_mut(name)
            .with_context(|| format!("find map {name} in the eBPF object"))?
            .try_into()
            .with_context(|| format!("open map {name}"))
    }

    fn pods(&mut self) -> Result<Pods<'_>> {
        self.map("pods").map(Pods)
    }

    fn counters(&mut self) -> Result<PerCpuHashMap<&mut MapData, CounterKey, u64>> {
        self.map("counters")
    }

    fn saved_sysctls(&mut self) -> Result<HashMap<&mut MapData, PodId, SavedSysctls>> {
        self.map("saved_sysctls")
    }

    /// Remembers the sysctls of a pod, unless that was done before.
    fn save_sysctls(&mut self, pod_id: PodId, values: SavedSysctls) -> Result<()> {
        const BPF_NOEXIST: u64 = 1;
        match self.saved_sysctls()?.insert(pod_id, values, BPF_NOEXIST) {
            Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(())
            }
            result => result.context("write map saved_sysctls"),
        }
    }

    /// Makes the entries of `inbound_ports` and `inbound_ranges` those of the settings.
    fn set_inbound(&mut self, pod_id: PodId, traffic: &Traffic) -> Result<()> {
        inbound::set::<PodPort>(&mut self.map(INBOUND_PORTS)?, pod_id, &PodPort::inbound(traffic))?;
        inbound::set::<PodPeer>(&mut self.map(INBOUND_RANGES)?, pod_id, &PodPeer::inbound(traffic))
    }

    /// Whether those entries are those of the settings: the ports', the ranges'.
    fn has_inbound(&mut self, pod_id: PodId, traffic: &Traffic) -> Result<(bool, bool)> {
        Ok((
            inbound::is_set::<PodPort>(
                &self.map(INBOUND_PORTS)?,
                pod_id,
                &PodPort::inbound(traffic),
            )?,
            inbound::is_set::<PodPeer>(
                &self.map(INBOUND_RANGES)?,
                pod_id,
                &PodPeer::inbound(traffic),
            )?,
        ))
    }

    /// Redirects the pod's new connections; called inside its namespace.
    fn redirect(&mut self, pod: &PodNetns, traffic: &Traffic) -> Result<()> {
        let routing = Routing::open()?;
        for source in pod.sources() {
            routing.set_outbound(source, traffic)?;
        }
        self.put_all(pod, true, true)?;
        let interfaces = routing.interfaces()?;
        self.virtual_interfaces()?.set(pod.id(), &interfaces, traffic, true)?;
        self.put_dns(pod, traffic.captures_dns())
    }

    fn virtual_interfaces(&mut self) -> Result<VirtualInterfaces<'_>> {
        self.map(VIRTUAL_INTERFACES).map(VirtualInterfaces)
    }

    /// Makes the entries of `outbound_ports` and `outbound_ranges` those of the settings.
    fn set_outbound(&mut self, pod_id: PodId, traffic: &Traffic) -> Result<()> {
        inbound::set::<PodPort>(
            &mut self.map(OUTBOUND_PORTS)?,
            pod_id,
            &PodPort::outbound(traffic),
        )?;
        inbound::set::<PodPeer>(
            &mut self.map(OUTBOUND_RANGES)?,
            pod_id,
            &PodPeer::outbound(traffic),
        )
    }

    /// Whether those entries are those of the settings.
    fn has_outbound(&mut self, pod_id: PodId, traffic: &Traffic) -> Result<bool> {
        let ports = PodPort::outbound(traffic);
        let ranges = PodPeer::outbound(traffic);
        Ok(inbound::is_set::<PodPort>(&self.map(OUTBOUND_PORTS)?, pod_id, &ports)?
            && inbound::is_set::<PodPeer>(&self.map(OUTBOUND_RANGES)?, pod_id, &ranges)?)
    }

    /// Changes the rows of a pod; why it is in the mesh or not stays as it is.
    fn put_all(&mut self, pod: &PodNetns, enrolled: bool, capture: bool) -> Result<()> {
        let mut pods = self.pods()?;
        for &address in &pod.addresses {
            let old = pods.row(address)?;
            let (inbound, reason) = old.map_or((0, 0), |row| (row.inbound, row.reason));
            let dns = enrolled && old.is_some_and(|row| row.dns);
            pods.put(Row { address, pod_id: pod.id(), enrolled, capture, inbound, dns, reason })?;
        }
        Ok(())
    }

    /// Says in the rows of a pod whether its DNS goes to the proxy's.
    fn put_dns(&mut self, pod: &PodNetns, dns: bool) -> Result<()> {
        let mut pods = self.pods()?;
        for &address in &pod.addresses {
            if let Some(row) = pods.row(address)? {
                pods.put(Row { dns, ..row })?;
            }
        }
        Ok(())
    }

    /// Drops all that is kept for a pod.
    fn forget(&mut self, links: &PodLinks, pod_id: PodId) -> Result<()> {
        links.detach()?;
        let mut pods = self.pods()?;
        for row in pods.rows()? {
            if row.pod_id == pod_id {
                pods.delete(row.address)?;
            }
        }
        self.delete_state(pod_id)?;
        links.remove_dir()
    }

    /// Deletes what is kept for a pod besides its rows of `pods`.
    fn delete_state(&mut self, pod_id: PodId) -> Result<()> {
        self.delete_counters(pod_id)?;
        self.clear_proxy_missing(pod_id)?;
        inbound::clear::<PodPort>(&mut self.map(INBOUND_PORTS)?, pod_id)?;
        inbound::clear::<PodPeer>(&mut self.map(INBOUND_RANGES)?, pod_id)?;
        inbound::clear::<PodPort>(&mut self.map(OUTBOUND_PORTS)?, pod_id)?;
        inbound::clear::<PodPeer>(&mut self.map(OUTBOUND_RANGES)?, pod_id)?;
        self.virtual_interfaces()?.clear(pod_id)?;
        self.clear_dns_flows(pod_id)?;
        absent(self.saved_sysctls()?.remove(&pod_id)).context("write map saved_sysctls")?;
        Ok(())
    }

    fn clear_dns_flows(&mut self, pod_id: PodId) -> Result<()> {
        let mut flows: HashMap<_, DnsKey, DnsFlow> = self.map(DNS_FLOWS)?;
        // An entry that the kernel puts in the place of another meanwhile ends the walk with an
        // error; what is left is overwritten or forgotten as any.
        let pods: Vec<DnsKey> = flows
            .iter()
            .filter_map(Result::ok)
            .filter(|(_, flow)| flow.pod_id == pod_id)
            .map(|(key, _)| key)
            .collect();
        for key in pods {
            absent(flows.remove(&key)).context("write map dns_flows")?;
        }
        Ok(())
    }

    fn clear_proxy_missing(&mut self, pod_id: PodId) -> Result<()> {
        let mut missing: HashMap<_, ListenerKey, u64> = self.map("proxy_missing")?;
        for kind in [LISTENER_OUTBOUND, LISTENER_INBOUND, LISTENER_HBONE] {
            absent(missing.remove(&ListenerKey { pod_id, kind }))
                .context("write map proxy_missing")?;
        }
        Ok(())
    }

    fn delete_counters(&mut self, pod_id: PodId) -> Result<()> {
        let mut counters = self.counters()?;
        for (counter, _) in Counter::ALL {
            absent(counters.remove(&CounterKey { pod_id, counter: counter as u32 }))
                .context("write map counters")?;
        }
        Ok(())
    }
}

/// The map `pods`, in user space's types.
struct Pods<'a>(HashMap<&'a mut MapData, Addr, PodEntry>);

impl Pods<'_> {
    fn row(&self, address: IpAddr) -> Result<Option<Row>> {
        let entry = absent(self.0.get(&address.into(), 0)).context("read map pods")?;
        Ok(entry.map(|entry| row(address, entry)))
    }

    fn rows(&self) -> Result<Vec<Row>> {
        self.0
            .iter()
            .map(|item| item.map(|(addr, entry)| row(addr.to_ip(), entry)).context("read map pods"))
            .collect()
    }

    fn put(&mut self, row: Row) -> Result<()> {
        let entry = PodEntry {
            pod_id: row.pod_id,
            decision: if row.enrolled { DECISION_ENROLLED } else { DECISION_BYPASS },
            reason: row.reason,
            flags: row.inbound
                | if row.capture { POD_CAPTURE } else { 0 }
                | if row.dns { POD_DNS } else { 0 },
        };
        self.0
            .insert(Addr::from(row.address), entry, 0)
            .with_context(|| format!("write {} to map pods", row.address))
    }

    fn delete(&mut self, address: IpAddr) -> Result<()> {
        absent(self.0.remove(&address.into())).context("write map pods").map(drop)
    }
}

/// Whether a row says that the pod is captured, with these settings.
fn is_captured(row: &Row, pod: &PodNetns, traffic: &Traffic) -> bool {
    row.pod_id == pod.id()
        && row.capture
        && row.inbound == inbound::flags(traffic)
        && row.dns == traffic.captures_dns()
}

fn row(address: IpAddr, entry: PodEntry) -> Row {
    Row {
        address,
        pod_id: entry.pod_id,
        enrolled: entry.decision == DECISION_ENROLLED,
        capture: entry.flags & POD_CAPTURE != 0,
        inbound: entry.flags & (POD_BYPASS_INBOUND | POD_INBOUND_RULES),
        dns: entry.flags & POD_DNS != 0,
        reason: entry.reason,
    }
}

/// What is not there is `None`, not an error.
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

/// Creates the agent's directory for root only; mounts bpffs first when its usual place has none.
fn create_bpffs_dir(dir: &Path) -> Result<()> {
    if dir.starts_with(BPFFS) && !is_bpffs(Path::new(BPFFS))? {
        debug!("mounting bpffs at {BPFFS}");
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
    Ok(fs.filesystem_type().0 == BPF_FS_MAGIC)
}

fn list(addresses: &[IpAddr]) -> String {
    match addresses {
        [] => "none".to_owned(),
        _ => addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", "),
    }
}
