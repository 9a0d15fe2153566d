//! `bundle`: what is in the archive, whether or not there is an agent that answers, and that nothing else
//! comes of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redirect_agent::output::PodState;
use redirect_tests::footprint::{assert_unchanged, footprint};
use redirect_tests::netns::Family;
use redirect_tests::process::{Process, binary, finish, wait_for};
use redirect_tests::topology::{Pod, Style, Topology};
use serde_json::{Value, json};
use tar::Archive;

use crate::cluster::{Cluster, Manifest, Node, SOON, echo};

/// How long it takes at most when an agent does not answer: the time for one answer, and what all the rest
/// takes on a busy machine.
const BOUND: Duration = Duration::from_secs(45);

/// An archive, unpacked: the files below its directory.
struct Unpacked {
    dir: String,
    files: BTreeMap<String, String>,
}

impl Unpacked {
    fn read(archive: &Path) -> Result<Self> {
        let file = File::open(archive).with_context(|| format!("open {}", archive.display()))?;
        Self::from(file)
    }

    fn from(archive: impl std::io::Read) -> Result<Self> {
        let (mut dir, mut files) = (String::new(), BTreeMap::new());
        for entry in Archive::new(GzDecoder::new(archive)).entries()? {
            let mut entry = entry?;
            let path = entry.path()?.to_str().context("a name that is not UTF-8")?.to_owned();
            let (top, name) = path.split_once('/').context("a file at the top")?;
            ensure!(dir.is_empty() || dir == top, "{dir} and {top}");
            let mut content = String::new();
            entry.read_to_string(&mut content)?;
            top.clone_into(&mut dir);
            ensure!(files.insert(name.to_owned(), content).is_none(), "{name} is there twice");
        }
        Ok(Self { dir, files })
    }

    fn text(&self, name: &str) -> Result<&str> {
        let found = self.files.get(name);
        let found = found.with_context(|| format!("no {name} in {:?}", self.files.keys()))?;
        Ok(found)
    }

    fn json(&self, name: &str) -> Result<Value> {
        serde_json::from_str(self.text(name)?).with_context(|| format!("read {name}"))
    }

    /// What is in the namespace of a pod.
    fn netns(&self, pod: &Pod) -> Result<Value> {
        self.json(&format!("netns/{}.json", pod.netns.inode()?))
    }
}

/// `bundle` for a node.
fn command(node: &Node, output: &Path) -> Result<Command> {
    let mut command = node.command("bundle")?;
    command
        .arg("--bpffs-dir")
        .arg(node.bpffs())
        .arg("--netns-dir")
        .arg(node.netns_dir())
        .arg("--state-dir")
        .arg(node.state_dir())
        .arg("--cni-conf-dir")
        .arg(node.cni_conf_dir())
        .arg("--cni-bin-dir")
        .arg(node.cni_bin_dir())
        .arg("-o")
        .arg(output);
    Ok(command)
}

fn listed(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    let names: std::io::Result<Vec<_>> =
        entries.map(|entry| Ok(entry?.path().display().to_string())).collect();
    let mut names = names?;
    names.sort();
    Ok(names)
}

/// An agent that does nothing until this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(node: &Node) -> Result<Self> {
        let pid = Pid::from_raw(i32::try_from(node.agent_pid()?)?);
        kill(pid, Signal::SIGSTOP).context("stop the agent")?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _gone = kill(self.0, Signal::SIGCONT);
    }
}

