//! Nodes with pods, wired as common CNI plugins do it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::netns::{Family, Netns, TestDir};
use crate::process::wait_for;

/// Routers of the ptp style, on the node's side of every pod's veth.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_V6: &str = "fe80::1";

/// How long the kernel may take to bring up an interface.
const PATIENCE: Duration = Duration::from_secs(10);

/// How pods are wired to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A veth to the node for each pod, a `/32` and `/128` address, and a link-local gateway, as
    /// Calico, Cilium and the `ptp` plugin do it.
    Routed,
    /// A bridge on the node that all pods are ports of, as Flannel and kubenet do it.
    Bridged,
}

/// Some nodes on one network, their pods, and the directory all of it is in.
///
/// | what | IPv4 | IPv6 |
/// |---|---|---|
/// | node *i*, from 0 | `192.168.77.<i+1>` | `fd77::<i+1>` |
/// | its pod *n* | `10.64.<i>.<n+10>` | `fd64:<i>::<n+10>` |
/// | nowhere, but no error either | `203.0.113.0/24` | `2001:db8::/32` |
#[derive(Debug)]
pub struct Topology {
    // Dropped in this order: the nodes' namespaces go before the directory they are in.
    nodes: Vec<Node>,
    _fabric: Netns,
    bpffs: PathBuf,
    dir: TestDir,
}

#[derive(Debug)]
struct Node {
    netns: Netns,
    style: Style,
    pods: u8,
}

impl Topology {
    /// Makes nodes, one for each of `styles`.
    pub fn new(styles: &[Style]) -> Result<Self> {
        let dir = TestDir::new()?;
        let netns_dir = dir.subdir("nodes")?;
        dir.subdir("netns")?;
        let bpffs = dir.mount_bpffs("bpf")?;
        let fabric = Netns::new(&netns_dir, "fabric")?;
        fabric.ip("link add fabric type bridge\nlink set fabric up")?;
        let mut nodes = Vec::new();
        for (i, &style) in styles.iter().enumerate() {
            let netns = Netns::new(&netns_dir, &format!("node{i}"))?;
            netns.set_sysctl("net/ipv4/ip_forward", "1")?;
            netns.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
            let peer = netns.path().display();
            fabric.ip(&format!(
                "link add node{i} type veth peer name uplink netns {peer}\n\
                 link set node{i} master fabric up"
            ))?;
            let host = i + 1;
            let mut batch = format!(
                "link set uplink up\n\
                 addr add 192.168.77.{host}/24 dev uplink\n\
                 addr add fd77::{host}/64 dev uplink nodad\n\
                 route add blackhole 203.0.113.0/24\n\
                 route add blackhole 2001:db8::/32\n"
            );
            for other in (0..styles.len()).filter(|&other| other != i) {
                let via = other + 1;
                batch += &format!(
                    "route add 10.64.{other}.0/24 via 192.168.77.{via}\n\
                     route add fd64:{other}::/64 via fd77::{via}\n"
                );
            }
            if style == Style::Bridged {
                batch += &format!(
                    "link add pods type bridge\n\
                     link set pods up\n\
                     addr add 10.64.{i}.1/24 dev pods\n\
                     addr add fd64:{i}::1/64 dev pods nodad\n"
                );
            }
            netns.ip(&batch)?;
            wait_for_link(&netns, "uplink")?;
            wait_for_link(&fabric, &format!("node{i}"))?;
            nodes.push(Node { netns, style, pods: 0 });
        }
        Ok(Self { nodes, _fabric: fabric, bpffs, dir })
    }

    /// The directory of the test.
    pub fn dir(&self) -> &TestDir {
        &self.dir
    }

    /// A bpffs of the test's own.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The directory with the pods' namespaces, `<namespace>_<name>` each: the agent's
    /// `--netns-dir`.
    pub fn netns_dir(&self) -> PathBuf {
        self.dir.path().join("netns")
    }

    /// The namespace of a node.
    pub fn node(&self, node: usize) -> &Netns {
        &self.nodes[node].netns
    }

