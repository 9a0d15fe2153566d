//! Which connections of a pod bypass the proxy, as keys of the maps `inbound_ports`, `inbound_ranges`,
//! `outbound_ports` and `outbound_ranges`, where the longest prefix wins. Those of outbound connections are for
//! the guard and for virtual interfaces.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{
        MapData,
        lpm_trie::{Key, LpmTrie},
    },
};
use ipnet::IpNet;
use redirect_ebpf::abi::{
    Addr, EVERY_POD, POD_BYPASS_INBOUND, POD_INBOUND_RULES, POD_OUTBOUND_RULES, PREFIX_BYPASS,
    PREFIX_REDIRECT, PodId, PodPeer, PodPort,
};

use super::absent;
use crate::traffic::{Ports, Selection, Traffic};

/// The leading `len` bits of `bits`; all other bits are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix {
    len: u32,
    bits: u128,
}

impl Prefix {
    const ALL: Self = Self { len: 0, bits: 0 };
    /// All addresses of IPv4, which the maps have as `::ffff:a.b.c.d`.
    const ALL_V4: Self = Self { len: 96, bits: 0xffff << 32 };

    fn covers(&self, other: &Self) -> bool {
        self.len <= other.len && (self.bits ^ other.bits).leading_zeros() >= self.len
    }
}

/// Prefixes, each with one of `PREFIX_*`.
pub(super) type Prefixes = BTreeMap<Prefix, u32>;

/// The flags of a pod's row for these settings.
pub(super) fn flags(traffic: &Traffic) -> u32 {
    let selections = &traffic.selections;
    let rules = !(selections.inbound_ports.is_all() && selections.inbound_sources.is_all());
    (if traffic.bypass_inbound { POD_BYPASS_INBOUND } else { 0 })
        | (if rules { POD_INBOUND_RULES } else { 0 })
        | (if has_outbound_rules(traffic) { POD_OUTBOUND_RULES } else { 0 })
}

/// Whether the settings need entries in the maps of outbound connections.
pub(super) fn has_outbound_rules(traffic: &Traffic) -> bool {
    let selections = &traffic.selections;
    !(selections.outbound_ports.is_all() && selections.outbound_ranges.is_all())
}

/// The entries of one pod in one of the maps.
pub(super) trait Entry: Pod + Ord {
    /// Number of key bits in front of the prefix.
    const PREFIX: u32;
    /// The pod's settings for the map of its inbound connections.
    fn inbound(traffic: &Traffic) -> Prefixes;
    /// The same for the map of its outbound connections.
    fn outbound(traffic: &Traffic) -> Prefixes;
    fn new(pod_id: PodId, bits: u128) -> Self;
    fn pod_id(&self) -> PodId;
    fn bits(&self) -> u128;
}

impl Entry for PodPort {
    const PREFIX: u32 = PodPort::PREFIX;

    fn inbound(traffic: &Traffic) -> Prefixes {
        resolve(&traffic.selections.inbound_ports, Prefix::ALL, |ports| port_prefixes(*ports))
    }

    fn outbound(traffic: &Traffic) -> Prefixes {
        resolve(&traffic.selections.outbound_ports, Prefix::ALL, |ports| port_prefixes(*ports))
    }

    fn new(pod_id: PodId, bits: u128) -> Self {
        let [hi, lo, ..] = bits.to_be_bytes();
        PodPort::new(pod_id, u16::from_be_bytes([hi, lo]))
    }

    fn pod_id(&self) -> PodId {
        self.pod_id
    }

    fn bits(&self) -> u128 {
        u128::from(u16::from_be_bytes(self.port)) << 112
    }
}

impl Entry for PodPeer {
    const PREFIX: u32 = PodPeer::PREFIX;

    fn inbound(traffic: &Traffic) -> Prefixes {
        resolve_ranges(&traffic.selections.inbound_sources)
    }

    fn outbound(traffic: &Traffic) -> Prefixes {
        resolve_ranges(&traffic.selections.outbound_ranges)
    }

    fn new(pod_id: PodId, bits: u128) -> Self {
        PodPeer { pod_id, peer: Addr { octets: bits.to_be_bytes() } }
    }

    fn pod_id(&self) -> PodId {
        self.pod_id
    }

    fn bits(&self) -> u128 {
        u128::from_be_bytes(self.peer.octets)
    }
}

/// The entries for a selection of what is in `all`.
fn resolve<T>(
    selection: &Selection<T>,
    all: Prefix,
    prefixes: impl Fn(&T) -> Vec<Prefix>,
) -> Prefixes {
    let except: Vec<Prefix> = selection.except.iter().flat_map(&prefixes).collect();
    let mut resolved = Prefixes::new();
    if let Some(only) = &selection.only {
        resolved.insert(all, PREFIX_BYPASS);
        // An included range inside an excluded one stays excluded.
        let only = only.iter().flat_map(&prefixes);
        let only = only.filter(|prefix| !except.iter().any(|e| e.covers(prefix)));
        resolved.extend(only.map(|prefix| (prefix, PREFIX_REDIRECT)));
    }
    resolved.extend(except.into_iter().map(|prefix| (prefix, PREFIX_BYPASS)));
    resolved
}

