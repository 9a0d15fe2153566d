//! What enrollment leaves in a pod's network namespace, to show that a pod that bypasses has none of
//! it.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{ProgramError, ProgramInfo, SchedClassifier, TcAttachType};
use redirect_agent::dataplane::contents::contents;
use serde_json::Value;

use crate::netns::Netns;
use crate::process::{succeed, wait_for};

/// The sysctls that redirections of one kind or another are known to change.
const SYSCTLS: [&str; 14] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
    "net/ipv4/tcp_migrate_req",
    "net/ipv4/conf/all/src_valid_mark",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/eth0/rp_filter",
    "net/ipv4/conf/lo/rp_filter",
    "net/ipv4/conf/all/accept_local",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/lo/accept_local",
    "net/ipv4/conf/lo/route_localnet",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/ip_forward",
];

/// All that enrollment may leave in a pod's network namespace: rules, routes, interfaces, sysctls,
/// qdiscs and programs, in lines, and how often each is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint(BTreeMap<String, usize>);

/// Takes down what is there now.
pub fn footprint(netns: &Netns) -> Result<Footprint> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        for what in [&["rule", "show"][..], &["route", "show", "table", "all"]] {
            let output = netns.output("ip", &[&[family], what].concat())?;
            lines.extend(output.lines().map(|line| format!("{family}: {line}")));
        }
    }
    let links = netns.output("ip", &["-details", "-oneline", "link", "show"])?;
    lines.extend(links.lines().map(without_timers));
    for sysctl in SYSCTLS {
        lines.push(format!("{sysctl} = {}", netns.sysctl(sysctl)?));
    }
    let qdiscs = netns.output("tc", &["qdisc", "show"])?;
    lines.extend(qdiscs.lines().map(str::to_owned));
    lines.extend(programs(netns)?);
    Ok(Footprint::of(lines))
}

/// Maps with what the agent has decided or changed. What the others have comes and goes with packets and sockets.
const DECISIONS: [&str; 12] = [
    "pods",
    "addresses",
    "strays",
    "inbound_ports",
    "inbound_ranges",
    "virtual_ifs",
    "outbound_ports",
    "outbound_ranges",
    "switches",
    "noted",
    "switching",
    "saved_sysctls",
];

/// The pins below the agent's directory on a bpffs, which may not be there, and the rows of the pinned maps,
/// except those that packets make and the times at which something happened.
///
/// # Errors
///
/// When a map cannot be read.
pub fn state_in_bpffs(dir: &Path) -> Result<Footprint> {
    let mut lines = Vec::new();
    pins(dir, &mut lines)?;
    for map in DECISIONS.into_iter().filter(|map| dir.join(map).exists()) {
        for mut entry in contents(dir, map)?.entries {
            for time in ["capturedAtNs", "sinceNs", "untilNs"] {
                if let Some(fields) = entry.as_object_mut()
                    && fields.get(time).is_some_and(|at| at.as_u64() != Some(0))
                {
                    fields.insert(time.to_owned(), Value::Bool(true));
                }
            }
            lines.push(format!("{map}: {entry}"));
        }
    }
    Ok(Footprint::of(lines))
}

fn pins(dir: &Path, lines: &mut Vec<String>) -> Result<()> {
    let listing = || format!("list {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(listing)?,
    };
    for entry in entries {
        let path = entry.with_context(listing)?.path();
        lines.push(path.display().to_string());
        if path.is_dir() {
            pins(&path, lines)?;
        }
    }
    Ok(())
}

/// A bridge's timers run.
fn without_timers(link: &str) -> String {
    let mut timer = false;
    let words = link.split_whitespace().filter(|word| {
        let value = std::mem::replace(&mut timer, word.ends_with("_timer"));
        !value
    });
    words.collect::<Vec<_>>().join(" ")
}

impl Footprint {
    fn of(lines: Vec<String>) -> Self {
        let mut footprint = BTreeMap::new();
        for line in lines {
            *footprint.entry(line).or_default() += 1;
        }
        Self(footprint)
    }

