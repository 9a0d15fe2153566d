//! Conditions that have broken other redirections: reverse-path filters, SYN cookies, reused ports,
//! large segments, many connections.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_tests::app::{App, Behaviour, Call, Outcome};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::Attached;
use redirect_tests::topology::Pod;

use crate::{PORT, Pair, assert_relayed, echo};

both_families! {
    every_reverse_path_filter_lets_mesh_traffic_pass,
    calls_pass_after_a_flush_of_the_neighbours,
    syn_cookies_on_the_clients_side,
    syn_cookies_on_the_servers_side,
    hundred_client_ports_for_a_thousand_outbound_calls,
    hundred_client_ports_for_a_thousand_inbound_calls,
    bulk_transfer_is_byte_exact,
    thousand_outbound_calls_at_once,
    thousand_inbound_calls_at_once,
}

/// Both pods enrolled, each with a proxy; what a scenario asks of them.
fn enrolled(
    family: Family,
    scenario: impl FnOnce(&Pair, &PlainProxy, &PlainProxy) -> Result<()>,
) -> Result<()> {
    let pair = Pair::new()?;
    let _app = echo(&pair.server, family)?;
    let clients = PlainProxy::start(&pair.client.netns)?;
    let servers = PlainProxy::start(&pair.server.netns)?;
    let _client = Attached::new(&pair.topology, &pair.client)?;
    let _server = Attached::new(&pair.topology, &pair.server)?;
    scenario(&pair, &clients, &servers)
}

fn every_reverse_path_filter_lets_mesh_traffic_pass(family: Family) -> Result<()> {
    enrolled(family, |Pair { client, server, .. }, clients, servers| {
        let to = server.addr(family, PORT);
        let mut old = Call::to(to).open(&client.netns)?;
        for (round, filter) in ["0", "1", "2"].into_iter().enumerate() {
            for pod in [client, server] {
                for interface in ["all", "default", "eth0", "lo"] {
                    let sysctl = format!("net/ipv4/conf/{interface}/rp_filter");
                    pod.netns.set_sysctl(&sysctl, filter)?;
                }
                pod.netns.ip("neigh flush all")?;
            }
            let mut new = Call::to(to)
                .open(&client.netns)
                .with_context(|| format!("with rp_filter {filter}"))?;
            new.exchange(b"hello").with_context(|| format!("with rp_filter {filter}"))?;
            old.exchange(b"hello").with_context(|| format!("with rp_filter {filter}"))?;
            assert_eq!(new.answer().by, "server");
            assert_eq!(new.answer().saw_peer.ip(), client.ip(family));
            assert_relayed(clients, Via::Outbound, &new, to)?;
            assert_eq!(servers.relayed_via(Via::Inbound).len(), round + 2);
        }
        Ok(())
    })
}

fn calls_pass_after_a_flush_of_the_neighbours(family: Family) -> Result<()> {
    enrolled(family, |Pair { client, server, topology }, clients, _| {
        let to = server.addr(family, PORT);
        for _ in 0..5 {
            for netns in [&client.netns, &server.netns, topology.node(0), topology.node(1)] {
                netns.ip("neigh flush all")?;
            }
            let conversation = Call::to(to).open(&client.netns)?;
            assert_eq!(conversation.answer().by, "server");
            assert_relayed(clients, Via::Outbound, &conversation, to)?;
        }
        Ok(())
    })
}

fn syn_cookies_on_the_clients_side(family: Family) -> Result<()> {
    enrolled(family, |pair, clients, servers| {
        syn_cookies(family, pair, &pair.client, clients, servers)
    })
}

fn syn_cookies_on_the_servers_side(family: Family) -> Result<()> {
    enrolled(family, |pair, clients, servers| {
        syn_cookies(family, pair, &pair.server, clients, servers)
    })
}

