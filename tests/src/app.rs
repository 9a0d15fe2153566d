//! Applications and their clients: who answered, and whom did they see?

use std::fmt;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::task::JoinSet;

use crate::netns::{Netns, Running};
use crate::process::wait_for;

/// How long a client waits for its answer, unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a process may take from being forked to running its own program.
const FORKED: Duration = Duration::from_secs(1);

/// What an application does with a connection, after the line that says who it is and whom it sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Sends back what it gets until the client closes.
    Echo,
    /// Closes at once: the TIME_WAIT is the server's.
    CloseFirst,
}

/// A connection as the application sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Accepted {
    /// The client's address.
    pub peer: SocketAddr,
    /// The application's own address.
    pub local: SocketAddr,
}

/// A TCP server in a pod. Its sockets are closed when it is dropped.
#[derive(Debug)]
pub struct App {
    accepted: Arc<Mutex<Vec<Accepted>>>,
    _running: Running,
}

impl App {
    /// Starts an application that calls itself `name` and listens at `addr`, with SO_REUSEADDR as
    /// nearly every server does.
    pub fn start(
        netns: &Netns,
        name: &str,
        addr: SocketAddr,
        behaviour: Behaviour,
    ) -> Result<Self> {
        Self::start_with(netns, name, addr, behaviour, |_| Ok(()))
    }

    /// The same, with these options on its listener.
    pub fn start_with(
        netns: &Netns,
        name: &str,
        addr: SocketAddr,
        behaviour: Behaviour,
        options: impl FnOnce(&Socket) -> io::Result<()> + Send,
    ) -> Result<Self> {
        let listener = netns.run(|| {
            let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            options(&socket)?;
            // A process that another test is just starting has a copy of a former listener, until it
            // runs its own program.
            let bound = wait_for("the port", FORKED, || match socket.bind(&addr.into()) {
                Err(e) if e.kind() == ErrorKind::AddrInUse => Ok(None),
                bound => Ok(Some(bound?)),
            });
            bound.with_context(|| format!("bind {addr} for {name}"))?;
            socket.listen(4096)?;
            socket.set_nonblocking(true)?;
            Ok(TcpListener::from(socket))
        })?;
        let accepted = Arc::new(Mutex::new(Vec::new()));
        let running = netns.spawn({
            let accepted = Arc::clone(&accepted);
            let name = name.to_owned();
            move || serve(listener, name, behaviour, accepted)
        })?;
        Ok(Self { accepted, _running: running })
    }

    /// The connections it has accepted so far.
    pub fn accepted(&self) -> Vec<Accepted> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn serve(
    listener: TcpListener,
    name: String,
    behaviour: Behaviour,
    accepted: Arc<Mutex<Vec<Accepted>>>,
) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
        return;
    };
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            continue;
        };
        let Ok(local) = stream.local_addr() else {
            continue;
        };
        let seen = Accepted { peer: canonical(peer), local: canonical(local) };
        accepted.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
        connections.spawn(answer(stream, greeting(&name, seen), behaviour));
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(
    mut stream: tokio::net::TcpStream,
    greeting: String,
    behaviour: Behaviour,
) -> std::io::Result<()> {
    stream.write_all(greeting.as_bytes()).await?;
    match behaviour {
        Behaviour::Echo => {
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await?;
        }
        Behaviour::CloseFirst => {
            stream.shutdown().await?;
            // Until the client has closed too: bytes that were not read would turn the end of this
            // connection into a reset.
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
        }
    }
    Ok(())
}

/// The line that an application starts with.
pub fn greeting(name: &str, Accepted { peer, local }: Accepted) -> String {
    format!("{name} {peer} {local}\n")
}

/// The reverse of [`greeting`].
pub fn read_greeting(line: &str) -> Option<Answer> {
    let mut words = line.strip_suffix('\n')?.split(' ');
    let answer = Answer {
        by: words.next()?.to_owned(),
        saw_peer: words.next()?.parse().ok()?,
        saw_local: words.next()?.parse().ok()?,
    };
    words.next().is_none().then_some(answer)
}

/// An address as IPv4 where it is IPv4 in the clothes of IPv6.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Who answered, and whom did they see?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The name of the application.
    pub by: String,
    /// The client's address as the application saw it.
    pub saw_peer: SocketAddr,
    /// The address that the application was called at.
    pub saw_local: SocketAddr,
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An application answered.
    Answered(Answer),
    /// The connection was refused (RST to the SYN).
    Refused {
        /// How long that took.
        after: Duration,
    },
    /// The connection came about and was closed or reset before an application answered.
    Closed {
        /// How many bytes came before.
        bytes: usize,
    },
    /// Nothing came.
    TimedOut,
}

