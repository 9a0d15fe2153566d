//! Sockets in a pod's netns, opened exactly as ztunnel opens them.
//!
//! ztunnel: `src/inpod/config.rs` (`InPodSocketPortReuseFactory`), `src/socket.rs`,
//! `src/proxy.rs` (`freebind_connect`, `maybe_set_transparent`, `DefaultSocketFactory`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tracing::warn;

use super::MARK;

/// As ztunnel (`proxy.rs`, `CONNECTION_TIMEOUT`).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// As ztunnel (`inpod/config.rs`, `tcp_bind`).
const BACKLOG: u32 = 128;
/// As ztunnel (`config.rs`, `SocketConfig`).
const KEEPALIVE: Duration = Duration::from_secs(180);
/// As ztunnel (`config.rs`, `SocketConfig`).
const KEEPALIVE_RETRIES: u32 = 9;

type SocketRequest = (Domain, Type, oneshot::Sender<io::Result<Socket>>);

/// A pod's network namespace, in which sockets can be opened.
///
/// A socket belongs for life to the netns of the thread that created it, so one thread per pod
/// enters the netns, creates sockets on demand and ends with this value. It never goes back, so it
/// cannot fail to.
#[derive(Debug)]
pub(super) struct InPod {
    sockets: mpsc::Sender<SocketRequest>,
}

impl InPod {
    /// Starts the thread that lives in `netns`; an error if that is no network namespace.
    pub(super) async fn enter(netns: OwnedFd) -> io::Result<Self> {
        let (sockets, requests) = mpsc::channel::<SocketRequest>();
        let (entered, result) = oneshot::channel();
        std::thread::Builder::new().name("in-pod".into()).spawn(move || {
            let kind = rustix::thread::LinkNameSpaceType::Network;
            let entering = rustix::thread::move_into_link_name_space(netns.as_fd(), Some(kind));
            drop(netns);
            let alive = entering.is_ok();
            // A receiver that is gone wants no answer, here and below.
            let _ = entered.send(entering);
            if alive {
                for (domain, kind, reply) in requests {
                    let _ = reply.send(open(domain, kind));
                }
            }
        })?;
        match result.await {
            Ok(Ok(())) => Ok(Self { sockets }),
            Ok(Err(errno)) => Err(errno.into()),
            Err(_) => Err(gone()),
        }
    }

    async fn socket(&self, domain: Domain) -> io::Result<TcpSocket> {
        let socket = self.any_socket(domain, Type::STREAM).await?;
        Ok(TcpSocket::from_std_stream(socket.into()))
    }

    async fn any_socket(&self, domain: Domain, kind: Type) -> io::Result<Socket> {
        let (reply, socket) = oneshot::channel();
        self.sockets.send((domain, kind, reply)).map_err(|_| gone())?;
        socket.await.map_err(|_| gone())?
    }

    /// The sockets of the proxy's DNS on loopback, in each family that there is: SO_MARK and
    /// SO_REUSEPORT, and not IP_TRANSPARENT.
    pub(super) async fn dns_sockets(&self, port: u16) -> io::Result<Vec<(UdpSocket, TcpListener)>> {
        let mut sockets = Vec::new();
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let at = SocketAddr::new(ip, port);
            let udp = match self.any_socket(Domain::for_address(at), Type::DGRAM).await {
                Err(e) if e.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => continue,
                socket => socket?,
            };
            udp.set_reuse_port(true)?;
            match udp.bind(&at.into()) {
                // The kernel has IPv6, the pod has not.
                Err(e) if e.raw_os_error() == Some(nix::libc::EADDRNOTAVAIL) => continue,
                bound => bound?,
            }
            let tcp = self.socket(Domain::for_address(at)).await?;
            tcp.set_reuseport(true)?;
            tcp.bind(at)?;
            sockets.push((UdpSocket::from_std(udp.into())?, tcp.listen(BACKLOG)?));
        }
        Ok(sockets)
    }

    /// A UDP socket that talks to `addr` only.
    pub(super) async fn udp(&self, addr: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.any_socket(Domain::for_address(addr), Type::DGRAM).await?;
        socket.connect(&addr.into())?;
        UdpSocket::from_std(socket.into())
    }

    /// Listens on the wildcard address: SO_MARK, SO_REUSEPORT and IP_TRANSPARENT, and not
    /// SO_REUSEADDR; `[::]`, or `0.0.0.0` where the kernel has no IPv6.
    pub(super) async fn listen(&self, port: u16) -> io::Result<TcpListener> {
        let (socket, ip) = match self.socket(Domain::IPV6).await {
            Ok(socket) => (socket, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
            Err(e) if e.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
                (self.socket(Domain::IPV4).await?, IpAddr::from(Ipv4Addr::UNSPECIFIED))
            }
            Err(e) => return Err(e),
        };
        socket.set_reuseport(true)?;
        socket.bind(SocketAddr::new(ip, port))?;
        let listener = socket.listen(BACKLOG)?;
        // The IPv4 option on an IPv6 socket too, as ztunnel: it serves both families.
        SockRef::from(&listener).set_ip_transparent_v4(true)?;
        Ok(listener)
    }

    /// Connects to `addr`, from `source` (which need not be an address of this netns) if given.
    pub(super) async fn connect(
        &self,
        source: Option<IpAddr>,
        addr: SocketAddr,
    ) -> io::Result<TcpStream> {
        let domain = if addr.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = self.socket(domain).await?;
        socket.set_nodelay(true)?;
        keep_alive(&SockRef::from(&socket))?;
        match source {
            // A pod that reaches itself through the mesh: it would be confused to see the same
            // address on both ends with a port it did not open.
            Some(source) if source == addr.ip().to_canonical() => {}
            // What cannot be bound to is not fatal to ztunnel either, a link-local client for one.
            Some(source) => {
                if let Err(error) = bind_transparently(&socket, source) {
                    warn!(%source, %error, "bind to the client's address failed");
                }
            }
            None => {}
        }
        tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(addr))
            .await
            .map_err(|elapsed| io::Error::new(io::ErrorKind::TimedOut, elapsed))?
    }
}

