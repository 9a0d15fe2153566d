//! Where and when something was measured.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use serde::Serialize;

/// A machine, at a time.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// The machine's processor.
    pub processor: String,
    /// How many of them.
    pub cores: usize,
    /// When it began, RFC 3339 in UTC.
    pub date: String,
    /// The source that was built: the commit, with `-dirty` where it was changed since.
    pub commit: String,
    /// Tasks that wanted to run, on average over the last minute, when it began and when it ended: much
    /// more than the benchmark's own means that something else ran.
    pub load: [f64; 2],
}

impl Machine {
    /// Looks at the machine, before anything is measured.
    ///
    /// # Errors
    ///
    /// When it cannot be described.
    pub fn now() -> Result<Self> {
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?,
            processor: processor()?,
            cores: std::thread::available_parallelism().context("count the cores")?.get(),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            commit: commit().unwrap_or_else(|| "unknown".to_owned()),
            load: [load()?; 2],
        })
    }

    /// Looks at its load again, after everything is measured.
    ///
    /// # Errors
    ///
    /// When that cannot be read.
    pub fn ended(self) -> Result<Self> {
        Ok(Self { load: [self.load[0], load()?], ..self })
    }
}

/// How busy the machine has been for a minute.
fn load() -> Result<f64> {
    let text = read("/proc/loadavg")?;
    let first = text.split_whitespace().next().unwrap_or_default();
    first.parse().context("read /proc/loadavg")
}

fn processor() -> Result<String> {
    let text = read("/proc/cpuinfo")?;
    let model = text.lines().find_map(|line| line.strip_prefix("model name"));
    let name = model.and_then(|line| line.split_once(':'));
    Ok(name.map_or("processor".to_owned(), |(_, name)| name.trim().to_owned()))
}

/// `None` without git, or where the source is not a clone.
fn commit() -> Option<String> {
    let mut git = Command::new("git");
    // We are root, and the clone is somebody else's.
    git.args(["-c", "safe.directory=*", "-C"]).arg(Path::new(env!("CARGO_MANIFEST_DIR")));
    git.args(["describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]);
    let output = git.output().ok().filter(|output| output.status.success())?;
    let name = String::from_utf8(output.stdout).ok()?;
    Some(name.trim().to_owned())
}

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    Ok(text.trim().to_owned())
}
