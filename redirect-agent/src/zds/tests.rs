//! The server over real SEQPACKET sockets, with proxies that follow a script.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    future::pending,
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd as _, OwnedFd, RawFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
        unix::net::UnixListener as StreamListener,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::{
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
        UnixAddr, bind, connect, listen, recvmsg, sendmsg, socket,
    },
    unistd::close,
};
use prost::Message as _;
use tempfile::TempDir;
use tokio::{
    io::Interest, net::UnixStream, sync::broadcast, sync::oneshot, task::JoinHandle,
    task::yield_now, time::timeout,
};

use super::{
    AddError, AddOutcome, Answer, BindError, Deleted, Event, Handle, ProxyId, Server, Workload,
    messages::{
        Ack, MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES, Request, Response, WorkloadInfo,
        WorkloadRequest, WorkloadResponse,
    },
};

const HELLO: &[u8] = &[0x08, 0x01];
const GOOD_ACK: &[u8] = &[0x0a, 0x00];

/// Far beyond what any step takes: only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: nothing within {PATIENCE:?}"))
}

/// Lets every task of this (single-threaded) runtime do what it can do now.
async fn settle() {
    for _ in 0..100 {
        yield_now().await;
    }
}

/// A directory that goes away with the test.
struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("ztunnel/ztunnel.sock")
    }
}

/// A namespace of this process. Only "net" is a netns; the others stand in for the netns of more
/// pods, because making those takes root: the server looks at file system and inode.
fn ns(kind: &str) -> Arc<OwnedFd> {
    Arc::new(File::open(format!("/proc/self/ns/{kind}")).unwrap().into())
}

fn ns_inode(kind: &str) -> u64 {
    fs::metadata(format!("/proc/self/ns/{kind}")).unwrap().ino()
}

/// The pod with this uid.
fn pod(uid: &str) -> Workload {
    Workload {
        uid: uid.into(),
        namespace: "shop".into(),
        name: format!("pod-{uid}"),
        service_account: "till".into(),
    }
}

/// A running server.
struct Rig {
    dir: Dir,
    handle: Handle,
    events: broadcast::Receiver<Event>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Rig {
    /// Deadlines that no test meets by accident.
    async fn start() -> Self {
        Self::start_with(PATIENCE).await
    }

    async fn start_with(deadline: Duration) -> Self {
        let dir = Dir::new();
        let server = Server::bind(&dir.socket()).unwrap().with_deadline(deadline);
        let handle = server.handle();
        let events = handle.subscribe();
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Self { dir, handle, events, stop, server }
    }

    /// Connects and says hello; the server has seen it when this returns.
    async fn proxy(&mut self) -> FakeProxy {
        let proxy = FakeProxy::connect(&self.dir.socket()).await;
        proxy.say(HELLO).await;
        assert!(matches!(self.event().await, Event::ProxyConnected { .. }));
        proxy
    }

    /// A proxy whose snapshot is these requests, and done.
    async fn proxy_with(&mut self, snapshot: &[&str]) -> FakeProxy {
        let proxy = self.proxy().await;
        for what in snapshot {
            proxy.takes(what).await;
        }
        proxy.takes("snapshot sent").await;
        assert!(matches!(self.event().await, Event::SnapshotDone { .. }));
        proxy
    }

    async fn event(&mut self) -> Event {
        soon("an event", self.events.recv()).await.unwrap()
    }

    /// Starts to add; the server knows the workload when this returns.
    async fn adding(&self, uid: &str, kind: &str) -> JoinHandle<Result<AddOutcome, AddError>> {
        let (handle, workload, netns) = (self.handle.clone(), pod(uid), ns(kind));
        let adding = tokio::spawn(async move { handle.add(workload, netns).await });
        settle().await;
        adding
    }

    async fn deleting(&self, uid: &str) -> JoinHandle<Deleted> {
        let (handle, uid) = (self.handle.clone(), uid.to_owned());
        let deleting = tokio::spawn(async move { handle.delete(&uid).await });
        settle().await;
        deleting
    }

    async fn known(&self, uid: &str, kind: &str) {
        let outcome = soon("add", self.handle.add(pod(uid), ns(kind))).await;
        assert_eq!(outcome.unwrap(), AddOutcome::NoProxy);
    }
}

/// What a proxy received in one packet.
#[derive(Debug)]
struct Received {
    request: Request,
    length: usize,
    /// Inodes of the fds that came with it.
    fds: Vec<u64>,
}

/// The client side of ZDS, as ztunnel's `src/inpod/{packet,protocol}.rs`.
struct FakeProxy(UnixStream);

impl FakeProxy {
    async fn connect(path: &Path) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        Self(UnixStream::from_std(fd.into()).unwrap())
    }

