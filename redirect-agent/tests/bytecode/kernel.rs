//! The programs in the kernel, with maps of their own that are pinned nowhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues,
        ProgramArray, RingBuf,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{ProgramFd, SchedClassifier, SkLookup, TcAttachType, tc::qdisc_add_clsact},
    util::nr_cpus,
};
use redirect_agent::dataplane::{OBJECT, sock_offsets, stub};
use redirect_ebpf::abi::{
    self, Addr, Counter, CounterKey, DnsFlow, DnsKey, EVERY_POD, Flow, HINT_NONE, Hint,
    ListenerKey, OwnAddress, PREFIX_BYPASS, PREFIX_REDIRECT, PodEntry, PodId, PodPeer, PodPort,
    QUESTION_AT, ThisPod, VerdictEvent, VirtualInterface,
};

use crate::{
    packet::LINK_HEADER,
    sys::{self, Insn},
    world::{Key as PodAndKind, LEASES, Listener, NOW, Since, set_own_device},
};

/// Longer than any machine takes for one step of the test.
const GRACE_NS: u64 = 600_000_000_000;
/// Longer than any DNS flow is kept for its own sake.
const LONG_NS: u64 = 3_600_000_000_000;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
/// Length of `struct __sk_buff`, and where its `mark` is. Source: Linux `include/uapi/linux/bpf.h`.
const SK_BUFF: usize = 192;
const SK_BUFF_MARK: std::ops::Range<usize> = 8..12;
/// Length of `struct bpf_sk_lookup`. Source: Linux `include/uapi/linux/bpf.h`.
const SK_LOOKUP: usize = 72;

/// Where a tcx program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tcx {
    Lo,
    Interface,
    Virtual,
    /// Egress of an interface.
    Out,
}

/// What a tcx program has done.
pub struct RanTcx {
    pub ret: u32,
    pub mark: u32,
    pub packet: Vec<u8>,
}

/// What the `sk_lookup` program has done.
pub struct RanLookup {
    pub ret: u32,
    /// Of the socket that it has chosen.
    pub cookie: Option<u64>,
}

pub struct Kernel {
    tcx: BTreeMap<Tcx, ProgramFd>,
    find_proxy: ProgramFd,
    /// The program that the pods' own call.
    shared: ProgramFd,
    /// The pods' own.
    lookups: BTreeMap<PodId, OwnedFd>,
    this_pod: PerCpuArray<MapData, ThisPod>,
    /// Emptied by the kernel when nobody has it open.
    programs: ProgramArray<MapData>,
    /// By protocol (TCP) and family (IPv4).
    ask: BTreeMap<(bool, bool), OwnedFd>,
    pub maps: Maps,
    ebpf: Ebpf,
}

impl Kernel {
    /// Loads the programs, and one of their own for `pods`; that does nothing before [`Self::share`].
    pub fn load(cpu: usize, pods: &[PodId]) -> Result<Self> {
        let mut ebpf = load()?;
        let programs = [
            (Tcx::Lo, "redirect_lo"),
            (Tcx::Interface, "redirect_ext"),
            (Tcx::Virtual, "redirect_virt"),
            (Tcx::Out, "redirect_out"),
        ];
        let tcx = programs.into_iter().map(|(at, name)| Ok((at, classifier(&mut ebpf, name)?)));
        let tcx = tcx.collect::<Result<_>>()?;
        let (this_pod, programs) = (map_fd(&ebpf, "this_pod")?, map_fd(&ebpf, "programs")?);
        let own = |pod_id: &PodId| {
            let program = stub::load(*pod_id, this_pod.as_fd(), programs.as_fd());
            Ok((*pod_id, program.with_context(|| format!("load the program of pod {pod_id}"))?))
        };
        let kernel = Self {
            tcx,
            find_proxy: classifier(&mut ebpf, "find_proxy")?,
            shared: lookup(&mut ebpf)?,
            lookups: pods.iter().map(own).collect::<Result<_>>()?,
            this_pod: ebpf.take_map("this_pod").context("find map this_pod")?.try_into()?,
            programs: ebpf.take_map("programs").context("find map programs")?.try_into()?,
            ask: [(true, true), (true, false), (false, true), (false, false)]
                .into_iter()
                .map(|(tcp, v4)| Ok(((tcp, v4), sys::load_tc(&ask(tcp, v4))?)))
                .collect::<io::Result<_>>()
                .context("load the questions")?,
            maps: Maps::take(&mut ebpf, cpu)?,
            ebpf,
        };
        // A question leaves a hint, which has the device.
        kernel.find_proxy()?;
        let hint = kernel.maps.last_hint()?;
        set_own_device(hint.device);
        Ok(kernel)
    }

