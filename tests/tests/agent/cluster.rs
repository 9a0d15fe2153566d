//! A node with a real agent and a stand-in proxy, pods on it, and a node without either.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use redirect_agent::output::{PodState, PodStatus, Status};
use redirect_tests::app::{App, Behaviour, Call, Conversation};
use redirect_tests::hbone::{Direction, Record, read_log};
use redirect_tests::netns::{Family, Netns};
use redirect_tests::process::{Process, binary, finish, succeed, wait_for};
use redirect_tests::topology::{Pod, Style, Topology};
use serde_json::{Value, json};

use crate::cgroup::Cgroup;

/// The port that the applications listen on.
pub const PORT: u16 = 8080;
/// By when something that takes a moment has happened, on a busy machine.
pub const SOON: Duration = Duration::from_secs(60);

/// A node with an agent and a proxy, and a pod on it; and a pod on a node that has neither.
pub struct Cluster {
    // Dropped in this order: processes, pods, and the network that they are in.
    pub node: Node,
    /// On the node.
    pub server: Pod,
    /// On the other node.
    pub client: Pod,
    pub topology: Topology,
}

impl Cluster {
    /// The agent and the proxy run; no pod has a label.
    pub fn start() -> Result<Self> {
        Self::with_flags(&[])
    }

    /// The same, with these flags for the agent.
    pub fn with_flags(flags: &[&str]) -> Result<Self> {
        let mut cluster = Self::without_agent(flags)?;
        cluster.node.start_agent()?;
        cluster.node.start_proxy()?;
        Ok(cluster)
    }

    /// Neither runs.
    pub fn without_agent(flags: &[&str]) -> Result<Self> {
        let mut topology = Topology::new(&[Style::Routed, Style::Bridged])?;
        let server = topology.add_pod(0, "shop", "server")?;
        let client = topology.add_pod(1, "shop", "client")?;
        let node = Node::new(&topology, 0, flags)?;
        node.write(&Manifest::of(&server))?;
        node.write(&Manifest::of(&client))?;
        Ok(Self { node, server, client, topology })
    }

    /// The agent runs, and has prepared the server, which waits for a proxy.
    pub fn prepared() -> Result<Self> {
        // The lookup, and tcx on `lo`, and in and out of `eth0`.
        const LINKS: usize = 4;
        let mut cluster = Self::without_agent(&[])?;
        cluster.node.start_agent()?;
        cluster.node.write(&Manifest::of(&cluster.server).mode("ambient"))?;
        let links = cluster.node.links(&cluster.server)?;
        wait_for("all interfaces to be prepared", SOON, || {
            let pins = fs::read_dir(&links).map_or(0, Iterator::count);
            Ok((pins == LINKS).then_some(()))
        })?;
        Ok(cluster)
    }

    /// The same as [`Self::start`], and the pod on the node is in the mesh.
    pub fn enrolled(flags: &[&str]) -> Result<Self> {
        let cluster = Self::with_flags(flags)?;
        cluster.node.enroll(&cluster.server)?;
        Ok(cluster)
    }

    /// Checks who answers to new connections from and to the server, and that they saw the caller,
    /// by way of the proxy.
    pub fn assert_redirected(&self, family: Family) -> Result<()> {
        self.node.assert_outbound(&self.server, &self.client, family)?;
        self.node.assert_inbound(&self.client, &self.server, family)
    }

    /// The same, past the proxy.
    pub fn assert_direct(&self, family: Family) -> Result<()> {
        self.node.assert_direct(&self.server, &self.client, family)?;
        self.node.assert_direct(&self.client, &self.server, family)
    }
}

/// An application that says the pod's name and echoes, in both families.
pub fn echo(pod: &Pod) -> Result<App> {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT);
    App::start(&pod.netns, &pod.name, any, Behaviour::Echo)
}

/// The one agent of a node, its proxies, and all that they need.
pub struct Node {
    agent: Option<Process>,
    proxies: Vec<Process>,
    name: String,
    dir: PathBuf,
    manifests: PathBuf,
    netns_dir: PathBuf,
    bpffs: PathBuf,
    flags: Vec<String>,
    /// What the next agent logs: `RUST_LOG`.
    log: String,
    /// The node's network namespace, if the agent is to run in it.
    netns: Option<PathBuf>,
    /// Where the agent serves health and metrics, or `off`.
    health: String,
    /// How the agent reaches the API server, when pods come from there and not from the manifests.
    kubeconfig: Option<PathBuf>,
    /// How many processes were started: each has a log of its own.
    started: usize,
}

