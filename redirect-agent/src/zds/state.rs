//! What the proxies have to be told, as a state machine without I/O.
//!
//! The state holds what is *known* (the workloads that the node's newest proxy has to serve) and, per
//! connection, what that proxy has been *told*. [`State::next`] is the difference of the two: each connection
//! asks for its next request, sends it, awaits the ack, records it, and asks again. Whatever happens in the
//! meantime is therefore coalesced. A proxy that becomes the newest, because it connects or because the one
//! after it disconnects, is told what it lacks.
//!
//! A netns is never given to a second uid while the proxy may still serve the first one in it. A Del precedes
//! any Add. If coalescing makes an Add collide with the earlier netns of a workload that has moved, that
//! workload is deleted first (and added again later). In a snapshot, which has no Del, such an Add waits
//! until after it.

use std::{
    collections::{BTreeMap, VecDeque},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Instant, SystemTime},
};

use nix::sys::stat::fstat;

use super::{
    AddError, Answer, Event, ProxyId, Workload,
    messages::{
        AddWorkload, DelWorkload, KeepWorkload, MAX_REQUEST_BYTES, Request, SnapshotSent,
        WorkloadInfo,
    },
    socket::Fault,
};

/// A network namespace: an open fd, so that the inode number stays its own.
#[derive(Clone, Debug)]
pub(super) struct Netns {
    pub(super) fd: Arc<OwnedFd>,
    /// Device and inode, which is how ztunnel tells two of them apart too.
    pub(super) id: (u64, u64),
}

impl Netns {
    /// Refuses what cannot be a netns; ztunnel would keep failing to start a proxy in it.
    pub(super) fn new(fd: Arc<OwnedFd>) -> nix::Result<Option<Self>> {
        // linux/magic.h; musl's libc lacks it.
        const NSFS_MAGIC: i64 = 0x6e73_6673;
        if nix::sys::statfs::fstatfs(&*fd)?.filesystem_type().0 as i64 != NSFS_MAGIC {
            return Ok(None);
        }
        let stat = fstat(&*fd)?;
        Ok(Some(Self { fd, id: (stat.st_dev, stat.st_ino) }))
    }
}

/// A workload that the newest proxy has to serve.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) workload: Workload,
    /// `None`: a proxy that already serves it may continue, but no proxy can be told to start.
    pub(super) netns: Option<Netns>,
    /// Grows with every change of any workload; what a proxy was told is out of date below it.
    pub(super) seq: u64,
}

/// What a proxy was last told about a workload.
#[derive(Debug)]
struct Told {
    seq: u64,
    /// The netns that the proxy may be serving the workload in.
    netns: Option<(u64, u64)>,
    answer: Answer,
}

/// A proxy that has said hello.
#[derive(Debug)]
pub(super) struct Proxy {
    pub(super) id: ProxyId,
    pub(super) pid: Option<i32>,
    pub(super) since: Instant,
    /// The workloads that the snapshot has yet to mention; None once it is acknowledged.
    snapshot: Option<VecDeque<String>>,
    told: BTreeMap<String, Told>,
    /// Workloads to delete, oldest first; one stays here until its ack.
    dels: VecDeque<String>,
}

impl Proxy {
    pub(super) fn snapshot_done(&self) -> bool {
        self.snapshot.is_none()
    }

    /// What the proxy answered about the current version of a workload; `None` if it was not told yet.
    pub(super) fn answer(&self, known: &Known) -> Option<&Answer> {
        let told = self.told.get(&known.workload.uid)?;
        (told.seq >= known.seq).then_some(&told.answer)
    }

    fn deletes(&self, uid: &str) -> bool {
        self.dels.iter().any(|del| del == uid)
    }

    fn delete(&mut self, uid: &str) {
        if !self.deletes(uid) {
            self.dels.push_back(uid.to_owned());
        }
    }

