//! Applications that restart, and ports that nobody listens on.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_tests::app::{App, Behaviour, Call};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::Attached;

use crate::{PORT, Pair, assert_relayed, echo};

both_families! {
    app_restarts_while_mesh_connections_to_its_port_are_open,
    app_restarts_while_a_mesh_connection_from_its_port_is_open,
    port_that_nobody_listens_on_refuses_at_once,
    port_of_a_local_listener_refuses_at_once,
}

/// What "at once" is, on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(500);

/// Regression: <https://github.com/istio/istio/issues/52260>, EADDRINUSE.
fn app_restarts_while_mesh_connections_to_its_port_are_open(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let app = echo(server, family)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;
    let to = server.addr(family, PORT);
    // The proxy keeps its end open as long as the client does.
    let mut open = Call::to(to).open(&client.netns)?;
    open.exchange(b"hello")?;
    assert_relayed(&proxy, Via::Inbound, &open, to)?;

    drop(app);
    let _app = echo(server, family).context("bind the port again")?;

    let new = Call::to(to).open(&client.netns)?;
    assert_eq!(new.answer().by, "server");
    assert_eq!(new.answer().saw_peer.ip(), client.ip(family));
    assert_relayed(&proxy, Via::Inbound, &new, to)
}

fn app_restarts_while_a_mesh_connection_from_its_port_is_open(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let _servers = echo(server, family)?;
    let proxy = PlainProxy::start(&client.netns)?;
    let _attached = Attached::new(topology, client)?;
    let to = server.addr(family, PORT);
    let mut open = Call::to(to).from(client.addr(family, PORT)).open(&client.netns)?;
    open.exchange(b"hello")?;
    assert_relayed(&proxy, Via::Outbound, &open, to)?;

    drop(echo(client, family).context("bind the port")?);
    let _app = echo(client, family).context("bind the port again")?;

    open.exchange(b"still there?")?;
    let own = Call::to(client.addr(family, PORT)).open(&server.netns)?;
    assert_eq!(own.answer().by, "client");
    assert_eq!(own.answer().saw_peer.ip(), server.ip(family));
    assert_relayed(&proxy, Via::Inbound, &own, client.addr(family, PORT))
}

fn port_that_nobody_listens_on_refuses_at_once(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;

    for outcome in Call::to(server.addr(family, PORT)).in_turn(&client.netns, 20)? {
        let after = outcome.refusal()?;
        assert!(after < AT_ONCE, "refused after {after:?}");
    }

    assert_eq!(proxy.relayed(), []);
    let _app = echo(server, family)?;
    let conversation = Call::to(server.addr(family, PORT)).open(&client.netns)?;
    assert_eq!(conversation.answer().by, "server");
    assert_relayed(&proxy, Via::Inbound, &conversation, server.addr(family, PORT))
}

/// An application at 127.0.0.1 is nobody to the rest of the world, enrolled or not.
fn port_of_a_local_listener_refuses_at_once(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let local = SocketAddr::new(family.localhost(), PORT);
    let app = App::start(&server.netns, "local", local, Behaviour::Echo)?;
    let proxy = PlainProxy::start(&server.netns)?;
    let _attached = Attached::new(topology, server)?;

    let after = Call::to(server.addr(family, PORT)).make(&client.netns)?.refusal()?;

    assert!(after < AT_ONCE, "refused after {after:?}");
    assert_eq!(proxy.relayed(), []);
    assert_eq!(app.accepted(), []);
    Ok(())
}
