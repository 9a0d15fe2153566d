//! What the application does, and who answers.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use redirect_ebpf::abi::PORT_PROXY_DNS;

use super::meter::{Meter, Spent};
use super::relay::{EXPLICIT_OFFSET, answer_queries};
use crate::dns;
use crate::netns::{Netns, Running};

/// The server sends back what it gets.
pub(super) const ECHO: u16 = 7001;
/// It reads.
const SINK: u16 = 7002;
/// It writes.
const SOURCE: u16 = 7003;
/// All that it listens on.
pub(super) const PORTS: [u16; 3] = [ECHO, SINK, SOURCE];

const CHUNK: usize = 128 * 1024;
/// Nothing takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// A query is lost by then, and how often one is asked.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
const TRIES: u32 = 5;

/// What the application does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Connects, sends and gets one byte, closes; one at a time.
    Connect1,
    /// The same, eight at once.
    Connect8,
    /// Sends and gets one byte, on one connection.
    Request1,
    /// The same, on 32 connections at once.
    Request32,
    /// Sends all it can.
    Up,
    /// Gets all it can.
    Down,
    /// Asks a resolver over UDP, each time from a new socket, as libc does; eight at once.
    Dns,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Connect1,
        Self::Connect8,
        Self::Request1,
        Self::Request32,
        Self::Up,
        Self::Down,
        Self::Dns,
    ];

    /// The name in the output.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connect1 => "connect1",
            Self::Connect8 => "connect8",
            Self::Request1 => "request1",
            Self::Request32 => "request32",
            Self::Up => "up",
            Self::Down => "down",
            Self::Dns => "dns",
        }
    }

    /// What its rate counts.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Connect1 | Self::Connect8 => "connections/s",
            Self::Request1 | Self::Request32 => "requests/s",
            Self::Up | Self::Down => "bytes/s",
            Self::Dns => "queries/s",
        }
    }

    /// What processor time is told for; a GB is 10⁹ bytes.
    pub fn per(self) -> &'static str {
        match self {
            Self::Connect1 | Self::Connect8 => "connection",
            Self::Request1 | Self::Request32 => "request",
            Self::Up | Self::Down => "GB",
            Self::Dns => "query",
        }
    }
}

/// Where the application connects to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    Server(IpAddr),
    /// The proxy, by its address.
    Relay(IpAddr),
}

impl Target {
    pub(super) fn port(self, port: u16) -> SocketAddr {
        match self {
            Target::Server(ip) => SocketAddr::new(ip, port),
            Target::Relay(ip) => SocketAddr::new(ip, port + EXPLICIT_OFFSET),
        }
    }

    fn resolver(self) -> SocketAddr {
        match self {
            Target::Server(ip) => SocketAddr::new(ip, dns::PORT),
            Target::Relay(ip) => SocketAddr::new(ip, PORT_PROXY_DNS),
        }
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) rate: f64,
    /// How many [`Workload::per`] were done.
    pub(super) done: f64,
    /// How many connections that took, or queries.
    pub(super) opened: u64,
    /// How many queries were asked in vain, and again.
    pub(super) lost: u64,
    /// What it cost.
    pub(super) spent: Spent,
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
}

/// Runs a workload in a pod for about `slice`.
pub(super) fn run(netns: &Netns, workload: Workload, to: Target, slice: Duration) -> Result<Found> {
    match workload {
        Workload::Connect1 | Workload::Connect8 => {
            let at_once = if workload == Workload::Connect1 { 1 } else { 8 };
            timed(netns, at_once, slice, || Ok(move || connect_once(to.port(ECHO))))
        }
        Workload::Request1 | Workload::Request32 => {
            let at_once = if workload == Workload::Request1 { 1 } else { 32 };
            let found = timed(netns, at_once, slice, || requests(to.port(ECHO)))?;
            Ok(Found { opened: at_once as u64, ..found })
        }
        Workload::Up => bulk(netns, to.port(SINK), slice, |stream, chunk| stream.write(chunk)),
        Workload::Down => bulk(netns, to.port(SOURCE), slice, |stream, chunk| stream.read(chunk)),
        Workload::Dns => {
            let query = dns::query(0x1234, dns::WHO, to.resolver().ip())?;
            let lost = AtomicU64::new(0);
            let found = timed(netns, 8, slice, || Ok(|| ask(to.resolver(), &query, &lost)))?;
            Ok(Found { lost: lost.into_inner(), ..found })
        }
    }
}

pub(super) fn open(to: SocketAddr) -> Result<TcpStream> {
    let stream =
        TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

pub(super) fn exchange(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"x").context("send")?;
    stream.read_exact(&mut [0]).context("get an answer")
}

fn connect_once(to: SocketAddr) -> Result<()> {
    exchange(&mut open(to)?)
}

/// Asks until there is an answer, as libc does, but for the length of its patience.
fn ask(resolver: SocketAddr, query: &[u8], lost: &AtomicU64) -> Result<()> {
    for _ in 0..TRIES {
        match ask_once(resolver, query) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionRefused
                ) =>
            {
                lost.fetch_add(1, Ordering::Relaxed);
            }
            asked => return asked.context("ask"),
        }
    }
    bail!("{resolver} does not answer")
}

