//! The Helm chart: that values reach the agent, that each is described, and that those without a meaning are
//! refused.

use std::collections::BTreeSet;
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ResourceQuota, ServiceAccount};
use redirect_agent::cli::LogFormat;
use redirect_agent::enablement::{self, Selectors};
use redirect_agent::page::Audience;
use redirect_tests::manifests::{Objects, chart, helm};
use redirect_tests::process::succeed;
use serde_json::Value;

use crate::agreement::{EVERYTHING, run_args};

#[test]
fn helm_finds_nothing_to_say_of_the_chart() -> Result<()> {
    for values in [&[][..], &["--values", EVERYTHING]] {
        succeed(helm("lint").arg("--strict").args(values))?;
    }
    Ok(())
}

#[test]
fn values_reach_the_agent() -> Result<()> {
    let objects = Objects::of_chart(&["--values", EVERYTHING])?;
    let args = run_args(&objects)?;
    assert_eq!(args.excluded_namespaces, ["kube-system", "istio-system"]);
    assert!(!args.traffic.dns_capture);
    assert_eq!(args.enablement_selectors, Some(enablement::DEFAULT.parse::<Selectors>()?));
    assert_eq!(args.log_format, LogFormat::Json);
    assert!(args.sidecar_annotations);
    assert_eq!(args.page, Audience::Local);
    let level = ("RUST_LOG".to_owned(), "debug".to_owned());
    assert!(objects.environment()?.contains(&level));

    let container = objects.container()?;
    assert_eq!(container.image.as_deref(), Some("registry.example.com/mesh/redirect-agent:1.2.3"));
    assert_eq!(container.image_pull_policy.as_deref(), Some("Always"));
    let context = container.security_context.context("no security context")?;
    let selinux = context.se_linux_options.context("no SELinux options")?;
    assert_eq!(selinux.type_.as_deref(), Some("spc_t"));
    assert_eq!(context.seccomp_profile.context("no seccomp profile")?.type_, "Localhost");
    let requests = container.resources.and_then(|r| r.requests).context("no requests")?;
    assert_eq!(requests["memory"].0, "100Mi");

    let pod = objects.pod()?;
    assert!(pod.affinity.is_some());
    assert_eq!(pod.termination_grace_period_seconds, Some(120));
    let paths: Vec<String> = pod
        .volumes
        .unwrap_or_default()
        .into_iter()
        .filter_map(|v| Some(v.host_path?.path))
        .collect();
    for path in
        ["/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/run/netns"]
    {
        assert!(paths.iter().any(|p| p == path), "{path} is not in {paths:?}");
    }
    let daemon_set: DaemonSet = objects.one()?;
    assert_eq!(daemon_set.metadata.labels.context("no labels")?["example.com/team"], "mesh");
    let spec = daemon_set.spec;
    assert!(spec.update_strategy.is_some_and(|s| s.rolling_update.is_some()));
    let pods = spec.template.metadata.context("no metadata")?;
    assert_eq!(pods.labels.context("no labels")?["example.com/team"], "mesh");
    assert_eq!(pods.annotations.context("no annotations")?["example.com/note"], "a note");
    let secrets = objects.one::<ServiceAccount>()?.image_pull_secrets.context("no secrets")?;
    assert_eq!(secrets[0].name, "registry-key");
    let quota = objects.one::<ResourceQuota>()?.spec.and_then(|s| s.hard).context("no quota")?;
    assert_eq!(quota["pods"].0, "100");
    Ok(())
}

#[test]
fn image_is_named_as_with_istio() -> Result<()> {
    for (values, image) in [
        ("hub=a", format!("a/redirect-agent:{}", env!("CARGO_PKG_VERSION"))),
        ("global.hub=example.com,global.tag=2", "example.com/redirect-agent:2".to_owned()),
        ("global.hub=a,hub=b,global.tag=2,tag=3", "b/redirect-agent:3".to_owned()),
        ("hub=a,image=example.com/own:1", "example.com/own:1".to_owned()),
        ("global.hub=,image=example.com/own:1", "example.com/own:1".to_owned()),
    ] {
        let objects = Objects::of_chart(&["--set", values])?;
        assert_eq!(objects.container()?.image, Some(image), "{values}");
    }
    Ok(())
}

#[test]
fn empty_list_of_selectors_is_not_the_label() -> Result<()> {
    let objects = Objects::of_chart(&["--set-json", "ambient.enablementSelectors=[]"])?;
    assert_eq!(run_args(&objects)?.enablement_selectors, Some("[]".parse::<Selectors>()?));
    Ok(())
}

