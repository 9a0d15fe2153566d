//! The CNI plugin in a chain with real network plugins, called as a container runtime does it, and the
//! agent that installs it.

use std::fs::{self, File};
use std::net::{Ipv6Addr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use redirect_agent::output::PodState;
use redirect_tests::apiserver::{ApiServer, Kind};
use redirect_tests::both_families;
use redirect_tests::cni::{Failure, Runtime, Sandbox, plugins};
use redirect_tests::footprint::programs;
use redirect_tests::netns::Family;
use redirect_tests::process::{binary, succeed, wait_for};
use serde_json::{Value, json};

use crate::api_server::Managed;
use crate::cluster::{Cluster, Manifest, SOON, echo};
use crate::health::get;
use crate::load::Until;

both_families! {
    first_connection_of_a_pod_is_redirected_behind_a_bridge,
    first_connection_of_a_pod_is_redirected_behind_ptp_with_an_older_version_and_a_single_plugin,
    bypassing_pod_starts_at_once,
    no_pod_starts_without_the_agent_but_those_that_it_needs,
    no_pod_starts_without_the_proxy,
    agent_is_killed_while_a_pod_starts,
    network_plugin_rewrites_its_configuration_while_pods_start,
    agent_that_is_uninstalled_leaves_the_node_as_it_was,
}

/// The plugin's name.
const OURS: &str = "redirect-cni";
/// What the specification calls "try again later".
const TRY_AGAIN: u64 = 11;
const UNAVAILABLE: u64 = 50;
/// `redirect-agent`'s own: the agent has refused.
const REFUSED: u64 = 100;
/// The DaemonSet that runs the agent.
const DAEMON_SET: &str = "istio-system/redirect-agent";
const MODE: &str = "istio.io/dataplane-mode";
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// A node that real network plugins serve, a cluster that it is in, and an agent with the CNI plugin.
struct Site {
    managed: Managed,
    /// What the network plugin writes: a file and its content.
    network: (&'static str, String),
}

impl Site {
    /// Neither the agent nor the proxy runs.
    fn new(file: &'static str, network: impl Fn(Value) -> Value, flags: &[&str]) -> Result<Self> {
        let mut managed = Managed::without_agent()?;
        let dir = managed.cluster.topology.dir().subdir("ipam")?;
        let ipam = json!({
            "type": "host-local", "dataDir": dir,
            "ranges": [
                [{"subnet": "10.64.0.0/24", "rangeStart": "10.64.0.100", "gateway": "10.64.0.1"}],
                [{"subnet": "fd64::/64", "rangeStart": "fd64::1:0", "gateway": "fd64::1"}],
            ],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        });
        let text = format!("{:#}\n", network(ipam));
        let node = &mut managed.cluster.node;
        // As a container runtime has it: their names say nothing of the pods.
        node.hide_netns()?;
        node.set_flags(&[&["--install-cni", "--daemonset", DAEMON_SET], flags].concat());
        for dir in [node.cni_conf_dir(), node.cni_bin_dir()] {
            fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        }
        let site = Self { managed, network: (file, text) };
        site.write_network()?;
        let namespace =
            Manifest::of_namespace("shop").with("/metadata/labels", MODE, json!("ambient"));
        site.managed.api.put(Kind::Namespace, namespace.object());
        site.cluster().node.write(&namespace)?;
        for outsider in [&site.cluster().server, &site.cluster().client] {
            site.declare(Manifest::of(outsider).mode("none"))?;
        }
        site.put_daemon_set(json!({}));
        Ok(site)
    }

    /// A bridge, and port mappings.
    fn bridged(flags: &[&str]) -> Result<Self> {
        let network = |ipam| {
            json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
                {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": ipam},
                {"type": "portmap", "capabilities": {"portMappings": true}},
            ]})
        };
        Self::new("10-pods.conflist", network, flags)
    }

    /// The agent and the proxy run, and the plugin is installed.
    fn start(mut self) -> Result<Self> {
        self.start_agent()?;
        self.managed.cluster.node.start_proxy()?;
        Ok(self)
    }

    fn start_agent(&mut self) -> Result<()> {
        self.managed.cluster.node.start_agent()?;
        self.wait_until_installed()
    }

    fn cluster(&self) -> &Cluster {
        &self.managed.cluster
    }

    fn runtime(&self) -> Runtime<'_> {
        let Cluster { node, topology, .. } = self.cluster();
        Runtime::new(topology.node(0), &node.cni_conf_dir(), &node.cni_bin_dir())
    }

    fn write_network(&self) -> Result<()> {
        let path = self.cluster().node.cni_conf_dir().join(self.network.0);
        fs::write(path, &self.network.1).context("write the node's network")
    }

    fn put_daemon_set(&self, more: Value) {
        let (namespace, name) = DAEMON_SET.split_once('/').unwrap_or_default();
        let mut object = json!({"metadata": {"namespace": namespace, "name": name}});
        if let Some(time) = more.get("deletionTimestamp") {
            object["metadata"]["deletionTimestamp"] = time.clone();
        }
        self.managed.api.put(Kind::DaemonSet, object);
    }

    /// Lets everybody know of a pod.
    fn declare(&self, manifest: Manifest) -> Result<()> {
        self.managed.put(&manifest);
        self.cluster().node.write(&manifest)
    }

    /// A pod that is to start on the node, and its sandbox.
    fn sandbox(&self, namespace: &str, name: &str) -> Result<Sandbox> {
        self.declare(Manifest::starting(namespace, name, 0))?;
        Sandbox::new(&self.cluster().topology.netns_dir(), 0, namespace, name)
    }

    /// What kubelet reports when the sandbox has its network.
    fn report(&self, sandbox: &Sandbox) -> Result<()> {
        self.declare(Manifest::of(&sandbox.pod))
    }

    /// Starts a pod of the mesh, whose first connection goes by the proxy.
    fn start_redirected(&self, name: &str, family: Family) -> Result<Sandbox> {
        let mut sandbox = self.sandbox("shop", name)?;
        self.runtime().add(&mut sandbox)?.map_err(|failure| anyhow!("{failure:?}"))?;
        self.assert_redirected(&sandbox, family)?;
        Ok(sandbox)
    }

    fn assert_redirected(&self, sandbox: &Sandbox, family: Family) -> Result<()> {
        let Cluster { node, client, .. } = self.cluster();
        // Nothing has run in it yet.
        let _client = echo(client)?;
        self.report(sandbox)?;
        node.assert_outbound(&sandbox.pod, client, family)?;
        let _app = echo(&sandbox.pod)?;
        node.assert_inbound(client, &sandbox.pod, family)
    }

    fn assert_direct(&self, sandbox: &Sandbox, family: Family) -> Result<()> {
        let Cluster { node, client, .. } = self.cluster();
        let _apps = (echo(client)?, echo(&sandbox.pod)?);
        node.assert_direct(&sandbox.pod, client, family)?;
        node.assert_direct(client, &sandbox.pod, family)
    }

    /// Whether our entry is the last of the node's first network.
    fn is_installed(&self) -> Result<bool> {
        let Ok((_, list)) = self.runtime().network() else { return Ok(false) };
        let ours = |plugin: &Value| plugin["type"] == OURS;
        let plugins = plugins(&list)?;
        Ok(plugins.iter().filter(|p| ours(p)).count() == 1 && plugins.last().is_some_and(ours))
    }

    fn wait_until_installed(&self) -> Result<()> {
        wait_for("the CNI plugin to be installed", SOON, || Ok(self.is_installed()?.then_some(())))
    }

    /// The names and contents of the node's CNI configuration, and its own plugins.
    fn files(&self) -> Result<Vec<(PathBuf, Vec<u8>, u32)>> {
        let node = &self.cluster().node;
        let mut files = Vec::new();
        for dir in [node.cni_conf_dir(), node.cni_bin_dir()] {
            for entry in fs::read_dir(dir)? {
                let path = entry?.path();
                files.push((path.clone(), fs::read(&path)?, fs::metadata(&path)?.mode()));
            }
        }
        files.sort();
        Ok(files)
    }

    /// Lets the plugin be impatient, with nobody there to put it right.
    fn hurry(&self) -> Result<()> {
        let (file, _) = self.runtime().network()?;
        let text = fs::read_to_string(&file)?;
        let hurried = text.replace("\"timeoutSeconds\": 30", "\"timeoutSeconds\": 1");
        ensure!(hurried != text, "no timeout in {text}");
        fs::write(file, hurried).context("write the node's network")
    }
}

