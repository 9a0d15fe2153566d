//! The agent is killed at system calls by which it changes something: strace counts those of each thread and
//! sends the signal. Traffic goes on, and the next agent completes what the first one had begun.

use std::env;
use std::fs;
use std::iter::successors;
use std::num::NonZero;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use redirect_agent::output::{PodState, PodStatus};
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;

use crate::cluster::{Cluster, Manifest, Node, SOON, echo};
use crate::load::Load;

/// `cargo xtask test -- faults` with this variable set to N takes every N-th. That takes minutes, since a pod's
/// entries are deleted one by one: the tests take the 1st, 3rd, 9th, ….
const EVERY: &str = "REDIRECT_FAULTS_EVERY";
const TIMES: usize = 3;
/// Maps, programs and links; netlink; sysctls and files; the proxy's socket; pins and files that come and go.
const CHANGES: [&str; 5] = [
    "bpf",
    "sendto",
    "write",
    "sendmsg",
    "?unlink,unlinkat,?rename,?renameat,renameat2,?mkdir,mkdirat",
];
const SELDOM: Duration = Duration::from_millis(250);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

#[test]
fn agent_is_killed_at_each_system_call_of_enrollment() -> Result<()> {
    killed_at_each_system_call(true)
}

#[test]
fn agent_is_killed_at_each_system_call_of_unenrollment() -> Result<()> {
    killed_at_each_system_call(false)
}

fn killed_at_each_system_call(entering: bool) -> Result<()> {
    let every = env::var(EVERY).ok().map(|n| n.parse::<NonZero<usize>>().context(EVERY));
    let every = every.transpose()?;
    let next = |number: usize| Some(every.map_or(number * TIMES, |every| number + every.get()));
    let mut cluster = Cluster::with_flags(&["--drain", "1s"])?;
    let Cluster { node, server, client, .. } = &mut cluster;
    let _apps = (echo(server)?, echo(client)?);
    let untouched = footprint(&server.netns)?;
    let (outside, inside) = (Manifest::of(server), Manifest::of(server).mode("ambient"));
    let (before, after) = if entering { (&outside, &inside) } else { (&inside, &outside) };
    let mut killed = 0;
    Load::between(client, server, &FAMILIES).for_long().during(|| {
        for call in CHANGES {
            for number in successors(Some(1), |number| next(*number)) {
                node.write(before)?;
                settle(node, server, !entering)?;
                println!("faults: {call} {number}");
                let died = change_and_kill(node, server, (call, number), after, entering)
                    .with_context(|| format!("at {call} {number}"))?;
                if died {
                    killed += 1;
                    node.start_agent()?;
                }
                let settled = settle(node, server, entering).and_then(|()| {
                    if !entering {
                        return assert_unchanged(&server.netns, &untouched);
                    }
                    FAMILIES.into_iter().try_for_each(|family| {
                        node.assert_inbound(client, server, family)?;
                        node.assert_outbound(server, client, family)
                    })
                });
                settled.with_context(|| format!("killed at {call} {number}"))?;
                if !died {
                    println!("faults: {call}: fewer than {number} in any thread");
                    break;
                }
            }
        }
        Ok(())
    })?;
    println!("faults: killed {killed} times");
    ensure!(killed >= 4, "killed {killed} times only");
    Ok(())
}

fn settle(node: &Node, pod: &Pod, inside: bool) -> Result<()> {
    match inside {
        true => node.wait_until_enrolled(pod),
        false => node.wait_for_state(pod, PodState::Bypassing).map(drop),
    }
}

/// Changes the manifest, and kills the agent at this call of any of its threads; whether one came so far.
fn change_and_kill(
    node: &mut Node,
    pod: &Pod,
    (call, number): (&str, usize),
    manifest: &Manifest,
    entering: bool,
) -> Result<bool> {
    let pid = node.agent_pid()?;
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-p", &pid.to_string()]);
    strace.args(["-e", &format!("trace={call}")]);
    strace.args(["-e", &format!("inject={call}:signal=KILL:when={number}")]);
    let mut tracer = node.spawn("strace", &mut strace)?;
    wait_for("strace to follow every thread", SOON, || Ok(is_traced(pid)?.then_some(())))?;
    node.write(manifest)?;
    let mut asked = Instant::now();
    let died = wait_for("the agent to be killed, or to be done", SOON, || {
        if node.has_agent_died()? {
            return Ok(Some(true));
        }
        // The answer, too, costs it system calls.
        if node.is_published(pod) != entering || asked.elapsed() < SELDOM {
            return Ok(None);
        }
        asked = Instant::now();
        let is_done = |p: PodStatus| match entering {
            true => p.state == PodState::Enrolled,
            false => p.state == PodState::Bypassing,
        };
        // It may be killed while it answers.
        let done = node.pod(pod).is_ok_and(|pod| pod.is_some_and(is_done));
        Ok(done.then_some(false))
    })?;
    tracer.terminate(SOON)?;
    Ok(died || node.has_agent_died()?)
}

fn is_traced(pid: u32) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("list the threads")? {
        // It may have ended.
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else { continue };
        if status.lines().any(|line| line == "TracerPid:\t0") {
            return Ok(false);
        }
    }
    Ok(true)
}
