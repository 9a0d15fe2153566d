//! A handshake that began before the capture, and ends after it.

use std::thread;

use anyhow::{Result, anyhow, ensure};
use redirect_tests::app::Call;
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::sockets::is_half_open;

use crate::cluster::{Cluster, PORT, SOON, echo};

both_families! {
    handshake_from_before_the_capture_completes,
}

/// The SYN-ACK is lost, and sent again when the pod is captured: the guard must not take it for the
/// answer of somebody who has stolen the call from the proxy.
fn handshake_from_before_the_capture_completes(family: Family) -> Result<()> {
    let mut cluster = Cluster::prepared()?;
    let app = echo(&cluster.server)?;
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
