//! A connection with the very addresses and ports of another one, which is in TIME_WAIT or open.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use redirect_tests::app::{App, Behaviour, Call, Conversation, Outcome};
use redirect_tests::both_families;
use redirect_tests::netns::{Family, Netns};
use redirect_tests::plain_proxy::{PlainProxy, Policy, Relayed, Via};
use redirect_tests::process::{Attached, wait_for};
use redirect_tests::topology::Pod;

use crate::{PORT, Pair, echo};

both_families! {
    ports_of_a_direct_connection_in_time_wait_lead_to_the_proxy,
    ports_of_the_proxys_connection_in_time_wait_lead_to_the_proxy,
    calls_with_one_port_are_direct_and_then_redirected_and_never_lost,
    application_that_begins_to_listen_is_not_reached_past_the_proxy,
    proxy_that_takes_the_port_of_a_direct_connection_is_refused_at_once,
    proxy_that_takes_the_port_of_a_redirected_connection_is_refused_at_once,
}

/// The port that the client calls from.
const CLIENT_PORT: u16 = 40_000;

/// An application that closes first, so that TIME_WAIT is on its side.
fn closes_first(server: &Pod, family: Family) -> Result<App> {
    let any = SocketAddr::new(family.any(), PORT);
    App::start(&server.netns, "server", any, Behaviour::CloseFirst)
}

fn strict(netns: &Netns) -> Result<PlainProxy> {
    PlainProxy::with_policy(netns, Policy { strict: true, ..Policy::default() })
}

/// Waits until a socket of the application is in TIME_WAIT, with this client's port.
fn wait_for_time_wait(netns: &Netns, family: Family, client_port: u16) -> Result<()> {
    let file = match family {
        Family::V4 => "/proc/thread-self/net/tcp",
        Family::V6 => "/proc/thread-self/net/tcp6",
    };
    let (local, remote) = (format!(":{PORT:04X}"), format!(":{client_port:04X}"));
    wait_for("TIME_WAIT", Duration::from_secs(5), || {
        let table = netns.run(|| fs::read_to_string(file).context("read the sockets"))?;
        let found = table.lines().any(|line| {
            let mut columns = line.split_whitespace().skip(1);
            let ends = |column: Option<&str>, end| column.is_some_and(|c| c.ends_with(end));
            ends(columns.next(), &*local)
                && ends(columns.next(), &*remote)
                && columns.next() == Some("06")
        });
        Ok(found.then_some(()))
    })
}

/// Checks that a call with these ports gets to a strict proxy, and not to the application.
fn assert_denied(
    pair: &Pair,
    app: &App,
    proxy: &PlainProxy,
    from: SocketAddr,
    to: SocketAddr,
) -> Result<()> {
    let before = app.accepted().len();
    let outcome = Call::to(to).from(from).make(&pair.client.netns)?;
    assert_eq!(outcome, Outcome::Closed { bytes: 0 });
    let relayed = Relayed { via: Via::Inbound, peer: from, destination: to };
    assert_eq!(proxy.relayed_via(Via::Inbound), [relayed]);
    assert_eq!(app.accepted().len(), before);
    Ok(())
}

fn ports_of_a_direct_connection_in_time_wait_lead_to_the_proxy(family: Family) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let app = closes_first(server, family)?;
    let (from, to) = (client.addr(family, CLIENT_PORT), server.addr(family, PORT));
    let direct = Call::to(to).from(from).until_closed().make(&client.netns)?.answer()?;
    assert_eq!(direct.saw_peer, from);

    let proxy = strict(&server.netns)?;
    let _attached = Attached::new(topology, server)?;

    wait_for_time_wait(&server.netns, family, CLIENT_PORT)?;
    assert_denied(&pair, &app, &proxy, from, to)
}

/// The proxy's own connection to the application comes from the client's address, and so the
/// client may get its port afterwards.
fn ports_of_the_proxys_connection_in_time_wait_lead_to_the_proxy(family: Family) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let app = closes_first(server, family)?;
    let to = server.addr(family, PORT);
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    let proxys = Call::to(to).until_closed().make(&client.netns)?.answer()?.saw_peer;
    drop(proxy);

    let proxy = strict(&server.netns)?;

    wait_for_time_wait(&server.netns, family, proxys.port())?;
    assert_denied(&pair, &app, &proxy, proxys, to)
}

