//! `observe`: verdicts as they are made.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
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
    child: std::process::Child,
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
    fn verdicts(self) -> Result<Vec<Verdict>> {
        let output = self.child.wait_with_output().context("wait for observe")?;
        ensure!(output.status.success(), "observe: {}", output.status);
        let text = String::from_utf8(output.stdout)?;
        let verdict = |line: &str| match serde_json::from_str(line)? {
            Line::Verdict(verdict) => Ok(*verdict),
            Line::LeftOut { left_out } => anyhow::bail!("{left_out} left out"),
        };
        text.lines().map(verdict).collect()
    }
}

/// Whether the programs tell their verdicts.
fn is_told(cluster: &Cluster) -> Result<bool> {
    let map = MapData::from_pin(cluster.node.bpffs().join("verdicts_wanted"))?;
    let wanted: Array<_, u32> = Map::Array(map).try_into()?;
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
    node.enrol(server)?;
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
    node.enrol(server)?;
    node.enrol(&second)?;
    let observer = Observer::start(&cluster, &[&key(&second), "--for", "3s"])?;
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

/// Whoever observes is sent away when the agent ends, and does not keep it.
#[test]
fn agent_that_stops_sends_observers_away() -> Result<()> {
    let mut cluster = Cluster::start()?;
    let observer = Observer::start(&cluster, &[])?;
    cluster.node.stop_agent()?;
    let output = observer.child.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    Ok(())
}