    async fn say(&self, packet: &[u8]) {
        self.say_with(packet, &[]).await;
    }

    async fn say_with(&self, packet: &[u8], fds: &[RawFd]) {
        let rights = (!fds.is_empty()).then_some(ControlMessage::ScmRights(fds));
        let send = || {
            let (socket, iov) = (self.0.as_raw_fd(), [IoSlice::new(packet)]);
            Ok(sendmsg::<()>(socket, &iov, rights.as_slice(), MsgFlags::MSG_NOSIGNAL, None)?)
        };
        let sent = soon("send", self.0.async_io(Interest::WRITABLE, send)).await.unwrap();
        assert_eq!(sent, packet.len());
    }

    fn recv_now(&self) -> io::Result<(Vec<u8>, Vec<u64>)> {
        let mut packet = vec![0; MAX_REQUEST_BYTES];
        let mut space = nix::cmsg_space!([RawFd; 8]);
        let (length, fds) = {
            let mut iov = [IoSliceMut::new(&mut packet)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
            let message = recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
            assert!(!message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
            let mut fds = Vec::new();
            for cmsg in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = cmsg {
                    for fd in raw {
                        fds.push(fs::metadata(format!("/proc/self/fd/{fd}"))?.ino());
                        close(fd)?;
                    }
                }
            }
            (message.bytes, fds)
        };
        packet.truncate(length);
        Ok((packet, fds))
    }

    async fn recv(&self) -> (Vec<u8>, Vec<u64>) {
        let recv = self.0.async_io(Interest::READABLE, || self.recv_now());
        soon("a request", recv).await.unwrap_or_default()
    }

    /// Receives one request, which must be this, and does not answer.
    async fn gets(&self, what: &str) -> Received {
        let (packet, fds) = self.recv().await;
        assert!(!packet.is_empty(), "expected {what}, was disconnected");
        let request = WorkloadRequest::decode(&packet[..]).unwrap().payload.unwrap();
        let got = match &request {
            Request::Add(add) => format!("add {}", add.uid),
            Request::Del(del) => format!("del {}", del.uid),
            Request::Keep(keep) => format!("keep {}", keep.uid),
            Request::SnapshotSent(_) => "snapshot sent".into(),
        };
        assert_eq!(got, what);
        let expected_fds = usize::from(matches!(request, Request::Add(_)));
        assert_eq!(fds.len(), expected_fds, "{what}: an Add has exactly one fd, others none");
        Received { request, length: packet.len(), fds }
    }

    /// Receives one request, which must be this, and acknowledges it.
    async fn takes(&self, what: &str) -> Received {
        let received = self.gets(what).await;
        self.ack().await;
        received
    }

    async fn ack(&self) {
        self.say(GOOD_ACK).await;
    }

    async fn nack(&self, error: &str) {
        let ack = Response::Ack(Ack { error: error.into() });
        self.say(&WorkloadResponse { payload: Some(ack) }.encode_to_vec()).await;
    }

    /// The server has nothing to say, or waits for an answer.
    async fn hears_nothing(&self) {
        settle().await;
        let error = self.recv_now().expect_err("heard something");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    async fn is_disconnected(&self) {
        let (packet, _) = self.recv().await;
        assert!(packet.is_empty(), "expected to be disconnected, got {packet:?}");
    }
}

fn gone(event: Event) -> (u64, String) {
    match event {
        Event::ProxyGone { id, reason } => (id.0, reason),
        other => panic!("expected ProxyGone, got {other:?}"),
    }
}

// --- the snapshot

#[tokio::test]
async fn snapshot_is_sent_one_by_one_and_each_ack_is_awaited() {
    let mut rig = Rig::start().await;
    rig.known("z", "net").await;
    rig.handle.keep(pod("k")).unwrap();
    rig.known("a", "uts").await;

    let proxy = rig.proxy().await;
    for what in ["add z", "keep k", "add a", "snapshot sent"] {
        proxy.gets(what).await;
        proxy.hears_nothing().await;
        assert!(rig.events.is_empty(), "the snapshot is not done before its last ack");
        proxy.ack().await;
    }
    let results = [("a", Answer::Added), ("k", Answer::Kept), ("z", Answer::Added)];
    let results: BTreeMap<_, _> = results.map(|(uid, answer)| (uid.to_owned(), answer)).into();
    let done = Event::SnapshotDone { id: ProxyId(1), results: Arc::new(results) };
    assert_eq!(rig.event().await, done);
    proxy.hears_nothing().await;

    assert!(rig.handle.acked("z") && rig.handle.acked("a"));
    assert!(!rig.handle.acked("k"), "a kept workload may not run there at all");
    assert!(!rig.handle.acked("unknown"));
}

#[tokio::test]
async fn empty_snapshot_is_just_its_end() {
    let mut rig = Rig::start().await;
    let proxy = rig.proxy_with(&[]).await;
    proxy.hears_nothing().await;
}

#[tokio::test]
async fn add_carries_who_the_workload_is_and_its_netns() {
    let mut rig = Rig::start().await;
    rig.known("u-1", "net").await;
    let proxy = rig.proxy().await;
    let received = proxy.gets("add u-1").await;
    assert_eq!(received.fds, [ns_inode("net")]);
    let Request::Add(add) = received.request else { unreachable!() };
    let info = WorkloadInfo {
        name: "pod-u-1".into(),
        namespace: "shop".into(),
        service_account: "till".into(),
    };
    assert_eq!(add.workload_info, Some(info));
}

#[tokio::test]
async fn workload_added_and_deleted_during_the_snapshot_ends_deleted() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    let proxy = rig.proxy().await;
    proxy.gets("add a").await;
    let adding = rig.adding("b", "uts").await;
    let deleting = rig.deleting("b").await;
    assert!(matches!(adding.await.unwrap(), Err(AddError::Superseded { .. })));
    proxy.ack().await;
    proxy.takes("snapshot sent").await;
    proxy.takes("del b").await;
    proxy.hears_nothing().await;
    assert_eq!(deleting.await.unwrap(), Deleted { acked: vec![ProxyId(1)], gone: vec![] });
}

#[tokio::test]
async fn workload_added_during_the_snapshot_follows_it() {
    let mut rig = Rig::start().await;
    rig.known("z", "net").await;
    let proxy = rig.proxy().await;
    proxy.gets("add z").await;
    let second = rig.adding("y", "uts").await;
    let third = rig.adding("x", "ipc").await;
    proxy.ack().await;
    proxy.takes("snapshot sent").await;
    proxy.takes("add y").await;
    proxy.takes("add x").await;
    assert_eq!(second.await.unwrap().unwrap(), AddOutcome::Acked);
    assert_eq!(third.await.unwrap().unwrap(), AddOutcome::Acked);
}

#[tokio::test]
async fn workload_deleted_before_its_turn_is_left_out_of_the_snapshot() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    rig.known("b", "uts").await;
    let proxy = rig.proxy().await;
    proxy.gets("add a").await;
    let deleting = rig.deleting("b").await;
    proxy.ack().await;
    proxy.takes("snapshot sent").await;
    proxy.takes("del b").await;
    deleting.await.unwrap();
}