/// Every one of these SYNs meets the TIME_WAIT of the call before it.
fn calls_with_one_port_are_direct_and_then_redirected_and_never_lost(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let app = closes_first(server, family)?;
    let (from, to) = (client.addr(family, CLIENT_PORT), server.addr(family, PORT));
    let proxy = strict(&server.netns)?;
    let done = AtomicBool::new(false);

    let (attached, outcomes) = thread::scope(|scope| {
        let calling = scope.spawn(|| -> Result<Vec<Outcome>> {
            let mut outcomes = Vec::new();
            // One more when it is over.
            let mut last = false;
            while !last {
                last = done.load(Ordering::Relaxed);
                // The client's own end of the call before goes in a moment.
                let outcome = wait_for("the client's port", Duration::from_secs(5), || {
                    match Call::to(to).from(from).until_closed().make(&client.netns) {
                        Err(e) if is_taken(&e) => Ok(None),
                        outcome => outcome.map(Some),
                    }
                });
                outcomes.push(outcome?);
            }
            Ok(outcomes)
        });
        let attached = Attached::new(topology, server);
        done.store(true, Ordering::Relaxed);
        let outcomes = calling.join().map_err(|_| anyhow!("the calling thread panicked"))?;
        Ok::<_, anyhow::Error>((attached?, outcomes?))
    })?;

    let direct = outcomes.iter().take_while(|o| matches!(o, Outcome::Answered(_))).count();
    for outcome in &outcomes[direct..] {
        if *outcome != (Outcome::Closed { bytes: 0 }) {
            bail!("after {direct} direct calls: {outcome}");
        }
    }
    let redirected = outcomes.len() - direct;
    assert!(direct > 0 && redirected > 0, "{direct} direct calls and {redirected} redirected");
    assert_eq!(app.accepted().len(), direct);
    assert_eq!(proxy.relayed_via(Via::Inbound).len(), redirected);
    drop(attached);
    Ok(())
}

/// Whether a call was not made, because a socket of the client has its ports.
fn is_taken(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::AddrNotAvailable)
}

/// Whether somebody listens is asked once, before the kernel looks for a listener itself: whoever
/// begins to listen in between must not be found.
fn application_that_begins_to_listen_is_not_reached_past_the_proxy(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let to = server.addr(family, PORT);
    let proxy = strict(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    let done = AtomicBool::new(false);

    let (refused, reached) = thread::scope(|scope| {
        let listening = scope.spawn(|| {
            server.netns.run(|| {
                let mut reached = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let listener = match TcpListener::bind(SocketAddr::new(family.any(), PORT)) {
                        Ok(listener) => listener,
                        // What is left of the one before goes in a moment.
                        Err(e) if e.kind() == ErrorKind::AddrInUse => {
                            thread::yield_now();
                            continue;
                        }
                        Err(e) => return Err(e.into()),
                    };
                    listener.set_nonblocking(true)?;
                    // As long as a handshake takes.
                    thread::sleep(Duration::from_micros(100));
                    reached.extend(listener.accept().ok().map(|(_, peer)| peer));
                }
                Ok(reached)
            })
        });
        let outcomes: Result<Vec<_>> =
            (0..10).map(|_| Call::to(to).at_once(&client.netns, 100)).collect();
        done.store(true, Ordering::Relaxed);
        let reached = listening.join().map_err(|_| anyhow!("the listening thread panicked"))??;
        let outcomes = outcomes?.into_iter().flatten();
        let refused = outcomes.filter(|o| matches!(o, Outcome::Refused { .. })).count();
        Ok::<_, anyhow::Error>((refused, reached))
    })?;

    // Both have happened: nobody listened, and somebody did.
    assert!(refused > 0 && !proxy.relayed_via(Via::Inbound).is_empty(), "{refused} refused");
    assert_eq!(reached, []);
    Ok(())
}

/// The proxy chooses a port for its connection to the application, which comes from the client's
/// address. That may be one that the client itself uses, because nothing in the pod is bound to it.
fn proxy_that_takes_the_port_of_a_direct_connection_is_refused_at_once(
    family: Family,
) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let _app = echo(server, family)?;
    let (from, to) = (client.addr(family, CLIENT_PORT), server.addr(family, PORT));
    let direct = Call::to(to).from(from).open(&client.netns)?;
    assert_eq!(direct.answer().saw_peer, from);
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;

    assert_refused_while_open(family, &pair, &proxy, direct)
}

fn proxy_that_takes_the_port_of_a_redirected_connection_is_refused_at_once(
    family: Family,
) -> Result<()> {
    let pair = Pair::new()?;
    let Pair { client, server, topology } = &pair;
    let _app = echo(server, family)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    let (from, to) = (client.addr(family, CLIENT_PORT), server.addr(family, PORT));
    let redirected = Call::to(to).from(from).open(&client.netns)?;
    assert_ne!(redirected.answer().saw_peer, from);

    assert_refused_while_open(family, &pair, &proxy, redirected)
}

/// The proxy has only the port of `open` to choose.
fn assert_refused_while_open(
    family: Family,
    Pair { client, server, .. }: &Pair,
    proxy: &PlainProxy,
    mut open: Conversation,
) -> Result<()> {
    let to = server.addr(family, PORT);
    let only = format!("{CLIENT_PORT} {CLIENT_PORT}");
    server.netns.set_sysctl("net/ipv4/ip_local_port_range", &only)?;
    let before = proxy.relayed_via(Via::Inbound).len();

    let called = Instant::now();
    let outcome = Call::to(to).make(&client.netns)?;
    assert_eq!(outcome, Outcome::Closed { bytes: 0 });
    assert!(called.elapsed() < Duration::from_millis(900), "after {:?}", called.elapsed());
    assert_eq!(proxy.relayed_via(Via::Inbound).len(), before + 1);

    open.exchange(b"still there?")?;
    drop(open);
    let answer = wait_for("the port to be free", Duration::from_secs(5), || {
        Ok(Call::to(to).make(&client.netns)?.answer().ok())
    })?;
    assert_eq!(answer.saw_peer.port(), CLIENT_PORT);
    Ok(())
}
