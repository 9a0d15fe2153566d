//! All that happens to a node, in random order, under load. The tests run this for some seconds, and
//! `cargo xtask soak` for as long as a person wishes.
//!
//! Two pods are called, and call, all the while. `witness` is in the mesh throughout: none of its connections may
//! get past the proxy. `server` enters and leaves the mesh. Neither may lose a connection while a proxy runs.

use std::collections::BTreeMap;
use std::env;
use std::mem;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use redirect_agent::output::PodState;
use redirect_tests::app::{Answer, Call, Conversation, Outcome};
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::sniff::Sniffer;
use redirect_tests::topology::Pod;
use serde_json::json;

use crate::cluster::{Cluster, Manifest, Node, PORT, SOON, echo};
use crate::load::Until;
use crate::restart::Random;

/// For how long, in seconds, and in which order. `cargo xtask soak` sets them.
const SECONDS: &str = "REDIRECT_SOAK_SECONDS";
const SEED: &str = "REDIRECT_SOAK_SEED";
const FEW_SECONDS: u64 = 20;
const ANY_SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// The clients' ports, which no proxy chooses by itself: `net.ipv4.ip_local_port_range` begins above.
const PORTS: Range<u16> = 20_000..30_000;
/// How many of a client's ports are for its long connections.
const LONG: u16 = 100;
/// What is wrong at any time.
const PAST: &str = "past the proxy";
/// How long a caller waits between two calls.
const PACE: Duration = Duration::from_millis(50);
/// How long after a proxy has come back a connection may still suffer: a SYN that the outage has dropped is sent
/// again after 1, 3, and 7 s.
const RETRANSMISSION: Duration = Duration::from_secs(8);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

#[test]
fn random_events_under_load_lose_and_leak_nothing() -> Result<()> {
    let length = Duration::from_secs(number(SECONDS)?.unwrap_or(FEW_SECONDS));
    let seed = number(SEED)?.unwrap_or(ANY_SEED);
    println!("soak: {} s, {SEED}={seed}", length.as_secs());
    soak(length, seed).with_context(|| format!("{SEED}={seed}"))
}

fn number(name: &str) -> Result<Option<u64>> {
    let value = env::var(name).ok();
    value.map(|v| v.parse().with_context(|| format!("{name}={v} is not a number"))).transpose()
}

fn soak(length: Duration, seed: u64) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let witness = &cluster.topology.add_pod(0, "shop", "witness")?;
    let passing = &cluster.topology.add_pod(0, "shop", "passing")?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?, echo(witness)?);
    let pods = [&*server, witness, passing];
    let untouched =
        pods.map(|pod| footprint(&pod.netns)).into_iter().collect::<Result<Vec<_>>>()?;
    node.enroll(witness)?;

    let load =
        Load { began: Instant::now(), outages: Mutex::default(), done: AtomicBool::new(false) };
    let mut events = Events {
        node,
        server,
        witness,
        passing,
        load: &load,
        random: Random(seed),
        entered: false,
    };
    let calls = [(&*client, witness), (witness, client), (client, server), (server, client)];
    let (counted, tally) = thread::scope(|scope| -> Result<_> {
        let until = Until(&load.done);
        let mut callers = Vec::new();
        for family in FAMILIES {
            for (n, (from, to)) in calls.into_iter().enumerate() {
                // Two of them call from the same pod.
                let half = PORTS.len() as u16 / 2;
                let ports =
                    PORTS.start + half * (n as u16 / 2)..PORTS.start + half * (n as u16 / 2 + 1);
                let in_mesh = n < 2;
                let caller = Caller { from, to, family, ports, in_mesh, load: &load };
                callers.push(scope.spawn(move || caller.run()));
            }
        }
        let counted = events.run(length, client);
        drop(until);
        let mut tally = Tally::default();
        for caller in callers {
            tally.add(caller.join().map_err(|_| anyhow!("a caller panicked"))??);
        }
        ensure!(
            tally.failures.is_empty(),
            "{} went wrong: {:#?}",
            tally.failures.len(),
            tally.failures
        );
        Ok((counted?, tally))
    })?;
    println!("soak: {counted:?}, {tally:?}");
    ensure!(
        tally.exchanges > 0 && tally.answered > tally.excused,
        "too little was tried: {tally:?}"
    );

    for (pod, before) in pods.into_iter().zip(&untouched) {
        node.write(&Manifest::of(pod))?;
        node.wait_for_state(pod, PodState::Bypassing)?;
        assert_unchanged(&pod.netns, before)?;
        ensure!(!node.links(pod)?.exists(), "{pod} has links left");
    }
    Ok(())
}