/// The entries for ranges of both families. A range of IPv6 selects no address of IPv4, whatever form that has.
fn resolve_ranges(selection: &Selection<IpNet>) -> Prefixes {
    let family = |v4: bool| {
        let of =
            |list: &[IpNet]| list.iter().copied().filter(|r| r.addr().is_ipv4() == v4).collect();
        Selection { only: selection.only.as_deref().map(of), except: of(&selection.except) }
    };
    let prefixes = |range: &IpNet| vec![range_prefix(*range)];
    let mut resolved = resolve(&family(false), Prefix::ALL, prefixes);
    keep_apart(&mut resolved);
    resolved.extend(resolve(&family(true), Prefix::ALL_V4, prefixes));
    resolved
}

/// Makes sure that these prefixes of IPv6 apply to no address of IPv4.
fn keep_apart(prefixes: &mut Prefixes) {
    if prefixes.keys().any(|prefix| prefix.covers(&Prefix::ALL_V4)) {
        prefixes.insert(Prefix::ALL_V4, PREFIX_REDIRECT);
    }
}

/// The prefixes that make up a range of ports.
fn port_prefixes(ports: Ports) -> Vec<Prefix> {
    let prefix =
        |(first, bits): (u16, u32)| Prefix { len: 16 - bits, bits: u128::from(first) << 112 };
    ports.prefixes().map(prefix).collect()
}

fn range_prefix(range: IpNet) -> Prefix {
    // IPv4 as `::ffff:a.b.c.d`.
    let before = if matches!(range.addr(), IpAddr::V4(_)) { 96 } else { 0 };
    let octets = Addr::from(range.addr()).octets;
    Prefix { len: before + u32::from(range.prefix_len()), bits: u128::from_be_bytes(octets) }
}

/// One of the maps.
pub(super) type Trie<'a, K> = LpmTrie<&'a mut MapData, K, u32>;

/// Replaces the entries that apply to every pod by `ranges`.
pub(super) fn set_for_every_pod(trie: &mut Trie<'_, PodPeer>, ranges: &[IpNet]) -> Result<()> {
    let sources = Selection { only: None, except: ranges.to_vec() };
    set(trie, EVERY_POD, &resolve_ranges(&sources))
}

/// Deletes the pod's entries.
pub(super) fn clear<K: Entry>(trie: &mut Trie<'_, K>, pod_id: PodId) -> Result<()> {
    set(trie, pod_id, &Prefixes::new())
}

/// Whether the pod's entries match `wanted`.
pub(super) fn is_set<K: Entry>(
    trie: &Trie<'_, K>,
    pod_id: PodId,
    wanted: &Prefixes,
) -> Result<bool> {
    Ok(present(trie, pod_id)? == *wanted)
}

fn present<K: Entry>(trie: &Trie<'_, K>, pod_id: PodId) -> Result<Prefixes> {
    let mut present = Prefixes::new();
    for entry in trie.iter() {
        let (key, value) = entry.context("read the inbound rules")?;
        let data = key.data();
        if data.pod_id() == pod_id {
            let len = key.prefix_len().saturating_sub(K::PREFIX);
            present.insert(Prefix { len, bits: data.bits() }, value);
        }
    }
    Ok(present)
}

/// Replaces the pod's entries by `wanted`. What is redirected before and after the change is redirected at
/// every moment in between.
pub(super) fn set<K: Entry>(
    trie: &mut Trie<'_, K>,
    pod_id: PodId,
    wanted: &Prefixes,
) -> Result<()> {
    let present = present(trie, pod_id)?;
    let key = |prefix: &Prefix| Key::new(K::PREFIX + prefix.len, K::new(pod_id, prefix.bits));
    let stale =
        |kind| present.iter().filter(move |(p, value)| **value == kind && !wanted.contains_key(p));
    // A redirection that is an exception to a bypass is added before that bypass, and removed after it.
    put(trie, wanted, PREFIX_REDIRECT, key)?;
    for (prefix, _) in stale(PREFIX_BYPASS) {
        absent(trie.remove(&key(prefix))).context("write the inbound rules")?;
    }
    put(trie, wanted, PREFIX_BYPASS, key)?;
    for (prefix, _) in stale(PREFIX_REDIRECT) {
        absent(trie.remove(&key(prefix))).context("write the inbound rules")?;
    }
    Ok(())
}

