//! `cargo xtask test`: all tests of the workspace, on real packets, and nothing left behind.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    leftovers::{self, Snapshot},
    process::{become_root, cargo, run},
    setup,
};

/// Builds as whoever started us, then runs the tests as root.
pub(crate) fn run_all(packages: &[String], harness: &[OsString]) -> Result<()> {
    setup::everything(setup::Report::Changes)?;
    // The scenarios start the agent as a program.
    run(cargo().args(["build", "--workspace", "--bins", "--locked"])).context("build")?;
    run(cargo_test(packages).arg("--no-run")).context("build the tests")?;
    become_root()?;

    let started = Instant::now();
    leftovers::isolate()?;
    let before = Snapshot::take()?;
    let (passed, summary) = run_tests(packages, harness)?;
    let left = leftovers::since(&before)?;

    eprintln!("\ntest: {summary} in {} s", started.elapsed().as_secs());
    for name in &summary.failures {
        eprintln!("test: failed: {name}");
    }
    for thing in &left {
        eprintln!("test: left behind: {thing}");
    }
    if !passed {
        bail!("run the tests: not all passed");
    }
    if !left.is_empty() {
        bail!("clean up after the tests: {} things are left behind", left.len());
    }
    eprintln!("test: nothing left behind");
    Ok(())
}

fn cargo_test(packages: &[String]) -> Command {
    let mut command = cargo();
    command.args(["test", "--locked", "--no-fail-fast"]);
    if packages.is_empty() {
        command.arg("--workspace");
    }
    for package in packages {
        command.args(["--package", package]);
    }
    command
}

/// Runs the tests, passing on what they print; says whether all passed, and the sums.
fn run_tests(packages: &[String], harness: &[OsString]) -> Result<(bool, Summary)> {
    let mut child = cargo_test(packages)
        .arg("--")
        .args(harness)
        // kubectl and helm, of the versions that we know.
        .env("PATH", setup::path_with_tools()?)
        .stdout(Stdio::piped())
        .spawn()
        .context("start cargo test")?;
    let stdout = child.stdout.take().context("read from cargo test")?;
    let mut summary = Summary::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("read from cargo test")?;
        let mut out = std::io::stdout().lock();
        out.write_all(&line).and_then(|()| out.write_all(b"\n")).context("write to stdout")?;
        summary.add(&String::from_utf8_lossy(&line));
    }
    let status = child.wait().context("wait for cargo test")?;
    Ok((status.success(), summary))
}

/// The sums over all test programs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    passed: usize,
    failed: usize,
    ignored: usize,
    pub(crate) failures: Vec<String>,
}

impl Summary {
    /// Takes in one line of a test program's output.
    pub(crate) fn add(&mut self, line: &str) {
        if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        // "ok. 12 passed; 0 failed; 1 ignored; 0 measured; …"
        for part in result.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(what)) = (words.next(), words.next()) else { continue };
            let Ok(number) = number.parse::<usize>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} ignored", self.passed, self.failed, self.ignored)
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn sums_go_over_all_test_programs() {
        let mut summary = Summary::default();
        for line in [
            "running 2 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.02s",
            "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 7 filtered out; finished in 1.50s",
        ] {
            summary.add(line);
        }
        let failures = vec!["a::c".to_owned()];
        assert_eq!(summary, Summary { passed: 13, failed: 1, ignored: 3, failures });
        assert_eq!(summary.to_string(), "13 passed, 1 failed, 3 ignored");
    }
}
