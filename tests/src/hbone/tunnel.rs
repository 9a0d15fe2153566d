//! HBONE itself: CONNECT streams in HTTP/2 connections.
//!
//! Sizes and timings are ztunnel's (`src/config.rs`, `src/proxy/h2.rs`, `src/proxy/h2/*.rs`).

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode, Version};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const FRAME_SIZE: u32 = 1 << 20;
const CLIENT_STREAMS: usize = 100;
const SERVER_STREAMS: u32 = 200;
const CLIENT_SEND_BUFFER: usize = STREAM_WINDOW as usize;
const SERVER_SEND_BUFFER: usize = 400 << 10;
const MAX_HEADERS: u32 = 64 << 10;
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

const FIRST_BUFFER: usize = 4 << 10;
const LARGEST_BUFFER: usize = 256 << 10;

/// One CONNECT stream: a TCP connection's bytes inside HTTP/2.
#[derive(Debug)]
pub(super) struct Tunnel {
    send: SendStream<Bytes>,
    recv: RecvStream,
    // Counts the streams of a client connection by being alive.
    _in_flight: Option<Arc<()>>,
}

impl Tunnel {
    pub(super) async fn send(&mut self, bytes: Bytes) -> io::Result<()> {
        send(&mut self.send, bytes).await
    }

    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.send.send_data(Bytes::new(), true).map_err(io::Error::other)
    }

    pub(super) async fn recv(&mut self) -> io::Result<Option<Bytes>> {
        recv(&mut self.recv).await
    }
}

/// Why a CONNECT did not become a [`Tunnel`].
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    /// The peer's answer was not 200.
    #[error("CONNECT answered with status {0}")]
    Status(StatusCode),
    /// The HTTP/2 connection broke.
    #[error("CONNECT failed: {0}")]
    Http2(#[from] h2::Error),
}

/// The client's end of an HBONE connection, which any number of streams share.
#[derive(Clone, Debug)]
pub(super) struct TunnelClient {
    sender: SendRequest<Bytes>,
    in_flight: Arc<()>,
}

impl TunnelClient {
    /// Starts HTTP/2 on `stream`; the future returned with the client drives the connection and has
    /// to be run.
    pub(super) async fn handshake<S>(
        stream: S,
    ) -> anyhow::Result<(Self, impl Future<Output = ()> + Send + 'static)>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, mut connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_SIZE)
            .initial_max_send_streams(CLIENT_STREAMS)
            .max_header_list_size(MAX_HEADERS)
            .max_send_buffer_size(CLIENT_SEND_BUFFER)
            .enable_push(false)
            .handshake::<_, Bytes>(stream)
            .await
            .context("start HTTP/2")?;
        let pings = connection.ping_pong();
        let driver = async move {
            tokio::select! {
                _ = connection => {}
                () = until_peer_is_dead(pings) => {}
            }
        };
        Ok((Self { sender, in_flight: Arc::default() }, driver))
    }

    /// Whether the connection has ended, or takes no new streams because it is about to.
    pub(super) fn closed(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        matches!(self.sender.poll_ready(&mut context), Poll::Ready(Err(_)))
    }

    /// Whether there is room for one more stream.
    pub(super) fn has_room(&self) -> bool {
        // One count is the pool's own.
        Arc::strong_count(&self.in_flight) <= CLIENT_STREAMS
    }

    /// Opens a stream to `authority` on behalf of `client`.
    pub(super) async fn connect(
        mut self,
        authority: SocketAddr,
        client: SocketAddr,
    ) -> Result<Tunnel, ConnectError> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.version_mut() = Version::HTTP_2;
        // Socket addresses, in brackets or not, are authorities.
        if let Ok(uri) = authority.to_string().parse() {
            *request.uri_mut() = uri;
        }
        if let Ok(value) = format!("for=\"{client}\"").parse() {
            request.headers_mut().insert(http::header::FORWARDED, value);
        }
        poll_fn(|context| self.sender.poll_ready(context)).await?;
        let (response, send) = self.sender.send_request(request, false)?;
        let response = response.await?;
        if response.status() != StatusCode::OK {
            return Err(ConnectError::Status(response.status()));
        }
        Ok(Tunnel { send, recv: response.into_body(), _in_flight: Some(self.in_flight) })
    }
}

/// A CONNECT that waits for its answer.
#[derive(Debug)]
pub(super) struct TunnelRequest {
    request: Request<RecvStream>,
    respond: h2::server::SendResponse<Bytes>,
}

impl TunnelRequest {
    /// The address in `:authority`; an error if this is no CONNECT to an address and port.
    pub(super) fn authority(&self) -> Result<SocketAddr, String> {
        if self.request.method() != Method::CONNECT {
            return Err(format!("expected method CONNECT, got {}", self.request.method()));
        }
        let authority = self.request.uri().authority().map(|a| a.as_str()).unwrap_or_default();
        authority.parse().map_err(|_| format!("invalid CONNECT address {authority:?}"))
    }

