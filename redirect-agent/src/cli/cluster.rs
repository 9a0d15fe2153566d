//! The commands that ask the API server of the cluster, and no agent.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser};

use super::{namespace, selectors};
use crate::{enablement::Selectors, output::Format};

/// The name by which kubectl finds the program: `kubectl redirect`.
const PLUGIN: &str = "kubectl-redirect";

/// After the help of both.
const HELP: &str = "\
Examples:
  redirect-agent cluster
  redirect-agent cluster -n shop --watch
  redirect-agent cluster --context production --readyz
  redirect-agent cluster -o json | jq '.unexpected[] | .message'

As kubectl-redirect in $PATH, the same is `kubectl redirect`. It reads the API server only, with
your kubeconfig: no root, no agent on this machine. docs/operations.md lists the RBAC permissions
that it uses; without an optional one, it prints a note.

States of pods; finished ones are left out:
  enrolled   in the mesh, as it should be
  pending    redirected, but the proxy does not serve it yet
  missing    should be in the mesh and is not
  stale      has the annotation and should not
  starting   should be in the mesh, and is not scheduled or not started yet, for however long; or it
             was started or labeled less than 30 s ago
  leaving    is being deleted, or was labeled out of the mesh (with none) less than 30 s ago
  bypassing  not in the mesh, as it should be
The API server does not record when a label was removed: such a pod is stale at once, until its
agent has removed it from the mesh, after --drain.

The exit status is 0 when no pod is pending, missing or stale, every agent is ready, and every node
with pods of the mesh has an agent; 1 when not; 2 for an error. With -n, only nodes with pods of the
namespace count. --watch ends when nobody reads its output; its exit status is then 0, whatever it
has printed.";

/// `cluster`
#[derive(Clone, Debug, Args)]
#[command(after_long_help = HELP)]
pub struct ClusterArgs {
    /// Only pods of this namespace, and the nodes that they are on.
    #[arg(short, long, value_name = "NAMESPACE", value_parser = namespace)]
    pub namespace: Option<String>,
    /// How to reach the API server; by default as $KUBECONFIG or ~/.kube/config say, or, in a pod, by its
    /// service account.
    #[arg(long, value_name = "PATH")]
    pub kubeconfig: Option<PathBuf>,
    /// Which context of the kubeconfig.
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// The agents' namespace, for users who cannot list the pods of all.
    #[arg(long, value_name = "NAMESPACE", value_parser = namespace)]
    pub agent_namespace: Option<String>,
    /// Namespaces whose pods are never in the mesh, in place of the agents' setting.
    #[arg(long, value_name = "NAMESPACE,…", value_delimiter = ',', value_parser = namespace)]
    pub excluded_namespaces: Option<Vec<String>>,
    /// Enablement selectors, in place of the agents' setting: YAML, or @FILE.
    #[arg(long, value_name = "YAML|@FILE", value_parser = selectors)]
    pub enablement_selectors: Option<Selectors>,
    /// Ask agents that are not ready what they wait for, 20 at most, through the API server.
    #[arg(long)]
    pub readyz: bool,
    /// Go on, and print a line whenever a pod or node becomes unexpected, and when that is resolved.
    #[arg(short, long)]
    pub watch: bool,
    /// How many objects the API server sends at once.
    #[arg(long, value_name = "NUMBER", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    pub chunk_size: u32,
    /// How to print it: wide shows every node, and what to run next.
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
}

/// Shows the pods of the cluster that should be in the ambient mesh and are not, since when, and why.
#[derive(Debug, Parser)]
#[command(name = "kubectl-redirect", bin_name = "kubectl redirect", version)]
pub struct Plugin {
    /// See [`ClusterArgs`].
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

impl Plugin {
    /// Reads the command line of this process. Ends the process when it asks for help, or cannot be
    /// understood.
    pub fn of_process() -> Self {
        let help = HELP.replace("redirect-agent cluster", "kubectl redirect");
        let matches = Self::command().after_long_help(help).get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }

    /// Whether this program was called as kubectl's plugin.
    pub fn is_called() -> bool {
        let path = env::args_os().next().unwrap_or_default();
        Path::new(&path).file_name() == Some(OsStr::new(PLUGIN))
    }
}