fn bind_transparently(socket: &TcpSocket, source: IpAddr) -> io::Result<()> {
    let options = SockRef::from(socket);
    if source.is_ipv4() {
        options.set_ip_transparent_v4(true)?;
        options.set_freebind_v4(true)?;
    } else {
        options.set_ip_transparent_v6(true)?;
        options.set_freebind_v6(true)?;
    }
    socket.bind(SocketAddr::new(source, 0))
}

fn open(domain: Domain, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(domain, kind.nonblocking(), None)?;
    socket.set_mark(MARK)?;
    Ok(socket)
}

fn gone() -> io::Error {
    io::Error::other("open a socket in the pod's netns: its thread is gone")
}

fn keep_alive(socket: &SockRef<'_>) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE)
        .with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Prepares an accepted connection as ztunnel's listener does.
pub(super) fn prepare_accepted(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    keep_alive(&SockRef::from(stream))
}

/// The address without an IPv4-mapped IPv6 wrapping.
pub(super) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Where the client wanted to go: SO_ORIGINAL_DST, else the socket's own address, as ztunnel.
pub(super) fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let translated = socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())
        .ok()
        .and_then(|addr| addr.as_socket());
    Ok(canonical(match translated {
        Some(addr) => addr,
        None => stream.local_addr()?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::{Netns, TestDir};
    use std::fs::File;

    fn in_new_netns(check: impl AsyncFnOnce(InPod) -> io::Result<()>) {
        let dir = TestDir::new().unwrap();
        let netns = Netns::new(dir.path(), "pod").unwrap();
        let file = File::open(netns.path()).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async { check(InPod::enter(file.into()).await?).await }).unwrap();
    }

    #[test]
    fn listeners_are_marked_transparent_and_shared_and_do_not_reuse_addresses() {
        in_new_netns(async |pod| {
            let listener = pod.listen(15006).await?;
            assert_eq!(listener.local_addr()?, "[::]:15006".parse().unwrap());
            // A second proxy during an upgrade.
            pod.listen(15006).await?;
            let client = pod.connect(None, "127.0.0.1:15006".parse().unwrap()).await?;
            let (accepted, _) = listener.accept().await?;
            assert_eq!(original_destination(&accepted)?, "127.0.0.1:15006".parse().unwrap());
            for socket in [SockRef::from(&listener), SockRef::from(&accepted)] {
                assert_eq!(socket.mark()?, MARK);
                assert!(socket.ip_transparent_v4()?);
                assert!(socket.reuse_port()?);
                assert!(!socket.reuse_address()?);
            }
            assert_eq!(SockRef::from(&client).mark()?, MARK);
            assert!(!SockRef::from(&client).ip_transparent_v4()?);
            Ok(())
        });
    }

    #[test]
    fn a_foreign_source_address_is_bound_to_and_the_own_one_is_not() {
        in_new_netns(async |pod| {
            // Ports of their own: a program that another test is about to start has a copy of the first
            // listener for a moment, which would still share the port.
            let own_and_foreign =
                [(15008, "127.0.0.1", "192.0.2.1"), (15009, "::1", "2001:db8::1")];
            for (port, own, foreign) in own_and_foreign {
                let [own, foreign]: [IpAddr; 2] = [own.parse().unwrap(), foreign.parse().unwrap()];
                let listener = pod.listen(port).await?;
                let addr = SocketAddr::new(own, port);
                let same = pod.connect(Some(own), addr).await?;
                assert_eq!(same.local_addr()?.ip(), own);
                // Nobody routes the answer back, so look at the socket that waits for it.
                let socket = pod.socket(Domain::for_address(addr)).await?;
                bind_transparently(&socket, foreign)?;
                assert_eq!(socket.local_addr()?.ip(), foreign);
                drop(listener);
            }
            Ok(())
        });
    }

    #[test]
    fn what_is_no_netns_cannot_be_entered() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        for file in ["/dev/null", "/proc/self/ns/uts"] {
            let file = File::open(file).unwrap();
            runtime.block_on(InPod::enter(file.into())).unwrap_err();
        }
    }
}
