//! Makes the calls, and follows what the datapath says about them.

use std::{
    io,
    net::{self, IpAddr, SocketAddr},
    os::fd::AsFd as _,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{
    Stream, StreamExt as _,
    future::{join_all, poll_immediate},
};
use nix::sys::utsname::uname;
use tokio::{
    net::TcpSocket,
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Call, Connection, Direction, Outcome, Verification, family,
    judge::{self, Facts},
    plan::{Planned, plan},
};
use crate::{
    dataplane::PodNetns,
    explain::{API_VERSION, Cause, Explanation, Place, PodPart},
    membership::PodKey,
    reconcile::{Inside, Observer},
    source::Source,
    verdicts::{self, Hub, Line, Lines, Verdict},
};

/// How long a call may take.
const CALL: Duration = Duration::from_secs(1);
/// How long its verdict may take after that: they are gathered, and the node may be busy.
const VERDICT: Duration = Duration::from_secs(1);
/// How long it may take until everything that was reported has been read, however busy the node is.
const READ: Duration = Duration::from_secs(5);
/// Why no more verdicts come.
const ENDS: &str = "the agent is ending";
/// How long a further verdict about the same packet may take.
const FURTHER: Duration = Duration::from_millis(50);

/// Verifies a pod of this node, as `explain` has just found it.
///
/// # Errors
///
/// When the pod is not on this node, or too many observe already.
pub async fn verify<S: Source>(
    observer: &Arc<Observer<S>>,
    hub: &Hub,
    key: &PodKey,
    explanation: Explanation,
    to: Option<SocketAddr>,
) -> Result<Verification> {
    let Explanation { time, node, mut pod, verdict: finding, .. } = explanation;
    match pod.place {
        Place::Here => {}
        Place::OtherNode => {
            let other = pod.node.as_deref().unwrap_or("none yet");
            bail!("pod {key} is on another node, {other}: ask the agent there");
        }
        _ => bail!("there is no pod {key} on this node"),
    }
    let (mut calls, mut programs) = (Vec::new(), Vec::new());
    match observer.inside(key).await {
        Ok(inside) => {
            ensure_same(&pod, &inside)?;
            let netns = &inside.netns;
            let names = Arc::clone(observer);
            let all = verdicts::Request::default();
            let verdicts = hub.observe(all, node.name.clone(), move || names.names())?;
            let planned = plan(&pod, to).into_iter();
            let ready = join_all(planned.map(|planned| open(planned, netns))).await;
            calls = make(&pod, netns.netns.inode(), ready, hub, verdicts).await?;
            let after = observer.inside(key).await;
            ensure_same(&pod, &after.with_context(|| replaced(&pod.name))?)?;
            programs = inside.programs;
        }
        Err(error) => {
            pod.message.get_or_insert(format!("{error:#}"));
        }
    }
    let (result, ok, message) = judge::all(&pod, &calls);
    let kernel = uname().context("ask for the kernel's release")?;
    Ok(Verification {
        api_version: API_VERSION.to_owned(),
        kind: "Verification".to_owned(),
        time,
        node,
        kernel_release: kernel.release().to_string_lossy().into_owned(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        pod,
        programs,
        calls,
        result,
        ok,
        message,
        finding: (!ok && finding.cause != Cause::NothingFound).then_some(finding),
    })
}

/// Fails when the pod that was explained is not the one that has been entered.
fn ensure_same(explained: &PodPart, inside: &Inside) -> Result<()> {
    ensure!(is_same(explained, &inside.uid, inside.netns.netns.inode()), replaced(&explained.name));
    Ok(())
}

fn is_same(explained: &PodPart, uid: &str, netns: u32) -> bool {
    explained.uid.as_deref() == Some(uid)
        && explained.kernel.as_ref().is_none_or(|kernel| kernel.netns == netns)
}

fn replaced(pod: &str) -> String {
    format!("{pod} was recreated or its network namespace changed meanwhile: run verify again")
}

/// A call that is about to be made.
struct Ready {
    planned: Planned,
    /// The caller's socket; or why there is none.
    socket: Result<TcpSocket, String>,
}

/// Opens the socket where the caller is: in the pod, or beside the agent.
async fn open(planned: Planned, pod: &Arc<PodNetns>) -> Ready {
    let to = match &planned.to {
        Ok(to) => to.ip(),
        Err(why) => {
            let socket = Err(why.clone());
            return Ready { planned, socket };
        }
    };
    let (pod, direction) = (Arc::clone(pod), planned.direction);
    let opened = spawn_blocking(move || match direction {
        Direction::Outbound => pod.netns.run(|| socket(to))?.context("open a socket in it"),
        Direction::Inbound => socket(to).context("open a socket"),
    });
    let opened = opened.await.context("open a socket").flatten();
    Ready { planned, socket: opened.map_err(|error| format!("{error:#}")) }
}

/// An ordinary socket, in the network namespace of the calling thread. It belongs there
/// wherever it is used. Once it is closed, nothing is left of its connection, not even TIME_WAIT.
fn socket(to: IpAddr) -> io::Result<TcpSocket> {
    let socket = match to {
        IpAddr::V4(_) => TcpSocket::new_v4()?,
        IpAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_zero_linger()?;
    Ok(socket)
}

/// A call that is made.
struct Made {
    planned: Planned,
    /// The caller's end.
    source: Option<SocketAddr>,
    /// Why there was no socket to call with.
    failed: Option<String>,
    connection: Option<Connection>,
    verdicts: Vec<Verdict>,
}

impl Made {
    /// Whether a verdict that was made in the pod is about this connection.
    fn is_meant(&self, netns: u32, verdict: &Verdict) -> bool {
        let (Some(source), Some(destination)) = (&verdict.source, &verdict.destination) else {
            return false;
        };
        verdict.netns == netns
            && verdict.protocol.as_deref() == Some("tcp")
            && self.source == Some(SocketAddr::new(source.ip, source.port))
            && self.planned.to == Ok(SocketAddr::new(destination.ip, destination.port))
    }

    /// What became of it.
    fn judge(self, pod: &PodPart, unread: Option<&str>) -> Call {
        let Made { planned: Planned { direction, ip, to }, source, failed, connection, verdicts } =
            self;
        let (outcome, why) = match (&to, &connection) {
            (Ok(to), Some(connection)) => {
                let excluded = match direction {
                    Direction::Outbound => judge::excludes_outbound(pod, *to),
                    Direction::Inbound => {
                        judge::excludes_inbound(pod, source.map(|source| source.ip()), to.port())
                    }
                };
                let wanted = pod.decision.as_ref().is_some_and(|decision| decision.enrolled);
                let verdicts = &verdicts;
                let facts = Facts { direction, wanted, excluded, connection, verdicts, unread };
                judge::call(&facts)
            }
            (Ok(_), None) => (Outcome::Unknown, failed),
            (Err(why), _) => (Outcome::Unknown, Some(why.clone())),
        };
        let family = family(ip).to_owned();
        let destination = to.ok();
        Call { direction, family, source, destination, connection, verdicts, outcome, why }
    }
}

/// The calls, as their verdicts come.
struct Calls {
    netns: u32,
    made: Vec<Made>,
    /// How many verdicts, of whatever, were dropped.
    dropped: u64,
}

impl Calls {
    fn take(&mut self, lines: Vec<Line>) {
        for line in lines {
            match line {
                Line::Dropped { dropped } => self.dropped += dropped,
                Line::Verdict(verdict) => {
                    let netns = self.netns;
                    let of = self.made.iter_mut().find(|made| made.is_meant(netns, &verdict));
                    if let Some(made) = of {
                        made.verdicts.push(*verdict);
                    }
                }
            }
        }
    }

    /// Reads what the programs have reported before the [`Hub::flush`] that was just asked for.
    async fn take_rest(
        &mut self,
        verdicts: &mut (impl Stream<Item = Lines> + Unpin),
    ) -> Result<()> {
        loop {
            let Lines { lines, more } = verdicts.next().await.context(ENDS)?;
            self.take(lines);
            if !more {
                return Ok(());
            }
        }
    }

    /// Whether something was decided about each.
    fn are_decided(&self) -> bool {
        self.made.iter().all(|made| made.source.is_none() || !made.verdicts.is_empty())
    }
}

/// Makes the calls, all at once.
async fn make(
    pod: &PodPart,
    netns: u32,
    ready: Vec<Ready>,
    hub: &Hub,
    verdicts: impl Stream<Item = Lines>,
) -> Result<Vec<Call>> {
    let mut verdicts = pin!(verdicts);
    // The first item says that they are reported from now on.
    verdicts.next().await.context(ENDS)?;
    let (mut made, mut calling) = (Vec::new(), Vec::new());
    for Ready { planned, socket } in ready {
        let (mut source, mut failed) = (None, None);
        match (socket, &planned.to) {
            (Ok(socket), Ok(to)) => {
                let number = made.len();
                let (its, connecting) = begin(socket, *to).await;
                calling.push(async move { (number, connecting.await) });
                source = its;
            }
            (Err(why), _) => failed = Some(why),
            (_, Err(_)) => {}
        }
        made.push(Made { planned, source, failed, connection: None, verdicts: Vec::new() });
    }
    let mut calls = Calls { netns, made, dropped: 0 };
    let mut calling = pin!(join_all(calling));
    let (mut done, mut until) = (false, Instant::now() + CALL + VERDICT);
    loop {
        tokio::select! {
            // What is there is taken before the time is up.
            biased;
            ends = &mut calling, if !done => {
                for (number, connection) in ends {
                    calls.made[number].connection = Some(connection);
                }
                (done, until) = (true, Instant::now() + VERDICT);
            }
            read = verdicts.next() => calls.take(read.context(ENDS)?.lines),
            () = sleep_until(until) => break,
        }
        if done && calls.are_decided() {
            until = until.min(Instant::now() + FURTHER);
        }
    }
    // That there is no verdict counts only when all have been read.
    hub.flush();
    let unread = match timeout(READ, calls.take_rest(&mut verdicts)).await {
        Err(_) => {
            Some("not all verdicts could be read: the node is too busy; try again".to_owned())
        }
        Ok(read) => {
            read?;
            let dropped = calls.dropped;
            (dropped > 0).then(|| format!("{dropped} verdicts were dropped: too many at once"))
        }
    };
    Ok(calls.made.into_iter().map(|made| made.judge(pod, unread.as_deref())).collect())
}

/// Sends the SYN. Says where from, and what comes of it.
async fn begin(
    socket: TcpSocket,
    to: SocketAddr,
) -> (Option<SocketAddr>, impl Future<Output = Connection>) {
    // The address is known once the SYN is sent, and may not be any more after a failure.
    let same = socket.as_fd().try_clone_to_owned().map(net::TcpStream::from);
    let mut connecting = Box::pin(connect(socket, to));
    let ended = poll_immediate(&mut connecting).await;
    let source = same.and_then(|same| same.local_addr()).ok();
    let source = source.filter(|source| !source.ip().is_unspecified());
    let source = source.map(|source| SocketAddr::new(source.ip(), source.port()));
    let end = async {
        match ended {
            Some(connection) => connection,
            None => connecting.await,
        }
    };
    (source, end)
}

/// Calls, and closes what it has established.
async fn connect(socket: TcpSocket, to: SocketAddr) -> Connection {
    match timeout(CALL, socket.connect(to)).await {
        Ok(Ok(_)) => Connection::Connected,
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Connection::Refused,
            io::ErrorKind::TimedOut => Connection::TimedOut,
            _ => Connection::Failed(error.to_string()),
        },
        Err(_) => Connection::TimedOut,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;
    use crate::{explain::KernelPart, verdicts::Endpoint};

    const TO: &str = "10.0.0.2:80";

    fn made(source: &str) -> Calls {
        let to: SocketAddr = TO.parse().unwrap();
        let made = Made {
            planned: Planned { direction: Direction::Inbound, ip: to.ip(), to: Ok(to) },
            source: source.parse().ok(),
            failed: None,
            connection: Some(Connection::Connected),
            verdicts: Vec::new(),
        };
        Calls { netns: 7, made: vec![made], dropped: 0 }
    }

    fn verdict(name: &str, source: &str) -> Line {
        let end = |at: &str| {
            let at: SocketAddr = at.parse().unwrap();
            Some(Endpoint { ip: at.ip(), port: at.port(), pod: None })
        };
        Line::Verdict(Box::new(Verdict {
            time: "2026-08-01T12:00:00.000000Z".to_owned(),
            node: "n1".to_owned(),
            pod: None,
            netns: 7,
            verdict: name.to_owned(),
            protocol: Some("tcp".to_owned()),
            source: end(source),
            destination: end(TO),
        }))
    }

    #[test]
    fn recreated_pod_of_the_same_name_is_another_one() {
        let kernel = |netns| Some(KernelPart { netns, ..KernelPart::default() });
        let pod = |kernel| PodPart { uid: Some("a".to_owned()), kernel, ..PodPart::default() };
        assert!(is_same(&pod(kernel(7)), "a", 7) && is_same(&pod(None), "a", 7));
        assert!(!is_same(&pod(kernel(7)), "b", 7) && !is_same(&pod(None), "b", 7));
        assert!(!is_same(&pod(kernel(7)), "a", 8));
    }

    #[test]
    fn another_client_with_the_same_port_does_not_count() {
        let mut calls = made("10.0.0.1:40000");
        calls.take(vec![verdict("redirected_inbound", "10.0.0.3:40000")]);
        assert!(!calls.are_decided());
        calls.take(vec![verdict("bypassed_inbound", "10.0.0.1:40000")]);
        let names: Vec<&str> =
            calls.made[0].verdicts.iter().map(|verdict| verdict.verdict.as_str()).collect();
        assert_eq!(names, ["bypassed_inbound"]);
    }

    #[tokio::test]
    async fn verdict_behind_many_others_is_read() {
        let other = || verdict("forwarded", "10.0.0.3:40000");
        let batches = [
            Lines { lines: vec![other()], more: true },
            Lines { lines: vec![Line::Dropped { dropped: 2 }, other()], more: true },
            Lines { lines: vec![verdict("redirected_inbound", "10.0.0.1:40000")], more: false },
        ];
        let mut calls = made("10.0.0.1:40000");
        calls.take_rest(&mut stream::iter(batches)).await.unwrap();
        assert!(calls.are_decided() && calls.dropped == 2);
        // It does not wait for what comes later.
        let mut later = stream::iter([Lines::default()]).chain(stream::pending());
        calls.take_rest(&mut later).await.unwrap();
    }

    #[tokio::test]
    async fn source_is_known_whether_or_not_somebody_answers() {
        let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        let closed = net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for (to, expected) in [(open, Connection::Connected), (closed, Connection::Refused)] {
            let (source, connecting) = begin(socket(to.ip()).unwrap(), to).await;
            assert_eq!(connecting.await, expected);
            let source = source.unwrap();
            assert!(source.ip() == to.ip() && source.port() > 0, "{source}");
        }
    }
}
