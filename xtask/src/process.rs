//! Other programs: running them, reading them, and running them as root.

use std::{
    env,
    ffi::{OsStr, OsString},
    io,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Where administrators' programs are; users' `PATH`s lack them.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// What sudo would drop and what decides which toolchain is used and where things are built.
const KEPT: &[&str] = &[
    "HOME",
    "CARGO",
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "REDIRECT_TOOLS_DIR",
    "XDG_CACHE_HOME",
    "RUST_BACKTRACE",
    "RUST_LOG",
    "NO_COLOR",
];

/// Runs `command` to its end; what it prints goes to our stderr.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let stderr = io::stderr().as_fd().try_clone_to_owned().context("duplicate stderr")?;
    let status = command
        .stdout(Stdio::from(stderr))
        .status()
        .with_context(|| format!("start {}", line(command)))?;
    if !status.success() {
        bail!("run {}: {status}", line(command));
    }
    Ok(())
}

/// Runs `command` to its end and returns what it printed, without the last newline.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", line(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("run {}: {}: {}", line(command), output.status, stderr.trim());
    }
    let stdout = String::from_utf8(output.stdout)
        .with_context(|| format!("read the output of {}", line(command)))?;
    Ok(stdout.trim_end().to_owned())
}

/// Replaces this process by `command`, so that signals reach it; returns only why that failed.
pub(crate) fn replace_by(command: &mut Command) -> anyhow::Error {
    let error = command.exec();
    anyhow::Error::new(error).context(format!("start {}", line(command)))
}

/// The cargo that started us, else the one in `PATH`.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// `program`, to be run as root: through sudo, with [`KEPT`] and [`path`], unless we are root.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    let program = program.as_ref();
    if nix::unistd::geteuid().is_root() {
        let mut command = Command::new(program);
        command.env("PATH", path()?);
        return Ok(command);
    }
    if find("sudo").is_none() {
        bail!(
            "run {} as root: sudo is not installed; install it or start this command as root",
            program.display()
        );
    }
    let mut command = Command::new("sudo");
    command.arg("env").arg(assignment("PATH", path()?));
    for name in KEPT {
        if let Some(value) = env::var_os(name) {
            command.arg(assignment(name, value));
        }
    }
    command.arg(program);
    Ok(command)
}

/// Starts this very command again as root, unless we are root already.
pub(crate) fn become_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let this = env::current_exe().context("find the path of this program")?;
    Err(replace_by(as_root(this)?.args(env::args_os().skip(1))))
}

/// Where `program` is, in [`path`].
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = path().ok()?;
    env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// `PATH`, and after it the directories of administrators' programs.
pub(crate) fn path() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<_> = env::split_paths(&path).collect();
    for sbin in SBIN.map(PathBuf::from) {
        if !directories.contains(&sbin) {
            directories.push(sbin);
        }
    }
    env::join_paths(directories).context("extend PATH")
}

fn assignment(name: &str, value: OsString) -> OsString {
    let mut assignment = OsString::from(name);
    assignment.push("=");
    assignment.push(value);
    assignment
}

/// The command as one would type it.
fn line(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}
