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
pub mod stub;
mod sys;
mod sysctl;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::IpAddr,
    ops::{Deref, DerefMut},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, PerCpuHashMap, ProgramArray},
    programs::{
        Iter, Program, SchedClassifier, SkLookup, SockOps, TcAttachType, tc::SchedClassifierLink,
    },
};
use aya_log::EbpfLogger;
use ipnet::IpNet;
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::{statfs::statfs, time::TimeValLike as _},
    time::{ClockId, clock_gettime},
};
use redirect_ebpf::abi::{
    ABI_VERSION, Addr, Counter, CounterKey, DECISION_BYPASS, DECISION_ENROLLED, DnsFlow, DnsKey,
    LISTENER_HBONE, LISTENER_INBOUND, LISTENER_OUTBOUND, ListenerKey, OwnAddress,
    POD_BYPASS_INBOUND, POD_CAPTURE, POD_DNS, POD_INBOUND_RULES, POD_OUTBOUND_RULES, PORT_HBONE,
    PORT_INBOUND, PORT_OUTBOUND, PodEntry, PodFlow, PodId, PodPeer, PodPort, SavedSysctls,
};
use tracing::debug;

use self::{
    inbound::Entry as _,
    links::{KubeletLink, PodLinks, attach_tcx, tcx_directions},
    reroute::VirtualInterfaces,
    routes::{Address, LOOPBACK_IFINDEX, OutboundState, Routing},
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
const PINNED_MAPS: [&str; 21] = [
    PODS,
    ADDRESSES,
    THIS_POD,
    PROGRAMS,
    STRAYS,
    "any_strays",
    "settled",
    WAY_COUNTS,
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
const PODS: &str = "pods";
const ADDRESSES: &str = "addresses";
const THIS_POD: &str = "this_pod";
const PROGRAMS: &str = "programs";
const STRAYS: &str = "strays";
const WAYS: &str = "ways";
const WAY_COUNTS: &str = "way_counts";
const DNS_FLOWS: &str = "dns_flows";
const INBOUND_PORTS: &str = "inbound_ports";
const INBOUND_RANGES: &str = "inbound_ranges";
const OUTBOUND_PORTS: &str = "outbound_ports";
const OUTBOUND_RANGES: &str = "outbound_ranges";
const VIRTUAL_INTERFACES: &str = "virtual_ifs";
const TCX_PROGRAMS: [&str; 7] = [
    "redirect_lo",
    "redirect_ext",
    "redirect_virt",
    "redirect_out",
    "watch_sent",
    "watch_received",
    FIND_PROXY,
];
const FIND_PROXY: &str = "find_proxy";
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

/// How many addresses of a pod are known to be its own. A call of the pod to another one of its own
/// goes by the proxy.
const POD_ADDRESSES: usize = 64;

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
    /// Its addresses: first those that the cluster knows it by, then any others that it can be called
    /// at from elsewhere.
    pub addresses: Vec<IpAddr>,
    /// Every address in the namespace: what the pod sends there stays there.
    found: Vec<Address>,
    /// The interfaces whose addresses are not among `addresses`: they may be the same in many pods.
    virtual_interfaces: Vec<String>,
}

impl PodNetns {
    /// Looks up the addresses inside the namespace.
    ///
    /// # Errors
    ///
    /// When the namespace carries no address, or lacks one of `known`: then it is not that pod's.
    pub fn new(netns: Netns, known: &[IpAddr]) -> Result<Self> {
        let pod = Self::existing(netns)?;
        let path = pod.netns.path().display();
        if let Some(ip) = known.iter().find(|ip| !pod.addresses.contains(ip)) {
            bail!("{path} does not carry address {ip}; it has {}", list(&pod.addresses));
        }
        if pod.addresses.is_empty() {
            bail!("{path} has no address besides loopback");
        }
        Ok(pod.known_first(known))
    }

    /// The same pod without the addresses of its virtual interfaces, but for `known` ones.
    pub fn without(self, virtual_interfaces: &[String], known: &[IpAddr]) -> Self {
        Self { virtual_interfaces: virtual_interfaces.to_vec(), ..self }.known_first(known)
    }

    /// For a namespace that is to be put back, whatever addresses it has by now.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn existing(netns: Netns) -> Result<Self> {
        let found = addresses_in(&netns)?;
        let (addresses, virtual_interfaces) = (Vec::new(), Vec::new());
        Ok(Self { netns, addresses, found, virtual_interfaces }.known_first(&[]))
    }

    fn known_first(self, known: &[IpAddr]) -> Self {
        Self { addresses: self.reachable(known), ..self }
    }

    /// Those of `found` that others can call, the `known` ones first.
    fn reachable(&self, known: &[IpAddr]) -> Vec<IpAddr> {
        let found = &self.found;
        let is_known = |address: &&Address| known.contains(&address.ip);
        let of_pod = |address: &&Address| {
            let elsewhere = address.interface == LOOPBACK_IFINDEX
                || self.virtual_interfaces.contains(&address.name);
            address.global && !elsewhere && !is_known(address)
        };
        let first = known.iter().filter(|ip| found.iter().any(|address| address.ip == **ip));
        let then = found.iter().filter(of_pod).map(|address| &address.ip);
        let mut addresses = Vec::new();
        for ip in first.chain(then) {
            if !addresses.contains(ip) {
                addresses.push(*ip);
            }
        }
        addresses
    }

    /// Whether the namespace has other addresses now, and still all of `known`.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn has_changed(&self, known: &[IpAddr]) -> Result<bool> {
        let set = |found: &[Address]| found.iter().map(|address| address.ip).collect();
        let (now, before): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) =
            (set(&addresses_in(&self.netns)?), set(&self.found));
        Ok(known.iter().all(|ip| now.contains(ip)) && now != before)
    }

    fn id(&self) -> PodId {
        self.netns.inode()
    }

    /// The first address of each family.
    fn sources(&self) -> impl Iterator<Item = IpAddr> {
        first_of_each(&self.addresses).into_iter().flatten()
    }

    /// The addresses that the programs know it by: not more than it may have.
    fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let found: BTreeSet<IpAddr> = self.found.iter().map(|address| address.ip).collect();
        let others = found.into_iter().filter(|ip| !self.addresses.contains(ip));
        self.addresses.iter().copied().chain(others).take(POD_ADDRESSES)
    }

    /// What of its row is known by the namespace alone.
    fn row(&self) -> Row {
        let [v4, v6] = first_of_each(&self.addresses);
        let of_first = self.found.iter().find(|found| self.addresses.first() == Some(&found.ip));
        let uplink = of_first.map_or(0, |found| found.interface);
        Row { uplink, v4, v6, ..Row::default() }
    }
}

