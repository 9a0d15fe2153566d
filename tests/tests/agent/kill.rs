//! Kills an agent, or a command of its program, at system calls by which it changes something, and checks that
//! what comes next completes the change. strace counts the calls of each thread, and sends the signal.

use std::env;
use std::fmt;
use std::fs;
use std::iter::successors;
use std::num::NonZero;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use redirect_tests::footprint::{Footprint, footprint, state_in_bpffs};
use redirect_tests::process::{Process, wait_for};
use redirect_tests::topology::Pod;

use crate::cluster::{Node, SOON};

/// `cargo xtask test -- faults` with this variable set to N takes every N-th. That takes minutes, since a pod's
/// entries are deleted one by one: the tests take the 1st, 3rd, 9th, ….
const EVERY: &str = "REDIRECT_FAULTS_EVERY";
const TIMES: usize = 3;
/// Maps, programs and links.
pub const BPF: &[&str] = &["bpf"];
/// Netlink, and the proxy's socket.
pub const MESSAGES: &[&str] = &["sendto", "sendmsg"];
/// Sysctls and files, and pins and files that come and go.
pub const FILES: &[&str] =
    &["write", "?unlink,unlinkat,?rename,?renameat,renameat2,?mkdir,mkdirat"];
/// The agent's log, too, is written by system calls.
const LOG: &str = "warn";
/// How often to ask an agent whether it is done: the answer, too, costs it system calls.
const SELDOM: Duration = Duration::from_millis(250);

/// A change in the middle of which somebody is killed.
pub struct Scenario<'a> {
    /// Brings everything to where the change begins. Whatever agent ran last still does, if it was not killed.
    pub before: &'a dyn Fn(&mut Node) -> Result<()>,
    pub victim: Victim<'a>,
    /// What follows a kill.
    pub resume: &'a dyn Fn(&mut Node) -> Result<()>,
    /// Waits until everything is as wished, and checks it.
    pub after: &'a dyn Fn(&Node) -> Result<()>,
}

/// Who changes something, and is killed.
pub enum Victim<'a> {
    /// The agent that runs.
    Running {
        /// Lets it begin.
        change: &'a dyn Fn(&Node) -> Result<()>,
        /// Whether there is nothing left to do. It does not ask the agent, if it can help it.
        is_done: &'a dyn Fn(&Node) -> Result<bool>,
    },
    /// An agent that starts.
    Starting {
        /// Whether it has done all that a start brings with it.
        is_done: &'a dyn Fn(&Node) -> Result<bool>,
    },
    /// A command.
    Command(&'a dyn Fn(&Node) -> Result<Command>),
}

impl Scenario<'_> {
    /// Carries out the change again and again, at first without a kill. Each time what it leaves, in these pods
    /// and below the directory of the pins, has to become the same.
    pub fn kill_at_each_call(
        &self,
        node: &mut Node,
        pods: &[&Pod],
        calls: &[&'static str],
    ) -> Result<()> {
        node.set_log(LOG);
        let began = Instant::now();
        self.round(node, None).context("without a kill")?;
        let wished = everything(node, pods)?;
        let mut killed = 0;
        for &call in calls {
            for fault in numbers()?.map(|number| Fault { call, number }) {
                let died = self
                    .round(node, Some(fault))
                    .and_then(|died| leaves(node, pods, &wished).map(|()| died))
                    .with_context(|| format!("killed at {fault}, after {:?}", began.elapsed()))?;
                println!("faults: {:6.1} s  {fault}: {died}", began.elapsed().as_secs_f64());
                if !died {
                    break;
                }
                killed += 1;
            }
        }
        println!("faults: killed {killed} times");
        ensure!(killed >= 2, "killed {killed} times only");
        Ok(())
    }

    /// Whether somebody was killed.
    fn round(&self, node: &mut Node, fault: Option<Fault>) -> Result<bool> {
        (self.before)(node).context("before the change")?;
        let died = self.victim.change(node, fault).context("the change")?;
        if died {
            (self.resume)(node).context("resume")?;
        }
        (self.after)(node).context("after the change")?;
        if let (Victim::Starting { .. }, Some(_), false) = (&self.victim, fault, died) {
            // strace still follows it.
            node.kill_agent()?;
            node.start_agent()?;
        }
        Ok(died)
    }
}

/// What is in the pods, pinned, and in the pinned maps.
fn everything(node: &Node, pods: &[&Pod]) -> Result<Footprint> {
    let mut all = state_in_bpffs(node.bpffs())?;
    for pod in pods {
        all.add(&pod.to_string(), &footprint(&pod.netns)?);
    }
    Ok(all)
}

