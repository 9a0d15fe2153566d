//! `cargo xtask demo` and `bench`: builds the program and becomes it.

use std::{env, ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    process::{as_root, cargo, replace_by, run},
    setup,
};

/// Builds as whoever started us, then becomes the program of this name as root; returns only if that
/// failed.
pub(crate) fn become_program(name: &str, arguments: &[OsString]) -> Result<()> {
    setup::for_building(setup::Report::Changes)?;
    setup::for_running(setup::Report::Changes)?;
    run(cargo().args(["build", "--release", "--locked", "--bins"]).args([
        "--package",
        "redirect-agent",
        "--package",
        "redirect-tests",
    ]))
    .with_context(|| format!("build the {name}"))?;
    // It finds the agent and the stand-in proxy beside itself.
    Err(replace_by(as_root(release_dir()?.join(name))?.args(arguments)))
}

/// Where cargo puts release binaries: beside the directory of our own, `target/debug`.
fn release_dir() -> Result<PathBuf> {
    let this = env::current_exe().context("find the path of this program")?;
    let target = this.ancestors().nth(2).context("find the target directory")?;
    Ok(target.join("release"))
}
