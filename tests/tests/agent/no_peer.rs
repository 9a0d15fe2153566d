//! A connection that the former proxy has closed, and the application has not, when an annotation changes.

use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::libc::{self, c_int};
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use redirect_ebpf::abi::MARK_DIRECT;
use redirect_tests::app::Call;
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::sniff::Sniffer;
use rustix::net::connect_unspec;
use socket2::Socket;

use crate::cgroup::{Cgroup, shell_in, unified};
use crate::cluster::{Cluster, PORT, echo};
use crate::probes::{Kubelet, wait_until_followed};

both_families! {
    what_the_former_proxy_has_closed_does_not_leave_past_the_next_when_an_annotation_changes,
}

fn what_the_former_proxy_has_closed_does_not_leave_past_the_next_when_an_annotation_changes(
    family: Family,
) -> Result<()> {
    let cgroup = Cgroup::new(&unified()?, "ztunnel")?;
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy_in(&cgroup)?;
    let _app = echo(&cluster.client)?;
    cluster.node.enroll(&cluster.server)?;
    let pooled = Call::to(cluster.client.addr(family, PORT)).open(&cluster.server.netns)?;
    let (own, peer) = (pooled.local_addr()?, pooled.peer_addr()?);
    // A rollout.
    cluster.node.start_proxy_in(&cgroup)?;
    cluster.node.kill_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    let Cluster { node, server, client, .. } = &cluster;
    node.change_a_setting(server)?;
    let wire = Sniffer::start(&client.netns, "eth0")?;
    let mut stream = pooled.into_stream();
    let _reset = stream.write_all(b"GET /two, Bearer secret").context("write");
    thread::sleep(Duration::from_secs(1));
    let seen = wire.finish();
    let leaked: Vec<_> = seen.iter().filter(|seen| seen.is_between(own, peer)).collect();
    ensure!(leaked.is_empty(), "past the proxy: {leaked:?}");
    Ok(())
}

// Source: Linux `include/uapi/linux/in6.h`.
const IPV6_MINHOPCOUNT: c_int = 73;
sockopt_impl!(MinHops, SetOnly, libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT, c_int);

/// The application takes the socket of a probe, calls itself with it from the address of an accomplice
/// (which needs no capability), and keeps the other end.
#[test]
fn socket_of_a_probe_does_not_open_a_way_past_the_proxy() -> Result<()> {
    let family = Family::V6;
    let mut cluster = Cluster::without_agent(&[])?;
    cluster.node.use_node_network(cluster.topology.node(0));
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    cluster.node.enroll(&cluster.server)?;
    let Cluster { server, client, topology, .. } = &cluster;
    let kubelet = Kubelet::start(&cluster, "kubelet.service")?;
    wait_until_followed(&cluster, &kubelet)?;

    let port = server.netns.run(|| Ok(TcpListener::bind(server.addr(family, 9002))?))?;
    let script =
        format!("exec timeout 20 bash -c 'exec 3<>/dev/tcp/{}/9002 && cat <&3'", server.ip(family));
    let mut probe = shell_in(kubelet.cgroup()?, Some(topology.node(0)), &script);
    let probe = thread::spawn(move || probe.output());
    let old: Socket = port.accept().context("accept the probe")?.0.into();
    ensure!(old.mark()? == MARK_DIRECT, "{:#x}", old.mark()?);
    connect_unspec(&old).context("disconnect")?;
    probe.join().map_err(|_| anyhow!("the probe panicked"))??;

    old.set_freebind_v6(true)?;
    old.bind(&client.addr(family, 8443).into())?;
    let listener = server.netns.run(|| Ok(TcpListener::bind(server.addr(family, 9000))?))?;
    let second = Duration::from_secs(1);
    old.connect_timeout(&server.addr(family, 9000).into(), second).context("call itself")?;
    let (mut stream, _) = listener.accept().context("accept")?;
    setsockopt(&stream.as_fd(), MinHops, &200)?;
    old.set_linger(Some(Duration::ZERO))?;
    drop(old);
    let wire = Sniffer::start(&client.netns, "eth0")?;
    stream.write_all(b"plaintext")?;
    thread::sleep(second);
    let leaked: Vec<_> =
        wire.finish().into_iter().filter(|seen| seen.segment.payload == b"plaintext").collect();
    ensure!(leaked.is_empty(), "past the proxy: {leaked:?}");
    Ok(())
}
