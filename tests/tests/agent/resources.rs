//! What the agent needs of its node: the numbers beside the DaemonSet's requests and limits.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use redirect_tests::process::wait_for;

use crate::cluster::{Cluster, Manifest, SOON};

/// How long the agent is watched when all is done.
const IDLE: Duration = Duration::from_secs(30);

/// `cargo xtask test -p redirect-tests -- --ignored --nocapture memory_and_time`
#[test]
#[ignore = "a measurement, which fails only when the agent does"]
fn memory_and_time_with_many_pods() -> Result<()> {
    for pods in [20, 100] {
        let mut cluster = Cluster::without_agent(&[])?;
        let names = (0..pods).map(|n| format!("pod{n}"));
        let pods: Vec<_> =
            names.map(|name| cluster.topology.add_pod(0, "shop", &name)).collect::<Result<_>>()?;
        for pod in &pods {
            cluster.node.write(&Manifest::of(pod).mode("ambient"))?;
        }
        cluster.node.start_agent()?;
        cluster.node.start_proxy()?;
        let enrolled = |count: usize| {
            let all = cluster.node.status()?.pods;
            let done = all.iter().filter(|p| p.kernel.as_ref().is_some_and(|k| k.complete)).count();
            Ok((done == count).then_some(()))
        };
        wait_for("all pods to be enrolled", SOON * 10, || enrolled(pods.len()))?;
        let (busy, _) = used(cluster.node.agent_pid()?)?;
        let since = Instant::now();
        wait_for("time to pass", IDLE * 2, || Ok((since.elapsed() > IDLE).then_some(())))?;
        let (later, memory) = used(cluster.node.agent_pid()?)?;
        println!(
            "{} pods: {memory}; {busy} ms of CPU until all were enrolled, then {} ms in {IDLE:?}",
            pods.len(),
            later - busy
        );
    }
    Ok(())
}

/// The milliseconds of CPU that a process has used so far, and its memory now and at most.
fn used(pid: u32) -> Result<(u64, String)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("read stat")?;
    let fields = stat.rsplit(')').next().context("read stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // utime and stime, in hundredths of a second: proc(5).
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read status")?;
    let memory: Vec<String> = status
        .lines()
        .filter(|line| line.starts_with("VmHWM") || line.starts_with("RssAnon"))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    Ok((ticks * 10, memory.join(", ")))
}