    /// The other workload, if any, that the proxy may be serving in the netns of this one.
    fn holder_of_netns_of(&self, known: &Known) -> Option<&str> {
        let netns = known.netns.as_ref()?.id;
        let mut others = self.told.iter().filter(|(uid, _)| **uid != known.workload.uid);
        others.find(|(_, told)| told.netns == Some(netns)).map(|(uid, _)| uid.as_str())
    }
}

/// One request to one proxy.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Add { workload: Workload, netns: Netns, seq: u64 },
    Keep { workload: Workload, seq: u64 },
    SnapshotSent,
    Del { uid: String },
}

impl Step {
    fn of(known: &Known) -> Self {
        let Known { workload, netns, seq } = known;
        match netns.clone() {
            Some(netns) => Self::Add { workload: workload.clone(), netns, seq: *seq },
            None => Self::Keep { workload: workload.clone(), seq: *seq },
        }
    }

    pub(super) fn request(&self) -> Request {
        match self {
            Self::Add { workload, .. } => add_request(workload),
            Self::Keep { workload, .. } => {
                Request::Keep(KeepWorkload { uid: workload.uid.clone() })
            }
            Self::SnapshotSent => Request::SnapshotSent(SnapshotSent {}),
            Self::Del { uid } => Request::Del(DelWorkload { uid: uid.clone() }),
        }
    }

    /// The fd that goes with the request: on an Add, and on nothing else.
    pub(super) fn fd(&self) -> Option<&OwnedFd> {
        match self {
            Self::Add { netns, .. } => Some(&netns.fd),
            Self::Keep { .. } | Self::SnapshotSent | Self::Del { .. } => None,
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Add { workload, .. } => write!(f, "the Add of {workload}"),
            Self::Keep { workload, .. } => write!(f, "the Keep of {workload}"),
            Self::SnapshotSent => f.write_str("SnapshotSent"),
            Self::Del { uid } => write!(f, "the Del of uid {uid}"),
        }
    }
}

fn add_request(workload: &Workload) -> Request {
    let Workload { uid, namespace, name, service_account } = workload.clone();
    let info = WorkloadInfo { name, namespace, service_account };
    Request::Add(AddWorkload { uid, workload_info: Some(info) })
}

/// How an Add stands with the newest proxy.
#[derive(Debug)]
pub(super) enum Standing {
    /// The newest proxy has not answered yet.
    Open,
    /// No proxy is connected.
    NoProxy,
    /// The newest proxy serves it.
    Acked,
    /// The newest proxy refused it.
    Refused { proxy: ProxyId, error: String },
    /// It was deleted, or got another netns, since.
    Superseded,
}

#[derive(Debug, Default)]
pub(super) struct State {
    known: BTreeMap<String, Known>,
    /// In the order of their hellos: the newest is the last.
    proxies: Vec<Proxy>,
    last_seq: u64,
    last_proxy: u64,
    /// The proxy that went away last, and why.
    last_gone: Option<(ProxyId, String)>,
    /// When that was.
    last_gone_at: Option<SystemTime>,
}

impl State {
    pub(super) fn known(&self) -> impl Iterator<Item = &Known> {
        self.known.values()
    }

    pub(super) fn proxies(&self) -> &[Proxy] {
        &self.proxies
    }

    pub(super) fn newest(&self) -> Option<&Proxy> {
        self.proxies.last()
    }

    pub(super) fn last_gone(&self) -> Option<&(ProxyId, String)> {
        self.last_gone.as_ref()
    }

    /// When the last proxy went away, and why; `None` where none was ever connected.
    pub(super) fn away(&self) -> Option<(SystemTime, &str)> {
        let (_, reason) = self.last_gone.as_ref()?;
        Some((self.last_gone_at?, reason))
    }