    /// The address of a node.
    pub fn node_ip(&self, node: usize, family: Family) -> IpAddr {
        let host = u8::try_from(node + 1).unwrap_or(u8::MAX);
        match family {
            Family::V4 => Ipv4Addr::new(192, 168, 77, host).into(),
            Family::V6 => Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, host.into()).into(),
        }
    }

    /// Makes a pod on a node.
    pub fn add_pod(&mut self, node: usize, namespace: &str, name: &str) -> Result<Pod> {
        let netns = Netns::new(&self.netns_dir(), &format!("{namespace}_{name}"))?;
        self.add_pod_in(netns, node, namespace, name)
    }

    /// The same for a pod with a user namespace of its own, which owns its network namespace.
    pub fn add_pod_with_users(&mut self, node: usize, namespace: &str, name: &str) -> Result<Pod> {
        let netns = Netns::in_user_namespace(&self.netns_dir(), &format!("{namespace}_{name}"))?;
        self.add_pod_in(netns, node, namespace, name)
    }

    fn add_pod_in(
        &mut self,
        netns: Netns,
        node: usize,
        namespace: &str,
        name: &str,
    ) -> Result<Pod> {
        let i = u8::try_from(node).context("number the node")?;
        let Node { netns: host, style, pods } = &mut self.nodes[node];
        let number = *pods + 10;
        *pods += 1;
        let v4 = Ipv4Addr::new(10, 64, i, number);
        let v6 = Ipv6Addr::new(0xfd64, i.into(), 0, 0, 0, 0, 0, number.into());
        let host_interface = format!("pod{number}");
        let peer = netns.path().display();
        host.ip(&format!("link add {host_interface} type veth peer name eth0 netns {peer}"))?;
        match style {
            Style::Routed => {
                let (node_v4, node_v6) =
                    (format!("192.168.77.{}", i + 1), format!("fd77::{}", i + 1));
                host.ip(&format!(
                    "link set {host_interface} up\n\
                     addr add {GATEWAY_V4}/32 dev {host_interface}\n\
                     addr add {GATEWAY_V6}/64 dev {host_interface} nodad\n\
                     route add {v4}/32 dev {host_interface} src {node_v4}\n\
                     route add {v6}/128 dev {host_interface} src {node_v6}\n"
                ))?;
                netns.ip(&format!(
                    "link set eth0 up\n\
                     addr add {v4}/32 dev eth0\n\
                     addr add {v6}/128 dev eth0 nodad\n\
                     route add {GATEWAY_V4} dev eth0 scope link\n\
                     route add default via {GATEWAY_V4} dev eth0\n\
                     route add default via {GATEWAY_V6} dev eth0\n"
                ))?;
            }
            Style::Bridged => {
                host.ip(&format!("link set {host_interface} master pods up"))?;
                netns.ip(&format!(
                    "link set eth0 up\n\
                     addr add {v4}/24 dev eth0\n\
                     addr add {v6}/64 dev eth0 nodad\n\
                     route add default via 10.64.{i}.1 dev eth0\n\
                     route add default via fd64:{i}::1 dev eth0\n"
                ))?;
            }
        }
        wait_for_link(host, &host_interface)?;
        wait_for_link(&netns, "eth0")?;
        wait_for(&format!("the IPv6 addresses of {name}"), PATIENCE, || {
            let routes = netns.output("ip", &["-6", "route", "show", "table", "local"])?;
            let has = |address: &str| routes.contains(&format!("local {address}"));
            Ok((has(&v6.to_string()) && has("fe80:")).then_some(()))
        })?;
        Ok(Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node,
            v4,
            v6,
            host_interface,
            netns,
        })
    }
}

/// Waits until an interface sends what it is given: the kernel switches the queue on, and the port
/// of a bridge, a while after the cable is in.
pub fn wait_for_link(netns: &Netns, interface: &str) -> Result<()> {
    wait_for(&format!("the carrier of {interface}"), PATIENCE, || {
        let link =
            netns.output("ip", &["-details", "-oneline", "link", "show", "dev", interface])?;
        let up = link.contains(" state UP ") && !link.contains(" qdisc noop ");
        let forwards = !link.contains(" bridge_slave ") || link.contains(" state forwarding ");
        Ok((up && forwards).then_some(()))
    })
}

/// A pod: a network namespace with an `eth0` that leads to its node.
#[derive(Debug)]
pub struct Pod {
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The number of its node.
    pub node: usize,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// The name of the node's end of its veth.
    pub host_interface: String,
    /// Its network namespace.
    pub netns: Netns,
}

impl Pod {
    /// Its address.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// Its address with a port.
    pub fn addr(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }

    /// Where its network namespace is found.
    pub fn netns_path(&self) -> &Path {
        self.netns.path()
    }
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
