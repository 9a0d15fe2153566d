//! `redirect-agent cluster`, and the same as kubectl's plugin: what the API server shows of every node.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::cluster::{Report, State, Why};
use redirect_tests::apiserver::{ApiServer, Kind, PORT};
use redirect_tests::process::{Process, binary, wait_for};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api_server::Managed;
use crate::cluster::{Cluster, Manifest, SOON};
use crate::health::{free_address, get};

const REDIRECTION: &str = "ambient.istio.io/redirection";

/// An API server with three nodes, an agent on each, and five pods of the mesh.
struct Fleet {
    api: ApiServer,
    dir: TempDir,
}

impl Fleet {
    fn start() -> Result<Self> {
        let fleet = Self { api: ApiServer::start()?, dir: tempfile::tempdir()? };
        fleet.api.write_kubeconfig(&fleet.kubeconfig())?;
        let labels = json!({"istio.io/dataplane-mode": "ambient"});
        let shop = json!({"metadata": {"name": "shop", "labels": labels}});
        fleet.api.put(Kind::Namespace, shop);
        fleet.api.put(Kind::Namespace, json!({"metadata": {"name": "istio-system"}}));
        for number in 1..=3 {
            fleet.add_node(&format!("n{number}"), "linux");
            fleet.add_agent(number, "0.1.0");
        }
        for number in 1..=5 {
            fleet.add_pod(&format!("web-{number}"), "n1", Some("enabled"));
        }
        Ok(fleet)
    }

    fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    fn add_node(&self, name: &str, os: &str) {
        let labels = json!({"kubernetes.io/os": os});
        self.api.put(Kind::Node, json!({"metadata": {"name": name, "labels": labels}}));
    }

    fn add_agent(&self, number: usize, version: &str) {
        let name = format!("redirect-agent-{number}");
        self.api.put(Kind::Pod, agent(&name, &format!("n{number}"), version));
    }

    fn add_pod(&self, name: &str, node: &str, redirection: Option<&str>) {
        let annotations = redirection.map(|value| json!({REDIRECTION: value}));
        self.api.put(
            Kind::Pod,
            json!({
                "metadata": {"namespace": "shop", "name": name, "annotations": annotations},
                "spec": {"nodeName": node, "containers": [{"name": "app"}]},
                "status": {"phase": "Running", "startTime": "2026-01-01T00:00:00Z",
                           "podIPs": [{"ip": "10.0.0.2"}, {"ip": "fd00::2"}]},
            }),
        );
    }

    fn ready(&self, number: usize, ready: bool) {
        let name = format!("redirect-agent-{number}");
        self.api.edit(Kind::Pod, "istio-system", &name, |pod| {
            pod["status"]["conditions"][0]["status"] =
                (if ready { "True" } else { "False" }).into();
        });
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(binary("redirect-agent")?);
        command.arg("cluster").arg("--kubeconfig").arg(self.kubeconfig()).env_remove("RUST_LOG");
        Ok(command)
    }

    /// The exit status, what was printed, and what was complained of.
    fn run(&self, args: &[&str]) -> Result<(i32, String, String)> {
        said(&self.command()?.args(args).output()?)
    }

    /// The same, as JSON.
    fn report(&self, args: &[&str]) -> Result<(i32, Report)> {
        let (code, text, error) = self.run(&[args, &["-o", "json"]].concat())?;
        let report = serde_json::from_str(&text).with_context(|| format!("read {text} {error}"))?;
        Ok((code, report))
    }
}

fn said(output: &Output) -> Result<(i32, String, String)> {
    let code = output.status.code().context("it was killed")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((code, text(&output.stdout), text(&output.stderr)))
}

/// The agent's pod, as the chart makes it.
fn agent(name: &str, node: &str, version: &str) -> Value {
    json!({
        "metadata": {"namespace": "istio-system", "name": name,
                     "labels": {"app": "redirect-agent", "istio.io/dataplane-mode": "none"}},
        "spec": {"nodeName": node, "hostNetwork": true, "containers": [{
            "name": "redirect-agent", "image": format!("registry:5000/redirect-agent:{version}"),
            "args": ["run", "--install-cni"],
            "envFrom": [{"configMapRef": {"name": "redirect-agent"}}],
        }]},
        "status": {"phase": "Running", "startTime": "2026-01-01T00:00:00Z", "podIP": "127.0.0.1",
                   "conditions": [{"type": "Ready", "status": "True",
                                   "lastTransitionTime": "2026-01-01T00:01:00Z"}]},
    })
}