    /// Adds what is somewhere else, under this name.
    pub fn add(&mut self, name: &str, other: &Self) {
        self.0.extend(other.0.iter().map(|(line, n)| (format!("{name}: {line}"), *n)));
    }

    /// What is there and was not before, and what was there before and is not; empty if nothing has
    /// changed.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let lacking = |sign: &str, a: &Self, b: &Self| -> Vec<String> {
            let lines = a.0.iter().filter(|(line, n)| b.0.get(*line) != Some(n));
            lines.map(|(line, _)| format!("{sign} {line}")).collect()
        };
        [lacking("+", self, before), lacking("-", before, self)].concat()
    }
}

/// Checks that a network namespace is as it was.
pub fn assert_unchanged(netns: &Netns, before: &Footprint) -> Result<()> {
    let changes = footprint(netns)?.changes_since(before);
    ensure!(changes.is_empty(), "{} has changed: {changes:#?}", netns.path().display());
    Ok(())
}

/// The BPF programs attached in a network namespace: to its interfaces, and to the namespace itself.
pub fn programs(netns: &Netns) -> Result<Vec<String>> {
    let mut programs = Vec::new();
    netns.run(|| {
        for interface in interfaces()? {
            for hook in [TcAttachType::Ingress, TcAttachType::Egress] {
                let attached = tcx(&interface, hook)?;
                let names = attached.iter().map(|program| program.name_as_str().unwrap_or("?"));
                programs.extend(names.map(|name| format!("{name} at {hook:?} of {interface}")));
                let names = filters(&interface, hook)?;
                programs
                    .extend(names.iter().map(|name| format!("{name} at {hook:?} of {interface}")));
            }
        }
        Ok(())
    })?;
    let links = links()?;
    let inode = netns.inode()?;
    for link in links.as_array().into_iter().flatten() {
        if link["netns_ino"].as_u64() == Some(inode) {
            programs.push(format!("{} on the namespace", link["attach_type"]));
        }
    }
    Ok(programs)
}

/// The tcx programs of an interface of this thread's namespace; none where the kernel has no tcx.
///
/// # Errors
///
/// When the kernel cannot be asked.
pub fn tcx(interface: &str, hook: TcAttachType) -> Result<Vec<ProgramInfo>> {
    match SchedClassifier::query_tcx(interface, hook) {
        Ok((_, programs)) => Ok(programs),
        Err(ProgramError::SyscallError(e)) if e.io_error.kind() == ErrorKind::InvalidInput => {
            Ok(Vec::new())
        }
        Err(e) => Err(e).with_context(|| format!("ask for the tcx programs of {interface}")),
    }
}

/// The names of the BPF filters of an interface of this thread's namespace, in the order in which they run.
///
/// # Errors
///
/// When `tc` cannot list them.
pub fn filters(interface: &str, hook: TcAttachType) -> Result<Vec<String>> {
    let direction = if hook == TcAttachType::Egress { "egress" } else { "ingress" };
    let listed = succeed(Command::new("tc").args(["filter", "show", "dev", interface, direction]))?;
    let listed = String::from_utf8(listed.stdout).context("read tc's output")?;
    // "filter protocol all pref 1 bpf chain 0 handle 0x1 redirect_lo direct-action … id 7 …"
    let names =
        listed.lines().filter_map(|line| line.split_once(" handle 0x")?.1.split(' ').nth(1));
    Ok(names.map(str::to_owned).collect())
}

/// All links of the machine, as bpftool lists them.
fn links() -> Result<Value> {
    // bpftool stops at a link that somebody else is just making.
    let listed = wait_for("a list of all BPF links", Duration::from_secs(10), || {
        let output = Command::new("bpftool").args(["-j", "link", "show"]).output()?;
        Ok(output.status.success().then_some(output.stdout))
    })?;
    serde_json::from_slice(&listed).context("read bpftool's output")
}

/// The interfaces of the namespace that the calling thread is in.
fn interfaces() -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").context("list interfaces")?;
    // Two lines of headings.
    let names = table.lines().skip(2).filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
}
