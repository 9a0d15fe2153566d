//! Plain TCP sockets in pods, and what two ends of a connection say to each other.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::libc::{self, c_int};
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use socket2::{Domain, Socket, Type};

use crate::netns::Netns;
use crate::topology::Pod;

/// How long an end waits for the other.
pub const PATIENCE: Duration = Duration::from_secs(5);

sockopt_impl!(
    #[doc(hidden)]
    DeferAccept,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    c_int
);

/// A socket of the pod with this address, which it may share.
///
/// # Errors
///
/// The address is not the pod's, or taken by a socket that does not share it.
pub fn bound(pod: &Pod, own: SocketAddr) -> Result<Socket> {
    pod.netns.run(|| {
        let socket = Socket::new(Domain::for_address(own), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&own.into()).with_context(|| format!("bind {own}"))?;
        Ok(socket)
    })
}

/// The same, listening.
///
/// # Errors
///
/// Those of [`bound`].
pub fn listen(pod: &Pod, own: SocketAddr) -> Result<TcpListener> {
    let socket = bound(pod, own)?;
    socket.listen(16)?;
    Ok(socket.into())
}

/// Keeps the listener's connections half open in the kernel until their clients speak.
///
/// # Errors
///
/// The kernel refuses.
pub fn defer_accept(listener: &TcpListener) -> Result<()> {
    setsockopt(listener, DeferAccept, &60).context("set TCP_DEFER_ACCEPT")
}

/// Whether a connection is half open in this namespace.
///
/// # Errors
///
/// The tables of the namespace's sockets cannot be read.
pub fn is_half_open(netns: &Netns) -> Result<bool> {
    // Source: Linux `include/net/tcp_states.h`, TCP_SYN_RECV.
    let half_open = |line: &str| line.split_whitespace().nth(3) == Some("03");
    netns.run(|| {
        for table in ["tcp", "tcp6"] {
            let path = format!("/proc/thread-self/net/{table}");
            let table = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
            if table.lines().any(half_open) {
                return Ok(true);
            }
        }
        Ok(false)
    })
}

/// Both ends speak and hear each other, twice, beginning with the first.
///
/// # Errors
///
/// An end does not hear the other within [`PATIENCE`].
pub fn converse(mut first: &TcpStream, mut second: &TcpStream) -> Result<()> {
    let mut heard = [0; 4];
    for stream in [first, second] {
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    for _ in 0..2 {
        first.write_all(b"ping").context("write")?;
        second.read_exact(&mut heard).context("hear")?;
        second.write_all(b"pong").context("answer")?;
        first.read_exact(&mut heard).context("hear the answer")?;
    }
    Ok(())
}
