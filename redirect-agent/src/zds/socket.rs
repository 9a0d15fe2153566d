//! Unix SOCK_SEQPACKET sockets: the listener's file, and packets with and without a file
//! descriptor, each within a deadline.
//!
//! Tokio has no SEQPACKET type. Its Unix *stream* types take any connected Unix socket and are used
//! here for accept, readiness and peer credentials only, never as byte streams (ztunnel's
//! `src/inpod/packet.rs` does the same).

use std::{
    fs, io,
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind,
        listen, recvmsg, sendmsg, socket,
    },
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    time::timeout,
};

use super::messages::{DecodeError, MAX_RESPONSE_BYTES};
use crate::process_ref::ProcessRef;
use crate::socket_file::{Obstacle, SocketFile, remove_stale};

/// Why the ZDS socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Something that is not ours to delete is in the way.
    #[error("bind ZDS socket {path}: the path exists and is no socket; move it away", path = .0.display())]
    NotASocket(PathBuf),
    /// Another agent serves there.
    #[error(
        "bind ZDS socket {path}: somebody listens there already; stop that agent (istio-cni?) first",
        path = .0.display()
    )]
    InUse(PathBuf),
    /// The kernel refuses.
    #[error("{action} ZDS socket {path}: {source}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why a proxy was disconnected: what it did, as an operator would say it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// End of file: the proxy restarts, or is gone.
    #[error("closed the connection")]
    Closed,
    /// A system call on the connection failed.
    #[error("lost the connection: {0}")]
    Lost(Errno),
    /// A fd came with a message.
    #[error("sent file descriptors, which no message to the agent has")]
    SentFds,
    /// A message beyond what the agent reads.
    #[error("sent a message of more than {MAX_RESPONSE_BYTES} bytes")]
    Oversize,
    /// Not the message it had to send.
    #[error("sent {0}")]
    Nonsense(#[from] DecodeError),
    /// A message while no request was open.
    #[error("sent {0} bytes without having been asked anything")]
    Unasked(usize),
    /// No hello in time.
    #[error("sent no hello within {0:?}")]
    NoHello(Duration),
    /// The socket's buffer stayed full.
    #[error("did not read {request} within {deadline:?}")]
    NotRead {
        /// The request, with its workload.
        request: String,
        /// How long we waited.
        deadline: Duration,
    },
    /// No answer in time.
    #[error("did not answer {request} within {deadline:?}")]
    NotAnswered {
        /// The request, with its workload.
        request: String,
        /// How long we waited.
        deadline: Duration,
    },
    /// Not the proxy's doing.
    #[error("is let go, because the agent stops")]
    Shutdown,
    /// It refused a request that cannot be refused (only an Add can).
    #[error("refused {request}: {error:?}")]
    Refused {
        /// The request, with its workload.
        request: String,
        /// The proxy's reason.
        error: String,
    },
}

/// The listening socket and its file, which goes away with it.
#[derive(Debug)]
pub(super) struct Listener {
    // Dropped first, so that an agent that starts in the meantime finds no file, rather than a stale one.
    file: SocketFile,
    listener: UnixListener,
}

impl Listener {
    /// Listens at `path`, for root only. Replaces the socket of an agent that is gone, and nothing
    /// else.
    pub(super) fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |action| {
            move |source: io::Error| BindError::Io { action, path: path.to_owned(), source }
        };
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            let mut builder = fs::DirBuilder::new();
            let made = builder.recursive(true).mode(0o755).create(dir);
            made.map_err(failed("create the directory of"))?;
        }
        let addr = UnixAddr::new(path).map_err(|e| failed("bind")(e.into()))?;
        remove_stale(path).map_err(|obstacle| match obstacle {
            Obstacle::NotASocket => BindError::NotASocket(path.to_owned()),
            Obstacle::InUse => BindError::InUse(path.to_owned()),
            Obstacle::Io(e) => failed("replace stale")(e),
        })?;

        let fd = seqpacket().map_err(|e| failed("create")(e.into()))?;
        bind(fd.as_raw_fd(), &addr).map_err(|e| failed("bind")(e.into()))?;
        let file = SocketFile::of(path).map_err(failed("look at"))?;
        // Before listen(): until then nobody can connect, whatever the umask made of the mode.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(failed("restrict to root the"))?;
        listen(&fd, Backlog::MAXCONN).map_err(|e| failed("listen on")(e.into()))?;
        let listener = UnixListener::from_std(fd.into()).map_err(failed("watch"))?;
        Ok(Self { file, listener })
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Waits for the next proxy. Can be dropped at any time.
    pub(super) async fn accept(&self) -> io::Result<Connection> {
        let (stream, _) = self.listener.accept().await?;
        Ok(Connection { stream })
    }
}

