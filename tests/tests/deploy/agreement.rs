//! The manifests say what Kubernetes understands and what the agent is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{CommandFactory as _, Parser as _};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, ResourceQuota, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use redirect_agent::cli::{Cli, Command as AgentCommand, RunArgs};
use redirect_agent::health;
use redirect_tests::manifests::{NAMESPACE, Objects, dir};
use redirect_tests::process::succeed;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Values that make the chart render all that it can.
pub const EVERYTHING: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/deploy/everything.yaml");

#[test]
fn committed_manifests_are_what_the_chart_renders() -> Result<()> {
    let (committed, rendered) = (Objects::committed()?, Objects::of_chart(&[])?);
    ensure!(committed == rendered, "they are out of date: run `cargo xtask manifests`");
    let committed = Objects::in_file("monitoring/alerts.yaml")?;
    let url =
        committed.0[0]["spec"]["groups"][0]["rules"][0]["annotations"]["runbook_url"].as_str();
    let runbook = url.and_then(|url| url.split('#').next()).context("no runbook_url")?;
    let rendered = Objects::of_chart(&[
        "--show-only=templates/prometheusrule.yaml",
        "--set=monitoring.rules.enabled=true",
        &format!("--set=monitoring.rules.runbookUrl={runbook}"),
    ])?;
    ensure!(committed == rendered, "they are out of date: run `cargo xtask manifests`");
    Ok(())
}

#[test]
fn kustomize_renders_the_committed_manifests() -> Result<()> {
    let output = succeed(Command::new("kubectl").arg("kustomize").arg(dir()))?;
    let mut rendered = Objects::read(&String::from_utf8(output.stdout)?)?.0;
    let mut committed = Objects::committed()?.0;
    for objects in [&mut rendered, &mut committed] {
        objects.sort_by_key(|o| (o["kind"].to_string(), o["metadata"]["name"].to_string()));
    }
    assert_eq!(rendered, committed);
    Ok(())
}

#[test]
fn every_field_is_one_that_kubernetes_knows() -> Result<()> {
    for objects in [Objects::committed()?, Objects::of_chart(&["--values", EVERYTHING])?] {
        assert!(objects.0.len() >= 5, "{objects:?}");
        for object in &objects.0 {
            let read = match object["kind"].as_str().context("no kind")? {
                "DaemonSet" => round_trip::<DaemonSet>(object),
                "ConfigMap" => round_trip::<ConfigMap>(object),
                "ServiceAccount" => round_trip::<ServiceAccount>(object),
                "ClusterRole" => round_trip::<ClusterRole>(object),
                "ClusterRoleBinding" => round_trip::<ClusterRoleBinding>(object),
                "Role" => round_trip::<Role>(object),
                "RoleBinding" => round_trip::<RoleBinding>(object),
                "ResourceQuota" => round_trip::<ResourceQuota>(object),
                // The Prometheus operator's: tests of their own are in monitoring.rs.
                "PodMonitor" | "PrometheusRule" => continue,
                other => bail!("a {other} is not expected"),
            };
            assert_eq!(&read?, object);
        }
    }
    Ok(())
}

/// What is left of an object when it was read as Kubernetes reads it.
fn round_trip<K: DeserializeOwned + Serialize>(object: &Value) -> Result<Value> {
    let read: K = serde_json::from_value(object.clone())
        .with_context(|| format!("read {} {}", object["kind"], object["metadata"]["name"]))?;
    Ok(serde_json::to_value(read)?)
}

