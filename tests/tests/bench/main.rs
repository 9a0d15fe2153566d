//! The benchmark's shape; its numbers are for machines that do nothing else.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use redirect_tests::process::{binary, finish, succeed};
use serde_json::Value;

#[test]
fn quick_benchmark_measures_everything() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let chart = dir.path().join("chart.svg");
    let mut bench = Command::new(binary("bench")?);
    let output = succeed(bench.args(["--quick", "-o", "json", "--chart"]).arg(&chart))?;
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
    for what in ["kernel", "processor", "date", "commit"] {
        ensure!(document[what].as_str().is_some_and(|what| !what.is_empty()), "{what}");
    }
    let chart = fs::read_to_string(chart).context("read the chart")?;
    // One for ours and one for each of istio-cni's, for rate and for processor time; beside the background and
    // the legend.
    let bars = chart.matches("<rect class=\"").count() - 1 - 4;
    ensure!(bars == 2 * 2 * 7 * (modes - 3), "{bars} bars in {chart}");
    ensure!(chart.contains("prefers-color-scheme: dark"), "{chart}");
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
        (&["--modes", "none,ours", "--chart", "/dev/null"], "explicit"),
        (&["--quick", "--chart", "/nowhere/chart.svg"], "/nowhere/chart.svg"),
        (&["--baseline", "/nowhere", "--modes", "ours", "--quick"], "/nowhere"),
    ] {
        let (done, said) = finish(Command::new(binary("bench")?).args(arguments))?;
        ensure!(!done && said.contains(explained), "{arguments:?}: {said}");
    }
    Ok(())
}

#[test]
fn missing_tool_is_an_error_that_says_what_to_install() -> Result<()> {
    for (mode, package) in [("istio-native", "nftables"), ("istio-legacy", "iptables")] {
        let mut bench = Command::new(binary("bench")?);
        let (done, said) =
            finish(bench.args(["--quick", "--modes", mode]).env("PATH", "/nowhere"))?;
        ensure!(!done && said.contains(&format!("Debian's package {package} ")), "{mode}: {said}");
    }
    Ok(())
}

#[test]
fn mode_that_the_kernel_cannot_run_is_left_out_and_named() -> Result<()> {
    // iptables-legacy on a kernel without ip_tables.
    let dir = tempfile::tempdir()?;
    for program in ["iptables-legacy-restore", "ip6tables-legacy-restore"] {
        let path = dir.path().join(program);
        let script =
            "#!/bin/sh\n[ \"$1\" = --version ] && exit\necho no ip_tables here >&2\nexit 3\n";
        fs::write(&path, script)?;
        fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    }
    let path = std::env::var("PATH").context("read PATH")?;
    let output = succeed(
        Command::new(binary("bench")?)
            .args(["--quick", "--modes", "none,istio-legacy", "--families", "ipv4"])
            .args(["--workloads", "connect1", "--held", "0", "-o", "json"])
            .env("PATH", format!("{}:{path}", dir.path().display())),
    )?;
    let document: Value = serde_json::from_slice(&output.stdout).context("read the document")?;
    let left_out = &document["leftOut"][0];
    let reason = left_out["reason"].as_str().context("no reason")?;
    ensure!(
        left_out["mode"] == "istio-legacy" && reason.contains("no ip_tables here"),
        "{left_out}"
    );
    ensure!(document["medians"].as_array().is_some_and(|m| m.len() == 1), "{document}");
    ensure!(String::from_utf8_lossy(&output.stderr).contains("without istio-legacy"), "{output:?}");
    Ok(())
}
