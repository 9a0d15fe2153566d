//! A stand-in for ztunnel: a small HBONE proxy for tests and demos, and nothing else.
//!
//! It is **not ztunnel** and not meant to carry anybody's traffic. It exists because a ztunnel image
//! cannot be pulled everywhere, and does what matters to redirection *exactly* as ztunnel does: it
//! takes pods over ZDS, opens its sockets in their netns with the same ports and options, finds the
//! original destination in the same way, connects from the same addresses, and ends connections at
//! the same moments. What ztunnel gets from istiod it reads from Kubernetes manifests. It has no
//! waypoints, no AuthorizationPolicy, no metrics.
//!
//! Where to look: `zds` is the wire, `workloads` what the proxy does with it, `inpod` the sockets,
//! `outbound`, `inbound` and `inbound_plaintext` the three listeners, `dns` the pod's DNS, `tunnel` and `pool` HTTP/2,
//! `tls` and `ca` identities, `mesh` and `policy` the manifests, `access_log` what it has seen.

mod access_log;
mod ca;
mod client;
mod dns;
mod inbound;
mod inbound_plaintext;
mod inpod;
mod mesh;
mod outbound;
mod policy;
mod pool;
mod proxy;
mod stop;
mod tls;
mod tunnel;
mod workloads;
pub mod zds;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tracing::{info, warn};

pub use access_log::{Direction, Outcome, Over, Record, read_log};
pub use ca::{Ca, Identity, TRUST_DOMAIN};
pub use client::{HboneClient, HboneError, HboneStream};

use workloads::Workloads;

// Read from ztunnel (`src/config.rs`) and not taken from our ABI: the two check each other.

/// The outbound listener's port.
pub const OUTBOUND_PORT: u16 = 15001;
/// The inbound plaintext listener's port.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// The inbound HBONE listener's port.
pub const HBONE_PORT: u16 = 15008;
/// SO_MARK of every socket of the proxy.
pub const MARK: u32 = 0x539;

/// Ports that nobody may ask the proxy to connect to: they are its own, so it would call itself.
const ILLEGAL_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT];

const RECONNECT_FIRST: Duration = Duration::from_millis(10);
/// ztunnel goes up to 15 s; nobody wants to wait for that in a test.
const RECONNECT_LONGEST: Duration = Duration::from_millis(500);

/// How to run the proxy.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name, for logs.
    pub node: String,
    /// The agent's ZDS socket.
    pub zds_socket: PathBuf,
    /// The directory of the mesh's CA; created if there is none.
    pub ca_dir: PathBuf,
    /// The directory of manifests; without it every address is unknown and every policy permissive.
    pub manifests: Option<PathBuf>,
    /// Where to append a line per connection.
    pub log_json: Option<PathBuf>,
    /// Whether it has DNS, and whom that asks for names that are not of the mesh.
    pub dns: Option<Dns>,
    /// How long connections may go on after a graceful shutdown began.
    pub drain: Duration,
}

/// The DNS of the proxy.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dns {
    /// The resolver for names that are not of the mesh; without one they have no answer.
    pub upstream: Option<SocketAddr>,
}

/// Runs the proxy until `shutdown` resolves, then drains it.
///
/// Errors when it cannot start, and on what ends ztunnel too: an agent that breaks the protocol.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    raise_file_limit();
    let mut workloads = Workloads::new(&config)?;
    warn!(node = config.node, "this is a stand-in for tests and demos, not ztunnel");
    tokio::select! {
        broken = serve_agent(&config, &mut workloads) => return broken,
        () = shutdown => {}
    }
    info!("draining");
    workloads.drain(config.drain).await;
    Ok(())
}

/// Serves one agent after the other; ends only with a broken protocol.
async fn serve_agent(config: &Config, workloads: &mut Workloads) -> anyhow::Result<()> {
    let mut backoff = RECONNECT_FIRST;
    loop {
        match zds::Connection::connect(&config.zds_socket).await {
            Ok(connection) => {
                info!(socket = %config.zds_socket.display(), "connected to the agent");
                let before = std::time::Instant::now();
                match workloads.serve(&connection).await {
                    Ok(()) => info!("the agent closed the connection"),
                    Err(workloads::Error::Protocol(error)) => return Err(error),
                    Err(workloads::Error::Connection(error)) => {
                        warn!("ZDS connection ended: {error:#}");
                    }
                }
                if before.elapsed() > RECONNECT_LONGEST {
                    backoff = RECONNECT_FIRST;
                }
            }
            Err(error) => {
                let socket = config.zds_socket.display();
                warn!(
                    "connect to the agent at {socket}: {error}; is it running? again in {backoff:?}"
                );
            }
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(RECONNECT_LONGEST);
    }
}

/// Two sockets per connection add up; ztunnel's image comes with a high limit.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        warn!(%error, "raise the limit of open files failed");
    }
}
