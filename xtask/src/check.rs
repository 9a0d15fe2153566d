//! `cargo xtask check`: formatting, lints, and the rules for dependencies.

use anyhow::{Context as _, Result};

use crate::{
    process::{cargo, find, run},
    setup,
};

/// Runs every check that needs no root.
pub(crate) fn run_all() -> Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))
        .context("check the formatting; `cargo fmt --all` mends it")?;
    setup::for_building(setup::Report::Changes)?;
    run(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ]))
    .context("check the lints")?;
    if find("cargo-deny").is_none() {
        eprintln!("check: cargo-deny is not installed; the rules in deny.toml were not checked");
        return Ok(());
    }
    // Not the advisories: what is published in the world must not fail a change that has no part in it.
    run(cargo().args(["deny", "--locked", "check", "bans", "licenses", "sources"]))
        .context("check the rules in deny.toml")
}