#[test]
fn bundle_has_everything_and_changes_nothing() -> Result<()> {
    let cluster = Cluster::enrolled(&["--verify-interval", "300ms"])?;
    let Cluster { node, server, topology, .. } = &cluster;
    let calm = topology.dir().subdir("bundles")?;
    let before = footprint(&server.netns)?;
    let _apps = (echo(server)?, echo(&cluster.client)?);
    cluster.assert_redirected(Family::V4)?;
    let path = calm.join("first.tar.gz");
    let (done, said) = finish(&mut command(node, &path)?)?;
    ensure!(done, "{said}");
    let first = Unpacked::read(&path)?;
    assert!(!first.files.contains_key("errors.txt"), "{:?}", first.files.get("errors.txt"));
    assert!(!first.files.keys().any(|name| name.starts_with("pods/")), "{:?}", first.files.keys());

    server.netns.output("ip", &["-4", "rule", "del", "table", "15001"])?;
    wait_for("the rule", SOON, || Ok((footprint(&server.netns)? == before).then_some(())))?;
    node.wait_until_enrolled(server)?;
    let pins = (listed(node.bpffs())?, listed(&node.links(server)?)?, listed(&node.state_dir())?);
    let path = calm.join("second.tar.gz");
    let (done, said) = finish(&mut command(node, &path)?)?;
    ensure!(done, "{said}");
    ensure!(said.contains("wrote ") && !said.contains("not collected"), "{said}");
    assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o7777, 0o600);
    let found = Unpacked::read(&path)?;
    ensure!(found.dir.starts_with("redirect-agent-node0-20"), "{}", found.dir);

    let manifest = found.json("manifest.json")?;
    assert_eq!(manifest["kind"], "Bundle");
    assert_eq!((&manifest["node"], &manifest["redacted"]), (&"node0".into(), &false.into()));
    for file in manifest["files"].as_array().context("no files")? {
        let content = found.text(file["name"].as_str().context("no name")?)?;
        assert_eq!(file["size"], content.len(), "{file}");
        assert_eq!(file["sha256"].as_str().map(str::len), Some(64), "{file}");
    }
    let explained = found.json("pods/shop/server/explain.json")?;
    assert_eq!(explained["verdict"]["cause"], "rule-deleted", "{explained}");
    ensure!(found.text("journal.json")?.contains("\"Repaired\""));
    ensure!(found.text("metrics.txt")?.contains("redirect_pods{state=\"enrolled\""));
    ensure!(found.text("status.txt")?.contains("1 pod: 1 enrolled"));
    ensure!(found.text("check.txt")?.contains("this node can run redirect-agent"));
    let agent = found.json("agent.json")?;
    assert_eq!(agent["pid"], node.agent_pid()?);
    ensure!(agent["commandLine"][1] == "run", "{agent}");
    ensure!(agent.get("commandLineCut").is_none(), "{agent}");
    let settings = &found.json("settings.json")?["settings"];
    let [interval, drain] = ["verify-interval", "drain"].map(|flag| &settings[flag]);
    assert_eq!(*interval, json!({ "value": ["300ms"], "from": "command-line" }));
    assert_eq!(*drain, json!({ "value": ["5s"], "from": "default" }));
    assert_kernel(&found, server)?;

    assert_unchanged(&server.netns, &before)?;
    let after = (listed(node.bpffs())?, listed(&node.links(server)?)?, listed(&node.state_dir())?);
    assert_eq!(after, pins);
    assert_eq!(listed(&calm)?.len(), 2);
    cluster.assert_redirected(Family::V6)
}

/// What the kernel has for an enrolled pod is there.
fn assert_kernel(found: &Unpacked, server: &Pod) -> Result<()> {
    let netns = found.netns(server)?;
    let rules = netns["rules"]["ipv4"].as_array().context("no rules")?;
    let capture =
        |rule: &&Value| rule.as_str().is_some_and(|r| r.ends_with("redirect-agent: capture"));
    assert_eq!(rules.iter().filter(capture).count(), 1, "{rules:?}");
    let lookup = |pin: &&Value| pin["pin"] == "lookup" && pin["target"] == netns["netns"];
    let pins = netns["pins"].as_array().context("no pins")?;
    assert_eq!(pins.iter().filter(lookup).count(), 1, "{pins:?}");
    assert_eq!(netns["sysctls"]["net/ipv4/tcp_fwmark_accept"], "1");
    let interfaces = netns["interfaces"].as_array().context("no interfaces")?;
    let guarded = |interface: &&Value| interface["egress"][0]["name"] == "redirect_out";
    assert_eq!(interfaces.iter().filter(guarded).count(), 1, "{interfaces:?}");
    let text = netns.to_string();
    ensure!(text.contains(&format!("eth0 {}", server.v4)), "{text}");
    ensure!(text.contains("table 15001  # redirect-agent"), "{text}");

    let rows = found.json("maps/pods.json")?;
    assert_eq!(rows["entries"][0]["ipv4"], server.v4.to_string(), "{rows}");
    assert_eq!(rows["entries"][0]["capture"], true, "{rows}");
    ensure!(found.text("maps/counters.json")?.contains("redirected_inbound"));
    assert_eq!(found.json("maps/listeners.json")?["entries"].as_array().map(Vec::len), Some(3));
    assert_eq!(found.json("maps.json")?["maps"].as_array().map(Vec::len), Some(28));
    ensure!(found.files.keys().filter(|name| name.starts_with("maps/")).count() == 28);
    Ok(())
}