fn first_connection_of_a_pod_is_redirected_behind_a_bridge(family: Family) -> Result<()> {
    let site = Site::bridged(&[])?.start()?;
    let mut sandbox = site.start_redirected("cart", family)?;
    let [.., portmap, ours] = sandbox.results.as_slice() else { bail!("{:?}", sandbox.results) };
    assert_eq!(portmap, ours);
    assert_eq!(site.runtime().check(&sandbox)?, Ok(()));

    // Deleted, and made anew under its name; kubelet may delete it twice.
    site.runtime().del(&mut sandbox)?;
    site.runtime().del(&mut sandbox)?;
    drop(sandbox);
    site.start_redirected("cart", family)?;
    Ok(())
}

/// The single network becomes a list.
fn first_connection_of_a_pod_is_redirected_behind_ptp_with_an_older_version_and_a_single_plugin(
    family: Family,
) -> Result<()> {
    let ptp = |ipam| json!({"cniVersion": "0.3.1", "name": "pods", "type": "ptp", "ipam": ipam});
    let site = Site::new("10-pods.conf", ptp, &[])?;
    let before = site.files()?;
    let mut site = site.start()?;
    let sandbox = site.start_redirected("cart", family)?;
    let [ptp, ours] = sandbox.results.as_slice() else { bail!("{:?}", sandbox.results) };
    assert_eq!(ptp, ours);
    assert_eq!(ours["cniVersion"], "0.3.1");

    site.managed.cluster.node.stop_agent()?;
    assert!(site.is_installed()?);
    let (done, said) = site.cluster().node.cleanup()?;
    assert!(done && said.contains("took redirect-cni out of"), "{said}");
    assert_eq!(site.files()?, before);
    site.assert_direct(&sandbox, family)
}

