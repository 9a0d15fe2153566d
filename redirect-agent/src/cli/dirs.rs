//! Where a node has what the agent needs, and what it keeps.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
};

use clap::Args;

use crate::{
    cni::{entry::PLUGIN, install},
    dataplane,
};

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
    #[arg(long, value_name = "DIR", default_value = CONF)]
    pub cni_conf_dir: PathBuf,
    /// Directory of the node's CNI plugins.
    #[arg(long, value_name = "DIR", default_value = BIN)]
    pub cni_bin_dir: PathBuf,
}

const CONF: &str = "/etc/cni/net.d";
const BIN: &str = "/opt/cni/bin";
/// Where else distributions have them (docs/install.md): k3s, and GKE.
const ELSEWHERE: [(&str, &str); 2] = [
    ("/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/lib/rancher/k3s/data/cni"),
    (CONF, "/home/kubernetes/bin"),
];

impl CniDirs {
    /// The directories given; if they are the default, also those of distributions and the one where this program is, if
    /// it is the plugin: the agent itself always has them at the default's paths, which are mounts.
    pub fn everywhere(&self) -> Vec<install::Dirs> {
        let mut all = vec![self.clone().into()];
        if self.cni_conf_dir == Path::new(CONF) && self.cni_bin_dir == Path::new(BIN) {
            all.extend(
                ELSEWHERE.map(|(conf, bin)| install::Dirs { conf: conf.into(), bin: bin.into() }),
            );
            let program = env::current_exe().unwrap_or_default();
            if program.file_name() == Some(OsStr::new(PLUGIN))
                && let Some(bin) = program.parent()
            {
                all.push(install::Dirs { conf: CONF.into(), bin: bin.to_owned() });
            }
        }
        all
    }
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
