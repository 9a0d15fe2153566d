//! Kubelet's probes reach the application past the proxy, and nothing else of the node does.

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::extract::ConnectInfo;
use axum::routing::any;
use redirect_agent::probes::InForce;
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns, Running};
use redirect_tests::process::{Process, succeed, wait_for};
use redirect_tests::topology::Pod;

use crate::cgroup::{Cgroup, shell_in, unified};
use crate::cluster::{Cluster, PORT, SOON, echo};

both_families! {
    kubelets_probes_reach_the_application_and_no_other_process_does,
    kubelet_is_followed_through_restarts_and_into_other_cgroups,
    probes_go_on_while_the_agent_is_away,
    configured_sources_count_until_kubelet_is_found,
    addresses_of_istio_count_on_demand,
}

const STRICT: &str = "apiVersion: security.istio.io/v1\n\
                      kind: PeerAuthentication\n\
                      metadata: {name: default, namespace: shop}\n\
                      spec: {mtls: {mode: STRICT}}\n";
/// An application's port for HTTP and gRPC.
const HTTP: u16 = 8081;

/// A process that is called as kubelet is.
pub struct Kubelet {
    // Dropped first: a cgroup that has a process cannot be removed.
    process: Process,
    cgroup: Option<Cgroup>,
}

impl Kubelet {
    pub fn start(cluster: &Cluster, cgroup: &str) -> Result<Self> {
        let cgroup = Cgroup::new(&unified()?, cgroup)?;
        let dir = cgroup.dir().to_owned();
        let process = Self::run(cluster, Some(cluster.topology.node(0)), &dir)?;
        Ok(Self { process, cgroup: Some(cgroup) })
    }

    fn run(cluster: &Cluster, netns: Option<&Netns>, cgroup: &Path) -> Result<Process> {
        let dir = cluster.topology.dir().subdir("kubelet")?;
        let program = dir.join("kubelet");
        if !program.exists() {
            symlink("/bin/sleep", &program).context("make a program called kubelet")?;
        }
        let script = format!("echo inside && exec {} infinity", program.display());
        let mut command = shell_in(cgroup, netns, &script);
        let log = dir.join(format!("{}.log", fs::read_dir(&dir)?.count()));
        let mut process = Process::spawn("kubelet", &mut command, log)?;
        process.wait_for_log("inside", SOON)?;
        Ok(process)
    }

    pub fn cgroup(&self) -> Result<&Path> {
        Ok(self.cgroup.as_ref().context("no cgroup of its own")?.dir())
    }
}

/// Which address a probe's answer says that it came from; `None` when there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    Tcp,
    Http,
    Grpc,
}

impl Probe {
    /// Sends the probe from a cgroup on the node; the address that the application saw.
    fn send(self, cluster: &Cluster, cgroup: &Path, family: Family) -> Result<Option<String>> {
        let (tcp, http) = (cluster.server.addr(family, PORT), cluster.server.addr(family, HTTP));
        let script = match self {
            Probe::Tcp => format!(
                "exec 3<>/dev/tcp/{}/{} && read -r -t 5 line <&3 && echo $line",
                tcp.ip(),
                tcp.port()
            ),
            Probe::Http => format!("exec curl -sS --max-time 5 http://{http}/healthz"),
            Probe::Grpc => format!(
                "exec curl -sS --max-time 5 --http2-prior-knowledge -H 'content-type: \
                 application/grpc' -H 'te: trailers' -d x \
                 http://{http}/grpc.health.v1.Health/Check"
            ),
        };
        let output = shell_in(cgroup, Some(cluster.topology.node(0)), &script)
            .output()
            .context("send a probe")?;
        // For whoever reads why a test failed.
        eprintln!("{self:?}: {}", String::from_utf8_lossy(&output.stderr));
        let said = String::from_utf8(output.stdout).context("read what the application said")?;
        Ok((output.status.success() && !said.is_empty()).then_some(said))
    }
}

