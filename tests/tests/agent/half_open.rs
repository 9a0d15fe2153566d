//! A handshake that began before the capture, and ends after it.

use std::fs;
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use redirect_tests::app::Call;
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns};
use redirect_tests::process::wait_for;

use crate::cluster::{Cluster, Manifest, PORT, SOON, echo};

/// The links of a prepared pod: the lookup, and tcx on `lo`, and in and out of `eth0`.
const PREPARED: usize = 4;

both_families! {
    handshake_from_before_the_capture_completes,
}

/// The SYN-ACK is lost, and sent again when the pod is captured: the guard must not take it for the
/// answer of somebody who has stolen the call from the proxy.
fn handshake_from_before_the_capture_completes(family: Family) -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let app = echo(&cluster.server)?;
    cluster.node.start_agent()?;
    cluster.node.write(&Manifest::of(&cluster.server).mode("ambient"))?;
    let links = cluster.node.links(&cluster.server)?;
    wait_for("all interfaces to be prepared", SOON, || {
        let pins = fs::read_dir(&links).map_or(0, Iterator::count);
        Ok((pins == PREPARED).then_some(()))
    })?;

    let (client, to) = (&cluster.client, cluster.server.addr(family, PORT));
    let node = cluster.topology.node(0);
    let lost = format!("route add blackhole {}", client.ip(family));
    node.ip(&lost)?;
    let answer = thread::scope(|scope| {
        let calling = scope.spawn(|| Call::to(to).within(SOON).make(&client.netns));
        wait_for("half a connection", SOON, || {
            Ok(is_half_open(&cluster.server.netns)?.then_some(()))
        })?;
        cluster.node.start_proxy()?;
        cluster.node.wait_until_enrolled(&cluster.server)?;
        node.ip(&lost.replace("add", "del"))?;
        calling.join().map_err(|_| anyhow!("the calling thread panicked"))??.answer()
    })?;
    // It is older than the capture, so it is direct; the next one is not.
    ensure!(answer.saw_peer.ip() == client.ip(family), "{answer:?}");
    ensure!(app.accepted().len() == 1, "{:?}", app.accepted());
    ensure!(cluster.node.records()?.is_empty(), "{:?}", cluster.node.records()?);
    cluster.node.assert_inbound(client, &cluster.server, family)
}

/// The application's listener has both families, so its connections are in the table of IPv6.
fn is_half_open(netns: &Netns) -> Result<bool> {
    let read = || fs::read_to_string("/proc/thread-self/net/tcp6").context("read the sockets");
    // Source: Linux `include/net/tcp_states.h`, TCP_SYN_RECV.
    let half_open = |line: &str| line.split_whitespace().nth(3) == Some("03");
    Ok(netns.run(read)?.lines().any(half_open))
}
