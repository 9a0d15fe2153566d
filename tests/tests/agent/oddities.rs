//! Pods that do to their own network what VPNs, meshes, firewalls and load balancers do: whatever that
//! is, each kind of traffic goes where it goes in any pod.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_tests::app::{App, Behaviour, Call, Conversation, read_greeting};
use redirect_tests::both_families;
use redirect_tests::dns;
use redirect_tests::hbone::{Direction, Outcome, Over, Record};
use redirect_tests::netns::{Family, Netns};
use redirect_tests::sniff::Sniffer;
use redirect_tests::topology::Pod;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::cgroup::{Cgroup, shell_in, unified};
use crate::cluster::{Cluster, Manifest, PORT, echo, now};
use crate::dns::{SERVICE, ask_tcp, exchange, service, service_ip};
use crate::interfaces::{add_network, second_address};
use crate::probes::{Kubelet, wait_until_followed};

both_families! {
    pod_that_does_nothing_odd,
    applications_mark_their_sockets,
    netfilter_marks_what_leaves,
    netfilter_marks_what_comes,
    rules_come_before_ours,
    second_network_is_routed_by_its_source,
    addresses_are_on_lo,
    netfilter_translates_what_comes,
    syn_cookies_are_sent_always,
    resolver_asks_from_the_port_of_dns,
}

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// A refusal that comes at once.
const AT_ONCE: Duration = Duration::from_secs(1);
/// A port that settings exclude, inbound and outbound.
const EXCLUDED: u16 = 8082;
/// A port that nobody listens on.
const NOBODY: u16 = 80;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    /// To a pod without a mesh.
    Outbound,
    /// To a pod of the mesh.
    OutboundHbone,
    /// From a socket with `SO_BINDTODEVICE`.
    OutboundBound,
    /// To a port that is excluded.
    OutboundExcluded,
    /// From a pod without a mesh.
    Inbound,
    /// From a pod of the mesh.
    InboundHbone,
    /// To a port that is excluded.
    InboundExcluded,
    /// To a port that nobody listens on.
    InboundNobody,
    /// Of kubelet.
    Probe,
    /// A query over UDP.
    Dns,
    /// A query over UDP from a socket with `SO_BINDTODEVICE`.
    DnsBound,
    /// A query over TCP.
    DnsTcp,
    /// What a UDP server answers to port 53.
    UdpServer,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Proxied,
    Direct,
    Refused,
}

/// What is expected in each row.
const CELLS: [(Cell, Way); 13] = [
    (Cell::Outbound, Way::Proxied),
    (Cell::OutboundHbone, Way::Proxied),
    (Cell::OutboundBound, Way::Proxied),
    (Cell::OutboundExcluded, Way::Direct),
    (Cell::Inbound, Way::Proxied),
    (Cell::InboundHbone, Way::Proxied),
    (Cell::InboundExcluded, Way::Direct),
    (Cell::InboundNobody, Way::Refused),
    (Cell::Probe, Way::Direct),
    (Cell::Dns, Way::Proxied),
    (Cell::DnsBound, Way::Proxied),
    (Cell::DnsTcp, Way::Proxied),
    (Cell::UdpServer, Way::Direct),
];

/// Which of the pod's addresses the cells are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Address {
    Pod,
    /// Of a second network.
    Second,
    /// On `lo`.
    Virtual,
}

/// What a pod does. In commands, `POD`, `VIP` and `ALL` stand for its address, one on `lo` and a range
/// around that; `GATEWAY` and `VPN` for the routers behind `eth0` and `net1`.
#[derive(Clone, Copy, Debug)]
struct Oddity {
    name: &'static str,
    /// `SO_MARK` of all sockets of its application.
    mark: Option<u32>,
    /// The port that its resolver asks from.
    dns_port: u16,
    sysctls: &'static [(&'static str, &'static str)],
    /// It has `net1`.
    second: bool,
    address: Address,
    /// What `ip` is told.
    ip: &'static [&'static str],
    /// Rules, added in this order.
    rules: &'static [&'static str],
    /// What iptables is told.
    netfilter: &'static [&'static str],
    /// What is known not to work (docs/limits.md), and leaves nothing past the proxy either.
    limits: &'static [Cell],
}

