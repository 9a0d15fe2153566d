//! `sock_diag`: asks the kernel for sockets by their addresses, or ends them. It looks them up as it
//! does for a packet, but in the asking process.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use crate::netns::Netns;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const IPPROTO_TCP: u8 = 6;

/// What to do with a socket. Source: Linux `include/uapi/linux/{sock,inet}_diag.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Shows it: needs no capability.
    Show = 20,
    /// Ends it: needs NET_ADMIN in the socket's namespace.
    Destroy = 21,
}

/// Asks in a namespace for the TCP socket that a packet from `remote` to `local` would find, had it
/// come in on the interface of this index; whether there is one.
pub fn ask(
    netns: &Netns,
    verb: Verb,
    local: SocketAddr,
    remote: SocketAddr,
    interface: u32,
) -> Result<bool> {
    let answer = netns.run(|| {
        let flags = SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::NetlinkSockDiag;
        let diag = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)
            .context("open a netlink socket")?;
        let request = request(verb, local, remote, interface);
        send(diag.as_raw_fd(), &request, MsgFlags::empty()).context("ask for a socket")?;
        let mut answer = vec![0; 4096];
        let length = recv(diag.as_raw_fd(), &mut answer, MsgFlags::empty())
            .context("receive what the kernel says of a socket")?;
        answer.truncate(length);
        Ok(answer)
    })?;
    ensure!(answer.len() >= 20, "the kernel says {answer:?}");
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    match (kind, Errno::from_raw(-error)) {
        (NLMSG_ERROR, Errno::ENOENT) => Ok(false),
        (NLMSG_ERROR, errno) if error != 0 => {
            Err(errno).with_context(|| format!("{verb:?} the socket of {remote} at {local}"))
        }
        _ => Ok(true),
    }
}

/// A `struct nlmsghdr` and a `struct inet_diag_req_v2`.
fn request(verb: Verb, local: SocketAddr, remote: SocketAddr, interface: u32) -> Vec<u8> {
    let mut body = vec![if local.is_ipv4() { 2 } else { 10 }, IPPROTO_TCP, 0, 0];
    body.extend(u32::MAX.to_ne_bytes());
    body.extend(local.port().to_be_bytes());
    body.extend(remote.port().to_be_bytes());
    for ip in [local.ip(), remote.ip()] {
        let mut words = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        words.resize(16, 0);
        body.extend(words);
    }
    body.extend(interface.to_ne_bytes());
    // No cookie.
    body.extend([0xff; 8]);
    let mut request = u32::try_from(16 + body.len()).unwrap_or(0).to_ne_bytes().to_vec();
    request.extend((verb as u16).to_ne_bytes());
    request.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    request
}
