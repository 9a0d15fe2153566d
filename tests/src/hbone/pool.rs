//! The HBONE connections of one workload to its peers, each shared by many streams.
//!
//! ztunnel: `src/proxy/pool.rs`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;

use super::ca::Identity;
use super::inpod::InPod;
use super::stop::Stop;
use super::tls::WorkloadTls;
use super::tunnel::TunnelClient;

/// Where a connection goes, and to whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Peer {
    pub(super) addr: SocketAddr,
    pub(super) identity: Identity,
}

/// Per peer: whoever holds the lock looks for a usable connection or makes one, the others wait for
/// that instead of making their own.
type Connections = Arc<tokio::sync::Mutex<Vec<TunnelClient>>>;

#[derive(Debug)]
pub(super) struct Pool {
    inpod: Arc<InPod>,
    tls: WorkloadTls,
    stop: Stop,
    peers: Mutex<HashMap<Peer, Connections>>,
}

impl Pool {
    pub(super) fn new(inpod: Arc<InPod>, tls: WorkloadTls, stop: Stop) -> Self {
        Self { inpod, tls, stop, peers: Mutex::default() }
    }

    /// A connection to `peer` with room for one more stream.
    pub(super) async fn client(&self, peer: &Peer) -> anyhow::Result<TunnelClient> {
        let connections = {
            let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
            peers.entry(peer.clone()).or_default().clone()
        };
        let mut connections = connections.lock().await;
        connections.retain_mut(|connection| !connection.closed());
        if let Some(connection) = connections.iter().find(|connection| connection.has_room()) {
            return Ok(connection.clone());
        }
        let connection = self.connect(peer).await?;
        connections.push(connection.clone());
        Ok(connection)
    }

    async fn connect(&self, peer: &Peer) -> anyhow::Result<TunnelClient> {
        let stream = self.inpod.connect(None, peer.addr).await;
        let stream = stream.with_context(|| format!("connect to {}", peer.addr))?;
        let expected = vec![peer.identity.clone()];
        let stream = self.tls.connect(stream, expected).await;
        let stream = stream
            .with_context(|| format!("authenticate {} at {} with TLS", peer.identity, peer.addr))?;
        let (client, driver) = TunnelClient::handshake(stream).await?;
        self.stop.spawn(driver);
        Ok(client)
    }
}
