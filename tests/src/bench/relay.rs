//! The null proxy: it opens its sockets as ztunnel does, and relays bytes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use redirect_ebpf::abi::{MARK_PROXY, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PORT_PROXY_DNS};
use socket2::SockRef;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};

use super::workload::{ECHO, PORTS};
use crate::netns::{Netns, Running};
use crate::plain_proxy::{connect, listen, original_destination};

/// For bulk.
const BUFFER: usize = 128 * 1024;
/// For single bytes: thousands of connections may be open at once.
const SMALL_BUFFER: usize = 1024;
/// Where a client that knows the proxy connects to instead of the server's port.
pub(super) const EXPLICIT_OFFSET: u16 = 10_000;

/// The proxy; its sockets are closed when it is dropped.
pub(super) struct Relay {
    relayed: Arc<AtomicU64>,
    asked: Arc<AtomicU64>,
    _running: Running,
}

impl Relay {
    /// Starts it in a pod: for redirected connections, or, for a client that connects to it by itself,
    /// with the server's addresses.
    pub(super) fn start(netns: &Netns, server: Option<[IpAddr; 2]>) -> Result<Self> {
        let (started, has_started) = std::sync::mpsc::channel();
        let [relayed, asked] = [(); 2].map(|()| Arc::<AtomicU64>::default());
        let (connections, queries) = (relayed.clone(), asked.clone());
        let running = netns.spawn(move || async move {
            let ports: Vec<u16> = match server {
                None => vec![PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE],
                Some(_) => PORTS.map(|port| port + EXPLICIT_OFFSET).to_vec(),
            };
            let listeners: io::Result<Vec<TcpListener>> = ports.into_iter().map(listen).collect();
            match listeners.and_then(|listeners| Ok((listeners, dns_sockets()?))) {
                Err(error) => {
                    let _ = started.send(Err(error));
                }
                Ok((listeners, sockets)) => {
                    let _ = started.send(Ok(()));
                    let accepting = listeners.into_iter().map(|l| accept(l, server, &connections));
                    let answering = sockets.into_iter().map(|s| answer_queries(s, &queries));
                    let accepting = futures_util::future::join_all(accepting);
                    tokio::join!(accepting, futures_util::future::join_all(answering));
                }
            }
        })?;
        has_started.recv().context("start the relay")?.context("open the relay's listeners")?;
        Ok(Self { relayed, asked, _running: running })
    }

    /// How many connections it has passed on to the server.
    pub(super) fn relayed(&self) -> u64 {
        self.relayed.load(Ordering::Relaxed)
    }

    /// How many queries its DNS has answered.
    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, server: Option<[IpAddr; 2]>, relayed: &Arc<AtomicU64>) {
    loop {
        if let Ok((client, _)) = listener.accept().await {
            tokio::spawn(relay(client, server, relayed.clone()));
        }
    }
}

async fn relay(
    mut client: TcpStream,
    server: Option<[IpAddr; 2]>,
    relayed: Arc<AtomicU64>,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    let Some(to) = original_destination(&client) else { return Ok(()) };
    let to = match server {
        None => to,
        Some([v4, v6]) => {
            let ip = if to.is_ipv4() { v4 } else { v6 };
            SocketAddr::new(ip, to.port() - EXPLICIT_OFFSET)
        }
    };
    let mut server = connect(to, None).await?;
    server.set_nodelay(true)?;
    relayed.fetch_add(1, Ordering::Relaxed);
    let buffer = if to.port() == ECHO { SMALL_BUFFER } else { BUFFER };
    copy_bidirectional_with_sizes(&mut client, &mut server, buffer, buffer).await?;
    Ok(())
}

/// As ztunnel's DNS, on loopback alone.
fn dns_sockets() -> io::Result<Vec<UdpSocket>> {
    let loopbacks = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let sockets = loopbacks.into_iter().map(|ip| {
        let socket = UdpSocket::bind((ip, PORT_PROXY_DNS))?;
        SockRef::from(&socket).set_mark(MARK_PROXY)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    sockets.collect()
}

/// Answers every query with no records, which costs next to nothing.
pub(super) async fn answer_queries(socket: UdpSocket, answered: &AtomicU64) {
    let Ok(socket) = tokio::net::UdpSocket::from_std(socket) else { return };
    let mut message = [0; 512];
    loop {
        let Ok((len, client)) = socket.recv_from(&mut message).await else { continue };
        // QR, the first bit of the flags. Source: RFC 1035, 4.1.1.
        message[2] |= 0x80;
        answered.fetch_add(1, Ordering::Relaxed);
        // A client that is gone wants none.
        let _ = socket.send_to(&message[..len], client).await;
    }
}
