//! The loaded programs and the open maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuHashMap, ProgramArray},
    programs::{Iter, Program, ProgramFd, SchedClassifier, SkLookup, SockOps},
};
use redirect_ebpf::abi::{
    Addr, Connection, Counter, CounterKey, HALF_OPEN_PLACES, HalfOpenKey, KernelOffsets,
    LISTENER_HBONE, LISTENER_INBOUND, LISTENER_OUTBOUND, ListenerKey, OwnAddress,
    POD_INBOUND_RULES, PodFlow, PodId, PodPeer, PodPort, SavedSysctls,
};

use super::{
    absent,
    dns_flows::{self, DNS_FLOWS},
    monotonic_ns,
    parts::{Inspection, PartKind},
    pod_netns::PodNetns,
    prefixes::{self, Entry as _},
    reroute::VirtualInterfaces,
    rows::{Pods, Row},
    stub,
};
use crate::{netns::Netns, traffic::Traffic};

/// The kernel programs, compiled by the build script.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect"));

/// The maps that outlive the agent.
pub(super) const PINNED_MAPS: [&str; 28] = [
    PODS,
    ADDRESSES,
    THIS_POD,
    PROGRAMS,
    STRAYS,
    ANY_STRAYS,
    "settled",
    HALF_OPEN,
    SWITCHES,
    NOTED,
    SWITCHING,
    "counters",
    "listeners",
    "proxy_cgroups",
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
    VERDICTS,
    VERDICTS_WANTED,
    VERDICTS_LOST,
];
const PODS: &str = "pods";
const HALF_OPEN: &str = "half_open";
const ADDRESSES: &str = "addresses";
const THIS_POD: &str = "this_pod";
const PROGRAMS: &str = "programs";
const STRAYS: &str = "strays";
const ANY_STRAYS: &str = "any_strays";
const WAYS: &str = "ways";
const SWITCHES: &str = "switches";
const NOTED: &str = "noted";
const SWITCHING: &str = "switching";
const INBOUND_PORTS: &str = "inbound_ports";
pub(super) const INBOUND_RANGES: &str = "inbound_ranges";
const OUTBOUND_PORTS: &str = "outbound_ports";
const OUTBOUND_RANGES: &str = "outbound_ranges";
const VIRTUAL_INTERFACES: &str = "virtual_ifs";
pub(super) const VERDICTS: &str = "verdicts";
pub(super) const VERDICTS_WANTED: &str = "verdicts_wanted";
pub(super) const VERDICTS_LOST: &str = "verdicts_lost";
pub(super) const TC_PROGRAMS: [&str; 5] =
    ["redirect_lo", "redirect_ext", "redirect_virt", "redirect_out", FIND_PROXY];
pub(super) const FIND_PROXY: &str = "find_proxy";
const LOOKUP_PROGRAM: &str = "redirect_lookup";
const KUBELET_PROGRAM: &str = "note_kubelet";
pub(super) const ITERATORS: [&str; 6] =
    ["note_proxy", "mark_all", "mark_open", "mark_noted", "count_redir", "reuse_addr"];

/// How long a switch keeps noting connections and holding back packets if nobody ends or extends it.
const SWITCH_NS: u64 = 2_000_000_000;

/// What the programs are told once, when they are loaded.
pub(super) struct Globals {
    pub(super) proxy_grace_ns: u64,
    pub(super) offsets: KernelOffsets,
}

/// A loaded program for interfaces.
pub(super) struct TcProgram {
    pub(super) name: &'static str,
    pub(super) fd: ProgramFd,
    /// The kernel's id of the program.
    pub(super) id: u32,
}

/// The loaded programs and the open maps.
pub(super) struct Kernel {
    pub(super) ebpf: Ebpf,
    /// What was counted for pods whose counters are deleted, by name.
    pub(super) departed: BTreeMap<&'static str, u64>,
}

/// Fails if a pinned map has another layout than the programs expect: the loader would use it anyway.
fn check_pins(dir: &Path) -> Result<()> {
    let object = aya_obj::Object::parse(OBJECT).context("read the eBPF object")?;
    for name in PINNED_MAPS {
        let path = dir.join(name);
        let wanted = object.maps.get(name).with_context(|| format!("find map {name}"))?;
        if !path.try_exists().with_context(|| format!("look for {}", path.display()))? {
            continue;
        }
        let found = MapInfo::from_pin(&path)
            .with_context(|| format!("open the pinned map {}", path.display()))?;
        let kind = found.map_type().map_or(u32::MAX, |kind| kind as u32);
        let found = [kind, found.key_size(), found.value_size(), found.max_entries()];
        let wanted =
            [wanted.map_type(), wanted.key_size(), wanted.value_size(), wanted.max_entries()];
        ensure!(
            found == wanted,
            "{} is a map of another layout (type, key, value, entries: {found:?}, and not {wanted:?}), which an agent of \
             another build has left: run that agent's `redirect-agent cleanup`, or give another --bpffs-dir",
            path.display()
        );
    }
    Ok(())
}