impl Node {
    /// Starts nothing. The nodes of one topology share its manifests, as they do in a cluster.
    pub fn new(topology: &Topology, number: usize, flags: &[&str]) -> Result<Self> {
        let name = format!("node{number}");
        Ok(Self {
            agent: None,
            proxies: Vec::new(),
            dir: topology.dir().subdir(&format!("on-{name}"))?,
            manifests: topology.dir().subdir("manifests")?,
            netns_dir: topology.netns_dir(),
            bpffs: topology.bpffs().join(&name),
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
            log: "debug,h2=warn".to_owned(),
            netns: None,
            health: "off".to_owned(),
            kubeconfig: None,
            started: 0,
            name,
        })
    }

    /// Starts the agent and waits until it answers, and knows the pods.
    pub fn start_agent(&mut self) -> Result<()> {
        let agent = self.spawn_agent()?;
        self.wait_for_agent(agent)
    }

    /// The same, by this command.
    pub fn start_agent_by(&mut self, command: Command) -> Result<()> {
        let agent = self.spawn_agent_by(command)?;
        self.wait_for_agent(agent)
    }

    fn wait_for_agent(&mut self, agent: Process) -> Result<()> {
        self.agent = Some(agent);
        wait_for("the agent to answer", SOON, || match self.status() {
            Ok(status) if status.waiting.is_none() => Ok(Some(())),
            _ => {
                let agent = self.agent.as_mut().context("no agent")?;
                ensure!(agent.is_running()?, "the agent has ended:\n{}", agent.log()?);
                Ok(None)
            }
        })
    }

    /// Lets the next agent learn of pods from an API server; the proxies go on with the manifests.
    pub fn use_api_server(&mut self, kubeconfig: PathBuf) {
        self.kubeconfig = Some(kubeconfig);
    }

    /// Lets the next agent find no network namespace by its name.
    pub fn hide_netns(&mut self) -> Result<()> {
        self.netns_dir = self.dir.join("no-netns");
        fs::create_dir_all(&self.netns_dir).context("make a directory")
    }

    /// Lets the next agent run on the node's own network.
    pub fn use_node_network(&mut self, node: &Netns) {
        self.netns = Some(node.path().to_owned());
    }

    /// Lets the next agent run with other flags.
    pub fn set_flags(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    }

    /// Lets the next agent log this.
    pub fn set_log(&mut self, filter: &str) {
        filter.clone_into(&mut self.log);
    }

    /// Lets the next agent serve health and metrics.
    pub fn serve_health(&mut self, address: SocketAddr) {
        self.health = address.to_string();
    }

    /// Starts the agent and does not wait.
    pub fn spawn_agent(&mut self) -> Result<Process> {
        let command = self.agent_command()?;
        self.spawn_agent_by(command)
    }

    /// Starts the agent by this command, and neither waits nor minds how it ends.
    pub fn adopt_agent(&mut self, command: Command) -> Result<()> {
        self.agent = Some(self.spawn_agent_by(command)?);
        Ok(())
    }

    /// What starts the agent.
    pub fn agent_command(&self) -> Result<Command> {
        let mut command = self.command("run")?;
        command
            .env("RUST_LOG", &self.log)
            .args(["--node-name", &self.name])
            .arg("--netns-dir")
            .arg(&self.netns_dir)
            .arg("--bpffs-dir")
            .arg(&self.bpffs)
            .arg("--state-dir")
            .arg(self.state_dir())
            .arg("--zds-socket")
            .arg(self.zds_socket())
            .arg("--cni-socket")
            .arg(self.cni_socket())
            .arg("--cni-conf-dir")
            .arg(self.cni_conf_dir())
            .arg("--cni-bin-dir")
            .arg(self.cni_bin_dir())
            .args(["--excluded-namespaces", "kube-system,excluded"])
            .args(["--health-address", &self.health])
            .args(&self.flags);
        match &self.kubeconfig {
            Some(kubeconfig) => command.arg("--kubeconfig").arg(kubeconfig),
            None => command.arg(format!("--source=dir:{}", self.manifests.display())),
        };
        Ok(command)
    }

    /// The same, by this command.
    pub fn spawn_agent_by(&mut self, mut command: Command) -> Result<Process> {
        let log = self.next_log("agent");
        Process::spawn(&format!("agent of {}", self.name), &mut command, log)
    }