#[tokio::test]
async fn workload_deleted_after_its_turn_in_the_snapshot_is_deleted_after_it() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    rig.known("b", "uts").await;
    let proxy = rig.proxy().await;
    proxy.takes("add a").await;
    proxy.gets("add b").await;
    let deleting = rig.deleting("a").await;
    let adding = rig.adding("a", "net").await;
    proxy.ack().await;
    proxy.takes("snapshot sent").await;
    proxy.takes("del a").await;
    proxy.takes("add a").await;
    deleting.await.unwrap();
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
}

#[tokio::test]
async fn refusal_in_the_snapshot_concerns_its_workload_only() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    rig.known("b", "uts").await;
    let proxy = rig.proxy().await;
    proxy.gets("add a").await;
    proxy.nack("no such netns").await;
    proxy.takes("add b").await;
    proxy.takes("snapshot sent").await;
    let Event::SnapshotDone { results, .. } = rig.event().await else { panic!("no snapshot") };
    assert_eq!(results["a"], Answer::Refused("no such netns".into()));
    assert_eq!(results["b"], Answer::Added);

    // Until it is deleted, ztunnel keeps trying and is not ready.
    proxy.takes("del a").await;
    proxy.hears_nothing().await;
    assert!(!rig.handle.acked("a") && rig.handle.acked("b"));

    // It is tried again when it is added again.
    let adding = rig.adding("a", "net").await;
    proxy.takes("add a").await;
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
}