impl Outcome {
    /// The answer, or what came instead as an error.
    pub fn answer(self) -> Result<Answer> {
        match self {
            Outcome::Answered(answer) => Ok(answer),
            other => bail!("expected an answer, but: {other}"),
        }
    }

    /// How long the refusal took, or what came instead as an error.
    pub fn refusal(self) -> Result<Duration> {
        match self {
            Outcome::Refused { after } => Ok(after),
            other => bail!("expected a refusal, but: {other}"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Answered(Answer { by, saw_peer, saw_local }) => {
                write!(f, "{by} answered at {saw_local} and saw {saw_peer}")
            }
            Outcome::Refused { after } => write!(f, "refused after {after:?}"),
            Outcome::Closed { bytes } => write!(f, "closed after {bytes} bytes"),
            Outcome::TimedOut => f.write_str("timed out"),
        }
    }
}

/// A call of a client.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    to: SocketAddr,
    source: Option<SocketAddr>,
    mark: Option<u32>,
    interface: Option<&'static str>,
    patience: Duration,
    until_closed: bool,
    speaks_first: bool,
}

impl Call {
    /// A call to an address.
    pub fn to(to: SocketAddr) -> Self {
        Self {
            to,
            source: None,
            mark: None,
            interface: None,
            patience: PATIENCE,
            until_closed: false,
            speaks_first: false,
        }
    }

    /// From this address and port.
    pub fn from(self, source: SocketAddr) -> Self {
        Self { source: Some(source), ..self }
    }

    /// With this SO_MARK on the client's socket.
    pub fn mark(self, mark: u32) -> Self {
        Self { mark: Some(mark), ..self }
    }

    /// With a socket that is bound to this interface (`SO_BINDTODEVICE`).
    pub fn bound_to(self, interface: &'static str) -> Self {
        Self { interface: Some(interface), ..self }
    }

    /// With this deadline.
    pub fn within(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Waits for the server to close first.
    pub fn until_closed(self) -> Self {
        Self { until_closed: true, ..self }
    }

    /// Says something as soon as it is connected. A server whose queue overflows under SYN cookies
    /// forgets a client that waits in silence; that is so without a mesh too.
    pub fn speaks_first(self) -> Self {
        Self { speaks_first: true, ..self }
    }

    /// Calls from a namespace.
    pub fn make(self, netns: &Netns) -> Result<Outcome> {
        netns.block_on(move || self.run())
    }

    /// Calls `count` times, one after the other.
    pub fn in_turn(self, netns: &Netns, count: usize) -> Result<Vec<Outcome>> {
        netns.block_on(move || async move {
            let mut outcomes = Vec::with_capacity(count);
            for _ in 0..count {
                outcomes.push(self.run().await?);
            }
            Ok(outcomes)
        })
    }

    /// Calls `count` times at once.
    pub fn at_once(self, netns: &Netns, count: usize) -> Result<Vec<Outcome>> {
        Self::all_at_once(vec![self; count], netns)
    }

    /// Makes different calls at once.
    pub fn all_at_once(calls: Vec<Self>, netns: &Netns) -> Result<Vec<Outcome>> {
        netns.block_on(move || async move {
            let calls: JoinSet<_> = calls.into_iter().map(Self::run).collect();
            calls.join_all().await.into_iter().collect()
        })
    }

    /// Calls and keeps the connection.
    pub fn open(self, netns: &Netns) -> Result<Conversation> {
        let stream = netns.run(|| {
            let socket = self.socket()?;
            socket
                .connect_timeout(&self.to.into(), self.patience)
                .with_context(|| format!("connect to {}", self.to))?;
            Ok(TcpStream::from(socket))
        })?;
        Conversation::new(stream, self.patience).with_context(|| format!("talk to {}", self.to))
    }

    fn socket(&self) -> Result<Socket> {
        let socket = Socket::new(Domain::for_address(self.to), Type::STREAM, Some(Protocol::TCP))
            .context("make a socket")?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark).context("set SO_MARK")?;
        }
        if let Some(interface) = self.interface {
            socket
                .bind_device(Some(interface.as_bytes()))
                .with_context(|| format!("bind a socket to {interface}"))?;
        }
        if let Some(source) = self.source {
            socket.set_reuse_address(true).context("set SO_REUSEADDR")?;
            socket.bind(&source.into()).with_context(|| format!("bind {source}"))?;
        }
        Ok(socket)
    }

    /// Calls from the namespace of the current thread.
    pub async fn run(self) -> Result<Outcome> {
        let started = Instant::now();
        let connected = async {
            let socket = self.socket()?;
            socket.set_nonblocking(true).context("make a socket non-blocking")?;
            let socket = tokio::net::TcpSocket::from_std_stream(TcpStream::from(socket));
            Ok::<_, anyhow::Error>(socket.connect(self.to).await)
        };
        let stream = match tokio::time::timeout(self.patience, connected).await {
            Err(_) => return Ok(Outcome::TimedOut),
            Ok(connected) => match connected? {
                Ok(stream) => stream,
                Err(error) => match error.kind() {
                    ErrorKind::ConnectionRefused => {
                        return Ok(Outcome::Refused { after: started.elapsed() });
                    }
                    ErrorKind::TimedOut => return Ok(Outcome::TimedOut),
                    // Between the last ACK of the handshake and our looking.
                    ErrorKind::ConnectionReset => return Ok(Outcome::Closed { bytes: 0 }),
                    _ => return Err(anyhow!(error).context(format!("connect to {}", self.to))),
                },
            },
        };
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        let left = self.patience.saturating_sub(started.elapsed());
        let talk = async {
            if self.speaks_first {
                let _ = stream.write_all(b"hello\n").await;
            }
            let _ = stream.read_line(&mut line).await;
            if self.until_closed {
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
            }
        };
        let timed_out = tokio::time::timeout(left, talk).await.is_err();
        Ok(match read_greeting(&line) {
            Some(answer) if !timed_out => Outcome::Answered(answer),
            _ if timed_out => Outcome::TimedOut,
            _ => Outcome::Closed { bytes: line.len() },
        })
    }
}

