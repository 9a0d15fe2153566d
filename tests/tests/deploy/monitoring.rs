//! The dashboard and the alerts ask for metrics and labels that the agent has, and the alerts fire when they
//! should.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_agent::membership::Reason;
use redirect_agent::metrics::{Metrics, Now};
use redirect_agent::output::{PodState, PodStatus};
use redirect_ebpf::abi::Counter;
use redirect_tests::manifests::{NAME, NAMESPACE, Objects, chart, dir};
use redirect_tests::process::succeed;
use serde_json::Value;

use crate::agreement::EVERYTHING;

/// Everything that the agent ever says of itself.
fn metrics() -> Result<String> {
    let metrics = Metrics::default();
    metrics.enrolled(Duration::from_secs(1));
    metrics.drifted("rule");
    metrics.failed();
    metrics.cni_request("add", true, Duration::from_secs(1));
    metrics.watch_error("pods");
    let states = [PodState::Enrolled, PodState::Degraded, PodState::Failed, PodState::Bypassing];
    let pods: Vec<PodStatus> = states.into_iter().map(pod).collect();
    let totals = BTreeMap::new();
    let now = Now {
        pods: &pods,
        totals: &totals,
        proxies: 1,
        proxys_cgroup: true,
        follows_kubelet: true,
        left_alone: 0,
    };
    metrics.report(&now).context("write the metrics")
}

fn pod(state: PodState) -> PodStatus {
    PodStatus {
        namespace: "shop".to_owned(),
        name: "cart".to_owned(),
        uid: state.as_str().to_owned(),
        ips: Vec::<IpAddr>::new(),
        state,
        since: None,
        reason: Reason::PodLabelAmbient,
        message: None,
        overridden: None,
        traffic: None,
        netns: Some(7),
        kernel: None,
        counters: BTreeMap::from_iter(Counter::ALL.map(|(_, name)| (name.to_owned(), 1))),
    }
}

/// The alerting rules of the only PrometheusRule among `objects`.
pub fn rules(objects: &Objects) -> Result<Vec<Value>> {
    let rule = objects.0.iter().find(|object| object["kind"] == "PrometheusRule");
    let groups = rule.and_then(|rule| rule["spec"]["groups"].as_array()).context("no groups")?;
    ensure!(groups.len() == 1, "{groups:?}");
    groups[0]["rules"].as_array().cloned().context("no rules")
}

/// The expressions of the dashboard and the alerts.
fn expressions() -> Result<Vec<String>> {
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(dir().join("monitoring/dashboard.json"))?)?;
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().context("no panels")? {
        for target in panel["targets"].as_array().context("no targets")? {
            found.push(target["expr"].as_str().context("no expression")?.to_owned());
        }
    }
    for rule in rules(&Objects::in_file("monitoring/alerts.yaml")?)? {
        assert!(rule["annotations"]["summary"].is_string(), "{rule}");
        found.push(rule["expr"].as_str().context("no expression")?.to_owned());
    }
    assert!(found.len() > 10, "{found:?}");
    Ok(found)
}

/// What others than the agent export: Prometheus itself, and kube-state-metrics. Source:
/// kube-state-metrics `docs/metrics/workload/pod-metrics.md`.
const OF_OTHERS: [&str; 3] = ["up", "kube_pod_info", "kube_pod_status_ready"];

#[test]
fn what_is_asked_for_is_what_the_agent_says() -> Result<()> {
    let said = metrics()?;
    let names: BTreeSet<&str> = said
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    for expression in expressions()? {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let (ours, others): (Vec<&str>, Vec<&str>) = words
            .filter(|word| word.starts_with("redirect_") || OF_OTHERS.contains(word))
            .partition(|word| word.starts_with("redirect_"));
        assert!(!(ours.is_empty() && others.is_empty()), "{expression}");
        for name in ours {
            assert!(names.contains(name), "{expression} asks for {name}, but there are {names:?}");
        }
        // The values of labels, too: each alternative of `verdict=~"a|b.*"`.
        for (label, values) in selectors(&expression) {
            for value in values.split('|') {
                let prefix = format!("{label}=\"{}", value.trim_end_matches(".*"));
                assert!(
                    said.contains(&prefix),
                    "{expression} asks for {prefix}, but there is\n{said}"
                );
            }
        }
    }
    Ok(())
}

