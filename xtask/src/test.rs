//! `cargo xtask test`: all tests of the workspace, on real packets, and nothing left behind.

use std::{
    env,
    ffi::OsString,
    io::{BufRead as _, BufReader, Write as _},
    num::NonZero,
    process::{Command, Stdio},
    thread,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    leftovers::{self, Snapshot},
    process::{become_root, cargo, run},
    setup,
};

/// Which tests to run, and how.
pub(crate) struct Tests {
    /// Only those of these packages; empty: of all.
    pub(crate) packages: Vec<String>,
    /// What the test programs get.
    pub(crate) harness: Vec<OsString>,
    /// What their environment has besides ours.
    pub(crate) environment: Vec<(&'static str, String)>,
    /// Whether those that failed get another chance, alone.
    pub(crate) again: bool,
}

/// Runs the scenario of random events for so long.
pub(crate) fn soak(minutes: u32, seed: Option<u64>) -> Result<()> {
    let seconds = minutes.checked_mul(60).context("that is too long")?;
    let seed = match seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    eprintln!("soak: {minutes} min of random events under load; --seed {seed} repeats their order");
    run_all(&Tests {
        packages: vec!["redirect-tests".to_owned()],
        harness: ["soak::", "--nocapture"].map(OsString::from).into(),
        environment: vec![
            ("REDIRECT_SOAK_SECONDS", seconds.to_string()),
            ("REDIRECT_SOAK_SEED", seed.to_string()),
        ],
        again: false,
    })
}

/// Builds as whoever started us, then runs the tests as root.
pub(crate) fn run_all(tests: &Tests) -> Result<()> {
    let Tests { packages, again, .. } = tests;
    setup::everything(setup::Report::Changes)?;
    // The scenarios start the agent as a program.
    run(cargo().args(["build", "--workspace", "--bins", "--locked"])).context("build")?;
    run(cargo_test(packages).arg("--no-run")).context("build the tests")?;
    become_root()?;

    let started = Instant::now();
    leftovers::isolate()?;
    let before = Snapshot::take()?;
    let (mut passed, summary) = run_tests(tests)?;
    let failed: Vec<_> = summary.failures.iter().map(String::as_str).collect();
    let flaky = !passed && *again && pass_alone(tests, &failed)?;
    let left = leftovers::since(&before)?;

    eprintln!("\ntest: {summary} in {} s", started.elapsed().as_secs());
    for name in &failed {
        let how = if flaky { "flaky: failed once, then passed alone" } else { "failed" };
        eprintln!("test: {how}: {name}");
        for line in summary.said(name) {
            eprintln!("test:     {line}");
        }
    }
    passed |= flaky;
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

/// What the fuzz tests begin with; source: bolero.
const FUZZ_SEED: &str = "BOLERO_RANDOM_SEED";
/// How many tests run at once; source: libtest.
const THREADS: &str = "RUST_TEST_THREADS";
/// Scenarios wait for half of their time: for grace periods, time-outs and the next attempt.
const TESTS_PER_CPU: usize = 2;
/// More failures than these have a common cause.
const MOST_FLAKY: usize = 3;
/// How often in a row a test has to pass alone, after it has failed among all the others.
const TIMES_ALONE: usize = 3;

/// Whether all tests that failed pass when nothing else runs. The scenarios have deadlines, and a machine
/// that stands still for a second misses some. Each is reported all the same.
fn pass_alone(tests: &Tests, failed: &[&str]) -> Result<bool> {
    if failed.is_empty() || failed.len() > MOST_FLAKY {
        return Ok(false);
    }
    let mut harness = ["--exact", "--test-threads=1"].map(OsString::from).to_vec();
    harness.extend(failed.iter().map(OsString::from));
    let (packages, environment) = (tests.packages.clone(), tests.environment.clone());
    let alone = Tests { packages, harness, environment, again: false };
    for time in 1..=TIMES_ALONE {
        eprintln!("\ntest: what failed runs again, alone ({time} of {TIMES_ALONE}) …");
        let (passed, summary) = run_tests(&alone)?;
        if !passed || summary.passed < failed.len() {
            return Ok(false);
        }
    }
    Ok(true)
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
fn run_tests(tests: &Tests) -> Result<(bool, Summary)> {
    let mut child = cargo_test(&tests.packages)
        .arg("--")
        .args(&tests.harness)
        // The same inputs each time, unless somebody fuzzes.
        .env(FUZZ_SEED, env::var_os(FUZZ_SEED).unwrap_or_else(|| "1".into()))
        .env(THREADS, env::var_os(THREADS).unwrap_or_else(|| threads().to_string().into()))
        .envs(tests.environment.iter().map(|(name, value)| (name, value)))
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

fn threads() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get) * TESTS_PER_CPU
}

/// The sums over all test programs.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    passed: usize,
    failed: usize,
    ignored: usize,
    pub(crate) failures: Vec<String>,
    /// What each test that failed printed: its name, and the lines.
    said: Vec<(String, Vec<String>)>,
    /// The line belongs to the last of them.
    saying: bool,
}

impl Summary {
    /// Takes in one line of a test program's output.
    pub(crate) fn add(&mut self, line: &str) {
        // "---- a::b stdout ----", what it printed, and so on, then "failures:" and the names.
        if let Some(name) =
            line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.said.push((name.to_owned(), Vec::new()));
            self.saying = true;
        } else if line == "failures:" {
            self.saying = false;
        } else if self.saying
            && let Some((_, lines)) = self.said.last_mut()
        {
            lines.push(line.to_owned());
        }
        if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.push(name.to_owned());
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        self.saying = false;
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

impl Summary {
    /// The last lines that a test which failed printed, without empty ones and backtraces.
    fn said(&self, name: &str) -> impl Iterator<Item = &str> {
        const LINES: usize = 20;
        let of_it = self.said.iter().filter(move |(test, _)| test == name);
        let lines: Vec<_> = of_it
            .flat_map(|(_, lines)| {
                lines.split(|line| line.trim().eq_ignore_ascii_case("stack backtrace:")).next()
            })
            .flatten()
            .filter(|line| !line.is_empty())
            .collect();
        let surplus = lines.len().saturating_sub(LINES);
        lines.into_iter().skip(surplus).map(String::as_str)
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
    fn sums_and_what_failed_go_over_all_test_programs() {
        let mut summary = Summary::default();
        for line in [
            "running 2 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "",
            "failures:",
            "",
            "---- a::c stdout ----",
            "Error: find it",
            "",
            "Caused by:",
            "    it is away",
            "Stack backtrace:",
            "   0: somewhere",
            "",
            "failures:",
            "    a::c",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.02s",
            "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 7 filtered out; finished in 1.50s",
        ] {
            summary.add(line);
        }
        assert_eq!((summary.passed, summary.failed, summary.ignored), (13, 1, 3));
        assert_eq!(summary.failures, ["a::c"]);
        let said: Vec<_> = summary.said("a::c").collect();
        assert_eq!(said, ["Error: find it", "Caused by:", "    it is away"]);
        assert_eq!(summary.said("a::b").count(), 0);
        assert_eq!(summary.to_string(), "13 passed, 1 failed, 3 ignored");
    }
}
