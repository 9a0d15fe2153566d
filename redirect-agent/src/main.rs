//! `redirect-agent`: wiring only.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::Parser;
use redirect_agent::{commands, dataplane::Options};

/// Steers the traffic of enrolled pods to the node's HBONE proxy.
#[derive(Parser)]
enum Cli {
    /// Redirects one network namespace.
    Attach {
        /// The network namespace.
        #[arg(long)]
        netns: PathBuf,
        /// An address of the pod; all of the namespace by default.
        #[arg(long)]
        address: Vec<IpAddr>,
        /// The directory on bpffs.
        #[arg(long)]
        bpffs_dir: Option<PathBuf>,
    },
    /// Puts one network namespace back.
    Detach {
        /// The network namespace.
        #[arg(long)]
        netns: PathBuf,
        /// The directory on bpffs.
        #[arg(long)]
        bpffs_dir: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<()> {
    let options = |dir: Option<PathBuf>| Options {
        bpffs_dir: dir.unwrap_or_else(Options::default_bpffs_dir),
        proxy_grace: Duration::from_secs(3),
        log: false,
    };
    match Cli::parse() {
        Cli::Attach { netns, address, bpffs_dir } => {
            commands::attach(&options(bpffs_dir), &netns, &address)
        }
        Cli::Detach { netns, bpffs_dir } => commands::detach(&options(bpffs_dir), &netns),
    }
}