const PLAIN: Oddity = Oddity {
    name: "nothing",
    mark: None,
    dns_port: 0,
    sysctls: &[],
    second: false,
    address: Address::Pod,
    ip: &[],
    rules: &[],
    netfilter: &[],
    limits: &[],
};

const NOTHING: &[Oddity] = &[PLAIN];

/// One of a VPN, one whose lower bits are not zero, and those that the agent uses itself.
const MARKED: &[Oddity] = &[
    Oddity { name: "SO_MARK 1", mark: Some(1), ..PLAIN },
    Oddity { name: "SO_MARK 0xca6c", mark: Some(0xca6c), ..PLAIN },
    Oddity { name: "SO_MARK 0xd1", mark: Some(0xd1), ..PLAIN },
    Oddity { name: "SO_MARK 0xd2", mark: Some(0xd2), ..PLAIN },
    // That is the guard's own: what has it comes to `lo`.
    Oddity {
        name: "SO_MARK 0xd3",
        mark: Some(0xd3),
        limits: &[Cell::OutboundExcluded, Cell::InboundExcluded, Cell::Probe, Cell::UdpServer],
        ..PLAIN
    },
    Oddity { name: "SO_MARK 0x111", mark: Some(0x111), ..PLAIN },
];

const LEAVING: &[Oddity] = &[
    Oddity {
        name: "MARK 1 on what has none",
        netfilter: &["-t mangle -A OUTPUT -m mark --mark 0 -j MARK --set-mark 1"],
        ..PLAIN
    },
    Oddity {
        name: "MARK 0xca6c on what has none",
        netfilter: &["-t mangle -A OUTPUT -m mark --mark 0 -j MARK --set-mark 0xca6c"],
        ..PLAIN
    },
    Oddity {
        name: "MARK 0xd1 on what has none",
        netfilter: &["-t mangle -A OUTPUT -m mark --mark 0 -j MARK --set-mark 0xd1"],
        ..PLAIN
    },
    Oddity {
        name: "MARK 0xd2 on what has none",
        netfilter: &["-t mangle -A OUTPUT -m mark --mark 0 -j MARK --set-mark 0xd2"],
        ..PLAIN
    },
    Oddity {
        name: "MARK 0x539 on what has none",
        netfilter: &["-t mangle -A OUTPUT -m mark --mark 0 -j MARK --set-mark 0x539"],
        ..PLAIN
    },
    // The proxy's own as well.
    Oddity {
        name: "MARK 1 on all",
        netfilter: &["-t mangle -A OUTPUT -j MARK --set-mark 1"],
        ..PLAIN
    },
    Oddity {
        name: "MARK 1 on NEW, in OUTPUT",
        netfilter: &["-t mangle -A OUTPUT -m conntrack --ctstate NEW -j MARK --set-mark 1"],
        ..PLAIN
    },
];

const COMING: &[Oddity] = &[
    Oddity {
        name: "CONNMARK restored",
        netfilter: &["-t mangle -A PREROUTING -j CONNMARK --restore-mark"],
        ..PLAIN
    },
    Oddity {
        name: "CONNMARK restored and saved",
        netfilter: &[
            "-t mangle -A PREROUTING -j CONNMARK --restore-mark",
            "-t mangle -A POSTROUTING -j CONNMARK --save-mark",
        ],
        // The application's answers get the proxy's mark, and the guard's is taken from them on `lo`.
        limits: &[Cell::Inbound, Cell::InboundHbone],
        ..PLAIN
    },
    Oddity {
        name: "MARK 7 on NEW, in PREROUTING",
        netfilter: &["-t mangle -A PREROUTING -m conntrack --ctstate NEW -j MARK --set-mark 7"],
        ..PLAIN
    },
    Oddity {
        name: "MARK 0 on all, in PREROUTING",
        netfilter: &["-t mangle -A PREROUTING -j MARK --set-mark 0"],
        ..PLAIN
    },
];

