//! What is in the pinned maps, decoded: for a report, and without a running agent. Reading changes nothing.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Pod,
    maps::{
        Array, HashMap, Map, MapData, MapError, MapInfo, MapType, PerCpuArray, PerCpuHashMap,
        lpm_trie::LpmTrie,
    },
};
use redirect_ebpf::abi::{
    Addr, Connection, Counter, CounterKey, DECISION_ENROLLED, DnsFlow, DnsKey, EVERY_POD, Flow,
    HalfOpenKey, LISTENER_HBONE, LISTENER_INBOUND, ListenerKey, OwnAddress, POD_BYPASS_INBOUND,
    POD_CAPTURE, POD_DNS, POD_INBOUND_RULES, POD_OUTBOUND_RULES, PREFIX_BYPASS, PodEntry, PodFlow,
    PodId, PodPeer, PodPort, SYSCTL_ABSENT, SavedSysctls, VIRTUAL_CAPTURE, VIRTUAL_RULES,
    VirtualInterface, WAY_DIRECT, WAY_REDIRECTED,
};
use serde::Serialize;
use serde_json::{Value, json};

use super::sysctl;

/// How many entries of a map are read: the largest have a quarter of a million, and a report has to be sent.
const ENTRIES: usize = 10_000;

/// The entries of a map.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Contents {
    /// The map's name.
    pub name: String,
    /// Why it has none here, where that is because of its type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<&'static str>,
    /// Whether there are more.
    pub truncated: bool,
    /// The entries. Ports are numbers, addresses text, times ns of CLOCK_MONOTONIC.
    pub entries: Vec<Value>,
}

/// Reads a map that is pinned below the agent's directory on a bpffs.
///
/// # Errors
///
/// When it is not there, cannot be opened (only root may), or has another layout.
pub fn contents(dir: &Path, name: &str) -> Result<Contents> {
    let path = dir.join(name);
    let read = || {
        let kind = MapInfo::from_pin(&path)?.map_type()?;
        entries(name, kind, MapData::from_pin(&path)?)
    };
    let read = read().with_context(|| format!("cannot read the pinned map {}", path.display()))?;
    let (note, mut entries) = match read {
        Read::Entries(entries) => (None, entries),
        Read::Not(why) => (Some(why), Vec::new()),
    };
    let truncated = entries.len() > ENTRIES;
    entries.truncate(ENTRIES);
    Ok(Contents { name: name.to_owned(), note, truncated, entries })
}

enum Read {
    Entries(Vec<Value>),
    Not(&'static str),
}

fn entries(name: &str, kind: MapType, data: MapData) -> Result<Read> {
    Ok(Read::Entries(match kind {
        MapType::Hash => hash(name, Map::HashMap(data))?,
        MapType::LruHash => hash(name, Map::LruHashMap(data))?,
        MapType::PerCpuHash => counters(data)?,
        // To user space, its values are the cookies of its sockets.
        MapType::SockHash => each(Map::HashMap(data), listener)?,
        MapType::LpmTrie if name.ends_with("_ports") => {
            let map = LpmTrie::<_, PodPort, u32>::try_from(Map::LpmTrie(data))?;
            take(
                map.iter().map(|entry| {
                    entry.map(|(key, value)| ports(key.prefix_len(), key.data(), value))
                }),
            )?
        }
        MapType::LpmTrie => {
            let map = LpmTrie::<_, PodPeer, u32>::try_from(Map::LpmTrie(data))?;
            take(
                map.iter().map(|entry| {
                    entry.map(|(key, value)| range(key.prefix_len(), key.data(), value))
                }),
            )?
        }
        // What a program array shows is the program's id.
        MapType::ProgramArray => vec![json!({ "program": first::<u32>(data)? })],
        MapType::PerCpuArray if name == "verdicts_lost" => {
            let map = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(data))?;
            vec![json!({ "value": map.get(&0, 0)?.iter().sum::<u64>() })]
        }
        MapType::PerCpuArray => return Ok(Read::Not("it holds what is of one packet only")),
        MapType::SkStorage => return Ok(Read::Not("the kernel shows what is in it to nobody")),
        MapType::RingBuf => return Ok(Read::Not("reading it would take from who observes")),
        MapType::Array if name == "verdicts_wanted" => {
            vec![json!({ "untilNs": first::<u64>(data)? })]
        }
        MapType::Array => vec![json!({ "value": first::<u32>(data)? })],
        _ => bail!("its type is unknown"),
    }))
}

