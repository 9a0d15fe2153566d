//! No socket of the application's sits on the proxy's ports by accident.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use redirect_agent::output::PodState;
use redirect_ebpf::abi::{PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PORT_PROXY_DNS};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::topology::Pod;
use socket2::{Domain, Socket, Type};

use crate::cluster::{Cluster, Manifest, echo};

both_families! {
    proxys_ports_are_reserved_until_the_pod_leaves,
    application_takes_every_port_while_the_proxy_is_away,
}

const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";
const RANGE: &str = "net/ipv4/ip_local_port_range";
const OWN: [u16; 4] = [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE, PORT_PROXY_DNS];

/// The ports that the kernel gives to nobody who has not asked for them.
fn reserved(pod: &Pod) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for range in pod.netns.sysctl(RESERVED)?.split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        ports.extend(first.parse::<u16>()?..=last.parse()?);
    }
    Ok(ports)
}

fn proxys_ports_are_reserved_until_the_pod_leaves(family: Family) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    for former in ["", "15006,20000-20002"] {
        cluster.server.netns.set_sysctl(RESERVED, former)?;
        cluster.node.enroll(&cluster.server)?;
        let mut expected: Vec<u16> = [reserved_by(former)?.as_slice(), &OWN].concat();
        expected.sort_unstable();
        expected.dedup();
        ensure!(reserved(&cluster.server)? == expected, "{:?}", reserved(&cluster.server)?);
        // Another agent knows as well what there was before.
        cluster.node.kill_agent()?;
        cluster.node.start_agent()?;
        cluster.node.wait_until_enrolled(&cluster.server)?;
        ensure!(reserved(&cluster.server)? == expected, "{:?}", reserved(&cluster.server)?);
        cluster.assert_redirected(family)?;

        cluster.node.write(&Manifest::of(&cluster.server))?;
        cluster.node.wait_for_state(&cluster.server, PodState::Bypassing)?;
        ensure!(cluster.server.netns.sysctl(RESERVED)? == former);
    }
    Ok(())
}

fn reserved_by(former: &str) -> Result<Vec<u16>> {
    Ok(if former.is_empty() { Vec::new() } else { vec![15006, 20000, 20001, 20002] })
}

/// Sockets of the pod until the kernel has no port for another.
fn take_all(pod: &Pod, kind: Type, family: Family) -> Result<Vec<Socket>> {
    pod.netns.run(|| {
        let any = SocketAddr::new(family.any(), 0);
        let mut sockets = Vec::new();
        loop {
            let socket = Socket::new(Domain::for_address(any), kind, None)?;
            match socket.bind(&any.into()) {
                Err(error) if error.raw_os_error() == Some(nix::libc::EADDRINUSE) => break,
                bound => bound?,
            }
            sockets.push(socket);
        }
        Ok(sockets)
    })
}

/// The ports are all that there are, and the next proxy binds its own all the same.
fn application_takes_every_port_while_the_proxy_is_away(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.assert_redirected(family)?;
    cluster.server.netns.set_sysctl(RANGE, "15000 15060")?;
    cluster.node.kill_proxy()?;
    let kinds = [Type::STREAM, Type::DGRAM];
    let taken = kinds.map(|kind| take_all(&cluster.server, kind, family));
    for sockets in &taken {
        let sockets = sockets.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        ensure!(sockets.len() > 50, "{} are not all", sockets.len());
    }
    cluster.node.start_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.server.netns.set_sysctl(RANGE, "32768 60999")?;
    cluster.assert_redirected(family)?;
    drop(taken);
    Ok(())
}
