//! Entering and leaving the mesh under live connections.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use redirect_tests::app::{Call, Conversation};
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint, programs};
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::{Attached, succeed, wait_for};
use redirect_tests::topology::Pod;

use crate::{PORT, Pair, assert_direct, assert_relayed, echo};

both_families! {
    connections_to_others_survive_enrollment,
    connections_from_others_survive_enrollment,
    new_calls_succeed_during_enrollment,
    attaching_twice_is_harmless,
    detaching_restores_everything,
    namespace_with_the_number_of_a_dead_one_starts_afresh,
}

/// Says something on a connection, over and over, while `f` runs; what `f` gives, and how often it
/// was said.
fn while_busy<T>(busy: &mut Conversation, f: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let talking = scope.spawn(|| -> Result<usize> {
            let mut said = 0;
            while !done.load(Ordering::Relaxed) {
                busy.exchange(&[b'x'; 4000])?;
                said += 1;
            }
            busy.exchange(b"the end")?;
            Ok(said)
        });
        let outcome = f();
        done.store(true, Ordering::Relaxed);
        let said = talking.join().map_err(|_| anyhow!("the busy connection's thread panicked"))?;
        Ok((outcome?, said.context("talk on the busy connection")?))
    })
}

fn connections_to_others_survive_enrollment(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    survive(family, client, client, server, Via::Outbound, || Attached::new(topology, client))
}

fn connections_from_others_survive_enrollment(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    survive(family, server, client, server, Via::Inbound, || Attached::new(topology, server))
}

fn survive<'a>(
    family: Family,
    enrolled: &Pod,
    client: &Pod,
    server: &Pod,
    via: Via,
    attach: impl FnOnce() -> Result<Attached<'a>>,
) -> Result<()> {
    let to = server.addr(family, PORT);
    let mut idle = Call::to(to).open(&client.netns)?;
    let mut busy = Call::to(to).open(&client.netns)?;
    let proxy = PlainProxy::start(&enrolled.netns)?;

    let (_attached, said) = while_busy(&mut busy, attach)?;

    assert!(said > 0);
    idle.exchange(b"still there?").context("talk on the idle connection")?;
    for pod in [client, server] {
        pod.netns.ip("neigh flush all")?;
    }
    idle.exchange(b"and now?").context("talk after a flush of the neighbours")?;
    assert_eq!(idle.answer().saw_peer, idle.local_addr()?);
    assert_eq!(proxy.relayed(), []);

    let mut new = Call::to(to).open(&client.netns)?;
    new.exchange(b"hello")?;
    assert_eq!(new.answer().by, "server");
    assert_eq!(new.answer().saw_peer.ip(), client.ip(family));
    assert_relayed(&proxy, via, &new, to)?;
    idle.exchange(b"side by side").context("talk beside a captured connection")
}

fn new_calls_succeed_during_enrollment(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let to = server.addr(family, PORT);
    let clients = PlainProxy::start(&client.netns)?;
    let servers = PlainProxy::start(&server.netns)?;
    let done = AtomicBool::new(false);

    let (attached, calls) = thread::scope(|scope| {
        let calling = scope.spawn(|| -> Result<usize> {
            let mut calls = 0;
            while !done.load(Ordering::Relaxed) {
                for outcome in Call::to(to).at_once(&client.netns, 4)? {
                    let answer = outcome.answer()?;
                    assert_eq!(answer.by, "server");
                    assert_eq!(answer.saw_peer.ip(), client.ip(family));
                    calls += 1;
                }
            }
            Ok(calls)
        });
        let attached = Attached::new(topology, client)
            .and_then(|client| Ok((client, Attached::new(topology, server)?)));
        done.store(true, Ordering::Relaxed);
        let calls = calling.join().map_err(|_| anyhow!("the calling thread panicked"))?;
        Ok::<_, anyhow::Error>((attached?, calls?))
    })?;

    assert!(calls > 0);
    let conversation = Call::to(to).open(&client.netns)?;
    assert_relayed(&clients, Via::Outbound, &conversation, to)?;
    assert!(servers.relayed().iter().any(|relayed| relayed.destination == to));
    drop(attached);
    Ok(())
}