const RULES: &[Oddity] = &[
    Oddity {
        name: "a rule without a preference",
        ip: &["route add default via GATEWAY dev eth0 table 200"],
        rules: &["lookup 200"],
        ..PLAIN
    },
    Oddity {
        name: "gluetun",
        second: true,
        ip: &[
            "route add default via GATEWAY dev eth0 table 200",
            "route add default via VPN dev net1 table 51820",
        ],
        rules: &["pref 100 from POD lookup 200", "pref 101 not fwmark 51820 lookup 51820"],
        ..PLAIN
    },
    Oddity {
        name: "Tailscale",
        second: true,
        ip: &["route add default via VPN dev net1 table 52"],
        rules: &[
            "pref 5210 fwmark 0x80000/0xff0000 lookup main",
            "pref 5230 fwmark 0x80000/0xff0000 lookup default",
            "pref 5250 fwmark 0x80000/0xff0000 unreachable",
            "pref 5270 lookup 52",
        ],
        ..PLAIN
    },
    Oddity {
        name: "wg-quick",
        second: true,
        ip: &["route add default via VPN dev net1 table 51820"],
        rules: &["not fwmark 51820 lookup 51820", "lookup main suppress_prefixlength 0"],
        ..PLAIN
    },
];

const SOURCE_BASED: &[Oddity] = &[Oddity {
    name: "Multus' sbr",
    second: true,
    address: Address::Second,
    ip: &["route add default via VPN dev net1 table 100"],
    rules: &["from SECOND lookup 100"],
    ..PLAIN
}];

/// Without it, IPv6 takes no such address for a socket's.
const NONLOCAL: &[(&str, &str)] = &[("net/ipv6/ip_nonlocal_bind", "1")];

const ON_LO: &[Oddity] = &[
    Oddity {
        name: "a VIP of LVS",
        sysctls: NONLOCAL,
        address: Address::Virtual,
        ip: &["addr add VIP dev lo"],
        // Answers to an address of `lo` do not come in on the interface that the socket is bound to.
        limits: &[Cell::OutboundBound, Cell::DnsBound],
        ..PLAIN
    },
    Oddity {
        name: "AnyIP",
        sysctls: NONLOCAL,
        address: Address::Virtual,
        ip: &["route add local ALL dev lo"],
        // The proxy accepts, and closes when it finds nobody.
        limits: &[Cell::OutboundBound, Cell::DnsBound, Cell::InboundNobody],
        ..PLAIN
    },
];

const TRANSLATED: &[Oddity] = &[
    Oddity {
        name: "REDIRECT",
        netfilter: &["-t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080"],
        ..PLAIN
    },
    Oddity {
        name: "TPROXY",
        ip: &["route add local default dev lo table 100"],
        rules: &["fwmark 1 lookup 100"],
        netfilter: &["-t mangle -A PREROUTING -i eth0 -p tcp --dport 80 -j TPROXY --on-port 8080 \
             --tproxy-mark 1"],
        ..PLAIN
    },
];

const COOKIES: &[Oddity] =
    &[Oddity { name: "syncookies=2", sysctls: &[("net/ipv4/tcp_syncookies", "2")], ..PLAIN }];

const RESOLVER: &[Oddity] = &[Oddity { name: "from port 53", dns_port: dns::PORT, ..PLAIN }];

fn pod_that_does_nothing_odd(family: Family) -> Result<()> {
    table(family, NOTHING)
}

fn applications_mark_their_sockets(family: Family) -> Result<()> {
    table(family, MARKED)
}

fn netfilter_marks_what_leaves(family: Family) -> Result<()> {
    table(family, LEAVING)
}

fn netfilter_marks_what_comes(family: Family) -> Result<()> {
    table(family, COMING)
}

fn rules_come_before_ours(family: Family) -> Result<()> {
    table(family, RULES)
}

fn second_network_is_routed_by_its_source(family: Family) -> Result<()> {
    table(family, SOURCE_BASED)
}

fn addresses_are_on_lo(family: Family) -> Result<()> {
    table(family, ON_LO)
}

fn netfilter_translates_what_comes(family: Family) -> Result<()> {
    table(family, TRANSLATED)
}

