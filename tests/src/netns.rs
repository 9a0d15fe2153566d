//! A network namespace that goes away with its owner, and threads that live in it.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt as _;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;
use tokio::sync::oneshot;

/// Where the directories of the tests are made.
const ROOT: &str = "/run";
/// What their names start with; the process id follows.
const PREFIX: &str = "redirect-test-";

/// The address family that a scenario runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
pub enum Family {
    /// IPv4.
    #[serde(rename = "ipv4")]
    #[value(name = "ipv4")]
    V4,
    /// IPv6.
    #[serde(rename = "ipv6")]
    #[value(name = "ipv6")]
    V6,
}

impl Family {
    /// `ipv4` or `ipv6`.
    pub fn as_str(self) -> &'static str {
        match self {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        }
    }

    /// The address of this host, to itself.
    pub fn localhost(self) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// The wildcard address.
    pub fn any(self) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// Makes a test of each function `fn(Family) -> Result<()>`, in both families.
#[macro_export]
macro_rules! both_families {
    ($($(#[$attribute:meta])* $scenario:ident),+ $(,)?) => {
        mod ipv4 {
            $($(#[$attribute])*
            #[test]
            fn $scenario() -> anyhow::Result<()> {
                super::$scenario($crate::netns::Family::V4)
            })+
        }
        mod ipv6 {
            $($(#[$attribute])*
            #[test]
            fn $scenario() -> anyhow::Result<()> {
                super::$scenario($crate::netns::Family::V6)
            })+
        }
    };
}

/// A directory of one test below `/run`: namespaces, a bpffs of its own, logs. Removed, and
/// everything in it unmounted, when dropped.
#[derive(Debug)]
pub struct TestDir {
    path: PathBuf,
}

impl TestDir {
    /// Makes the directory. What test processes that are dead by now have left behind is removed.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEPT: OnceLock<()> = OnceLock::new();
        ensure!(
            nix::unistd::geteuid().is_root(),
            "refuse to run: network namespaces and BPF programs need root (use `cargo xtask test`)"
        );
        SWEPT.get_or_init(remove_left_overs);
        raise_descriptor_limit()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(ROOT).join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a directory in it, or finds it there.
    pub fn subdir(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    }

    /// Mounts a bpffs of the test's own: nobody else sees its pins, and unmounting it lets go of
    /// all of them.
    pub fn mount_bpffs(&self, name: &str) -> Result<PathBuf> {
        let path = self.subdir(name)?;
        mount(Some("bpf"), &path, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount a bpffs at {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        remove_tree(&self.path);
    }
}

/// A thousand connections at once, with both ends and the proxy in this process.
fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise the limit of descriptors")
}

fn remove_left_overs() {
    let Ok(entries) = fs::read_dir(ROOT) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
            continue;
        };
        let Some((pid, _)) = rest.split_once('-') else {
            continue;
        };
        if !Path::new("/proc").join(pid).exists() {
            remove_tree(&entry.path());
        }
    }
}

fn remove_tree(root: &Path) {
    if let Ok(mounts) = fs::read_to_string("/proc/self/mounts") {
        let below: Vec<&Path> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .map(Path::new)
            .filter(|path| path.starts_with(root))
            .collect();
        for path in below.into_iter().rev() {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
    }
    let _ = fs::remove_dir_all(root);
}

/// A network namespace, kept by a bind mount at [`Netns::path`], with `lo` up. It goes away when
/// dropped, with whatever is still in it.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    file: File,
}

impl Netns {
    /// Makes a namespace that is found at `dir/name`.
    pub fn new(dir: &Path, name: &str) -> Result<Self> {
        Self::bound(dir, name, |target| {
            thread::scope(|scope| {
                scope
                    .spawn(|| {
                        unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
                        bind(Path::new("/proc/thread-self/ns/net"), target)
                    })
                    .join()
                    .unwrap_or_else(|panic| resume_unwind(panic))
            })
        })
    }

    /// The same, but a new user namespace owns it, as runtimes do it for a pod with `hostUsers: false`.
    pub fn in_user_namespace(dir: &Path, name: &str) -> Result<Self> {
        Self::bound(dir, name, |target| {
            // A process with threads cannot change its user namespace.
            let mut child = Command::new("unshare")
                .args(["--user", "--net", "sh", "-c", "echo inside && exec cat"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("run `unshare`")?;
            let mut inside = [0; 7];
            let stdout = child.stdout.as_mut().context("read from `unshare`")?;
            let bound = stdout
                .read_exact(&mut inside)
                .context("make a user namespace")
                .and_then(|()| bind(Path::new(&format!("/proc/{}/ns/net", child.id())), target));
            // This closes its standard input, which ends it.
            child.wait().context("wait for `unshare`")?;
            bound
        })
    }

    /// One that `make` binds to `dir/name`.
    fn bound(dir: &Path, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let path = dir.join(name);
        File::create_new(&path).with_context(|| format!("make {}", path.display()))?;
        if let Err(error) = make(&path) {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let netns = Self { path, file };
        // Addresses are to be usable at once: nobody else can have them.
        for interface in ["all", "default"] {
            netns.set_sysctl(&format!("net/ipv6/conf/{interface}/accept_dad"), "0")?;
        }
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Where it is found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its inode number.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.file.metadata().context("read the namespace's inode")?.ino())
    }

    /// Runs `f` in the namespace, on a thread of its own that ends with it.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter()?;
                    f()
                })
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Runs the future that `f` makes to its end, on a thread and a runtime of its own in the
    /// namespace: every socket that it opens is the namespace's.
    pub fn block_on<T, F>(&self, f: impl FnOnce() -> F + Send) -> Result<T>
    where
        T: Send,
        F: Future<Output = Result<T>>,
    {
        self.run(|| runtime()?.block_on(async { f().await }))
    }

    /// Starts the future that `f` makes in the same way, and lets it run until it is ready or the
    /// returned [`Running`] is dropped.
    pub fn spawn<F>(&self, f: impl FnOnce() -> F + Send + 'static) -> Result<Running>
    where
        F: Future<Output = ()>,
    {
        let file = self.file.try_clone().context("duplicate the namespace's descriptor")?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (entered, has_entered) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime = setns(&file, CloneFlags::CLONE_NEWNET)
                .context("enter the namespace")
                .and_then(|()| runtime());
            match runtime {
                Ok(runtime) => {
                    let _ = entered.send(Ok(()));
                    runtime.block_on(async {
                        tokio::select! {
                            () = f() => {}
                            _ = stopped => {}
                        }
                    });
                }
                Err(error) => {
                    let _ = entered.send(Err(error));
                }
            }
        });
        let running = Running { stop: Some(stop), thread: Some(thread) };
        has_entered.recv().map_err(|_| anyhow!("start a thread in {}", self.path.display()))??;
        Ok(running)
    }

    /// Runs the lines of `batch` as `ip -batch` in the namespace; the first that fails is the
    /// error.
    pub fn ip(&self, batch: &str) -> Result<()> {
        self.run(|| {
            let mut child = Command::new("ip")
                .args(["-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .context("run `ip` (package iproute2)")?;
            let mut stdin = child.stdin.take().context("write to `ip`")?;
            stdin.write_all(batch.as_bytes()).context("write to `ip`")?;
            drop(stdin);
            let output = child.wait_with_output().context("wait for `ip`")?;
            if !output.status.success() {
                let stderr = String::from_utf8_lossy(&output.stderr);
                bail!("configure {}: {stderr} in\n{batch}", self.path.display());
            }
            Ok(())
        })
    }

    /// Adds so many routes by `eth0`, each to an address of its own.
    pub fn add_routes(&self, count: u32) -> Result<()> {
        let first = u32::from(Ipv4Addr::new(11, 0, 0, 0));
        let route = |n| format!("route add {}/32 dev eth0\n", Ipv4Addr::from(first + n));
        self.ip(&(0..count).map(route).collect::<String>())
    }

    /// Runs a command in the namespace and gives its standard output.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        self.run(|| {
            let output = Command::new(program)
                .args(args)
                .output()
                .with_context(|| format!("run {program}"))?;
            ensure!(
                output.status.success(),
                "run {program} {args:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).with_context(|| format!("read {program}'s output"))
        })
    }

    /// Reads a sysctl of the namespace, `net/ipv4/ip_forward` say.
    pub fn sysctl(&self, name: &str) -> Result<String> {
        self.run(|| {
            // At once: the kernel shows nothing of some at any position but the first.
            let mut value = vec![0; 1 << 16];
            let read = fs::File::open(Path::new("/proc/sys").join(name))
                .and_then(|mut file| file.read(&mut value));
            value.truncate(read.with_context(|| format!("read sysctl {name}"))?);
            Ok(String::from_utf8_lossy(&value).trim().to_owned())
        })
    }

    /// Sets a sysctl of the namespace.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.run(|| {
            fs::write(Path::new("/proc/sys").join(name), value)
                .with_context(|| format!("set sysctl {name} to {value}"))
        })
    }

    fn enter(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter {}", self.path.display()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&self.path);
    }
}

fn bind(namespace: &Path, target: &Path) -> Result<()> {
    mount(Some(namespace), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("bind the namespace to {}", target.display()))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")
}

/// A future that runs on a thread in a namespace. Dropping it ends the thread and closes all of
/// its sockets before it returns.
#[derive(Debug)]
pub struct Running {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
