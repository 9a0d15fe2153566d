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

use super::{
    Collector, Options,
    bounds::{all, beginning},
};
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

/// The longest file that is read, in bytes, and how many of a directory are.
const OF_FILE: usize = 1024 * 1024;
const FILES: usize = 100;

/// Collects.
pub(super) async fn collect<F: FnMut(&str)>(options: &Options, to: &mut Collector<F>) {
    let found = to.clock.bounded(node).await;
    to.json("node.json", found.map(|node| Document::new("Node", node)));
    let asked =
        preflight::Options { bpffs_dir: options.bpffs_dir.clone(), cni: options.cni.clone() };
    let report = to.clock.bounded(move || Ok(preflight::check(&asked)));
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
    let dir = options.cni.conf.clone();
    let found = to.clock.bounded(move || cni(&dir)).await;
    to.json("cni.json", found.map(|found| Document::new("Cni", found)));
    let file = overrides::file(&options.state_dir);
    let found = to.clock.bounded(move || stored(&file)).await;
    to.json("overrides.json", found);
    let dir = options.state_dir.clone();
    let found = to.clock.bounded(move || records::look(&dir)).await;
    to.json("sandboxes.json", found);
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
    let context = || format!("read {}", path.display());
    if !path.try_exists().with_context(context)? {
        return Ok(json!({}));
    }
    serde_json::from_slice(&all(path, OF_FILE)?).with_context(context)
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
    paths.retain(|path| path.is_file());
    let files = paths.iter().map(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Ok(found) = beginning(path, OF_FILE) else { return json!({ "file": name }) };
        if found.is_cut {
            return json!({ "file": name, "note": format!("longer than {OF_FILE} bytes: not read") });
        }
        match serde_json::from_slice::<Value>(&found.content) {
            Ok(content) => described(&name, &content),
            Err(_) => json!({ "file": name }),
        }
    });
    let files: Vec<Value> = files.take(FILES).collect();
    Ok(json!({ "dir": dir, "files": files, "leftOut": paths.len().saturating_sub(FILES) }))
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

    #[test]
    fn files_that_are_too_long_are_named_and_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{{ \"type\": \"bridge\" }}{}", " ".repeat(OF_FILE));
        fs::write(dir.path().join("10-long.conf"), &long).unwrap();
        fs::write(dir.path().join("20-short.conf"), long.trim()).unwrap();
        let found = cni(dir.path()).unwrap();
        assert_eq!(found["files"][0]["note"], "longer than 1048576 bytes: not read", "{found}");
        assert_eq!(found["files"][1]["plugins"], json!(["bridge"]), "{found}");
        let error = format!("{:#}", stored(&dir.path().join("10-long.conf")).unwrap_err());
        assert!(error.contains("10-long.conf is longer than 1048576 bytes"), "{error}");
        assert_eq!(stored(&dir.path().join("none")).unwrap(), json!({}));
    }
}
