//! A label goes on and off a running pod, under load.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use redirect_agent::output::PodState;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::Stop;
use super::cluster::{APP_PORT, Cluster, NEWCOMER};
use super::rows::FAMILIES;
use crate::app::{Answer, Call, Conversation, Outcome, read_greeting};
use crate::hbone::{Over, Record};
use crate::netns::Running;
use crate::process::wait_for;

/// Between two new connections of one client to one server.
const PACE: Duration = Duration::from_millis(20);
/// Between two messages on a busy connection.
const BEAT: Duration = Duration::from_millis(50);
/// For how long nothing may come before a connection counts as broken or a call as failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the agent promises.
const PROMISE: Duration = Duration::from_secs(1);
/// The agent's default `--drain`.
const DRAIN: Duration = Duration::from_secs(5);
/// New connections of each client that are waited for before and after a switch.
const BETWEEN: usize = 60;

/// Client and server; one of them is the newcomer, the other is in the mesh or not.
const PAIRS: [(&str, &str); 4] = [
    (NEWCOMER, "shop/catalog"),
    (NEWCOMER, "legacy/db"),
    ("shop/cart", NEWCOMER),
    ("legacy/db", NEWCOMER),
];

/// What the load has seen of a label's going on and off.
#[derive(Clone, Debug, Serialize)]
pub struct Live {
    /// The pod that got the label and lost it.
    pub pod: &'static str,
    /// Clients and servers of the load.
    pub pairs: Vec<String>,
    /// The label goes on.
    pub enrollment: Switch,
    /// The label goes off.
    pub unenrollment: Switch,
    /// What became of connections that were opened through the proxy, when the pod left.
    pub redirected: Redirected,
    /// Whether all of it is as it should be.
    pub ok: bool,
}

/// One change of the label.
#[derive(Clone, Debug, Serialize)]
pub struct Switch {
    /// From the edit of the manifest until `status` said so.
    pub status_after_ms: u64,
    /// From the edit until the pod's proxy got its first connection; only for enrollment.
    pub first_redirected_after_ms: Option<u64>,
    /// From the edit until the pod's proxy got its last connection; only for unenrollment.
    pub last_redirected_after_ms: Option<u64>,
    /// New connections from shortly before the edit until after the switch.
    pub new_connections: Vec<Tally>,
    /// Connections that were open before the label went on.
    pub old_connections: Old,
    /// Whether it is as it should be.
    pub ok: bool,
}

/// New connections of one direction and family.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tally {
    /// `inbound` or `outbound`, seen from the pod.
    pub direction: &'static str,
    /// `IPv4` or `IPv6`.
    pub family: &'static str,
    /// How many were made.
    pub made: u64,
    /// How many of them failed.
    pub failed: u64,
    /// How long the slowest took.
    pub slowest_ms: u64,
    /// The first failures.
    pub failures: Vec<String>,
}

/// Connections that are older than the pod's enrollment.
#[derive(Clone, Debug, Serialize)]
pub struct Old {
    /// How many say something all the time.
    pub busy: usize,
    /// How many were silent during the switch.
    pub idle: usize,
    /// How many of all broke.
    pub broken: usize,
    /// How.
    pub breaks: Vec<String>,
}

/// Connections that were opened through the pod's proxy.
#[derive(Clone, Debug, Serialize)]
pub struct Redirected {
    /// How many were open when the label went off, all of them busy.
    pub open: usize,
    /// How many of them are in the proxies' logs.
    pub in_proxy_logs: usize,
    /// How long the drain may take.
    pub drain_ms: u64,
    /// When the first ended, from the edit.
    pub first_end_after_ms: Option<u64>,
    /// When the last ended.
    pub last_end_after_ms: Option<u64>,
    /// How many were open even after the pod had left.
    pub outlasted: usize,
    /// How many ended with a close, and not with a reset.
    pub closed_cleanly: usize,
    /// Whether that is as it should be.
    pub ok: bool,
}

