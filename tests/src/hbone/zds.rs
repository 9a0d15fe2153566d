//! ZDS as the proxy speaks it: the messages, and packets with a netns fd on a SOCK_SEQPACKET socket.
//!
//! Written from ztunnel's `proto/zds.proto`, `src/inpod/protocol.rs` and `src/inpod/packet.rs`, and
//! deliberately not shared with the agent: two independent readings of the protocol check each other.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, bail};
use prost::Message;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// The longest message that ztunnel reads, in bytes (`inpod/protocol.rs`, `read_message`).
pub const MAX_MESSAGE: usize = 1024;

/// The protocol's version, in the proxy's hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Version {
    /// Never sent.
    NotUsed = 0,
    /// The only version there is.
    V1 = 1,
}

/// The proxy's first packet on a connection.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ZdsHello {
    /// A [`Version`].
    #[prost(enumeration = "Version", tag = "1")]
    pub version: i32,
}

/// Who a workload is.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct WorkloadInfo {
    /// The pod's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The pod's namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// The pod's service account.
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// Start a workload's proxy; the packet carries the fd of the workload's netns.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct AddWorkload {
    /// The pod's Kubernetes UID.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Who it is; its absence ends ztunnel.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
}

/// Stop a workload's proxy.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DelWorkload {
    /// The pod's Kubernetes UID.
    #[prost(string, tag = "2")]
    pub uid: String,
}

/// Every workload of the node has been sent.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SnapshotSent {}

/// Keep a workload that the agent holds no netns fd for; only before [`SnapshotSent`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct KeepWorkload {
    /// The pod's Kubernetes UID.
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// One packet from the agent to the proxy.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WorkloadRequest {
    /// What is asked for.
    #[prost(oneof = "Payload", tags = "1, 2, 3, 5")]
    pub payload: Option<Payload>,
}

/// What a [`WorkloadRequest`] asks for.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Payload {
    /// Start a proxy.
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    /// Stop a proxy.
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    /// The snapshot is complete.
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    /// Keep a proxy.
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
}

/// The proxy's answer to one request.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Ack {
    /// Empty when all is well.
    #[prost(string, tag = "1")]
    pub error: String,
}

/// One packet from the proxy to the agent, after its hello.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WorkloadResponse {
    /// The answer.
    #[prost(oneof = "Answer", tags = "1")]
    pub payload: Option<Answer>,
}

/// What a [`WorkloadResponse`] says.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Answer {
    /// Done, or why not.
    #[prost(message, tag = "1")]
    Ack(Ack),
}

/// What the agent asked for, its netns fd at hand.
#[derive(Debug)]
pub enum Request {
    /// Start a proxy for this workload in this netns.
    Add {
        /// The pod's Kubernetes UID.
        uid: String,
        /// Who it is.
        info: Option<WorkloadInfo>,
        /// What the agent says is its netns.
        netns: OwnedFd,
    },
    /// Keep this workload's proxy.
    Keep(String),
    /// Stop this workload's proxy.
    Del(String),
    /// The snapshot is complete.
    SnapshotSent,
}

/// One ZDS connection, seen from the proxy.
#[derive(Debug)]
pub struct Connection(UnixStream);