/// When a switch that begins or is extended now ends at the latest.
fn switch_end() -> Result<u64> {
    Ok(monotonic_ns()? + SWITCH_NS)
}

impl Kernel {
    pub(super) fn new(ebpf: Ebpf) -> Self {
        Self { ebpf, departed: BTreeMap::new() }
    }

    /// Loads the programs, and opens or creates the maps that are pinned in `dir`; nothing is attached
    /// yet.
    pub(super) fn load(dir: &Path, globals: &Globals) -> Result<Self> {
        check_pins(dir)?;
        let mut loader = EbpfLoader::new();
        loader
            // No program needs CO-RE relocations, and the kernel's BTF is large.
            .btf(None)
            .override_global("PROXY_GRACE_NS", &globals.proxy_grace_ns, true)
            .override_global("KERNEL_OFFSETS", &globals.offsets, true);
        for map in PINNED_MAPS {
            loader.map_pin_path(map, dir.join(map));
        }
        let ebpf = loader.load(OBJECT).context("load the eBPF object")?;
        let mut kernel = Self::new(ebpf);
        for name in TC_PROGRAMS {
            kernel.classifier(name)?.load().with_context(|| format!("load program {name}"))?;
        }
        kernel.lookup()?.load().context("load program redirect_lookup")?;
        kernel.share_lookup()?;
        kernel.kubelet()?.load().context("load program note_kubelet")?;
        let btf = Btf::from_sys_fs().context("read the kernel's BTF")?;
        for name in ITERATORS {
            let loaded = kernel.iterator(name)?.load("tcp", &btf);
            loaded.with_context(|| format!("load program {name}"))?;
        }
        kernel.end_switches()?;
        Ok(kernel)
    }