/// Runs it.
pub(super) fn run(cluster: &Cluster, stop: &Stop) -> Result<Live> {
    let load = Load::start(cluster)?;
    let mut idle = idle(cluster)?;
    let old = Busy::start(cluster, stop)?;
    load.grow(stop)?;

    load.next_phase();
    let on = Edit::make(cluster, Some("ambient"))?;
    let enrolled_after = on.until(cluster, stop, PodState::Enrolled)?;
    load.grow(stop)?;
    let first_redirected = on.redirected_after(cluster)?.into_iter().min();
    let broken_by_enrollment = old.broken(&mut idle, cluster)?;

    let redirected = Busy::start(cluster, stop)?;
    let in_proxy_logs = redirected.in_proxy_logs(&records(cluster)?);
    load.next_phase();
    load.grow(stop)?;
    let off = Edit::make(cluster, None)?;
    let left_after = off.until(cluster, stop, PodState::Bypassing)?;
    load.grow(stop)?;
    let last_redirected = off.redirected_after(cluster)?.into_iter().max();
    let broken_by_unenrollment = old.broken(&mut idle, cluster)?;
    let mut phases = load.finish(stop)?;
    let leaving = phases.pop().unwrap_or_default();
    let entering = phases.pop().unwrap_or_default();

    let soon = |after: Option<Duration>| after.is_some_and(|after| after < PROMISE);
    let enrollment = Switch {
        status_after_ms: millis(enrolled_after),
        first_redirected_after_ms: first_redirected.map(millis),
        last_redirected_after_ms: None,
        ok: soon(Some(enrolled_after))
            && soon(first_redirected)
            && none_failed(&entering)
            && broken_by_enrollment.broken == 0,
        new_connections: entering,
        old_connections: broken_by_enrollment,
    };
    let unenrollment = Switch {
        status_after_ms: millis(left_after),
        first_redirected_after_ms: None,
        last_redirected_after_ms: last_redirected.map(millis),
        ok: soon(last_redirected)
            && left_after >= DRAIN
            && none_failed(&leaving)
            && broken_by_unenrollment.broken == 0,
        new_connections: leaving,
        old_connections: broken_by_unenrollment,
    };
    let redirected = redirected.ended(off.at, in_proxy_logs);
    let ok = enrollment.ok && unenrollment.ok && redirected.ok;
    let pairs = PAIRS.iter().map(|(from, to)| format!("{from} -> {to}")).collect();
    Ok(Live { pod: NEWCOMER, pairs, enrollment, unenrollment, redirected, ok })
}

/// Whether there were connections in both directions and families, and none of them failed.
fn none_failed(tallies: &[Tally]) -> bool {
    tallies.len() == 4 && tallies.iter().all(|tally| tally.made > 0 && tally.failed == 0)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// An edit of the newcomer's manifest.
struct Edit {
    at: Instant,
    /// The same, since 1970.
    seconds: f64,
}

impl Edit {
    fn make(cluster: &Cluster, mode: Option<&str>) -> Result<Self> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let at = Instant::now();
        cluster.label(NEWCOMER, mode)?;
        Ok(Self { at, seconds })
    }

    /// Waits until the agent says that the newcomer is there; how long after the edit that was.
    fn until(&self, cluster: &Cluster, stop: &Stop, state: PodState) -> Result<Duration> {
        let node = cluster.node_of(NEWCOMER)?;
        let what = format!("{NEWCOMER} to be {}", state.as_str());
        stop.wait_for(&what, Duration::from_secs(30), || {
            let there = node.state(NEWCOMER)? == state;
            Ok(there.then(|| self.at.elapsed()))
        })
    }

    /// When the newcomer's proxy got connections, after the edit.
    fn redirected_after(&self, cluster: &Cluster) -> Result<Vec<Duration>> {
        let records = records(cluster)?;
        let of_newcomer = records.iter().filter(|record| record.pod == NEWCOMER);
        let after = of_newcomer.map(|record| record.ts - self.seconds);
        Ok(after.filter_map(|after| Duration::try_from_secs_f64(after).ok()).collect())
    }
}