    /// From here on the pods' own programs call the shared one.
    pub fn share(&mut self) -> Result<()> {
        self.programs.set(stub::SHARED, &self.shared, 0).context("write map programs")
    }

    /// And from here on there is none.
    pub fn unshare(&mut self) -> Result<()> {
        self.programs.clear_index(&stub::SHARED).context("write map programs")
    }

    /// The kernel asks the pod's program for listeners in this namespace, as long as the link is held.
    pub fn attach_lookup(&self, pod_id: PodId, netns: &File) -> Result<OwnedFd> {
        let program = self.lookups[&pod_id].as_fd();
        sys::link_lookup(program, netns.as_fd()).context("attach the pod's program")
    }

    /// Attaches the guard where packets leave by an interface.
    pub fn attach_guard(&mut self, interface: &str) -> Result<()> {
        let program: &mut SchedClassifier =
            self.ebpf.program_mut("redirect_out").context("find redirect_out")?.try_into()?;
        // Where there is no tcx, aya makes a filter of it, which needs this.
        qdisc_add_clsact(interface).context("make a clsact qdisc")?;
        program.attach(interface, TcAttachType::Egress).context("attach redirect_out")?;
        Ok(())
    }

    /// Runs `find_proxy`; gives a bit for each listener that it has found.
    pub fn find_proxy(&self) -> Result<u32> {
        let mut packet = [0; LINK_HEADER + 40];
        let found = abi::find_proxy(|question| {
            packet[QUESTION_AT..QUESTION_AT + 4].copy_from_slice(&question.to_ne_bytes());
            let ran = sys::run(self.find_proxy.as_fd(), &packet, &[0; SK_BUFF], 1)?;
            io::Result::Ok(ran.ret.cast_signed())
        });
        found.context("run find_proxy")
    }

