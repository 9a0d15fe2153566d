//! The cgroups (v2) of processes: kubelet's, whose connections are probes, and the proxies', whose sockets
//! may leave pods.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs},
};
use procfs::{
    FromRead as _, ProcessCGroups,
    process::{MountInfos, Process},
};

use crate::process_ref::ProcessRef;

/// The number of the root cgroup. Source: Linux `fs/kernfs/dir.c`, `kernfs_create_root`.
const ROOT: u64 = 1;

/// The cgroup that a process is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Its path as seen by the process that was asked: `/system.slice/kubelet.service`.
    pub path: String,
    /// Its directory, reached by that process's root.
    pub dir: PathBuf,
}

impl Cgroup {
    /// The cgroup of `process`, as `viewer` sees it: the agent's own container may show cgroups differently,
    /// or not at all.
    ///
    /// # Errors
    ///
    /// When the process has none, or `viewer` has no cgroup v2 mounted that shows it.
    pub fn of(process: &Process, viewer: &Process) -> Result<Self> {
        let (path, mounts) =
            as_seen_by(viewer, || path_in(process.cgroups().context("read its cgroups")?))?;
        Self::at(path, viewer.pid, &mounts)
    }

    /// The cgroup at this path, as process `viewer`, with these mounts, sees it.
    pub(crate) fn at(path: String, viewer: i32, mounts: &MountInfos) -> Result<Self> {
        let below = mounts
            .iter()
            .filter(|mount| mount.fs_type == "cgroup2")
            .find_map(|mount| {
                let inside = Path::new(&path).strip_prefix(&mount.root).ok()?;
                // A cgroup of another cgroup namespace, which this one does not show, begins with `..`.
                if !inside.components().all(|part| matches!(part, Component::Normal(_))) {
                    return None;
                }
                Some(mount.mount_point.strip_prefix("/").ok()?.join(inside))
            })
            .with_context(|| format!("process {viewer} has no cgroup v2 mounted"))?;
        let dir = PathBuf::from(format!("/proc/{viewer}/root")).join(below);
        Ok(Self { path, dir })
    }

    /// Its directory, open, and its id: the directory's inode number, which the kernel never reuses.
    ///
    /// # Errors
    ///
    /// When it is gone, or something else is mounted there.
    pub fn open(&self) -> Result<(File, u64)> {
        let open = || {
            let dir = File::open(&self.dir)?;
            if fstatfs(&dir)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
                return Err(io::Error::other("it is on no cgroup v2"));
            }
            let id = dir.metadata()?.ino();
            Ok((dir, id))
        };
        open().with_context(|| format!("open cgroup {}", self.dir.display()))
    }
}

/// The path of the v2 cgroup.
pub(crate) fn path_in(cgroups: ProcessCGroups) -> Result<String> {
    let unified = cgroups.0.into_iter().find(|cgroup| cgroup.hierarchy == 0);
    Ok(unified.context("it has no cgroup of version 2")?.pathname)
}

/// The cgroups of the process's threads.
fn paths_of_threads(process: &Process) -> Result<BTreeSet<String>> {
    let mut paths = BTreeSet::new();
    for thread in process.tasks().context("list its threads")?.flatten() {
        let file = format!("/proc/{}/task/{}/cgroup", process.pid, thread.tid);
        // A thread that has exited has none.
        if let Ok(cgroups) = ProcessCGroups::from_file(file) {
            paths.insert(path_in(cgroups)?);
        }
    }
    ensure!(!paths.is_empty(), "it has no thread any more");
    Ok(paths)
}

/// The cgroup of its parent, if that is visible.
fn path_of_parent(process: &Process) -> Option<String> {
    let parent = Process::new(process.stat().ok()?.ppid).ok()?;
    path_in(parent.cgroups().ok()?).ok()
}

/// What `read` finds in a thread that sees cgroups as `viewer` does, and the mounts of `viewer`.
fn as_seen_by<T: Send>(
    viewer: &Process,
    read: impl FnOnce() -> Result<T> + Send,
) -> Result<(T, MountInfos)> {
    let namespace = File::open(format!("/proc/{}/ns/cgroup", viewer.pid))
        .context("open its cgroup namespace")?;
    let entered = || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWCGROUP)
            .context("enter its cgroup namespace")?;
        Ok((read()?, viewer.mountinfo().context("read the mounts")?))
    };
    thread::scope(|scope| scope.spawn(entered).join()).map_err(|_| anyhow!("a thread panicked"))?
}

/// The ids of the cgroups in which a proxy creates its sockets: those of its threads, which are nearly always
/// in the same one.
///
/// # Errors
///
/// When they are unknown, or one is its parent's, too: if containers have no cgroups of their own, cgroups
/// identify nobody.
pub fn of_proxy(proxy: &ProcessRef) -> Result<BTreeSet<u64>> {
    let pid = proxy.pid();
    let find = || {
        let process = Process::new(pid).context("look at it")?;
        let numbers = numbers_of_proxy(&process, &process).or_else(|first| {
            let init = Process::new(1).context("find process 1")?;
            numbers_of_proxy(&process, &init).map_err(|_| first)
        })?;
        // Otherwise it may have been another process with that id.
        ensure!(proxy.is_alive()?, "it has ended");
        ensure!(
            !numbers.contains(&ROOT),
            "it is in the root cgroup of version 2, as on nodes with cgroup v1"
        );
        Ok(numbers)
    };
    find().with_context(|| format!("find the cgroup of process {pid}"))
}

fn numbers_of_proxy(process: &Process, viewer: &Process) -> Result<BTreeSet<u64>> {
    let ((paths, parents), mounts) =
        as_seen_by(viewer, || Ok((paths_of_threads(process)?, path_of_parent(process))))?;
    ensure!(
        parents.is_none_or(|parents| !paths.contains(&parents)),
        "it shares its cgroup with its parent, as on nodes with cgroup v1, or behind a wrapper that does not exec"
    );
    let number = |path| Ok(Cgroup::at(path, viewer.pid, &mounts)?.open()?.1);
    paths.into_iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_without_a_root_shows_no_cgroup() {
        for (root, shows) in [("/a", true), ("", false)] {
            let line = format!("30 23 0:26 {root} /sys/fs/cgroup rw - cgroup2 none rw\n");
            let mounts = MountInfos::from_read(line.as_bytes()).unwrap();
            assert_eq!(Cgroup::at("/a/b".to_owned(), 1, &mounts).is_ok(), shows, "{root:?}");
        }
    }

    #[test]
    fn cgroup_of_a_process_is_the_directory_that_lists_it() {
        let own = Process::myself().unwrap();
        let cgroup = Cgroup::of(&own, &own).unwrap();
        let (_, number) = cgroup.open().unwrap();
        let listed = std::fs::read_to_string(cgroup.dir.join("cgroup.procs")).unwrap();
        assert!(listed.lines().any(|pid| pid == own.pid.to_string()), "{cgroup:?}: {listed}");
        match numbers_of_proxy(&own, &own) {
            Ok(numbers) => assert_eq!(numbers, BTreeSet::from([number])),
            // So it is where nobody has a cgroup of its own.
            Err(e) => assert!(format!("{e:#}").contains("cgroup v1"), "{e:#}"),
        }
    }
}