/// There is no proxy: nothing is asked of it.
fn bypassing_pod_starts_at_once(family: Family) -> Result<()> {
    let mut site = Site::bridged(&[])?;
    site.start_agent()?;
    let mut sandbox = Sandbox::new(&site.cluster().topology.netns_dir(), 0, "shop", "plain")?;
    site.declare(Manifest::starting("shop", "plain", 0).mode("none"))?;
    let started = Instant::now();
    assert_eq!(site.runtime().add(&mut sandbox)?, Ok(()));
    let took = started.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    site.assert_direct(&sandbox, family)?;
    assert_eq!(site.runtime().check(&sandbox)?, Ok(()));
    site.runtime().del(&mut sandbox)
}

/// As after the node has restarted: the configuration has our entry, and nobody answers.
fn no_pod_starts_without_the_agent_but_those_that_it_needs(family: Family) -> Result<()> {
    let mut site = Site::bridged(&[])?.start()?;
    site.managed.cluster.node.kill_agent()?;
    site.hurry()?;
    for socket in ["stale", "gone", "silent"] {
        let path = site.cluster().node.cni_socket();
        let _hung = match socket {
            "stale" => None,
            "gone" => {
                fs::remove_file(&path)?;
                None
            }
            _ => Some(UnixListener::bind(&path)?),
        };
        let mut sandbox = site.sandbox("shop", "cart")?;
        let before = remains(&sandbox)?;
        let failure = site.runtime().add(&mut sandbox)?.err().context("the pod started")?;
        assert_eq!((failure.plugin.as_str(), failure.code), (OURS, TRY_AGAIN), "{failure:?}");
        assert!(
            failure.message.contains("did not let pod shop/cart start within 1 s"),
            "{failure:?}"
        );
        assert!(failure.message.contains("look whether its pod runs"), "{failure:?}");
        // The runtime has taken back what the others have done, and ours has done nothing.
        assert_eq!(remains(&sandbox)?, before);

        for (namespace, name) in [("kube-system", "dns"), ("istio-system", "redirect-agent-x2v9k")]
        {
            let mut sandbox = site.sandbox(namespace, name)?;
            assert_eq!(site.runtime().add(&mut sandbox)?, Ok(()), "{namespace}/{name}");
            site.report(&sandbox)?;
            site.assert_direct(&sandbox, family)?;
            site.runtime().del(&mut sandbox)?;
        }
    }
    fs::remove_file(site.cluster().node.cni_socket())?;
    site.start_agent()?;
    site.cluster().node.wait_for_state(&site.cluster().server, PodState::Bypassing)?;
    site.start_redirected("cart", family)?;
    Ok(())
}

