//! The agent's end of ZDS, as far as a test of the proxy needs it.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use prost::Message;
use redirect_tests::hbone::zds::{
    self, Ack, AddWorkload, Answer, DelWorkload, KeepWorkload, Payload, SnapshotSent, Version,
    WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello,
};
use redirect_tests::topology::Pod;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;

const PATIENCE: Duration = Duration::from_secs(5);

/// An agent that says what the test says.
pub struct Agent {
    listener: UnixListener,
    connection: Option<UnixStream>,
    runtime: Runtime,
}

impl Agent {
    /// Listens at `path`, in place of who did so before.
    pub fn listen(path: &Path) -> Result<Self> {
        if path.exists() {
            fs::remove_file(path)?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )?;
        let addr = SocketAddrUnix::new(path)?;
        rustix::net::bind(&socket, &addr).with_context(|| format!("bind {}", path.display()))?;
        rustix::net::listen(&socket, 1)?;
        let entered = runtime.enter();
        let listener = UnixListener::from_std(std::os::unix::net::UnixListener::from(socket))?;
        drop(entered);
        Ok(Self { listener, connection: None, runtime })
    }

    /// Waits for the proxy and its hello.
    pub fn accept(&mut self) -> Result<()> {
        let Self { listener, runtime, .. } = self;
        let connection = runtime.block_on(async {
            let accept = tokio::time::timeout(PATIENCE, listener.accept());
            let (stream, _) = accept.await.context("wait for the proxy")??;
            let (bytes, fds) = tokio::time::timeout(PATIENCE, zds::recv(&stream))
                .await
                .context("wait for the hello")??
                .context("expected a hello, but the proxy is gone")?;
            ensure!(ZdsHello::decode(&bytes[..])? == ZdsHello { version: Version::V1 as i32 });
            ensure!(fds.is_empty());
            Ok(stream)
        })?;
        self.connection = Some(connection);
        Ok(())
    }

    /// Sends a request and gives the error in its ack, empty if all is well.
    pub fn ask(&self, payload: Payload, fd: Option<&File>) -> Result<String> {
        let stream = self.connection.as_ref().context("no proxy is connected")?;
        let bytes = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
        self.runtime.block_on(async {
            let fd = fd.map(AsFd::as_fd);
            zds::send(stream, &bytes, fd).await.context("send to the proxy")?;
            let (bytes, _) = tokio::time::timeout(PATIENCE, zds::recv(stream))
                .await
                .context("wait for the ack")??
                .context("expected an ack, but the proxy is gone")?;
            match WorkloadResponse::decode(&bytes[..])?.payload {
                Some(Answer::Ack(Ack { error })) => Ok(error),
                None => Ok("an answer without a payload".to_owned()),
            }
        })
    }

    /// Adds a pod under its name as the uid, and expects that to succeed.
    pub fn add(&self, pod: &Pod) -> Result<()> {
        self.add_as(&pod.to_string(), pod)
    }

    /// Adds a pod under this uid, and expects that to succeed.
    pub fn add_as(&self, uid: &str, pod: &Pod) -> Result<()> {
        let netns = File::open(pod.netns_path())?;
        let error = self.ask(add(uid, Some(info(pod))), Some(&netns))?;
        ensure!(error.is_empty(), "add {pod}: {error}");
        Ok(())
    }

    pub fn del(&self, pod: &Pod) -> Result<()> {
        let error = self.ask(Payload::Del(DelWorkload { uid: pod.to_string() }), None)?;
        ensure!(error.is_empty(), "delete {pod}: {error}");
        Ok(())
    }

    pub fn keep(&self, pod: &Pod) -> Result<()> {
        let error = self.ask(Payload::Keep(KeepWorkload { uid: pod.to_string() }), None)?;
        ensure!(error.is_empty(), "keep {pod}: {error}");
        Ok(())
    }

    pub fn snapshot_sent(&self) -> Result<()> {
        let error = self.ask(Payload::SnapshotSent(SnapshotSent {}), None)?;
        ensure!(error.is_empty(), "end the snapshot: {error}");
        Ok(())
    }
}

pub fn add(uid: &str, info: Option<WorkloadInfo>) -> Payload {
    Payload::Add(AddWorkload { uid: uid.to_owned(), workload_info: info })
}

/// Every pod's service account is called as the pod.
pub fn info(pod: &Pod) -> WorkloadInfo {
    WorkloadInfo {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.name.clone(),
    }
}
