//! A constant load of new connections, and long-lived ones that go on meanwhile.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use redirect_tests::app::{Call, Outcome};
use redirect_tests::netns::Family;
use redirect_tests::topology::Pod;

use crate::cluster::{PORT, converse};

/// How many connections each caller opens at once.
const AT_ONCE: usize = 3;

/// How many calls of each caller may meet the port of its old connection; one is rare.
const PORT_TAKEN: usize = 2;

/// The callers' ports where the proxy's path shows by the port: `net.ipv4.ip_local_port_range` begins above, so
/// no proxy chooses them by itself.
const PORTS: Range<u16> = 16_000..32_000;
/// How long such a caller waits between two rounds: no port is used again while its TIME_WAIT lasts.
const PACE: Duration = Duration::from_millis(20);

/// Who calls whom.
pub struct Load<'a> {
    calls: Vec<(&'a Pod, &'a Pod, Family)>,
    keeps_old: bool,
    seen_as: Option<&'a Pod>,
    /// Whether the callers' ports are of [`PORTS`].
    own_ports: bool,
    /// Whether no connection may get past the proxy.
    by_proxy: bool,
    /// How many connections of each caller may be closed without an answer.
    may_close: usize,
}

/// Says that the load is to end, also when what it was for has panicked.
pub struct Until<'a>(pub &'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'a> Load<'a> {
    /// Two pods call each other.
    pub fn between(a: &'a Pod, b: &'a Pod, families: &[Family]) -> Self {
        let calls = families.iter().flat_map(|&family| [(a, b, family), (b, a, family)]).collect();
        Self::of_all(calls)
    }

    /// One pod calls another, or what is behind a pod does.
    pub fn of(from: &'a Pod, to: &'a Pod, family: Family) -> Self {
        Self::of_all(vec![(from, to, family)])
    }

    /// Each of these pods calls another.
    pub fn of_all(calls: Vec<(&'a Pod, &'a Pod, Family)>) -> Self {
        Self {
            calls,
            keeps_old: false,
            seen_as: None,
            own_ports: false,
            by_proxy: false,
            may_close: 0,
        }
    }

    /// Whoever answers may see this pod in the place of the one that calls.
    pub fn seen_as(self, pod: &'a Pod) -> Self {
        Self { seen_as: Some(pod), ..self }
    }

    /// The callers' ports are none that the proxy may choose, so that none is lost, however long it lasts; and
    /// they leave the machine to others between two rounds.
    pub fn with_own_ports(self) -> Self {
        Self { own_ports: true, ..self }
    }

    /// The same, and every connection has to go by the proxy: whoever answers sees a port of the proxy's.
    pub fn by_proxy(self) -> Self {
        Self { by_proxy: true, ..self.with_own_ports() }
    }

    /// So many times a proxy ends, which closes what it has not accepted by then.
    pub fn while_proxies_end(self, times: usize) -> Self {
        Self { may_close: times * AT_ONCE, ..self }
    }

    /// A connection of each caller is opened before, and has to go on all the while. The proxy may choose
    /// its port for a call, 1 in 28,000, and then has to close that (docs/limits.md).
    pub fn keeping_old(self) -> Self {
        Self { keeps_old: true, may_close: self.may_close + PORT_TAKEN, ..self }
    }

    /// Runs `f` under this load. Every connection has to be answered, by the right pod, which has
    /// to see the right one; gives what `f` gives, and the number of connections.
    pub fn during<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
        let done = &AtomicBool::new(false);
        thread::scope(|scope| {
            let until = Until(done);
            let mut callers = Vec::new();
            for &(from, to, family) in &self.calls {
                let old = match self.keeps_old {
                    true => Some(converse(from, to, family)?),
                    false => None,
                };
                callers.push(scope.spawn(move || {
                    let mut old = old;
                    let mut failures = Vec::new();
                    let (mut made, mut closed) = (0, 0);
                    let started = Instant::now();
                    let mut ports = PORTS.cycle();
                    while !done.load(Ordering::Relaxed) {
                        let addr = to.addr(family, PORT);
                        let at = started.elapsed();
                        let call = Call::to(addr);
                        let outcomes = if self.own_ports {
                            thread::sleep(PACE);
                            let ports = ports.by_ref().take(AT_ONCE);
                            let calls = ports.map(|port| call.from(from.addr(family, port)));
                            Call::all_at_once(calls.collect(), &from.netns)?
                        } else {
                            call.at_once(&from.netns, AT_ONCE)?
                        };
                        for outcome in outcomes {
                            made += 1;
                            let past = self.by_proxy && is_past_the_proxy(&outcome);
                            if matches!(outcome, Outcome::Closed { bytes: 0 })
                                && closed < self.may_close
                            {
                                closed += 1;
                            } else if past || !is_right(&outcome, from, self.seen_as, to, addr) {
                                // With --nocapture, it is seen beside what happens meanwhile.
                                println!("load: {from} to {addr}, after {at:?}: {outcome}");
                                failures.push(format!("after {at:?}: {outcome}"));
                            }
                        }
                        if let Some(old) = &mut old {
                            old.exchange(b"still there?").with_context(|| {
                                format!("talk on the old connection from {from} to {to}")
                            })?;
                        }
                    }
                    ensure!(
                        failures.is_empty(),
                        "{} of {made} calls of {from} to {to} went wrong: {failures:#?}",
                        failures.len()
                    );
                    Ok(made)
                }));
            }
            let outcome = f();
            drop(until);
            let mut made = 0;
            let mut failed = Ok(());
            for caller in callers {
                match caller.join().map_err(|_| anyhow!("a caller panicked")).flatten() {
                    Ok(calls) => made += calls,
                    Err(error) => failed = Err(error),
                }
            }
            let outcome = outcome?;
            failed?;
            Ok((outcome, made))
        })
    }
}

/// Whoever answered saw the very port of the caller.
fn is_past_the_proxy(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Answered(answer) if PORTS.contains(&answer.saw_peer.port()))
}

fn is_right(
    outcome: &Outcome,
    from: &Pod,
    seen_as: Option<&Pod>,
    to: &Pod,
    addr: SocketAddr,
) -> bool {
    matches!(outcome, Outcome::Answered(answer)
        if answer.by == to.name
            && [Some(from), seen_as]
                .into_iter()
                .flatten()
                .any(|pod| [pod.v4.into(), pod.v6.into()].contains(&answer.saw_peer.ip()))
            && answer.saw_local == addr)
}
