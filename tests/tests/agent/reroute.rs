//! TCP that arrives on the virtual interfaces of a pod, from a nested container or a VM, is the
//! pod's own.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::{PodState, PodStatus};
use redirect_tests::app::{App, Behaviour, Call, Conversation};
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::hbone::{Direction, Over};
use redirect_tests::netns::{Family, Netns};
use redirect_tests::process::{succeed, wait_for};
use redirect_tests::topology::{Pod, wait_for_link};
use serde_json::json;

use crate::cluster::{Cluster, Manifest, Node, PORT, SOON, converse, echo, now};
use crate::drift::{detach, index};
use crate::load::Load;

both_families! {
    nested_container_calls_as_the_pod_and_keeps_its_identity,
    guests_behind_a_bridge_reach_others_by_the_proxy_and_each_other_without,
    strict_reverse_path_filter_lets_guests_through,
    guests_calls_are_selected_as_the_pods_own,
    annotation_comes_and_goes_under_load_and_open_connections_go_on,
    pod_enters_and_leaves_under_load_of_its_guest,
    agent_restarts_and_guests_go_on,
    interface_that_comes_later_is_captured_from_its_first_packet,
    without_a_proxy_guests_are_refused_and_what_is_excluded_is_not,
    guest_reaches_the_pod_itself,
    syn_cookies_lead_guests_to_the_proxy,
    pods_of_a_node_have_the_same_bridge,
    pods_own_interfaces_are_refused,
    udp_of_guests_is_forwarded_as_it_was,
    what_is_removed_of_a_virtual_interface_is_put_back,
    cleanup_leaves_nothing_of_a_virtual_interface,
}

const ANNOTATION: &str = "istio.io/reroute-virtual-interfaces";
const STRICT: &str = "apiVersion: security.istio.io/v1\n\
                      kind: PeerAuthentication\n\
                      metadata: {name: default, namespace: shop}\n\
                      spec: {mtls: {mode: STRICT}}\n";

/// What is behind a virtual interface of a pod: it has its own network namespace and addresses.
pub fn guest(cluster: &Cluster, name: &str, number: u8) -> Result<Pod> {
    let dir = cluster.topology.dir().subdir("guests")?;
    Ok(Pod {
        namespace: "guests".to_owned(),
        name: name.to_owned(),
        node: cluster.server.node,
        v4: Ipv4Addr::new(10, 44, 0, number),
        v6: Ipv6Addr::new(0xfd44, 0, 0, 0, 0, 0, 0, number.into()),
        host_interface: "eth0".to_owned(),
        netns: Netns::new(&dir, name)?,
    })
}

/// Lets the server forward what its guests send, and the nodes find them.
pub fn forward(cluster: &Cluster) -> Result<()> {
    let Cluster { server, topology, .. } = cluster;
    server.netns.set_sysctl("net/ipv4/ip_forward", "1")?;
    server.netns.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
    topology.node(0).ip(&format!(
        "route add 10.44.0.0/24 via {} dev {}\nroute add fd44::/64 via {} dev {}",
        server.v4, server.host_interface, server.v6, server.host_interface
    ))?;
    topology.node(1).ip("route add 10.44.0.0/24 via 192.168.77.1\nroute add fd44::/64 via fd77::1")
}

/// Connects a guest to an interface of `pod`, which it calls `interface`.
pub fn plug(pod: &Pod, guest: &Pod, interface: &str) -> Result<()> {
    pod.netns.ip(&format!(
        "link add {interface} type veth peer name eth0 netns {}",
        guest.netns.path().display()
    ))?;
    guest.netns.ip(&format!(
        "addr add {}/24 dev eth0\n\
         addr add {}/64 dev eth0 nodad\n\
         link set eth0 up\n\
         route add default via 10.44.0.1\n\
         route add default via fd44::1",
        guest.v4, guest.v6
    ))
}

/// A guest of `pod` behind a veth of its own.
pub fn behind_veth(pod: &Pod, guest: &Pod, interface: &str) -> Result<()> {
    plug(pod, guest, interface)?;
    as_gateway(pod, interface)?;
    wait_for_link(&pod.netns, interface)?;
    wait_for_link(&guest.netns, "eth0")
}

