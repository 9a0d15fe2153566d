//! The agent as its DaemonSet runs it: with the arguments, the environment, the mounts and the
//! capabilities of the manifest and no others, a read-only root and `/proc/sys`, and a cgroup
//! namespace of its own; on the node's network and among its processes.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Container as Manifested;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};
use redirect_agent::output::PodState;
use redirect_tests::apiserver::{ApiServer, Kind};
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::manifests::{NAME, NAMESPACE, Objects};
use redirect_tests::netns::{Family, TestDir};
use redirect_tests::process::{Process, binary, wait_for};
use serde_json::json;

use crate::api_server::Managed;
use crate::cgroup::{Cgroup, any_hierarchy, shell_in};
use crate::cluster::{Cluster, Manifest, SOON, echo};
use crate::probes::{Kubelet, assert_reaches, counted, serve_http, wait_until_followed};

both_families! {
    agent_does_all_of_its_work_with_what_the_daemon_set_gives_it,
}

const AGENTS_UID: &str = "0a9f3a52-98a8-4d5c-9b2e-7c1f0f7d2a00";
/// Where a pod finds its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Somebody who is not root: the application's processes are theirs, and the node's CNI directories.
const SOMEBODY: u32 = 1234;

/// The container's root: nothing but what the image, a runtime and the manifest put there. The debug
/// build of the program is linked dynamically: `/usr` is for that.
const SET_UP: &str = r#"
mount -t tmpfs -o mode=755 image "$ROOT" && cd "$ROOT"
mkdir -p proc sys usr run var && ln -s ../run var/run
ln -s usr/bin bin && ln -s usr/lib lib && ln -s usr/lib64 lib64
mount --rbind /usr usr
touch redirect-agent
mount --bind "$PROGRAM" redirect-agent
mkdir -p ".$ACCOUNT" && mount --bind -o ro "$CREDENTIALS" ".$ACCOUNT"
mount -t proc proc proc
mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
"#;
const ENTER: &str = r#"
mount -o remount,bind,ro .
pivot_root . . && umount -l .
exec setpriv --bounding-set="-all$CAPABILITIES" --inh-caps=-all \
    env -i KUBECONFIG="$ACCOUNT/kubeconfig" NODE_NAME=node0 RUST_LOG=info $ENVIRONMENT /redirect-agent "$@"
"#;

/// What is needed to run a container of the DaemonSet on the first node.
struct Container {
    /// As a runtime would make it.
    cgroup: Cgroup,
    script: PathBuf,
    /// What stands for the service account's directory.
    credentials: PathBuf,
    root: PathBuf,
    environment: Vec<(String, String)>,
    manifest: Manifested,
}

impl Container {
    fn new(cluster: &Cluster, api: &ApiServer) -> Result<Self> {
        let objects = Objects::committed()?;
        let manifest = objects.container()?;
        let context = manifest.security_context.as_ref().context("no security context")?;
        ensure!(context.privileged == Some(false) && context.run_as_user == Some(0));
        ensure!(context.read_only_root_filesystem == Some(true));
        let dir = cluster.topology.dir();
        let script = dir.path().join("container.sh");
        let mut text = format!("set -eu{SET_UP}");
        for mount in manifest.volume_mounts.as_deref().context("no mounts")? {
            let at = &mount.mount_path;
            let host = cluster.node.host_dir(&cluster.topology, at)?;
            fs::create_dir_all(&host).with_context(|| format!("make {}", host.display()))?;
            // In /sys nothing can be made, but the place for a bpffs is there.
            text += &format!(
                "[ -d .{at} ] || mkdir -p .{at}\nmount --rbind {} .{at}\n",
                host.display()
            );
        }
        fs::write(&script, text + ENTER).context("write a script")?;
        Ok(Self {
            cgroup: Cgroup::new(&any_hierarchy()?, &format!("kubepods/pod{AGENTS_UID}/agent"))?,
            script,
            credentials: credentials(dir, api)?,
            root: dir.subdir("root")?,
            environment: objects.environment()?,
            manifest,
        })
    }

    /// Its capabilities.
    fn capabilities(&self) -> Result<Vec<String>> {
        let context = self.manifest.security_context.as_ref().context("no security context")?;
        let capabilities = context.capabilities.as_ref().context("no capabilities")?;
        ensure!(capabilities.drop.as_deref() == Some(&["ALL".to_owned()]), "not all are dropped");
        capabilities.add.clone().context("no capabilities are added")
    }

