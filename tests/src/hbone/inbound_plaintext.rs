//! 15006: plaintext from outside the mesh, let in unless the workload's policy is STRICT.
//!
//! ztunnel: `src/proxy/inbound_passthrough.rs`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::ILLEGAL_PORTS;
use super::access_log::{Direction, Outcome, Over};
use super::inpod::original_destination;
use super::proxy::Workload;
use super::tunnel;

/// Serves one connection; a denied one is closed with no bytes.
pub(super) async fn serve(
    workload: Arc<Workload>,
    stream: TcpStream,
    src: SocketAddr,
) -> io::Result<()> {
    let dst = original_destination(&stream)?;
    let mut record = workload.record(Direction::InboundPlaintext, src, dst);
    record.over = Some(Over::Plaintext);
    if ILLEGAL_PORTS.contains(&dst.port()) {
        workload.write(record.fail(Outcome::Loop, "attempted recursive call to ourselves"));
        return Ok(());
    }
    let info = &workload.info;
    let Some(view) = workload.mesh.wait_for(&info.namespace, &info.name).await else {
        workload.write(record.fail(Outcome::Denied, "no manifest of the workload"));
        return Ok(());
    };
    if view.is_strict(&info.namespace, &info.name, dst.port()) {
        workload.write(record.fail(Outcome::Denied, "PeerAuthentication is STRICT"));
        return Ok(());
    }
    record.via = Some(dst);
    match workload.inpod.connect(Some(src.ip()), dst).await {
        Ok(app) => {
            workload.write(&record);
            tunnel::copy_tcp(stream, app).await;
        }
        Err(error) => workload.write(record.fail_to_connect(&error)),
    }
    Ok(())
}