/// Guests of `pod` behind a bridge, `br1`.
fn behind_bridge(pod: &Pod, guests: &[&Pod]) -> Result<()> {
    pod.netns.ip("link add br1 type bridge")?;
    as_gateway(pod, "br1")?;
    for (number, guest) in guests.iter().enumerate() {
        let port = format!("port{number}");
        plug(pod, guest, &port)?;
        pod.netns.ip(&format!("link set {port} master br1 up"))?;
        wait_for_link(&pod.netns, &port)?;
        wait_for_link(&guest.netns, "eth0")?;
    }
    wait_for_link(&pod.netns, "br1")
}

pub fn as_gateway(pod: &Pod, interface: &str) -> Result<()> {
    pod.netns.ip(&format!(
        "addr add 10.44.0.1/24 dev {interface}\n\
         addr add fd44::1/64 dev {interface} nodad\n\
         link set {interface} up"
    ))
}

/// Waits until the kernel has taken up an interface's IPv6 addresses, now that the pod forwards.
pub fn wait_for_addresses(pod: &Pod, interface: &str) -> Result<()> {
    wait_for(&format!("the IPv6 addresses of {interface}"), SOON, || {
        let routes = pod.netns.output("ip", &["-6", "route", "show", "table", "local"])?;
        let on = format!(" dev {interface} ");
        let has = |what: &str| routes.lines().any(|r| r.starts_with(what) && r.contains(&on));
        let all = ["local fd44::1 ", "local fe80:", "anycast fd44:: ", "anycast fe80:: "];
        Ok(all.into_iter().all(has).then_some(()))
    })
}

fn gateway(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 44, 0, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfd44, 0, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// A guest behind `veth1` of the server, with nothing else set up.
fn one_guest(flags: &[&str]) -> Result<(Cluster, Pod)> {
    let cluster = Cluster::with_flags(flags)?;
    let nested = guest(&cluster, "nested", 2)?;
    behind_veth(&cluster.server, &nested, "veth1")?;
    forward(&cluster)?;
    wait_for_addresses(&cluster.server, "veth1")?;
    Ok((cluster, nested))
}

/// The manifest of a pod in the mesh, with these annotations besides.
pub fn rerouting(pod: &Pod, interfaces: &str, more: &[(&str, &str)]) -> Manifest {
    let manifest = Manifest::of(pod).mode("ambient").with(
        "/metadata/annotations",
        ANNOTATION,
        json!(interfaces),
    );
    more.iter().fold(manifest, |manifest, (name, value)| {
        let name = format!("traffic.redirect-agent/{name}");
        manifest.with("/metadata/annotations", &name, json!(value))
    })
}

/// Waits until a pod is in the mesh with these interfaces rerouted, and no others.
fn wait_until_rerouted(node: &Node, pod: &Pod, interfaces: &[&str]) -> Result<PodStatus> {
    node.wait_for_pod("to be rerouted", pod, |p| {
        let named = p.traffic.as_ref().map(|t| t.virtual_interfaces.clone()).unwrap_or_default();
        p.state == PodState::Enrolled
            && named == interfaces
            && p.kernel.as_ref().is_some_and(|kernel| kernel.complete)
    })
}

/// Enrolls a pod, and waits until what is behind its interfaces is captured.
fn reroute(node: &Node, pod: &Pod, interface: &str) -> Result<()> {
    node.write(&rerouting(pod, interface, &[]))?;
    wait_until_rerouted(node, pod, &[interface])?;
    node.wait_until_enrolled(pod)
}

/// Checks that a new call of a guest of `pod` is answered by `to` by way of the pod's proxy.
fn assert_rerouted(
    node: &Node,
    guest: &Pod,
    pod: &Pod,
    to: &Pod,
    family: Family,
) -> Result<Conversation> {
    let since = now()?;
    let addr = to.addr(family, PORT);
    let mut conversation = Call::to(addr).open(&guest.netns)?;
    let answer = conversation.answer();
    ensure!(
        answer.by == to.name && answer.saw_local == addr && answer.saw_peer.ip() == pod.ip(family),
        "{guest} called {to}, and got {answer:?}"
    );
    let src = conversation.local_addr()?;
    ensure!(src.ip() == guest.ip(family), "{src} is not {guest}");
    let records = node.records_of(&conversation, since)?;
    let outbound: Vec<_> = records.iter().filter(|r| r.direction == Direction::Outbound).collect();
    ensure!(
        outbound.len() == 1 && outbound[0].pod == pod.to_string(),
        "no outbound connection of {pod} for {src} to {addr}, but {records:?}"
    );
    conversation.exchange(b"more than a greeting")?;
    Ok(conversation)
}

fn counter(node: &Node, pod: &Pod, name: &str) -> Result<u64> {
    let status = node.pod(pod)?.context("no status")?;
    Ok(status.counters.get(name).copied().unwrap_or_default())
}

fn nested_container_calls_as_the_pod_and_keeps_its_identity(family: Family) -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let neighbour = cluster.topology.add_pod(0, "shop", "neighbour")?;
    let nested = guest(&cluster, "nested", 2)?;
    behind_veth(&cluster.server, &nested, "veth1")?;
    forward(&cluster)?;
    wait_for_addresses(&cluster.server, "veth1")?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&neighbour)?);
    fs::write(node.manifests().join("policy.yaml"), STRICT).context("write a policy")?;
    node.enroll(&neighbour)?;
    let before = footprint(&server.netns)?;
    node.assert_direct(&nested, client, family)?;

    reroute(node, server, "veth1")?;
    let kernel = node.pod(server)?.and_then(|p| p.kernel).context("nothing in the kernel")?;
    assert!(kernel.present.contains(&"reroute veth1".to_owned()), "{:?}", kernel.present);
    let redirected = counter(node, server, "redirected_outbound")?;
    assert_rerouted(node, &nested, server, client, family)?.bulk(4 << 20)?;
    assert_eq!(counter(node, server, "redirected_outbound")?, redirected + 1);

    // By HBONE, with the pod's identity, to who refuses plaintext.
    let since = now()?;
    let mut secured = Call::to(neighbour.addr(family, PORT)).open(&nested.netns)?;
    assert_eq!(secured.answer().by, "neighbour");
    secured.bulk(4 << 20)?;
    let records = node.records_of(&secured, since)?;
    let outbound = records.iter().find(|r| r.pod == server.to_string()).context("not by proxy")?;
    assert_eq!((outbound.direction, outbound.over), (Direction::Outbound, Some(Over::Hbone)));
    let inbound = node.records()?.into_iter().rfind(|r| r.direction == Direction::Inbound);
    let identity = inbound.and_then(|r| r.peer_identity).context("no identity")?;
    assert!(identity.ends_with("/ns/shop/sa/server"), "{identity}");
    // The pod itself is captured as ever.
    node.assert_outbound(server, client, family)?;

    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &before)?;
    node.assert_direct(&nested, client, family)?;
    Ok(())
}