    /// What stands for the node's directory at `path`, of those that the agent's container has.
    pub fn host_dir(&self, topology: &Topology, path: &str) -> Result<PathBuf> {
        Ok(match path {
            "/sys/fs/bpf" => topology.bpffs().to_owned(),
            "/var/run/netns" => self.netns_dir.clone(),
            "/var/run/ztunnel" => self.dir.join("run"),
            "/var/run/istio-cni" => self.dir.join("cni"),
            "/etc/cni/net.d" => self.cni_conf_dir(),
            "/opt/cni/bin" => self.cni_bin_dir(),
            "/var/lib/redirect-agent" => self.state_dir(),
            "/run/redirect-agent" => self.dir.join("control"),
            other => bail!("{other} is not expected to be mounted"),
        })
    }

    /// Starts a proxy and waits until it has taken over what the agent knows.
    pub fn start_proxy(&mut self) -> Result<()> {
        self.start_proxy_with(&[])
    }

    /// The same, with these flags for the proxy.
    pub fn start_proxy_with(&mut self, flags: &[&str]) -> Result<()> {
        self.start_proxy_by(Command::new(binary("standin-proxy")?), flags)
    }

    /// The same, in a cgroup.
    pub fn start_proxy_in(&mut self, cgroup: &Cgroup) -> Result<()> {
        let mut command = cgroup.shell(None, "exec \"$0\" \"$@\"");
        command.arg(binary("standin-proxy")?);
        self.start_proxy_by(command, &[])
    }

    fn start_proxy_by(&mut self, mut command: Command, flags: &[&str]) -> Result<()> {
        let log = self.next_log("proxy");
        command
            .env("RUST_LOG", "info,h2=warn")
            .args(["run", "--node", &self.name])
            .arg("--zds-socket")
            .arg(self.zds_socket())
            .arg("--ca-dir")
            .arg(self.manifests.join("../ca"))
            .arg("--manifests")
            .arg(&self.manifests)
            .arg("--log-json")
            .arg(log.with_extension("json"))
            .args(flags);
        let mut proxy = Process::spawn(&format!("proxy of {}", self.name), &mut command, log)?;
        proxy.wait_for_log("snapshot complete", SOON)?;
        self.proxies.push(proxy);
        Ok(())
    }

    /// The agent's process.
    pub fn agent_pid(&self) -> Result<u32> {
        Ok(self.agent.as_ref().context("no agent runs")?.pid())
    }

    /// What the agent has logged so far.
    pub fn agent_log(&self) -> Result<String> {
        self.agent.as_ref().context("no agent runs")?.log()
    }

    fn next_log(&mut self, what: &str) -> PathBuf {
        self.started += 1;
        self.dir.join(format!("{what}-{}.log", self.started))
    }

    /// Kills the agent as a crash would.
    pub fn kill_agent(&mut self) -> Result<()> {
        self.agent.take().context("no agent runs")?.kill()
    }

    /// Whether somebody else has killed the agent.
    pub fn has_agent_died(&mut self) -> Result<bool> {
        if let Some(agent) = &mut self.agent
            && !agent.is_running()?
        {
            self.agent = None;
        }
        Ok(self.agent.is_none())
    }

    /// Starts another process, which logs to a file of this node.
    pub fn spawn(&mut self, name: &str, command: &mut Command) -> Result<Process> {
        let log = self.next_log(name);
        Process::spawn(name, command, log)
    }

    /// Stops the agent as its supervisor would; what it has logged.
    pub fn stop_agent(&mut self) -> Result<String> {
        let mut agent = self.agent.take().context("no agent runs")?;
        let status = agent.terminate(SOON)?;
        let log = agent.log()?;
        ensure!(status.success(), "the agent ended with {status}:\n{log}");
        Ok(log)
    }

    /// The oldest running proxy, which is not looked after any more.
    pub fn take_proxy(&mut self) -> Result<Process> {
        ensure!(!self.proxies.is_empty(), "no proxy runs");
        Ok(self.proxies.remove(0))
    }

    /// Kills the proxy as a crash would.
    pub fn kill_proxy(&mut self) -> Result<()> {
        self.take_proxy()?.kill()
    }

    /// A command of the agent's program that goes to the agent of this node.
    pub fn command(&self, verb: &str) -> Result<Command> {
        let mut command = self.command_without_agent(verb)?;
        command.arg("--control-socket").arg(self.control_socket());
        Ok(command)
    }