/// What the callers know of each other and of the proxy.
struct Load {
    began: Instant,
    /// From when to when no proxy served every pod.
    outages: Mutex<Vec<(Instant, Option<Instant>)>>,
    done: AtomicBool,
}

impl Load {
    /// Whether the proxy was away at any time since then.
    fn had_outage(&self, since: Instant) -> bool {
        let outages = self.outages.lock().unwrap_or_else(PoisonError::into_inner);
        outages.iter().any(|(_, end)| end.is_none_or(|end| end + RETRANSMISSION > since))
    }

    fn outage<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let lock = || self.outages.lock().unwrap_or_else(PoisonError::into_inner);
        lock().push((Instant::now(), None));
        let outcome = f();
        if let Some((_, end)) = lock().last_mut() {
            *end = Some(Instant::now());
        }
        outcome
    }
}

/// What has come of the calls.
#[derive(Debug, Default)]
struct Tally {
    answered: usize,
    exchanges: usize,
    /// Lost to an outage of the proxy.
    excused: usize,
    failures: Vec<String>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.exchanges += other.exchanges;
        self.excused += other.excused;
        self.failures.extend(other.failures);
    }
}

/// Makes one call after the other, and talks on one long connection.
struct Caller<'a> {
    from: &'a Pod,
    to: &'a Pod,
    family: Family,
    ports: Range<u16>,
    /// Whether every connection has to go through the proxy.
    in_mesh: bool,
    load: &'a Load,
}

impl Caller<'_> {
    fn run(&self) -> Result<Tally> {
        let mut tally = Tally::default();
        // A short connection never gets the port of the long one, which is still open.
        let border = self.ports.end - LONG;
        let mut short = (self.ports.start..border).cycle();
        let mut long = (border..self.ports.end).cycle();
        let address = |port: Option<u16>| self.from.addr(self.family, port.unwrap_or(border));
        let mut old = None;
        // When the long connection was last known to be whole: an outage has cut it if there was one since.
        let mut whole = Instant::now();
        while !self.load.done.load(Ordering::Relaxed) {
            let (source, began) = (address(short.next()), Instant::now());
            let called = Call::to(self.to.addr(self.family, PORT)).from(source);
            let wrong = match called.make(&self.from.netns)? {
                Outcome::Answered(answer) if self.is_past_the_proxy(&answer) => {
                    Some(format!("{PAST}: {answer:?}"))
                }
                Outcome::Answered(answer) if answer.by == self.to.name => None,
                other => Some(other.to_string()),
            };
            let (wrong, since) = match wrong {
                Some(wrong) => (Some(wrong), began),
                None => match self.talk(&mut old, || address(long.next())) {
                    Ok(()) => {
                        whole = Instant::now();
                        (None, began)
                    }
                    Err(error) => (Some(format!("{error:#}")), whole.min(began)),
                },
            };
            match wrong {
                None => tally.answered += 1,
                Some(wrong) if !wrong.contains(PAST) && self.load.had_outage(since) => {
                    tally.excused += 1;
                }
                Some(wrong) => {
                    let after = self.load.began.elapsed().as_secs_f64();
                    println!("soak: {after:7.2} s  {self}: {wrong}");
                    tally.failures.push(format!("after {after:.2} s: {self}: {wrong}"));
                }
            }
            tally.exchanges += usize::from(old.is_some());
            thread::sleep(PACE);
        }
        Ok(tally)
    }

    /// The proxy calls from ports of its own.
    fn is_past_the_proxy(&self, answer: &Answer) -> bool {
        self.in_mesh && PORTS.contains(&answer.saw_peer.port())
    }

    /// Talks on the long connection, and opens one if there is none.
    fn talk(
        &self,
        old: &mut Option<Conversation>,
        next: impl FnOnce() -> SocketAddr,
    ) -> Result<()> {
        let Some(mut open) = old.take() else {
            let call = Call::to(self.to.addr(self.family, PORT)).from(next());
            let opened = call.open(&self.from.netns).context("a long connection")?;
            let answer = opened.answer();
            ensure!(!self.is_past_the_proxy(answer), "a long connection {PAST}: {answer:?}");
            *old = Some(opened);
            return Ok(());
        };
        open.exchange(b"still there?").context("the long connection")?;
        *old = Some(open);
        Ok(())
    }
}

