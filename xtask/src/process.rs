//! Other programs: running them, reading them, and running them as root.

use std::{
    env,
    ffi::OsStr,
    io,
    os::fd::AsFd as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

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

/// The cargo that started us, else the one in `PATH`.
pub(crate) fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// `program`, to be run as root: through sudo unless we are root already.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if find("sudo").is_none() {
        bail!(
            "run {} as root: sudo is not installed; install it or start this command as root",
            program.as_ref().display()
        );
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    Ok(command)
}

/// Whether we run as root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Where `program` is: in `PATH`, or where administrators' programs are (users' `PATH`s lack it).
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// The command as one would type it.
fn line(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}