    /// The command that runs it, but without `lacking`.
    fn command(&self, cluster: &Cluster, lacking: Option<&str>) -> Result<Command> {
        let capabilities: String = self
            .capabilities()?
            .iter()
            .filter(|capability| Some(capability.as_str()) != lacking)
            .map(|capability| format!(",+{}", capability.to_lowercase()))
            .collect();
        let environment: Vec<String> =
            self.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let args = self.manifest.args.iter().flatten();
        let args = args.map(|arg| format!("'{}'", arg.replace("$(POD_NAMESPACE)", NAMESPACE)));
        let script = format!(
            "exec unshare --mount --cgroup --propagation slave bash {} {}",
            self.script.display(),
            args.collect::<Vec<_>>().join(" ")
        );
        let mut command = shell_in(self.cgroup.dir(), Some(cluster.topology.node(0)), &script);
        command
            .env("ROOT", &self.root)
            .env("PROGRAM", binary("redirect-agent")?)
            .env("ACCOUNT", ACCOUNT)
            .env("CREDENTIALS", &self.credentials)
            .env("CAPABILITIES", capabilities)
            .env("ENVIRONMENT", environment.join(" "));
        Ok(command)
    }
}

/// How to reach the API server. As in a pod, its CA is known: the image has none.
fn credentials(dir: &TestDir, api: &ApiServer) -> Result<PathBuf> {
    let account = dir.subdir("account")?;
    let kubeconfig = account.join("kubeconfig");
    api.write_kubeconfig(&kubeconfig)?;
    let ca = rcgen::generate_simple_self_signed(["ca".to_owned()]).context("make a CA")?;
    fs::write(account.join("ca.crt"), ca.cert.pem()).context("write the CA")?;
    let with_ca = fs::read_to_string(&kubeconfig)?.replace(
        "cluster: {server:",
        &format!("cluster: {{certificate-authority: {ACCOUNT}/ca.crt, server:"),
    );
    fs::write(&kubeconfig, with_ca).context("write a kubeconfig")?;
    Ok(account)
}

/// A cluster on an API server that the first node reaches, with one pod whose processes are
/// somebody else's.
struct Setting {
    // Dropped in this order: processes, their cgroups, and the network that they are in.
    managed: Managed,
    _process: Process,
    _cgroup: Cgroup,
    container: Container,
    /// The pod's. Its processes must not be taken for those of another test.
    uid: String,
}

impl Setting {
    fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let uid = format!("6f0f3a52-98a8-4d5c-{number:04x}-{process:012x}");
        let mut cluster = Cluster::without_agent(&[])?;
        cluster.node.hide_netns()?;
        let api = cluster.topology.node(0).run(ApiServer::start)?;
        api.put(Kind::Namespace, Manifest::of_namespace("shop").object());
        let daemon_set = json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": NAME, "namespace": NAMESPACE},
        });
        api.put(Kind::DaemonSet, daemon_set);
        cni_of_somebody(&cluster.node.cni_conf_dir(), &cluster.node.cni_bin_dir())?;
        let container = Container::new(&cluster, &api)?;

        let cgroup = Cgroup::new(&any_hierarchy()?, &format!("kubepods/pod{uid}/container"))?;
        let mut command = cgroup.shell(
            Some(&cluster.server.netns),
            &format!(
                "echo inside && exec setpriv --reuid {SOMEBODY} --regid {SOMEBODY} --clear-groups \
                 sleep infinity"
            ),
        );
        let log = cluster.topology.dir().path().join("container.log");
        let mut process = Process::spawn("the pod's container", &mut command, log)?;
        process.wait_for_log("inside", SOON)?;
        let managed = Managed { cluster, api };
        Ok(Self { managed, _process: process, _cgroup: cgroup, container, uid })
    }

    fn pod(&self) -> Manifest {
        Manifest::of(&self.managed.cluster.server).uid(&self.uid)
    }

    fn start_agent(&mut self) -> Result<()> {
        let cluster = &mut self.managed.cluster;
        let command = self.container.command(cluster, None)?;
        cluster.node.start_agent_by(command)
    }

    fn is_enrolled(&self) -> Result<()> {
        let Cluster { node, server, .. } = &self.managed.cluster;
        node.wait_until_complete(server)?;
        self.managed.wait_for_redirection(server, Some("enabled"))
    }
}