fn first<V: Pod>(data: MapData) -> Result<V> {
    Ok(Array::<_, V>::try_from(Map::Array(data))?.get(&0, 0)?)
}

/// One more than is kept, to know whether there are more. The programs may add and delete entries meanwhile.
fn take(entries: impl Iterator<Item = Result<Value, MapError>>) -> Result<Vec<Value>> {
    Ok(entries.take(ENTRIES + 1).collect::<Result<Vec<Value>, MapError>>()?)
}

fn hash(name: &str, map: Map) -> Result<Vec<Value>> {
    match name {
        "pods" => each(map, pod),
        "addresses" => each(
            map,
            |key: OwnAddress, _: u32| json!({ "pod": key.pod_id, "address": key.addr.to_ip() }),
        ),
        "strays" | "noted" => {
            each(map, |pod: PodId, value: u32| json!({ "pod": pod, "value": value }))
        }
        "switches" => each(map, |pod: PodId, until: u64| json!({ "pod": pod, "untilNs": until })),
        "saved_sysctls" => each(map, saved),
        "proxy_cgroups" => {
            each(map, |cgroup: u64, value: u64| json!({ "cgroup": cgroup, "value": value }))
        }
        "proxy_missing" => each(
            map,
            |key: ListenerKey, since: u64| json!({ "pod": key.pod_id, "listener": kind(key.kind), "sinceNs": since }),
        ),
        "half_open" => each(map, |key: HalfOpenKey, connection: Connection| {
            let flow = flow(&connection.flow);
            json!({ "pod": key.pod_id, "place": key.place, "connection": flow })
        }),
        "ways" => each(map, |key: PodFlow, way: u32| {
            let way = match way {
                WAY_DIRECT => json!("direct"),
                WAY_REDIRECTED => json!("redirected"),
                other => json!(other),
            };
            json!({ "pod": key.pod_id, "connection": flow(&key.flow), "way": way })
        }),
        "kubelet_flows" => {
            each(map, |key: Flow, at: u64| json!({ "connection": flow(&key), "atNs": at }))
        }
        "dns_flows" => each(map, dns_flow),
        "virtual_ifs" => each(map, |key: VirtualInterface, flags: u32| {
            json!({
                "pod": key.pod_id,
                "interface": key.index,
                "capture": flags & VIRTUAL_CAPTURE != 0,
                "rules": flags & VIRTUAL_RULES != 0,
            })
        }),
        _ => Err(anyhow!("its layout is unknown")),
    }
}

fn each<K: Pod, V: Pod>(map: Map, shown: impl Fn(K, V) -> Value) -> Result<Vec<Value>> {
    let map = HashMap::<_, K, V>::try_from(map)?;
    take(map.iter().map(|entry| entry.map(|(key, value)| shown(key, value))))
}

fn counters(data: MapData) -> Result<Vec<Value>> {
    let map = PerCpuHashMap::<_, CounterKey, u64>::try_from(Map::PerCpuHashMap(data))?;
    take(map.iter().map(|entry| {
        entry.map(|(key, values)| {
            let name = Counter::ALL.iter().find(|(counter, _)| *counter as u32 == key.counter);
            let name = name.map_or_else(|| json!(key.counter), |(_, name)| json!(name));
            json!({ "pod": key.pod_id, "counter": name, "value": values.iter().sum::<u64>() })
        })
    }))
}