fn records(cluster: &Cluster) -> Result<Vec<Record>> {
    Ok(cluster.connections()?.into_iter().flatten().collect())
}

/// Every pair in every family.
fn lines(cluster: &Cluster) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (client, server) in PAIRS {
        for (family, name) in FAMILIES {
            let direction = if client == NEWCOMER { "outbound" } else { "inbound" };
            let target = cluster.pod(server)?.addr(family, APP_PORT);
            let client_ip = cluster.pod(client)?.ip(family);
            lines.push(Line { client, client_ip, server, target, direction, family: name });
        }
    }
    Ok(lines)
}

/// A client and a server in one family.
#[derive(Clone, Copy, Debug)]
struct Line {
    client: &'static str,
    client_ip: IpAddr,
    server: &'static str,
    target: SocketAddr,
    direction: &'static str,
    family: &'static str,
}

impl Line {
    /// What is wrong with an answer.
    fn fault(&self, answer: &Answer) -> Option<String> {
        let Answer { by, saw_peer, saw_local } = answer;
        let right =
            by == self.server && *saw_local == self.target && saw_peer.ip() == self.client_ip;
        (!right).then(|| format!("{by} answered at {saw_local} and saw {saw_peer}"))
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} -> {} ({})", self.client, self.server, self.family)
    }
}

/// Connections that say nothing until they are asked.
fn idle(cluster: &Cluster) -> Result<Vec<(Line, Conversation)>> {
    let lines = lines(cluster)?.into_iter().map(|line| {
        let client = &cluster.pod(line.client)?.netns;
        let open = Call::to(line.target).within(PATIENCE).open(client)?;
        if let Some(fault) = line.fault(open.answer()) {
            bail!("{line}: {fault}");
        }
        Ok((line, open))
    });
    lines.collect()
}

// --- New connections

/// What is counted by: the phase, and whether it is inbound, and its family.
type Key = (usize, &'static str, &'static str);

/// A constant stream of new connections between all pairs, in both families.
struct Load {
    phase: Arc<AtomicUsize>,
    enough: Arc<AtomicBool>,
    running: Vec<(Arc<AtomicBool>, Running)>,
    tallies: Arc<Mutex<BTreeMap<Key, Tally>>>,
}

impl Load {
    fn start(cluster: &Cluster) -> Result<Self> {
        let mut load = Self {
            phase: Arc::default(),
            enough: Arc::default(),
            running: Vec::new(),
            tallies: Arc::default(),
        };
        for line in lines(cluster)? {
            let client = &cluster.pod(line.client)?.netns;
            let ended = Arc::new(AtomicBool::new(false));
            let stream = Stream {
                line,
                phase: Arc::clone(&load.phase),
                enough: Arc::clone(&load.enough),
                ended: Arc::clone(&ended),
                tallies: Arc::clone(&load.tallies),
            };
            load.running.push((ended, client.spawn(move || stream.run())?));
        }
        Ok(load)
    }