fn syn_cookies_are_sent_always(family: Family) -> Result<()> {
    table(family, COOKIES)
}

fn resolver_asks_from_the_port_of_dns(family: Family) -> Result<()> {
    table(family, RESOLVER)
}

/// Looks at every cell of these rows, and names all that are wrong.
fn table(family: Family, rows: &[Oddity]) -> Result<()> {
    let mut wrong = Vec::new();
    for row in rows {
        let world = World::start(row, family).with_context(|| format!("set up: {}", row.name))?;
        for (cell, way) in CELLS {
            let error = world.look(cell, way).err().map(|error| format!("{error:#}"));
            match error {
                None if row.limits.contains(&cell) => {
                    wrong.push(format!("{} × {cell:?} is no limit any more", row.name));
                }
                Some(error) if !row.limits.contains(&cell) || error.contains("past the proxy") => {
                    wrong.push(format!("{} × {cell:?} is not {way:?}: {error}", row.name));
                }
                _ => {}
            }
        }
        if let Err(error) = world.assert_nothing_refused() {
            wrong.push(format!("{}: {error:#}", row.name));
        }
    }
    let (wrongs, cells) = (wrong.len(), rows.len() * CELLS.len());
    ensure!(wrong.is_empty(), "{wrongs} of {cells} cells are wrong:\n{}", wrong.join("\n"));
    Ok(())
}

/// A pod that does it, in the mesh, and all that it has to do with.
struct World {
    row: Oddity,
    family: Family,
    kubelet: Kubelet,
    /// Asks a UDP server from port 53, and sees the queries that come past the proxy.
    asker: UdpSocket,
    _apps: Vec<App>,
    /// In the mesh, on the same node.
    neighbour: Pod,
    cluster: Cluster,
    /// The proxy's; its process has to be gone before it.
    proxys: Cgroup,
}

impl World {
    fn start(row: &Oddity, family: Family) -> Result<Self> {
        let mut cluster = Cluster::without_agent(&[])?;
        let neighbour = cluster.topology.add_pod(0, "shop", "neighbour")?;
        let Cluster { server, client, .. } = &cluster;
        let apps = vec![
            app(server, PORT, row.mark)?,
            app(server, EXCLUDED, row.mark)?,
            app(client, EXCLUDED, None)?,
            echo(client)?,
            echo(&neighbour)?,
        ];
        let asker = client.netns.run(|| {
            let socket = UdpSocket::bind(client.addr(family, dns::PORT))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        })?;
        route_back(&cluster)?;
        if row.second {
            add_network(&cluster)?;
        }
        let odd = Self {
            kubelet: Kubelet::start(&cluster, "kubelet.service")?,
            row: *row,
            family,
            asker,
            _apps: apps,
            neighbour,
            cluster,
            proxys: Cgroup::new(&unified()?, "ztunnel")?,
        };
        odd.make_odd()?;
        odd.assert_works_without_a_mesh().context("without a mesh")?;
        odd.enroll()
    }

    fn enroll(mut self) -> Result<Self> {
        let file = self.cluster.node.manifests().join("web.json");
        std::fs::write(file, service().to_string()).context("write the service")?;
        let excluded = |manifest: Manifest, name: &str| {
            let name = format!("traffic.redirect-agent/{name}");
            manifest.with("/metadata/annotations", &name, json!(EXCLUDED.to_string()))
        };
        let server = Manifest::of(&self.cluster.server).mode("ambient");
        let server = excluded(server, "excludeInboundPorts");
        self.cluster.node.use_node_network(self.cluster.topology.node(0));
        self.cluster.node.start_agent()?;
        self.cluster.node.start_proxy_in(&self.proxys)?;
        self.cluster.node.write(&excluded(server, "excludeOutboundPorts"))?;
        self.cluster.node.write(&Manifest::of(&self.neighbour).mode("ambient"))?;
        self.cluster.node.wait_until_enrolled(&self.cluster.server)?;
        self.cluster.node.wait_until_enrolled(&self.neighbour)?;
        wait_until_followed(&self.cluster, &self.kubelet)?;
        // Once more, so that they come before whatever rules there are now.
        self.rules("del")?;
        self.rules("add")?;
        Ok(self)
    }

