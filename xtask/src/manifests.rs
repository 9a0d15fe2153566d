//! `cargo xtask manifests`: what the Helm chart renders by default, for those who do without Helm.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{process::read, setup};

/// Written here; kustomize builds on it, and a test says when it is not what the chart renders.
const FILE: &str = "deploy/redirect-agent.yaml";
const HEADER: &str =
    "# Made from deploy/helm/redirect-agent by `cargo xtask manifests`. Edit that.\n";

/// Writes it.
pub(crate) fn write() -> Result<()> {
    setup::for_running(setup::Report::Changes)?;
    let mut helm = Command::new("helm");
    helm.args(["template", "redirect-agent", "deploy/helm/redirect-agent"]);
    helm.args(["--namespace", "istio-system"]).env("PATH", setup::path_with_tools()?);
    let manifests = read(&mut helm)?;
    fs::write(FILE, format!("{HEADER}{manifests}\n")).with_context(|| format!("write {FILE}"))
}
