//! What the BPF programs of a pod cost.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use serde::Serialize;

use super::meter::packets;
use super::workload::Found;
use crate::attached::Attached;
use crate::netns::Netns;

/// What programs did for each connection, request, query or GB. Where one calls another, the first has
/// the time of both.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// How often one ran.
    pub runs: f64,
    /// How long they ran, ns.
    pub nanoseconds: f64,
    /// How many packets the pod sent and received, on `lo` and `eth0`. One packet is what the kernel handles
    /// as one: up to 64 KiB of TCP.
    pub packets: f64,
    /// The parts of it, by where they are attached.
    pub places: Vec<Place>,
}

/// The part of one program.
#[derive(Clone, Debug, Serialize)]
pub struct Place {
    /// Where it is attached, and its name.
    pub place: String,
    /// How often it ran.
    pub runs: f64,
    /// How long it ran, ns.
    pub nanoseconds: f64,
}

/// Counts the runs of `programs` while `run` runs. The kernel counts only as long as it is asked to,
/// because that costs time.
pub(super) fn cost_of(
    programs: &[Attached],
    netns: &Netns,
    run: impl FnOnce() -> Result<Found>,
) -> Result<Cost> {
    let _counting = enable_stats(Stats::RunTime).context("enable bpf_stats")?;
    let before = so_far();
    let sent = packets(netns)?;
    let found = run()?;
    let after = so_far();
    let sent = packets(netns)? - sent;
    let places: Vec<Place> = programs
        .iter()
        .filter_map(|program| {
            let ((time, runs), (time_after, runs_after)) =
                (before.get(&program.id)?, after.get(&program.id)?);
            Some(Place {
                place: program.place.clone(),
                runs: (runs_after - runs) as f64 / found.done,
                nanoseconds: (*time_after - *time).as_nanos() as f64 / found.done,
            })
        })
        .collect();
    Ok(Cost {
        runs: places.iter().map(|place| place.runs).sum(),
        nanoseconds: places.iter().map(|place| place.nanoseconds).sum(),
        packets: sent as f64 / found.done,
        places,
    })
}

/// How long each program has run, and how often. One that is unloaded meanwhile is somebody else's.
fn so_far() -> BTreeMap<u32, (Duration, u64)> {
    let programs = loaded_programs().filter_map(Result::ok);
    programs.map(|program| (program.id(), (program.run_time(), program.run_count()))).collect()
}
