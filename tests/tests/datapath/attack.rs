//! Attacks on the rule that a connection without a peer leaves past the proxy only if it is known to be direct,
//! and connections that this rule must not cut.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use redirect_ebpf::abi::MARK_DIRECT;
use redirect_tests::netns::Family;
use redirect_tests::plain_proxy::{PlainProxy, Via};
use redirect_tests::process::Attached;
use redirect_tests::sniff::Sniffer;
use redirect_tests::sockets::{PATIENCE, bound, converse, defer_accept, listen};
use redirect_tests::topology::Pod;
use rustix::net::connect_unspec;
use socket2::Socket;

use crate::{PORT, Pair, iptables};

const SECRET: &[u8] = b"Authorization: Bearer secret";
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Runs `send`, and checks that no data comes from this very address and port of the pod.
fn assert_nothing_arrives(
    from: SocketAddr,
    to: &Pod,
    watch: Duration,
    send: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let wire = Sniffer::start(&to.netns, "eth0")?;
    send()?;
    thread::sleep(watch);
    let leaked: Vec<_> = wire
        .finish()
        .into_iter()
        .filter(|seen| seen.segment.src == from && !seen.segment.payload.is_empty())
        .collect();
    ensure!(leaked.is_empty(), "past the proxy: {leaked:?}");
    Ok(())
}

/// Needs NET_RAW, and a setting that ends. The record of the path outlives the connection: the socket makes another
/// one with the same addresses and ports, whose SYN never passes the guard.
#[test]
fn record_of_a_former_connection_does_not_open_a_way_past_the_proxy() -> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let target = listen(client, client.addr(family, PORT))?;
        let proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        attached.set(&["--exclude-outbound-ports", &PORT.to_string()])?;
        let own = server.addr(family, 30_000);
        let to = client.addr(family, PORT);
        let socket = bound(server, own)?;
        socket.connect_timeout(&to.into(), PATIENCE).context("connect directly")?;
        let (_, peer) = target.accept()?;
        ensure!(peer == own && proxy.relayed().is_empty(), "it is not direct");
        connect_unspec(&socket).context("disconnect")?;
        attached.again()?;

        socket.connect_timeout(&to.into(), PATIENCE).context("connect by the proxy")?;
        let (_accepted, peer) = target.accept()?;
        ensure!(peer != own && proxy.relayed_via(Via::Outbound).len() == 1, "it is direct");
        ensure!(socket.mark()? == 0);
        // Needs NET_RAW. Binding it to `eth0` does not: then `local default dev eth0` brings it to `lo`.
        socket.set_mark(1)?;
        let mut stream = TcpStream::from(socket);
        assert_nothing_arrives(own, client, Duration::from_secs(1), || {
            Ok(stream.write_all(SECRET)?)
        })?;
    }
    Ok(())
}

/// Apache httpd sets `TCP_DEFER_ACCEPT` (`AcceptFilter http data`): a connection stays half open in the kernel
/// until its client speaks. That is longer than a switch, and the SYN-ACK is not sent again.
#[test]
fn connection_that_waits_for_its_clients_data_survives_the_end_of_the_setting_that_let_it_in()
-> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let _proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        attached.set(&["--exclude-inbound-ports", &PORT.to_string()])?;
        let listener = listen(server, server.addr(family, PORT))?;
        defer_accept(&listener)?;
        let mut opened = client.netns.run(|| Ok(TcpStream::connect(server.addr(family, PORT))?))?;
        thread::sleep(Duration::from_millis(50));
        attached.again()?;
        thread::sleep(Duration::from_millis(100));
        opened.write_all(b"ping").context("write")?;
        let (mut accepted, peer) = listener.accept()?;
        assert_eq!(peer, opened.local_addr()?, "it is not direct");
        let mut heard = [0; 4];
        accepted.read_exact(&mut heard).context("hear")?;
        accepted.write_all(b"pong").context("answer")?;
        opened.set_read_timeout(Some(PATIENCE))?;
        opened.read_exact(&mut heard).context("hear the answer")?;
        converse(&opened, &accepted)?;
    }
    Ok(())
}

