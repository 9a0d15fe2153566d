//! Pods whose traffic a guest has that the pod's own network stack does not see: a VM behind masquerade,
//! as KubeVirt has it, and a guest that tc mirrors everything to, as Kata has it. None of it goes past
//! the proxy in silence.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use redirect_agent::output::PodState;
use redirect_tests::app::{App, Behaviour, Call, Outcome, read_greeting};
use redirect_tests::both_families;
use redirect_tests::hbone::Direction;
use redirect_tests::netns::{Family, Netns};
use redirect_tests::topology::{Pod, wait_for_link};
use serde_json::json;

use crate::cgroup::shell_in;
use crate::cluster::{Cluster, Manifest, PORT, echo, now};
use crate::probes::{Kubelet, wait_until_followed};
use crate::reroute::{behind_veth, forward, guest, rerouting, wait_for_addresses};

both_families! {
    vm_behind_masquerade_gets_no_plaintext,
    vm_whose_interface_is_rerouted_gets_no_plaintext,
    guest_that_tc_mirrors_to_gets_no_plaintext,
}

const PATIENCE: Duration = Duration::from_secs(5);
/// A refusal that comes at once.
const AT_ONCE: Duration = Duration::from_secs(1);
/// A port that settings exclude, inbound.
const EXCLUDED: u16 = 8082;
const STRICT: &str = "apiVersion: security.istio.io/v1\n\
                      kind: PeerAuthentication\n\
                      metadata: {name: default, namespace: shop}\n\
                      spec: {mtls: {mode: STRICT}}\n";

/// How the guest is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wiring {
    Masqueraded,
    Rerouted,
    Mirrored,
}

fn vm_behind_masquerade_gets_no_plaintext(family: Family) -> Result<()> {
    gets_no_plaintext(Wiring::Masqueraded, family)
}

fn vm_whose_interface_is_rerouted_gets_no_plaintext(family: Family) -> Result<()> {
    gets_no_plaintext(Wiring::Rerouted, family)
}

fn guest_that_tc_mirrors_to_gets_no_plaintext(family: Family) -> Result<()> {
    gets_no_plaintext(Wiring::Mirrored, family)
}

/// As KubeVirt's masquerade: what comes for these ports of the pod, or for all, is the guest's, and the
/// guest's is the pod's.
fn masquerade(cluster: &Cluster, ports: &[u16]) -> Result<Pod> {
    let server = &cluster.server;
    let guest = guest(cluster, "vm", 2)?;
    behind_veth(server, &guest, "veth1")?;
    forward(cluster)?;
    wait_for_addresses(server, "veth1")?;
    for (program, guest) in
        [("iptables-nft", guest.v4.to_string()), ("ip6tables-nft", guest.v6.to_string())]
    {
        let dnat = |port: &str| {
            format!("PREROUTING -i eth0 -p tcp{port} -j DNAT --to-destination {guest}")
        };
        let mut rules: Vec<String> =
            ports.iter().map(|port| dnat(&format!(" --dport {port}"))).collect();
        // What is called from within, by the proxy say, is the guest's too.
        rules.extend(ports.iter().map(|port| {
            format!(
                "OUTPUT -p tcp -m addrtype --dst-type LOCAL --dport {port} -j DNAT \
                 --to-destination {guest}"
            )
        }));
        if ports.is_empty() {
            rules.push(dnat(""));
        }
        rules.push(format!("POSTROUTING -s {guest} -o eth0 -j MASQUERADE"));
        for rule in rules {
            let rule: Vec<_> = ["-t", "nat", "-A"].into_iter().chain(rule.split(' ')).collect();
            server.netns.output(program, &rule)?;
        }
    }
    Ok(guest)
}

