//! One process at a time owns the pins below a directory of bpffs; two would undo each other's work.
//!
//! The owner holds a lock on the directory (flock(2)) as long as it lives, so no lock is ever left behind.
//! /proc/locks says who the owner is.

use std::{
    fmt, fs,
    os::linux::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use procfs::{Lock, LockType};

use crate::text::shortened;

/// How long to wait for an owner that is exiting.
const PATIENCE: Duration = Duration::from_millis(800);
const LOOK: Duration = Duration::from_millis(20);
/// How many characters of the owner's command line are told.
const COMMAND: usize = 60;

/// Holds the directory until dropped.
#[derive(Debug)]
pub struct Owner {
    lock: Flock<fs::File>,
}

impl Owner {
    /// Takes the directory.
    ///
    /// # Errors
    ///
    /// [`Owned`] when another process has it.
    pub(super) fn take(dir: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let mut file = fs::File::open(dir).with_context(|| format!("open {}", dir.display()))?;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self { lock }),
                Err((again, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                    thread::sleep(LOOK);
                    file = again;
                }
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(Owned { dir: dir.to_owned(), by: find(dir) }.into());
                }
                Err((_, e)) => return Err(e).with_context(|| format!("lock {}", dir.display())),
            }
        }
    }

    /// Whether the directory is still where it was: a former owner may have removed it.
    pub(super) fn is_at(&self, dir: &Path) -> bool {
        let (here, there) = (self.lock.metadata(), fs::metadata(dir));
        here.is_ok_and(|here| there.is_ok_and(|there| here.st_ino() == there.st_ino()))
    }
}

/// Another process owns the directory.
#[derive(Debug)]
pub struct Owned {
    dir: PathBuf,
    /// `None` if it is unknown, for example a process of another pid namespace.
    by: Option<Process>,
}

impl fmt::Display for Owned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is in use by ", self.dir.display())?;
        match &self.by {
            Some(Process { pid, command, since }) => {
                write!(f, "process {pid} ({command})")?;
                if let Some(since) = since {
                    write!(f, ", since {}", humantime::format_rfc3339_seconds(*since))?;
                }
            }
            None => f.write_str("a process of another pid namespace")?,
        }
        f.write_str("; stop it first")
    }
}

impl std::error::Error for Owned {}

#[derive(Debug)]
struct Process {
    pid: i32,
    command: String,
    since: Option<SystemTime>,
}

/// The process that holds the lock.
fn find(dir: &Path) -> Option<Process> {
    let inode = fs::metadata(dir).ok()?.st_ino();
    // A lock's device is not always the one that stat(2) shows for the mount.
    let of_dir = |lock: &Lock| lock.lock_type == LockType::FLock && lock.inode == inode;
    let pid = procfs::locks().ok()?.into_iter().find(of_dir)?.pid?;
    let process = procfs::process::Process::new(pid).ok()?;
    let command = shortened(&process.cmdline().ok()?.join(" "), COMMAND);
    let since = process.stat().ok().and_then(|stat| {
        let after_boot = stat.starttime / procfs::ticks_per_second();
        let since = procfs::boot_time_secs().ok()? + after_boot;
        Some(SystemTime::UNIX_EPOCH + Duration::from_secs(since))
    });
    Some(Process { pid, command, since })
}