/// What is in a sandbox that has no network, or not any more.
fn remains(sandbox: &Sandbox) -> Result<Vec<String>> {
    let netns = &sandbox.pod.netns;
    let mut remains = programs(netns)?;
    for what in [&["-4", "rule"][..], &["-6", "rule"], &["-o", "link"], &["-o", "addr"]] {
        remains.push(netns.output("ip", what)?);
    }
    Ok(remains)
}

fn no_pod_starts_without_the_proxy(family: Family) -> Result<()> {
    let mut site = Site::bridged(&["--cni-timeout", "1s"])?;
    site.start_agent()?;
    let mut sandbox = site.sandbox("shop", "cart")?;
    let failure = site.runtime().add(&mut sandbox)?.err().context("the pod started")?;
    assert_eq!((failure.plugin.as_str(), failure.code), (OURS, TRY_AGAIN), "{failure:?}");
    assert!(failure.message.contains("shop/cart"), "{failure:?}");
    drop(sandbox);
    site.managed.cluster.node.start_proxy()?;
    site.start_redirected("cart", family)?;

    // One that the cluster does not know is no pod.
    let mut stranger = Sandbox::new(&site.cluster().topology.netns_dir(), 0, "shop", "stranger")?;
    let failure = site.runtime().add(&mut stranger)?.err().context("the pod started")?;
    assert_eq!((failure.plugin.as_str(), failure.code), (OURS, REFUSED), "{failure:?}");
    assert!(failure.message.contains("shop/stranger"), "{failure:?}");
    Ok(())
}

fn agent_is_killed_while_a_pod_starts(family: Family) -> Result<()> {
    let mut site = Site::bridged(&[])?;
    site.start_agent()?;
    let mut sandbox = site.sandbox("shop", "cart")?;
    // Nobody but the proxy is missing, so the plugin waits for the agent.
    let Cluster { node, topology, .. } = &mut site.managed.cluster;
    let (conf, bin) = (node.cni_conf_dir(), node.cni_bin_dir());
    let host = topology.node(0);
    let answer = thread::scope(|scope| {
        let starting = scope.spawn(|| Runtime::new(host, &conf, &bin).add(&mut sandbox));
        let killed = (|| {
            wait_for("the pod to be asked for", SOON, || {
                let pods = node.status()?.pods;
                Ok(pods.iter().any(|p| p.name == "cart" && p.netns.is_some()).then_some(()))
            })?;
            node.kill_agent()?;
            node.start_agent()?;
            node.start_proxy()
        })();
        let answer = starting.join().map_err(|_| anyhow!("a thread panicked"))?;
        killed.and(answer)
    })?;
    assert_eq!(answer, Ok(()));
    site.assert_redirected(&sandbox, family)
}

fn network_plugin_rewrites_its_configuration_while_pods_start(family: Family) -> Result<()> {
    let site = Site::bridged(&[])?.start()?;
    let conf_dir = site.cluster().node.cni_conf_dir();
    let mut pods = Vec::new();
    for round in 0..4 {
        match round {
            // In place, as an editor that is not careful does.
            0 | 2 => site.write_network()?,
            1 => {
                fs::write(conf_dir.join(".new"), &site.network.1)?;
                fs::rename(conf_dir.join(".new"), conf_dir.join(site.network.0))?;
            }
            // Under a new name, before the former one goes.
            _ => {
                fs::write(conf_dir.join("05-pods.conflist"), &site.network.1)?;
                site.wait_until_installed()?;
                fs::remove_file(conf_dir.join(site.network.0))?;
            }
        }
        // The plugin's program may go as well.
        fs::remove_file(site.cluster().node.cni_bin_dir().join(OURS))?;
        wait_for("the CNI plugin to be there again", SOON, || {
            let program = site.cluster().node.cni_bin_dir().join(OURS);
            Ok((program.exists() && site.is_installed()?).then_some(()))
        })?;
        pods.push(site.start_redirected(&format!("pod{round}"), family)?);
    }
    for sandbox in &pods {
        site.assert_redirected(sandbox, family)?;
    }
    Ok(())
}

