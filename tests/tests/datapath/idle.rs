//! Connections that are direct stay so although they have sent nothing yet by which the datapath could know them.

use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context as _, Result};
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::PlainProxy;
use redirect_tests::process::Attached;
use redirect_tests::sockets::{PATIENCE, converse};
use redirect_tests::topology::Pod;
use socket2::{Domain, Socket, Type};

use crate::{PORT, Pair};

both_families! {
    accepted_connection_survives_the_end_of_the_setting_that_let_it_in,
    opened_connection_survives_the_end_of_the_setting_that_let_it_out,
    connections_with_marks_of_the_applications_survive_enrollment,
}

/// As of a VPN.
const MARK: u32 = 1;

/// A connection between two pods on which nobody has spoken; `mark` is that of the sockets.
fn connect(from: &Pod, to: &Pod, family: Family, mark: u32) -> Result<(TcpStream, TcpStream)> {
    let addr = to.addr(family, PORT);
    let socket = || -> Result<Socket> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
        socket.set_mark(mark)?;
        socket.set_reuse_address(true)?;
        Ok(socket)
    };
    let listener: TcpListener = to.netns.run(|| {
        let socket = socket()?;
        socket.bind(&addr.into())?;
        socket.listen(1)?;
        anyhow::Ok(socket.into())
    })?;
    let opened: TcpStream = from.netns.run(|| {
        let socket = socket()?;
        socket.connect_timeout(&addr.into(), PATIENCE).context("connect")?;
        anyhow::Ok(socket.into())
    })?;
    let (accepted, _) = listener.accept().context("accept")?;
    Ok((opened, accepted))
}

fn assert_untouched(proxy: &PlainProxy, accepted: &TcpStream, by: SocketAddr) -> Result<()> {
    assert_eq!(accepted.peer_addr()?, by);
    assert_eq!(proxy.relayed(), []);
    Ok(())
}

fn accepted_connection_survives_the_end_of_the_setting_that_let_it_in(
    family: Family,
) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let proxy = PlainProxy::start(&server.netns)?;
    let attached = Attached::new(topology, server)?;
    for server_first in [false, true] {
        attached.set(&["--exclude-inbound-ports", &PORT.to_string()])?;
        let (opened, accepted) = connect(client, server, family, 0)?;
        attached.again()?;
        let (first, second) =
            if server_first { (&accepted, &opened) } else { (&opened, &accepted) };
        converse(first, second).with_context(|| format!("server first: {server_first}"))?;
        assert_untouched(&proxy, &accepted, opened.local_addr()?)?;
    }
    Ok(())
}

fn opened_connection_survives_the_end_of_the_setting_that_let_it_out(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let proxy = PlainProxy::start(&client.netns)?;
    let attached = Attached::new(topology, client)?;
    for mark in [0, MARK] {
        attached.set(&["--exclude-outbound-ports", &PORT.to_string()])?;
        let (opened, accepted) = connect(client, server, family, mark)?;
        attached.again()?;
        converse(&opened, &accepted).with_context(|| format!("mark {mark}"))?;
        assert_untouched(&proxy, &accepted, opened.local_addr()?)?;
    }
    Ok(())
}

fn connections_with_marks_of_the_applications_survive_enrollment(family: Family) -> Result<()> {
    let Pair { client, server, topology } = &Pair::new()?;
    let pairs = [connect(client, server, family, MARK)?, connect(server, client, family, MARK)?];
    let proxy = PlainProxy::start(&server.netns)?;
    let attached = Attached::new(topology, server)?;
    for (opened, accepted) in &pairs {
        converse(accepted, opened)?;
        assert_untouched(&proxy, accepted, opened.local_addr()?)?;
    }
    // Nor do they become the proxy's when settings change.
    attached.set(&["--exclude-outbound-ports", "9999"])?;
    for (opened, accepted) in &pairs {
        converse(opened, accepted)?;
    }
    attached.detach()?;
    for (opened, accepted) in &pairs {
        converse(opened, accepted)?;
    }
    Ok(())
}
