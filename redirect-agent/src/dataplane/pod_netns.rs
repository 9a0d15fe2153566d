//! A pod's network namespace, and what the datapath has to know about it.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::{Result, bail};
use redirect_ebpf::abi::{LOOPBACK_IFINDEX, PodId};

use super::{
    routes::{Address, Routing},
    rows::Row,
};
use crate::netns::Netns;

/// How many addresses of a pod are entered as its own. The pod's calls to any further address of its own go
/// through the proxy.
const POD_ADDRESSES: usize = 64;

/// A pod as the datapath knows it.
#[derive(Debug)]
pub struct PodNetns {
    /// Its network namespace.
    pub netns: Netns,
    /// Its addresses: first those that the cluster knows, then any others that can be reached from outside.
    pub addresses: Vec<IpAddr>,
    /// Every address in the namespace. Traffic from the pod to these stays in the pod.
    found: Vec<Address>,
    /// The interfaces whose addresses are left out of `addresses`, because many pods may have the same ones.
    virtual_interfaces: Vec<String>,
}

impl PodNetns {
    /// Looks up the addresses inside the namespace.
    ///
    /// # Errors
    ///
    /// When the namespace has no address, or lacks one of `known`, so it is not that pod's.
    pub fn new(netns: Netns, known: &[IpAddr]) -> Result<Self> {
        let pod = Self::existing(netns)?;
        let path = pod.netns.path().display();
        // An address on `lo` does not count: nobody can call it.
        if let Some(ip) = known.iter().find(|ip| !pod.addresses.contains(ip)) {
            bail!("{path} does not carry address {ip}; it has {}", list(&pod.addresses));
        }
        if pod.addresses.is_empty() {
            bail!("{path} has no address besides loopback");
        }
        Ok(pod.known_first(known))
    }

    /// The same for a pod whose addresses come from the cluster: some of `known` may be gone, and the others
    /// must work. A namespace that is set up already (`is_ours`) is the pod's, whatever addresses it has.
    ///
    /// # Errors
    ///
    /// When the namespace has no address, or none of `known`, so it is not that pod's.
    pub fn of_pod(netns: Netns, known: &[IpAddr], is_ours: bool) -> Result<Self> {
        let pod = Self::existing(netns)?.known_first(known);
        let path = pod.netns.path().display();
        if is_ours {
            return Ok(pod);
        }
        if !known.is_empty() && pod.missing(known).count() == known.len() {
            bail!("{path} does not carry address {}; it has {}", list(known), list(&pod.addresses));
        }
        if pod.addresses.is_empty() {
            bail!("{path} has no address besides loopback");
        }
        Ok(pod)
    }

    /// Those of `known` that the namespace does not have.
    pub fn missing(&self, known: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
        known.iter().copied().filter(|ip| !self.found.iter().any(|address| address.ip == *ip))
    }

    /// The same pod without the addresses of its virtual interfaces, except those in `known`.
    pub fn without(self, virtual_interfaces: &[String], known: &[IpAddr]) -> Self {
        Self { virtual_interfaces: virtual_interfaces.to_vec(), ..self }.known_first(known)
    }

    /// For a namespace that is to be restored, whatever addresses it has.
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

    /// The addresses in `found` that can be reached from outside, `known` ones first.
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

    /// Whether the addresses have changed and one of `known` is still there. If none is, the namespace is
    /// being torn down.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn has_changed(&self, known: &[IpAddr]) -> Result<bool> {
        let set = |found: &[Address]| found.iter().map(|address| address.ip).collect();
        let (now, before): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) =
            (set(&addresses_in(&self.netns)?), set(&self.found));
        Ok(known.iter().any(|ip| now.contains(ip)) && now != before)
    }

    pub(super) fn id(&self) -> PodId {
        self.netns.inode()
    }

    /// The first address of each family.
    pub(super) fn sources(&self) -> impl Iterator<Item = IpAddr> {
        first_of_each(&self.addresses).into_iter().flatten()
    }

    /// The addresses that are entered for the programs, up to the limit.
    pub(super) fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let found: BTreeSet<IpAddr> = self.found.iter().map(|address| address.ip).collect();
        let others = found.into_iter().filter(|ip| !self.addresses.contains(ip));
        self.addresses.iter().copied().chain(others).take(POD_ADDRESSES)
    }

    /// The part of its row that follows from the namespace alone.
    pub(super) fn row(&self) -> Row {
        let [v4, v6] = first_of_each(&self.addresses);
        let of_first = self.found.iter().find(|found| self.addresses.first() == Some(&found.ip));
        let uplink = of_first.map_or(0, |found| found.interface);
        Row { uplink, v4, v6, ..Row::default() }
    }
}

fn addresses_in(netns: &Netns) -> Result<Vec<Address>> {
    netns.run(|| Ok(Routing::open()?.look()?.addresses()))?
}

/// The first address of each family: IPv4, IPv6.
pub(super) fn first_of_each(addresses: &[IpAddr]) -> [Option<IpAddr>; 2] {
    let first = |v4| addresses.iter().find(|ip| ip.is_ipv4() == v4).copied();
    [first(true), first(false)]
}

fn list(addresses: &[IpAddr]) -> String {
    match addresses {
        [] => "none".to_owned(),
        _ => addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", "),
    }
}