fn addresses_in(netns: &Netns) -> Result<Vec<Address>> {
    netns.run(|| Routing::open()?.addresses())?
}

/// A kind of thing that the kernel has for an enrolled pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    /// The row of the map `pods`.
    Row,
    /// The entry of an address in the map `addresses`.
    Address,
    /// The inbound settings of ports in the map `inbound_ports`.
    InboundPorts,
    /// The inbound settings of ranges in the map `inbound_ranges`.
    InboundRanges,
    /// The outbound settings in the maps `outbound_ports` and `outbound_ranges`.
    Outbound,
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
    /// That no rule of others comes before ours.
    RuleOrder,
    /// A sysctl.
    Sysctl,
}

impl PartKind {
    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            PartKind::Row => "row",
            PartKind::Address => "address",
            PartKind::InboundPorts => "inbound_ports",
            PartKind::InboundRanges => "inbound_ranges",
            PartKind::Outbound => "outbound",
            PartKind::Lookup => "sk_lookup",
            PartKind::Tcx => "tcx",
            PartKind::Reroute => "reroute",
            PartKind::Route => "route",
            PartKind::Rule => "rule",
            PartKind::DrainRoute => "drain_route",
            PartKind::DrainRule => "drain_rule",
            PartKind::RuleOrder => "rule_order",
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
            PartKind::Row => "capture",
            PartKind::InboundPorts => "inbound ports",
            PartKind::InboundRanges => "inbound ranges",
            PartKind::Outbound => "outbound exclusions",
            PartKind::DrainRoute => "drain route",
            PartKind::DrainRule => "drain rule",
            PartKind::RuleOrder => "precedence of our rules",
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
    /// The pod's row.
    row: Option<Row>,
    /// The rules and routes of each family.
    outbound: Vec<OutboundState>,
}

