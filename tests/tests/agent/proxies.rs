//! A proxy that dies, one that comes back, and two of them during an upgrade.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use redirect_tests::app::{Call, Outcome};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;

use crate::cluster::{Cluster, Node, PORT, SOON, converse, echo, now};
use crate::load::Load;

both_families! {
    calls_wait_for_a_proxy_that_is_killed_and_comes_back,
    calls_are_refused_when_the_proxy_stays_away,
    proxy_is_replaced_under_load,
}

/// How often the pod has held a call back, or refused one, for want of a proxy.
fn counter(node: &Node, pod: &Pod, name: &str) -> Result<u64> {
    let status = node.pod(pod)?.context("the pod is not in status")?;
    Ok(status.counters.get(name).copied().unwrap_or_default())
}

fn calls_wait_for_a_proxy_that_is_killed_and_comes_back(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&["--proxy-grace", "15s"])?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let apps = (echo(server)?, echo(client)?);

    for (from, to) in [(&*client, &*server), (&*server, &*client)] {
        let held = counter(node, server, "dropped_proxy_away")?;
        let since = now()?;
        node.kill_proxy()?;
        let conversation = thread::scope(|scope| {
            let calling = scope.spawn(|| converse(from, to, family));
            wait_for("a call that is held back", SOON, || {
                Ok((counter(node, server, "dropped_proxy_away")? > held).then_some(()))
            })?;
            // It neither reaches the application nor is it refused.
            assert!(!calling.is_finished());
            node.start_proxy()?;
            calling.join().map_err(|_| anyhow!("the caller panicked"))?
        })?;
        let records = node.records_of(&conversation, since)?;
        ensure!(records.len() == 1, "the proxy has seen {records:?}");
    }
    assert_eq!((apps.0.accepted().len(), apps.1.accepted().len()), (1, 1));
    assert_eq!(counter(node, server, "refused_proxy_away")?, 0);
    Ok(())
}

fn calls_are_refused_when_the_proxy_stays_away(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&["--proxy-grace", "500ms"])?;
    let apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.assert_redirected(family)?;
    let seen = |app: &redirect_tests::app::App| app.accepted().len();
    assert_eq!((seen(&apps.0), seen(&apps.1)), (1, 1));
    cluster.node.kill_proxy()?;

    for (from, to) in [(&cluster.client, &cluster.server), (&cluster.server, &cluster.client)] {
        let call = Call::to(to.addr(family, PORT));
        wait_for("a refusal", SOON, || {
            let outcome = call.make(&from.netns)?;
            ensure!(!matches!(outcome, Outcome::Answered(_)), "past the proxy, {outcome}");
            Ok(matches!(outcome, Outcome::Refused { .. }).then_some(()))
        })?;
        for outcome in call.in_turn(&from.netns, 5)? {
            let after = outcome.refusal()?;
            assert!(after < Duration::from_secs(1), "refused only after {after:?}");
        }
    }
    assert_eq!((seen(&apps.0), seen(&apps.1)), (1, 1));
    let status = cluster.node.status()?;
    assert_eq!(status.proxies, 0);

    cluster.node.start_proxy()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.assert_redirected(family)
}

/// As a DaemonSet with `maxSurge` does it: the new one is ready before the old one is asked to end.
fn proxy_is_replaced_under_load(family: Family) -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);

    let load = Load::between(client, server, &[family]).while_proxies_end(3);
    load.during(|| {
        for _ in 0..3 {
            node.start_proxy()?;
            wait_for("both proxies in status", SOON, || {
                Ok((node.status()?.proxies == 2).then_some(()))
            })?;
            let mut old = node.take_proxy()?;
            let mut open = converse(client, server, family)?;
            open.exchange(b"hello")?;
            old.signal(Signal::SIGTERM)?;
            open.exchange(b"the old one drains, or it was the new one's")?;
            drop(open);
            old.terminate(SOON)?;
            node.assert_inbound(client, server, family)?;
            node.assert_outbound(server, client, family)?;
            wait_for("one proxy in status", SOON, || {
                Ok((node.status()?.proxies == 1).then_some(()))
            })?;
            node.wait_until_enrolled(server)?;
        }
        Ok(())
    })?;
    Ok(())
}