    /// The same, for a command that does not ask the agent.
    pub fn command_without_agent(&self, verb: &str) -> Result<Command> {
        let binary = binary("redirect-agent")?;
        let mut command = match &self.netns {
            Some(netns) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", netns.display())).arg(binary);
                command
            }
            None => Command::new(binary),
        };
        command.arg(verb);
        Ok(command)
    }

    /// Runs such a command, and gives what it prints.
    pub fn tell(&self, verb: &str, args: &[&str]) -> Result<String> {
        let output = succeed(self.command(verb)?.args(args))?;
        String::from_utf8(output.stdout).context("read what the command prints")
    }

    /// `cleanup`, which may fail: whether it succeeded, and what it said.
    pub fn cleanup(&self) -> Result<(bool, String)> {
        finish(&mut self.cleanup_command()?)
    }

    /// What that runs.
    pub fn cleanup_command(&self) -> Result<Command> {
        self.cleanup_command_for(&self.bpffs)
    }

    /// The same for an agent whose pins are in another directory.
    pub fn cleanup_command_for(&self, bpffs: &Path) -> Result<Command> {
        let mut command = self.command_on_node("cleanup")?;
        command
            .arg("--bpffs-dir")
            .arg(bpffs)
            .arg("--cni-conf-dir")
            .arg(self.cni_conf_dir())
            .arg("--cni-bin-dir")
            .arg(self.cni_bin_dir());
        Ok(command)
    }

    /// `takeover`, which may fail: whether it succeeded, and what it said.
    pub fn take_over(&self, args: &[&str]) -> Result<(bool, String)> {
        finish(self.take_over_command()?.args(args))
    }

    /// What that runs.
    pub fn take_over_command(&self) -> Result<Command> {
        let mut command = self.command_on_node("takeover")?;
        command.arg("--control-socket").arg(self.control_socket());
        Ok(command)
    }

    /// A command that looks for the node's pods itself.
    fn command_on_node(&self, verb: &str) -> Result<Command> {
        let mut command = self.command_without_agent(verb)?;
        command.arg("--netns-dir").arg(&self.netns_dir).arg("--state-dir").arg(self.state_dir());
        Ok(command)
    }

    /// What `status` says.
    pub fn status(&self) -> Result<Status> {
        let json = self.tell("status", &["-o", "json"])?;
        serde_json::from_str(&json).context("read status")
    }

    /// What `status` says of a pod.
    pub fn pod(&self, pod: &Pod) -> Result<Option<PodStatus>> {
        let pods = self.status()?.pods;
        Ok(pods.into_iter().find(|p| p.namespace == pod.namespace && p.name == pod.name))
    }

    /// Edits an annotation of a pod in the mesh, which concerns none of its connections, and waits until the
    /// switch is over.
    pub fn change_a_setting(&self, pod: &Pod) -> Result<()> {
        let annotation = "traffic.redirect-agent/excludeOutboundPorts";
        let manifest = Manifest::of(pod).mode("ambient");
        self.write(&manifest.with("/metadata/annotations", annotation, json!("9999")))?;
        self.wait_for_pod("to have other settings", pod, |p| {
            p.traffic.as_ref().is_some_and(|t| format!("{t:?}").contains("9999"))
                && p.kernel.as_ref().is_some_and(|kernel| kernel.complete)
        })?;
        thread::sleep(Duration::from_secs(1));
        Ok(())
    }

    /// Waits until `status` says something of a pod, and gives it.
    pub fn wait_for_pod(
        &self,
        what: &str,
        pod: &Pod,
        is: impl Fn(&PodStatus) -> bool,
    ) -> Result<PodStatus> {
        let waited = wait_for(&format!("{pod} {what}"), SOON, || Ok(self.pod(pod)?.filter(&is)));
        waited.with_context(|| format!("status: {:#?}", self.status()))
    }

    /// Waits until a pod is there.
    pub fn wait_for_state(&self, pod: &Pod, state: PodState) -> Result<PodStatus> {
        self.wait_for_pod(&format!("to be {}", state.as_str()), pod, |p| p.state == state)
    }

    /// Labels a pod, and waits until it is in the mesh and its peers know.
    pub fn enroll(&self, pod: &Pod) -> Result<()> {
        self.write(&Manifest::of(pod).mode("ambient"))?;
        self.wait_until_enrolled(pod)
    }

    /// Waits until a pod is in the mesh, its peers know, and nothing is missing.
    pub fn wait_until_enrolled(&self, pod: &Pod) -> Result<()> {
        self.wait_until_complete(pod)?;
        wait_for(&format!("{pod} to be published"), SOON, || {
            Ok(self.is_published(pod).then_some(()))
        })
    }

    /// Waits until a pod is in the mesh and nothing is missing.
    pub fn wait_until_complete(&self, pod: &Pod) -> Result<()> {
        let complete = |p: &PodStatus| {
            p.state == PodState::Enrolled && p.kernel.as_ref().is_some_and(|k| k.complete)
        };
        self.wait_for_pod("to be enrolled", pod, complete).map(drop)
    }

    /// Whether the pod's peers are told to speak HBONE to it.
    pub fn is_published(&self, pod: &Pod) -> bool {
        let name = format!("{}_{}.json", pod.namespace, pod.name);
        fs::read_to_string(self.manifests.join(".status").join(name))
            .is_ok_and(|patch| patch.contains("\"enabled\""))
    }

    /// Writes a manifest, in place, as an editor that is not careful does.
    pub fn write(&self, manifest: &Manifest) -> Result<()> {
        let file = self.manifests.join(&manifest.file);
        fs::write(&file, manifest.object.to_string())
            .with_context(|| format!("write {}", file.display()))
    }

    /// Removes a manifest.
    pub fn remove(&self, manifest: &Manifest) -> Result<()> {
        fs::remove_file(self.manifests.join(&manifest.file)).context("remove a manifest")
    }

    /// What the proxies have seen, oldest first.
    pub fn records(&self) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for log in self.logs_of_proxies() {
            records.extend(read_log(&log)?);
        }
        Ok(records)
    }

    /// What the proxies have seen of a connection that was opened after `since`: a proxy has
    /// written it down before the client gets its first byte.
    pub fn records_of(&self, conversation: &Conversation, since: f64) -> Result<Vec<Record>> {
        let (src, dst) = (conversation.local_addr()?, conversation.peer_addr()?);
        let needle = format!("\"src\":\"{src}\"");
        let mut records = Vec::new();
        for log in self.logs_of_proxies() {
            let Ok(text) = fs::read_to_string(&log) else { continue };
            for line in text.lines().filter(|line| line.contains(&needle)) {
                let record: Record = serde_json::from_str(line).context("read an access log")?;
                // Ports are used again.
                if record.dst == dst && record.ts >= since {
                    records.push(record);
                }
            }
        }
        Ok(records)
    }

    fn logs_of_proxies(&self) -> impl Iterator<Item = PathBuf> {
        (1..=self.started).map(|n| self.dir.join(format!("proxy-{n}.json")))
    }

    /// Checks that a new call of an enrolled pod is answered by `to` by way of the proxy.
    pub fn assert_outbound(&self, from: &Pod, to: &Pod, family: Family) -> Result<()> {
        self.assert_by_proxy(from, to, family, (from, Direction::Outbound))
    }

    /// Checks that a new plaintext call to an enrolled pod is answered by it by way of the proxy.
    pub fn assert_inbound(&self, from: &Pod, to: &Pod, family: Family) -> Result<()> {
        self.assert_by_proxy(from, to, family, (to, Direction::InboundPlaintext))
    }

    fn assert_by_proxy(
        &self,
        from: &Pod,
        to: &Pod,
        family: Family,
        (pod, direction): (&Pod, Direction),
    ) -> Result<()> {
        let since = now()?;
        let conversation = converse(from, to, family)?;
        let records = self.records_of(&conversation, since)?;
        let expected = |r: &Record| r.pod == pod.to_string() && r.direction == direction;
        ensure!(
            records.iter().any(expected),
            "no {direction:?} connection of {pod} from {} to {} was seen, but {records:?}; the app \
             saw {:?}",
            conversation.local_addr()?,
            conversation.peer_addr()?,
            conversation.answer()
        );
        Ok(())
    }

    /// Checks that a new call is answered by `to` directly: it saw the caller's very address and
    /// port.
    pub fn assert_direct(&self, from: &Pod, to: &Pod, family: Family) -> Result<()> {
        let since = now()?;
        let conversation = converse(from, to, family)?;
        let src = conversation.local_addr()?;
        ensure!(
            conversation.answer().saw_peer == src,
            "{to} saw {} and not {src}",
            conversation.answer().saw_peer
        );
        let records = self.records_of(&conversation, since)?;
        ensure!(records.is_empty(), "the proxy has seen {records:?}");
        Ok(())
    }

    /// Where the pins of a pod's links are.
    pub fn links(&self, pod: &Pod) -> Result<PathBuf> {
        Ok(self.bpffs.join("links").join(pod.netns.inode()?.to_string()))
    }

    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    pub fn manifests(&self) -> &Path {
        &self.manifests
    }

    pub fn netns_dir(&self) -> &Path {
        &self.netns_dir
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn zds_socket(&self) -> PathBuf {
        self.dir.join("run/ztunnel.sock")
    }

    pub fn cni_socket(&self) -> PathBuf {
        self.dir.join("cni/pluginevent.sock")
    }

    /// Where the node's CNI configuration is, if it has any.
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.dir.join("net.d")
    }

    /// Where its CNI plugins are.
    pub fn cni_bin_dir(&self) -> PathBuf {
        self.dir.join("cni-bin")
    }

    fn control_socket(&self) -> PathBuf {
        self.dir.join("control/control.sock")
    }
}