#[test]
fn without_an_agent_the_rest_is_collected() -> Result<()> {
    let mut cluster = Cluster::enrolled(&[])?;
    cluster.node.kill_agent()?;
    let Cluster { node, server, topology, .. } = &cluster;
    server.netns.output("ip", &["-4", "rule", "del", "table", "15001"])?;
    let (before, state) = (footprint(&server.netns)?, listed(&node.state_dir())?);
    let dir = topology.dir().subdir("bundles")?;
    let path = dir.join("x.tar.gz");
    let (done, said) = finish(&mut command(node, &path)?)?;
    ensure!(!done && said.contains("status.txt: not collected"), "{said}");
    ensure!(said.contains("not collected, see errors.txt in it: agent.json"), "{said}");
    let found = Unpacked::read(&path)?;
    let errors = found.text("errors.txt")?;
    ensure!(errors.contains("agent.json: cannot reach the agent"), "{errors}");
    ensure!(!errors.contains("maps") && !errors.contains("netns/"), "{errors}");
    let missing = found.json("manifest.json")?["missing"].as_array().map(Vec::len);
    assert_eq!(missing, Some(errors.lines().count()));
    let netns = found.netns(server)?;
    assert_eq!(netns["pod"], Value::Null);
    let rules = netns["rules"].to_string();
    assert_eq!(rules.matches("redirect-agent: capture").count(), 1, "{rules}");
    found.json("maps/pods.json")?;
    found.json("check.json")?;
    assert_unchanged(&server.netns, &before)?;
    assert_eq!(listed(&node.state_dir())?, state);

    // Files that are too long, or have another's name, are named or counted, and not read.
    fs::write(node.state_dir().join("overrides.json"), " ".repeat(2 << 20))?;
    fs::write(node.state_dir().join("sandboxes/u-1.json"), " ".repeat(1 << 20))?;
    let long = dir.join("long.tar.gz");
    let (_, said) = finish(&mut command(node, &long)?)?;
    let found = Unpacked::read(&long)?;
    let errors = found.text("errors.txt")?;
    ensure!(errors.contains("overrides.json is longer than 1048576 bytes"), "{errors}, {said}");
    assert_eq!(found.json("sandboxes.json")?["leftOut"], 1);
    fs::remove_file(long)?;

    let (done, said) = finish(&mut command(node, &path)?)?;
    ensure!(!done && said.contains("exists; give another file"), "{said}");
    let (link, target) = (dir.join("link.tar.gz"), dir.join("precious"));
    fs::write(&target, "mine")?;
    symlink(&target, &link)?;
    let (done, said) = finish(&mut command(node, &link)?)?;
    ensure!(!done && said.contains("exists; give another file"), "{said}");
    let (_, said) = finish(command(node, &link)?.arg("--overwrite"))?;
    ensure!(said.contains("wrote "), "{said}");
    assert_eq!(fs::read_to_string(&target)?, "mine");
    Unpacked::read(&link)?;
    assert_eq!(listed(&dir)?.len(), 3);
    Ok(())
}

#[test]
fn agent_that_hangs_holds_it_up_only_once() -> Result<()> {
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, topology, .. } = &cluster;
    let dir = topology.dir().subdir("bundles")?;
    let path = dir.join("x.tar.gz");
    let stopped = Stopped::new(node)?;
    let began = Instant::now();
    let (done, said) = finish(&mut command(node, &path)?)?;
    let took = began.elapsed();
    ensure!(!done && took < BOUND, "{took:?}: {said}");
    let found = Unpacked::read(&path)?;
    let errors = found.text("errors.txt")?;
    ensure!(errors.contains("status.txt: the agent did not answer within 8s"), "{errors}");
    ensure!(errors.contains("metrics.txt: not asked"), "{errors}");
    let agent = found.json("agent.json")?;
    assert_eq!(agent["status"]["State"], "T (stopped)", "{agent}");
    assert_eq!(found.netns(server)?["pod"], Value::Null);
    found.json("maps/pods.json")?;

    // What its time does not suffice for is named, and the rest is there.
    let path = dir.join("short.tar.gz");
    let began = Instant::now();
    let (done, said) = finish(command(node, &path)?.args(["--timeout", "1s"]))?;
    let took = began.elapsed();
    ensure!(!done && took < Duration::from_secs(15), "{took:?}: {said}");
    ensure!(said.contains("wrote ") && said.contains("maps.json"), "{said}");
    let found = Unpacked::read(&path)?;
    found.json("agent.json")?;
    let errors = found.text("errors.txt")?;
    for part in ["status.json", "check.json", "maps.json", "netns/*.json", "takeover.json"] {
        let line = errors.lines().find(|line| line.starts_with(part));
        let line = line.with_context(|| format!("no {part} in {errors}"))?;
        ensure!(!found.files.contains_key(part), "{part}");
        ensure!(line.ends_with("has taken the 1s of --timeout"), "{line}");
    }
    let missing = found.json("manifest.json")?["missing"].as_array().map(Vec::len);
    assert_eq!(missing, Some(errors.lines().count()));

    // Interrupted by a signal that nothing can catch, too, it leaves nothing.
    let path = dir.join("interrupted.tar.gz");
    let log = topology.dir().path().join("bundle.log");
    let mut running = Process::spawn("bundle", &mut command(node, &path)?, log)?;
    running.wait_for_log("agent.json", SOON)?;
    running.kill()?;
    assert_eq!(listed(&dir)?.len(), 2);
    drop(stopped);
    node.wait_for_state(server, PodState::Enrolled).map(drop)
}