/// A server of HTTP/1.1 and HTTP/2 that tells its clients their address, once it has read all that
/// they sent: curl takes an earlier answer for an error.
pub fn serve_http(pod: &Pod) -> Result<Running> {
    pod.netns.spawn(|| async {
        let app = Router::new().fallback(any(
            |ConnectInfo(peer): ConnectInfo<SocketAddr>, _all: Bytes| async move {
                peer.ip().to_canonical().to_string()
            },
        ));
        let listener = tokio::net::TcpListener::bind(("::", HTTP)).await;
        if let Ok(listener) = listener {
            let app = app.into_make_service_with_connect_info::<SocketAddr>();
            let _ended = axum::serve(listener, app).await;
        }
    })
}

/// The server is in the mesh under STRICT, and the agent runs on the node's network.
fn strict(flags: &[&str]) -> Result<Cluster> {
    let mut cluster = Cluster::without_agent(flags)?;
    cluster.node.use_node_network(cluster.topology.node(0));
    fs::write(cluster.node.manifests().join("policy.yaml"), STRICT).context("write a policy")?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    cluster.node.enroll(&cluster.server)?;
    Ok(cluster)
}

fn wait_until(cluster: &Cluster, what: &str, is: impl Fn(&InForce) -> bool) -> Result<InForce> {
    let found = wait_for(what, SOON, || Ok(Some(cluster.node.status()?.probes).filter(&is)));
    found.with_context(|| format!("probes: {:#?}", cluster.node.status().map(|s| s.probes)))
}

pub fn wait_until_followed(cluster: &Cluster, kubelet: &Kubelet) -> Result<()> {
    wait_until(cluster, "kubelet to be followed", |probes| {
        probes.kubelet.as_ref().is_some_and(|found| found.pid == kubelet.process.pid())
    })?;
    Ok(())
}

/// What the application sees of a call that the node makes directly.
fn node_ip(cluster: &Cluster, family: Family) -> String {
    cluster.topology.node_ip(0, family).to_string()
}

pub fn assert_reaches(cluster: &Cluster, cgroup: &Path, family: Family) -> Result<()> {
    for probe in [Probe::Tcp, Probe::Http, Probe::Grpc] {
        let saw = probe.send(cluster, cgroup, family)?;
        let ip = node_ip(cluster, family);
        ensure!(saw.as_ref().is_some_and(|saw| saw.contains(&ip)), "{probe:?}: {saw:?}, not {ip}");
    }
    Ok(())
}

fn assert_refused(cluster: &Cluster, cgroup: &Path, family: Family) -> Result<()> {
    for probe in [Probe::Tcp, Probe::Http, Probe::Grpc] {
        let saw = probe.send(cluster, cgroup, family)?;
        ensure!(saw.is_none(), "{probe:?} past the proxy: {saw:?}");
    }
    Ok(())
}

pub fn counted(cluster: &Cluster, name: &str) -> Result<u64> {
    let pod = cluster.node.pod(&cluster.server)?.context("no such pod")?;
    Ok(pod.counters.get(name).copied().unwrap_or_default())
}

fn kubelets_probes_reach_the_application_and_no_other_process_does(family: Family) -> Result<()> {
    let cluster = strict(&[])?;
    let _apps = (echo(&cluster.server)?, serve_http(&cluster.server)?);
    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    let other = Cgroup::new(&unified()?, "other.service")?;
    wait_until_followed(&cluster, &kubelet)?;

    assert_reaches(&cluster, kubelet.cgroup()?, family)?;
    ensure!(counted(&cluster, "kubelet_probe")? == 3);
    assert_refused(&cluster, other.dir(), family)?;
    ensure!(counted(&cluster, "kubelet_probe")? == 3);
    ensure!(cluster.node.tell("status", &[])?.contains("probes: of kubelet, process"));
    // Nobody gets the pass of a connection that has ended.
    let map = cluster.node.bpffs().join("kubelet_flows");
    wait_for("kubelet's connections to be forgotten", SOON, || {
        let mut bpftool = Command::new("bpftool");
        let output = succeed(bpftool.args(["-j", "map", "dump", "pinned"]).arg(&map))?;
        let flows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
        Ok(flows.is_empty().then_some(()))
    })
}