/// Adds a rule of the application's to its own table of NAT.
pub fn translate(pod: &Pod, family: Family, rule: &str) -> Result<()> {
    iptables(pod, family, &format!("-t nat -A {rule}"))
}

/// The socket has other addresses and ports than its packets on the wire: the record, which has the socket's,
/// must be found. An init container that redirects a port below 1024 to the application's is common.
#[test]
fn accepted_connection_with_a_translated_port_survives_enrollment() -> Result<()> {
    for family in FAMILIES {
        let pair = &Pair::new()?;
        let rule = "PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080";
        translate(&pair.server, family, rule)?;
        assert_survives_enrollment(pair, &pair.client, 80, &pair.server, family)?;
    }
    Ok(())
}

#[test]
fn opened_connection_with_a_translated_destination_survives_enrollment() -> Result<()> {
    for family in FAMILIES {
        let pair = &Pair::new()?;
        let to = pair.client.addr(family, PORT);
        let rule = format!("OUTPUT -p tcp --dport 81 -j DNAT --to-destination {to}");
        translate(&pair.server, family, &rule)?;
        assert_survives_enrollment(pair, &pair.server, 81, &pair.client, family)?;
    }
    Ok(())
}

/// Calls this port of a pod, which translates it, and enrolls the server of the pair.
fn assert_survives_enrollment(
    pair: &Pair,
    from: &Pod,
    port: u16,
    to: &Pod,
    family: Family,
) -> Result<()> {
    let listener = listen(to, to.addr(family, PORT))?;
    let opened = from.netns.run(|| Ok(TcpStream::connect(to.addr(family, port))?))?;
    let (accepted, _) = listener.accept()?;
    converse(&opened, &accepted).context("before")?;
    let _proxy = PlainProxy::start(&pair.server.netns)?;
    let _attached = Attached::new(&pair.topology, &pair.server)?;
    converse(&opened, &accepted).context("after")
}

/// The same for an excluded connection, when another setting changes.
#[test]
fn excluded_connection_with_a_translated_port_survives_another_setting() -> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let to = client.addr(family, PORT);
        translate(
            server,
            family,
            &format!("OUTPUT -p tcp --dport 81 -j DNAT --to-destination {to}"),
        )?;
        let _proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        attached.set(&["--exclude-outbound-ports", "81,8080"])?;
        let listener = listen(client, to)?;
        let opened = server.netns.run(|| Ok(TcpStream::connect(client.addr(family, 81))?))?;
        let (accepted, peer) = listener.accept()?;
        assert_eq!(peer, opened.local_addr()?, "it is not direct");
        converse(&opened, &accepted).context("before")?;
        attached.set(&["--exclude-outbound-ports", "81,8080,9999"])?;
        converse(&opened, &accepted).context("after a change")?;
        attached.again()?;
        converse(&opened, &accepted).context("after its end")?;
    }
    Ok(())
}

/// What is opened while the settings change: the maps exclude it already, but the routes do not yet.
#[test]
fn connection_opened_while_a_setting_begins_survives_the_end_of_that_setting() -> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let to = client.addr(family, PORT);
        let listener = listen(client, to)?;
        let _proxy = PlainProxy::start(&server.netns)?;
        let attached = Attached::new(topology, server)?;
        let mut direct = Vec::new();
        thread::scope(|scope| -> Result<()> {
            let port = PORT.to_string();
            let attached = &attached;
            let setting = scope.spawn(move || attached.set(&["--exclude-outbound-ports", &port]));
            let began = Instant::now();
            while !setting.is_finished() {
                let opened = server.netns.run(|| Ok(TcpStream::connect(to)?))?;
                let (accepted, peer) = listener.accept()?;
                if peer == opened.local_addr()? {
                    direct.push((began.elapsed(), opened, accepted));
                }
                thread::sleep(Duration::from_millis(10));
            }
            setting.join().map_err(|_| anyhow!("panicked"))?
        })?;
        ensure!(!direct.is_empty(), "none is direct");
        let total = direct.len();
        let mut lost = Vec::new();
        for (at, opened, accepted) in &direct {
            if let Err(error) = converse(opened, accepted) {
                lost.push(format!("{at:?}: {error:#}"));
            }
        }
        ensure!(lost.is_empty(), "of {total}, with the setting: {lost:?}");
        attached.again()?;
        for (at, opened, accepted) in &direct {
            if let Err(error) = converse(opened, accepted) {
                lost.push(format!("{at:?}: {error:#}"));
            }
        }
        ensure!(lost.is_empty(), "of {total}, after it: {lost:?}");
    }
    Ok(())
}