fn agent_that_is_uninstalled_leaves_the_node_as_it_was(family: Family) -> Result<()> {
    let site = Site::bridged(&[])?;
    let found = site.files()?;
    let mut site = site.start()?;
    let sandbox = site.start_redirected("cart", family)?;
    let installed = site.files()?;
    let published = |site: &Site| site.managed.api.annotation("shop", "cart", REDIRECTION);
    wait_for("the pod to be published", SOON, || {
        Ok((published(&site).as_deref() == Some("enabled")).then_some(()))
    })?;

    // An upgrade; or the API server is away: everything stays.
    site.managed.cluster.node.stop_agent()?;
    assert_eq!(site.files()?, installed);
    site.assert_redirected(&sandbox, family)?;
    site.start_agent()?;
    site.cluster().node.wait_for_state(&sandbox.pod, PodState::Enrolled)?;
    site.managed.api.go_away()?;
    site.managed.cluster.node.stop_agent()?;
    site.managed.api.come_back()?;
    assert_eq!(site.files()?, installed);
    site.assert_redirected(&sandbox, family)?;

    site.start_agent()?;
    site.cluster().node.wait_for_state(&sandbox.pod, PodState::Enrolled)?;
    site.managed.api.delete(Kind::DaemonSet, "istio-system", "redirect-agent");
    let bpffs = site.cluster().node.bpffs().to_owned();
    let done = AtomicBool::new(false);
    let had_no_owner = thread::scope(|scope| {
        let until = Until(&done);
        let looking = scope.spawn(|| has_no_owner(&bpffs, &done));
        let stopped = site.managed.cluster.node.stop_agent();
        drop(until);
        stopped.map(|_| looking.join())
    })?;
    // Another agent could have begun to set up what this one puts back.
    assert!(!had_no_owner.map_err(|_| anyhow!("a thread panicked"))?, "the pins had no owner");
    assert_eq!(site.files()?, found);
    assert_eq!(published(&site), None);
    site.assert_direct(&sandbox, family)?;
    assert!(!site.cluster().node.bpffs().exists() && !site.cluster().node.state_dir().exists());
    let mut other = site.sandbox("shop", "other")?;
    assert_eq!(site.runtime().add(&mut other)?, Ok(()));
    site.report(&other)?;
    site.assert_direct(&other, family)
}

/// Whether a directory that is there had no owner at any time until `done`.
fn has_no_owner(dir: &Path, done: &AtomicBool) -> bool {
    while !done.load(Ordering::Relaxed) {
        let lock = |file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok();
        if File::open(dir).is_ok_and(lock) && dir.exists() {
            return true;
        }
        thread::sleep(Duration::from_millis(1));
    }
    false
}

/// However the API server says it.
#[test]
fn uninstallation_is_told_in_several_ways() -> Result<()> {
    let mut site = Site::bridged(&[])?;
    let found = site.files()?;
    for way in ["deleting", "role is gone", "account is gone"] {
        site.put_daemon_set(json!({}));
        site.managed.api.allow_all();
        site.start_agent()?;
        wait_for("the agent to have asked once", SOON, || {
            let asked = site.managed.api.requests_of("get", "daemonsets");
            Ok(asked.iter().any(|request| request.code == 200).then_some(()))
        })?;
        match way {
            "deleting" => site.put_daemon_set(json!({"deletionTimestamp": "2026-01-01T00:00:00Z"})),
            "role is gone" => site.managed.api.forbid("get", "daemonsets"),
            _ => site.managed.api.forget_tokens(),
        }
        site.managed.cluster.node.stop_agent()?;
        assert_eq!(site.files()?, found, "{way}");
    }
    Ok(())
}

/// An API server that starts refuses everybody until it has read its roles.
#[test]
fn refused_for_a_moment_and_everything_stays() -> Result<()> {
    let mut site = Site::bridged(&[])?;
    site.start_agent()?;
    let installed = site.files()?;
    let asked = |api: &ApiServer, code: u16| {
        wait_for(&format!("the agent to be told {code}"), SOON, || {
            let asked = api.requests_of("get", "daemonsets");
            Ok(asked.iter().any(|request| request.code == code).then_some(()))
        })
    };
    let managed = &mut site.managed;
    asked(&managed.api, 200)?;
    managed.api.forbid("get", "daemonsets");
    let (api, node) = (&managed.api, &mut managed.cluster.node);
    thread::scope(|scope| {
        let starting = scope.spawn(|| asked(api, 403).map(|()| api.allow_all()));
        node.stop_agent()?;
        starting.join().map_err(|_| anyhow!("a thread panicked"))?
    })?;
    assert_eq!(site.files()?, installed);
    Ok(())
}

