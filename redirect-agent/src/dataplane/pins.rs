//! What is pinned below the bpffs directory, and how full it is.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Pod,
    maps::{HashMap, Map, MapData, MapError, MapInfo, MapType, PerCpuHashMap, lpm_trie},
};
use redirect_ebpf::abi::{
    Connection, CounterKey, DnsFlow, DnsKey, Flow, HalfOpenKey, ListenerKey, OwnAddress, PodEntry,
    PodFlow, PodId, PodPeer, PodPort, SavedSysctls, VirtualInterface,
};
use serde::Serialize;

use super::kernel::PINNED_MAPS;
use crate::output::Document;

/// A pinned map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PinnedMap {
    /// Its name, which is also that of its pin.
    pub name: &'static str,
    /// Its type, as bpftool names it.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// How many entries it has. `None`: a map of its type has no number of entries.
    pub entries: Option<usize>,
    /// How many it may have; 0 where memory is the limit. Of a ring buffer: bytes.
    pub max_entries: u32,
    /// Where it is pinned.
    pub path: PathBuf,
}

/// What `maps` prints as JSON.
pub fn document(maps: &[PinnedMap]) -> Document<impl Serialize> {
    #[derive(Serialize)]
    struct Maps<'a> {
        maps: &'a [PinnedMap],
    }
    Document::new("Maps", Maps { maps })
}

/// Every map that the agent has pinned below its directory on a bpffs, in the order of ARCHITECTURE.md.
///
/// # Errors
///
/// When the directory has none, or a map cannot be opened (only root may).
pub fn pinned_maps(dir: &Path) -> Result<Vec<PinnedMap>> {
    let mut maps = Vec::new();
    for name in PINNED_MAPS {
        let path = dir.join(name);
        let opening = || format!("cannot open the pinned map {}", path.display());
        if !path.try_exists().with_context(opening)? {
            continue;
        }
        let info = MapInfo::from_pin(&path).with_context(opening)?;
        let data = MapData::from_pin(&path).with_context(opening)?;
        let (kind, entries) = measure(name, info.map_type()?, data)
            .with_context(|| format!("cannot read the pinned map {}", path.display()))?;
        maps.push(PinnedMap { name, kind, entries, max_entries: info.max_entries(), path });
    }
    if maps.is_empty() {
        return Err(anyhow!(
            "{} has no maps of the agent: it has never run there, or `cleanup` has removed them; --bpffs-dir \
             names another directory",
            dir.display()
        ));
    }
    Ok(maps)
}

/// bpftool's name of a type, and the number of entries.
fn measure(name: &str, kind: MapType, data: MapData) -> Result<(&'static str, Option<usize>)> {
    Ok(match kind {
        MapType::Hash => ("hash", Some(entries(name, Map::HashMap(data))?)),
        MapType::LruHash => ("lru_hash", Some(entries(name, Map::LruHashMap(data))?)),
        MapType::PerCpuHash => {
            let map = PerCpuHashMap::<_, CounterKey, u64>::try_from(Map::PerCpuHashMap(data))?;
            ("percpu_hash", Some(count(map.keys())?))
        }
        MapType::SockHash => ("sockhash", Some(keys::<ListenerKey, u64>(Map::HashMap(data))?)),
        MapType::LpmTrie => ("lpm_trie", Some(prefixes(name, Map::LpmTrie(data))?)),
        MapType::PerCpuArray => ("percpu_array", None),
        MapType::ProgramArray => ("prog_array", None),
        MapType::SkStorage => ("sk_storage", None),
        MapType::RingBuf => ("ringbuf", None),
        _ => ("array", None),
    })
}

fn entries(name: &str, map: Map) -> Result<usize> {
    match name {
        "pods" => keys::<PodId, PodEntry>(map),
        "addresses" => keys::<OwnAddress, u32>(map),
        "strays" | "noted" => keys::<PodId, u32>(map),
        "switches" => keys::<PodId, u64>(map),
        "saved_sysctls" => keys::<PodId, SavedSysctls>(map),
        "proxy_cgroups" => keys::<u64, u64>(map),
        "proxy_missing" => keys::<ListenerKey, u64>(map),
        "half_open" => keys::<HalfOpenKey, Connection>(map),
        "ways" => keys::<PodFlow, u32>(map),
        "kubelet_flows" => keys::<Flow, u64>(map),
        "dns_flows" => keys::<DnsKey, DnsFlow>(map),
        "virtual_ifs" => keys::<VirtualInterface, u32>(map),
        _ => Err(anyhow!("its layout is unknown")),
    }
}

fn keys<K: Pod, V: Pod>(map: Map) -> Result<usize> {
    count(HashMap::<_, K, V>::try_from(map)?.keys())
}

fn prefixes(name: &str, map: Map) -> Result<usize> {
    if name.ends_with("_ports") {
        count(lpm_trie::LpmTrie::<_, PodPort, u32>::try_from(map)?.keys())
    } else {
        count(lpm_trie::LpmTrie::<_, PodPeer, u32>::try_from(map)?.keys())
    }
}

/// The programs may add and delete keys meanwhile.
fn count<K>(mut keys: impl Iterator<Item = Result<K, MapError>>) -> Result<usize> {
    Ok(keys.try_fold(0, |count, key| key.map(|_| count + 1))?)
}