    /// Runs a tcx program; `None` when the kernel does not take so short a packet.
    pub fn run_tcx(&self, at: Tcx, packet: &[u8], mark: u32, times: u32) -> Result<Option<RanTcx>> {
        let program = &self.tcx[&at];
        let mut context = [0; SK_BUFF];
        context[SK_BUFF_MARK].copy_from_slice(&mark.to_ne_bytes());
        match sys::run(program.as_fd(), packet, &context, times) {
            // A link header, and an IPv6 header at most.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && packet.len() < LINK_HEADER + 40 => {
                Ok(None)
            }
            result => {
                let sys::Ran { ret, packet, context } = result.context("run a tcx program")?;
                let mark = u32::from_ne_bytes(array(&context[SK_BUFF_MARK])?);
                Ok(Some(RanTcx { ret, mark, packet }))
            }
        }
    }

    /// Runs a pod's `sk_lookup` program for a packet that did not come in on `lo`.
    pub fn run_lookup(&self, pod_id: PodId, v4: bool, tcp: bool, flow: &Flow) -> Result<RanLookup> {
        run_lookup(self.lookups[&pod_id].as_fd(), v4, tcp, flow)
    }

    /// Runs the shared program as if it were attached itself, where another context is noted.
    pub fn run_shared(&mut self, pod_id: PodId, tcp: bool, flow: &Flow) -> Result<RanLookup> {
        let this = ThisPod { context: u64::MAX, pod_id, padding: 0 };
        let cpus = nr_cpus().map_err(|(_, e)| e).context("count the CPUs")?;
        self.this_pod.set(0, PerCpuValues::try_from(vec![this; cpus])?, 0)?;
        run_lookup(self.shared.as_fd(), flow.local.is_v4(), tcp, flow)
    }
    /// Lets the kernel look for the socket of a flow that comes in on `lo`; gives its local port.
    pub fn ask_on_lo(&self, tcp: bool, flow: &Flow) -> Result<Option<u16>> {
        let skip = if flow.local.is_v4() { 12 } else { 0 };
        let program = &self.ask[&(tcp, skip == 12)];
        let mut packet = vec![0; LINK_HEADER];
        packet.extend(&flow.remote.octets[skip..]);
        packet.extend(&flow.local.octets[skip..]);
        packet.extend(flow.remote_port.to_be_bytes());
        packet.extend(flow.local_port.to_be_bytes());
        let ran = sys::run(program.as_fd(), &packet, &[0; SK_BUFF], 1).context("ask on lo")?;
        let port = u16::try_from(ran.ret).with_context(|| format!("ask on lo: {:#x}", ran.ret))?;
        Ok((port != 0).then_some(port))
    }
}

fn run_lookup(program: BorrowedFd<'_>, v4: bool, tcp: bool, flow: &Flow) -> Result<RanLookup> {
    let mut context = [0; SK_LOOKUP];
    let mut put = |at: usize, bytes: &[u8]| context[at..at + bytes.len()].copy_from_slice(bytes);
    put(8, &(if v4 { AF_INET } else { AF_INET6 }).to_ne_bytes());
    put(12, &(if tcp { IPPROTO_TCP } else { IPPROTO_UDP }).to_ne_bytes());
    if v4 {
        put(16, &flow.remote.octets[12..]);
        put(40, &flow.local.octets[12..]);
    } else {
        put(20, &flow.remote.octets);
        put(44, &flow.local.octets);
    }
    put(36, &flow.remote_port.to_be_bytes());
    put(60, &u32::from(flow.local_port).to_ne_bytes());
    let ran = sys::run(program, &[], &context, 1).context("run redirect_lookup")?;
    let cookie = u64::from_ne_bytes(array(&ran.context[..8])?);
    Ok(RanLookup { ret: ran.ret, cookie: (cookie != 0).then_some(cookie) })
}

fn load() -> Result<Ebpf> {
    let offsets = sock_offsets()?;
    EbpfLoader::new()
        .override_global("PROXY_GRACE_NS", &GRACE_NS, true)
        .override_global("KERNEL_OFFSETS", &offsets, true)
        .load(OBJECT)
        .context("load the eBPF object")
}

/// How many instructions the kernel's verifier looks at for each program of an interface: those of every
/// path that it cannot prune.
pub fn verified() -> Result<Vec<(&'static str, u32)>> {
    let mut ebpf = load()?;
    let names = ["redirect_lo", "redirect_ext", "redirect_virt", "redirect_out", "find_proxy"];
    let verified = names.into_iter().map(|name| {
        let begun = Instant::now();
        classifier(&mut ebpf, name)?;
        let program: &SchedClassifier =
            ebpf.program(name).with_context(|| format!("find {name}"))?.try_into()?;
        let count = program.info()?.verified_instruction_count().context("Linux before 5.16")?;
        println!("{name}: {count} instructions, {:?}", begun.elapsed());
        Ok((name, count))
    });
    verified.collect()
}

fn classifier(ebpf: &mut Ebpf, name: &str) -> Result<ProgramFd> {
    let program: &mut SchedClassifier =
        ebpf.program_mut(name).with_context(|| format!("find {name}"))?.try_into()?;
    program.load().with_context(|| format!("load {name}"))?;
    Ok(program.fd()?.try_clone()?)
}

