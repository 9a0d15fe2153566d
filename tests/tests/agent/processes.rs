//! Pods whose network namespaces have no name: they are found by their processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_agent::output::PodState;
use redirect_tests::netns::Family;
use redirect_tests::process::{Process, wait_for};
use redirect_tests::topology::Pod;

use crate::cluster::{Cluster, Manifest, SOON, echo};

const UID: &str = "6f0f3a52-98a8-4d5c-9b2e-7c1f0f7d2a11";

/// A process in a pod's network namespace, or in the node's, and in a cgroup as kubelet makes them.
struct Container {
    // Dropped first: a cgroup that has a process cannot be removed.
    process: Option<Process>,
    /// From the innermost to the outermost.
    cgroups: Vec<PathBuf>,
}

impl Container {
    fn start(netns: Option<&Pod>, uid: &str, log: &Path) -> Result<Self> {
        let root = hierarchy()?.join(format!("redirect-test-{}", process::id()));
        let pod = root.join("kubepods").join(format!("pod{uid}"));
        let name = log.file_stem().context("a log without a name")?;
        let container = pod.join(name);
        fs::create_dir_all(&container).context("make a cgroup")?;
        let mut cgroups: Vec<PathBuf> = vec![container.clone(), pod];
        cgroups.extend([root.join("kubepods"), root]);
        let mut started = Self { process: None, cgroups };
        let mut command = Command::new("sh");
        if let Some(pod) = netns {
            command = Command::new("nsenter");
            command.arg(format!("--net={}", pod.netns.path().display())).arg("sh");
        }
        command.arg("-c").arg(format!(
            "echo $$ > {}/cgroup.procs && echo inside && exec sleep infinity",
            container.display()
        ));
        let mut process = Process::spawn("a container", &mut command, log.to_owned())?;
        process.wait_for_log("inside", SOON)?;
        started.process = Some(process);
        Ok(started)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        drop(self.process.take());
        for cgroup in &self.cgroups {
            let deadline = Duration::from_secs(5);
            // Another container may need the outer ones; whatever is left shows.
            let _left = wait_for("a cgroup to be empty", deadline, || {
                let removed = fs::remove_dir(cgroup).is_ok() || !cgroup.exists();
                let needed = fs::read_dir(cgroup)
                    .is_ok_and(|entries| entries.flatten().any(|entry| entry.path().is_dir()));
                Ok((removed || needed).then_some(()))
            });
        }
    }
}

/// A cgroup hierarchy that processes may be put into: that of pids, which nothing is limited by, or
/// the one of v2.
fn hierarchy() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let mut found = mounts.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let &[_, at, kind, options, ..] = fields.as_slice() else { return None };
        let usable = kind == "cgroup2"
            || (kind == "cgroup" && options.split(',').any(|option| option == "pids"));
        usable.then(|| PathBuf::from(at))
    });
    found.next().context("no cgroup hierarchy is mounted")
}

#[test]
fn pod_is_found_by_its_processes_until_its_sandbox_is_gone() -> Result<()> {
    let mut cluster = Cluster::without_agent(&[])?;
    let logs = cluster.topology.dir().subdir("containers")?;
    cluster.node.hide_netns()?;
    cluster.node.write(&Manifest::of(&cluster.server).uid(UID).mode("ambient"))?;
    // One that is not in the pod's namespace must mislead nobody, such as a probe that runs on the node.
    let _stray = Container::start(None, UID, &logs.join("stray.log"))?;
    cluster.node.start_agent()?;
    cluster.node.start_proxy()?;
    cluster.node.wait_for_pod("to be awaited", &cluster.server, |p| {
        p.state == PodState::Failed && p.message.as_ref().is_some_and(|m| m.contains(UID))
    })?;

    let sandbox = Container::start(Some(&cluster.server), UID, &logs.join("sandbox.log"))?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    let _apps = (echo(&cluster.server)?, echo(&cluster.client)?);
    cluster.assert_redirected(Family::V4)?;
    cluster.assert_redirected(Family::V6)?;

    // The next agent finds it again.
    cluster.node.kill_agent()?;
    cluster.node.start_agent()?;
    cluster.node.wait_until_enrolled(&cluster.server)?;
    // It is the pod's as long as any of its processes is there.
    let second = Container::start(Some(&cluster.server), UID, &logs.join("second.log"))?;
    drop(sandbox);
    cluster.node.wait_until_enrolled(&cluster.server)?;
    cluster.assert_redirected(Family::V4)?;

    drop(second);
    cluster.node.wait_for_pod("to be missed", &cluster.server, |p| p.state == PodState::Failed)?;
    wait_for("peers to be told", SOON, || {
        Ok((!cluster.node.is_published(&cluster.server)).then_some(()))
    })
}
