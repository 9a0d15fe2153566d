//! The first that comes for a pod, or for its new proxy, is a SYN in fragments.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_tests::both_families;
use redirect_tests::hbone::Direction;
use redirect_tests::netns::Family;
use redirect_tests::raw::{RawClient, RawOutcome, Wire, Wrapping};

use crate::cluster::{Cluster, PORT, echo};

both_families! {
    first_syn_in_fragments_reaches_the_proxy,
}

const PATIENCE: Duration = Duration::from_secs(5);

fn first_syn_in_fragments_reaches_the_proxy(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let _app = echo(&cluster.server)?;
    let ip: IpAddr = match family {
        Family::V4 => [203, 0, 113, 9].into(),
        Family::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 9].into(),
    };
    // The answers' way back is known before it counts.
    cluster.server.netns.run(|| {
        UdpSocket::bind((family.any(), 0))?.send_to(b"", (ip, 9)).context("find the way back")
    })?;
    let in_fragments = |wrapping: &&Wrapping| wrapping.valid && wrapping.name.contains("fragments");
    let wrappings = Wrapping::all(family);
    let to = cluster.server.addr(family, PORT);
    for (port, wrapping) in (20_000..).zip(wrappings.iter().filter(in_fragments)) {
        let from = SocketAddr::new(ip, port);
        let wire = Wire::open(&cluster.topology, &cluster.server)?;
        let outcome = RawClient::new(&wire, *wrapping, from, to).connect(PATIENCE)?;
        let answered = matches!(&outcome, RawOutcome::Answered(answer) if answer.by == "server");
        ensure!(answered, "{wrapping:?}: {outcome:?}");
        let records = cluster.node.records()?;
        let seen = records.iter().any(|r| (r.direction, r.src, r.dst) == (INBOUND, from, to));
        ensure!(seen, "{wrapping:?}: the proxy saw {records:?}");
        cluster.node.kill_proxy()?;
        cluster.node.start_proxy()?;
        cluster.node.wait_until_enrolled(&cluster.server)?;
    }
    let status = cluster.node.pod(&cluster.server)?.context("no status")?;
    let refused = status.counters.get("refused_proxy_away").copied().unwrap_or_default();
    ensure!(refused == 0, "{refused} were refused for want of a proxy");
    Ok(())
}

const INBOUND: Direction = Direction::InboundPlaintext;