/// A node's CNI, all of it owned by somebody.
fn cni_of_somebody(conf: &Path, bin: &Path) -> Result<()> {
    for dir in [conf, bin] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        chown(dir, Some(SOMEBODY), Some(SOMEBODY)).context("give a directory away")?;
    }
    let network = conf.join("10-net.conflist");
    let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]});
    fs::write(&network, list.to_string()).context("write a network")?;
    chown(&network, Some(SOMEBODY), Some(SOMEBODY)).context("give a file away")
}

fn agent_does_all_of_its_work_with_what_the_daemon_set_gives_it(family: Family) -> Result<()> {
    let mut setting = Setting::new()?;
    let before = footprint(&setting.managed.cluster.server.netns)?;
    setting.managed.put(&setting.pod().mode("ambient"));
    let kubelet = Kubelet::start(&setting.managed.cluster, "kubelet.service")?;
    setting.start_agent()?;
    setting.managed.cluster.node.start_proxy()?;
    setting.is_enrolled()?;

    let Cluster { node, server, client, .. } = &setting.managed.cluster;
    let apps = (echo(server)?, echo(client)?, serve_http(server)?);
    setting.managed.cluster.assert_redirected(family).context("once enrolled")?;
    setting.managed.wait_for_event(server, "Enrolled")?;
    answers_where_it_is_asked(&setting)?;
    assert_is_installed(&setting)?;
    wait_until_followed(&setting.managed.cluster, &kubelet)?;
    assert_reaches(&setting.managed.cluster, kubelet.cgroup()?, family)?;
    ensure!(counted(&setting.managed.cluster, "kubelet_probe")? == 3);

    // Somebody asks for a call to a Service.
    let service = json!({
        "metadata": {"name": "cart", "namespace": server.namespace},
        "spec": {"clusterIPs": ["10.96.0.7"], "ports": [{"port": 80}]},
    });
    setting.managed.api.put(Kind::Service, service);
    let explained = node.tell("explain", &[&server.to_string(), "cart.shop.svc:80"])?;
    ensure!(explained.contains("no-ready-endpoint"), "{explained}");

    // What is gone is put back.
    server.netns.output("ip", &["-4", "rule", "del", "table", "15001"])?;
    server.netns.set_sysctl("net/ipv4/tcp_fwmark_accept", "0")?;
    setting.managed.wait_for_event(server, "Repaired")?;
    node.wait_until_complete(server)?;
    setting.managed.cluster.assert_redirected(family).context("after the repair")?;

    // The next container takes over.
    setting.managed.cluster.node.stop_agent()?;
    setting.managed.cluster.assert_redirected(family).context("without an agent")?;
    setting.start_agent()?;
    setting.is_enrolled()?;
    setting.managed.cluster.assert_redirected(family).context("with the next agent")?;

    // The label is removed.
    setting.managed.put(&setting.pod());
    let Cluster { node, server, .. } = &setting.managed.cluster;
    node.wait_for_state(server, PodState::Bypassing)?;
    setting.managed.wait_for_redirection(server, None)?;
    setting.managed.cluster.assert_direct(family)?;
    drop(apps);
    assert_unchanged(&server.netns, &before).context("after the label was removed")?;

    // Uninstalled: the node is as it was.
    setting.managed.put(&setting.pod().mode("ambient"));
    setting.is_enrolled()?;
    setting.managed.api.delete(Kind::DaemonSet, NAMESPACE, NAME);
    let log = setting.managed.cluster.node.stop_agent()?;
    let Cluster { node, server, .. } = &setting.managed.cluster;
    assert_unchanged(&server.netns, &before).context(log)?;
    let network = fs::read_to_string(node.cni_conf_dir().join("10-net.conflist"))?;
    ensure!(!network.contains("redirect-cni"), "{network}");
    ensure!(!node.cni_bin_dir().join("redirect-cni").exists(), "the plugin is left");

    assert_asks_for_what_it_may(&setting.managed.api)
}

