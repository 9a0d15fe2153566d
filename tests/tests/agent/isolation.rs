//! What a pod, or somebody outside, does to another pod of the node, as its counters and `status`
//! show it.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::{PodState, PodStatus};
use redirect_ebpf::abi::{PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::app::{App, Behaviour, Call, Outcome};
use redirect_tests::both_families;
use redirect_tests::dns::{self, Resolver, query};
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::raw::{SYN, Segment, Wire};
use redirect_tests::sock_diag::{self, Verb};
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cgroup::shell_in;
use crate::cluster::{Cluster, Manifest, Node, PORT, SOON, echo};
use crate::dns::{SERVICE, ask, ask_tcp, connect, service, service_ip};
use crate::probes::{Kubelet, wait_until_followed};

both_families! {
    sock_diag_of_a_neighbour_neither_counts_nor_closes,
    address_that_a_neighbour_adds_stays_the_pods,
    dns_flood_of_a_neighbour_costs_a_pod_nothing,
    thousands_of_addresses_of_a_neighbour_keep_no_pod_out,
    forged_sources_are_refused_and_counted,
    application_on_the_hbone_port_is_refused_and_counted,
    probe_of_a_neighbours_address_counts_for_the_neighbour,
}

/// How long it is looked whether something does not happen.
const A_WHILE: Duration = Duration::from_secs(3);
const STRICT: &str = "apiVersion: security.istio.io/v1\n\
                      kind: PeerAuthentication\n\
                      metadata: {name: default, namespace: shop}\n\
                      spec: {mtls: {mode: STRICT}}\n";
/// Queries in each family: more than 65,536 in both, which all pods of the node once shared.
const QUERIES: u16 = 50_000;
const ADDRESSES: u16 = 9_000;

/// A cluster with another pod on the server's node, which is not in the mesh yet.
fn with_neighbour() -> Result<(Pod, Cluster)> {
    let mut cluster = Cluster::without_agent(&[])?;
    let neighbour = cluster.topology.add_pod(0, "shop", "neighbour")?;
    cluster.node.write(&Manifest::of(&neighbour))?;
    Ok((neighbour, cluster))
}

fn counters(node: &Node, pod: &Pod) -> Result<BTreeMap<String, u64>> {
    Ok(node.pod(pod)?.context("no such pod")?.counters)
}

fn counter(pod: &PodStatus, name: &str) -> u64 {
    pod.counters.get(name).copied().unwrap_or_default()
}

fn sock_diag_of_a_neighbour_neither_counts_nor_closes(family: Family) -> Result<()> {
    let (neighbour, mut cluster) = with_neighbour()?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?);
    node.enroll(server)?;
    node.enroll(&neighbour)?;
    cluster.assert_redirected(family)?;
    let before = counters(node, server)?;

    for verb in [Verb::Show, Verb::Destroy] {
        for port in [PORT, PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE] {
            for (local, remote) in [(server, client), (client, server), (server, server)] {
                // As if it had come in on no interface, on `lo`, and on eth0.
                for interface in 0..3 {
                    let (local, remote) = (local.addr(family, port), remote.addr(family, 1000));
                    sock_diag::ask(&neighbour.netns, verb, local, remote, interface)?;
                }
            }
        }
        assert_eq!(counters(node, server)?, before, "{verb:?}");
    }

    cluster.assert_redirected(family)?;
    let after = node.pod(server)?.context("no such pod")?;
    for counter in ["redirected_outbound", "redirected_inbound"] {
        assert_eq!(after.counters[counter], before[counter] + 1, "{counter}");
    }
    assert_eq!(after.state, PodState::Enrolled);
    Ok(())
}