fn pod(id: PodId, entry: PodEntry) -> Value {
    let address = |addr: Addr| (addr.octets != [0; 16]).then(|| addr.to_ip());
    json!({
        "pod": id,
        "enrolled": entry.decision == DECISION_ENROLLED,
        "reason": entry.reason,
        "capture": entry.flags & POD_CAPTURE != 0,
        "bypassInbound": entry.flags & POD_BYPASS_INBOUND != 0,
        "inboundRules": entry.flags & POD_INBOUND_RULES != 0,
        "outboundRules": entry.flags & POD_OUTBOUND_RULES != 0,
        "dns": entry.flags & POD_DNS != 0,
        "uplink": entry.uplink,
        "capturedAtNs": entry.captured_at_ns,
        "ipv4": address(entry.v4),
        "ipv6": address(entry.v6),
    })
}

fn saved(pod: PodId, saved: SavedSysctls) -> Value {
    let values = sysctl::names().zip(saved.values);
    let values: serde_json::Map<String, Value> = values
        .map(|(name, value)| (name.to_owned(), json!((value != SYSCTL_ABSENT).then_some(value))))
        .collect();
    json!({ "pod": pod, "values": values })
}

fn dns_flow(key: DnsKey, dns: DnsFlow) -> Value {
    json!({
        "pod": key.pod_id,
        "place": key.place,
        "protocol": key.protocol,
        "neededUntilNs": dns.needed_until_ns,
        "client": dns.client.to_ip(),
        "clientPort": dns.client_port,
        "alias": dns.alias,
        "resolver": dns.resolver.to_ip(),
        "resolverPort": dns.resolver_port,
        "asked": dns.asked,
        "answered": dns.answered,
        "ended": dns.ended != 0,
    })
}

fn listener(key: ListenerKey, cookie: u64) -> Value {
    json!({ "pod": key.pod_id, "listener": kind(key.kind), "socketCookie": cookie })
}

fn kind(listener: u32) -> &'static str {
    match listener {
        LISTENER_INBOUND => "inbound",
        LISTENER_HBONE => "hbone",
        _ => "outbound",
    }
}

fn flow(flow: &Flow) -> Value {
    json!({
        "local": flow.local.to_ip(),
        "localPort": flow.local_port,
        "remote": flow.remote.to_ip(),
        "remotePort": flow.remote_port,
    })
}

fn ports(bits: u32, key: PodPort, value: u32) -> Value {
    let first = u16::from_be_bytes(key.port);
    let free = u16::MAX.checked_shr(bits.saturating_sub(PodPort::PREFIX)).unwrap_or(0);
    json!({ "pod": key.pod_id, "first": first, "last": first | free, "bypass": value == PREFIX_BYPASS })
}

fn range(bits: u32, key: PodPeer, value: u32) -> Value {
    const MAPPED: u32 = 96;
    let bits = bits.saturating_sub(PodPeer::PREFIX);
    let (ip, bits) = match key.peer {
        addr if addr.is_v4() && bits >= MAPPED => (addr.to_ip(), bits - MAPPED),
        addr => (std::net::Ipv6Addr::from(addr.octets).into(), bits),
    };
    let pod = if key.pod_id == EVERY_POD { json!("every") } else { json!(key.pod_id) };
    json!({ "pod": pod, "range": format!("{ip}/{bits}"), "bypass": value == PREFIX_BYPASS })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn prefixes_are_shown_as_ranges() {
        let of = |bits, port| ports(PodPort::PREFIX + bits, PodPort::new(7, port), PREFIX_BYPASS);
        assert_eq!(of(16, 80), json!({ "pod": 7, "first": 80, "last": 80, "bypass": true }));
        assert_eq!(of(13, 8000), json!({ "pod": 7, "first": 8000, "last": 8007, "bypass": true }));
        assert_eq!(of(0, 0), json!({ "pod": 7, "first": 0, "last": 65535, "bypass": true }));
        for (ip, bits, pod_id, expected) in [
            ("10.0.0.0", 104, 7, json!({ "pod": 7, "range": "10.0.0.0/8", "bypass": false })),
            ("fd00::", 8, 0, json!({ "pod": "every", "range": "fd00::/8", "bypass": false })),
        ] {
            let ip: IpAddr = ip.parse().unwrap();
            let key = PodPeer { pod_id, peer: ip.into() };
            assert_eq!(range(PodPeer::PREFIX + bits, key, 0), expected);
        }
    }
}
