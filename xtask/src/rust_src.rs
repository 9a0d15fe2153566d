//! core's source, which `-Z build-std=core` compiles: whether the toolchain has it, and Debian's
//! package of it for places where rustup has no server.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    apt::Apt,
    process::{read, run},
    setup::Nightly,
};

/// The suites to look into: older compilers are still in the older ones.
const SUITES: &[&str] = &["sid", "testing", "stable"];

/// Says where the source that `nightly` has came from, or `None` if it has none that fits.
///
/// Debian's source for a nightly that has been replaced since is removed.
pub(crate) fn installed(nightly: &Nightly) -> Result<Option<String>> {
    let library = library(nightly);
    if !(library.join("Cargo.lock").is_file() && library.join("core/src/lib.rs").is_file()) {
        return Ok(None);
    }
    let origin = fs::read_to_string(origin_file(nightly)).unwrap_or_default();
    let Some((version, rustc)) = origin.trim_end().split_once('\n') else {
        return Ok(Some("rustup's".to_owned()));
    };
    if rustc == nightly.name() {
        return Ok(Some(format!("Debian's {version}")));
    }
    for path in [library, origin_file(nightly)] {
        run(Command::new("rm").arg("-rf").arg(path))?;
    }
    Ok(None)
}

/// Puts the source of Debian's nearest `rust-src` into the toolchain; returns its version.
pub(crate) fn install_from_debian(nightly: &Nightly, scratch: &Path) -> Result<String> {
    let apt = Apt::update(scratch, SUITES.iter().map(|suite| ("debian", *suite)))?;
    let listed = read(apt.command("apt-cache").args(["madison", "rust-src"]))?;
    let available: Vec<_> =
        listed.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim).collect();
    let release = nightly.release()?;
    let version = choose(release, &available)
        .with_context(|| format!("choose a rust-src for {release} among {available:?}"))?;
    apt.download(&[format!("rust-src={version}")])?;

    let deb = scratch.join(format!("rust-src_{}_all.deb", version.replace(':', "%3a")));
    let staging = library(nightly).with_extension("new");
    unpack(&deb, &staging)?;
    let library = library(nightly);
    fs::rename(&staging, &library).with_context(|| format!("create {}", library.display()))?;
    let origin = origin_file(nightly);
    fs::write(&origin, format!("{version}\n{}\n", nightly.name()))
        .with_context(|| format!("write {}", origin.display()))?;
    fs::remove_dir_all(scratch).with_context(|| format!("remove {}", scratch.display()))?;
    Ok(version.to_owned())
}

fn library(nightly: &Nightly) -> PathBuf {
    nightly.sysroot.join("lib/rustlib/src/rust/library")
}

/// Debian's version and the rustc it was chosen for, a line each; rustup's source has no such file.
fn origin_file(nightly: &Nightly) -> PathBuf {
    nightly.sysroot.join("lib/rustlib/src/rust/from-debian")
}

/// Unpacks `usr/src/rustc-*/library` of a Debian package into `directory`.
fn unpack(deb: &Path, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let mut dpkg = Command::new("dpkg")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("start dpkg")?;
    let archive = dpkg.stdout.take().context("read from dpkg")?;
    let unpacked = run(Command::new("tar")
        .arg("--extract")
        .arg("--directory")
        .arg(directory)
        .args([
            "--no-same-owner",
            "--strip-components=5",
            "--wildcards",
            "./usr/src/rustc-*/library/*",
        ])
        .stdin(archive));
    let status = dpkg.wait().context("wait for dpkg")?;
    if !status.success() {
        bail!("unpack {}: dpkg: {status}", deb.display());
    }
    unpacked.with_context(|| format!("unpack {}", deb.display()))
}

/// Of Debian's `available` versions, the newest with the major and minor number of `release`, else
/// the nearest to it.
fn choose<'a>(release: &str, available: &[&'a str]) -> Option<&'a str> {
    let wanted = parse(release)?;
    available
        .iter()
        .filter_map(|version| Some((parse(version)?, *version)))
        .min_by_key(|((major, minor, patch), _)| {
            let distance = (major.abs_diff(wanted.0), minor.abs_diff(wanted.1));
            (distance, std::cmp::Reverse((*major, *minor, *patch)))
        })
        .map(|(_, version)| version)
}

/// The numbers at the start of `1.97.0-nightly` and of `1.97.1+dfsg1-1`.
fn parse(version: &str) -> Option<(u32, u32, u32)> {
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(version.len());
    let mut numbers = version[..end].split('.').map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some((next()?, next()?, next()?))
}

#[cfg(test)]
mod tests {
    use super::{choose, parse};

    #[test]
    fn newest_of_the_same_minor_wins() {
        let available = ["1.98.0+dfsg1-1", "1.97.0+dfsg1-2", "1.97.1+dfsg1-1", "1.85.0+dfsg3-1"];
        assert_eq!(choose("1.97.0-nightly", &available), Some("1.97.1+dfsg1-1"));
    }

    #[test]
    fn without_the_same_minor_the_nearest_wins() {
        let available = ["1.63.0+dfsg1-2", "1.85.0+dfsg3-1", "1.97.1+dfsg1-1"];
        assert_eq!(choose("1.99.0-nightly", &available), Some("1.97.1+dfsg1-1"));
        assert_eq!(choose("1.70.0-nightly", &available), Some("1.63.0+dfsg1-2"));
    }

    #[test]
    fn of_two_as_near_the_newer_wins() {
        assert_eq!(
            choose("1.97.0-nightly", &["1.96.0+dfsg1-1", "1.98.0+dfsg1-1"]),
            Some("1.98.0+dfsg1-1")
        );
    }

    #[test]
    fn what_is_no_version_is_not_chosen() {
        assert_eq!(choose("1.97.0-nightly", &["", "rust", "1.97"]), None);
        assert_eq!(choose("nightly", &["1.97.1+dfsg1-1"]), None);
        assert_eq!(choose("1.97.0-nightly", &[]), None);
    }

    #[test]
    fn versions_of_rustc_and_of_debian_are_read() {
        assert_eq!(parse("1.97.0-nightly"), Some((1, 97, 0)));
        assert_eq!(parse("1.97.1+dfsg1-1"), Some((1, 97, 1)));
        assert_eq!(parse("1.85.0~bpo12+1"), Some((1, 85, 0)));
    }
}