#[tokio::test]
async fn proxy_that_reconnects_gets_what_is_known_now() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    rig.known("b", "uts").await;
    drop(rig.proxy_with(&["add a", "add b"]).await);
    assert_eq!(gone(rig.event().await), (1, "closed the connection".into()));

    assert_eq!(rig.handle.delete("a").await, Deleted::default());
    rig.known("c", "ipc").await;
    let proxy = rig.proxy_with(&["add b", "add c"]).await;
    proxy.hears_nothing().await;
}

// --- changes

#[tokio::test]
async fn add_goes_to_the_newest_proxy_and_del_to_all() {
    let mut rig = Rig::start().await;
    let old = rig.proxy_with(&[]).await;
    let new = rig.proxy_with(&[]).await;

    let adding = rig.adding("a", "net").await;
    old.hears_nothing().await;
    new.gets("add a").await;
    assert!(!adding.is_finished() && !rig.handle.acked("a"));
    new.ack().await;
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
    assert!(rig.handle.acked("a"));
    assert_eq!(rig.event().await, Event::WorkloadAdded { id: ProxyId(2), uid: "a".into() });

    let deleting = rig.deleting("a").await;
    old.takes("del a").await;
    new.gets("del a").await;
    settle().await;
    assert!(!deleting.is_finished(), "every ack is awaited");
    new.ack().await;
    let acked = vec![ProxyId(1), ProxyId(2)];
    assert_eq!(deleting.await.unwrap(), Deleted { acked, gone: vec![] });
}

#[tokio::test]
async fn newest_proxy_dies_and_the_one_before_is_told_what_it_lacks() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    let old = rig.proxy_with(&["add a"]).await;
    let new = rig.proxy_with(&["add a"]).await;
    let adding = rig.adding("b", "uts").await;
    new.takes("add b").await;
    adding.await.unwrap().unwrap();
    assert_eq!(rig.event().await, Event::WorkloadAdded { id: ProxyId(2), uid: "b".into() });

    drop(new);
    assert_eq!(gone(rig.event().await).0, 2);
    old.gets("add b").await;
    assert!(rig.handle.acked("a") && !rig.handle.acked("b"));
    old.ack().await;
    assert_eq!(rig.event().await, Event::WorkloadAdded { id: ProxyId(1), uid: "b".into() });
    assert!(rig.handle.acked("b"));
}

#[tokio::test]
async fn newest_proxy_dies_over_an_add_and_the_one_before_takes_it() {
    let mut rig = Rig::start().await;
    let old = rig.proxy_with(&[]).await;
    let new = rig.proxy_with(&[]).await;
    let adding = rig.adding("a", "net").await;
    new.gets("add a").await;
    drop(new);
    old.takes("add a").await;
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
}

