//! Finds kubelet, whose own cgroup distinguishes its probes from all other traffic.

use std::{
    fmt,
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use procfs::process::Process;
use serde::{Deserialize, Serialize};

use crate::{cgroup::Cgroup, finder};

/// Names of the processes in which kubelet runs: its own, MicroK8s', k3s'.
const NAMES: [&str; 5] = ["kubelet", "kubelite", "k3s-server", "k3s-agent", "k3s"];
/// Set-user-id and set-group-id. Source: `inode(7)`.
const SET_ID: u32 = 0o6000;
/// What kubelet puts into the names of all pods' cgroups.
const PODS: &str = "kubepods";

/// A kubelet of this node, and its cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kubelet {
    /// Its process id.
    pub pid: u32,
    /// Its cgroup (v2), as it sees it: `/system.slice/kubelet.service`.
    pub cgroup: String,
    /// The directory of that cgroup.
    #[serde(skip)]
    dir: PathBuf,
    /// When it was started, in ticks since boot, because process ids are reused.
    #[serde(skip)]
    started: u64,
}

impl fmt::Display for Kubelet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} in cgroup {}", self.pid, self.cgroup)
    }
}

impl Kubelet {
    /// Looks for it among the node's processes. If there are several, takes the youngest.
    ///
    /// # Errors
    ///
    /// When there is none, or it is not in a cgroup of its own.
    pub fn find() -> Result<Self> {
        let hosts = finder::hosts()?;
        let mut found: Option<(Process, u64)> = None;
        for process in procfs::process::all_processes().context("list the processes")? {
            // A process that has just exited is skipped.
            let Ok(process) = process else { continue };
            let Ok(started) = started(&process, &hosts) else { continue };
            if found.as_ref().is_none_or(|(_, youngest)| *youngest <= started) {
                found = Some((process, started));
            }
        }
        let (process, started) = found.with_context(|| {
            format!(
                "no process of this node is called {} (in a container, the agent needs hostPID and \
                 hostNetwork)",
                NAMES.join(", ")
            )
        })?;
        Self::of(&process, started).with_context(|| format!("use kubelet, process {}", process.pid))
    }

    fn of(process: &Process, started: u64) -> Result<Self> {
        let pid = u32::try_from(process.pid).context("convert a process id")?;
        // Through its own root, because the agent's container may show cgroups differently.
        let Cgroup { path: cgroup, dir } = Cgroup::of(process, process)?;
        if cgroup == "/" {
            bail!(
                "it is in the root cgroup, and so is told from no other process; let its service \
                 manager give it a cgroup of version 2"
            );
        }
        if let Some(pods) = cgroup_of_pods(&dir)? {
            bail!(
                "the pods' cgroup {} is within its own: they would pass for kubelet",
                pods.display()
            );
        }
        Ok(Self { pid, cgroup, dir, started })
    }

    /// Its cgroup, open, and the cgroup's id.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn open_cgroup(&self) -> Result<(File, u64)> {
        Cgroup { path: self.cgroup.clone(), dir: self.dir.clone() }.open()
    }

    /// Whether it still runs in that cgroup.
    pub fn stands(&self) -> bool {
        let look = || {
            let process = Process::new(i32::try_from(self.pid)?)?;
            let same = process.stat()?.starttime == self.started;
            anyhow::Ok(same && Cgroup::of(&process, &process)?.path == self.cgroup)
        };
        look().unwrap_or(false)
    }
}

/// When the process was started, if it may be a kubelet. Anybody can take that name, so it has to run as
/// root, on the node's own network, and outside any pod. A user can also give the name to a program that
/// becomes root by itself, such as su: that one has to be left out.
fn started(process: &Process, hosts: &std::collections::BTreeSet<u32>) -> Result<u64> {
    let stat = process.stat()?;
    if !NAMES.contains(&stat.comm.as_str()) || process.uid()? != 0 {
        bail!("not kubelet");
    }
    let program = fs::metadata(format!("/proc/{}/exe", process.pid))?;
    if process.status()?.ruid != 0 || program.mode() & SET_ID != 0 {
        bail!("not kubelet");
    }
    let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", process.pid))?;
    let netns = fs::read_link(format!("/proc/{}/ns/net", process.pid))?;
    if finder::pod_of(&cgroups).is_some()
        || !finder::inode_of(&netns).is_some_and(|inode| hosts.contains(&inode))
    {
        bail!("not kubelet");
    }
    Ok(stat.starttime)
}

/// A cgroup in `dir` that contains pods.
fn cgroup_of_pods(dir: &Path) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("list {}", dir.display()))?;
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy().contains(PODS) {
            return Ok(Some(entry.path()));
        }
        if let Some(found) = cgroup_of_pods(&entry.path())? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
