//! What a test run must not leave behind: network namespaces, pins, mounts, processes.
//!
//! The run has mounts of its own, so that what somebody else does on the machine meanwhile is not
//! taken for ours, and so that nothing survives a run that is killed. BPF links are not looked for:
//! each lives by a pin or by a process that holds it.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::setup::BPFFS;

/// Where iproute2 keeps the named network namespaces.
const NETNS_DIR: &str = "/run/netns";

/// How long the kernel may take to free what the last test gave up.
const PATIENCE: Duration = Duration::from_secs(5);

/// One thing that outlives a process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Thing {
    /// A named network namespace, as `ip netns list` shows it.
    Netns(String),
    /// A file below a bpffs.
    Pin(PathBuf),
    /// A mount point.
    Mount(String),
    /// A process that a test started: its id and its command line.
    Process(Pid, String),
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Netns(name) => write!(f, "network namespace {name}"),
            Self::Pin(path) => write!(f, "pin {}", path.display()),
            Self::Mount(point) => write!(f, "mount at {point}"),
            Self::Process(pid, line) => write!(f, "process {pid} (ended now): {line}"),
        }
    }
}

/// What there is of these things at one moment; processes are known by being our children.
pub(crate) struct Snapshot(BTreeSet<Thing>);

impl Snapshot {
    /// Looks at what our mounts show.
    pub(crate) fn take() -> Result<Self> {
        let mut things = BTreeSet::new();
        for name in entries(Path::new(NETNS_DIR))? {
            let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
            things.insert(Thing::Netns(name));
        }
        pins(Path::new(BPFFS), &mut things)?;
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        things.extend(points.map(|point| Thing::Mount(point.to_owned())));
        Ok(Self(things))
    }
}

/// Gives us and what we start mounts of our own, with an empty bpffs and no named network
/// namespace, and makes us the parent of the processes that tests leave running. Needs root.
pub(crate) fn isolate() -> Result<()> {
    prctl::set_child_subreaper(true).context("adopt orphaned processes")?;
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace for the tests")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .context("keep the tests' mounts to themselves")?;
    fs::create_dir_all(NETNS_DIR).with_context(|| format!("create {NETNS_DIR}"))?;
    for (kind, directory) in [("bpf", BPFFS), ("tmpfs", NETNS_DIR)] {
        mount(Some(kind), directory, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount a {kind} at {directory} for the tests"))?;
    }
    Ok(())
}

/// What there is now and was not `before`, after patience; processes among it are ended.
pub(crate) fn since(before: &Snapshot) -> Result<Vec<Thing>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut left: Vec<_> = Snapshot::take()?.0.difference(&before.0).cloned().collect();
        let processes = children()?;
        left.extend(processes.iter().cloned());
        if left.is_empty() || Instant::now() > deadline {
            for process in processes {
                if let Thing::Process(pid, _) = process {
                    // Gone by itself in this instant: just as well.
                    let _ = kill(pid, Signal::SIGKILL);
                }
            }
            return Ok(left);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Our running children; the dead are buried on the way.
fn children() -> Result<Vec<Thing>> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
            Ok(_) => {}
            Err(error) => return Err(error).context("wait for orphaned processes"),
        }
    }
    let mut children = Vec::new();
    for directory in entries(Path::new("/proc"))? {
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Ok(pid) = name.parse() else { continue };
        // A process may end while we read about it.
        let Ok(stat) = fs::read_to_string(directory.join("stat")) else { continue };
        if parent(&stat) != Some(Pid::this()) {
            continue;
        }
        let line = fs::read(directory.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        children.push(Thing::Process(Pid::from_raw(pid), line.trim_end().to_owned()));
    }
    Ok(children)
}

/// The parent in a line of `/proc/<pid>/stat`: `<pid> (<name>) <state> <parent> …`.
fn parent(stat: &str) -> Option<Pid> {
    // The name may hold anything, also ") ".
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(1)?.parse().ok().map(Pid::from_raw)
}

fn pins(directory: &Path, things: &mut BTreeSet<Thing>) -> Result<()> {
    for path in entries(directory)? {
        if path.is_dir() {
            pins(&path, things)?;
        }
        things.insert(Thing::Pin(path));
    }
    Ok(())
}

/// The paths in `directory`; none where there is no such directory.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect();
    match read() {
        Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.with_context(|| format!("list {}", directory.display())),
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::Pid;

    use super::parent;

    #[test]
    fn a_process_name_may_look_like_the_end_of_a_name() {
        assert_eq!(parent("7 (a) S 1 (b) R 42 7 7 0"), Some(Pid::from_raw(42)));
        assert_eq!(parent("7 (sh) S 3 7 7 0"), Some(Pid::from_raw(3)));
        assert_eq!(parent(""), None);
    }
}