fn lookup(ebpf: &mut Ebpf) -> Result<ProgramFd> {
    let program: &mut SkLookup =
        ebpf.program_mut("redirect_lookup").context("find redirect_lookup")?.try_into()?;
    program.load().context("load redirect_lookup")?;
    Ok(program.fd()?.try_clone()?)
}

fn map_fd(ebpf: &Ebpf, name: &str) -> Result<OwnedFd> {
    let map = ebpf.map(name).with_context(|| format!("find map {name}"))?;
    let (Map::PerCpuArray(map) | Map::ProgramArray(map)) = map else {
        anyhow::bail!("map {name} has another type");
    };
    Ok(map.fd().as_fd().try_clone_to_owned()?)
}

/// A `tc` program that lets the kernel look for a TCP or UDP socket by the `struct bpf_sock_tuple`
/// behind the packet's link header, and returns the socket's local port, or 0.
fn ask(tcp: bool, v4: bool) -> [Insn; 20] {
    let len = if v4 { 12 } else { 36 };
    const SKB_LOAD_BYTES: i32 = 26;
    const SKC_LOOKUP_TCP: i32 = 99;
    const SK_LOOKUP_UDP: i32 = 85;
    const SK_RELEASE: i32 = 86;
    const BPF_SOCK_SRC_PORT: i16 = 44;
    let insn = |code: u8, dst: u8, src: u8, off: i16, imm: i32| -> Insn {
        let [o0, o1] = off.to_ne_bytes();
        let [i0, i1, i2, i3] = imm.to_ne_bytes();
        [code, src << 4 | dst, o0, o1, i0, i1, i2, i3]
    };
    let copy = |dst, src| insn(0xbf, dst, src, 0, 0);
    let set = |dst, imm| insn(0xb7, dst, 0, 0, imm);
    let add = |dst, imm| insn(0x07, dst, 0, 0, imm);
    let call = |helper| insn(0x85, 0, 0, 0, helper);
    [
        copy(6, 1),
        set(2, LINK_HEADER as i32),
        copy(3, 10),
        add(3, -40),
        set(4, len),
        call(SKB_LOAD_BYTES),
        // Not loaded: return the error.
        insn(0x55, 0, 0, 12, 0),
        copy(1, 6),
        copy(2, 10),
        add(2, -40),
        set(3, len),
        // BPF_F_CURRENT_NETNS
        set(4, -1),
        set(5, 0),
        call(if tcp { SKC_LOOKUP_TCP } else { SK_LOOKUP_UDP }),
        // Nothing found: return 0.
        insn(0x15, 0, 0, 4, 0),
        insn(0x61, 7, 0, BPF_SOCK_SRC_PORT, 0),
        copy(1, 0),
        call(SK_RELEASE),
        copy(0, 7),
        insn(0x95, 0, 0, 0, 0),
    ]
}

/// The maps of the programs.
pub struct Maps {
    cpu: usize,
    pods: HashMap<MapData, PodId, PodEntry>,
    addresses: HashMap<MapData, OwnAddress, u32>,
    counters: PerCpuHashMap<MapData, CounterKey, u64>,
    listeners: HashMap<MapData, ListenerKey, u64>,
    proxy_cgroups: HashMap<MapData, u64, u64>,
    missing: HashMap<MapData, ListenerKey, u64>,
    hint: PerCpuArray<MapData, Hint>,
    inbound_ports: LpmTrie<MapData, PodPort, u32>,
    inbound_ranges: LpmTrie<MapData, PodPeer, u32>,
    outbound_ports: LpmTrie<MapData, PodPort, u32>,
    outbound_ranges: LpmTrie<MapData, PodPeer, u32>,
    virtual_interfaces: HashMap<MapData, VirtualInterface, u32>,
    dns_flows: HashMap<MapData, DnsKey, DnsFlow>,
    kubelet_flows: HashMap<MapData, Flow, u64>,
    any_strays: Array<MapData, u32>,
    strays: HashMap<MapData, PodId, u32>,
    verdicts_wanted: Array<MapData, u64>,
    verdicts: RingBuf<MapData>,
    /// Those of what was counted last.
    told: Vec<VerdictEvent>,
}

