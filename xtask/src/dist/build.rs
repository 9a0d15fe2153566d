//! Builds the static binary, for this machine's architecture or another.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    process::{cargo, read, run},
    setup,
};

/// What a node's processor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Machine {
    #[value(alias = "x86_64")]
    Amd64,
    #[value(alias = "aarch64")]
    Arm64,
}

impl Machine {
    /// This one's.
    pub(super) fn host() -> Result<Self> {
        match env::consts::ARCH {
            "x86_64" => Ok(Self::Amd64),
            "aarch64" => Ok(Self::Arm64),
            other => bail!("build for {other}: the agent knows amd64 and arm64"),
        }
    }

    /// As Rust and `uname -m` call it.
    pub(super) fn arch(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// As Debian and image registries call it.
    pub(super) fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Rust's target.
    pub(super) fn target(self) -> String {
        format!("{}-unknown-linux-gnu", self.arch())
    }

    /// The C compiler that links for it.
    fn cc(self) -> Result<String> {
        let native = self == Self::host()?;
        Ok(if native { "cc".to_owned() } else { format!("{}-linux-gnu-gcc", self.arch()) })
    }
}

/// A binary, and what of its toolchain is in it.
pub(super) struct Built {
    pub(super) machine: Machine,
    pub(super) path: PathBuf,
    /// The version of Rust's standard library.
    pub(super) rust: String,
    /// The version of glibc.
    pub(super) glibc: String,
}

/// Builds the binary. It needs nothing of the system that it runs on: the CNI plugin is the same
/// one, and runs on any node.
pub(super) fn binary(machine: Machine, target_dir: &Path, epoch: u64) -> Result<Built> {
    let target = machine.target();
    if machine != Machine::host()? {
        setup::for_cross_building(machine.arch(), machine.debian(), setup::Report::Changes)?;
    }
    let toolchain = Toolchain::for_target(&target)?;
    let cc = machine.cc()?;
    let linker = format!("CARGO_TARGET_{}_LINKER", target.to_uppercase().replace('-', "_"));
    let mut command = toolchain.cargo();
    command.arg("build").args(toolchain.build_std());
    run(command
        .args(["--release", "--locked", "--package", "redirect-agent", "--bins"])
        .args(["--target", &target])
        .arg("--target-dir")
        .arg(target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags()?.join("\x1f"))
        .env(linker, &cc)
        .env("CARGO_INCREMENTAL", "0")
        .env("SOURCE_DATE_EPOCH", epoch.to_string()))
    .with_context(|| format!("build the static binary for {target}"))?;
    let path = target_dir.join(&target).join("release/redirect-agent");
    check_static(&path)?;
    Ok(Built { machine, path, rust: toolchain.release()?, glibc: glibc(&cc)? })
}

fn rustflags() -> Result<[String; 4]> {
    let here = env::current_dir().context("find this directory")?;
    let home = cargo_home()?;
    Ok([
        "-Ctarget-feature=+crt-static".to_owned(),
        // Backtraces keep the names of functions.
        "-Cstrip=debuginfo".to_owned(),
        format!("--remap-path-prefix={}=/source", here.display()),
        format!("--remap-path-prefix={}=/cargo", home.display()),
    ])
}

fn cargo_home() -> Result<PathBuf> {
    match env::var_os("CARGO_HOME") {
        Some(home) => Ok(home.into()),
        None => {
            Ok(PathBuf::from(env::var_os("HOME").context("find HOME: it is not set")?)
                .join(".cargo"))
        }
    }
}

fn check_static(binary: &Path) -> Result<()> {
    let kind = read(Command::new("readelf").arg("-lW").arg(binary))
        .context("look at the binary; readelf comes with the C linker (binutils)")?;
    if kind.lines().any(|line| line.trim_start().starts_with("INTERP")) {
        bail!("link {} statically: it asks for a dynamic loader", binary.display());
    }
    Ok(())
}

/// Who compiles.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Toolchain {
    /// The one that runs us, which has the target's standard library.
    Ours,
    /// The nightly that compiles the kernel programs, and with it the standard library: where rustup has
    /// no server.
    Nightly,
}

impl Toolchain {
    fn for_target(target: &str) -> Result<Self> {
        let libraries =
            read(Self::Ours.rustc().args(["--print", "target-libdir", "--target", target]))?;
        if Path::new(&libraries).is_dir() {
            return Ok(Self::Ours);
        }
        let mut rustup = Command::new("rustup");
        // It may fail in the ordinary course of things: a backtrace would look as if we had.
        rustup.args(["target", "add", target]).env("RUST_BACKTRACE", "0");
        match run(&mut rustup) {
            Ok(()) => Ok(Self::Ours),
            Err(error) => {
                eprintln!(
                    "dist: rustup cannot ({error}); compiling Rust's standard library with the nightly toolchain"
                );
                Ok(Self::Nightly)
            }
        }
    }

    fn cargo(self) -> Command {
        match self {
            Self::Ours => cargo(),
            Self::Nightly => self.nightly("cargo"),
        }
    }

    fn rustc(self) -> Command {
        match self {
            Self::Ours => Command::new("rustc"),
            Self::Nightly => self.nightly("rustc"),
        }
    }

    fn nightly(self, program: &str) -> Command {
        let mut rustup = Command::new("rustup");
        rustup.args(["run", "nightly", program]);
        rustup
    }

    fn build_std(self) -> &'static [&'static str] {
        match self {
            Self::Ours => &[],
            Self::Nightly => &["-Zbuild-std=std,panic_abort"],
        }
    }

    /// `1.95.0`
    fn release(self) -> Result<String> {
        let version = read(self.rustc().arg("-vV"))?;
        let release = version.lines().find_map(|line| line.strip_prefix("release: "));
        Ok(release.context("find the release in the output of `rustc -vV`")?.to_owned())
    }
}

/// The version of the C library that `cc` links.
fn glibc(cc: &str) -> Result<String> {
    let mut command = Command::new(cc);
    let macros =
        read(command.args(["-E", "-dM", "-include", "features.h", "-x", "c", "/dev/null"]))?;
    let value = |name: &str| {
        let line = macros.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
        line.with_context(|| format!("find {name} in what {cc} defines"))
    };
    Ok(format!("{}.{}", value("__GLIBC__")?, value("__GLIBC_MINOR__")?))
}
