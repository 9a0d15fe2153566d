//! Makes the calls, and follows what the datapath says about them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use futures_util::{Stream, StreamExt as _, future::join_all};
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
    reconcile::Observer,
    source::Source,
    verdicts::{self, Hub, Line, Verdict},
};

/// How long a call may take.
const CALL: Duration = Duration::from_secs(1);
/// How long its verdict may take after that: they are gathered, and the node may be busy.
const VERDICT: Duration = Duration::from_secs(1);
/// How long it may take until everything that was told has been read, however busy the node is.
const READ: Duration = Duration::from_secs(5);
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
        Ok((netns, found)) => {
            let names = Arc::clone(observer);
            let all = verdicts::Request::default();
            let verdicts = hub.observe(all, node.name.clone(), move || names.names())?;
            let planned = plan(&pod, to).into_iter();
            let ready = join_all(planned.map(|planned| open(planned, &netns))).await;
            calls = make(&pod, netns.netns.inode(), ready, hub, verdicts).await?;
            programs = found;
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

/// A call that is about to be made.
struct Ready {
    planned: Planned,
    /// The caller's socket and its port; or why there is none.
    socket: Result<(TcpSocket, u16), String>,
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

/// An ordinary socket with a port of its own, in the network namespace of the calling thread. It belongs there
/// wherever it is used. Once it is closed, nothing is left of its connection, not even TIME_WAIT.
fn socket(to: IpAddr) -> io::Result<(TcpSocket, u16)> {
    let (socket, any): (_, IpAddr) = match to {
        IpAddr::V4(_) => (TcpSocket::new_v4()?, Ipv4Addr::UNSPECIFIED.into()),
        IpAddr::V6(_) => (TcpSocket::new_v6()?, Ipv6Addr::UNSPECIFIED.into()),
    };
    socket.set_zero_linger()?;
    socket.bind(SocketAddr::new(any, 0))?;
    let port = socket.local_addr()?.port();
    Ok((socket, port))
}

/// A call that is made.
struct Made {
    planned: Planned,
    /// The caller's port.
    port: Option<u16>,
    source: Option<SocketAddr>,
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
            && self.port == Some(source.port)
            && self.planned.to == Ok(SocketAddr::new(destination.ip, destination.port))
    }

    /// What became of it.
    fn judge(self, pod: &PodPart, left_out: u64) -> Call {
        let Made { planned: Planned { direction, ip, to }, source, connection, verdicts, .. } =
            self;
        let told = verdicts.first().and_then(|verdict| verdict.source.as_ref());
        let source = source.or(told.map(|end| SocketAddr::new(end.ip, end.port)));
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
                let facts = Facts { direction, wanted, excluded, connection, verdicts, left_out };
                judge::call(&facts)
            }
            (Ok(_), None) => (Outcome::Unknown, None),
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
    left_out: u64,
}

impl Calls {
    fn take(&mut self, lines: Vec<Line>) {
        for line in lines {
            match line {
                Line::LeftOut { left_out } => self.left_out += left_out,
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

    /// Whether something was decided about each.
    fn are_decided(&self) -> bool {
        self.made.iter().all(|made| made.port.is_none() || !made.verdicts.is_empty())
    }
}

/// Makes the calls, all at once.
async fn make(
    pod: &PodPart,
    netns: u32,
    ready: Vec<Ready>,
    hub: &Hub,
    verdicts: impl Stream<Item = Vec<Line>>,
) -> Result<Vec<Call>> {
    const ENDS: &str = "the agent is ending";
    let mut verdicts = pin!(verdicts);
    // The first item says that they are told from now on.
    verdicts.next().await.context(ENDS)?;
    let (mut made, mut calling) = (Vec::new(), Vec::new());
    for Ready { mut planned, socket } in ready {
        let mut port = None;
        match (socket, &planned.to) {
            (Ok((socket, its)), Ok(to)) => {
                calling.push(connect(made.len(), socket, *to));
                port = Some(its);
            }
            (Err(why), _) => planned.to = Err(why),
            (_, Err(_)) => {}
        }
        made.push(Made { planned, port, source: None, connection: None, verdicts: Vec::new() });
    }
    let mut calls = Calls { netns, made, left_out: 0 };
    let mut calling = pin!(join_all(calling));
    let (mut done, mut until) = (false, Instant::now() + CALL + VERDICT);
    loop {
        tokio::select! {
            // What is there is taken before the time is up.
            biased;
            ends = &mut calling, if !done => {
                for (number, source, connection) in ends {
                    let made = &mut calls.made[number];
                    (made.source, made.connection) = (source, Some(connection));
                }
                (done, until) = (true, Instant::now() + VERDICT);
            }
            lines = verdicts.next() => calls.take(lines.context(ENDS)?),
            () = sleep_until(until) => break,
        }
        if done && calls.are_decided() {
            until = until.min(Instant::now() + FURTHER);
        }
    }
    // That there is no verdict counts only when all have been read.
    hub.nudge();
    let lines = timeout(READ, verdicts.next()).await;
    let busy = "read the datapath's verdicts: the node is too busy; try again";
    calls.take(lines.context(busy)?.context(ENDS)?);
    let Calls { made, left_out, .. } = calls;
    Ok(made.into_iter().map(|made| made.judge(pod, left_out)).collect())
}

/// Calls, and closes what it has established.
async fn connect(
    number: usize,
    socket: TcpSocket,
    to: SocketAddr,
) -> (usize, Option<SocketAddr>, Connection) {
    let (source, connection) = match timeout(CALL, socket.connect(to)).await {
        Ok(Ok(stream)) => (stream.local_addr().ok(), Connection::Connected),
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused => (None, Connection::Refused),
            io::ErrorKind::TimedOut => (None, Connection::TimedOut),
            _ => (None, Connection::Failed(error.to_string())),
        },
        Err(_) => (None, Connection::TimedOut),
    };
    (number, source, connection)
}