#[test]
fn exit_status_tells_whether_everything_is_in_also_of_lists_with_many_pages() -> Result<()> {
    let fleet = Fleet::start()?;
    let (code, text, error) = fleet.run(&["--chunk-size", "2"])?;
    ensure!((code, error.as_str()) == (0, ""), "{code} {text} {error}");
    let last = "8 pods: 5 enrolled, 3 bypassing; 3 nodes, 3 with a ready agent";
    assert_eq!(text.lines().last(), Some(last), "{text}");
    let lists = fleet.api.requests_of("list", "pods");
    let pages = lists.iter().filter(|list| list.query.contains("fieldSelector=status.phase"));
    assert_eq!(pages.clone().filter(|list| list.query.contains("continue=")).count(), 3);
    assert!(pages.clone().all(|list| list.query.contains("limit=2")), "{lists:?}");
    assert!(fleet.api.requests_of("list", "events").is_empty(), "nothing is wrong");

    fleet.add_pod("missing", "n2", None);
    let (code, report) = fleet.report(&["--chunk-size", "2"])?;
    assert_eq!((code, report.ok, report.unexpected.len()), (1, false, 1));
    assert_eq!(
        (report.unexpected[0].state, report.unexpected[0].why),
        (State::Missing, Why::Unknown)
    );
    let next = "kubectl --namespace istio-system exec redirect-agent-2 -- redirect-agent explain \
                shop/missing";
    assert_eq!(report.unexpected[0].next.as_deref(), Some(next));
    assert_eq!(fleet.run(&["-n", "istio-system"])?.0, 0, "another namespace");
    assert_eq!(fleet.run(&["-n", "shop"])?.0, 1);
    Ok(())
}

#[test]
fn list_that_expires_in_the_middle_begins_anew() -> Result<()> {
    let fleet = Fleet::start()?;
    fleet.api.slow_down(Duration::from_millis(200));
    let (code, text, error) = thread::scope(|scope| {
        let viewed = scope.spawn(|| fleet.run(&["--chunk-size", "1"]));
        wait_for("the second page", SOON, || {
            let lists = fleet.api.requests_of("list", "pods");
            Ok(lists
                .iter()
                .any(|l| l.query.contains("fieldS") && l.query.contains("continue="))
                .then_some(()))
        })?;
        fleet.api.delete(Kind::Pod, "shop", "web-1");
        fleet.api.forget(false);
        viewed.join().map_err(|_| anyhow::anyhow!("the thread has panicked"))?
    })?;
    assert_eq!((code, error.as_str()), (0, ""), "{text}");
    assert!(text.contains("7 pods: 4 enrolled, 3 bypassing;"), "{text}");
    assert!(fleet.api.requests_of("list", "pods").iter().any(|list| list.code == 410));
    Ok(())
}

#[test]
fn server_that_is_busy_is_asked_again_but_not_for_ever() -> Result<()> {
    let fleet = Fleet::start()?;
    fleet.api.be_busy(2);
    let (code, text, error) = fleet.run(&[])?;
    assert_eq!((code, error.as_str()), (0, ""), "{text}");
    assert_eq!(fleet.api.requests().iter().filter(|request| request.code == 429).count(), 2);
    fleet.api.be_busy(u64::MAX);
    let (code, _, error) = fleet.run(&[])?;
    assert!(code == 2 && error.contains("429"), "{code} {error}");
    Ok(())
}

#[test]
fn what_cannot_be_read_is_an_error_or_a_note() -> Result<()> {
    let mut fleet = Fleet::start()?;
    fleet.add_pod("missing", "n2", None);
    for resource in ["nodes", "events"] {
        fleet.api.forbid("list", resource);
    }
    fleet.api.forbid("get", "configmaps");
    let (code, report) = fleet.report(&[])?;
    assert_eq!((code, report.notes.len()), (1, 3), "{:?}", report.notes);
    for (note, part) in report.notes.iter().zip(["give --excluded-namespaces", "nodes", "Events"]) {
        assert!(note.contains("forbids it") && note.contains(part), "{note}");
    }
    for (resource, hint) in [("pods", "list on pods"), ("namespaces", "list on namespaces")] {
        fleet.api.allow_all();
        fleet.api.forbid("list", resource);
        let (code, text, error) = fleet.run(&[])?;
        assert_eq!((code, text.as_str()), (2, ""));
        assert!(error.contains("forbids it") && error.contains(hint), "{error}");
    }
    // The last one is refused, but not needed for one namespace.
    assert_eq!(fleet.run(&["-n", "istio-system"])?.0, 0);
    assert_eq!(fleet.run(&["-n", "shop"])?.0, 1);
    fleet.api.allow_all();
    let (code, _, error) = fleet.run(&["-n", "nosuch"])?;
    assert_eq!((code, error.as_str()), (2, "error: there is no namespace nosuch\n"));
    let (code, _, error) = fleet.run(&["--context", "nosuch"])?;
    assert!(code == 2 && error.contains("nosuch"), "{code} {error}");
    assert_eq!(fleet.run(&["--context", "test", "-n", "istio-system"])?.0, 0);
    assert_eq!(fleet.run(&["--chunk-size", "0"])?.0, 2);
    fleet.api.go_away()?;
    let (code, _, error) = fleet.run(&[])?;
    assert!(code == 2 && error.contains(&fleet.api.url()), "{code} {error}");
    assert!(error.contains("connection refused"), "{error}");
    fleet.api.come_back()?;
    fleet.api.forget_tokens();
    let (code, _, error) = fleet.run(&[])?;
    assert!(code == 2 && error.contains("give --kubeconfig or --context"), "{code} {error}");
    Ok(())
}

