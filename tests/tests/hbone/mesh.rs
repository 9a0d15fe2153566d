//! Two nodes with a pod each, one stand-in proxy for both, and an agent that does what a test says.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use redirect_tests::app::{App, Behaviour, Call, Conversation};
use redirect_tests::hbone::{self, Direction, HboneClient, Identity, OUTBOUND_PORT, Record};
use redirect_tests::netns::Family;
use redirect_tests::process::{Process, binary};
use redirect_tests::topology::{Pod, Style, Topology};
use serde_json::json;

use crate::agent::Agent;

/// Where apps listen.
pub const APP_PORT: u16 = 8080;
/// Where nobody listens.
pub const DEAD_PORT: u16 = 8081;

pub struct Mesh {
    pub proxy: Process,
    pub agent: Agent,
    pub client: Pod,
    pub server: Pod,
    /// On the server's node, and of no service.
    pub other: Pod,
    topology: Topology,
}

impl Mesh {
    /// A proxy that is connected and knows no workload yet.
    pub fn start() -> Result<Self> {
        let mut topology = Topology::new(&[Style::Routed, Style::Bridged])?;
        let client = topology.add_pod(0, "shop", "client")?;
        let server = topology.add_pod(1, "shop", "server")?;
        let other = topology.add_pod(1, "shop", "other")?;
        for vip in [vip(Family::V4), vip(Family::V6)] {
            client.netns.ip(&format!("addr add {} dev lo nodad", vip.ip()))?;
        }
        let dir = topology.dir();
        let manifests = dir.subdir("manifests")?;
        fs::create_dir(manifests.join(".status"))?;
        for pod in [&client, &server, &other] {
            fs::write(manifests.join(format!("{}.json", pod.name)), manifest(pod))?;
        }
        fs::write(manifests.join("service.yaml"), service())?;

        let socket = dir.path().join("zds.sock");
        let mut agent = Agent::listen(&socket)?;
        let mut command = Command::new(binary("standin-proxy")?);
        command
            .env("RUST_LOG", "debug,h2=warn")
            .args(["run", "--node", "node1", "--drain", "30"])
            .arg("--zds-socket")
            .arg(&socket)
            .arg("--ca-dir")
            .arg(ca_dir(dir.path()))
            .arg("--manifests")
            .arg(&manifests)
            .arg("--log-json")
            .arg(log_json(dir.path()));
        let log = dir.path().join("proxy.log");
        let proxy = Process::spawn("standin-proxy", &mut command, log)?;
        agent.accept()?;
        Ok(Self { proxy, agent, client, server, other, topology })
    }

    /// A proxy in front of the client and the server, which both speak HBONE.
    pub fn enrolled() -> Result<Self> {
        let mesh = Self::start()?;
        mesh.enroll(&mesh.client)?;
        mesh.enroll(&mesh.server)?;
        mesh.agent.snapshot_sent()?;
        Ok(mesh)
    }

    /// The server's app, which echoes.
    pub fn app(&self, family: Family) -> Result<App> {
        let addr = self.server.addr(family, APP_PORT);
        App::start(&self.server.netns, "server", addr, Behaviour::Echo)
    }

    /// Gives a pod a proxy and says that it speaks HBONE.
    pub fn enroll(&self, pod: &Pod) -> Result<()> {
        self.agent.add(pod)?;
        route_replies(pod, "add")?;
        self.publish(pod)
    }

    /// Says that a pod speaks HBONE, as an agent would.
    pub fn publish(&self, pod: &Pod) -> Result<()> {
        let file = self.status_file(pod);
        let draft = file.with_extension("draft");
        let patch = json!({"metadata": {"annotations": {
            "ambient.istio.io/redirection": "enabled",
        }}});
        fs::write(&draft, patch.to_string())?;
        fs::rename(draft, file).context("publish HBONE")
    }

    /// The reverse of [`Self::enroll`].
    pub fn unenroll(&self, pod: &Pod) -> Result<()> {
        fs::remove_file(self.status_file(pod)).context("withdraw HBONE")?;
        route_replies(pod, "del")?;
        self.agent.del(pod)
    }

    fn status_file(&self, pod: &Pod) -> PathBuf {
        let name = format!(".status/{}_{}.json", pod.namespace, pod.name);
        self.manifests().join(name)
    }

