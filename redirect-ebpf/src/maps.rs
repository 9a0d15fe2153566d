//! Every map. Those that the agent reads or writes are pinned below the agent's bpffs directory.

use aya_ebpf::{
    btf_maps::{HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, SockHash},
    macros::btf_map,
};
use redirect_ebpf::abi::{
    Addr, CounterKey, DnsFlow, DnsKey, Flow, Hint, ListenerKey, PodEntry, PodId, PodPeer, PodPort,
    SavedSysctls, VirtualInterface,
};

/// Addresses of pods: a large node has 500 pods, each with a few addresses.
const ADDRESSES: usize = 8192;
/// Pods of a node.
const PODS: usize = 2048;

/// Address of a pod of this node, enrolled or not → what is decided about the pod.
#[btf_map(name = "pods")]
pub static PODS_BY_ADDR: HashMap<Addr, PodEntry, ADDRESSES> = HashMap::new();

/// Pod and what is counted → how often.
#[btf_map(name = "counters")]
pub static COUNTERS: PerCpuHashMap<CounterKey, u64, { PODS * 16 }> = PerCpuHashMap::new();

/// Pod and kind → the proxy's listening socket. The kernel drops an entry when its socket closes.
#[btf_map(name = "listeners")]
pub static LISTENERS: SockHash<ListenerKey, { PODS * 4 }> = SockHash::new();

/// Pod and kind → since when the proxy does not listen, ns of CLOCK_MONOTONIC.
#[btf_map(name = "proxy_missing")]
pub static PROXY_MISSING: HashMap<ListenerKey, u64, { PODS * 4 }> = HashMap::new();

/// The hint from tcx to `sk_lookup`, which run in one go on one CPU.
#[btf_map(name = "hints")]
pub static HINT: PerCpuArray<Hint, 1> = PerCpuArray::new();

/// Pod and port of the pod, by their longest prefix → one of `INBOUND_*`. Looked into only for pods
/// with `POD_INBOUND_RULES`.
#[btf_map(name = "inbound_ports")]
pub static INBOUND_PORTS: LpmTrie<PodPort, u32, 65536> = LpmTrie::new();

/// Pod and peer of the pod, by their longest prefix → one of `INBOUND_*`. As `inbound_ports`, but what
/// is under `EVERY_POD` counts for all.
#[btf_map(name = "inbound_ranges")]
pub static INBOUND_RANGES: LpmTrie<PodPeer, u32, 65536> = LpmTrie::new();

/// Virtual interface of a pod → bits of `VIRTUAL_*`. Only these interfaces have the program that looks
/// into it.
#[btf_map(name = "virtual_ifs")]
pub static VIRTUAL_INTERFACES: HashMap<VirtualInterface, u32, { PODS * 4 }> = HashMap::new();

/// Pod and port that is called by way of a virtual interface, by their longest prefix → one of
/// `INBOUND_*`. What the pod itself calls is a matter of routes and rules.
#[btf_map(name = "outbound_ports")]
pub static OUTBOUND_PORTS: LpmTrie<PodPort, u32, 65536> = LpmTrie::new();

/// The same for the address that is called.
#[btf_map(name = "outbound_ranges")]
pub static OUTBOUND_RANGES: LpmTrie<PodPeer, u32, 65536> = LpmTrie::new();

/// Connection of kubelet to a pod, as the pod sees it → since when, ns of CLOCK_MONOTONIC. An entry
/// that is lost costs a probe.
#[btf_map(name = "kubelet_flows")]
pub static KUBELET_FLOWS: LruHashMap<Flow, u64, 8192> = LruHashMap::new();

/// Client of the proxy's DNS → the resolver that it has asked. An entry that is lost costs an answer.
#[btf_map(name = "dns_flows")]
pub static DNS_FLOWS: LruHashMap<DnsKey, DnsFlow, 65536> = LruHashMap::new();

/// Flows of a pod that enters or leaves the mesh, or whose settings change → one of `WAY_*`.
#[btf_map(name = "ways")]
pub static WAYS: LruHashMap<Flow, u32, 131072> = LruHashMap::new();

/// Pod → its sysctls before enrolment. Only the agent uses it; it is here to be pinned with the rest.
#[btf_map(name = "saved_sysctls")]
pub static SAVED_SYSCTLS: HashMap<PodId, SavedSysctls, PODS> = HashMap::new();
