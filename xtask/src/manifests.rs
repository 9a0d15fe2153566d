//! `cargo xtask manifests`: what the Helm chart renders, for those who do not use Helm.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{process::read, setup};

/// Every file that is written, and helm's arguments for it. kustomize builds on the first. Tests
/// (`tests/tests/deploy/agreement.rs`) fail when a file is not what the chart renders.
const FILES: &[(&str, &[&str])] = &[
    ("deploy/redirect-agent.yaml", &["--set=hub=registry.example.com"]),
    (
        "deploy/monitoring/alerts.yaml",
        &[
            "--show-only=templates/prometheusrule.yaml",
            "--set=hub=registry.example.com",
            "--set=monitoring.rules.enabled=true",
            "--set=monitoring.rules.runbookUrl=https://docs.example.com/redirect-agent/runbook.md",
        ],
    ),
];
const HEADER: &str =
    "# Made from deploy/helm/redirect-agent by `cargo xtask manifests`. Edit that.\n";

/// Writes all of them.
pub(crate) fn write() -> Result<()> {
    setup::for_running(setup::Report::Changes)?;
    for (file, arguments) in FILES {
        let mut helm = Command::new("helm");
        helm.args(["template", "redirect-agent", "deploy/helm/redirect-agent"]);
        helm.args(["--namespace", "istio-system"]).args(*arguments);
        let manifests = read(helm.env("PATH", setup::path_with_tools()?))?;
        fs::write(file, format!("{HEADER}{manifests}\n"))
            .with_context(|| format!("write {file}"))?;
    }
    Ok(())
}