#[tokio::test]
async fn only_proxy_dies_over_an_add_and_the_next_one_gets_it() {
    let mut rig = Rig::start().await;
    let proxy = rig.proxy_with(&[]).await;
    let adding = rig.adding("a", "net").await;
    proxy.gets("add a").await;
    drop(proxy);
    let error = adding.await.unwrap().unwrap_err();
    assert!(matches!(&error, AddError::ProxyGone { proxy: ProxyId(1), .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "add workload shop/pod-a (uid a): ztunnel (connection 1) closed the connection, \
         and no other is connected"
    );
    gone(rig.event().await);
    rig.proxy_with(&["add a"]).await;
}

#[tokio::test]
async fn refused_add_is_an_error_and_the_proxy_is_told_to_give_up() {
    let mut rig = Rig::start().await;
    let proxy = rig.proxy_with(&[]).await;
    let adding = rig.adding("a", "net").await;
    proxy.gets("add a").await;
    proxy.nack("port 15008 is taken").await;
    let error = adding.await.unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "add workload shop/pod-a (uid a): ztunnel (connection 1) refused it: \"port 15008 is taken\""
    );
    let error = "port 15008 is taken".to_owned();
    let refused = Event::WorkloadRefused { id: ProxyId(1), uid: "a".into(), error: error.clone() };
    assert_eq!(rig.event().await, refused);

    // Added again before the Del is acknowledged: Del and Add stay in order.
    proxy.gets("del a").await;
    let adding = rig.adding("a", "net").await;
    proxy.hears_nothing().await;
    proxy.ack().await;
    proxy.takes("add a").await;
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
    proxy.hears_nothing().await;
}

#[tokio::test]
async fn add_and_delete_twice_are_harmless() {
    let mut rig = Rig::start().await;
    let proxy = rig.proxy_with(&[]).await;
    let adding = rig.adding("a", "net").await;
    proxy.takes("add a").await;
    adding.await.unwrap().unwrap();
    let again = soon("add again", rig.handle.add(pod("a"), ns("net"))).await;
    assert_eq!(again.unwrap(), AddOutcome::Acked);
    proxy.hears_nothing().await;

    let first = rig.deleting("a").await;
    let second = rig.deleting("a").await;
    proxy.takes("del a").await;
    assert_eq!(first.await.unwrap(), second.await.unwrap());
    assert_eq!(rig.handle.delete("a").await, Deleted::default());
    proxy.hears_nothing().await;
}

#[tokio::test]
async fn pod_sandbox_is_made_anew_and_its_workload_gets_the_new_netns() {
    let mut rig = Rig::start().await;
    let proxy = rig.proxy_with(&[]).await;
    let first = rig.adding("a", "net").await;
    assert_eq!(proxy.gets("add a").await.fds, [ns_inode("net")]);
    let second = rig.adding("a", "uts").await;
    assert!(matches!(first.await.unwrap(), Err(AddError::Superseded { .. })));
    proxy.ack().await;
    settle().await;
    assert!(!rig.handle.acked("a") && !second.is_finished(), "that ack was for the old netns");
    assert_eq!(proxy.takes("add a").await.fds, [ns_inode("uts")]);
    assert_eq!(second.await.unwrap().unwrap(), AddOutcome::Acked);
}

#[tokio::test]
async fn second_uid_for_a_netns_has_to_wait_until_the_first_is_deleted() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    let proxy = rig.proxy_with(&["add a"]).await;
    let error = rig.handle.add(pod("b"), ns("net")).await.unwrap_err();
    let inode = ns_inode("net");
    assert_eq!(
        error.to_string(),
        format!(
            "add workload shop/pod-b (uid b): its netns (inode {inode}) belongs to workload \
             shop/pod-a (uid a); delete that one first"
        )
    );
    proxy.hears_nothing().await;

    let deleting = rig.deleting("a").await;
    let adding = rig.adding("b", "net").await;
    proxy.gets("del a").await;
    proxy.hears_nothing().await;
    proxy.ack().await;
    proxy.takes("add b").await;
    deleting.await.unwrap();
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
}

#[tokio::test]
async fn workload_gets_the_former_netns_of_one_that_moved_twice_while_ztunnel_was_busy() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    let proxy = rig.proxy_with(&["add a"]).await;
    rig.adding("busy", "pid").await;
    proxy.gets("add busy").await;
    rig.adding("a", "uts").await;
    rig.adding("b", "net").await;
    rig.adding("a", "ipc").await;
    proxy.ack().await;
    // What is left of the moves: b comes before a, but ztunnel still serves a in b's netns.
    proxy.takes("del a").await;
    assert_eq!(proxy.takes("add b").await.fds, [ns_inode("net")]);
    assert_eq!(proxy.takes("add a").await.fds, [ns_inode("ipc")]);
    proxy.hears_nothing().await;
}

#[tokio::test]
async fn keep_is_never_sent_after_the_snapshot() {
    let mut rig = Rig::start().await;
    let proxy = rig.proxy().await;
    proxy.gets("snapshot sent").await;
    rig.handle.keep(pod("a")).unwrap();
    proxy.ack().await;
    rig.handle.keep(pod("b")).unwrap();
    proxy.hears_nothing().await;

    // With a netns it becomes an Add, and stays one.
    let adding = rig.adding("a", "net").await;
    proxy.takes("add a").await;
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
    rig.handle.keep(pod("a")).unwrap();
    proxy.hears_nothing().await;
    assert!(rig.handle.acked("a"));
    drop(proxy);
    while !matches!(rig.event().await, Event::ProxyGone { .. }) {}
    rig.proxy_with(&["keep b", "add a"]).await;
}

