//! The datapath of `redirect-agent attach` on real packets: the agent's real programs in the
//! namespaces of pods, and a proxy that relays. Every scenario asserts who answered and whom they
//! saw, in both address families.

mod addresses;
mod attack;
mod bad_input;
mod between_pods;
mod clsact;
mod enrollment;
mod first_packets;
mod half_open;
mod held_attacks;
mod identity;
mod idle;
mod isolation;
mod load;
mod no_peer;
mod no_proxy;
mod own_ways;
mod proxy_ports;
mod raw_packets;
mod restart;
mod same_ports;

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use redirect_tests::app::{App, Behaviour, Call, Conversation};
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Relayed, Via};
use redirect_tests::topology::{Pod, Style, Topology};

/// The port that the applications listen on.
const PORT: u16 = 8080;

/// Two pods on two nodes.
struct Pair {
    // Dropped before the topology they are a part of.
    client: Pod,
    server: Pod,
    topology: Topology,
}

impl Pair {
    fn new() -> Result<Self> {
        let mut topology = Topology::new(&[Style::Routed, Style::Bridged])?;
        let client = topology.add_pod(0, "default", "client")?;
        let server = topology.add_pod(1, "default", "server")?;
        Ok(Self { client, server, topology })
    }
}

/// An application of a pod that says the pod's name and echoes.
fn echo(pod: &Pod, family: Family) -> Result<App> {
    App::start(&pod.netns, &pod.name, SocketAddr::new(family.any(), PORT), Behaviour::Echo)
}

/// Checks that the proxy has taken in a conversation, with the addresses that its client and its
/// destination have.
fn assert_relayed(
    proxy: &PlainProxy,
    via: Via,
    conversation: &Conversation,
    destination: SocketAddr,
) -> Result<()> {
    let relayed = proxy.relayed();
    let expected = Relayed { via, peer: conversation.local_addr()?, destination };
    ensure!(relayed.contains(&expected), "the proxy saw {relayed:?}, not {expected:?}");
    Ok(())
}

/// Checks that a new call is answered by `by` directly: it saw the client's very address and port.
fn assert_direct(from: &Pod, to: SocketAddr, by: &str) -> Result<()> {
    let conversation = Call::to(to).open(&from.netns)?;
    let answer = conversation.answer();
    assert_eq!(answer.by, by);
    assert_eq!(answer.saw_peer, conversation.local_addr()?);
    assert_eq!(answer.saw_local, to);
    Ok(())
}

/// Changes a pod's netfilter.
fn iptables(pod: &Pod, family: Family, arguments: &str) -> Result<()> {
    let program = if family == Family::V4 { "iptables" } else { "ip6tables" };
    pod.netns.output(program, &arguments.split(' ').collect::<Vec<_>>()).map(drop)
}

/// An address of a service, which exists nowhere.
fn service(family: Family) -> SocketAddr {
    let ip: IpAddr = match family {
        Family::V4 => IpAddr::from([10, 96, 0, 1]),
        Family::V6 => IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, 1]),
    };
    SocketAddr::new(ip, 80)
}
