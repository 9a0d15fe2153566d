//! `cargo xtask demo` and `bench`: builds the program and becomes it.

use std::{env, ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    process::{as_root, cargo, replace_by, run},
    setup,
};

/// Which profile a program is built with.
#[derive(Clone, Copy)]
pub(crate) enum Profile {
    /// The tests' own, so that either builds what the other needs.
    Dev,
    /// For numbers that mean something.
    Release,
}

/// Builds as whoever started us, then becomes the program of this name as root; returns only if that
/// failed.
pub(crate) fn become_program(name: &str, profile: Profile, arguments: &[OsString]) -> Result<()> {
    eprintln!(
        "{name}: first the tools and the build (the first one takes minutes), then the {name}"
    );
    setup::for_building(setup::Report::Changes)?;
    setup::for_running(setup::Report::Changes)?;
    // Of the whole workspace: with fewer packages, cargo chooses other features and builds them twice.
    let mut build = cargo();
    build.args(["build", "--workspace", "--bins", "--locked"]);
    let directory = match profile {
        Profile::Dev => "debug",
        Profile::Release => {
            build.arg("--release");
            "release"
        }
    };
    run(&mut build).with_context(|| format!("build the {name}"))?;
    // It finds the agent and the stand-in proxy beside itself.
    Err(replace_by(as_root(target_dir()?.join(directory).join(name))?.args(arguments)))
}

/// Cargo's target directory: ours is in its `debug`.
fn target_dir() -> Result<PathBuf> {
    let this = env::current_exe().context("find the path of this program")?;
    let target = this.ancestors().nth(2).context("find the target directory")?;
    Ok(target.to_owned())
}