    fn make_odd(&self) -> Result<()> {
        let netns = &self.cluster.server.netns;
        for (name, value) in self.row.sysctls {
            netns.set_sysctl(name, value)?;
        }
        for command in self.row.ip {
            self.tell("ip", &format!("{} {command}", self.flag()))?;
        }
        self.rules("add")?;
        let program = match self.family {
            Family::V4 => "iptables-nft",
            Family::V6 => "ip6tables-nft",
        };
        self.row.netfilter.iter().try_for_each(|rule| self.tell(program, rule))
    }

    fn rules(&self, verb: &str) -> Result<()> {
        let add = |rule| self.tell("ip", &format!("{} rule {verb} {rule}", self.flag()));
        self.row.rules.iter().try_for_each(add)
    }

    fn tell(&self, program: &str, command: &str) -> Result<()> {
        let (vip, all, gateway, vpn) = match self.family {
            Family::V4 => ("10.9.9.9/32", "10.9.9.0/24", "169.254.1.1", "10.9.0.1"),
            Family::V6 => ("fd99::9/128", "fd99::/64", "fe80::1", "fd09::1"),
        };
        let command = command
            .replace("POD", &self.cluster.server.ip(self.family).to_string())
            .replace("SECOND", &second_address(self.family)?.to_string())
            .replace("VIP", vip)
            .replace("ALL", all)
            .replace("GATEWAY", gateway)
            .replace("VPN", vpn);
        let arguments: Vec<&str> = command.split_whitespace().collect();
        self.cluster.server.netns.output(program, &arguments).map(drop)
    }