    /// A call of the client's app to the service that the server is behind.
    pub fn service_call(&self, family: Family) -> Call {
        Call::to(vip(family)).from(self.client.addr(family, 0))
    }

    /// The same, kept.
    pub fn converse(&self, family: Family) -> Result<Conversation> {
        self.service_call(family).open(&self.client.netns)
    }

    /// An HBONE client that is the client pod.
    pub fn hbone_client(&self) -> Result<HboneClient> {
        HboneClient::new(&self.ca_dir(), &identity(&self.client))
    }

    pub fn ca_dir(&self) -> PathBuf {
        ca_dir(self.topology.dir().path())
    }

    /// What the proxy has seen in this direction.
    pub fn records(&self, direction: Direction) -> Result<Vec<Record>> {
        let mut records = hbone::read_log(&log_json(self.topology.dir().path()))?;
        records.retain(|record| record.direction == direction);
        Ok(records)
    }

    /// The one connection that the proxy has seen in this direction.
    pub fn record(&self, direction: Direction) -> Result<Record> {
        let mut records = self.records(direction)?;
        let last = records.pop();
        anyhow::ensure!(records.is_empty(), "more than one connection: {records:?}");
        last.with_context(|| format!("no {direction:?} connection"))
    }

    /// The nodes, for what this does not offer itself.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The directory of manifests.
    pub fn manifests(&self) -> PathBuf {
        self.topology.dir().path().join("manifests")
    }

    /// Where another agent can listen.
    pub fn zds_socket(&self) -> PathBuf {
        self.topology.dir().path().join("zds.sock")
    }
}

fn ca_dir(dir: &Path) -> PathBuf {
    dir.join("ca")
}

fn log_json(dir: &Path) -> PathBuf {
    dir.join("connections.json")
}

pub fn identity(pod: &Pod) -> Identity {
    Identity::new(&pod.namespace, &pod.name)
}

/// The service's address, which the client's `lo` has, and the only port that gets through to the
/// proxy without redirection.
pub fn vip(family: Family) -> SocketAddr {
    let ip = match family {
        Family::V4 => IpAddr::from([10, 96, 0, 1]),
        Family::V6 => IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, 1]),
    };
    SocketAddr::new(ip, OUTBOUND_PORT)
}

/// An app that is called from a client's address must answer to the proxy: the one part of
/// redirection that a proxy cannot do without. `change` is `add` or `del`.
fn route_replies(pod: &Pod, change: &str) -> Result<()> {
    let ports = format!("{APP_PORT}-{DEAD_PORT}");
    for family in ["-4", "-6"] {
        let route = "local default dev lo table 100".to_owned();
        let rule = format!("iif lo fwmark 0x0/0xfff ipproto tcp sport {ports} table 100");
        for (object, what) in [("route", route), ("rule", rule)] {
            let args: Vec<_> =
                [family, object, change].into_iter().chain(what.split(' ')).collect();
            pod.netns.output("ip", &args)?;
        }
    }
    Ok(())
}

fn manifest(pod: &Pod) -> String {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "labels": {"app": pod.name},
        },
        "spec": {
            "serviceAccountName": pod.name,
            "containers": [{"name": "app", "ports": [{"name": "echo", "containerPort": APP_PORT}]}],
        },
        "status": {"podIPs": [{"ip": pod.v4}, {"ip": pod.v6}]},
    })
    .to_string()
}

/// The service in front of the server, in a file with other things.
fn service() -> String {
    format!(
        "apiVersion: v1\n\
         kind: Service\n\
         metadata: {{name: server, namespace: shop}}\n\
         spec:\n\
         \x20 clusterIP: {v4}\n\
         \x20 clusterIPs: [{v4}, '{v6}']\n\
         \x20 selector: {{app: server}}\n\
         \x20 ports:\n\
         \x20 - {{port: {OUTBOUND_PORT}, targetPort: echo}}\n\
         ---\n\
         apiVersion: v1\n\
         kind: Namespace\n\
         metadata: {{name: shop}}\n",
        v4 = vip(Family::V4).ip(),
        v6 = vip(Family::V6).ip(),
    )
}