/// What the agent makes of its arguments and its environment.
pub fn run_args(objects: &Objects) -> Result<RunArgs> {
    let container = objects.container()?;
    ensure!(container.command.is_none(), "the image knows its program");
    let mut arguments = container.args.unwrap_or_default();
    for argument in &mut arguments {
        *argument = argument.replace("$(POD_NAMESPACE)", NAMESPACE);
    }
    let definition = Cli::command();
    let run = definition.find_subcommand("run").context("no command run")?;
    let flag_of = |variable: &str| {
        let flag = run.get_arguments().find(|a| a.get_env().is_some_and(|env| env == variable));
        flag.and_then(|flag| flag.get_long())
    };
    for (variable, value) in objects.environment()? {
        match flag_of(&variable) {
            Some(flag) => arguments.push(format!("--{flag}={value}")),
            None => ensure!(variable == "RUST_LOG", "the agent does not read {variable}"),
        }
    }
    for variable in container.env.unwrap_or_default() {
        let known = flag_of(&variable.name).is_some() || variable.name == "POD_NAMESPACE";
        ensure!(known || variable.value.is_some(), "nobody reads {}", variable.name);
    }
    let cli = Cli::try_parse_from(["redirect-agent".to_owned()].into_iter().chain(arguments))?;
    match cli.command {
        AgentCommand::Run(args) => Ok(*args),
        other => bail!("the container does not run the agent, but {other:?}"),
    }
}

#[test]
fn arguments_and_environment_are_those_of_the_agent() -> Result<()> {
    let args = run_args(&Objects::committed()?)?;
    // As without any: what is said is the default.
    let plain = Cli::try_parse_from(["redirect-agent", "run"])?;
    let AgentCommand::Run(plain) = plain.command else { bail!("not run") };
    assert_eq!(args.excluded_namespaces, plain.excluded_namespaces);
    assert_eq!(args.traffic.dns_capture, plain.traffic.dns_capture);
    assert_eq!(args.enablement_selectors, None);
    assert!(args.install_cni);
    let daemon_set: DaemonSet = Objects::committed()?.one()?;
    let name = daemon_set.metadata.name.context("no name")?;
    let own = args.daemonset.map(|own| own.to_string());
    assert_eq!(own, Some(format!("{NAMESPACE}/{name}")));
    run_args(&Objects::of_chart(&["--values", EVERYTHING])?)?;
    Ok(())
}

#[test]
fn probes_and_prometheus_ask_where_the_agent_answers() -> Result<()> {
    let objects = Objects::committed()?;
    let health::Address::At(address) = run_args(&objects)?.health_address else {
        bail!("the agent serves no health");
    };
    let container = objects.container()?;
    let ports = container.ports.context("no ports")?;
    assert_eq!(ports.len(), 1);
    assert_eq!(ports[0].container_port, i32::from(address.port()));
    let name = ports[0].name.clone().context("the port has no name")?;
    for (probe, path) in [
        (container.startup_probe, "/healthz"),
        (container.liveness_probe, "/healthz"),
        (container.readiness_probe, "/readyz"),
    ] {
        let get = probe.and_then(|probe| probe.http_get).context("no probe by HTTP")?;
        assert_eq!(get.port, IntOrString::String(name.clone()));
        assert_eq!(get.path.as_deref(), Some(path));
    }
    let daemon_set: DaemonSet = objects.one()?;
    let metadata = daemon_set.spec.template.metadata.context("no metadata")?;
    let annotations = metadata.annotations.context("no annotations")?;
    assert_eq!(annotations["prometheus.io/port"], address.port().to_string());
    assert_eq!(annotations["prometheus.io/path"], "/metrics");
    Ok(())
}