/// As Kata: the guest has the pod's addresses, and the frames do not meet the pod's stack.
fn mirror(cluster: &Cluster) -> Result<Pod> {
    let server = &cluster.server;
    let dir = cluster.topology.dir().subdir("guests")?;
    let guest = Pod {
        namespace: "guests".to_owned(),
        name: "vm".to_owned(),
        netns: Netns::new(&dir, "vm")?,
        host_interface: "veth1".to_owned(),
        node: server.node,
        v4: server.v4,
        v6: server.v6,
    };
    server.netns.ip(&format!(
        "link add veth1 type veth peer name eth0 netns {}\nlink set veth1 up",
        guest.netns_path().display()
    ))?;
    let mac = mac_of(&server.netns)?;
    guest.netns.ip(&format!(
        "link set eth0 address {mac}\n\
         link set eth0 up\n\
         addr add {}/32 dev eth0\n\
         addr add {}/128 dev eth0 nodad\n\
         route add 169.254.1.1 dev eth0 scope link\n\
         route add default via 169.254.1.1 dev eth0\n\
         route add default via fe80::1 dev eth0",
        guest.v4, guest.v6
    ))?;
    wait_for_link(&server.netns, "veth1")?;
    wait_for_link(&guest.netns, "eth0")?;
    for (from, to) in [("eth0", "veth1"), ("veth1", "eth0")] {
        let tc = |command: &str| {
            let arguments: Vec<&str> = command.split(' ').collect();
            server.netns.output("tc", &arguments).map(drop)
        };
        tc(&format!("qdisc add dev {from} ingress"))?;
        tc(&format!(
            "filter add dev {from} ingress protocol all u32 match u8 0 0 action mirred egress \
             redirect dev {to}"
        ))?;
    }
    Ok(guest)
}

fn mac_of(netns: &Netns) -> Result<String> {
    let link = netns.output("ip", &["-oneline", "link", "show", "dev", "eth0"])?;
    let mac = link.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
    Ok(mac.context("find the pod's MAC")?.to_owned())
}

struct Vm {
    wiring: Wiring,
    family: Family,
    kubelet: Kubelet,
    app: App,
    excluded: App,
    _peers: Vec<App>,
    guest: Pod,
    /// In the mesh, on the same node.
    neighbour: Pod,
    cluster: Cluster,
}

fn gets_no_plaintext(wiring: Wiring, family: Family) -> Result<()> {
    let vm = Vm::start(wiring, family)?;
    let looks: [(&str, &dyn Fn() -> Result<()>); 5] = [
        ("inbound plaintext", &|| vm.refuses()),
        ("inbound HBONE", &|| vm.answers_hbone_or_refuses()),
        ("an excluded port", &|| vm.serves_directly()),
        ("a probe", &|| vm.is_probed()),
        ("outbound", &|| vm.calls_by_the_proxy_or_is_shown()),
    ];
    let wrong: Vec<String> = looks
        .iter()
        .filter_map(|(name, look)| look().err().map(|error| format!("{name}: {error:#}")))
        .collect();
    ensure!(wrong.is_empty(), "{wiring:?}:\n{}", wrong.join("\n"));
    Ok(())
}

impl Vm {
    fn start(wiring: Wiring, family: Family) -> Result<Self> {
        let mut cluster = Cluster::without_agent(&[])?;
        let neighbour = cluster.topology.add_pod(0, "shop", "neighbour")?;
        cluster.node.use_node_network(cluster.topology.node(0));
        let guest = match wiring {
            Wiring::Masqueraded => masquerade(&cluster, &[])?,
            Wiring::Rerouted => masquerade(&cluster, &[PORT, EXCLUDED])?,
            Wiring::Mirrored => mirror(&cluster)?,
        };
        let at = |port| {
            let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
            App::start(&guest.netns, &guest.name, any, Behaviour::Echo)
        };
        let mut vm = Self {
            kubelet: Kubelet::start(&cluster, "kubelet.service")?,
            app: at(PORT)?,
            excluded: at(EXCLUDED)?,
            _peers: vec![echo(&cluster.client)?, echo(&neighbour)?],
            wiring,
            family,
            guest,
            neighbour,
            cluster,
        };
        vm.assert_works_without_a_mesh().context("without a mesh")?;
        vm.enroll()?;
        Ok(vm)
    }

    fn enroll(&mut self) -> Result<()> {
        let Cluster { node, server, .. } = &mut self.cluster;
        fs::write(node.manifests().join("policy.yaml"), STRICT).context("write a policy")?;
        node.start_agent()?;
        node.start_proxy()?;
        let manifest = match self.wiring {
            Wiring::Rerouted => rerouting(server, "veth1", &[]),
            _ => Manifest::of(server).mode("ambient"),
        };
        let excluded = json!(EXCLUDED.to_string());
        let name = "traffic.redirect-agent/excludeInboundPorts";
        node.write(&manifest.with("/metadata/annotations", name, excluded))?;
        node.enroll(&self.neighbour)?;
        // It may never be as it should: that is what this is about.
        node.wait_for_pod("to be captured", server, |p| {
            p.kernel.is_some()
                && matches!(p.state, PodState::Enrolled | PodState::Degraded | PodState::Failed)
        })?;
        wait_until_followed(&self.cluster, &self.kubelet)
    }