#[test]
fn new_settings_start_new_agents() -> Result<()> {
    let template = |arguments: &[&str]| {
        let daemon_set: DaemonSet = Objects::of_chart(arguments)?.one()?;
        anyhow::Ok(daemon_set.spec.template)
    };
    assert_eq!(template(&[])?, template(&[])?);
    assert_ne!(template(&[])?, template(&["--set", "ambient.dnsCapture=false"])?);
    assert_ne!(template(&[])?, template(&["--set", "excludeNamespaces={a,b}"])?);
    Ok(())
}

#[test]
fn values_without_a_meaning_are_refused_by_name() -> Result<()> {
    for (values, named) in [
        ("repair.enabled=true", "repair"),
        ("ambient.enabled=true", "enabled"),
        ("ambient.ipv6=true", "ipv6"),
        ("chained=true", "chained"),
        ("global.nativeNftables=true", "nativeNftables"),
        ("dnsCapture=true", "dnsCapture"),
        ("terminationGracePeriodSeconds=30", "terminationGracePeriodSeconds"),
        ("pullPolicy=Sometimes", "pullPolicy"),
        ("statusPage=everybody", "statusPage"),
        ("cniConfDir=etc/cni", "cniConfDir"),
        ("ambient.enablementSelectors[0].podSelectors.a=b", "podSelectors"),
        // Without a registry, nodes would pull docker.io/library/redirect-agent, which is not ours.
        ("global.hub=", "hub: set it to the registry"),
        ("monitoring.rules.enabled=true", "monitoring.rules.runbookUrl: set it"),
        ("monitoring.rules.runbookUrl=docs/runbook.md", "runbookUrl"),
        ("monitoring.rules.runbookUrl=https://example.com/runbook#top", "runbookUrl"),
    ] {
        let output = helm("template").args(["--set", values]).output().context("run helm")?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(named), "{values}: {said}");
    }
    Ok(())
}

/// The values of the schema, by their paths: `logging.level`.
fn described(schema: &Value, path: &str, found: &mut Vec<(String, Value)>) {
    let Some(properties) = schema["properties"].as_object() else {
        found.push((path.to_owned(), schema.clone()));
        return;
    };
    for (name, property) in properties {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        described(property, &path, found);
    }
}

/// What values.yaml has at `path`; `None` where it leaves the value to Kubernetes.
fn default<'a>(values: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(values, |value, name| value.get(name))
}

/// The paths of all values that values.yaml sets, as far as the schema tells them apart.
fn set(values: &Value, path: &str, known: &BTreeSet<&str>, found: &mut Vec<String>) {
    match values.as_object() {
        Some(fields) if !known.contains(path) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                set(value, &path, known, found);
            }
        }
        _ => found.push(path.to_owned()),
    }
}

#[test]
fn readme_of_the_chart_describes_every_value() -> Result<()> {
    let schema: Value =
        serde_json::from_str(&fs::read_to_string(chart().join("values.schema.json"))?)?;
    let values: Value = serde_saphyr::from_str(&fs::read_to_string(chart().join("values.yaml"))?)?;
    let mut all = Vec::new();
    described(&schema, "", &mut all);
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    let paths: BTreeSet<&str> = all.iter().map(|(path, _)| path.as_str()).collect();
    let mut defaults = Vec::new();
    set(&values, "", &paths, &mut defaults);
    for path in &defaults {
        // An empty object stands for all that may be in it.
        let known = |known: &&str| *known == path || known.starts_with(&format!("{path}."));
        ensure!(paths.iter().any(known), "{path} is not in values.schema.json");
    }

    let mut table = "| value | default | meaning |\n|---|---|---|\n".to_owned();
    for (path, property) in &all {
        let description = property["description"].as_str();
        let description = description.with_context(|| format!("{path} has no description"))?;
        let default = match default(&values, path) {
            None | Some(Value::Null) => String::new(),
            Some(value) => format!("`{value}`"),
        };
        table += &format!("| `{path}` | {default} | {description} |\n");
    }
    let file = chart().join("README.md");
    let readme = fs::read_to_string(&file)?;
    let head = readme.split("| value |").next().unwrap_or_default();
    let wanted = format!("{head}{table}");
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&file, wanted)?;
    } else {
        ensure!(readme == wanted, "it is out of date: UPDATE_GOLDEN=1 cargo test … writes it");
    }
    Ok(())
}

#[test]
fn notes_name_the_next_command() -> Result<()> {
    let output = succeed(helm("install").arg("--dry-run=client"))?;
    let said = String::from_utf8(output.stdout)?;
    let notes = said.split("NOTES:").nth(1).context("no notes")?;
    let agent = "kubectl --namespace istio-system";
    for command in [
        format!("{agent} rollout status daemonset/redirect-agent"),
        format!("{agent} exec daemonset/redirect-agent -- redirect-agent status"),
        format!("{agent} delete daemonset redirect-agent --cascade=foreground"),
    ] {
        ensure!(notes.contains(&command), "no `{command}` in\n{notes}");
    }
    Ok(())
}
