//! Packets that no kernel sends: whatever a segment is wrapped in, it does not reach an application
//! of an enrolled pod past the proxy.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_tests::app::{App, Call, canonical};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Policy, Relayed, Via};
use redirect_tests::process::{Attached, wait_for};
use redirect_tests::raw::{RawClient, RawOutcome, Wire, Wrapping};
use redirect_tests::topology::{Pod, Style, Topology};

use crate::{PORT, echo};

both_families! {
    every_wrapping_is_what_it_claims_to_be,
    every_wrapping_reaches_the_app_through_the_proxy_or_not_at_all,
    no_wrapping_gets_past_a_strict_proxy,
    no_wrapping_gets_past_a_strict_proxy_where_the_kernel_takes_more,
    odd_mac_addresses_get_nothing_past_a_strict_proxy,
    no_wrapping_gets_past_a_proxy_that_is_away,
    fragments_do_not_profit_from_a_refusal_before_them,
}

/// How long an answer may take that is expected.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for an answer that is not to come.
const LITTLE_PATIENCE: Duration = Duration::from_millis(250);

/// A client that does not exist; the number keeps it apart from others.
fn client(family: Family, number: usize) -> SocketAddr {
    let ip: IpAddr = match family {
        Family::V4 => IpAddr::from([203, 0, 113, 9]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9]),
    };
    SocketAddr::new(ip, u16::try_from(20_000 + number).unwrap_or(u16::MAX))
}

fn pod(style: Style) -> Result<(Pod, Topology)> {
    let mut topology = Topology::new(&[style])?;
    Ok((topology.add_pod(0, "default", "server")?, topology))
}

/// Connects in every wrapping, and gives what came of it with the client's address. `patience` is
/// for those that are valid.
fn connect_all(
    family: Family,
    topology: &Topology,
    pod: &Pod,
    patience: Duration,
) -> Result<Vec<(Wrapping, SocketAddr, RawOutcome)>> {
    let to = pod.addr(family, PORT);
    let wire = Wire::open(topology, pod)?;
    // The answers' way back is known before it counts.
    pod.netns.block_on(|| async {
        let _ = tokio::net::UdpSocket::bind(SocketAddr::new(family.any(), 0))
            .await?
            .send_to(b"", client(family, 0))
            .await;
        Ok(())
    })?;
    Wrapping::all(family)
        .into_iter()
        .enumerate()
        .map(|(number, wrapping)| {
            let from = client(family, number);
            let outcome = RawClient::new(&wire, wrapping, from, to)
                .connect(if wrapping.valid { patience } else { LITTLE_PATIENCE })
                .with_context(|| format!("connect in wrapping {wrapping:?}"))?;
            Ok((wrapping, from, outcome))
        })
        .collect()
}

/// Whom the application has accepted by now: an own call of the pod comes after all of them.
fn accepted(family: Family, pod: &Pod, app: &App) -> Result<Vec<SocketAddr>> {
    let control = Call::to(SocketAddr::new(family.localhost(), PORT)).open(&pod.netns)?;
    let control = control.local_addr()?;
    wait_for("the control call", Duration::from_secs(5), || {
        let accepted: Vec<_> = app.accepted().iter().map(|seen| canonical(seen.peer)).collect();
        Ok(accepted.strip_suffix(&[control]).map(<[_]>::to_vec))
    })
}

/// Without redirection: the valid ones reach the application, the others do not. So the scenarios
/// below are about packets that would get through.
fn every_wrapping_is_what_it_claims_to_be(family: Family) -> Result<()> {
    for style in [Style::Routed, Style::Bridged] {
        let (pod, topology) = pod(style)?;
        let app = echo(&pod, family)?;

        let outcomes = connect_all(family, &topology, &pod, PATIENCE)?;

        for (wrapping, from, outcome) in &outcomes {
            match outcome {
                RawOutcome::Answered(answer) => {
                    assert!(wrapping.valid, "{wrapping:?} was answered");
                    assert_eq!(answer.by, "server", "{wrapping:?}");
                    assert_eq!(answer.saw_peer, *from, "{wrapping:?}");
                }
                other => assert!(!wrapping.valid, "{wrapping:?}: {other:?}"),
            }
        }
        let valid = outcomes.iter().filter(|(wrapping, ..)| wrapping.valid).count();
        assert_eq!(accepted(family, &pod, &app)?.len(), valid);
    }
    Ok(())
}

