//! The dashboard and the alerts ask for metrics and labels that the agent has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use redirect_agent::membership::Reason;
use redirect_agent::metrics::{Metrics, Now};
use redirect_agent::output::{PodState, PodStatus};
use redirect_ebpf::abi::Counter;
use redirect_tests::manifests::dir;
use serde_json::Value;

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
    let now =
        Now { pods: &pods, proxies: 1, proxys_cgroup: true, follows_kubelet: true, left_alone: 0 };
    metrics.report(&now).context("write the metrics")
}

fn pod(state: PodState) -> PodStatus {
    PodStatus {
        namespace: "shop".to_owned(),
        name: "cart".to_owned(),
        uid: state.as_str().to_owned(),
        ips: Vec::<IpAddr>::new(),
        state,
        reason: Reason::PodLabelAmbient,
        message: None,
        overridden: None,
        traffic: None,
        netns: Some(7),
        kernel: None,
        counters: BTreeMap::from_iter(Counter::ALL.map(|(_, name)| (name.to_owned(), 1))),
    }
}

/// The expressions of the dashboard and the alerts.
fn expressions() -> Result<Vec<String>> {
    let read = |name: &str| fs::read_to_string(dir().join("monitoring").join(name));
    let dashboard: Value = serde_json::from_str(&read("dashboard.json")?)?;
    let alerts: Value = serde_saphyr::from_str(&read("alerts.yaml")?)?;
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().context("no panels")? {
        for target in panel["targets"].as_array().context("no targets")? {
            found.push(target["expr"].as_str().context("no expression")?.to_owned());
        }
    }
    for rule in alerts["spec"]["groups"][0]["rules"].as_array().context("no rules")? {
        assert!(rule["annotations"]["summary"].is_string(), "{rule}");
        found.push(rule["expr"].as_str().context("no expression")?.to_owned());
    }
    assert!(found.len() > 10, "{found:?}");
    Ok(found)
}

#[test]
fn what_is_asked_for_is_what_the_agent_says() -> Result<()> {
    let said = metrics()?;
    let names: BTreeSet<&str> = said
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    for expression in expressions()? {
        let asked: Vec<&str> = expression
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("redirect_"))
            .collect();
        assert!(!asked.is_empty(), "{expression}");
        for name in asked {
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

/// `label="values"` in an expression, of the labels that are the agent's own.
fn selectors(expression: &str) -> Vec<(&str, &str)> {
    let mut parts = expression.split('"');
    let mut found = Vec::new();
    while let (Some(before), Some(values)) = (parts.next(), parts.next()) {
        let label = before.trim_end_matches(['=', '~', '!']);
        let label = label.rsplit(['{', ',']).next().unwrap_or_default();
        if label != "instance" {
            found.push((label, values));
        }
    }
    found
}