impl Maps {
    fn take(ebpf: &mut Ebpf, cpu: usize) -> Result<Self> {
        let mut map = |name: &str| -> Result<Map> {
            ebpf.take_map(name).with_context(|| format!("find map {name}"))
        };
        Ok(Self {
            cpu,
            pods: map("pods")?.try_into()?,
            addresses: map("addresses")?.try_into()?,
            counters: map("counters")?.try_into()?,
            listeners: match map("listeners")? {
                // aya's type has values of 4 bytes.
                Map::SockHash(map) => Map::HashMap(map).try_into()?,
                other => bail!("listeners is {other:?}"),
            },
            proxy_cgroups: map("proxy_cgroups")?.try_into()?,
            missing: map("proxy_missing")?.try_into()?,
            hint: map("hints")?.try_into()?,
            inbound_ports: map("inbound_ports")?.try_into()?,
            inbound_ranges: map("inbound_ranges")?.try_into()?,
            outbound_ports: map("outbound_ports")?.try_into()?,
            outbound_ranges: map("outbound_ranges")?.try_into()?,
            virtual_interfaces: map("virtual_ifs")?.try_into()?,
            dns_flows: map("dns_flows")?.try_into()?,
            kubelet_flows: map("kubelet_flows")?.try_into()?,
            any_strays: map("any_strays")?.try_into()?,
            strays: map("strays")?.try_into()?,
            verdicts_wanted: map("verdicts_wanted")?.try_into()?,
            verdicts: map("verdicts")?.try_into()?,
            told: Vec::new(),
        })
    }

    /// The pods that there are, and their addresses.
    pub fn enter(
        &mut self,
        pods: &BTreeMap<PodId, PodEntry>,
        addresses: &BTreeSet<OwnAddress>,
    ) -> Result<()> {
        pods.iter().try_for_each(|(pod_id, entry)| self.pods.insert(pod_id, entry, 0))?;
        addresses.iter().try_for_each(|address| self.addresses.insert(address, 1, 0))?;
        Ok(())
    }

    /// The cgroups whose sockets are the proxy's if they have its mark.
    pub fn trust(&mut self, cgroups: &[u64]) -> Result<()> {
        for id in self.proxy_cgroups.keys().collect::<Result<Vec<_>, _>>()? {
            self.proxy_cgroups.remove(&id)?;
        }
        Ok(cgroups.iter().try_for_each(|id| self.proxy_cgroups.insert(id, 0, 0))?)
    }

    /// What is kept off the proxy of a pod: a port, a peer. All around them is redirected.
    pub fn exclude(&mut self, pod_id: PodId, excluded: (Option<u16>, Option<Addr>)) -> Result<()> {
        let (port, peer) = excluded;
        let all = Key::new(PodPort::PREFIX, PodPort::new(pod_id, 0));
        self.inbound_ports.insert(&all, PREFIX_REDIRECT, 0)?;
        if let Some(port) = port {
            let key = Key::new(PodPort::BITS, PodPort::new(pod_id, port));
            self.inbound_ports.insert(&key, PREFIX_BYPASS, 0)?;
        }
        if let Some(peer) = peer {
            let key = Key::new(PodPeer::BITS, PodPeer { pod_id, peer });
            self.inbound_ranges.insert(&key, PREFIX_BYPASS, 0)?;
        }
        Ok(())
    }