fn every_wrapping_reaches_the_app_through_the_proxy_or_not_at_all(family: Family) -> Result<()> {
    let (pod, topology) = pod(Style::Routed)?;
    let app = echo(&pod, family)?;
    let proxy = PlainProxy::start(&pod.netns)?;
    let _attached = Attached::new(&topology, &pod)?;

    let outcomes = connect_all(family, &topology, &pod, PATIENCE)?;

    let relayed = proxy.relayed();
    for (wrapping, from, outcome) in &outcomes {
        let destination = pod.addr(family, PORT);
        let passed = relayed.contains(&Relayed { via: Via::Inbound, peer: *from, destination });
        match outcome {
            RawOutcome::Answered(answer) => {
                assert!(passed, "{wrapping:?} was answered past the proxy");
                assert_eq!(answer.by, "server", "{wrapping:?}");
                assert_eq!(answer.saw_peer.ip(), from.ip(), "{wrapping:?}");
            }
            other => assert!(!wrapping.valid, "{wrapping:?}: {other:?}"),
        }
    }
    assert_eq!(accepted(family, &pod, &app)?.len(), relayed.len());
    Ok(())
}

fn no_wrapping_gets_past_a_strict_proxy(family: Family) -> Result<()> {
    for style in [Style::Routed, Style::Bridged] {
        let (pod, topology) = pod(style)?;
        let app = echo(&pod, family)?;
        let policy = Policy { strict: true, ..Policy::default() };
        let proxy = PlainProxy::with_policy(&pod.netns, policy)?;
        let _attached = Attached::new(&topology, &pod)?;

        let outcomes = connect_all(family, &topology, &pod, PATIENCE)?;

        for (wrapping, _, outcome) in &outcomes {
            let expected = if wrapping.valid { &RawOutcome::Accepted } else { outcome };
            assert_eq!(outcome, expected, "{wrapping:?}");
            assert!(!matches!(outcome, RawOutcome::Answered(_)), "{wrapping:?} was answered");
        }
        assert_eq!(accepted(family, &pod, &app)?, []);
        let valid = outcomes.iter().filter(|(wrapping, ..)| wrapping.valid).count();
        assert_eq!(proxy.relayed_via(Via::Inbound).len(), valid);
    }
    Ok(())
}

/// What the kernel drops by itself unless it is told otherwise: routes of the sender's, the pod's own
/// addresses and loopback from outside, and data in a SYN.
fn no_wrapping_gets_past_a_strict_proxy_where_the_kernel_takes_more(family: Family) -> Result<()> {
    let (pod, topology) = pod(Style::Routed)?;
    for (sysctl, value) in [
        ("net/ipv4/conf/all/accept_source_route", "1"),
        ("net/ipv4/conf/eth0/accept_source_route", "1"),
        ("net/ipv4/conf/all/accept_local", "1"),
        ("net/ipv4/conf/all/route_localnet", "1"),
        ("net/ipv6/conf/all/accept_source_route", "1"),
        ("net/ipv6/conf/eth0/accept_source_route", "1"),
        ("net/ipv6/conf/all/seg6_enabled", "1"),
        ("net/ipv6/conf/eth0/seg6_enabled", "1"),
        // A server without cookies, on every listener.
        ("net/ipv4/tcp_fastopen", "1539"),
    ] {
        pod.netns.set_sysctl(sysctl, value)?;
    }
    let app = echo(&pod, family)?;
    let proxy = PlainProxy::with_policy(&pod.netns, Policy { strict: true, ..Policy::default() })?;
    let _attached = Attached::new(&topology, &pod)?;

    for (wrapping, _, outcome) in connect_all(family, &topology, &pod, PATIENCE)? {
        assert!(!matches!(outcome, RawOutcome::Answered(_)), "{wrapping:?} was answered");
    }

    assert_eq!(accepted(family, &pod, &app)?, []);
    assert!(!proxy.relayed_via(Via::Inbound).is_empty());
    Ok(())
}

