//! Cgroups for the processes of a test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_tests::netns::Netns;
use redirect_tests::process::wait_for;

/// A cgroup, which goes away when dropped. Its processes have to be gone by then.
pub struct Cgroup {
    /// From the innermost to the outermost.
    dirs: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes one at this path below one that is the test's alone.
    pub fn new(hierarchy: &Path, path: &str) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = hierarchy.join(format!("redirect-test-{}-{number}", process::id()));
        let inner = root.join(path);
        fs::create_dir_all(&inner).with_context(|| format!("make cgroup {}", inner.display()))?;
        let below = path.split('/').count();
        Ok(Self { dirs: inner.ancestors().take(below + 1).map(Path::to_owned).collect() })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dirs[0]
    }

    /// Runs `script` in a shell in it.
    pub fn shell(&self, netns: Option<&Netns>, script: &str) -> Command {
        shell_in(self.dir(), netns, script)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for dir in &self.dirs {
            // The kernel takes a moment to let go of processes. Whatever is left shows.
            let _left = wait_for("a cgroup to be empty", Duration::from_secs(5), || {
                Ok((fs::remove_dir(dir).is_ok() || !dir.exists()).then_some(()))
            });
        }
    }
}

/// Runs `script` in a shell in a cgroup and a network namespace.
pub fn shell_in(cgroup: &Path, netns: Option<&Netns>, script: &str) -> Command {
    let mut command = match netns {
        Some(netns) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={}", netns.path().display())).arg("bash");
            command
        }
        None => Command::new("bash"),
    };
    command.arg("-c").arg(format!("echo $$ > {}/cgroup.procs && {script}", cgroup.display()));
    command
}

/// Where the hierarchy of version 2 is mounted.
pub fn unified() -> Result<PathBuf> {
    hierarchy(|kind, _| kind == "cgroup2").context("no cgroup v2 is mounted")
}

/// A hierarchy that processes may be put into: that of version 2, or that of pids, which nothing is
/// limited by.
pub fn any_hierarchy() -> Result<PathBuf> {
    let usable = |kind: &str, options: &str| {
        kind == "cgroup2" || (kind == "cgroup" && options.split(',').any(|o| o == "pids"))
    };
    hierarchy(usable).context("no cgroup hierarchy is mounted")
}

fn hierarchy(usable: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let &[_, at, kind, options, ..] = fields.as_slice() else { return None };
        usable(kind, options).then(|| PathBuf::from(at))
    })
}