/// Seconds since 1970, as in the proxies' records.
pub fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("read the clock")?.as_secs_f64())
}

/// Opens a connection to a pod's application, and checks who answers and whom they see.
pub fn converse(from: &Pod, to: &Pod, family: Family) -> Result<Conversation> {
    let addr = to.addr(family, PORT);
    let conversation = Call::to(addr).open(&from.netns)?;
    let answer = conversation.answer();
    if answer.by != to.name || answer.saw_peer.ip() != from.ip(family) || answer.saw_local != addr {
        bail!("{from} called {to} at {addr}, and got {answer:?}");
    }
    Ok(conversation)
}

/// The links of a pod by the names of their pins: each with its id and its program's.
pub fn links(dir: &Path) -> Result<Vec<(String, u64, u64)>> {
    let mut links = Vec::new();
    for pin in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let pin = pin?;
        let mut command = Command::new("bpftool");
        let output = succeed(command.args(["-j", "link", "show", "pinned"]).arg(pin.path()))?;
        let link: Value =
            serde_json::from_slice(&output.stdout).context("read bpftool's output")?;
        let number = |key: &str| link[key].as_u64().with_context(|| format!("no {key}: {link}"));
        links.push((
            pin.file_name().to_string_lossy().into_owned(),
            number("id")?,
            number("prog_id")?,
        ));
    }
    links.sort();
    Ok(links)
}