/// An agent that was never allowed to ask has no reason to think that it is uninstalled.
#[test]
fn role_lacks_the_daemon_set_and_everything_stays() -> Result<()> {
    let mut site = Site::bridged(&[])?;
    site.managed.api.forbid("get", "daemonsets");
    site.start_agent()?;
    let installed = site.files()?;
    let node = &mut site.managed.cluster.node;
    wait_for("the agent to tell of it", SOON, || {
        Ok(node.agent_log()?.contains("get on its own DaemonSet").then_some(()))
    })?;
    node.stop_agent()?;
    assert_eq!(site.files()?, installed);
    Ok(())
}

/// The commands that a runtime gives beside ADD and DEL, and what the operator sees.
#[test]
fn plugin_and_agent_say_how_it_stands() -> Result<()> {
    let mut site = Site::bridged(&[])?;
    let (file, network) = site.network.clone();
    fs::remove_file(site.cluster().node.cni_conf_dir().join(file))?;
    let address = TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?.local_addr()?;
    site.managed.cluster.node.serve_health(address);
    site.managed.cluster.node.start_agent()?;
    let check = |site: &Site| -> Result<Value> {
        let node = &site.cluster().node;
        let (conf, bin) = (node.cni_conf_dir(), node.cni_bin_dir());
        let output = succeed(
            Command::new(binary("redirect-agent")?)
                .args(["check", "-o", "json", "--cni-conf-dir"])
                .arg(conf)
                .arg("--cni-bin-dir")
                .arg(bin),
        )?;
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let checks = report["checks"].as_array().context("no checks")?;
        let ours = checks.iter().find(|check| check["name"] == "our CNI plugin");
        Ok(ours.context("no check of the plugin")?["answer"].clone())
    };
    // A fresh node: its network plugin comes later.
    wait_for("the agent to wait for a network", SOON, || {
        let (status, text) = get(address, "/readyz")?;
        let waits = text.contains("[-] cni plugin: ") && text.contains("has no network");
        Ok((status == 503 && waits).then_some(()))
    })?;
    assert_eq!(check(&site)?, "no");
    fs::write(site.cluster().node.cni_conf_dir().join(file), network)?;
    wait_for("the agent to be ready", SOON, || {
        let (status, text) = get(address, "/readyz")?;
        Ok((status == 200 && text.contains("[+] cni plugin\n")).then_some(()))
    })?;
    assert_eq!(check(&site)?, "yes");

    let sandbox = site.sandbox("shop", "cart")?;
    let (_, list) = site.runtime().network()?;
    let ours = plugins(&list)?.last().context("no plugin")?.clone();
    let list = json!({"name": "pods", "cniVersion": "1.1.0"});
    let call = |site: &Site, command: &str| site.runtime().execute(command, &list, &ours, &sandbox);
    assert_eq!(call(&site, "STATUS")?, Ok(String::new()));
    assert_eq!(call(&site, "GC")?, Ok(String::new()));
    let versions: Value = serde_json::from_str(&call(&site, "VERSION")?.unwrap_or_default())?;
    assert_eq!(
        versions,
        json!({
            "cniVersion": "1.1.0",
            "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        })
    );
    let unknown = call(&site, "FROBNICATE")?.unwrap_err();
    assert_eq!(unknown.code, 4, "{unknown:?}");
    let alone = call(&site, "ADD")?.unwrap_err();
    assert!(alone.code == 7 && alone.message.contains("no prevResult"), "{alone:?}");

    site.managed.cluster.node.kill_agent()?;
    let Failure { code, message, .. } = call(&site, "STATUS")?.unwrap_err();
    assert!(code == UNAVAILABLE && message.contains("cannot let pods start"), "{code} {message}");
    assert_eq!(call(&site, "GC")?, Ok(String::new()));
    assert_eq!(call(&site, "DEL")?, Ok(String::new()));
    Ok(())
}
