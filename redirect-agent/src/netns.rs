//! Network namespaces: opening one, distinguishing it from other files, and running code inside it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
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

    /// How many levels below the agent's user namespace its owner is: 0 if the agent's own is the owner.
    /// `None`: the owner is neither that nor below it, and the agent cannot enter the namespace.
    ///
    /// # Errors
    ///
    /// When a system call fails.
    pub fn owner_depth(&self) -> Result<Option<u32>> {
        const OWN: &str = "/proc/self/ns/user";
        let own = fs::metadata(OWN).with_context(|| format!("look at {OWN}"))?;
        let look = || format!("look for the owner of {}", self.path.display());
        let mut owner = match related(&self.fd, libc::NS_GET_USERNS) {
            // Source: Linux `kernel/user_namespace.c`, `ns_get_owner`.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => return Ok(None),
            owner => owner.with_context(look)?,
        };
        let mut depth = 0;
        loop {
            let stat = fstat(&owner).with_context(look)?;
            if (stat.st_ino, stat.st_dev) == (own.ino(), own.dev()) {
                return Ok(Some(depth));
            }
            // The kernel limits the depth.
            owner = related(&owner, libc::NS_GET_PARENT).with_context(look)?;
            depth += 1;
        }
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

/// The owner or the parent of a namespace, as `request` says. Source: `ioctl_ns(2)`.
#[expect(unsafe_code, reason = "an ioctl without an argument that opens a file")]
fn related(fd: &OwnedFd, request: libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: it reads nothing and writes nothing.
    let fd = unsafe { libc::ioctl(fd.as_raw_fd(), request) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        io::Read as _,
        process::{Child, Command, Stdio},
    };

    use super::*;

    /// The network namespace of a process so many user namespaces below ours. The process ends when it is
    /// dropped, or when its standard input is closed.
    pub fn below_us(depth: u32) -> (Child, Netns) {
        let mut command = Command::new("unshare");
        for _ in 1..depth {
            command.args(["--user", "--map-root-user", "unshare"]);
        }
        let mut child = command
            .args(["--user", "--net", "sh", "-c", "echo && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let netns = Netns::open(Path::new(&format!("/proc/{}/ns/net", child.id()))).unwrap();
        (child, netns)
    }

    #[test]
    fn owner_is_so_many_levels_below_us() {
        for depth in 1..=3 {
            let (mut child, netns) = below_us(depth);
            assert_eq!(netns.owner_depth().unwrap(), Some(depth));
            child.wait().unwrap();
        }
        // It may be somebody else's who has started the test.
        let own = Netns::open(Path::new("/proc/self/ns/net")).unwrap().owner_depth().unwrap();
        assert!(matches!(own, Some(0) | None), "{own:?}");
    }
}