/// A manifest and the name of its file.
#[derive(Clone, Debug)]
pub struct Manifest {
    file: String,
    object: Value,
}

impl Manifest {
    /// A pod as Kubernetes would show it. Its uid is made of its name.
    pub fn of(pod: &Pod) -> Self {
        let object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": pod.name,
                "namespace": pod.namespace,
                "uid": format!("uid-of-{}-{}", pod.namespace, pod.name),
                "labels": {"app": pod.name},
                "annotations": {},
            },
            "spec": {"nodeName": format!("node{}", pod.node), "serviceAccountName": pod.name},
            "status": {"phase": "Running", "podIPs": [{"ip": pod.v4}, {"ip": pod.v6}]},
        });
        Self { file: format!("{}_{}.json", pod.namespace, pod.name), object }
    }

    /// A pod of a node whose sandbox is being made: it has no address yet.
    pub fn starting(namespace: &str, name: &str, node: usize) -> Self {
        let object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": format!("uid-of-{namespace}-{name}"),
                "labels": {"app": name},
                "annotations": {},
            },
            "spec": {"nodeName": format!("node{node}"), "serviceAccountName": name},
            "status": {"phase": "Pending"},
        });
        Self { file: format!("{namespace}_{name}.json"), object }
    }

    /// A namespace.
    pub fn of_namespace(name: &str) -> Self {
        let object = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": {}},
        });
        Self { file: format!("{name}.yaml"), object }
    }

    /// The object as Kubernetes has it.
    pub fn object(&self) -> Value {
        self.object.clone()
    }

    /// With this value of the label `istio.io/dataplane-mode`.
    pub fn mode(self, mode: &str) -> Self {
        self.with("/metadata/labels", "istio.io/dataplane-mode", json!(mode))
    }

    /// With another uid.
    pub fn uid(self, uid: &str) -> Self {
        self.with("/metadata", "uid", json!(uid))
    }

    /// With this field of the object at `path`.
    pub fn with(mut self, path: &str, field: &str, value: Value) -> Self {
        if let Some(parent) = self.object.pointer_mut(path) {
            parent[field] = value;
        }
        self
    }
}
