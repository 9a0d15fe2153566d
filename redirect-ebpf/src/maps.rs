//! Every map. Those that the agent reads or writes are pinned below the agent's bpffs directory.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SOCKHASH},
    btf_maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, ProgramArray, RingBuf,
        SkStorage,
    },
    macros::btf_map,
};
use redirect_ebpf::{
    abi::{
        Connection, CounterKey, DnsFlow, DnsKey, Flow, HALF_OPEN_PLACES, HalfOpenKey, Hint,
        ListenerKey, OwnAddress, POD_PREFIXES, POD_VIRTUAL_INTERFACES, PodEntry, PodFlow, PodId,
        PodPeer, PodPort, SavedSysctls, Settled, ThisPod, VerdictEvent, VirtualInterface,
    },
    shown,
};

use crate::packet::Parsed;

/// The maximum number of pods of a node, enrolled or not.
const PODS: usize = 2048;
/// Room for the prefixes of all pods, and for those that apply to every pod. A trie allocates memory as it is
/// filled.
const PREFIXES: usize = (PODS + 1) * POD_PREFIXES;
/// Prefixes of pods → one of `PREFIX_*`.
pub type Prefixes<T> = LpmTrie<T, u32, PREFIXES>;
/// For maps that allocate memory as they are filled.
const AS_IT_COMES: usize = BPF_F_NO_PREALLOC as usize;

/// Pod → the decision about it.
#[btf_map(name = "pods")]
static PODS_BY_ID: HashMap<PodId, shown::PodEntry, PODS> = HashMap::new();

/// A pod's entry in `pods`.
#[inline(always)]
pub fn pod_entry(pod_id: PodId) -> Option<*const PodEntry> {
    PODS_BY_ID.get_ptr(&pod_id).map(<*const shown::PodEntry>::cast)
}

/// Address that an enrolled pod has → 1. The agent limits how many each pod has.
#[btf_map(name = "addresses")]
pub static ADDRESSES: HashMap<OwnAddress, u32, { PODS * 64 }, AS_IT_COMES> = HashMap::new();

/// The pod whose program has called the shared one, on this CPU.
#[btf_map(name = "this_pod")]
pub static THIS_POD: PerCpuArray<ThisPod, 1> = PerCpuArray::new();

/// The program that every pod's own program calls: `redirect_lookup`.
#[btf_map(name = "programs")]
pub static PROGRAMS: ProgramArray<1> = ProgramArray::new();

/// Pod and counter → count. Only the pod's own programs write its counters.
#[btf_map(name = "counters")]
pub static COUNTERS: PerCpuHashMap<shown::CounterKey, u64, { PODS * 32 }, AS_IT_COMES> =
    PerCpuHashMap::new();

/// Pod and kind → the proxy's listening socket. The kernel drops an entry when its socket closes.
#[btf_map(name = "listeners")]
pub static LISTENERS: Listeners = Listeners {
    r#type: ptr::null(),
    key: ptr::null(),
    value: ptr::null(),
    max_entries: ptr::null(),
};

/// A sockhash that user space can read: with values of 8 bytes, in place of the 4 of aya's `SockHash`, it sees the
/// sockets' cookies. The loader reads the types of the fields (BTF); programs only use the address.
#[repr(C)]
pub struct Listeners {
    r#type: *const [i32; BPF_MAP_TYPE_SOCKHASH as usize],
    key: *const ListenerKey,
    value: *const u64,
    max_entries: *const [i32; PODS * 4],
}

// SAFETY: the pointers are null, and nobody reads them.
unsafe impl Sync for Listeners {}

/// Cgroup whose sockets are the proxy's if they have its mark, or `ANY_CGROUP` → when its proxy last
/// connected to the agent, ns of CLOCK_MONOTONIC. Only the agent writes it. The kernel never reuses a cgroup
/// id.
#[btf_map(name = "proxy_cgroups")]
pub static PROXY_CGROUPS: HashMap<u64, u64, 64> = HashMap::new();

/// Pod and kind → since when the proxy does not listen, ns of CLOCK_MONOTONIC.
#[btf_map(name = "proxy_missing")]
pub static PROXY_MISSING: HashMap<ListenerKey, u64, { PODS * 4 }> = HashMap::new();

/// The hint from tcx to `sk_lookup`. Both run for a packet in one go, on one CPU.
#[btf_map(name = "hints")]
pub static HINT: PerCpuArray<Hint, 1> = PerCpuArray::new();

/// The packet that a tcx program is processing. No other program reads it, so it is not pinned.
#[btf_map(name = "parsed")]
pub static PARSED: PerCpuArray<Parsed, 1> = PerCpuArray::new();

/// An address that a program computes with. No other program reads it, so it is not pinned.
#[btf_map(name = "address")]
pub static ADDRESS: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Whether any pod of the node is in `strays`.
#[btf_map(name = "any_strays")]
pub static ANY_STRAYS: Array<u32, 1> = Array::new();