fn ask_once(resolver: SocketAddr, query: &[u8]) -> io::Result<()> {
    let any: IpAddr = if resolver.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(ANSWER_WITHIN))?;
    socket.connect(resolver)?;
    socket.send(query)?;
    let mut answer = [0; 512];
    let len = socket.recv(&mut answer)?;
    if answer[..len].starts_with(&query[..2]) {
        Ok(())
    } else {
        Err(io::Error::other("the answer is to another query"))
    }
}

fn requests(to: SocketAddr) -> Result<impl FnMut() -> Result<()>> {
    let mut stream = open(to)?;
    exchange(&mut stream)?;
    Ok(move || exchange(&mut stream))
}

/// Repeats what `prepare` gives, on as many threads as are to be at once.
fn timed<F: FnMut() -> Result<()>>(
    netns: &Netns,
    at_once: usize,
    slice: Duration,
    prepare: impl Fn() -> Result<F> + Sync,
) -> Result<Found> {
    let ready = Barrier::new(at_once + 1);
    let one = || -> Result<(Vec<Duration>, Duration)> {
        netns.run(|| {
            let prepared = prepare();
            ready.wait();
            let mut repeat = prepared?;
            let (began, mut took) = (Instant::now(), Vec::new());
            while began.elapsed() < slice {
                let start = Instant::now();
                repeat()?;
                took.push(start.elapsed());
            }
            Ok((took, began.elapsed()))
        })
    };
    let (all, spent) = thread::scope(|scope| -> Result<_> {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(one)).collect();
        let meter = Meter::start();
        ready.wait();
        let all = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
            .collect::<Result<Vec<_>>>()?;
        Ok((all, meter?.stop()?))
    })?;
    let rate = all.iter().map(|(took, during)| took.len() as f64 / during.as_secs_f64()).sum();
    let mut took: Vec<Duration> = all.into_iter().flat_map(|(took, _)| took).collect();
    ensure!(!took.is_empty(), "nothing was done in time");
    took.sort_unstable();
    let at = |part: f64| {
        let n = (took.len() - 1) as f64 * part;
        Some(took[n.round() as usize].as_secs_f64() * 1e6)
    };
    Ok(Found {
        rate,
        done: took.len() as f64,
        opened: took.len() as u64,
        lost: 0,
        spent,
        p50_us: at(0.5),
        p99_us: at(0.99),
    })
}

fn bulk(
    netns: &Netns,
    to: SocketAddr,
    slice: Duration,
    pass: impl Fn(&mut TcpStream, &mut [u8]) -> io::Result<usize> + Sync + Send,
) -> Result<Found> {
    netns.run(|| {
        let mut stream = open(to)?;
        let mut chunk = vec![b'x'; CHUNK];
        // The windows open first.
        let warm_up = Instant::now();
        while warm_up.elapsed() < slice / 5 {
            pass(&mut stream, &mut chunk).context("warm up")?;
        }
        let (meter, began, mut bytes) = (Meter::start()?, Instant::now(), 0);
        while began.elapsed() < slice {
            bytes += pass(&mut stream, &mut chunk).context("pass bytes")?;
        }
        let rate = bytes as f64 / began.elapsed().as_secs_f64();
        let spent = meter.stop()?;
        Ok(Found {
            rate,
            done: bytes as f64 / 1e9,
            opened: 1,
            lost: 0,
            spent,
            p50_us: None,
            p99_us: None,
        })
    })
}

/// The server; its sockets are closed when it is dropped.
pub(super) struct Server {
    _running: Running,
}

impl Server {
    pub(super) fn start(netns: &Netns) -> Result<Self> {
        let listeners = netns.run(|| {
            PORTS
                .iter()
                .map(|port| {
                    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port))?;
                    listener.set_nonblocking(true)?;
                    Ok(listener)
                })
                .collect::<Result<Vec<_>>>()
        })?;
        let resolver = netns.run(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, dns::PORT))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        let running = netns.spawn(move || async move {
            let serving =
                listeners.into_iter().zip(PORTS).map(|(listener, port)| serve(listener, port));
            let serving = futures_util::future::join_all(serving);
            let unread = AtomicU64::new(0);
            tokio::join!(serving, answer_queries(resolver, &unread));
        })?;
        Ok(Self { _running: running })
    }
}

async fn serve(listener: TcpListener, port: u16) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        tokio::spawn(async move {
            let mut chunk = vec![0; if port == ECHO { 1024 } else { CHUNK }];
            loop {
                if port == SOURCE {
                    stream.write_all(&chunk).await?;
                    continue;
                }
                let n = stream.read(&mut chunk).await?;
                match (port, n) {
                    (_, 0) => return io::Result::Ok(()),
                    (ECHO, n) => stream.write_all(&chunk[..n]).await?,
                    _ => {}
                }
            }
        });
    }
}