#[tokio::test]
async fn workload_that_ztunnel_could_not_read_is_refused() {
    let mut rig = Rig::start().await;
    let proxy = rig.proxy_with(&[]).await;
    let named = |name: usize| Workload { name: "n".repeat(name), ..pod("a") };
    let error = rig.handle.add(named(1024), ns("net")).await.unwrap_err();
    let AddError::TooLong { bytes, .. } = error else { panic!("{error:?}") };
    assert!(error.to_string().starts_with("add workload shop/nnn"), "{error}");
    assert!(matches!(rig.handle.keep(named(1024)), Err(AddError::TooLong { .. })));
    let fits = 1024 - (bytes - MAX_REQUEST_BYTES);
    let error = rig.handle.add(named(fits + 1), ns("net")).await.unwrap_err();
    assert!(matches!(error, AddError::TooLong { bytes: 1025, .. }), "{error:?}");
    proxy.hears_nothing().await;
    assert!(rig.handle.status().workloads.is_empty());

    let (handle, workload) = (rig.handle.clone(), named(fits));
    let adding = tokio::spawn(async move { handle.add(workload, ns("net")).await });
    assert_eq!(proxy.takes("add a").await.length, MAX_REQUEST_BYTES);
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
}

#[tokio::test]
async fn workload_without_uid_or_netns_is_refused() {
    let rig = Rig::start().await;
    let error = rig.handle.add(pod(""), ns("net")).await.unwrap_err();
    assert!(matches!(error, AddError::NoUid { .. }), "{error:?}");
    let file = Arc::new(File::open("/dev/null").unwrap().into());
    let error = rig.handle.add(pod("a"), file).await.unwrap_err();
    assert!(matches!(error, AddError::NotNetns { .. }), "{error:?}");
    assert!(rig.handle.status().workloads.is_empty());
}

// --- proxies that misbehave

/// Connects a proxy with a snapshot, has it misbehave, and expects it, and only it, disconnected.
async fn misbehaves(deed: impl AsyncFnOnce(&FakeProxy), expected: &str) {
    let mut rig = Rig::start().await;
    let good = rig.proxy_with(&[]).await;
    let bad = rig.proxy_with(&[]).await;
    deed(&bad).await;
    bad.is_disconnected().await;
    let (id, reason) = gone(rig.event().await);
    assert_eq!(id, 2);
    assert!(reason.starts_with(expected), "{reason}");
    let adding = rig.adding("a", "net").await;
    good.takes("add a").await;
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
}

#[tokio::test]
async fn proxy_acknowledges_what_nobody_asked() {
    misbehaves(async |p| p.ack().await, "sent 2 bytes without having been asked").await;
}

#[tokio::test]
async fn proxy_says_hello_twice() {
    misbehaves(async |p| p.say(HELLO).await, "sent 2 bytes without having been asked").await;
}

#[tokio::test]
async fn proxy_sends_more_than_a_message_may_have() {
    let oversize = [0x0a; MAX_RESPONSE_BYTES + 1];
    misbehaves(async |p| p.say(&oversize).await, "sent a message of more than 4096 bytes").await;
}

#[tokio::test]
async fn proxy_sends_file_descriptors() {
    let file = File::open("/dev/null").unwrap();
    let fds = || fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let null =
        || fds().filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/null")));
    let before = null().count();
    let send = async |p: &FakeProxy| p.say_with(GOOD_ACK, &[file.as_raw_fd(); 8]).await;
    misbehaves(send, "sent file descriptors").await;
    // Other tests of this process may have it open for a moment, but not eight times.
    assert!(null().count() < before + 8, "they are closed");
}

#[tokio::test]
async fn proxy_answers_with_nonsense() {
    for (answer, expected) in [
        (&b"\xff\xff\xff\xff"[..], "sent 4 bytes that are no response: "),
        (HELLO, "sent 2 bytes that are no response: "),
        (b"\x12\x00", "sent a response without an ack"),
    ] {
        let mut rig = Rig::start().await;
        let proxy = rig.proxy_with(&[]).await;
        let adding = rig.adding("a", "net").await;
        proxy.gets("add a").await;
        proxy.say(answer).await;
        proxy.is_disconnected().await;
        let reason = gone(rig.event().await).1;
        assert!(reason.starts_with(expected), "{reason}");
        assert!(matches!(adding.await.unwrap(), Err(AddError::ProxyGone { .. })));
    }
}

#[tokio::test]
async fn proxy_answers_once_more_than_it_was_asked() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    rig.known("b", "uts").await;
    let proxy = rig.proxy().await;
    proxy.gets("add a").await;
    // Both are there before the server asks for b: the second must not count as b's.
    proxy.ack().await;
    proxy.ack().await;
    proxy.is_disconnected().await;
    assert!(gone(rig.event().await).1.starts_with("sent 2 bytes without having been asked"));
    assert!(!rig.handle.acked("b"));
}

