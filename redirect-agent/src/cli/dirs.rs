//! Where a node has what the agent needs, and what it keeps.

use std::path::PathBuf;

use clap::Args;

use crate::{cni::install, dataplane};

/// Where the agent keeps its pins.
#[derive(Clone, Debug, Args)]
pub struct BpffsDir {
    /// Directory on a bpffs for the agent's maps and links; one for each agent on this kernel.
    #[arg(long, value_name = "DIR", default_value_os_t = dataplane::Options::default_bpffs_dir())]
    pub bpffs_dir: PathBuf,
    /// Attaches by clsact filters where the kernel has tcx, too: for tests.
    #[arg(long, env = "REDIRECT_TEST_CLSACT", hide = true)]
    pub test_clsact: bool,
}

impl BpffsDir {
    /// By what programs run on interfaces, if that is said.
    pub fn hooks(&self) -> Option<dataplane::Hooks> {
        self.test_clsact.then_some(dataplane::Hooks::Clsact)
    }
}

/// Where the node has its CNI.
#[derive(Clone, Debug, Args)]
pub struct CniDirs {
    /// Directory of the node's CNI configuration.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Directory of the node's CNI plugins.
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
}

impl From<CniDirs> for install::Dirs {
    fn from(dirs: CniDirs) -> Self {
        install::Dirs { conf: dirs.cni_conf_dir, bin: dirs.cni_bin_dir }
    }
}

/// Where to look for the pods of a node.
#[derive(Clone, Debug, Args)]
pub struct PodDirs {
    /// Directory where network namespaces of pods are, as NAMESPACE_NAME; those of other pods are
    /// found by their processes.
    #[arg(long, value_name = "DIR", default_value = "/var/run/netns")]
    pub netns_dir: PathBuf,
    /// Directory for what the agent has to remember: the overrides, and where pods are.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/redirect-agent")]
    pub state_dir: PathBuf,
}

/// Where a node has something of the agent.
#[derive(Clone, Debug, Args)]
pub struct NodeDirs {
    /// See [`PodDirs`].
    #[command(flatten)]
    pub pods: PodDirs,
    /// See [`CniDirs`].
    #[command(flatten)]
    pub cni: CniDirs,
    /// See [`BpffsDir`].
    #[command(flatten)]
    pub bpffs: BpffsDir,
}
