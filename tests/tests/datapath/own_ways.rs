//! Ways past the proxy by what a pod does to its own network, and what enrollment does to a pod's calls to
//! itself.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use redirect_tests::app::{Call, Outcome};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::PlainProxy;
use redirect_tests::process::Attached;

use crate::{PORT, Pair, echo};

both_families! {
    copies_of_a_pods_packets_do_not_leave_past_the_proxy,
    copies_with_the_proxys_mark_do_not_leave_past_the_proxy,
    copies_on_lo_with_the_proxys_mark_do_not_leave_past_the_proxy,
    packets_of_the_guard_that_get_another_mark_on_lo_do_not_leave_past_the_proxy,
    packets_of_the_guard_that_get_the_proxys_mark_on_lo_do_not_leave_past_the_proxy,
    copies_of_calls_to_the_pod_change_nothing,
    pod_that_calls_itself_is_refused_at_no_moment_of_its_enrollment,
}

const PATIENCE: Duration = Duration::from_secs(3);
const ENROLLMENTS: usize = 5;

fn iptables(pair: &Pair, family: Family, rule: &str) -> Result<()> {
    let program = if family == Family::V4 { "iptables-nft" } else { "ip6tables-nft" };
    let to = pair.client.ip(family).to_string();
    let gateway = if family == Family::V4 { "10.64.1.1" } else { "fd64:1::1" };
    let own = pair.server.ip(family).to_string();
    let rule = rule.replace("PEER", &to).replace("OWN", &own).replace("GATEWAY", gateway);
    let arguments: Vec<&str> = rule.split_whitespace().collect();
    pair.server.netns.output(program, &arguments).map(drop)
}

/// With these rules in the pod, nothing of it reaches the other one but by the proxy.
fn assert_nothing_gets_past(family: Family, rules: &[&str]) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let app = echo(client, family)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    // As pods have it on most nodes: they inherit it.
    server.netns.set_sysctl("net/ipv4/ip_forward", "1")?;
    server.netns.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
    rules.iter().try_for_each(|rule| iptables(&pair, family, rule))?;

    let outcome = Call::to(client.addr(family, PORT)).within(PATIENCE).make(&server.netns)?;

    ensure!(
        app.accepted().len() <= proxy.relayed().len(),
        "past the proxy: {outcome}, {:?}",
        app.accepted()
    );
    Ok(())
}

fn copies_of_a_pods_packets_do_not_leave_past_the_proxy(family: Family) -> Result<()> {
    assert_nothing_gets_past(
        family,
        &[
            "-t mangle -A OUTPUT -p tcp -d PEER -o lo -m mark --mark 0 -j TEE --gateway GATEWAY",
            "-A OUTPUT -p tcp -d PEER -o lo -m mark --mark 0 -j DROP",
        ],
    )
}

fn copies_with_the_proxys_mark_do_not_leave_past_the_proxy(family: Family) -> Result<()> {
    assert_nothing_gets_past(
        family,
        &[
            "-t mangle -A OUTPUT -p tcp -d PEER -o lo -m mark --mark 0 -j MARK --set-mark 0x539",
            "-t mangle -A OUTPUT -p tcp -d PEER -o lo -m mark --mark 0x539 -j TEE --gateway GATEWAY",
            "-A OUTPUT -p tcp -d PEER -o lo -m mark --mark 0x539 -j DROP",
        ],
    )
}

fn copies_on_lo_with_the_proxys_mark_do_not_leave_past_the_proxy(family: Family) -> Result<()> {
    assert_nothing_gets_past(
        family,
        &[
            "-t mangle -A PREROUTING -i lo -p tcp -d PEER -j MARK --set-mark 0x539",
            "-t mangle -A PREROUTING -i lo -p tcp -d PEER -j TEE --gateway GATEWAY",
            "-t mangle -A PREROUTING -i lo -p tcp -d PEER -j DROP",
        ],
    )
}

fn packets_of_the_guard_that_get_the_proxys_mark_on_lo_do_not_leave_past_the_proxy(
    family: Family,
) -> Result<()> {
    assert_nothing_gets_past(
        family,
        &[
            "-t mangle -A OUTPUT -p tcp -d PEER -m mark --mark 0 -j MARK --set-mark 1",
            "-t mangle -A PREROUTING -i lo -j MARK --set-mark 0x539",
        ],
    )
}

fn packets_of_the_guard_that_get_another_mark_on_lo_do_not_leave_past_the_proxy(
    family: Family,
) -> Result<()> {
    assert_nothing_gets_past(
        family,
        &[
            "-t mangle -A OUTPUT -p tcp -d PEER -m mark --mark 0 -j MARK --set-mark 1",
            "-t mangle -A PREROUTING -i lo -j MARK --set-mark 1",
        ],
    )
}

/// A copy leaves while the packet is on its way up.
fn copies_of_calls_to_the_pod_change_nothing(family: Family) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    iptables(
        &pair,
        family,
        "-t mangle -A PREROUTING -i lo -p tcp -d OWN -j TEE --gateway GATEWAY",
    )?;
    let call = Call::to(server.addr(family, PORT)).within(PATIENCE);

    let answer = call.make(&client.netns)?.answer()?;
    assert_eq!(answer.saw_peer.ip(), client.ip(family));
    assert_eq!(proxy.relayed().len(), 1, "{:?}", proxy.relayed());

    call.make(&server.netns)?.answer()?;
    assert_eq!(proxy.relayed().len(), 1, "{:?}", proxy.relayed());
    Ok(())
}

fn pod_that_calls_itself_is_refused_at_no_moment_of_its_enrollment(family: Family) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { server, topology, .. } = &pair;
    let _app = echo(server, family)?;
    let _proxy = PlainProxy::start(&server.netns)?;
    let to: SocketAddr = server.addr(family, PORT);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let calling = scope.spawn(|| -> Result<usize> {
            let mut calls = 0;
            while !over.load(Ordering::Relaxed) {
                for outcome in Call::to(to).in_turn(&server.netns, 100)? {
                    calls += 1;
                    ensure!(matches!(outcome, Outcome::Answered(_)), "call {calls}: {outcome}");
                }
            }
            Ok(calls)
        });
        let enrolled = (0..ENROLLMENTS).try_for_each(|_| {
            let attached = Attached::new(topology, server)?;
            attached.detach()
        });
        over.store(true, Ordering::Relaxed);
        let called = calling.join().map_err(|_| anyhow!("the calling thread panicked"))?;
        enrolled.context("enroll")?;
        called.map(drop)
    })
}
