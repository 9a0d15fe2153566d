//! One process at a time owns the pins: whoever comes second is told by whom, at once.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redirect_tests::both_families;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::{finish, succeed, wait_for};

use crate::cluster::{Cluster, Node, SOON, echo};

both_families! {
    commands_beside_an_agent_fail_at_once_and_name_it,
    commands_beside_an_agent_that_hangs_fail_too_unless_forced,
    pod_of_another_agent_is_left_alone,
}

/// By when a command has failed, on a busy machine; alone it takes less than one second.
const AT_ONCE: Duration = Duration::from_secs(5);

const SOCKETS: [&str; 3] = ["control.sock", "zds.sock", "cni.sock"];

/// `run`, with sockets and state of its own.
fn run_with_sockets_in(node: &Node, dir: &Path) -> Result<Command> {
    let mut run = node.command_without_agent("run")?;
    for (flag, name) in [
        ("--control-socket", SOCKETS[0]),
        ("--zds-socket", SOCKETS[1]),
        ("--cni-socket", SOCKETS[2]),
        ("--state-dir", "state"),
    ] {
        run.arg(flag).arg(dir.join(name));
    }
    Ok(run)
}

/// What `run` on the same directory, but with sockets of its own, `attach`, `detach` and `cleanup` say.
fn refusals(cluster: &Cluster) -> Result<Vec<(bool, String)>> {
    let Cluster { node, server, topology, .. } = cluster;
    let dir = topology.dir().subdir("second")?;
    // Stale, but not for others to remove.
    for name in SOCKETS {
        let _stale = UnixListener::bind(dir.join(name));
    }
    let mut run = run_with_sockets_in(node, &dir)?;
    run.arg(format!("--source=dir:{}", node.manifests().display()));
    run.args(["--health-address", "off", "--bpffs-dir"]).arg(node.bpffs());
    let on_netns = |verb| -> Result<Command> {
        let mut command = node.command_without_agent(verb)?;
        command.arg("--bpffs-dir").arg(node.bpffs()).arg("--netns").arg(server.netns_path());
        Ok(command)
    };
    let refusals = [run, on_netns("attach")?, on_netns("detach")?, node.cleanup_command()?]
        .iter_mut()
        .map(|command| {
            let began = Instant::now();
            let said = finish(command)?;
            ensure!(began.elapsed() < AT_ONCE, "{command:?} took {:?}", began.elapsed());
            Ok(said)
        })
        .collect();
    for name in SOCKETS {
        ensure!(dir.join(name).exists(), "{name} is gone");
    }
    refusals
}

fn commands_beside_an_agent_fail_at_once_and_name_it(family: Family) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let by = format!("is in use by process {} (", cluster.node.agent_pid()?);
    for (done, said) in refusals(&cluster)? {
        ensure!(!done && said.contains(&by) && said.contains(", since 2"), "{said}");
    }
    cluster.assert_redirected(family)
}

/// The other agent's pins are in another directory, so neither owns the other's.
fn pod_of_another_agent_is_left_alone(family: Family) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, client, .. } = &cluster;
    let _apps = (echo(server)?, echo(client)?);
    let enrolled = footprint(&server.netns)?;
    let second = node.bpffs().with_file_name("second");
    let mut attach = node.command_without_agent("attach")?;
    attach.arg("--bpffs-dir").arg(&second).arg("--netns").arg(server.netns_path());
    attach.args(["--address", &server.v4.to_string(), "--address", &server.v6.to_string()]);
    let (done, said) = finish(&mut attach)?;
    let advice = format!("cleanup --bpffs-dir {}", node.bpffs().display());
    ensure!(!done && said.contains("another redirect-agent") && said.contains(&advice), "{said}");
    assert_unchanged(&server.netns, &enrolled)?;

    // Whoever has the pins of such a directory puts back only what is theirs.
    let (done, said) = finish(&mut node.cleanup_command_for(&second)?)?;
    ensure!(done && said.contains("another redirect-agent"), "{said}");
    assert_unchanged(&server.netns, &enrolled)?;
    node.wait_until_enrolled(server)?;
    node.assert_inbound(client, server, family)?;
    node.assert_outbound(server, client, family)
}

fn commands_beside_an_agent_that_hangs_fail_too_unless_forced(family: Family) -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    let agent = cluster.node.agent_pid()?;
    let pid = Pid::from_raw(agent.try_into().context("a pid")?);
    kill(pid, Signal::SIGSTOP)?;
    let refusals = refusals(&cluster);
    kill(pid, Signal::SIGCONT)?;
    for (done, said) in refusals? {
        ensure!(!done && said.contains(&format!("process {agent} (")), "{said}");
    }
    cluster.assert_redirected(family)?;

    kill(pid, Signal::SIGSTOP)?;
    let mut command = cluster.node.command_without_agent("detach")?;
    command.arg("--force").arg("--bpffs-dir").arg(cluster.node.bpffs());
    let forced = finish(command.arg("--netns").arg(cluster.server.netns_path()));
    let direct = cluster.assert_direct(family);
    kill(pid, Signal::SIGCONT)?;
    let (done, said) = forced?;
    ensure!(done, "{said}");
    direct?;
    // The agent puts it right again.
    wait_for("the pod to be captured again", SOON, || {
        Ok(cluster.assert_redirected(family).is_ok().then_some(()))
    })
}

/// An agent of another build, whose maps are laid out otherwise, has left them.
#[test]
fn pinned_map_of_another_layout_is_named() -> Result<()> {
    let cluster = Cluster::without_agent(&[])?;
    let Cluster { node, server, .. } = &cluster;
    fs::create_dir_all(node.bpffs()).context("make the directory")?;
    let pin = node.bpffs().join("pods");
    let mut create = Command::new("bpftool");
    create.args(["map", "create"]).arg(&pin);
    succeed(
        create.args(["type", "hash", "key", "4", "value", "48", "entries", "2048", "name", "x"]),
    )?;
    let mut attach = node.command_without_agent("attach")?;
    attach.arg("--bpffs-dir").arg(node.bpffs()).arg("--netns").arg(server.netns_path());
    let (done, said) = finish(&mut attach)?;
    ensure!(!done && said.lines().count() < 5, "{said}");
    for part in [&*pin.to_string_lossy(), "another layout", "48", "cleanup", "--bpffs-dir"] {
        ensure!(said.contains(part), "no {part}: {said}");
    }
    // What was there is left alone.
    ensure!(pin.exists());
    Ok(())
}

/// Nor does it take away what another one has left for pods of the mesh.
#[test]
fn agent_that_cannot_start_leaves_nothing_behind() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let run = |cluster: &Cluster| -> Result<()> {
        let node = &cluster.node;
        let dir = cluster.topology.dir().subdir("fails")?;
        let mut run = run_with_sockets_in(node, &dir)?;
        run.args(["--source=dir:/nowhere", "--health-address=off", "--bpffs-dir"]);
        let (done, said) = finish(run.arg(node.bpffs()))?;
        ensure!(!done && said.contains("read the manifests in /nowhere"), "{said}");
        Ok(())
    };
    run(&cluster)?;
    ensure!(!cluster.node.bpffs().exists(), "maps are left");

    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    cluster.node.enroll(&cluster.server)?;
    cluster.node.kill_agent()?;
    run(&cluster)?;
    let _app = echo(&cluster.server)?;
    for family in [Family::V4, Family::V6] {
        cluster.node.assert_inbound(&cluster.client, &cluster.server, family)?;
    }
    Ok(())
}