/// Names that are in nothing else.
fn strangers() -> Result<(Cluster, Pod, Pod)> {
    let mut topology = Topology::new(&[Style::Routed, Style::Bridged])?;
    let server = topology.add_pod(0, "zebramart", "quokka-7d9f")?;
    let client = topology.add_pod(1, "zebramart", "wombat-5c4b")?;
    let other = topology.add_pod(0, "yakbank", "ocelot")?;
    let number = topology.add_pod(0, "908172635", "536271809")?;
    let mut node = Node::new(&topology, 0, &[])?;
    node.write(&Manifest::of(&server))?;
    node.write(&Manifest::of(&client))?;
    node.write(&Manifest::of(&other))?;
    node.write(&Manifest::of(&number))?;
    node.start_agent()?;
    node.start_proxy()?;
    Ok((Cluster { node, server, client, topology }, other, number))
}

#[test]
fn redacted_bundle_has_no_address_and_no_name() -> Result<()> {
    let (mut cluster, other, number) = strangers()?;
    let Cluster { node, server, client, topology } = &cluster;
    node.enroll(server)?;
    node.enroll(&other)?;
    let _apps = (echo(server)?, echo(client)?);
    cluster.assert_redirected(Family::V4)?;
    cluster.assert_redirected(Family::V6)?;
    node.tell("unenroll", &["yakbank/ocelot", "--reason", "INC-4711 by numbat"])?;
    node.enroll(&number)?;
    node.tell("unenroll", &[&number.to_string(), "--reason", "7418529630"])?;
    server.netns.output("ip", &["-6", "rule", "del", "table", "15001"])?;
    wait_for("a repair", SOON, || {
        let said = node.tell("explain", &["zebramart/quokka-7d9f"])?;
        Ok(said.contains("Repaired").then_some(()))
    })?;
    let path = topology.dir().path().join("x.tar.gz");
    let (done, said) = finish(command(node, &path)?.arg("--redact"))?;
    ensure!(done, "{said}");
    let found = Unpacked::read(&path)?;
    let mut real = ["zebramart", "quokka", "wombat", "yakbank", "ocelot", "node0", "numbat"]
        .map(str::to_owned)
        .to_vec();
    real.push("7418529630".to_owned());
    for pod in [server, client, &other, &number] {
        real.push(pod.namespace.clone());
        real.extend([pod.v4.to_string(), pod.v6.to_string(), pod.name.clone()]);
    }
    assert_absent(&found, real.iter())?;
    assert_eq!(found.json("manifest.json")?["redacted"], true);

    assert_consistent(&found, server)?;

    cluster.node.kill_agent()?;
    let path = cluster.topology.dir().path().join("down.tar.gz");
    let (_, said) = finish(command(&cluster.node, &path)?.arg("--redact"))?;
    ensure!(said.contains("wrote "), "{said}");
    let found = Unpacked::read(&path)?;
    // Its files are in a directory of that name, which only the agent knows.
    assert_absent(&found, real.iter().filter(|name| *name != "node0"))
}

/// One thing has one alias in every file.
fn assert_consistent(found: &Unpacked, server: &Pod) -> Result<()> {
    let status = found.json("status.json")?;
    let netns = server.netns.inode()?;
    let pods = status["pods"].as_array().context("no pods")?;
    let pod = pods.iter().find(|pod| pod["netns"] == netns).context("no pod")?;
    let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
    let (namespace, name) = (text(&pod["namespace"])?, text(&pod["name"])?);
    ensure!(namespace.starts_with("ns-") && name.starts_with("pod-"), "{pod}");
    let explained = found.json(&format!("pods/{namespace}/{name}/explain.json"))?;
    assert_eq!(explained["pod"]["name"], format!("{namespace}/{name}"));
    let rows = found.json("maps/pods.json")?;
    let rows = rows["entries"].as_array().context("no rows")?;
    let row = rows.iter().find(|row| row["pod"] == netns).context("no row")?;
    let ips = pod["ips"].as_array().context("no addresses")?;
    ensure!(ips.contains(&row["ipv4"]) && ips.contains(&row["ipv6"]), "{row}, {pod}");
    Ok(())
}

