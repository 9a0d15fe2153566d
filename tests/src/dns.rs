//! DNS: a resolver for tests, and what it shares with the stand-in proxy's DNS.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use crate::netns::{Netns, Running};

/// The port of DNS.
pub const PORT: u16 = 53;
/// A name that every [`Resolver`] has: its own addresses.
pub const WHO: &str = "who.test.";
/// A name with so many addresses that the answer is above any MTU of Ethernet.
pub const BIG: &str = "big.test.";
/// A name whose answer over UDP is always truncated.
pub const TRUNCATED: &str = "truncated.test.";
/// A name whose answer takes [`SLOWNESS`].
pub const SLOW: &str = "slow.test.";
/// See [`SLOW`].
pub const SLOWNESS: Duration = Duration::from_millis(500);
/// How many addresses [`BIG`] has.
pub const BIG_ANSWERS: u8 = 200;
/// How long a message is over UDP where the query does not say. Source: RFC 1035, 4.2.1.
const UDP_PAYLOAD: usize = 512;

/// What a server does with a message that came from an address, over TCP or not.
pub type Handler = Arc<dyn Fn(Vec<u8>, SocketAddr, bool) -> Answer + Send + Sync>;
/// The answer, if there is one.
pub type Answer = Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>>;

/// Answers datagrams for ever, several at a time.
pub async fn serve_udp(socket: UdpSocket, handler: Handler) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; 65535];
    // They end with this future.
    let mut queries = JoinSet::new();
    loop {
        while queries.try_join_next().is_some() {}
        let Ok((len, client)) = socket.recv_from(&mut buffer).await else { continue };
        let answer = handler(buffer[..len].to_vec(), client, false);
        let socket = socket.clone();
        queries.spawn(async move {
            if let Some(answer) = answer.await {
                // A client that is gone wants none.
                let _ = socket.send_to(&answer, client).await;
            }
        });
    }
}

/// Answers connections for ever.
pub async fn serve_tcp(listener: TcpListener, handler: Handler) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, client)) = listener.accept().await else { continue };
        let handler = handler.clone();
        connections.spawn(async move {
            // It ends with an error when the client is gone.
            let _ = serve_stream(stream, client, handler).await;
        });
    }
}

async fn serve_stream(
    mut stream: TcpStream,
    client: SocketAddr,
    handler: Handler,
) -> std::io::Result<()> {
    loop {
        let len = stream.read_u16().await?;
        let mut query = vec![0; len.into()];
        stream.read_exact(&mut query).await?;
        if let Some(answer) = handler(query, client, true).await {
            stream.write_all(&framed(&answer)).await?;
        }
    }
}

/// Asks over a connection, and waits for the answer.
pub async fn ask_tcp(stream: &mut TcpStream, query: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.write_all(&framed(query)).await?;
    read_tcp(stream).await
}

/// Waits for the next answer on a connection.
pub async fn read_tcp(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let len = stream.read_u16().await?;
    let mut answer = vec![0; len.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

/// A message as TCP carries it. Source: RFC 1035, 4.2.2.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&len.to_be_bytes(), message].concat()
}

/// A query for the addresses of a name, in the family of `like`.
pub fn query(id: u16, name: &str, like: IpAddr) -> Result<Vec<u8>> {
    let kind = if like.is_ipv4() { RecordType::A } else { RecordType::AAAA };
    let mut message = Message::query();
    message.metadata.id = id;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).context("make a name")?, kind));
    let mut edns = Edns::new();
    edns.set_max_payload(8192);
    message.set_edns(edns);
    message.to_vec().context("make a query")
}

/// The id of an answer, its code, and the addresses in it.
pub fn read(answer: &[u8]) -> Result<(u16, ResponseCode, Vec<IpAddr>)> {
    let message = Message::from_vec(answer).context("read an answer")?;
    let addresses = message.answers.iter().filter_map(|record| match &record.data {
        RData::A(a) => Some(IpAddr::from(a.0)),
        RData::AAAA(a) => Some(IpAddr::from(a.0)),
        _ => None,
    });
    Ok((message.metadata.id, message.metadata.response_code, addresses.collect()))
}