/// One row of the map `pods`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Whether the pod is enrolled.
    pub enrolled: bool,
    /// Whether its new connections are redirected.
    pub capture: bool,
    /// What of them is not, as bits of `POD_BYPASS_INBOUND`, `POD_INBOUND_RULES`,
    /// `POD_OUTBOUND_RULES`.
    pub rules: u32,
    /// Whether its DNS goes to the proxy's.
    pub dns: bool,
    /// The `membership::Reason`, as a number.
    pub reason: u32,
    /// The index of the interface that leads out of it.
    pub uplink: u32,
    /// When the capture began, ns of CLOCK_MONOTONIC; 0 where no connection is older.
    pub captured_at_ns: u64,
    /// Its first IPv4 address.
    pub v4: Option<IpAddr>,
    /// Its first IPv6 address.
    pub v6: Option<IpAddr>,
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
        kernel.share_lookup()?;
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
        // Before the row that tells the programs to look into them.
        let rules = inbound::flags(traffic);
        kernel.set_outbound(pod.id(), traffic)?;
        if rules & POD_INBOUND_RULES != 0 {
            kernel.set_inbound(pod.id(), traffic)?;
        }
        // Before the links, so that the programs know the pod when they are attached.
        kernel.set_addresses(pod)?;
        let old = kernel.pods()?.row(pod.id())?.unwrap_or_default();
        let Row { capture, captured_at_ns, dns, .. } = old;
        let row = Row { enrolled: true, capture, captured_at_ns, rules, dns, reason, ..pod.row() };
        kernel.pods()?.put(pod.id(), row)?;
        if rules & POD_INBOUND_RULES == 0 {
            kernel.set_inbound(pod.id(), traffic)?;
        }
        // Affects new connections only, so it needs no switch.
        let interfaces = pod.netns.run(|| Routing::open()?.interfaces())??;
        kernel.virtual_interfaces()?.set(pod.id(), &interfaces, traffic, old.capture)?;
        let saved = pod.netns.run(sysctl::read)??;
        kernel.save_sysctls(pod.id(), saved)?;

        links.ensure_lookup(&pod.netns, || kernel.load_stub(&pod.netns))?;
        pod.netns.run(|| {
            sysctl::set()?;
            let routing = Routing::open()?;
            // Before the guard, which relies on them.
            for source in pod.sources() {
                routing.add_keep(source, traffic)?;
            }
            for (index, name) in interfaces {
                for &at in tcx_directions(index) {
                    let program = if at == TcAttachType::Egress {
                        "redirect_out"
                    } else if index == LOOPBACK_IFINDEX {
                        "redirect_lo"
                    } else if kernel.virtual_interfaces()?.contains(pod.id(), index)? {
                        "redirect_virt"
                    } else {
                        "redirect_ext"
                    };
                    links.ensure_tcx(kernel.classifier(program)?, (index, &name), at)?;
                }
            }
            routing.precede_foreign_rules()
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
        self.switch(pod, mark, |kernel| kernel.redirect(pod, traffic, monotonic_ns()?))
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
        pod.netns.run(|| kernel.redirect(pod, traffic, 0))?
    }

    /// Makes the proxy's listeners known to the programs, and lets the application bind ports that the
    /// proxy's accepted connections hold. To be called whenever the proxy has opened its listeners in
    /// the pod. Returns the ports that it does not listen on.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn proxy_listens(&self, pod: &PodNetns) -> Result<Vec<u16>> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        pod.netns.run(|| {
            let found = sockets::find_proxy(kernel.classifier(FIND_PROXY)?)?;
            sockets::iterate(kernel.iterator("reuse_addr")?)?;
            let ports = [
                (LISTENER_OUTBOUND, PORT_OUTBOUND),
                (LISTENER_INBOUND, PORT_INBOUND),
                (LISTENER_HBONE, PORT_HBONE),
            ];
            let missing = ports.into_iter().filter(|(kind, _)| found & (1 << kind) == 0);
            Ok(missing.map(|(_, port)| port).collect())
        })?
    }

    /// Step 3: the pod's new connections go direct; those that are redirected stay redirected.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn release(&self, pod: &PodNetns) -> Result<()> {
        self.switch(pod, "mark_all", |kernel| {
            kernel.pods()?.change(pod.id(), |row| Row {
                capture: false,
                captured_at_ns: 0,
                ..row
            })?;
            kernel.virtual_interfaces()?.release(pod.id())?;
            Routing::open()?.delete_capture()?;
            // Last: a connection to a resolver that the capture rule brings to `lo` is one for the DNS.
            kernel.pods()?.change(pod.id(), |row| Row { dns: false, ..row })
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

    /// Step 4: the pod is as it was before step 1. Its row of `pods` stays, and says that it
    /// bypasses; [`Dataplane::forget`] deletes it.
    ///
    /// # Errors
    ///
    /// When a system call fails; calling again completes it.
    pub fn remove(&self, pod: &PodNetns) -> Result<()> {
        let mut locked = self.lock()?;
        let kernel = &mut *locked;
        // First, so that the programs let everything pass for as long as they still run.
        let bypass =
            |row| Row { enrolled: false, capture: false, captured_at_ns: 0, dns: false, ..row };
        kernel.pods()?.change(pod.id(), bypass)?;
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
        let row = kernel.pods()?.row(pod.id())?;
        found.add(row.is_some_and(|row| is_captured(&row, traffic)), PartKind::Row, None);
        let missing = kernel.missing_addresses(pod)?;
        for ip in pod.own_addresses() {
            found.add(!missing.contains(&ip), PartKind::Address, ip.to_string());
        }
        found.add(kernel.has_outbound(pod.id(), traffic)?, PartKind::Outbound, None);
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
                    found.add(captured, PartKind::Reroute, name.clone());
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
            found.add(!routing.has_foreign_rules()?, PartKind::RuleOrder, None);
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
        Ok(found.row.is_some_and(|row| is_captured(&row, traffic))
            && found.outbound.iter().all(|outbound| outbound.rules && outbound.routes))
    }

    /// Whether some of the pod's new connections may be redirected.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn partly_captured(&self, pod: &PodNetns) -> Result<bool> {
        let found = self.capture_state(pod, &Traffic::default())?;
        Ok(found.row.is_some_and(|row| row.capture)
            || found.outbound.iter().any(|outbound| outbound.any))
    }

    /// Drops what the maps and bpffs hold for namespaces that are dead, the pins of interfaces that
    /// are gone, and the rows of pods that are neither `known` nor have links. A link that somebody has
    /// detached looks as if its namespace were dead: those that are known to be `alive` have to be
    /// named.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn sweep(&self, known: &BTreeSet<PodId>, alive: &BTreeSet<PodId>) -> Result<()> {
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
        let mut locked = self.lock()?;
        let linked = self.linked_pods()?;
        let mut pods = locked.pods()?;
        for pod_id in pods.ids()? {
            if !known.contains(&pod_id) && !linked.contains(&pod_id) {
                pods.delete(pod_id)?;
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

    /// Enters or replaces the row of a pod that bypasses.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn put_bypass(&self, pod_id: PodId, addresses: &[IpAddr], reason: u32) -> Result<()> {
        let [v4, v6] = first_of_each(addresses);
        self.lock()?.pods()?.put(pod_id, Row { reason, v4, v6, ..Row::default() })
    }

    /// Removes the row of a pod that bypasses.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn delete_bypass(&self, pod_id: PodId) -> Result<()> {
        let mut locked = self.lock()?;
        let mut pods = locked.pods()?;
        match pods.row(pod_id)? {
            Some(row) if !row.enrolled => pods.delete(pod_id),
            _ => Ok(()),
        }
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
        if !self.linked_pods()?.is_empty() || !locked.pods()?.ids()?.is_empty() {
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
        let row = self.lock()?.pods()?.row(pod.id())?;
        let outbound = pod.netns.run(|| {
            let routing = Routing::open()?;
            pod.sources()
                .map(|source| routing.outbound(source, traffic))
                .collect::<Result<Vec<OutboundState>>>()
        })??;
        Ok(CaptureState { row, outbound })
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
        self.begin_transition(pod)?;
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
        self.lock()?.forget_ways(pod.id())
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

    /// From now on ways are noted.
    fn begin_transition(&self, pod: &PodNetns) -> Result<()> {
        let mut locked = self.lock()?;
        locked.forget_ways(pod.id())?;
        let mut counts: HashMap<_, PodId, u32> = locked.map(WAY_COUNTS)?;
        counts.insert(pod.id(), 0, 0).context("write map way_counts")
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

    /// From now on the pods' own programs call ours.
    fn share_lookup(&mut self) -> Result<()> {
        let program = self.lookup()?.fd()?.try_clone().context("take program redirect_lookup")?;
        let mut programs: ProgramArray<&mut MapData> = self.map(PROGRAMS)?;
        programs.set(stub::SHARED, &program, 0).context("write map programs")
    }

    /// Loads the pod's own program.
    fn load_stub(&self, netns: &Netns) -> Result<OwnedFd> {
        let fd = |name: &str| -> Result<OwnedFd> {
            let map = self.0.map(name).with_context(|| format!("find map {name}"))?;
            let (Map::PerCpuArray(map) | Map::ProgramArray(map)) = map else {
                bail!("map {name} has another type");
            };
            map.fd().as_fd().try_clone_to_owned().with_context(|| format!("take map {name}"))
        };
        let (this_pod, programs) = (fd(THIS_POD)?, fd(PROGRAMS)?);
        stub::load(netns.inode(), this_pod.as_fd(), programs.as_fd())
            .context("load the sk_lookup program of the pod")
    }

    fn pods(&mut self) -> Result<Pods<'_>> {
        self.map(PODS).map(Pods)
    }

    fn addresses(&mut self) -> Result<HashMap<&mut MapData, OwnAddress, u32>> {
        self.map(ADDRESSES)
    }

    /// Makes the addresses that are known to be the pod's those that it has.
    fn set_addresses(&mut self, pod: &PodNetns) -> Result<()> {
        let pod_id = pod.id();
        let mut addresses = self.addresses()?;
        for ip in pod.own_addresses() {
            let key = OwnAddress { pod_id, addr: ip.into() };
            addresses.insert(key, 1, 0).with_context(|| format!("write {ip} to map addresses"))?;
        }
        let wanted: Vec<Addr> = pod.own_addresses().map(Addr::from).collect();
        self.delete_addresses(|key| key.pod_id == pod_id && !wanted.contains(&key.addr))
    }

    fn delete_addresses(&mut self, which: impl Fn(&OwnAddress) -> bool) -> Result<()> {
        let mut addresses = self.addresses()?;
        let keys: Vec<OwnAddress> = addresses.keys().filter_map(Result::ok).filter(which).collect();
        for key in keys {
            absent(addresses.remove(&key)).context("write map addresses")?;
        }
        Ok(())
    }

    fn missing_addresses(&mut self, pod: &PodNetns) -> Result<BTreeSet<IpAddr>> {
        let addresses = self.addresses()?;
        let mut missing = BTreeSet::new();
        for ip in pod.own_addresses() {
            let key = OwnAddress { pod_id: pod.id(), addr: ip.into() };
            if absent(addresses.get(&key, 0)).context("read map addresses")?.is_none() {
                missing.insert(ip);
            }
        }
        Ok(missing)
    }

    /// Forgets which way the pod's flows go, and notes no more of them.
    fn forget_ways(&mut self, pod_id: PodId) -> Result<()> {
        let mut counts: HashMap<_, PodId, u32> = self.map(WAY_COUNTS)?;
        absent(counts.remove(&pod_id)).context("write map way_counts")?;
        let mut ways: HashMap<_, PodFlow, u32> = self.map(WAYS)?;
        let keys = ways.keys().filter_map(Result::ok);
        let noted: Vec<PodFlow> = keys.filter(|key| key.pod_id == pod_id).collect();
        for key in noted {
            absent(ways.remove(&key)).context("write map ways")?;
        }
        Ok(())
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

    /// Redirects the pod's new connections, from `since` on, or since ever where that is 0; called inside
    /// its namespace.
    fn redirect(&mut self, pod: &PodNetns, traffic: &Traffic, since: u64) -> Result<()> {
        let routing = Routing::open()?;
        let dns = traffic.captures_dns();
        // Before the rule that brings connections to resolvers to `lo`.
        self.pods()?.change(pod.id(), |row| Row { dns: dns || row.dns, ..row })?;
        for source in pod.sources() {
            routing.set_outbound(source, traffic)?;
        }
        routing.precede_foreign_rules()?;
        self.pods()?.change(pod.id(), |row| {
            let captured_at_ns = if row.capture { row.captured_at_ns } else { since };
            Row { enrolled: true, capture: true, captured_at_ns, dns, ..row }
        })?;
        let interfaces = routing.interfaces()?;
        self.virtual_interfaces()?.set(pod.id(), &interfaces, traffic, true)
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

    /// Drops all that is kept for a pod.
    fn forget(&mut self, links: &PodLinks, pod_id: PodId) -> Result<()> {
        links.detach()?;
        self.pods()?.delete(pod_id)?;
        self.delete_state(pod_id)?;
        links.remove_dir()
    }

    /// Deletes what is kept for a pod besides its row of `pods`.
    fn delete_state(&mut self, pod_id: PodId) -> Result<()> {
        self.delete_addresses(|key| key.pod_id == pod_id)?;
        self.forget_ways(pod_id)?;
        let mut strays: HashMap<_, PodId, u32> = self.map(STRAYS)?;
        absent(strays.remove(&pod_id)).context("write map strays")?;
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
        let keys = flows.keys().filter_map(Result::ok);
        let pods: Vec<DnsKey> = keys.filter(|key| key.pod_id == pod_id).collect();
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
struct Pods<'a>(HashMap<&'a mut MapData, PodId, PodEntry>);

impl Pods<'_> {
    fn row(&self, pod_id: PodId) -> Result<Option<Row>> {
        let entry = absent(self.0.get(&pod_id, 0)).context("read map pods")?;
        Ok(entry.map(Row::from))
    }

    fn ids(&self) -> Result<Vec<PodId>> {
        self.0.keys().map(|id| id.context("read map pods")).collect()
    }

    fn put(&mut self, pod_id: PodId, row: Row) -> Result<()> {
        self.0
            .insert(pod_id, PodEntry::from(row), 0)
            .with_context(|| format!("write pod {pod_id} to map pods"))
    }

    /// Changes the row of a pod; what `change` leaves stays as it is.
    fn change(&mut self, pod_id: PodId, change: impl FnOnce(Row) -> Row) -> Result<()> {
        let old = self.row(pod_id)?.unwrap_or_default();
        self.put(pod_id, change(old))
    }

    fn delete(&mut self, pod_id: PodId) -> Result<()> {
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
fn is_captured(row: &Row, traffic: &Traffic) -> bool {
    row.enrolled
        && row.capture
        && row.rules == inbound::flags(traffic)
        && row.dns == traffic.captures_dns()
}

/// What the programs have as `bpf_ktime_get_ns`.
fn monotonic_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the clock")?;
    u64::try_from(now.num_nanoseconds()).context("read the clock")
}

/// The first address of each family: IPv4, IPv6.
fn first_of_each(addresses: &[IpAddr]) -> [Option<IpAddr>; 2] {
    let first = |v4| addresses.iter().find(|ip| ip.is_ipv4() == v4).copied();
    [first(true), first(false)]
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
