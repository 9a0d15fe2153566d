//! `cargo xtask dist`: what is released. The static binary, the image, the Debian package and the
//! bill of materials, for one architecture or more.
//!
//! | in `target/dist` | what it is |
//! |---|---|
//! | `rootfs/MACHINE/` | the image's content; `deploy/Dockerfile` copies it |
//! | `redirect-agent-VERSION-ARCH` | the binary |
//! | `redirect-agent-VERSION-ARCH.tar` | `rootfs/MACHINE` as an archive |
//! | `redirect-agent-VERSION-ARCH.oci.tar` | the image, as `ctr image import`, `podman load` and `skopeo` take it |
//! | `redirect-agent-VERSION-ARCH.cdx.json` | what the binary is made of, in CycloneDX 1.5 |
//! | `redirect-agent_VERSION_MACHINE.deb` | the Debian package |
//! | `redirect-agent-VERSION.oci.tar` | one image for several architectures, if several were built |
//! | `SHA256SUMS` | of all these files |
//!
//! ARCH is `x86_64` or `aarch64`, as Rust and the kernel call it; MACHINE is `amd64` or `arm64`, as
//! Debian and image registries do.
//!
//! Everything is the same, byte by byte, for the same source at the same path with the same
//! toolchains. Times are that of the commit, or `SOURCE_DATE_EPOCH`.

mod archive;
mod build;
mod deb;
mod image;
mod sbom;

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

pub(crate) use self::build::Machine;
use self::{
    archive::{archive, put, remove},
    build::Built,
    image::Image,
};
use crate::{process::read, setup};

/// Where everything is put.
const DIST: &str = "target/dist";
/// Where it is built.
const BUILD: &str = "target/dist-build";
/// Where `--check` does both a second time.
const SECOND: &str = "target/dist-check";
/// The binary in the image.
const BINARY: &str = "usr/local/bin/redirect-agent";
/// What goes with it.
const LICENSES: [&str; 3] = ["LICENSE", "LICENSES/GPL-2.0-only.txt", "LICENSES/BSD-3-Clause.txt"];
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Builds all of it for `machines`, else for this one; with `check` a second time, from nothing, and
/// compares.
pub(crate) fn make(machines: &[Machine], check: bool) -> Result<()> {
    let mut machines = match machines {
        [] => vec![Machine::host()?],
        machines => machines.to_vec(),
    };
    machines.sort_unstable();
    machines.dedup();
    setup::for_building(setup::Report::Changes)?;
    let epoch = epoch()?;
    let all = |dist: &Path, build: &Path| {
        let built = machines.iter().map(|machine| build::binary(*machine, build, epoch));
        assemble(dist, &built.collect::<Result<Vec<_>>>()?, epoch)
    };
    let sums = all(Path::new(DIST), Path::new(BUILD))?;
    if check {
        let second = Path::new(SECOND);
        remove(second)?;
        let again = all(&second.join("dist"), &second.join("build"))?;
        ensure!(sums == again, "build it twice: it differs\n{sums}\n{again}");
        remove(second)?;
        eprintln!("dist: a second build is the same, byte by byte");
    }
    eprint!("dist: {DIST}\n{sums}");
    Ok(())
}

/// Seconds since 1970 of the source.
fn epoch() -> Result<u64> {
    let epoch = match env::var("SOURCE_DATE_EPOCH") {
        Ok(epoch) => epoch,
        Err(_) => read(Command::new("git").args(["log", "-1", "--format=%ct"]))
            .context("find out how old the source is; without git, set SOURCE_DATE_EPOCH")?,
    };
    epoch.parse().with_context(|| format!("read SOURCE_DATE_EPOCH: {epoch:?}"))
}

