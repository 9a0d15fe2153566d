//! The null proxy: it opens its sockets as ztunnel does, and relays bytes.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use redirect_ebpf::abi::{PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};

use super::workload::PORTS;
use crate::netns::{Netns, Running};
use crate::plain_proxy::{connect, listen, original_destination};

const BUFFER: usize = 128 * 1024;
/// Where a client that knows the proxy connects to instead of the server's port.
pub(super) const EXPLICIT_OFFSET: u16 = 10_000;

/// The proxy; its sockets are closed when it is dropped.
pub(super) struct Relay {
    relayed: Arc<AtomicU64>,
    _running: Running,
}

impl Relay {
    /// Starts it in a pod: for redirected connections, or, for a client that connects to it by itself,
    /// with the server's addresses.
    pub(super) fn start(netns: &Netns, server: Option<[IpAddr; 2]>) -> Result<Self> {
        let (started, has_started) = std::sync::mpsc::channel();
        let relayed = Arc::<AtomicU64>::default();
        let count = relayed.clone();
        let running = netns.spawn(move || async move {
            let ports: Vec<u16> = match server {
                None => vec![PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE],
                Some(_) => PORTS.map(|port| port + EXPLICIT_OFFSET).to_vec(),
            };
            let listeners: io::Result<Vec<TcpListener>> = ports.into_iter().map(listen).collect();
            match listeners {
                Err(error) => {
                    let _ = started.send(Err(error));
                }
                Ok(listeners) => {
                    let _ = started.send(Ok(()));
                    let accepting = listeners.into_iter().map(|l| accept(l, server, &count));
                    futures_util::future::join_all(accepting).await;
                }
            }
        })?;
        has_started.recv().context("start the relay")?.context("open the relay's listeners")?;
        Ok(Self { relayed, _running: running })
    }

    /// How many connections it has passed on to the server.
    pub(super) fn relayed(&self) -> u64 {
        self.relayed.load(Ordering::Relaxed)
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
    copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER, BUFFER).await?;
    Ok(())
}