    fn assert_works_without_a_mesh(&self) -> Result<()> {
        let outbound = self.call(&self.cluster.client).make(&self.guest.netns)?.answer()?;
        ensure!(outbound.saw_peer.ip() == self.cluster.server.ip(self.family), "{outbound:?}");
        let inbound = self.call(&self.cluster.server).make(&self.cluster.client.netns)?.answer()?;
        ensure!(inbound.by == self.guest.name, "{inbound:?}");
        self.serves_directly()?;
        self.is_probed()
    }

    fn call(&self, to: &Pod) -> Call {
        Call::to(to.addr(self.family, PORT)).within(PATIENCE)
    }

    /// What the operator sees of the pod: a complaint, and the counters.
    fn shown(&self) -> Result<(Option<String>, BTreeMap<String, u64>)> {
        let status = self.cluster.node.pod(&self.cluster.server)?.context("no status")?;
        Ok((status.message, status.counters))
    }

    fn refuses(&self) -> Result<()> {
        let Cluster { server, client, .. } = &self.cluster;
        let no_listener = || -> Result<u64> {
            Ok(self.shown()?.1.get("no_listener").copied().unwrap_or_default())
        };
        let (reached, counted) = (self.app.accepted().len(), no_listener()?);
        let outcome = self.call(server).make(&client.netns)?;
        ensure!(self.app.accepted().len() == reached, "plaintext reached the guest");
        let after = outcome.refusal()?;
        ensure!(after < AT_ONCE, "refused after {after:?}");
        ensure!(no_listener()? > counted, "it is not counted");
        Ok(())
    }

    fn answers_hbone_or_refuses(&self) -> Result<()> {
        let Cluster { node, server, .. } = &self.cluster;
        let (since, reached) = (now()?, self.app.accepted().len());
        match self.call(server).make(&self.neighbour.netns)? {
            Outcome::Answered(answer) => {
                let inbound = |direction| direction == Direction::Inbound;
                let by_proxy =
                    node.records()?.iter().any(|r| r.ts >= since && inbound(r.direction));
                ensure!(by_proxy, "past the proxy: {answer:?}");
            }
            Outcome::Refused { .. } | Outcome::Closed { .. } => {
                ensure!(self.app.accepted().len() == reached, "it reached the guest");
            }
            Outcome::TimedOut => ensure!(self.shown()?.0.is_some(), "it hangs in silence"),
        }
        Ok(())
    }

    fn serves_directly(&self) -> Result<()> {
        let Cluster { server, client, .. } = &self.cluster;
        let to = server.addr(self.family, EXCLUDED);
        let reached = self.excluded.accepted().len();
        let answer = Call::to(to).within(PATIENCE).make(&client.netns)?.answer()?;
        ensure!(answer.by == self.guest.name, "{answer:?}");
        ensure!(answer.saw_peer.ip() == client.ip(self.family), "{answer:?}");
        ensure!(self.excluded.accepted().len() == reached + 1);
        Ok(())
    }

    fn is_probed(&self) -> Result<()> {
        let Cluster { server, topology, .. } = &self.cluster;
        let script = format!(
            "exec timeout {} bash -c 'exec 3<>/dev/tcp/{}/{PORT} && read -r line <&3 && echo $line'",
            PATIENCE.as_secs(),
            server.ip(self.family),
        );
        let mut shell = shell_in(self.kubelet.cgroup()?, Some(topology.node(0)), &script);
        let said = String::from_utf8(shell.output().context("send a probe")?.stdout)?;
        let answer = read_greeting(&said).with_context(|| format!("no answer: {said:?}"))?;
        ensure!(answer.by == self.guest.name, "{answer:?}");
        ensure!(answer.saw_peer.ip() == topology.node_ip(0, self.family), "{answer:?}");
        Ok(())
    }

    fn calls_by_the_proxy_or_is_shown(&self) -> Result<()> {
        let Cluster { node, server, client, .. } = &self.cluster;
        let (since, before) = (now()?, self.shown()?);
        let outcome = self.call(client).make(&self.guest.netns)?;
        let after = self.shown()?;
        let proxied = node.records()?.iter().any(|r| {
            (r.direction, r.dst) == (Direction::Outbound, client.addr(self.family, PORT))
                && r.pod == server.to_string()
                && r.ts >= since
        });
        match &outcome {
            Outcome::Answered(_) if proxied => {}
            _ if self.wiring == Wiring::Rerouted => bail!("not by the proxy: {outcome}"),
            Outcome::Answered(_) => ensure!(after.0.is_some(), "past the proxy, in silence"),
            _ => ensure!(after != before || after.0.is_some(), "{outcome}, in silence"),
        }
        Ok(())
    }
}
