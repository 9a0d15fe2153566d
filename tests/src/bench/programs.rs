//! What the BPF programs of a pod cost.

use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use serde::Serialize;

use super::meter::packets;
use super::workload::Found;
use crate::netns::Netns;

/// What programs did for each connection, request, query or GB. Where one calls another, the first has
/// the time of both.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// How often one ran.
    pub runs: f64,
    /// How long they ran, ns.
    pub nanoseconds: f64,
    /// How many packets the pod sent and received, on `lo` and `eth0`. One packet is what the kernel handles as one: up to
    /// 64 KiB of TCP.
    pub packets: f64,
}

/// Counts the runs of `programs` while `run` runs. The kernel counts only as long as it is asked to,
/// because that costs time.
pub(super) fn cost_of(
    programs: &[u32],
    netns: &Netns,
    run: impl FnOnce() -> Result<Found>,
) -> Result<Cost> {
    let _counting = enable_stats(Stats::RunTime).context("enable bpf_stats")?;
    let (time, runs) = so_far(programs)?;
    let sent = packets(netns)?;
    let found = run()?;
    let (time_after, runs_after) = so_far(programs)?;
    let sent = packets(netns)? - sent;
    Ok(Cost {
        runs: (runs_after - runs) as f64 / found.done,
        nanoseconds: (time_after - time).as_nanos() as f64 / found.done,
        packets: sent as f64 / found.done,
    })
}

fn so_far(programs: &[u32]) -> Result<(Duration, u64)> {
    let (mut time, mut runs) = (Duration::ZERO, 0);
    for program in loaded_programs() {
        // One that is unloaded meanwhile is somebody else's.
        let Ok(program) = program else { continue };
        if programs.contains(&program.id()) {
            time += program.run_time();
            runs += program.run_count();
        }
    }
    Ok((time, runs))
}
