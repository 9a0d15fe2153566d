//! 15008: HBONE from peers, whose identity is in their certificate.
//!
//! ztunnel: `src/proxy/inbound.rs`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::ILLEGAL_PORTS;
use super::access_log::{Direction, Outcome, Over, Record};
use super::ca::Identity;
use super::inpod::canonical;
use super::proxy::Workload;
use super::tls;
use super::tunnel::{self, TunnelRequest};

/// Serves one HBONE connection and all of its streams.
pub(super) async fn serve(
    workload: Arc<Workload>,
    stream: TcpStream,
    src: SocketAddr,
) -> io::Result<()> {
    let dst = canonical(stream.local_addr()?);
    let mut record = workload.record(Direction::Inbound, src, dst);
    record.over = Some(Over::Hbone);
    let stream = match TlsAcceptor::from(workload.tls.server.clone()).accept(stream).await {
        Ok(stream) => stream,
        Err(error) => {
            workload.write(record.fail(Outcome::Denied, format!("TLS: {error}")));
            return Ok(());
        }
    };
    let Some(identity) = tls::peer_identity(stream.get_ref().1) else {
        workload.write(record.fail(Outcome::Denied, "no SPIFFE identity in the certificate"));
        return Ok(());
    };
    let drain = workload.stop.clone();
    let handle = |request| {
        workload.stop.spawn(connect(workload.clone(), request, identity.clone(), src, dst));
    };
    if let Err(error) = tunnel::serve(stream, drain.draining(), handle).await {
        debug!(%src, %error, "HBONE connection ended");
    }
    Ok(())
}

/// Serves one CONNECT.
async fn connect(
    workload: Arc<Workload>,
    request: TunnelRequest,
    identity: Identity,
    src: SocketAddr,
    dst: SocketAddr,
) {
    let mut record = workload.record(Direction::Inbound, src, dst);
    record.over = Some(Over::Hbone);
    record.peer_identity = Some(identity.to_string());
    match reach(&workload, &request, &mut record).await {
        Ok(app) => {
            workload.write(&record);
            match request.accept() {
                Ok(stream) => tunnel::copy_tunnel(app, stream).await,
                Err(error) => debug!(%src, %error, "the client is gone"),
            }
        }
        Err(status) => {
            workload.write(&record);
            request.refuse(status);
        }
    }
}

/// Connects to what the client asks for, or says with which status it is refused.
async fn reach(
    workload: &Workload,
    request: &TunnelRequest,
    record: &mut Record,
) -> Result<TcpStream, StatusCode> {
    let target = request.authority().map_err(|error| {
        record.fail(Outcome::Error, error);
        StatusCode::BAD_REQUEST
    })?;
    let own = record.dst.ip();
    // From here on, what the client wanted and not 15008.
    record.dst = target;
    if target.ip() != own {
        record.fail(Outcome::Denied, format!("ip mismatch: {own} != {}", target.ip()));
        return Err(StatusCode::BAD_REQUEST);
    }
    if ILLEGAL_PORTS.contains(&target.port()) {
        record.fail(Outcome::Loop, "attempted recursive call to ourselves");
        return Err(StatusCode::SERVICE_UNAVAILABLE);
    }
    record.via = Some(target);
    workload.inpod.connect(Some(record.src.ip()), target).await.map_err(|error| {
        record.fail_to_connect(&error);
        StatusCode::SERVICE_UNAVAILABLE
    })
}
