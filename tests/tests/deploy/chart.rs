//! The Helm chart: that values reach the agent, and that those without a meaning are refused.

use anyhow::{Context as _, Result};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ResourceQuota, ServiceAccount};
use redirect_agent::cli::LogFormat;
use redirect_agent::enablement::{self, Selectors};
use redirect_tests::manifests::{Objects, helm};
use redirect_tests::process::succeed;

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
        ("hub=", format!("redirect-agent:{}", env!("CARGO_PKG_VERSION"))),
        ("global.hub=example.com,global.tag=2", "example.com/redirect-agent:2".to_owned()),
        ("global.hub=a,hub=b,global.tag=2,tag=3", "b/redirect-agent:3".to_owned()),
        ("hub=a,image=example.com/own:1", "example.com/own:1".to_owned()),
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
        ("cniConfDir=etc/cni", "cniConfDir"),
        ("ambient.enablementSelectors[0].podSelectors.a=b", "podSelectors"),
    ] {
        let output = helm("template").args(["--set", values]).output().context("run helm")?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(named), "{values}: {said}");
    }
    Ok(())
}