    /// Makes a workload known; with `netns` None it keeps the one that it has, if any.
    /// Returns the number under which [`State::standing`] knows this state of it.
    pub(super) fn put(
        &mut self,
        workload: Workload,
        netns: Option<Netns>,
    ) -> Result<u64, AddError> {
        if workload.uid.is_empty() {
            return Err(AddError::NoUid { workload: workload.to_string() });
        }
        let bytes = add_request(&workload).to_packet().len();
        if bytes > MAX_REQUEST_BYTES {
            return Err(AddError::TooLong { workload: workload.to_string(), bytes });
        }
        if let Some(netns) = &netns {
            let holder = self.known.values().find(|other| {
                other.workload.uid != workload.uid
                    && other.netns.as_ref().is_some_and(|held| held.id == netns.id)
            });
            if let Some(holder) = holder {
                return Err(AddError::NetnsTaken {
                    workload: workload.to_string(),
                    holder: Box::new(holder.workload.clone()),
                    inode: netns.id.1,
                });
            }
        }
        let refused_by_newest = self.is_refused_by_newest(&workload.uid);
        if let Some(known) = self.known.get_mut(&workload.uid) {
            let same_netns = match (&netns, &known.netns) {
                (Some(new), Some(old)) => new.id == old.id,
                (None, _) => true,
                (Some(_), None) => false,
            };
            let retry = netns.is_some() && refused_by_newest;
            if same_netns && known.workload == workload && !retry {
                return Ok(known.seq);
            }
        }
        self.last_seq += 1;
        let seq = self.last_seq;
        let uid = workload.uid.clone();
        let netns = netns.or_else(|| self.known.get_mut(&uid)?.netns.take());
        self.known.insert(uid, Known { workload, netns, seq });
        Ok(seq)
    }

    fn is_refused_by_newest(&self, uid: &str) -> bool {
        let answer = self.newest().zip(self.known.get(uid)).and_then(|(p, known)| p.answer(known));
        matches!(answer, Some(Answer::Refused(_)))
    }

    /// Forgets a workload, and has every proxy delete it. The proxies whose ack that takes.
    pub(super) fn delete(&mut self, uid: &str) -> Vec<ProxyId> {
        if self.known.remove(uid).is_some() {
            self.proxies.iter_mut().for_each(|proxy| proxy.delete(uid));
        }
        self.deleting(uid).collect()
    }

    /// The proxies that have yet to acknowledge the deletion of a workload.
    pub(super) fn deleting(&self, uid: &str) -> impl Iterator<Item = ProxyId> {
        self.proxies.iter().filter(move |proxy| proxy.deletes(uid)).map(|proxy| proxy.id)
    }

    /// What the newest proxy says about the workload that [`State::put`] numbered `seq`.
    pub(super) fn standing(&self, uid: &str, netns: &Netns, seq: u64) -> Standing {
        let Some(known) = self.known.get(uid) else {
            return Standing::Superseded;
        };
        if known.netns.as_ref().is_none_or(|held| held.id != netns.id) {
            return Standing::Superseded;
        }
        let Some(newest) = self.newest() else {
            return Standing::NoProxy;
        };
        match newest.told.get(uid).filter(|told| told.seq >= seq).map(|told| &told.answer) {
            Some(Answer::Added) => Standing::Acked,
            Some(Answer::Refused(error)) => {
                Standing::Refused { proxy: newest.id, error: error.clone() }
            }
            Some(Answer::Kept) | None => Standing::Open,
        }
    }

    /// Whether the newest proxy serves the workload as it is now known.
    pub(super) fn acked(&self, uid: &str) -> bool {
        let Some(known) = self.known.get(uid) else {
            return false;
        };
        self.newest().is_some_and(|newest| newest.answer(known) == Some(&Answer::Added))
    }

