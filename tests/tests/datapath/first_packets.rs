//! The first that comes for a pod is no packet that could be read on its way.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Relayed, Via};
use redirect_tests::process::Attached;
use redirect_tests::raw::{RawClient, RawOutcome, Wire, Wrapping};
use redirect_tests::topology::{Style, Topology};

use crate::{PORT, echo};

both_families! {
    first_packet_that_is_hard_to_read_reaches_the_proxy,
}

const PATIENCE: Duration = Duration::from_secs(5);

fn first_packet_that_is_hard_to_read_reaches_the_proxy(family: Family) -> Result<()> {
    let mut topology = Topology::new(&[Style::Routed])?;
    let pod = topology.add_pod(0, "default", "server")?;
    let _app = echo(&pod, family)?;
    let wire = Wire::open(&topology, &pod)?;
    let ip: IpAddr = match family {
        Family::V4 => [203, 0, 113, 9].into(),
        Family::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 9].into(),
    };
    // The answers' way back is known before it counts.
    pod.netns.run(|| {
        UdpSocket::bind((family.any(), 0))?.send_to(b"", (ip, 9)).context("find the way back")
    })?;
    let destination = pod.addr(family, PORT);
    let hard = |wrapping: &Wrapping| {
        wrapping.valid && ["fragment", "tags"].iter().any(|what| wrapping.name.contains(what))
    };
    let mut wrong = Vec::new();
    for (port, wrapping) in (20_000..).zip(Wrapping::all(family)).filter(|(_, w)| hard(w)) {
        // Whatever was known of the former proxy is gone with it.
        let proxy = PlainProxy::start(&pod.netns)?;
        let attached = Attached::new(&topology, &pod)?;
        let peer = SocketAddr::new(ip, port);
        match RawClient::new(&wire, wrapping, peer, destination).connect(PATIENCE)? {
            RawOutcome::Answered(answer) => {
                ensure!(answer.by == "server" && answer.saw_local == destination, "{answer:?}");
                let relayed = proxy.relayed();
                let expected = Relayed { via: Via::Inbound, peer, destination };
                ensure!(relayed == [expected], "{wrapping:?}: the proxy saw {relayed:?}");
            }
            other => wrong.push(format!("{wrapping:?}: {other:?}")),
        }
        attached.detach()?;
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
