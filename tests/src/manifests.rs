//! The manifests in `deploy/`, as Kubernetes' own types.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, PodSpec};
use k8s_openapi::{Metadata, Resource};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::process::succeed;

/// What all objects are called.
pub const NAME: &str = "redirect-agent";
/// The namespace that they are in.
pub const NAMESPACE: &str = "istio-system";

/// The directory with all of them.
pub fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Some objects.
#[derive(Clone, Debug, PartialEq)]
pub struct Objects(pub Vec<Value>);

impl Objects {
    /// Reads YAML documents.
    pub fn read(yaml: &str) -> Result<Self> {
        let objects: Vec<Value> = serde_saphyr::from_multiple(yaml).context("read manifests")?;
        Ok(Self(objects.into_iter().filter(|object| !object.is_null()).collect()))
    }

    /// Those that are committed.
    pub fn committed() -> Result<Self> {
        Self::in_file("redirect-agent.yaml")
    }

    /// Those in a file below [`dir`].
    pub fn in_file(name: &str) -> Result<Self> {
        let file = dir().join(name);
        let yaml = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        Self::read(&yaml)
    }

    /// Those that the Helm chart renders with these arguments.
    pub fn of_chart(arguments: &[&str]) -> Result<Self> {
        let output = succeed(helm("template").args(arguments))?;
        Self::read(&String::from_utf8(output.stdout).context("read what helm renders")?)
    }

    /// The object of this kind.
    pub fn one<K: Resource + Metadata + DeserializeOwned>(&self) -> Result<K> {
        let mut of_kind =
            self.0.iter().filter(|o| o["kind"] == K::KIND && o["apiVersion"] == K::API_VERSION);
        let object = of_kind.next().with_context(|| format!("no {}", K::KIND))?;
        serde_json::from_value(object.clone()).with_context(|| format!("read {}", K::KIND))
    }

    /// What the DaemonSet's pods are.
    pub fn pod(&self) -> Result<PodSpec> {
        let daemon_set: DaemonSet = self.one()?;
        daemon_set.spec.template.spec.context("the DaemonSet has no pods")
    }

    /// The agent's container.
    pub fn container(&self) -> Result<Container> {
        self.pod()?.containers.into_iter().next().context("the pods have no container")
    }

    /// The environment that the agent gets, but for what its pod alone knows.
    pub fn environment(&self) -> Result<Vec<(String, String)>> {
        let config: ConfigMap = self.one()?;
        let own = self.container()?.env.unwrap_or_default().into_iter();
        let own = own.filter_map(|variable| Some((variable.name, variable.value?)));
        Ok(config.data.unwrap_or_default().into_iter().chain(own).collect())
    }
}

/// The directory of our chart.
pub fn chart() -> PathBuf {
    dir().join("helm").join(NAME)
}

/// helm with our chart, and with the only value that has no default: the registry of the committed manifests.
pub fn helm(verb: &str) -> Command {
    let mut command = Command::new("helm");
    command.arg(verb);
    if ["template", "install"].contains(&verb) {
        command.args([NAME, "--namespace", NAMESPACE]);
    }
    command.arg(chart()).args(["--set", "global.hub=registry.example.com"]);
    command
}
