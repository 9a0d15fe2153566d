//! What the kernel has: the map of pods, and what is in a pod's network namespace.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::membership::Reason;
use serde::Serialize;
use serde_json::Value;

use super::cluster::{CAST, Cluster};
use super::node::Node;
use crate::attached::attached;
use crate::netns::Netns;
use crate::process::succeed;

/// The sysctls that redirection sets or leans on.
const SYSCTLS: [&str; 8] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
    "net/ipv4/conf/all/src_valid_mark",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/all/accept_local",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/ip_forward",
];

// --- The map of pods

/// The map `pods` of a node, as bpftool prints it.
#[derive(Clone, Debug, Serialize)]
pub struct PodsMap {
    /// The node.
    pub node: &'static str,
    /// The command.
    pub command: String,
    /// What it printed, as JSON.
    pub dump: Value,
    /// The same, read.
    pub entries: Vec<PodsEntry>,
    /// Whether it holds both addresses of every pod of the node, with the right decision.
    pub ok: bool,
}

/// An address in an entry of the map `pods`.
#[derive(Clone, Debug, Serialize)]
pub struct PodsEntry {
    /// It.
    pub address: String,
    /// Whose address it is.
    pub pod: String,
    /// The key: the inode number of the pod's network namespace.
    pub pod_id: u64,
    /// Whether the pod is in the mesh.
    pub enrolled: bool,
    /// Why.
    pub reason: String,
    /// Whether its new connections are redirected.
    pub capture: bool,
}

impl PodsMap {
    pub(super) fn dump(cluster: &Cluster, node: &Node) -> Result<Self> {
        let pin = node.bpffs_dir.join("pods");
        let mut bpftool = Command::new("bpftool");
        let output = succeed(bpftool.args(["-j", "map", "dump", "pinned"]).arg(&pin))?;
        let dump: Value = serde_json::from_slice(&output.stdout).context("read bpftool's JSON")?;
        let rows = dump.as_array().context("read bpftool's JSON: expected a list")?;
        let mut entries = Vec::new();
        for row in rows {
            entries.extend(pod_entries(cluster, row)?);
        }
        entries.sort_by(|a, b| (&a.pod, &a.address).cmp(&(&b.pod, &b.address)));
        let mut expected = Vec::new();
        for cast in CAST.iter().filter(|cast| cluster.nodes[cast.node].name == node.name) {
            let pod = cluster.pod(cast.pod)?;
            for address in [pod.v4.to_string(), pod.v6.to_string()] {
                expected.push((cast.pod.to_owned(), address, pod.netns.inode()?, cast.enrolled));
            }
        }
        expected.sort();
        let found: Vec<_> = entries
            .iter()
            .map(|e| (e.pod.clone(), e.address.clone(), e.pod_id, e.enrolled && e.capture))
            .collect();
        let ok = found == expected;
        let command = format!("bpftool map dump pinned {}", pin.display());
        Ok(Self { node: node.name, command, dump, entries, ok })
    }
}

/// The addresses of one pod.
fn pod_entries(cluster: &Cluster, row: &Value) -> Result<[PodsEntry; 2]> {
    // bpftool prints fields, decisions and reasons by name, because the map carries its BTF.
    let (key, value) = (&row["formatted"]["key"], &row["formatted"]["value"]);
    let pod_id = key.as_u64().with_context(|| format!("read key {key} of the map pods"))?;
    let number = |field: &str| {
        value[field].as_u64().with_context(|| format!("read {field} of {pod_id} in the map pods"))
    };
    let is = |reason: &Reason| value["reason"] == format!("{reason:?}");
    let reason = Reason::ALL.into_iter().find(is).map_or("?", Reason::as_str);
    let entry = |field: &str| {
        let octets: [u8; 16] = serde_json::from_value(value[field]["octets"].clone())
            .with_context(|| format!("read {field} of {pod_id} in the map pods"))?;
        let address = Ipv6Addr::from(octets).to_canonical();
        let owner = CAST
            .iter()
            .map(|cast| cluster.pod(cast.pod))
            .find(|pod| pod.as_ref().is_ok_and(|pod| address == pod.v4 || address == pod.v6));
        anyhow::Ok(PodsEntry {
            address: address.to_string(),
            pod: owner.transpose()?.map_or("nobody".to_owned(), ToString::to_string),
            pod_id,
            enrolled: value["decision"] == "Enrolled",
            reason: reason.to_owned(),
            capture: number("flags")? & u64::from(redirect_ebpf::abi::POD_CAPTURE) != 0,
        })
    };
    Ok([entry("v4")?, entry("v6")?])
}

// --- A pod's network namespace

/// What there is in a pod's network namespace that a pod without a mesh has not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// The pod.
    pub pod: &'static str,
    /// Whether it is in the mesh.
    pub enrolled: bool,
    /// BPF programs: `tcx ingress lo`, `sk_lookup`.
    pub programs: Vec<String>,
    /// Rules beside the kernel's own.
    pub rules: Vec<String>,
    /// Routes in tables other than `local` and `main`.
    pub routes: Vec<String>,
    /// iptables and nftables tables, and tracked connections.
    pub netfilter: Vec<String>,
    /// Sysctls that differ from those of a new namespace.
    pub sysctls: Vec<String>,
    /// Where was looked, and what was not there to look at.
    pub looked_at: Vec<String>,
    /// Whether this is nothing for a pod that bypasses, and something for one in the mesh.
    pub ok: bool,
}

