//! What the node is like, with or without an agent.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability};
use nix::{
    sys::{sysinfo::sysinfo, utsname::uname},
    unistd::getpid,
};
use procfs::{FromRead as _, process::MountInfos};
use serde_json::{Value, json};

use super::{Collector, Options, bounded};
use crate::{
    cni::{entry::PLUGIN, records},
    dataplane::monotonic_ns,
    output::{Document, Format},
    overrides, preflight,
};

/// Files of the kernel that say what BPF may do.
const SETTINGS: [&str; 6] = [
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/net/core/bpf_jit_enable",
    "/proc/sys/net/core/bpf_jit_harden",
    "/proc/sys/net/ipv6/conf/all/disable_ipv6",
    "/sys/kernel/security/lockdown",
    "/sys/kernel/security/lsm",
];

/// Collects.
pub(super) async fn collect<F: FnMut(&str)>(options: &Options, to: &mut Collector<F>) {
    to.json("node.json", node().map(|node| Document::new("Node", node)));
    let asked =
        preflight::Options { bpffs_dir: options.bpffs_dir.clone(), cni: options.cni.clone() };
    let report = bounded(move || Ok(preflight::check(&asked)));
    match report.await {
        Ok(report) => {
            to.text("check.txt", report.print(Format::Table));
            to.json("check.json", Ok(report.document()));
        }
        Err(error) => {
            to.lacks("check.txt", format!("{error:#}"));
            to.lacks("check.json", format!("{error:#}"));
        }
    }
    to.json("cni.json", cni(&options.cni.conf).map(|found| Document::new("Cni", found)));
    to.json("overrides.json", stored(&overrides::file(&options.state_dir)));
    let sandboxes = records::look(&options.state_dir);
    to.json("sandboxes.json", sandboxes.map(|found| json!({ "sandboxes": found })));
}

/// The running kernel's release.
pub(super) fn release() -> String {
    uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

fn node() -> Result<Value> {
    let name = uname().context("ask the kernel for its name")?;
    let capabilities = caps::read(None, CapSet::Effective).context("read the capabilities")?;
    let mut capabilities: Vec<String> = capabilities.iter().map(Capability::to_string).collect();
    capabilities.sort_unstable();
    let settings: BTreeMap<&str, Option<String>> = SETTINGS
        .into_iter()
        .map(|path| (path, fs::read_to_string(path).ok().map(|text| text.trim().to_owned())))
        .collect();
    let uptime = sysinfo().map(|info| info.uptime().as_secs()).unwrap_or_default();
    Ok(json!({
        "kernel": release(),
        "kernelVersion": name.version().to_string_lossy(),
        "machine": name.machine().to_string_lossy(),
        "uptimeSeconds": uptime,
        "monotonicNs": monotonic_ns()?,
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "pid": getpid().as_raw(),
        "capabilities": capabilities,
        "settings": settings,
        "mounts": mounts()?,
    }))
}

/// Where cgroups and bpffs are mounted.
fn mounts() -> Result<Vec<Value>> {
    const MOUNTS: &str = "/proc/self/mountinfo";
    let mounts = MountInfos::from_file(MOUNTS).with_context(|| format!("read {MOUNTS}"))?;
    let of_interest = mounts
        .iter()
        .filter(|mount| matches!(mount.fs_type.as_str(), "cgroup" | "cgroup2" | "bpf"))
        .map(|mount| json!({ "type": mount.fs_type, "at": mount.mount_point, "root": mount.root }));
    Ok(of_interest.collect())
}

/// A file that the agent stores; without one, nothing is stored.
fn stored(path: &Path) -> Result<Value> {
    match fs::read(path) {
        Ok(content) => {
            serde_json::from_slice(&content).with_context(|| format!("read {}", path.display()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(json!({})),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// The configuration files in the runtime's order. Of other plugins, only the names: their entries may have
/// credentials.
fn cni(dir: &Path) -> Result<Value> {
    let listed = match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    let mut paths = listed.with_context(|| format!("list {}", dir.display()))?;
    paths.sort();
    let files = paths.iter().filter(|path| path.is_file()).map(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match fs::read(path).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok()) {
            Some(content) => described(&name, &content),
            None => json!({ "file": name }),
        }
    });
    Ok(json!({ "dir": dir, "files": files.collect::<Vec<_>>() }))
}

fn described(file: &str, content: &Value) -> Value {
    let single = std::slice::from_ref(content);
    let plugins = content["plugins"].as_array().map_or(single, Vec::as_slice);
    let types: Vec<&Value> = plugins.iter().map(|plugin| &plugin["type"]).collect();
    let ours = plugins.iter().find(|plugin| plugin["type"] == PLUGIN);
    json!({ "file": file, "cniVersion": content["cniVersion"], "plugins": types, "entry": ours })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_other_plugins_only_the_types_are_told() {
        let list = json!({
            "cniVersion": "1.0.0",
            "name": "k8s",
            "plugins": [
                { "type": "calico", "token": "hunter2" },
                { "type": PLUGIN, "socket": "/s", "excludeNamespaces": ["kube-system"] },
            ],
        });
        let shown = described("10-calico.conflist", &list);
        assert_eq!(shown["plugins"], json!(["calico", PLUGIN]));
        assert_eq!(shown["entry"]["socket"], "/s");
        assert!(!shown.to_string().contains("hunter2"), "{shown}");
        let single = described("10-net.conf", &json!({ "type": "bridge", "token": "hunter2" }));
        assert_eq!(single["plugins"], json!(["bridge"]));
        assert!(!single.to_string().contains("hunter2"), "{single}");
    }
}
