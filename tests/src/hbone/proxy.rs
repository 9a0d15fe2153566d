//! One workload's proxy: three listeners in its netns, and its DNS.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::{TcpListener, TcpStream};
use tracing::{info, warn};

use super::access_log::{AccessLog, Direction, Record};
use super::ca::{Ca, Identity};
use super::inpod::{self, InPod};
use super::mesh::Mesh;
use super::pool::Pool;
use super::stop::Stop;
use super::tls::WorkloadTls;
use super::zds::WorkloadInfo;
use super::{Dns, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};
use super::{dns, inbound, inbound_plaintext, outbound};

/// Time to breathe after a failed accept: it fails again at once when files have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// What the connections of one workload share.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) info: WorkloadInfo,
    pub(super) inpod: Arc<InPod>,
    pub(super) tls: WorkloadTls,
    pub(super) pool: Pool,
    pub(super) mesh: Arc<Mesh>,
    pub(super) stop: Stop,
    log: AccessLog,
    /// `<namespace>/<name>`
    name: String,
}

impl Workload {
    pub(super) fn record(&self, direction: Direction, src: SocketAddr, dst: SocketAddr) -> Record {
        self.log.record(direction, &self.name, src, dst)
    }

    pub(super) fn write(&self, record: &Record) {
        self.log.write(record);
    }
}

/// A workload's proxy, running; it has to be killed or drained.
#[derive(Debug)]
pub(super) struct Proxy {
    stop: Stop,
}

impl Proxy {
    /// Starts a workload's proxy; when this returns, its listeners are bound.
    pub(super) async fn start(
        ca: &Ca,
        mesh: &Arc<Mesh>,
        log: &AccessLog,
        dns: Option<Dns>,
        info: WorkloadInfo,
        netns: OwnedFd,
    ) -> anyhow::Result<Self> {
        let name = format!("{}/{}", info.namespace, info.name);
        let inpod = InPod::enter(netns).await.context("enter the netns of the workload")?;
        let inpod = Arc::new(inpod);
        let listen =
            async |port| inpod.listen(port).await.with_context(|| format!("listen on port {port}"));
        // In ztunnel's order.
        let hbone = listen(HBONE_PORT).await?;
        let plaintext = listen(INBOUND_PLAINTEXT_PORT).await?;
        let outbound = listen(OUTBOUND_PORT).await?;

        let tls = WorkloadTls::new(ca, &Identity::new(&info.namespace, &info.service_account))?;
        let stop = Stop::default();
        if let Some(Dns { upstream }) = dns {
            dns::start(&inpod, mesh, upstream, &stop).await.context("start DNS")?;
        }
        let pool = Pool::new(inpod.clone(), tls.clone(), stop.clone());
        info!(pod = name, "listening");
        let workload = Arc::new(Workload {
            info,
            inpod,
            tls,
            pool,
            mesh: mesh.clone(),
            stop: stop.clone(),
            log: log.clone(),
            name,
        });
        accept(hbone, workload.clone(), inbound::serve);
        accept(plaintext, workload.clone(), inbound_plaintext::serve);
        accept(outbound, workload, outbound::serve);
        Ok(Self { stop })
    }

    /// Closes all connections at once.
    pub(super) async fn kill(self) {
        self.stop.kill().await;
    }

    /// Lets the connections end by themselves until `deadline`.
    pub(super) async fn drain(self, deadline: Duration) {
        self.stop.drain(deadline).await;
    }
}

fn accept<F>(
    listener: TcpListener,
    workload: Arc<Workload>,
    serve: impl Fn(Arc<Workload>, TcpStream, SocketAddr) -> F + Send + 'static,
) where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let stop = workload.stop.clone();
    stop.spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = workload.stop.draining() => return,
            };
            match accepted.and_then(|(stream, src)| {
                inpod::prepare_accepted(&stream)?;
                Ok((stream, inpod::canonical(src)))
            }) {
                Ok((stream, src)) => {
                    let connection = serve(workload.clone(), stream, src);
                    workload.stop.spawn(async move {
                        if let Err(error) = connection.await {
                            info!(%src, %error, "connection ended before it was handled");
                        }
                    });
                }
                Err(error) => {
                    warn!(pod = workload.name, %error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
}