#[test]
fn settings_are_those_of_the_agents_unless_they_are_given() -> Result<()> {
    let fleet = Fleet::start()?;
    fleet.add_pod("missing", "n2", None);
    let metadata = json!({"namespace": "istio-system", "name": "redirect-agent"});
    let data = json!({"EXCLUDE_NAMESPACES": "kube-system,shop"});
    fleet.api.put(Kind::ConfigMap, json!({"metadata": metadata, "data": data}));
    let (_, report) = fleet.report(&[])?;
    assert_eq!(report.settings.excluded_namespaces, ["kube-system", "shop"]);
    // They would be excluded, and have the annotation.
    let pods = |states: [State; 3]| states.map(|state| report.pods[state]);
    assert_eq!(pods([State::Stale, State::Missing, State::Bypassing]), [5, 0, 4]);
    let (_, report) = fleet.report(&["--excluded-namespaces", "kube-system"])?;
    let pods = |states: [State; 3]| states.map(|state| report.pods[state]);
    assert_eq!(pods([State::Stale, State::Missing, State::Enrolled]), [0, 1, 5]);
    let nobody = ["--excluded-namespaces", "x", "--enablement-selectors", "[]"];
    let (_, report) = fleet.report(&nobody)?;
    assert_eq!((report.pods[State::Stale], report.settings.from.as_str()), (5, "the command line"));
    assert!(report.settings.enablement_selectors);
    Ok(())
}

#[test]
fn nodes_without_a_ready_agent_and_versions_are_shown() -> Result<()> {
    let fleet = Fleet::start()?;
    fleet.add_node("n4", "linux");
    fleet.add_node("windows", "windows");
    let (code, report) = fleet.report(&[])?;
    let names: Vec<&str> = report.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!((code, names), (0, vec!["n1", "n2", "n3", "n4"]), "n4 needs no agent yet");
    fleet.add_pod("orphan", "n4", None);
    fleet.add_agent(3, "0.2.0");
    fleet.ready(2, false);
    let (code, text, _) = fleet.run(&[])?;
    assert_eq!(code, 1);
    let has = |line: &[&str]| {
        text.lines().any(|l| {
            l.split("   ").map(str::trim).filter(|c| !c.is_empty()).eq(line.iter().copied())
        })
    };
    assert!(has(&["0.1.0", "2", "1", "5", "0", "0", "0", "0", "0", "2"]), "{text}");
    assert!(has(&["0.2.0", "1", "1", "0", "0", "0", "0", "0", "0", "1"]), "{text}");
    assert!(has(&["no agent", "1", "0", "0", "0", "1", "0", "0", "0", "0"]), "{text}");
    assert!(has(&["n4", "-", "-", "-", "no agent on the node"]), "{text}");
    let since = "2026-01-01T00:01:00Z";
    let agent = "istio-system/redirect-agent-2";
    assert!(has(&["n2", agent, "0.1.0", since, "its agent is not ready"]), "{text}");
    assert!(text.contains("2 with a ready agent, 2 versions of the agent"), "{text}");
    Ok(())
}