#[tokio::test]
async fn proxy_refuses_what_cannot_be_refused() {
    let mut rig = Rig::start().await;
    let proxy = rig.proxy().await;
    proxy.gets("snapshot sent").await;
    proxy.nack("why?").await;
    proxy.is_disconnected().await;
    assert_eq!(gone(rig.event().await).1, "refused SnapshotSent: \"why?\"");
}

#[tokio::test]
async fn client_without_a_proper_hello_never_counts_as_a_proxy() {
    let mut rig = Rig::start().await;
    let good = rig.proxy_with(&[]).await;
    for hello in [&b"\x08\x02"[..], b"\x08\x00", b"GET / HTTP/1.1\r\n\r\n", GOOD_ACK] {
        let client = FakeProxy::connect(&rig.dir.socket()).await;
        client.say(hello).await;
        client.is_disconnected().await;
    }
    assert!(rig.events.is_empty());
    let adding = rig.adding("a", "net").await;
    good.takes("add a").await;
    adding.await.unwrap().unwrap();
}

#[tokio::test]
async fn client_without_hello_is_disconnected_at_the_deadline() {
    let rig = Rig::start_with(Duration::from_millis(50)).await;
    let client = FakeProxy::connect(&rig.dir.socket()).await;
    client.is_disconnected().await;
}

#[tokio::test]
async fn proxy_that_never_answers_is_disconnected_and_delays_no_other() {
    let mut rig = Rig::start_with(Duration::from_secs(1)).await;
    rig.known("a", "net").await;
    let stuck = rig.proxy().await;
    stuck.gets("add a").await;
    // While the first one is stuck in its snapshot:
    let good = rig.proxy_with(&["add a"]).await;
    let adding = rig.adding("b", "uts").await;
    good.takes("add b").await;
    assert_eq!(adding.await.unwrap().unwrap(), AddOutcome::Acked);
    assert_eq!(rig.event().await, Event::WorkloadAdded { id: ProxyId(2), uid: "b".into() });

    let deleting = rig.deleting("b").await;
    good.takes("del b").await;
    let (id, reason) = gone(rig.event().await);
    assert_eq!(id, 1);
    assert_eq!(reason, "did not answer the Add of shop/pod-a (uid a) within 1s");
    stuck.is_disconnected().await;
    let deleted = Deleted { acked: vec![ProxyId(2)], gone: vec![ProxyId(1)] };
    assert_eq!(deleting.await.unwrap(), deleted);
}

// --- the socket

#[tokio::test]
async fn socket_is_for_root_only_and_goes_away_with_the_server() {
    let mut rig = Rig::start().await;
    let socket = rig.dir.socket();
    let mode = fs::symlink_metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    rig.known("a", "net").await;
    let proxy = rig.proxy().await;
    proxy.gets("add a").await;
    let adding = rig.adding("b", "uts").await;

    rig.stop.send(()).unwrap();
    soon("shutdown", rig.server).await.unwrap();
    proxy.is_disconnected().await;
    assert!(!socket.exists());
    let event = soon("an event", rig.events.recv()).await.unwrap();
    assert_eq!(gone(event), (1, "is let go, because the agent stops".into()));
    assert!(matches!(adding.await.unwrap(), Err(AddError::ProxyGone { .. })));
    assert!(rig.handle.status().proxies.is_empty());
}

#[tokio::test]
async fn proxies_that_connect_before_the_server_runs_are_served_then() {
    let dir = Dir::new();
    let server = Server::bind(&dir.socket()).unwrap();
    let handle = server.handle();
    let proxy = FakeProxy::connect(&dir.socket()).await;
    proxy.say(HELLO).await;
    proxy.hears_nothing().await;
    handle.keep(pod("a")).unwrap();
    let server = tokio::spawn(server.run(pending()));
    proxy.takes("keep a").await;
    proxy.takes("snapshot sent").await;
    server.abort();
}