    /// The virtual interface, which test runs are on, and whom its guests call past the proxy: at a
    /// port, an address.
    pub fn set_virtual(
        &mut self,
        pod_id: PodId,
        flags: Option<u32>,
        (port, peer): (Option<u16>, Option<Addr>),
    ) -> Result<()> {
        // The kernel lets them come in on the namespace's `lo`.
        let key = VirtualInterface { pod_id, index: 1 };
        if let Some(flags) = flags {
            self.virtual_interfaces.insert(key, flags, 0)?;
        }
        if let Some(port) = port {
            let key = Key::new(PodPort::BITS, PodPort::new(pod_id, port));
            self.outbound_ports.insert(&key, PREFIX_BYPASS, 0)?;
        }
        if let Some(peer) = peer {
            let key = Key::new(PodPeer::BITS, PodPeer { pod_id, peer });
            self.outbound_ranges.insert(&key, PREFIX_BYPASS, 0)?;
        }
        Ok(())
    }

    /// Where probes come from.
    pub fn set_probe_source(&mut self, peer: Addr) -> Result<()> {
        let key = Key::new(PodPeer::BITS, PodPeer { pod_id: EVERY_POD, peer });
        Ok(self.inbound_ranges.insert(&key, PREFIX_BYPASS, 0)?)
    }

    /// The one connection of kubelet's that is noted.
    pub fn set_kubelets(&mut self, flow: &Flow, since: Since) -> Result<()> {
        self.clear_kubelets()?;
        let age = if since == Since::Now { 0 } else { LONG_NS };
        // See `set_missing`.
        Ok(self.kubelet_flows.insert(flow, sys::now().wrapping_sub(age), 0)?)
    }

    fn clear_kubelets(&mut self) -> Result<()> {
        for flow in self.kubelet_flows.keys().collect::<Result<Vec<_>, _>>()? {
            self.kubelet_flows.remove(&flow)?;
        }
        Ok(())
    }

    /// Empties all of them.
    pub fn clear(&mut self) -> Result<()> {
        for pod_id in self.pods.keys().collect::<Result<Vec<_>, _>>()? {
            self.pods.remove(&pod_id)?;
        }
        for address in self.addresses.keys().collect::<Result<Vec<_>, _>>()? {
            self.addresses.remove(&address)?;
        }
        self.set_strays(&BTreeSet::new(), false)?;
        for key in self.inbound_ports.keys().collect::<Result<Vec<_>, _>>()? {
            self.inbound_ports.remove(&key)?;
        }
        for key in self.inbound_ranges.keys().collect::<Result<Vec<_>, _>>()? {
            self.inbound_ranges.remove(&key)?;
        }
        for key in self.outbound_ports.keys().collect::<Result<Vec<_>, _>>()? {
            self.outbound_ports.remove(&key)?;
        }
        for key in self.outbound_ranges.keys().collect::<Result<Vec<_>, _>>()? {
            self.outbound_ranges.remove(&key)?;
        }
        for key in self.virtual_interfaces.keys().collect::<Result<Vec<_>, _>>()? {
            self.virtual_interfaces.remove(&key)?;
        }
        self.clear_kubelets()?;
        for key in self.listeners()? {
            self.set_listener(key, None)?;
        }
        for key in self.dns_flows.keys().collect::<Result<Vec<_>, _>>()? {
            self.dns_flows.remove(&key)?;
        }
        for key in self.missing()?.into_keys() {
            self.set_missing(key, None)?;
        }
        Ok(())
    }

    pub fn set_hint(&mut self, hint: Hint) -> Result<()> {
        let cpus = nr_cpus().map_err(|(_, e)| e).context("count the CPUs")?;
        self.hint.set(0, PerCpuValues::try_from(vec![hint; cpus])?, 0)?;
        Ok(())
    }

    /// The hint, if there is one.
    pub fn hint(&self) -> Result<Option<Hint>> {
        let hint = self.last_hint()?;
        Ok((hint.kind != HINT_NONE).then_some(hint))
    }

