//! What is on the wire: packet sockets, and a sniffer that remembers the TCP it has seen.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket,
};

use crate::netns::Netns;
use crate::raw::{RST, SYN, Segment};

const ETHERNET_HEADER: usize = 14;
const PACKET_OUTGOING: u8 = 4;
/// How often a sniffer looks whether it is to end.
const INTERVAL: Duration = Duration::from_millis(20);

/// Which way a frame goes, seen from the namespace it is seen in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It has come in.
    In,
    /// It goes out.
    Out,
}

/// A frame on an interface.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The index of the interface.
    pub interface: usize,
    /// Which way it goes.
    pub direction: Direction,
    bytes: Vec<u8>,
}

impl Frame {
    /// The TCP segment in it, if there is a whole one.
    pub fn segment(&self) -> Option<Segment> {
        Segment::parse(self.bytes.get(ETHERNET_HEADER..)?)
    }
}

/// A socket that sees every frame of a namespace.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens one in a namespace.
    pub fn open(netns: &Netns) -> Result<Self> {
        netns.run(|| {
            socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                SockProtocol::EthAll,
            )
            .map(Self)
            .context("open a packet socket")
        })
    }

    /// Its descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The next frame; none if there is none within `patience`.
    pub fn receive(&self, patience: Duration) -> Result<Option<Frame>> {
        let mut buffer = vec![0; 65_600];
        loop {
            match recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut buffer) {
                Ok((length, Some(from))) => {
                    let direction = match from.pkttype() {
                        PACKET_OUTGOING => Direction::Out,
                        _ => Direction::In,
                    };
                    buffer.truncate(length);
                    return Ok(Some(Frame { interface: from.ifindex(), direction, bytes: buffer }));
                }
                Ok((_, None)) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
                    let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut fds, timeout) {
                        Ok(0) => return Ok(None),
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(error) => return Err(error).context("wait for a frame"),
                    }
                }
                Err(error) => return Err(error).context("receive a frame"),
            }
        }
    }
}

/// A TCP segment that was seen.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// Which way it went.
    pub direction: Direction,
    /// The segment.
    pub segment: Segment,
}

impl Sighting {
    /// Whether it is the start of a connection.
    pub fn is_syn(&self) -> bool {
        self.segment.flags & (SYN | crate::raw::ACK) == SYN
    }

    /// Whether it refuses or breaks a connection.
    pub fn is_rst(&self) -> bool {
        self.segment.flags & RST != 0
    }

    /// Whether it goes between these two, either way.
    pub fn is_between(&self, a: SocketAddr, b: SocketAddr) -> bool {
        (self.segment.src, self.segment.dst) == (a, b)
            || (self.segment.src, self.segment.dst) == (b, a)
    }
}

/// Remembers every TCP segment on one interface, from its start until it is dropped.
#[derive(Debug)]
pub struct Sniffer {
    seen: Arc<Mutex<Vec<Sighting>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Starts on an interface of a namespace.
    pub fn start(netns: &Netns, interface: &str) -> Result<Self> {
        let socket = PacketSocket::open(netns)?;
        let index = netns.run(|| {
            nix::net::if_::if_nametoindex(interface)
                .with_context(|| format!("find interface {interface}"))
        })?;
        let index = usize::try_from(index).context("convert an interface's index")?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            move || {
                loop {
                    let stopping = stop.load(Ordering::Relaxed);
                    let frame = match socket.receive(INTERVAL) {
                        Ok(Some(frame)) => frame,
                        Ok(None) if !stopping => continue,
                        Ok(None) | Err(_) => return,
                    };
                    if frame.interface != index {
                        continue;
                    }
                    if let Some(segment) = frame.segment() {
                        let sighting = Sighting { direction: frame.direction, segment };
                        seen.lock().unwrap_or_else(PoisonError::into_inner).push(sighting);
                    }
                }
            }
        });
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// What it has seen so far.
    pub fn seen(&self) -> Vec<Sighting> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it once everything that is on the wire by now is read, and gives what it has seen.
    pub fn finish(mut self) -> Vec<Sighting> {
        self.end();
        self.seen()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.end();
    }
}
