//! The datapath's verdicts, one by one, for whoever observes: `redirect-agent observe`.
//!
//! The programs report verdicts only while somebody observes. What finds no room, in the ring buffer or
//! with an observer that is slow, is dropped and counted.

mod line;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use futures_util::{Stream, StreamExt as _, stream};
use redirect_ebpf::abi::VerdictEvent;
use tokio::{
    sync::{
        Notify,
        broadcast::{self, error::RecvError},
    },
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

pub(crate) use self::line::is_refusal;
pub use self::line::{Endpoint, Line, Request, To, Verdict};
use crate::{
    dataplane::{Dataplane, Verdicts, monotonic_ns},
    membership::PodKey,
};

/// How long verdicts are gathered before they are passed on: a flood does not wake everybody up for each.
const GATHER: Duration = Duration::from_millis(20);
/// How often it is looked whether anybody still observes, while there are no verdicts.
const LOOK: Duration = Duration::from_millis(500);
/// How many verdicts are passed on at once. With [`GATHER`] it bounds what a flood costs; the rest is
/// dropped.
const BATCH: usize = 512;
/// How many batches an observer may lag behind.
const BATCHES: usize = 16;
/// How many may observe at the same time.
const OBSERVERS: usize = 8;
/// How long the programs report verdicts after they were last told to: an agent that is killed cannot
/// tell them to stop.
const LEASE: Duration = Duration::from_secs(5);

/// The pods of this node, as verdicts name them.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// By pod id.
    pub pods: HashMap<u32, PodKey>,
    /// By address.
    pub addresses: HashMap<IpAddr, PodKey>,
}

#[derive(Debug)]
struct Batch {
    /// The number of the first event; those that were lost are counted, too.
    first: u64,
    events: Vec<VerdictEvent>,
    /// Whether the ring buffer may hold more.
    more: bool,
    /// The same instant by both clocks; CLOCK_MONOTONIC in ns.
    now: (SystemTime, u64),
}

/// What an observer gets at once.
#[derive(Debug, Default)]
pub struct Lines {
    /// The verdicts, and how many were dropped before them.
    pub lines: Vec<Line>,
    /// Whether there may be more that were made before this was read; they follow at once.
    pub more: bool,
}

/// Passes the verdicts on to whoever observes.
pub struct Hub {
    dataplane: Arc<Dataplane>,
    batches: broadcast::Sender<Arc<Batch>>,
    came: Notify,
    ended: CancellationToken,
}

impl Hub {
    /// Nobody observes yet. Observers are sent away when `shutdown` begins.
    pub fn new(dataplane: Arc<Dataplane>, shutdown: CancellationToken) -> Self {
        let batches = broadcast::Sender::new(BATCHES);
        Self { dataplane, batches, came: Notify::new(), ended: shutdown }
    }

    /// Passes verdicts on until shutdown.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub async fn run(self: Arc<Self>) -> Result<()> {
        // A former agent may have been killed while somebody observed.
        self.dataplane.want_verdicts(Duration::ZERO)?;
        let mut verdicts = self.dataplane.verdicts()?;
        while self.ended.run_until_cancelled(self.came.notified()).await.is_some() {
            if self.batches.receiver_count() == 0 {
                continue;
            }
            let followed = self.ended.run_until_cancelled(self.follow(&mut verdicts)).await;
            self.dataplane.want_verdicts(Duration::ZERO)?;
            followed.transpose()?;
        }
        Ok(())
    }

    /// Passes verdicts on as long as anybody observes.
    async fn follow(&self, verdicts: &mut Verdicts) -> Result<()> {
        // Left over from the last observer.
        drop(verdicts.take(usize::MAX));
        let mut lost = self.dataplane.verdicts_lost()?;
        // The first batch, which may be empty, says that the programs report verdicts from now on.
        let (mut number, mut more) = (0, true);
        while self.batches.receiver_count() > 0 {
            self.dataplane.want_verdicts(LEASE)?;
            if !more {
                tokio::select! {
                    waited = timeout(LOOK, verdicts.wait()) => match waited {
                        Ok(waited) => waited?,
                        Err(_) => continue,
                    },
                    // Somebody has come, or waits for what there is.
                    () = self.came.notified() => {}
                }
            }
            let events = verdicts.take(BATCH);
            // The kernel announces nothing new before the ring buffer was empty.
            more = events.len() == BATCH;
            let now = (SystemTime::now(), monotonic_ns()?);
            let lost_now = self.dataplane.verdicts_lost()?;
            let first = number + lost_now.saturating_sub(lost);
            number = first + events.len() as u64;
            lost = lost_now;
            // Nobody may be there any more.
            let _nobody = self.batches.send(Arc::new(Batch { first, events, more, now }));
            sleep(GATHER).await;
        }
        Ok(())
    }

    /// Makes items come to each who observes, up to the first without [`Lines::more`]: with it, everything has come
    /// that the programs have reported by now.
    pub fn flush(&self) {
        self.came.notify_one();
    }

    /// What the request asks for, until shutdown. The first item comes at once, and may be empty: whatever is
    /// decided after it is reported.
    ///
    /// # Errors
    ///
    /// When too many observe already.
    pub fn observe<N: Fn() -> Names + Send + 'static>(
        &self,
        request: Request,
        node: String,
        names: N,
    ) -> Result<impl Stream<Item = Lines> + Send + use<N>> {
        ensure!(
            self.batches.receiver_count() < OBSERVERS,
            "{OBSERVERS} others observe already; end one of them"
        );
        let observer =
            Observer { batches: self.batches.subscribe(), next: None, request, node, names };
        self.came.notify_one();
        let lines = stream::unfold(observer, |mut observer| async {
            let lines = observer.lines().await?;
            Some((lines, observer))
        });
        Ok(lines.take_until(self.ended.clone().cancelled_owned()))
    }
}