    /// The hint, also if it is no longer one.
    pub fn last_hint(&self) -> Result<Hint> {
        Ok(self.hint.get(&0, 0)?[self.cpu])
    }

    /// What has been counted, and how often.
    pub fn counts(&self) -> Result<Vec<((PodId, Counter), u64)>> {
        let counts = self.counters.iter().map(|entry| {
            let (key, values) = entry?;
            Ok(((key.pod_id, counter(&key)?), values.iter().sum()))
        });
        counts.collect()
    }

    pub fn clear_counts(&mut self) -> Result<()> {
        for key in self.counters.keys().collect::<Result<Vec<_>, _>>()? {
            self.counters.remove(&key)?;
        }
        Ok(())
    }

    /// What has been counted since the last call, each of it so often as it is in there; all on this
    /// CPU.
    pub fn take_counts(&mut self) -> Result<Vec<(PodId, Counter)>> {
        let mut counted = Vec::new();
        for entry in self.counters.iter() {
            let (key, values) = entry?;
            let on_this_cpu = values.iter().enumerate().all(|(c, n)| (*n != 0) == (c == self.cpu));
            ensure!(on_this_cpu, "counted {values:?} of {key:?}");
            let what = (key.pod_id, counter(&key)?);
            counted.extend((0..values[self.cpu]).map(|_| what));
        }
        self.clear_counts()?;
        self.take_verdicts(&counted)?;
        Ok(counted)
    }

    /// Whether somebody observes.
    pub fn want_verdicts(&mut self, wanted: bool) -> Result<()> {
        Ok(self.verdicts_wanted.set(0, if wanted { u64::MAX } else { 0 }, 0)?)
    }

    /// What has been counted is told while somebody observes, and nothing else is.
    fn take_verdicts(&mut self, counted: &[(PodId, Counter)]) -> Result<()> {
        self.told.clear();
        while let Some(entry) = self.verdicts.next() {
            self.told.push(bytemuck::pod_read_unaligned(&entry));
        }
        let number = |counter: &Counter| *counter as u32;
        let wanted = self.verdicts_wanted.get(&0, 0)? != 0;
        let counted =
            counted.iter().filter(|_| wanted).map(|(pod, counter)| (*pod, number(counter)));
        let (mut counted, mut told): (Vec<_>, Vec<_>) =
            (counted.collect(), self.told.iter().map(|told| (told.pod_id, told.counter)).collect());
        counted.sort_unstable();
        told.sort_unstable();
        ensure!(counted == told, "counted {counted:?}, told {told:?}");
        Ok(())
    }

    /// Every verdict that was told last is about this packet; `None`: one that cannot be read. The flow is
    /// the receiver's.
    pub fn were_about(&self, packet: Option<(Flow, bool)>) -> Result<()> {
        let none = Addr { octets: [0; 16] };
        let nothing = Flow { local: none, remote: none, local_port: 0, remote_port: 0 };
        let (flow, protocol) = match packet {
            Some((flow, true)) => (flow, IPPROTO_TCP),
            Some((flow, false)) => (flow, IPPROTO_UDP),
            None => (nothing, 0),
        };
        for told in &self.told {
            let VerdictEvent { src, dst, src_port, dst_port, .. } = *told;
            let said =
                Flow { local: dst, remote: src, local_port: dst_port, remote_port: src_port };
            ensure!(
                (said, told.protocol) == (flow, protocol),
                "{told:?} and not {flow:?}, {protocol}"
            );
            ensure!(told.at_ns <= sys::now(), "{told:?} is of the future");
        }
        Ok(())
    }

    /// What has been counted since the last call: one thing, once, on this CPU, or nothing.
    pub fn take_count(&mut self) -> Result<Option<(PodId, Counter)>> {
        let counted = self.take_counts()?;
        ensure!(counted.len() < 2, "counted twice: {counted:?}");
        Ok(counted.first().copied())
    }