impl std::fmt::Display for Caller<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}, {:?}", self.from, self.to, self.family)
    }
}

/// What happens meanwhile.
struct Events<'a> {
    node: &'a mut Node,
    server: &'a Pod,
    witness: &'a Pod,
    passing: &'a Pod,
    load: &'a Load,
    random: Random,
    /// Whether the server is to be in the mesh.
    entered: bool,
}

impl Events<'_> {
    /// Goes on until the time is over. How often each event has come.
    fn run(&mut self, length: Duration, client: &Pod) -> Result<BTreeMap<&'static str, usize>> {
        let mut counted = BTreeMap::new();
        let began = self.load.began;
        let mut wire = Sniffer::start(&client.netns, "eth0")?;
        while began.elapsed() < length {
            let name = self.next().with_context(|| format!("after {:?}", began.elapsed()))?;
            println!("soak: {:7.2} s  {name}", began.elapsed().as_secs_f64());
            *counted.entry(name).or_default() += 1;
            thread::sleep(Duration::from_millis(self.random.below(1500).into()));
            if self.random.below(4) == 0 {
                self.settle()?;
            }
            let past_the_proxy = |from: SocketAddr| {
                FAMILIES.iter().any(|&f| from.ip() == self.witness.ip(f))
                    && PORTS.contains(&from.port())
            };
            let next = Sniffer::start(&client.netns, "eth0")?;
            let seen = mem::replace(&mut wire, next).finish();
            let leaked = seen.iter().find(|seen| past_the_proxy(seen.segment.src));
            ensure!(leaked.is_none(), "past the proxy, during {name}: {leaked:?}");
        }
        self.settle()?;
        Ok(counted)
    }

    fn next(&mut self) -> Result<&'static str> {
        let pause = Duration::from_millis(self.random.below(1000).into());
        match self.random.below(16) {
            0..4 => {
                self.entered = !self.entered;
                let manifest = Manifest::of(self.server);
                let manifest = if self.entered { manifest.mode("ambient") } else { manifest };
                self.node.write(&manifest)?;
                Ok("the server's label changes")
            }
            4..8 => {
                self.node.kill_agent()?;
                thread::sleep(pause);
                self.node.start_agent()?;
                Ok("the agent is killed")
            }
            8 => {
                self.node.stop_agent()?;
                thread::sleep(pause);
                self.node.start_agent()?;
                Ok("the agent is restarted")
            }
            9 => {
                self.outage(|node| {
                    node.kill_proxy()?;
                    thread::sleep(pause);
                    node.start_proxy()
                })?;
                Ok("the proxy is killed")
            }
            10 => {
                self.outage(|node| {
                    node.start_proxy()?;
                    node.take_proxy()?.terminate(SOON).map(drop)
                })?;
                Ok("another proxy takes over")
            }
            11 | 12 => {
                let excluded = json!(format!("{}", 9000 + self.random.below(100)));
                let annotation = "traffic.redirect-agent/excludeOutboundPorts";
                let manifest = Manifest::of(self.witness).mode("ambient");
                self.node.write(&manifest.with("/metadata/annotations", annotation, excluded))?;
                Ok("a setting changes")
            }
            13 => {
                for family in ["-4", "-6"] {
                    // Fails if the agent has just removed it, to write it again.
                    let _absent = self
                        .witness
                        .netns
                        .output("ip", &[family, "route", "flush", "table", "15001"]);
                }
                Ok("the capture routes are deleted")
            }
            _ => {
                let manifest = Manifest::of(self.passing);
                self.node.write(&manifest.mode("ambient"))?;
                thread::sleep(pause);
                self.node.remove(&Manifest::of(self.passing))?;
                Ok("a pod comes and goes")
            }
        }
    }

    /// What no proxy can serve may be lost, until one serves every pod again.
    fn outage(&mut self, f: impl FnOnce(&mut Node) -> Result<()>) -> Result<()> {
        let load = self.load;
        load.outage(|| {
            f(self.node)?;
            self.settle()
        })
    }

    /// Waits until everything is as it should be.
    fn settle(&self) -> Result<()> {
        self.node.wait_until_complete(self.witness)?;
        match self.entered {
            true => self.node.wait_until_complete(self.server),
            false => self.node.wait_for_state(self.server, PodState::Bypassing).map(drop),
        }
    }
}