/// One who observes.
struct Observer<N> {
    batches: broadcast::Receiver<Arc<Batch>>,
    /// The number of the next event; `None` before the first batch.
    next: Option<u64>,
    request: Request,
    node: String,
    names: N,
}

impl<N: Fn() -> Names> Observer<N> {
    /// What the next batch has for it; nothing more comes after `None`.
    async fn lines(&mut self) -> Option<Lines> {
        let batch = loop {
            match self.batches.recv().await {
                Ok(batch) => break batch,
                // The numbers show how many verdicts that were.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        };
        let next = self.next.unwrap_or(batch.first);
        self.next = Some(batch.first + batch.events.len() as u64);
        let dropped = batch.first.saturating_sub(next);
        let mut lines = Vec::new();
        if dropped > 0 {
            lines.push(Line::Dropped { dropped });
        }
        let names = (self.names)();
        let verdicts = batch.events.iter().filter_map(|event| {
            Verdict::of(event, batch.now, &self.node, &names)
                .filter(|verdict| self.request.selects(verdict))
        });
        lines.extend(verdicts.map(|verdict| Line::Verdict(Box::new(verdict))));
        Some(Lines { lines, more: batch.more })
    }
}

/// Lines as JSON, each with its newline.
///
/// # Errors
///
/// Never in practice: when JSON cannot express them.
pub fn to_json(lines: &[Line]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut out, line).context("write a verdict")?;
        out.push(b'\n');
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use redirect_ebpf::abi::{Addr, Counter};

    use super::*;

    fn batch(first: u64, events: usize) -> Arc<Batch> {
        let none = Addr { octets: [0; 16] };
        let event = VerdictEvent {
            at_ns: 0,
            pod_id: 1,
            counter: Counter::Local as u32,
            src: none,
            dst: none,
            src_port: 0,
            dst_port: 0,
            protocol: 0,
        };
        Arc::new(Batch {
            first,
            events: vec![event; events],
            more: false,
            now: (SystemTime::UNIX_EPOCH, 0),
        })
    }

    #[tokio::test]
    async fn what_is_lost_and_what_a_slow_observer_misses_is_said_to_be_dropped() {
        let (sender, batches) = broadcast::channel(4);
        let mut observer = Observer {
            batches,
            next: None,
            request: Request::default(),
            node: "n1".to_owned(),
            names: Names::default,
        };
        let mut told = async || {
            let Lines { lines, .. } = observer.lines().await.unwrap();
            let dropped = lines.iter().find_map(|line| match line {
                Line::Dropped { dropped } => Some(*dropped),
                Line::Verdict(_) => None,
            });
            (dropped, lines.len() - usize::from(dropped.is_some()))
        };
        // What was before does not concern it.
        sender.send(batch(100, 2)).unwrap();
        sender.send(batch(102, 3)).unwrap();
        assert_eq!([told().await, told().await], [(None, 2), (None, 3)]);
        // Lost in the kernel.
        sender.send(batch(112, 1)).unwrap();
        assert_eq!(told().await, (Some(7), 1));
        // It has not listened for long.
        for number in 0..10 {
            sender.send(batch(113 + number, 1)).unwrap();
        }
        assert_eq!([told().await, told().await], [(Some(6), 1), (None, 1)]);
    }
}
