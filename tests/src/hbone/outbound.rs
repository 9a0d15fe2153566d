//! 15001: the workload's own calls.
//!
//! ztunnel: `src/proxy/outbound.rs`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::access_log::{Direction, Outcome, Over, Record};
use super::inpod::original_destination;
use super::mesh::{Pod, Route};
use super::pool::Peer;
use super::proxy::Workload;
use super::tunnel::{self, ConnectError};
use super::{HBONE_PORT, ILLEGAL_PORTS};

/// Serves one connection.
pub(super) async fn serve(
    workload: Arc<Workload>,
    stream: TcpStream,
    src: SocketAddr,
) -> io::Result<()> {
    let dst = original_destination(&stream)?;
    let mut record = workload.record(Direction::Outbound, src, dst);
    // ztunnel looks at loopback alone here: a call to the pod's own address comes back to its own
    // 15008, which refuses it. That needs the pod to speak HBONE, which ours may not yet.
    let own = dst.ip().is_loopback() || dst.ip() == src.ip();
    if own && ILLEGAL_PORTS.contains(&dst.port()) {
        workload.write(record.fail(Outcome::Loop, "attempted recursive call to ourselves"));
        return Ok(());
    }
    let info = &workload.info;
    let Some(view) = workload.mesh.wait_for(&info.namespace, &info.name).await else {
        workload.write(record.fail(Outcome::Denied, "no manifest of the workload"));
        return Ok(());
    };
    match workload.mesh.route(&view, dst) {
        Route::Pod(pod, addr) if workload.mesh.speaks_hbone(&pod) => {
            hbone(&workload, stream, record, &pod, addr).await;
        }
        Route::Pod(_, addr) => {
            record.over = Some(Over::Plaintext);
            plain(&workload, stream, record, addr).await;
        }
        Route::Passthrough => {
            record.over = Some(Over::Passthrough);
            plain(&workload, stream, record, dst).await;
        }
        Route::Nowhere(service) => {
            let detail = format!("no endpoint of service {service} on port {}", dst.port());
            workload.write(record.fail(Outcome::Error, detail));
        }
    }
    Ok(())
}

async fn plain(workload: &Workload, stream: TcpStream, mut record: Record, addr: SocketAddr) {
    record.via = Some(addr);
    match workload.inpod.connect(None, addr).await {
        Ok(peer) => {
            workload.write(&record);
            tunnel::copy_tcp(stream, peer).await;
        }
        Err(error) => workload.write(record.fail_to_connect(&error)),
    }
}

async fn hbone(
    workload: &Workload,
    stream: TcpStream,
    mut record: Record,
    pod: &Pod,
    target: SocketAddr,
) {
    let peer =
        Peer { addr: SocketAddr::new(target.ip(), HBONE_PORT), identity: pod.identity.clone() };
    record.over = Some(Over::Hbone);
    record.via = Some(peer.addr);
    let client = match workload.pool.client(&peer).await {
        Ok(client) => client,
        Err(error) => {
            workload.write(match error.downcast_ref::<io::Error>() {
                Some(cause) => record.fail_to_connect(cause),
                None => record.fail(Outcome::Error, format!("{error:#}")),
            });
            return;
        }
    };
    record.peer_identity = Some(peer.identity.to_string());
    match client.connect(target, record.src).await {
        Ok(tunnel) => {
            workload.write(&record);
            tunnel::copy_tunnel(stream, tunnel).await;
        }
        Err(error @ ConnectError::Status(_)) => {
            workload.write(record.fail(Outcome::Refused, error));
        }
        Err(error) => workload.write(record.fail(Outcome::Error, error)),
    }
}
