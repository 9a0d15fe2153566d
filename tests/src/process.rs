//! The real binaries as child processes, and waiting for things to become true.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::topology::{Pod, Topology};

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long a process gets to end by itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// Looks at a condition until it is there, and gives what was found; `what` names it for the error
/// when it is not there within `patience`.
pub fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {patience:?} in vain for {what}");
        }
        thread::sleep(INTERVAL);
    }
}

/// The path of a binary of this workspace, next to the running test.
pub fn binary(name: &str) -> Result<PathBuf> {
    let running = std::env::current_exe().context("find the running executable")?;
    running
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "find {name} next to {}: build it first (`cargo xtask test` does)",
                running.display()
            )
        })
}

/// A child process with its output in a log file. It is ended when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command whose output goes to `log`.
    pub fn spawn(name: &str, command: &mut Command, log: PathBuf) -> Result<Self> {
        let out = File::create(&log).with_context(|| format!("make {}", log.display()))?;
        let err = out.try_clone().context("duplicate the log's descriptor")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().with_context(|| format!("look after {}", self.name))?.is_none())
    }

    /// Waits until a line with `text` is in its log.
    pub fn wait_for_log(&mut self, text: &str, patience: Duration) -> Result<()> {
        let what = format!("{text:?} in the log of {}", self.name);
        let found = wait_for(&what, patience, || {
            ensure!(self.is_running()?, "{} has ended before {what}", self.name);
            Ok(self.log()?.contains(text).then_some(()))
        });
        found.with_context(|| format!("{} wrote:\n{}", self.name, self.log().unwrap_or_default()))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("convert a process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// Asks it to end (SIGTERM) and waits for it; an error if it does not within `patience`.
    pub fn terminate(&mut self, patience: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        wait_for(&format!("the end of {}", self.name), patience, || Ok(self.child.try_wait()?))
    }

    /// Ends it at once (SIGKILL), as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.terminate(PATIENCE).is_err() {
            let _ = self.kill();
        }
        if thread::panicking() {
            eprintln!("--- {} wrote:\n{}", self.name, self.log().unwrap_or_default());
        }
    }
}

/// A pod that `redirect-agent attach` has enrolled, without a daemon; detached when dropped.
#[derive(Debug)]
pub struct Attached<'a> {
    agent: PathBuf,
    pod: &'a Pod,
    bpffs: PathBuf,
    /// Whether it is to be by clsact filters, whatever the kernel has.
    clsact: bool,
    attached: bool,
}

impl<'a> Attached<'a> {
    /// Enrolls a pod. The pins are in the test's own bpffs.
    pub fn new(topology: &Topology, pod: &'a Pod) -> Result<Self> {
        Self::by(binary("redirect-agent")?, topology, pod)
    }

    /// The same, as on a kernel without tcx.
    pub fn by_clsact(topology: &Topology, pod: &'a Pod) -> Result<Self> {
        let mut attached = Self::prepare(binary("redirect-agent")?, topology, pod);
        attached.clsact = true;
        attached.again()?;
        Ok(attached)
    }

    /// The same, by this build of the agent.
    pub fn by(agent: PathBuf, topology: &Topology, pod: &'a Pod) -> Result<Self> {
        let attached = Self::prepare(agent, topology, pod);
        attached.again()?;
        Ok(attached)
    }

    /// Enrolls a pod whose addresses the agent is to find by itself.
    pub fn without_addresses(topology: &Topology, pod: &'a Pod) -> Result<Self> {
        let attached = Self::prepare(binary("redirect-agent")?, topology, pod);
        succeed(&mut attached.command("attach")?)?;
        Ok(attached)
    }

    /// Made before `attach` runs: what a failed one leaves behind is removed as well.
    fn prepare(agent: PathBuf, topology: &Topology, pod: &'a Pod) -> Self {
        Self {
            agent,
            pod,
            bpffs: topology.bpffs().join(format!("node{}", pod.node)),
            clsact: false,
            attached: true,
        }
    }

    /// Enrolls it once more: what is there already is not an error.
    pub fn again(&self) -> Result<()> {
        self.set(&[])
    }

    /// Enrolls it once more, with these flags.
    pub fn set(&self, settings: &[&str]) -> Result<()> {
        let (v4, v6) = (self.pod.v4.to_string(), self.pod.v6.to_string());
        let mut command = self.command("attach")?;
        succeed(command.args(["--address", &v4, "--address", &v6]).args(settings)).map(drop)
    }

    /// Where the pins are.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// Takes the pod out of the mesh.
    pub fn detach(mut self) -> Result<()> {
        self.attached = false;
        succeed(&mut self.command("detach")?).map(drop)
    }

    /// A command of the agent's program for the pod.
    ///
    /// # Errors
    ///
    /// None so far.
    pub fn command(&self, verb: &str) -> Result<Command> {
        let mut command = Command::new(&self.agent);
        command.arg(verb).arg("--netns").arg(self.pod.netns_path());
        command.arg("--bpffs-dir").arg(&self.bpffs);
        if self.clsact {
            command.arg("--test-clsact");
        }
        Ok(command)
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if self.attached
            && let Ok(mut command) = self.command("detach")
        {
            let _ = command.output();
        }
    }
}

/// Runs a command that may fail: whether it succeeded, and what it said.
///
/// # Errors
///
/// When it cannot be run.
pub fn finish(command: &mut Command) -> Result<(bool, String)> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

/// Runs a command to its end; that it fails is an error with what it wrote.
pub fn succeed(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(
        output.status.success(),
        "run {command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output)
}