/// The probes of the manifest, and Prometheus, are answered.
fn answers_where_it_is_asked(setting: &Setting) -> Result<()> {
    let manifest = &setting.container.manifest;
    let ports = manifest.ports.as_ref().context("no ports")?;
    let port = u16::try_from(ports[0].container_port).context("no port")?;
    let probes = [&manifest.startup_probe, &manifest.liveness_probe, &manifest.readiness_probe];
    let paths = probes.map(|probe| probe.as_ref()?.http_get.as_ref()?.path.clone());
    let cluster = &setting.managed.cluster;
    for family in [Family::V4, Family::V6] {
        let node = SocketAddr::new(cluster.topology.node_ip(0, family), port);
        for path in paths.iter().cloned().chain([Some("/metrics".to_owned())]) {
            let path = path.context("a probe that is not by HTTP")?;
            wait_for(&format!("{path} of {node}"), SOON, || {
                let mut stream = cluster.topology.node(0).run(|| Ok(TcpStream::connect(node)?))?;
                write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(answer.starts_with("HTTP/1.0 200").then_some(()))
            })?;
        }
    }
    Ok(())
}

/// The plugin is installed, and what was somebody's is still theirs.
fn assert_is_installed(setting: &Setting) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let node = &setting.managed.cluster.node;
    let network = node.cni_conf_dir().join("10-net.conflist");
    wait_for("the plugin in the node's network", SOON, || {
        Ok(fs::read_to_string(&network)?.contains("redirect-cni").then_some(()))
    })?;
    ensure!(node.cni_bin_dir().join("redirect-cni").exists());
    let owner = fs::metadata(&network).context("stat a network")?;
    ensure!((owner.uid(), owner.gid()) == (SOMEBODY, SOMEBODY), "{owner:?}");
    Ok(())
}

/// Every request is allowed by the roles, and every right of theirs is made use of.
fn assert_asks_for_what_it_may(api: &ApiServer) -> Result<()> {
    let objects = Objects::committed()?;
    let rules = |rules: Option<Vec<PolicyRule>>| rules.unwrap_or_default();
    let granted: BTreeSet<(String, String)> = rules(objects.one::<ClusterRole>()?.rules)
        .into_iter()
        .chain(rules(objects.one::<Role>()?.rules))
        .flat_map(|rule| {
            let resources = rule.resources.unwrap_or_default();
            let pairs = resources.into_iter().flat_map(move |resource| {
                rule.verbs.clone().into_iter().map(move |verb| (verb, resource.clone()))
            });
            pairs.collect::<Vec<_>>()
        })
        .collect();
    let asked: BTreeSet<(String, String)> =
        api.requests().into_iter().map(|r| (r.verb.to_owned(), r.resource)).collect();
    let not_granted: Vec<_> = asked.difference(&granted).collect();
    ensure!(not_granted.is_empty(), "the manifest does not grant {not_granted:?}");
    // Events that are repeated are patched: tests/kube/events.rs.
    let unused: Vec<_> = granted.difference(&asked).collect();
    let repeats = ("patch".to_owned(), "events".to_owned());
    ensure!(unused.iter().all(|right| **right == repeats), "nobody needs {unused:?}");
    Ok(())
}

/// What the agent says when it lacks a capability.
const LACKING: [(&str, &str); 6] = [
    ("SYS_ADMIN", "this node cannot run redirect-agent"),
    ("NET_ADMIN", "this node cannot run redirect-agent"),
    ("SYS_PTRACE", "find the network namespace of pod shop/server"),
    ("DAC_OVERRIDE", "the CNI plugin is not installed"),
    ("CHOWN", "the CNI plugin is not installed"),
    ("FOWNER", "the CNI plugin is not installed"),
];

/// With all of them it does its work, as the other scenario shows; here without one at a time.
#[test]
fn each_capability_is_needed() -> Result<()> {
    let setting = &mut Setting::new()?;
    assert_eq!(setting.container.capabilities()?, LACKING.map(|(capability, _)| capability));
    setting.managed.put(&setting.pod().mode("ambient"));
    for (capability, complaint) in LACKING {
        let command = setting.container.command(&setting.managed.cluster, Some(capability))?;
        let node = &mut setting.managed.cluster.node;
        // The one before may have installed the plugin.
        cni_of_somebody(&node.cni_conf_dir(), &node.cni_bin_dir())?;
        let mut agent = node.spawn_agent_by(command)?;
        let complains = wait_for(&format!("{complaint:?} without {capability}"), SOON, || {
            Ok(agent.log()?.contains(complaint).then_some(()))
        });
        complains.with_context(|| agent.log().unwrap_or_default())?;
        agent.terminate(SOON)?;
    }
    Ok(())
}
