//! The BPF programs that are attached in a network namespace.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use aya::programs::TcAttachType;
use serde_json::Value;

use crate::footprint::tcx;
use crate::netns::Netns;
use crate::process::succeed;

/// A program where it is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// `tcx ingress lo: redirect_lo`, `sk_lookup`
    pub place: String,
    /// The program's id.
    pub id: u32,
}

/// All programs of tcx and sk_lookup in a namespace.
///
/// # Errors
///
/// When the kernel or bpftool cannot be asked.
pub fn attached(netns: &Netns) -> Result<Vec<Attached>> {
    let mut all = netns.run(|| {
        let mut all = Vec::new();
        for interface in interfaces()? {
            let hooks = [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")];
            for (hook, name) in hooks {
                let programs = tcx(&interface, hook)?;
                all.extend(programs.iter().map(|program| Attached {
                    place: format!(
                        "tcx {name} {interface}: {}",
                        program.name_as_str().unwrap_or("?")
                    ),
                    id: program.id(),
                }));
            }
        }
        Ok(all)
    })?;
    let output = succeed(Command::new("bpftool").args(["-j", "link", "show"]))?;
    let links: Vec<Value> =
        serde_json::from_slice(&output.stdout).context("read bpftool's JSON")?;
    let inode = netns.inode()?;
    let here = links.iter().filter(|link| link["netns_ino"].as_u64() == Some(inode));
    let ids = here.filter_map(|link| u32::try_from(link["prog_id"].as_u64()?).ok());
    all.extend(ids.map(|id| Attached { place: "sk_lookup".to_owned(), id }));
    Ok(all)
}

/// The interfaces of this thread's namespace.
fn interfaces() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").context("read the interfaces")?;
    let names = text.lines().filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
}