/// The footprint of every pod that bypasses, and of one in the mesh to compare them with.
pub(super) fn footprints(cluster: &Cluster) -> Result<Vec<Footprint>> {
    let new = Netns::new(cluster.topology.dir().path(), "new")?;
    let defaults = sysctls(&new)?;
    let compared = CAST.iter().find(|cast| cast.enrolled);
    CAST.iter()
        .filter(|cast| !cast.enrolled)
        .chain(compared)
        .map(|cast| {
            let netns = &cluster.pod(cast.pod)?.netns;
            let mut looked_at = vec!["tcx of all interfaces (BPF_PROG_QUERY)".to_owned()];
            looked_at.push("netns_ino in `bpftool link show`".to_owned());
            let attached = attached(netns)?.into_iter();
            let mut programs: Vec<_> = attached.map(|program| program.place).collect();
            looked_at.push("`bpftool net show`".to_owned());
            programs.extend(bpftool_net(netns)?);
            looked_at.push("`ip rule` and `ip route show table all`, -4 and -6".to_owned());
            let (rules, routes) = (rules(netns)?, routes(netns)?);
            let netfilter = netfilter(netns, &mut looked_at)?;
            looked_at.push(format!("sysctls {}", SYSCTLS.join(" ")));
            let changed = sysctls(netns)?
                .into_iter()
                .filter(|(name, value)| defaults.get(name) != Some(value));
            let sysctls: Vec<_> = changed.map(|(name, value)| format!("{name}={value}")).collect();
            let in_mesh = [&programs, &rules, &routes, &sysctls];
            let ok = netfilter.is_empty()
                && in_mesh.into_iter().all(|found| found.is_empty() != cast.enrolled);
            Ok(Footprint {
                pod: cast.pod,
                enrolled: cast.enrolled,
                programs,
                rules,
                routes,
                netfilter,
                sysctls,
                looked_at,
                ok,
            })
        })
        .collect()
}

/// What bpftool knows of by itself: XDP, clsact filters, and, when it is new enough, tcx.
fn bpftool_net(netns: &Netns) -> Result<Vec<String>> {
    let printed = netns.output("bpftool", &["-j", "net", "show"])?;
    let found: Vec<Value> = serde_json::from_str(&printed).context("read bpftool's JSON")?;
    ensure!(found.len() == 1, "read bpftool's JSON: expected one object, got {printed}");
    let kinds = found.first().and_then(Value::as_object).context("read bpftool's JSON")?;
    let listed = kinds.iter().flat_map(|(kind, list)| {
        list.as_array().into_iter().flatten().map(move |program| format!("{kind}: {program}"))
    });
    // tcx has been asked for already.
    Ok(listed.filter(|program| !program.contains("\"tcx/")).collect())
}

fn rules(netns: &Netns) -> Result<Vec<String>> {
    const KERNELS: [&str; 3] = [
        "0: from all lookup local",
        "32766: from all lookup main",
        "32767: from all lookup default",
    ];
    both_families(netns, &["rule", "show"], |rule| !KERNELS.contains(&rule))
}

fn routes(netns: &Netns) -> Result<Vec<String>> {
    both_families(netns, &["route", "show", "table", "all"], |route| {
        let mut words = route.split(' ').skip_while(|word| *word != "table");
        words.nth(1).is_some_and(|table| !["local", "main"].contains(&table))
    })
}

/// The lines of an `ip` command in both families that are worth showing.
fn both_families(netns: &Netns, args: &[&str], show: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        let printed = netns.output("ip", &[&[family], args].concat())?;
        let words = printed.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "));
        let shown = words.filter(|line| show(line));
        lines.extend(shown.map(|line| format!("{family} {line}")));
    }
    Ok(lines)
}

/// Tables of iptables, and tracked connections, of a namespace; notes what the kernel has not even.
fn netfilter(netns: &Netns, looked_at: &mut Vec<String>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in ["ip_tables_names", "ip6_tables_names", "nf_conntrack"] {
        let path = Path::new("/proc/thread-self/net").join(file);
        let content = netns.run(|| match fs::read_to_string(&path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        })?;
        match content {
            None => looked_at.push(format!("/proc/net/{file} (absent)")),
            Some(content) => {
                looked_at.push(format!("/proc/net/{file}"));
                found.extend(content.lines().map(|line| format!("{file}: {line}")));
            }
        }
    }
    // Asking nft would load the module, so ask only where there is one.
    if !Path::new("/sys/module/nf_tables").exists() {
        looked_at.push("module nf_tables (absent)".to_owned());
    } else if let Ok(ruleset) = netns.output("nft", &["list", "ruleset"]) {
        looked_at.push("`nft list ruleset`".to_owned());
        found.extend(ruleset.lines().map(str::to_owned));
    } else {
        looked_at.push("`nft list ruleset` (cannot tell: nft does not run here)".to_owned());
    }
    let path = "/proc/sys/net/netfilter/nf_conntrack_count";
    if Path::new(path).exists() {
        looked_at.push(path.to_owned());
        let count = netns.sysctl("net/netfilter/nf_conntrack_count")?;
        if count != "0" {
            found.push(format!("nf_conntrack_count {count}"));
        }
    } else {
        looked_at.push(format!("{path} (absent)"));
    }
    Ok(found)
}

fn sysctls(netns: &Netns) -> Result<BTreeMap<String, String>> {
    SYSCTLS.iter().map(|name| Ok(((*name).to_owned(), netns.sysctl(name)?))).collect()
}
