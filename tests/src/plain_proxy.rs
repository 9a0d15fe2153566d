//! A proxy in a pod that opens its sockets exactly as ztunnel does but relays everything as
//! plaintext: the datapath can be tested without HBONE, certificates or ZDS.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use redirect_ebpf::abi::{MARK_PROXY, PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND};
use socket2::{Domain, SockRef};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::app::{Accepted, canonical, greeting};
use crate::netns::{Netns, Running};

/// Who answers at port 15008 of a pod with a [`PlainProxy`].
pub const HBONE_NAME: &str = "hbone";

/// The listener that a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Via {
    /// 15001: the pod called somebody.
    Outbound,
    /// 15006: somebody called the pod.
    Inbound,
    /// 15008: another proxy called this one.
    Hbone,
}

/// A connection as the proxy sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Relayed {
    /// The listener it came to.
    pub via: Via,
    /// The client's address.
    pub peer: SocketAddr,
    /// Where the client meant to go.
    pub destination: SocketAddr,
}

/// What the proxy does other than to relay.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Inbound plaintext is accepted and closed without a byte, as ztunnel does under STRICT.
    pub strict: bool,
    /// Services: the virtual address, and the backend that stands for it.
    pub services: HashMap<SocketAddr, SocketAddr>,
}

/// The proxy. Its sockets are closed when it is dropped.
#[derive(Debug)]
pub struct PlainProxy {
    relayed: Arc<Mutex<Vec<Relayed>>>,
    _running: Running,
}

impl PlainProxy {
    /// Starts a proxy that relays.
    pub fn start(netns: &Netns) -> Result<Self> {
        Self::with_policy(netns, Policy::default())
    }

    /// Starts a proxy.
    pub fn with_policy(netns: &Netns, policy: Policy) -> Result<Self> {
        let (started, has_started) = std::sync::mpsc::channel();
        let relayed = Arc::new(Mutex::new(Vec::new()));
        let running = netns.spawn({
            let state = Arc::new(State { relayed: Arc::clone(&relayed), policy });
            move || async move {
                let mut listeners = JoinSet::new();
                for (via, port) in [
                    (Via::Outbound, PORT_OUTBOUND),
                    (Via::Inbound, PORT_INBOUND),
                    (Via::Hbone, PORT_HBONE),
                ] {
                    match listen(port) {
                        Ok(listener) => listeners.spawn(accept(listener, via, Arc::clone(&state))),
                        Err(error) => {
                            let _ = started.send(Err(error));
                            return;
                        }
                    };
                }
                let _ = started.send(Ok(()));
                listeners.join_all().await;
            }
        })?;
        has_started.recv().context("start the proxy")?.context("open the proxy's listeners")?;
        Ok(Self { relayed, _running: running })
    }

    /// The connections it has accepted so far.
    pub fn relayed(&self) -> Vec<Relayed> {
        self.relayed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Those of one listener.
    pub fn relayed_via(&self, via: Via) -> Vec<Relayed> {
        self.relayed().into_iter().filter(|relayed| relayed.via == via).collect()
    }
}

#[derive(Debug)]
struct State {
    relayed: Arc<Mutex<Vec<Relayed>>>,
    policy: Policy,
}

/// As ztunnel's `InPodSocketPortReuseFactory::tcp_bind` and `maybe_set_transparent`
/// (`src/inpod/config.rs`, `src/proxy.rs`).
pub(crate) fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    SockRef::from(&socket).set_mark(MARK_PROXY)?;
    socket.set_reuseport(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    let listener = socket.listen(128)?;
    SockRef::from(&listener).set_ip_transparent_v4(true)?;
    Ok(listener)
}

async fn accept(listener: TcpListener, via: Via, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            continue;
        };
        let _ = stream.set_nodelay(true);
        let Some(destination) = original_destination(&stream) else {
            continue;
        };
        let relayed = Relayed { via, peer: canonical(peer), destination };
        state.relayed.lock().unwrap_or_else(PoisonError::into_inner).push(relayed);
        connections.spawn(relay(stream, relayed, Arc::clone(&state)));
        while connections.try_join_next().is_some() {}
    }
}

/// As ztunnel's `orig_dst_addr_or_default` (`src/socket.rs`): what netfilter says, and where there
/// is none the socket's own address.
pub(crate) fn original_destination(stream: &TcpStream) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())
        .ok()
        .and_then(|addr| addr.as_socket())
        .or_else(|| stream.local_addr().ok())
        .map(canonical)
}

async fn relay(mut client: TcpStream, relayed: Relayed, state: Arc<State>) -> io::Result<()> {
    let Relayed { via, peer, destination } = relayed;
    if via == Via::Hbone {
        let greeting = greeting(HBONE_NAME, Accepted { peer, local: destination });
        return client.write_all(greeting.as_bytes()).await;
    }
    // As ztunnel's `illegal_ports`: a call of the proxy to itself would never end.
    if [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE].contains(&destination.port()) {
        return Ok(());
    }
    let mut server = match via {
        Via::Inbound if state.policy.strict => return Ok(()),
        Via::Inbound => connect(destination, Some(peer.ip())).await?,
        _ => {
            let backend = state.policy.services.get(&destination).copied();
            connect(backend.unwrap_or(destination), None).await?
        }
    };
    server.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

/// As ztunnel's `freebind_connect` (`src/proxy.rs`).
pub(crate) async fn connect(to: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    {
        let socket = SockRef::from(&socket);
        socket.set_mark(MARK_PROXY)?;
        if let Some(source) = source.filter(|source| *source != to.ip()) {
            if socket.domain()? == Domain::IPV4 {
                socket.set_ip_transparent_v4(true)?;
                socket.set_freebind_v4(true)?;
            } else {
                socket.set_ip_transparent_v6(true)?;
                socket.set_freebind_v6(true)?;
            }
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
    }
    socket.connect(to).await
}
