//! What the kubelet and Prometheus ask of the agent.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::PodState;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use socket2::{Domain, Socket, Type};

use crate::cluster::{Cluster, Manifest, Node, SOON, echo};
use crate::load::Until;

#[test]
fn agent_tells_its_health_and_what_it_has_counted() -> Result<()> {
    let mut cluster = Cluster::without_agent(&["--verify-interval", "300ms"])?;
    let address = free_address()?;
    cluster.node.serve_health(address);
    cluster.node.start_agent()?;
    assert_eq!(get(address, "/healthz")?, (200, "ok\n".to_owned()));
    wait_for("the agent to be ready", SOON, || {
        Ok((get(address, "/readyz")? == (200, "[+] pods\n".to_owned())).then_some(()))
    })?;
    assert_eq!(get(address, "/elsewhere")?.0, 404);
    assert_has(address, "redirect_zds_connections 0")?;
    assert_has(address, "redirect_pods{state=\"bypassing\",reason=\"not-labeled\"} 1")?;

    cluster.node.start_proxy()?;
    cluster.node.enroll(&cluster.server)?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.assert_redirected(Family::V4)?;
    cluster.assert_redirected(Family::V6)?;
    assert_has(address, "redirect_zds_connections 1")?;
    assert_has(address, "redirect_pods{state=\"enrolled\",reason=\"pod-label-ambient\"} 1")?;
    assert_has(address, "redirect_connections_total{verdict=\"redirected_outbound\"} 2")?;
    assert_has(address, "redirect_connections_total{verdict=\"redirected_inbound\"} 2")?;
    assert_has(address, "redirect_enrollment_duration_seconds_count 1")?;

    cluster.server.netns.output("ip", &["-4", "rule", "del", "table", "15001"])?;
    assert_has(address, "redirect_drift_total{kind=\"rule\"} 1")?;

    // Nobody asks between its calls and its end in the mesh.
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.assert_redirected(Family::V4)?;
    cluster.node.write(&Manifest::of(&cluster.server).mode("none"))?;
    cluster.node.wait_for_state(&cluster.server, PodState::Bypassing)?;
    assert_has(address, "redirect_connections_total{verdict=\"redirected_outbound\"} 3")?;
    assert_has(address, "redirect_connections_total{verdict=\"redirected_inbound\"} 3")
}

/// An agent whose health port is open at every address of the node, and that port.
fn open_to_anybody() -> Result<(Cluster, u16)> {
    let mut cluster = Cluster::without_agent(&[])?;
    let port = free_address()?.port();
    cluster.node.serve_health(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port));
    cluster.node.start_agent()?;
    Ok((cluster, port))
}

/// How many the agent has.
fn descriptors(node: &Node) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", node.agent_pid()?))?.count())
}

/// Anybody can connect to the port of health and metrics.
#[test]
fn strangers_that_connect_and_say_nothing_take_neither_descriptors_nor_answers() -> Result<()> {
    let (cluster, port) = open_to_anybody()?;
    let before = descriptors(&cluster.node)?;
    let stranger = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let mut idle = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(stranger)?;
        // A header without an end, from some of them; refused ones may be closed by now.
        let _refused = stream.write_all(b"GET /healthz HTTP/1.1\r\nX: ");
        idle.push(stream);
    }
    let another = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
    ensure!(get(another, "/healthz")?.0 == 200);
    let during = descriptors(&cluster.node)?;
    ensure!(during < before + 40, "{before} descriptors before, {during} with 200 strangers");
    // They have had their time: it is the others' turn.
    wait_for("an answer to the stranger's neighbor", SOON, || {
        Ok(get(stranger, "/healthz").is_ok_and(|answer| answer.0 == 200).then_some(()))
    })
}

/// A process of the node has millions of addresses of loopback to call from.
#[test]
fn strangers_on_the_node_take_no_more_descriptors_than_others() -> Result<()> {
    let (cluster, port) = open_to_anybody()?;
    let before = descriptors(&cluster.node)?;
    let mut idle = Vec::new();
    for n in 0..600_u16 {
        let [high, low] = n.to_be_bytes();
        let address = SocketAddr::new(Ipv4Addr::new(127, 1, high, low).into(), port);
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(address.ip(), 0).into())?;
        socket.connect(&address.into())?;
        idle.push(socket);
    }
    let another = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
    ensure!(get(another, "/healthz")?.0 == 200);
    let during = descriptors(&cluster.node)?;
    ensure!(during < before + 40, "{before} descriptors before, {during} with 600 strangers");
    Ok(())
}

/// Everybody may scrape, and a look at a pod with many routes takes a while.
#[test]
fn many_who_scrape_without_end_do_not_keep_a_pod_from_the_mesh() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let Cluster { node, server, .. } = &mut cluster;
    let address = free_address()?;
    node.serve_health(address);
    node.start_agent()?;
    node.start_proxy()?;
    node.enroll(server)?;
    server.netns.add_routes(50_000)?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let until = Until(&done);
        for _ in 0..16 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // One beyond those that an address may have is refused.
                    let _refused = get(address, "/metrics");
                }
            });
        }
        assert_has(address, "redirect_pods{state=\"enrolled\",reason=\"pod-label-ambient\"} 1")?;
        let enrolled = node.enroll(&second);
        drop(until);
        enrolled
    })
}

/// A runtime takes `lo` down, and a while later the namespace away.
#[test]
fn namespace_that_is_taken_apart_has_not_drifted() -> Result<()> {
    let mut cluster = Cluster::without_agent(&["--verify-interval", "100ms"])?;
    let address = free_address()?;
    cluster.node.serve_health(address);
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    let Cluster { node, server, .. } = &cluster;
    node.enroll(server)?;
    let complete = |wanted: bool| {
        wait_for("what the kernel has for the pod to change", SOON, || {
            let kernel = node.pod(server)?.and_then(|p| p.kernel);
            Ok(kernel.is_some_and(|k| k.complete == wanted).then_some(()))
        })
    };

    server.netns.ip("link set lo down")?;
    complete(false)?;
    // Some rounds of the timer.
    let drifted = wait_for("drift", Duration::from_secs(1), || {
        let metrics = get(address, "/metrics")?.1;
        let repaired = |l: &&str| l.starts_with("redirect_drift_total{") && !l.ends_with(" 0");
        Ok(metrics.lines().find(repaired).map(str::to_owned))
    });
    assert!(drifted.is_err(), "{drifted:?}");
    assert_has(address, "redirect_reconcile_failures_total 0")?;

    // It was something else: all is put back.
    server.netns.ip("link set lo up")?;
    complete(true)?;
    assert_has(address, "redirect_drift_total{kind=\"route\"} 1")
}

/// Free a moment ago, and nothing else here takes ports of this host.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?.local_addr()?)
}

/// What is counted may be counted a moment later.
pub fn assert_has(address: SocketAddr, line: &str) -> Result<()> {
    let mut last = String::new();
    let found = wait_for(line, SOON, || {
        let (status, text) = get(address, "/metrics")?;
        assert_eq!(status, 200, "{text}");
        let has = text.lines().any(|l| l == line);
        last = text;
        Ok(has.then_some(()))
    });
    found.with_context(|| format!("in\n{last}"))
}

/// The status of an answer, and its body.
pub fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).context("connect to the agent")?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("read an HTTP answer")?;
    let status = head.split(' ').nth(1).context("read a status line")?.parse()?;
    Ok((status, body.to_owned()))
}