/// Keys for peers that it does not have, until there is no room for the record of its path. No capability.
fn use_up_option_memory(socket: &Socket, family: Family) -> Result<()> {
    // Source: Linux `include/uapi/linux/tcp.h`, `struct tcp_md5sig`: an address, flags, and a key.
    const TCP_MD5SIG: nix::libc::c_int = 14;
    for n in 1u16.. {
        let mut option = [0u8; 216];
        let [hi, lo] = n.to_be_bytes();
        match family {
            Family::V4 => {
                option[..2].copy_from_slice(&(nix::libc::AF_INET as u16).to_ne_bytes());
                option[4..8].copy_from_slice(&[203, 0, hi, lo]);
            }
            Family::V6 => {
                option[..2].copy_from_slice(&(nix::libc::AF_INET6 as u16).to_ne_bytes());
                option[8..10].copy_from_slice(&[0x20, 0x01]);
                option[22..24].copy_from_slice(&[hi, lo]);
            }
        }
        option[130..132].copy_from_slice(&1u16.to_ne_bytes());
        option[136] = 1;
        // SAFETY: the option is as long as is said.
        #[expect(unsafe_code, reason = "nix has no such option")]
        let ret = unsafe {
            nix::libc::setsockopt(
                socket.as_raw_fd(),
                nix::libc::IPPROTO_TCP,
                TCP_MD5SIG,
                option.as_ptr().cast(),
                216,
            )
        };
        if ret != 0 {
            let error = std::io::Error::last_os_error();
            ensure!(error.raw_os_error() == Some(nix::libc::ENOMEM), "key {n}: {error}");
            return Ok(());
        }
    }
    Ok(())
}

/// No capability. A socket whose path cannot be recorded calls the accomplice: the guard drops its SYN, but it
/// goes on waiting. The accomplice calls it, the other way, so both open the connection. Within a minute of the
/// capture, the guard takes the SYN-ACK of that very socket for the answer to a SYN that is older.
#[test]
fn socket_that_opens_a_connection_with_its_caller_does_not_speak_past_the_proxy() -> Result<()> {
    for family in FAMILIES {
        let Pair { client, server, topology } = &Pair::new()?;
        let target = listen(client, client.addr(family, PORT))?;
        let old: Socket =
            server.netns.run(|| Ok(TcpStream::connect(client.addr(family, PORT))?))?.into();
        let _accepted = target.accept()?;
        let proxy = PlainProxy::start(&server.netns)?;
        let _attached = Attached::new(topology, server)?;

        // Another one with the mark of a direct connection, and nothing recorded.
        connect_unspec(&old).context("disconnect")?;
        let here = SocketAddr::new(family.localhost(), 9000);
        old.bind(&here.into())?;
        old.listen(1)?;
        let _self = server.netns.run(|| Ok(TcpStream::connect(here)?))?;
        let (socket, _) = old.accept()?;
        ensure!(socket.mark()? == MARK_DIRECT, "{:#x}", socket.mark()?);
        connect_unspec(&socket).context("disconnect")?;
        use_up_option_memory(&socket, family)?;

        let (own, to) = (server.addr(family, 30_000), client.addr(family, 8443));
        socket.bind(&own.into())?;
        socket.set_nonblocking(true)?;
        let _in_progress = socket.connect(&to.into());
        thread::sleep(Duration::from_millis(50));
        let accomplice = bound(client, to)?;
        let called = accomplice.connect_timeout(&own.into(), PATIENCE);
        if called.is_ok() && proxy.relayed().is_empty() {
            socket.set_nonblocking(false)?;
            let said = converse(&TcpStream::from(socket), &TcpStream::from(accomplice));
            bail!("past the proxy, from {own} to {to}: {said:?}");
        }
    }
    Ok(())
}
