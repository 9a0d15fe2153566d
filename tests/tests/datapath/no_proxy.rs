//! While no proxy listens: first patience, then a refusal, and never a leak.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use redirect_tests::app::{Call, Outcome};
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns};
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::{Attached, wait_for};
use redirect_tests::sniff::{Direction, Sniffer};
use redirect_tests::topology::Pod;

use crate::{PORT, Pair, assert_relayed, echo, service};

both_families! {
    outbound_call_waits_for_a_proxy_that_restarts,
    inbound_call_waits_for_a_proxy_that_restarts,
    outbound_calls_are_refused_without_a_proxy,
    inbound_calls_are_refused_without_a_proxy,
    pod_that_never_had_a_proxy_leaks_nothing,
}

/// What "at once" is, on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(500);
/// The grace of three seconds, and the SYN's next repetition after it.
const GRACE_IS_OVER: Duration = Duration::from_secs(15);

fn outbound_call_waits_for_a_proxy_that_restarts(family: Family) -> Result<()> {
    let pair = Pair::new()?;
    waits(family, &pair, &pair.client, &pair.client.netns, "lo", Via::Outbound)
}

fn inbound_call_waits_for_a_proxy_that_restarts(family: Family) -> Result<()> {
    let pair = Pair::new()?;
    waits(family, &pair, &pair.server, &pair.server.netns, "eth0", Via::Inbound)
}

fn waits(
    family: Family,
    Pair { client, server, topology }: &Pair,
    enrolled: &Pod,
    watched: &Netns,
    interface: &str,
    via: Via,
) -> Result<()> {
    let app = echo(server, family)?;
    let to = server.addr(family, PORT);
    let proxy = PlainProxy::start(&enrolled.netns)?;
    let _attached = Attached::new(topology, enrolled)?;
    Call::to(to).make(&client.netns)?.answer()?;
    wait_for("the first call at the app", AT_ONCE, || {
        Ok((app.accepted().len() == 1).then_some(()))
    })?;

    drop(proxy);
    let sniffer = Sniffer::start(watched, interface)?;
    let (outcome, proxy) = thread::scope(|scope| {
        let calling = scope.spawn(|| Call::to(to).make(&client.netns));
        wait_for("the call's SYN", Duration::from_secs(5), || {
            let syn = sniffer.seen().iter().any(|seen| seen.is_syn() && seen.segment.dst == to);
            Ok(syn.then_some(()))
        })?;
        let proxy = PlainProxy::start(&enrolled.netns)?;
        let outcome = calling.join().map_err(|_| anyhow!("the calling thread panicked"))?;
        Ok::<_, anyhow::Error>((outcome?, proxy))
    })?;

    let answer = outcome.answer()?;
    assert_eq!(answer.by, "server");
    assert_eq!(answer.saw_peer.ip(), client.ip(family));
    assert_eq!(proxy.relayed_via(via).len(), 1);
    assert!(!sniffer.finish().iter().any(|seen| seen.is_rst()), "a RST while the grace lasts");
    Ok(())
}

/// Calls until the grace is over; then every call is refused at once.
fn refused_after_the_grace(client: &Pod, to: SocketAddr) -> Result<()> {
    wait_for("a refusal", GRACE_IS_OVER, || {
        match Call::to(to).within(GRACE_IS_OVER).make(&client.netns)? {
            Outcome::Refused { .. } => Ok(Some(())),
            Outcome::TimedOut => Ok(None),
            other => Err(anyhow!("without a proxy: {other}")),
        }
    })?;
    for outcome in Call::to(to).in_turn(&client.netns, 10)? {
        let after = outcome.refusal()?;
        assert!(after < AT_ONCE, "refused after {after:?}");
    }
    Ok(())
}

fn outbound_calls_are_refused_without_a_proxy(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    // The caller itself listens on the port that it calls.
    let (own, app) = (echo(client, family)?, echo(server, family)?);
    let to = server.addr(family, PORT);
    let proxy = PlainProxy::start(&client.netns)?;
    let _attached = Attached::new(topology, client)?;
    Call::to(to).make(&client.netns)?.answer()?;

    drop(proxy);
    let sniffer = Sniffer::start(topology.node(client.node), &client.host_interface)?;
    refused_after_the_grace(client, to)?;
    refused_after_the_grace(client, SocketAddr::new(service(family).ip(), PORT))?;

    let leaked: Vec<_> = sniffer
        .finish()
        .into_iter()
        .filter(|seen| seen.is_syn() || !seen.segment.payload.is_empty())
        .collect();
    assert!(leaked.is_empty(), "on the wire: {leaked:?}");
    assert_eq!(own.accepted(), []);
    assert_eq!(app.accepted().len(), 1);

    let proxy = PlainProxy::start(&client.netns)?;
    let conversation = Call::to(to).open(&client.netns)?;
    assert_eq!(conversation.answer().by, "server");
    assert_relayed(&proxy, Via::Outbound, &conversation, to)
}

fn inbound_calls_are_refused_without_a_proxy(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let app = echo(server, family)?;
    let to = server.addr(family, PORT);
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    Call::to(to).make(&client.netns)?.answer()?;

    drop(proxy);
    let sniffer = Sniffer::start(topology.node(server.node), &server.host_interface)?;
    refused_after_the_grace(client, to)?;

    // From the pod there is nothing but RSTs.
    let leaked: Vec<_> = sniffer
        .finish()
        .into_iter()
        .filter(|seen| seen.direction == Direction::In && seen.segment.src == to && !seen.is_rst())
        .collect();
    assert!(leaked.is_empty(), "on the wire: {leaked:?}");
    assert_eq!(app.accepted().len(), 1);

    let proxy = PlainProxy::start(&server.netns)?;
    let conversation = Call::to(to).open(&client.netns)?;
    assert_eq!(conversation.answer().by, "server");
    assert_relayed(&proxy, Via::Inbound, &conversation, to)
}

fn pod_that_never_had_a_proxy_leaks_nothing(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let (own, app) = (echo(client, family)?, echo(server, family)?);
    let _attached = (Attached::new(topology, client)?, Attached::new(topology, server)?);
    let sniffer = Sniffer::start(topology.node(client.node), &client.host_interface)?;

    refused_after_the_grace(client, server.addr(family, PORT))?;
    refused_after_the_grace(server, client.addr(family, PORT))?;

    let leaked: Vec<_> = sniffer.finish().into_iter().filter(|seen| seen.is_syn()).collect();
    assert!(leaked.is_empty(), "on the wire: {leaked:?}");
    assert_eq!((own.accepted(), app.accepted()), (vec![], vec![]));
    Ok(())
}