/// A connection to an application that echoes.
#[derive(Debug)]
pub struct Conversation {
    stream: TcpStream,
    answer: Answer,
}

impl Conversation {
    /// A conversation on a connection that somebody has opened.
    pub fn new(mut stream: TcpStream, patience: Duration) -> Result<Self> {
        stream.set_read_timeout(Some(patience)).context("set a deadline")?;
        stream.set_write_timeout(Some(patience)).context("set a deadline")?;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).context("read who it is")?;
            line.push(byte[0]);
        }
        let line = String::from_utf8(line).context("read who it is")?;
        let answer = read_greeting(&line).with_context(|| format!("read who it is: {line:?}"))?;
        Ok(Self { stream, answer })
    }

    /// Its connection.
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Who is at the other end.
    pub fn answer(&self) -> &Answer {
        &self.answer
    }

    /// This end's own address.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        self.stream.local_addr().context("read the own address")
    }

    /// The address that was called.
    pub fn peer_addr(&self) -> Result<SocketAddr> {
        self.stream.peer_addr().context("read the peer's address")
    }

    /// The SO_MARK of this end.
    pub fn mark(&self) -> Result<u32> {
        SockRef::from(&self.stream.as_fd()).mark().context("read SO_MARK")
    }

    /// Says something and checks that it comes back.
    pub fn exchange(&mut self, what: &[u8]) -> Result<()> {
        self.stream.write_all(what).context("send")?;
        let mut back = vec![0; what.len()];
        self.stream.read_exact(&mut back).context("receive")?;
        ensure!(back == what, "received other bytes than were sent");
        Ok(())
    }

    /// Sends `total` bytes, in large writes, while it checks that every one of them comes back in
    /// its place.
    pub fn bulk(&mut self, total: usize) -> Result<()> {
        const CHUNK: usize = 256 * 1024;
        let mut writer = self.stream.try_clone().context("duplicate the socket")?;
        thread::scope(|scope| {
            let sending = scope.spawn(move || -> Result<()> {
                let mut noise = Noise::default();
                let mut chunk = vec![0; CHUNK];
                let mut left = total;
                while left > 0 {
                    let part = &mut chunk[..left.min(CHUNK)];
                    noise.fill(part);
                    writer.write_all(part).context("send")?;
                    left -= part.len();
                }
                Ok(())
            });
            let mut noise = Noise::default();
            let (mut got, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
            let mut left = total;
            while left > 0 {
                let size = left.min(CHUNK);
                self.stream.read_exact(&mut got[..size]).context("receive")?;
                noise.fill(&mut expected[..size]);
                ensure!(
                    got[..size] == expected[..size],
                    "received other bytes than were sent, {left} before the end"
                );
                left -= size;
            }
            sending.join().map_err(|_| anyhow!("the sender panicked"))?
        })
    }

    /// Waits for the other end to close; false if it has not within `patience`. What arrives
    /// before is thrown away.
    pub fn closed_within(&mut self, patience: Duration) -> Result<bool> {
        self.stream.set_read_timeout(Some(patience)).context("set a deadline")?;
        loop {
            match self.stream.read(&mut [0; 4096]) {
                Ok(0) => return Ok(true),
                Ok(_) => {}
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => return Ok(false),
                    ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => return Ok(true),
                    _ => return Err(error).context("wait for the end"),
                },
            }
        }
    }
}

/// A reproducible stream of bytes without a period that a lost or doubled packet could hide in
/// (xorshift64).
#[derive(Debug)]
struct Noise(u64);

impl Default for Noise {
    fn default() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
}

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
        }
    }
}