#[tokio::test]
async fn proxy_is_told_nothing_before_it_is_admitted() {
    let dir = Dir::new();
    let asked = Arc::new(AtomicUsize::new(0));
    let connected = Arc::new(());
    let server = Server::bind(&dir.socket()).unwrap().with_admission({
        let asked = Arc::clone(&asked);
        let connected = Arc::clone(&connected);
        move |process| {
            assert_eq!(process.map(|p| p.pid()), Some(std::process::id().cast_signed()));
            match asked.fetch_add(1, Ordering::SeqCst) {
                0 => anyhow::bail!("not the first one"),
                _ => Ok(Box::new(Arc::clone(&connected))),
            }
        }
    });
    let handle = server.handle();
    handle.keep(pod("a")).unwrap();
    let server = tokio::spawn(server.run(pending()));
    let refused = FakeProxy::connect(&dir.socket()).await;
    refused.say(HELLO).await;
    refused.is_disconnected().await;
    assert!(handle.status().proxies.is_empty());
    let proxy = FakeProxy::connect(&dir.socket()).await;
    proxy.say(HELLO).await;
    proxy.takes("keep a").await;
    proxy.takes("snapshot sent").await;
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    // What it was admitted with lasts as long as its connection.
    let before = Arc::strong_count(&connected);
    drop(proxy);
    soon("the end of the admission", async {
        while Arc::strong_count(&connected) == before {
            tokio::task::yield_now().await;
        }
    })
    .await;
    server.abort();
}

#[tokio::test]
async fn socket_of_a_killed_agent_is_replaced() {
    let dir = Dir::new();
    fs::create_dir(dir.socket().parent().unwrap()).unwrap();
    let flags = SockFlag::SOCK_CLOEXEC;
    let dead = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(dead.as_raw_fd(), &UnixAddr::new(&dir.socket()).unwrap()).unwrap();
    listen(&dead, Backlog::new(1).unwrap()).unwrap();
    assert!(matches!(Server::bind(&dir.socket()), Err(BindError::InUse(_))));
    drop(dead);
    assert!(dir.socket().exists());
    let server = Server::bind(&dir.socket()).unwrap();
    FakeProxy::connect(&dir.socket()).await;
    drop(server);
    assert!(!dir.socket().exists());
}

#[tokio::test]
async fn what_is_not_a_dead_agents_socket_is_left_alone() {
    let rig = Rig::start().await;
    let error = Server::bind(&rig.dir.socket()).unwrap_err();
    assert!(matches!(error, BindError::InUse(_)), "{error}");
    FakeProxy::connect(&rig.dir.socket()).await;

    let dir = Dir::new();
    let file = dir.0.path().join("precious");
    fs::write(&file, "data").unwrap();
    let error = Server::bind(&file).unwrap_err();
    assert!(matches!(error, BindError::NotASocket(_)), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "data");

    let stream = dir.0.path().join("stream.sock");
    let _listener = StreamListener::bind(&stream).unwrap();
    assert!(matches!(Server::bind(&stream), Err(BindError::InUse(_))));

    let long = dir.0.path().join("x".repeat(120));
    let error = Server::bind(&long).unwrap_err().to_string();
    assert!(error.starts_with("bind ZDS socket ") && error.contains("xxx"), "{error}");
}

#[tokio::test]
async fn socket_that_another_agent_put_in_place_survives_this_one() {
    let dir = Dir::new();
    let server = Server::bind(&dir.socket()).unwrap();
    fs::remove_file(dir.socket()).unwrap();
    let other = Server::bind(&dir.socket()).unwrap();
    drop(server);
    assert!(dir.socket().exists());
    drop(other);
}

#[tokio::test]
async fn status_shows_proxies_and_what_the_newest_says_to_each_workload() {
    let mut rig = Rig::start().await;
    rig.known("a", "net").await;
    rig.handle.keep(pod("k")).unwrap();
    let _old = rig.proxy_with(&["add a", "keep k"]).await;
    let new = rig.proxy().await;
    new.gets("add a").await;
    new.nack("busy").await;
    new.gets("keep k").await;

    let status = rig.handle.status();
    assert_eq!(status.socket, rig.dir.socket());
    let [new, old] = &status.proxies[..] else { panic!("{:?}", status.proxies) };
    assert_eq!((new.id, new.snapshot_done, new.added, new.refused), (ProxyId(2), false, 0, 1));
    assert_eq!((old.id, old.snapshot_done, old.added, old.refused), (ProxyId(1), true, 1, 0));
    assert_eq!(old.pid, Some(std::process::id().cast_signed()));
    let json = serde_json::to_value(&status.workloads).unwrap();
    let expected = serde_json::json!([
        {"uid": "a", "namespace": "shop", "name": "pod-a", "service_account": "till",
         "netns_inode": ns_inode("net"), "answer": {"refused": "busy"}},
        {"uid": "k", "namespace": "shop", "name": "pod-k", "service_account": "till",
         "netns_inode": null, "answer": null},
    ]);
    assert_eq!(json, expected);
}