/// The answer to a query by the addresses of names; `None`: there is no such name. The second: the
/// name that was asked for. `None` for what is no query.
pub fn answer(
    query: &[u8],
    tcp: bool,
    addresses: impl Fn(&str) -> Option<Vec<IpAddr>>,
) -> Option<(Vec<u8>, String)> {
    let query = Message::from_vec(query).ok()?;
    let asked = query.queries.first()?;
    let name = asked.name().to_ascii().to_lowercase();
    if query.metadata.message_type != MessageType::Query {
        return None;
    }
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    answer.metadata.recursion_desired = query.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.add_query(asked.clone());
    match addresses(&name) {
        None => answer.metadata.response_code = ResponseCode::NXDomain,
        Some(addresses) => {
            for ip in addresses {
                let data = match (ip, asked.query_type()) {
                    (IpAddr::V4(ip), RecordType::A) => RData::A(ip.into()),
                    (IpAddr::V6(ip), RecordType::AAAA) => RData::AAAA(ip.into()),
                    _ => continue,
                };
                answer.add_answer(Record::from_rdata(asked.name().clone(), 5, data));
            }
        }
    }
    if query.edns.is_some() {
        answer.set_edns(Edns::new());
    }
    let bytes = answer.to_vec().ok()?;
    let payload = query.edns.as_ref().map_or(UDP_PAYLOAD, |edns| edns.max_payload().into());
    if tcp || (bytes.len() <= payload && name != TRUNCATED) {
        return Some((bytes, name));
    }
    let mut truncated = answer.truncate();
    truncated.metadata.truncation = true;
    Some((truncated.to_vec().ok()?, name))
}

/// A DNS server at one address, in the role of a cluster's resolver.
#[derive(Debug)]
pub struct Resolver {
    asked: Arc<Mutex<Vec<(SocketAddr, String)>>>,
    _running: Running,
}

impl Resolver {
    /// Starts one in `netns`, UDP and TCP, at each of `addresses`, which it says of itself.
    pub fn start(netns: &Netns, addresses: &[IpAddr]) -> Result<Self> {
        let asked: Arc<Mutex<Vec<(SocketAddr, String)>>> = Arc::default();
        let own = addresses.to_vec();
        let log = asked.clone();
        let handler: Handler = Arc::new(move |query, client, tcp| {
            let answer = answer(&query, tcp, |name| known(name, &own));
            if let Some((_, name)) = &answer {
                log.lock().unwrap_or_else(PoisonError::into_inner).push((client, name.clone()));
            }
            Box::pin(async move {
                let (answer, name) = answer?;
                if name == SLOW {
                    tokio::time::sleep(SLOWNESS).await;
                }
                Some(answer)
            })
        });
        let sockets = netns.run(|| {
            let sockets = addresses.iter().map(|ip| {
                let at = SocketAddr::new(*ip, PORT);
                let udp = std::net::UdpSocket::bind(at)?;
                let tcp = std::net::TcpListener::bind(at)?;
                udp.set_nonblocking(true)?;
                tcp.set_nonblocking(true)?;
                std::io::Result::Ok((udp, tcp))
            });
            sockets.collect::<std::io::Result<Vec<_>>>().context("open a resolver's sockets")
        })?;
        let running = netns.spawn(move || async move {
            for (udp, tcp) in sockets {
                if let (Ok(udp), Ok(tcp)) = (UdpSocket::from_std(udp), TcpListener::from_std(tcp)) {
                    tokio::spawn(serve_udp(udp, handler.clone()));
                    tokio::spawn(serve_tcp(tcp, handler.clone()));
                }
            }
            std::future::pending().await
        })?;
        Ok(Self { asked, _running: running })
    }

    /// Who has asked it for what so far.
    pub fn asked(&self) -> Vec<(SocketAddr, String)> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn known(name: &str, own: &[IpAddr]) -> Option<Vec<IpAddr>> {
    match name {
        WHO | TRUNCATED | SLOW => Some(own.to_vec()),
        BIG => Some(
            (0..BIG_ANSWERS)
                .flat_map(|n| {
                    [[192, 0, 2, n].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()].into()]
                })
                .collect(),
        ),
        _ => None,
    }
}
