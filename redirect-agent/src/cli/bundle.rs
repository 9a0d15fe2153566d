//! The options of `bundle`.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use super::{ControlSocket, NodeDirs, interval};

/// `bundle`
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  redirect-agent bundle
  redirect-agent bundle --redact -o report.tar.gz
  kubectl -n istio-system exec POD -- redirect-agent bundle -o - > report.tar.gz

Changes nothing on the node. Works with the agent down or hanging, without what only the agent
knows. The archive has no Secret, token, payload or environment of a process in it. README.txt in
it says what each file is. With --redact, each IP address and each name of a pod, namespace or
node is replaced by an alias, the same everywhere in the archive. Names of a cluster that the
agent does not know may remain, for example in an error message, as do annotations, ports and the
IDs of containers: look through the archive before you publish it.

The exit status is 0 if everything was collected, and 1 if the archive lacks something, or could
not be written. errors.txt in it says what is missing, or was skipped when --timeout was over.")]
pub struct BundleArgs {
    /// Where to write the archive, or `-` for standard output [redirect-agent-NODE-TIME.tar.gz in the working
    /// directory].
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Replaces a file that exists.
    #[arg(long)]
    pub overwrite: bool,
    /// Replaces IP addresses and the names of pods, namespaces and nodes by aliases.
    #[arg(long)]
    pub redact: bool,
    /// How long collecting may take. What is left then is skipped, and the archive is written without it.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = interval)]
    pub timeout: Duration,
    /// This node's name, if the agent does not answer; the host's name by default.
    #[arg(long, value_name = "NAME", env = "NODE_NAME", hide_env_values = true)]
    pub node_name: Option<String>,
    /// See [`NodeDirs`].
    #[command(flatten)]
    pub dirs: NodeDirs,
    /// See [`ControlSocket`].
    #[command(flatten)]
    pub control: ControlSocket,
}