fn kubelet_is_followed_through_restarts_and_into_other_cgroups(family: Family) -> Result<()> {
    let cluster = strict(&[])?;
    let _apps = (echo(&cluster.server)?, serve_http(&cluster.server)?);
    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    wait_until_followed(&cluster, &kubelet)?;
    drop(kubelet);
    let missed = wait_until(&cluster, "kubelet to be missed", |p| p.kubelet.is_none())?;
    ensure!(missed.problem.is_some_and(|problem| problem.contains("no process")));

    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    wait_until_followed(&cluster, &kubelet)?;
    assert_reaches(&cluster, kubelet.cgroup()?, family)?;

    let moved = Cgroup::new(&unified()?, "elsewhere/kubelet.service")?;
    let procs = moved.dir().join("cgroup.procs");
    fs::write(procs, kubelet.process.pid().to_string()).context("move kubelet")?;
    wait_until(&cluster, "kubelet to be found elsewhere", |probes| {
        probes.kubelet.as_ref().is_some_and(|found| found.cgroup.contains("elsewhere"))
    })?;
    assert_reaches(&cluster, moved.dir(), family)?;
    assert_refused(&cluster, kubelet.cgroup()?, family)?;
    drop(kubelet);
    Ok(())
}

fn probes_go_on_while_the_agent_is_away(family: Family) -> Result<()> {
    let mut cluster = strict(&[])?;
    let _apps = (echo(&cluster.server)?, serve_http(&cluster.server)?);
    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    wait_until_followed(&cluster, &kubelet)?;
    let pin = cluster.node.bpffs().join("kubelet");
    let link = |pin: &PathBuf| -> Result<String> {
        let mut bpftool = Command::new("bpftool");
        let output = succeed(bpftool.args(["-j", "link", "show", "pinned"]).arg(pin))?;
        let link: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        Ok(link["id"].to_string())
    };
    let before = link(&pin)?;
    cluster.node.kill_agent()?;
    assert_reaches(&cluster, kubelet.cgroup()?, family)?;

    cluster.node.start_agent()?;
    wait_until_followed(&cluster, &kubelet)?;
    ensure!(link(&pin)? == before, "the link is taken over");
    assert_reaches(&cluster, kubelet.cgroup()?, family)?;

    cluster.node.stop_agent()?;
    let (cleaned, said) = cluster.node.cleanup()?;
    ensure!(cleaned && !pin.exists(), "{said}");
    Ok(())
}

fn configured_sources_count_until_kubelet_is_found(family: Family) -> Result<()> {
    let sources = "192.168.77.0/24,fd77::/64";
    let cluster = strict(&["--probe-sources", sources])?;
    let _apps = (echo(&cluster.server)?, serve_http(&cluster.server)?);
    let other = Cgroup::new(&unified()?, "other.service")?;
    ensure!(
        cluster.node.tell("status", &[])?.contains("probes: from 192.168.77.0/24, fd77::/64 (")
    );
    assert_reaches(&cluster, other.dir(), family)?;
    ensure!(counted(&cluster, "probe_source")? == 3);

    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    wait_until_followed(&cluster, &kubelet)?;
    assert_refused(&cluster, other.dir(), family)?;
    assert_reaches(&cluster, kubelet.cgroup()?, family)?;
    drop(kubelet);
    wait_until(&cluster, "the sources to count again", |p| !p.sources.is_empty())?;
    assert_reaches(&cluster, other.dir(), family)
}

fn addresses_of_istio_count_on_demand(family: Family) -> Result<()> {
    let mut cluster = strict(&["--kubelet-probes", "false"])?;
    let _apps = (echo(&cluster.server)?, serve_http(&cluster.server)?);
    let other = Cgroup::new(&unified()?, "other.service")?;
    // As istio-cni's SNAT does it.
    let node = cluster.topology.node(0);
    let address = match family {
        Family::V4 => "169.254.7.127",
        Family::V6 => "fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
    };
    node.ip(&format!("addr add {address} dev lo"))?;
    let pod = cluster.server.ip(family);
    let route = node.output("ip", &["-o", "route", "get", &pod.to_string()])?;
    let device = route.split(" dev ").nth(1).and_then(|rest| rest.split(' ').next());
    let device = device.context("no route to the pod")?;
    node.ip(&format!("route replace {pod} dev {device} src {address}"))?;
    assert_refused(&cluster, other.dir(), family)?;

    cluster.node.stop_agent()?;
    cluster.node.set_flags(&["--kubelet-probes", "false", "--istio-probe-addresses"]);
    cluster.node.start_agent()?;
    for probe in [Probe::Tcp, Probe::Http, Probe::Grpc] {
        let saw = probe.send(&cluster, other.dir(), family)?;
        ensure!(saw.as_ref().is_some_and(|saw| saw.contains(address)), "{probe:?}: {saw:?}");
    }
    Ok(())
}