    /// A proxy said hello: it is the newest now, and its snapshot is what is known now.
    pub(super) fn connect(&mut self, pid: Option<i32>) -> (ProxyId, Event) {
        self.last_proxy += 1;
        let id = ProxyId(self.last_proxy);
        let mut snapshot: Vec<&Known> = self.known.values().collect();
        snapshot.sort_by_key(|known| known.seq);
        let snapshot = snapshot.into_iter().map(|known| known.workload.uid.clone()).collect();
        self.proxies.push(Proxy {
            id,
            pid,
            since: Instant::now(),
            snapshot: Some(snapshot),
            told: BTreeMap::new(),
            dels: VecDeque::new(),
        });
        (id, Event::ProxyConnected { id, pid })
    }

    /// A proxy is gone; the one before it, if any, is the newest again.
    pub(super) fn disconnect(&mut self, id: ProxyId, fault: Fault) -> Event {
        self.proxies.retain(|proxy| proxy.id != id);
        let reason = fault.to_string();
        self.last_gone = Some((id, reason.clone()));
        self.last_gone_at = Some(SystemTime::now());
        Event::ProxyGone { id, reason }
    }

    /// The next request to a proxy, if there is one. Has to be sent, and its ack recorded, before
    /// the next call for the same proxy.
    pub(super) fn next(&mut self, id: ProxyId) -> Option<Step> {
        let known = &self.known;
        let is_newest = self.proxies.last().is_some_and(|newest| newest.id == id);
        let proxy = self.proxies.iter_mut().find(|proxy| proxy.id == id)?;

        while let Some(uid) = proxy.snapshot.as_mut().and_then(VecDeque::pop_front) {
            let Some(known) = known.get(&uid) else {
                continue;
            };
            // Deleted and known again in the meantime: the Del has to come first.
            if !proxy.deletes(&uid) && proxy.holder_of_netns_of(known).is_none() {
                return Some(Step::of(known));
            }
        }
        if !proxy.snapshot_done() {
            return Some(Step::SnapshotSent);
        }
        if let Some(uid) = proxy.dels.front() {
            return Some(Step::Del { uid: uid.clone() });
        }
        if !is_newest {
            return None;
        }
        let lacking = known
            .values()
            .filter(|known| known.netns.is_some() && proxy.answer(known).is_none())
            .min_by_key(|known| known.seq)?;
        Some(match proxy.holder_of_netns_of(lacking) {
            None => Step::of(lacking),
            Some(holder) => Step::Del { uid: holder.to_owned() },
        })
    }

