//! An HBONE client, for workloads that speak HBONE by themselves: sidecars and gateways.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use http::StatusCode;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::HBONE_PORT;
use super::ca::{Ca, Identity};
use super::tls::{self, WorkloadTls};
use super::tunnel::{ConnectError, Tunnel, TunnelClient};

/// Why an HBONE call failed.
#[derive(Debug, thiserror::Error)]
pub enum HboneError {
    /// No TCP connection to the peer's proxy.
    #[error("connect to {0}: {1}")]
    Connect(SocketAddr, #[source] io::Error),
    /// No mutual TLS with it.
    #[error("authenticate with {0}: {1:#}")]
    Tls(SocketAddr, #[source] anyhow::Error),
    /// The proxy refused the CONNECT with this HTTP status.
    #[error("call {0}: the proxy answered with status {1}")]
    Refused(SocketAddr, u16),
    /// HTTP/2 broke.
    #[error("call {0}: {1:#}")]
    Http2(SocketAddr, #[source] anyhow::Error),
}

/// A client with an identity of the mesh.
#[derive(Clone, Debug)]
pub struct HboneClient {
    tls: WorkloadTls,
}

/// A TCP connection inside an HBONE connection of its own.
#[derive(Debug)]
pub struct HboneStream {
    /// Who the server is.
    pub peer: Identity,
    tunnel: Tunnel,
    // Drives the connection for as long as the stream lives.
    _driver: JoinSet<()>,
}

impl HboneClient {
    /// A client that is `identity`, certified by the CA in `ca_dir`.
    pub fn new(ca_dir: &Path, identity: &Identity) -> anyhow::Result<Self> {
        Ok(Self { tls: WorkloadTls::new(&Ca::open(ca_dir)?, identity)? })
    }

    /// Connects to `target` through the proxy on port 15008 of the same address, from the current
    /// netns.
    pub async fn connect(&self, target: SocketAddr) -> Result<HboneStream, HboneError> {
        self.connect_via(SocketAddr::new(target.ip(), HBONE_PORT), target).await
    }

    /// Connects to the proxy at `proxy` and asks it for `target`, which a proxy of another pod has to
    /// refuse.
    pub async fn connect_via(
        &self,
        proxy: SocketAddr,
        target: SocketAddr,
    ) -> Result<HboneStream, HboneError> {
        let stream = TcpStream::connect(proxy).await.map_err(|e| HboneError::Connect(proxy, e))?;
        let local = stream.local_addr().map_err(|e| HboneError::Connect(proxy, e))?;
        let stream = self.tls.connect(stream, Vec::new()).await;
        let stream = stream.map_err(|e| HboneError::Tls(proxy, e))?;
        let peer = tls::peer_identity(stream.get_ref().1)
            .ok_or_else(|| HboneError::Tls(proxy, anyhow::anyhow!("no SPIFFE identity")))?;
        let (client, driver) =
            TunnelClient::handshake(stream).await.map_err(|e| HboneError::Http2(proxy, e))?;
        let mut driving = JoinSet::new();
        driving.spawn(driver);
        let tunnel = client.connect(target, local).await.map_err(|error| match error {
            ConnectError::Status(status) => {
                HboneError::Refused(target, StatusCode::as_u16(&status))
            }
            ConnectError::Http2(error) => HboneError::Http2(target, error.into()),
        })?;
        Ok(HboneStream { peer, tunnel, _driver: driving })
    }
}

impl HboneStream {
    /// Sends all of `bytes`.
    pub async fn send(&mut self, bytes: impl Into<Bytes>) -> io::Result<()> {
        self.tunnel.send(bytes.into()).await
    }

    /// Ends the sending direction; the other stays open.
    pub fn finish(&mut self) -> io::Result<()> {
        self.tunnel.finish()
    }

    /// Receives what is there, `None` at the end.
    pub async fn recv(&mut self) -> io::Result<Option<Bytes>> {
        self.tunnel.recv().await
    }

    /// Sends `line` and a newline, and receives one line without its newline, or what there is until
    /// the end.
    pub async fn ask(&mut self, line: &str) -> io::Result<String> {
        self.send(format!("{line}\n")).await?;
        let mut answer = Vec::new();
        while let Some(bytes) = self.recv().await? {
            answer.extend_from_slice(&bytes);
            if let Some(end) = answer.iter().position(|byte| *byte == b'\n') {
                answer.truncate(end);
                break;
            }
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}