fn put<K: Entry>(
    trie: &mut Trie<'_, K>,
    wanted: &Prefixes,
    kind: u32,
    key: impl Fn(&Prefix) -> Key<K>,
) -> Result<()> {
    wanted
        .iter()
        .filter(|(_, value)| **value == kind)
        .try_for_each(|(prefix, value)| trie.insert(&key(prefix), value, 0))
        .context("write the inbound rules")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::{Selections, parse_range};

    fn decides(prefixes: &Prefixes, bits: u128) -> u32 {
        let key = Prefix { len: 128, bits };
        let longest = prefixes.iter().rfind(|(prefix, _)| prefix.covers(&key));
        longest.map_or(PREFIX_REDIRECT, |(_, value)| *value)
    }

    fn ports(text: &str) -> Vec<Ports> {
        text.split_whitespace().map(|ports| ports.parse().unwrap()).collect()
    }

    #[test]
    fn ports_are_selected_exactly_by_their_prefixes() {
        for (only, except) in [
            (None, "80"),
            (None, "1-65535"),
            (Some("1-65535"), "8080"),
            (Some("80 8000-8010"), "8005"),
            (Some("8080"), "8000-9000"),
            (Some("1000-2000 1500-3000"), "1999-2001 60000"),
            (Some(""), ""),
        ] {
            let selection = Selection { only: only.map(ports), except: ports(except) };
            let prefixes = resolve(&selection, Prefix::ALL, |ports| port_prefixes(*ports));
            let within =
                |list: &[Ports], port| list.iter().any(|p| (p.first..=p.last).contains(&port));
            for port in 1..=u16::MAX {
                let selected = selection.only.as_ref().is_none_or(|only| within(only, port))
                    && !within(&selection.except, port);
                let decided = decides(&prefixes, PodPort::new(1, port).bits());
                assert_eq!(decided == PREFIX_REDIRECT, selected, "{port} of {selection:?}");
            }
        }
    }

    #[test]
    fn ranges_of_both_families_are_selected_by_their_longest_prefix() {
        let ranges = |list: &[&str]| list.iter().map(|r| parse_range(r).unwrap()).collect();
        let selection = Selection {
            only: Some(ranges(&["10.0.0.0/8", "fd00::/8"])),
            except: ranges(&["10.1.0.0/16", "fd01::1"]),
        };
        let prefixes = resolve_ranges(&selection);
        for (peer, selected) in [
            ("10.0.0.1", true),
            ("10.1.0.1", false),
            ("11.0.0.1", false),
            ("fd00::1", true),
            ("fd01::1", false),
            ("fd01::2", true),
            ("2001:db8::1", false),
        ] {
            let peer: IpAddr = peer.parse().unwrap();
            let bits = u128::from_be_bytes(Addr::from(peer).octets);
            assert_eq!(decides(&prefixes, bits) == PREFIX_REDIRECT, selected, "{peer}");
        }
    }

    #[test]
    fn ranges_of_one_family_select_nothing_of_the_other() {
        let ranges =
            |list: &str| list.split_whitespace().map(|r| parse_range(r).unwrap()).collect();
        for (only, except) in [
            (None, "::/0"),
            (None, "::/64"),
            (None, "0.0.0.0/0"),
            (None, "::/0 0.0.0.0/0"),
            (Some("::/0"), ""),
            (Some("10.0.0.0/8"), "::/0"),
            (Some("::/0 10.0.0.0/8"), "10.1.0.0/16"),
            (Some("fd00::/8"), "0.0.0.0/0"),
        ] {
            let selection = Selection { only: only.map(ranges), except: ranges(except) };
            let traffic = Traffic {
                selections: Selections {
                    outbound_ranges: selection.clone(),
                    ..Selections::default()
                },
                ..Traffic::default()
            };
            let prefixes = resolve_ranges(&selection);
            for ip in ["10.0.0.1", "10.1.0.1", "192.0.2.1", "fd00::1", "::1:1", "2001:db8::1"] {
                let ip: IpAddr = ip.parse().unwrap();
                let decided = decides(&prefixes, u128::from_be_bytes(Addr::from(ip).octets));
                let selected = traffic.redirects_call_to(ip, None);
                assert_eq!(decided == PREFIX_REDIRECT, selected, "{ip} of {selection:?}");
            }
        }
    }

    #[test]
    fn prefixes_survive_the_way_into_a_key_and_back() {
        for port in [1, 80, 32768, 65535] {
            let key = <PodPort as Entry>::new(7, PodPort::new(1, port).bits());
            assert_eq!(key, PodPort::new(7, port));
        }
        let bits = range_prefix(parse_range("10.1.0.0/16").unwrap()).bits;
        assert_eq!(<PodPeer as Entry>::new(7, bits).bits(), bits);
    }
}