    /// The proxy answered `step`. An error is a refusal after which it has to be disconnected.
    pub(super) fn record(
        &mut self,
        id: ProxyId,
        step: Step,
        answer: Result<(), String>,
    ) -> Result<Option<Event>, Fault> {
        if let (Err(error), false) = (&answer, matches!(step, Step::Add { .. })) {
            return Err(Fault::Refused { request: step.to_string(), error: error.clone() });
        }
        let known = &self.known;
        let Some(proxy) = self.proxies.iter_mut().find(|proxy| proxy.id == id) else {
            return Ok(None);
        };
        match step {
            Step::Add { workload: Workload { uid, .. }, netns, seq } => {
                let (answer, event) = match answer {
                    Ok(()) => (Answer::Added, Event::WorkloadAdded { id, uid: uid.clone() }),
                    Err(error) => {
                        // Otherwise the proxy keeps trying, and is not ready as long as it fails.
                        proxy.delete(&uid);
                        let event =
                            Event::WorkloadRefused { id, uid: uid.clone(), error: error.clone() };
                        (Answer::Refused(error), event)
                    }
                };
                proxy.told.insert(uid, Told { seq, netns: Some(netns.id), answer });
                Ok(proxy.snapshot_done().then_some(event))
            }
            Step::Keep { workload, seq } => {
                let told = Told { seq, netns: None, answer: Answer::Kept };
                proxy.told.insert(workload.uid, told);
                Ok(None)
            }
            Step::SnapshotSent => {
                proxy.snapshot = None;
                let told = proxy.told.iter();
                let results = told.map(|(uid, told)| (uid.clone(), told.answer.clone())).collect();
                Ok(Some(Event::SnapshotDone { id, results: Arc::new(results) }))
            }
            Step::Del { uid } => {
                proxy.dels.retain(|del| *del != uid);
                let last = proxy.told.remove(&uid);
                // A refusal is remembered; otherwise the Add would be sent again at once.
                if let Some(told) = last
                    && matches!(told.answer, Answer::Refused(_))
                    && known.get(&uid).is_some_and(|known| known.seq == told.seq)
                {
                    proxy.told.insert(uid, Told { netns: None, ..told });
                }
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs::File};

    use super::*;

    /// ztunnel's side of one connection, and the workloads that its process serves: a model of
    /// `src/inpod/statemanager.rs`. Panics on whatever makes ztunnel exit or misbehave.
    #[derive(Default)]
    struct Ztunnel {
        /// Which netns each uid is served in; outlives a connection.
        serving: BTreeMap<String, (u64, u64)>,
        pending: BTreeSet<String>,
        snapshot: BTreeSet<String>,
        snapshot_received: bool,
    }

    impl Ztunnel {
        fn reconnect(&mut self) {
            self.pending.clear();
            self.snapshot.clear();
            self.snapshot_received = false;
        }

        fn ready(&self) -> bool {
            self.snapshot_received && self.pending.is_empty()
        }

        fn process(&mut self, step: &Step, fails: bool) -> Result<(), String> {
            let packet = step.request().to_packet();
            assert!((1..=MAX_REQUEST_BYTES).contains(&packet.len()));
            match step.request() {
                Request::Add(AddWorkload { uid, workload_info }) => {
                    assert!(workload_info.is_some(), "protocol error");
                    let Step::Add { netns, .. } = step else { unreachable!() };
                    if !self.snapshot_received {
                        self.snapshot.insert(uid.clone());
                    }
                    if self.serving.get(&uid) == Some(&netns.id) {
                        return Ok(());
                    }
                    self.serving.remove(&uid);
                    if fails {
                        self.pending.insert(uid);
                        return Err("failure to start proxy".into());
                    }
                    self.pending.remove(&uid);
                    self.serving.insert(uid, netns.id);
                }
                Request::Keep(keep) => {
                    assert!(!self.snapshot_received, "protocol error");
                    self.snapshot.insert(keep.uid);
                }
                Request::Del(del) => {
                    assert!(self.snapshot_received, "Del within a snapshot");
                    self.pending.remove(&del.uid);
                    self.serving.remove(&del.uid);
                }
                Request::SnapshotSent(_) => {
                    assert!(!self.snapshot_received, "protocol error");
                    self.snapshot_received = true;
                    self.serving.retain(|uid, _| self.snapshot.contains(uid));
                }
            }
            Ok(())
        }
    }

    /// xorshift64*: the same numbers for the same seed, everywhere.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
        }
    }

    struct World {
        state: State,
        fd: Arc<OwnedFd>,
        /// Per connection: the process, and its request without an answer yet.
        connections: BTreeMap<ProxyId, (Ztunnel, Option<Step>)>,
        /// Processes whose connection broke; what they serve goes on.
        apart: Vec<Ztunnel>,
    }

    impl World {
        fn workload(n: u64) -> Workload {
            let name = format!("pod-{n}");
            let (namespace, service_account) = ("ns".into(), "sa".into());
            Workload { uid: format!("u-{n}"), namespace, name, service_account }
        }

        /// One request is sent, or answered, on a connection. False if there was nothing to do.
        fn advance(&mut self, id: ProxyId, fails: bool) -> bool {
            let (ztunnel, open) = self.connections.get_mut(&id).unwrap();
            let Some(step) = open.take().or_else(|| self.state.next(id)) else {
                return false;
            };
            let answer = ztunnel.process(&step, fails);
            self.state.record(id, step, answer).unwrap();
            true
        }

