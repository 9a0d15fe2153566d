//! Network namespaces: opening one, distinguishing it from other files, and running code inside it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        stat::fstat,
        statfs::{NSFS_MAGIC, fstatfs},
    },
};

/// An open network namespace. While this is held, the namespace stays alive and its inode number unique.
#[derive(Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    inode: u32,
    path: PathBuf,
}

impl Netns {
    /// Opens the network namespace at `path`: a bind mount such as `/var/run/netns/NAME`, or a
    /// `/proc/PID/ns/net`.
    ///
    /// # Errors
    ///
    /// When the file is missing, or is not a network namespace.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)
            .with_context(|| format!("open network namespace {}", path.display()))?;
        Self::from_fd(file.into(), path)
    }

    /// Takes ownership of an open network namespace. `path` names it in messages.
    ///
    /// # Errors
    ///
    /// When the descriptor is not that of a network namespace.
    pub fn from_fd(fd: OwnedFd, path: &Path) -> Result<Self> {
        let fs = fstatfs(&fd).with_context(|| format!("stat {}", path.display()))?;
        // Other kinds of namespaces live on the same filesystem.
        if fs.filesystem_type() != NSFS_MAGIC || namespace_type(&fd) != Some(libc::CLONE_NEWNET) {
            bail!(
                "{} is not a network namespace; give a bind mount such as /var/run/netns/NAME, or /proc/PID/ns/net",
                path.display()
            );
        }
        let stat = fstat(&fd).with_context(|| format!("stat {}", path.display()))?;
        let inode = u32::try_from(stat.st_ino)
            .with_context(|| format!("use inode number {} of {}", stat.st_ino, path.display()))?;
        Ok(Self { fd: Arc::new(fd), inode, path: path.to_owned() })
    }

    /// Whether the network namespace at `path` is this one.
    ///
    /// # Errors
    ///
    /// When that is unknown. If nothing is at the path, it is not this one.
    pub fn is_at(&self, path: &Path) -> Result<bool> {
        let there = match fs::metadata(path) {
            Err(e) if is_gone(&e) => return Ok(false),
            there => there.with_context(|| format!("look at {}", path.display()))?,
        };
        let here = fstat(&self.fd).with_context(|| format!("stat {}", self.path.display()))?;
        // All namespaces are on one filesystem, on which inode numbers are unique.
        Ok((there.ino(), there.dev()) == (here.st_ino, here.st_dev))
    }

    /// The inode number, which is unique among living namespaces.
    pub fn inode(&self) -> u32 {
        self.inode
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its descriptor.
    pub fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Whether it is the node's own: the kernel's initial one, or that of the node's first process. If
    /// process 1 is the first of a container, and shares our namespace, it says nothing.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn is_nodes(&self) -> Result<bool> {
        // Only the initial one has this file. Source: Linux `net/core/sysctl_net_core.c`, `net_core_table`.
        const OF_FIRST: &str = "/proc/sys/net/core/dev_weight";
        let is_first = self.run(|| Path::new(OF_FIRST).try_exists())?;
        let is_first = is_first.with_context(|| format!("look for {OF_FIRST}"))?;
        let with_us = self.is_at(Path::new("/proc/self/ns/net"))?;
        // The agent may lack the rights to read that process.
        let with_its_first = || self.is_at(Path::new("/proc/1/ns/net")).unwrap_or(false);
        Ok(is_first || (!with_us && with_its_first()))
    }

    /// Runs `f` inside the namespace, on a thread that exists for this alone.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or `f` panics.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = thread::Builder::new()
                .name(format!("netns-{}", self.inode))
                .spawn_scoped(scope, || {
                    setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
                    nix::Result::Ok(f())
                })
                .context("start a thread")?;
            match inside.join() {
                Ok(result) => result
                    .with_context(|| format!("enter network namespace {}", self.path.display())),
                Err(_) => bail!("a thread panicked in network namespace {}", self.path.display()),
            }
        })
    }
}

/// Whether an error says that nothing is there. Any other error leaves that open. A process that has exited
/// is gone from `/proc`, too.
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Which kind of namespace it is, one of `CLONE_NEW*`. Source: Linux `include/uapi/linux/nsfs.h`.
#[expect(unsafe_code, reason = "an ioctl without an argument")]
fn namespace_type(fd: &OwnedFd) -> Option<i32> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: it reads nothing and writes nothing.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    (kind >= 0).then_some(kind)
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The network namespaces that are mounted in a directory; other files are passed over.
///
/// # Errors
///
/// When the directory cannot be read; one that does not exist is empty.
pub fn in_dir(dir: &Path) -> Result<Vec<Netns>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list {}", dir.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        found.extend(Netns::open(&entry?.path()));
    }
    Ok(found)
}
