//! 15053: the workload's DNS.
//!
//! ztunnel: `src/dns/server.rs`. Services of the mesh have their addresses; the rest is asked of the
//! resolver upstream, by a socket in the pod with the mark.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tracing::info;

use super::inpod::InPod;
use super::mesh::Mesh;
use super::stop::Stop;
use crate::dns::{Handler, answer, serve_tcp, serve_udp};
use hickory_proto::op::{Message, ResponseCode};

/// The port of the proxy's DNS.
pub(super) const DNS_PORT: u16 = 15053;
/// How long the resolver upstream is waited for.
const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(5);
const SUFFIX: &str = ".svc.cluster.local.";

/// Opens the sockets and serves them until the proxy ends.
pub(super) async fn start(
    inpod: &Arc<InPod>,
    mesh: &Arc<Mesh>,
    upstream: Option<SocketAddr>,
    stop: &Stop,
) -> io::Result<()> {
    let (pod, mesh) = (inpod.clone(), mesh.clone());
    let handler: Handler = Arc::new(move |query, client, tcp| {
        let (pod, mesh) = (pod.clone(), mesh.clone());
        Box::pin(async move {
            info!(%client, tcp, "DNS query");
            let view = mesh.view();
            let (found, name) = answer(&query, tcp, |name| {
                let (service, namespace) = name.strip_suffix(SUFFIX)?.split_once('.')?;
                view.service_addresses(namespace, service)
            })?;
            if name.ends_with(SUFFIX) {
                return Some(found);
            }
            match upstream {
                Some(upstream) => match forward(&pod, upstream, &query, tcp).await {
                    Ok(answer) => Some(answer),
                    Err(error) => {
                        info!(%upstream, %error, "no answer from upstream");
                        refuse(&query)
                    }
                },
                None => refuse(&query),
            }
        })
    });
    for (udp, tcp) in inpod.dns_sockets(DNS_PORT).await? {
        let (datagrams, connections) = (handler.clone(), handler.clone());
        serve(stop, serve_udp(udp, datagrams));
        serve(stop, serve_tcp(tcp, connections));
    }
    Ok(())
}

fn serve(stop: &Stop, serving: impl Future<Output = ()> + Send + 'static) {
    let draining = stop.clone();
    stop.spawn(async move {
        tokio::select! {
            () = serving => {}
            () = draining.draining() => {}
        }
    });
}

fn refuse(query: &[u8]) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok()?;
    let id = query.metadata.id;
    let mut answer = Message::error_msg(id, query.metadata.op_code, ResponseCode::ServFail);
    answer.queries = query.queries;
    answer.to_vec().ok()
}

async fn forward(
    pod: &InPod,
    upstream: SocketAddr,
    query: &[u8],
    tcp: bool,
) -> io::Result<Vec<u8>> {
    let asked = async {
        if tcp {
            let mut stream = pod.connect(None, upstream).await?;
            return crate::dns::ask_tcp(&mut stream, query).await;
        }
        let socket = pod.udp(upstream).await?;
        socket.send(query).await?;
        let mut answer = vec![0; 65535];
        let len = socket.recv(&mut answer).await?;
        answer.truncate(len);
        Ok(answer)
    };
    timeout(UPSTREAM_TIMEOUT, asked).await?
}