fn syn_cookies(
    family: Family,
    Pair { client, server, .. }: &Pair,
    forced: &Pod,
    clients: &PlainProxy,
    servers: &PlainProxy,
) -> Result<()> {
    forced.netns.set_sysctl("net/ipv4/tcp_syncookies", "2")?;
    let to = server.addr(family, PORT);

    let mut bulk = Call::to(to).open(&client.netns)?;
    bulk.bulk(1 << 20)?;
    all_answered(Call::to(to).in_turn(&client.netns, 99)?, client, to)?;

    assert_eq!(clients.relayed_via(Via::Outbound).len(), 100);
    assert_eq!(servers.relayed_via(Via::Inbound).len(), 100);
    Ok(())
}

fn hundred_client_ports_for_a_thousand_outbound_calls(family: Family) -> Result<()> {
    reused_ports(family, |pair| &pair.client, Via::Outbound)
}

fn hundred_client_ports_for_a_thousand_inbound_calls(family: Family) -> Result<()> {
    reused_ports(family, |pair| &pair.server, Via::Inbound)
}

/// The server closes first, so the TIME_WAIT is where the next SYN of the same ports arrives.
fn reused_ports(family: Family, enrolled: impl Fn(&Pair) -> &Pod, via: Via) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let any = SocketAddr::new(family.any(), PORT);
    let app = App::start(&server.netns, "server", any, Behaviour::CloseFirst)?;
    let proxy = PlainProxy::start(&enrolled(&pair).netns)?;
    let _attached = Attached::new(topology, enrolled(&pair))?;
    for pod in [client, server] {
        pod.netns.set_sysctl("net/ipv4/ip_local_port_range", "40000 40099")?;
    }

    let to = server.addr(family, PORT);
    let outcomes = Call::to(to).until_closed().in_turn(&client.netns, 1000)?;

    all_answered(outcomes, client, to)?;
    assert_eq!(app.accepted().len(), 1000);
    assert_eq!(proxy.relayed_via(via).len(), 1000);
    Ok(())
}

fn bulk_transfer_is_byte_exact(family: Family) -> Result<()> {
    enrolled(family, |Pair { client, server, .. }, clients, _| {
        let to = server.addr(family, PORT);
        let mut conversation = Call::to(to).open(&client.netns)?;
        conversation.bulk(64 << 20)?;
        assert_relayed(clients, Via::Outbound, &conversation, to)
    })
}

fn thousand_outbound_calls_at_once(family: Family) -> Result<()> {
    at_once(family, |pair| &pair.client, Via::Outbound)
}

fn thousand_inbound_calls_at_once(family: Family) -> Result<()> {
    at_once(family, |pair| &pair.server, Via::Inbound)
}

fn at_once(family: Family, enrolled: impl Fn(&Pair) -> &Pod, via: Via) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&enrolled(&pair).netns)?;
    let _attached = Attached::new(topology, enrolled(&pair))?;

    let to = server.addr(family, PORT);
    // The proxy's queue holds 128, as ztunnel's: most SYNs are sent more than once.
    let call = Call::to(to).speaks_first().within(Duration::from_secs(60));
    let outcomes = call.at_once(&client.netns, 1000)?;

    all_answered(outcomes, client, to)?;
    assert_eq!(proxy.relayed_via(via).len(), 1000);
    Ok(())
}

fn all_answered(outcomes: Vec<Outcome>, client: &Pod, to: SocketAddr) -> Result<()> {
    let (mut wrong, total) = (Vec::new(), outcomes.len());
    for outcome in outcomes {
        match outcome {
            Outcome::Answered(answer)
                if answer.by == "server"
                    && [client.v4.into(), client.v6.into()].contains(&answer.saw_peer.ip())
                    && answer.saw_local == to => {}
            other => wrong.push(other),
        }
    }
    let first = wrong.first().map(ToString::to_string).unwrap_or_default();
    ensure!(wrong.is_empty(), "{} of {total} calls went wrong, the first: {first}", wrong.len());
    Ok(())
}