#[test]
fn every_directory_of_the_agent_is_the_nodes() -> Result<()> {
    let objects = Objects::committed()?;
    let args = run_args(&objects)?;
    let paths = [
        args.bpffs.bpffs_dir,
        args.pods.netns_dir,
        args.pods.state_dir,
        args.control.control_socket,
        args.zds_socket,
        args.cni_socket,
        args.cni.cni_conf_dir,
        args.cni.cni_bin_dir,
    ];
    let mounts = objects.container()?.volume_mounts.context("no mounts")?;
    let mut used = BTreeSet::new();
    for path in &paths {
        let mount = mounts.iter().find(|mount| path.starts_with(&mount.mount_path));
        let mount = mount.with_context(|| format!("{} is not mounted", path.display()))?;
        assert_ne!(mount.read_only, Some(true), "{}", path.display());
        used.insert(mount.mount_path.clone());
    }
    for mount in &mounts {
        assert!(used.contains(&mount.mount_path), "nobody needs {}", mount.mount_path);
        // What is mounted on the node later, the agent has to see.
        let later = ["/sys/fs/bpf", "/var/run/netns"].contains(&mount.mount_path.as_str());
        let propagation = later.then_some("HostToContainer");
        assert_eq!(mount.mount_propagation.as_deref(), propagation, "{}", mount.mount_path);
    }
    let volumes = objects.pod()?.volumes.context("no volumes")?;
    assert_eq!(volumes.len(), mounts.len());
    for mount in &mounts {
        let volume = volumes.iter().find(|volume| volume.name == mount.name);
        let host = volume.and_then(|volume| volume.host_path.as_ref()).context("not the node's")?;
        // ztunnel, the CNI plugin and the commands know these paths on the node.
        assert_eq!(host.path, mount.mount_path);
    }
    Ok(())
}

#[test]
fn pods_are_known_to_istiod_and_stay_out_of_the_mesh() -> Result<()> {
    let daemon_set: DaemonSet = Objects::committed()?.one()?;
    let spec = daemon_set.spec;
    let labels = spec.template.metadata.and_then(|m| m.labels).context("no labels")?;
    // Source: Istio `pilot/pkg/controllers/untaint/nodeuntainter.go`.
    assert_eq!(labels["k8s-app"], "istio-cni-node");
    assert_eq!(labels["istio.io/dataplane-mode"], "none");
    let selector = spec.selector.match_labels.context("no selector")?;
    assert!(selector.iter().all(|(label, value)| labels.get(label) == Some(value)));
    let pod = spec.template.spec.context("no pod")?;
    assert_eq!((pod.host_pid, pod.host_network), (Some(true), Some(true)));
    assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"));
    assert!(pod.termination_grace_period_seconds.is_some_and(|seconds| seconds >= 60));
    Ok(())
}

#[test]
fn rights_go_to_the_agents_account_alone() -> Result<()> {
    let objects = Objects::committed()?;
    let account: ServiceAccount = objects.one()?;
    let name = account.metadata.name.context("no name")?;
    assert_eq!(objects.pod()?.service_account_name.as_deref(), Some(name.as_str()));
    let role: ClusterRole = objects.one()?;
    let binding: ClusterRoleBinding = objects.one()?;
    assert_eq!(Some(binding.role_ref.name), role.metadata.name);
    let own_role: Role = objects.one()?;
    let own_binding: RoleBinding = objects.one()?;
    assert_eq!(Some(own_binding.role_ref.name), own_role.metadata.name);
    for subjects in [binding.subjects, own_binding.subjects] {
        let subjects = subjects.context("no subjects")?;
        assert_eq!(subjects.len(), 1);
        assert_eq!(subjects[0].kind, "ServiceAccount");
        assert_eq!(subjects[0].name, name);
        assert_eq!(subjects[0].namespace.as_deref(), Some(NAMESPACE));
    }
    // Of DaemonSets its own, and nothing else.
    let daemon_set: DaemonSet = objects.one()?;
    let rules = own_role.rules.context("no rules")?;
    assert_eq!(rules.len(), 1);
    assert_eq!(rules[0].resource_names, daemon_set.metadata.name.map(|name| vec![name]));
    Ok(())
}

#[test]
fn image_starts_the_program_that_dist_puts_into_it() -> Result<()> {
    let read = |path: PathBuf| {
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let dockerfile = read(dir().join("Dockerfile"))?;
    let dist = read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../xtask/src/dist.rs"))?;
    assert!(dockerfile.contains("ENTRYPOINT [\"/usr/local/bin/redirect-agent\"]"));
    assert!(dist.contains("const BINARY: &str = \"usr/local/bin/redirect-agent\";"));
    let chart = read(dir().join("helm/redirect-agent/Chart.yaml"))?;
    assert!(chart.contains(&format!("appVersion: {}\n", env!("CARGO_PKG_VERSION"))), "{chart}");
    Ok(())
}