    /// Opens the stream.
    pub(super) fn accept(mut self) -> Result<Tunnel, h2::Error> {
        let send = self.respond.send_response(Response::new(()), false)?;
        Ok(Tunnel { send, recv: self.request.into_body(), _in_flight: None })
    }

    /// Refuses the stream.
    pub(super) fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        // A client that is gone needs no refusal.
        let _ = self.respond.send_response(response, true);
    }
}

/// Serves an HBONE connection until the client ends it; after `drain` nothing new is let in.
pub(super) async fn serve<S>(
    stream: S,
    drain: impl Future<Output = ()>,
    mut handle: impl FnMut(TunnelRequest),
) -> Result<(), h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut connection = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_SIZE)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SERVER_SEND_BUFFER)
        .max_concurrent_streams(SERVER_STREAMS)
        .handshake(stream)
        .await?;
    let dead = until_peer_is_dead(connection.ping_pong());
    tokio::pin!(dead, drain);
    let mut draining = false;
    loop {
        tokio::select! {
            request = connection.accept() => match request {
                Some(request) => {
                    let (request, respond) = request?;
                    handle(TunnelRequest { request, respond });
                }
                None => return Ok(()),
            },
            () = &mut drain, if !draining => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = &mut dead => {
                connection.abrupt_shutdown(Reason::NO_ERROR);
                return Ok(());
            }
        }
    }
}

async fn until_peer_is_dead(pings: Option<PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        match tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // A broken connection is reported by whoever drives it.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// Copies between two TCP connections until both directions have ended; an end of one direction is
/// passed on and leaves the other open.
pub(super) async fn copy_tcp(a: TcpStream, b: TcpStream) {
    let (mut a_read, mut a_write) = a.into_split();
    let (mut b_read, mut b_write) = b.into_split();
    tokio::join!(tcp_to_tcp(&mut a_read, &mut b_write), tcp_to_tcp(&mut b_read, &mut a_write));
}

/// Copies between a TCP connection and a stream, like [`copy_tcp`].
pub(super) async fn copy_tunnel(tcp: TcpStream, tunnel: Tunnel) {
    let (mut read, mut write) = tcp.into_split();
    let Tunnel { mut send, mut recv, _in_flight } = tunnel;
    tokio::join!(tcp_to_tunnel(&mut read, &mut send), tunnel_to_tcp(&mut recv, &mut write));
}

// How a direction ends is for the two applications to see, not for us to judge: in each of the
// following, an error ends that direction only.

async fn tcp_to_tcp(read: &mut (impl AsyncRead + Unpin), write: &mut (impl AsyncWrite + Unpin)) {
    let mut buffer = Buffer::default();
    while let Ok(chunk) = buffer.fill(read).await {
        if chunk.is_empty() || write.write_all(&chunk).await.is_err() {
            break;
        }
    }
    let _ = write.shutdown().await;
}

async fn tcp_to_tunnel(read: &mut (impl AsyncRead + Unpin), stream: &mut SendStream<Bytes>) {
    let mut buffer = Buffer::default();
    while let Ok(chunk) = buffer.fill(read).await {
        if chunk.is_empty() || send(stream, chunk).await.is_err() {
            break;
        }
    }
    let _ = stream.send_data(Bytes::new(), true);
}

async fn tunnel_to_tcp(stream: &mut RecvStream, write: &mut (impl AsyncWrite + Unpin)) {
    while let Ok(Some(chunk)) = recv(stream).await {
        if write.write_all(&chunk).await.is_err() {
            break;
        }
    }
    let _ = write.shutdown().await;
}

async fn send(stream: &mut SendStream<Bytes>, mut bytes: Bytes) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        match poll_fn(|context| stream.poll_capacity(context)).await {
            Some(Ok(granted)) => {
                let now = bytes.split_to(granted.min(bytes.len()));
                stream.send_data(now, false).map_err(io::Error::other)?;
            }
            Some(Err(error)) => return Err(io::Error::other(error)),
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
    Ok(())
}

async fn recv(stream: &mut RecvStream) -> io::Result<Option<Bytes>> {
    let Some(bytes) = stream.data().await else {
        return Ok(None);
    };
    let bytes = bytes.map_err(io::Error::other)?;
    stream.flow_control().release_capacity(bytes.len()).map_err(io::Error::other)?;
    Ok(Some(bytes))
}

/// A read buffer that grows with what the connection turns out to carry: thousands of idle
/// connections stay small, a bulk transfer gets large records.
#[derive(Default)]
struct Buffer {
    bytes: BytesMut,
    size: usize,
}

impl Buffer {
    /// Reads what is there; empty at the end.
    async fn fill(&mut self, read: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
        self.size = self.size.max(FIRST_BUFFER);
        self.bytes.reserve(self.size);
        let len = read.read_buf(&mut self.bytes).await?;
        if len >= self.size && self.size < LARGEST_BUFFER {
            self.size *= 2;
        }
        Ok(self.bytes.split().freeze())
    }
}
