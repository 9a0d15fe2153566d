//! Connections that stay open: what they cost the kernel.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;

use super::Mode;
use super::meter::{conntrack, kernel_memory};
use super::stage::Stage;
use super::workload::{ECHO, Workload, exchange, open};
use crate::netns::{Family, Netns};

/// The number that memory is told for.
pub(super) const UNIT: f64 = 10_000.0;
/// How many connect at once.
const AT_ONCE: usize = 8;
/// A connection by the proxy has four ends, all of them in this process.
const ENDS: u64 = 4;
/// Descriptors for everything else.
const SPARE: u64 = 1000;

/// Memory has settled when it changes less from one look to the next, bytes.
const SETTLED: u64 = 64 << 10;
/// How often to look for that.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// What open connections cost.
#[derive(Clone, Debug, Serialize)]
pub struct Held {
    /// In which round.
    pub round: usize,
    /// How the connections got to the server.
    pub mode: Mode,
    /// In which family.
    pub family: Family,
    /// How many were open.
    pub connections: usize,
    /// The kernel's memory for 10,000 of them, bytes: of the client, the proxy and the server together.
    pub kernel_bytes: f64,
    /// For 10,000 of them, entries of conntrack in the client's pod.
    pub conntrack: f64,
}

/// How many connections there is room for, of those that are asked for.
pub(super) fn room_for(connections: usize) -> Result<usize> {
    let wanted = connections as u64 * ENDS + SPARE;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of descriptors")?;
    if wanted <= hard || setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(connections);
    }
    usize::try_from((hard - SPARE.min(hard)) / ENDS).context("count descriptors")
}

/// Opens connections, and closes them.
pub(super) fn hold(stage: &Stage<'_>, round: usize, family: Family, count: usize) -> Result<Held> {
    let before = (settled_memory()?, conntrack(stage.netns())?);
    let connections = stage.through_the_proxy(Workload::Connect8, || {
        let all = open_all(stage.netns(), stage.target(family).port(ECHO), count)?;
        Ok((all.len() as u64, all))
    })?;
    let after = (settled_memory()?, conntrack(stage.netns())?);
    let per_unit =
        |before: u64, after: u64| (after as f64 - before as f64) * UNIT / connections.len() as f64;
    Ok(Held {
        round,
        mode: stage.mode(),
        family,
        connections: connections.len(),
        kernel_bytes: per_unit(before.0, after.0),
        conntrack: per_unit(before.1, after.1),
    })
}

/// The kernel's memory once it hardly changes any more, because the kernel frees much of it a while after. Where
/// it goes on changing somebody else is at work, and the interval tells.
fn settled_memory() -> Result<u64> {
    let mut last = kernel_memory()?;
    for _ in 0..LOOKS {
        thread::sleep(BETWEEN_LOOKS);
        let now = kernel_memory()?;
        if now.abs_diff(last) < SETTLED {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

fn open_all(netns: &Netns, to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let some = |number: usize| {
        netns.run(|| {
            let share = count / AT_ONCE + usize::from(number < count % AT_ONCE);
            (0..share)
                .map(|_| {
                    let mut stream = open(to)?;
                    exchange(&mut stream)?;
                    Ok(stream)
                })
                .collect::<Result<Vec<_>>>()
        })
    };
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..AT_ONCE).map(|number| scope.spawn(move || some(number))).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().map_err(|_| anyhow!("a thread panicked"))??);
        }
        Ok(all)
    })
}