/// Whoever may create pods can give them the agents' label.
#[test]
fn pod_that_poses_as_an_agent_hides_nothing() -> Result<()> {
    let fleet = Fleet::start()?;
    fleet.add_pod("missing", "n2", None);
    fleet.ready(2, false);
    let mut impostor = agent("impostor", "n2", "0.1.0");
    impostor["metadata"]["namespace"] = "shop".into();
    impostor["metadata"]["creationTimestamp"] = "2026-09-01T00:00:00Z".into();
    impostor["spec"]["containers"][0]["args"] = json!(["run", "--excluded-namespaces", "shop"]);
    fleet.api.put(Kind::Pod, impostor);
    let (code, report) = fleet.report(&[])?;
    let missing = report.unexpected.iter().any(|pod| pod.name == "missing");
    ensure!(code == 1 && missing, "{code} {report:#?}");
    let said = report.notes.iter().any(|note| note.contains("give --agent-namespace"));
    ensure!(said, "{:?}", report.notes);
    let (code, report) = fleet.report(&["--agent-namespace", "istio-system"])?;
    let problem = report.nodes.iter().find(|node| node.name == "n2").and_then(|node| node.problem);
    ensure!(code == 1 && problem.is_some(), "{report:#?}");
    Ok(())
}

#[test]
fn agent_that_waits_is_asked_why_through_the_api_server() -> Result<()> {
    let fleet = Fleet::start()?;
    let mut cluster = Cluster::without_agent(&[])?;
    let mut dead = ApiServer::start()?;
    let kubeconfig = cluster.topology.dir().path().join("dead");
    dead.write_kubeconfig(&kubeconfig)?;
    dead.go_away()?;
    cluster.node.use_api_server(kubeconfig);
    let address = free_address()?;
    cluster.node.serve_health(address);
    let mut waiting = cluster.node.spawn_agent()?;
    wait_for("the agent to say that it waits", SOON, || {
        ensure!(waiting.is_running()?, "the agent has ended:\n{}", waiting.log()?);
        Ok(get(address, "/readyz").is_ok_and(|(code, _)| code == 503).then_some(()))
    })?;
    fleet.api.edit(Kind::Pod, "istio-system", "redirect-agent-1", |pod| {
        pod["status"]["podIP"] = format!("[{}]", address.ip()).into();
        pod["metadata"]["annotations"] = json!({PORT: address.port().to_string()});
    });
    fleet.ready(1, false);
    let message = |args: &[&str]| -> Result<Option<String>> {
        let (code, report) = fleet.report(args)?;
        assert_eq!(code, 1);
        Ok(report.nodes[0].message.clone())
    };
    assert_eq!(message(&[])?, None, "it is not asked unless that is wanted");
    let said = message(&["--readyz"])?.context("nothing is said")?;
    assert!(said.starts_with("/readyz says 503: ") && said.contains("waiting for kube:"), "{said}");
    fleet.api.forbid("get", "pods/proxy");
    let said = message(&["--readyz"])?.context("nothing is said")?;
    assert!(said.contains("403") && said.contains("pods/proxy"), "{said}");
    fleet.api.allow_all();
    ensure!(waiting.terminate(SOON)?.success(), "it cannot be stopped");
    let said = message(&["--readyz"])?.context("nothing is said")?;
    assert!(said.contains("error trying to reach service"), "{said}");
    Ok(())
}

#[test]
fn what_a_real_agent_writes_is_understood() -> Result<()> {
    let managed = &Managed::start()?;
    let Cluster { server, client, topology, .. } = &managed.cluster;
    for node in ["node0", "node1"] {
        managed.api.put(Kind::Node, json!({"metadata": {"name": node}}));
    }
    managed.api.put(Kind::Pod, agent("redirect-agent-0", "node0", "0.1.0"));
    let view = || -> Result<(i32, Report)> {
        let mut command = Command::new(binary("redirect-agent")?);
        let kubeconfig = topology.dir().path().join("kubeconfig");
        command.args(["cluster", "-o", "json"]).arg("--kubeconfig").arg(kubeconfig);
        let (code, text, error) = said(&command.output()?)?;
        Ok((code, serde_json::from_str(&text).with_context(|| format!("read {text} {error}"))?))
    };
    managed.api.forbid("patch", "pods/status");
    managed.put(&Manifest::of(server).mode("ambient"));
    managed.put(&Manifest::of(client).mode("ambient"));
    managed.wait_for_event(server, "EnrollmentFailed")?;
    let (code, report) = view()?;
    let why: Vec<_> = report.unexpected.iter().map(|pod| (pod.name.as_str(), pod.why)).collect();
    assert_eq!((code, why), (1, vec![("client", Why::NoAgent), ("server", Why::Event)]));
    let message = &report.unexpected[1].message;
    assert!(message.starts_with("EnrollmentFailed at 20"), "{message}");
    assert!(message.contains("patch on pods/status"), "{message}");

    managed.api.allow_all();
    managed.wait_for_redirection(server, Some("enabled"))?;
    managed.put(&Manifest::of(client));
    let (code, report) = view()?;
    assert_eq!((code, report.pods[State::Enrolled], report.pods[State::Bypassing]), (0, 1, 2));

    // An operator's override is an Event, and no fault of the agent's.
    managed.cluster.node.tell("unenroll", &[&server.to_string(), "--reason", "INC-42"])?;
    managed.wait_for_redirection(server, None)?;
    managed.wait_for_event(server, "Unenrolled")?;
    let (code, report) = view()?;
    assert_eq!((code, report.unexpected.len(), report.unexpected[0].why), (1, 1, Why::Event));
    // Both Events are of that second or the next.
    let message = &report.unexpected[0].message;
    let told = ["uid 0 (redirect-agent", "an operator took it out of the mesh"];
    assert!(told.iter().any(|told| message.contains(told)), "{message}");
    Ok(())
}