/// The neighbour lets everybody in, and claims to be the pod.
fn address_that_a_neighbour_adds_stays_the_pods(family: Family) -> Result<()> {
    let (neighbour, mut cluster) = with_neighbour()?;
    fs::write(cluster.node.manifests().join("policy.yaml"), STRICT).context("write a policy")?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let Cluster { node, server, client, .. } = &cluster;
    let app = echo(server)?;
    node.enroll(server)?;
    let annotation = "ambient.istio.io/bypass-inbound-capture";
    let manifest = Manifest::of(&neighbour).mode("ambient");
    node.write(&manifest.with("/metadata/annotations", annotation, json!("true")))?;
    node.wait_until_enrolled(&neighbour)?;
    let before = counters(node, server)?;

    let ip = server.ip(family);
    let (length, nodad) = if ip.is_ipv4() { (32, "") } else { (128, "nodad") };
    let call = Call::to(server.addr(family, PORT));
    let mut calls = 0;
    for change in ["add", "del"] {
        neighbour.netns.ip(&format!("addr {change} {ip}/{length} dev eth0 {nodad}"))?;
        let deadline = Instant::now() + A_WHILE;
        wait_for("a while to be over", SOON, || {
            let outcome = call.make(&client.netns)?;
            ensure!(outcome == Outcome::Closed { bytes: 0 }, "after {change}: {outcome}");
            calls += 1;
            Ok((Instant::now() > deadline).then_some(()))
        })?;
    }

    assert_eq!(app.accepted(), []);
    let after = node.pod(server)?.context("no such pod")?;
    let redirected = before.get("redirected_inbound").copied().unwrap_or_default();
    assert_eq!(counter(&after, "redirected_inbound"), redirected + calls);
    let neighbour = node.pod(&neighbour)?.context("no such pod")?;
    assert_eq!(counter(&neighbour, "bypassed_inbound"), 0);
    Ok(())
}

/// The pod has an idle connection to its resolver when the neighbour asks as much as it can.
fn dns_flood_of_a_neighbour_costs_a_pod_nothing(family: Family) -> Result<()> {
    let (neighbour, mut cluster) = with_neighbour()?;
    let resolver = cluster.client.ip(family);
    let _resolver = Resolver::start(&cluster.client.netns, &[resolver])?;
    fs::write(cluster.node.manifests().join("web.json"), service().to_string())
        .context("write the service")?;
    cluster.node.start_agent()?;
    let upstream = cluster.client.addr(family, dns::PORT).to_string();
    cluster.node.start_proxy_with(&["--dns-upstream", &upstream])?;
    let Cluster { node, server, .. } = &cluster;
    node.enroll(server)?;
    node.enroll(&neighbour)?;
    let mut open = connect(&server.netns, resolver)?;
    ensure!(ask_tcp(&mut open, SERVICE, resolver)? == [service_ip(family)]);
    let before = counters(node, server)?;

    neighbour.netns.run(|| {
        for family in [Family::V4, Family::V6] {
            let nowhere: IpAddr = match family {
                Family::V4 => [203, 0, 113, 1].into(),
                Family::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into(),
            };
            let question = query(7, SERVICE, nowhere)?;
            for port in 1024..1024 + QUERIES {
                let socket = UdpSocket::bind((neighbour.ip(family), port)).context("bind")?;
                // Whether it is answered is the neighbour's own affair.
                let _asked = socket.send_to(&question, (nowhere, dns::PORT));
            }
        }
        Ok(())
    })?;

    ensure!(ask_tcp(&mut open, SERVICE, resolver)? == [service_ip(family)]);
    let answer = ask(&server.netns, resolver, SERVICE, SOON)?.context("no answer came")?;
    assert_eq!(answer.1, [service_ip(family)]);
    let mut expected = before;
    *expected.entry("redirected_dns".to_owned()).or_default() += 1;
    assert_eq!(counters(node, server)?, expected);
    Ok(())
}