#[test]
fn what_only_calls_itself_kubelet_is_not_followed() -> Result<()> {
    let cluster = strict(&[])?;
    let hierarchy = unified()?;
    let session = Cgroup::new(&hierarchy, "session.scope")?;
    let programs = tempfile::tempdir().context("make a directory for programs")?;
    let pod_cgroup =
        Cgroup::new(&hierarchy, "kubepods/pod6f0f3a52-98a8-4d5c-9b2e-7c1f0f7d2a11/container")?;
    let service = Cgroup::new(&hierarchy, "some.service")?;
    let node = cluster.topology.node(0);
    let impostors = [
        // On the node's network, in a pod.
        Kubelet::run(&cluster, Some(node), pod_cgroup.dir())?,
        // On a network of its own.
        Kubelet::run(&cluster, Some(&cluster.server.netns), service.dir())?,
        // A user's, by a program that becomes root for whoever calls it, such as su.
        run_set_user_id(&cluster, programs.path(), session.dir())?,
    ];
    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    wait_until_followed(&cluster, &kubelet)?;
    drop(kubelet);
    let missed = wait_until(&cluster, "kubelet to be missed", |p| p.kubelet.is_none())?;
    ensure!(missed.problem.is_some_and(|problem| problem.contains("no process")));
    drop(impostors);
    Ok(())
}

/// Runs a program called kubelet that is set-user-id root, as a user who is not root.
fn run_set_user_id(cluster: &Cluster, programs: &Path, cgroup: &Path) -> Result<Process> {
    let program = programs.join("kubelet");
    fs::copy("/bin/sleep", &program).context("copy a program")?;
    fs::set_permissions(programs, Permissions::from_mode(0o755))?;
    fs::set_permissions(&program, Permissions::from_mode(0o4755))?;
    let script = format!(
        "echo inside && exec setpriv --reuid 65534 --regid 65534 --clear-groups {} infinity",
        program.display()
    );
    let mut command = shell_in(cgroup, Some(cluster.topology.node(0)), &script);
    let log = cluster.topology.dir().subdir("kubelet")?.join("set-user-id.log");
    let mut process = Process::spawn("kubelet", &mut command, log)?;
    process.wait_for_log("inside", SOON)?;
    let status = format!("/proc/{}/status", process.pid());
    wait_for("the program to become root", SOON, || {
        let status = fs::read_to_string(&status).context("read its status")?;
        Ok(status.contains("Uid:\t65534\t0\t").then_some(()))
    })?;
    Ok(process)
}

/// `::/0` has the addresses of IPv4 only in the form in which the maps have them.
#[test]
fn source_of_all_ipv6_addresses_is_none_of_ipv4() -> Result<()> {
    let cluster = strict(&["--probe-sources", "::/0"])?;
    let _apps = (echo(&cluster.server)?, serve_http(&cluster.server)?);
    let other = Cgroup::new(&unified()?, "other.service")?;
    assert_reaches(&cluster, other.dir(), Family::V6)?;
    assert_refused(&cluster, other.dir(), Family::V4)
}

#[test]
fn kubelet_that_shares_its_cgroup_with_others_is_refused_by_name() -> Result<()> {
    let cluster = strict(&[])?;
    let hierarchy = unified()?;
    let node = cluster.topology.node(0);
    let in_root = Kubelet::run(&cluster, Some(node), &hierarchy)?;
    wait_until(&cluster, "the root cgroup to be refused", |probes| {
        probes.problem.as_ref().is_some_and(|problem| problem.contains("root cgroup"))
    })?;
    drop(in_root);
    let outer = Cgroup::new(&hierarchy, "node")?;
    let pods = Cgroup::new(outer.dir(), "kubepods")?;
    let around = Kubelet::run(&cluster, Some(node), outer.dir())?;
    wait_until(&cluster, "a cgroup with pods in it to be refused", |probes| {
        probes.problem.as_ref().is_some_and(|problem| problem.contains("pods' cgroup"))
    })?;
    drop((around, pods));
    Ok(())
}
