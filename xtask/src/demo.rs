//! `cargo xtask demo`: builds the demo and becomes it.

use std::{env, ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    process::{as_root, cargo, replace_by, run},
    setup,
};

/// Builds as whoever started us, then becomes the demo as root; returns only if that failed.
pub(crate) fn become_demo(arguments: &[OsString]) -> Result<()> {
    setup::everything(setup::Report::Changes)?;
    run(cargo().args(["build", "--release", "--locked", "--bins"]).args([
        "--package",
        "redirect-agent",
        "--package",
        "redirect-tests",
    ]))
    .context("build the demo")?;
    // The demo finds the agent and the stand-in proxy beside itself.
    Err(replace_by(as_root(release_dir()?.join("demo"))?.args(arguments)))
}

/// Where cargo puts release binaries: beside the directory of our own, `target/debug`.
fn release_dir() -> Result<PathBuf> {
    let this = env::current_exe().context("find the path of this program")?;
    let target = this.ancestors().nth(2).context("find the target directory")?;
    Ok(target.join("release"))
}