fn thousands_of_addresses_of_a_neighbour_keep_no_pod_out(family: Family) -> Result<()> {
    let (neighbour, mut cluster) = with_neighbour()?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let Cluster { node, client, .. } = &cluster;
    let _app = echo(client)?;
    node.enroll(&neighbour)?;
    let added: String = (0..ADDRESSES)
        .map(|n| match family {
            Family::V4 => format!("addr add 10.99.{}.{}/32 dev eth0\n", n >> 8, n & 0xff),
            Family::V6 => format!("addr add fd99::{n:x}/128 dev eth0 nodad\n"),
        })
        .collect();
    neighbour.netns.ip(&added)?;
    // By then they are looked at, and if they are too many that is said.
    let _said = wait_for("the agent to complain", SOON / 2, || {
        Ok(node.pod(&neighbour)?.and_then(|pod| pod.message))
    });

    let late = cluster.topology.add_pod(0, "shop", "late")?;
    let Cluster { node, client, .. } = &cluster;
    let _app = echo(&late)?;
    node.enroll(&late)?;

    node.assert_outbound(&late, client, family)?;
    node.assert_inbound(client, &late, family)
}

/// The agent's memory is there for all pods: what another pod's kernel holds may not fill it, and an agent
/// that starts with it neither.
#[test]
fn hundreds_of_thousands_of_routes_and_rules_of_a_neighbour_cost_the_agent_no_memory() -> Result<()>
{
    let (neighbour, mut cluster) = with_neighbour()?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    cluster.node.enroll(&neighbour)?;
    neighbour.netns.add_routes(300_000)?;
    let rule = |n| format!("rule add from 11.0.0.1 priority {n} lookup 77\n");
    neighbour.netns.ip(&(10_000..15_000).map(rule).collect::<String>())?;
    for again in [false, true] {
        if again {
            cluster.node.kill_agent()?;
            cluster.node.start_agent()?;
        }
        let Cluster { node, server, .. } = &cluster;
        node.wait_until_enrolled(&neighbour)?;
        node.enroll(server)?;
        let peak = peak_memory(node.agent_pid()?)?;
        ensure!(peak < 128 << 10, "{peak} KiB");
    }
    Ok(())
}

/// The most that a process has had in memory, KiB.
fn peak_memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = peak.and_then(|peak| peak.trim().strip_suffix(" kB"));
    number.context("find VmHWM")?.trim().parse().context("read VmHWM")
}

/// Each interface has programs, and one without them would be a way past the proxy.
#[test]
fn pod_with_more_interfaces_than_can_be_guarded_is_not_enrolled_and_says_why() -> Result<()> {
    let (neighbour, mut cluster) = with_neighbour()?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let Cluster { node, server, .. } = &cluster;
    let pairs = |what: &str, peer: bool| -> String {
        let pair = |n| match peer {
            true => format!("link {what} x{n} type veth peer name y{n}\n"),
            false => format!("link {what} x{n}\n"),
        };
        (0..32).map(pair).collect()
    };
    // With eth0 one too many.
    neighbour.netns.ip(&pairs("add", true))?;
    node.write(&Manifest::of(&neighbour).mode("ambient"))?;
    let failed = node.wait_for_state(&neighbour, PodState::Failed)?;
    let message = failed.message.context("no message")?;
    ensure!(message.contains("65 network interfaces") && message.contains("64"), "{message}");
    node.enroll(server)?;

    neighbour.netns.ip(&pairs("del", false))?;
    node.wait_until_enrolled(&neighbour)?;
    neighbour.netns.ip(&pairs("add", true))?;
    let degraded = node.wait_for_state(&neighbour, PodState::Degraded)?;
    let message = degraded.message.context("no message")?;
    ensure!(message.contains("65 network interfaces"), "{message}");
    Ok(())
}

