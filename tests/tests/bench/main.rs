//! The benchmark's shape; its numbers are for machines that do nothing else.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use redirect_tests::process::{binary, finish, succeed};
use serde_json::Value;

#[test]
fn quick_benchmark_measures_everything() -> Result<()> {
    let output = succeed(Command::new(binary("bench")?).args(["--quick", "-o", "json"]))?;
    let document: Value = serde_json::from_slice(&output.stdout).context("read the document")?;
    ensure!(document["apiVersion"] == "redirect-agent.bench/v2", "{document}");
    let medians = document["medians"].as_array().context("no medians")?;
    // iptables-legacy needs ip_tables, which a kernel may lack.
    let left_out = document["leftOut"].as_array().context("nothing about modes left out")?;
    ensure!(left_out.iter().all(|out| out["mode"] == "istio-legacy"), "{left_out:?}");
    let modes = 7 - left_out.len();
    // Two families, seven workloads.
    ensure!(medians.len() == 2 * 7 * modes, "{} medians", medians.len());
    let positive = |value: &Value| value.as_f64().is_some_and(|value| value > 0.0);
    for median in medians {
        ensure!(positive(&median["rate"]) && positive(&median["cpu_us"]), "{median}");
        let bulk = median["unit"] == "bytes/s";
        ensure!(median["p99_us"].is_null() == bulk, "{median}");
        ensure!(bulk || positive(&median["p99_us"]), "{median}");
        let programs = &median["programs"];
        match median["mode"].as_str() {
            Some("ours") => ensure!(positive(&programs["runs"]), "{median}"),
            // A pod outside the mesh, beside one that has programs: few packets of that one are all.
            Some("outside") => {
                let few = 0.01 * programs["packets"].as_f64().context("no packets")?;
                ensure!(programs["runs"].as_f64().is_some_and(|runs| runs < few), "{median}");
            }
            _ => ensure!(programs.is_null(), "{median}"),
        }
    }
    let held = document["heldMedians"].as_array().context("nothing about open connections")?;
    ensure!(held.len() == 2 * modes, "{held:?}");
    for median in held {
        // By istio-cni's rules both the client's connection and the proxy's are tracked.
        let by_istio_cni = median["mode"].as_str().is_some_and(|mode| mode.starts_with("istio"));
        ensure!(median["conntrack"] == if by_istio_cni { 20_000.0 } else { 0.0 }, "{median}");
    }
    let ratios = document["ratios"].as_array().context("no ratios")?;
    // Ours by each but itself and `outside`, and by istio-cni's best; `outside` by none. Four metrics, of
    // which bulk has two.
    ensure!(ratios.len() == 2 * (5 * 4 + 2 * 2) * modes, "{} ratios", ratios.len());
    for to in ["none", "explicit", "istio-nft", "istio-native", "istio-best"] {
        ensure!(ratios.iter().any(|ratio| ratio["to"] == to), "no ratio to {to}");
    }
    // One round proves nothing.
    for ratio in ratios {
        ensure!(ratio["conclusive"] == false && ratio["doubts"][0] == "few-rounds", "{ratio}");
    }
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