/// `label="values"` in the selectors of the agent's own metrics, of the labels that it sets itself.
fn selectors(expression: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for part in expression.split('}') {
        let Some((before, selector)) = part.split_once('{') else { continue };
        let metric = before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next();
        if !metric.is_some_and(|metric| metric.starts_with("redirect_")) {
            continue;
        }
        let mut pieces = selector.split('"');
        while let (Some(before), Some(values)) = (pieces.next(), pieces.next()) {
            let label = before.trim_end_matches(['=', '~', '!']).trim_start_matches([',', ' ']);
            if label != "instance" {
                found.push((label, values));
            }
        }
    }
    found
}

#[test]
fn alerts_fire_when_they_should_and_not_otherwise() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let rules = rules(&Objects::in_file("monitoring/alerts.yaml")?)?;
    let groups = serde_json::json!({"groups": [{"name": NAME, "rules": rules}]});
    fs::write(dir.path().join("rules.yaml"), groups.to_string())?;
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/deploy/alerts_test.yaml");
    let tests = fs::read_to_string(tests)?;
    fs::write(dir.path().join("alerts_test.yaml"), &tests)?;
    let promtool = |arguments: &[&str]| {
        succeed(Command::new("promtool").args(arguments).current_dir(dir.path()))
    };
    promtool(&["check", "rules", "rules.yaml"])?;
    promtool(&["test", "rules", "alerts_test.yaml"])?;
    // Each of them, in both ways.
    let tests: Value = serde_saphyr::from_str(&tests)?;
    let cases = tests["tests"].as_array().context("no tests")?.iter();
    let cases: Vec<&Value> =
        cases.filter_map(|test| test["alert_rule_test"].as_array()).flatten().collect();
    for rule in &rules {
        let of_rule = || cases.iter().filter(|case| case["alertname"] == rule["alert"]);
        assert!(of_rule().any(|case| case["exp_alerts"].is_array()), "{} fires", rule["alert"]);
        assert!(of_rule().any(|case| case["exp_alerts"].is_null()), "{} is silent", rule["alert"]);
    }
    Ok(())
}

#[test]
fn prometheus_understands_every_expression_of_the_dashboard() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let rules: Vec<Value> = expressions()?
        .iter()
        .enumerate()
        .map(|(number, expression)| {
            let expression =
                expression.replace("$__rate_interval", "5m").replace("$instance", ".*");
            serde_json::json!({"record": format!("panel:{number}"), "expr": expression})
        })
        .collect();
    let groups = serde_json::json!({"groups": [{"name": NAME, "rules": rules}]});
    fs::write(dir.path().join("rules.yaml"), groups.to_string())?;
    succeed(
        Command::new("promtool").args(["check", "rules", "rules.yaml"]).current_dir(dir.path()),
    )?;
    Ok(())
}

#[test]
fn operators_of_prometheus_and_grafana_find_what_the_chart_makes_for_them() -> Result<()> {
    let objects = Objects::of_chart(&["--values", EVERYTHING])?;
    let of_kind = |kind: &str| {
        objects.0.iter().find(|o| o["kind"] == kind).with_context(|| format!("no {kind}"))
    };
    let (monitor, rule) = (of_kind("PodMonitor")?, of_kind("PrometheusRule")?);
    for object in [monitor, rule] {
        assert_eq!(object["apiVersion"], "monitoring.coreos.com/v1");
        assert_eq!(object["metadata"]["namespace"], NAMESPACE);
        assert_eq!(object["metadata"]["labels"]["example.com/team"], "mesh");
    }
    // The pods, and their port, by the names that they have.
    let daemon_set = of_kind("DaemonSet")?;
    assert_eq!(monitor["spec"]["selector"], daemon_set["spec"]["selector"]);
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    let ports = objects.container()?.ports.context("no ports")?;
    assert_eq!(endpoint["port"].as_str(), ports[0].name.as_deref());
    assert_eq!(endpoint["path"], "/metrics");
    assert_eq!(endpoint["interval"], "15s");
    // What the rules sum by.
    assert_eq!(endpoint["relabelings"][0]["targetLabel"], "node");
    for rule in rules(&objects)? {
        let url = rule["annotations"]["runbook_url"].as_str().context("no runbook_url")?;
        assert!(url.starts_with("https://wiki.example.com/runbook#"), "{url}");
    }
    let mut dashboards = objects.0.iter().filter(|o| o["kind"] == "ConfigMap");
    let dashboard = dashboards
        .find(|o| o["metadata"]["labels"]["example.com/dashboard"] == "yes")
        .context("no dashboard")?;
    let json = dashboard["data"]["redirect-agent.json"].as_str().context("no JSON")?;
    let file = fs::read_to_string(chart().join("files/dashboard.json"))?;
    assert_eq!(serde_json::from_str::<Value>(json)?, serde_json::from_str::<Value>(&file)?);
    Ok(())
}
