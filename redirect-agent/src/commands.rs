//! The commands that need no running agent: each a function of its arguments.

use std::{net::IpAddr, path::Path};

use anyhow::Result;

use crate::{
    dataplane::{Dataplane, Options, PodNetns},
    netns::Netns,
};

/// `attach`: redirects one network namespace; what it sets up outlives the process.
///
/// # Errors
///
/// When the namespace cannot be set up; what was set up so far stays, and calling again completes
/// it.
pub fn attach(options: &Options, netns: &Path, addresses: &[IpAddr]) -> Result<()> {
    let pod = PodNetns::new(Netns::open(netns)?, addresses, 0)?;
    let dataplane = Dataplane::open(options)?;
    dataplane.prepare(&pod)?;
    dataplane.proxy_listens(&pod)?;
    dataplane.capture(&pod)
}

/// `detach`: puts one network namespace back to how it was before `attach`.
///
/// # Errors
///
/// When a system call fails; calling again completes it.
pub fn detach(options: &Options, netns: &Path) -> Result<()> {
    let pod = PodNetns::new(Netns::open(netns)?, &[], 0)?;
    let dataplane = Dataplane::open(options)?;
    dataplane.release(&pod)?;
    dataplane.remove(&pod)?;
    dataplane.unpin_if_unused()
}