fn attaching_twice_is_harmless(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _app = echo(server, family)?;
    let to = server.addr(family, PORT);
    let proxy = PlainProxy::start(&client.netns)?;
    let attached = Attached::new(topology, client)?;
    let mut captured = Call::to(to).open(&client.netns)?;
    let before = footprint(&client.netns)?;

    attached.again()?;

    assert_unchanged(&client.netns, &before)?;
    captured.exchange(b"still there?").context("talk on the captured connection")?;
    let new = Call::to(to).open(&client.netns)?;
    assert_eq!(new.answer().by, "server");
    assert_relayed(&proxy, Via::Outbound, &new, to)
}

fn detaching_restores_everything(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _apps = (echo(client, family)?, echo(server, family)?);
    let to = server.addr(family, PORT);
    // Not the kernel's default: it has to come back.
    server.netns.set_sysctl("net/ipv4/fwmark_reflect", "1")?;
    client.netns.set_sysctl("net/ipv4/tcp_fwmark_accept", "0")?;
    let before = [footprint(&client.netns)?, footprint(&server.netns)?];
    let proxies = (PlainProxy::start(&client.netns)?, PlainProxy::start(&server.netns)?);
    let (clients, servers) = (Attached::new(topology, client)?, Attached::new(topology, server)?);
    let mut redirected = Call::to(to).open(&client.netns)?;
    redirected.exchange(b"hello")?;
    assert_relayed(&proxies.0, Via::Outbound, &redirected, to)?;
    assert_ne!(footprint(&client.netns)?, before[0]);
    assert_ne!(footprint(&server.netns)?, before[1]);
    drop(redirected);

    clients.detach()?;
    servers.detach()?;

    assert_unchanged(&client.netns, &before[0])?;
    assert_unchanged(&server.netns, &before[1])?;
    // The proxies are still there, and get nothing.
    let handed = (proxies.0.relayed().len(), proxies.1.relayed().len());
    assert_direct(client, to, "server")?;
    assert_direct(server, client.addr(family, PORT), "client")?;
    assert_direct(client, SocketAddr::new(family.localhost(), PORT), "client")?;
    assert_eq!((proxies.0.relayed().len(), proxies.1.relayed().len()), handed);
    wait_for("the programs to be gone", Duration::from_secs(5), || {
        let left = [programs(&client.netns)?, programs(&server.netns)?].concat();
        Ok(left.is_empty().then_some(()))
    })
}

/// The kernel gives a new namespace the number of one that is gone, and by that number a pod is known.
/// When it does so is its own matter: here the dead one's traces are given the new one's number.
fn namespace_with_the_number_of_a_dead_one_starts_afresh(family: Family) -> Result<()> {
    let Pair { mut topology, client, server } = Pair::new()?;
    let next = topology.add_pod(1, "default", "next")?;
    let attached = Attached::new(&topology, &server)?;
    let bpffs = attached.bpffs().to_owned();
    let links = |inode: u64| bpffs.join("links").join(inode.to_string());
    let (dead, traces) = (links(server.netns.inode()?), links(next.netns.inode()?));
    // It dies with all that is in it.
    std::mem::forget(attached);
    drop(server);
    fs::rename(&dead, &traces).context("rename the pins")?;
    wait_for("its link to be dead", Duration::from_secs(10), || {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["-j", "link", "show", "pinned"]).arg(traces.join("lookup"));
        let shown = String::from_utf8(succeed(&mut bpftool)?.stdout)?;
        Ok(shown.contains("\"netns_ino\":0").then_some(()))
    })?;
    // All sysctls were 1.
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["map", "update", "pinned"]).arg(bpffs.join("saved_sysctls"));
    let number = u32::try_from(next.netns.inode()?)?.to_ne_bytes();
    bpftool.arg("key").args(number.map(|byte| byte.to_string()));
    bpftool
        .arg("value")
        .args([1_i32; 7].iter().flat_map(|v| v.to_ne_bytes().map(|b| b.to_string())));
    succeed(&mut bpftool)?;
    let before = footprint(&next.netns)?;

    let (_app, proxy) = (echo(&next, family)?, PlainProxy::start(&next.netns)?);
    let attached = Attached::new(&topology, &next)?;
    let to = next.addr(family, PORT);
    let call = Call::to(to).open(&client.netns)?;
    assert_eq!(call.answer().by, "next");
    assert_relayed(&proxy, Via::Inbound, &call, to)?;
    drop(call);
    attached.detach()?;
    assert_unchanged(&next.netns, &before)
}
