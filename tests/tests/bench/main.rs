//! The benchmark's shape; its numbers are for machines that do nothing else.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use redirect_tests::process::{binary, finish, succeed};
use serde_json::Value;

#[test]
fn quick_benchmark_measures_everything() -> Result<()> {
    let output = succeed(Command::new(binary("bench")?).args(["--quick", "-o", "json"]))?;
    let document: Value = serde_json::from_slice(&output.stdout).context("read the document")?;
    ensure!(document["apiVersion"] == "redirect-agent.bench/v1", "{document}");
    let medians = document["medians"].as_array().context("no medians")?;
    // iptables-legacy needs ip_tables, which a kernel may lack.
    let left_out = document["leftOut"].as_array().context("nothing about modes left out")?;
    ensure!(left_out.iter().all(|out| out["mode"] == "istio-legacy"), "{left_out:?}");
    let modes = 6 - left_out.len();
    // Two families, six workloads.
    ensure!(medians.len() == 2 * 6 * modes, "{} medians", medians.len());
    for median in medians {
        ensure!(median["rate"].as_f64().is_some_and(|rate| rate > 0.0), "{median}");
        let bulk = median["unit"] == "bytes/s";
        ensure!(
            median["p99_us"].as_f64().is_none_or(|p99| p99 > 0.0)
                && median["p99_us"].is_null() == bulk,
            "{median}"
        );
    }
    let ratios = document["ratios"].as_array().context("no ratios")?;
    ensure!(ratios.len() == 2 * 6 * (modes - 1), "{} ratios", ratios.len());
    // One round proves nothing.
    ensure!(ratios.iter().all(|ratio| ratio["conclusive"] == false), "{ratios:?}");
    Ok(())
}

#[test]
fn wrong_use_is_explained() -> Result<()> {
    for (arguments, explained) in [
        (&["--rounds", "0"][..], "at least one round"),
        (&["--slice", "0"], "--slice"),
        (&["--modes", "baseline"], "--baseline PATH"),
        (&["--baseline", "/nowhere", "--modes", "ours", "--quick"], "/nowhere"),
    ] {
        let (done, said) = finish(Command::new(binary("bench")?).args(arguments))?;
        ensure!(!done && said.contains(explained), "{arguments:?}: {said}");
    }
    Ok(())
}