fn forged_sources_are_refused_and_counted(family: Family) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, topology } = &cluster;
    let apps = (echo(server)?, echo(client)?);
    cluster.assert_redirected(family)?;
    let before = node.pod(server)?.context("no such pod")?;

    let wire = Wire::open(topology, server)?;
    let (own, stranger, loopback) = (server.ip(family), client.ip(family), family.localhost());
    let forged = [(own, own), (loopback, own), (own, loopback), (stranger, loopback)];
    for (src, dst) in forged {
        wire.send_segment(&Segment {
            src: SocketAddr::new(src, 1000),
            dst: SocketAddr::new(dst, PORT),
            seq: 1,
            ack: 0,
            flags: SYN,
            payload: Vec::new(),
        })?;
    }

    let expected = u64::try_from(forged.len())?;
    let refused = |p: &PodStatus| counter(p, "refused_forged_address") == expected;
    let after = node.wait_for_pod("to have refused them", server, refused)?;
    for name in ["local", "redirected_inbound", "refused_proxy_away", "no_listener"] {
        assert_eq!(counter(&after, name), counter(&before, name), "{name}");
    }
    // What the pod calls itself is its own affair.
    node.assert_direct(server, server, family)?;
    cluster.assert_redirected(family)?;
    assert_eq!(apps.0.accepted().len(), 3);
    Ok(())
}

fn application_on_the_hbone_port_is_refused_and_counted(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&["--proxy-grace", "1s"])?;
    cluster.node.kill_proxy()?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?);
    let to = server.addr(family, PORT_HBONE);
    let at = SocketAddr::new(family.any(), PORT_HBONE);
    let squatter = App::start(&server.netns, "squatter", at, Behaviour::Echo)?;
    let before = node.pod(server)?.context("no such pod")?;

    wait_for("a refusal", SOON, || match Call::to(to).within(SOON).make(&client.netns)? {
        Outcome::Refused { .. } => Ok(Some(())),
        Outcome::TimedOut => Ok(None),
        other => Err(anyhow::anyhow!("the squatter's: {other}")),
    })?;

    assert_eq!(squatter.accepted(), []);
    let after = node.pod(server)?.context("no such pod")?;
    assert_eq!(counter(&after, "hbone"), counter(&before, "hbone"));
    let away = counter(&after, "refused_proxy_away");
    ensure!(away > counter(&before, "refused_proxy_away"), "{:?}", after.counters);

    drop(squatter);
    cluster.node.start_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.assert_redirected(family)
}

/// A pod's author may let kubelet call any address (`httpGet.host`): that is said in SECURITY.md. It
/// is the called pod's probe, and opens nothing to anybody else.
fn probe_of_a_neighbours_address_counts_for_the_neighbour(family: Family) -> Result<()> {
    let (neighbour, mut cluster) = with_neighbour()?;
    cluster.node.use_node_network(cluster.topology.node(0));
    fs::write(cluster.node.manifests().join("policy.yaml"), STRICT).context("write a policy")?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    cluster.node.enroll(&cluster.server)?;
    cluster.node.enroll(&neighbour)?;
    let Cluster { node, server, topology, .. } = &cluster;
    let app = echo(&neighbour)?;
    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    wait_until_followed(&cluster, &kubelet)?;

    let to = neighbour.addr(family, PORT);
    let script =
        format!("exec 3<>/dev/tcp/{}/{PORT} && read -r -t 5 line <&3 && echo $line", to.ip());
    let output =
        shell_in(kubelet.cgroup()?, Some(topology.node(0)), &script).output().context("probe")?;
    let said = String::from_utf8(output.stdout).context("read what the application said")?;

    ensure!(said.starts_with("neighbour "), "the probe was answered by {said:?}");
    let saw = app.accepted();
    ensure!(saw.len() == 1 && saw[0].peer.ip() == topology.node_ip(0, family), "{saw:?}");
    let probes =
        |pod: &Pod| anyhow::Ok(counter(&node.pod(pod)?.context("no pod")?, "kubelet_probe"));
    assert_eq!((probes(&neighbour)?, probes(server)?), (1, 0));
    // Whoever is not kubelet gets nothing from it.
    let outcome = Call::to(to).within(A_WHILE).make(&cluster.client.netns)?;
    assert_eq!(outcome, Outcome::Closed { bytes: 0 });
    assert_eq!((app.accepted().len(), probes(&neighbour)?), (1, 1));
    Ok(())
}