/// Puts what is released of the binaries into `dist`; the checksums.
fn assemble(dist: &Path, built: &[Built], epoch: u64) -> Result<String> {
    remove(dist)?;
    let mut files = Vec::new();
    let mut images = Vec::new();
    for one in built {
        let name = format!("redirect-agent-{VERSION}-{}", one.machine.arch());
        let binary = fs::read(&one.path).with_context(|| format!("read {}", one.path.display()))?;
        let rootfs = dist.join("rootfs").join(one.machine.debian());
        fill_rootfs(&rootfs, &binary)?;
        let layer = archive(&rootfs, epoch)?;
        let image = Image::new(layer.clone(), one.machine, epoch)?;
        let bill = sbom::document(one, &binary, epoch)
            .with_context(|| format!("write the bill of materials of {name}"))?;
        let package = deb::package(&dist.join("deb"), one.machine, &binary, epoch)
            .with_context(|| format!("make the Debian package for {}", one.machine.debian()))?;
        files.extend([
            (format!("{name}.tar"), layer),
            (format!("{name}.oci.tar"), image::layout(&dist.join("image"), &[&image], epoch)?),
            (format!("{name}.cdx.json"), bill),
            (format!("redirect-agent_{VERSION}_{}.deb", one.machine.debian()), package),
            (name, binary),
        ]);
        images.push(image);
    }
    if images.len() > 1 {
        let images: Vec<&Image> = images.iter().collect();
        let all = image::layout(&dist.join("image"), &images, epoch)?;
        files.push((format!("redirect-agent-{VERSION}.oci.tar"), all));
    }
    let mut sums = String::new();
    for (file, bytes) in &files {
        put(&dist.join(file), bytes)?;
        sums += &format!("{:x}  {file}\n", Sha256::digest(bytes));
    }
    for one in built {
        executable(&dist.join(format!("redirect-agent-{VERSION}-{}", one.machine.arch())))?;
    }
    put(&dist.join("SHA256SUMS"), sums.as_bytes())?;
    Ok(sums)
}

/// What is in the image.
fn fill_rootfs(rootfs: &Path, binary: &[u8]) -> Result<()> {
    put(&rootfs.join(BINARY), binary)?;
    executable(&rootfs.join(BINARY))?;
    for license in LICENSES {
        let text = read_source(license)?;
        let name = Path::new(license).file_name().unwrap_or_default();
        put(&rootfs.join("licenses").join(name), text.as_bytes())?;
    }
    // As on nodes, so that a network namespace has both of its names in the container, too.
    for dir in ["run", "var"] {
        fs::create_dir_all(rootfs.join(dir)).with_context(|| format!("create /{dir}"))?;
    }
    symlink("../run", rootfs.join("var/run")).context("link /var/run to /run")
}

/// A text of the repository.
fn read_source(path: &str) -> Result<String> {
    fs::read_to_string(Path::new(ROOT).join(path)).with_context(|| format!("read {path}"))
}

fn executable(file: &Path) -> Result<()> {
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("make {} executable", file.display()))
}

/// A moment as `date` writes it.
fn date(epoch: u64, format: &str) -> Result<String> {
    let mut date = Command::new("date");
    read(date.env("LC_ALL", "C").args(["--utc", "--date", &format!("@{epoch}"), format]))
}

fn rfc3339(epoch: u64) -> Result<String> {
    date(epoch, "+%Y-%m-%dT%H:%M:%SZ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a build leaves, with a text in the place of the binary.
    fn built(dir: &Path, machine: Machine) -> Built {
        let path = dir.join(machine.arch());
        put(&path, b"not really a binary").unwrap();
        Built { machine, path, rust: "1.95.0".to_owned(), glibc: "2.36".to_owned() }
    }

    #[test]
    fn release_of_two_architectures_is_complete_and_the_same_again() {
        let dir = tempfile::tempdir().unwrap();
        let both = [built(dir.path(), Machine::Amd64), built(dir.path(), Machine::Arm64)];
        let make = |name: &str| assemble(&dir.path().join(name), &both, 7).unwrap();
        let sums = make("first");
        assert_eq!(sums, make("second"));

        let dist = dir.path().join("first");
        let mut expected = vec!["SHA256SUMS".to_owned(), "rootfs".to_owned()];
        expected.push(format!("redirect-agent-{VERSION}.oci.tar"));
        for (arch, debian) in [("x86_64", "amd64"), ("aarch64", "arm64")] {
            for end in ["", ".cdx.json", ".oci.tar", ".tar"] {
                expected.push(format!("redirect-agent-{VERSION}-{arch}{end}"));
            }
            expected.push(format!("redirect-agent_{VERSION}_{debian}.deb"));
        }
        expected.sort_unstable();
        let entries = fs::read_dir(&dist).unwrap();
        let mut files: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        files.sort_unstable();
        assert_eq!(files, expected);

        // Every file but the sums themselves.
        assert_eq!(sums.lines().count(), expected.len() - 2);
        let mut check = Command::new("sha256sum");
        read(check.current_dir(&dist).args(["--check", "--strict", "SHA256SUMS"])).unwrap();
    }
}