    fn flag(&self) -> &'static str {
        match self.family {
            Family::V4 => "-4",
            Family::V6 => "-6",
        }
    }

    /// The pod's address that the cells are about, with a port.
    fn own(&self, port: u16) -> Result<SocketAddr> {
        let ip: IpAddr = match (self.row.address, self.family) {
            (Address::Pod, family) => self.cluster.server.ip(family),
            (Address::Second, family) => second_address(family)?,
            (Address::Virtual, Family::V4) => [10, 9, 9, 9].into(),
            (Address::Virtual, Family::V6) => [0xfd99, 0, 0, 0, 0, 0, 0, 9].into(),
        };
        Ok(SocketAddr::new(ip, port))
    }

    /// Where that address is at home.
    fn device(&self) -> &'static str {
        match self.row.address {
            Address::Second => "net1",
            Address::Pod | Address::Virtual => "eth0",
        }
    }

    /// A call of the pod as its application makes it.
    fn call(&self, to: &Pod, port: u16, device: Option<&'static str>) -> Result<Call> {
        let mut call = Call::to(to.addr(self.family, port)).within(PATIENCE);
        if let Some(mark) = self.row.mark {
            call = call.mark(mark);
        }
        if let Some(device) = device {
            call = call.bound_to(device);
        }
        Ok(match self.row.address {
            Address::Pod => call,
            _ => call.from(self.own(0)?),
        })
    }

    /// It is no oddity but a fault that nothing passes, mesh or not.
    fn assert_works_without_a_mesh(&self) -> Result<()> {
        let Cluster { server, client, .. } = &self.cluster;
        for device in [None, Some(self.device())] {
            let conversation = self.call(client, PORT, device)?.open(&server.netns)?;
            ensure!(conversation.answer().saw_peer == conversation.local_addr()?);
        }
        let mut ports = vec![PORT, EXCLUDED];
        // Netfilter translates it.
        ports.extend(self.row.netfilter.iter().any(|r| r.contains("--dport 80 ")).then_some(80));
        for port in ports {
            let conversation = Call::to(self.own(port)?).within(PATIENCE).open(&client.netns)?;
            ensure!(conversation.answer().by == server.name);
        }
        self.probe()?;
        self.serve_udp()
    }

    fn assert_nothing_refused(&self) -> Result<()> {
        for counter in ["refused_proxy_away", "dropped_proxy_away"] {
            let times = self.counted(&[counter])?;
            ensure!(times == 0, "{counter} is {times} and the proxy was always there");
        }
        Ok(())
    }

    fn look(&self, cell: Cell, way: Way) -> Result<()> {
        let Cluster { server, client, .. } = &self.cluster;
        match cell {
            Cell::Outbound => self.dial(client, PORT, None, way),
            Cell::OutboundHbone => self.dial(&self.neighbour, PORT, None, way),
            Cell::OutboundBound => self.dial(client, PORT, Some(self.device()), way),
            Cell::OutboundExcluded => self.dial(client, EXCLUDED, None, way),
            Cell::Inbound => self.answer(self.own(PORT)?, way),
            Cell::InboundHbone => self.answer_over_hbone(server.addr(self.family, PORT)),
            Cell::InboundExcluded => self.answer(self.own(EXCLUDED)?, way),
            Cell::InboundNobody => self.answer(self.own(NOBODY)?, way),
            Cell::Probe => {
                let before = (self.counted(&["kubelet_probe"])?, now()?);
                let saw = self.probe()?;
                let since = |record: &Record| record.ts >= before.1 && record.src.ip() == saw.ip();
                let proxied: Vec<_> =
                    self.cluster.node.records()?.into_iter().filter(since).collect();
                ensure!(proxied.is_empty(), "the proxy has seen {proxied:?}");
                ensure!(self.counted(&["kubelet_probe"])? > before.0, "it is not counted");
                Ok(())
            }
            Cell::Dns => self.ask(None),
            Cell::DnsBound => self.ask(Some(self.device())),
            Cell::DnsTcp => self.ask_tcp(),
            Cell::UdpServer => self.serve_udp(),
        }
    }

    /// The pod calls.
    fn dial(&self, to: &Pod, port: u16, device: Option<&'static str>, way: Way) -> Result<()> {
        const CAPTURED: &[&str] = &["redirected_outbound", "rescued_outbound"];
        let (node, server) = (&self.cluster.node, &self.cluster.server);
        let addr = to.addr(self.family, port);
        let wire = Sniffer::start(&to.netns, "eth0")?;
        let (since, counted) = (now()?, self.counted(CAPTURED)?);
        let mut conversation = self.call(to, port, device)?.open(&server.netns)?;
        conversation.exchange(b"more than a greeting")?;
        let local = conversation.local_addr()?;
        ensure!(conversation.answer().by == to.name, "{:?}", conversation.answer());
        let saw = conversation.answer().saw_peer;
        let direct = saw == local || wire.finish().iter().any(|seen| seen.is_between(local, addr));
        let records = node.records_of(&conversation, since)?;
        if way == Way::Direct {
            ensure!(direct && records.is_empty(), "{to} saw {saw}, the proxy {records:?}");
            return Ok(());
        }
        ensure!(!direct, "{local} reached {to} past the proxy, which saw {records:?}");
        let over = if to.name == "neighbour" { Over::Hbone } else { Over::Plaintext };
        let expected = |r: &Record| {
            (r.direction, r.over, r.result) == (Direction::Outbound, Some(over), Outcome::Ok)
                && r.pod == server.to_string()
        };
        ensure!(records.iter().any(expected), "the proxy saw {records:?}");
        ensure!(self.counted(CAPTURED)? > counted, "it is not counted");
        Ok(())
    }

    /// The pod is called by one that is not in the mesh.
    fn answer(&self, addr: SocketAddr, way: Way) -> Result<()> {
        const CAPTURED: &[&str] = &["redirected_inbound", "rescued_inbound"];
        let Cluster { node, server, client, .. } = &self.cluster;
        let call = Call::to(addr).within(PATIENCE);
        if way == Way::Refused {
            let after = call.make(&client.netns)?.refusal()?;
            ensure!(after < AT_ONCE, "refused after {after:?}");
            return Ok(());
        }
        let (since, counted) = (now()?, self.counted(CAPTURED)?);
        let mut conversation = call.open(&client.netns)?;
        conversation.exchange(b"more than a greeting")?;
        assert_served(&conversation, &server.name, client.ip(self.family))?;
        let records = node.records_of(&conversation, since)?;
        if way == Way::Direct {
            let saw = conversation.answer().saw_peer;
            ensure!(saw == conversation.local_addr()? && records.is_empty(), "{saw}, {records:?}");
            return Ok(());
        }
        let expected =
            |r: &Record| r.direction == Direction::InboundPlaintext && r.pod == server.to_string();
        ensure!(records.iter().any(expected), "the proxy saw {records:?}");
        ensure!(self.counted(CAPTURED)? > counted, "it is not counted");
        Ok(())
    }

    /// The pod is called by its neighbour.
    fn answer_over_hbone(&self, addr: SocketAddr) -> Result<()> {
        let (node, server) = (&self.cluster.node, &self.cluster.server);
        let since = now()?;
        let opened = Call::to(addr).within(PATIENCE).open(&self.neighbour.netns);
        let inbound = |r: &Record| {
            (r.direction, r.result, r.dst) == (Direction::Inbound, Outcome::Ok, addr)
                && r.pod == server.to_string()
                && r.ts >= since
        };
        let records: Vec<_> = node.records()?.into_iter().filter(|r| r.ts >= since).collect();
        let mut conversation = opened.with_context(|| format!("the proxy saw {records:?}"))?;
        conversation.exchange(b"more than a greeting")?;
        assert_served(&conversation, &server.name, self.neighbour.ip(self.family))?;
        ensure!(records.iter().any(inbound), "the proxy saw {records:?}");
        Ok(())
    }

    /// Kubelet looks whether the application accepts connections; whom it saw.
    fn probe(&self) -> Result<SocketAddr> {
        let Cluster { server, topology, .. } = &self.cluster;
        let script = format!(
            "exec timeout {} bash -c 'exec 3<>/dev/tcp/{}/{PORT} && read -r line <&3 && echo $line'",
            PATIENCE.as_secs(),
            server.ip(self.family),
        );
        let mut shell = shell_in(self.kubelet.cgroup()?, Some(topology.node(0)), &script);
        let output = shell.output().context("send a probe")?;
        let said = String::from_utf8(output.stdout).context("read what the application said")?;
        let answer = read_greeting(&said).with_context(|| format!("no answer: {said:?}"))?;
        ensure!(answer.saw_peer.ip() == topology.node_ip(0, self.family), "{answer:?}");
        Ok(answer.saw_peer)
    }

    /// A socket of the pod's application.
    fn socket(&self, kind: Type, own: SocketAddr, device: Option<&str>) -> Result<Socket> {
        let socket = Socket::new(Domain::for_address(own), kind, None)?;
        if let Some(mark) = self.row.mark {
            socket.set_mark(mark)?;
        }
        socket.bind_device(device.map(str::as_bytes))?;
        socket.bind(&own.into()).with_context(|| format!("bind {own}"))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    }

    /// The socket that its resolver asks from.
    fn resolver(&self, kind: Type, device: Option<&str>) -> Result<Socket> {
        let own = match self.row.address {
            Address::Pod => SocketAddr::new(self.family.any(), self.row.dns_port),
            _ => self.own(self.row.dns_port)?,
        };
        self.socket(kind, own, device)
    }

    /// The pod asks for a name that the proxy alone knows.
    fn ask(&self, device: Option<&str>) -> Result<()> {
        let Cluster { server, client, .. } = &self.cluster;
        let there = client.addr(self.family, dns::PORT);
        self.forget()?;
        let answer = server.netns.run(|| {
            let socket = self.resolver(Type::DGRAM, device)?;
            socket.connect(&there.into())?;
            exchange(&socket.into(), SERVICE, there.ip())
        });
        ensure!(self.forget()? == 0, "the resolver was asked past the proxy");
        let (code, addresses) = answer?.context("no answer came")?;
        ensure!(addresses == [service_ip(self.family)], "{code}, {addresses:?}");
        Ok(())
    }

    fn ask_tcp(&self) -> Result<()> {
        let Cluster { server, client, .. } = &self.cluster;
        let there = client.addr(self.family, dns::PORT);
        let wire = Sniffer::start(&client.netns, "eth0")?;
        let answer = server.netns.run(|| {
            let socket = self.resolver(Type::STREAM, None)?;
            socket.connect_timeout(&there.into(), PATIENCE).context("connect")?;
            ask_tcp(&mut TcpStream::from(socket), SERVICE, there.ip())
        });
        let past = wire.finish().iter().any(|seen| seen.segment.dst == there);
        ensure!(!past, "the resolver was asked past the proxy");
        let addresses = answer?;
        ensure!(addresses == [service_ip(self.family)], "{addresses:?}");
        Ok(())
    }

    /// Throws away what has come to port 53; how much.
    fn forget(&self) -> Result<usize> {
        self.asker.set_nonblocking(true)?;
        let mut count = 0;
        while self.asker.recv_from(&mut [0; 512]).is_ok() {
            count += 1;
        }
        self.asker.set_nonblocking(false)?;
        Ok(count)
    }

    /// The pod's server is asked from port 53, as resolvers and games do it, and answers.
    fn serve_udp(&self) -> Result<()> {
        let own = self.own(PORT)?;
        let Cluster { server, client, .. } = &self.cluster;
        self.forget()?;
        let socket = server.netns.run(|| self.socket(Type::DGRAM, own, None))?;
        let socket = UdpSocket::from(socket);
        let query = dns::query(7, SERVICE, own.ip())?;
        let answer = dns::answer(&query, false, |_| Some(vec![own.ip()])).context("no answer")?.0;
        let mut buffer = [0; 512];
        for said in [&b"pong"[..], b"what a game says to who plays it", &[0xff; 100], &answer] {
            self.asker.send_to(b"ask", own)?;
            let (_, peer) = receive(&socket, &mut buffer).context("wait for the question")?;
            ensure!(peer == client.addr(self.family, dns::PORT), "{peer} asks");
            socket.send_to(said, peer)?;
            let (len, from) = receive(&self.asker, &mut buffer)
                .with_context(|| format!("wait for the answer {said:?}"))?;
            ensure!((&buffer[..len], from) == (said, own), "{from}: {:?}", &buffer[..len]);
        }
        Ok(())
    }

    /// What `status` has counted for the pod, in all of these counters.
    fn counted(&self, counters: &[&str]) -> Result<u64> {
        let status = self.cluster.node.pod(&self.cluster.server)?.context("no status")?;
        Ok(counters.iter().filter_map(|counter| status.counters.get(*counter)).sum())
    }
}