/// Pod of which every packet on `lo` is checked for its socket → 1.
#[btf_map(name = "strays")]
pub static STRAYS: HashMap<PodId, u32, PODS> = HashMap::new();

/// Place of a pod → a direct connection that was half open when its pod was captured, or when its settings
/// changed. Once it is open, its socket is found here.
#[btf_map(name = "half_open")]
pub static HALF_OPEN: HashMap<
    HalfOpenKey,
    Connection,
    { PODS * HALF_OPEN_PLACES as usize },
    AS_IT_COMES,
> = HashMap::new();

/// Socket of a pod → the path of its connection, as the guard or an iterator determined it.
#[btf_map(name = "settled")]
pub static SETTLED: SkStorage<Settled> = SkStorage::new();

/// Pod and port of the pod, by longest prefix → one of `PREFIX_*`. Read only for pods with
/// `POD_INBOUND_RULES`.
#[btf_map(name = "inbound_ports")]
pub static INBOUND_PORTS: Prefixes<PodPort> = LpmTrie::new();

/// Pod and peer of the pod, by longest prefix → one of `PREFIX_*`. Like `inbound_ports`; entries under
/// `EVERY_POD` apply to all pods.
#[btf_map(name = "inbound_ranges")]
pub static INBOUND_RANGES: Prefixes<PodPeer> = LpmTrie::new();

/// Virtual interface of a pod → bits of `VIRTUAL_*`. Only these interfaces have the program that reads it.
#[btf_map(name = "virtual_ifs")]
pub static VIRTUAL_INTERFACES: HashMap<
    VirtualInterface,
    u32,
    { PODS * POD_VIRTUAL_INTERFACES },
    AS_IT_COMES,
> = HashMap::new();

/// Pod and called port, by longest prefix → one of `PREFIX_*`. Read by the guard for pods with
/// `POD_OUTBOUND_RULES`, and for virtual interfaces. Otherwise rules and routes decide.
#[btf_map(name = "outbound_ports")]
pub static OUTBOUND_PORTS: Prefixes<PodPort> = LpmTrie::new();

/// The same for the called address.
#[btf_map(name = "outbound_ranges")]
pub static OUTBOUND_RANGES: Prefixes<PodPeer> = LpmTrie::new();

/// Connection that kubelet has opened, as the pod sees it → since when, ns of CLOCK_MONOTONIC. Only kubelet's
/// cgroup fills it. A lost entry costs one probe.
#[btf_map(name = "kubelet_flows")]
pub static KUBELET_FLOWS: LruHashMap<Flow, u64, 8192> = LruHashMap::new();

/// Place of a pod → the DNS flow that occupies it.
#[btf_map(name = "dns_flows")]
pub static DNS_FLOWS: HashMap<DnsKey, DnsFlow, 262_144, AS_IT_COMES> = HashMap::new();

/// Flow of a pod that enters or leaves the mesh, or whose settings change → one of `WAY_*`.
#[btf_map(name = "ways")]
pub static WAYS: HashMap<PodFlow, u32, 262_144, AS_IT_COMES> = HashMap::new();

/// Pod that enters or leaves the mesh, or whose settings change → until when at most, ns of
/// CLOCK_MONOTONIC. Only the agent writes it.
#[btf_map(name = "switches")]
pub static SWITCHES: HashMap<PodId, u64, PODS> = HashMap::new();

/// The same pod → how many entries of `ways` it has. The agent creates and deletes it; only the programs
/// count.
#[btf_map(name = "noted")]
pub static NOTED: HashMap<PodId, u32, PODS> = HashMap::new();

/// How many pods are in `switches`.
#[btf_map(name = "switching")]
pub static SWITCHING: Array<u32, 1> = Array::new();

/// Pod → its sysctls before enrollment. Only the agent uses it; it is here to be pinned with the others.
#[btf_map(name = "saved_sysctls")]
pub static SAVED_SYSCTLS: HashMap<PodId, SavedSysctls, PODS> = HashMap::new();

/// Until when somebody observes, ns of CLOCK_MONOTONIC; 0: nobody does. Only the agent writes it.
#[btf_map(name = "verdicts_wanted")]
pub static VERDICTS_WANTED: Array<u64, 1> = Array::new();

/// Verdicts, as they are counted, while somebody observes.
#[btf_map(name = "verdicts")]
pub static VERDICTS: RingBuf<VerdictEvent, { 1 << 20 }> = RingBuf::new();

/// How many verdicts found no room there.
#[btf_map(name = "verdicts_lost")]
pub static VERDICTS_LOST: PerCpuArray<u64, 1> = PerCpuArray::new();

/// The key as `counters` declares it.
#[inline(always)]
pub fn counter(key: &CounterKey) -> &shown::CounterKey {
    // SAFETY: the layout is the same, and what is counted is a `Counter`.
    unsafe { &*ptr::from_ref(key).cast() }
}