fn assert_absent<'a>(found: &Unpacked, real: impl Iterator<Item = &'a String>) -> Result<()> {
    for name in real {
        ensure!(!found.dir.contains(name), "{name} is in {}", found.dir);
        for (file, content) in &found.files {
            ensure!(!file.contains(name), "{name} is in the name {file}");
            let line = content.lines().find(|line| line.contains(name));
            ensure!(line.is_none(), "{name} is in {file}: {line:?}");
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_written_is_said_before_anything_is_collected() -> Result<()> {
    let cluster = Cluster::without_agent(&[])?;
    let Cluster { node, topology, .. } = &cluster;
    for path in ["/proc/x.tar.gz", "/nonexistent/x.tar.gz"] {
        let (done, said) = finish(&mut command(node, Path::new(path))?)?;
        ensure!(!done && said.contains("give a file elsewhere with -o"), "{said}");
        ensure!(!said.contains("not collected"), "{said}");
    }
    // The program may lie where nobody can read it.
    let dir = topology.dir().subdir("for-nobody")?;
    let copy = dir.join("redirect-agent");
    fs::copy(binary("redirect-agent")?, &copy).context("copy the program")?;
    for path in [topology.dir().path(), &dir] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("set a mode")?;
    }
    let mut command = Command::new(copy);
    let (done, said) = finish(command.arg("bundle").current_dir("/").uid(65534).gid(65534))?;
    ensure!(!done && said.contains("run the command as root"), "{said}");
    Ok(())
}

/// As in `kubectl exec POD -- redirect-agent bundle -o - > FILE`.
#[test]
fn archive_goes_to_standard_output_or_to_the_working_directory() -> Result<()> {
    let cluster = Cluster::start()?;
    let Cluster { node, topology, .. } = &cluster;
    let output = command(node, Path::new("-"))?.stderr(Stdio::null()).output()?;
    ensure!(output.status.success(), "{}", output.status);
    let found = Unpacked::from(&*output.stdout)?;
    found.json("status.json")?;

    let dir = topology.dir().subdir("working")?;
    let all = command(node, &dir)?;
    // All but -o.
    let arguments: Vec<_> = all.get_args().collect();
    let mut command = Command::new(binary("redirect-agent")?);
    command.args(&arguments[..arguments.len() - 2]).current_dir(&dir);
    let (done, said) = finish(&mut command)?;
    ensure!(done, "{said}");
    let [path] = &*listed(&dir)? else { return Err(anyhow::anyhow!("{:?}", listed(&dir)?)) };
    let path = PathBuf::from(path);
    let name = path.file_name().and_then(|name| name.to_str()).context("no name")?;
    let dir = Unpacked::read(&path)?.dir;
    assert_eq!(name, format!("{dir}.tar.gz"));
    ensure!(said.contains(&format!("wrote {name}: ")), "{said}");
    Ok(())
}

/// The kernel lists nf_tables in a time that grows with the square of their number.
#[test]
fn pod_with_tens_of_thousands_of_rules_does_not_hold_it_up() -> Result<()> {
    const RULES: usize = 200_000;
    let cluster = Cluster::enrolled(&[])?;
    let Cluster { node, server, topology, .. } = &cluster;
    let file = topology.dir().path().join("rules.nft");
    let head = "add table inet many\nadd chain inet many rules\n".to_owned();
    fs::write(&file, head + &"add rule inet many rules accept\n".repeat(RULES))?;
    server.netns.output("nft", &["-f", file.to_str().context("a path that is not UTF-8")?])?;
    let path = topology.dir().path().join("x.tar.gz");
    let began = Instant::now();
    let (done, said) = finish(&mut command(node, &path)?)?;
    let took = began.elapsed();
    ensure!(!done && took < Duration::from_secs(15), "{took:?}: {said}");
    let found = Unpacked::read(&path)?;
    let errors = found.text("errors.txt")?;
    ensure!(errors.contains("list the rules of nf_tables: there are more than"), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    Ok(())
}
