//! The cgroups (version 2) of processes: kubelet's, whose connections are probes, and the proxies', whose
//! sockets are let out of pods.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use procfs::process::Process;

/// The cgroup that a process is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Its path as seen by the process that was asked: `/system.slice/kubelet.service`.
    pub path: String,
    /// Its directory, reached by that process's root.
    pub dir: PathBuf,
}

impl Cgroup {
    /// The cgroup of `process`, as `viewer` sees it: the agent's own container may show cgroups otherwise,
    /// or not at all.
    ///
    /// # Errors
    ///
    /// When the process has none, or `viewer` has no cgroup v2 mounted that shows it.
    pub fn of(process: &Process, viewer: &Process) -> Result<Self> {
        let (path, mounts) = in_cgroup_namespace_of(viewer, || {
            let cgroups = process.cgroups().context("read its cgroups")?;
            let unified = cgroups.0.into_iter().find(|cgroup| cgroup.hierarchy == 0);
            let path = unified.context("it has no cgroup of version 2")?.pathname;
            Ok((path, viewer.mountinfo().context("read the mounts")?))
        })?;
        let below = mounts
            .into_iter()
            .filter(|mount| mount.fs_type == "cgroup2")
            .find_map(|mount| {
                let inside = Path::new(&path).strip_prefix(&mount.root).ok()?;
                Some(mount.mount_point.strip_prefix("/").ok()?.join(inside))
            })
            .with_context(|| format!("process {} has no cgroup v2 mounted", viewer.pid))?;
        let dir = PathBuf::from(format!("/proc/{}/root", viewer.pid)).join(below);
        Ok(Self { path, dir })
    }

    /// Its directory, open, and its number: the directory's inode, which the kernel uses for no other cgroup.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn open(&self) -> Result<(File, u64)> {
        let open = || {
            let dir = File::open(&self.dir)?;
            let id = dir.metadata()?.ino();
            io::Result::Ok((dir, id))
        };
        open().with_context(|| format!("open cgroup {}", self.dir.display()))
    }
}

/// Runs `read` in a thread that sees cgroups as `viewer` does.
fn in_cgroup_namespace_of<T: Send>(
    viewer: &Process,
    read: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let namespace = File::open(format!("/proc/{}/ns/cgroup", viewer.pid))
        .context("open its cgroup namespace")?;
    let entered = || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWCGROUP)
            .context("enter its cgroup namespace")?;
        read()
    };
    thread::scope(|scope| scope.spawn(entered).join()).map_err(|_| anyhow!("a thread panicked"))?
}

/// The number of the cgroup that a proxy, process `pid`, makes its sockets in.
///
/// # Errors
///
/// When it cannot be found out.
pub fn of_proxy(pid: i32) -> Result<u64> {
    let process = Process::new(pid).with_context(|| format!("find process {pid}"))?;
    let number = |viewer: &Process| Cgroup::of(&process, viewer)?.open().map(|(_, number)| number);
    number(&process).or_else(|first| {
        let init = Process::new(1).context("find process 1")?;
        number(&init).map_err(|_| first.context(format!("find the cgroup of process {pid}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_of_a_process_is_the_directory_that_lists_it() {
        let own = Process::myself().unwrap();
        let cgroup = Cgroup::of(&own, &own).unwrap();
        let (_, number) = cgroup.open().unwrap();
        let listed = std::fs::read_to_string(cgroup.dir.join("cgroup.procs")).unwrap();
        assert!(listed.lines().any(|pid| pid == own.pid.to_string()), "{cgroup:?}: {listed}");
        assert_eq!(of_proxy(own.pid).unwrap(), number);
    }

    #[test]
    fn process_that_is_gone_has_none() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        let error = format!("{:#}", of_proxy(pid).unwrap_err());
        assert!(error.contains(&format!("process {pid}")), "{error}");
    }
}
