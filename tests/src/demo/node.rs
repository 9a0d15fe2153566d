//! A node's two programs, the agent and the proxy, and the agent's command line.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Error, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use redirect_agent::control::Client;
use redirect_agent::output::{PodState, Status};

use crate::hbone::{self, Record};
use crate::process::{Process, binary, succeed};
use crate::topology::Topology;

/// A node with an agent and a proxy of its own.
#[derive(Debug)]
pub(crate) struct Node {
    /// As in the pods' `spec.nodeName`.
    pub(super) name: &'static str,
    /// Where its agent's pins are.
    pub(super) bpffs_dir: PathBuf,
    control_socket: PathBuf,
    access_log: PathBuf,
    // Dropped in this order: a proxy that loses its agent would look for it.
    proxy: Process,
    agent: Process,
}

impl Node {
    /// Starts the programs of node number `number`.
    pub(crate) fn start(
        topology: &Topology,
        number: usize,
        name: &'static str,
        manifests: &Path,
        ca_dir: &Path,
    ) -> Result<Self> {
        let netns = topology.node(number).path();
        let dir = topology.dir().subdir(name)?;
        let bpffs_dir = topology.bpffs().join(name);
        let control_socket = dir.join("run/control.sock");
        let zds_socket = dir.join("ztunnel.sock");
        let access_log = dir.join("connections.json");

        let mut agent = program(netns, "redirect-agent")?;
        agent.arg("run").arg("--source").arg(prefixed("dir:", manifests));
        agent.args(["--node-name", name]);
        agent.arg("--netns-dir").arg(topology.netns_dir());
        agent.arg("--bpffs-dir").arg(&bpffs_dir);
        agent.arg("--state-dir").arg(dir.join("state"));
        agent.arg("--control-socket").arg(&control_socket);
        agent.arg("--zds-socket").arg(&zds_socket);
        agent.arg("--cni-socket").arg(dir.join("cni.sock"));
        let log = dir.join("agent.log");
        let agent = Process::spawn(&format!("the agent of {name}"), &mut agent, log)?;

        let mut proxy = program(netns, "standin-proxy")?;
        proxy.args(["run", "--node", name]);
        proxy.arg("--zds-socket").arg(&zds_socket);
        proxy.arg("--ca-dir").arg(ca_dir);
        proxy.arg("--manifests").arg(manifests);
        proxy.arg("--log-json").arg(&access_log);
        // The demo ends its connections before it ends the proxy.
        proxy.args(["--drain", "0"]).env("RUST_LOG", "warn");
        let log = dir.join("proxy.log");
        let proxy = Process::spawn(&format!("the proxy of {name}"), &mut proxy, log)?;
        Ok(Self { name, bpffs_dir, control_socket, access_log, proxy, agent })
    }

    /// What the agent knows.
    pub(super) fn status(&self) -> Result<Status> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(Client::new(&self.control_socket).status())
    }

    /// The status once the agent answers; an error when it has ended.
    pub(crate) fn status_when_up(&mut self) -> Result<Option<Status>> {
        if !self.agent.is_running()? {
            return Err(anyhow!("the agent of {} has ended:\n{}", self.name, self.agent.log()?));
        }
        Ok(self.status().ok())
    }

    /// Where a pod of this node is, seen by its agent.
    pub(super) fn state(&self, pod: &str) -> Result<PodState> {
        let status = self.status()?;
        let found = status.pods.iter().find(|p| format!("{}/{}", p.namespace, p.name) == pod);
        Ok(found.with_context(|| format!("find pod {pod} in the status of {}", self.name))?.state)
    }

    /// Runs a command of the agent's, as an operator would, and gives what it printed.
    pub(super) fn command(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("redirect-agent")?);
        command.args(args).arg("--control-socket").arg(&self.control_socket);
        let output = succeed(&mut command)?;
        String::from_utf8(output.stdout).context("read what redirect-agent printed")
    }

    /// What the agent and the proxy have logged.
    pub(super) fn logs(&self) -> Result<String> {
        let (agent, proxy) = (self.agent.log()?, self.proxy.log()?);
        let name = self.name;
        Ok(format!("--- the agent of {name}:\n{agent}--- the proxy of {name}:\n{proxy}"))
    }

    /// What the proxy has written to its access log.
    pub(super) fn connections(&self) -> Result<Vec<Record>> {
        hbone::read_log(&self.access_log)
    }
}

fn prefixed(prefix: &str, path: &Path) -> OsString {
    let mut argument = OsString::from(prefix);
    argument.push(path);
    argument
}

/// A program of this workspace, to be run in a namespace.
fn program(netns: &Path, name: &str) -> Result<Command> {
    let this = std::env::current_exe().context("find the path of this program")?;
    let mut command = Command::new(this);
    command.arg("become").arg(netns).arg(std::process::id().to_string()).arg(binary(name)?);
    // The terminal's Ctrl-C is the demo's; it ends the others in order.
    command.process_group(0);
    Ok(command)
}

/// The hidden command of the demo and of the benchmark that [`program`] runs.
#[derive(Debug, clap::Subcommand)]
pub enum NodeCommand {
    /// Become a program of a node, which ends with this one
    #[command(hide = true)]
    Become {
        /// The node's network namespace
        netns: PathBuf,
        /// The process id of this one
        parent: i32,
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        program: Vec<OsString>,
    },
}

impl NodeCommand {
    /// Carries it out; returns only why that failed.
    pub fn carry_out(&self) -> Error {
        let Self::Become { netns, parent, program } = self;
        become_program(netns, *parent, program)
    }
}

/// Enters a node's namespace and becomes a program that dies with `parent`, even when that is
/// killed; returns only why that failed.
fn become_program(netns: &Path, parent: i32, program: &[OsString]) -> Error {
    let prepared = || -> Result<Command> {
        prctl::set_pdeathsig(Signal::SIGKILL).context("ask to end with the demo")?;
        // It may have ended just before.
        if getppid() != Pid::from_raw(parent) {
            return Err(anyhow!("the demo has ended"));
        }
        let file = File::open(netns).with_context(|| format!("open {}", netns.display()))?;
        setns(&file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter {}", netns.display()))?;
        let (program, args) = program.split_first().context("no program is named")?;
        let mut command = Command::new(program);
        command.args(args);
        Ok(command)
    };
    match prepared() {
        Ok(mut command) => Error::new(command.exec()).context("become a node's program"),
        Err(error) => error,
    }
}