#[test]
fn watching_prints_what_becomes_wrong_and_what_no_longer_is() -> Result<()> {
    let mut fleet = Fleet::start()?;
    let mut command = fleet.command()?;
    command.arg("--watch");
    let log = fleet.dir.path().join("watch.log");
    let mut watching = Process::spawn("cluster --watch", &mut command, log)?;
    watching.wait_for_log("3 with a ready agent\n", SOON)?;
    fleet.api.edit(Kind::Pod, "shop", "web-1", |pod| pod["metadata"]["annotations"] = Value::Null);
    watching.wait_for_log("pod shop/web-1   missing   no Event", SOON)?;
    fleet.ready(2, false);
    watching.wait_for_log("node n2   its agent is not ready", SOON)?;
    fleet.api.delete(Kind::Pod, "shop", "web-1");
    watching.wait_for_log("pod shop/web-1   resolved", SOON)?;
    fleet.api.go_away()?;
    watching.wait_for_log("connection refused; retrying", SOON)?;
    fleet.api.come_back()?;
    fleet.ready(2, true);
    watching.wait_for_log("node n2   resolved", SOON)?;
    let labels = json!({"istio.io/dataplane-mode": "none"});
    fleet.api.put(Kind::Namespace, json!({"metadata": {"name": "shop", "labels": labels}}));
    watching.wait_for_log("pod shop/web-2   stale", SOON)?;
    let log = watching.log()?;
    assert_eq!(log.matches("cannot reach").count(), 1, "{log}");
    assert_eq!(log.matches("\n20").count(), 8, "a line for each change: {log}");
    Ok(())
}

/// As its users call it.
#[test]
fn kubectl_has_it_as_a_plugin() -> Result<()> {
    let fleet = Fleet::start()?;
    symlink(binary("redirect-agent")?, fleet.dir.path().join("kubectl-redirect"))?;
    let path = env::var("PATH").unwrap_or_default();
    let kubectl = |args: &[&str]| -> Result<(i32, String, String)> {
        let mut command = Command::new("kubectl");
        command
            .env("PATH", format!("{}:{path}", fleet.dir.path().display()))
            .env("KUBECONFIG", fleet.kubeconfig())
            .env_remove("RUST_LOG");
        let output = command.arg("redirect").args(args).output();
        said(&output.context("run kubectl; `cargo xtask setup` installs it")?)
    };
    let direct = fleet.run(&["-n", "shop"])?;
    assert_eq!(kubectl(&["-n", "shop"])?, direct);
    assert_eq!(direct.0, 0);
    fleet.add_pod("missing", "n2", None);
    let (code, text, _) = kubectl(&["-n", "shop", "-o", "json"])?;
    let report: Report = serde_json::from_str(&text).context("read it")?;
    assert_eq!((code, report.unexpected[0].name.as_str()), (1, "missing"));
    let (code, text, _) = kubectl(&["--help"])?;
    assert_eq!(code, 0);
    assert!(text.contains("Usage: kubectl redirect [OPTIONS]"), "{text}");
    assert!(text.contains("\n  kubectl redirect -n shop --watch\n"), "{text}");
    assert!(!text.contains("  redirect-agent cluster"), "{text}");
    assert_eq!(kubectl(&["--version"])?.0, 0);
    let (code, _, error) = kubectl(&["--nosuch"])?;
    assert!(code == 2 && error.contains("--nosuch"), "{code} {error}");
    fs::write(fleet.kubeconfig(), "a: [")?;
    assert_eq!(kubectl(&[])?.0, 2);
    Ok(())
}
