//! `observe`: verdicts as they are made.

use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redirect_agent::verdicts::{Endpoint, Line, Verdict};
use redirect_tests::app::Call;
use redirect_tests::both_families;
use redirect_tests::netns::Family;
use redirect_tests::process::wait_for;
use redirect_tests::topology::Pod;

use crate::cluster::{Cluster, PORT, echo};

both_families! {
    verdicts_of_a_call_name_both_ends_and_refusals_can_be_picked_out,
    observer_of_one_pod_sees_nothing_of_another,
}

const PATIENCE: Duration = Duration::from_secs(10);

/// `observe` in the background.
struct Observer {
    child: Child,
}

impl Drop for Observer {
    fn drop(&mut self) {
        // It may have ended.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

impl Observer {
    fn start(cluster: &Cluster, args: &[&str]) -> Result<Self> {
        // Or another one's end is not seen yet.
        wait_for("the datapath to be silent", PATIENCE, || Ok((!is_told(cluster)?).then_some(())))?;
        let mut command = cluster.node.command("observe")?;
        let child = command.args(args).args(["-o", "json"]).stdout(Stdio::piped()).spawn();
        let observer = Self { child: child.context("start observe")? };
        wait_for("the datapath to tell", PATIENCE, || Ok(is_told(cluster)?.then_some(())))?;
        Ok(observer)
    }

    /// What it has printed by its own end.
    fn verdicts(mut self) -> Result<Vec<Verdict>> {
        let mut text = String::new();
        self.child.stdout.take().context("no output")?.read_to_string(&mut text)?;
        let status = self.child.wait().context("wait for observe")?;
        ensure!(status.success(), "observe: {status}");
        let verdict = |line: &str| match serde_json::from_str(line)? {
            Line::Verdict(verdict) => Ok(*verdict),
            Line::Dropped { dropped } => anyhow::bail!("{dropped} dropped"),
        };
        text.lines().map(verdict).collect()
    }
}

/// Whether the programs tell their verdicts.
pub fn is_told(cluster: &Cluster) -> Result<bool> {
    let map = MapData::from_pin(cluster.node.bpffs().join("verdicts_wanted"))?;
    let wanted: Array<_, u64> = Map::Array(map).try_into()?;
    Ok(wanted.get(&0, 0)? != 0)
}

fn key(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

fn end(pod: &Pod, family: Family, port: u16) -> Result<Endpoint> {
    Ok(Endpoint { ip: pod.ip(family), port, pod: Some(key(pod).parse()?) })
}

fn verdicts_of_a_call_name_both_ends_and_refusals_can_be_picked_out(family: Family) -> Result<()> {
    let cluster = Cluster::start()?;
    let Cluster { node, server, client, .. } = &cluster;
    let _app = echo(client)?;
    node.enroll(server)?;
    let to = client.addr(family, PORT);
    let port = PORT.to_string();
    let observer = Observer::start(&cluster, &["--port", &port, "--limit", "1", "--for", "30s"])?;
    Call::to(to).within(PATIENCE).make(&server.netns)?.answer()?;
    let verdicts = observer.verdicts()?;
    let [verdict] = &verdicts[..] else { anyhow::bail!("{verdicts:?}") };
    ensure!(verdict.verdict == "redirected_outbound", "{verdict:?}");
    ensure!(verdict.pod == Some(key(server).parse()?), "{verdict:?}");
    ensure!(verdict.protocol.as_deref() == Some("tcp"), "{verdict:?}");
    // Of another node's pods the agent does not know the names.
    let called = Endpoint { pod: None, ..end(client, family, PORT)? };
    ensure!(verdict.destination == Some(called), "{verdict:?}");
    let source = verdict.source.clone().context("no source")?;
    ensure!(source == end(server, family, source.port)?, "{verdict:?}");

    // Nobody listens there.
    let observer = Observer::start(&cluster, &["--refused", "--limit", "1", "--for", "30s"])?;
    Call::to(to).within(PATIENCE).make(&server.netns)?.answer()?;
    Call::to(server.addr(family, PORT)).within(PATIENCE).make(&client.netns)?.refusal()?;
    let verdicts = observer.verdicts()?;
    ensure!(verdicts.iter().map(|verdict| &*verdict.verdict).eq(["no_listener"]), "{verdicts:?}");
    wait_for("the datapath to be silent", PATIENCE, || Ok((!is_told(&cluster)?).then_some(())))
}

fn observer_of_one_pod_sees_nothing_of_another(family: Family) -> Result<()> {
    let mut cluster = Cluster::start()?;
    let second = cluster.topology.add_pod(0, "shop", "second")?;
    let Cluster { node, server, .. } = &cluster;
    let _apps = (echo(server)?, echo(&second)?);
    node.enroll(server)?;
    node.enroll(&second)?;
    let observer = Observer::start(&cluster, &[&key(&second), "--for", "10s"])?;
    let to_second = Call::to(second.addr(family, PORT)).within(PATIENCE);
    to_second.make(&server.netns)?.answer()?;
    let verdicts = observer.verdicts()?;
    let pod = key(&second).parse()?;
    ensure!(!verdicts.is_empty(), "nothing of the pod that was called");
    ensure!(verdicts.iter().all(|verdict| verdict.pod.as_ref() == Some(&pod)), "{verdicts:?}");
    let inbound = verdicts.iter().find(|verdict| verdict.verdict == "hbone");
    let inbound = inbound.with_context(|| format!("no HBONE: {verdicts:?}"))?;
    let from = inbound.source.as_ref().and_then(|source| source.pod.as_ref());
    ensure!(from == Some(&key(server).parse()?), "{inbound:?}");
    Ok(())
}

/// Whoever observes is sent away when the agent ends, and does not keep it, not even when it reads nothing.
#[test]
fn agent_that_stops_sends_observers_away() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let Cluster { node, server, client, .. } = &cluster;
    let _app = echo(client)?;
    node.enroll(server)?;
    let mut observer = Observer::start(&cluster, &["--port", "1"])?;
    let mut stuck = node.command("observe")?;
    let stuck = stuck.args(["-o", "json"]).stdout(Stdio::piped()).spawn();
    let stuck = Observer { child: stuck.context("start observe")? };
    sleep(Duration::from_millis(500));
    let pid = Pid::from_raw(i32::try_from(stuck.child.id())?);
    kill(pid, Signal::SIGSTOP).context("stop observe")?;
    // More than the buffers in between take.
    let nobody = SocketAddr::new(server.ip(Family::V4), 9);
    client.netns.run(|| {
        for _ in 0..10_000 {
            let refused = TcpStream::connect_timeout(&nobody, PATIENCE);
            ensure!(refused.is_err(), "somebody listens at {nobody}");
        }
        Ok(())
    })?;
    let began = Instant::now();
    cluster.node.stop_agent()?;
    ensure!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
    let status = observer.child.wait()?;
    ensure!(status.code() == Some(1), "{status}");
    drop(stuck);
    Ok(())
}

#[test]
fn observer_ends_when_nobody_reads_what_it_says() -> Result<()> {
    let cluster = Cluster::start()?;
    let mut observer = Observer::start(&cluster, &[])?;
    drop(observer.child.stdout.take());
    wait_for("observe to end", PATIENCE, || Ok(observer.child.try_wait()?.map(drop)))?;
    wait_for("the datapath to be silent", PATIENCE, || Ok((!is_told(&cluster)?).then_some(())))
}