fn odd_mac_addresses_get_nothing_past_a_strict_proxy(family: Family) -> Result<()> {
    let (pod, topology) = pod(Style::Routed)?;
    let app = echo(&pod, family)?;
    let proxy = PlainProxy::with_policy(&pod.netns, Policy { strict: true, ..Policy::default() })?;
    let _attached = Attached::new(&topology, &pod)?;
    let (pods, own) = Wire::open(&topology, &pod)?.macs();
    let (broadcast, multicast) = ([0xff; 6], [0x01, 0, 0x5e, 0, 0, 1]);
    let (multicast_v6, somebody) = ([0x33, 0x33, 0, 0, 0, 1], [2, 0, 0, 0, 0, 9]);
    let plain = *Wrapping::all(family).first().context("find the plain wrapping")?;

    let macs = [
        (broadcast, own),
        (multicast, own),
        (multicast_v6, own),
        (somebody, own),
        ([0; 6], own),
        (pods, broadcast),
        (pods, multicast),
        (pods, pods),
        (pods, [0; 6]),
        (own, pods),
    ];
    for (number, (to, from)) in macs.into_iter().enumerate() {
        let wire = Wire::open(&topology, &pod)?.with_macs(to, from);
        let outcome = RawClient::new(&wire, plain, client(family, number), pod.addr(family, PORT))
            .connect(LITTLE_PATIENCE)?;
        assert!(!matches!(outcome, RawOutcome::Answered(_)), "{to:x?} from {from:x?} was answered");
    }

    assert_eq!(accepted(family, &pod, &app)?, []);
    // Who sends is nobody's business.
    assert!(!proxy.relayed_via(Via::Inbound).is_empty());
    Ok(())
}

fn no_wrapping_gets_past_a_proxy_that_is_away(family: Family) -> Result<()> {
    let (pod, topology) = pod(Style::Routed)?;
    let app = echo(&pod, family)?;
    let _attached = Attached::new(&topology, &pod)?;

    for (wrapping, _, outcome) in connect_all(family, &topology, &pod, LITTLE_PATIENCE)? {
        assert!(
            matches!(outcome, RawOutcome::Refused | RawOutcome::Silence),
            "{wrapping:?}: {outcome:?}"
        );
    }

    assert_eq!(accepted(family, &pod, &app)?, []);
    Ok(())
}

/// A SYN to a closed port makes the kernel look for a listener by itself; that must not open the
/// way for a packet of the same addresses and ports which cannot be read.
fn fragments_do_not_profit_from_a_refusal_before_them(family: Family) -> Result<()> {
    let (pod, topology) = pod(Style::Routed)?;
    let proxy = PlainProxy::with_policy(&pod.netns, Policy { strict: true, ..Policy::default() })?;
    let _attached = Attached::new(&topology, &pod)?;
    let wire = Wire::open(&topology, &pod)?;
    let wrappings = Wrapping::all(family);
    let plain = *wrappings.first().context("find the plain wrapping")?;

    for (number, wrapping) in wrappings.into_iter().enumerate().filter(|(_, w)| w.valid) {
        let (from, to) = (client(family, number), pod.addr(family, PORT));
        let refused = RawClient::new(&wire, plain, from, to).connect(PATIENCE)?;
        assert_eq!(refused, RawOutcome::Refused);
        let app = echo(&pod, family)?;
        let outcome = RawClient::new(&wire, wrapping, from, to).connect(PATIENCE)?;
        assert_eq!(outcome, RawOutcome::Accepted, "{wrapping:?}");
        assert_eq!(accepted(family, &pod, &app)?, [], "{wrapping:?}");
    }

    assert!(!proxy.relayed_via(Via::Inbound).is_empty());
    Ok(())
}