        fn do_something(&mut self, random: &mut Random) {
            let ids: Vec<ProxyId> = self.connections.keys().copied().collect();
            let pick = |random: &mut Random| ids[random.below(ids.len() as u64) as usize];
            match random.below(16) {
                0..4 => {
                    let uid = random.below(8);
                    // The last two have a netns to themselves, as they are also kept: nobody can
                    // tell in which netns a kept workload is served.
                    let netns = if uid < 6 { random.below(6) } else { uid };
                    let netns = Netns { fd: Arc::clone(&self.fd), id: (1, netns) };
                    let _ = self.state.put(Self::workload(uid), Some(netns));
                }
                4 => {
                    self.state.put(Self::workload(6 + random.below(2)), None).unwrap();
                }
                5..7 => {
                    self.state.delete(&Self::workload(random.below(8)).uid);
                }
                7 if ids.len() < 3 => {
                    let mut ztunnel = self.apart.pop().unwrap_or_default();
                    ztunnel.reconnect();
                    let (id, _) = self.state.connect(None);
                    self.connections.insert(id, (ztunnel, None));
                }
                8 if !ids.is_empty() && random.below(4) == 0 => {
                    let id = pick(random);
                    let (ztunnel, _) = self.connections.remove(&id).unwrap();
                    self.state.disconnect(id, Fault::Closed);
                    if random.below(2) == 0 {
                        self.apart.push(ztunnel);
                    }
                }
                // A request goes out; what happens before its answer is up to the next rounds.
                9..11 if !ids.is_empty() => {
                    let id = pick(random);
                    let (_, open) = self.connections.get_mut(&id).unwrap();
                    if open.is_none() {
                        *open = self.state.next(id);
                    }
                }
                11.. if !ids.is_empty() => {
                    let id = pick(random);
                    let fails = random.below(8) == 0;
                    self.advance(id, fails);
                }
                _ => {}
            }
        }

        /// On no connection were two uids told to be served in one netns at once. (What a process
        /// still serves from an earlier connection is settled by the snapshot.)
        fn no_netns_is_served_twice(&self) {
            for (ztunnel, _) in self.connections.values().filter(|(z, _)| z.snapshot_received) {
                let netns: BTreeSet<_> = ztunnel.serving.values().collect();
                assert_eq!(netns.len(), ztunnel.serving.len(), "{:?}", ztunnel.serving);
            }
        }
    }

    #[test]
    fn whatever_happens_no_proxy_is_offended_and_the_newest_ends_up_with_what_is_known() {
        for seed in 1..=2000 {
            let mut random = Random(seed);
            let mut world = World {
                state: State::default(),
                fd: Arc::new(File::open("/dev/null").unwrap().into()),
                connections: BTreeMap::new(),
                apart: Vec::new(),
            };
            for _ in 0..300 {
                world.do_something(&mut random);
                world.no_netns_is_served_twice();
            }
            // Quiet: everybody catches up.
            for id in world.connections.keys().copied().collect::<Vec<_>>() {
                while world.advance(id, false) {
                    world.no_netns_is_served_twice();
                }
            }
            let state = &world.state;
            for (id, (ztunnel, _)) in &world.connections {
                assert!(ztunnel.ready(), "seed {seed}: {:?} hangs", ztunnel.pending);
                for uid in ztunnel.serving.keys() {
                    assert!(state.known.contains_key(uid), "seed {seed}: {uid} is not deleted");
                }
                if state.newest().unwrap().id != *id {
                    continue;
                }
                for Known { workload: Workload { uid, .. }, netns, .. } in state.known() {
                    let Some(netns) = netns else { continue };
                    let refused = state.is_refused_by_newest(uid);
                    let serving = (!refused).then_some(&netns.id);
                    assert_eq!(ztunnel.serving.get(uid), serving, "seed {seed}: {uid}");
                    assert_eq!(state.acked(uid), !refused, "seed {seed}: {uid}");
                }
            }
        }
    }
}