    fn next_phase(&self) {
        self.phase.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until there are a good many more connections.
    fn grow(&self, stop: &Stop) -> Result<()> {
        let made = || lock(&self.tallies).values().map(|tally| tally.made).sum::<u64>();
        let more = u64::try_from(BETWEEN * self.running.len())?;
        let goal = made() + more;
        stop.wait_for("more connections", Duration::from_secs(30), || {
            Ok((made() >= goal).then_some(()))
        })
    }

    /// Ends the load once every connection of it has ended, and gives its counts, phase by phase.
    fn finish(self, stop: &Stop) -> Result<Vec<Vec<Tally>>> {
        self.enough.store(true, Ordering::Relaxed);
        stop.wait_for("the last connections", PATIENCE * 2, || {
            let ended = self.running.iter().all(|(ended, _)| ended.load(Ordering::Relaxed));
            Ok(ended.then_some(()))
        })?;
        let mut phases = vec![Vec::new(); self.phase.load(Ordering::Relaxed) + 1];
        for ((phase, ..), tally) in std::mem::take(&mut *lock(&self.tallies)) {
            phases[phase].push(tally);
        }
        Ok(phases)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The part of the load of one client, one server and one family.
struct Stream {
    line: Line,
    phase: Arc<AtomicUsize>,
    enough: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    tallies: Arc<Mutex<BTreeMap<Key, Tally>>>,
}

impl Stream {
    async fn run(self) {
        // At a constant pace: a slow connection does not hold up the next.
        let mut tick = interval(PACE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut calls = JoinSet::new();
        while !self.enough.load(Ordering::Relaxed) {
            tick.tick().await;
            let phase = self.phase.load(Ordering::Relaxed);
            let call = Call::to(self.line.target).within(PATIENCE);
            calls.spawn(async move {
                let started = Instant::now();
                (phase, call.run().await, started.elapsed())
            });
            while let Some(Ok(call)) = calls.try_join_next() {
                self.count(call);
            }
        }
        while let Some(ended) = calls.join_next().await {
            if let Ok(call) = ended {
                self.count(call);
            }
        }
        self.ended.store(true, Ordering::Relaxed);
    }

    fn count(&self, (phase, outcome, took): (usize, Result<Outcome>, Duration)) {
        let Line { direction, family, .. } = self.line;
        let failure = match outcome {
            Ok(Outcome::Answered(answer)) => self.line.fault(&answer),
            Ok(other) => Some(other.to_string()),
            Err(error) => Some(format!("{error:#}")),
        };
        let mut tallies = lock(&self.tallies);
        let tally = tallies.entry((phase, direction, family)).or_default();
        (tally.direction, tally.family) = (direction, family);
        tally.made += 1;
        tally.slowest_ms = tally.slowest_ms.max(millis(took));
        if let Some(failure) = failure {
            tally.failed += 1;
            if tally.failures.len() < 5 {
                tally.failures.push(format!("{}: {failure}", self.line));
            }
        }
    }
}

// --- Long-lived connections

/// Connections that say something all the time.
struct Busy(Vec<Talk>);

struct Talk {
    line: Line,
    state: Arc<Mutex<TalkState>>,
    _running: Running,
}

#[derive(Debug, Default)]
struct TalkState {
    local: Option<SocketAddr>,
    exchanges: u64,
    end: Option<(Instant, String)>,
}

impl Busy {
    /// Opens one for each line, and waits until all have said something.
    fn start(cluster: &Cluster, stop: &Stop) -> Result<Self> {
        let mut talks = Vec::new();
        for line in lines(cluster)? {
            let state = Arc::new(Mutex::new(TalkState::default()));
            let talking = Arc::clone(&state);
            let running = cluster.pod(line.client)?.netns.spawn(move || async move {
                let end = match talk(line, &talking).await {
                    Ok(never) => match never {},
                    Err(error) => format!("{error:#}"),
                };
                lock(&talking).end = Some((Instant::now(), end));
            })?;
            talks.push(Talk { line, state, _running: running });
        }
        stop.wait_for("busy connections", PATIENCE, || {
            for talk in &talks {
                if let Some((_, end)) = &lock(&talk.state).end {
                    bail!("open a connection: {}: {end}", talk.line);
                }
            }
            let all = talks.iter().all(|talk| lock(&talk.state).exchanges > 0);
            Ok(all.then_some(()))
        })?;
        Ok(Self(talks))
    }

    /// Which of these and of the idle ones have broken.
    fn broken(&self, idle: &mut [(Line, Conversation)], cluster: &Cluster) -> Result<Old> {
        let mut breaks = Vec::new();
        for Talk { line, state, .. } in &self.0 {
            let before = lock(state).exchanges;
            // Alive means that it goes on, not only that no end was seen.
            let goes_on = wait_for("another exchange", PATIENCE, || {
                let state = lock(state);
                Ok((state.exchanges > before || state.end.is_some()).then_some(()))
            });
            match (&lock(state).end, goes_on) {
                (Some((_, end)), _) => breaks.push(format!("{line}: {end}")),
                (None, Err(error)) => breaks.push(format!("{line}: {error:#}")),
                (None, Ok(())) => {}
            }
        }
        for (line, conversation) in idle.iter_mut() {
            if let Err(error) = conversation.exchange(b"still there?") {
                breaks.push(format!("{line}, idle: {error:#}"));
            }
        }
        // An old connection that the proxy knows would not be an old one. The same port may be in use
        // to another destination.
        let records = records(cluster)?;
        for Talk { line, state, .. } in &self.0 {
            let local = lock(state).local;
            let mut of_newcomer = records.iter().filter(|record| record.pod == NEWCOMER);
            if of_newcomer.any(|record| Some(record.src) == local && record.dst == line.target) {
                breaks.push(format!("{line}: was handed to the proxy"));
            }
        }
        let (busy, idle) = (self.0.len(), idle.len());
        Ok(Old { busy, idle, broken: breaks.len(), breaks })
    }

    /// How many of them the proxies know: the newcomer's own, or a peer's that uses HBONE to it.
    fn in_proxy_logs(&self, records: &[Record]) -> usize {
        let known = |talk: &&Talk| {
            let local = lock(&talk.state).local;
            records.iter().any(|record| {
                Some(record.src) == local
                    && record.dst == talk.line.target
                    && (record.pod == NEWCOMER || record.over == Some(Over::Hbone))
            })
        };
        self.0.iter().filter(known).count()
    }

    /// How they ended after `leave`.
    fn ended(&self, leave: Instant, in_proxy_logs: usize) -> Redirected {
        let open = self.0.len();
        let ends: Vec<_> = self.0.iter().filter_map(|talk| lock(&talk.state).end.clone()).collect();
        let after = ends.iter().map(|(at, _)| at.saturating_duration_since(leave));
        let (first, last) = (after.clone().min(), after.max());
        let kept = first.is_none_or(|first| first >= DRAIN - PROMISE);
        let gone = last.is_none_or(|last| last <= DRAIN + PROMISE * 2);
        let outlasted = open - ends.len();
        Redirected {
            open,
            in_proxy_logs,
            drain_ms: millis(DRAIN),
            first_end_after_ms: first.map(millis),
            last_end_after_ms: last.map(millis),
            outlasted,
            closed_cleanly: ends.iter().filter(|(_, end)| end == CLOSED).count(),
            ok: in_proxy_logs == open && kept && gone && outlasted == 0,
        }
    }
}

const CLOSED: &str = "closed by the other end";

/// Talks until something goes wrong.
async fn talk(line: Line, state: &Mutex<TalkState>) -> Result<std::convert::Infallible> {
    let stream = timeout(PATIENCE, TcpStream::connect(line.target)).await.context("connect")??;
    lock(state).local = Some(stream.local_addr()?);
    let mut stream = BufReader::new(stream);
    let mut hello = String::new();
    timeout(PATIENCE, stream.read_line(&mut hello)).await.context("wait for a greeting")??;
    let answer = read_greeting(&hello).with_context(|| format!("read a greeting: {hello:?}"))?;
    if let Some(fault) = line.fault(&answer) {
        bail!(fault);
    }
    let mut beat = interval(BEAT);
    loop {
        beat.tick().await;
        let said = lock(state).exchanges.to_be_bytes();
        let mut back = [0; 8];
        let exchange = async {
            stream.write_all(&said).await?;
            stream.read_exact(&mut back).await
        };
        match timeout(PATIENCE, exchange).await.context("wait for an echo")? {
            Ok(_) if back == said => lock(state).exchanges += 1,
            Ok(_) => bail!("other bytes came back"),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => bail!(CLOSED),
            Err(e) => return Err(e.into()),
        }
    }
}