/// An application that may be the target of a TPROXY rule, with this mark on its sockets.
fn app(pod: &Pod, port: u16, mark: Option<u32>) -> Result<App> {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    App::start_with(&pod.netns, &pod.name, any, Behaviour::Echo, |socket| {
        socket.set_ip_transparent_v6(true)?;
        mark.map_or(Ok(()), |mark| socket.set_mark(mark))
    })
}

fn assert_served(conversation: &Conversation, by: &str, whom: IpAddr) -> Result<()> {
    let (answer, addr) = (conversation.answer(), conversation.peer_addr()?);
    ensure!(
        (answer.by.as_str(), answer.saw_peer.ip(), answer.saw_local) == (by, whom, addr),
        "{answer:?}"
    );
    Ok(())
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => return Ok(received?),
        }
    }
}

/// Lets everybody find the server's second and virtual addresses.
fn route_back(cluster: &Cluster) -> Result<()> {
    let Cluster { server, topology, .. } = cluster;
    let (v4, v6, interface) = (server.v4, server.v6, &server.host_interface);
    topology.node(0).ip(&format!(
        "route add 10.9.9.0/24 via {v4} dev {interface}\n\
         route add fd99::/64 via {v6} dev {interface}"
    ))?;
    let via = |node: &Netns, range, gateway| node.ip(&format!("route add {range} via {gateway}"));
    let node = topology.node(1);
    ["10.9.0.0/24", "10.9.9.0/24"]
        .into_iter()
        .try_for_each(|range| via(node, range, "192.168.77.1"))?;
    ["fd09::/64", "fd99::/64"].into_iter().try_for_each(|range| via(node, range, "fd77::1"))
}