fn guests_behind_a_bridge_reach_others_by_the_proxy_and_each_other_without(
    family: Family,
) -> Result<()> {
    let cluster = &Cluster::start()?;
    let (one, two) = (guest(cluster, "one", 2)?, guest(cluster, "two", 3)?);
    behind_bridge(&cluster.server, &[&one, &two])?;
    forward(cluster)?;
    wait_for_addresses(&cluster.server, "br1")?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&one)?, echo(&two)?);
    let before = footprint(&server.netns)?;
    reroute(node, server, "br1")?;
    for guest in [&one, &two] {
        assert_rerouted(node, guest, server, client, family)?.bulk(4 << 20)?;
    }
    node.assert_direct(&one, &two, family)?;
    node.assert_direct(&two, &one, family)?;
    // The pod calls its guest by the proxy, and what comes from outside reaches it as ever.
    let since = now()?;
    let to_guest = Call::to(one.addr(family, PORT)).open(&server.netns)?;
    ensure!(to_guest.answer().by == "one" && !node.records_of(&to_guest, since)?.is_empty());
    node.assert_direct(client, &one, family)?;

    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &before)
}

fn strict_reverse_path_filter_lets_guests_through(family: Family) -> Result<()> {
    let (cluster, nested) = &one_guest(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    reroute(node, server, "veth1")?;
    for filter in ["0", "1"] {
        for interface in ["all", "lo", "eth0", "veth1"] {
            let name = format!("net/ipv4/conf/{interface}/rp_filter");
            server.netns.set_sysctl(&name, filter)?;
        }
        for netns in [&server.netns, &nested.netns] {
            netns.ip("neigh flush all")?;
        }
        assert_rerouted(node, nested, server, client, family)?.bulk(1 << 20)?;
    }
    // Nothing of this is forwarded.
    server.netns.set_sysctl("net/ipv4/ip_forward", "0")?;
    server.netns.set_sysctl("net/ipv6/conf/all/forwarding", "0")?;
    assert_rerouted(node, nested, server, client, family)?.bulk(1 << 20)
}

fn guests_calls_are_selected_as_the_pods_own(family: Family) -> Result<()> {
    let (cluster, nested) = &one_guest(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let (here, elsewhere) = match family {
        Family::V4 => (format!("{}/24", client.v4), "198.51.100.0/24"),
        Family::V6 => (format!("{}/64", client.v6), "2001:db8:1::/48"),
    };
    for (annotations, selected) in [
        (&[("excludeOutboundPorts", "8080")][..], false),
        (&[("excludeOutboundPorts", "1-8079,8081-65535")], true),
        (&[("includeOutboundPorts", "80")], false),
        (&[("includeOutboundPorts", "8000-9000")], true),
        (&[("excludeOutboundIPRanges", &here)], false),
        (&[("excludeOutboundIPRanges", elsewhere)], true),
        (&[("includeOutboundIPRanges", elsewhere)], false),
        (&[("includeOutboundIPRanges", &here), ("includeOutboundPorts", "8080")], true),
        (&[("includeOutboundIPRanges", &here), ("excludeOutboundPorts", "8080")], false),
    ] {
        let before = node.pod(server)?.and_then(|p| p.traffic);
        node.write(&rerouting(server, "veth1", annotations))?;
        node.wait_for_pod("to have other settings", server, |p| {
            let kernel = p.kernel.as_ref();
            p.state == PodState::Enrolled
                && p.traffic != before
                && kernel.is_some_and(|kernel| kernel.complete)
        })?;
        match selected {
            true => {
                assert_rerouted(node, nested, server, client, family).map(drop)?;
                node.assert_outbound(server, client, family)
            }
            false => {
                node.assert_direct(nested, client, family)?;
                node.assert_direct(server, client, family)
            }
        }
        .with_context(|| format!("with {annotations:?}"))?;
    }
    Ok(())
}

fn annotation_comes_and_goes_under_load_and_open_connections_go_on(family: Family) -> Result<()> {
    const ROUNDS: usize = 3;
    let (cluster, nested) = &one_guest(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    node.enroll(server)?;
    let load = Load::of(nested, client, family).keeping_old().seen_as(server);
    let mut open = Vec::new();
    let (edits, calls) = load.during(|| {
        let mut edits = Vec::new();
        for _ in 0..ROUNDS {
            let named = now()?;
            node.write(&rerouting(server, "veth1", &[]))?;
            wait_until_rerouted(node, server, &["veth1"])?;
            open.push(assert_rerouted(node, nested, server, client, family)?);
            let unnamed = now()?;
            node.write(&Manifest::of(server).mode("ambient"))?;
            wait_until_rerouted(node, server, &[])?;
            open.push(converse(nested, client, family)?);
            for conversation in &mut open {
                conversation.exchange(b"still there?")?;
                conversation.bulk(1 << 20)?;
            }
            edits.push((named, unnamed));
        }
        Ok(edits)
    })?;
    assert!(calls > 20 * ROUNDS, "{calls} calls are no load");
    let records = node.records()?;
    for (round, (named, unnamed)) in edits.iter().enumerate() {
        let next = edits.get(round + 1).map_or(f64::MAX, |(next, _)| *next);
        let seen = |from: f64, to: f64| {
            let times = records.iter().filter(|r| r.src.ip() == nested.ip(family)).map(|r| r.ts);
            times.filter(move |ts| (from..to).contains(ts))
        };
        let first = seen(*named, *unnamed).reduce(f64::min).context("nothing redirected")?;
        let last = seen(*unnamed, next).reduce(f64::max).unwrap_or(*unnamed);
        assert!(first - named < 1.0, "late by {}", first - named);
        assert!(last - unnamed < 1.0, "redirected for {} s more", last - unnamed);
    }
    Ok(())
}

fn pod_enters_and_leaves_under_load_of_its_guest(family: Family) -> Result<()> {
    let (cluster, nested) = &one_guest(&["--drain", "60s"])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    let load = Load::of(nested, client, family).keeping_old().seen_as(server);
    let ((), calls) = load.during(|| {
        for _ in 0..2 {
            reroute(node, server, "veth1")?;
            let mut redirected = assert_rerouted(node, nested, server, client, family)?;
            let bypass =
                Manifest::of(server).with("/metadata/annotations", ANNOTATION, json!("veth1"));
            node.write(&bypass)?;
            wait_for("new connections to be forwarded", SOON, || {
                Ok(node.assert_direct(nested, client, family).ok())
            })?;
            redirected.exchange(b"still by the proxy")?;
            redirected.bulk(1 << 20)?;
            node.wait_for_state(server, PodState::Leaving)?;
            drop(redirected);
            node.wait_for_state(server, PodState::Bypassing)?;
            node.assert_direct(nested, client, family)?;
        }
        Ok(())
    })?;
    assert!(calls > 40, "{calls} calls are no load");
    assert_unchanged(&server.netns, &before)
}

fn agent_restarts_and_guests_go_on(family: Family) -> Result<()> {
    let (mut cluster, nested) = one_guest(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let mut direct = converse(&nested, &cluster.client, family)?;
    reroute(&cluster.node, &cluster.server, "veth1")?;
    let enrolled = footprint(&cluster.server.netns)?;
    let Cluster { node, server, client, .. } = &cluster;
    let mut redirected = assert_rerouted(node, &nested, server, client, family)?;
    for _ in 0..2 {
        cluster.node.kill_agent()?;
        let Cluster { node, server, client, .. } = &cluster;
        assert_rerouted(node, &nested, server, client, family)?;
        cluster.node.start_agent()?;
        let Cluster { node, server, client, .. } = &cluster;
        node.wait_until_enrolled(server)?;
        assert_rerouted(node, &nested, server, client, family)?;
        for conversation in [&mut direct, &mut redirected] {
            conversation.exchange(b"still there?")?;
            conversation.bulk(1 << 20)?;
        }
        wait_for("the same as before", SOON, || {
            Ok((footprint(&server.netns)? == enrolled).then_some(()))
        })?;
    }
    Ok(())
}

fn interface_that_comes_later_is_captured_from_its_first_packet(family: Family) -> Result<()> {
    let cluster = &Cluster::start()?;
    forward(cluster)?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    let before = footprint(&server.netns)?;
    reroute(node, server, "veth1,veth2")
        .or_else(|_| wait_until_rerouted(node, server, &["veth1", "veth2"]).map(drop))?;
    let guests = (2..18)
        .map(|number| guest(cluster, &format!("nested{number}"), number))
        .collect::<Result<Vec<_>>>()?;
    for (round, [first, second]) in (0..).zip(guests.as_chunks().0) {
        behind_veth(server, first, "veth1")?;
        // Sooner or later it comes while the agent is busy with the first.
        thread::sleep(Duration::from_millis(20 * round));
        plug(server, second, "veth2")?;
        server.netns.ip(&format!(
            "addr add 10.44.0.1/32 dev veth2\n\
             addr add fd44::1/128 dev veth2 nodad\n\
             link set veth2 up\n\
             route add {}/32 dev veth2\n\
             route add {}/128 dev veth2",
            second.v4, second.v6
        ))?;
        wait_for_link(&second.netns, "eth0")?;
        // Not one call goes out by itself, not even the first.
        for nested in [first, second] {
            assert_rerouted(node, nested, server, client, family)?;
        }
        server.netns.ip("link del veth1\nlink del veth2")?;
    }
    node.write(&Manifest::of(server))?;
    node.wait_for_state(server, PodState::Bypassing)?;
    assert_unchanged(&server.netns, &before)
}

fn without_a_proxy_guests_are_refused_and_what_is_excluded_is_not(family: Family) -> Result<()> {
    let (mut cluster, nested) = one_guest(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let other = SocketAddr::new(family.any(), 9090);
    let _other = App::start(&cluster.client.netns, "other", other, Behaviour::Echo)?;
    let Cluster { node, server, client, .. } = &mut cluster;
    node.write(&rerouting(server, "veth1", &[("excludeOutboundPorts", "9090")]))?;
    wait_until_rerouted(node, server, &["veth1"])?;
    assert_rerouted(node, &nested, server, client, family)?;
    let excluded = || Call::to(client.addr(family, 9090)).make(&nested.netns)?.answer();

    // A proxy that restarts costs a delay and no error.
    node.kill_proxy()?;
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            Call::to(client.addr(family, PORT)).within(SOON).make(&nested.netns)?.answer()
        });
        node.start_proxy()?;
        waiting.join().map_err(|_| anyhow::anyhow!("the caller panicked"))?
    })?;
    assert_eq!((waiting.by.as_str(), waiting.saw_peer.ip()), ("client", server.ip(family)));

    node.kill_proxy()?;
    let took = wait_for("the grace to be over", SOON, || {
        let outcome = Call::to(client.addr(family, PORT)).within(SOON).make(&nested.netns)?;
        assert_eq!(excluded()?.by, "other");
        Ok(outcome.refusal().ok().filter(|took| *took < Duration::from_millis(500)))
    })?;
    assert!(took < Duration::from_millis(500), "refused after {took:?}");
    assert!(counter(node, server, "refused_proxy_away")? > 0);
    let answer = excluded()?;
    assert_eq!(answer.saw_peer.ip(), nested.ip(family));
    Ok(())
}

fn guest_reaches_the_pod_itself(family: Family) -> Result<()> {
    let (cluster, nested) = &one_guest(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    reroute(node, server, "veth1")?;
    // The pod's address: inbound, as for everybody.
    node.assert_inbound(nested, server, family)?;
    converse(nested, server, family)?.bulk(1 << 20)?;
    let closed = SocketAddr::new(server.ip(family), 9999);
    Call::to(closed).make(&nested.netns)?.refusal()?;
    // The pod's end of the wire is an address of the pod, too.
    let at_gateway = SocketAddr::new(gateway(family), PORT);
    let since = now()?;
    let mut conversation = Call::to(at_gateway).open(&nested.netns)?;
    assert_eq!(conversation.answer().by, "server");
    conversation.bulk(1 << 20)?;
    let records = node.records_of(&conversation, since)?;
    assert!(records.iter().any(|r| r.direction == Direction::InboundPlaintext), "{records:?}");
    let itself = Call::to(at_gateway).make(&server.netns)?.answer()?;
    assert_eq!((itself.by.as_str(), itself.saw_peer.ip()), ("server", gateway(family)));
    Ok(())
}

fn syn_cookies_lead_guests_to_the_proxy(family: Family) -> Result<()> {
    let (cluster, nested) = &one_guest(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    reroute(node, server, "veth1")?;
    server.netns.set_sysctl("net/ipv4/tcp_syncookies", "2")?;
    for _ in 0..20 {
        assert_rerouted(node, nested, server, client, family)?;
    }
    Ok(())
}

fn pods_of_a_node_have_the_same_bridge(family: Family) -> Result<()> {
    let mut cluster = Cluster::without_agent(&["--verify-interval", "300ms"])?;
    let other = cluster.topology.add_pod(0, "shop", "other")?;
    let guests = [guest(&cluster, "of-server", 2)?, guest(&cluster, "of-other", 2)?];
    behind_bridge(&cluster.server, &[&guests[0]])?;
    behind_bridge(&other, &[&guests[1]])?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?, echo(&other)?);
    reroute(node, server, "br1")?;
    reroute(node, &other, "br1")?;
    for _ in 0..3 {
        for (guest, pod) in [(&guests[0], server), (&guests[1], &other)] {
            assert_rerouted(node, guest, pod, client, family)?;
            let at_gateway = SocketAddr::new(gateway(family), PORT);
            let answer = Call::to(at_gateway).make(&guest.netns)?.answer()?;
            assert_eq!(answer.by, pod.name);
            let status = node.pod(pod)?.context("no status")?;
            assert!(status.kernel.is_some_and(|kernel| kernel.complete));
        }
    }
    Ok(())
}

fn pods_own_interfaces_are_refused(family: Family) -> Result<()> {
    let (cluster, nested) = &one_guest(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    reroute(node, server, "veth1")?;
    for name in ["eth0", "veth1,lo", "a-name-that-is-too-long"] {
        node.write(&rerouting(server, name, &[]))?;
        let refused = name.rsplit(',').next().unwrap_or(name);
        let status = node.wait_for_pod("to complain", server, |p| {
            p.message.as_ref().is_some_and(|message| message.contains(refused))
        })?;
        assert_eq!(status.state, PodState::Enrolled);
        // What it said before holds.
        assert_rerouted(node, nested, server, client, family)?;
        node.assert_inbound(client, server, family)?;
    }
    Ok(())
}

fn udp_of_guests_is_forwarded_as_it_was(family: Family) -> Result<()> {
    let (cluster, nested) = &one_guest(&[])?;
    let Cluster { node, server, client, .. } = cluster;
    reroute(node, server, "veth1")?;
    for port in [53, 4000] {
        let bind = |port| {
            let socket = UdpSocket::bind(SocketAddr::new(family.any(), port))?;
            socket.set_read_timeout(Some(SOON))?;
            Ok(socket)
        };
        let answers = client.netns.run(|| bind(port))?;
        let asks = nested.netns.run(|| bind(0))?;
        asks.send_to(b"ask", client.addr(family, port))?;
        let mut buffer = [0; 16];
        let (len, peer) = answers.recv_from(&mut buffer)?;
        assert_eq!((&buffer[..len], peer.ip()), (&b"ask"[..], nested.ip(family)), "port {port}");
        answers.send_to(b"answer", peer)?;
        let (len, peer) = asks.recv_from(&mut buffer)?;
        assert_eq!((&buffer[..len], peer), (&b"answer"[..], client.addr(family, port)));
    }
    Ok(())
}

fn what_is_removed_of_a_virtual_interface_is_put_back(family: Family) -> Result<()> {
    let (cluster, nested) = &one_guest(&["--verify-interval", "300ms"])?;
    let Cluster { node, server, client, .. } = cluster;
    let _apps = (echo(server)?, echo(client)?);
    reroute(node, server, "veth1")?;
    let before = footprint(&server.netns)?;
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    let rule = |action: &[&str]| {
        let args = [&[flag, "rule", "del", "iif", "veth1"], action].concat();
        server.netns.output("ip", &args).map(drop)
    };
    let pin = node.links(server)?.join(format!("in_{}", index(server, "veth1")?));
    let entries = || {
        let map = node.bpffs().join("virtual_ifs");
        let mut key = u32::try_from(server.netns.inode()?)?.to_ne_bytes().to_vec();
        key.extend(index(server, "veth1")?.parse::<u32>()?.to_ne_bytes());
        let mut command = Command::new("bpftool");
        command.args(["map", "delete", "pinned"]).arg(map).args(["key", "hex"]);
        succeed(command.args(key.iter().map(|byte| format!("{byte:02x}")))).map(drop)
    };
    let removals: [(&str, &dyn Fn() -> Result<()>); 4] = [
        ("the rule that redirects", &|| rule(&["table", "15002"])),
        ("the rule that holds back", &|| rule(&["blackhole"])),
        ("the program", &|| detach(&pin)),
        ("the entry", &entries),
    ];
    for (what, remove) in removals {
        remove().with_context(|| format!("remove {what}"))?;
        wait_for(what, SOON, || {
            let complete = node.pod(server)?.and_then(|p| p.kernel).is_some_and(|k| k.complete);
            Ok((complete && footprint(&server.netns)? == before).then_some(()))
        })?;
        assert_rerouted(node, nested, server, client, family)
            .with_context(|| format!("after {what} was put back"))?;
    }
    Ok(())
}

fn cleanup_leaves_nothing_of_a_virtual_interface(family: Family) -> Result<()> {
    let (mut cluster, nested) = one_guest(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let before = footprint(&cluster.server.netns)?;
    reroute(&cluster.node, &cluster.server, "veth1")?;
    cluster.node.stop_agent()?;
    let Cluster { node, server, client, .. } = &cluster;
    assert_rerouted(node, &nested, server, client, family)?;
    let (success, said) = node.cleanup()?;
    assert!(success, "{said}");
    assert_unchanged(&server.netns, &before)?;
    assert!(!node.bpffs().exists(), "pins are left");
    node.assert_direct(&nested, client, family)
}