    pub fn set_listener(
        &mut self,
        (pod_id, kind): PodAndKind,
        socket: Option<&Listener>,
    ) -> Result<()> {
        let key = ListenerKey { pod_id, kind };
        match socket {
            Some(socket) => {
                self.listeners.insert(key, u64::try_from(socket.socket.as_raw_fd())?, 0)?
            }
            None => absent(self.listeners.remove(&key))?,
        }
        Ok(())
    }

    pub fn listeners(&self) -> Result<BTreeSet<PodAndKind>> {
        self.listeners.keys().map(|key| Ok(key.map(|key| (key.pod_id, key.kind))?)).collect()
    }

    pub fn set_missing(&mut self, (pod_id, kind): PodAndKind, since: Option<Since>) -> Result<()> {
        let key = ListenerKey { pod_id, kind };
        let now = sys::now();
        match since {
            Some(Since::Now) => self.missing.insert(key, now, 0)?,
            // A machine that has just booted has no such time; the programs wrap around, too.
            Some(Since::LongAgo) => self.missing.insert(key, now.wrapping_sub(2 * GRACE_NS), 0)?,
            None => absent(self.missing.remove(&key))?,
        }
        Ok(())
    }

    /// The pods in `strays`, and whether any is said to be there.
    pub fn set_strays(&mut self, pods: &BTreeSet<PodId>, any: bool) -> Result<()> {
        for pod_id in self.strays.keys().collect::<Result<Vec<_>, _>>()? {
            self.strays.remove(&pod_id)?;
        }
        pods.iter().try_for_each(|pod_id| self.strays.insert(pod_id, 1, 0))?;
        Ok(self.any_strays.set(0, u32::from(any), 0)?)
    }

    pub fn strays(&self) -> Result<(BTreeSet<PodId>, bool)> {
        let pods = self.strays.keys().collect::<Result<_, _>>()?;
        Ok((pods, self.any_strays.get(&0, 0)? != 0))
    }

    /// Enters a flow, from the model's time.
    pub fn set_flow(&mut self, key: &DnsKey, flow: &DnsFlow) -> Result<()> {
        let lease = flow.needed_until_ns.wrapping_sub(NOW);
        // See `set_missing`.
        let flow = DnsFlow { needed_until_ns: sys::now().wrapping_add(lease), ..*flow };
        self.dns_flows.insert(key, flow, 0)?;
        Ok(())
    }

    /// The flows, in the model's time.
    pub fn flows(&self) -> Result<BTreeMap<DnsKey, DnsFlow>> {
        let now = sys::now();
        let entries = self.dns_flows.iter().map(|entry| {
            let (key, flow) = entry?;
            // It was whole a moment ago.
            let left = flow.needed_until_ns.wrapping_sub(now).cast_signed();
            let lease = LEASES.into_iter().find(|lease| left <= *lease);
            let lease = lease.with_context(|| format!("{left} ns are left of {flow:?}"))?;
            Ok((key, DnsFlow { needed_until_ns: NOW.wrapping_add_signed(lease), ..flow }))
        });
        entries.collect()
    }

    pub fn missing(&self) -> Result<BTreeMap<PodAndKind, Since>> {
        let now = sys::now();
        self.missing
            .iter()
            .map(|entry| {
                let (key, since) = entry?;
                let running = now.wrapping_sub(since) < GRACE_NS;
                let since = if running { Since::Now } else { Since::LongAgo };
                Ok(((key.pod_id, key.kind), since))
            })
            .collect()
    }
}

fn counter(key: &CounterKey) -> Result<Counter> {
    let named = Counter::ALL.iter().find(|(counter, _)| *counter as u32 == key.counter);
    Ok(named.with_context(|| format!("no such counter: {key:?}"))?.0)
}

/// To remove what is not there is no error.
fn absent(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N]> {
    bytes.try_into().context("a field of that size")
}