/// Waits until exactly this is there.
fn leaves(node: &Node, pods: &[&Pod], wished: &Footprint) -> Result<()> {
    let mut changes = Vec::new();
    wait_for("what is left to be as without a kill", SOON, || {
        changes = everything(node, pods)?.changes_since(wished);
        Ok(changes.is_empty().then_some(()))
    })
    .with_context(|| format!("{changes:#?}"))
}

/// Of the calls of one kind, those at which to kill.
fn numbers() -> Result<impl Iterator<Item = usize>> {
    let every = env::var(EVERY).ok().map(|n| n.parse::<NonZero<usize>>().context(EVERY));
    let every = every.transpose()?;
    Ok(successors(Some(1), move |number: &usize| {
        Some(every.map_or(number * TIMES, |every| number + every.get()))
    }))
}

impl Victim<'_> {
    /// Whether it was killed before it was done.
    fn change(&self, node: &mut Node, fault: Option<Fault>) -> Result<bool> {
        match self {
            Self::Running { change, is_done } => {
                let tracer = fault.map(|fault| fault.attach(node)).transpose()?;
                change(node)?;
                let died = died_or_done(node, is_done)?;
                if let Some(mut tracer) = tracer {
                    // Asked to end, strace may wait for a thread that does not stop; the kernel lets all go.
                    tracer.kill()?;
                }
                if died { Ok(true) } else { dies_or_answers(node) }
            }
            Self::Starting { is_done } => {
                node.adopt_agent(Fault::over(fault, node.agent_command()?)?)?;
                died_or_done(node, is_done)
            }
            Self::Command(command) => {
                let mut command = Fault::over(fault, command(node)?)?;
                let ended = command.output().with_context(|| format!("run {command:?}"))?;
                let said = [ended.stdout, ended.stderr].concat();
                match ended.status.signal() {
                    None if ended.status.success() => Ok(false),
                    Some(signal) if signal == Signal::SIGKILL as i32 => Ok(true),
                    _ => bail!("{}: {}", ended.status, String::from_utf8_lossy(&said)),
                }
            }
        }
    }
}

fn died_or_done(node: &mut Node, is_done: &dyn Fn(&Node) -> Result<bool>) -> Result<bool> {
    let mut asked = Instant::now();
    wait_for("the agent to be killed, or to be done", SOON, || {
        if node.has_agent_died()? {
            return Ok(Some(true));
        }
        if asked.elapsed() < SELDOM {
            return Ok(None);
        }
        asked = Instant::now();
        // It may be killed while it answers.
        Ok(is_done(node).is_ok_and(|done| done).then_some(false))
    })
}

/// Whether the agent was killed just when it was done: nobody follows it any more, so if it answers, it was not.
fn dies_or_answers(node: &mut Node) -> Result<bool> {
    wait_for("the agent to be dead, or to answer", SOON, || {
        if node.has_agent_died()? {
            return Ok(Some(true));
        }
        Ok(node.status().is_ok().then_some(false))
    })
}

/// A call of any thread, from the moment on at which strace follows it.
#[derive(Clone, Copy)]
struct Fault {
    call: &'static str,
    number: usize,
}

impl Fault {
    fn strace(self) -> Command {
        let Self { call, number } = self;
        let mut strace = Command::new("strace");
        // With `-I 2`, a signal ends it.
        strace.args(["-f", "-qq", "-I", "2", "-o", "/dev/null", "-e", &format!("trace={call}")]);
        strace.args(["-e", &format!("inject={call}:signal=KILL:when={number}")]);
        strace
    }

    /// Follows the agent that runs.
    fn attach(self, node: &mut Node) -> Result<Process> {
        let pid = node.agent_pid()?;
        let tracer = node.spawn("strace", self.strace().args(["-p", &pid.to_string()]))?;
        wait_for("strace to follow every thread", SOON, || Ok(is_traced(pid)?.then_some(())))?;
        Ok(tracer)
    }

    /// The command, followed from its beginning. Its process is the one that is started: strace is a
    /// grandchild (`-D`). With `--seccomp-bpf`, which would be faster, strace 6.1 does not count.
    fn over(fault: Option<Self>, command: Command) -> Result<Command> {
        let Some(fault) = fault else { return Ok(command) };
        let mut strace = fault.strace();
        strace.args(["-D", "--"]).arg(command.get_program());
        strace.args(command.get_args());
        for (name, value) in command.get_envs() {
            strace.env(name, value.context("no variable is removed")?);
        }
        Ok(strace)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.call, self.number)
    }
}

fn is_traced(pid: u32) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("list the threads")? {
        // It may have ended.
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else { continue };
        if status.lines().any(|line| line == "TracerPid:\t0") {
            return Ok(false);
        }
    }
    Ok(true)
}