impl Connection {
    /// Connects to the agent's socket at `path`.
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )?;
        let connected = rustix::net::connect(&socket, &SocketAddrUnix::new(path)?);
        let stream = UnixStream::from_std(std::os::unix::net::UnixStream::from(socket))?;
        match connected {
            Ok(()) => Ok(Self(stream)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INPROGRESS) => {
                stream.writable().await?;
                match stream.take_error()? {
                    Some(error) => Err(error),
                    None => Ok(Self(stream)),
                }
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Announces the proxy.
    pub async fn send_hello(&self) -> io::Result<()> {
        send(&self.0, &ZdsHello { version: Version::V1 as i32 }.encode_to_vec(), None).await
    }

    /// Answers a request; an empty `error` means that it was done.
    pub async fn send_ack(&self, error: &str) -> io::Result<()> {
        let ack = Answer::Ack(Ack { error: error.to_owned() });
        send(&self.0, &WorkloadResponse { payload: Some(ack) }.encode_to_vec(), None).await
    }

    /// Reads the next request, `None` at the end of the connection; cancel safe.
    ///
    /// Errors on what ztunnel refuses too: a packet that is cut off or does not decode, an Add
    /// without exactly one fd, an fd on anything else.
    pub async fn recv(&self) -> anyhow::Result<Option<Request>> {
        let Some((bytes, fds)) = recv(&self.0).await? else {
            return Ok(None);
        };
        let request = WorkloadRequest::decode(&bytes[..]).context("decode ZDS request")?;
        let mut fds = fds.into_iter();
        Ok(Some(match (request.payload, fds.next(), fds.next()) {
            (_, _, Some(_)) => bail!("expected at most one fd in a ZDS request"),
            (Some(Payload::Add(add)), Some(netns), None) => {
                Request::Add { uid: add.uid, info: add.workload_info, netns }
            }
            (Some(Payload::Add(add)), None, None) => bail!("no fd with AddWorkload {}", add.uid),
            (Some(_), Some(_), None) => bail!("unexpected fd in a ZDS request"),
            (Some(Payload::Keep(keep)), None, None) => Request::Keep(keep.uid),
            (Some(Payload::Del(del)), None, None) => Request::Del(del.uid),
            (Some(Payload::SnapshotSent(_)), None, None) => Request::SnapshotSent,
            (None, ..) => bail!("no payload in a ZDS request"),
        }))
    }
}

/// Sends one packet, with `fd` riding on it.
pub async fn send(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<_> = fd.into_iter().collect();
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::Error::other("attach the netns fd: no space in the packet"));
            }
            rustix::net::sendmsg(
                stream.as_fd(),
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            )?;
            Ok(())
        })
        .await
}

/// Reads one packet and the fds that ride on it, `None` at the end of the connection.
pub async fn recv(stream: &UnixStream) -> anyhow::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let (len, flags, fds) = stream
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let packet = rustix::net::recvmsg(
                stream.as_fd(),
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            // Taken before anything is judged: whatever happens next, no fd is left open.
            let fds: Vec<_> = control
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            Ok((packet.bytes, packet.flags, fds))
        })
        .await
        .context("read from the ZDS socket")?;
    if len == 0 {
        return Ok(None);
    }
    if flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        bail!("received a truncated ZDS message");
    }
    bytes.truncate(len);
    Ok(Some((bytes, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes seen on the wire between istio-cni and ztunnel.
    #[test]
    fn messages_are_the_bytes_that_ztunnel_sends_and_reads() {
        assert_eq!(ZdsHello { version: Version::V1 as i32 }.encode_to_vec(), [0x08, 0x01]);
        let ack = WorkloadResponse { payload: Some(Answer::Ack(Ack { error: String::new() })) };
        assert_eq!(ack.encode_to_vec(), [0x0a, 0x00]);
        let snapshot = WorkloadRequest { payload: Some(Payload::SnapshotSent(SnapshotSent {})) };
        assert_eq!(snapshot.encode_to_vec(), [0x1a, 0x00]);
        let add = WorkloadRequest {
            payload: Some(Payload::Add(AddWorkload {
                uid: "u-1".into(),
                workload_info: Some(WorkloadInfo {
                    name: "pod1".into(),
                    namespace: "ns1".into(),
                    service_account: "sa1".into(),
                }),
            })),
        };
        let mut bytes = vec![0x0a, 0x17, 0x0a, 0x03];
        bytes.extend(b"u-1\x12\x10\x0a\x04pod1\x12\x03ns1\x1a\x03sa1");
        assert_eq!(add.encode_to_vec(), bytes);
        let del = WorkloadRequest { payload: Some(Payload::Del(DelWorkload { uid: "u".into() })) };
        assert_eq!(del.encode_to_vec(), [0x12, 0x03, 0x12, 0x01, b'u']);
        let keep =
            WorkloadRequest { payload: Some(Payload::Keep(KeepWorkload { uid: "u".into() })) };
        assert_eq!(keep.encode_to_vec(), [0x2a, 0x03, 0x0a, 0x01, b'u']);
    }
}