    /// The programs for interfaces, by name.
    pub(super) fn tc_programs(&mut self) -> Result<BTreeMap<&'static str, TcProgram>> {
        let mut programs = BTreeMap::new();
        for name in TC_PROGRAMS {
            programs.insert(name, self.tc_program(name)?);
        }
        Ok(programs)
    }

    /// One of them, loaded.
    pub(super) fn tc_program(&mut self, name: &'static str) -> Result<TcProgram> {
        let program = self.classifier(name)?;
        let id = program.info().with_context(|| format!("inspect program {name}"))?.id();
        let fd = program.fd()?.try_clone().with_context(|| format!("take program {name}"))?;
        Ok(TcProgram { name, fd, id })
    }

    pub(super) fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        Ok(self.program(name)?.try_into()?)
    }

    pub(super) fn lookup(&mut self) -> Result<&mut SkLookup> {
        Ok(self.program(LOOKUP_PROGRAM)?.try_into()?)
    }

    pub(super) fn kubelet(&mut self) -> Result<&mut SockOps> {
        Ok(self.program(KUBELET_PROGRAM)?.try_into()?)
    }

    pub(super) fn iterator(&mut self, name: &str) -> Result<&mut Iter> {
        Ok(self.program(name)?.try_into()?)
    }

    fn program(&mut self, name: &str) -> Result<&mut Program> {
        self.ebpf
            .program_mut(name)
            .with_context(|| format!("find program {name} in the eBPF object"))
    }

    pub(super) fn map<'a, M>(&'a mut self, name: &str) -> Result<M>
    where
        M: TryFrom<&'a mut Map, Error = MapError>,
    {
        self.ebpf
            .map_mut(name)
            .with_context(|| format!("find map {name} in the eBPF object"))?
            .try_into()
            .with_context(|| format!("open map {name}"))
    }

    /// Makes the pods' own programs call this agent's shared program.
    pub(super) fn share_lookup(&mut self) -> Result<()> {
        let program = self.lookup()?.fd()?.try_clone().context("take program redirect_lookup")?;
        let mut programs: ProgramArray<&mut MapData> = self.map(PROGRAMS)?;
        programs.set(stub::SHARED, &program, 0).context("write map programs")
    }

    /// Loads the pod's own program.
    pub(super) fn load_stub(&self, netns: &Netns) -> Result<OwnedFd> {
        let fd = |name: &str| -> Result<OwnedFd> {
            let map = self.ebpf.map(name).with_context(|| format!("find map {name}"))?;
            let (Map::PerCpuArray(map) | Map::ProgramArray(map)) = map else {
                bail!("map {name} has another type");
            };
            map.fd().as_fd().try_clone_to_owned().with_context(|| format!("take map {name}"))
        };
        let (this_pod, programs) = (fd(THIS_POD)?, fd(PROGRAMS)?);
        stub::load(netns.inode(), this_pod.as_fd(), programs.as_fd())
            .context("load the sk_lookup program of the pod")
    }

    /// The kernel's id of the map `programs`, by which this agent's own programs are told from another's.
    pub(super) fn programs_map(&self) -> Result<u32> {
        match self.ebpf.map(PROGRAMS) {
            Some(Map::ProgramArray(map)) => Ok(map.info().context("inspect map programs")?.id()),
            _ => bail!("map programs is missing"),
        }
    }

    pub(super) fn pods(&mut self) -> Result<Pods<'_>> {
        self.map(PODS).map(Pods)
    }

    fn addresses(&mut self) -> Result<HashMap<&mut MapData, OwnAddress, u32>> {
        self.map(ADDRESSES)
    }

    /// Writes the pod's entries, or those that have changed, before any of its programs runs.
    pub(super) fn enter(
        &mut self,
        pod: &PodNetns,
        reason: u32,
        traffic: &Traffic,
        interfaces: &BTreeMap<u32, String>,
    ) -> Result<()> {
        // Before the row, which tells the programs to look into these maps.
        let rules = prefixes::flags(traffic);
        self.set_outbound(pod.id(), traffic)?;
        if rules & POD_INBOUND_RULES != 0 {
            self.set_inbound(pod.id(), traffic)?;
        }
        // Before the links, so that the programs know the pod when they are attached.
        self.set_addresses(pod)?;
        let old = self.pods()?.row(pod.id())?.unwrap_or_default();
        let Row { capture, captured_at_ns, dns, .. } = old;
        let row = Row { enrolled: true, capture, captured_at_ns, rules, dns, reason, ..pod.row() };
        self.pods()?.put(pod.id(), row)?;
        if rules & POD_INBOUND_RULES == 0 {
            self.set_inbound(pod.id(), traffic)?;
        }
        // Affects new connections only, so it needs no switch.
        self.virtual_interfaces()?.set(pod.id(), interfaces, traffic, old.capture)
    }

    /// Whether [`Kernel::enter`] changes the settings of a captured pod.
    pub(super) fn changes_captured(&mut self, pod: &PodNetns, traffic: &Traffic) -> Result<bool> {
        let Some(row) = self.pods()?.row(pod.id())?.filter(|row| row.capture) else {
            return Ok(false);
        };
        let same = row.rules == prefixes::flags(traffic)
            && self.has_inbound(pod.id(), traffic)? == (true, true)
            && self.has_outbound(pod.id(), traffic)?;
        Ok(!same)
    }

    /// Checks what the maps should have for a pod besides its row.
    pub(super) fn inspect(
        &mut self,
        pod: &PodNetns,
        traffic: &Traffic,
        found: &mut Inspection,
    ) -> Result<()> {
        let missing = self.missing_addresses(pod)?;
        for ip in pod.own_addresses() {
            found.add(!missing.contains(&ip), PartKind::Address, ip.to_string());
        }
        found.add(self.has_outbound(pod.id(), traffic)?, PartKind::Outbound, None);
        let (ports, ranges) = self.has_inbound(pod.id(), traffic)?;
        found.add(ports, PartKind::InboundPorts, None);
        found.add(ranges, PartKind::InboundRanges, None);
        Ok(())
    }

    /// Updates the pod's addresses in the map to those that it has.
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

    /// Begins a switch: from now on the programs note which path each of the pod's connections takes. One that
    /// is running goes on: what was noted stays true.
    pub(super) fn begin_switch(&mut self, pod_id: PodId) -> Result<()> {
        let until = absent(self.switches()?.get(&pod_id, 0)).context("read map switches")?;
        let now = monotonic_ns()?;
        if until.is_none_or(|until| until <= now) {
            self.end_switch(pod_id)?;
            // This comes first: the programs note nothing for a pod without a count.
            self.noted()?.insert(pod_id, 0, 0).context("write map noted")?;
        }
        self.switches()?.insert(pod_id, switch_end()?, 0).context("write map switches")?;
        self.count_switches()
    }

    /// Extends the switch, if one is running.
    pub(super) fn continue_switch(&mut self, pod_id: PodId) -> Result<()> {
        const BPF_EXIST: u64 = 2;
        let continued = self.switches()?.insert(pod_id, switch_end()?, BPF_EXIST);
        absent(continued).map(drop).context("write map switches")
    }

    /// Whether the programs have noted connections of the pod.
    pub(super) fn has_noted(&mut self, pod_id: PodId) -> Result<bool> {
        let noted = absent(self.noted()?.get(&pod_id, 0)).context("read map noted")?;
        Ok(noted.is_some_and(|noted| noted > 0))
    }

    /// Ends the switch and forgets what was noted.
    pub(super) fn end_switch(&mut self, pod_id: PodId) -> Result<()> {
        absent(self.switches()?.remove(&pod_id)).context("write map switches")?;
        self.count_switches()?;
        absent(self.noted()?.remove(&pod_id)).context("write map noted")?;
        // Whatever the count says: a program that was still running may have noted one more.
        let mut ways: HashMap<_, PodFlow, u32> = self.map(WAYS)?;
        let keys = ways.keys().filter_map(Result::ok);
        let noted: Vec<PodFlow> = keys.filter(|key| key.pod_id == pod_id).collect();
        for key in noted {
            absent(ways.remove(&key)).context("write map ways")?;
        }
        Ok(())
    }

    /// Ends switches that a killed process left behind.
    fn end_switches(&mut self) -> Result<()> {
        let left: Vec<PodId> = self.switches()?.keys().filter_map(Result::ok).collect();
        left.into_iter().try_for_each(|pod_id| self.end_switch(pod_id))?;
        self.count_switches()
    }

    fn switches(&mut self) -> Result<HashMap<&mut MapData, PodId, u64>> {
        self.map(SWITCHES)
    }

    fn noted(&mut self) -> Result<HashMap<&mut MapData, PodId, u32>> {
        self.map(NOTED)
    }

    /// Tells the programs whether they have to look into `switches`.
    fn count_switches(&mut self) -> Result<()> {
        let count = self.switches()?.keys().filter_map(Result::ok).count();
        let mut switching: Array<_, u32> = self.map(SWITCHING)?;
        switching.set(0, u32::try_from(count)?, 0).context("write map switching")
    }

    pub(super) fn counters(&mut self) -> Result<PerCpuHashMap<&mut MapData, CounterKey, u64>> {
        self.map("counters")
    }

    pub(super) fn saved_sysctls(&mut self) -> Result<HashMap<&mut MapData, PodId, SavedSysctls>> {
        self.map("saved_sysctls")
    }

    /// Saves the sysctls of a pod, unless they are saved already.
    pub(super) fn save_sysctls(&mut self, pod_id: PodId, values: SavedSysctls) -> Result<()> {
        const BPF_NOEXIST: u64 = 1;
        match self.saved_sysctls()?.insert(pod_id, values, BPF_NOEXIST) {
            Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(())
            }
            result => result.context("write map saved_sysctls"),
        }
    }

    /// Replaces the pod's entries of `inbound_ports` and `inbound_ranges` by those of the settings.
    fn set_inbound(&mut self, pod_id: PodId, traffic: &Traffic) -> Result<()> {
        prefixes::set::<PodPort>(
            &mut self.map(INBOUND_PORTS)?,
            pod_id,
            &PodPort::inbound(traffic),
        )?;
        prefixes::set::<PodPeer>(&mut self.map(INBOUND_RANGES)?, pod_id, &PodPeer::inbound(traffic))
    }

    /// Whether these entries match the settings: ports, ranges.
    fn has_inbound(&mut self, pod_id: PodId, traffic: &Traffic) -> Result<(bool, bool)> {
        Ok((
            prefixes::is_set::<PodPort>(
                &self.map(INBOUND_PORTS)?,
                pod_id,
                &PodPort::inbound(traffic),
            )?,
            prefixes::is_set::<PodPeer>(
                &self.map(INBOUND_RANGES)?,
                pod_id,
                &PodPeer::inbound(traffic),
            )?,
        ))
    }

    pub(super) fn virtual_interfaces(&mut self) -> Result<VirtualInterfaces<'_>> {
        self.map(VIRTUAL_INTERFACES).map(VirtualInterfaces)
    }

    /// Replaces the pod's entries of `outbound_ports` and `outbound_ranges` by those of the settings.
    fn set_outbound(&mut self, pod_id: PodId, traffic: &Traffic) -> Result<()> {
        prefixes::set::<PodPort>(
            &mut self.map(OUTBOUND_PORTS)?,
            pod_id,
            &PodPort::outbound(traffic),
        )?;
        prefixes::set::<PodPeer>(
            &mut self.map(OUTBOUND_RANGES)?,
            pod_id,
            &PodPeer::outbound(traffic),
        )
    }

    /// Whether these entries match the settings.
    fn has_outbound(&mut self, pod_id: PodId, traffic: &Traffic) -> Result<bool> {
        let ports = PodPort::outbound(traffic);
        let ranges = PodPeer::outbound(traffic);
        Ok(prefixes::is_set::<PodPort>(&self.map(OUTBOUND_PORTS)?, pod_id, &ports)?
            && prefixes::is_set::<PodPeer>(&self.map(OUTBOUND_RANGES)?, pod_id, &ranges)?)
    }

    /// Deletes what the maps have for a pod besides its row in `pods`.
    pub(super) fn delete_state(&mut self, pod_id: PodId) -> Result<()> {
        self.delete_addresses(|key| key.pod_id == pod_id)?;
        self.end_switch(pod_id)?;
        self.forget_strays(pod_id)?;
        self.delete_counters(pod_id)?;
        self.clear_proxy_missing(pod_id)?;
        prefixes::clear::<PodPort>(&mut self.map(INBOUND_PORTS)?, pod_id)?;
        prefixes::clear::<PodPeer>(&mut self.map(INBOUND_RANGES)?, pod_id)?;
        prefixes::clear::<PodPort>(&mut self.map(OUTBOUND_PORTS)?, pod_id)?;
        prefixes::clear::<PodPeer>(&mut self.map(OUTBOUND_RANGES)?, pod_id)?;
        self.virtual_interfaces()?.clear(pod_id)?;
        dns_flows::clear(&mut self.map(DNS_FLOWS)?, pod_id)?;
        self.clear_half_open(pod_id)?;
        absent(self.saved_sysctls()?.remove(&pod_id)).context("write map saved_sysctls")?;
        Ok(())
    }

    /// Clears `any_strays` with the last pod that has strays, so that packets no longer pay for the lookup.
    fn forget_strays(&mut self, pod_id: PodId) -> Result<()> {
        absent(self.strays()?.remove(&pod_id)).context("write map strays")?;
        if self.any_strays()? {
            return Ok(());
        }
        self.set_any_strays(0)?;
        // A program adds its pod to `strays` first, and then sets this.
        if self.any_strays()? { self.set_any_strays(1) } else { Ok(()) }
    }

    fn strays(&mut self) -> Result<HashMap<&mut MapData, PodId, u32>> {
        self.map(STRAYS)
    }

    fn any_strays(&mut self) -> Result<bool> {
        Ok(self.strays()?.keys().next().is_some())
    }

    fn set_any_strays(&mut self, any: u32) -> Result<()> {
        let mut map: Array<_, u32> = self.map(ANY_STRAYS)?;
        map.set(0, any, 0).context("write map any_strays")
    }

    fn clear_half_open(&mut self, pod_id: PodId) -> Result<()> {
        let mut connections: HashMap<_, HalfOpenKey, Connection> = self.map(HALF_OPEN)?;
        for place in 0..u32::from(HALF_OPEN_PLACES) {
            absent(connections.remove(&HalfOpenKey { pod_id, place }))
                .context("write map half_open")?;
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
        for (counter, name) in Counter::ALL {
            let key = CounterKey { pod_id, counter: counter as u32 };
            let mut counters = self.counters()?;
            let last = absent(counters.get(&key, 0)).context("read map counters")?;
            absent(counters.remove(&key)).context("write map counters")?;
            if let Some(values) = last {
                *self.departed.entry(name).or_default() += values.iter().sum::<u64>();
            }
        }
        Ok(())
    }

    /// Every count, summed over the CPUs: the pod, the counter's name, how often.
    pub(super) fn counts(&mut self) -> Result<Vec<(PodId, &'static str, u64)>> {
        let mut counts = Vec::new();
        for entry in self.counters()?.iter() {
            let (key, values) = entry.context("read map counters")?;
            if let Some((_, name)) = Counter::ALL.iter().find(|(c, _)| *c as u32 == key.counter) {
                counts.push((key.pod_id, *name, values.iter().sum()));
            }
        }
        Ok(counts)
    }
}