fn seqpacket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

/// One proxy's connection. Dropping it closes it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// The proxy's process, where the agent's pid namespace has it.
    pub(super) fn process(&self) -> io::Result<Option<ProcessRef>> {
        ProcessRef::of_peer(&self.stream)
    }

    /// Sends one packet. Waits while the socket's buffer is full; can be dropped at any time.
    pub(super) async fn send(
        &self,
        packet: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), Fault> {
        let raw = fd.as_ref().map(|fd| [fd.as_raw_fd()]);
        let rights = raw.as_ref().map(|fds| ControlMessage::ScmRights(fds));
        let send = || {
            let iov = [IoSlice::new(packet)];
            let socket = self.stream.as_raw_fd();
            let sent =
                sendmsg::<()>(socket, &iov, rights.as_slice(), MsgFlags::MSG_NOSIGNAL, None)?;
            Ok(sent)
        };
        match self.stream.async_io(Interest::WRITABLE, send).await {
            Ok(_) => Ok(()),
            Err(e) => Err(lost(&e)),
        }
    }

    /// Receives one packet. Can be dropped at any time: a packet is then still there.
    pub(super) async fn recv(&self) -> Result<Vec<u8>, Fault> {
        let received = self.stream.async_io(Interest::READABLE, || self.recv_now()).await;
        received.unwrap_or_else(|e| Err(lost(&e)))
    }

    /// Waits until the proxy does something although it has nothing to do: goes away, or speaks.
    pub(super) async fn unasked(&self) -> Fault {
        match self.recv().await {
            Ok(packet) => Fault::Unasked(packet.len()),
            Err(fault) => fault,
        }
    }

    /// Makes sure that the next packet to come is an answer to what is sent next.
    pub(super) fn nothing_unasked(&self) -> Result<(), Fault> {
        match self.recv_now() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(lost(&e)),
            Ok(packet) => Err(Fault::Unasked(packet?.len())),
        }
    }

    /// The outer error is the kernel's, among them "nothing there yet".
    fn recv_now(&self) -> io::Result<Result<Vec<u8>, Fault>> {
        let mut packet = vec![0; MAX_RESPONSE_BYTES];
        let (length, flags) = {
            let mut iov = [IoSliceMut::new(&mut packet)];
            // No control buffer: the kernel then closes any fd by itself and says MSG_CTRUNC.
            let message =
                recvmsg::<()>(self.stream.as_raw_fd(), &mut iov, None, MsgFlags::MSG_DONTWAIT)?;
            (message.bytes, message.flags)
        };
        packet.truncate(length);
        Ok(if flags.contains(MsgFlags::MSG_CTRUNC) {
            Err(Fault::SentFds)
        } else if flags.contains(MsgFlags::MSG_TRUNC) {
            Err(Fault::Oversize)
        } else if length == 0 {
            Err(Fault::Closed)
        } else {
            Ok(packet)
        })
    }
}

fn lost(error: &io::Error) -> Fault {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPIPE | Errno::ECONNRESET) => Fault::Closed,
        errno => Fault::Lost(errno.unwrap_or(Errno::UnknownErrno)),
    }
}

/// `io` within `deadline`, or else `fault`.
pub(super) async fn within<T>(
    deadline: Duration,
    io: impl Future<Output = Result<T, Fault>>,
    fault: impl FnOnce() -> Fault,
) -> Result<T, Fault> {
    timeout(deadline, io).await.unwrap_or_else(|_| Err(fault()))
}
